"""The data set: values against independent computations, faults of folders, cache against encoders."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import PATIENCE_S, ROOT, ok, script, wait_for
from PIL import Image
from safetensors.torch import load_file, save_file

from clap2diffusion.base import files, processes
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.dataset import cache as feature_cache
from clap2diffusion.dataset import encoders
from clap2diffusion.dataset.cache import (
    Build,
    Known,
    build_features,
    cache_key,
    file_stats,
    model_fingerprints,
)
from clap2diffusion.dataset.dataset import AudioImageDataset, make_loader, step_batches
from clap2diffusion.dataset.decoding import BadFile, decode_audio, load_image, load_waveform
from clap2diffusion.dataset.manifest import SPLITS, read_manifest

RATE, SIZE = 16000, 32


# --- small random models and data ---------------------------------------------------------------------------

@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A random VAE, text encoder and tokenizer as a pipeline's folder, and a random CLAP."""
    from diffusers import AutoencoderKL
    from transformers import (
        ClapAudioConfig,
        ClapAudioModelWithProjection,
        ClapFeatureExtractor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
    )
    torch.manual_seed(0)
    base, clap = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("clap")
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
                  shift_factor=0.1, down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2,).save_pretrained(base / "vae")
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)
    tokenizer.save_pretrained(base / "tokenizer")
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32,
                                 num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
                                 eos_token_id=len(words) - 1,
                                 bos_token_id=len(words) - 2)).save_pretrained(base / "text_encoder")
    config = ClapAudioConfig(spec_size=64, num_mel_bins=16, patch_size=4, patch_stride=[4, 4], window_size=4,
                             patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[2, 2],
                             hidden_size=16, projection_dim=10, num_hidden_layers=2, enable_fusion=False)
    ClapAudioModelWithProjection(config).save_pretrained(clap)
    ClapFeatureExtractor(feature_size=16, sampling_rate=RATE, hop_length=160, max_length_s=1,
                         fft_window_size=512,
                         frequency_max=8000, truncation="rand_trunc").save_pretrained(clap)
    return base, clap


def picture(path: Path, seed: int, size=(40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def sound(path: Path, seed: int, seconds: float = 0.5, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate)), rate)
    return path


def folder(root: Path, n: int = 10, **changes) -> Path:
    """A data folder of n rows; changes: {"3": {...}} updates row 3 of the manifest."""
    rows = []
    for i in range(n):
        picture(root / f"images/{i}.png", i)
        sound(root / f"audio/{i}.wav", i)
        rows.append({"image_file_name": f"images/{i}.png", "audio_file_name": f"audio/{i}.wav",
                     "text": f"scene {i % 3}", "label": "ab"[i % 2],
                     "split": "val" if i % 5 == 4 else "train"})
        rows[i].update(changes.get(str(i), {}))
    manifest(root, rows)
    return root


def manifest(root: Path, rows: list) -> None:
    root.mkdir(exist_ok=True)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(root: Path, models, cache: Path, log=lambda line: None, **options) -> Path:
    options = {"workers": 0, "batch_size": 4} | options
    return build_features(root, *models, SIZE, cache, log=log, **options)


def test_cached_features_equal_the_models_own(tmp_path, models):
    from diffusers import AutoencoderKL
    from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor, CLIPTextModel, CLIPTokenizer
    root = folder(tmp_path / "data")
    sound(root / "audio/1.wav", 5, seconds=3.0, rate=22050)
    cache = build(root, models, tmp_path / "cache", flip=True, windows=2)
    dataset, rows = AudioImageDataset(root, "train", cache), {row.id: row for row in read_manifest(root)[0]}
    base, clap = models
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").eval()
    extractor, tower = ClapFeatureExtractor.from_pretrained(
        clap), ClapAudioModelWithProjection.from_pretrained(clap)
    with torch.inference_mode():
        for i in (0, 1, 5):
            item, row = dataset[i], rows[dataset.rows[i]["id"]]
            image = torch.from_numpy(load_image(row.image_path, SIZE))
            for side, x in enumerate((image, image.flip(-1))):
                posterior = vae.encode(x[None]).latent_dist
                torch.testing.assert_close(item["latents_mean"][side], (posterior.mean[0] - 0.1) * 0.5)
                torch.testing.assert_close(item["latents_std"][side], posterior.std[0] * 0.5)
            for k, clip in enumerate(load_waveform(row.audio_path, RATE, 1.0, 2)):
                mel = extractor(clip, sampling_rate=RATE, return_tensors="pt").input_features
                embeds = torch.nn.functional.normalize(tower.eval()(input_features=mel).audio_embeds, dim=-1)
                torch.testing.assert_close(item["audio_embeds"][k], embeds[0], atol=1e-5, rtol=1e-4)
            for text, got in ((row.text, item["text_embeds"]), ("", dataset.empty_text_embeds)):
                ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
                torch.testing.assert_close(got, text_encoder(ids).last_hidden_state[0], atol=1e-5, rtol=1e-4)
    assert (dataset.latent_shape, dataset.embed_dim) == ((4, 16, 16), 10)
    assert dataset.empty_text_embeds.shape[1] == 16
    assert (len(dataset), {row["label"] for row in dataset.rows}) == (8, {"a", "b"})


# --- sound --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [8000, 11025, 44100, 96000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_any_rate_and_depth_gives_the_same_sine(tmp_path, rate, subtype):
    t = np.arange(rate) / rate
    sf.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate, subtype=subtype)
    [clip] = load_waveform(tmp_path / "a.wav", RATE, 10.0)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert clip.shape == (RATE,) and clip.dtype == np.float32
    assert np.abs(clip - expected)[500:-500].max() < 0.01  # 8 bits are coarse; the ends ring


def test_channels_are_averaged_and_flagged_when_they_cancel(tmp_path):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 6)).astype(np.float32)
    sf.write(tmp_path / "6.wav", x, RATE, subtype="FLOAT")
    [clip], flags = decode_audio(tmp_path / "6.wav", RATE, 1.0)
    assert not flags
    np.testing.assert_allclose(clip, x.mean(1), atol=1e-6)
    for name, channels, flag in (("opposite", [x[:, 0], -x[:, 0]], "cancelled by the mono mix"),
                                 ("silent", [0 * x[:, 0]], "silent")):
        sf.write(tmp_path / f"{name}.wav", np.stack(channels, 1), RATE)
        assert decode_audio(tmp_path / f"{name}.wav", RATE, 1.0)[1] == [flag]


@pytest.mark.parametrize("loud", [100.0, 3e38, 1e300])
def test_absurdly_loud_is_scaled_to_peak_one(tmp_path, loud):
    x = np.sin(np.arange(RATE) / 5)
    sf.write(tmp_path / "a.wav", np.stack([x, x], 1) * loud, RATE, subtype="DOUBLE")
    [clip] = load_waveform(tmp_path / "a.wav", RATE, 1.0)
    np.testing.assert_allclose(clip, x / np.abs(x).max(), atol=1e-6)


def test_windows_are_spread_and_only_they_are_decoded(tmp_path, monkeypatch):
    hours = 3 * 3600 * 8000
    # a ramp: a sample tells its place
    with sf.SoundFile(tmp_path / "long.wav", "w", 8000, 1, "PCM_16") as file:
        for second in range(0, 3 * 3600, 600):
            file.write(np.linspace(second, second + 600, 600 * 8000, endpoint=False) / (3 * 3600))
    read, frames = sf.SoundFile.read, []
    monkeypatch.setattr(sf.SoundFile, "read", lambda self, n, **k: frames.append(n) or read(self, n, **k))
    clips = load_waveform(tmp_path / "long.wav", 8000, 10.0, windows=3)
    assert sum(frames) <= 3 * 80000 + 1024  # and the last, which show that it is whole
    starts = [0, (hours - 80000) // 2, hours - 80000]
    for clip, start in zip(clips, starts):
        np.testing.assert_allclose(clip, np.arange(start, start + 80000) / hours, atol=1e-4)


def cut(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    return path


def noise(path: Path, n: int = RATE, rate: int = RATE, **options) -> Path:
    sf.write(path, np.random.default_rng(0).uniform(-.1, .1, n), rate, **options)
    return path


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_value(path: Path, value: float) -> Path:
    x = np.zeros(RATE, np.float32)
    x[7] = value
    sf.write(path, x, RATE, subtype="FLOAT")
    return path


@pytest.mark.parametrize("make, reason", [
    (lambda d: d / "none.wav", "no such file"),
    (lambda d: d, "a folder"),
    (lambda d: with_bytes(d / "a.wav", b""), "zero bytes"),
    (lambda d: with_bytes(d / "a.wav", b"this is text, not sound " * 50), "not a sound"),
    (lambda d: with_bytes(d / "a.raw", b"\0" * 5000), "not a sound"),
    (lambda d: noise(d / "a.wav", 0), "zero length"),
    (lambda d: noise(d / "a.wav", 100), "expected at least 0.1 s"),
    (lambda d: noise(d / "a.wav", RATE, 10), "sampling rate 10 Hz"),
    (lambda d: with_value(d / "a.wav", np.nan), "NaN or infinite"),
    (lambda d: with_value(d / "a.wav", -np.inf), "NaN or infinite"),
    (lambda d: cut(noise(d / "a.wav")), "truncated"),
    (lambda d: cut(noise(d / "a.aiff")), "truncated"),
    (lambda d: cut(noise(d / "a.w64")), "truncated"),
    (lambda d: cut(noise(d / "a.flac")), "truncated"),
    (lambda d: cut(noise(d / "a.flac", 20 * RATE), 0.9), "truncated"),  # the window itself is whole
    (lambda d: cut(noise(d / "a.ogg", 5 * RATE), 0.8), "truncated"),
    (lambda d: cut(noise(d / "a.opus", 5 * RATE, format="OGG", subtype="OPUS"), 0.95), "truncated"),
    (lambda d: cut(noise(d / "a.mp3")), "truncated"),
])
def test_unusable_sounds_are_rejected_with_a_reason(tmp_path, make, reason):
    with pytest.raises(BadFile, match=reason):
        load_waveform(make(tmp_path), RATE, 1.0)


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.w64", "a.flac", "a.ogg", "a.mp3", "a.caf", "a.au"])
def test_whole_sounds_of_every_format_are_accepted(tmp_path, name):
    assert len(load_waveform(noise(tmp_path / name), RATE, 10.0)[0]) == pytest.approx(RATE, abs=1200)


def test_a_streamed_wav_without_lengths_in_its_header_is_whole(tmp_path):
    content = bytearray(noise(tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # what ffmpeg writes to a pipe
    with_bytes(tmp_path / "a.wav", content)
    assert len(load_waveform(tmp_path / "a.wav", RATE, 10.0)[0]) == RATE


# --- pictures -----------------------------------------------------------------------------------------------

def values(image: np.ndarray) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) in 0..255."""
    return np.rint((image.transpose(1, 2, 0) + 1) * 127.5)


def test_image_crop_and_range(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 32)
    assert image.dtype == np.float32 and image.min() >= -1 and image.max() <= 1
    np.testing.assert_array_equal(values(image), pixels[:, 8:40])
    expected = Image.fromarray(pixels[:, 8:40]).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(values(load_image(tmp_path / "a.png", 16)), np.asarray(expected), atol=1)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bit_gray_keeps_its_values(tmp_path, suffix):
    gray = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / f"a.{suffix}")
    got = values(load_image(tmp_path / f"a.{suffix}", 32))
    np.testing.assert_allclose(got[..., 0], gray / 257, atol=0.51)


@pytest.mark.parametrize("orientation, turn",
                         [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)),
                                               (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(values(load_image(tmp_path / "a.png", 32)), turn(pixels))


def test_transparency_palette_cmyk_and_animation(tmp_path):
    red = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    red.save(tmp_path / "alpha.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "gray.png")
    for name in ("alpha", "palette", "gray"):
        assert (values(load_image(tmp_path / f"{name}.png", 32))[5:, 5:] == 255).all(), name
    assert values(load_image(tmp_path / "alpha.png", 32))[0, 0].tolist() == [255, 0, 0]
    Image.new("RGBA", (32, 32), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert (values(load_image(tmp_path / "half.png", 32)) == 127).all()
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    assert values(load_image(tmp_path / "cmyk.tiff", 32))[3, 3].tolist() == [255, 0, 0]
    frames = [Image.new("RGB", (32, 32), color) for color in ("blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert values(load_image(tmp_path / "a.gif", 32))[3, 3].tolist() == [0, 0, 255]


def bomb(path: Path) -> Path:
    """A PNG whose header claims 30000 x 30000 pixels."""
    content = bytearray(picture(path, 0).read_bytes())
    content[16:24] = (30000).to_bytes(4, "big") * 2
    import zlib
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return with_bytes(path, content)


@pytest.mark.parametrize("make, reason", [
    (lambda d: d / "none.png", "no such file"),
    (lambda d: d, "a folder"),
    (lambda d: with_bytes(d / "a.png", b""), "zero bytes"),
    (lambda d: with_bytes(d / "a.png", b"<html>not found</html>"), "not a picture"),
    (lambda d: cut(picture(d / "a.png", 0)), "truncated"),
    (lambda d: cut(picture(d / "a.jpg", 0)), "truncated"),
    (lambda d: picture(d / "a.png", 0, (1, 1)), "at least 8"),
    (lambda d: picture(d / "a.png", 0, (10, 400)), "at most 8:1"),
    (lambda d: bomb(d / "a.png"), "expected at most|bomb"),
])
def test_unusable_pictures_are_rejected_with_a_reason(tmp_path, make, reason):
    with pytest.raises(BadFile, match=reason):
        load_image(make(tmp_path), 32)


# --- manifest -----------------------------------------------------------------------------------------------

def test_manifest_takes_bom_crlf_spaces_and_both_normal_forms(tmp_path):
    for form, name in (("NFD", "천둥 소리"), ("NFC", "café")):
        sound(tmp_path / (unicodedata.normalize(form, name) + ".wav"), 0)
        picture(tmp_path / (unicodedata.normalize(form, name) + ".png"), 0)
    lines = [json.dumps({"image_file_name": f"{n}.png", "audio_file_name": f"{n}.wav", "text": "천둥\u2028",
                         "split": "val"}, ensure_ascii=False)
             for n in (unicodedata.normalize("NFC", "천둥 소리"), unicodedata.normalize("NFD", "café"))]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    rows, bad = read_manifest(tmp_path)
    assert not bad and [row.text for row in rows] == ["천둥\u2028"] * 2
    assert all(row.audio_path.is_file() and row.image_path.is_file() for row in rows)


GOOD = {"image_file_name": "images/0.png", "audio_file_name": "audio/0.wav", "text": "t", "split": "train"}


@pytest.mark.parametrize("line, reason", [
    ('{"image_file_name": "im', "not one JSON object"), ("[1]", "got a JSON list"),
    ("\udcff", "not one JSON object"),
    ({"text": None}, "text: got null"), ({"text": 3}, "text: got 3"), ({"label": 3.5}, "label: got 3.5"),
    ({"split": "held out"}, "split: got 'held out'"), ({"audio_file_name": ""}, "is empty"),
    ({"audio_file_name": "../audio/0.wav"}, "'..'"), ({"image_file_name": "/etc/0.png"}, "is absolute"),
    ({"audio_file_name": "leak.wav"}, "a link that leaves"), ({}, "the same row as metadata.jsonl line 1"),
    ({"text": "other", "split": "test"}, "in split test here and in train at metadata.jsonl line 1"),
    ({"image_file_name": "a" * 5000}, "cannot be looked up"),
])
def test_bad_rows_name_line_and_reason(tmp_path, line, reason):
    root = folder(tmp_path / "data", 1)
    (root / "leak.wav").symlink_to(sound(tmp_path / "outside.wav", 0))
    line = line if isinstance(line, str) else json.dumps(GOOD | line)
    (root / "metadata.jsonl").write_text(json.dumps(GOOD) + "\n" + line, encoding="utf-8",
                                         errors="surrogateescape")
    rows, [bad] = read_manifest(root)
    assert len(rows) == 1 and bad.startswith("metadata.jsonl line 2: ") and reason in bad


def test_missing_key_founding_lists_and_empty_manifests(tmp_path):
    root = folder(tmp_path / "data", 3)
    (root / "metadata.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="line 1: the key image_file_name is missing"):
        read_manifest(root)
    for content, error in (("", "no rows"), (" \r\n\n", "no rows"), (None, "no metadata.jsonl")):
        (root / "metadata.jsonl").unlink() if content is None else (root / "metadata.jsonl").write_text(
            content)
        with pytest.raises(UserError, match=error):
            read_manifest(root)
    for i, split in enumerate(("train", "val")):
        items = [{"audio_path": f"audio/{i}.wav", "image_path": f"images/{i}.png", "text": "t",
                  "class": "dog"}, 7]
        (root / f"{split}_metadata.json").write_text(json.dumps(items))
    rows, bad = read_manifest(root)
    assert [(row.split, row.label, row.where) for row in rows] == [
        ("train", "dog", "train_metadata.json item 1"), ("val", "dog", "val_metadata.json item 1")]
    assert len(bad) == 2
    (root / "val_metadata.json").write_text("[{")
    with pytest.raises(UserError, match="val_metadata.json: not valid JSON"):
        read_manifest(root)
    with pytest.raises(UserError, match="no such data folder"):
        read_manifest(tmp_path / "none")


def test_a_missing_split_is_assigned_stably(tmp_path):
    rows = [GOOD | {"audio_file_name": f"{i}.wav", "split": None} for i in range(2000)]
    manifest(tmp_path, rows)
    lines = []
    first = {row.id: row.split for row in read_manifest(tmp_path, lines.append)[0]}
    manifest(tmp_path, rows[1::-1] + rows[2:][::-1])
    assert {row.id: row.split for row in read_manifest(tmp_path)[0]} == first
    counts = [list(first.values()).count(split) for split in SPLITS]
    assert abs(counts[0] - 1800) < 60 and abs(counts[1] - 100) < 40 and "2000 rows name no split" in lines[0]


# --- cache --------------------------------------------------------------------------------------------------

@pytest.fixture
def encoded(monkeypatch) -> list:
    """The number of rows of each call of the row encoders."""
    calls, plain = [], encoders.Encoders.rows
    monkeypatch.setattr(encoders.Encoders, "rows",
                        lambda self, d, *a: calls.append(len(d)) or plain(self, d, *a))
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 4)
    return calls


def content(cache: Path) -> dict:
    return {path.name: path.read_bytes()
            for path in cache.iterdir() if path.suffix in (".safetensors", ".json")}


def test_key_follows_content_and_a_finished_cache_loads_no_encoder(tmp_path, models, encoded, monkeypatch):
    root = folder(tmp_path / "data")
    first = build(root, models, tmp_path / "cache")
    assert encoded == [4, 4, 2]
    script = ("import sys; from clap2diffusion.dataset import cache; cache.SHARD_ROWS = 4; "
              f"cache.build_features({str(root)!r}, {str(models[0])!r}, {str(models[1])!r}, {SIZE}, "
              f"{str(tmp_path / 'cache')!r}); print('diffusers' in sys.modules or 'transformers' "
              "in sys.modules)")
    monkeypatch.setattr(encoders, "Encoders", None)
    assert build(root, models, tmp_path / "cache") == first
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False", done.stderr

    def key(**options):
        rows, bad = read_manifest(root)
        settings = {"image_size": SIZE} | options
        return cache_key(rows, [*map(file_stats, rows)], bad, model_fingerprints(*models), settings)

    keys = [key(), key(windows=2)]
    sound(root / "audio/3.wav", 99)
    keys.append(key())
    folder(root, **{"2": {"text": "another caption"}})
    keys.append(key())
    assert len(set(keys)) == 4


def test_damaged_shards_and_stale_files_are_replaced(tmp_path, models, encoded):
    root = folder(tmp_path / "data")
    cache = build(root, models, tmp_path / "cache")
    whole = content(cache)
    cut(cache / "rows-00001.safetensors", 0.8)
    (cache / "rows-00002.safetensors").write_bytes(whole["text-00000.safetensors"])
    (cache / ".rows-00000.safetensors.1.tmp").write_bytes(b"half")
    encoded.clear()
    lines = []
    assert build(root, models, tmp_path / "cache", lines.append) == cache
    assert encoded == [4, 2] and content(cache) == whole and not list(cache.glob(".*.tmp"))
    assert sum("building it again" in line for line in lines) == 2
    assert sum(line.startswith("removed") for line in lines) == 1


def test_a_shard_that_breaks_under_a_running_stage_is_one_sentence(tmp_path, models):
    cache = build(folder(tmp_path / "data"), models, tmp_path / "cache")
    dataset = AudioImageDataset(tmp_path / "data", "train", cache)
    last = dataset[len(dataset) - 1]
    path = cache / "rows-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) * 2 // 3])  # where its rows lie is known already
    with pytest.raises(RunFailed, match="rows-00000.*cannot be read .cut off.; start again"):
        dataset[len(dataset) - 1]
    path.write_bytes(whole)
    assert all(torch.equal(last[key], dataset[len(dataset) - 1][key]) for key in last if key != "index")
    for content in (b"", whole[:20], b"\xff" * 100, None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(RunFailed, match="rows-00000.*cannot be read"):
            AudioImageDataset(tmp_path / "data", "train", cache)[len(dataset) - 1]


def test_a_killed_build_goes_on_and_equals_the_unbroken_one(tmp_path, models, encoded):
    root = folder(tmp_path / "data", 14)
    script = f"""
import os, signal
from pathlib import Path
from clap2diffusion.dataset import cache
from clap2diffusion.dataset.encoders import Encoders
cache.SHARD_ROWS, plain, calls = 4, Encoders.rows, []
def rows(self, *args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args)
Encoders.rows = rows
cache.build_features({str(root)!r}, Path({str(models[0])!r}), Path({str(models[1])!r}), {SIZE},
                    {str(tmp_path / 'killed')!r}, batch_size=4, workers=2)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torch.manual_seed(1)
    cache = build(root, models, tmp_path / "killed")
    assert encoded == [4, 2]
    assert content(cache) == content(build(root, models, tmp_path / "unbroken"))


def test_unusable_rows_are_listed_at_once_and_again(tmp_path, models):
    root = folder(tmp_path / "data", 20, **{"3": {"text": 5}})
    cut(root / "images/7.png")
    sf.write(root / "audio/8.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (root / "audio/9.wav").unlink()
    lines = []
    for _ in range(2):  # the second time from the finished cache
        with pytest.raises(UserError,
                           match="4 of 20 rows cannot be used .limit 1 %., listed in .*bad_rows.txt"):
            build(root, models, tmp_path / "cache", lines.append)
    [listed] = (tmp_path / "cache").glob("*/bad_rows.txt")
    assert [line.split(":")[0].split()[-1]
            for line in listed.read_text().splitlines()] == ["4", "8", "9", "10"]
    cache = build(root, models, tmp_path / "cache", lines.append, max_bad_share=0.2)
    assert "they are left out" in lines[-2] and "16 rows" in lines[-1]
    sizes = [len(AudioImageDataset(root, split, cache)) for split in ("train", "val")]
    assert sum(sizes) == 16


def test_silence_is_kept_and_flagged(tmp_path, models):
    root = folder(tmp_path / "data", 5)
    sf.write(root / "audio/1.wav", np.zeros(RATE), RATE)
    dataset = AudioImageDataset(root, "train", build(root, models, tmp_path / "cache"))
    assert [row["flags"] for row in dataset.rows] == [[], ["silent"], [], []]


def test_a_full_disk_is_one_sentence_and_the_build_goes_on(tmp_path, models, encoded, monkeypatch):
    root = folder(tmp_path / "data")
    plain = os.fsync

    def full(number):
        if "rows-00001" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        plain(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="no space left in .* MB needed"):
        build(root, models, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/.*.tmp"))
    monkeypatch.undo()
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 4)
    build(root, models, tmp_path / "cache")


def test_a_second_build_waits_for_the_first(tmp_path, models, capsys):
    root = folder(tmp_path / "data", 5)
    cache = build(root, models, tmp_path / "cache")
    (cache / "index.json").unlink()
    holder = subprocess.Popen([sys.executable, "-c", f"""
import fcntl
lock = open({str(cache / ".lock")!r}, "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
input()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    said, second = [], threading.Thread(target=build, args=(root, models, tmp_path / "cache"))
    second.start()
    wait_for(lambda: said.append(capsys.readouterr().out) or "waiting for another process" in "".join(said),
             "the wait")
    time.sleep(0.5)
    assert second.is_alive() and not (cache / "index.json").exists()  # it waits still
    holder.communicate("\n")
    second.join(PATIENCE_S)
    assert not second.is_alive() and (cache / "index.json").exists()


def test_processes_build_the_cache_in_shares(tmp_path, models, monkeypatch):
    """Each fills its own shards; together they are, byte for byte, those of one process."""
    monkeypatch.setattr(feature_cache, "SHARD_ROWS", 4)
    root = folder(tmp_path / "data", 18)
    whole = build(root, models, tmp_path / "one")
    rows, _ = read_manifest(root)
    one, shared, written = json.loads((whole / "index.json").read_text()), tmp_path / "two", []
    key = one["key"]
    shared.mkdir()
    for rank in (1, 0, 2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "world", lambda: 3)
        build_ = Build(shared, key, one["made_by"], rows, [*map(file_stats, rows)], {}, print, Known([], {}))
        build_.fill(*models, {"image_size": SIZE, "windows": 1, "flip": False}, 16, 0, "cpu")
        written.append({path.name for path in shared.iterdir()} - set().union(*written))
    assert [len([name for name in names if name.startswith("rows")]) for names in written] == [2, 2, 1]
    for path in whole.glob("*.safetensors"):
        assert (shared / path.name).read_bytes() == path.read_bytes(), path.name
    build_.finish([], len(rows))
    assert json.loads((shared / "index.json").read_text()) == one


def everything(root: Path, cache: Path) -> dict:
    """All the tensors of a data folder's rows, by id."""
    found = {}
    for split in ("train", "val"):
        dataset = AudioImageDataset(root, split, cache)
        for i, row in enumerate(dataset.rows):
            found[row["id"]] = {key: value for key, value in dataset[i].items() if key != "index"}
    return found


def same(first: dict, second: dict) -> bool:
    return first.keys() <= second.keys() and all(torch.equal(first[row][key], second[row][key])
                                                 for row in first for key in first[row])


@pytest.fixture
def texts(monkeypatch) -> list:
    """The captions that are encoded."""
    captions, plain = [], encoders.Encoders.text
    monkeypatch.setattr(encoders.Encoders, "text",
                        lambda self, batch: captions.extend(batch) or plain(self, batch))
    return captions


def test_one_row_more_encodes_that_row_alone(tmp_path, models, encoded, texts):
    root, lines = folder(tmp_path / "data"), []
    first = build(root, models, tmp_path / "cache")
    before = everything(root, first)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    picture(root / "images/10.png", 10)
    sound(root / "audio/10.wav", 10)
    more = {"image_file_name": "images/10.png", "audio_file_name": "audio/10.wav", "text": "a new scene",
            "label": "a", "split": "train"}
    manifest(root, [more, *rows])  # in front, where it moves all others
    encoded.clear(), texts.clear()
    second = build(root, models, tmp_path / "cache", lines.append)
    assert second != first and encoded == [1] and texts == ["a new scene"]
    assert "10 of 11 rows are known from caches in" in lines[0]
    after = everything(root, second)
    assert len(after) == 11 and same(before, after)
    alone = everything(root, build(root, models, tmp_path / "anew"))
    for row, item in alone.items():  # in another batch sums are rounded otherwise
        for key, value in item.items():
            torch.testing.assert_close(after[row][key], value, atol=1e-5, rtol=1e-4)
    shutil.rmtree(first)  # either may go
    assert same(before, everything(root, second)) and build(root, models, tmp_path / "cache") == second
    encoded.clear()
    manifest(root, rows)
    assert same(before, everything(root, build(root, models, tmp_path / "cache"))) and not encoded


def test_a_copied_folder_encodes_nothing_and_has_the_same_content(tmp_path, models, encoded, texts):
    root = folder(tmp_path / "data")
    first = build(root, models, tmp_path / "cache")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for path in copy.rglob("*.*"):
        os.utime(path, (1, 1))
    encoded.clear(), texts.clear()
    second = build(copy, models, tmp_path / "cache")
    assert second != first and not encoded and not texts
    assert same(everything(root, first), everything(copy, second))
    contents = [AudioImageDataset(root, "train", cache).content for cache in (first, second)]
    assert contents[0] == contents[1]  # by which a run knows that it goes on with the same features
    linked = [path for path in second.glob("*.safetensors") if path.stat().st_nlink == 2]
    assert len(linked) == len(list(first.glob("*.safetensors"))) == 4
    picture(copy / "images/3.png", 77)  # another picture
    third = build(copy, models, tmp_path / "cache")
    assert encoded == [1] and AudioImageDataset(copy, "train", third).content != contents[0]
    before, after = everything(root, first), everything(copy, third)
    changed = [row for row in before
               if not torch.equal(before[row]["latents_mean"], after[row]["latents_mean"])]
    assert changed == ["audio/3.wav+images/3.png"]
    assert same({row: before[row] for row in before if row not in changed}, after)


def test_caches_that_came_from_one_another_do_not_mix_their_shards_up(tmp_path, models, encoded):
    """The first cache goes and is made again from the second; the third takes from both, whose numbers are
    alike."""
    root, cache = folder(tmp_path / "data", 12), tmp_path / "cache"
    whole = everything(root, build(root, models, tmp_path / "whole"))
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]

    def of(*places: int) -> Path:
        manifest(root, [rows[i] for i in places])
        return build(root, models, cache)
    first, second = of(0, 1, 4), of(0, 1, 9)
    shutil.rmtree(first)
    assert of(0, 1, 4) == first
    shutil.rmtree(second)
    last = of(9, 11, 4, 1, 0, 10)
    assert first != last and len(everything(root, last)) == 6
    for row, item in everything(root, last).items():
        for key, value in item.items():
            torch.testing.assert_close(value, whole[row][key], atol=1e-5, rtol=1e-4)


def test_a_file_that_changes_during_the_build_is_encoded_again(tmp_path, models, encoded, monkeypatch):
    root, plain = folder(tmp_path / "data"), encoders.Encoders.rows

    def rows(self, decoded, *more):
        picture(root / "images/0.png", 99)  # it is decoded by now
        return plain(self, decoded, *more)
    monkeypatch.setattr(encoders.Encoders, "rows", rows)
    build(root, models, tmp_path / "cache")
    monkeypatch.setattr(encoders.Encoders, "rows", plain)
    again = everything(root, build(root, models, tmp_path / "cache"))
    whole = everything(root, build(root, models, tmp_path / "anew"))
    for row in whole:
        torch.testing.assert_close(again[row]["latents_mean"], whole[row]["latents_mean"], atol=1e-5,
                                   rtol=1e-4)


def test_equal_names_sizes_and_times_in_another_folder_are_no_equal_files(tmp_path, models, encoded):
    """As archives and containers give all files one time."""
    roots = [folder(tmp_path / name, n) for name, n in (("one", 6), ("two", 7))]
    for n, root in enumerate(roots):
        for i in range(6 + n):
            pixels = np.random.default_rng([n, i]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{i}.bmp")  # of one size whatever is drawn
        manifest(root, [json.loads(line) | {"image_file_name": f"images/{i}.bmp"} for i, line in enumerate(
            (root / "metadata.jsonl").read_text().splitlines())])
        for path in root.rglob("*.*"):
            os.utime(path, (1, 1))
    first, second = (everything(root, build(root, models, tmp_path / "cache")) for root in roots)
    assert encoded == [4, 2, 4, 3]
    assert not any(torch.equal(first[row]["latents_mean"], second[row]["latents_mean"]) for row in first)


def test_a_cut_copy_of_a_shard_is_mended(tmp_path, models, encoded):
    """Where a cache was copied, its shards are files of their own and may be cut like any other."""
    root = folder(tmp_path / "data")
    build(root, models, tmp_path / "cache")
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    manifest(root, rows[:9])
    second = build(root, models, tmp_path / "cache")
    before = everything(root, second)
    for path in second.glob("*.safetensors"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:len(content) // 2])
    encoded.clear()
    assert build(root, models, tmp_path / "cache") == second and not encoded
    assert same(before, everything(root, second))


def fail_at(names: tuple[str, ...], root: Path, models, cache: Path, monkeypatch) -> None:
    """A build that can write no file whose name begins so."""
    plain = files.write_atomic

    def full(path, content):
        if path.name.startswith(names):
            raise RunFailed("no space left")
        plain(path, content)
    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(RunFailed):
        build(root, models, cache)
    monkeypatch.setattr(files, "write_atomic", plain)


def test_what_a_killed_build_has_made_is_known_to_another(tmp_path, models, encoded, monkeypatch):
    root = folder(tmp_path / "data")
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    fail_at(("index.json",), root, models, tmp_path / "cache", monkeypatch)
    rows[5]["text"] = "another caption"
    manifest(root, rows)
    encoded.clear()
    assert len(everything(root, build(root, models, tmp_path / "cache"))) == 10 and not encoded


def test_a_split_whose_files_are_all_broken_is_told_before_encoding(tmp_path, models, encoded):
    root = folder(tmp_path / "data")
    for i in (4, 9):
        (root / f"audio/{i}.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match="no usable row in split 'val'"):
        build(root, models, tmp_path / "cache", max_bad_share=0.5)
    assert not encoded


def test_other_models_or_settings_share_nothing(tmp_path, models, encoded):
    root = folder(tmp_path / "data")
    build(root, models, tmp_path / "cache")
    other = tmp_path / "clap"
    shutil.copytree(models[1], other)
    content = load_file(other / "model.safetensors")
    save_file({key: value + 1e-3 * ("linear2.bias" in key) for key, value in content.items()},
              other / "model.safetensors", {"format": "pt"})
    for options in ({"flip": True}, {"windows": 2}):
        encoded.clear()
        build(root, models, tmp_path / "cache", **options)
        assert encoded == [4, 4, 2], options
    encoded.clear()
    build(root, (models[0], other), tmp_path / "cache")
    assert encoded == [4, 4, 2]


def test_a_killed_build_beside_another_cache_goes_on(tmp_path, models, encoded, monkeypatch):
    """Also where the other cache has gone in between: its shards are linked by then."""
    root = folder(tmp_path / "data", 14)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    manifest(root, rows[:3] + rows[9:11])
    first = build(root, models, tmp_path / "cache")
    manifest(root, rows)
    fail_at(("rows-00002", "index.json"), root, models, tmp_path / "cache", monkeypatch)
    shutil.copytree(tmp_path / "cache", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / first.name)
    encoded.clear()
    whole = everything(root, build(root, models, tmp_path / "cache"))
    assert encoded == [2, 2] and len(whole) == 14
    encoded.clear()
    again = everything(root, build(root, models, tmp_path / "without"))
    assert encoded == [2, 2] and again.keys() == whole.keys()
    for row, item in whole.items():
        for key, value in item.items():
            torch.testing.assert_close(again[row][key], value, atol=1e-5, rtol=1e-4)


def clean(place: Path, *args) -> subprocess.CompletedProcess:
    return script("prepare_data.py", "clean", "--cache-dir", place, *args)


def test_clean_lists_the_caches_and_removes_the_old_ones(tmp_path, models):
    root, cache = folder(tmp_path / "data"), tmp_path / "cache"
    first = build(root, models, cache)
    flipped = build(root, models, cache, flip=True)
    shutil.copy(root / "images/3.png", tmp_path / "old.png")
    old = os.stat(root / "images/3.png").st_mtime_ns
    picture(root / "images/3.png", 77)
    second = build(root, models, cache)
    gone = build(folder(tmp_path / "gone", 6), models, cache)
    shutil.rmtree(tmp_path / "gone")
    half = cache / ("0" * 16)
    half.mkdir()
    (half / "rows-00000.safetensors").write_bytes(bytes(3_000_000))
    (cache / "notes").mkdir()  # not ours
    (cache / "notes/index.json").write_text("{}")
    thesis = cache / ("1" * 16) / "thesis.txt"  # nor this, in spite of its name
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    (cache / ("2" * 16)).symlink_to(second)
    before = everything(root, second)

    def listed() -> dict[str, str]:
        return {line.split()[0]: line for line in ok(clean(cache)).stdout.splitlines()}
    lines = listed()
    assert len(lines) == 6 and "MB shared with others)" in lines[second.name]
    assert f"10 rows of {root}" in lines[second.name]
    assert f"OLD: {second.name} was used later" in lines[first.name]
    assert f"6 rows of {tmp_path / 'gone'}, which is not there now" in lines[gone.name]
    assert "3.0 MB  not finished" in lines[half.name]
    assert not [name for name, line in lines.items() if "OLD" in line and name != first.name]
    # the old picture again: what is used counts, not what was built last
    shutil.copy(tmp_path / "old.png", root / "images/3.png")
    os.utime(root / "images/3.png", ns=(old, old))
    assert build(root, models, cache) == first and "OLD" in listed()[second.name]
    assert len(list(cache.iterdir())) == 8  # nothing went
    done = clean(cache, "--remove", "notes")
    assert done.returncode == 2 and "error: --remove notes: no such cache in" in done.stderr
    assert "2 caches, 3 removed" in ok(clean(cache, "--remove", "old", flipped.name, half.name)).stdout
    assert {path.name for path in cache.iterdir()} == {
        first.name, gone.name, "notes", thesis.parent.name, "2" * 16} and thesis.exists()
    assert build(root, models, cache) == first
    after = everything(root, first)
    assert same({row: before[row] for row in before if "3.png" not in row}, after)
    done = clean(tmp_path / "none")
    assert done.returncode == 2 and "no such folder" in done.stderr.splitlines()[-1]


def test_clean_removes_no_cache_that_is_being_built(tmp_path, models):
    built = build(folder(tmp_path / "data", 5), models, tmp_path / "cache")
    holder = subprocess.Popen([sys.executable, "-c", f"""
from pathlib import Path
from clap2diffusion.base import files
held = files.lock(Path({str(built)!r}))
print("locked", flush=True)
input()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "locked\n"
    done = clean(tmp_path / "cache", "--remove", built.name)
    holder.communicate("\n")
    assert done.returncode == 2 and "a process is building it, so it was not removed" in done.stderr
    assert (built / "index.json").exists()


# --- training side ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, batch", [(1, 1), (5, 2), (7, 3), (16, 4), (10, 10), (3, 7)])
def test_every_epoch_shows_each_sample_once_and_any_step_can_start(size, batch):
    steps = size * 6 // batch
    stream = [i for b in step_batches(size, batch, 3, 0, steps) for i in b]
    for epoch in range(len(stream) // size):
        assert sorted(stream[epoch * size:(epoch + 1) * size]) == list(range(size))
    assert list(step_batches(size, batch, 3, 2, steps)) == list(step_batches(size, batch, 3, 0, steps))[2:]
    assert stream[:size] == np.random.default_rng([3, 0]).permutation(size).tolist()
    # processes that take their share of each batch show the same stream, wherever it begins
    for world in (2, 3):
        shares = [list(step_batches(size, batch, 3, 1, 5, (rank, world))) for rank in range(world)]
        together = [sum(parts, []) for parts in zip(*shares)]
        assert together == list(step_batches(size, batch * world, 3, 1, 5))
    if size > 4:
        assert stream[:size] != stream[size:2 * size]
        assert stream[:batch] != next(step_batches(size, batch, 4, 0, 1))


def test_loader_gives_the_same_bits_for_any_number_of_workers(tmp_path, models):
    root = folder(tmp_path / "data")
    cache = build(root, models, tmp_path / "cache", workers=2)
    assert content(cache)["rows-00000.safetensors"] == content(
        build(root, models, tmp_path / "again"))["rows-00000.safetensors"]
    dataset = AudioImageDataset(root, "train", cache)
    runs = [list(make_loader(dataset, 3, 1, 2, 7, workers, torch.device("cpu"))) for workers in (0, 1, 2)]
    assert len(runs[0]) == 5 and runs[0][0]["index"].tolist() == next(step_batches(8, 3, 1, 2, 3))
    assert runs[0][0]["latents_mean"].shape == (3, 1, 4, 16, 16)
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for make, error in ((lambda: AudioImageDataset(root, "test", cache), "no usable row in split 'test'"),
                        (lambda: make_loader(dataset, 9, 0, 0, 1, 0, torch.device("cpu")),
                         "8 usable rows, fewer than a batch of 9"),
                        (lambda: AudioImageDataset(root, "train", tmp_path), "not a finished feature cache")):
        with pytest.raises(UserError, match=error):
            make()


class _Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


class _Breaks(_Dies):
    SENTENCE = "cache/rows-00000.safetensors: cannot be read (cut off); start again, it will be rebuilt"

    def __getitem__(self, i):
        raise RunFailed(self.SENTENCE)


def test_what_breaks_in_a_loader_process_is_said_as_in_our_own():
    for workers in (0, 1):
        with pytest.raises(RunFailed) as caught:
            list(make_loader(_Breaks(), 2, 0, 0, 2, workers, torch.device("cpu")))
        assert str(caught.value) == _Breaks.SENTENCE
        assert not multiprocessing.active_children()  # although `caught` holds the traceback


def test_workers_ignore_ctrl_c_and_a_killed_one_is_one_sentence():
    with pytest.raises(RunFailed, match="--shm-size=8g"):
        list(make_loader(_Dies(), 2, 0, 0, 2, 1, torch.device("cpu")))
