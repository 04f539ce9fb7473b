"""Stock diffusers: the adapter file that it loads, the proof that it does, and pictures from sounds by it.

The file has diffusers' IP-Adapter FaceID layout, so every SD 1.5 pipeline takes it. `image_proj.` holds the
projection, `ip_adapter.` the audio K and V (odd numbers, in the order of the UNet's attention processors) and
the LoRA (all numbers)."""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import diffusers  # a pipeline takes seconds to import: each is named where it is used
import numpy as np
import torch
import transformers
from safetensors.torch import save
from torch import Tensor, nn

from clap2diffusion.base import files, tensor_file
from clap2diffusion.base.device import DTYPES, quiet_libraries, to_nf4
from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.hub import told
from clap2diffusion.base.models import load_part
from clap2diffusion.base.settings import GUIDANCE, SCHEDULERS
from clap2diffusion.base.statistics import stratified
from clap2diffusion.dataset.captions import text_limit
from clap2diffusion.pictures.loras import add_lora
from clap2diffusion.pictures.sheets import tile

MOST_DIFFERENCE = 1e-4  # of stock diffusers' prediction from ours
UNPROVEN = "unproven.safetensors"  # an adapter file until it is checked; no run is left with one
REHEARSAL_SIZE = 16  # largest side of its latents: a weight that is not exported shows there as well


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
                        scheduler: str = "base", lora: str | Path | None = None, lora_scale: float = 1.0,
                        frozen_dtype: str = "", compile: bool = False, **parts):
    """diffusers' StableDiffusionPipeline with the exported file; `parts` replace its own. scheduler: the base
    model's own, or one of SCHEDULERS for few steps (DPM-Solver++, Lu et al. 2022; UniPC, Zhao et al. 2023;
    LCM, Luo et al. 2023), on the base model's noise schedule. lora: a file that check_lora() has passed,
    which acts beside the adapter's own LoRA, times lora_scale. frozen_dtype: "nf4" holds the UNet's attention
    blocks in 4 bits, with dtype bfloat16. compile: the transformer blocks are compiled at the first picture.
    Raises UserError: a model or the LoRA cannot be used."""
    pipe = load_base_pipeline(base_dir, dtype, **parts)
    if frozen_dtype == "nf4":  # before the adapter and LoRA, which stay in `dtype`, as in training
        to_nf4(pipe.unet)
    pipe.load_ip_adapter(str(adapter_path.parent), "", adapter_path.name, image_encoder_folder=None)
    if lora:
        add_lora(pipe, Path(lora), lora_scale)
    set_scheduler(pipe, scheduler)
    pipe.to(device)
    if compile:  # not the whole UNet: listening() hooks it anew for every call
        torch._dynamo.config.recompile_limit = 64  # one for each width, size and batch; the rest would not be
        pipe.unet.compile_repeated_blocks()
    return pipe


def sampling(args) -> dict:
    """The arguments of load_stock_pipeline() that sampling_flags() ask for, but for device and type."""
    return {name: getattr(args, name) for name in ("scheduler", "lora", "lora_scale", "frozen_dtype",
                                                   "compile")}


def set_scheduler(pipe, name: str) -> None:
    """Give a pipeline one of SCHEDULERS on the noise schedule that it has; "base" changes nothing."""
    if SCHEDULERS[name]:
        kind = getattr(diffusers, SCHEDULERS[name])
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")


def stock_layout(weights: dict[str, nn.Module], unet: nn.Module) -> dict[str, Tensor]:
    """The adapter as diffusers' tensors, with sqrt(E), tanh(gate) and LoRA's alpha / rank folded in. A part
    that a changed script adds has its place here too; gradients flow back through these tensors."""
    audio_proj, audio_attn = weights["audio_proj"], weights["audio_attn"]
    tensors = {f"image_proj.{key}": weight for key, weight in audio_proj.state_dict(keep_vars=True).items()}
    tensors["image_proj.proj.0.weight"] = audio_proj.proj[0].weight * math.sqrt(audio_proj.input_dim)
    for i, (to_k, to_v) in enumerate(zip(audio_attn.to_k, audio_attn.to_v)):
        tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = to_k.weight
        tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = to_v.weight * torch.tanh(audio_attn.gate)
    for i, name in enumerate(attention_names(unet)):
        attn = unet.get_submodule(name)
        layers = {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}
        for key, layer in layers.items():
            if hasattr(layer, "lora_A"):
                up = layer.lora_B["lora"].weight * layer.scaling["lora"]
                tensors[f"ip_adapter.{i}.{key}_lora.down.weight"] = layer.lora_A["lora"].weight
                tensors[f"ip_adapter.{i}.{key}_lora.up.weight"] = up
    return tensors


def attention_names(unet: nn.Module) -> list[str]:
    """The UNet's attentions in the order of its processors, from which the file's numbers are: number i is
    [i]. So another program can put the tensors in their places without asking a UNet."""
    return [name.removesuffix(".processor") for name in unet.attn_processors]


def write_adapter(path: Path, weights: dict[str, nn.Module], unet: nn.Module, header: dict) -> None:
    """Write the file that stock diffusers loads. Its metadata are adapter_facts() and their SHA-256."""
    named = ("stage", "step", "base_model", "clap_model", "fingerprints", "dims")
    facts = {**{key: header[key] for key in named}, "image_size": header["settings"]["image_size"],
             "tanh_gate": float(torch.tanh(weights["audio_attn"].gate.detach())),
             "warning": header.get("warning", ""), "attentions": attention_names(unet),
             **{key: header[key] for key in ("name", "best_step", "verdict", "history") if key in header}}
    tensors = {key: weight.detach().float().cpu().contiguous()
               for key, weight in stock_layout(weights, unet).items()}
    # as NumPy arrays, which is how adapter_facts() reads them: a digest names the type
    facts["sha256"] = tensor_file.digest(facts, {name: tensor.numpy() for name, tensor in tensors.items()})
    files.write_atomic(path, save(tensors, {"clap2diffusion": json.dumps(facts)}))


@contextmanager
def _in_float32(weights: dict[str, nn.Module], unet: nn.Module, stock: nn.Module):
    """Inside, UNet and weights are in eval mode and on the CPU in float32. What is frozen in a UNet that is
    held in fewer bits is taken from `stock`. Afterwards all is as it was, bit for bit, device included."""
    parts = [part for part in (unet, *weights.values()) if isinstance(part, nn.Module)]
    modules = {m: (m.training, dict(m._buffers)) for part in parts for m in part.modules()}
    own = {p for part in weights.values() for p in part.parameters()}  # stays as trained
    kept = {p: p.data for p in (*unet.parameters(), *own)}
    fewer_bits, layers = next(unet.parameters()).dtype != torch.float32, {}
    try:
        if fewer_bits:  # bitsandbytes' 4-bit layers hold a quant_state
            layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "quant_state")}
            for name in layers:
                unet.set_submodule(name, stock.get_submodule(name))
            whole = {name.replace(".base_layer", ""): p for name, p in stock.named_parameters()}
            for name, p in unet.named_parameters():
                if p not in own:
                    p.data = whole.get(name.replace(".base_layer", ""), p).data
        for p in (*unet.parameters(), *own):
            p.data = p.data.float().cpu()
        for module in modules:
            module.training = False
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.cpu()
        yield
    finally:
        for name, layer in layers.items():
            unet.set_submodule(name, layer)
        for p, data in kept.items():
            p.data = data
        for module, (training, buffers) in modules.items():
            module.training = training
            module._buffers.update(buffers)


@torch.no_grad()
def check_export(adapter_path: Path, base_dir: Path, forward, weights: dict[str, nn.Module], unet: nn.Module,
                 batch: dict[str, Tensor]) -> float:
    """The largest difference of a stock pipeline's prediction from our own, on the CPU in float32, relative
    to the largest predicted value if that is above 1. The modules are afterwards as they were before.
    forward(noisy_latents, timesteps, text_tokens, audio_embeds): our prediction, as a stage trains it.
    batch: noisy_latents (B, C, h, w), timesteps (B,), text_tokens (B, L, D), audio_embeds (B, E).
    Raises RunFailed: it is above MOST_DIFFERENCE; the sentence says what the file lacks."""
    pipe = load_stock_pipeline(base_dir, adapter_path, vae=None, text_encoder=None, tokenizer=None)
    latents, timesteps, text_tokens, audio_embeds = inputs = [
        batch[key].cpu() for key in ("noisy_latents", "timesteps", "text_tokens", "audio_embeds")]
    # a compiled UNet would compile anew for this batch
    with _in_float32(weights, unet, pipe.unet), torch.compiler.set_stance("force_eager"):
        ours = forward(*inputs)
        stock = pipe.unet(latents, timesteps, text_tokens,
                          added_cond_kwargs={"image_embeds": [audio_embeds[:, None]]}).sample
    difference = float((ours - stock).abs().max() / max(1.0, float(ours.abs().max())))
    if not difference <= MOST_DIFFERENCE:
        lost = lost_in_export(weights, unet)
        what = (f"nothing in the exported file depends on {', '.join(lost[:3])}"
                + f" and {len(lost) - 3} more" * (len(lost) > 3) if lost else
                "every weight that trains is in the exported file, but not all that is done with them")
        raise RunFailed(f"stock diffusers' prediction differs from ours by {difference:.2e}, expected at "
                        f"most {MOST_DIFFERENCE:g}: {what}; fold it into stock_layout() in clap2diffusion/"
                        "pictures/pipelines.py, as tanh(gate) is folded into the audio V")
    return difference


def lost_in_export(weights: dict[str, nn.Module], unet: nn.Module) -> list[str]:
    """The names of the weights that train and on which no tensor of stock_layout() depends."""
    named = {}
    for name, part in weights.items():
        own = (part.named_parameters() if isinstance(part, nn.Module) else
               zip(part.state_dict(), part.parameters()))
        named |= {f"{name}.{key}": p for key, p in own if p.requires_grad}
    with torch.enable_grad():
        total = sum(weight.float().sum().cpu() for weight in stock_layout(weights, unet).values())
        if not total.requires_grad:
            return list(named)
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return [name for name, gradient in zip(named, found) if gradient is None]


@contextmanager
def _moved(parameters: list[nn.Parameter]):
    """Inside, each number of the parameters is moved by a fixed step. What begins at 0 or at 1, such as a
    LoRA's B or a factor, does nothing there, and a file without it would be right. Then: the old bits."""
    kept = {p: p.data for p in parameters}
    generator = torch.Generator().manual_seed(0)  # its own: training's draws stay what they are
    try:
        for p, data in kept.items():
            signs = torch.randint(0, 2, data.shape, generator=generator).to(data) * 2 - 1
            p.data = data + signs * (0.02 + 0.1 * data.square().mean().sqrt())
        yield
    finally:
        for p, data in kept.items():
            p.data = data


def rehearse_export(folder: Path, base_dir: Path, forward, weights: dict[str, nn.Module], unet: nn.Module,
                    header: dict, parameters: list[nn.Parameter], batch: dict[str, Tensor]) -> float:
    """write_adapter() and check_export() before training, with all `parameters` that train moved away from
    where they begin, on latents of at most REHEARSAL_SIZE a side. Neither the weights nor torch's generators
    change; the file is removed. Raises RunFailed, as check_export() does."""
    path, latents = folder / UNPROVEN, batch["noisy_latents"][..., :REHEARSAL_SIZE, :REHEARSAL_SIZE]
    try:
        with torch.random.fork_rng(devices=[]), _moved(parameters):
            write_adapter(path, weights, unet, header)
            return check_export(path, base_dir, forward, weights, unet, batch | {"noisy_latents": latents})
    except RunFailed as error:
        raise RunFailed(f"{folder}: tried before training, with every weight that trains moved: "
                        f"{error}") from None
    finally:
        path.unlink(missing_ok=True)


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
             strength: float = 0.6, each_step: Callable[[int], None] | None = None) -> list:
    """Pictures (PIL) from audio_embeds (B, E), one a sound, by the stock pipeline. Zeros are the null audio.
    negative_embeds (1 or B, E): what the unconditional half hears instead of the null audio.
    guidance_pair (T, A): guidance of text and of sound apart, instead of `guidance`; see listening().
    init_image (3, size, size) in [-1, 1]: begin with it, noised by `strength`, image to image.
    each_step(n): called after step n, from 1; what it raises ends the drawing."""
    pipe.set_ip_adapter_scale(audio_scale)
    call = {"guidance_scale": 2.0 if guidance_pair else guidance, "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    if each_step:
        def after(_pipe, step: int, _timestep, tensors: dict) -> dict:
            each_step(step + 1)
            return tensors
        call["callback_on_step_end"] = after
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
