"""From sounds to PNG files, as generate.py's checked flags ask for.

What CLAP hears: one sound, several mixed, the way from one to another, the windows of a long one."""

import argparse
import io
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clap2diffusion.base import files, hub
from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.dataset.captions import cut_texts
from clap2diffusion.dataset.decoding import SILENT_PEAK, decode_audio
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.pictures import heat_maps, inputs
from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures, sampling
from clap2diffusion.pictures.sheets import tile, write_png


def load_clap(name: str, facts: dict, adapter_path: Path) -> CLAPAudioEncoder:
    """The CLAP encoder that the adapter was trained with, from `name` ('' = where it was in training).
    Raises UserError: it is missing, or its fingerprint is not the adapter's."""
    folder = hub.find_trained(name, facts["clap_model"], "CLAP model", adapter_path)
    expected = facts["fingerprints"]["clap"]
    if not hub.is_model(expected, folder):
        raise UserError(f"{folder}: is CLAP {hub.fingerprint(folder)}, but {adapter_path} was trained with "
                        f"CLAP {expected} ({facts['clap_model']}); give that one with --clap-model")
    return CLAPAudioEncoder(folder)


def hear(encoder: CLAPAudioEncoder, path: str, start_s: float = 0.0) -> np.ndarray | None:
    """One window (samples,) of a sound file at the encoder's rate; None if silent. Raises UserError."""
    with inputs.usable(path):
        [waveform], flags = decode_audio(path, encoder.sampling_rate, encoder.window_s, start_s=start_s)
    if not flags:
        return waveform
    where = f"{path} at {start_s:.1f} s" if start_s else path
    print(f"{where}: is {flags[0]}, which counts as no sound", flush=True)
    return None


def embed(encoder: CLAPAudioEncoder, path: str, start_s: float = 0.0) -> Tensor:
    """audio_embeds (1, E) of such a window; zeros, the null audio, if it is silent. Raises UserError."""
    return embed_heard(encoder, hear(encoder, path, start_s))


def embed_heard(encoder: CLAPAudioEncoder, waveform: np.ndarray | None) -> Tensor:
    """audio_embeds (1, E) of what hear() gave."""
    return torch.zeros(1, encoder.embed_dim) if waveform is None else encoder([waveform])


def mix(waveforms: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Mix sounds (samples,) of one rate as air does: the sum of w_i / max(w) * waveform_i, float32, as long
    as the longest. A sound of weight 0 is left out. A mix beyond full scale is scaled down to a peak of 1."""
    heard = [(waveform, weight) for waveform, weight in zip(waveforms, weights, strict=True) if weight > 0]
    mixture = np.zeros(max(len(waveform) for waveform, _ in heard))
    for waveform, weight in heard:
        mixture[:len(waveform)] += weight / max(weights) * waveform
    return (mixture / max(1.0, np.abs(mixture).max())).astype(np.float32)


def embed_mix(encoder: CLAPAudioEncoder, paths: list[str], weights: list[float]) -> Tensor:
    """audio_embeds (1, E) of files heard at once; zeros if nothing is left to hear. Raises UserError."""
    pairs = [(hear(encoder, path), weight) for path, weight in zip(paths, weights, strict=True)]
    heard = [(waveform, weight) for waveform, weight in pairs if waveform is not None and weight > 0]
    mixture = mix(*zip(*heard, strict=True)) if heard else np.zeros(1)
    if np.abs(mixture).max() >= SILENT_PEAK:
        return encoder([mixture])
    print("nothing is left to hear: the picture is made with the null audio", flush=True)
    return torch.zeros(1, encoder.embed_dim)


def slerp(first: Tensor, second: Tensor, n: int) -> Tensor:
    """n unit vectors (n, E) at equal angles on the great circle from `first` to `second` (1, E).
    Spherical (Shoemake 1985): embeddings lie on the unit sphere, and a straight line would leave it."""
    at = torch.linspace(0, 1, n)[:, None]
    angle = torch.arccos((first * second).sum().clamp(-1, 1))
    if angle < 1e-3:  # the same sound twice
        return first.repeat(n, 1)
    return torch.sin((1 - at) * angle) / angle.sin() * first + torch.sin(at * angle) / angle.sin() * second


def window_starts(duration_s: float, window_s: float, every_s: float) -> list[float]:
    """Where the windows of a storyboard begin: 0, S, 2 S, ...; the last one ends with the sound."""
    last = max(0.0, duration_s - window_s)
    return [min(i * every_s, last) for i in range(math.ceil(last / every_s - 1e-9) + 1)]


def generate(args: argparse.Namespace, request: argparse.Namespace) -> None:
    """Make and write the pictures that generate.py's flags, checked by check_request(), ask for.
    Raises UserError: the device is missing, CLAP is not the adapter's, or a sound cannot be used."""
    device, adapter_path = pick_device(args.device, args.precision, args.compile)[0], request.adapter_path
    if request.facts["warning"]:
        print(f"warning: {adapter_path}: {request.facts['warning']}", file=sys.stderr, flush=True)
    encoder = load_clap(args.clap_model, request.facts, adapter_path)
    audio_embeds, notes = sounds(args, encoder)  # (B, E)
    negative_embeds = embed(encoder, args.negative_audio) if args.negative_audio else None
    for cut in cut_texts([args.prompt], request.base).values():
        print(f"--prompt: {cut}", flush=True)
    pair = None if args.guidance_text is None else (args.guidance_text, args.guidance_audio)
    pipe = load_stock_pipeline(request.base, adapter_path, device, DTYPES[args.precision], **sampling(args))
    count = f"{len(notes)} pictures" if len(notes) > 1 else "picture"
    pipe.set_progress_bar_config(**bar_options(desc=count, unit="step", leave=False))
    images, maps = draw(args, pipe, audio_embeds, [note["seed"] for note in notes], size=request.size,
                        audio_scale=request.audio_scale, negative_embeds=negative_embeds, guidance_pair=pair,
                        init_image=request.init_image, strength=args.strength)
    write(args, request, images, maps, notes)


def sounds(args: argparse.Namespace, encoder: CLAPAudioEncoder) -> tuple[Tensor, list[dict]]:
    """audio_embeds (B, E) of the pictures to make, and what each one's PNG says of its sound and seed.
    Raises UserError: a file cannot be used, or the way would begin or end with silence."""
    paths, seed, n = args.audio, args.seed, args.interpolate
    for path in [*([] if args.every else paths), *([args.negative_audio] if args.negative_audio else [])]:
        duration_s = inputs.sound_duration(path)
        if duration_s > encoder.window_s + 0.05:
            print(f"{path}: {duration_s:.1f} s long, of which CLAP hears the first {encoder.window_s:g} s; "
                  "--every goes through all of one sound", flush=True)
    if args.every:
        starts = window_starts(inputs.sound_duration(paths[0]), encoder.window_s, args.every)
        return (torch.cat([embed(encoder, paths[0], start_s) for start_s in starts]),
                [{"audio": paths[0], "start_s": round(start_s, 3), "seed": seed} for start_s in starts])
    if len(paths) > 1 and not args.each and not n:
        weights = args.weights or [1.0] * len(paths)
        return embed_mix(encoder, paths, weights), [{"audio": paths, "seed": seed}]
    audio_embeds = torch.cat([embed(encoder, path) for path in paths])
    if not n:
        return audio_embeds, [{"audio": path, "seed": seed + i} for i, path in enumerate(paths)]
    for path, row in zip(paths, audio_embeds, strict=True):
        if not row.any():
            raise UserError(f"--interpolate: {path} is silent, and nothing lies between a sound and silence; "
                            "give two sounds, or vary --audio-scale")
    return (slerp(audio_embeds[:1], audio_embeds[1:], n),
            [{"audio": paths, "position": round(i / (n - 1), 4), "seed": seed} for i in range(n)])


def draw(args: argparse.Namespace, pipe, audio_embeds: Tensor, seeds: list[int], **call) -> tuple[list, list]:
    """Pictures of audio_embeds (B, E) by pictures(..., **call), --batch-size at once, and any heat maps."""
    images, maps = [], []
    for at in range(0, len(seeds), args.batch_size):
        chunk = slice(at, at + args.batch_size)
        embeds, prompts = audio_embeds[chunk], [args.prompt] * len(seeds[chunk])
        with heat_maps.record(pipe.unet, embeds) if args.attention_map else nullcontext() as recorder:
            images += pictures(pipe, embeds, prompts, args.guidance, args.steps, seeds[chunk], **call)
        if recorder:
            maps += recorder.maps(images[-1].width // pipe.vae_scale_factor)
    return images, maps


def write(args: argparse.Namespace, request: argparse.Namespace, images: list, maps: list[dict],
          notes: list[dict]) -> None:
    """Write the pictures and the strip or storyboard, with their settings in them. With maps, write beside
    each picture NAME-attention.png, the picture under each map, and NAME-attention.npz, the maps."""
    out, adapter = request.out, str(request.adapter_path)
    settings = {**vars(args), "adapter": adapter, "base_model": str(request.base), "trained": request.facts}
    several = args.each or args.interpolate or args.every
    paths = [out.with_stem(f"{out.stem}-{i}") for i in range(1, len(images) + 1)] if several else [out]
    for path, image, note in zip(paths, images, notes, strict=True):
        write_png(path, image, {**settings, **note})
        heard = args.audio if isinstance(note["audio"], list) else [note["audio"]]
        given = " + ".join([*heard, *([repr(args.prompt)] if args.prompt else [])])
        print(f"{path}: {given} by {adapter}", flush=True)
    for path, image, found, note in zip(paths, images, maps, notes):
        content, sheet = io.BytesIO(), path.with_stem(f"{path.stem}-attention")
        np.savez(content, **found)
        files.write_atomic(sheet.with_suffix(".npz"), content.getvalue())
        write_png(sheet, tile(*heat_maps.overlays(image, found), columns=5), {**settings, **note})
        print(f"{sheet}: where the sound acted", flush=True)
    if args.interpolate or args.every:
        labels = [f"{note['start_s']:.1f} s" for note in notes] if args.every else None
        write_png(out, tile(images, labels, columns=8 if args.every else len(images)), settings)
        print(f"{out}: the {len(images)} pictures side by side", flush=True)
