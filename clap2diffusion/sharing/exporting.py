"""export.py's work: the files of an export, their proof, and the folder that takes its place whole."""

import argparse
from pathlib import Path

import diffusers
import torch

from clap2diffusion.base import files
from clap2diffusion.pictures.pipelines import MOST_DIFFERENCE, attention_names
from clap2diffusion.sharing import folders, layouts
from clap2diffusion.sharing.card import make_card
from clap2diffusion.sharing.proof import make_reference, prove
from clap2diffusion.sharing.request import push

APART = layouts.LEFT_OUT + " and lies in {}: load both"
LORA_FILES = {"diffusers": layouts.diffusers_lora, "kohya": layouts.kohya_lora, "peft": layouts.peft_lora}
LORA_NAMES = {"diffusers": layouts.LORA, "kohya": layouts.KOHYA_LORA, "peft": layouts.PEFT_LORA}


def places(base: Path) -> dict[str, int]:
    """The UNet's attentions in the order of its processors, each with its width, by its config alone."""
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel.load_config(base / "unet", local_files_only=True)
        unet = diffusers.UNet2DConditionModel.from_config(config)
    return {name: unet.get_submodule(name).inner_dim for name in attention_names(unet)}


def files_apart(to: str, facts: dict, tensors: dict) -> dict[str, bytes]:
    """The adapter without its LoRA, which says so in its facts, and the LoRA in the layout of `to`."""
    rest, lora = layouts.split(tensors, facts["attentions"])
    if not lora:
        return {layouts.ADAPTER: layouts.adapter_bytes(tensors, facts)}
    warning = "; ".join(filter(None, [facts["warning"], APART.format(LORA_NAMES[to])]))
    return {layouts.ADAPTER: layouts.adapter_bytes(rest, {**facts, "warning": warning}),
            **LORA_FILES[to](lora, facts)}


def make_files(args: argparse.Namespace, request: argparse.Namespace, facts: dict) -> dict[str, bytes]:
    """The content of every file of an export by its name. facts: the adapter's, with its attentions."""
    if args.to != "hub":
        return files_apart(args.to, facts, request.tensors)
    whole = (request.adapter_path.read_bytes() if "attentions" in request.facts else
             layouts.adapter_bytes(request.tensors, facts))
    apart = files_apart("diffusers", facts, request.tensors) if request.has_lora else {}
    apart = {layouts.WITHOUT_LORA if name == layouts.ADAPTER else name: content
             for name, content in apart.items()}
    return {layouts.ADAPTER: whole, **apart, **make_card(args, request, facts)}


def export(args: argparse.Namespace, request: argparse.Namespace) -> None:
    """Write, prove and, with --push, upload what export.py's flags, checked by check_request(), ask for.
    Raises UserError: the base model does not fit, or the hub refuses. Raises RunFailed: the proof failed, the
    disk is full, the hub is not reached."""
    attentions = places(request.base)
    layouts.check_places(request.adapter_path, request.tensors, attentions,
                         request.facts.get("attentions", []))
    facts = {**request.facts, "attentions": [*attentions]}
    contents = make_files(args, request, facts)
    with folders.whole(request.out) as folder:
        for name, content in contents.items():
            files.write_atomic(folder / name, content)
        files.write_atomic(folder / folders.FACTS, folders.facts_of(
            args.to, request.adapter_path.read_bytes(), contents))
        reference = make_reference(request.base, request.adapter_path, facts["dims"]["audio_embed"])
        found, effect = prove(args.to, folder, reference, request.has_lora)
        for how, difference in found.items():
            print(f"{how} predicts the same as {request.adapter_path}, largest difference {difference:.1e}",
                  flush=True)
    print(about_lora(request, effect), flush=True)
    for name in sorted(contents):
        print(f"{request.out / name}: {len(contents[name]):,} bytes", flush=True)
    if args.push:
        print(f"uploading {request.out} to {args.push}", flush=True)
        address = push(args.push, request.out, args.public)
        print(f"{address}: uploaded{'' if args.public else '; a new repository is private without --public'}",
              flush=True)


def about_lora(request: argparse.Namespace, effect: float) -> str:
    """Whether there is a LoRA, and what it does, so that one knows whether the proof could tell."""
    if not request.has_lora:
        return (f"{request.adapter_path}: holds no LoRA (it is of {request.facts['stage']}), so the folder "
                "has none")
    if layouts.is_zero(request.tensors):
        return (f"the LoRA of {request.adapter_path} is 0 (the best step of its stage 2 is step 0): the "
                "files are right, and it changes nothing")
    small = "; that is too little to tell whether it is there" if effect <= 10 * MOST_DIFFERENCE else ""
    return f"without the LoRA the prediction is off by {effect:.1e}{small}"
