"""What a training step is made of: adapter, gate, LoRA, draws, loss, validation, checkpoints.

Shapes: B samples of a batch, n clips, k CLAP windows of a clip, M views of a picture (plain, mirrored), N
audio tokens, L text tokens, Q places in the picture, D width of the UNet's cross-attention (768 for SD 1.5),
E width of CLAP's embedding (512), C x h x w latents. Nothing here knows which stage is running."""

import math
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clap2diffusion.base import processes, statistics, tensor_file
from clap2diffusion.base.exits import RunFailed, UserError

# --- the audio adapter --------------------------------------------------------------------------------------
LEAST_VARIANCE = 1e-4  # of an entry, whose mean square is 1: below it two clips have a cosine above 0.9999

def whitening(audio_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (E,) of sqrt(E) * audio_embeds (n, E), and the matrix (E, E) that whitens them, in float64.
    ZCA whitening (Bell & Sejnowski 1997) with a Wiener filter: the gain sqrt(v) / (v + f) of a direction of
    variance v is near 1 / sqrt(v) where v is large, and 0 where v is 0. So nothing is amplified that training
    never saw. f is a tenth of the mean variance. Silent clips are zeros and no sounds; they are left out.
    Where all that is left sounds alike, there is nothing to whiten: the mean 0 and the identity, with a line
    that says so; another line where the clips are too few for E directions."""
    x = audio_embeds[audio_embeds.any(-1)].double().cpu() * math.sqrt(audio_embeds.shape[-1])
    if len(x) < 2 or x.var(0).mean() < LEAST_VARIANCE:
        what = "all sound alike to CLAP" if len(x) else "all are silent"
        if processes.first():
            print(f"warning: of {len(audio_embeds)} training clips {what}: the adapter is not whitened, and "
                  "no sound can be told from another; look at them with prepare_data.py check",
                  file=sys.stderr, flush=True)
        return torch.zeros_like(audio_embeds[0]).double().cpu(), torch.eye(audio_embeds.shape[-1]).double()
    if (few := statistics.few_to_whiten(*x.shape)) and processes.first():
        print(f"warning: {few}", file=sys.stderr, flush=True)
    variances, directions = torch.linalg.eigh(torch.cov(x.T))
    variances = variances.clamp(min=0)
    gain = variances.sqrt() / (variances + 0.1 * variances.mean())
    gain *= (len(gain) / (variances * gain ** 2).sum()).sqrt()  # total variance becomes E
    return x.mean(0), (directions * gain) @ directions.T


class AudioProjectionMLP(nn.Module):
    """audio_embeds (B, E) -> audio_tokens (B, N, D): Linear E-2E, GELU, Linear 2E-(N*D), LayerNorm over D.

    The shape is IP-Adapter FaceID's projection (Ye et al. 2023, arXiv 2308.06721, and diffusers'
    IPAdapterFaceIDImageProjection). CLAP's vector has unit length, so its entries are about 1/sqrt(E); the
    factor sqrt(E) brings them to unit size."""
    NEAR_LINEAR = 0.3

    def __init__(self, input_dim: int, output_dim: int, num_tokens: int = 8):
        super().__init__()
        self.input_dim, self.output_dim, self.num_tokens = input_dim, output_dim, num_tokens
        self.proj = nn.Sequential(nn.Linear(input_dim, 2 * input_dim), nn.GELU(),
                                  nn.Linear(2 * input_dim, num_tokens * output_dim))
        self.norm = nn.LayerNorm(output_dim)

    @torch.no_grad()
    def whiten(self, audio_embeds: Tensor) -> None:
        """Make the first layer whiten the training set's audio_embeds (n, E), and keep it so.
        CLAP's embeddings vary mostly between classes. Pitch and rate lie in directions of less variance,
        which an unwhitened layer learns last. NEAR_LINEAR makes the layer's output small. Small inputs keep
        GELU nearly linear, so the tokens of two sounds add up, even for a pair that training never had. A
        trained or larger first layer memorises the pairs of training instead."""
        mean, filter_matrix = whitening(audio_embeds)
        first = self.proj[0]
        weight = first.weight.double().cpu() @ filter_matrix
        first.weight.copy_(self.NEAR_LINEAR * weight)
        first.bias.copy_(self.NEAR_LINEAR * (first.bias.double().cpu() - weight @ mean))
        first.requires_grad_(False)

    def forward(self, audio_embeds: Tensor) -> Tensor:
        if audio_embeds.shape[-1] != self.input_dim:
            raise ValueError(f"audio_embeds are {audio_embeds.shape[-1]} wide, the adapter expects "
                             f"{self.input_dim}")
        tokens = self.proj(audio_embeds * math.sqrt(self.input_dim))
        return self.norm(tokens.unflatten(-1, (self.num_tokens, self.output_dim)))


class AudioAttentionAdapter(nn.Module):
    """Gated, decoupled cross-attention: attend(q, text) + tanh(gate) * attend(q, audio).

    Holds bias-free audio K and V for each of the UNet's cross-attentions, begun as copies of the text K and
    V, and one gate shared by all (a scalar, as in Flamingo, Alayrac et al. 2022, eq. 3). `attach` puts them
    into a UNet, which then takes encoder_hidden_states = (text_tokens (B, L, D), audio_tokens (B, N, D))."""

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
        """Set tanh(gate), in (-1, 1]; 1 becomes 1 - 1e-7, since atanh(1) is infinite."""
        self.gate.data.fill_(math.atanh(min(strength, 1 - 1e-7)))

    def attach(self, unet: nn.Module) -> None:
        """Make the UNet attend to the sound. The weights stay here; the UNet's own are untouched."""
        for i, attn in enumerate(cross_attentions(unet).values()):
            attn.set_processor(AudioAttnProcessor(self, i))


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The UNet's cross-attentions (diffusers: attn2) by name, in the order of its attention processors."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {name: unet.get_submodule(name) for name in names if name.endswith("attn2")}


class AudioAttnProcessor:
    """diffusers' AttnProcessor2_0 for a cross-attention, with the second, gated attention over audio tokens.

    A plain object that refers to the adapter, so the UNet does not own the adapter's weights. A gate of 0
    still gets a gradient (diffusers' IP-Adapter processor skips its branch at scale 0)."""

    def __init__(self, adapter: AudioAttentionAdapter, index: int):
        self.adapter, self.index = adapter, index

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor],
                 attention_mask=None, temb=None) -> Tensor:
        """hidden_states (B, Q, channels) -> (B, Q, channels)."""
        text_tokens, audio_tokens = encoder_hidden_states

        def heads(x: Tensor) -> Tensor:  # (B, T, channels) -> (B, heads, T, head_dim)
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        to_k, to_v = self.adapter.to_k[self.index], self.adapter.to_v[self.index]
        query = heads(attn.to_q(hidden_states))
        text = F.scaled_dot_product_attention(query, heads(attn.to_k(text_tokens)),
                                              heads(attn.to_v(text_tokens)), attn_mask=attention_mask)
        audio = F.scaled_dot_product_attention(query, heads(to_k(audio_tokens)), heads(to_v(audio_tokens)))
        gate = torch.tanh(self.adapter.gate).to(text.dtype)
        mixed = (text + gate * audio).transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](mixed)) / attn.rescale_output_factor


# --- LoRA, optimizer, EMA -----------------------------------------------------------------------------------

class LoraWeights:
    """The LoRA tensors inside a UNet, saved and loaded like a module. Ranks from `active` on sleep: their
    rows of A and columns of B are 0, so both gradients are exactly 0."""

    def __init__(self, unet: nn.Module, active: int | None = None):
        self.tensors = {name: p for name, p in unet.named_parameters() if ".lora_" in name}
        self.lora_a = [p for name, p in self.tensors.items() if ".lora_A." in name]
        for p in self.lora_a if active else ():
            p.data[active:] = 0

    def parameters(self):
        return self.tensors.values()

    def wake(self, active: int, generator: torch.Generator) -> None:
        """Draw the sleeping rows of A up to rank `active` as peft does, normal with deviation 1 / rank."""
        for p in self.lora_a:
            awake = int(p.data.any(1).sum())  # B's columns from here on are 0 still: no output changes
            p.data[awake:active] = torch.randn(active - awake, p.shape[1], generator=generator).to(p) / len(p)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.tensors.items():
            p.data.copy_(state[name])


def add_lora(unet: nn.Module, rank: int, alpha: float, dropout: float,
             active: int | None = None) -> LoraWeights:
    """Put peft's LoRA (Hu et al. 2021) on to_q, to_k, to_v, to_out.0 of every attention; none for rank 0."""
    if rank:
        from peft import LoraConfig  # half a second, which only LoRA has to wait for
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers,
                                    init_lora_weights="gaussian"), adapter_name="lora")
    for name, p in unet.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()  # trainable weights stay float32 whatever the frozen ones are held in
    return LoraWeights(unet, active)


def trainable_parameters(weights: dict) -> list[nn.Parameter]:
    """The explicit list of what is optimized, clipped and averaged, in the order of the weights."""
    return [p for part in weights.values() for p in part.parameters() if p.requires_grad]


def parameter_groups(weights: dict, **scales: float) -> list[dict]:
    """An optimizer's groups, one for each part that trains, with the `lr_scale` given for it, or 1."""
    parts = {name: trainable_parameters({name: part}) for name, part in weights.items()}
    return [{"params": some, "lr_scale": scales.get(name, 1.0)} for name, some in parts.items() if some]


def make_adamw(groups: list[dict], cfg) -> torch.optim.Optimizer:
    """torch's AdamW, or for --adam-8bit bitsandbytes' with moments in 8 bits (Dettmers et al. 2022)."""
    kind = torch.optim.AdamW
    if cfg.adam_8bit:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind(groups, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)


def make_ema(parameters: list[nn.Parameter], decay: float):
    """diffusers' EMAModel over the trainable parameters, or None for decay 0."""
    if decay:
        from diffusers.training_utils import EMAModel
        return EMAModel(parameters, decay=decay)


def step_ema(ema, parameters: list[nn.Parameter]) -> None:
    """Update the averages with the parameters, on their own device; without an EMA nothing happens."""
    if ema:
        ema.step([p.detach().to(m.device).requires_grad_() for p, m in zip(parameters, ema.shadow_params)])


@contextmanager
def averaged(ema, parameters: list[nn.Parameter]):
    """Inside, the parameters hold their averages; without an EMA nothing changes."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema:
        ema.restore(parameters)


# --- a step: draws, conditions, target, loss ----------------------------------------------------------------

class Draws:
    """The random numbers of one step: a function of nothing but the key, e.g. (seed, step, micro-step).

    Each of several processes draws for the whole batch and keeps its own rows, so their number changes no
    draw. Also seeds the global generator, from which dropout draws, differently in each process."""

    def __init__(self, *key: int):
        self.rank, self.world = processes.rank(), processes.world()
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + self.rank)

    def _own_rows(self, draw, shape: tuple[int, ...]) -> Tensor:
        everyone = draw((shape[0] * self.world, *shape[1:]))
        return everyone[self.rank * shape[0]:(self.rank + 1) * shape[0]]

    def normal(self, *shape: int) -> Tensor:
        return self._own_rows(lambda size: torch.randn(size, generator=self.generator), shape)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return self._own_rows(lambda size: torch.rand(size, generator=self.generator), shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high - 1."""
        return self._own_rows(lambda size: torch.randint(low, high, size, generator=self.generator), shape)


def draw_latents(batch: dict, draws: Draws) -> Tensor:
    """A sample of the VAE's posterior from the cached mean and std (B, M, C, h, w) -> latents (B, C, h, w).
    Both are times the VAE's scaling factor already. M is 2 where mirrored pictures are cached too."""
    mean, std = batch["latents_mean"], batch["latents_std"]
    which = draws.integers(0, mean.shape[1], len(mean))
    mean, std = mean[range(len(mean)), which], std[range(len(mean)), which]
    return mean + std * draws.normal(*mean.shape)


def draw_timesteps(scheduler, n: int, high_noise_share: float, draws: Draws) -> Tensor:
    """Uniform timesteps (n,); a share `high_noise_share` of them from the noisiest fifth alone."""
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


def drop_conditions(text_tokens: Tensor, audio_embeds: Tensor, empty_text: Tensor, caption_drop: float,
                    audio_drop: float, both_drop: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Replace, sample by sample, the caption by the empty one, the sound by the null audio (zeros), or both.
    text_tokens (B, L, D), audio_embeds (B, E), empty_text (L, D); three shares, together at most 1. One draw
    decides for each sample, as in IP-Adapter's training."""
    draw = draws.uniform(len(text_tokens))
    drop_text = draw < both_drop + caption_drop
    drop_audio = (draw < both_drop) | (~drop_text & (draw < both_drop + caption_drop + audio_drop))
    return (torch.where(drop_text[:, None, None], empty_text, text_tokens),
            torch.where(drop_audio[:, None], torch.zeros_like(audio_embeds), audio_embeds))


def diffusion_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict: the noise, or the velocity (Salimans & Ho 2022), as the scheduler says."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise UserError(f"the base model's scheduler predicts {kind!r}; expected epsilon or v_prediction")


def mse_per_sample(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B, ...) -> (B,), in float32 whatever the model computed in."""
    return F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(1)


def min_snr_weights(scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Loss weights (B,) of Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, section 3.4); ones for gamma 0:
    min(SNR, gamma) / SNR for a predicted noise, min(SNR, gamma) / (SNR + 1) for a predicted velocity."""
    if not gamma:
        return torch.ones(timesteps.shape, device=timesteps.device)
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    snr = alpha_bar / (1 - alpha_bar)  # signal to noise ratio
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # also where the last timestep's SNR is 0


class FiniteCheck:
    """Decides whether a step may be taken, and ends the run after three in a row that may not."""

    def __init__(self, log, sample_ids, warn_above: float = 100.0):
        """log: the run's log, with `text` and `folder`. sample_ids(step): the samples of a step."""
        self.log, self.sample_ids, self.warn_above, self.in_a_row = log, sample_ids, warn_above, 0

    def __call__(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """True if loss and gradient norm are finite. Waits for the device.
        Raises RunFailed: three steps in a row were not finite."""
        finite = bool(torch.isfinite(loss + grad_norm))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite:
            self.log.text(f"step {step}: loss {float(loss):g}, gradient norm {float(grad_norm):g}: update "
                          f"skipped; samples {', '.join(self.sample_ids(step))}")
        elif grad_norm > self.warn_above:
            self.log.text(f"step {step}: gradient norm {float(grad_norm):.1f} is above {self.warn_above:g}")
        if self.in_a_row == 3:
            raise RunFailed(f"{self.log.folder}: loss or gradient not finite in steps {step - 2} to {step}; "
                            "nothing of these steps was kept; lower the learning rate or look at the "
                            "samples named in log.txt")
        return finite


# --- does the sound matter: right, silence and other --------------------------------------------------------

def other_sounds(labels: list[str | None], audio_embeds: Tensor, seed: int) -> list[int]:
    """For each clip the index of another one: never its own recording, and none of its labels if possible.
    labels: `a` or `a+b`; audio_embeds: (n, E) of unit length. Clips that CLAP hears alike (cosine above
    0.999) count as one recording, so a copy under another name is no "other".

    Raises UserError: there is one recording only."""
    rng, others = np.random.default_rng([seed, 77]), []
    alike = (audio_embeds @ audio_embeds.T > 0.999).numpy() | np.eye(len(labels), dtype=bool)
    heard = [set((label or "").split("+")) for label in labels]
    for i in range(len(labels)):
        different = np.flatnonzero(~alike[i])
        if not len(different):
            raise UserError("the validation split holds one recording only; expected at least two different "
                            "ones")
        others.append(int(rng.choice([j for j in different if not heard[j] & heard[i]] or different)))
    return others


@torch.inference_mode()
def validation_losses(predict, val, scheduler, device, autocast, cfg,
                      sounds: tuple[str, ...] = ("right", "silence", "other")) -> tuple[dict, np.ndarray]:
    """Loss of each validation clip with each sound, {sound: (n, draws)}, and the timesteps (n, draws).
    predict(noisy_latents, timesteps, text_tokens, audio_embeds) -> pred. Silence is the null audio, the zero
    embedding. The caption is empty, so that no class name explains what only the sound should. A clip shows
    its plain view, the posterior's mean and its first window, with fixed noise at `val_draws` timesteps, one
    from each equal part of the schedule. No loss weights."""
    chosen = statistics.stratified([row["label"] for row in val.rows], cfg.val_clips)
    n, rows = len(chosen), [val[i] for i in chosen]
    right = torch.stack([row["audio_embeds"][0] for row in rows])  # (n, E)
    others = other_sounds([val.rows[i]["label"] for i in chosen], right, cfg.seed)
    embeds = {"right": right, "silence": torch.zeros_like(right), "other": right[others]}
    latents = torch.stack([row["latents_mean"][0] for row in rows])  # (n, C, h, w)
    part, drawn = scheduler.config.num_train_timesteps // cfg.val_draws, []
    losses = {sound: np.zeros((n, cfg.val_draws)) for sound in sounds}
    for draw in range(cfg.val_draws):
        generator = torch.Generator().manual_seed(cfg.seed * 1000 + draw)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(draw * part, (draw + 1) * part, (n,), generator=generator)
        drawn.append(timesteps.numpy())
        for at in range(0, n, cfg.val_batch_size):
            chunk = slice(at, min(n, at + cfg.val_batch_size))
            x, eps, t = latents[chunk].to(device), noise[chunk].to(device), timesteps[chunk].to(device)
            text_tokens = val.empty_text_embeds.to(device).expand(len(x), -1, -1)
            noisy_latents, target = scheduler.add_noise(x, eps, t), diffusion_target(scheduler, x, eps, t)
            for sound in sounds:
                with autocast():
                    pred = predict(noisy_latents, t, text_tokens, embeds[sound][chunk].to(device))
                losses[sound][chunk, draw] = mse_per_sample(pred, target).double().cpu().numpy()
    return losses, np.stack(drawn, 1)


def validate(predict, val, scheduler, device, autocast, cfg) -> dict[str, list]:
    """[mean, low, high] of the loss with each sound, and of silence and other minus right, paired by clip,
    each with its 95 % interval. The same of val_right on the noisier half of the timesteps (`_noisy`), and of
    what is told by the right sound on each quarter of them (`_by_quarter`, the noisiest last): layout is
    decided where there is much noise, while the mean is of steps that no sound can change.
    Rank 0 measures, the others wait; all get its numbers and decide alike."""
    if not processes.first():
        return processes.of_first(None)
    losses, timesteps = validation_losses(predict, val, scheduler, device, autocast, cfg)
    quarter = timesteps * 4 // scheduler.config.num_train_timesteps
    told = {"val_right": losses["right"], **{f"{sound}_minus_right": losses[sound] - losses["right"]
                                             for sound in ("silence", "other")}}
    result = {f"val_{sound}": statistics.interval(values.mean(1)) for sound, values in losses.items()}
    result |= {name: statistics.interval(values.mean(1)) for name, values in told.items()}
    result["val_right_noisy"] = statistics.interval_where(losses["right"], quarter >= 2)
    return processes.of_first(result | {
        f"{name}_by_quarter": [statistics.interval_where(values, quarter == q) for q in range(4)]
        for name, values in told.items()})


# --- checkpoints: base/tensor_file.py writes and reads the bytes, engine/run_folder.py keeps the files ------

def save_checkpoint(path: Path, objects: dict, header: dict) -> None:
    """Write every registered object's state_dict and the header into one safetensors file; rank 0 does it.
    Raises RunFailed: a weight is not finite (nothing is written), or the disk is full."""
    if processes.first():
        tensor_file.write_tensors(path, header, {name: part.state_dict() for name, part in objects.items()})


def load_checkpoint(path: Path, header: dict, tensors: dict[str, Tensor], objects: dict) -> None:
    """Load the registered objects from what read_tensors(path) gave: none missing, none of another size.
    Raises UserError: an object or a tensor is missing, or a shape differs (both sides shown)."""
    for name, part in objects.items():
        state = tensor_file.state_of(name, path, header, tensors)
        # of an optimizer nothing is compared
        own = part.state_dict() if hasattr(part, "parameters") else state
        for key in own.keys() | state.keys():
            have, want = (tuple(s[key].shape) if torch.is_tensor(s.get(key)) else "absent"
                          for s in (state, own))
            if have != want:
                raise UserError(f"{path}: {name}.{key} is {have}, this run expects {want}; the dimensions "
                                "must agree")
        part.load_state_dict(state)
