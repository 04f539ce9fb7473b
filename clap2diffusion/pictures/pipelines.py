"""Pictures from sounds by diffusers' own pipelines, with the exported adapter file loaded into them."""

from contextlib import contextmanager
from pathlib import Path

import diffusers  # a pipeline takes seconds to import: each is named where it is used
import numpy as np
import torch
from torch import Tensor, nn

from clap2diffusion.base.device import DTYPES, quiet_libraries
from clap2diffusion.base.settings import GUIDANCE, SCHEDULERS
from clap2diffusion.pictures.sheets import tile


def load_stock_pipeline(base_dir: Path, adapter_path: Path, device: str = "cpu", dtype=torch.float32,
                        scheduler: str = "base", **parts):
    """diffusers' StableDiffusionPipeline with the exported file loaded; `parts` replace its own.

    scheduler: the base model's own, or one of SCHEDULERS for few steps (DPM-Solver++, Lu et al. 2022; UniPC,
    Zhao et al. 2023), on the base model's noise schedule.
    """
    quiet_libraries()
    parts = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None, **parts}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base_dir, dtype=dtype, **parts)
    pipe.load_ip_adapter(str(adapter_path.parent), "", adapter_path.name, image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    if SCHEDULERS[scheduler]:
        kind = getattr(diffusers, SCHEDULERS[scheduler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe.to(device)


@contextmanager
def listening(unet: nn.Module, audio_embeds: Tensor, guided: bool, negative_embeds: Tensor | None = None,
              guidance_pair: tuple[float, float] | None = None):
    """Inside, row i of the batch that a pipeline gives its UNet hears audio_embeds[i] of (B, E).

    diffusers expects one image for a batch and repeats `ip_adapter_image_embeds` for each picture, so each
    would attend to every sound. Hooks on the UNet put each sound where it belongs.

    guided: the pipeline calls with the rows [no text, text]. The first half then hears negative_embeds
    (1 or B, E), or the null audio if that is None.
    guidance_pair (T, A): the rows become [no text and no audio, text alone, text and audio]. Both halves of
    the answer are no + T * (text - no) + A * (both - text) (InstructPix2Pix, Brooks et al. 2023, eq. 3), so
    the pipeline's own guidance, no + g * (text - no), changes nothing.
    """
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
    init_image (3, size, size) in [-1, 1]: begin with it, noised by `strength`, image to image.
    """
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
    """One picture, without a prompt, for each of the first clips of differing labels, side by side (PIL)."""
    first = {row["label"] or row["id"]: i for i, row in reversed(list(enumerate(val.rows)))}
    pipe, images = load_stock_pipeline(base, adapter_path, device, DTYPES[cfg.precision]), []
    for i in sorted(first.values())[:cfg.samples]:  # one at a time, to fit wherever training fits
        sound = val[i]["audio_embeds"][:1]
        images += pictures(pipe, sound, [""], GUIDANCE, 25, [cfg.seed + i], size=cfg.image_size)
    return tile(images, columns=len(images), gap=0)
