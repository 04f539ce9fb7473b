"""Step time, use of the device and memory of all three stages, by batch.

    python bench/gpu.py --models /tmp/sd15        # writes bench/results/gpu-DEVICE.{json,md}
    python bench/gpu.py --small --image-size 64 --batches 2 1    # few channels: shows that it runs

gpu.sh runs it on SD 1.5's architecture at 512 px. The real scripts run as in step.py. Beside the script's and
the bare step's time stand: the bare step by itself, with nothing between; utilisation, which is its
floating-point operations (torch's own count) over that time over what a BF16 matrix product of 8192 x 8192
reaches on the same device; and the peak of reserved memory. A batch that does not fit ends its stage."""

import gc
import statistics
import time
from pathlib import Path

import bench_tools as tools
import torch
from step import make_stages, time_stage
from torch.utils.flop_counter import FlopCounterMode

from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.settings import Number

CUDA = torch.cuda.is_available()
COLUMNS = ("script, s a step", "bare step alone, s", "ratio to bare", "flops", "utilisation",
           "peak memory, MB")
PARSER = tools.bench_parser(__doc__, image_size=512)
PARSER.set_defaults(size="sd15", device="auto")
add = PARSER.add_argument
add("--pairs", type=Number(int, 5), default=5, help="pairs of blocks that count")
add("--block", type=Number(int, 1), default=2, help="steps in a block")
add("--stages", nargs="+", type=Number(int, 1, 3), default=[1, 2, 3], help="stages to time")
add("--batches", nargs="+", type=Number(int, 1), default=[8, 16, 1, 4, 32, 64, 2], help="in this order")
add("--compile", action="store_true", help="with --compile --channels-last, whose first step takes minutes")
add("--seconds", type=Number(float, 1), default=200.0, help="start nothing new after this long")


def peak_flops() -> float:
    """Operations a second of a BF16 matrix product of two squares, after a warm-up."""
    side = 8192 if CUDA else 512
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device="cuda" if CUDA else "cpu")
    return 2 * side ** 3 / statistics.median(*tools.in_turns(20, lambda turn: a @ b))


def measure(stage: int, flags: list[str], args, peak: float) -> dict:
    """One stage with one batch: its cells of COLUMNS. Raises torch.OutOfMemoryError."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row, _, times = time_stage(stage, flags, args)
    memory = round(torch.cuda.max_memory_reserved() / 2 ** 20) if CUDA else ""
    alone_s = statistics.median(*tools.in_turns(5, lambda turn: times.bare_step()))
    flops = share = ""  # a compiled UNet's operations cannot be counted
    if not args.compile:
        with FlopCounterMode(display=False) as counter:
            times.bare_step()
        flops = counter.get_total_flops()
        share = flops / alone_s / peak
    cells = row["script, s a step"], alone_s, row["ratio"], flops, share, memory
    return dict(zip(COLUMNS, cells, strict=True))


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    began, peak, rows, too_large = time.monotonic(), peak_flops(), [], {}
    about = (f"{args.image_size} px, BF16, frozen UNet in BF16, LoRA rank 8; a BF16 matrix product reaches "
             f"{peak / 1e12:.1f} TFLOP/s; median [lowest, highest]")
    world = tools.make_world(place / "world", max(16, *args.batches))
    flags = [*tools.stage_flags(world, tools.models(args, place), args.image_size), "--frozen-dtype", "bf16"]
    make_stages(3, [*flags, "--run", str(place / "run"), "--batch-size", "1"])
    plans = [(stage, batch) for batch in args.batches for stage in args.stages]
    more, name = ["--channels-last", "--compile"] if args.compile else [], f"gpu-{args.size}"
    name += "-compile" if args.compile else ""
    for stage, batch in plans:
        if batch >= too_large.get(stage, batch + 1) or time.monotonic() - began > args.seconds:
            continue
        run = place / f"run-{stage}-{batch}"
        own = [*flags, *more, "--run", str(run), "--batch-size", str(batch)]
        own += ["--init-from", str(place / f"run/stage{stage - 1}")] if stage > 1 else []
        row = {"stage": stage, "batch": batch, "setting": " ".join(more) or "bf16"}
        try:
            row |= measure(stage, own, args, peak)
        except torch.OutOfMemoryError:
            too_large[stage] = batch  # the smallest one
            row |= dict.fromkeys(COLUMNS, "") | {"ratio to bare": "out of memory"}
        rows.append(row)
        tools.write_results(name, about, rows, done=False)
    if not rows:
        raise RunFailed(f"bench/gpu.py --seconds {args.seconds:g}: nothing was timed, making the models and "
                        "features took longer; give more")
    tools.write_results(name, about, rows)
