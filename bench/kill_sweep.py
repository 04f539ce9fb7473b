"""kill -9 at random moments, half of them inside a save, and the same command again: is the result that of an unbroken run?

    python bench/kill_sweep.py                    # 200 kills over the three stages and the feature cache, 0, 1 and 2 loader processes
    python bench/kill_sweep.py --kills 24 --seed 1

Writes results/kill-sweep-DEVICE.{json,md} and prints killed / resumed / equal: kills that hit a running process; of these how many
after which the same command went on; and how many belong to a run that ended with the weights, the optimizer, the counters and the
logged losses (of the cache: the bytes) of a run that nobody disturbed. Exit code 1 if the three differ.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench_tools import ROOT, write_results

from config import Number, RunFailed, new_parser, run_main

sys.path[:0] = [str(ROOT / "tests")]
STEPS, COLUMNS = 12, ("killed", "resumed", "equal")


def build_parser():
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=Number(int, 1), default=200, help="kills over all")
    parser.add_argument("--seed", type=Number(int, 0), default=0, help="seed of the moments")
    return parser


def outcome(target: str, place: Path) -> dict:
    """All that a finished run is judged by, apart from times: {name: tensor or value}."""
    if target == "cache":
        return {path.name: path.read_bytes() for path in place.glob("cache/*/*.*") if path.name != "lock"}
    import runs
    folder, found = place / "run" / target, {}
    for path in (folder / "final.safetensors", folder / f"checkpoints/step-{STEPS:08d}.safetensors"):
        header, tensors = runs.read_checkpoint(path)
        found |= {f"{path.stem} {name}": tensor for name, tensor in tensors.items()}
        for name, state in header["objects"].items():
            for key, value in state.get("pairs", []):
                if name == "progress" and not key.endswith("_seconds"):
                    found[f"{path.stem} {name} {key}"] = value
    losses: dict[int, set] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:  # a step that was done again counts once, if it said the same
            losses.setdefault(entry["step"], set()).add((entry["loss"], entry["grad_norm"]))
    return found | {"losses": losses}


def equal(a: dict, b: dict) -> bool:
    import torch
    return a.keys() == b.keys() and all(torch.equal(x, b[key]) if isinstance(x, torch.Tensor) else x == b[key] for key, x in a.items())


def sweep(target: str, workers: int, kills: int, place: Path, config: Path, before: list, dice: random.Random, unbroken: dict, seconds: float,
          saving: Counter) -> list[int]:
    """[killed, resumed, equal] of one stage or the cache with one number of loader processes; `saving` counts the files that were being saved."""
    from conftest import Started
    total = [0, 0, 0]
    while total[0] < kills:
        here, of_this_run, mended = place / f"{target}-{workers}-{total[0]}", 0, True
        command = [f"train_{'stage1' if target == 'cache' else target}.py", "--config", config, "--run", here / "run", "--workers", workers, *before]
        if target == "cache":
            command += ["--cache-dir", here / "cache", "--steps", 1]
        while True:
            process = Started(*command)
            kill = total[0] + of_this_run < kills
            moment, skip = time.time() + dice.uniform(0, seconds), dice.randrange(6)
            inside, seen, new = (total[0] + of_this_run) % 2 == 1, set(), set()
            while process.poll() is None and kill:
                if inside:  # inside a save: its temporary file is there
                    folder = here / "cache" if target == "cache" else here / "run" / target  # checkpoints, best, adapter, pictures, result
                    new = {path.name for path in folder.rglob(".*.tmp")} - seen
                    seen |= new
                    if len(seen) > skip:
                        break
                elif time.time() > moment:
                    break
                time.sleep(0.0002)
            if process.poll() is None and kill:
                process.send_signal(signal.SIGKILL)
            done = process.end()
            if done.returncode == -signal.SIGKILL:
                of_this_run += 1
                saving.update(re.split(r"-\d|\.", name)[1] for name in list(new)[:1])
                continue
            mended = done.returncode == 0
            if not mended:
                print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr, flush=True)
            break
        same = mended and equal(outcome(target, here), unbroken) and not list(here.rglob(".*.tmp"))
        total = [total[0] + of_this_run, total[1] + of_this_run * mended, total[2] + of_this_run * same]
        shutil.rmtree(here)
    return total


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from conftest import ok, script, write_config
    targets = [(target, workers) for target in ("cache", "stage1", "stage2", "stage3") for workers in (0, 1, 2)]
    dice, began, all_of_them, rows, saving = random.Random(args.seed), time.time(), [0, 0, 0], [], Counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        ok(script("prepare_data.py", "world", "--out", place / "world", "--train", 40, "--val", 4, "--test", 4))
        config = write_config(place / "c.json", place / "world", place / "unbroken/run", place / "unbroken/cache", save_every=1, samples=0)
        content = json.loads(config.read_text())
        for stage in ("stage1", "stage2", "stage3"):
            content[stage] |= {"steps": STEPS}
        config.write_text(json.dumps(content))
        unbroken, seconds = {}, {}
        for stage in ("stage1", "stage2", "stage3"):
            started = time.time()
            ok(script(f"train_{stage}.py", "--config", config, "--workers", 0))
            unbroken[stage], seconds[stage] = outcome(stage, place / "unbroken"), time.time() - started
        unbroken["cache"], seconds["cache"] = outcome("cache", place / "unbroken"), seconds["stage1"] / 2
        for n, (target, workers) in enumerate(targets):
            kills = args.kills * (n + 1) // len(targets) - args.kills * n // len(targets)
            before = ["--init-from", place / f"unbroken/run/stage{int(target[-1]) - 1}"] if target in ("stage2", "stage3") else []
            found = sweep(target, workers, kills, place, config, before, dice, unbroken[target], seconds[target], saving)
            all_of_them = [a + b for a, b in zip(all_of_them, found)]
            print(f"{target}, {workers} loader processes: {' / '.join(map(str, found))}", flush=True)
            rows.append({"what": "feature cache" if target == "cache" else target, "loader processes": workers, **dict(zip(COLUMNS, found))})
    write_results("kill-sweep", "kill_sweep.py", argv, f"{STEPS} steps of each stage, a checkpoint at every one; half of the kills aimed inside a save, which hit that of "
                  + ", ".join(f"{name} {n}" for name, n in saving.most_common()),
                  [*rows, {"what": "all", "loader processes": "", **dict(zip(COLUMNS, all_of_them))}], "cpu")
    print(f"seed {args.seed}, {time.time() - began:.0f} s: killed {all_of_them[0]} / resumed {all_of_them[1]} / equal {all_of_them[2]}", flush=True)
    if len(set(all_of_them)) > 1:
        raise RunFailed(f"bench/kill_sweep.py --kills {args.kills} --seed {args.seed}: not every killed run ended as an unbroken one")


if __name__ == "__main__":
    run_main(main)
