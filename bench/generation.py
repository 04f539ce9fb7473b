"""What generate.py adds to the bare pipeline call, and what fewer steps cost in quality.

    python bench/generation.py                    # after the default run, whose pictures it judges; writes bench/results/generation-DEVICE and few-steps-DEVICE .{json,md}
    python bench/generation.py --sd15 --only time # SD 1.5's architecture with random weights

Time: generate.draw(), which makes generate.py's pictures, over the call of diffusers' pipeline with the same prompts, seeds,
steps and sounds, guidance on, in turns. The bare call takes one sound for the batch, as stock diffusers does. Quality:
evaluate.py's judge on pictures of held-out sounds, by scheduler and steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench_tools import call, model_flags, models, spread, write_results

from config import GUIDANCE, Number, new_parser, run_main

QUALITY = (("base", 25), ("base", 12), ("base", 8), ("base", 4), ("dpm", 8), ("dpm", 4), ("unipc", 8), ("unipc", 4))


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--only", nargs="+", choices=("time", "quality"), default=["time", "quality"], help="what to measure")
    add("--run", default="runs/tiny", help="the run whose pictures are judged")
    add("--batch-size", type=Number(int, 1, 16), default=8, help="pictures at once")
    add("--steps", type=Number(int, 1), default=25, help="sampling steps that are timed")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=64, help="side of the timed pictures")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
    add("--repeats", type=Number(int, 1), default=7, help="turns")
    add("--clips", type=Number(int, 10), default=300, help="held-out sounds that are judged")
    return parser


def time_pictures(args, place: Path) -> list[dict]:
    import torch

    import common
    import generate
    import stock
    named = models(args, place)
    # an adapter of the right shape: what it knows costs no time
    call("prepare_data.py", "world", "--out", place / "world", "--train", 16, "--val", 2, "--test", 2)
    call("train_stage1.py", "--config", "", "--data-root", place / "world", "--run", place / "run", "--cache-dir", place / "cache", *named,
         "--image-size", 64, "--batch-size", 1, "--steps", 1, "--samples", 0, "--val-draws", 1, "--val-clips", 2)
    adapter = place / "run/stage1/adapter.safetensors"
    device, _ = common.pick_device("auto", args.precision)
    pipe = stock.load_stock_pipeline(Path(named[1]), adapter, device, common.DTYPES[args.precision])
    audio_embeds = torch.nn.functional.normalize(torch.randn(args.batch_size, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    seeds = list(range(args.batch_size))
    asked = argparse.Namespace(attention_map=False, prompt="", guidance=GUIDANCE, steps=args.steps, batch_size=args.batch_size)
    both = torch.stack([torch.zeros(1, 512), audio_embeds[:1]]).to(device, pipe.unet.dtype)  # (2, 1, E)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def bare():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe([""] * len(seeds), ip_adapter_image_embeds=[both], guidance_scale=GUIDANCE, num_inference_steps=args.steps,
                    generator=generators, height=args.image_size, width=args.image_size).images

    ours, alone = [], []
    for turn in range(args.repeats + 1):
        began = now()
        generate.draw(asked, pipe, audio_embeds, seeds, size=args.image_size)
        middle = now()
        bare()
        if turn:  # the first is a warm-up
            ours.append(middle - began)
            alone.append(now() - middle)
    return [{"pictures": args.batch_size, "generate.py, s": spread(ours), "bare pipeline, s": spread(alone),
             "ratio": spread([a / b for a, b in zip(ours, alone, strict=True)])}]


def judge_few_steps(args) -> list[dict]:
    import evaluate
    import judge
    import metrics
    rows, judged = [], None
    for scheduler, steps in QUALITY:
        asked = evaluate.build_parser().parse_args(["--run", args.run, "--clips", str(args.clips), "--steps", str(steps), "--scheduler", scheduler])
        subject = evaluate.Subject(asked.run, asked)
        clips = evaluate.Clips(evaluate.find_data(asked, subject.adapter_path), "test", args.clips, subject.facts["image_size"])
        subject.load(clips)
        judged = judged or evaluate.Judged(judge.Judge(asked.judge), clips)
        with tempfile.TemporaryDirectory() as fresh:
            subject.pictures_dir = Path(fresh)
            images = subject.pictures("right", subject.audio_embeds, list(range(len(clips.rows))))
        found = judged.measures(judged.judge.images(images))
        rows.append({"scheduler": scheduler, "steps": steps,
                     **{title: [round(value, 4) for value in metrics.interval(found[key])] for key, title in (
                         ("top1_en", "top-1"), ("iis_cosine", "image similarity, cosine"), ("recall_at_1", "R@1"),
                         ("pairs_heard", "both, heard pairs"), ("pairs_unheard", "both, unheard pairs")) if key in found}})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if "time" in args.only:
        with tempfile.TemporaryDirectory() as place:
            rows = time_pictures(args, Path(place))
        write_results(f"generation-{'sd15' if args.sd15 else 'tiny'}", "generation.py", argv, f"{args.steps} steps, {args.image_size} px, "
                      f"{args.precision}, guidance {GUIDANCE:g}, {args.repeats} turns after a warm-up; median [lowest, highest]", rows)
    if "quality" in args.only:
        write_results("few-steps", "generation.py", argv, f"adapter of {args.run}, {args.clips} held-out sounds, seed 0, guidance {GUIDANCE:g}; "
                      "mean and 95 % interval", judge_few_steps(args))


if __name__ == "__main__":
    run_main(main)
