"""Stock diffusers: the adapter file that it loads, the proof that it does, and pictures from sounds by it.

The file has diffusers' IP-Adapter FaceID layout, so every SD 1.5 pipeline takes it. `image_proj.` holds the
projection, `ip_adapter.` the audio K and V (odd numbers, in the order of the UNet's attention processors) and
the LoRA (all numbers)."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import diffusers  # a pipeline takes seconds to import: each is named where it is used
import numpy as np
import torch
import transformers
from safetensors.torch import save
from torch import Tensor, nn

from clap2diffusion.base import files, tensor_file
from clap2diffusion.base.device import DTYPES, quiet_libraries
from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.hub import told
from clap2diffusion.base.models import load_part
from clap2diffusion.base.settings import GUIDANCE, SCHEDULERS
from clap2diffusion.base.statistics import stratified
from clap2diffusion.dataset.captions import text_limit
from clap2diffusion.pictures.sheets import tile

MOST_DIFFERENCE = 1e-4  # of stock diffusers' prediction from ours


def load_base_pipeline(base_dir: Path, dtype=torch.float32, **parts):
    """diffusers' StableDiffusionPipeline of a base model, on the CPU; `parts` replace its own.
    Raises UserError: a part cannot be made of its files, or a tensor is missing or has no place."""
    quiet_libraries()
    kinds = {"unet": (diffusers, "UNet2DConditionModel"), "vae": (diffusers, "AutoencoderKL"),
             "text_encoder": (transformers, "CLIPTextModel")}
    parts = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None,
             "image_encoder": None, **parts}
    parts |= {part: load_part(getattr(library, kind), base_dir, "base model", part, dtype,
                              ("text_projection.",) if part == "text_encoder" else ())
              for part, (library, kind) in kinds.items() if part not in parts}
    with told(diffusers.StableDiffusionPipeline, "base model", base_dir):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(base_dir, dtype=dtype, **parts)
    if pipe.tokenizer:  # not every tokenizer's config names a limit
        pipe.tokenizer.model_max_length = text_limit(Path(base_dir))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_stock_pipeline(base_dir: Path, adapter_path: Path, device: str = "cpu", dtype=torch.float32,
                        scheduler: str = "base", **parts):
    """diffusers' StableDiffusionPipeline with the exported file; `parts` replace its own. scheduler: the base
    model's own, or one of SCHEDULERS for few steps (DPM-Solver++, Lu et al. 2022; UniPC, Zhao et al. 2023),
    on the base model's noise schedule."""
    pipe = load_base_pipeline(base_dir, dtype, **parts)
    pipe.load_ip_adapter(str(adapter_path.parent), "", adapter_path.name, image_encoder_folder=None)
    if SCHEDULERS[scheduler]:
        kind = getattr(diffusers, SCHEDULERS[scheduler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe.to(device)


def stock_layout(weights: dict[str, nn.Module], unet: nn.Module) -> dict[str, Tensor]:
    """The adapter as diffusers' tensors, with sqrt(E), tanh(gate) and LoRA's alpha / rank folded in."""
    audio_proj, audio_attn = weights["audio_proj"], weights["audio_attn"]
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


def write_adapter(path: Path, weights: dict[str, nn.Module], unet: nn.Module, header: dict) -> None:
    """Write the file that stock diffusers loads. Its metadata are adapter_facts() and their SHA-256."""
    named = ("stage", "step", "base_model", "clap_model", "fingerprints", "dims")
    facts = {**{key: header[key] for key in named}, "image_size": header["settings"]["image_size"],
             "tanh_gate": float(torch.tanh(weights["audio_attn"].gate.detach())),
             "warning": header.get("warning", "")}
    tensors = stock_layout(weights, unet)
    # as NumPy arrays, which is how adapter_facts() reads them: a digest names the type
    facts["sha256"] = tensor_file.digest(facts, {name: tensor.numpy() for name, tensor in tensors.items()})
    files.write_atomic(path, save(tensors, {"clap2diffusion": json.dumps(facts)}))


@torch.inference_mode()
def check_export(adapter_path: Path, base_dir: Path, weights: dict[str, nn.Module], unet: nn.Module,
                 batch: dict[str, Tensor]) -> float:
    """The largest difference of a stock pipeline's prediction from our own, on the CPU in float32, relative
    to the largest predicted value if that is above 1. Raises RunFailed: it is above MOST_DIFFERENCE. The
    modules stay there, since nothing trains them any more. batch: noisy_latents (B, C, h, w), timesteps (B,),
    text_tokens (B, L, D), audio_embeds (B, E)."""
    pipe = load_stock_pipeline(base_dir, adapter_path, vae=None, text_encoder=None, tokenizer=None)
    if next(unet.parameters()).dtype != torch.float32:  # held in fewer bits; its LoRA stays as trained
        for name, module in list(unet.named_modules()):
            if hasattr(module, "quant_state"):  # bitsandbytes' 4-bit layer
                unet.set_submodule(name, pipe.unet.get_submodule(name))
        whole = dict(pipe.unet.named_parameters())
        for name, p in unet.named_parameters():
            p.data = p.data.float() if ".lora_" in name else whole[name].data.clone()
    for module in (weights["audio_proj"], weights["audio_attn"], unet.eval()):
        module.cpu()
    latents, timesteps, text_tokens, audio_embeds = (
        batch[key].cpu() for key in ("noisy_latents", "timesteps", "text_tokens", "audio_embeds"))
    with torch.compiler.set_stance("force_eager"):  # a compiled UNet would compile anew for this batch
        ours = unet(latents, timesteps, (text_tokens, weights["audio_proj"](audio_embeds))).sample
    stock = pipe.unet(latents, timesteps, text_tokens,
                      added_cond_kwargs={"image_embeds": [audio_embeds[:, None]]}).sample
    difference = float((ours - stock).abs().max() / max(1.0, float(ours.abs().max())))
    if not difference <= MOST_DIFFERENCE:
        raise RunFailed(f"{adapter_path}: stock diffusers' prediction differs from ours by {difference:.2e}, "
                        f"expected at most {MOST_DIFFERENCE:g}; keep the file and report it")
    return difference


@contextmanager
def listening(unet: nn.Module, audio_embeds: Tensor, guided: bool, negative_embeds: Tensor | None = None,
              guidance_pair: tuple[float, float] | None = None):
    """Inside, row i of the batch that a pipeline gives its UNet hears audio_embeds[i] of (B, E).
    By hooks: diffusers repeats `ip_adapter_image_embeds`, so each picture would attend to every sound.
    guided: the rows are [no text, text]; the first half hears negative_embeds (1 or B, E) or the null audio.
    guidance_pair (T, A): the rows become [no text and no audio, text alone, text and audio]. Both halves of
    the answer are no + T * (text - no) + A * (both - text) (InstructPix2Pix, Brooks et al. 2023, eq. 3), so
    the pipeline's own guidance, no + g * (text - no), changes nothing."""
    sounds = audio_embeds[:, None].to(unet.device, unet.dtype)  # (B, 1, E)
    negative = torch.zeros_like(sounds) if negative_embeds is None else negative_embeds[:, None].to(sounds)
    embeds = torch.cat([negative.expand_as(sounds)] * (2 if guidance_pair else int(guided)) + [sounds])

    def before(unet, args, kwargs):
        if guidance_pair:
            no_text, text = kwargs["encoder_hidden_states"].chunk(2)
            args = (torch.cat([args[0].chunk(2)[0]] * 3), *args[1:])
            kwargs["encoder_hidden_states"] = torch.cat([no_text, text, text])
        return args, {**kwargs, "added_cond_kwargs": {"image_embeds": [embeds]}}

    def after(unet, args, output):
        if guidance_pair:
            no, text, both = output[0].chunk(3)
            pred = no + guidance_pair[0] * (text - no) + guidance_pair[1] * (both - text)
            return (torch.cat([pred, pred]),)

    with unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after):
        yield


@torch.inference_mode()
def pictures(pipe, audio_embeds: Tensor, prompts: list[str], guidance: float, steps: int, seeds: list[int],
             audio_scale: float = 1.0, size: int | None = None, negative_embeds: Tensor | None = None,
             guidance_pair: tuple[float, float] | None = None, init_image: np.ndarray | None = None,
             strength: float = 0.6) -> list:
    """Pictures (PIL) from audio_embeds (B, E), one a sound, by the stock pipeline. Zeros are the null audio.
    negative_embeds (1 or B, E): what the unconditional half hears instead of the null audio.
    guidance_pair (T, A): guidance of text and of sound apart, instead of `guidance`; see listening().
    init_image (3, size, size) in [-1, 1]: begin with it, noised by `strength`, image to image."""
    pipe.set_ip_adapter_scale(audio_scale)
    call = {"guidance_scale": 2.0 if guidance_pair else guidance, "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    if init_image is None:
        call |= {"height": size, "width": size}
    else:
        bar, kind = pipe._progress_bar_config, diffusers.StableDiffusionImg2ImgPipeline
        pipe = kind.from_pipe(pipe, dtype=pipe.unet.dtype)  # its default casts to float32
        pipe.set_progress_bar_config(**bar)
        image = torch.from_numpy(init_image / 2 + 0.5)  # the pipeline expects [0, 1]
        call |= {"image": image.expand(len(seeds), -1, -1, -1), "strength": strength}
    with listening(pipe.unet, audio_embeds, call["guidance_scale"] > 1, negative_embeds, guidance_pair):
        return pipe(prompts, **call).images


def sample_pictures(adapter_path: Path, base: Path, val, cfg, device):
    """One picture, without a prompt, for each of --samples clips, side by side (PIL)."""
    pipe, images = load_stock_pipeline(base, adapter_path, device, DTYPES[cfg.precision]), []
    for i in stratified([row["label"] for row in val.rows], cfg.samples):
        # one at a time, to fit wherever training fits
        sound = val[i]["audio_embeds"][:1]
        images += pictures(pipe, sound, [""], GUIDANCE, 25, [cfg.seed + i], size=cfg.image_size)
    return tile(images, columns=len(images), gap=0)
