"""How long from the command to an answer, and to the first step?

    python bench/startup.py                       # writes bench/results/startup-DEVICE.{json,md}

In turns, each a process of its own: `--help` and a mistyped flag of each stage; `import torch` with the
UNet's from_pretrained, which nothing can do without; and a stage from launch to the end of its first
optimizer step, features cached. That first step comes after a validation; here it has two clips."""

import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import bench_tools as tools
from tqdm import tqdm

from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.progress import bar_options

SCRIPTS = [f"train_stage{stage}.py" for stage in (1, 2, 3)]
LOADING, LOAD = "import torch, load the UNet", """
import os, sys, torch
from diffusers import UNet2DConditionModel
UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
os._exit(0)
"""


def seconds(code: int, *command) -> float:
    """Wall time of a command that must end with an exit code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=tools.ROOT, capture_output=True,
                          encoding="utf-8", errors="replace")
    if done.returncode != code:
        raise RunFailed(f"{command}: exit code {done.returncode}, expected {code}: {done.stderr[-300:]}")
    return time.perf_counter() - began


@tools.automain(tools.bench_parser(__doc__, repeats=7))
def main(args, place: Path) -> None:
    base, clap = tools.models(args, place)
    flags = tools.stage_flags(tools.make_world(place / "world", 40), (base, clap), 64)
    flags += ["--batch-size", "1", "--precision", "fp32", "--steps", "2"]
    for script in SCRIPTS[:2]:  # what stages 2 and 3 begin with
        tools.call(script, *flags, "--run", place / "before")
    found = defaultdict(list)
    for turn in tqdm(range(args.repeats + 1), **bar_options(desc="turns")):
        for script in SCRIPTS:
            found[f"{script} --help"].append(seconds(0, script, "--help"))
            found[f"{script} --no-such-flag"].append(seconds(2, script, "--no-such-flag"))
        found["tools/plan.py with a wrong flag"].append(
            seconds(2, "tools/plan.py", "configs/tiny.json", "--no-such-flag"))
        found[LOADING].append(seconds(0, "-c", LOAD, base))
        for stage, script in enumerate(SCRIPTS, start=1):
            more = ["--init-from", place / f"before/stage{stage - 1}"] if stage > 1 else []
            run = tools.watched(place, script, *flags, *more, "--run", place / f"run-{turn}", steps=1)
            found[f"{script} to its first step"].append(run["first_s"])
    found = {name: values[1:] for name, values in found.items()}  # the first turn is a warm-up
    rows = [{"what": name, "s": tools.spread(values), "of torch and the UNet":
             tools.ratios(values, found[LOADING]) if name.endswith("first step") else ""}
            for name, values in found.items()]
    about = f"64 px, batch 1, {args.repeats} turns after a warm-up; median [lowest, highest]"
    tools.write_results(f"startup-{args.size}", about, rows)
