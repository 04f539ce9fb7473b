"""An adapter.safetensors as the nodes use it: its facts, audio tokens, audio K and V, LoRA, and their places.

Shapes: S sounds, E width of CLAP's embedding, N audio tokens, D width of the UNet's cross-attention."""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

PLACE = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2")
MODULE = re.compile(r"(input|middle|output)_block(?:s\.(\d+))?\.\d+\.transformer_blocks\.(\d+)\.attn2")
WHOLE = {f"image_proj.{name}" for name in ("proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias",
                                           "norm.weight", "norm.bias")}
SIDES = {"down": "input", "mid": "middle", "up": "output"}
LAYERS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out_0"}


class Adapter(NamedTuple):
    """A file's name, the facts in its header, and its tensors in float32 on the CPU."""
    path: str
    facts: dict
    tensors: dict[str, Tensor]


def _digest(facts: dict, tensors: dict[str, np.ndarray]) -> str:
    """The SHA-256 that the file's writer took of facts and tensors."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(np.ascontiguousarray(tensors[name]))
    return found.hexdigest()


def read_adapter(path: str) -> Adapter:
    """Read and check an adapter file. Raises ValueError: it is missing, not one of CLAP2Diffusion's, altered,
    or from before the header named the attentions."""
    if not Path(path).is_file():
        raise ValueError(f"{path or 'no adapter'}: is not a file; give the adapter.safetensors of a run")
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["clap2diffusion"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        recorded = facts.pop("sha256", "")
        dims, clap = facts["dims"], facts["fingerprints"]["clap"]
        heard = [i for i, name in enumerate(facts.get("attentions", ())) if name.endswith("attn2")]
        halves = [{name.replace(f"lora.{side}", "lora") for name in arrays if f"_lora.{side}." in name}
                  for side in ("down", "up")]
        known = (isinstance(clap, str) and isinstance(facts["clap_model"], str) and halves[0] == halves[1]
                 and isinstance(facts.get("tanh_gate", 0.0), (int, float))
                 and WHOLE <= arrays.keys() and all(np.isfinite(array).all() for array in arrays.values())
                 and arrays["image_proj.proj.0.weight"].shape[1] == dims["audio_embed"]
                 and len(arrays["image_proj.proj.2.weight"]) == dims["num_tokens"] * dims["width"]
                 and {f"ip_adapter.{i}.to_{part}_ip.weight" for i in heard for part in "kv"} <= arrays.keys())
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path}: is not an adapter of CLAP2Diffusion (its header or tensors are missing, "
                         "of another kind or not finite); give the adapter.safetensors of a run")
    if recorded and recorded != _digest(facts, arrays):
        raise ValueError(f"{path}: its content does not match its SHA-256; the file was altered, use another "
                         "copy of it")
    if not facts.get("attentions"):
        raise ValueError(f"{path}: its header does not name the UNet's attentions, as files of the first "
                         "versions; write it again with today's code: python export.py --run RUN --to hub")
    return Adapter(str(path), facts, {name: torch.from_numpy(a).float() for name, a in arrays.items()})


def describe(adapter: Adapter) -> str:
    """What the header says, a line for each fact; the warning last."""
    facts, dims = adapter.facts, adapter.facts["dims"]
    ranks = {len(tensor) for name, tensor in lora_tensors(adapter).items() if "lora_down" in name}
    rows = {"file": adapter.path, "stage": f"{facts.get('stage')}, step {facts.get('step')}",
            "base model": facts.get("base_model"),
            "CLAP": f"{facts.get('clap_model')} ({facts['fingerprints']['clap']})",
            "audio tokens": f"{dims['num_tokens']} of width {dims['width']}",
            "gate": f"{facts.get('tanh_gate', float('nan')):.3f}, within the weights",
            "LoRA": f"rank {max(ranks)}" if ranks else "none",
            "picture size": f"{facts.get('image_size')} px", "warning": facts.get("warning") or "none"}
    return "\n".join(f"{name}: {value}" for name, value in rows.items())


def audio_tokens(adapter: Adapter, embeds: Tensor) -> Tensor:
    """CLAP's embeddings (S, E) -> audio tokens (S, N, D), both float32: Linear, GELU, Linear, LayerNorm. The
    file's first layer already holds the factor sqrt(E)."""
    dims = adapter.facts["dims"]
    layer = {name.removeprefix("image_proj."): weight for name, weight in adapter.tensors.items()}
    hidden = F.gelu(F.linear(embeds, layer["proj.0.weight"], layer["proj.0.bias"]))
    tokens = F.linear(hidden, layer["proj.2.weight"], layer["proj.2.bias"])
    return F.layer_norm(tokens.unflatten(-1, (dims["num_tokens"], dims["width"])), (dims["width"],),
                        layer["norm.weight"], layer["norm.bias"])


def keys_and_values(adapter: Adapter, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Audio K and V (S, N, channels) of each cross-attention by diffusers' name. The V hold the learned gate.
    They do not depend on the picture, so they are made once and no weight goes into the UNet."""
    return {name: tuple(F.linear(tokens, adapter.tensors[f"ip_adapter.{i}.to_{part}_ip.weight"])
                        for part in "kv")
            for i, name in enumerate(adapter.facts["attentions"]) if name.endswith("attn2")}


def lora_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The LoRA under the names that ComfyUI's loader knows; empty if the file has none. alpha / rank is in
    the up matrices, and a LoRA without an alpha counts as it is."""
    found = {}
    for i, name in enumerate(adapter.facts["attentions"]):
        for layer, module in LAYERS.items():
            for side in ("down", "up"):
                tensor = adapter.tensors.get(f"ip_adapter.{i}.{layer}_lora.{side}.weight")
                if tensor is not None:
                    found[f"lora_unet_{name.replace('.', '_')}_{module}.lora_{side}.weight"] = tensor
    return found


def match_attentions(names: list[str], modules: list[str]) -> dict[str, tuple[str, tuple]]:
    """diffusers' cross-attentions -> (ComfyUI's module, key of its replacement). Both number a UNet's blocks
    in the order in which they run, so they are matched one by one on each side of the middle. The key is
    (side, number), and (side, number, i) where a side has blocks with several transformers, as other
    IP-Adapter nodes have it. Raises ValueError: the counts differ."""
    expected, found = {side: [] for side in SIDES.values()}, {side: [] for side in SIDES.values()}
    for name in names:
        if place := PLACE.fullmatch(name):
            side, *numbers = place.groups(default="0")
            expected[SIDES[side]].append((tuple(map(int, numbers)), name))
    for module in modules:
        if place := MODULE.fullmatch(module):
            side, *numbers = place.groups(default="0")
            found[side].append((tuple(map(int, numbers)), module))
    sizes = [[len(one[side]) for side in SIDES.values()] for one in (found, expected)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the model has {'+'.join(map(str, sizes[0]))} cross-attentions (input, middle, "
                         f"output), the adapter expects {'+'.join(map(str, sizes[1]))}; load a checkpoint of "
                         "the kind it was trained with")
    matched = {}
    for side in SIDES.values():
        depth = max((index for (_, index), _ in found[side]), default=0)
        for (_, name), ((number, index), module) in zip(sorted(expected[side]), sorted(found[side])):
            matched[name] = module, (side, number, index) if depth else (side, number)
    return matched
