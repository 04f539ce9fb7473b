"""20,000 steps of stage 1 on the smallest model: does memory, the log, the number of checkpoints or the step time grow?

    python bench/long_run.py                      # about 20 minutes on two cores
    python bench/long_run.py --steps 400          # to see that it runs

Memory is the process's own (VmRSS), read every second, and its slope is fitted over the second half of the run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_tools import ROOT, write_results

from config import Number, RunFailed, new_parser, run_main


def build_parser():
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=Number(int, 100), default=20_000, help="optimizer steps")
    return parser


def resident_mb(pid: int) -> float:
    """Memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        subprocess.run([sys.executable, ROOT / "prepare_data.py", "world", "--out", place / "world", "--train", "200", "--val", "8", "--test", "2"], check=True)
        flags = ["--run", place / "run", "--data-root", place / "world", "--cache-dir", place / "cache", "--steps", args.steps, "--batch-size", 1,
                 "--precision", "fp32", "--val-draws", 1, "--samples", 0, "--num-tokens", 1]
        began = time.time()
        process = subprocess.Popen([sys.executable, ROOT / "bench/watch.py", place / "seen.json", ROOT / "train_stage1.py", *map(str, flags)], cwd=ROOT,
                                   env={**os.environ, "WATCH_BEGAN": str(began)})
        log, memory, checkpoints = place / "run/stage1/log.jsonl", [], []
        while process.poll() is None:
            if log.exists() and log.stat().st_size:
                try:
                    memory.append((time.time(), resident_mb(process.pid)))
                except (OSError, StopIteration):  # it has just ended
                    break
                checkpoints.append(len(list((place / "run/stage1/checkpoints").glob("step-*.safetensors"))))
            time.sleep(1)
        if process.wait():
            raise RunFailed(f"train_stage1.py ended with {process.returncode}; what it said is above")
        steps = json.loads((place / "seen.json").read_text())["steps"]
        seconds = np.diff(steps)
        size = {name: (place / "run/stage1" / name).stat().st_size for name in ("log.txt", "log.jsonl")}
        part = max(1, args.steps // 20)
        memory = [(at, mb) for at, mb in memory if at <= began + steps[-1]]
        half = memory[len(memory) // 2:]
        slope = np.polyfit([at for at, _ in half], [mb for _, mb in half], 1)[0] * (steps[-1] - steps[0]) / args.steps * 1000
        rows = [{"steps": args.steps, "memory at the start, MB": round(memory[min(5, len(memory) - 1)][1]), "halfway": round(half[0][1]), "at the end": round(half[-1][1]),
                 "slope of the second half, MB per 1,000 steps": round(slope, 3), "log.jsonl, bytes a step": round(size["log.jsonl"] / args.steps, 1),
                 "log.txt, bytes a step": round(size["log.txt"] / args.steps, 1), "checkpoints at most": max(checkpoints),
                 f"s a step, first {part}": round(statistics.median(seconds[:part]), 5), f"last {part}": round(statistics.median(seconds[-part:]), 5),
                 "last of first": round(statistics.median(seconds[-part:]) / statistics.median(seconds[:part]), 3)}]
        rows = [{"what": what, "value": value} for what, value in rows[0].items()]
    write_results("long-run", "long_run.py", argv, "stage 1, batch 1, 64 px, fp32, one audio token, the default's rates of logs and checkpoints", rows)


if __name__ == "__main__":
    run_main(main)
