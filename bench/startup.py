"""How long from the command to an answer, and to the first step?

    python bench/startup.py                       # writes bench/results/startup-DEVICE.{json,md}

In turns, each a process of its own: `--help` and a mistyped flag of each stage; `import torch` with the
UNet's from_pretrained, which nothing can do without; and a stage from launch to the end of its first
optimizer step, features cached. That first step comes after a validation; here it has two clips.
"""

import subprocess
import sys
import time
from pathlib import Path

import bench_tools as tools
from tqdm import tqdm

from clap2diffusion.base.exits import RunFailed

LOADING, LOAD = "import torch, load the UNet", """
import os, sys, torch
from diffusers import UNet2DConditionModel
UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
os._exit(0)
"""


def seconds(code: int, *command) -> float:
    """Wall time of a command that must end with an exit code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=tools.ROOT, capture_output=True, text=True)
    if done.returncode != code:
        raise RunFailed(f"{command}: exit code {done.returncode}, expected {code}: {done.stderr[-300:]}")
    return time.perf_counter() - began


def take_turn(place: Path, flags: list[str], base: str, turn: int) -> dict[str, float]:
    """Seconds of everything that is timed, once."""
    found, scripts, plan = {}, [f"train_stage{stage}.py" for stage in (1, 2, 3)], "tools/plan.py"
    for script in scripts:
        found[f"{script} --help"] = seconds(0, script, "--help")
        found[f"{script} --no-such-flag"] = seconds(2, script, "--no-such-flag")
    found[f"{plan} with a wrong flag"] = seconds(2, plan, "configs/tiny.json", "--no-such-flag")
    found[LOADING] = seconds(0, "-c", LOAD, base)
    for stage, script in enumerate(scripts, start=1):
        more = ["--init-from", place / f"before/stage{stage - 1}"] if stage > 1 else []
        run = tools.watched(place, script, *flags, *more, "--run", place / f"run-{turn}", steps=1)
        found[f"{script} to its first step"] = run["steps"][0]
    return found


def main(args, place: Path) -> None:
    tools.make_world(place / "world", 40)
    named = tools.models(args, place)
    flags = [*tools.stage_flags(place, named, 64), "--batch-size", "1", "--precision", "fp32", "--steps", "2"]
    for stage in (1, 2, 3):
        tools.call(f"train_stage{stage}.py", *flags, "--run", place / "before")
    turns = [take_turn(place, flags, named[1], turn) for turn in tqdm(range(args.repeats + 1), desc="turns")]
    found = {name: [turn[name] for turn in turns[1:]] for name in turns[0]}  # the first is a warm-up
    rows = [{"what": name, "s": tools.spread(values), "of torch and the UNet":
             tools.ratios(values, found[LOADING]) if name.endswith("first step") else ""}
            for name, values in found.items()]
    about = f"64 px, batch 1, {args.repeats} turns after a warm-up; median [lowest, highest]"
    tools.write_results(f"startup-{tools.size_name(args)}", about, rows)


if __name__ == "__main__":
    tools.start(main, tools.bench_parser(__doc__, repeats=7))
