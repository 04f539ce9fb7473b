"""Faults of sounds, pictures and manifests. `prepare_data.py check` says of each what a stage would say."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import ok, script
from faults import Case, check, pattern
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from clap2diffusion.base.exits import Stopped
from clap2diffusion.dataset.checking import look_at
from clap2diffusion.dataset.containers import _changed_page, _crc, _flac_frame
from clap2diffusion.dataset.decoding import (
    BadFile,
    decode_audio,
    load_image,
    load_waveform,
    open_audio,
    read_windows,
)
from clap2diffusion.dataset.manifest import read_manifest

RATE = 16000
COMMAND = "prepare_data.py check"


def row(i: int, **changes) -> dict:
    return {"image_file_name": f"images/{i}.png", "audio_file_name": f"audio/{i}.wav", "text": f"scene {i}",
            "label": "thing", "split": "train"} | changes


def noise(path: Path, seconds: float = 2.0, rate: int = RATE, seed: int = 0, **options) -> Path:
    sf.write(path, np.random.default_rng(seed).uniform(-.1, .1, int(seconds * rate)), rate, **options)
    return path


def picture(path: Path, size=(96, 96), seed: int = 0, **options) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def folder(root: Path, n: int = 4) -> list[dict]:
    """n good rows, not yet listed in a manifest."""
    (root / "audio").mkdir(parents=True)
    (root / "images").mkdir()
    for i in range(n):
        noise(root / f"audio/{i}.wav", seed=i)
        picture(root / f"images/{i}.png", seed=i)
    return [row(i) for i in range(n)]


def write_manifest(root: Path, rows: list[dict]) -> None:
    (root / "metadata.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
                                         encoding="utf-8")


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])


def checked(root: Path, *splits: str) -> list:
    return [*COMMAND.split(), "--data-root", root, "--max-bad-share", 0, "--splits", *(splits or ["train"])]


def sound(name: str, make) -> object:
    """Row 2's sound is what make(path) writes."""
    def build(d: Path) -> list:
        rows = folder(d / "data")
        (d / "data/audio/1.wav").unlink()
        rows[1]["audio_file_name"] = f"audio/{name}"
        write_manifest(d / "data", rows)
        make(d / "data/audio" / name)
        return checked(d / "data")
    return build


def image(name: str, make) -> object:
    def build(d: Path) -> list:
        rows = folder(d / "data")
        (d / "data/images/1.png").unlink()
        rows[1]["image_file_name"] = f"images/{name}"
        write_manifest(d / "data", rows)
        make(d / "data/images" / name)
        return checked(d / "data")
    return build


def manifest(change, *splits: str) -> object:
    """change(root, rows) returns the manifest's bytes, or changes rows. False: there is no manifest."""
    def build(d: Path) -> list:
        rows = folder(d / "data")
        content = change(d / "data", rows)
        if isinstance(content, bytes):
            (d / "data/metadata.jsonl").write_bytes(content)
        elif content is not False:
            write_manifest(d / "data", rows)
        return checked(d / "data", *splits)
    return build


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


# --- sounds -------------------------------------------------------------------------------------------------

def with_value(value: float):
    def make(path: Path) -> None:
        x = np.random.default_rng(0).uniform(-.1, .1, 2 * RATE).astype(np.float32)
        x[7] = value
        sf.write(path, x, RATE, subtype="FLOAT")
    return make


def sine(rate: int = RATE, subtype: str = "PCM_16", channels: int = 1):
    def make(path: Path) -> None:
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
        sf.write(path, np.stack([wave] * channels, 1), rate, subtype=subtype)
    return make


def is_the_sine(d: Path, _) -> None:
    [clip] = load_waveform(d / "data/audio/a.wav", RATE, 10.0)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    assert clip.shape == expected.shape and np.abs(clip - expected)[500:-500].max() < 0.01


def loud(path: Path) -> None:
    sf.write(path, 1e300 * np.sin(np.arange(2 * RATE) / 5), RATE, subtype="DOUBLE")


def is_scaled(d: Path, _) -> None:
    [clip] = load_waveform(d / "data/audio/a.wav", RATE, 10.0)
    wave = np.sin(np.arange(2 * RATE) / 5)
    np.testing.assert_allclose(clip, wave / np.abs(wave).max(), atol=1e-6)


def six_channels(path: Path) -> None:
    sf.write(path, np.random.default_rng(0).uniform(-.5, .5, (2 * RATE, 6)).astype(np.float32), RATE,
             subtype="FLOAT")


def is_the_mean(d: Path, _) -> None:
    x = np.random.default_rng(0).uniform(-.5, .5, (2 * RATE, 6)).astype(np.float32)
    np.testing.assert_allclose(load_waveform(d / "data/audio/a.wav", RATE, 10.0)[0], x.mean(1), atol=1e-6)


def clipped(path: Path) -> None:
    sf.write(path, np.clip(3 * np.sin(np.arange(2 * RATE) / 20), -1, 1), RATE)


def opposite(path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-.5, .5, 2 * RATE)
    sf.write(path, np.stack([wave, -wave], 1), RATE)


def wrong_rate(path: Path) -> None:
    """A header with a rate of 8 kHz and the byte rate of 16 kHz: a program has changed one field alone."""
    content = bytearray(noise(path).read_bytes())
    content[24:28] = (8000).to_bytes(4, "little")
    path.write_bytes(content)


def three_hours(path: Path) -> None:
    """172 MB of silence in a sparse file, which takes no room on the disk."""
    content = bytearray(noise(path, 1.0, 8000).read_bytes())
    size, header = 3 * 3600 * 16000, content[:-16000]
    header[-4:] = size.to_bytes(4, "little")
    header[4:8] = (size + len(header) - 8).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def reads_ten_seconds(d: Path, _) -> None:
    read, frames = sf.SoundFile.read, []
    sf.SoundFile.read = lambda self, n, **k: frames.append(n) or read(self, n, **k)
    try:
        load_waveform(d / "data/audio/a.wav", RATE, 10.0)
    finally:
        sf.SoundFile.read = read
    assert sum(frames) <= 10 * 8000 + 1024  # and the last, which show that it is whole


def truncated(share: float, **options):
    def make(path: Path) -> None:
        noise(path, 5.0, **options)
        cut(path, share)
    return make


# Sounds whose container cannot be sought, or says a wrong length or none. All play the same melody.

TONE_S = 0.5
TONES = [300 + 90 * (7 * i % 24) for i in range(24)]  # Hz; twelve seconds, no tone twice


def melody(rate: int = RATE) -> np.ndarray:
    t = np.arange(round(TONE_S * rate)) / rate
    return np.concatenate([0.5 * np.sin(2 * np.pi * tone * t) for tone in TONES])


def plays(name: str, seconds: float = 12.0, tones=TONES) -> object:
    """The whole lasts `seconds`. Each tone sounds in its place, in the whole and in a window of its own."""
    def check_tones(d: Path, _) -> None:
        path = d / "data/audio" / name
        [whole] = load_waveform(path, RATE, 100.0)
        assert abs(len(whole) / RATE - seconds) < 0.13, len(whole) / RATE
        for i, tone in enumerate(tones[:int(seconds / TONE_S)]):
            [window], _ = decode_audio(path, RATE, TONE_S, start_s=i * TONE_S)
            start = round(i * TONE_S * RATE)
            for part in (whole[start:start + len(window)], window):
                middle = part[round(0.2 * RATE):round(0.45 * RATE)]  # codecs are late by up to 0.1 s
                heard = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))).argmax() * RATE / len(middle)
                assert abs(heard - tone) < 10, (i, tone, heard)
    return check_tones


def encoded(rate: int = RATE, sound=None, **options) -> bytearray:
    file = io.BytesIO()
    sf.write(file, melody(rate) if sound is None else sound, rate, **options)
    return bytearray(file.getvalue())


def as_bytes(change=bytes, **options):
    """The melody as libsndfile writes it with these options, changed by change(bytes)."""
    return lambda path: path.write_bytes(change(encoded(**options)))


def id3(n: int) -> bytes:
    """An ID3v2 tag with n bytes of content, at most 16383."""
    return b"ID3\4\0\0\0\0" + bytes([n >> 7, n & 127]) + bytes(n)


def behind_id3(content: bytes) -> bytes:
    return id3(5000) + content


def put(mark: bytes, offset: int, *values: tuple[str, int], riff: bool = True):
    """Put numbers (struct form, value) at `offset` from the last `mark`; if `riff`, 0 as the file's size."""
    def change(content: bytearray) -> bytearray:
        place = content.rindex(mark) + offset
        for form, value in values:
            struct.pack_into(form, content, place, value)
            place += struct.calcsize(form)
        if riff:
            content[4:8] = bytes(4)
        return content
    return change


no_flac_length = put(b"fLaC", 22, (">I", 0), riff=False)


def without_first_frame(content: bytearray) -> bytearray:
    """An MP3 without the frame that says its length, as streams have it."""
    return content[content.index(content[:2], 4):]


def in_two_parts(first: str):
    """Four seconds of noise and eight of nothing, in an MP3 of variable rate that does not say its length."""
    def make(path: Path) -> None:
        parts = {"loud": np.random.default_rng(0).uniform(-.5, .5, 4 * 44100), "quiet": np.zeros(8 * 44100)}
        order = [first, *(name for name in parts if name != first)]
        content = encoded(44100, np.concatenate([parts[name] for name in order]), format="MP3",
                          bitrate_mode="VARIABLE", compression_level=0.3)
        path.write_bytes(without_first_frame(content))
    return make


def is_in_two_parts(loud: slice):
    def check_parts(d: Path, _) -> None:
        [clip] = load_waveform(d / "data/audio/a.mp3", RATE, 100.0)
        assert abs(len(clip) / RATE - 12.04) < 0.01
        assert np.std(clip[loud]) > 0.1 and np.abs(np.delete(clip, loud)).max() < 1e-3
        [part], _ = decode_audio(d / "data/audio/a.mp3", RATE, 1.0, start_s=9.0)
        assert (np.std(part) > 0.1) == (loud.start > 0) == (np.std(part) > 1e-3)
    return check_parts


def between_chunks(content: bytearray) -> bytes:
    """A WAV with a chunk of odd size and a broadcast chunk before its sound, and a tag behind it."""
    return (content[:36] + b"JUNK\5\0\0\0abcde\0" + b"bext\x5a\2\0\0" + bytes(602) + content[36:]
            + b"id3 " + struct.pack("<I", 510) + id3(500))


def beside_a_sidecar(path: Path) -> None:
    """As macOS' tar, zip and exFAT leave one beside every file."""
    path.write_bytes(encoded(44100, format="MP3"))
    path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(4080))


def rounded_rate(content: bytearray) -> bytearray:
    content[28:32] = (int.from_bytes(content[28:32], "little") + 1).to_bytes(4, "little")
    return content


def hole_in_ogg(content: bytearray) -> bytearray:
    """100 zero bytes before a page in the middle."""
    at = content.index(b"OggS", len(content) // 2)
    return content[:at] + bytes(100) + content[at:]


def hole_in_mp3(content: bytes) -> bytes:
    return content[:len(content) // 2] + bytes(70_000) + content[len(content) // 2:]


def no_end_mark(content: bytearray) -> bytearray:
    content[content.rindex(b"OggS\0") + 5] &= ~4
    return content


def last_pages_gone(content: bytearray) -> bytearray:
    """Cut between two Ogg pages, near the middle."""
    return content[:content.index(b"OggS\0", len(content) // 2)]


def plays_to_its_last_page(d: Path, _) -> None:
    content = (d / "data/audio/a.ogg").read_bytes()
    place = content.rindex(b"OggS\0")
    samples = int.from_bytes(content[place + 6:place + 14], "little")
    assert 6 * RATE < samples < 11 * RATE
    plays("a.ogg", samples / RATE)(d, _)


def gsm_of_odd_size(content: bytes) -> bytes:
    """A WAV of GSM without its last block, and padded to an even size."""
    data = content.index(b"data") + 4
    size = int.from_bytes(content[data:data + 4], "little") - 65
    assert size % 2
    return content[:data] + size.to_bytes(4, "little") + content[data + 4:data + 4 + size] + b"\0"


def ends_without_noise(d: Path, _) -> None:
    plays("a.wav", 12 - 320 / 8000)(d, _)
    [clip] = load_waveform(d / "data/audio/a.wav", 8000, 100.0)
    assert len(clip) == 12 * 8000 - 320


def frames_of_flac(first: int, last: int):
    """The header of a FLAC, and its frames from `first` up to `last`, as ffmpeg -c copy cuts it."""
    def change(content: bytes) -> bytes:
        block_size = int.from_bytes(content[10:12], "big")
        found = ((_flac_frame(content[at:at + 16], block_size), at) for at in range(len(content)))
        places = {frame[0] // block_size: at for frame, at in found if frame}
        return content[:places[0]] + content[places[first]:places[last]]
    return change


def before_its_start(seconds: float, rate: int = 48000):
    """An Opus or Vorbis whose first seconds lie before time 0, as ffmpeg -ss and -c copy write it. rate: of
    its times."""
    def change(content: bytes) -> bytes:
        pages = [b"OggS\0" + page for page in bytes(content).split(b"OggS\0")[1:]]
        for i, page in enumerate(pages):
            if until := int.from_bytes(page[6:14], "little"):
                time = until - round(seconds * rate)
                pages[i] = _changed_page(page, 6, time.to_bytes(8, "little", signed=True))
        return b"".join(pages)
    return change


def late_last_page(content: bytes) -> bytes:
    """An Opus whose last page says 0.1 s more than it has, as where times are of a clock."""
    at = content.rindex(b"OggS\0")
    until = int.from_bytes(content[at + 6:at + 14], "little") + 4800
    return content[:at] + _changed_page(bytes(content[at:]), 6, until.to_bytes(8, "little"))


def in_full_pages(content: bytes) -> bytes:
    """An Opus in pages of 255 parts, so that packets begin in one page and end in the next, as ffmpeg writes
    high bit rates."""
    pages = [b"OggS\0" + page for page in bytes(content).split(b"OggS\0")[1:]]
    sizes = b"".join(page[27:27 + page[26]] for page in pages[2:])
    body = b"".join(page[27 + page[26]:] for page in pages[2:])
    made, time, whole = pages[:2], 0, True
    for at in range(0, len(sizes), 255):
        part = sizes[at:at + 255]
        time = min(time + 960 * sum(size < 255 for size in part), int.from_bytes(pages[-1][6:14], "little"))
        flags = (not whole) | 4 * (at + 255 >= len(sizes))
        page = (b"OggS\0" + bytes([flags]) + time.to_bytes(8, "little") + pages[0][14:18]
                + len(made).to_bytes(4, "little") + bytes(4) + bytes([len(part)]) + part)
        made.append(_changed_page(page + body[:sum(part)], 5, bytes([flags])))
        body, whole = body[sum(part):], part[-1] < 255
    assert sum(page[5] & 1 for page in made) > 1
    return b"".join(made)


def joined_flac(content: bytes) -> bytes:
    """The frames of a FLAC twice behind one header, as ffmpeg joins two without encoding them again."""
    header = len(frames_of_flac(0, 0)(content))
    return content + content[header:]


def mp3_in_wav(path: Path) -> None:
    sound = without_first_frame(encoded(44100, format="MP3", bitrate_mode="VARIABLE"))
    form = struct.pack("<4sIHHIIHHHHIHHH", b"fmt ", 30, 0x55, 1, 44100, 16000, 1, 0, 12, 1, 2, 418, 1, 1105)
    data = b"WAVE" + form + b"data" + struct.pack("<I", len(sound)) + sound
    path.write_bytes(b"RIFF" + struct.pack("<I", len(data)) + data)


def of_layer_2(path: Path) -> None:
    """Twelve seconds of silent MPEG layer II. Its first frame has four times the bytes of the others."""
    frames = [b"\xff\xfd\xa4\xc0" + bytes(572), *[b"\xff\xfd\x24\xc0" + bytes(140)] * 499]
    path.write_bytes(b"".join(frames))


def cut_gigabytes(path: Path) -> None:
    """The first of the three gigabytes that the header says, in a sparse file."""
    path.write_bytes(put(b"data", 4, ("<I", 3_000_000_000))(encoded(format="WAV")))
    with path.open("r+b") as file:
        file.truncate(1_000_000_000)


def is_not_read(d: Path, _) -> None:
    read, n = sf.SoundFile.read, []
    sf.SoundFile.read = lambda self, *a, **k: n.append(a) or read(self, *a, **k)
    try:
        with pytest.raises(BadFile, match="truncated"):
            open_audio(d / "data/audio/a.wav")
    finally:
        sf.SoundFile.read = read
    assert not n


def lasts(name: str, seconds: float):
    def check_length(d: Path, _) -> None:
        with open_audio(d / "data/audio" / name) as sound:
            assert abs(sound.frames / sound.samplerate - seconds) < 0.1
        assert abs(len(load_waveform(d / "data/audio" / name, RATE, 100.0)[0]) / RATE - seconds) < 0.1
    return check_length


def in_pcm(frame: bytes):
    """Frames that begin like this, 1536 bytes each, as the samples of a WAV."""
    body = np.random.default_rng(0).bytes(1536 - len(frame))
    samples = np.frombuffer((frame + body) * 40, "<i2").reshape(-1, 2)
    return lambda path: sf.write(path, samples, 48000, format="WAV")


def voc(*sizes: int):
    """The melody in 8 bits at 8 kHz, in blocks of these sizes, and the rest in a last one."""
    def make(path: Path) -> None:
        sound = np.rint(melody(8000) * 127 + 128).astype(np.uint8).tobytes()
        parts = [b"Creative Voice File\x1a\x1a\0\x0a\1\x29\x11"]
        for kind, size in zip((b"\1", *[b"\2"] * len(sizes)), (*sizes, len(sound))):
            head = b"\x83\0" if kind == b"\1" else b""
            part, sound = head + sound[:size], sound[size:]
            parts.append(kind + len(part).to_bytes(3, "little") + part)
        path.write_bytes(b"".join(parts) + b"\0")
    return make


def w64_as_ffmpeg_writes(path: Path) -> None:
    """Float samples in a W64 that names their codec at the end of an extensible format."""
    tail, sound = bytes.fromhex("f3acd3118cd100c04f8edb8a"), melody().astype("<f4").tobytes()
    form = struct.pack("<HHIIHHHHIH14s", 0xFFFE, 1, RATE, 4 * RATE, 4, 32, 22, 32, 4, 3,
                       bytes.fromhex("000000001000800000aa00389b71"))
    parts = b"wave" + tail + b"".join(name + tail + struct.pack("<Q", 24 + len(part)) + part
                                      for name, part in ((b"fmt ", form), (b"data", sound)))
    riff = bytes.fromhex("726966662e91cf11a5d628db04c10000")
    path.write_bytes(riff + struct.pack("<Q", 24 + len(parts)) + parts)


def no_opus_rate(content: bytearray) -> bytearray:
    """Ogg Opus that does not say at which rate it was recorded, with a right checksum."""
    at = content.index(b"OpusHead") + 12
    content[at:at + 4], content[22:26] = bytes(4), bytes(4)
    page = content[:27 + content[26] + sum(content[27:27 + content[26]])]
    content[22:26] = _crc(bytes(page), 0x04C1_1DB7, 32).to_bytes(4, "little")
    return content


def has_all_tones_of_opus(d: Path, _) -> None:
    with open_audio(d / "data/audio/a.opus") as sound:
        assert sound.samplerate == 48000
    plays("a.opus")(d, _)


def foreign(start: bytes):
    return lambda path: path.write_bytes(start + bytes(range(256)) * 20)


USED = "{d}/data: 4 rows (4 train, 0 val, 0 test), 0 unusable, 0 suspicious"
SOUNDS = [
    Case("silence", sound("a.wav", lambda p: sf.write(p, np.zeros(2 * RATE), RATE)), 0, "silent: 1"),
    Case("a header without samples", sound("a.wav", lambda p: noise(p, 0)), 2,
         "sound a.wav: zero length: a header without samples"),
    Case("a few samples", sound("a.wav", lambda p: noise(p, 0.01)), 2,
         "sound a.wav: 0.010 s long, expected at least 0.1 s"),
    Case("NaN samples", sound("a.wav", with_value(np.nan)), 2, "sound a.wav: holds NaN or infinite samples"),
    Case("infinite samples", sound("a.wav", with_value(-np.inf)), 2,
         "sound a.wav: holds NaN or infinite samples"),
    Case("truncated WAV", sound("a.wav", truncated(0.5)), 2, "sound a.wav: truncated: 79978 of 160000 bytes"),
    Case("truncated AIFF", sound("a.aiff", truncated(0.5)), 2,
         "sound a.aiff: truncated: 79981 of 160008 bytes"),
    Case("truncated FLAC", sound("a.flac", truncated(0.5)), 2, "sound a.flac: truncated"),
    Case("FLAC truncated after the part that is used",
         sound("a.flac", lambda p: (noise(p, 20.0), cut(p, 0.9))), 2, "sound a.flac: truncated"),
    Case("truncated Ogg", sound("a.ogg", truncated(0.8)), 2,
         "sound a.ogg: truncated: the last Ogg page is missing"),
    Case("truncated Opus", sound("a.opus", truncated(0.95, format="OGG", subtype="OPUS")), 2,
         "sound a.opus: truncated: the last Ogg page is missing"),
    Case("truncated MP3", sound("a.mp3", truncated(0.5)), 2, "sound a.mp3: truncated"),
    Case("a text file named .wav", sound("a.wav", lambda p: p.write_text("this is text, not sound " * 50)), 2,
         "sound a.wav: not a sound that libsndfile or FFmpeg reads"),
    Case("zero bytes as sound", sound("a.wav", lambda p: p.write_bytes(b"")), 2, "sound a.wav: zero bytes"),
    Case("a folder as sound", sound("a.wav", lambda p: p.mkdir()), 2,
         "sound a.wav: a folder, expected a file"),
    Case("a missing sound", sound("a.wav", lambda p: None), 2, "sound a.wav: no such file"),
    Case("a sampling rate of 10 Hz", sound("a.wav", lambda p: noise(p, 200.0, 10)), 2,
         "sound a.wav: sampling rate 10 Hz, expected 1000 to 768000"),
    *(Case(f"sound at {rate / 1000:g} kHz", sound("a.wav", sine(rate)), 0, USED, is_the_sine)
      for rate in (8000, 11025, 44100, 96000)),
    *(Case(f"sound in {name}", sound("a.wav", sine(44100, subtype)), 0, USED, is_the_sine)
      for name, subtype in (("8 bits", "PCM_U8"), ("24 bits", "PCM_24"), ("32 bits", "PCM_32"),
                            ("float64", "DOUBLE"))),
    Case("stereo", sound("a.wav", sine(44100, channels=2)), 0, USED, is_the_sine),
    Case("six channels", sound("a.wav", six_channels), 0, USED, is_the_mean),
    Case("stereo in opposite phase", sound("a.wav", opposite), 0, "cancelled by the mono mix: 1"),
    Case("clipped sound", sound("a.wav", clipped), 0, "clipped: 1"),
    Case("absurdly loud sound (1e300)", sound("a.wav", loud), 0, USED, is_scaled),
    Case("shorter than a second", sound("a.wav", lambda p: noise(p, 0.6)), 0, "shorter than a second: 1"),
    Case("a header that contradicts itself about the rate", sound("a.wav", wrong_rate), 0,
         "wrong rate claimed: 1"),
    Case("a three-hour file", sound("a.wav", three_hours), 0, "silent: 1", reads_ten_seconds),
    Case("GSM in a WAV, which cannot be sought",
         sound("a.wav", as_bytes(rate=8000, format="WAV", subtype="GSM610")), 0, USED, plays("a.wav")),
    Case("GSM in a WAV whose size is odd",
         sound("a.wav", as_bytes(gsm_of_odd_size, rate=8000, format="WAV", subtype="GSM610")), 0, USED,
         ends_without_noise),
    Case("FLAC cut out of a longer one without encoding it again",
         sound("a.flac", as_bytes(frames_of_flac(4, 40), format="FLAC")), 0,
         "its header says 192000 samples, its frames hold 147456; used up to there",
         plays("a.flac", 9.216, TONES[2:])),
    Case("the first seconds of a FLAC, not encoded again",
         sound("a.flac", as_bytes(frames_of_flac(0, 36), format="FLAC")), 0,
         "its header says 192000 samples, its frames hold 147456; used up to there", plays("a.flac", 9.216)),
    *(Case(f"an Opus whose first {0.5 * n} s lie before its time 0, cut without encoding it again",
           sound("a.opus", as_bytes(before_its_start(0.5 * n), rate=48000, format="OGG", subtype="OPUS")), 0,
           f"its first {0.5 * n:.2f} s lie before its time 0", plays("a.opus", 12 - 0.5 * n, TONES[n:]))
      for n in (1, 3)),
    Case("a FLAC cut within its header", sound("a.flac", as_bytes(lambda c: c[:60], format="FLAC")), 2,
         "sound a.flac: not a sound that libsndfile or FFmpeg reads (Error : unknown error in flac "
         "decoder.); if it plays elsewhere"),
    Case("FLAC behind an ID3v2 tag", sound("a.flac", as_bytes(behind_id3, format="FLAC")), 0, USED,
         plays("a.flac")),
    Case("MP3 of variable rate without its length", sound("a.mp3", in_two_parts("loud")), 0, USED,
         is_in_two_parts(slice(0, 5 * RATE))),
    Case("MP3 of variable rate without its length, quiet at first", sound("a.mp3", in_two_parts("quiet")), 0,
         USED, is_in_two_parts(slice(7 * RATE, 100 * RATE))),
    Case("two MP3s in one file",
         sound("a.mp3", as_bytes(lambda c: c + id3(500) + c, rate=44100, format="MP3")), 0, USED,
         plays("a.mp3", 24.1, TONES + TONES)),
    *(Case(f"{kind} in Ogg whose last page has no end mark",
           sound("a.ogg", as_bytes(no_end_mark, rate=48000, format="OGG", subtype=kind)), 0,
           "perhaps not whole: 1", plays("a.ogg")) for kind in ("VORBIS", "OPUS")),
    Case("a WAV whose recorder wrote no length",
         sound("a.wav", as_bytes(put(b"data", 4, ("<I", 0)), format="WAV")), 0,
         "its header has no length, as when a recorder is stopped", plays("a.wav")),
    Case("a WAV of three gigabytes cut to one", sound("a.wav", cut_gigabytes), 2,
         "sound a.wav: truncated: 999999956 of 3000000000 bytes", is_not_read),
    Case("chunks before and behind the sound",
         sound("a.wav", as_bytes(between_chunks, format="WAV")), 0, USED, plays("a.wav")),
    Case("an MP4 that is damaged", sound("a.m4a", foreign(b"\0\0\0 ftypM4A ")), 2,
         "sound a.m4a: truncated: 5132 of * bytes"),
    Case("a web page as sound", sound("a.mp3", foreign(b"<!DOCTYPE html>")), 2,
         "sound a.mp3: a web page; download it again"),
]
# Of the same kinds, in other containers. One process serves for all.
OTHER_SOUNDS = [
    Case("a Vorbis whose first 0.5 s lie before its time 0, cut without encoding it again",
         sound("a.ogg", as_bytes(before_its_start(0.5, RATE), format="OGG", subtype="VORBIS")), 0,
         "its first 0.5* s lie before its time 0", plays("a.ogg", 11.5, TONES[1:])),
    Case("an Opus whose packets go over the ends of its pages",
         sound("a.opus", as_bytes(in_full_pages, rate=48000, format="OGG", subtype="OPUS",
                                  compression_level=0.0)), 0, USED, plays("a.opus")),
    Case("an Opus with times of a clock, as browsers record",
         sound("a.opus", as_bytes(late_last_page, rate=48000, format="OGG", subtype="OPUS")), 2,
         "truncated, or the times in it are wrong: fewer than its * samples can be read; if it plays "
         "elsewhere convert it: ffmpeg -i a.opus a.flac"),
    Case("two FLACs joined without encoding them again",
         sound("a.flac", as_bytes(joined_flac, format="FLAC")), 0,
         "a second file begins behind its sound; it is not used", plays("a.flac")),
    Case("an MP3 beside its macOS sidecar", sound("a.mp3", beside_a_sidecar), 0, USED, plays("a.mp3")),
    Case("little-endian AU", sound("a.au", foreign(b"\0ds.")), 2, "not a file that FFmpeg reads"),
    Case("ADPCM whose byte rate is rounded", sound("a.wav", as_bytes(
        rounded_rate, rate=44100, format="WAV", subtype="MS_ADPCM")), 0, USED, plays("a.wav")),
    Case("an MP3 that has a transport stream's mark by chance",
         sound("a.mp3", as_bytes(lambda c: c[:188] + b"G@" + c[190:], rate=44100, format="MP3")), 0, USED,
         plays("a.mp3")),
    Case("Ogg with a hole between two pages",
         sound("a.ogg", as_bytes(hole_in_ogg, rate=48000, format="OGG")), 0,
         "100 bytes between its pages are no Ogg", plays("a.ogg")),
    Case("MP3 without its length, with 70,000 zeros in the middle",
         sound("a.mp3", as_bytes(lambda c: hole_in_mp3(without_first_frame(c)), rate=44100, format="MP3")), 0,
         "are no MPEG audio; used up to there"),
    *(Case(f"{kind} in {container}",
           sound("a.au", as_bytes(rate=rate, format=container, subtype=kind)), 0, USED, plays("a.au"))
      for container, kind, rate in (
          ("AIFF", "GSM610", 8000), ("W64", "GSM610", 8000), ("AU", "G721_32", 8000), ("AU", "G723_24", 8000),
          ("WAV", "NMS_ADPCM_32", 8000), ("XI", "DPCM_16", 44100))),
    *(Case(f"{name} behind an ID3v2 tag", sound("a.wav", as_bytes(behind_id3, format=name)), 0, USED,
           plays("a.wav")) for name in ("WAV", "AIFF", "OGG", "MP3")),
    Case("a piped FLAC", sound("a.flac", as_bytes(no_flac_length, format="FLAC")), 0,
         "its header has no length", plays("a.flac")),
    Case("a piped FLAC cut within a frame",
         sound("a.flac", as_bytes(lambda c: no_flac_length(c)[:-500], format="FLAC")), 0,
         "its header has no length", plays("a.flac", 11.78)),
    *(Case(f"MP3 at {rate} Hz without its length",
           sound("a.mp3", as_bytes(without_first_frame, rate=rate, format="MP3", bitrate_mode="VARIABLE")), 0,
           USED, plays("a.mp3")) for rate in (11025, 24000, 32000, 48000)),
    Case("MP3 of constant rate without its length",
         sound("a.mp3", as_bytes(without_first_frame, rate=44100, format="MP3", bitrate_mode="CONSTANT")), 0,
         USED, plays("a.mp3")),
    Case("an MP3 that begins within a frame",
         sound("a.mp3", as_bytes(lambda c: without_first_frame(c)[77:], rate=44100, format="MP3")), 0, USED,
         plays("a.mp3")),
    Case("MP3 whose last frame is cut",
         sound("a.mp3", as_bytes(lambda c: without_first_frame(c)[:-100], rate=44100, format="MP3")), 0,
         "its last frame is cut", plays("a.mp3")),
    Case("MP3 in which the sampling rate changes",
         sound("a.mp3", as_bytes(lambda c: c + encoded(24000, format="MP3"), rate=44100, format="MP3")), 0,
         "its sampling rate or channels change after frame", plays("a.mp3")),
    Case("MP3 in a WAV", sound("a.wav", mp3_in_wav), 0, USED, plays("a.wav")),
    Case("MPEG layer II of variable rate", sound("a.mp2", of_layer_2), 0, "silent", lasts("a.mp2", 12.0)),
    Case("Ogg that ends between two pages", sound("a.ogg", as_bytes(last_pages_gone, format="OGG")), 0,
         "its last Ogg page has no end mark", plays_to_its_last_page),
    Case("Ogg with a tag and zeros behind its last page",
         sound("a.ogg", as_bytes(lambda c: c + b"TAG" + bytes(2000), format="OGG")), 0, USED, plays("a.ogg")),
    Case("two Ogg streams in one file",
         sound("a.ogg", as_bytes(lambda c: c + encoded(format="OGG"), format="OGG")), 0,
         "a second Ogg stream follows", plays("a.ogg")),
    *(Case(f"{name} without a length", sound("a.wav", as_bytes(change, format=name)), 0,
           "its header has no length", plays("a.wav"))
      for name, change in (("WAVEX", put(b"data", 4, ("<I", 0))),
                           ("RF64", put(b"ds64", 8, *[("<Q", 0)] * 3, riff=False)),
                           ("W64", put(b"data", 16, ("<Q", 24), riff=False)),
                           ("AIFF", put(b"SSND", 4, (">I", 8))),
                           ("AU", put(b".snd", 8, (">I", 0), riff=False)),
                           ("CAF", put(b"data", 4, (">q", -1), riff=False)))),
    *(Case(f"a WAV that says {size:#x} bytes, as programs write to a pipe",
           sound("a.wav", as_bytes(put(b"data", 4, ("<I", size)), format="WAV")), 0,
           "its header has no length", plays("a.wav"))
      for size in (0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_FFDB)),
    Case("an AIFF that says 0x7f000008 bytes, as SoX writes to a pipe",
         sound("a.aiff", as_bytes(put(b"SSND", 4, (">I", 0x7F00_0008)), format="AIFF")), 0,
         "its header has no length", plays("a.aiff")),
    Case("a WAV with a size of 0 for the whole file",
         sound("a.wav", as_bytes(put(b"RIFF", 4, ("<I", 0)), format="WAV")), 0, USED, plays("a.wav")),
    Case("a WAV that counts its header as sound",
         sound("a.wav", as_bytes(put(b"data", 4, ("<I", 2 * 12 * RATE + 44)), format="WAV")), 0,
         "its header says 384044 bytes of sound, the file has 384000", plays("a.wav")),
    Case("a WAV with more behind the sound than it says",
         sound("a.wav", as_bytes(put(b"data", 4, ("<I", 12 * RATE)), format="WAV")), 0,
         "its header says 192000 bytes of sound; the 192000 behind them are not used", plays("a.wav", 6.0)),
    Case("two WAVs in one file", sound("a.wav", as_bytes(lambda c: c + c, format="WAV")), 0,
         "a second file begins behind its sound", plays("a.wav")),
    Case("an empty WAV with a tag behind it",
         sound("a.wav", as_bytes(lambda c: c + b"LIST\4\0\0\0INFO", sound=[], format="WAV")), 2,
         "zero length"),
    Case("a sound without a header, known by its name",
         sound("a.au", lambda p: p.write_bytes(bytes(16000))), 0, "its name makes it ULAW at 8000 Hz"),
    *(Case(f"truncated {name}", sound("a.wav", truncated(0.5, format=name)), 2, "truncated: *bytes")
      for name in ("RF64", "W64", "AU", "CAF")),
    *(Case(f"noise that begins like {name}", sound("a.bin", foreign(start)), 2, says)
      for name, start, says in (
          ("WebM", b"\x1aE\xdf\xa3", "truncated: 5124 of * bytes"),
          ("Windows Media", b"0&\xb2u\x8ef\xcf\x11", "not a file that FFmpeg reads"),
          ("AMR", b"#!AMR\n", "damaged: its sound at 0.1 s cannot be decoded"),
          ("AAC", b"\xff\xf1\x50\x80", "not a file that FFmpeg reads"),
          ("WavPack", b"wvpk", "not a file that FFmpeg reads"))),
    Case("a pointer of Git LFS", sound("a.wav", foreign(b"version https://git-lfs.github.com/spec/v1")), 2,
         "a pointer of Git LFS; run git lfs pull"),
    *(Case(f"{name} in a WAV, as if it were samples", sound("a.wav", in_pcm(frame)), 2,
           "coded surround sound (AC-3 or DTS), which FFmpeg does not find in it either")
      for name, frame in (("AC-3", b"\x0b\x77"), ("AC-3 from a digital cable", b"\x72\xf8\x1f\x4e"),
                          ("DTS", b"\x7f\xfe\x80\x01\xfc"), ("DTS of a CD", b"\xff\x1f\0\xe8\xf1\x07"))),
    Case("a WAV that has AC-3's mark by chance",
         sound("a.wav", as_bytes(lambda c: c[:44] + b"\x0b\x77" + c[46:], format="WAV")), 0, USED,
         plays("a.wav")),
    Case("two FLACs in one file", sound("a.flac", as_bytes(lambda c: c + c, format="FLAC")), 0,
         "a second file begins behind its sound; it is not used", plays("a.flac")),
    Case("two FLACs in one file, the first piped",
         sound("a.flac", as_bytes(
             lambda c: no_flac_length(c) + encoded(sound=melody()[:3 * RATE], format="FLAC"), format="FLAC")),
         0, "a second file begins behind its sound; it is not used", plays("a.flac")),
    Case("two AUs in one file", sound("a.au", as_bytes(lambda c: c + c, format="AU")), 0,
         "its header says 384000 bytes of sound; the 384024 behind them are not used", plays("a.au")),
    Case("VOC of one block", sound("a.voc", voc()), 0, USED, plays("a.voc")),
    Case("VOC of several blocks", sound("a.voc", voc(3000, 3000)), 0, USED, plays("a.voc")),
    *(Case(f"{kind} in {container}, which ends in a block",
           sound("a.bin", as_bytes(format=container, subtype=kind)), 0, USED, plays("a.bin"))
      for container, kind in (("SDS", "PCM_16"), ("SDS", "PCM_24"), ("PAF", "PCM_24"))),
    Case("W64 with a chunk behind its sound", sound("a.w64", as_bytes(
        lambda c: c + b"junk" + bytes.fromhex("f3acd3118cd100c04f8edb8a") + struct.pack("<Q", 100_024)
        + bytes(100_000), format="W64")), 0, USED, plays("a.w64")),
    Case("W64 with 100,000 zeros behind its sound",
         sound("a.w64", as_bytes(lambda c: c + bytes(100_000), format="W64")), 0,
         "its header says 384000 bytes of sound; the 100000 behind them are not used", plays("a.w64")),
    Case("W64 of floats in an extensible format", sound("a.w64", w64_as_ffmpeg_writes), 0, USED,
         plays("a.w64")),
    Case("Opus that says no rate", sound("a.opus", as_bytes(
        no_opus_rate, rate=48000, format="OGG", subtype="OPUS")), 0, USED, has_all_tones_of_opus),
    Case("ADPCM whose byte rate is a third", sound("a.wav", as_bytes(
        put(b"fmt ", 16, ("<I", 8000)), rate=44100, format="WAV", subtype="IMA_ADPCM")), 0, USED,
        plays("a.wav")),
    Case("text named .mp3", sound("a.mp3", lambda p: p.write_text("this is text " * 500)), 2,
         "not a sound that libsndfile or FFmpeg reads (Format not recognised.); if it plays elsewhere, save "
         "it there as FLAC"),
    *(Case(f"{name} as sound", sound("a.mp3", foreign(start)), 2, says) for name, start, says in (
        ("a web page behind empty lines", b"\xef\xbb\xbf\r\n <!DOCTYPE html>",
         "a web page; download it again"),
        ("JSON", b'{"error": 404}', "JSON, perhaps an error page; download it again"),
        ("XML", b"<Error><Code>AccessDenied", "XML, perhaps an error page; download it again"),
        ("a ZIP archive", b"PK\3\4", "a ZIP archive; unpack it"),
        ("gzip", b"\x1f\x8b\x08", "compressed with gzip; unpack it"),
        ("MIDI", b"MThd\0\0\0\6", "MIDI: notes, not a sound; render it with a synthesizer"))),
]


# --- pictures -----------------------------------------------------------------------------------------------

def values(d: Path, name: str, size: int = 96) -> np.ndarray:
    return np.rint((load_image(d / "data/images" / name, size).transpose(1, 2, 0) + 1) * 127.5)


RAMP = np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16)


def is_the_ramp(d: Path, _) -> None:
    np.testing.assert_allclose(values(d, "a.png")[..., 0], RAMP / 257, atol=0.51)


def is_white(d: Path, _) -> None:
    assert (values(d, "a.png") == 255).all()


def palette(path: Path) -> None:
    one = Image.new("P", (96, 96), 1)
    one.putpalette([255, 0, 0, 0, 255, 0])
    one.save(path, transparency=1)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(path, seed=5, exif=exif)


def is_upright(d: Path, _) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    np.testing.assert_array_equal(values(d, "a.png"), np.rot90(pixels, -1))


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (96, 96), color) for color in ("blue", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def all_are(name: str, colour: tuple) -> object:
    def check_colour(d: Path, _) -> None:
        assert np.abs(values(d, name) - colour).max() <= 1
    return check_colour


def bomb(path: Path) -> None:
    """A PNG whose header claims 30000 x 30000 pixels."""
    content = bytearray(picture(path).read_bytes())
    content[16:24] = struct.pack(">II", 30000, 30000)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def gray_tiff(bits: int, photometric: int):
    """A ramp from black on the left to white on the right, as scanners save it. photometric 0: 0 is white.
    """
    def make(path: Path) -> None:
        ramp = np.tile(np.rint(np.linspace(0, 2 ** bits - 1, 96)).astype(int), (96, 1))
        ramp = ramp if photometric else 2 ** bits - 1 - ramp
        if bits == 12:
            a, b = ramp[:, ::2], ramp[:, 1::2]
            data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
        else:
            data = ramp.astype("<u2").tobytes()
        tags = ((256, 96), (257, 96), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
                (278, 96), (279, len(data)))
        directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
                         + struct.pack("<H", len(tags)) + directory + bytes(4))
    return make


def is_a_ramp_of_gray(d: Path, _) -> None:
    expected = np.tile(np.linspace(0, 255, 96)[:, None], (96, 1, 3))
    assert np.abs(values(d, "a.tiff") - expected).max() < 1.5


def cut_picture(path: Path) -> None:
    picture(path)
    cut(path, 0.5)


def broken_avif(path: Path) -> None:
    """An AVIF with one byte inverted, so that Pillow's decoder raises a RuntimeError."""
    content = picture(path).read_bytes()
    for at in range(len(content)):
        changed = content[:at] + bytes([content[at] ^ 255]) + content[at + 1:]
        try:
            Image.open(io.BytesIO(changed)).load()
        except RuntimeError:
            return path.write_bytes(changed)
        except (OSError, SyntaxError, ValueError):
            pass
    raise AssertionError("no byte does it")


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def exif(*entries: bytes) -> bytes:
    """EXIF as it stands in a file, of entries that Pillow itself would not write."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURN = entry(0x0112, 3, 1, struct.pack("<H", 6))  # a quarter turn
FLOAT_MAKER = entry(0x010F, 11, 1, struct.pack("<f", 1.5))
XMP = b'<rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF>'


def top_is_red(path: Path, **options) -> Path:
    """A picture of 96x64, red on the left and blue on the right. Turned upright, red is on top."""
    one = Image.new("RGB", (96, 64), (0, 0, 255))
    one.paste((255, 0, 0), (0, 0, 48, 64))
    one.save(path, **options)
    return path


def is_red_above_blue(name: str, red=(255, 0, 0), blue=(0, 0, 255)):
    def check_turn(d: Path, _) -> None:
        pixels = values(d, name, 64)  # the middle square of 64x96 upright
        assert np.abs(pixels[4:28] - red).max() <= 3 and np.abs(pixels[36:60] - blue).max() <= 3
    return check_turn


def odd_tiff(path: Path) -> None:
    """A TIFF whose XMP is a tag of numbers and whose maker's tag has a type that no reader knows."""
    top_is_red(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    at = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[at:at + 2], "little")
    tags = [bytes(content[at + 2 + 12 * i:at + 14 + 12 * i]) for i in range(count)]
    tags += [TURN, entry(0x010F, 99, 1, b""), entry(700, 4, 2, struct.pack("<I", 8))]
    directory = struct.pack("<H", len(tags)) + b"".join(sorted(tags, key=lambda t: t[1::-1])) + bytes(4)
    content[4:8] = len(content).to_bytes(4, "little")
    path.write_bytes(content + directory)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def icc_tag(name: bytes, profile: bytes = SRGB) -> slice:
    """Where a tag's three numbers stand in an ICC profile."""
    at = profile.index(name)  # in the table of tags
    start = int.from_bytes(profile[at + 4:at + 8])
    return slice(start + 8, start + 20)


def with_colorants(*rows: bytes) -> bytes:
    profile = bytearray(SRGB)
    for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), rows):
        profile[icc_tag(name)] = row
    return bytes(profile)


EXCHANGED = with_colorants(SRGB[icc_tag(b"gXYZ")], SRGB[icc_tag(b"rXYZ")])
P3 = np.array([[.51512, .2412, -.00105], [.29198, .69225, .04189], [.1571, .06657, .78407]])  # XYZ under D50
DISPLAY_P3 = with_colorants(*(struct.pack(">3i", *(round(x * 65536) for x in row)) for row in P3))


def profile_of(space: bytes, kind: bytes, pcs: bytes, **tags: bytes) -> bytes:
    """A small ICC profile of version 2."""
    table, body = b"", b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), 132 + 12 * len(tags) + len(body), len(content))
        body += content
    white = struct.pack(">3i", *(round(x * 65536) for x in (.9642, 1, .8249)))
    size = 132 + len(table) + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s28x12s48x", size, 0x02400000, kind, space, pcs, b"acsp", white)
    return head + struct.pack(">I", len(tags)) + table + body


LINEAR_GRAY = profile_of(b"GRAY", b"mntr", b"XYZ ", wtpt=b"XYZ " + bytes(4) + struct.pack(
    ">3i", 63190, 65536, 54061), kTRC=b"curv" + bytes(8))
RAMP_8 = bytes(range(256))
# inks of which only cyan prints, and prints black: a table of 2 x 2 x 2 x 2 nodes in Lab
CYAN_IS_BLACK = profile_of(
    b"CMYK", b"prtr", b"Lab ", A2B0=b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9))) + RAMP_8 * 4
    + b"".join(bytes([255 * (node < 8), 128, 128]) for node in range(16)) + RAMP_8 * 3)


def plain(colour, mode: str = "RGB", **options):
    return lambda path: Image.new(mode, (96, 96), colour).save(path, **options)


def colours(path: Path) -> np.ndarray:
    """Colours inside sRGB and outside, in blocks that a JPEG keeps."""
    grid = np.random.default_rng(3).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pixels = grid.repeat(16, 0).repeat(16, 1)
    Image.fromarray(pixels).save(path, icc_profile=DISPLAY_P3)
    return pixels


def is_display_p3(d: Path, _) -> None:
    """The same by the two sets of colorants and sRGB's curve, without a colour management library."""
    coded = colours(d / "again.png") / 255
    linear = np.where(coded <= .04045, coded / 12.92, ((coded + .055) / 1.055) ** 2.4)
    srgb = np.array([[.43607, .22249, .01392], [.38515, .71687, .09708], [.14307, .06061, .7141]])
    linear = np.clip(linear @ P3 @ np.linalg.inv(srgb), 0, 1)
    coded = np.where(linear <= .0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - .055)
    assert np.abs(values(d, "a.png") - coded * 255).max() <= 2


def is_the_noise(name: str):
    """The pixels of picture(seed=5), whatever stands beside them in the file."""
    def check_pixels(d: Path, _) -> None:
        pixels = np.random.default_rng(5).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        assert np.abs(values(d, name) - pixels).max() <= 1
    return check_pixels


def png_with(name: bytes, body: bytes, right=True, at: int = 33):
    """A PNG with one chunk more, whose checksum is right or not; at=-12 puts it behind the pixels."""
    def make(path: Path) -> None:
        content = picture(path, seed=5).read_bytes()
        checksum = zlib.crc32(name + body) ^ (not right)
        chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)
        path.write_bytes(content[:at] + chunk + content[at:])
    return make


def jpeg_with(kind: int, body: bytes, **options):
    """A JPEG with one segment more at its start."""
    def make(path: Path) -> None:
        content = top_is_red(path, quality=95, **options).read_bytes()
        path.write_bytes(content[:2] + bytes([255, kind]) + struct.pack(">H", len(body) + 2) + body
                         + content[2:])
    return make


def is_red_beside_blue(name: str):
    def check_sides(d: Path, _) -> None:
        pixels = values(d, name, 64)
        assert np.abs(pixels[:, :28] - (255, 0, 0)).max() <= 3
        assert np.abs(pixels[:, 36:] - (0, 0, 255)).max() <= 3
    return check_sides


def two_frames(form: str):
    def make(path: Path) -> None:
        more = [Image.new("RGB", (96, 96), "lime")]
        Image.new("RGB", (96, 96), "blue").save(path, form, save_all=True, append_images=more, lossless=True)
    return make


def tail(path: Path) -> None:
    """A phone's moving photo, and what a web server has put behind a picture."""
    top_is_red(path, exif=exif(TURN), quality=95)
    path.write_bytes(path.read_bytes() + b"\0\0\0\x18ftypmp42" + bytes(5000) + b"<html>")


def lab(path: Path) -> None:
    source, target = map(ImageCms.createProfile, ("sRGB", "LAB"))
    transform = ImageCms.buildTransform(source, target, "RGB", "LAB")
    transform.apply(Image.new("RGB", (96, 96), (200, 60, 30))).save(path)


BOMB = b"Comment\0\0" + zlib.compress(bytes(80_000_000))
ODD_PICTURES = [
    Case("gray TIFF of 12 bits", image("a.tiff", gray_tiff(12, 1)), 0, USED, is_a_ramp_of_gray),
    Case("gray TIFF of 16 bits in which 0 is white", image("a.tiff", gray_tiff(16, 0)), 0, USED,
         is_a_ramp_of_gray),
    Case("HEIC named .jpg", image("a.jpg", lambda p: p.write_bytes(b"\0\0\0$ftypheic" + bytes(500))), 2,
         "picture a.jpg: not a picture that Pillow reads: HEIC, as iPhones write it; convert it to PNG: "),
    Case("a video named .jpg", image("a.jpg", lambda p: p.write_bytes(b"\0\0\0$ftypisom" + bytes(500))), 2,
         "picture a.jpg: not a picture that Pillow reads: a video, MP4"),
    Case("a pointer of Git LFS as picture",
         image("a.png", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n")), 2,
         "picture a.png: not a picture that Pillow reads: a pointer of Git LFS; run git lfs pull"),
    Case("EXIF with a maker's tag of type FLOAT beside orientation 6", image("a.jpg", lambda p: top_is_red(
        p, exif=exif(FLOAT_MAKER, TURN), quality=95)), 0, USED, is_red_above_blue("a.jpg")),
    Case("EXIF that is no EXIF", image("a.jpg", jpeg_with(0xE1, b"Exif\0\0" + b"\xff" * 30)), 0, USED,
         is_red_beside_blue("a.jpg")),
    Case("an orientation that is text", image("a.jpg", lambda p: top_is_red(
        p, exif=exif(entry(0x0112, 2, 3, b"6a")), quality=95)), 0, USED, is_red_beside_blue("a.jpg")),
    Case("an orientation of 0", image("a.jpg", lambda p: top_is_red(
        p, exif=exif(entry(0x0112, 3, 1, bytes(2))), quality=95)), 0, USED, is_red_beside_blue("a.jpg")),
    Case("an EXIF pointer out of the file", image("a.webp", lambda p: top_is_red(p, lossless=True, exif=exif(
        TURN, entry(0x8769, 4, 1, b"\xff\xff\xff\x7f")))), 0, USED, is_red_above_blue("a.webp")),
    Case("orientation in XMP alone, WebP", image("a.webp", lambda p: top_is_red(p, lossless=True, xmp=XMP)),
         0, USED, is_red_above_blue("a.webp")),
    Case("orientation in XMP alone, JPEG", image("a.jpg", lambda p: top_is_red(p, quality=95, xmp=XMP)), 0,
         USED, is_red_above_blue("a.jpg")),
    Case("orientation in a PNG's EXIF", image("a.png", lambda p: top_is_red(p, exif=exif(FLOAT_MAKER, TURN))),
         0, USED, is_red_above_blue("a.png")),
    Case("a TIFF with odd tags and an orientation", image("a.tiff", odd_tiff), 0, USED,
         is_red_above_blue("a.tiff")),
    Case("a JPEG with a torn Photoshop segment", image("a.jpg", jpeg_with(
        0xED, b"Photoshop 3.0\x008BIM\x04\x04", exif=exif(TURN))), 0, USED, is_red_above_blue("a.jpg")),
    Case("a JPEG with an empty profile segment", image("a.jpg", jpeg_with(
        0xE2, b"ICC_PROFILE\0", exif=exif(TURN))), 0, USED, is_red_above_blue("a.jpg")),
    Case("a JPEG whose list of pictures is torn", image("a.jpg", jpeg_with(0xE2, b"MPF\0II*\0\x08")), 0, USED,
         is_red_beside_blue("a.jpg")),
    Case("a phone's picture with a second one in it (MPO)", image("a.jpg", lambda p: top_is_red(
        p, format="MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))], exif=exif(TURN),
        quality=95)), 0, USED, is_red_above_blue("a.jpg")),
    Case("a whole JPEG with other bytes behind it", image("a.jpg", tail), 0, USED,
         is_red_above_blue("a.jpg")),
    Case("a profile with red and green exchanged", image("a.png", plain((255, 0, 0), icc_profile=EXCHANGED)),
         0, USED, all_are("a.png", (0, 255, 0))),
    Case("the same in a JPEG", image("a.jpg", plain((254, 0, 0), icc_profile=EXCHANGED, quality=95)), 0, USED,
         all_are("a.jpg", (0, 254, 0))),
    Case("the same in a palette", image("a.png", lambda p: Image.new("RGB", (96, 96), "red").quantize(4).save(
        p, icc_profile=EXCHANGED)), 0, USED, all_are("a.png", (0, 255, 0))),
    Case("the same beside alpha", image("a.png", plain((255, 0, 0, 128), "RGBA", icc_profile=EXCHANGED)), 0,
         USED, all_are("a.png", (127, 255, 127))),
    Case("the same, turned", image("a.jpg", lambda p: top_is_red(
        p, exif=exif(FLOAT_MAKER, TURN), icc_profile=EXCHANGED, quality=95)), 0, USED,
         is_red_above_blue("a.jpg", red=(0, 255, 0))),
    Case("a profile of sRGB", image("a.png", lambda p: picture(p, seed=5, icc_profile=SRGB)), 0, USED,
         is_the_noise("a.png")),
    Case("a picture in Display P3", image("a.png", colours), 0, USED, is_display_p3),
    Case("a gray picture with a linear profile", image("a.jpg", plain(128, "L", icc_profile=LINEAR_GRAY)), 0,
         USED, all_are("a.jpg", (188, 188, 188))),
    Case("the same with alpha", image("a.png", plain((128, 255), "LA", icc_profile=LINEAR_GRAY)), 0, USED,
         all_are("a.png", (188, 188, 188))),
    Case("16-bit gray with a transparent level", image("a.png", lambda p: Image.fromarray(
        np.full((96, 96), 1000, np.uint16)).save(p, transparency=1000)), 0, USED, is_white),
    Case("CMYK by its profile", image("a.jpg", plain((255, 0, 0, 0), "CMYK", icc_profile=CYAN_IS_BLACK)), 0,
         USED, all_are("a.jpg", (0, 0, 0))),
    Case("CMYK by its profile, other inks", image("a.tiff", plain(
        (0, 255, 255, 0), "CMYK", icc_profile=CYAN_IS_BLACK)), 0, USED, all_are("a.tiff", (255, 255, 255))),
    Case("CMYK in a JPEG, as Adobe inverts it", image("a.jpg", plain((0, 255, 255, 0), "CMYK", quality=95)),
         0, USED, all_are("a.jpg", (255, 0, 0))),
    Case("a picture in Lab", image("a.tiff", lab), 0, USED, all_are("a.tiff", (200, 60, 30))),
    Case("a broken profile", image("a.png", lambda p: picture(p, seed=5, icc_profile=SRGB[:200])), 0, USED,
         is_the_noise("a.png")),
    Case("a profile that is no profile", image("a.png", lambda p: picture(p, seed=5, icc_profile=b"sRGB")), 0,
         USED, is_the_noise("a.png")),
    Case("a CMYK profile in an RGB picture", image("a.png", lambda p: picture(
        p, seed=5, icc_profile=CYAN_IS_BLACK)), 0, USED, is_the_noise("a.png")),
    Case("an RGB profile in a gray picture", image("a.png", plain(77, "L", icc_profile=EXCHANGED)), 0, USED,
         all_are("a.png", (77, 77, 77))),
    Case("a PNG text that unpacks to 80 MB", image("a.png", png_with(b"zTXt", BOMB)), 0, USED,
         is_the_noise("a.png")),
    Case("the same behind the pixels", image("a.png", png_with(b"zTXt", BOMB, at=-12)), 0, USED,
         is_the_noise("a.png")),
    Case("a PNG profile that unpacks to 80 MB", image("a.png", png_with(b"iCCP", BOMB)), 0, USED,
         is_the_noise("a.png")),
    Case("a PNG profile packed in an unknown way", image("a.png", png_with(b"iCCP", b"x\0\x07abc")), 0, USED,
         is_the_noise("a.png")),
    Case("a PNG text with a wrong checksum", image("a.png", png_with(b"tEXt", b"a\0b", right=False)), 0, USED,
         is_the_noise("a.png")),
    Case("a PNG's EXIF that is no EXIF", image("a.png", png_with(b"eXIf", b"\xff" * 9)), 0, USED,
         is_the_noise("a.png")),
    Case("a PNG resolution of three bytes", image("a.png", png_with(b"pHYs", b"abc")), 0, USED,
         is_the_noise("a.png")),
    Case("an animated WebP", image("a.webp", two_frames("WEBP")), 0, USED, all_are("a.webp", (0, 0, 255))),
    Case("an animated PNG", image("a.png", two_frames("PNG")), 0, USED, all_are("a.png", (0, 0, 255))),
    Case("a progressive JPEG", image("a.jpg", lambda p: top_is_red(p, progressive=True, quality=95)), 0, USED,
         is_red_beside_blue("a.jpg")),
]


def small_in_gif(path: Path) -> None:
    """A GIF of 96x96 whose only frame of 48x48 lies in its middle."""
    file = io.BytesIO()
    Image.new("P", (48, 48), 0).save(file, "GIF")
    content = bytearray(file.getvalue())
    at = content.index(b"\x2c\0\0\0\0\x30\0\x30\0")
    content[6:10] = content[at + 1:at + 5] = struct.pack("<HH", 96, 96)
    content[at + 1:at + 5] = struct.pack("<HH", 24, 24)
    path.write_bytes(content)


def is_black_on_white(d: Path, _) -> None:
    pixels = values(d, "a.gif")
    assert (pixels[24:72, 24:72] == 0).all() and pixels.sum() == 255 * 3 * (96 * 96 - 48 * 48)


def deep_jpeg_2000(path: Path) -> None:
    """The header of a picture of 16 bits a colour, before the data of one of 8 bits."""
    content = bytearray(picture(path).read_bytes())
    at = content.index(b"\xff\x4f\xff\x51") + 42
    content[at] = content[at + 3] = content[at + 6] = 15
    path.write_bytes(content)


def zeros_from_half(path: Path) -> None:
    content = picture(path, seed=5).read_bytes()
    path.write_bytes(content[:len(content) // 2] + bytes(len(content)))


def preview(path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    picture(path, format="TIFF", tiffinfo=tags)


OTHER_PICTURES = [
    *(Case(f"a {kind} JPEG of which the last {n} bytes are missing, its end mark", image(
        "a.jpg", lambda p, n=n, kind=kind: top_is_red(p, quality=95, progressive=kind == "progressive")
        and p.write_bytes(p.read_bytes()[:-n])), 0, USED, is_red_beside_blue("a.jpg"))
      for kind in ("plain", "progressive") for n in (1, 2)),
    Case("a JPEG of which a little more than its end mark is missing", image(
        "a.jpg", lambda p: (picture(p), p.write_bytes(p.read_bytes()[:-9]))), 2,
         "truncated or damaged picture"),
    Case("EPS as picture", image("a.eps", plain("red")), 2, "EPS, a drawing, not pixels; save it as PNG"),
    Case("XBM, in which 1 is ink", image("a.xbm", lambda p: Image.new("1", (96, 96), 1).save(p)), 0, USED,
         all_are("a.xbm", (0, 0, 0))),
    Case("GIF whose first frame is smaller than the picture", image("a.gif", small_in_gif), 0, USED,
         is_black_on_white),
    Case("JPEG 2000 of 8 bits", image("a.jp2", lambda p: picture(p, seed=5)), 0, USED, is_the_noise("a.jp2")),
    Case("JPEG 2000 of 16 bits a colour", image("a.jp2", deep_jpeg_2000), 2,
         "JPEG 2000 of more than 8 bits a colour, in which Pillow makes white black; save it as PNG"),
    Case("a JPEG whose second half is zeros", image("a.jpg", zeros_from_half), 2,
         "truncated: only zeros behind * bytes, as a broken download leaves them"),
    Case("a whole JPEG with zeros behind it", image("a.jpg", lambda p: top_is_red(p, quality=95) and
         p.write_bytes(p.read_bytes() + bytes(5000))), 0, USED, is_red_beside_blue("a.jpg")),
    Case("a camera's raw picture", image("a.dng", preview), 2,
         "a camera's raw picture, of which only a preview can be read; develop it and save it as JPEG"),
    Case("a TIFF that is cut before its directory",
         image("a.tiff", foreign(struct.pack("<2sHI", b"II", 42, 1 << 20))), 2,
         "a TIFF with other pixels, or cut; save it as RGB or gray with 8 or 16 bits"),
    Case("a picture of a format that nobody knows", image("a.x", foreign(b"\xabcd")), 2,
         "not a picture that Pillow reads; if it is one convert it to PNG: convert a.x a.png"),
    Case("JPEG XL named .png", image("a.png", foreign(b"\xff\x0a")), 2,
         "JPEG XL; convert it to PNG: djxl a.png a-2.png"),
    Case("SVG behind an XML header", image("a.svg", foreign(b'<?xml version="1.0"?><svg>')), 2,
         "SVG; convert it to PNG: convert a.svg a.png"),
]
PICTURES = [
    Case("16-bit gray picture", image("a.png", lambda p: Image.fromarray(RAMP).save(p)), 0, USED,
         is_the_ramp),
    Case("CMYK picture", image("a.tiff", lambda p: Image.new("CMYK", (96, 96), (0, 255, 255, 0)).save(p)), 0,
         USED, all_are("a.tiff", (255, 0, 0))),
    Case("palette with a hidden colour", image("a.png", palette), 0, USED, is_white),
    Case("transparent picture", image("a.png", lambda p: Image.new("RGBA", (96, 96), (255, 0, 0, 0)).save(p)),
         0, USED, is_white),
    Case("EXIF rotation", image("a.png", turned), 0, USED, is_upright),
    Case("animated picture", image("a.gif", animated), 0, USED, all_are("a.gif", (0, 0, 255))),
    Case("truncated PNG", image("a.png", cut_picture), 2, "picture a.png: truncated or damaged picture"),
    Case("truncated JPEG", image("a.jpg", cut_picture), 2, "picture a.jpg: truncated or damaged picture"),
    Case("a damaged AVIF", image("a.avif", broken_avif), 2, "picture a.avif: "),
    Case("zero bytes as picture", image("a.png", lambda p: p.write_bytes(b"")), 2,
         "picture a.png: zero bytes"),
    Case("a web page named .png", image("a.png", lambda p: p.write_text("<html>not found</html>")), 2,
         "picture a.png: not a picture that Pillow reads"),
    Case("a folder as picture", image("a.png", lambda p: p.mkdir()), 2,
         "picture a.png: a folder, expected a file"),
    Case("a missing picture", image("a.png", lambda p: None), 2, "picture a.png: no such file"),
    Case("a picture of 1x1", image("a.png", lambda p: picture(p, (1, 1))), 2,
         "picture a.png: 1x1 pixels, expected sides of at least 8"),
    Case("an extreme shape", image("a.png", lambda p: picture(p, (900, 90))), 2,
         "picture a.png: 900x90 pixels, expected a shape of at most 8:1"),
    Case("a decompression bomb", image("a.png", bomb), 2,
         "picture a.png: not a picture that Pillow reads (Image size (900000000 pixels) exceeds limit"),
    Case("floating-point pixels", image("a.tiff", lambda p: Image.new("F", (96, 96)).save(p)), 2,
         "picture a.tiff: floating-point pixels have no known white"),
    Case("a tiny picture", image("a.png", lambda p: picture(p, (32, 32))), 0, "tiny picture: 1"),
    Case("a long picture", image("a.png", lambda p: picture(p, (400, 100))), 0, "extreme picture: 1"),
]


# --- manifests ----------------------------------------------------------------------------------------------

def change(i: int, **values):
    def apply(root: Path, rows: list[dict]) -> None:
        rows[i] |= values
    return apply


def link_out(root: Path, rows: list[dict]) -> None:
    noise(root.parent / "outside.wav")
    (root / "audio/leak.wav").symlink_to(root.parent / "outside.wav")
    rows[1]["audio_file_name"] = "audio/leak.wav"


def circle(root: Path, rows: list[dict]) -> None:
    (root / "audio/ring.wav").symlink_to(root / "audio/ring.wav")
    rows[1]["audio_file_name"] = "audio/ring.wav"


def renamed(name: str, written: str):
    """Row 2's sound has the name `name` on the disk and `written` in the manifest."""
    def apply(root: Path, rows: list[dict]) -> None:
        (root / "audio/1.wav").rename(root / "audio" / name)
        rows[1]["audio_file_name"] = f"audio/{written}"
    return apply


def copied(kind: str, **values):
    def apply(root: Path, rows: list[dict]) -> None:
        name = {"audio": "wav", "images": "png"}[kind]
        shutil.copy(root / f"{kind}/0.{name}", root / f"{kind}/1.{name}")
        rows[1] |= values
    return apply


def founding(root: Path, rows: list[dict]) -> bool:
    (root / "train_metadata.json").write_text("[{")
    return False


def every(key: str, value) -> object:
    """value(name) in the place of every row's name."""
    def apply(root: Path, rows: list[dict]) -> None:
        for r in rows:
            r[key] = value(r[key])
    return apply


def as_file(name: str, content) -> object:
    """content(rows), bytes or text, as the data folder's only manifest."""
    def apply(root: Path, rows: list[dict]) -> bool:
        found = content(rows)
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(found if isinstance(found, bytes) else found.encode())
        return False
    return apply


def table(rows: list[dict], separator: str = ",", names: dict | None = None) -> str:
    """The rows as CSV, its columns called `names`."""
    file, keys = io.StringIO(), [*rows[0]]
    writer = csv.writer(file, delimiter=separator)
    writer.writerow([(names or {}).get(key, key) for key in keys])
    writer.writerows([[r[key] for key in keys] for r in rows])
    return file.getvalue()


def two_lines(rows: list[dict]) -> str:
    return table([r | {"text": f'one\nscene, "{i}"'} for i, r in enumerate(rows)])


def in_splits(**counts: int) -> object:
    """The first rows in the splits that are named, as many as said."""
    def apply(root: Path, rows: list[dict]) -> None:
        for r, split in zip(rows, [split for split, n in counts.items() for _ in range(n)], strict=True):
            r["split"] = split
    return apply


def one_sound(split: str) -> object:
    def apply(root: Path, rows: list[dict]) -> None:
        in_splits(train=2, val=2)(root, rows)
        same = [r for r in rows if r["split"] == split]
        same[1]["audio_file_name"] = same[0]["audio_file_name"]
    return apply


HUB = {"image_file_name": "image", "audio_file_name": "file_name", "text": "transcription",
       "label": "category"}


def hub_folders(root: Path, rows: list[dict]) -> bool:
    """Hugging Face's layout: a metadata file in each split's folder, with names relative to it."""
    for r, name in zip(rows, ("train/metadata.jsonl",) * 2 + ("validation/metadata.csv", "test/metadata.csv"),
                       strict=True):
        place = root / name
        (place.parent / "data").mkdir(parents=True, exist_ok=True)
        moved = {HUB[key]: f"data/{Path(r[key]).name}" for key in ("image_file_name", "audio_file_name")}
        for key in ("image_file_name", "audio_file_name"):
            (root / r[key]).rename(place.parent / "data" / Path(r[key]).name)
        item = moved | {"transcription": r["text"], "category": 7}
        with place.open("a") as file:
            file.write(json.dumps(item) + "\n" if name.endswith("l") else table([item]))
    return False


def rows_are(*expected) -> object:
    """Each row as (image, audio, text, label, split), by value."""
    def check_rows(d: Path, _) -> None:
        found = [(r.image, r.audio, r.text, r.label, r.split) for r in read_manifest(d / "data")[0]]
        assert found == [*expected]
    return check_rows


FOUR = rows_are(*((f"images/{i}.png", f"audio/{i}.wav", f"scene {i}", "thing", "train") for i in range(4)))
WORDS = "a red dog and a blue cat sit in the rain below an old tree while it rains and rains and rains again"
MANIFESTS = [
    # a file of another kind: one sentence, not one a row
    Case("a manifest in UTF-16", manifest(lambda root, rows: lines(rows).decode().encode("utf-16")), 2,
         "error: {d}/data/metadata.jsonl: is text in UTF-16 or UTF-32, expected UTF-8"),
    Case("a manifest in UTF-16 without a byte order mark",
         manifest(lambda root, rows: lines(rows).decode().encode("utf-16-le")), 2,
         "error: {d}/data/metadata.jsonl: is text in UTF-16 or UTF-32, expected UTF-8"),
    Case("a CSV manifest in UTF-16",
         manifest(as_file("metadata.csv", lambda r: table(r).encode("utf-16"))), 2,
         "error: {d}/data/metadata.csv: is text in UTF-16 or UTF-32, expected UTF-8"),
    Case("a CSV manifest in another encoding",
         manifest(as_file("metadata.csv", lambda r: table(r).replace("thing", "개").encode("cp949"))), 2,
         "error: {d}/data/metadata.csv: is not UTF-8 text (byte 0xb0)"),
    Case("a JSON list as manifest", manifest(lambda root, rows: json.dumps(rows).encode()), 2,
         "error: {d}/data/metadata.jsonl: holds a JSON list, expected one object a line"),
    Case("a JSON list over many lines", manifest(lambda root, rows: json.dumps(rows, indent=1).encode()), 2,
         "error: {d}/data/metadata.jsonl: holds a JSON list, expected one object a line"),
    Case("JSON objects over many lines", manifest(lambda root, rows: b"\n".join(
        json.dumps(r, indent=2).encode() for r in rows)), 2,
         "error: {d}/data/metadata.jsonl: holds JSON objects that go over several lines"),
    Case("a manifest in gzip", manifest(lambda root, rows: gzip.compress(lines(rows))), 2,
         "error: {d}/data/metadata.jsonl: is compressed with gzip"),
    Case("an Excel table named .csv", manifest(as_file("metadata.csv", lambda r: b"PK\x03\x04" + bytes(99))),
         2, "error: {d}/data/metadata.csv: is a ZIP archive or an Excel table (.xlsx)"),
    Case("a Parquet table named .csv", manifest(as_file("metadata.csv", lambda r: b"PAR1" + bytes(99))), 2,
         "error: {d}/data/metadata.csv: is a Parquet table"),
    Case("a pointer of Git LFS as manifest",
         manifest(lambda root, rows: b"version https://git-lfs.github.com/spec/v1\nsize 9\n"), 2,
         "error: {d}/data/metadata.jsonl: is a pointer of Git LFS"),
    Case("a web page as manifest", manifest(lambda root, rows: b"<!DOCTYPE html><html>sign in</html>"), 2,
         "error: {d}/data/metadata.jsonl: is a web page or XML"),
    Case("CSV named .jsonl", manifest(lambda root, rows: table(rows).encode()), 2,
         "error: {d}/data/metadata.jsonl: holds CSV, expected JSON lines; rename it to metadata.csv"),
    Case("JSON lines named .csv", manifest(as_file("metadata.csv", lines)), 2,
         "error: {d}/data/metadata.csv: holds JSON, expected CSV with a header; rename it"),
    Case("lines that end with CR alone", manifest(lambda root, rows: lines(rows).replace(b"\n", b"\r")), 2,
         "error: {d}/data/metadata.jsonl: its lines end with CR alone"),
    Case("a manifest of another letter case", manifest(as_file("Metadata.JSONL", lines)), 2,
         "error: {d}/data: no metadata.jsonl in this folder, and no metadata.csv; Metadata.JSONL is none of"),
    Case("a manifest one folder below", manifest(as_file("set/metadata.csv", table)), 2,
         "error: {d}/data: no metadata.jsonl in this folder, and no metadata.csv; set/metadata.csv is none"),
    Case("a CSV quote that is not closed",
         manifest(as_file("metadata.csv", lambda r: table(r).replace("scene 1", '"scene 1'))), 2,
         "error: {d}/data/metadata.csv: line 3 or after it: not valid CSV (unexpected end of data)"),
    Case("CSV without a header that is known",
         manifest(as_file("metadata.csv", lambda r: table(r).split("\r\n", 1)[1])), 2,
         "error: {d}/data/metadata.csv: line 1 names no column that is known"),
    Case("a CSV column twice",
         manifest(as_file("metadata.csv", lambda r: table(r, names={"label": "text"}))), 2,
         "error: {d}/data/metadata.csv: the column 'text' stands twice in the header"),
    # every row for one cause
    Case("backslashes in every name", manifest(every("audio_file_name", lambda n: n.replace("/", "\\"))), 2,
         "error: {d}/data: no row of the manifest can be used (4, all for one cause); metadata.jsonl line 1: "
         "audio_file_name: * is written with backslashes"),
    Case("another letter case in every name", manifest(every("image_file_name", str.upper)), 2,
         "error: {d}/data: no row of the manifest can be used (4, all for one cause); metadata.jsonl line 1: "
         "image_file_name: no file is called 'IMAGES/0.PNG', but 'images/0.png' is there"),
    Case("web addresses as names", manifest(every("audio_file_name", lambda n: f"https://a.org/{n}")), 2,
         "(4, all for one cause); * audio_file_name: 'https://a.org/audio/0.wav' is a web address"),
    Case("spaces around every name", manifest(every("audio_file_name", lambda n: f" {n}")), 2,
         "(4, all for one cause); * audio_file_name: ' audio/0.wav' begins or ends with a space"),
    Case("names relative to another folder", manifest(every("audio_file_name", lambda n: f"data/{n}")), 2,
         "error: {d}/data: none of the 4 sounds that the manifest names is there; the first is "
         "{d}/data/data/audio/0.wav of metadata.jsonl line 1"),
    Case("no column of the sound",
         manifest(lambda root, rows: [r.pop("audio_file_name") for r in rows] and None), 2,
         "(4, all for one cause); metadata.jsonl line 1: the key audio_file_name is missing (also read: "),
    # one row
    Case("another letter case in one name", manifest(change(1, audio_file_name="Audio/1.WAV")), 2,
         "metadata.jsonl line 2: audio_file_name: no file is called 'Audio/1.WAV', but 'audio/1.wav' is"),
    Case("two columns of one meaning that differ", manifest(change(1, caption="another")), 2,
         "metadata.jsonl line 2: the columns text and caption are read as one and differ ('scene 1' and "),
    Case("a key twice in a row",
         manifest(lambda root, rows: lines(rows).replace(b'"scene 1"', b'"scene 1", "text": "b"')), 2,
         "metadata.jsonl line 2: the key 'text' stands twice"),
    Case("a CSV row with a cell too many",
         manifest(as_file("metadata.csv", lambda r: table(r).replace("scene 1", "one, scene"))), 2,
         "metadata.csv line 3: has 6 cells, the header has 5; quote cells that hold ','"),
    Case("a file_name that may be either",
         manifest(lambda root, rows: rows[1].update(file_name="audio/1.dat") or None), 2,
         "metadata.jsonl line 2: file_name: 'audio/1.dat' shows by no suffix whether it is a picture or"),
    Case("a split that contradicts its folder", manifest(as_file("train/metadata.jsonl", lambda r: lines(
        [one | {"split": "val"} for one in r[:1]] + r[1:]))), 2,
         "train/metadata.jsonl line 1: split: got 'val', but its file is of split train"),
    Case("a column that nothing reads", manifest(lambda root, rows: rows[1].update(lable="x") or None), 0,
         "columns of the manifest that nothing reads: 'lable' (did you mean 'label'?)"),
    Case("both manifests", manifest(lambda root, rows: as_file("metadata.csv", table)(root, rows) or None), 0,
         "{d}/data: metadata.jsonl is read, metadata.csv is not", FOUR),
    # simply read
    Case("a CSV manifest", manifest(as_file("metadata.csv", table)), 0, USED, FOUR),
    Case("CSV with semicolons and a byte order mark",
         manifest(as_file("metadata.csv", lambda r: "\ufeff" + table(r, ";"))), 0, USED, FOUR),
    Case("CSV with tabs", manifest(as_file("metadata.csv", lambda r: table(r, "\t"))), 0, USED, FOUR),
    Case("CSV with a newline in a cell", manifest(as_file("metadata.csv", two_lines)), 0, USED,
         rows_are(*((f"images/{i}.png", f"audio/{i}.wav", f'one\nscene, "{i}"', "thing", "train")
                    for i in range(4)))),
    Case("CSV as Excel saves it", manifest(as_file("metadata.csv", lambda r: "sep=;\r\n" + table(r, ";"))), 0,
         USED, FOUR),
    Case("Hugging Face's column names", manifest(as_file("metadata.csv", lambda r: table(r, names=HUB))), 0,
         USED, FOUR),
    Case("Hugging Face's folders", manifest(hub_folders), 0,
         "{d}/data: 4 rows (2 train, 1 val, 1 test), 0 unusable, 0 suspicious",
         rows_are(("train/data/0.png", "train/data/0.wav", "scene 0", "7", "train"),
                  ("train/data/1.png", "train/data/1.wav", "scene 1", "7", "train"),
                  ("validation/data/2.png", "validation/data/2.wav", "scene 2", "7", "val"),
                  ("test/data/3.png", "test/data/3.wav", "scene 3", "7", "test"))),
    # too little to train from
    Case("no validation row", manifest(lambda root, rows: None, "train", "val"), 2,
         "error: {d}/data: 4 rows (4 train, 0 val, 0 test), *; split 'val' has no row (4 train, 0 val, 0 t"),
    Case("no training row", manifest(in_splits(test=2, val=2), "train", "val"), 2,
         "split 'train' has no row (0 train, 2 val, 2 test)"),
    Case("a folder for testing alone", manifest(in_splits(test=4), "test"), 0,
         "{d}/data: 4 rows (0 train, 0 val, 4 test), 0 unusable, 0 suspicious"),
    Case("one validation sound", manifest(one_sound("val"), "train", "val"), 2,
         "split 'val' has one sound only (2 train, 2 val, 0 test), expected at least two"),
    Case("one training sound", manifest(one_sound("train"), "train", "val"), 2,
         "split 'train' has one sound only (2 train, 2 val, 0 test), expected at least two"),
    Case("a caption longer than the text encoder reads", manifest(change(1, text=WORDS)), 0,
         "metadata.jsonl line 2: * tokens, of which 32 are read; left out: "),
    Case("no data folder", lambda d: checked(d / "none"), 2,
         "error: {d}/none: no such data folder; make it with prepare_data.py or correct --data-root"),
    Case("no manifest", manifest(lambda root, rows: False), 2,
         "error: {d}/data: no metadata.jsonl in this folder"),
    Case("an empty manifest", manifest(lambda root, rows: b" \r\n\n"), 2,
         "error: {d}/data: the manifest has no rows"),
    Case("a list of the founding project that is not JSON", manifest(founding), 2,
         "error: {d}/data/train_metadata.json: not valid JSON"),
    Case("`..` in a path", manifest(change(1, audio_file_name="../audio/1.wav")), 2,
         "metadata.jsonl line 2: audio_file_name: '../audio/1.wav' is absolute or holds '..'"),
    Case("an absolute path", manifest(change(1, image_file_name="/etc/1.png")), 2,
         "metadata.jsonl line 2: image_file_name: '/etc/1.png' is absolute or holds '..'"),
    Case("a link out of the data folder", manifest(link_out), 2,
         "metadata.jsonl line 2: audio_file_name: 'audio/leak.wav' is a link that leaves the data folder"),
    Case("a link to itself", manifest(circle), 2,
         "metadata.jsonl line 2: audio_file_name: 'audio/ring.wav' cannot be looked up"),
    Case("a name of 5000 letters", manifest(change(1, audio_file_name="a" * 5000)), 2,
         "metadata.jsonl line 2: audio_file_name: * cannot be looked up"),
    Case("the same row twice", manifest(change(1, **row(0))), 2,
         "metadata.jsonl line 2: the same row as metadata.jsonl line 1"),
    Case("one clip in train and val", manifest(change(1, audio_file_name="audio/0.wav", split="val")), 2,
         "metadata.jsonl line 2: the sound is in split val here and in train at metadata.jsonl line 1"),
    Case("one clip under two names in train and val", manifest(copied("audio", split="val")), 0,
         "sound in two splits: 1"),
    Case("one clip under two names", manifest(copied("audio")), 0, "sound twice: 1"),
    Case("one picture in train and test", manifest(copied("images", split="test")), 0,
         "picture in two splits: 1"),
    Case("a composed name on disk, decomposed in the manifest",
         manifest(renamed("café.wav", unicodedata.normalize("NFD", "café.wav"))), 0, USED),
    Case("a decomposed name on disk, composed in the manifest",
         manifest(renamed(unicodedata.normalize("NFD", "천둥.wav"), "천둥.wav")), 0, USED),
    Case("spaces in a name", manifest(renamed("a b  c.wav", "a b  c.wav")), 0, USED),
    Case("a byte order mark", manifest(lambda root, rows: b"\xef\xbb\xbf" + lines(rows)), 0, USED),
    Case("CRLF", manifest(lambda root, rows: lines(rows).replace(b"\n", b"\r\n")), 0, USED),
    Case("a last line without newline", manifest(lambda root, rows: lines(rows).rstrip()), 0, USED),
    Case("half a line", manifest(lambda root, rows: lines(rows)[:-40]), 2,
         "metadata.jsonl line 4: not one JSON object"),
    Case("bad JSON at line 2",
         manifest(lambda root, rows: lines(rows[:1]) + b"{'text': 1}\n" + lines(rows[2:])), 2,
         "metadata.jsonl line 2: not one JSON object"),
    Case("a line that is not UTF-8",
         manifest(lambda root, rows: lines(rows[:1]) + b"\xff\xfe\n" + lines(rows[2:])), 2,
         "metadata.jsonl line 2: not one JSON object"),
    Case("JSON nested 100,000 deep", manifest(lambda root, rows: lines(rows[:1]) + b"[" * 100_000 + b"\n"), 2,
         "metadata.jsonl line 2: not one JSON object"),
    Case("a list as a row", manifest(lambda root, rows: lines(rows[:1]) + b"[1]\n"), 2,
         "metadata.jsonl line 2: got a JSON list, expected an object {...}"),
    Case("a key missing", manifest(lambda root, rows: rows[1].pop("text") and None), 2,
         "metadata.jsonl line 2: the key text is missing"),
    Case("a number as text", manifest(change(1, text=3)), 2,
         "metadata.jsonl line 2: text: got 3, expected text"),
    Case("half of an emoji in a caption",
         manifest(lambda root, rows: lines(rows[:1]) + json.dumps(row(1, text="\ud83d")).encode() + b"\n"), 2,
         "metadata.jsonl line 2: text: *ud83d' holds half of a character"),
    Case("an unknown split", manifest(change(1, split="held out")), 2,
         "metadata.jsonl line 2: split: got 'held out', expected train, val or test"),
    Case("a caption that names the label", manifest(change(1, text="a Thing in the rain")), 0,
         "caption names the label: 1"),
    Case("an empty caption", manifest(change(1, text=" ")), 0, "empty caption: 1"),
]
CASES = SOUNDS + PICTURES + ODD_PICTURES + MANIFESTS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, tmp_path):
    check(case, script(*case.make(tmp_path)), tmp_path, {})


@pytest.mark.parametrize("case", OTHER_SOUNDS + OTHER_PICTURES, ids=str)
def test_other_file(case, tmp_path):
    case.make(tmp_path)
    [path] = (tmp_path / "data").glob("*/a.*")
    reason, found = look_at(("sound" if path.parent.name == "audio" else "picture", path))
    said = reason or "; ".join(f"{what}: {detail}" for what, detail in found)
    assert bool(reason) == (case.code == 2)
    assert said == "" if case.says == USED else re.search(pattern(case.says, tmp_path), said), said
    if case.then:
        case.then(tmp_path, None)


def test_a_stage_says_the_same_of_every_unusable_file_at_once(config, tmp_path):
    """All unusable files in one folder: stage 1 lists each with the sentence above, and loads no model."""
    rows, expected = folder(tmp_path / "data", 6), []
    in_splits(train=4, val=2)(tmp_path / "data", rows)  # one batch and two sounds to compare
    for n, case in enumerate(SOUNDS + PICTURES):
        if case.code == 2:
            place = tmp_path / f"case{n}"
            case.make(place)
            [bad] = [r for r in map(json.loads, (place / "data/metadata.jsonl").read_text().splitlines())
                     if "/a." in r["audio_file_name"] + r["image_file_name"]]
            moved = {}
            for key in ("audio_file_name", "image_file_name"):
                source = place / "data" / bad[key]
                moved[key] = f"{Path(bad[key]).parent}/x{n}{Path(bad[key]).suffix}"
                if source.exists():
                    shutil.move(source, tmp_path / "data" / moved[key])
            rows.append(bad | moved)
            what, reason = case.says.split(": ", 1)
            kind, name = what.split(" ")
            kind = {"sound": "audio", "picture": "image"}[kind]
            expected.append(f"{kind} x{n}{Path(name).suffix}: {reason.split('*')[0]}")
    write_manifest(tmp_path / "data", rows)
    done = script("train_stage1.py", "--config", config, "--run", tmp_path / "run", "--data-root",
                  tmp_path / "data", "--cache-dir", tmp_path / "cache")
    assert done.returncode == 2 and f"{len(expected)} of {len(rows)} rows cannot be used" in done.stderr
    [listed] = (tmp_path / "cache").glob("*/bad_rows.txt")
    text = listed.read_text()
    assert len(expected) >= 24 and not [one for one in expected if one not in text], text


@pytest.mark.parametrize("name, options, change", [
    ("a.wav", {"rate": 8000, "format": "WAV", "subtype": "GSM610"}, bytes),
    ("a.flac", {"format": "FLAC"}, behind_id3), ("a.flac", {"format": "FLAC"}, frames_of_flac(4, 40)),
    ("a.wav", {"format": "WAV"}, put(b"data", 4, ("<I", 0))),
    ("a.mp3", {"rate": 44100, "format": "MP3", "bitrate_mode": "VARIABLE"}, without_first_frame),
    ("a.ogg", {"rate": 48000, "format": "OGG", "subtype": "OPUS"}, no_end_mark)],
    ids=["cannot be sought", "behind ID3", "cut FLAC", "no length", "no Xing", "no end mark"])
def test_several_windows_are_stretches_of_the_whole(tmp_path, name, options, change):
    as_bytes(change, **options)(tmp_path / name)
    with open_audio(tmp_path / name) as sound:
        rate, total = sound.samplerate, sound.frames
        whole = sound.windows([0], total, "float32")[0]
    windows, flags = decode_audio(tmp_path / name, rate, 2.0, windows=3)
    assert not flags
    for window, start in zip(windows, np.linspace(0, total - 2 * rate, 3).round().astype(int)):
        np.testing.assert_allclose(window, whole[start:start + 2 * rate, 0], atol=2e-3)


@pytest.mark.parametrize("seed", range(6))
def test_windows_of_vorbis_lie_where_they_should(tmp_path, seed):
    """Tones that decay, so that the sizes of Vorbis' blocks change: there libsndfile seeks wrongly."""
    rng, rate = np.random.default_rng(seed), 44100
    t, x = np.arange(12 * rate) / rate, np.zeros(12 * rate)
    for begin in np.sort(rng.uniform(0, 11.5, 25)):
        after = np.maximum(t - begin, 0)
        x += 0.3 * (t >= begin) * np.exp(-6 * after) * np.sin(2 * np.pi * rng.uniform(200, 3000) * after)
    sf.write(tmp_path / "a.ogg", x / np.abs(x).max(), rate, format="OGG", subtype="VORBIS")
    whole, _ = sf.read(tmp_path / "a.ogg", dtype="float32")
    for windows, start_s in ((5, 0.0), (3, 0.3), (4, 1.7)):
        blocks, _ = read_windows(tmp_path / "a.ogg", 0.7, windows, start_s)
        length = round(0.7 * rate)
        first, last = round(start_s * rate), len(whole) - length
        for block, start in zip(blocks, np.linspace(first, last, windows).round().astype(int), strict=True):
            assert len(block) == length
            np.testing.assert_allclose(block[:, 0], whole[start:start + length], atol=1e-4)


def test_check_counts_shows_and_ends_by_its_limits(tmp_path):
    """Ten rows, one unusable, two suspicious in two ways. Workers agree; the limits decide the exit code."""
    rows = folder(tmp_path / "data", 10)
    (tmp_path / "data/audio/3.wav").write_bytes(b"")
    noise(tmp_path / "data/audio/5.wav", 0.5, seed=5)
    picture(tmp_path / "data/images/5.png", (32, 32), seed=5)
    rows[6]["text"] = "the thing"
    write_manifest(tmp_path / "data", rows)
    command = (*COMMAND.split(), "--data-root", tmp_path / "data", "--splits", "train")
    done = script(*command)
    assert done.returncode == 2 and "1 unusable, 2 suspicious; mend or remove" in done.stderr
    assert "--max-bad-share 0.01" in done.stderr
    first = ok(script(*command, "--max-bad-share", 0.1))
    again = ok(script(*command, "--max-bad-share", 0.1, "--workers", 1, "--show", 0))
    assert first.stdout == again.stdout
    assert "10 rows (10 train, 0 val, 0 test), 1 unusable, 2 suspicious" in first.stdout
    assert "unusable: 1\n  metadata.jsonl line 4: sound 3.wav: zero bytes" in first.stdout
    assert "shorter than a second: 1\n  metadata.jsonl line 6: sound 5.wav: 0.50 s" in first.stdout
    assert "tiny picture: 1\n  metadata.jsonl line 6: picture 5.png: 32x32" in first.stdout
    assert "caption names the label: 1\n  metadata.jsonl line 7: 'the thing' says 'thing'" in first.stdout
    assert script(*command, "--max-bad-share", 0.1, "--max-suspicious-share", 0.1).returncode == 2
    for r in rows:
        r["text"] = "a thing"
    write_manifest(tmp_path / "data", rows)
    done = ok(script(*command, "--max-bad-share", 0.1, "--show", 3))
    assert "caption names the label: 9\n" in done.stdout
    assert "... and 6 more (--show 0 lists all)" in done.stdout


def test_random_bytes_and_flipped_ones_are_never_a_traceback(tmp_path):
    """400 damaged sounds and pictures: each is used or refused with a reason."""
    rng, seen = np.random.default_rng(0), {"used": 0, "refused": 0}
    sounds = {suffix: noise(tmp_path / f"a.{suffix}", 0.3).read_bytes()
              for suffix in ("wav", "flac", "ogg", "mp3", "aiff")}
    frames = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(2)]
    for suffix in ("png", "jpg", "gif", "tiff", "webp", "bmp", "avif"):
        file = io.BytesIO()
        frames[0].save(file, format={"jpg": "JPEG", "tiff": "TIFF"}.get(suffix, suffix.upper()))
        sounds[suffix] = file.getvalue()
    for i in range(400):
        suffix = list(sounds)[i % len(sounds)]
        content = bytearray(sounds[suffix])
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content) if i % 2 else min(120, len(content)))] = rng.integers(256)
        path = tmp_path / f"b.{suffix}"
        path.write_bytes(content[:rng.integers(1, len(content) + 1)] if i % 3 == 0 else content)
        try:
            if suffix in ("wav", "flac", "ogg", "mp3", "aiff"):
                [clip] = load_waveform(path, RATE, 1.0)
                assert np.isfinite(clip).all() and np.abs(clip).max() < 2 and len(clip) <= RATE
            else:
                pixels = load_image(path, 32)
                assert pixels.shape == (3, 32, 32) and np.isfinite(pixels).all() and np.abs(pixels).max() <= 1
            seen["used"] += 1
        except BadFile as error:
            assert str(error)
            seen["refused"] += 1
    assert min(seen.values()) > 50, seen


def test_odd_exif_is_read_alike_by_a_stage_and_by_generate(run, tmp_path):
    """The picture to begin with is the one that stands upright; a stage encodes the same pixels."""
    from clap2diffusion.dataset.cache import Decode
    from clap2diffusion.dataset.manifest import read_manifest
    rows = folder(tmp_path / "data")
    odd = top_is_red(tmp_path / "data/images/odd.jpg", exif=exif(FLOAT_MAKER, TURN), quality=95)
    write_manifest(tmp_path / "data", [rows[0] | {"image_file_name": "images/odd.jpg"}])
    Image.open(odd).rotate(-90, expand=True).save(tmp_path / "upright.png")
    pixels, *_ = Decode(read_manifest(tmp_path / "data", print)[0], 64, RATE, 10.0)[0]
    np.testing.assert_array_equal(pixels, load_image(tmp_path / "upright.png", 64))
    made = []
    flags = ("--run", run, "--audio", tmp_path / "data/audio/0.wav", "--steps", 2, "--strength", 0.5)
    for n, start in enumerate((odd, tmp_path / "upright.png")):
        made.append(tmp_path / f"made-{n}.png")
        ok(script("generate.py", *flags, "--init-image", start, "--out", made[-1]))
    np.testing.assert_array_equal(*map(np.asarray, map(Image.open, made)))


@pytest.mark.parametrize("error", [Stopped(15), MemoryError()], ids=repr)
def test_a_signal_or_want_of_memory_is_no_fault_of_a_picture(error, tmp_path, monkeypatch):
    def fail(self):
        raise error
    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(type(error)):
        load_image(path, 64)
