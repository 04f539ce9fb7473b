"""The frozen encoders: CLAP's audio tower, the VAE's encoder and CLIP's text encoder, all in float32.

Shapes: B samples, F sides of a picture, C h w latents, k windows, E width of CLAP's output, L D text tokens.
"""

import functools
from pathlib import Path

import diffusers  # no `from`, as of transformers: naming a class loads it, which takes seconds
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from clap2diffusion.base.device import quiet_libraries
from clap2diffusion.base.hub import load_small
from clap2diffusion.base.models import load_part
from clap2diffusion.dataset.captions import text_limit


def log_mel(extractor, waveform: np.ndarray) -> dict[str, np.ndarray]:
    """waveform (samples,) float32 at the extractor's rate -> the audio tower's inputs, each (1, ...).
    One clip at a time, so the rest of a batch changes nothing. Loader processes call it, as it needs no torch
    and takes half of an encoder's time on a CPU. Raises ValueError: not one-dimensional, empty, longer than
    the window, not finite. The extractor would take it for several clips, crash, crop it, pass NaN on. A
    fused CLAP is told that the clip is not longer than its window. The extractor by itself calls one clip of
    every batch longer, at random, for training's sake."""
    longest = extractor.nb_max_samples
    if waveform.ndim != 1 or not 0 < len(waveform) <= longest:
        raise ValueError(f"waveform has shape {waveform.shape}, expected (1..{longest},)")
    if not np.isfinite(waveform).all():
        raise ValueError("waveform holds NaN or infinity")
    found = dict(extractor([waveform], sampling_rate=extractor.sampling_rate, return_tensors="np"))
    return {**found, "is_longer": np.zeros_like(found["is_longer"], dtype=bool)}


class CLAPAudioEncoder(nn.Module):
    """The frozen CLAP audio tower, from a local folder: waveforms to embeddings of unit length."""

    def __init__(self, model_name: str | Path):
        super().__init__()
        quiet_libraries()
        self.extractor = load_small(transformers.ClapFeatureExtractor, model_name, "CLAP model")
        self.model = load_part(transformers.ClapAudioModelWithProjection, model_name, "CLAP model",
                               unread=("text_model.", "text_projection.", "logit_scale_"))
        self.log_mel = functools.partial(log_mel, self.extractor)
        self.sampling_rate: int = self.extractor.sampling_rate
        self.window_s: float = self.extractor.nb_max_samples / self.sampling_rate
        self.embed_dim: int = self.model.config.projection_dim

    def forward(self, waveforms: list[np.ndarray]) -> Tensor:
        """B waveforms (samples,) at `sampling_rate` -> (B, E) float32. Raises ValueError as log_mel does."""
        return self.embed([self.log_mel(waveform) for waveform in waveforms])

    @torch.inference_mode()
    def embed(self, clips: list[dict[str, np.ndarray]]) -> Tensor:
        """What log_mel gave of B waveforms -> audio_embeds (B, E) float32, unit length."""
        joined = {name: np.concatenate([clip[name] for clip in clips]) for name in clips[0]}
        inputs = {name: torch.from_numpy(values).to(self.model.device) for name, values in joined.items()}
        return F.normalize(self.model(**inputs).audio_embeds.float(), dim=-1)


class Encoders:
    """All of them together, loaded to build a feature cache."""

    def __init__(self, base: Path, clap: Path, device: str):
        self.device = device
        vae = load_part(diffusers.AutoencoderKL, base, "base model", "vae")
        text_encoder = load_part(transformers.CLIPTextModel, base, "base model", "text_encoder",
                                 unread=("text_projection.",))
        self.vae, self.text_encoder, self.clap = (
            model.to(device) for model in (vae, text_encoder, CLAPAudioEncoder(clap)))
        self.tokenizer = load_small(transformers.CLIPTokenizer, base, "base model", "tokenizer")
        self.text_limit = text_limit(base)

    def text(self, captions: list[str]) -> Tensor:
        """Captions -> (B, L, D), padded and cut to the encoder's length as the pipelines do. open_splits()
        says which are cut."""
        ids = self.tokenizer(captions, padding="max_length", max_length=self.text_limit,
                             truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.cpu()

    def rows(self, decoded: list[tuple], flip: bool, batch_size: int) -> dict[str, Tensor]:
        """What Decode gave of B rows -> latents_mean, latents_std (B, F, C, h, w), audio_embeds (B, k, E)."""
        images, heard, flags = zip(*decoded)
        # clone: torch aligns its memory, NumPy does not, and the alignment changes last bits
        plain = torch.from_numpy(np.stack(images)).clone().to(self.device)
        sides = [self.vae.encode(x).latent_dist for x in ([plain, plain.flip(-1)] if flip else [plain])]
        mean = torch.stack([side.mean for side in sides], 1)  # (B, F, C, h, w), as std is; both unscaled
        std = torch.stack([side.std for side in sides], 1)
        shift, scale = getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor
        clips = sum(heard, [])
        parts = [self.clap.embed(clips[i:i + batch_size]).cpu() for i in range(0, len(clips), batch_size)]
        embeds = torch.cat(parts).unflatten(0, (len(decoded), -1))
        silent = torch.tensor([*map(bool, flags)])
        return {"latents_mean": ((mean - shift) * scale).cpu(), "latents_std": (std * scale).cpu(),
                "audio_embeds": embeds.masked_fill(silent[:, None, None], 0.0)}  # zeros are the null audio
