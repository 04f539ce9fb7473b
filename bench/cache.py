"""What the feature cache costs: to build it, and to train from one of 200,000 rows.

    python bench/cache.py                         # writes bench/results/cache-build-DEVICE and cache-rows-DEVICE .{json,md}

Built: seconds of build_features() on an empty folder over seconds of the encoders alone on the same inputs, decoded
beforehand, in the same batches; in turns. From 200,000 rows: the real train_stage1.py on a manifest of that length and on
one of 1,000, in turns. Its files are hard links to a hundred real ones and its shards hold made-up numbers, since encoding
200,000 clips here would take hours; everything that reads them is the stage's own code.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from bench_tools import ROOT, call, model_flags, models, spread, watched, write_results

from config import Number, new_parser, run_main


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    model_flags(parser)
    add("--only", nargs="+", choices=("build", "rows"), default=["build", "rows"], help="what to measure")
    add("--clips", type=Number(int, 16), default=1200, help="clips of the built cache")
    add("--rows", type=Number(int, 2000), default=200_000, help="rows of the long manifest")
    add("--image-size", type=Number(int, 64, 1024, multiple_of=64), default=64, help="side of the built cache's pictures")
    add("--repeats", type=Number(int, 1), default=5, help="turns")
    add("--steps", type=Number(int, 3), default=60, help="optimizer steps on each manifest")
    return parser


def time_build(args, place: Path, named: list[str]) -> list[dict]:
    """Build the same features again and again, and run their encoders alone in between."""
    import torch

    import common
    import data
    import features
    device, _ = common.pick_device("auto", "fp32")
    base, clap = Path(named[1]), Path(named[3])
    call("prepare_data.py", "world", "--out", place / "clips", "--train", args.clips - 4, "--val", 2, "--test", 2)
    rows, _ = data.read_manifest(place / "clips")
    encoders = features._Encoders(base, clap, device)
    decode = features._Decode(rows, args.image_size, encoders.clap.sampling_rate, encoders.clap.window_s, 1)
    decoded = [decode[i] for i in range(len(rows))]
    captions = sorted({"", *(row.text for row in rows)})

    def chunks(things: list) -> list[list]:
        return [things[i:i + 16] for shard in range(0, len(things), features.SHARD_ROWS)
                for i in range(shard, min(shard + features.SHARD_ROWS, len(things)), 16)]

    built, alone = [], []
    for turn in range(args.repeats + 1):  # the first is a warm-up
        began = time.perf_counter()
        features.build_features(place / "clips", base, clap, args.image_size, place / f"cache-{turn}",
                                workers=2 if device.type == "cuda" else 1, device=str(device), log=lambda _: None)
        middle = time.perf_counter()
        with torch.inference_mode():
            for chunk in chunks(captions):
                encoders.text(chunk)
            for chunk in chunks(decoded):
                encoders.rows([(image, [*map(encoders.clap.log_mel, clips)], flags) for image, clips, flags in chunk], False, 16)
        built.append(middle - began)
        alone.append(time.perf_counter() - middle)
    return [{"clips": len(rows), "build, s": spread(built[1:]), "encoders alone, s": spread(alone[1:]),
             "ratio": spread([a / b for a, b in zip(built[1:], alone[1:], strict=True)])}]


def make_rows(folder: Path, cache: Path, n: int, named: list[str]) -> None:
    """A data folder of n rows and its finished cache, by build_features() itself on decoders and encoders that make numbers up."""
    import numpy as np
    import torch

    import features
    if not folder.parent.joinpath("few").exists():
        call("prepare_data.py", "world", "--out", folder.parent / "few", "--train", 96, "--val", 2, "--test", 2)
    few = [json.loads(line) for line in (folder.parent / "few/metadata.jsonl").read_text().splitlines()]
    (folder / "images").mkdir(parents=True)
    (folder / "audio").mkdir()
    with (folder / "metadata.jsonl").open("w") as manifest:
        for i in range(n):
            row = few[i % len(few)]
            names = {"image_file_name": f"images/{i:06d}.png", "audio_file_name": f"audio/{i:06d}.wav"}
            for key, name in names.items():
                os.link(folder.parent / "few" / row[key], folder / name)
            manifest.write(json.dumps({**names, "text": f"{row['text']} {i}", "label": row["label"],
                                       "split": "val" if i < 20 else "train"}) + "\n")
    real = features._Decode, features._Encoders, features._header_check
    rng = np.random.default_rng(0)
    bank = {"latents_mean": (1, 4, 16, 16), "latents_std": (1, 4, 16, 16), "audio_embeds": (1, 512)}
    bank = {name: torch.from_numpy(rng.standard_normal((16, *shape), dtype=np.float32)) for name, shape in bank.items()}
    text = torch.from_numpy(rng.standard_normal((16, 32, 128), dtype=np.float32))

    class Decode:
        def __init__(self, rows, *_):
            self.rows = rows

        def __getitem__(self, i):
            return i, i, []

    class Encoders:
        device = "cpu"

        def __init__(self, *_):
            self.clap = type("CLAP", (), {"sampling_rate": 48000, "window_s": 4.0, "log_mel": None})

        def text(self, captions):
            return text[:len(captions)]

        def rows(self, decoded, *_):
            return {name: torch.roll(values, decoded[0][0])[:len(decoded)] for name, values in bank.items()}

    features._Decode, features._Encoders, features._header_check = Decode, Encoders, lambda rows: {}
    try:
        features.build_features(folder, Path(named[1]), Path(named[3]), 64, cache, workers=0)
    finally:
        features._Decode, features._Encoders, features._header_check = real


def time_rows(args, place: Path) -> list[dict]:
    """Start-up, memory and steps of stage 1 on the long manifest and on a short one."""
    named = ["--base-model", "assets/tiny/base", "--clap-model", "assets/tiny/clap"]
    sizes, seen = {n: place / f"rows-{n}" for n in (1000, args.rows)}, {}
    for n, folder in sizes.items():
        make_rows(folder, place / "rows-cache", n, [named[0], str(ROOT / named[1]), named[2], str(ROOT / named[3])])
        seen[n] = []
    for turn in range(args.repeats):
        for n, folder in sizes.items():
            seen[n].append(watched(place / "seen.json", "train_stage1.py", "--config", "", "--data-root", folder, "--cache-dir",
                                   place / "rows-cache", *named, "--image-size", 64, "--batch-size", 16, "--precision", "fp32",
                                   "--validate-every", 0, "--val-draws", 1, "--samples", 0, "--save-every", 100000, "--steps",
                                   args.steps, "--run", place / f"run-{n}-{turn}", steps=args.steps))
    short = seen[1000]
    return [{"rows": n, "first step done after, s": spread([run["steps"][0] for run in runs]),
             "s more than 1,000 rows": spread([a["steps"][0] - b["steps"][0] for a, b in zip(runs, short, strict=True)]),
             "peak memory, MB": spread([float(run["memory_mb"][-1]) for run in runs]),
             "s a step": spread([run["step_s"] for run in runs]),
             "of 1,000 rows'": spread([a["step_s"] / b["step_s"] for a, b in zip(runs, short, strict=True)])}
            for n, runs in seen.items()]


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        if "build" in args.only:
            rows = time_build(args, place, models(args, place))
            write_results(f"cache-build-{'sd15' if args.sd15 else 'tiny'}", "cache.py", argv, f"{args.image_size} px, batches of 16, "
                          f"{args.repeats} turns after a warm-up; median [lowest, highest]", rows)
        if "rows" in args.only:
            rows = time_rows(args, place)
            write_results("cache-rows", "cache.py", argv, f"stage 1 of the small models, batch 16, "
                          f"{args.steps} steps, {args.repeats} turns; median [lowest, highest]", rows)


if __name__ == "__main__":
    run_main(main)
