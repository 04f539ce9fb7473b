"""The files of a data folder: what their headers say, and their samples and pixels."""

import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from PIL import Image, ImageOps

MIN_CLIP_S, MIN_RATE, MAX_RATE = 0.1, 1000, 768_000
MIN_SIDE, MAX_PIXELS, MAX_SHAPE_RATIO = 8, 100_000_000, 8
SILENT_PEAK, CANCELLED_SHARE = 1e-5, 1e-3  # -100 dB of full scale; -60 dB of what the channels had
# What Pillow's decoders raise on damaged files. Never `Exception`: a signal's Stopped must pass.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, KeyError, TypeError,
                  struct.error, zlib.error, OverflowError, Image.DecompressionBombError)


class BadFile(Exception):
    """A sound or picture that cannot be used; the message is the reason."""


def _check_plain_file(path: Path) -> None:
    if not path.exists():
        raise BadFile("no such file")
    if not path.is_file():
        raise BadFile("a folder, expected a file" if path.is_dir() else "not a regular file")
    if not path.stat().st_size:
        raise BadFile("zero bytes")


def _checked(opened, faults: list[tuple[bool, str]]):
    """An opened file. Raises BadFile with the first of its faults that is true, and closes it."""
    for wrong, reason in faults:
        if wrong:
            opened.close()
            raise BadFile(reason)
    return opened


def _ogg_ends(path: Path) -> bool:
    """Whether the last Ogg page is whole and marked as last. libsndfile shortens a cut Ogg without a word."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 70_000))  # a page is at most 65307 bytes
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")):]
    if len(page) < 27 or not page.startswith(b"OggS"):
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27:27 + page[26]])


def open_audio(path: Path) -> sf.SoundFile:
    """Open a sound and check what its header says, without decoding it. Raises BadFile."""
    try:
        _check_plain_file(path)
        sound = sf.SoundFile(str(path))
    except (RuntimeError, TypeError, ValueError, OSError) as error:  # sf's own errors are RuntimeErrors
        reason = getattr(error, "error_string", error)
        raise BadFile(f"not a sound that libsndfile reads ({reason})") from None
    # libsndfile shortens a cut WAV or AIFF too, and says so only in its log. A program that cannot go back to
    # fill in the header writes a size near 2^31 or 2^32.
    cut = re.search(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    w64 = re.search(r"^riff : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    said, found = map(int, (cut or w64).groups()) if cut or w64 else (0, 0)
    rate, frames = sound.samplerate, sound.frames  # libsndfile gives no rate below 1
    return _checked(sound, [
        (not MIN_RATE <= rate <= MAX_RATE, f"sampling rate {rate} Hz, expected {MIN_RATE} to {MAX_RATE}"),
        (frames <= 0, "zero length: a header without samples"),
        (frames > 1 << 48, "the header does not say how long it is; encode it again"),
        (found < said < 0x7FFF_F000, f"truncated: {found} of {said} bytes"),
        (sound.format == "OGG" and not _ogg_ends(path), "truncated: the last Ogg page is missing"),
        (frames < MIN_CLIP_S * rate, f"{frames / rate:.3f} s long, expected at least {MIN_CLIP_S} s")])


def read_windows(path: Path, window_s: float, windows=1, start_s=0.0) -> tuple[list[np.ndarray], int]:
    """Stretches (samples, channels) of a sound as its file has them, and its rate in Hz: one from start_s, or
    several evenly from there to the end; the whole if it is shorter than window_s. Raises BadFile."""
    with open_audio(path) as sound:
        rate, total = sound.samplerate, sound.frames
        length, blocks = min(total, round(window_s * rate)), []
        # An MP3's length is only an estimate. Files of float64 are read as such: float32 has no 1e300.
        surely = 0.98 if sound.format == "MPEG" else 1
        dtype = "float64" if sound.subtype == "DOUBLE" else "float32"
        try:
            sound.seek(int(total * surely) - 1)  # the last sample shows that a compressed file is whole
            if not len(sound.read(1)):
                raise BadFile(f"truncated: fewer than the header's {total} samples can be read")
            first, last = min(round(start_s * rate), total - length), total - length
            for start in np.linspace(first, last, windows).round().astype(int):
                sound.seek(start)
                blocks.append(sound.read(length, dtype=dtype, always_2d=True))
                if len(blocks[-1]) < length * surely:
                    raise BadFile(f"truncated: {len(blocks[-1])} of {length} samples can be read")
        except RuntimeError as error:
            raise BadFile(f"truncated or damaged: it stops within its {total} samples ({error})") from None
    if not all(np.isfinite(block).all() for block in blocks):
        raise BadFile("holds NaN or infinite samples")
    return blocks, rate


def to_mono(blocks: list[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """Windows (samples, channels) -> the means of their channels (samples,), with peaks scaled to at most 1,
    and flags of the clip: "silent" or "cancelled by the mono mix"."""
    peak = max(float(np.abs(block).max()) for block in blocks)
    # Scaled before the mean, which could overflow. All windows by one factor, so they stay in proportion.
    monos = [(block / max(peak, 1.0)).mean(axis=1) for block in blocks]
    if peak < SILENT_PEAK:
        return monos, ["silent"]
    cancelled = max(np.abs(mono).max() for mono in monos) < CANCELLED_SHARE * min(peak, 1.0)
    return monos, ["cancelled by the mono mix"] if cancelled else []


def decode_audio(path: str | Path, sampling_rate: int, window_s: float, windows=1,
                 start_s=0.0) -> tuple[list[np.ndarray], list[str]]:
    """`windows` mono float32 waveforms (samples,) of at most window_s seconds at sampling_rate, and flags, by
    read_windows() and to_mono(). Raises BadFile."""
    blocks, rate = read_windows(Path(path), window_s, windows, start_s)
    monos, flags = to_mono(blocks)
    limit = round(window_s * sampling_rate)  # what is longer the CLAP extractor would crop at random
    return [soxr.resample(mono.astype(np.float32), rate, sampling_rate)[:limit] for mono in monos], flags


def load_waveform(path: str | Path, sampling_rate: int, window_s: float, windows=1) -> list[np.ndarray]:
    """The waveforms of decode_audio() from the clip's start, without the flags. Raises BadFile."""
    return decode_audio(path, sampling_rate, window_s, windows)[0]


def active_rms(waveform: np.ndarray, sampling_rate: int) -> float:
    """RMS of (samples,) while it sounds: the mean power of 20 ms blocks, each weighted by its power. Silence
    hardly counts. Over the whole clip five barks would be 7 dB above one; here they are as loud."""
    block = sampling_rate // 50
    blocks = np.pad(waveform, (0, -len(waveform) % block)).reshape(-1, block)
    power = np.mean(blocks ** 2, axis=1)
    return float(np.sqrt(np.sum(power ** 2) / np.sum(power)))


def open_image(path: Path) -> Image.Image:
    """Open a picture and check its header, without decoding it. Raises BadFile."""
    try:
        _check_plain_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; the limit below is stricter
            image = Image.open(path)
    except _PILLOW_ERRORS as error:
        raise BadFile(f"not a picture that Pillow reads ({error})") from None
    (short, long), size = sorted(image.size), f"{image.width}x{image.height} pixels"
    return _checked(image, [
        (short * long > MAX_PIXELS, f"{size}, expected at most {MAX_PIXELS // 1_000_000} million"),
        (short < MIN_SIDE, f"{size}, expected sides of at least {MIN_SIDE}"),
        (long > MAX_SHAPE_RATIO * short, f"{size}, expected a shape of at most {MAX_SHAPE_RATIO}:1"),
        (image.mode == "F", "floating-point pixels have no known white; save it with 8 or 16 bits")])


def load_image(path: str | Path, size: int) -> np.ndarray:
    """A picture as (3, size, size) float32 in [-1, 1]: upright, on white, centre crop. Raises BadFile."""
    try:
        with open_image(Path(path)) as image:  # animated pictures open at their first frame
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of gray: a plain convert would clip nearly all to white
                gray = np.asarray(image).astype(np.int64)
                if gray.min() < 0 or gray.max() > 65535:
                    raise BadFile("more than 16 bits a pixel")
                image = Image.fromarray(np.rint(gray / 257).astype(np.uint8))
            if image.has_transparency_data:  # also a palette's: its hidden colours must not show through
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.LANCZOS)
    except _PILLOW_ERRORS as error:
        raise BadFile(f"truncated or damaged picture ({error})") from None
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
    # Convolutions round differently in other layouts, and pickling in a worker changes the layout.
    return np.ascontiguousarray(pixels)


def load_picture(path: str | Path, size: int) -> Image.Image:
    """load_image() as a PIL picture, for showing and judging. Raises BadFile."""
    return Image.fromarray(((load_image(path, size).transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8))
