"""Sounds as CLAP hears them: one, several mixed, the way from one to another, the windows of a long one."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.hub import fingerprint, resolve_model
from clap2diffusion.dataset.decoding import SILENT_PEAK, decode_audio
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.pictures.inputs import usable


def load_clap(name: str, facts: dict, adapter_path: Path) -> CLAPAudioEncoder:
    """The CLAP encoder that the adapter was trained with, from `name` ('' = where it was in training).

    Raises UserError: it is missing, or its fingerprint is not the adapter's.
    """
    folder = resolve_model(name or facts["clap_model"], "CLAP model")
    found, expected = fingerprint(folder), facts["fingerprints"]["clap"]
    if found != expected:
        raise UserError(f"{folder}: is CLAP {found}, but {adapter_path} was trained with CLAP {expected} "
                        f"({facts['clap_model']}); give that one with --clap-model")
    return CLAPAudioEncoder(folder)


def hear(encoder: CLAPAudioEncoder, path: str, start_s: float = 0.0) -> np.ndarray | None:
    """One window (samples,) of a sound file at the encoder's rate; None if silent. Raises UserError."""
    with usable(path):
        [waveform], flags = decode_audio(path, encoder.sampling_rate, encoder.window_s, start_s=start_s)
    if not flags:
        return waveform
    where = f"{path} at {start_s:.1f} s" if start_s else path
    print(f"{where}: is {flags[0]}, which counts as no sound", flush=True)
    return None


def embed(encoder: CLAPAudioEncoder, path: str, start_s: float = 0.0) -> Tensor:
    """audio_embeds (1, E) of such a window; zeros, the null audio, if it is silent. Raises UserError."""
    waveform = hear(encoder, path, start_s)
    return torch.zeros(1, encoder.embed_dim) if waveform is None else encoder([waveform])


def mix(waveforms: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Mix sounds as air does: the sum of w_i / max(w) * waveform_i, with silence after the shorter ones.

    waveforms: arrays (samples,) at one rate -> (samples of the longest,), float32. A sound of weight 0 is
    left out. A mix beyond full scale is scaled down to a peak of 1.
    """
    heard = [(waveform, weight) for waveform, weight in zip(waveforms, weights, strict=True) if weight > 0]
    mixture = np.zeros(max(len(waveform) for waveform, _ in heard))
    for waveform, weight in heard:
        mixture[:len(waveform)] += weight / max(weights) * waveform
    return (mixture / max(1.0, np.abs(mixture).max())).astype(np.float32)


def embed_mix(encoder: CLAPAudioEncoder, paths: list[str], weights: list[float]) -> Tensor:
    """audio_embeds (1, E) of files heard at once; zeros if nothing is left to hear. Raises UserError."""
    pairs = [(hear(encoder, path), weight) for path, weight in zip(paths, weights, strict=True)]
    heard = [(waveform, weight) for waveform, weight in pairs if waveform is not None and weight > 0]
    mixture = mix(*zip(*heard, strict=True)) if heard else np.zeros(1)
    if np.abs(mixture).max() >= SILENT_PEAK:
        return encoder([mixture])
    print("nothing is left to hear: the picture is made with the null audio", flush=True)
    return torch.zeros(1, encoder.embed_dim)


def slerp(first: Tensor, second: Tensor, n: int) -> Tensor:
    """n unit vectors (n, E) at equal angles on the great circle from `first` to `second` (1, E).

    Spherical interpolation (Shoemake 1985): embeddings lie on the unit sphere, and a straight line leaves it.
    """
    at = torch.linspace(0, 1, n)[:, None]
    angle = torch.arccos((first * second).sum().clamp(-1, 1))
    if angle < 1e-3:  # the same sound twice
        return first.repeat(n, 1)
    return torch.sin((1 - at) * angle) / angle.sin() * first + torch.sin(at * angle) / angle.sin() * second


def window_starts(duration_s: float, window_s: float, every_s: float) -> list[float]:
    """Where the windows of a storyboard begin: 0, S, 2 S, ...; the last one ends with the sound."""
    last = max(0.0, duration_s - window_s)
    return [min(i * every_s, last) for i in range(math.ceil(last / every_s - 1e-9) + 1)]
