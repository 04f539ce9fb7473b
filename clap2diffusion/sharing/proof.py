"""Proof of an export: the library that it is for loads it, and the UNet predicts what it does with our file.

Shapes: B samples, C x h x w latents, L text tokens of width D, E width of CLAP's embedding."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clap2diffusion.base.device import quiet_libraries
from clap2diffusion.base.exits import RunFailed
from clap2diffusion.pictures.pipelines import MOST_DIFFERENCE, REHEARSAL_SIZE, load_base_pipeline
from clap2diffusion.sharing.layouts import ADAPTER, KOHYA_LORA, WITHOUT_LORA

TEXT_TOKENS = 77


class Reference(NamedTuple):
    """What our file predicts of two fixed samples, and what they are."""
    base: Path
    batch: dict[str, Tensor]
    pred: Tensor  # (B, C, h, w)

    def apart(self, pred: Tensor) -> float:
        """The largest difference, relative to the largest predicted value if that is above 1."""
        return float((self.pred - pred).abs().max() / max(1.0, float(self.pred.abs().max())))


def pipeline(base: Path):
    """The base model's UNet in a stock pipeline without the other models."""
    return load_base_pipeline(base, vae=None, text_encoder=None, tokenizer=None)


def load_adapter(pipe, folder: Path, name: str = ADAPTER) -> None:
    pipe.load_ip_adapter(str(folder), "", name, image_encoder_folder=None)


@torch.inference_mode()
def predict(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, C, h, w): two sounds in one batch, each sample with its own."""
    return unet(batch["noisy_latents"], batch["timesteps"], batch["text_tokens"],
                added_cond_kwargs={"image_embeds": [batch["audio_embeds"][:, None]]}).sample


def make_reference(base: Path, adapter_path: Path, embed_dim: int) -> Reference:
    """What stock diffusers predicts with our file, which a stage has proved before it named it so."""
    pipe = pipeline(base)
    load_adapter(pipe, adapter_path.parent, adapter_path.name)
    config, generator = pipe.unet.config, torch.Generator().manual_seed(0)
    size = min(config.sample_size, REHEARSAL_SIZE)
    embeds = torch.randn(2, embed_dim, generator=generator)
    batch = {"noisy_latents": torch.randn(2, config.in_channels, size, size, generator=generator),
             "timesteps": torch.tensor([700, 30]),
             "text_tokens": torch.randn(2, TEXT_TOKENS, config.cross_attention_dim, generator=generator),
             "audio_embeds": nn.functional.normalize(embeds, dim=-1)}
    return Reference(base, batch, predict(pipe.unet, batch))


def _peft(pipe, folder: Path) -> nn.Module:
    from peft import PeftModel
    return PeftModel.from_pretrained(pipe.unet, str(folder))


def _diffusers(pipe, folder: Path, **named: str) -> nn.Module:
    """Without a name diffusers finds the LoRA's file by itself."""
    pipe.load_lora_weights(str(folder), **named)
    return pipe.unet


class Way(NamedTuple):
    """How a library loads an export: an adapter file by load_ip_adapter, then any LoRA by add_lora(pipe,
    folder), which returns the UNet."""
    name: str
    adapter: str = ADAPTER
    add_lora: Callable[..., nn.Module] | None = None


def ways(to: str, has_lora: bool) -> list[Way]:
    """How the folder of an export `to` a library is loaded."""
    alone = Way("load_ip_adapter")
    if not has_lora:
        return [alone]
    return {"diffusers": [Way("load_ip_adapter and load_lora_weights", add_lora=_diffusers)],
            "kohya": [Way("diffusers' reading of kohya's file", add_lora=functools.partial(
                _diffusers, weight_name=KOHYA_LORA))],
            "peft": [Way("PeftModel.from_pretrained", add_lora=_peft)],
            "hub": [alone, Way(f"load_ip_adapter({WITHOUT_LORA}) and load_lora_weights", WITHOUT_LORA,
                               _diffusers)]}[to]


def prove(to: str, folder: Path, reference: Reference, has_lora: bool) -> tuple[dict[str, float], float]:
    """({how it was loaded: the largest difference}, how far the prediction is off without the LoRA, or 0).
    Raises RunFailed: it cannot be loaded so, or a difference is above MOST_DIFFERENCE."""
    quiet_libraries()
    found, effect = {}, 0.0
    for way in ways(to, has_lora):
        pipe = pipeline(reference.base)
        try:
            load_adapter(pipe, folder, way.adapter)
            if way.add_lora:
                effect = reference.apart(predict(pipe.unet, reference.batch))
            unet = way.add_lora(pipe, folder) if way.add_lora else pipe.unet
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise RunFailed(f"--to {to}: {way.name} does not take what was made ({type(error).__name__}: "
                            f"{why:.200}); nothing was written") from None
        found[way.name] = reference.apart(predict(unet, reference.batch))
        if not found[way.name] <= MOST_DIFFERENCE:
            raise RunFailed(f"--to {to}: by {way.name} the prediction differs from our adapter's by "
                            f"{found[way.name]:.2e}, expected at most {MOST_DIFFERENCE:g}; nothing was "
                            "written")
    return found, effect
