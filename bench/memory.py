"""What each memory setting saves and costs: stage 2 with it, alone, and all together, against plain.

    python bench/memory.py    # the default model; writes bench/results/memory-tiny-64-16-DEVICE.{json,md}
    python bench/memory.py --sd15 --image-size 128 --batch-size 2 --steps 4 --repeats 1

Each setting is the real train_stage2.py in a process of its own, in turns, with the same seed, steps and
data. Memory is the peak of the steps after the first one, without loading and export: on CUDA what was
reserved by the last one, on a CPU the process's resident set, Python and torch included. The validation loss
is that of the last weights; its difference from plain's is paired by clip, with a 95 % interval. `batch x 2`
shows what the saved memory buys."""

from pathlib import Path

import bench_tools as tools

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.statistics import interval

BF16, NF4 = ["--frozen-dtype", "bf16"], ["--frozen-dtype", "nf4"]
DOWN, ALL = ["--checkpointing", "down"], ["--checkpointing", "all"]
SETTINGS = {
    "plain": [], "frozen bf16": BF16, "frozen nf4": NF4, "8-bit Adam": ["--adam-8bit"],
    "checkpointing down": DOWN, "checkpointing all": ALL, "channels_last": ["--channels-last"],
    "accumulation 2": ["--accumulation", "2"], "EMA": ["--ema-decay", "0.99"],
    "EMA on the CPU": ["--ema-decay", "0.99", "--ema-on-cpu"], "compile": ["--compile"],
    "bf16, channels_last, compile": [*BF16, "--channels-last", "--compile"],
    "bf16, checkpointing down": BF16 + DOWN, "bf16, checkpointing all": BF16 + ALL,
    "bf16, checkpointing all, batch x 2": BF16 + ALL,
    "nf4, 8-bit, checkpointing all": [*NF4, "--adam-8bit", *ALL],
    "nf4, 8-bit, checkpointing all, batch x 2": [*NF4, "--adam-8bit", *ALL]}
PARSER = tools.bench_parser(__doc__, steps=60, repeats=1, batch_size=16, image_size=64)
PARSER.add_argument("--only", nargs="+", choices=[*SETTINGS],
                    default=[name for name in SETTINGS if "compile" not in name],
                    help="settings (default: all but those with compile, whose first step takes minutes)")
PARSER.add_argument("--precision", choices=("bf16", "fp32"), default="bf16",
                    help="autocast; settings that need bf16 run in it always")


def compare(name: str, seen: dict, plain: dict, real: bool) -> dict:
    """A row of the table: a setting's runs against the plain ones."""
    change = ""
    if name != "plain" and not real:  # random weights have nothing to lose
        # of the last step's weights in the first turn; the best ones are validated after them
        last = zip(seen["losses"][0][-2], plain["losses"][0][-2], strict=True)
        change = [round(value, 6) for value in interval([a - b for a, b in last])]
    return {"setting": name, "peak memory, MB": round(max(seen["peak_mb"])),
            "of plain": round(tools.ratios(seen["peak_mb"], plain["peak_mb"])[2], 2),
            "s a step": tools.spread(seen["step_s"]),
            "of plain's": tools.ratios(seen["step_s"], plain["step_s"]), "loss - plain's": change}


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    if "accumulation 2" in args.only and args.batch_size % 2:
        if args.batch_size > 1:
            raise UserError(f"--batch-size {args.batch_size}: accumulation 2 halves it; give an even number")
        args.only.remove("accumulation 2")
    if args.only[0] != "plain":
        raise UserError("--only: everything is compared with plain; name it first")
    real = args.size != "tiny"
    world = tools.make_world(place / "world", 8 * args.batch_size, 2 if real else 50)
    flags = tools.stage_flags(world, tools.models(args, place), args.image_size)
    flags += ["--val-batch-size", "4", "--log-every", "1"]
    tools.call("train_stage1.py", *flags, "--run", place, "--steps", 1, "--batch-size", 1,
               "--precision", args.precision)
    commands = {}
    for name in args.only:
        scale = 2 if "batch x 2" in name else 0.5 if "accumulation" in name else 1
        precision = "bf16" if "--frozen-dtype" in SETTINGS[name] else args.precision
        commands[name] = ["train_stage2.py", *flags, "--init-from", place / "stage1", "--run", tools.RUN,
                          "--steps", args.steps, "--precision", precision, "--learning-rate", 3e-4,
                          "--batch-size", int(args.batch_size * scale), *SETTINGS[name]]
    about = (f"stage 2, batch {args.batch_size}, {args.image_size} px, {args.precision}, {args.steps} steps, "
             f"runs of each: {args.repeats}, in turns; median [lowest, highest]")

    def write(found: dict, done: bool = False) -> None:
        rows = [compare(name, seen, found["plain"], real) for name, seen in found.items()]
        tools.write_results(f"memory-{args.size}-{args.image_size}-{args.batch_size}", about, rows, done=done)

    write(tools.watched_turns(place, args.repeats, commands, args.steps * real, write), done=True)
