"""The bridge to stock diffusers: export, load, proof of equality, pictures, and a stage's result.

The file is, tensor for tensor, diffusers' IP-Adapter FaceID layout, so every SD 1.5 pipeline takes it as it is:
`image_proj.` holds the projection, `ip_adapter.` the audio K and V (odd numbers, in the order of the UNet's attention
processors) and the LoRA (all numbers).
"""

from __future__ import annotations

import io
import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

import parallel
import pretrained
import runs
from common import DTYPES, AudioAttentionAdapter, AudioProjectionMLP, peak_memory_mb, quiet_libraries
from config import GUIDANCE, SCHEDULERS, RunFailed, write_atomic, write_json


def stock_layout(audio_proj: AudioProjectionMLP, audio_attn: AudioAttentionAdapter, unet: nn.Module) -> dict[str, Tensor]:
    """The adapter as diffusers' IP-Adapter FaceID tensors: sqrt(E), tanh(gate) and LoRA's alpha/rank are folded in."""
    proj = {key: value.detach().float().cpu().clone() for key, value in audio_proj.state_dict().items()}
    proj["proj.0.weight"] *= math.sqrt(audio_proj.input_dim)
    tensors = {f"image_proj.{key}": value for key, value in proj.items()}
    for i, (to_k, to_v) in enumerate(zip(audio_attn.to_k, audio_attn.to_v)):
        tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = to_k.weight.detach().float().cpu()
        tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = (
            to_v.weight.detach().float() * torch.tanh(audio_attn.gate.detach())).cpu()
    for i, name in enumerate(unet.attn_processors):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        for key, layer in (("to_q", attn.to_q), ("to_k", attn.to_k), ("to_v", attn.to_v), ("to_out", attn.to_out[0])):
            if hasattr(layer, "lora_A"):
                tensors[f"ip_adapter.{i}.{key}_lora.down.weight"] = layer.lora_A["lora"].weight.detach().float().cpu()
                tensors[f"ip_adapter.{i}.{key}_lora.up.weight"] = (
                    layer.lora_B["lora"].weight.detach().float() * layer.scaling["lora"]).cpu()
    return {key: value.contiguous() for key, value in tensors.items()}


def write_adapter(path: Path, weights: dict, unet: nn.Module, header: dict) -> None:
    """Write the file that stock diffusers loads; its metadata tell which CLAP and base model it belongs to, and its SHA-256."""
    facts = {key: header[key] for key in ("stage", "step", "base_model", "clap_model", "fingerprints", "dims")}
    facts |= {"image_size": header["settings"]["image_size"],
              "tanh_gate": float(torch.tanh(weights["audio_attn"].gate.detach()))}
    tensors = stock_layout(weights["audio_proj"], weights["audio_attn"], unet)
    facts["sha256"] = pretrained.adapter_digest(facts, {name: tensor.numpy() for name, tensor in tensors.items()})
    write_atomic(path, safetensors_bytes(tensors, {"clap2diffusion": json.dumps(facts)}))


def load_stock_pipeline(base_dir: Path, adapter_path: Path, device: str = "cpu", dtype=torch.float32, scheduler: str = "base",
                        **parts):
    """diffusers' StableDiffusionPipeline with load_ip_adapter on the exported file; `parts` replace components.

    scheduler: the base model's own, or one of SCHEDULERS made for few steps (DPM-Solver++, Lu et al. 2022; UniPC, Zhao et
    al. 2023) on the base model's noise schedule.
    """
    quiet_libraries()
    import diffusers
    from diffusers import StableDiffusionPipeline
    parts = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None, **parts}
    pipe = StableDiffusionPipeline.from_pretrained(base_dir, dtype=dtype, **parts)
    pipe.load_ip_adapter(str(adapter_path.parent), subfolder="", weight_name=adapter_path.name,
                         image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    if SCHEDULERS[scheduler]:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe.to(device)


@torch.inference_mode()
def check_export(adapter_path: Path, base_dir: Path, audio_proj: AudioProjectionMLP, audio_attn: AudioAttentionAdapter,
                 unet: nn.Module, batch: dict[str, Tensor], limit: float = 1e-4) -> float:
    """Load the exported file in a stock pipeline and compare its noise prediction with our own forward, in float32.

    batch: noisy_latents (B, C, h, w), timesteps (B,), text_tokens (B, L, D), audio_embeds (B, E).

    Raises:
        RunFailed: the largest difference is above `limit`, relative to the prediction's own largest value
            where that is above 1.
    """
    batch = {key: value.cpu() for key, value in batch.items()}
    audio_tokens = audio_proj.cpu()(batch["audio_embeds"])
    pipe = load_stock_pipeline(base_dir, adapter_path, vae=None, text_encoder=None, tokenizer=None)
    if next(unet.parameters()).dtype != torch.float32:  # held in fewer bits: compare with the base's own float32 weights
        for name, module in list(unet.named_modules()):
            if hasattr(module, "quant_state"):
                unet.set_submodule(name, pipe.unet.get_submodule(name))
        whole = dict(pipe.unet.named_parameters())
        for name, p in unet.named_parameters():
            p.data = p.data.float() if ".lora_" in name else whole[name].data.clone()
    unet.cpu().eval(), audio_attn.cpu()
    with torch.compiler.set_stance("force_eager"):
        ours = unet(batch["noisy_latents"], batch["timesteps"], (batch["text_tokens"], audio_tokens)).sample
    stock = pipe.unet(batch["noisy_latents"], batch["timesteps"], batch["text_tokens"],
                      added_cond_kwargs={"image_embeds": [batch["audio_embeds"][:, None]]}).sample
    difference = float((ours - stock).abs().max() / max(1.0, float(ours.abs().max())))
    if not difference <= limit:
        raise RunFailed(f"{adapter_path}: stock diffusers' prediction differs from ours by {difference:.2e}, expected "
                        f"at most {limit:g}; keep the file and report it")
    return difference


@contextmanager
def listening(unet: nn.Module, audio_embeds: Tensor, guided: bool, negative_embeds: Tensor | None = None,
              guidance_pair: tuple[float, float] | None = None):
    """Inside, row i of the batch that a pipeline gives its UNet hears audio_embeds[i] of (B, E).

    diffusers repeats `ip_adapter_image_embeds` for each picture of a batch (it expects one image for all of them), so
    that every picture would attend to every sound; hooks on the UNet put each sound where it belongs. `guided` says
    that the pipeline calls with the rows [no text, text]; the first half then hears `negative_embeds` (1 or B, E), the
    null audio if None.

    guidance_pair (T, A): the rows become [no text and no audio, text alone, text and audio], and both halves of the
    answer are no + T * (text - no) + A * (both - text) (InstructPix2Pix, Brooks et al. 2023, eq. 3), so that the
    pipeline's own guidance, no + g * (text - no), changes nothing.
    """
    sounds = audio_embeds[:, None].to(unet.device, unet.dtype)  # (B, 1, E)
    silence = torch.zeros_like(sounds)
    if negative_embeds is not None:
        silence = silence + negative_embeds[:, None].to(sounds)
    embeds = torch.cat([silence] * (2 if guidance_pair else int(guided)) + [sounds])

    def before(unet, args, kwargs):
        if guidance_pair:
            no_text, text = kwargs["encoder_hidden_states"].chunk(2)
            latents = args[0].chunk(2)[0]
            args = (torch.cat([latents] * 3), *args[1:])
            kwargs["encoder_hidden_states"] = torch.cat([no_text, text, text])
        return args, {**kwargs, "added_cond_kwargs": {"image_embeds": [embeds]}}

    def after(unet, args, output):
        if guidance_pair:
            no, text, both = output[0].chunk(3)
            pred = no + guidance_pair[0] * (text - no) + guidance_pair[1] * (both - text)
            return (torch.cat([pred, pred]),)

    hooks = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def pictures(pipe, audio_embeds: Tensor, prompts: list[str], guidance: float, steps: int, seeds: list[int],
             audio_scale: float = 1.0, size: int | None = None, negative_embeds: Tensor | None = None,
             guidance_pair: tuple[float, float] | None = None, init_image: np.ndarray | None = None,
             strength: float = 0.6) -> list:
    """Pictures (PIL) from audio_embeds (B, E), one a sound, by the stock pipeline; the null audio is the zero vector.

    negative_embeds (1 or B, E): what the unconditional half hears instead of the null audio.
    guidance_pair (T, A): guidance of text and sound apart, instead of `guidance`; see listening().
    init_image (3, size, size) in [-1, 1]: begin with it, noised by `strength`, in the stock image-to-image pipeline.
    """
    pipe.set_ip_adapter_scale(audio_scale)
    call = {"guidance_scale": 2.0 if guidance_pair else guidance, "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    if init_image is None:
        call |= {"height": size, "width": size}
    else:
        from diffusers import StableDiffusionImg2ImgPipeline
        bar = pipe._progress_bar_config
        pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=pipe.unet.dtype)  # its default casts to float32
        pipe.set_progress_bar_config(**bar)
        image = torch.from_numpy(init_image / 2 + 0.5)  # the pipeline expects [0, 1]
        call |= {"image": image.expand(len(seeds), -1, -1, -1), "strength": strength}
    with listening(pipe.unet, audio_embeds, call["guidance_scale"] > 1, negative_embeds, guidance_pair):
        return pipe(prompts, **call).images


def sample_pictures(adapter_path: Path, base: Path, val, cfg, device, steps: int = 25, guidance: float = GUIDANCE):
    """One picture for each of the first clips of differing labels, without a prompt, side by side (a PIL image)."""
    from PIL import Image
    first = {row["label"] or row["id"]: i for i, row in reversed(list(enumerate(val.rows)))}
    chosen = sorted(first.values())[:cfg.samples]
    pipe = load_stock_pipeline(base, adapter_path, device, DTYPES[cfg.precision])
    images = []
    for i in chosen:  # one at a time: a sample sheet must fit wherever training fits
        images += pictures(pipe, val[i]["audio_embeds"][:1], [""], guidance, steps, [cfg.seed + i],
                           size=cfg.image_size)
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * image.width, 0))
    return sheet


def write_png(path: Path, image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomic(path, content.getvalue())


def sample_during(folder, weights: dict, unet: nn.Module, base: Path, header: dict, val, cfg, log, step, device) -> None:
    """Sample pictures of the weights as they are now, through the same export and pipeline as the final ones."""
    if not parallel.first():
        return
    preview = folder.folder / "preview.safetensors"
    write_adapter(preview, weights, unet, {**header, "step": step})
    sheet = sample_pictures(preview, base, val, cfg, device)
    write_png(folder.folder / f"samples-{step:08d}.png", sheet)
    log.image(step, "samples", sheet)
    preview.unlink()


def finish(folder, weights: dict, unet: nn.Module, base: Path, header: dict, val, scheduler, cfg, progress, log, result,
           device) -> None:
    """Write final.safetensors and adapter.safetensors, prove the latter in a stock pipeline, write result.json last."""
    if not parallel.first():
        return
    header = {**header, "step": progress.step}
    adapter_path = folder.folder / "adapter.safetensors"
    write_adapter(adapter_path, weights, unet, header)
    generator = torch.Generator().manual_seed(cfg.seed)
    n = min(len(val), 4)
    rows = [val[i] for i in range(n)]
    timesteps = torch.linspace(0, scheduler.config.num_train_timesteps - 1, n).long()
    batch = {"noisy_latents": torch.randn((n, *val.latent_shape), generator=generator), "timesteps": timesteps,
             "text_tokens": torch.stack([row["text_embeds"] for row in rows]),
             "audio_embeds": torch.stack([row["audio_embeds"][0] for row in rows])}
    difference = check_export(adapter_path, base, weights["audio_proj"], weights["audio_attn"], unet, batch)
    log.text(f"{cfg.name}: {adapter_path} loads into a stock pipeline, largest difference {difference:.1e}")
    if cfg.samples:
        sheet = sample_pictures(adapter_path, base, val, cfg, device)
        write_png(folder.folder / "samples.png", sheet)
        log.image(progress.step, "samples", sheet)
    runs.save_checkpoint(folder.final, weights, header)  # only now: the next stage takes it for a proven result
    memory = peak_memory_mb(device)
    result = {"stage": cfg.name, "steps": progress.step, "ended": progress.ended, "init": header["init"],
              "seconds": round(progress.wall_seconds(), 1), "step_seconds": round(progress.step_seconds, 1),
              "first_validation": progress.first_validation, "last_validation": progress.last_validation,
              "tanh_gate": float(torch.tanh(weights["audio_attn"].gate.detach())), "stock_difference": difference,
              "peak_memory_mb": memory, **result}
    write_json(folder.result, result)
    right, other = result["validation"]["val_right"], result["validation"]["other_minus_right"]
    log.text(f"{cfg.name}: done ({progress.ended}); val_right {right[0]:.5f}, another's sound costs {other[0]:+.5f} "
             f"[{other[1]:+.5f}, {other[2]:+.5f}]; peak memory "
             + ", ".join(f"{name} {mb:.0f} MB" for name, mb in memory.items()))
    log.close()
