"""Step time, use of the device and memory of all three stages, by batch; gpu.sh runs it on SD 1.5's architecture at 512 px.

    python bench/gpu.py --models /tmp/sd15        # writes bench/results/gpu-DEVICE.{json,md}
    python bench/gpu.py --smoke                   # the small models, two batches: shows that it runs

The real scripts run as in step.py. Beside the script's and the bare step's time: the bare step between two CUDA events,
utilisation, which is the step's floating-point operations (torch's own count) over that time over what a BF16 matrix
product of 8192 x 8192 reaches on the same device, and the peak of reserved memory. A batch that does not fit ends its stage.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from pathlib import Path

from bench_tools import model_flags, models, write_results
from step import time_stage

from config import Number, new_parser, run_main


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--smoke", action="store_true", help="the small models at 64 px, batches 1 and 2")
    add("--stages", nargs="+", type=Number(int, 1, 3), default=[1, 2, 3], help="stages to time")
    add("--batches", nargs="+", type=Number(int, 1), default=[1, 2, 4, 8, 16, 32, 64], help="batches, rising")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=512, help="side of the pictures")
    add("--seconds", type=Number(float, 1), default=200.0, help="start nothing new after this long")
    parser.set_defaults(block=2, pairs=5, device="auto")
    return parser


def event_seconds(run, torch, n: int = 5) -> float:
    """Median seconds of a call, between CUDA events where there are any."""
    found = []
    for _ in range(n):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.smoke:
        args.batches, args.image_size, args.pairs = [1, 2], 64, 2
    args.sd15 = not args.smoke
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import prepare_data
    began, cuda = time.monotonic(), torch.cuda.is_available()
    side = 8192 if cuda else 512
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda" if cuda else "cpu") for _ in range(2))
    event_seconds(lambda: a @ b, torch)
    peak = 2 * side ** 3 / event_seconds(lambda: a @ b, torch, 20)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        prepare_data.main(["world", "--out", str(place / "world"), "--train", str(max(16, *args.batches)), "--val", "2", "--test", "2"])
        flags = ["--config", "", "--data-root", str(place / "world"), "--run", str(place / "run"), "--cache-dir", str(place / "cache"),
                 *models(args, place), "--image-size", str(args.image_size), "--validate-every", "0", "--val-draws", "1", "--samples", "0",
                 "--save-every", "1000000", "--frozen-dtype", "bf16"]
        for stage in (1, 2):  # what the next stages begin with
            __import__(f"train_stage{stage}").main([*flags, "--name", f"stage{stage}", "--steps", "1", "--batch-size", "1"])
        steps = args.block * (args.pairs + 2)
        plans = [(stage, batch, []) for batch in args.batches for stage in args.stages]
        fast = ["--channels-last", "--compile"]
        if cuda:
            plans += [(2, batch, fast) for batch in args.batches[-3:]]
        too_large: set[tuple] = set()
        for stage, batch, more in plans:
            if (stage, *more) in too_large or time.monotonic() - began > args.seconds:
                continue
            seen = {}

            def at_end(times, seen=seen, more=more):
                if cuda:
                    seen["memory"] = torch.cuda.max_memory_reserved() / 2 ** 20
                seen["event_s"] = event_seconds(times.bare_step, torch)
                if not more:
                    with FlopCounterMode(display=False) as counter:
                        times.bare_step()
                    seen["flops"] = counter.get_total_flops()

            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            own = [*flags, *more, "--run", str(place / f"run-{stage}-{batch}-{len(more)}"), "--batch-size", str(batch), "--steps", str(steps)]
            own += ["--init-from", str(place / f"run/stage{stage - 1}")] if stage > 1 else []
            own += ["--min-steps", str(steps), "--away-steps", str(steps + 1)] if stage == 3 else []
            try:
                row, _ = time_stage(stage, own, args, at_end)
            except torch.OutOfMemoryError:
                too_large.add((stage, *more))
                rows.append({"stage": stage, "batch": batch, "setting": " ".join(more) or "bf16", "ratio to bare": "out of memory"})
                continue
            flops = seen.get("flops") or next(row["flops"] for row in rows if (row["stage"], row["batch"], row["setting"]) == (stage, batch, "bf16"))
            rows.append({"stage": stage, "batch": batch, "setting": " ".join(more) or "bf16", "script, s a step": row["script, s a step"],
                         "bare step by events, s": seen["event_s"], "ratio to bare": row["ratio"], "flops": flops,
                         "utilisation": flops / seen["event_s"] / peak, "peak memory, MB": round(seen["memory"]) if cuda else ""})
    columns = list(rows[0])
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    write_results(f"gpu-{'smoke' if args.smoke else 'sd15'}", "gpu.py", argv, f"{args.image_size} px, BF16, frozen UNet in BF16, LoRA rank 8; a BF16 "
                  f"matrix product reaches {peak / 1e12:.1f} TFLOP/s; median [lowest, highest]", rows)


if __name__ == "__main__":
    run_main(main)
