"""Does each export of export.py predict what the adapter does, by the library that it is for?

    python bench/sharing.py --run runs/tiny                   # writes results/sharing-tiny-CPU.{json,md}
    python bench/sharing.py --sd15                            # SD 1.5's shapes, an adapter of random weights
    python bench/sharing.py --sd15 --sd-scripts ../sd-scripts # kohya's own loader as well, from its checkout

Each export is made by export.py, which proves it; then it is loaded here once more. By hand means that
alpha / rank * up @ down of kohya's file is added to the weights of a UNet, with none of these libraries."""

import functools
import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock, patch

import bench_tools as tools
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from clap2diffusion.base.progress import bar_options
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter
from clap2diffusion.sharing import proof
from clap2diffusion.sharing.layouts import KOHYA_LORA

parser = tools.bench_parser(__doc__)
parser.add_argument("--run", default="", help="a run or adapter ('' = an adapter of random weights)")
parser.add_argument("--sd-scripts", default="", help="a checkout of kohya-ss/sd-scripts ('' = none)")


def by_hand(pipe, folder: Path) -> torch.nn.Module:
    """kohya's LoRA added to the UNet's own weights."""
    tensors = load_file(folder / KOHYA_LORA)
    named = {f"lora_unet_{name.replace('.', '_')}": module for name, module in pipe.unet.named_modules()}
    for name in [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        named[name].weight.data += tensors[f"{name}.alpha"] / len(down) * up @ down
    return pipe.unet


def by_sd_scripts(pipe, folder: Path, checkout: Path, merged: bool) -> torch.nn.Module:
    """kohya's networks/lora.py at multiplier 1: as modules beside the UNet's, or merged into its weights."""
    absent = [name for name in ("torchvision", "cv2", "einops") if not importlib.util.find_spec(name)]
    unused = {name: MagicMock() for name in (*absent, "torchvision.transforms")}  # imported there, not used
    with patch.dict(sys.modules, unused), patch.object(sys, "path", [str(checkout), *sys.path]):
        from networks.lora import create_network_from_weights
    network, tensors = create_network_from_weights(1.0, str(folder / KOHYA_LORA), None, [], pipe.unet,
                                                   for_inference=True)
    if merged:
        network.merge_to([], pipe.unet, tensors, torch.float32, "cpu")
    else:
        network.apply_to([], pipe.unet, False, True)
        network.load_state_dict(tensors)
        pipe.unet.network = network  # or it would be gone
    return pipe.unet.eval()


@tools.automain(parser)
def main(args, place: Path) -> None:
    base, clap = tools.models(args, place)
    adapter_path = find_adapter(args.run) if args.run else place / "adapter.safetensors"
    if not args.run:
        tools.random_adapter(adapter_path, base, clap)
    embed_dim = adapter_facts(adapter_path)["dims"]["audio_embed"]
    reference, rows = proof.make_reference(base, adapter_path, embed_dim), []

    def measure(to: str, way: proof.Way) -> None:
        pipe = proof.pipeline(base)
        proof.load_adapter(pipe, place / to, way.adapter)
        unet = way.add_lora(pipe, place / to) if way.add_lora else pipe.unet
        apart = reference.apart(proof.predict(unet, reference.batch))
        rows.append({"export": to, "loaded by": way.name, "largest difference": f"{apart:.1e}"})
    for to in tqdm(("diffusers", "kohya", "peft", "hub"), **bar_options(desc="exports")):
        tools.call("export.py", "--run", adapter_path, "--to", to, "--out", place / to, "--base-model", base)
        for way in proof.ways(to, True):
            measure(to, way)
    measure("kohya", proof.Way("by hand", add_lora=by_hand))
    for how, merged in (("applied", False), ("merged", True)) if args.sd_scripts else ():
        measure("kohya", proof.Way(f"sd-scripts, {how}", add_lora=functools.partial(
            by_sd_scripts, checkout=Path(args.sd_scripts).resolve(), merged=merged)))
    measure("diffusers", proof.Way("without its LoRA"))
    tools.write_results(f"sharing-{args.size}", "largest difference of the noise prediction of two samples, "
                        "a sound each, in float32, from adapter.safetensors'", rows)
