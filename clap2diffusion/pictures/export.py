"""The adapter as the file that stock diffusers loads, and the proof that it does there what it does here.

The file has diffusers' IP-Adapter FaceID layout, so every SD 1.5 pipeline takes it. `image_proj.` holds the
projection, `ip_adapter.` the audio K and V (odd numbers, in the order of the UNet's attention processors) and
the LoRA (all numbers).
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.files import write_atomic
from clap2diffusion.base.tensor_file import digest
from clap2diffusion.pictures.pipelines import load_stock_pipeline
from common import AudioAttentionAdapter, AudioProjectionMLP


def stock_layout(audio_proj: AudioProjectionMLP, audio_attn: AudioAttentionAdapter, unet: nn.Module) -> dict:
    """The adapter as diffusers' tensors, with sqrt(E), tanh(gate) and LoRA's alpha / rank folded in."""
    tensors = {f"image_proj.{key}": weight for key, weight in audio_proj.state_dict().items()}
    tensors["image_proj.proj.0.weight"] = audio_proj.proj[0].weight * math.sqrt(audio_proj.input_dim)
    for i, (to_k, to_v) in enumerate(zip(audio_attn.to_k, audio_attn.to_v)):
        tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = to_k.weight
        tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = to_v.weight * torch.tanh(audio_attn.gate)
    for i, name in enumerate(unet.attn_processors):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        layers = {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}
        for key, layer in layers.items():
            if hasattr(layer, "lora_A"):
                up = layer.lora_B["lora"].weight * layer.scaling["lora"]
                tensors[f"ip_adapter.{i}.{key}_lora.down.weight"] = layer.lora_A["lora"].weight
                tensors[f"ip_adapter.{i}.{key}_lora.up.weight"] = up
    return {key: weight.detach().float().cpu().contiguous() for key, weight in tensors.items()}


def write_adapter(path: Path, weights: dict, unet: nn.Module, header: dict) -> None:
    """Write the file that stock diffusers loads. Its metadata are adapter_facts() and their SHA-256."""
    named = ("stage", "step", "base_model", "clap_model", "fingerprints", "dims")
    facts = {**{key: header[key] for key in named}, "image_size": header["settings"]["image_size"],
             "tanh_gate": float(torch.tanh(weights["audio_attn"].gate.detach()))}
    tensors = stock_layout(weights["audio_proj"], weights["audio_attn"], unet)
    # as NumPy arrays, which is how adapter_facts() reads them: a digest names the type
    facts["sha256"] = digest(facts, {name: tensor.numpy() for name, tensor in tensors.items()})
    write_atomic(path, safetensors_bytes(tensors, {"clap2diffusion": json.dumps(facts)}))


def restore_float32(unet: nn.Module, whole: nn.Module) -> None:
    """Give a UNet that was held in fewer bits the float32 weights of `whole`. Its LoRA stays as trained."""
    for name, module in list(unet.named_modules()):
        if hasattr(module, "quant_state"):  # bitsandbytes' 4-bit layer
            unet.set_submodule(name, whole.get_submodule(name))
    weights = dict(whole.named_parameters())
    for name, p in unet.named_parameters():
        p.data = p.data.float() if ".lora_" in name else weights[name].data.clone()


@torch.inference_mode()
def check_export(adapter_path: Path, base_dir: Path, audio_proj: AudioProjectionMLP,
                 audio_attn: AudioAttentionAdapter, unet: nn.Module, batch: dict[str, Tensor],
                 limit: float = 1e-4) -> float:
    """Load the file in a stock pipeline and compare its prediction with our own, on the CPU in float32.

    batch: noisy_latents (B, C, h, w), timesteps (B,), text_tokens (B, L, D), audio_embeds (B, E).
    The three modules stay there, the UNet in eval mode: nobody trains them any more.
    Returns the largest difference, relative to the largest predicted value where that is above 1.
    Raises RunFailed: it is above `limit`.
    """
    pipe = load_stock_pipeline(base_dir, adapter_path, vae=None, text_encoder=None, tokenizer=None)
    if next(unet.parameters()).dtype != torch.float32:
        restore_float32(unet, pipe.unet)
    for module in (audio_proj, audio_attn, unet.eval()):
        module.cpu()
    latents, timesteps, text_tokens, audio_embeds = (
        batch[key].cpu() for key in ("noisy_latents", "timesteps", "text_tokens", "audio_embeds"))
    with torch.compiler.set_stance("force_eager"):  # a compiled UNet would compile anew for this batch
        ours = unet(latents, timesteps, (text_tokens, audio_proj(audio_embeds))).sample
    stock = pipe.unet(latents, timesteps, text_tokens,
                      added_cond_kwargs={"image_embeds": [audio_embeds[:, None]]}).sample
    difference = float((ours - stock).abs().max() / max(1.0, float(ours.abs().max())))
    if not difference <= limit:
        raise RunFailed(f"{adapter_path}: stock diffusers' prediction differs from ours by {difference:.2e}, "
                        f"expected at most {limit:g}; keep the file and report it")
    return difference
