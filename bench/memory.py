"""What each memory setting saves and costs: stage 2 with it, alone, and all together, against plain.

    python bench/memory.py                        # the default model; writes bench/results/memory-tiny-64-16-DEVICE.{json,md}
    python bench/memory.py --sd15 --image-size 128 --batch-size 2 --steps 4 --repeats 1

Each setting is the real train_stage2.py in a process of its own, in turns, with the same seed, steps and data. Memory is the
peak of the steps after the first one (on CUDA what was reserved by the last one, on a CPU the process's resident set, Python
and torch included), without loading and export. The validation loss is that of the last weights; its difference from plain's is paired by clip, with
a 95 % interval. `batch x 2` shows what the saved memory buys.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench_tools import call, model_flags, models, spread, watched, write_results

from config import Number, UserError, new_parser, run_main

SMALL = ["--frozen-dtype", "nf4", "--adam-8bit", "--checkpointing", "all"]
SETTINGS = {
    "plain": [],
    "frozen bf16": ["--frozen-dtype", "bf16"],
    "frozen nf4": ["--frozen-dtype", "nf4"],
    "8-bit Adam": ["--adam-8bit"],
    "checkpointing down": ["--checkpointing", "down"],
    "checkpointing all": ["--checkpointing", "all"],
    "channels_last": ["--channels-last"],
    "accumulation 2": ["--accumulation", "2"],
    "EMA": ["--ema-decay", "0.99"],
    "EMA on the CPU": ["--ema-decay", "0.99", "--ema-on-cpu"],
    "compile": ["--compile"],
    "bf16, channels_last, compile": ["--frozen-dtype", "bf16", "--channels-last", "--compile"],
    "bf16, checkpointing down": ["--frozen-dtype", "bf16", "--checkpointing", "down"],
    "bf16, checkpointing all": ["--frozen-dtype", "bf16", "--checkpointing", "all"],
    "bf16, checkpointing all, batch x 2": ["--frozen-dtype", "bf16", "--checkpointing", "all"],
    "nf4, 8-bit, checkpointing all": SMALL,
    "nf4, 8-bit, checkpointing all, batch x 2": SMALL}


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--only", nargs="+", choices=[*SETTINGS], default=[name for name in SETTINGS if "compile" not in name],
        help="settings (default: all but those with compile, whose first step takes minutes)")
    add("--steps", type=Number(int, 3), default=60, help="optimizer steps")
    add("--repeats", type=Number(int, 1), default=1, help="runs of each setting, in turns")
    add("--batch-size", type=Number(int, 1), default=16, help="samples in a step; accumulation halves it")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=64, help="side of the pictures")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="autocast; settings that need bf16 run in it always")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if "accumulation 2" in args.only and args.batch_size % 2:
        if args.batch_size > 1:
            raise UserError(f"--batch-size {args.batch_size}: accumulation 2 halves it; give an even number")
        args.only.remove("accumulation 2")
    if "plain" not in args.only:
        raise UserError("--only: plain is missing, and everything is compared with it; add it")
    from tqdm import tqdm

    import metrics
    found: dict[str, list[dict]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        call("prepare_data.py", "world", "--out", place / "world", "--train", 8 * args.batch_size, "--val", 2 if args.sd15 else 50, "--test", 2)
        flags = ["--config", "", "--data-root", place / "world", "--cache-dir", place / "cache", *models(args, place),
                 "--image-size", args.image_size, "--validate-every", 0, "--val-draws", 1, "--samples", 0, "--val-batch-size", 4,
                 "--save-every", 100000, "--log-every", 1]
        call("train_stage1.py", *flags, "--run", place, "--steps", 1, "--batch-size", 1, "--precision", args.precision)
        for turn in range(args.repeats):
            for name in tqdm(args.only, desc=f"turn {turn + 1} of {args.repeats}", unit="setting"):
                batch = args.batch_size * 2 if "batch x 2" in name else args.batch_size // 2 if "accumulation" in name else args.batch_size
                precision = "bf16" if "--frozen-dtype" in SETTINGS[name] else args.precision
                found[name].append(watched(
                    place / "seen.json", "train_stage2.py", *flags, "--init-from", place / "stage1", "--run", place / f"run-{name}-{turn}",
                    "--precision", precision, "--steps", args.steps, "--batch-size", batch, "--learning-rate", 3e-4, *SETTINGS[name],
                    steps=args.steps if args.sd15 else 0))
    rows = []
    for name, seen in found.items():
        pairs = list(zip(seen, found["plain"], strict=True))
        change = ""
        if name != "plain" and not args.sd15:  # random weights have nothing to lose
            last = [run[0]["losses"][-2] for run in (seen, found["plain"])]  # of the last step's weights; then come the best ones'
            change = [round(value, 6) for value in metrics.interval([a - b for a, b in zip(*last, strict=True)])]
        rows.append({"setting": name, "peak memory, MB": round(max(run["memory_mb"][-1] for run in seen)),
                     "of plain": round(max(a["memory_mb"][-1] / b["memory_mb"][-1] for a, b in pairs), 2),
                     "s a step": spread([run["step_s"] for run in seen]),
                     "of plain's": spread([a["step_s"] / b["step_s"] for a, b in pairs]),
                     "loss - plain's": change})
    about = (f"stage 2, batch {args.batch_size}, {args.image_size} px, {args.precision}, {args.steps} steps, runs of each: {args.repeats}, in "
             "turns; median [lowest, highest]")
    write_results(f"memory-{'sd15' if args.sd15 else 'tiny'}-{args.image_size}-{args.batch_size}", "memory.py", argv, about, rows)


if __name__ == "__main__":
    run_main(main)
