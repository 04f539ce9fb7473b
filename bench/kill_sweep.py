"""kill -9 at random moments, half of them inside a save, then the same command again: is the result equal?

    python bench/kill_sweep.py          # 200 kills over stages and feature cache, 0, 1 and 2 loader processes
    python bench/kill_sweep.py --kills 24 --seed 1

Writes results/kill-sweep-DEVICE.{json,md} and prints killed / resumed / equal: kills that hit a running
process; of these how many after which the same command went on; and how many belong to a run that ended as
one that nobody disturbed, with equal weights, optimizer, counters and logged losses (of the cache: bytes).
Exit code 1 if the three differ."""

import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import bench_tools as tools

from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.settings import Number, new_parser
from clap2diffusion.base.tensor_file import digest, read_tensors

sys.path[:0] = [str(tools.ROOT / "tests")]
from conftest import Started, logged_steps, ok, script, write_config  # noqa: E402

STEPS, COLUMNS, STAGES = 12, ("killed", "resumed", "equal"), ("stage1", "stage2", "stage3")
PARSER = new_parser(__doc__)
PARSER.add_argument("--kills", type=Number(int, 1), default=200, help="kills over all")
PARSER.add_argument("--seed", type=Number(int, 0), default=0, help="seed of the moments")


def outcome(target: str, place: Path) -> dict:
    """All that a finished run is judged by, apart from times."""
    if target == "cache":
        return {path.name: path.read_bytes() for path in place.glob("cache/*/*.*") if path.name != ".lock"}
    folder, found = place / "run" / target, {}
    for path in (folder / "final.safetensors", folder / f"checkpoints/step-{STEPS:08d}.safetensors"):
        header, tensors = read_tensors(path)
        counters = header["objects"].get("progress", {}).get("pairs", [])
        found[path.stem] = digest({}, tensors), [one for one in counters if not one[0].endswith("_seconds")]
    # a step that was done again counts once, if it said the same
    losses = {(line["step"], line["loss"], line["grad_norm"]) for line in logged_steps(folder / "log.jsonl")}
    return found | {"losses": losses}


def kill_somewhere(process, folder: Path, inside: bool, seconds: float, dice: random.Random) -> list[str]:
    """Kill a process at a random moment, or inside a save: while its temporary file is there. [That file.]"""
    moment, skip, seen, new = time.time() + dice.uniform(0, seconds), dice.randrange(6), set(), set()
    while process.poll() is None and (inside or time.time() <= moment):
        if inside:
            new = {path.name for path in folder.rglob(".*.tmp")} - seen
            seen |= new
            if len(seen) > skip:
                break
        time.sleep(0.0002)
    process.send_signal(signal.SIGKILL)
    return [re.split(r"-\d|\.", name)[1] for name in new][:1]


def sweep(target: str, command: list, kills: int, here: Path, unbroken: dict, seconds: float,
          dice: random.Random, saving: Counter) -> list[int]:
    """[killed, resumed, equal] of one command in the folder `here`; `saving` counts the files being saved."""
    total, folder = [0, 0, 0], here / ("cache" if target == "cache" else f"run/{target}")
    while total[0] < kills:
        killed = 0
        while True:
            process, hit = Started(*command), []
            if total[0] + killed < kills:
                hit = kill_somewhere(process, folder, (total[0] + killed) % 2 == 1, seconds, dice)
            done = process.end()
            if done.returncode != -signal.SIGKILL:
                break
            killed += 1
            saving.update(hit)
        mended = done.returncode == 0
        if not mended:
            print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr, flush=True)
        same = mended and outcome(target, here) == unbroken and not list(here.rglob(".*.tmp"))
        total = [total[0] + killed, total[1] + killed * mended, total[2] + killed * same]
        shutil.rmtree(here)
    return total


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    world, undisturbed, here = tools.make_world(place / "world", 40, 4), place / "unbroken", place / "swept"
    config = write_config(place / "c.json", world, undisturbed / "run", undisturbed / "cache", save_every=1,
                          samples=0)
    dice, began, rows, saving = random.Random(args.seed), time.time(), [], Counter()
    unbroken, seconds = {}, {}
    for target in STAGES:
        start = time.time()
        ok(script(f"train_{target}.py", "--config", config, "--steps", STEPS, "--workers", 0))
        unbroken[target], seconds[target] = outcome(target, undisturbed), time.time() - start
    unbroken["cache"], seconds["cache"] = outcome("cache", undisturbed), seconds["stage1"] / 2
    targets = [*product(("cache", *STAGES), (0, 1, 2))]
    for n, (target, workers) in enumerate(targets):
        kills = args.kills * (n + 1) // len(targets) - args.kills * n // len(targets)
        stage = 1 if target == "cache" else int(target[-1])
        command = [f"train_stage{stage}.py", "--config", config, "--run", here / "run", "--workers", workers]
        command += ["--init-from", undisturbed / f"run/stage{stage - 1}"] if stage > 1 else []
        command += ["--cache-dir", here / "cache", "--steps", 1] if target == "cache" else ["--steps", STEPS]
        found = sweep(target, command, kills, here, unbroken[target], seconds[target], dice, saving)
        print(f"{target}, {workers} loader processes: {' / '.join(map(str, found))}", flush=True)
        rows.append({"what": "feature cache" if target == "cache" else target, "loader processes": workers,
                     **dict(zip(COLUMNS, found))})
    total = {column: sum(row[column] for row in rows) for column in COLUMNS}
    hit = ", ".join(f"{name} {n}" for name, n in saving.most_common())
    about = (f"{STEPS} steps of each stage, a checkpoint at every one; half of the kills aimed inside a "
             f"save, which hit that of {hit}")
    tools.write_results("kill-sweep", about, [*rows, {"what": "all", "loader processes": "", **total}], "cpu")
    print(f"seed {args.seed}, {time.time() - began:.0f} s: "
          + " / ".join(f"{column} {n}" for column, n in total.items()), flush=True)
    if len(set(total.values())) > 1:
        raise RunFailed(f"bench/kill_sweep.py --kills {args.kills} --seed {args.seed}: not every killed run "
                        "ended as an unbroken one")
