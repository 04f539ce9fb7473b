"""Faults of sounds, pictures and manifests. `prepare_data.py check` says of each what a stage would say."""

from __future__ import annotations

import io
import json
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import ok, script
from faults import Case, check
from PIL import Image

from clap2diffusion.dataset.decoding import BadFile, load_image, load_waveform

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


def checked(root: Path) -> list:
    return [*COMMAND.split(), "--data-root", root, "--max-bad-share", 0]


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


def manifest(change) -> object:
    """change(root, rows) returns the manifest's bytes, or changes rows."""
    def build(d: Path) -> list:
        rows = folder(d / "data")
        content = change(d / "data", rows)
        if isinstance(content, bytes):
            (d / "data/metadata.jsonl").write_bytes(content)
        elif content is not False:
            write_manifest(d / "data", rows)
        return checked(d / "data")
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
    assert sum(frames) <= 10 * 8000 + 1


def truncated(share: float, **options):
    def make(path: Path) -> None:
        noise(path, 5.0, **options)
        cut(path, share)
    return make


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
         "sound a.wav: not a sound that libsndfile reads"),
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


MANIFESTS = [
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
    Case("an unknown split", manifest(change(1, split="dev")), 2,
         "metadata.jsonl line 2: split: got 'dev', expected train, val or test"),
    Case("a caption that names the label", manifest(change(1, text="a Thing in the rain")), 0,
         "caption names the label: 1"),
    Case("an empty caption", manifest(change(1, text=" ")), 0, "empty caption: 1"),
]
CASES = SOUNDS + PICTURES + MANIFESTS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, tmp_path):
    check(case, script(*case.make(tmp_path)), tmp_path, {})


def test_a_stage_says_the_same_of_every_unusable_file_at_once(config, tmp_path):
    """All unusable files in one folder: stage 1 lists each with the sentence above, and loads no model."""
    rows, expected = folder(tmp_path / "data", 2), []
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


def test_check_counts_shows_and_ends_by_its_limits(tmp_path):
    """Ten rows, one unusable, two suspicious in two ways. Workers agree; the limits decide the exit code."""
    rows = folder(tmp_path / "data", 10)
    (tmp_path / "data/audio/3.wav").write_bytes(b"")
    noise(tmp_path / "data/audio/5.wav", 0.5, seed=5)
    picture(tmp_path / "data/images/5.png", (32, 32), seed=5)
    rows[6]["text"] = "the thing"
    write_manifest(tmp_path / "data", rows)
    command = (*COMMAND.split(), "--data-root", tmp_path / "data")
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
