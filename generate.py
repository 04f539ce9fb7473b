"""A picture from a sound: CLAP embedding in, diffusers' own StableDiffusionPipeline with load_ip_adapter, PNG out.

    python generate.py --audio dog.wav --out dog.png
    python generate.py --audio dog.wav rain.flac --prompt "under a clear sky" --seed 3 --out out.png   # two pictures
    python generate.py --audio dog.wav --run runs/tiny/stage1 --audio-scale 0.5

Several sounds make one picture each, in one batch: out-1.png, out-2.png, ... The settings stand in each PNG's text
chunk `clap2diffusion`. A silent clip is the null audio, as in training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path

from config import Number, UserError, new_parser, read_json, run_main, write_atomic

STAGES = ("stage3", "stage2", "stage1")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--audio", nargs="+", required=True, metavar="FILE", help="sound files, any format that libsndfile reads")
    add("--prompt", default="", help="text prompt beside the sound ('' = the sound alone)")
    add("--run", default="runs/tiny", help="run or stage folder (its adapter.safetensors), or an adapter file")
    add("--audio-scale", type=Number(float, 0, 10), default=1.0, help="strength of the sound, times the learned gate")
    add("--guidance", type=Number(float, 1, 100), default=5.0, help="classifier-free guidance (1 = none)")
    add("--steps", type=Number(int, 1, 1000), default=25, help="sampling steps")
    add("--seed", type=Number(int, 0, 2 ** 31 - 1), default=0, help="seed of the starting noise; sound i takes seed + i")
    add("--out", default="out.png", help="PNG to write; with several sounds NAME-1.png, NAME-2.png, ...")
    add("--base-model", default="", help="another base model for the same adapter ('' = the one it was trained with)")
    add("--clap-model", default="", help="where the adapter's CLAP lies now ('' = where it was in training)")
    add("--size", type=Number(int, 8, 4096, multiple_of=8), default=None, help="side in pixels (default: the size of training)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
    return parser


def find_adapter(run: str) -> Path:
    """The adapter file of a run (its last finished stage's), of a stage, or itself.

    Raises:
        UserError: there is none.
    """
    path = Path(run)
    if path.is_file():
        return path
    finished = (path / stage for stage in STAGES if (path / stage / "result.json").exists())
    for folder in [*finished, path]:
        if (folder / "adapter.safetensors").exists():
            return folder / "adapter.safetensors"
    raise UserError(f"{run}: holds no adapter.safetensors; expected a run folder with a finished stage, so train first: "
                    "bash run_all_stages.sh")


def adapter_facts(path: Path) -> dict:
    """The metadata of an adapter file: stage, base_model, clap_model, fingerprints, dims, image_size, tanh_gate.

    Raises:
        UserError: not an adapter of ours.
    """
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["clap2diffusion"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not an adapter of ours ({type(error).__name__}); expected an adapter.safetensors that a "
                        "stage has written") from None


def load_clap(name: str, facts: dict, adapter_path: Path):
    """The CLAP encoder that the adapter was trained with; any other one is refused.

    Raises:
        UserError: it is missing, or its fingerprint is not the adapter's.
    """
    import common
    folder = common.resolve_model(name or facts["clap_model"], "CLAP model")
    found, expected = common.fingerprint(folder), facts["fingerprints"]["clap"]
    if found != expected:
        raise UserError(f"{folder}: is CLAP {found}, but {adapter_path} was trained with CLAP {expected} "
                        f"({facts['clap_model']}); give that one with --clap-model")
    return common.CLAPAudioEncoder(folder)


def embed(encoder, path: str):
    """audio_embeds (1, E) of a sound file's first window; zeros, the null audio, for a silent clip.

    Raises:
        UserError: the file cannot be used.
    """
    import torch

    import data
    try:
        [waveform], flags = data.decode_audio(path, encoder.sampling_rate, encoder.window_s)
    except data.BadFile as error:
        raise UserError(f"{path}: {error}; give another sound file") from None
    if flags:
        print(f"{path}: is {flags[0]}, the picture is made with the null audio", flush=True)
        return torch.zeros(1, encoder.embed_dim)
    return encoder([waveform])


def out_paths(out: str, n: int) -> list[Path]:
    """The files to write: `out` itself for one sound, NAME-1.png ... NAME-n.png for several."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder; expected the name of a PNG file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {out}: {path.parent} is not a folder that can be written to; make it first")
    return [path] if n == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, n + 1)]


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for path in args.audio:
        if not Path(path).is_file():
            raise UserError(f"--audio {path}: is not a file; expected a sound file")
    paths = out_paths(args.out, len(args.audio))
    adapter_path = find_adapter(args.run)
    facts = adapter_facts(adapter_path)

    import torch  # heavy imports come after every error that needs none
    from PIL.PngImagePlugin import PngInfo

    import common
    import stock

    device, _ = common.pick_device(args.device, args.precision)
    base = common.resolve_model(args.base_model or facts["base_model"], "base model", common.BASE_PARTS)
    width = read_json(base / "unet/config.json").get("cross_attention_dim")
    if width != facts["dims"]["width"]:
        raise UserError(f"{base}: its cross-attention is {width} wide, {adapter_path} expects {facts['dims']['width']}; "
                        "give a base model of the kind it was trained with")
    encoder = load_clap(args.clap_model, facts, adapter_path)
    audio_embeds = torch.cat([embed(encoder, path) for path in args.audio])  # (B, E)
    pipe = stock.load_stock_pipeline(base, adapter_path, device, common.DTYPES[args.precision])
    seeds = [args.seed + i for i in range(len(paths))]
    images = stock.pictures(pipe, audio_embeds, [args.prompt] * len(paths), args.guidance, args.steps, seeds,
                            args.audio_scale, args.size or facts["image_size"])
    for path, image, audio, seed in zip(paths, images, args.audio, seeds, strict=True):
        chunk = PngInfo()
        used = {"audio": audio, "seed": seed, "adapter": str(adapter_path), "base_model": str(base)}
        chunk.add_text("clap2diffusion", json.dumps({**vars(args), **used, "trained": facts}))
        png = io.BytesIO()
        image.save(png, format="PNG", pnginfo=chunk)
        write_atomic(path, png.getvalue())
        print(f"{path}: {audio}" + (f" + {args.prompt!r}" if args.prompt else "") + f" by {adapter_path}", flush=True)


if __name__ == "__main__":
    run_main(main)
