"""How long from the command to an answer, and to the first step?

    python bench/startup.py                       # writes bench/results/startup-DEVICE.{json,md}

In turns, each a process of its own: `--help` and a mistyped flag of each stage; `import torch` with the UNet's from_pretrained,
which nothing can do without; and a stage from launch to the end of its first optimizer step, features cached. That first step
comes after a validation; here it has two clips.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_tools import ROOT, call, model_flags, models, spread, watched, write_results

from config import Number, RunFailed, new_parser, run_main

LOAD = """
import sys
import time
import torch
from diffusers import UNet2DConditionModel
UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
print(time.time())
"""


def build_parser():
    parser = new_parser(__doc__)
    model_flags(parser)
    parser.add_argument("--repeats", type=Number(int, 1), default=7, help="turns")
    return parser


def seconds(code: int, *command) -> float:
    """Wall time of a command that must end with an exit code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != code:
        raise RunFailed(f"{' '.join(map(str, command))}: exit code {done.returncode}, expected {code}: {done.stderr[-300:]}")
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from tqdm import tqdm
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        call("prepare_data.py", "world", "--out", place / "world", "--train", 40, "--val", 2, "--test", 2)
        named = models(args, place)
        flags = ["--config", "", "--data-root", place / "world", "--cache-dir", place / "cache", *named, "--image-size", 64, "--batch-size", 1,
                 "--precision", "fp32", "--val-draws", 1, "--validate-every", 0, "--samples", 0, "--save-every", 100000, "--steps", 2]
        for stage in (1, 2, 3):
            call(f"train_stage{stage}.py", *flags, "--run", place / "before", *(["--min-steps", 2] if stage == 3 else []))
        found: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            found.setdefault(name, []).append(value)

        for turn in tqdm(range(args.repeats + 1), desc="turns"):
            if turn == 1:  # the first was a warm-up
                found.clear()
            for stage in (1, 2, 3):
                note(f"train_stage{stage}.py --help", seconds(0, f"train_stage{stage}.py", "--help"))
                note(f"train_stage{stage}.py --no-such-flag", seconds(2, f"train_stage{stage}.py", "--no-such-flag"))
            note("config.py plan with a wrong flag", seconds(2, "config.py", "plan", "configs/tiny.json", "--no-such-flag"))
            began = time.time()
            loaded = subprocess.run([sys.executable, "-c", LOAD, named[1]], cwd=ROOT, capture_output=True, text=True, check=True)
            loading = float(loaded.stdout.split()[-1]) - began
            note("import torch, load the UNet", loading)
            for stage in (1, 2, 3):
                init = ["--init-from", place / f"before/stage{stage - 1}"] if stage > 1 else []
                run = watched(place / "seen.json", f"train_stage{stage}.py", *flags, *init, "--run", place / f"run-{turn}",
                              *(["--min-steps", 2] if stage == 3 else []), steps=1)
                note(f"train_stage{stage}.py to its first step", run["steps"][0])
                note(f"ratio {stage}", run["steps"][0] / loading)
    rows = [{"what": name, "s": spread(values),
             "of torch and the UNet": spread(found[f"ratio {name[11]}"]) if name.endswith("first step") else ""}
            for name, values in found.items() if not name.startswith("ratio")]
    write_results(f"startup-{'sd15' if args.sd15 else 'tiny'}", "startup.py", argv, f"64 px, batch 1, {args.repeats} turns after a warm-up; "
                  "median [lowest, highest]", rows)


if __name__ == "__main__":
    run_main(main)
