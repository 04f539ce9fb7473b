"""Manifest and files: the checked rows of a data folder, and the decoding of its sounds and pictures."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from PIL import Image, ImageOps

from config import UserError

SPLITS = ("train", "val", "test")
MIN_CLIP_S, MIN_RATE, MAX_RATE = 0.1, 1000, 768_000
MIN_SIDE, MAX_PIXELS, MAX_SHAPE_RATIO = 8, 100_000_000, 8
SILENT_PEAK, CANCELLED_SHARE = 1e-5, 1e-3  # -100 dB of full scale; -60 dB of what the channels had
Log = Callable[[str], None]


class BadFile(Exception):
    """A sound or picture that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)  # a manifest may have hundreds of thousands: names instead of paths, no dictionary
class Row:
    """One example. Names are inside the data folder, links resolved; `where` is its place in the manifest."""
    root: Path
    image: str
    audio: str
    text: str
    label: str | None
    split: str
    where: str = ""
    properties: dict | None = None  # what was drawn, where the data were made (the sound world)

    @property
    def id(self) -> str:
        return f"{self.audio}+{self.image}"

    @property
    def image_path(self) -> Path:
        return self.root / self.image

    @property
    def audio_path(self) -> Path:
        return self.root / self.audio


@dataclass(frozen=True)
class BadRow:
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


# --- manifest -----------------------------------------------------------------------------------------------

def _entries(root: Path) -> Iterator[tuple[str, str | None, object]]:
    """Yield (place, split given by the file's name, object, or an Exception where a line is not JSON)."""
    path = root / "metadata.jsonl"
    if path.is_file():
        # Split at b"\n" only: str.splitlines would also cut at U+2028, which JSON allows inside a string.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    try:
                        yield f"{path.name} line {number}", None, json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        yield f"{path.name} line {number}", None, ValueError(f"not one JSON object ({error})")
        return
    lists = [path for path in (root / f"{split}_metadata.json" for split in SPLITS) if path.is_file()]
    if not lists:
        raise UserError(f"{root}: no metadata.jsonl in this folder; make one with prepare_data.py")
    for path in lists:
        try:
            items = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error}); mend it or make it again") from None
        if not isinstance(items, list):
            raise UserError(f"{path}: got a JSON {type(items).__name__}, expected a list [...] of objects")
        names = {"audio_path": "audio_file_name", "image_path": "image_file_name", "class": "label"}
        for number, item in enumerate(items, 1):
            if isinstance(item, dict):
                item = {names.get(key, key): value for key, value in item.items()}
            yield f"{path.name} item {number}", path.name.split("_")[0], item


def _mode(path: str) -> int | None:
    """What is at a path, links not followed; None if nothing is."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _inside(root: str, key: str, name: str, folders: dict[str, str]) -> str:
    """The name, in the data folder and with links resolved, of the file that a manifest names, tried also in both Unicode
    normal forms; ValueError if it leaves the folder. `folders` remembers resolved folders: asking for each is slow.
    """
    if not name or "\0" in name:
        raise ValueError(f"{key}: the name {name!r} is empty or holds a zero character")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{key}: {name!r} is absolute or holds '..'; expected a path inside the data folder")
    name = os.path.normpath(name)
    forms = [name] if name.isascii() else [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    paths = [os.path.join(root, form) for form in forms]
    try:
        path, mode = next(((path, mode) for path in paths if (mode := _mode(path)) is not None), (paths[0], 0))
        folder, file = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = str(Path(path).resolve()) if stat.S_ISLNK(mode) else os.path.join(folders[folder], file)
    except (OSError, RuntimeError) as error:  # a name too long, a circle of links
        raise ValueError(f"{key}: {name!r} cannot be looked up ({error})") from None
    inside = os.path.join(root, "")
    if not path.startswith(inside):
        raise ValueError(f"{key}: {name!r} is a link that leaves the data folder")
    return path.removeprefix(inside)


def _row(root: Path, where: str, split: str | None, item: object, folders: dict[str, str]) -> Row:
    if isinstance(item, Exception):
        raise item
    if not isinstance(item, dict):
        raise ValueError(f"got a JSON {type(item).__name__}, expected an object {{...}}")
    for key in ("image_file_name", "audio_file_name", "text", "label", "split"):
        value = item.get(key)
        if value is None and key in ("label", "split"):
            continue
        if key not in item:
            raise ValueError(f"the key {key} is missing")
        if not isinstance(value, str):
            raise ValueError(f"{key}: got {json.dumps(value)[:80]}, expected text")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{key}: {value!r:.80} holds half of a character (\\ud800 to \\udfff)")
    split, label = split or item.get("split"), item.get("label")
    image = _inside(str(root), "image_file_name", item["image_file_name"], folders)
    audio = _inside(str(root), "audio_file_name", item["audio_file_name"], folders)
    if split is None:
        share = int(hashlib.sha256(unicodedata.normalize("NFC", audio).encode()).hexdigest(), 16) % 100
        split = "train" if share < 90 else "val" if share < 95 else "test"
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected train, val or test")
    return Row(root, image, audio, item["text"], label and sys.intern(label), sys.intern(split), where,
               item.get("properties") if isinstance(item.get("properties"), dict) else None)


def read_manifest(data_root: str | Path, log: Log | None = None) -> tuple[list[Row], list[BadRow]]:
    """Read metadata.jsonl, or the founding project's {train,val,test}_metadata.json lists.

    A row without split gets a stable one from its audio name (90/5/5); `log` is told how many. Of rows that
    contradict each other (the same row twice, one sound in two splits) the first counts and the later one is bad.

    Raises:
        UserError: no data folder, no manifest, an empty one, or a founding list that is not JSON.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder; make it with prepare_data.py or correct --data-root")
    root = root.resolve()
    rows, bad, seen, split_of, folders, unsplit = [], [], {}, {}, {}, 0
    for where, split, item in _entries(root):
        try:
            row = _row(root, where, split, item, folders)
            same = (row.image, row.audio, row.text)
            if same in seen:
                raise ValueError(f"the same row as {seen[same]}")
            first = split_of.setdefault(row.audio, row)
            if first.split != row.split:
                raise ValueError(f"the sound is in split {row.split} here and in {first.split} at {first.where}")
            seen[same] = where
            unsplit += split is None and item.get("split") is None
            rows.append(row)
        except ValueError as error:
            bad.append(BadRow(where, str(error)))
    if not rows and not bad:
        raise UserError(f"{root}: the manifest has no rows; make it again with prepare_data.py")
    if unsplit and log:
        log(f"{unsplit} rows name no split: assigned by a hash of the audio name, 90/5/5 train/val/test")
    return rows, bad


# --- decoding -----------------------------------------------------------------------------------------------

def _ogg_ends(path: Path) -> bool:
    """Whether the last Ogg page is whole and marked as the last (libsndfile shortens a cut Ogg in silence)."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 70_000))  # a page is at most 65307 bytes
        tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0 or len(tail) < at + 27 + tail[at + 26: at + 27][0]:
        return False
    segments = tail[at + 26]
    return bool(tail[at + 5] & 4) and len(tail) >= at + 27 + segments + sum(tail[at + 27: at + 27 + segments])


def _plain_file(path: Path) -> None:
    if not path.exists():
        raise BadFile("no such file")
    if not path.is_file():
        raise BadFile("a folder, expected a file" if path.is_dir() else "not a regular file")
    if not path.stat().st_size:
        raise BadFile("zero bytes")


def open_audio(path: Path) -> sf.SoundFile:
    """Open a sound and check what its header says, without decoding it.

    Raises:
        BadFile: missing, not a sound, empty, too short, cut off, an absurd rate.
    """
    try:
        _plain_file(path)
        sound = sf.SoundFile(str(path))
    except (RuntimeError, TypeError, ValueError, OSError) as error:  # sf's own errors are RuntimeErrors
        raise BadFile(f"not a sound that libsndfile reads ({getattr(error, 'error_string', error)})") from None
    reason = None
    # libsndfile shortens a cut WAV or AIFF in silence and only says so in its log; a size near 2^31 or 2^32 is
    # what a program writes that could not go back to fill in the header.
    cut = re.search(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    w64 = re.search(r"^riff : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    said, found = map(int, (cut or w64).groups()) if cut or w64 else (0, 0)
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        reason = f"sampling rate {sound.samplerate} Hz, expected {MIN_RATE} to {MAX_RATE}"
    elif sound.frames <= 0:
        reason = "zero length: a header without samples"
    elif sound.frames > 1 << 48:
        reason = "the header does not say how long it is; encode it again"
    elif found < said < 0x7FFF_F000:
        reason = f"truncated: {found} of {said} bytes"
    elif sound.format == "OGG" and not _ogg_ends(path):
        reason = "truncated: the last Ogg page is missing"
    elif sound.frames < MIN_CLIP_S * sound.samplerate:
        reason = f"{sound.frames / sound.samplerate:.3f} s long, expected at least {MIN_CLIP_S} s"
    if reason:
        sound.close()
        raise BadFile(reason)
    return sound


def read_windows(path: Path, window_s: float, windows: int = 1, start_s: float = 0.0) -> tuple[list[np.ndarray], int]:
    """(`windows` stretches of the file, each (samples, channels) as the file holds them, and its rate in Hz).

    Raises:
        BadFile: the reason why the file cannot be used.
    """
    with open_audio(path) as sound:
        rate, total = sound.samplerate, sound.frames
        length = min(total, round(window_s * rate))
        # float64 files are read as such: 1e300 would become infinite in float32.
        dtype = "float64" if sound.subtype == "DOUBLE" else "float32"
        blocks = []
        try:
            # The last sample shows that a compressed file is whole; an MP3's length is only an estimate.
            sound.seek(total - 1 if sound.format != "MPEG" else int(total * 0.98) - 1)
            if not len(sound.read(1)):
                raise BadFile(f"truncated: fewer than the header's {total} samples can be read")
            first, last = min(round(start_s * rate), total - length), total - length
            for start in np.linspace(first, last, windows).round().astype(int):
                sound.seek(start)
                blocks.append(sound.read(length, dtype=dtype, always_2d=True))
                if len(blocks[-1]) < length * (0.98 if sound.format == "MPEG" else 1):
                    raise BadFile(f"truncated: {len(blocks[-1])} of {length} samples can be read")
        except RuntimeError as error:
            raise BadFile(f"truncated or damaged: it stops within its {total} samples ({error})") from None
    if not all(np.isfinite(block).all() for block in blocks):
        raise BadFile("holds NaN or infinite samples")
    return blocks, rate


def to_mono(blocks: list[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """Windows of (samples, channels) -> their channels' means (samples,), scaled to a peak of at most 1, and their flags:
    "silent", "cancelled by the mono mix"."""
    peak = max(float(np.abs(block).max()) for block in blocks)
    # Scaled before the mean, which could overflow; all windows alike, so that they stay in proportion.
    monos = [(block / max(peak, 1.0)).mean(axis=1) for block in blocks]
    flags = []
    if peak < SILENT_PEAK:
        flags.append("silent")
    elif max(np.abs(mono).max() for mono in monos) < CANCELLED_SHARE * min(peak, 1.0):
        flags.append("cancelled by the mono mix")
    return monos, flags


def decode_audio(path: str | Path, sampling_rate: int, window_s: float, windows: int = 1,
                 start_s: float = 0.0) -> tuple[list[np.ndarray], list[str]]:
    """load_waveform() from start_s seconds on, with the clip's flags (to_mono)."""
    blocks, rate = read_windows(Path(path), window_s, windows, start_s)
    monos, flags = to_mono(blocks)
    limit = round(window_s * sampling_rate)  # the CLAP extractor crops what is longer at random
    return [soxr.resample(mono.astype(np.float32), rate, sampling_rate)[:limit] for mono in monos], flags


def load_waveform(path: str | Path, sampling_rate: int, window_s: float, windows: int = 1) -> list[np.ndarray]:
    """`windows` mono float32 waveforms (samples,) of at most window_s seconds at sampling_rate, finite.

    One window is the start of the clip, k windows are spread evenly from start to end; only they are decoded.
    A clip shorter than the window comes whole. Samples beyond full scale are scaled to a peak of 1.

    Raises:
        BadFile: the reason why the file cannot be used.
    """
    return decode_audio(path, sampling_rate, window_s, windows)[0]


# What Pillow's decoders raise on damaged files. Never `Exception`: a signal's Stopped must pass.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error,
                  OverflowError, Image.DecompressionBombError)


def open_image(path: Path) -> Image.Image:
    """Open a picture and check its header, without decoding it. Raises BadFile."""
    try:
        _plain_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit below is stricter than its error
            image = Image.open(path)
    except _PILLOW_ERRORS as error:
        raise BadFile(f"not a picture that Pillow reads ({error})") from None
    (width, height), reason = image.size, None
    if width * height > MAX_PIXELS:
        reason = f"{width}x{height} pixels, expected at most {MAX_PIXELS // 1_000_000} million"
    elif min(width, height) < MIN_SIDE:
        reason = f"{width}x{height} pixels, expected sides of at least {MIN_SIDE}"
    elif max(width, height) > MAX_SHAPE_RATIO * min(width, height):
        reason = f"{width}x{height} pixels, expected a shape of at most {MAX_SHAPE_RATIO}:1"
    elif image.mode == "F":
        reason = "floating-point pixels have no known white; save it with 8 or 16 bits"
    if reason:
        image.close()
        raise BadFile(reason)
    return image


def load_image(path: str | Path, size: int) -> np.ndarray:
    """A picture as (3, size, size) float32 in [-1, 1]: upright, on white, centre crop, Lanczos. Raises BadFile."""
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
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    except _PILLOW_ERRORS as error:
        raise BadFile(f"truncated or damaged picture ({error})") from None
    # Contiguous: convolutions round differently for other layouts, and pickling from a worker changes the layout.
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1)


def load_picture(path: str | Path, size: int) -> Image.Image:
    """load_image() as a PIL picture, for showing and judging. Raises BadFile."""
    return Image.fromarray(((load_image(path, size).transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8))
