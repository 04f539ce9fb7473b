"""What each memory setting saves and costs: stage 2 with it, alone, and all together, against plain BF16.

    python bench/memory.py                        # the default model; writes bench/results/memory-tiny-DEVICE.{json,md}
    python bench/memory.py --sd15 --image-size 128 --steps 4 --repeats 1

Each setting is the real train_stage2.py in a process of its own, in turns, with the same seed, steps and data. Memory is the
peak when the last step is done (on CUDA what was reserved, on a CPU the process's resident set, Python and torch included),
before the export. The validation loss is that of the last weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from config import Number, RunFailed, new_parser, run_main, write_atomic, write_json  # noqa: E402

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
    "all but compile": ["--frozen-dtype", "nf4", "--adam-8bit", "--checkpointing", "all", "--channels-last"]}


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--sd15", action="store_true", help="SD 1.5's architecture with random weights instead of the default's models")
    add("--only", nargs="+", choices=[*SETTINGS], default=[name for name in SETTINGS if name != "compile"], help="settings")
    add("--steps", type=Number(int, 2), default=60, help="optimizer steps")
    add("--repeats", type=Number(int, 1), default=1, help="runs of each setting, in turns")
    add("--batch-size", type=Number(int, 2, multiple_of=2), default=16, help="samples in a step; accumulation halves it")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=64, help="side of the pictures")
    return parser


def call(*command) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{' '.join(map(str, command))}: {done.stderr.strip().splitlines()[-1]}")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch
    from tqdm import tqdm
    found: dict[str, list[dict]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        base, clap = "assets/tiny/base", "assets/tiny/clap"
        if args.sd15:
            from models import make_sd15
            make_sd15(place)
            base, clap = place / "base", place / "clap"
        call("prepare_data.py", "world", "--out", place / "world", "--train", 400, "--val", 20, "--test", 2)
        flags = ["--config", "", "--data-root", place / "world", "--cache-dir", place / "cache", "--base-model", base, "--clap-model", clap,
                 "--image-size", args.image_size, "--precision", "bf16", "--validate-every", 0, "--val-draws", 1, "--samples", 0,
                 "--save-every", 100000, "--log-every", 1]
        call("train_stage1.py", *flags, "--run", place, "--steps", 1, "--batch-size", 2)
        for turn in range(args.repeats):
            for name in tqdm(args.only, desc=f"turn {turn + 1} of {args.repeats}", unit="setting"):
                run = place / f"{name.replace(' ', '-')}-{turn}"
                batch = args.batch_size // 2 if name.startswith("accumulation") else args.batch_size
                call("train_stage2.py", *flags, "--init-from", place / "stage1", "--run", run, "--steps", args.steps, "--batch-size", batch,
                     "--learning-rate", 3e-4, *SETTINGS[name])
                lines = [json.loads(line) for line in (run / "stage2/log.jsonl").read_text().splitlines()]
                steps = [line for line in lines if "loss" in line]
                seconds = [b["s_per_step"] * b["step"] - a["s_per_step"] * a["step"] for a, b in zip(steps, steps[1:])]
                found[name].append({"memory_mb": steps[-1]["memory_mb"], "s_per_step": statistics.median(seconds),
                                    "val_right": [line for line in lines if "val_right" in line][-1]["val_right"]})
    rows = [{"setting": name, **{key: statistics.median(run[key] for run in runs) for key in ("memory_mb", "s_per_step")},
             "val_right": runs[0]["val_right"]} for name, runs in found.items()]
    plain = rows[0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    command = ("python bench/memory.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip()
    lines = [f"`{command}`: {device}, torch {torch.__version__}, stage 2, batch {args.batch_size}, {args.image_size} px, BF16, {args.steps} steps, "
             f"{args.repeats} runs of each, in turns; the share is of `{plain['setting']}`.", "",
             "| setting | peak memory, MB | share | s a step | share | validation loss, right sound |", "|---|---|---|---|---|---|"]
    lines += [f"| {row['setting']} | {row['memory_mb']:.0f} | {row['memory_mb'] / plain['memory_mb']:.2f} | {row['s_per_step']:.3f} | "
              f"{row['s_per_step'] / plain['s_per_step']:.2f} | {row['val_right'][0]:.5f} [{row['val_right'][1]:.5f}, {row['val_right'][2]:.5f}] |"
              for row in rows]
    name = f"memory-{'sd15' if args.sd15 else 'tiny'}-{device.split(',')[0].replace(' ', '-')}"
    write_json(HERE / "results" / f"{name}.json", {"command": command, "device": device, "torch": torch.__version__, "rows": rows})
    write_atomic(HERE / "results" / f"{name}.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
