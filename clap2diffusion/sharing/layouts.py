"""An adapter's tensors in the layouts of diffusers, kohya's sd-scripts and peft. No torch is needed.

Our file has alpha / rank folded into the LoRA's B (up). So in each layout alpha equals the rank, and strength
1 is as trained. Shapes: R rank, I and O width of a layer's input and output; down (R, I), up (O, R)."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.tensor_file import digest

ADAPTER, WITHOUT_LORA = "adapter.safetensors", "adapter_without_lora.safetensors"
LORA = "pytorch_lora_weights.safetensors"  # as diffusers looks for it
KOHYA_LORA, PEFT_LORA, PEFT_CONFIG = ("clap2diffusion_lora.safetensors", "adapter_model.safetensors",
                                      "adapter_config.json")
LAYERS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}  # our file's: the UNet's
OF_LORA = re.compile(r"ip_adapter\.(\d+)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
LEFT_OUT = "its LoRA is left out of this file"  # stands in the warning of such an adapter
SD15_WIDTHS = {320, 640, 1280}  # of the attentions of Stable Diffusion 1.x

Lora = dict[str, tuple[np.ndarray, np.ndarray]]  # a layer's name in the UNet: down, up


def to_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes each time: the library writes metadata in an order of chance."""
    content = save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, metadata)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length:]


def read_adapter(path: Path) -> dict[str, np.ndarray]:
    """All tensors of an adapter file."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def adapter_bytes(tensors: dict[str, np.ndarray], facts: dict) -> bytes:
    """An adapter file with its facts and their SHA-256, as adapter_facts() reads it."""
    return to_bytes(tensors, {"clap2diffusion": json.dumps({**facts, "sha256": digest(facts, tensors)})})


def has_lora(names) -> bool:
    return any(OF_LORA.fullmatch(name) for name in names)


def is_zero(tensors: dict[str, np.ndarray]) -> bool:
    """Whether the LoRA's B is 0 everywhere, as it is before the first step: such a LoRA changes nothing."""
    return not any(tensor.any() for name, tensor in tensors.items() if name.endswith("_lora.up.weight"))


def split(tensors: dict[str, np.ndarray], attentions: list[str]) -> tuple[dict[str, np.ndarray], Lora]:
    """An adapter's tensors without those of its LoRA, and the LoRA by the names of the UNet's layers."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if found := OF_LORA.fullmatch(name):
            layer = f"{attentions[int(found[1])]}.{LAYERS[found[2]]}"
            halves.setdefault(layer, {})[found[3]] = tensor
    rest = {name: tensor for name, tensor in tensors.items() if not OF_LORA.fullmatch(name)}
    return rest, {layer: (halves[layer]["down"], halves[layer]["up"]) for layer in sorted(halves)}


def check_places(path: Path, tensors: dict[str, np.ndarray], places: dict[str, int],
                 recorded: list[str]) -> None:
    """Compare an adapter with a UNet. places: the UNet's attentions in the order of its processors, with the
    width of each. recorded: those that the adapter names, or []. Raises UserError: they are others."""
    names, widths = list(places), list(places.values())
    found = {int(name.split(".")[1]): tensor.shape[0] for name, tensor in tensors.items()
             if name.endswith(".to_k_ip.weight")}
    fits = sorted(found) == list(range(1, len(widths), 2)) and all(widths[i] == found[i] for i in found)
    if not fits or recorded not in ([], names):
        raise UserError(f"{path}: its {len(found)} attentions to the sound do not fit this base model's UNet "
                        f"with {len(names) // 2}; give the one that it was trained with as --base-model")


def diffusers_lora(lora: Lora, facts: dict) -> dict[str, bytes]:
    tensors = {f"unet.{layer}.lora.{half}.weight": tensor for layer, pair in lora.items()
               for half, tensor in zip(("down", "up"), pair, strict=True)}
    return {LORA: to_bytes(tensors, {"format": "pt", "clap2diffusion": json.dumps(facts)})}


def kohya_lora(lora: Lora, facts: dict) -> dict[str, bytes]:
    """With the metadata that sd-scripts and A1111 show. What is not known is left out."""
    tensors = {}
    for layer, (down, up) in lora.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
                    f"{name}.alpha": np.array(len(down), np.float32)}
    ranks = {len(down) for down, _ in lora.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    widths = {len(up) for _, up in lora.values()}
    shown = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank,
             "ss_output_name": KOHYA_LORA.removesuffix(".safetensors"), "ss_steps": str(facts["step"]),
             "ss_sd_model_name": Path(facts["base_model"]).name, "ss_v2": "False",
             "ss_resolution": f"({facts['image_size']}, {facts['image_size']})"}
    if facts["dims"]["width"] == 768 and widths == SD15_WIDTHS:
        shown["ss_base_model_version"] = "sd_v1"
    return {KOHYA_LORA: to_bytes(tensors, {"format": "pt", **shown, "clap2diffusion": json.dumps(facts)})}


def peft_lora(lora: Lora, facts: dict) -> dict[str, bytes]:
    """A LoraConfig whose alpha is the rank, and the weights under the names that PeftModel gives them."""
    tensors = {f"base_model.model.{layer}.{half}.weight": tensor for layer, pair in lora.items()
               for half, tensor in zip(("lora_A", "lora_B"), pair, strict=True)}
    ranks = {layer: len(down) for layer, (down, _) in lora.items()}
    most = max(ranks.values())
    others = {layer: rank for layer, rank in ranks.items() if rank != most}
    config = {"peft_type": "LORA", "base_model_name_or_path": facts["base_model"], "r": most,
              "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0,
              "target_modules": sorted(lora), "bias": "none", "inference_mode": True, "task_type": None}
    return {PEFT_LORA: to_bytes(tensors, {"format": "pt", "clap2diffusion": json.dumps(facts)}),
            PEFT_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
