"""The models, loaded once, and what the page's tabs make with them. Nothing of the page is known here."""

import argparse
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soxr
from PIL import Image
from torch import Tensor

from clap2diffusion.base import hub
from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.settings import GUIDANCE
from clap2diffusion.dataset.captions import cut_texts
from clap2diffusion.dataset.decoding import MIN_CLIP_S, to_mono
from clap2diffusion.demo.hearing import Listener
from clap2diffusion.demo.own_data import OwnData
from clap2diffusion.pictures import heat_maps, inputs
from clap2diffusion.pictures.generation import draw, embed_heard, load_clap
from clap2diffusion.pictures.pipelines import load_stock_pipeline, set_scheduler

STEPS = 25  # as generate.py
LIVE_STEPS, LIVE_SCHEDULER = 4, "unipc"  # as good as 25 plain steps on the small models: docs/speed.md
LONGEST_S = 600  # of a sound; the page takes no longer one


class Studio:
    """The models of one adapter. Several sessions may ask at once: one picture is drawn at a time."""

    def __init__(self, adapter_path: Path, facts: dict, base: Path, data: OwnData, clap_model: str = "",
                 device: str = "auto", precision: str = "fp32"):
        """Raises UserError: the device is missing, or a model is not the adapter's or is broken."""
        self.adapter_path, self.facts, self.base, self.data = adapter_path, facts, base, data
        self.device = pick_device(device, precision)[0]
        self.encoder = load_clap(clap_model, facts, adapter_path)
        self.pipe = load_stock_pipeline(base, adapter_path, self.device, DTYPES[precision])
        self.quick = type(self.pipe)(**self.pipe.components, requires_safety_checker=False)  # the same models
        self.quick.set_progress_bar_config(disable=True)
        set_scheduler(self.quick, LIVE_SCHEDULER)
        clap = hub.find_trained(clap_model, facts["clap_model"], "CLAP model", adapter_path)
        self.listener = Listener(clap, data.texts)
        self.turn = threading.Lock()

    def check_sound(self, path: str, longest_s: float = LONGEST_S) -> float:
        """The length of a sound file in seconds. Raises UserError: not a sound, or too long."""
        duration_s = inputs.sound_duration(path)
        if duration_s > longest_s:
            raise UserError(f"{path}: {duration_s:.0f} s long, expected at most {longest_s:g} s; cut out the "
                            "part that you want to see")
        return duration_s

    def remarks(self, prompt: str) -> list[str]:
        """What of a prompt the base model does not read, as sentences."""
        return [f"the prompt is too long: {cut.tokens} tokens, of which {cut.limit} are read"
                for cut in cut_texts([prompt], self.base).values()]

    def picture(self, audio_embeds: Tensor, prompt: str = "", seed: int = 0, strength: float = 1.0,
                guidance: float = GUIDANCE, steps: int = STEPS, pipe=None, maps: bool = False,
                each_step: Callable[[int], None] | None = None) -> tuple[Image.Image, Image.Image | None]:
        """One picture (PIL) of audio_embeds (1, E), as generate.py draws it; and with maps, the same under
        the heat of where the sound acted."""
        asked = argparse.Namespace(batch_size=1, attention_map=maps, prompt=prompt, guidance=guidance,
                                   steps=steps)
        with self.turn:
            [image], found = draw(asked, pipe or self.pipe, audio_embeds, [seed], audio_scale=strength,
                                  size=self.facts["image_size"], each_step=each_step)
        return image, heat_maps.overlays(image, found[0])[0][1] if maps else None


class Stream:
    """One session's microphone: the last window of what came in, and the pictures made of it."""

    def __init__(self, studio: Studio):
        self.studio, self.rate, self.block = studio, 0, np.zeros((0, 1), np.float32)
        self.fresh = False  # whether sound has come since the last picture
        self.silent = False  # whether that picture is of silence
        self.ended: deque[float] = deque(maxlen=8)  # when the last pictures were ready, in seconds

    def add(self, rate: int, samples: np.ndarray) -> None:
        """Take in samples (n,) or (n, channels), int16 or float in [-1, 1]; keep the last window."""
        block = samples[:, None] if samples.ndim == 1 else samples
        if np.issubdtype(block.dtype, np.integer):
            block = block / np.float32(-np.iinfo(block.dtype).min)
        if rate != self.rate or block.shape[1] != self.block.shape[1]:  # another microphone
            self.rate, self.block = rate, np.zeros((0, block.shape[1]), np.float32)
        length = round(self.studio.encoder.window_s * rate)
        self.block, self.fresh = np.concatenate([self.block, block.astype(np.float32)])[-length:], True

    def heard(self) -> np.ndarray | None:
        """The last window (samples,) at CLAP's rate, or None if it is silent. Raises UserError: too short."""
        encoder, seconds = self.studio.encoder, len(self.block) / max(self.rate, 1)
        if seconds < MIN_CLIP_S:
            raise UserError(f"{seconds:.2f} s of sound so far, expected at least {MIN_CLIP_S} s; go on")
        [mono], flags = to_mono([self.block])
        limit = round(encoder.window_s * encoder.sampling_rate)
        return None if flags else soxr.resample(mono, self.rate, encoder.sampling_rate)[:limit]

    def picture(self, prompt: str, strength: float, seed: int) -> Image.Image:
        """The picture of the last window, in few steps. With one seed the sound alone moves it.
        Raises UserError: there is too little sound yet."""
        self.fresh, heard = False, self.heard()
        self.silent, audio_embeds = heard is None, embed_heard(self.studio.encoder, heard)
        image, _ = self.studio.picture(audio_embeds, prompt, seed, strength, steps=LIVE_STEPS,
                                       pipe=self.studio.quick)
        self.ended.append(time.monotonic())
        return image

    def pace(self) -> float:
        """Pictures a second, of the last ones; 0 before the second."""
        took = self.ended[-1] - self.ended[0] if len(self.ended) > 1 else 0.0
        return (len(self.ended) - 1) / took if took else 0.0
