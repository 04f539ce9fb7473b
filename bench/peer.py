"""How much faster than what people run today? Stage 2 against the usual loop that encodes in every step.

    python bench/peer.py                          # the default model; writes bench/results/peer-tiny-DEVICE.{json,md}
    python bench/peer.py --sd15 --image-size 256 --batch-size 1 --steps 5
    python bench/peer.py --published train_text_to_image_lora.py    # diffusers' own script too (pip install datasets torchvision)

Each is a process of its own, in turns, on the same UNet, LoRA, pictures, batch and resolution: ours with its features
cached (train_stage2.py), the loop (peer_loop.py: VAE, text encoder and CLAP in every step), and the published script,
which has no sound. Seconds a step are the median between optimizer steps; the first step's time is from the start of the
process; memory is the peak of the steps after the first one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bench_tools import HERE, call, model_flags, models, spread, watched, write_results

from config import Number, UserError, new_parser, run_main


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--steps", type=Number(int, 3), default=40, help="optimizer steps of each")
    add("--repeats", type=Number(int, 1), default=5, help="turns")
    add("--batch-size", type=Number(int, 1), default=16, help="samples in a step")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=64, help="side of the pictures")
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="precisions to run each in")
    add("--published", default="", help="diffusers' train_text_to_image_lora.py of the installed version, to run it beside")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.published and not Path(args.published).is_file():
        raise UserError(f"--published {args.published}: is not a file; expected diffusers' train_text_to_image_lora.py")
    from tqdm import tqdm
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        world, n = place / "world", max(16, args.batch_size * 4)
        call("prepare_data.py", "world", "--out", world, "--train", n, "--val", 2, "--test", 2)
        rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]
        pictures = place / "pictures"  # the same training pictures as Hugging Face's imagefolder
        pictures.mkdir()
        listed = []
        for row in (row for row in rows if row["split"] == "train"):
            name = Path(row["image_file_name"]).name
            (pictures / name).symlink_to(world / row["image_file_name"])
            listed.append(json.dumps({"file_name": name, "text": row["text"]}))
        (pictures / "metadata.jsonl").write_text("\n".join(listed) + "\n")

        named = models(args, place)
        common = ["--data-root", world, *named, "--image-size", args.image_size, "--batch-size", args.batch_size]
        ours = ["--config", "", *common, "--cache-dir", place / "cache", "--validate-every", 0, "--val-draws", 1, "--samples", 0,
                "--save-every", 100000]
        call("train_stage1.py", *ours, "--run", place, "--steps", 1)  # which caches the features

        def contestant(name: str, precision: str, turn: int) -> list:
            if name == "ours":
                frozen = ["--frozen-dtype", "bf16"] if precision == "bf16" else []
                return ["train_stage2.py", *ours, "--init-from", place / "stage1", "--run", place / f"{precision}-{turn}", "--steps",
                        args.steps, "--precision", precision, *frozen]
            if name == "loop":
                return [HERE / "peer_loop.py", *common, "--steps", args.steps, "--precision", precision]
            return [Path(args.published).resolve(), "--pretrained_model_name_or_path", named[1], "--train_data_dir", pictures,
                    "--cache_dir", place / "datasets", "--output_dir", place / "published", "--resolution", args.image_size,
                    "--train_batch_size", args.batch_size, "--max_train_steps", args.steps, "--rank", 8, "--seed", 0,
                    "--checkpointing_steps", 100000, "--mixed_precision", "no" if precision == "fp32" else "bf16"]

        names = ["ours", "loop"] + (["published"] if args.published else [])
        found = {(name, precision): [] for precision in args.precisions for name in names}
        for turn in range(args.repeats):
            for name, precision in tqdm(found, desc=f"turn {turn + 1} of {args.repeats}", unit="run"):
                found[name, precision].append(watched(place / "seen.json", *contestant(name, precision, turn), steps=args.steps))

    def against(seen: list[dict], precision: str) -> list[float]:
        """[median, lowest, highest] of how many times our steps a second are theirs."""
        return spread([theirs["step_s"] / own["step_s"] for theirs, own in zip(seen, found["ours", precision], strict=True)])

    rows = []
    for (name, precision), seen in found.items():
        rows.append({"what": f"{'train_text_to_image_lora.py' if name == 'published' else name}, {precision}",
                     "s a step": spread([run["step_s"] for run in seen]),
                     **{f"ours in {one} is faster by": against(seen, one) for one in args.precisions},
                     "peak memory, MB": round(max(run["memory_mb"][-1] for run in seen)),
                     "first step done after, s": spread([run["steps"][0] for run in seen])})
    about = (f"batch {args.batch_size}, {args.image_size} px, LoRA rank 8, {args.steps} steps, {args.repeats} turns; median [lowest, highest]")
    write_results(f"peer-{'sd15' if args.sd15 else 'tiny'}", "peer.py", argv, about, rows)


if __name__ == "__main__":
    run_main(main)
