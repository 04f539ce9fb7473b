"""Distil the small base model into a LoRA that draws in 4 steps without guidance.

    python tools/make_lcm_lora.py    # assets/tiny/lcm_lora.safetensors, in about five minutes on one core
    python tools/make_lcm_lora.py --smoke --out lora.safetensors    # right shapes in seconds, knows nothing

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378) into a LoRA (LCM-LoRA, arXiv 2311.05556),
as in diffusers' examples/consistency_distillation. The teacher is the base model with guidance, one DDIM step
at a time. The student is the same UNet with the LoRA: it is to predict the same picture from noisy latents
and from the teacher's less noisy ones. It learns from scenes and captions of the base's own training, and
from no sound.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (first: it ends in one sentence where packages are missing)

# isort: split
import diffusers
import numpy as np
import torch
from make_tiny_models import BARE, PICTURES, as_images, draw, encode_text, scene, train
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from clap2diffusion.base import files
from clap2diffusion.base.device import quiet_libraries
from clap2diffusion.base.exits import run_main
from clap2diffusion.base.settings import GUIDANCE, Number, new_parser

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1",
          "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]  # LCM-LoRA's
TIMES, SKIP = 50, 5  # timesteps that the student learns, LCMScheduler's; how many of them a teacher's step is
HUBER, EMA = 1e-3, 0.95  # where the loss turns from squared to absolute; decay of the target's weights
COUNTS = {"threads": (1, 1, "CPU threads"), "pictures": (64, 2000, "scenes drawn"),
          "steps": (1, 300, "optimizer steps"), "batch_size": (1, 16, "scenes in a step"),
          "rank": (1, 8, "rank of the LoRA")}


class Distillation:
    """The consistency loss on a UNet of v-prediction and its schedule; shapes: B latents of 4 x h x w."""

    def __init__(self, unet, scheduler, empty: Tensor, guidance: float):
        """empty (1, L, D): the empty caption's text_tokens."""
        self.unet, self.empty, self.guidance = unet, empty, guidance
        self.signal = scheduler.alphas_cumprod.sqrt()  # of each timestep; the last one's is 0
        self.noise = (1 - scheduler.alphas_cumprod).sqrt()
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        self.averaged = [p.detach().clone() for p in self.trained]

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the picture and of the noise in noisy latents, each (B, 1, 1, 1)."""
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][:, None, None, None]

    def picture(self, noisy: Tensor, timesteps: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The UNet's prediction of the clean latents and of the noise in them."""
        signal, noise = self.at(timesteps)
        v = self.unet(noisy, timesteps, text_tokens).sample
        return signal * noisy - noise * v, noise * noisy + signal * v

    def consistent(self, noisy: Tensor, timesteps: Tensor, text_tokens: Tensor) -> Tensor:
        """The consistency function: the clean latents, and at timestep 0 the latents themselves (2310.04378,
        eq. 9, with LCMScheduler's constants)."""
        t = timesteps[:, None, None, None] * 10.0  # LCMScheduler's timestep_scaling
        skip, out = 0.25 / (t ** 2 + 0.25), t / (t ** 2 + 0.25).sqrt()
        return skip * noisy + out * self.picture(noisy, timesteps, text_tokens)[0]

    @torch.no_grad()
    def less_noisy(self, noisy: Tensor, timesteps: Tensor, earlier: Tensor, text_tokens: Tensor) -> Tensor:
        """The teacher's DDIM step with guidance from the timesteps to the earlier ones."""
        self.unet.disable_adapters()
        both = torch.cat([text_tokens, self.empty.expand_as(text_tokens)])
        found = self.picture(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        self.unet.enable_adapters()
        x, noise = (no + self.guidance * (yes - no) for yes, no in (one.chunk(2) for one in found))
        signal, share = self.at(earlier)
        return signal * x + share * noise

    @contextmanager
    def with_averaged(self):
        """Bring the averaged weights up to date. Inside, they are the UNet's. A target that moves with every
        step collapses: all latents are given the same picture."""
        for p, averaged in zip(self.trained, self.averaged):
            averaged.lerp_(p.data, 1 - EMA)
            p.data, averaged.data = averaged.data, p.data
        yield
        for p, averaged in zip(self.trained, self.averaged):
            p.data, averaged.data = averaged.data, p.data

    def loss(self, latents: Tensor, text_tokens: Tensor) -> Tensor:
        """latents (B, 4, h, w), text_tokens (B, L, D) -> scalar: pseudo-Huber between the two predictions."""
        length = len(self.signal) // TIMES
        timesteps = torch.randint(1, TIMES + 1, (len(latents),)) * length - 1
        earlier = (timesteps - SKIP * length).clamp(min=0)
        signal, share = self.at(timesteps)
        noisy = signal * latents + share * torch.randn_like(latents)
        pred = self.consistent(noisy, timesteps, text_tokens)
        with torch.no_grad(), self.with_averaged():
            less_noisy = self.less_noisy(noisy, timesteps, earlier, text_tokens)
            target = self.consistent(less_noisy, earlier, text_tokens)
        return ((pred - target).square() + HUBER ** 2).sqrt().mean() - HUBER


@torch.no_grad()
def features(pipe, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """latents (n, 4, 16, 16), text_tokens (n, k, L, D) of k captions each, the empty caption's (1, L, D)."""
    pictures, captions, _ = draw(scene, args.seed, PICTURES, args.pictures, "scenes")
    pictures = np.stack(pictures)
    latents = torch.cat([pipe.vae.encode(as_images(pictures[i:i + 64])).latent_dist.mean
                         for i in range(0, len(pictures), 64)]) * pipe.vae.config.scaling_factor
    ids = encode_text(pipe.tokenizer, captions)  # (n, k, L)
    tokens = torch.cat([pipe.text_encoder(part).last_hidden_state for part in ids.flatten(0, 1).split(256)])
    empty = pipe.text_encoder(encode_text(pipe.tokenizer, [[""]])[0]).last_hidden_state
    return latents, tokens.unflatten(0, ids.shape[:2]), empty


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--base-model", default="assets/tiny/base", help="the base model to distil: one of v-prediction")
    add("--out", default="assets/tiny/lcm_lora.safetensors", help="file to write, in diffusers' LoRA format")
    add("--seed", type=Number(int, 0), default=0, help="seed of the scenes and of the training")
    add("--guidance", type=Number(float, 1), default=GUIDANCE, help="guidance of the teacher")
    add("--empty", type=Number(float, 0, 1), default=0.3, help="share of empty captions")
    add("--learning-rate", type=Number(float, 0), default=1e-3, help="AdamW's, warmed up, then cosine")
    for name, (lowest, default, text) in COUNTS.items():
        add(f"--{name.replace('_', '-')}", type=Number(int, lowest), default=default, help=text)
    add("--smoke", action="store_true", help="three steps on 64 scenes")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.pictures = 3, 64
    quiet_libraries()
    torch.set_num_threads(args.threads)
    began, rng = time.time(), np.random.default_rng([args.seed, 2004])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(args.base_model, **BARE)
    latents, text_tokens, empty = features(pipe, args)
    torch.manual_seed(args.seed + 4)
    unet = pipe.unet.requires_grad_(False).eval()
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS), "lcm")
    distillation = Distillation(unet, diffusers.DDPMScheduler.from_config(pipe.scheduler.config), empty,
                                args.guidance)

    def loss_at(step: int) -> Tensor:
        i = rng.integers(len(latents), size=args.batch_size)
        text = text_tokens[i, rng.integers(text_tokens.shape[1], size=args.batch_size)]
        dropped = torch.from_numpy(rng.random(args.batch_size) < args.empty)[:, None, None]
        return distillation.loss(latents[i], torch.where(dropped, empty, text))

    train("LCM LoRA", distillation.trained, loss_at, args.steps, args.learning_rate)
    tensors = {f"unet.{name}": weight.half().contiguous()
               for name, weight in get_peft_model_state_dict(unet, adapter_name="lcm").items()}
    files.write_atomic(Path(args.out), save(tensors, {"format": "pt"}))
    print(f"{args.out}: {len(tensors)} tensors, {Path(args.out).stat().st_size / 1e6:.2f} MB, in "
          f"{time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
