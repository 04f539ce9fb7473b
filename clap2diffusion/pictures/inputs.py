"""What pictures are made from, found and checked before torch loads: an adapter file, generate.py's flags."""

import argparse
import json
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clap2diffusion.base import files, hub
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.tensor_file import digest
from clap2diffusion.dataset.decoding import BadFile, load_image, open_audio
from clap2diffusion.pictures.loras import check_lora

LONGEST_NAME = 200  # bytes; file systems take 255, and a picture's number or "-attention" may follow


def find_adapter(run: str) -> Path:
    """The adapter file of a run (its last finished stage's), of a stage, or itself. Raises UserError."""
    path = Path(run)
    ended = [path / s for s in ("stage3", "stage2", "stage1") if (path / s / "result.json").exists()]
    for found in [path, *(folder / "adapter.safetensors" for folder in [*ended, path])]:
        if found.is_file():
            return found
    raise UserError(f"{run}: holds no adapter.safetensors; expected a run folder with a finished stage, so "
                    "train first: bash run_all_stages.sh")


def adapter_facts(path: Path) -> dict:
    """An adapter file's metadata: stage, base_model, clap_model, fingerprints, dims, image_size, tanh_gate,
    and as `warning` why stage 3 did not show that the sound helps, or ''.
    Raises UserError: it is no adapter of ours, or its content has changed since it was written."""
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["clap2diffusion"])
            recorded = facts.pop("sha256", "")  # the first versions wrote none
            if recorded and recorded != digest(facts, {key: file.get_tensor(key) for key in file.keys()}):
                raise UserError(f"{path}: its content does not match its SHA-256; the file was altered, use "
                                "another copy of it")
            return {"warning": "", **facts, "fingerprints": {**facts["fingerprints"]},
                    "dims": {**facts["dims"]}}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: not an adapter of ours ({type(e).__name__}); expected an "
                        "adapter.safetensors that a stage has written") from None


def find_base(given: str, facts: dict, adapter_path: Path) -> Path:
    """The base model for an adapter. Raises UserError: there is none, or its width is not the adapter's."""
    base = hub.find_trained(given, facts["base_model"], "base model", adapter_path)
    width = files.read_json(base / "unet/config.json").get("cross_attention_dim")
    if width != facts["dims"]["width"]:
        raise UserError(f"{base}: its cross-attention is {width} wide, {adapter_path} expects "
                        f"{facts['dims']['width']}; give a base model of the kind it was trained with")
    return base


def scale_of_gate(gate: float, facts: dict, adapter_path: Path) -> float:
    """The IP-Adapter scale that turns the learned tanh(gate), which is folded into V, into `gate`.
    Raises UserError: the learned one is 0, so there is nothing to scale."""
    if abs(facts["tanh_gate"]) < 1e-6:
        raise UserError(f"--gate {gate:g}: the learned gate of {adapter_path} is 0 and was folded into the "
                        "file, so no other one can be set; give an adapter with an open gate")
    return gate / facts["tanh_gate"]


def check_request(args: argparse.Namespace, most_pictures: int) -> argparse.Namespace:
    """Look at --out, the sounds, the adapter, --init-image and the models, in this order. Returns the
    paths `out`, `adapter_path` and `base`, the adapter's `facts`, `audio_scale`, `size` in pixels, and
    `init_image` (3, size, size) in [-1, 1] or None. The last one looked at is --lora.
    Raises UserError: the first that is missing or cannot be used, or a storyboard above most_pictures."""
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UserError(f"--out {out}: a name of {len(os.fsencode(out.name))} bytes, expected at most "
                        f"{LONGEST_NAME}; give a shorter one")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; expected the name of a PNG file")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent} is not a folder that can be written to; make it first")
    sounds = [("--negative-audio", args.negative_audio)] if args.negative_audio else []
    for flag, path in sounds + [("--audio", path) for path in args.audio]:
        if not Path(path).is_file():
            raise UserError(f"{flag} {path}: is not a file; expected a sound or video file")
        duration_s = sound_duration(path)
    if args.every and duration_s / args.every > most_pictures:
        raise UserError(f"--every {args.every:g}: {path} is {duration_s:.0f} s long, which makes more than "
                        f"{most_pictures} pictures; raise it")
    path = find_adapter(args.run)
    facts = adapter_facts(path)
    scale = args.audio_scale if args.gate is None else scale_of_gate(args.gate, facts, path)
    size = args.size or facts["image_size"]
    with usable(f"--init-image {args.init_image}", "picture"):
        init_image = load_image(args.init_image, size) if args.init_image else None
    base = check_models(args, facts, path)
    check_distilled(args, base)
    return argparse.Namespace(out=out, adapter_path=path, facts=facts, audio_scale=scale, size=size,
                              init_image=init_image, base=base)


def check_models(args: argparse.Namespace, facts: dict, adapter_path: Path) -> Path:
    """The folder of an adapter's base model; --base-model and --clap-model say where the models lie now.
    Raises UserError: one is missing or broken, or the base model's text is of another width."""
    base = find_base(args.base_model, facts, adapter_path)
    hub.find_trained(args.clap_model, facts["clap_model"], "CLAP model", adapter_path)
    return base


def check_distilled(args: argparse.Namespace, base: Path) -> None:
    """Look at --lora, and say it where --scheduler lcm is used without what it is made for.
    Raises UserError."""
    if args.lora:
        check_lora(args.lora, base)
    scheduler = files.read_json(base / "scheduler/scheduler_config.json").get("_class_name")
    if args.scheduler == "lcm" and not args.lora and scheduler != "LCMScheduler":
        print("--scheduler lcm without --lora: it is made for a model or a LoRA that was distilled for few "
              "steps; others draw worse pictures with it", flush=True)


def sound_duration(path: str) -> float:
    """Length of a sound file in seconds, by its header. Raises UserError."""
    with usable(path), open_audio(Path(path)) as sound:
        return sound.frames / sound.samplerate


@contextmanager
def usable(name: str, kind: str = "sound or video file"):
    """Turn a BadFile into a UserError that names the file and asks for another one."""
    try:
        yield
    except BadFile as error:
        raise UserError(f"{name}: {error}; give another {kind}") from None
