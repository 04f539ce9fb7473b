"""Pictures from sounds: CLAP embedding in, diffusers' own pipelines with load_ip_adapter, PNG out.

    python generate.py --audio dog.wav --out dog.png
    python generate.py --audio dog.wav rain.flac --weights 0.7 0.3            # the sounds mixed, one picture
    python generate.py --audio dog.wav rain.flac --each                       # a picture each: out-1.png, out-2.png
    python generate.py --audio dog.wav rain.flac --interpolate 6              # from the one to the other in 6 pictures
    python generate.py --audio storm.wav --every 2                            # a storyboard, a picture every 2 s
    python generate.py --audio dog.wav --negative-audio rain.flac             # the dog, and away from the rain
    python generate.py --audio dog.wav --prompt "at deep dusk" --guidance-text 3 --guidance-audio 6
    python generate.py --audio dog.wav --init-image photo.png --strength 0.6  # begin with a picture
    python generate.py --audio dog.wav --attention-map                        # where in the picture the sound acted

The settings stand in each PNG's text chunk `clap2diffusion`. A silent clip is the null audio, as in training.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from pathlib import Path

from config import GUIDANCE, SCHEDULERS, Number, UserError, new_parser, read_json, run_main, write_atomic

STAGES = ("stage3", "stage2", "stage1")
MOST_PICTURES = 400
AUDIO_SCALE, STRENGTH = 1.0, 0.6


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    group = parser.add_argument_group("sound", "several files are mixed into one sound, unless --each, --interpolate "
                                      "or --every is given")
    group.add_argument("--audio", nargs="+", required=True, metavar="FILE",
                       help="sound files, any format that libsndfile reads")
    group.add_argument("--weights", nargs="+", type=Number(float, 0), metavar="W",
                       help="level of each file in the mix, one a file (default: all alike; 0 leaves a file out)")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--each", action="store_true", help="a picture for each file: NAME-1.png, NAME-2.png, ...")
    mode.add_argument("--interpolate", type=Number(int, 2, MOST_PICTURES), metavar="N",
                      help="N pictures from the first of two files to the second: NAME-1.png, ..., as a strip in --out")
    mode.add_argument("--every", type=Number(float, 0.01), metavar="S",
                      help="a picture every S seconds of one long file: NAME-1.png, ..., as a storyboard in --out")
    group.add_argument("--negative-audio", metavar="FILE",
                       help="sound to lead away from (default: none, the null audio)")

    group = parser.add_argument_group("strength")
    scale = group.add_mutually_exclusive_group()
    scale.add_argument("--audio-scale", type=Number(float, 0, 10), metavar="X",
                       help="strength of the sound, times the learned gate (default: 1)")
    scale.add_argument("--gate", type=Number(float, 0, 1), metavar="G",
                       help="strength of the sound in place of the learned gate (0 = no sound)")
    group.add_argument("--guidance", type=Number(float, 1, 100), metavar="G",
                       help=f"classifier-free guidance (default: {GUIDANCE:g}; 1 = none)")
    group.add_argument("--guidance-text", type=Number(float, 0, 100), metavar="T",
                       help="guidance of the prompt alone; with --guidance-audio, instead of --guidance")
    group.add_argument("--guidance-audio", type=Number(float, 0, 100), metavar="A", help="guidance of the sound alone")

    group = parser.add_argument_group("picture")
    add = group.add_argument
    add("--prompt", default="", help="text prompt beside the sound ('' = the sound alone)")
    add("--init-image", metavar="FILE", help="picture to begin with, cropped as in training (default: noise alone)")
    add("--strength", type=Number(float, 0, 1), help="how much of --init-image is drawn anew, 0 to 1 (default: 0.6)")
    add("--steps", type=Number(int, 1, 1000), default=25, help="sampling steps (default: 25)")
    add("--scheduler", choices=[*SCHEDULERS], default="base",
        help="base = the base model's own; dpm, unipc: made for few steps, such as --steps 8 (default: base)")
    add("--seed", type=Number(int, 0, 2 ** 31 - 1), default=0,
        help="seed of the starting noise (default: 0); with --each file i takes seed + i - 1")
    add("--size", type=Number(int, 8, 4096, multiple_of=8), help="side in pixels (default: the size of training)")
    add("--attention-map", action="store_true",
        help="write beside each picture where the sound acted: NAME-attention.png and NAME-attention.npz")
    add("--out", default="out.png", help="PNG to write (default: out.png)")

    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--run", default="runs/tiny",
        help="run or stage folder (its adapter.safetensors), or an adapter file (default: runs/tiny)")
    add("--base-model", default="", help="another base model for the same adapter ('' = the one it was trained with)")
    add("--clap-model", default="", help="where the adapter's CLAP lies now ('' = where it was in training)")
    add("--batch-size", type=Number(int, 1), default=16, help="pictures made at once (default: 16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, and fill in the defaults of those that exclude others.

    Raises:
        UserError: the first contradiction.
    """
    n, weights, pair = len(args.audio), args.weights, (args.guidance_text, args.guidance_audio)
    mode = "--each" if args.each else "--interpolate" if args.interpolate else "--every" if args.every else ""
    strength = STRENGTH if args.strength is None else args.strength
    for wrong, sentence in (
        (weights and mode, f"--weights is for the mix of several sounds; leave it or {mode} out"),
        (weights and len(weights) != n,
         f"--weights: got {len(weights or ())} for {n} --audio files; give one for each file"),
        (weights and not any(weights), "--weights: all are 0, so nothing would be heard; raise at least one above 0"),
        (args.interpolate and n != 2,
         f"--interpolate leads from one sound to another, got {n} --audio files; give exactly two"),
        (args.every and n != 1, f"--every goes through one long sound, got {n} --audio files; give one"),
        (pair.count(None) == 1, "--guidance-text and --guidance-audio belong together; give both or neither"),
        (pair.count(None) < 2 and args.guidance is not None,
         "--guidance is replaced by --guidance-text and --guidance-audio; leave it or those two out"),
        (args.negative_audio and args.guidance == 1,
         "--negative-audio acts through guidance, and --guidance 1 means none; raise it above 1"),
        (args.strength is not None and not args.init_image, "--strength is for --init-image; give one or leave it out"),
        (args.init_image and int(args.steps * strength) < 1,
         f"--strength {strength:g} of --steps {args.steps} leaves no step to draw; raise one of them"),
        (args.attention_map and (args.interpolate or args.every),
         f"--attention-map is for the single picture and for --each; leave it or {mode} out"),
    ):
        if wrong:
            raise UserError(sentence)
    if pair.count(None) == 2 and args.guidance is None:
        args.guidance = GUIDANCE
    if args.gate is None and args.audio_scale is None:
        args.audio_scale = AUDIO_SCALE
    if args.init_image:
        args.strength = strength


def check_sounds(args: argparse.Namespace) -> None:
    """Open every sound's header.

    Raises:
        UserError: a file is missing or no sound, or a storyboard of it would have too many pictures.
    """
    files = [("--audio", path) for path in args.audio]
    if args.negative_audio:
        files.insert(0, ("--negative-audio", args.negative_audio))
    for flag, path in files:
        if not Path(path).is_file():
            raise UserError(f"{flag} {path}: is not a file; expected a sound file")
    for _, path in files:
        duration_s = sound_duration(path)
    if args.every and duration_s / args.every > MOST_PICTURES:
        raise UserError(f"--every {args.every:g}: {args.audio[0]} is {duration_s:.0f} s long, which makes more than "
                        f"{MOST_PICTURES} pictures; raise it")


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
        UserError: not an adapter of ours, or its content is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    import pretrained
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["clap2diffusion"])
            recorded = facts.pop("sha256", "")  # the first versions wrote none
            if recorded and recorded != pretrained.adapter_digest(facts, {key: file.get_tensor(key) for key in file.keys()}):
                raise UserError(f"{path}: its content does not match its SHA-256; the file was altered, use another copy of it")
            return {**facts, "fingerprints": {**facts["fingerprints"]}, "dims": {**facts["dims"]}}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not an adapter of ours ({type(error).__name__}); expected an adapter.safetensors that a "
                        "stage has written") from None


def load_clap(name: str, facts: dict, adapter_path: Path):
    """The CLAP encoder that the adapter was trained with; any other one is refused.

    Raises:
        UserError: it is missing, or its fingerprint is not the adapter's.
    """
    import common
    import pretrained
    folder = pretrained.resolve_model(name or facts["clap_model"], "CLAP model")
    found, expected = pretrained.fingerprint(folder), facts["fingerprints"]["clap"]
    if found != expected:
        raise UserError(f"{folder}: is CLAP {found}, but {adapter_path} was trained with CLAP {expected} "
                        f"({facts['clap_model']}); give that one with --clap-model")
    return common.CLAPAudioEncoder(folder)


def audio_scale(args: argparse.Namespace, facts: dict, adapter_path: Path) -> float:
    """The IP-Adapter scale: --audio-scale, or what turns the learned tanh(gate), folded into V, into --gate.

    Raises:
        UserError: the learned gate is 0, so that nothing is left to scale.
    """
    if args.gate is None:
        return args.audio_scale
    return scale_of_gate(args.gate, facts, adapter_path)


def scale_of_gate(gate: float, facts: dict, adapter_path: Path) -> float:
    """The IP-Adapter scale that turns the learned tanh(gate) into `gate`.

    Raises:
        UserError: the learned one is 0, which no scale opens.
    """
    if abs(facts["tanh_gate"]) < 1e-6:
        raise UserError(f"--gate {gate:g}: the learned gate of {adapter_path} is 0 and was folded into the file, "
                        "so no other one can be set; give an adapter with an open gate")
    return gate / facts["tanh_gate"]


def first_picture(args: argparse.Namespace, size: int):
    """--init-image as (3, size, size) in [-1, 1], or None. Raises UserError."""
    import data
    try:
        return data.load_image(args.init_image, size) if args.init_image else None
    except data.BadFile as error:
        raise UserError(f"--init-image {args.init_image}: {error}; give another picture") from None


# --- sounds ----------------------------------------------------------------------------------------------------

def sound_duration(path: str) -> float:
    """Length of a sound file in seconds, by its header. Raises UserError."""
    import data
    try:
        with data.open_audio(Path(path)) as sound:
            return sound.frames / sound.samplerate
    except data.BadFile as error:
        raise UserError(f"{path}: {error}; give another sound file") from None


def hear(encoder, path: str, start_s: float = 0.0):
    """The waveform (samples,) of one window of a sound file at the encoder's rate; None if it is silent.

    Raises:
        UserError: the file cannot be used.
    """
    import data
    try:
        [waveform], flags = data.decode_audio(path, encoder.sampling_rate, encoder.window_s, start_s=start_s)
    except data.BadFile as error:
        raise UserError(f"{path}: {error}; give another sound file") from None
    if flags:
        print(f"{path}{f' at {start_s:.1f} s' if start_s else ''}: is {flags[0]}, which counts as no sound", flush=True)
        return None
    return waveform


def embed(encoder, path: str, start_s: float = 0.0):
    """audio_embeds (1, E) of the window of a sound file that begins at start_s; zeros, the null audio, if it is silent.

    Raises:
        UserError: the file cannot be used.
    """
    import torch
    waveform = hear(encoder, path, start_s)
    return torch.zeros(1, encoder.embed_dim) if waveform is None else encoder([waveform])


def mix(waveforms: list, weights: list[float]):
    """Sounds mixed as in air: the sum of w_i / max(w) * waveform_i, the shorter ones followed by silence.

    waveforms: arrays (samples,) at one rate -> (samples of the longest,), float32. A sound of weight 0 is as if it were
    not there. A mix beyond full scale is scaled down to a peak of 1.
    """
    import numpy as np
    heard = [(waveform, weight) for waveform, weight in zip(waveforms, weights, strict=True) if weight > 0]
    mixture = np.zeros(max(len(waveform) for waveform, _ in heard))
    for waveform, weight in heard:
        mixture[:len(waveform)] += weight / max(weights) * waveform
    return (mixture / max(1.0, np.abs(mixture).max())).astype(np.float32)


def embed_mix(encoder, paths: list[str], weights: list[float]):
    """audio_embeds (1, E) of several files heard at once; zeros, the null audio, where nothing is left to hear."""
    import numpy as np
    import torch

    import data
    waveforms = [hear(encoder, path) for path in paths]
    heard = [(waveform, weight) for waveform, weight in zip(waveforms, weights, strict=True)
             if waveform is not None and weight > 0]
    mixture = mix(*zip(*heard, strict=True)) if heard else np.zeros(1)
    if np.abs(mixture).max() < data.SILENT_PEAK:
        print("nothing is left to hear: the picture is made with the null audio", flush=True)
        return torch.zeros(1, encoder.embed_dim)
    return encoder([mixture])


def slerp(first, second, n: int):
    """n unit vectors (n, E) at equal angles on the great circle from `first` to `second` (1, E), ends included.

    Spherical interpolation (Shoemake 1985): the embeddings live on the unit sphere, a straight line would leave it.
    """
    import torch
    at = torch.linspace(0, 1, n)[:, None]
    angle = torch.arccos((first * second).sum().clamp(-1, 1))
    if angle < 1e-3:  # one and the same sound
        return first.repeat(n, 1)
    return torch.sin((1 - at) * angle) / torch.sin(angle) * first + torch.sin(at * angle) / torch.sin(angle) * second


def window_starts(duration_s: float, window_s: float, every_s: float) -> list[float]:
    """Where the windows of a storyboard begin: 0, S, 2 S, ...; the last one ends with the sound."""
    last = max(0.0, duration_s - window_s)
    return [min(i * every_s, last) for i in range(math.ceil(last / every_s - 1e-9) + 1)]


def sounds(args: argparse.Namespace, encoder) -> tuple:
    """audio_embeds (B, E) of the pictures to make, and what each one's PNG says of its sound and seed.

    Raises:
        UserError: a file cannot be used, or a silent one is to be interpolated.
    """
    import torch
    if args.every:
        [path] = args.audio
        starts = window_starts(sound_duration(path), encoder.window_s, args.every)
        return (torch.cat([embed(encoder, path, start_s) for start_s in starts]),
                [{"audio": path, "start_s": round(start_s, 3), "seed": args.seed} for start_s in starts])
    if args.each or args.interpolate:
        audio_embeds = torch.cat([embed(encoder, path) for path in args.audio])
    if args.each:
        return audio_embeds, [{"audio": path, "seed": args.seed + i} for i, path in enumerate(args.audio)]
    if args.interpolate:
        for path, row in zip(args.audio, audio_embeds, strict=True):
            if not row.any():
                raise UserError(f"--interpolate: {path} is silent, and nothing lies between a sound and silence; give "
                                "two sounds, or vary --audio-scale")
        n = args.interpolate
        return (slerp(audio_embeds[:1], audio_embeds[1:], n),
                [{"audio": args.audio, "position": round(i / (n - 1), 4), "seed": args.seed} for i in range(n)])
    if len(args.audio) == 1:
        return embed(encoder, args.audio[0]), [{"audio": args.audio[0], "seed": args.seed}]
    return (embed_mix(encoder, args.audio, args.weights or [1.0] * len(args.audio)),
            [{"audio": args.audio, "seed": args.seed}])


# --- pictures --------------------------------------------------------------------------------------------------

def check_out(out: str) -> Path:
    """Raises UserError if `out` is no PNG's name in a folder that can be written to."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder; expected the name of a PNG file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {out}: {path.parent} is not a folder that can be written to; make it first")
    return path


def tile(images: list, labels: list[str] | None = None, columns: int = 8):
    """Pictures of one size in rows of `columns`, each with its label under it."""
    from PIL import Image, ImageDraw, ImageFont
    columns, gap, under = min(columns, len(images)), 4, 20 if labels else 0
    width, height = images[0].width + gap, images[0].height + gap + under
    sheet = Image.new("RGB", (columns * width - gap, math.ceil(len(images) / columns) * height - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, image in enumerate(images):
        x, y = i % columns * width, i // columns * height
        sheet.paste(image, (x, y))
        if labels:
            middle = (x + image.width / 2, y + image.height + under / 2)
            draw.text(middle, labels[i], fill="black", font=font, anchor="mm")
    return sheet


def write_png(path: Path, image, settings: dict) -> None:
    """Write a picture with its settings as JSON in the text chunk `clap2diffusion`."""
    from PIL.PngImagePlugin import PngInfo
    chunk, png = PngInfo(), io.BytesIO()
    chunk.add_text("clap2diffusion", json.dumps(settings))
    image.save(png, format="PNG", pnginfo=chunk)
    write_atomic(path, png.getvalue())


def write_attention(path: Path, image, maps: dict, settings: dict) -> None:
    """NAME-attention.png, the picture under each map, and NAME-attention.npz, the maps, beside a picture."""
    import numpy as np

    import attention
    content = io.BytesIO()
    np.savez(content, **maps)
    write_atomic(path.with_name(f"{path.stem}-attention.npz"), content.getvalue())
    sheet = path.with_stem(f"{path.stem}-attention")
    write_png(sheet, tile(*attention.overlays(image, maps), columns=5), settings)
    print(f"{sheet}: where the sound acted", flush=True)


def draw(args: argparse.Namespace, pipe, audio_embeds, seeds: list[int], **call) -> tuple[list, list]:
    """The pictures of audio_embeds (B, E), at most --batch-size at once, and with --attention-map the maps of each."""
    from contextlib import nullcontext

    import attention
    import stock
    images, maps = [], []
    for at in range(0, len(seeds), args.batch_size):
        embeds = audio_embeds[at:at + args.batch_size]
        with attention.record(pipe.unet, embeds) if args.attention_map else nullcontext() as recorder:
            images += stock.pictures(pipe, embeds, [args.prompt] * len(embeds), args.guidance, args.steps,
                                     seeds[at:at + args.batch_size], **call)
        if recorder:
            maps += recorder.maps(images[-1].width // pipe.vae_scale_factor)
    return images, maps


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    out = check_out(args.out)
    check_sounds(args)
    adapter_path = find_adapter(args.run)
    facts = adapter_facts(adapter_path)
    scale, size = audio_scale(args, facts, adapter_path), args.size or facts["image_size"]
    init_image = first_picture(args, size)

    import pretrained
    base = pretrained.resolve_model(args.base_model or facts["base_model"], "base model", pretrained.BASE_PARTS)
    width = read_json(base / "unet/config.json").get("cross_attention_dim")
    if width != facts["dims"]["width"]:
        raise UserError(f"{base}: its cross-attention is {width} wide, {adapter_path} expects {facts['dims']['width']}; "
                        "give a base model of the kind it was trained with")

    import common  # heavy imports come after every error that needs none
    import stock
    device, _ = common.pick_device(args.device, args.precision)
    encoder = load_clap(args.clap_model, facts, adapter_path)
    audio_embeds, notes = sounds(args, encoder)  # (B, E)
    negative_embeds = embed(encoder, args.negative_audio) if args.negative_audio else None
    pair = None if args.guidance_text is None else (args.guidance_text, args.guidance_audio)
    pipe = stock.load_stock_pipeline(base, adapter_path, device, common.DTYPES[args.precision], args.scheduler)
    pipe.set_progress_bar_config(desc=f"{len(audio_embeds)} pictures" if len(audio_embeds) > 1 else "picture", unit="step", leave=False)
    images, maps = draw(args, pipe, audio_embeds, [note["seed"] for note in notes], audio_scale=scale, size=size,
                        negative_embeds=negative_embeds, guidance_pair=pair, init_image=init_image,
                        strength=args.strength)

    settings = {**vars(args), "adapter": str(adapter_path), "base_model": str(base), "trained": facts}
    several = args.each or args.interpolate or args.every
    paths = [out.with_stem(f"{out.stem}-{i}") for i in range(1, len(images) + 1)] if several else [out]
    for path, image, note in zip(paths, images, notes, strict=True):
        write_png(path, image, {**settings, **note})
        heard = " + ".join(args.audio if isinstance(note["audio"], list) else [note["audio"]])
        print(f"{path}: {heard}" + (f" + {args.prompt!r}" if args.prompt else "") + f" by {adapter_path}", flush=True)
    for path, image, found, note in zip(paths, images, maps, notes, strict=False):
        write_attention(path, image, found, {**settings, **note})
    if args.interpolate or args.every:
        labels = [f"{note['start_s']:.1f} s" for note in notes] if args.every else None
        write_png(out, tile(images, labels, columns=8 if args.every else len(images)), settings)
        print(f"{out}: the {len(images)} pictures side by side", flush=True)


if __name__ == "__main__":
    run_main(main)
