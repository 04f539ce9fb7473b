"""From generate.py's checked flags to PNG files."""

import argparse
import io
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.files import write_atomic
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.pictures.heat_maps import overlays, record
from clap2diffusion.pictures.inputs import sound_duration
from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures
from clap2diffusion.pictures.sheets import tile, write_png
from clap2diffusion.pictures.sound_algebra import embed, embed_mix, load_clap, slerp, window_starts


def generate(args: argparse.Namespace, request: argparse.Namespace) -> None:
    """Make and write the pictures that generate.py's flags, checked by check_request(), ask for.

    Raises UserError: the device is missing, CLAP is not the adapter's, or a sound cannot be used.
    """
    device, _ = pick_device(args.device, args.precision)
    dtype, adapter_path = DTYPES[args.precision], request.adapter_path
    encoder = load_clap(args.clap_model, request.facts, adapter_path)
    audio_embeds, notes = sounds(args, encoder)  # (B, E)
    negative_embeds = embed(encoder, args.negative_audio) if args.negative_audio else None
    pair = None if args.guidance_text is None else (args.guidance_text, args.guidance_audio)
    pipe = load_stock_pipeline(request.base, adapter_path, device, dtype, args.scheduler)
    count = f"{len(notes)} pictures" if len(notes) > 1 else "picture"
    pipe.set_progress_bar_config(desc=count, unit="step", leave=False)
    images, maps = draw(args, pipe, audio_embeds, [note["seed"] for note in notes], size=request.size,
                        audio_scale=request.audio_scale, negative_embeds=negative_embeds, guidance_pair=pair,
                        init_image=request.init_image, strength=args.strength)
    write(args, request, images, maps, notes)


def sounds(args: argparse.Namespace, encoder: CLAPAudioEncoder) -> tuple[Tensor, list[dict]]:
    """audio_embeds (B, E) of the pictures to make, and what each one's PNG says of its sound and seed.

    Raises UserError: a file cannot be used, or the way would begin or end with silence.
    """
    paths, seed, n = args.audio, args.seed, args.interpolate
    if args.every:
        starts = window_starts(sound_duration(paths[0]), encoder.window_s, args.every)
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
    """Pictures of audio_embeds (B, E), --batch-size at once, by pictures(..., **call), and their heat maps.

    There are maps with --attention-map alone.
    """
    images, maps = [], []
    for at in range(0, len(seeds), args.batch_size):
        chunk = slice(at, at + args.batch_size)
        embeds, prompts = audio_embeds[chunk], [args.prompt] * len(seeds[chunk])
        with record(pipe.unet, embeds) if args.attention_map else nullcontext() as recorder:
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
        write_atomic(sheet.with_suffix(".npz"), content.getvalue())
        write_png(sheet, tile(*overlays(image, found), columns=5), {**settings, **note})
        print(f"{sheet}: where the sound acted", flush=True)
    if args.interpolate or args.every:
        labels = [f"{note['start_s']:.1f} s" for note in notes] if args.every else None
        write_png(out, tile(images, labels, columns=8 if args.every else len(images)), settings)
        print(f"{out}: the {len(images)} pictures side by side", flush=True)
