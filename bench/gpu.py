"""Step time, use of the device and memory of all three stages, by batch; gpu.sh runs it on SD 1.5's architecture at 512 px.

    python bench/gpu.py --models /tmp/sd15        # writes bench/results/gpu-DEVICE.{json,md}
    python bench/gpu.py --smoke                   # the small models, two batches: shows that it runs

The real scripts run as in step.py. Beside the script's and the bare step's time: the bare step between two CUDA events,
utilisation, which is the step's floating-point operations (torch's own count) over that time over what a BF16 matrix
product of 8192 x 8192 reaches on the same device, and the peak of reserved memory. A batch that does not fit ends its stage.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
import time
from pathlib import Path

from bench_tools import model_flags, models, write_results
from step import time_stage

from config import Number, RunFailed, new_parser, run_main

COLUMNS = ("stage", "batch", "setting", "script, s a step", "bare step by events, s", "ratio to bare", "flops", "utilisation", "peak memory, MB")


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--smoke", action="store_true", help="the small models at 64 px, batches 1 and 2")
    add("--stages", nargs="+", type=Number(int, 1, 3), default=[1, 2, 3], help="stages to time")
    add("--batches", nargs="+", type=Number(int, 1), default=[1, 8, 16, 4, 32, 64, 2], help="batches, in this order")
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


def product_seconds(side: int, device: str, torch) -> float:
    """Median seconds of a BF16 matrix product of two squares, after a warm-up."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    event_seconds(lambda: a @ b, torch)
    return event_seconds(lambda: a @ b, torch, 20)


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
    peak = 2 * side ** 3 / product_seconds(side, "cuda" if cuda else "cpu", torch)
    rows, name = [], f"gpu-{'smoke' if args.smoke else 'sd15'}"
    about = (f"{args.image_size} px, BF16, frozen UNet in BF16, LoRA rank 8; a BF16 matrix product reaches {peak / 1e12:.1f} TFLOP/s; median "
             "[lowest, highest]")
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
        if cuda:  # beside the second batch: compiling takes minutes, and later ones may not be come to
            batch = args.batches[min(1, len(args.batches) - 1)]
            plans.insert(plans.index((2, batch, [])) + 1, (2, batch, ["--channels-last", "--compile"]))
        smallest_too_large: dict[int, int] = {}
        for stage, batch, more in plans:
            if batch >= smallest_too_large.get(stage, batch + 1) or time.monotonic() - began > args.seconds:
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
                flops = seen.get("flops") or next((row["flops"] for row in rows if (row["stage"], row["batch"]) == (stage, batch)), "")
                found = {"script, s a step": row["script, s a step"], "bare step by events, s": seen["event_s"], "ratio to bare": row["ratio"], "flops": flops,
                         "utilisation": flops / seen["event_s"] / peak if flops else "", "peak memory, MB": round(seen["memory"]) if cuda else ""}
            except torch.OutOfMemoryError:
                smallest_too_large[stage] = batch
                found = dict.fromkeys(COLUMNS[3:], "") | {"ratio to bare": "out of memory"}
            rows.append(dict(zip(COLUMNS, (stage, batch, " ".join(more) or "bf16"))) | found)
            with contextlib.redirect_stdout(None):
                write_results(name, "gpu.py", argv, about, rows)  # what is there, should the time run out
    if not rows:
        raise RunFailed(f"bench/gpu.py --seconds {args.seconds:g}: nothing was timed, making the models and features took longer; give more")
    write_results(name, "gpu.py", argv, about, rows)


if __name__ == "__main__":
    run_main(main)
