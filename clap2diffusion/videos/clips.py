"""One video becomes clips: the sound of a window and the frame that belongs to it, written as two files.

This runs in worker processes. What comes out depends on the video and the flags alone."""

import functools
import hashlib
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image

from clap2diffusion.base import files
from clap2diffusion.dataset import decoding, frames, media
from clap2diffusion.dataset.decoding import BadFile
from clap2diffusion.judging.clips import PLAIN
from clap2diffusion.pictures.sheets import png_bytes
from clap2diffusion.videos.wanted import LEAST_S, Wanted, window_start

MOST_RATE = 48_000  # Hz; no encoder hears more
PNG_SIDE = 128  # pixels; up to this shorter side a picture is a PNG: among so few JPEG's blocks would show
BLOCK_S, AROUND = 0.02, 11  # loudness is of blocks of this length, averaged over so many
NO_MEMORY, CRASHED = "too little memory", "a decoder crashed on it"
BLACK, SHORT = "only black or blank frames", "shorter than 1 s"


@dataclass(frozen=True, slots=True)
class Options:
    """What is the same for all clips of a run. judge: a folder or hub name, for pick == "siglip"."""
    videos: Path
    out: Path
    window_s: float
    windows: int
    pick: str
    still: bool
    size: int
    judge: str
    threads: int


class Unusable(Exception):
    """A clip that cannot be made: `reason` is counted, `detail` says more of this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


FAILURES = (Unusable, BadFile, MemoryError, OSError)  # of one clip; the others go on


def file_name(wanted: Wanted, start_s: float) -> str:
    """The name of a clip's files, without suffix: readable, safe on every system, and another one for every
    file and start."""
    slug = "".join(letter if letter.isalnum() or letter in "_-" else "_"
                   for letter in unicodedata.normalize("NFC", wanted.video_id.rpartition("/")[2])[:24])
    slug = re.sub("^-+", lambda dashes: "_" * len(dashes[0]), slug)
    digest = hashlib.sha256(wanted.file.encode(errors="surrogateescape")).hexdigest()[:10]
    return f"{slug}-{digest}-{round(start_s * 1000):06d}"


def window_starts(wanted: Wanted, path: Path, options: Options) -> list[tuple[float, float]]:
    """(start, length) in seconds of the windows of a video. Raises BadFile, Unusable."""
    length = min(options.window_s, wanted.length_s or options.window_s)
    if not wanted.start_s and (options.windows == 1 or wanted.start_s is not None):
        return [(0.0, length)]  # read_windows() reads less where less is there
    with decoding.open_audio(path) as sound:
        whole = sound.frames / sound.samplerate
    if wanted.start_s is None:
        n = max(1, min(options.windows, int(whole / length + 1e-6)))  # they do not overlap
        return [(float(start), length) for start in np.linspace(0, max(0.0, whole - length), n)]
    start = window_start(wanted, whole)
    if whole >= LEAST_S and whole - start < LEAST_S:
        raise Unusable("ends before its window",
                       f"its sound lasts {whole:.1f} s, the window begins at {start:g} s")
    return [(start, min(length, whole - start))]


def read_sound(path: Path, start_s: float, length_s: float) -> tuple[np.ndarray, int]:
    """The sound of a window: (samples,) int16, and its rate in Hz. Raises BadFile, Unusable."""
    blocks, rate = decoding.read_windows(path, length_s, 1, start_s)
    if len(blocks[0]) < LEAST_S * rate:
        raise Unusable(SHORT, f"its sound lasts {len(blocks[0]) / rate:.2f} s")
    [mono], flags = decoding.to_mono(blocks)
    if rate > MOST_RATE:
        mono, rate = soxr.resample(mono, rate, MOST_RATE), MOST_RATE
    samples = np.rint(np.clip(mono, -1, 1) * 32767).astype(np.int16)
    if flags or not samples.any():
        raise Unusable("silent", flags[0] if flags[:1] not in ([], ["silent"]) else "")
    return samples, rate


def loudest_moment(samples: np.ndarray, rate: int) -> float:
    """The middle of the loudest fifth of a second of (samples,), in seconds."""
    block = max(1, round(BLOCK_S * rate))
    power = (samples[:len(samples) // block * block].reshape(-1, block).astype(np.float64) ** 2).mean(1)
    around = np.convolve(power, np.ones(AROUND), "same")
    return (int(around.argmax()) + 0.5) * block / rate


@functools.cache
def _judge(name: str, threads: int):
    import torch

    from clap2diffusion.base.device import pick_device
    from clap2diffusion.judging.judge import Judge
    torch.set_num_threads(threads)
    return Judge(name, pick_device("auto", "fp32")[0])


def _score(wanted: Wanted, options: Options):
    """A picture -> how well it fits the clip's label or, without one, its first caption."""
    judge = _judge(options.judge, options.threads)
    label = wanted.label and wanted.label.replace("_", " ").replace("+", " and ")
    [caption] = judge.captions([PLAIN.format(label) if label else wanted.texts[0]])
    return lambda image: float(judge.images([image])[0] @ caption)


def read_picture(wanted: Wanted, options: Options, path: Path, start_s: float, length_s: float,
                 loudest_s: float) -> tuple[Image.Image, frames.Picked]:
    """The picture of a window as it is stored, and what was picked. Raises BadFile, Unusable."""
    candidates = frames.read_frames(path, frames.candidate_times(start_s, length_s))
    how = "middle" if options.pick == "siglip" and not (wanted.label or wanted.texts) else options.pick
    picked = frames.pick(candidates, how, loudest_s, _score(wanted, options) if how == "siglip" else None,
                         middle_s=start_s + length_s / 2)
    if picked.still and not options.still:
        raise Unusable("a still picture")
    image = picked.frame.image
    if (short := min(image.size)) > options.size:
        size = [max(1, round(side * options.size / short)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image, picked


def _image_bytes(image: Image.Image) -> tuple[str, bytes]:
    """A picture's suffix and file: JPEG with all its colours, or PNG of a small one."""
    if min(image.size) <= PNG_SIDE:
        return ".png", png_bytes(image)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=95, subsampling=0)
    return ".jpg", content.getvalue()


def _make_clip(wanted: Wanted, options: Options, path: Path, start_s: float, length_s: float) -> dict:
    samples, rate = read_sound(path, start_s, length_s)
    seconds = len(samples) / rate
    loudest_s = start_s + loudest_moment(samples, rate)
    image, picked = read_picture(wanted, options, path, start_s, seconds, loudest_s)
    suffix, pixels = _image_bytes(image)
    sound, name = io.BytesIO(), file_name(wanted, start_s)
    soundfile.write(sound, samples, rate, subtype="PCM_16", format="FLAC")
    found = {"image_file_name": f"images/{name}{suffix}", "audio_file_name": f"audio/{name}.flac"}
    for key, content in (("image_file_name", pixels), ("audio_file_name", sound.getvalue())):
        files.write_atomic(options.out / found[key], content, synced=False)
    return found | {"bytes": [len(pixels), len(sound.getvalue())], "start_s": round(start_s, 3),
                    "frame_s": round(picked.frame.time_s, 3), "length_s": round(seconds, 3),
                    "still": picked.still, "bars": picked.bars}


def unusable(start_s: float | None, reason: str, detail: str = "") -> dict:
    """What is noted of a clip that cannot be made. again: the next call tries once more, since the reason may
    have gone while the file is the same."""
    again = detail.startswith("cannot be read (") or detail == NO_MEMORY or reason == CRASHED
    return {"start_s": start_s and round(start_s, 3), "reason": reason, "detail": detail,
            **({"again": True} if again else {})}


def make_clips(wanted: Wanted, options: Options) -> list[dict]:
    """Make the clips of one video or of one window of it: for each what was written, or why nothing was. The
    files are whole, but not yet on the disk: sync_disk() waits for that."""
    path, start = options.videos / wanted.file, wanted.start_s
    found: list[dict] = []
    if not path.is_file():
        what = "a pipe or device" if path.exists() else "a link to nothing" if path.is_symlink() else "gone"
        return [unusable(start, "broken", what)]
    try:
        windows = window_starts(wanted, path, options)
    except FAILURES as error:
        return [unusable(start, *_reason_of(path, error))]
    for start, length in windows:
        try:
            found.append(_make_clip(wanted, options, path, start, length))
        except FAILURES as error:
            found.append(unusable(start, *_reason_of(path, error)))
    return found


def _reason_of(path: Path, error: Exception) -> tuple[str, str]:
    """The reason that is counted of what went wrong, and what it says."""
    if isinstance(error, Unusable):
        return error.reason, error.detail
    said = " ".join(str(error).split()) or NO_MEMORY
    if isinstance(error, OSError):
        said = f"cannot be read ({error.strerror or error})"
    if said == BLACK:
        return BLACK, ""
    if "s long, expected at least" in said:
        return SHORT, said
    try:  # asked now, since most files have both
        facts = media.facts(path)
        if not (facts.has_sound and facts.has_video):
            return f"no {'video' if facts.has_sound else 'sound'} track", ""
    except media.Unread as unread:  # the other reason tells what to do with a sound
        said = str(unread)
    except (BadFile, OSError):
        pass
    return "cut off" if said.startswith(("truncated", "cut off")) else "broken", said
