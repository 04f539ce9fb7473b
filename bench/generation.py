"""What generate.py adds to the bare pipeline call, and what fewer steps and bits cost and save.

    python bench/generation.py    # after the default run; writes bench/results/generation-* and ways-*
    python bench/generation.py --sd15 --only time       # SD 1.5's architecture with random weights

Time: draw(), which makes generate.py's pictures, over the call of diffusers' pipeline with the same prompts,
seeds, steps and sounds, guidance on, in turns. The bare call takes one sound for the batch, as stock
diffusers does. Ways: evaluate.py's judge on pictures of held-out sounds, by the flags that draw them, and
their times, in turns. Memory and the time of a whole generate.py, with compiling, are of one process each."""

import argparse
import ast
import shlex
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import bench_tools as tools
import torch
from tqdm import tqdm

from clap2diffusion.base import hub
from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.settings import GUIDANCE, Number, check_sampling
from clap2diffusion.base.statistics import interval
from clap2diffusion.pictures.generation import draw, embed, load_clap
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter
from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures, sampling

LCM = "--scheduler lcm --lora {lcm}"
WAYS = {"plain": "", "bf16": "--precision bf16", "nf4": "--precision bf16 --frozen-dtype nf4",
        "compile": "--compile", "bf16, compile": "--precision bf16 --compile",
        "base, 4 steps": "--steps 4",
        "dpm, 8 steps": "--scheduler dpm --steps 8", "dpm, 4 steps": "--scheduler dpm --steps 4",
        "unipc, 8 steps": "--scheduler unipc --steps 8", "unipc, 4 steps": "--scheduler unipc --steps 4",
        "unipc, 3 steps": "--scheduler unipc --steps 3", "unipc, 2 steps": "--scheduler unipc --steps 2",
        "lcm, LCM LoRA": LCM, "lcm, LCM LoRA, 2 steps": f"{LCM} --steps 2",
        "lcm, LCM LoRA, 1 step": f"{LCM} --steps 1",
        "lcm, LCM LoRA, guidance 1.5": f"{LCM} --guidance 1.5", "lcm, no LoRA": "--scheduler lcm"}
ALONE = ("plain", "bf16", "nf4", "compile", "lcm, LCM LoRA")  # whose memory and whole time differ
TITLES = {"top1_en": "top-1", "iis_cosine": "similarity to the true picture", "recall_at_1": "R@1",
          "both_heard": "both, heard pairs"}
PARSER = tools.bench_parser(__doc__, repeats=7, batch_size=8, image_size=64)
add = PARSER.add_argument
add("--only", nargs="+", choices=("time", "ways"), default=["time", "ways"], help="what to measure")
add("--run", default="runs/tiny", help="the run whose pictures are judged")
add("--data-root", default="", help="its data ('' = where they were in training)")
add("--lcm-lora", default="assets/tiny/lcm_lora.safetensors", help="the LCM LoRA of its base model")
add("--steps", type=Number(int, 1), default=25, help="sampling steps that are timed")
add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
add("--clips", type=Number(int, 10), default=120, help="held-out sounds that are judged")


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


def one_picture(args, flags: list[str], sound: Path, place: Path) -> tuple[float, float]:
    """Peak memory in MB and seconds of a whole generate.py that makes one picture."""
    code = ("import sys, torch, generate; generate.main(sys.argv[1:]); "
            "from clap2diffusion.base.device import peak_memory_mb; "
            "print(peak_memory_mb(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))")
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code, "--run", args.run, "--audio", sound, "--out",
                           place / "one.png", *flags], cwd=tools.ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RunFailed(f"generate.py {shlex.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
    return ast.literal_eval(done.stdout.splitlines()[-1])["rss"], time.time() - began


def judge_ways(args, place: Path) -> list[dict]:
    """Each way of WAYS to draw: judged on the same sounds and noise, timed in turns, its memory alone."""
    import evaluate  # here: its page needs matplotlib, and the times do not
    from clap2diffusion.judging.clips import Clips, find_data
    from clap2diffusion.judging.evaluation import Judged
    from clap2diffusion.judging.judge import Judge
    parser, pipes, asked, shown = evaluate.build_parser(), {}, {}, {}
    adapter = find_adapter(args.run)
    facts = adapter_facts(adapter)
    base = hub.find_trained("", facts["base_model"], "base model", adapter)
    for name, flags in WAYS.items():
        shown[name] = shlex.split(flags.format(lcm=args.lcm_lora))
        asked[name] = parser.parse_args(["--run", args.run, "--data-root", args.data_root, *shown[name]])
        check_sampling(asked[name])
    plain = asked["plain"]
    clips = Clips(find_data(plain, adapter), "test", args.clips, facts["image_size"])
    judged, encoder = Judged(Judge(plain.judge), clips), load_clap("", facts, adapter)
    audio_embeds = torch.cat([embed(encoder, str(row.audio_path)) for row in clips.rows])  # (n, E)
    device, _ = pick_device("auto", "fp32")

    def draw_batch(name: str, at: int) -> list:
        how, chunk = asked[name], range(at, min(at + args.batch_size, len(audio_embeds)))
        return pictures(pipes[name], audio_embeds[chunk], [""] * len(chunk), how.guidance, how.steps,
                        [*chunk], size=facts["image_size"])

    rows = []
    for name, how in asked.items():
        pipes[name] = load_stock_pipeline(base, adapter, device, DTYPES[how.precision], **sampling(how))
        batches = range(0, len(audio_embeds), args.batch_size)
        images = [image for at in tqdm(batches, **bar_options(desc=name)) for image in draw_batch(name, at)]
        found = judged.measures(judged.judge.images(images))
        rows.append({"way": name, "steps": how.steps, "guidance": how.guidance,
                     **{title: [round(value, 4) for value in interval(found[key])]
                        for key, title in TITLES.items() if key in found}})
    turns = tools.in_turns(args.repeats, *(partial(lambda name, turn: draw_batch(name, 0), name)
                                           for name in asked))
    for row, seconds in zip(rows, turns, strict=True):
        peak, whole = (one_picture(args, shown[row["way"]], clips.rows[0].audio_path.absolute(), place)
                       if row["way"] in ALONE else ("", ""))
        unet = sum(p.numel() * p.element_size() for p in pipes[row["way"]].unet.parameters()) / 1e6
        row |= {"of plain's time": tools.ratios(seconds, turns[0]),
                "s a picture": statistics.median(seconds) / min(args.batch_size, len(audio_embeds)),
                "UNet, MB": round(unet, 1), "peak memory, MB": peak, "generate.py, s": whole}
    return rows


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    if "time" in args.only:
        about = (f"{args.steps} steps, {args.image_size} px, {args.precision}, guidance {GUIDANCE:g}, "
                 f"{args.repeats} turns after a warm-up; median [lowest, highest]")
        tools.write_results(f"generation-{args.size}", about, time_pictures(args, place))
    if "ways" in args.only:
        about = (f"{args.clips} held-out sounds, seed 0, batches of {args.batch_size}; mean and 95 % "
                 f"interval; times of {args.repeats} turns after a warm-up; median [lowest, highest]")
        tools.write_results("ways", about, judge_ways(args, place))
