"""What the feature cache costs: to build it, and to train from one of 200,000 rows.

    python bench/cache.py               # writes bench/results/cache-build-* and cache-rows-*

Built: seconds of build_features() on an empty folder over seconds of the encoders alone on the same inputs,
decoded beforehand, in the same batches; in turns. From 200,000 rows: the real train_stage1.py on a manifest
of that length and on one of 1,000, in turns. Its files are hard links to a hundred real ones and its shards
hold made-up numbers: encoding 200,000 clips here would take hours. The stage's own code reads them all."""

import json
import os
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import bench_tools as tools
import numpy as np
import torch

from clap2diffusion.base.device import pick_device
from clap2diffusion.base.settings import Number
from clap2diffusion.dataset import cache, encoders
from clap2diffusion.dataset.manifest import read_manifest

PARSER = tools.bench_parser(__doc__, repeats=5, steps=60, image_size=64)
add = PARSER.add_argument
add("--only", nargs="+", choices=("build", "rows"), default=["build", "rows"], help="what to measure")
add("--clips", type=Number(int, 16), default=1200, help="clips of the built cache")
add("--rows", type=Number(int, 2000), default=200_000, help="rows of the long manifest")


def time_build(args, place: Path) -> list[dict]:
    """Build the same features again and again, and run their encoders alone in between."""
    device, (base, clap) = pick_device("auto", "fp32")[0], tools.models(args, place)
    clips = tools.make_world(place / "clips", args.clips - 4)
    rows, _ = read_manifest(clips)
    own = encoders.Encoders(base, clap, device)
    decode = cache.Decode(rows, args.image_size, own.clap.sampling_rate, own.clap.window_s, 1)
    decoded, captions = [decode[i] for i in range(len(rows))], sorted({"", *(row.text for row in rows)})

    def build(turn: int) -> None:
        cache.build_features(clips, base, clap, args.image_size, place / f"cache-{turn}", device=str(device),
                             workers=2 if device.type == "cuda" else 1, log=lambda _: None)

    @torch.inference_mode()
    def encode(turn: int) -> None:
        for i in range(0, len(captions), 16):
            own.text(captions[i:i + 16])
        for i in range(0, len(decoded), 16):  # a shard holds a multiple of 16
            own.rows([(image, [*map(own.clap.log_mel, sounds)], flags)
                      for image, sounds, flags in decoded[i:i + 16]], False, 16)

    built, alone = tools.in_turns(args.repeats, build, encode)
    return [{"clips": len(rows), "build, s": tools.spread(built), "encoders alone, s": tools.spread(alone),
             "ratio": tools.ratios(built, alone)}]


def fake_encoders(*_) -> SimpleNamespace:
    """What gives numbers of the right shapes, in no time."""
    rng = np.random.default_rng(0)
    shapes = {"latents_mean": (1, 4, 16, 16), "latents_std": (1, 4, 16, 16), "audio_embeds": (1, 512),
              "text": (32, 128)}
    bank = {name: torch.from_numpy(rng.standard_normal((16, *shape), dtype=np.float32))
            for name, shape in shapes.items()}
    text_embeds = bank.pop("text")

    def rows(decoded: list, *_) -> dict:
        return {name: torch.roll(values, decoded[0][0])[:len(decoded)] for name, values in bank.items()}

    return SimpleNamespace(device="cpu", text=lambda captions: text_embeds[:len(captions)], rows=rows,
                           clap=SimpleNamespace(sampling_rate=48000, window_s=4.0, log_mel=None))


def make_rows(few: Path, folder: Path, n: int) -> None:
    """A data folder of n rows, whose files are hard links to those of the folder `few`."""
    known = [json.loads(line) for line in (few / "metadata.jsonl").read_text("utf-8").splitlines()]
    (folder / "images").mkdir(parents=True)
    (folder / "audio").mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as manifest:
        for i, row in zip(range(n), cycle(known)):
            names = {"image_file_name": f"images/{i:06d}.png", "audio_file_name": f"audio/{i:06d}.wav"}
            for key, name in names.items():
                os.link(few / row[key], folder / name)
            manifest.write(json.dumps({**names, "text": f"{row['text']} {i}", "label": row["label"],
                                       "split": "val" if i < 20 else "train"}) + "\n")


def time_rows(args, place: Path) -> list[dict]:
    """Start-up, memory and steps of stage 1 on the long manifest and on a short one."""
    few, commands = tools.make_world(place / "few", 96), {}
    # the files are one another's links: by these names every row is one of its own
    cache.Decode = lambda rows, *_: [(i, i, [], row.id) for i, row in enumerate(rows)]
    cache.content_name = lambda row: f"{row.root}/{row.id}"
    encoders.Encoders, cache.check_headers = fake_encoders, lambda rows, known: {}
    for n in (1000, args.rows):
        folder = place / f"rows-{n}"
        make_rows(few, folder, n)
        cache.build_features(folder, *tools.TINY, 64, place / "cache", workers=0)
        commands[n] = ["train_stage1.py", *tools.stage_flags(folder, tools.TINY, 64),
                       "--batch-size", 16, "--precision", "fp32", "--steps", args.steps, "--run", tools.RUN]
    found = tools.watched_turns(place, args.repeats, commands, args.steps)
    short = found[1000]
    return [{"rows": n, "first step done after, s": tools.spread(seen["first_s"]),
             "s more than 1,000 rows": tools.spread(a - b for a, b in zip(seen["first_s"], short["first_s"])),
             "peak memory, MB": tools.spread(map(float, seen["peak_mb"])),
             "s a step": tools.spread(seen["step_s"]),
             "of 1,000 rows'": tools.ratios(seen["step_s"], short["step_s"])} for n, seen in found.items()]


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    turns = f"{args.repeats} turns{{}}; median [lowest, highest]"
    if "build" in args.only:
        about = f"{args.image_size} px, batches of 16, {turns.format(' after a warm-up')}"
        tools.write_results(f"cache-build-{args.size}", about, time_build(args, place))
    if "rows" in args.only:
        about = f"stage 1 of the small models, batch 16, {args.steps} steps, {turns.format('')}"
        tools.write_results("cache-rows", about, time_rows(args, place))
