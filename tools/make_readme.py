"""Write the README's tables and pictures from the files that the runs left, so that no figure in them is typed by hand.

    python tools/make_readme.py                   # every block and picture whose sources are there
    python tools/make_readme.py --check           # exit code 1 where a table differs from its source; changes nothing

A block stands between `<!-- NAME -->` and `<!-- end -->`. Its source is a part of a report that a run wrote for
itself (report.md, evaluation.md, ...), that of the faults the tables of the tests; docs/world.png is drawn here.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import RunFailed, new_parser, run_main, write_atomic  # noqa: E402

# name: (the report that holds it, how the block's first line begins, how the line after its last one begins; "" = the end)
BLOCKS = {"faults": ("tests/faults.py", "", ""), "stages": ("runs/tiny/report.md", "| after", "| tanh(gate)"),
          "evaluation": ("runs/tiny/evaluation.md", "", "Win rates"),
          "properties": ("runs/tiny/evaluation.md", "| property", "Diversity"),
          "control": ("runs/tiny/evaluation-noise.md", "", "Win rates"),
          "control-properties": ("runs/tiny/evaluation-noise.md", "| property", "Diversity"),
          "tuxpaint": ("runs/tuxpaint/report.md", "| after", "| tanh(gate)"),
          "small-models": ("assets/tiny/report.md", "| what", ""), "ablations": ("ablations/results.md", "", ""),
          **{f"bench-{name}": (f"bench/results/{name}-CPU.md", "", "") for name in (
              "step-tiny", "loop-tiny", "step-sd15", "peer-sd15", "cache-build-tiny", "cache-rows", "startup-tiny", "generation-tiny", "few-steps", "peer-tiny",
              "memory-sd15-512-1", "memory-sd15-128-1", "memory-tiny-64-8", "kill-sweep", "long-run")}}

PICTURES = {"samples.png": "runs/tiny/samples.png", "sweep.png": "runs/tiny/stage3/sweep.png",
            "tuxpaint.png": "runs/tuxpaint/samples.png"}


def excerpt(report: Path, first: str, after: str) -> str:
    """The lines of a report, its title left out, from the one that begins with `first` to the one before `after`."""
    lines = [line for line in report.read_text().splitlines() if not line.startswith("# ")]
    start = next((i for i, line in enumerate(lines) if line and line.startswith(first)), None)
    if start is None:
        raise RunFailed(f"{report}: no line begins with {first!r}; BLOCKS in tools/make_readme.py says it should")
    stop = next((i for i, line in enumerate(lines) if after and i > start and line.startswith(after)), len(lines))
    return "\n".join(lines[start:stop]).strip() + "\n"


def list_faults() -> str:
    """Every case of the suite of faults and what the user sees, as tests/test_faults_*.py state and check them."""
    sys.path[:0] = [str(ROOT / "tests")]
    import test_faults_config as config
    import test_faults_data as data
    import test_faults_runs as runs
    import test_faults_signals as signals
    groups = [("Sounds", data.SOUNDS), ("Pictures", data.PICTURES), ("Manifests", data.MANIFESTS), ("Configs and flags", config.CONFIGS),
              ("Models", config.MODELS), ("Checkpoints", runs.CHECKPOINTS), ("Run folders and data", runs.FOLDERS),
              ("Making and judging pictures, making data", runs.PICTURES), ("Full disks", [case for case, _ in runs.FULL_DISKS]), ("Processes", signals.PROCESSES)]
    count = sum(len(cases) for _, cases in groups)
    lines = [f"{count} cases, and a signal in each of these phases: {', '.join(signals.NAMES)}, setting up the environment.", ""]
    for title, cases in groups:
        lines += [f"| {title} | exit | what you see |", "|---|---|---|", *(case.line() for case in cases), ""]
    return "\n".join(lines).strip() + "\n"


def draw_world(path: Path) -> None:
    """Three scenes of each class, and ten of two sounds."""
    import numpy as np
    from PIL import Image

    import sound_world as world
    labels = [(c,) for _ in range(3) for c in world.CLASSES] + [(c, world.CLASSES[(i + 4) % 10]) for i, c in enumerate(world.CLASSES)]
    page = Image.new("RGB", (10 * 100 - 4, 4 * 100 - 4), "white")
    for i, names in enumerate(labels):
        scene = world.draw_scene(world.low_and_high(world.draw_state(np.random.default_rng([9, i]), names)))
        page.paste(scene.resize((96, 96), Image.Resampling.BICUBIC), (i % 10 * 100, i // 10 * 100))
    page.save(path, optimize=True)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=[*BLOCKS], default=[*BLOCKS], help="blocks to write or check")
    parser.add_argument("--check", action="store_true", help="change nothing; say which blocks differ from their sources")
    args = parser.parse_args(argv)
    readme, differing = ROOT / "README.md", []
    text = readme.read_text()
    for name in args.only:
        source, first, after = BLOCKS[name]
        found = re.search(rf"(<!-- {name} -->\n)((?:(?!<!--).)*)(<!-- end -->)", text, re.S)
        if not found or not (ROOT / source).exists():
            print(f"{name}: " + ("no such block in README.md" if not found else f"{source} is not there"))
            continue
        block = list_faults() if name == "faults" else excerpt(ROOT / source, first, after)
        if block != found[2]:
            differing.append(name)
            text = text[:found.start(2)] + block + text[found.end(2):]
    print(("differ: " if args.check else "rewritten: ") + (", ".join(differing) or "none"))
    if args.check and differing:
        raise RunFailed(f"README.md: {', '.join(differing)} differ from their sources; run python tools/make_readme.py")
    if not args.check:
        write_atomic(readme, text.encode())
        draw_world(ROOT / "docs/world.png")
        for name, source in PICTURES.items():
            if (ROOT / source).exists():
                shutil.copy(ROOT / source, ROOT / "docs" / name)


if __name__ == "__main__":
    run_main(main)
