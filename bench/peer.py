"""How much faster than what people run today? Stage 2 against the usual loop that encodes in every step.

    python bench/peer.py                # the default model; writes bench/results/peer-tiny-DEVICE.{json,md}
    python bench/peer.py --sd15 --image-size 256 --batch-size 1 --steps 5
    python bench/peer.py --published train_text_to_image_lora.py    # pip install datasets torchvision

Each is a process of its own, in turns, on the same UNet, LoRA, pictures, batch and resolution: ours with its
features cached (train_stage2.py), the loop (peer_loop.py: VAE, text encoder and CLAP in every step), and
diffusers' published script, which has no sound. Seconds a step are the median between optimizer steps; the
first step's time is from the start of the process; memory is the peak of the steps after the first one.
"""

import json
from pathlib import Path

import bench_tools as tools

from clap2diffusion.base.exits import UserError

PUBLISHED = "train_text_to_image_lora.py"
PARSER = tools.bench_parser(__doc__, steps=40, repeats=5, batch_size=16, image_size=64)
PARSER.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"],
                    help="precisions to run each in")
PARSER.add_argument("--published", default="", help=f"diffusers' {PUBLISHED} of the installed version")


def link_pictures(world: Path, folder: Path) -> None:
    """The world's training pictures once more, as Hugging Face's imagefolder."""
    folder.mkdir()
    listed = []
    for row in map(json.loads, (world / "metadata.jsonl").read_text().splitlines()):
        if row["split"] == "train":
            name = Path(row["image_file_name"]).name
            (folder / name).symlink_to(world / row["image_file_name"])
            listed.append(json.dumps({"file_name": name, "text": row["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(listed) + "\n")


def commands(args, place: Path, ours: list, named: list[str], precision: str) -> dict[str, list]:
    """The command of each contestant."""
    frozen = ["--frozen-dtype", "bf16"] if precision == "bf16" else []
    found = {"ours": ["train_stage2.py", *ours, "--init-from", place / "stage1", "--run", tools.RUN,
                      "--steps", args.steps, "--precision", precision, *frozen],
             "loop": [tools.HERE / "peer_loop.py", place / "world", named[1], named[3], args.image_size,
                      args.batch_size, args.steps, precision]}
    if args.published:
        found[PUBLISHED] = [
            Path(args.published).resolve(), "--pretrained_model_name_or_path", named[1], "--train_data_dir",
            place / "pictures", "--cache_dir", place / "datasets", "--output_dir", place / "published",
            "--resolution", args.image_size, "--train_batch_size", args.batch_size, "--rank", 8, "--seed", 0,
            "--max_train_steps", args.steps, "--checkpointing_steps", 100000,
            "--mixed_precision", "no" if precision == "fp32" else "bf16"]
    return found


def main(args, place: Path) -> None:
    if args.published and not Path(args.published).is_file():
        raise UserError(f"--published {args.published}: is not a file; expected diffusers' {PUBLISHED}")
    tools.make_world(place / "world", max(16, args.batch_size * 4))
    link_pictures(place / "world", place / "pictures")
    named = tools.models(args, place)
    ours = [*tools.stage_flags(place, named, args.image_size), "--batch-size", str(args.batch_size)]
    tools.call("train_stage1.py", *ours, "--run", place, "--steps", 1)  # which caches the features
    each = {(name, precision): command for precision in args.precisions
            for name, command in commands(args, place, ours, named, precision).items()}
    found = tools.watched_turns(place, args.repeats, each, args.steps)
    step_s = {key: [run["step_s"] for run in seen] for key, seen in found.items()}
    rows = [{"what": f"{name}, {precision}", "s a step": tools.spread(step_s[name, precision]),
             **{f"ours in {one} is faster by": tools.ratios(step_s[name, precision], step_s["ours", one])
                for one in args.precisions},
             "peak memory, MB": round(max(run["memory_mb"][-1] for run in seen)),
             "first step done after, s": tools.spread(run["steps"][0] for run in seen)}
            for (name, precision), seen in found.items()]
    about = (f"batch {args.batch_size}, {args.image_size} px, LoRA rank 8, {args.steps} steps, "
             f"{args.repeats} turns; median [lowest, highest]")
    tools.write_results(f"peer-{tools.size_name(args)}", about, rows)


if __name__ == "__main__":
    tools.start(main, PARSER)
