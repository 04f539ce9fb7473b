"""Where a run stands, and how busy the machine is; anew every two seconds, until the key q.

    python tools/watch.py runs/tiny           # from any terminal, while it trains or after
    python tools/watch.py runs/tiny | cat     # once, if the output is no terminal

It reads the run's logs and asks the GPU's driver. The run does not notice. In the chain's tmux session,
`bash run_all_stages.sh --tmux`, the second window shows this."""

import contextlib
import json
import math
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clap2diffusion.base.exits import UserError, run_main  # noqa: E402
from clap2diffusion.base.settings import Number, new_parser  # noqa: E402
from clap2diffusion.engine.watching import Driver, describe  # noqa: E402

EVERY_S = 2
TAIL_BYTES = 200_000  # of a log: a validation's line has 2 kB
SHOWN = ("loss", "grad_norm", "lr", "tanh_gate")
# a screen of its own without a cursor, on which a line too wide (a letter may take two places) is cut; back
TERMINAL = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
FULL, EMPTY, CURVE = "█", "░", "▁▂▃▄▅▆▇█"
ASCII = str.maketrans(f"{FULL}{EMPTY}{CURVE}°", "#.12345678 ")  # for a terminal without them
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def build_parser():
    parser = new_parser(__doc__)
    parser.add_argument("run", nargs="?", default="runs/tiny", help="run folder")
    parser.add_argument("--until", type=Number(int, 0, 2 ** 31 - 1), default=0, metavar="PID",
                        help="wait for a run that has not begun, and end with this process")
    return parser


def last_lines(path: Path) -> list[str]:
    """Those of a log's end that are whole; none of a log that cannot be read."""
    try:  # --fresh may just have moved it away
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    return lines[size > TAIL_BYTES:-1]


def read_object(text: str) -> dict:
    """A JSON object; {} of half a line, or of a file that is being written."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}


def read_file(path: Path) -> dict:
    try:
        return read_object(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def clock(seconds: float) -> str:
    seconds = int(max(0, seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def draw_bar(share: float, width: int) -> str:
    full = round(min(1, max(0, share)) * width)
    return FULL * full + EMPTY * (width - full)


def draw_curve(values: list[float], width: int) -> str:
    """Means of `width` pieces of a curve, from the lowest to the highest."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    pieces = min(width, len(values))
    cuts = [len(values) * piece // pieces for piece in range(pieces + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, high = min(means), max(means)
    return "".join(CURVE[int(7.99 * (mean - low) / (high - low or 1))] for mean in means)


def describe_stage(folder: Path) -> list[str]:
    """Lines on one stage, the first with its name."""
    try:
        return list(_describe_stage(folder))
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        return [f"{folder.name}  cannot be read now ({type(error).__name__}: {error})"]


def _describe_stage(folder: Path) -> Iterator[str]:
    name, steps = folder.name, read_file(folder / "config.json").get("steps", 0)
    result = read_file(folder / "result.json")
    if result and (folder / "final.safetensors").exists():
        right = result["validation"]["val_right"][0]
        yield f"{name}  done at step {result['steps']:,} ({result['ended']}), val_right {right:.5f}"
        return
    lines = [read_object(line) for line in last_lines(folder / "log.jsonl")]
    logged = [line for line in lines if "loss" in line]
    if not steps:
        yield f"{name}  not begun"
        return
    if not logged:
        yield f"{name}  before its first log line, of {steps:,} steps"
        return
    newest = logged[-1]
    step, pace = newest["step"], newest.get("s_per_step", 0)
    yield f"{name}  {draw_bar(step / steps, 24)}  {step:,} of {steps:,} ({step / steps:.0%})"
    indent, age = " " * (len(name) + 2), time.time() - (folder / "log.jsonl").stat().st_mtime
    yield (f"{indent}{pace:.3g} s a step, at least {clock(pace * (steps - step))} left; last log line "
           f"{clock(age)} ago")
    yield f"{indent}{describe(newest)}, {newest.get('memory_mb', 0):,.0f} MB at most"
    yield indent + ", ".join(f"{key} {newest[key]:.4g}" for key in SHOWN if key in newest)
    yield f"{indent}{draw_curve([line['loss'] for line in logged], 40)}  loss, {len(logged)} log lines"
    validations = [line["val_right"][0] for line in lines if "val_right" in line]
    if validations:
        yield f"{indent}val_right {', '.join(f'{value:.5f}' for value in validations[-5:])}"


def describe_machine(driver: Driver | None) -> Iterator[str]:
    """A line for each GPU, as its driver sees it now, and one for the processors."""
    for number, handle in enumerate(driver.handles() if driver else []):
        found = driver.read(handle)
        total = found.pop("gpu_memory_total_mb", None)
        of_total = f" (of {total:,.0f} MB)" if total else ""
        yield f"GPU {number}  {driver.name(handle)}: {describe(found)}{of_total}"
    load = os.getloadavg()[0]
    yield f"CPU    {os.cpu_count()} processors, {load:.1f} processes want one (mean of the last minute)"


def describe_run(run: Path, driver: Driver | None, width: int, height: int) -> list[str]:
    """The whole screen, from top to bottom, in lines of at most `width` letters."""
    found = {path.parent for path in run.glob("*/config.json") if ".before-" not in path.parent.name}
    stages = sorted({*(run / f"stage{number}" for number in (1, 2, 3)), *found})
    lines = [f"{run}    {time.strftime('%H:%M:%S')}", ""]
    for folder in stages:
        lines += describe_stage(folder)
    lines += ["", *describe_machine(driver), ""]
    logs = [path for path in (folder / "log.txt" for folder in stages) if path.exists()]
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    rest = max(0, height - len(lines) - 1)
    # without the day
    lines += [line[11:] for line in last_lines(newest)[-rest:]] if newest and rest else []
    table = {} if "utf" in (sys.stdout.encoding or "").lower() else ASCII
    return [line[:width].translate(table) for line in lines[:height - 1]]


def is_alive(pid: int) -> bool:
    """Whether the process runs. A zombie has ended: tmux may not take notice of the end of its pane's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return True
    return stat.rpartition(") ")[2][:1] != "Z"


@contextlib.contextmanager
def own_screen():
    """Inside, the terminal shows a screen of its own, and gives each key at once."""
    import termios
    import tty
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    if before:
        tty.setcbreak(sys.stdin)
    sys.stdout.write(TERMINAL[0])
    try:
        yield
    finally:
        sys.stdout.write(TERMINAL[1])
        sys.stdout.flush()
        if before:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def pressed_q(seconds: float) -> bool:
    """Wait that long, less if a key comes."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    ready = select.select([sys.stdin], [], [], seconds)[0]
    return bool(ready) and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b"")


def main() -> None:
    args = build_parser().parse_args()
    run = Path(args.run)
    if not run.is_dir() and not args.until:
        raise UserError(f"{run}: no such run; expected the folder of --run, such as runs/tiny")
    if (run / "config.json").exists():
        raise UserError(f"{run}: is the folder of one stage; give the run's, {run.absolute().parent}")
    runs = sorted({path.parents[1].name for path in run.glob("*/*/config.json")})
    if runs and not list(run.glob("*/config.json")):
        raise UserError(f"{run}: holds the runs {', '.join(runs)}; give one of them, such as {run / runs[0]}")
    try:
        driver = Driver()
    except ImportError:  # no GPU of NVIDIA's, or no package for it
        driver = None
    if not sys.stdout.isatty():
        print("\n".join(describe_run(run, driver, 200, 60)))
        return
    with own_screen():
        while not args.until or is_alive(args.until):
            width, height = shutil.get_terminal_size()
            lines = [*describe_run(run, driver, width, height), "q leaves; the run goes on"]
            lines[0], lines[-1] = f"{BOLD}{lines[0]}{PLAIN}", f"{DIM}{lines[-1]}{PLAIN}"
            sys.stdout.write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J")
            sys.stdout.flush()
            if pressed_q(EVERY_S):
                return


if __name__ == "__main__":
    run_main(main)
