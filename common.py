"""What the three stages use identically: models, export, a step's mechanics, validation. (Files: runs.py.)

Shapes: B samples, N audio tokens, D width of the UNet's cross-attention (768 for SD 1.5), E width of CLAP's embedding
(512), C x h x w latents, L text tokens. Nothing here knows which stage is running.
"""

from __future__ import annotations

import logging
import math
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
import runs
from config import RunFailed, UserError
from metrics import interval

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}  # nf4: what is not held in 4 bits
VALIDATED = ("val_right", "val_silence", "val_other", "silence_minus_right", "other_minus_right")

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it says that an optional package is missing


class LogMel:
    """A waveform as CLAP's audio tower sees it, one clip at a time: whatever else is in a batch changes nothing.

    Half of an encoder's time on a CPU, and no torch: loader processes call it too.
    """

    def __init__(self, extractor):
        self.extractor = extractor

    def __call__(self, waveform: np.ndarray) -> dict[str, np.ndarray]:
        """waveform (samples,) float32 at the extractor's rate -> the audio tower's inputs, each (1, ...).

        Raises:
            ValueError: it is not one-dimensional, empty, not finite or longer than the window: the extractor would take it
                for several clips, crash, pass NaN on, or crop it at random.
        """
        if waveform.ndim != 1 or not 0 < len(waveform) <= self.extractor.nb_max_samples:
            raise ValueError(f"waveform has shape {waveform.shape}, expected (1..{self.extractor.nb_max_samples},)")
        if not np.isfinite(waveform).all():
            raise ValueError("waveform holds NaN or infinity")
        return dict(self.extractor([waveform], sampling_rate=self.extractor.sampling_rate, return_tensors="np"))


class CLAPAudioEncoder(nn.Module):
    """The frozen CLAP audio tower: waveforms to unit-length embeddings.

    Args:
        model_name: local folder of a CLAP model (resolve_model turns a hub name into one).
    """

    def __init__(self, model_name: str | Path):
        super().__init__()
        quiet_libraries()
        from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor
        self.extractor = ClapFeatureExtractor.from_pretrained(model_name)
        self.model, info = ClapAudioModelWithProjection.from_pretrained(
            model_name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise UserError(f"CLAP model {model_name}: {len(info['missing_keys'])} weights are missing, first "
                            f"{sorted(info['missing_keys'])[0]}; expected a whole CLAP checkpoint")
        self.model.eval().requires_grad_(False)
        self.log_mel = LogMel(self.extractor)
        self.sampling_rate: int = self.extractor.sampling_rate
        self.window_s: float = self.extractor.nb_max_samples / self.sampling_rate
        self.embed_dim: int = self.model.config.projection_dim

    def forward(self, waveforms: list[np.ndarray]) -> Tensor:
        """waveforms: B arrays (samples,) float32 at `sampling_rate` -> audio_embeds (B, E) float32, unit length.

        Raises:
            ValueError: see LogMel.
        """
        return self.embed([self.log_mel(waveform) for waveform in waveforms])

    @torch.inference_mode()
    def embed(self, clips: list[dict[str, np.ndarray]]) -> Tensor:
        """What log_mel gave of B waveforms -> audio_embeds (B, E) float32, unit length."""
        inputs = {name: torch.from_numpy(np.concatenate([clip[name] for clip in clips])).to(self.model.device) for name in clips[0]}
        return F.normalize(self.model(**inputs).audio_embeds.float(), dim=-1)


# --- the audio adapter ------------------------------------------------------------------------------------------------

class AudioProjectionMLP(nn.Module):
    """audio_embeds (B, E) -> audio_tokens (B, N, D): Linear E-2E, GELU, Linear 2E-(N*D), LayerNorm over D.

    The shape is IP-Adapter FaceID's projection (Ye et al. 2023, arXiv 2308.06721, and diffusers'
    IPAdapterFaceIDImageProjection). CLAP's vector has unit length, so its entries are about 1/sqrt(E); the factor
    sqrt(E) brings them to unit size.
    """
    NEAR_LINEAR = 0.3

    def __init__(self, input_dim: int, output_dim: int, num_tokens: int = 8):
        super().__init__()
        self.input_dim, self.output_dim, self.num_tokens = input_dim, output_dim, num_tokens
        self.proj = nn.Sequential(nn.Linear(input_dim, 2 * input_dim), nn.GELU(),
                                  nn.Linear(2 * input_dim, num_tokens * output_dim))
        self.norm = nn.LayerNorm(output_dim)

    @torch.no_grad()
    def whiten(self, audio_embeds: Tensor) -> None:
        """Make the first layer a whitening of the training set's audio_embeds (n, E), which training leaves as it is.

        CLAP's embeddings vary mostly between classes; what else is heard (pitch, rate) lies in directions of less
        variance, which training from even weights finds last. ZCA whitening (Bell & Sejnowski 1997), variances
        under a tenth of their mean left small, since they are noise. NEAR_LINEAR makes it small, so that GELU hardly
        bends it: what two sounds say then adds up, also of two that were never heard together, whereas a trained or
        a larger first layer learns which pairs there are.
        """
        x = audio_embeds.double().cpu() * math.sqrt(self.input_dim)
        mean, covariance = x.mean(0), torch.cov(x.T)
        variances, directions = torch.linalg.eigh(covariance)
        variances = variances.clamp(min=0)
        kept = (variances / (variances + 0.1 * variances.mean())).sum()  # variance in all after the whitening
        scale = (variances + 0.1 * variances.mean()).rsqrt() * (self.input_dim / kept).sqrt()
        first = self.proj[0]
        weight = first.weight.double().cpu() @ (directions * scale) @ directions.T
        first.weight.copy_(self.NEAR_LINEAR * weight)
        first.bias.copy_(self.NEAR_LINEAR * (first.bias.double().cpu() - weight @ mean))
        first.requires_grad_(False)

    def forward(self, audio_embeds: Tensor) -> Tensor:
        if audio_embeds.shape[-1] != self.input_dim:
            raise ValueError(f"audio_embeds are {audio_embeds.shape[-1]} wide, the adapter expects {self.input_dim}")
        tokens = self.proj(audio_embeds * math.sqrt(self.input_dim))
        return self.norm(tokens.unflatten(-1, (self.num_tokens, self.output_dim)))


class AudioAttentionAdapter(nn.Module):
    """Gated, decoupled cross-attention: attend(q, text) + tanh(gate) * attend(q, audio) in every cross-attention.

    Holds bias-free audio K and V for each of the UNet's cross-attentions, begun as copies of the text K and V, and one
    gate shared by all (a scalar, as in Flamingo, Alayrac et al. 2022, eq. 3). `attach` puts them into a UNet, which
    then takes encoder_hidden_states = (text_tokens (B, L, D), audio_tokens (B, N, D)).
    """

    def __init__(self, unet: nn.Module, strength: float):
        """strength: tanh(gate) to begin with, in (-1, 1)."""
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.set_strength(strength)
        self.to_k, self.to_v = nn.ModuleList(), nn.ModuleList()
        for attn in cross_attentions(unet).values():
            for copies, text in ((self.to_k, attn.to_k), (self.to_v, attn.to_v)):
                linear = nn.Linear(text.in_features, text.out_features, bias=False)
                linear.weight.data.copy_(text.weight.data.float())
                copies.append(linear)

    def set_strength(self, strength: float) -> None:
        """Set tanh(gate), in (-1, 1]; 1 is the largest value below it that float32 can hold."""
        self.gate.data.fill_(math.atanh(min(strength, 1 - 1e-7)))

    def attach(self, unet: nn.Module) -> None:
        """Make the UNet attend to the sound. The weights stay in this module, so the UNet's own are untouched."""
        for i, attn in enumerate(cross_attentions(unet).values()):
            attn.set_processor(AudioAttnProcessor(self, i))


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The UNet's cross-attention modules by name, in the order of its attention processors."""
    return {name.removesuffix(".processor"): unet.get_submodule(name.removesuffix(".processor"))
            for name in unet.attn_processors if name.endswith("attn2.processor")}


class AudioAttnProcessor:
    """diffusers' AttnProcessor2_0 for a UNet's cross-attention, with the second, gated attention over audio tokens.

    A plain object that refers to the adapter: the UNet does not own the adapter's weights, and a gate of 0 still gets
    a gradient (diffusers' IP-Adapter processor skips its branch at scale 0).
    """

    def __init__(self, adapter: AudioAttentionAdapter, index: int):
        self.adapter, self.index = adapter, index

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor],
                 attention_mask=None, temb=None) -> Tensor:
        """hidden_states (B, Q, channels) -> (B, Q, channels)."""
        text_tokens, audio_tokens = encoder_hidden_states

        def heads(x: Tensor) -> Tensor:  # (B, T, channels) -> (B, heads, T, head_dim)
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        text = F.scaled_dot_product_attention(query, heads(attn.to_k(text_tokens)), heads(attn.to_v(text_tokens)),
                                              attn_mask=attention_mask)
        audio = F.scaled_dot_product_attention(query, heads(self.adapter.to_k[self.index](audio_tokens)),
                                               heads(self.adapter.to_v[self.index](audio_tokens)))
        gate = torch.tanh(self.adapter.gate).to(text.dtype)
        mixed = (text + gate * audio).transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor


def save_memory(unet: nn.Module, cfg) -> None:
    """Hold and run the frozen UNet as --frozen-dtype nf4, --checkpointing, --channels-last and --compile ask.

    After the audio K and V were copied from it and before LoRA comes on top (QLoRA, Dettmers et al. 2023).
    """
    if cfg.frozen_dtype == "nf4":
        import bitsandbytes
        linears = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear) and "attentions." in name}
        for name, linear in linears.items():
            with torch.random.fork_rng(devices=[]):  # it draws weights that nobody needs; LoRA's shall be those of a plain run
                held = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                                                  compute_dtype=torch.bfloat16, quant_type="nf4")
            held.load_state_dict(linear.state_dict())
            held.requires_grad_(False)
            held.support_avx512bf16_for_cpu = False  # else, on CPUs with it, a pass in eval mode packs the weight for a kernel without gradients
            unet.set_submodule(name, held.to(linear.weight.device))  # which packs the weight
        unet.is_loaded_in_4bit = True  # what peft asks before it puts LoRA on a Linear4bit
    if cfg.checkpointing != "none":
        unet.enable_gradient_checkpointing()  # never the reentrant kind
        for block in [unet.mid_block, *unet.up_blocks] if cfg.checkpointing == "down" else ():
            for module in block.modules():
                module.gradient_checkpointing = False
    if cfg.channels_last:
        unet.to(memory_format=torch.channels_last)
    if cfg.compile:
        unet.compile()


def make_adamw(groups: list[dict], cfg) -> torch.optim.Optimizer:
    """torch's AdamW, or bitsandbytes' with moments in 8 bits (Dettmers et al. 2022) for --adam-8bit."""
    kind = torch.optim.AdamW
    if cfg.adam_8bit:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind(groups, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)


def add_lora(unet: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Put peft's LoRA (Hu et al. 2021) on to_q, to_k, to_v, to_out.0 of every attention; only it is trainable."""
    from peft import LoraConfig
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian",
                                target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter_name="lora")
    for name, p in unet.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()  # trainable weights stay float32 whatever the frozen ones are held in


class LoraWeights:
    """The LoRA tensors inside a UNet as one object that can be saved and loaded like a module."""

    def __init__(self, unet: nn.Module):
        self.tensors = {name: p for name, p in unet.named_parameters() if ".lora_" in name}

    def sleep(self, active: int) -> None:
        """Put the ranks from `active` on to sleep: rows of zeros in A beside the columns of zeros that B begins with.

        A sleeping rank adds nothing and its gradients are exactly 0, so neither Adam nor weight decay moves it.
        """
        for name, p in self.tensors.items():
            if ".lora_A." in name:
                p.data[active:] = 0

    def wake(self, low: int, high: int, generator: torch.Generator) -> None:
        """Let the ranks low..high-1 train: rows of A begin as peft's do, normal with deviation 1 / rank.

        B's columns are 0 still, so the output does not change.
        """
        for name, p in self.tensors.items():
            if ".lora_A." in name:
                p.data[low:high] = torch.randn(high - low, p.shape[1], generator=generator).to(p) / len(p)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.tensors.items():
            p.data.copy_(state[name])


def trainable_parameters(weights: dict) -> list[nn.Parameter]:
    """The explicit list of what is optimized, clipped and averaged, in the order of the registered weights."""
    parts = (part.parameters() if isinstance(part, nn.Module) else part.tensors.values() for part in weights.values())
    return [p for part in parts for p in part if p.requires_grad]


def parameter_groups(weights: dict, **scales: float) -> list[dict]:
    """The trainable parameters as an optimizer's groups, one a part, each with the `lr_scale` given for it, or 1."""
    groups = [{"params": trainable_parameters({name: part}), "lr_scale": scales.get(name, 1.0)} for name, part in weights.items()]
    return [group for group in groups if group["params"]]


def check_dims(unet: nn.Module, data) -> None:
    """Raises UserError if the cached features do not fit the UNet; both sides are named."""
    text_dim, width = data.empty_text_embeds.shape[-1], unet.config.cross_attention_dim
    if text_dim != width:
        raise UserError(f"text embeddings are {text_dim} wide, the UNet's cross-attention expects {width}; "
                        "text encoder and UNet must be of one base model")
    if data.latent_shape[0] != unet.config.in_channels:
        raise UserError(f"latents have {data.latent_shape[0]} channels, the UNet expects {unet.config.in_channels}; "
                        "VAE and UNet must be of one base model")


def make_ema(parameters: list[nn.Parameter], decay: float):
    """diffusers' EMAModel over the trainable parameters, or None for decay 0."""
    from diffusers.training_utils import EMAModel
    return EMAModel(parameters, decay=decay) if decay else None


def step_ema(ema, parameters: list[nn.Parameter]) -> None:
    """Average the parameters in, on the device that holds the averages."""
    ema.step([p.detach().to(average.device).requires_grad_() for p, average in zip(parameters, ema.shadow_params, strict=True)])


@contextmanager
def averaged(ema, parameters: list[nn.Parameter]):
    """Inside, the parameters hold their averages; without an EMA nothing changes."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema:
        ema.restore(parameters)


# --- one step's mechanics -----------------------------------------------------------------------------------------------

class Draws:
    """The random numbers of one step: a function of nothing but the key, e.g. (seed, step, micro-step).

    Several processes draw what one alone would draw for the whole batch, and each keeps its samples' share of it, so their
    number changes nothing. Also seeds the global generator (dropout), for each process apart.
    """

    def __init__(self, *key: int):
        self.rank, self.world = parallel.rank(), parallel.world()
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + self.rank)

    def _share(self, draw, shape: tuple[int, ...]) -> Tensor:
        everyone = draw((shape[0] * self.world, *shape[1:]))
        return everyone[self.rank * shape[0]:(self.rank + 1) * shape[0]]

    def normal(self, *shape: int) -> Tensor:
        return self._share(lambda size: torch.randn(size, generator=self.generator), shape)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return self._share(lambda size: torch.rand(size, generator=self.generator), shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high - 1."""
        return self._share(lambda size: torch.randint(low, high, size, generator=self.generator), shape)


def draw_latents(batch: dict, draws: Draws) -> Tensor:
    """A sample of the VAE's posterior from the cached mean and std (B, F, C, h, w) -> latents (B, C, h, w).

    F is 2 where mirrored pictures are cached too; each sample then draws which one it shows.
    """
    mean, std = batch["latents_mean"], batch["latents_std"]
    which = draws.integers(0, mean.shape[1], len(mean))
    mean, std = mean[range(len(mean)), which], std[range(len(mean)), which]
    return mean + std * draws.normal(*mean.shape)


def draw_timesteps(scheduler, n: int, high_noise_share: float, draws: Draws) -> Tensor:
    """Timesteps (n,), even over the schedule but for a share that is even over its noisiest fifth."""
    total = scheduler.config.num_train_timesteps
    timesteps = draws.integers(0, total, n)
    if not high_noise_share:
        return timesteps
    high = draws.integers(total - total // 5, total, n)
    return torch.where(draws.uniform(n) < high_noise_share, high, timesteps)


def draw_window(batch: dict, draws: Draws) -> Tensor:
    """One of each clip's k cached windows: (B, k, E) -> audio_embeds (B, E)."""
    windows = batch["audio_embeds"]
    return windows[range(len(windows)), draws.integers(0, windows.shape[1], len(windows))]


def drop_conditions(text_tokens: Tensor, audio_embeds: Tensor, empty_text: Tensor, caption: float, audio: float,
                    both: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Replace, sample by sample, the caption by the empty one, the sound by the null audio (zeros), or both.

    One draw decides for a sample (as in IP-Adapter's training), so the three shares never add up in one sample.
    text_tokens (B, L, D), audio_embeds (B, E), empty_text (L, D).
    """
    draw = draws.uniform(len(text_tokens))
    no_both = draw < both
    no_text = no_both | ((draw >= both) & (draw < both + caption))
    no_audio = no_both | ((draw >= both + caption) & (draw < both + caption + audio))
    return (torch.where(no_text[:, None, None], empty_text, text_tokens),
            torch.where(no_audio[:, None], torch.zeros_like(audio_embeds), audio_embeds))


def mse_per_sample(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B, ...) -> (B,), in float32 whatever the model computed in."""
    return F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(1)


def diffusion_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict: the noise, or the velocity (Salimans & Ho 2022), as the scheduler's config says."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise UserError(f"the base model's scheduler predicts {kind!r}; expected epsilon or v_prediction")


def min_snr_weights(scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Loss weights (B,) of Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, section 3.4); ones for gamma 0.

    min(SNR, gamma) / SNR for a predicted noise, / (SNR + 1) for a predicted velocity.
    """
    if not gamma:
        return torch.ones(timesteps.shape, device=timesteps.device)
    alpha = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = alpha / (1 - alpha)
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # also where the last timestep's SNR is 0


class FiniteCheck:
    """Decides whether a step may be taken, and ends the run after three in a row that may not."""

    def __init__(self, log: runs.Logger, sample_ids, warn_above: float = 100.0):
        """sample_ids(step): the samples of a step."""
        self.log, self.sample_ids, self.warn_above, self.in_a_row = log, sample_ids, warn_above, 0

    def __call__(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """True if loss and gradient norm are finite, for which it waits until the device has computed them.

        Raises:
            RunFailed: three steps in a row were not finite.
        """
        finite = bool(torch.isfinite(loss + grad_norm))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite:
            self.log.text(f"step {step}: loss {float(loss):g}, gradient norm {float(grad_norm):g}: update skipped; "
                          f"samples {', '.join(self.sample_ids(step))}")
        elif grad_norm > self.warn_above:
            self.log.text(f"step {step}: gradient norm {float(grad_norm):.1f} is above {self.warn_above:g}")
        if self.in_a_row == 3:
            raise RunFailed(f"{self.log.folder}: loss or gradient not finite in steps {step - 2} to {step}; the last "
                            "checkpoint is good; lower the learning rate or look at the samples named in log.txt")
        return finite


# --- does the sound matter: right, silence and other ---------------------------------------------------------------------

def other_sounds(labels: list[str | None], audio_embeds: Tensor, seed: int) -> list[int]:
    """For each clip the index of another one: never its own recording, and with none of its labels if there is one.

    labels: `a` or `a+b`; audio_embeds: (n, E) of unit length. Clips that CLAP hears alike (cosine above 0.999) count as
    one recording, so a copy under another name is no "other".

    Raises:
        UserError: there is one recording only.
    """
    rng, others = np.random.default_rng([seed, 77]), []
    alike = (audio_embeds @ audio_embeds.T > 0.999).numpy() | np.eye(len(labels), dtype=bool)
    heard = [set((label or "").split("+")) for label in labels]
    for i in range(len(labels)):
        different = np.flatnonzero(~alike[i])
        if not len(different):
            raise UserError("the validation split holds one recording only; expected at least two different ones")
        others.append(int(rng.choice([j for j in different if not heard[j] & heard[i]] or different)))
    return others


@torch.inference_mode()
def validation_losses(predict, val, scheduler, device, autocast, cfg, sounds=("right", "silence", "other")) -> dict:
    """Loss of each validation clip with each sound, on fixed noise and timesteps: {sound: (n,) float64}.

    predict(noisy_latents, timesteps, text_tokens, audio_embeds) -> pred. Silence is the null audio, the zero embedding.
    The caption is the empty one, so that no class name explains what only the sound should. A clip's `val_draws`
    timesteps lie one in each equal part of the schedule.
    """
    n = min(len(val), cfg.val_clips or len(val))
    rows = [val[i] for i in range(n)]
    right = torch.stack([row["audio_embeds"][0] for row in rows])  # (n, E)
    others = other_sounds([row["label"] for row in val.rows[:n]], right, cfg.seed)
    embeds = {"right": right, "silence": torch.zeros_like(right), "other": right[others]}
    latents = torch.stack([row["latents_mean"][0] for row in rows])  # (n, C, h, w)
    part = scheduler.config.num_train_timesteps // cfg.val_draws
    losses = {sound: np.zeros(n) for sound in sounds}
    for draw in range(cfg.val_draws):
        generator = torch.Generator().manual_seed(cfg.seed * 1000 + draw)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(draw * part, (draw + 1) * part, (n,), generator=generator)
        for at in range(0, n, cfg.val_batch_size):
            chunk = slice(at, min(n, at + cfg.val_batch_size))
            x, e, t = latents[chunk].to(device), noise[chunk].to(device), timesteps[chunk].to(device)
            text_tokens = val.empty_text_embeds.to(device).expand(len(x), -1, -1)
            noisy_latents, target = scheduler.add_noise(x, e, t), diffusion_target(scheduler, x, e, t)
            for sound in sounds:
                with autocast():
                    pred = predict(noisy_latents, t, text_tokens, embeds[sound][chunk].to(device))
                losses[sound][chunk] += mse_per_sample(pred, target).double().cpu().numpy() / cfg.val_draws
    return losses


def validate(predict, val, scheduler, device, autocast, cfg) -> dict[str, list[float]]:
    """[mean, low, high] of val_right, val_silence, val_other and of silence and other minus right, paired by clip.

    Rank 0 measures, with no other process beside it; all get its numbers, so that all decide alike.
    """
    if not parallel.first():
        return parallel.of_first(None, VALIDATED)
    losses = validation_losses(predict, val, scheduler, device, autocast, cfg)
    result = {f"val_{sound}": interval(values) for sound, values in losses.items()}
    for sound in ("silence", "other"):
        result[f"{sound}_minus_right"] = interval(losses[sound] - losses["right"])
    return parallel.of_first(result, VALIDATED)


# --- logging ----------------------------------------------------------------------------------------------------------

def log_header(log: runs.Logger, cfg, device, weights: dict, unet: nn.Module, train, val, progress) -> None:
    trainable = sum(p.numel() for p in trainable_parameters(weights))
    total = sum(p.numel() for p in unet.parameters()) + sum(
        p.numel() for part in weights.values() if isinstance(part, nn.Module) for p in part.parameters())
    log.text(f"{cfg.name}: {trainable:,} of {total:,} parameters train ({trainable / total:.1%}); base {cfg.base_model}, "
             f"CLAP {cfg.clap_model}")
    log.text(f"{cfg.name}: {len(train)} train and {len(val)} validation clips, {train.embed_dim}-wide embeddings, latents "
             f"{'x'.join(map(str, train.latent_shape))}; {device.type}, {cfg.precision} autocast, frozen UNet in "
             f"{cfg.frozen_dtype}")
    log.text(f"{cfg.name}: effective batch {cfg.batch_size * cfg.accumulation * parallel.world()} ({cfg.batch_size} x "
             f"{cfg.accumulation}{f' x {parallel.world()} processes' if parallel.world() > 1 else ''}), "
             f"EMA {getattr(cfg, 'ema_decay', 0) or 'off'}, seed {cfg.seed}, memory so far "
             f"{peak_memory_mb(device)['rss']:.0f} MB")
    log.text(f"{cfg.name}: {'resuming at' if progress.step else 'starting at'} step {progress.step} of {cfg.steps}")


def log_step(log: runs.Logger, bar, cfg, progress, loss: Tensor, grad_norm: Tensor, device, **more: float) -> None:
    """Advance the bar; on log steps, and only there, fetch the loss from the device and write it down."""
    bar.update()
    if progress.step % cfg.log_every and progress.step != cfg.steps:
        return
    values = {"loss": float(loss), "grad_norm": float(grad_norm), **{key: float(v) for key, v in more.items()}}
    bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()})
    log.scalars(progress.step, **values, s_per_step=progress.step_seconds / progress.step,
                memory_mb=max(peak_memory_mb(device).values()))


# --- the machine ------------------------------------------------------------------------------------------------------

def pick_device(device: str, precision: str):
    """Return (torch.device, autocast): autocast() is a context in bfloat16, or one that does nothing for fp32.

    Raises:
        UserError: CUDA was asked for and is not there, or it has no BF16.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda and device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(f"local rank {device.index} has no GPU: torch sees {torch.cuda.device_count()}; give torchrun "
                            "--nproc-per-node that many processes")
        torch.cuda.set_device(device)
    parallel.begin(device)
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no BF16; use --precision fp32")
    return device, lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory in MB: resident set of the process, and on CUDA what was allocated and reserved."""
    status = Path("/proc/self/status")  # getrusage's figure also counts what the starting process held
    peak_kb = (int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists()
               else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    memory = {"rss": peak_kb / 1024}
    if device.type == "cuda":
        memory |= {"cuda_allocated": torch.cuda.max_memory_allocated() / 2 ** 20,
                   "cuda_reserved": torch.cuda.max_memory_reserved() / 2 ** 20}
    return {key: round(value, 1) for key, value in memory.items()}


def quiet_libraries() -> None:
    """Keep the libraries' notices off a user's first screen; their errors still show."""
    import diffusers
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
