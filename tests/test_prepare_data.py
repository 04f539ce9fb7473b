"""prepare_data.py: the sound world's bytes, splits and pairs, and Tux Paint's stamps."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ENV, ROOT, ok, script
from PIL import Image
from scipy.stats import spearmanr

from clap2diffusion.world import sound_world
from clap2diffusion.world.making import plan_labels

STAMPS = Path("/usr/share/tuxpaint/stamps")


def digest(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*.*"))}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_whoever_draws_them(tmp_path):
    sizes = ("--train", 12, "--val", 5, "--test", 5)
    ok(script("prepare_data.py", "world", "--out", tmp_path / "a", *sizes, "--workers", 1))
    ok(script("prepare_data.py", "world", "--out", tmp_path / "b", *sizes, "--workers", 2))
    ok(script("prepare_data.py", "world", "--out", tmp_path / "c", *sizes, "--seed", 1))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    sounds = [value for key, value in digest(tmp_path / "a").items() if key.endswith((".wav", ".png"))]
    assert len(set(sounds)) == len(sounds) == 44  # no clip or picture twice, across splits too
    info = soundfile.info(next((tmp_path / "a/audio").iterdir()))
    assert (info.samplerate, info.channels, info.subtype, info.duration) == (48000, 1, "PCM_16", 4.0)
    assert Image.open(next((tmp_path / "a/images").iterdir())).size == (64, 64)
    done = ok(script("prepare_data.py", "world", "--out", tmp_path / "a", *sizes))
    assert "already complete" in done.stdout
    done = script("prepare_data.py", "world", "--out", tmp_path / "a", "--train", 13)
    assert done.returncode == 2 and '"train": 12' in done.stderr and '"train": 13' in done.stderr


def test_a_killed_world_goes_on_to_the_same_bytes(tmp_path):
    command = [sys.executable, str(ROOT / "prepare_data.py"), "world", "--train", "60", "--val", "1",
               "--test", "1", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "a")], env=ENV, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "a").glob("audio/*.wav"))) < 5:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and not (tmp_path / "a/metadata.jsonl").exists()
    for name in ("a", "b"):
        ok(subprocess.run([*command, str(tmp_path / name)], env=ENV, capture_output=True, text=True))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_one_in_five_holds_two_sounds_in_train_every_other_and_nine_pairs_are_never_heard():
    assert len(sound_world.UNHEARD_PAIRS) == len({frozenset(p) for p in sound_world.UNHEARD_PAIRS}) == 9
    unheard = {frozenset(pair) for pair in sound_world.UNHEARD_PAIRS}
    for split, n in (("train", 4800), ("val", 100), ("test", 300)):
        plan = plan_labels(split, n)
        pairs = [frozenset(labels) for labels in plan if len(labels) == 2]
        singles = [labels[0] for labels in plan if len(labels) == 1]
        assert len(plan) == n and len(pairs) == (n // 2 if split == "train" else n // 5)
        first = [labels for labels in plan if len(labels) == 2
                 and labels[0] == min(labels, key=sound_world.CLASSES.index)]
        assert abs(2 * len(first) - len(pairs)) <= 2  # no class is on one side more often than it must
        counts = [singles.count(name) for name in sound_world.CLASSES]
        assert max(counts) - min(counts) <= 1
        assert set(pairs) & unheard == (unheard if split == "test" else set())
    heard = {frozenset(pair) for pair in combinations(sound_world.CLASSES, 2)} - unheard
    assert {frozenset(labels) for labels in plan_labels("train", 800) if len(labels) == 2} == heard


def test_of_two_sounds_the_low_one_stands_left_and_the_high_one_right(tmp_path):
    ok(script("prepare_data.py", "world", "--out", tmp_path / "a", "--train", 30, "--val", 1, "--test", 1))
    rows = [json.loads(line) for line in (tmp_path / "a/metadata.jsonl").read_text().splitlines()]
    pairs = [row["properties"]["sources"] for row in rows if len(row["properties"]["sources"]) == 2]
    assert len(pairs) == 15
    assert all(left["pitch"] <= 0.4 and right["pitch"] >= 0.6 for left, right in pairs)
    state = sound_world.State(tuple(sound_world.Source(**source) for source in pairs[0]), 0.5, 0)
    (x, y, _), (right, higher, _) = (sound_world.place(state, i) for i in (0, 1))
    assert x < 32 < right and y > higher  # rows count downwards


def states(label: str, vary: str, n: int = 12):
    """States that differ in one property alone, evenly from 0 to 1."""
    for value in np.linspace(0.02, 0.98, n):
        properties = {"loudness": 0.6, "pitch": 0.5, "rate": 0.5, "density": 0.3, vary: float(value)}
        density = properties.pop("density")
        yield value, sound_world.State((sound_world.Source(label, **properties, x=0.5),), density, 7)


def object_mask(state: sound_world.State) -> np.ndarray:
    """Where a scene differs from the same sky without a source."""
    empty = sound_world.draw_scene(sound_world.State((), state.density, state.seed))
    return np.abs(np.asarray(sound_world.draw_scene(state)).astype(int) - np.asarray(empty)).sum(-1) > 40


@pytest.mark.parametrize("label", sound_world.CLASSES)
def test_each_property_runs_through_sound_and_picture(label):
    """Spearman's rho of a property and a plain measure of each side is nearly 1, one at a time."""
    def level(waveform):
        return np.sqrt(np.mean(waveform ** 2))

    def centroid(waveform):
        power = np.abs(np.fft.rfft(waveform)) ** 2
        return (power * np.fft.rfftfreq(len(waveform))).sum() / power.sum()

    def floor(waveform):
        return np.percentile(np.sqrt(np.mean(waveform.reshape(-1, 480) ** 2, axis=1)), 5)

    values, pairs = zip(*states(label, "loudness"), strict=True)
    assert spearmanr(values, [level(sound_world.synthesise(s)) for s in pairs])[0] > 0.95
    assert spearmanr(values, [object_mask(s).any(0).sum() for s in pairs])[0] > 0.9
    values, pairs = zip(*states(label, "pitch"), strict=True)
    assert spearmanr(values, [centroid(sound_world.synthesise(s)) for s in pairs])[0] > 0.9
    assert spearmanr(values, [-np.nonzero(object_mask(s))[0].mean() for s in pairs])[0] > 0.95
    values, pairs = zip(*states(label, "density"), strict=True)
    assert spearmanr(values,
                     [-np.asarray(sound_world.draw_scene(s)).astype(int)[:3].sum() for s in pairs])[0] > 0.95
    quiet = [sound_world.State((), s.density, s.seed) for s in pairs]
    assert spearmanr(values, [floor(sound_world.synthesise(s)) for s in quiet])[0] > 0.95
    counts = [s.sources[0].count for _, s in states(label, "rate")]
    assert counts == sorted(counts) and set(counts) == {1, 2, 3, 4, 5}
    pictures = {np.asarray(sound_world.draw_scene(s)).tobytes() for _, s in states(label, "rate")}
    assert len(pictures) == 5  # the count is all that rate changes in the picture


def test_tuxpaint_without_the_package_names_the_apt_line(tmp_path):
    done = script("prepare_data.py", "tuxpaint", "--out", tmp_path / "out", "--stamps", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("sudo apt-get install -y tuxpaint-stamps-default")


def test_tuxpaint_reads_stamps_as_the_package_lays_them_out(tmp_path):
    """A folder like the package's: PNG with alpha, SVG, speech (left out), two stamps with one sound."""
    stamps = tmp_path / "stamps/animals"
    (stamps / "symbols").mkdir(parents=True)
    tone = (0.1 * np.sin(np.arange(8000) * 0.3)).astype(np.float32)
    for name in ("cat", "kitten", "bird"):
        soundfile.write(stamps / f"{name}.ogg", tone * (2 if name == "bird" else 1), 8000)
        (stamps / f"{name}.txt").write_text(f"A {name}.\nde.utf8=Ein Tier.\n")
    shutil.copy(stamps / "cat.ogg", stamps / "kitten.ogg")
    for speech in ("cat_desc", "cat_desc_de", "symbols/a"):
        soundfile.write(stamps / f"{speech}.ogg", tone, 8000)
    for name in ("cat", "kitten"):
        Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(stamps / f"{name}.png")
    (stamps / "bird.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10">'
                                     '<rect x="0" y="0" width="5" height="10" fill="#0000ff"/></svg>')
    ok(script("prepare_data.py", "tuxpaint", "--out", tmp_path / "out", "--stamps", tmp_path / "stamps",
              "--size", 32))
    rows = {row["label"]: row for row in rows_of(tmp_path / "out")}
    assert set(rows) == {"cat", "kitten", "bird"} and rows["cat"]["text"] == "A cat."
    assert rows["cat"]["split"] == rows["kitten"]["split"]  # one sound, one split
    bird = Image.open(tmp_path / "out" / rows["bird"]["image_file_name"])
    assert bird.size == (32, 32) and bird.getpixel((4, 16)) == (0, 0, 255, 255)
    assert bird.getpixel((28, 16))[3] == 0


@pytest.mark.skipif(not STAMPS.exists(), reason="Debian's tuxpaint-stamps-default is not installed")
def test_tuxpaint_package(tmp_path):
    done = ok(script("prepare_data.py", "tuxpaint", "--out", tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert len(rows) > 90 and "44100 Hz" in done.stdout
    by_sound: dict[str, set] = {}
    for row in rows:
        content = hashlib.sha256((tmp_path / "out" / row["audio_file_name"]).read_bytes()).hexdigest()
        by_sound.setdefault(content, set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_sound.values()) and len({r["split"] for r in rows}) == 3
