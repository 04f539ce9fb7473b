"""20,000 steps of stage 1 on the smallest model: does memory, the log, the checkpoints or the step time grow?

    python bench/long_run.py                      # about 20 minutes on two cores
    python bench/long_run.py --steps 400          # to see that it runs

Memory is the process's own (VmRSS), read at every step; its slope is fitted over the second half of the run.
"""

from pathlib import Path
from statistics import median

import bench_tools as tools
import numpy as np

from clap2diffusion.base.settings import Number, new_parser

PARSER = new_parser(__doc__)
PARSER.add_argument("--steps", type=Number(int, 100), default=20_000, help="optimizer steps")


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    n, part, half, run = args.steps, max(1, args.steps // 20), args.steps // 2, place / "run/stage1"
    tools.make_world(place / "world", 200, 8)
    seen = tools.watched(place, "train_stage1.py", "--run", place / "run", "--data-root", place / "world",
                         "--cache-dir", place / "cache", "--steps", n, "--batch-size", 1, "--val-draws", 1,
                         "--precision", "fp32", "--samples", 0, "--num-tokens", 1)
    rss, seconds = seen["rss_mb"], np.diff(seen["steps"])
    first, last = median(seconds[:part]), median(seconds[-part:])
    slope = np.polyfit(np.arange(half, n), rss[half:], 1)[0] * 1000
    found = {"steps": n, "memory at the start, MB": round(rss[part]), "halfway": round(rss[half]),
             "at the end": round(rss[-1]), "slope of the second half, MB per 1,000 steps": round(slope, 3),
             **{f"{name}, bytes a step": round((run / name).stat().st_size / n, 1)
                for name in ("log.jsonl", "log.txt")},
             "checkpoints at the end": len(list(run.glob("checkpoints/step-*.safetensors"))),
             f"s a step, first {part}": round(first, 5), f"last {part}": round(last, 5),
             "last of first": round(last / first, 3)}
    about = "stage 1, batch 1, 64 px, fp32, one audio token, the default's rates of logs and checkpoints"
    tools.write_results("long-run", about, [{"what": what, "value": value} for what, value in found.items()])
