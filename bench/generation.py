"""What generate.py adds to the bare pipeline call, and what fewer steps cost in quality.

    python bench/generation.py    # after the default run; writes bench/results/generation-* and few-steps-*
    python bench/generation.py --sd15 --only time       # SD 1.5's architecture with random weights

Time: draw(), which makes generate.py's pictures, over the call of diffusers' pipeline with the same prompts,
seeds, steps and sounds, guidance on, in turns. The bare call takes one sound for the batch, as stock
diffusers does. Quality: evaluate.py's judge on pictures of held-out sounds, by scheduler and steps."""

import argparse
from pathlib import Path

import bench_tools as tools
import torch

from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.settings import GUIDANCE, Number
from clap2diffusion.base.statistics import interval
from clap2diffusion.pictures.generation import draw
from clap2diffusion.pictures.pipelines import load_stock_pipeline

QUALITY = (*(("base", steps) for steps in (25, 12, 8, 4)), ("dpm", 8), ("dpm", 4), ("unipc", 8), ("unipc", 4))
TITLES = {"top1_en": "top-1", "iis_cosine": "image similarity, cosine", "recall_at_1": "R@1",
          "both_heard": "both, heard pairs", "both_unheard": "both, unheard pairs"}
PARSER = tools.bench_parser(__doc__, repeats=7, batch_size=8, image_size=64)
add = PARSER.add_argument
add("--only", nargs="+", choices=("time", "quality"), default=["time", "quality"], help="what to measure")
add("--run", default="runs/tiny", help="the run whose pictures are judged")
add("--steps", type=Number(int, 1), default=25, help="sampling steps that are timed")
add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
add("--clips", type=Number(int, 10), default=300, help="held-out sounds that are judged")


def time_pictures(args, place: Path) -> list[dict]:
    base, clap = tools.models(args, place)
    flags = tools.stage_flags(tools.make_world(place / "world", 16), (base, clap), 64)
    # an adapter of the right shape: what it knows costs no time
    tools.call("train_stage1.py", *flags, "--run", place / "run", "--batch-size", 1, "--steps", 1,
               "--val-clips", 2)
    device, _ = pick_device("auto", args.precision)
    adapter = place / "run/stage1/adapter.safetensors"
    pipe = load_stock_pipeline(base, adapter, device, DTYPES[args.precision])
    noise = torch.randn(args.batch_size, 512, generator=torch.Generator().manual_seed(0))
    audio_embeds, seeds = torch.nn.functional.normalize(noise, dim=-1), list(range(args.batch_size))
    both = torch.stack([torch.zeros(1, 512), audio_embeds[:1]]).to(device, pipe.unet.dtype)  # (2, 1, E)
    asked = argparse.Namespace(**vars(args), attention_map=False, prompt="", guidance=GUIDANCE)

    def ours(turn: int) -> None:
        draw(asked, pipe, audio_embeds, seeds, size=args.image_size)

    @torch.inference_mode()
    def bare(turn: int) -> None:
        pipe([""] * len(seeds), ip_adapter_image_embeds=[both], guidance_scale=GUIDANCE,
             num_inference_steps=args.steps, height=args.image_size, width=args.image_size,
             generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    found = tools.in_turns(args.repeats, ours, bare)
    return [{"pictures": args.batch_size, "generate.py, s": tools.spread(found[0]),
             "bare pipeline, s": tools.spread(found[1]), "ratio": tools.ratios(*found)}]


def judge_few_steps(args, place: Path) -> list[dict]:
    import evaluate  # here: its page needs matplotlib, and the times do not
    from clap2diffusion.judging.clips import Clips, find_data
    from clap2diffusion.judging.evaluation import Judged, Subject
    from clap2diffusion.judging.judge import Judge
    rows, judged = [], None
    for scheduler, steps in QUALITY:
        flags = ["--run", args.run, "--clips", args.clips, "--steps", steps, "--scheduler", scheduler]
        asked = evaluate.build_parser().parse_args(list(map(str, flags)))
        subject = Subject(asked.run, asked)
        if judged is None:
            data_root, side = find_data(asked, subject.adapter_path), subject.facts["image_size"]
            judged = Judged(Judge(asked.judge), Clips(data_root, "test", args.clips, side))
        subject.load(judged.clips)
        subject.pictures_dir = place / f"{scheduler}-{steps}"
        subject.pictures_dir.mkdir()
        images = subject.pictures("right", subject.audio_embeds, list(range(len(judged.clips.rows))))
        found = judged.measures(judged.judge.images(images))
        rows.append({"scheduler": scheduler, "steps": steps,
                     **{title: [round(value, 4) for value in interval(found[key])]
                        for key, title in TITLES.items() if key in found}})
    return rows


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    if "time" in args.only:
        about = (f"{args.steps} steps, {args.image_size} px, {args.precision}, guidance {GUIDANCE:g}, "
                 f"{args.repeats} turns after a warm-up; median [lowest, highest]")
        tools.write_results(f"generation-{args.size}", about, time_pictures(args, place))
    if "quality" in args.only:
        about = (f"adapter of {args.run}, {args.clips} held-out sounds, seed 0, guidance {GUIDANCE:g}; "
                 "mean and 95 % interval")
        tools.write_results("few-steps", about, judge_few_steps(args, place))
