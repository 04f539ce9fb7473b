"""prepare_data.py videos: a folder of videos becomes a data folder, by the real script on real files."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ENV, JUDGE, ROOT, Started, has_no_process, ok, script, wait_for
from PIL import Image

import prepare_data
from clap2diffusion.base import workers
from clap2diffusion.base.workers import Lost, each_in_processes
from clap2diffusion.dataset.manifest import read_manifest
from clap2diffusion.videos import clips, preparing, splits
from clap2diffusion.videos.wanted import Wanted

av = pytest.importorskip("av")
RATE, FPS, SIZE = 24_000, 10, (96, 64)
CODECS = {".mp4": ("libx264", "aac"), ".webm": ("libvpx-vp9", "libopus"), ".mkv": ("libx264", "libopus")}


def tone(hertz: float, seconds: float, channels: int = 1) -> np.ndarray:
    """(channels, samples): a tone that swells, so that its loudest moment is at three quarters."""
    t = np.arange(round(seconds * RATE)) / RATE
    swell = np.exp(-0.5 * ((t - 0.75 * seconds) / (0.15 * seconds)) ** 2)
    return np.tile(0.6 * swell * np.sin(2 * np.pi * hertz * t), (channels, 1)).astype(np.float32)


def moving(i: int) -> np.ndarray:
    """Picture i of a video: the whole is striped, and its left half is as bright as i says."""
    picture = np.full((SIZE[1], SIZE[0], 3), 120, np.uint8)
    picture[:, ::8] = 200
    picture[:, 4::8] = 60
    picture[:, :48] = 40 + 4 * i
    return picture


def level(image: Image.Image) -> float:
    """The number of the picture of moving() that this is."""
    return (np.asarray(image.convert("L")).astype(float)[:, 4:40].mean() - 40) / 4


def film(path: Path, seconds: float, picture=moving, sound: np.ndarray | None = None) -> Path:
    """Write a video by PyAV; its suffix is its container. picture: number -> (height, width, 3), or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video_codec, audio_codec = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=FPS, options={"crf": "8"}) if picture else None
        layout = "mono" if sound is None or len(sound) == 1 else "stereo"
        audio = container.add_stream(audio_codec, rate=RATE, layout=layout) if sound is not None else None
        if video:
            video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
            video.codec_context.thread_count = 1
            for i in range(round(seconds * FPS)):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
            container.mux(video.encode(None))
        if audio:
            for at in range(0, sound.shape[1], 960):
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[:, at:at + 960]), format="fltp",
                                                   layout=layout)
                frame.sample_rate, frame.pts = RATE, at
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Good videos in folders that are their labels, and one of every kind that cannot be used."""
    root = tmp_path_factory.mktemp("videos")
    film(root / "dog_barking/one.mp4", 3, sound=tone(440, 3))
    film(root / "dog_barking/one.webm", 3, sound=tone(660, 3))
    film(root / "rain/one.mp4", 3, sound=tone(880, 3, 2))
    shutil.copy(root / "dog_barking/one.mp4", root / "rain/-고양이 é.mp4")
    bad = root / "bad"
    film(bad / "mute.mp4", 2)
    film(bad / "no picture.mp4", 2, None, tone(440, 2))
    film(bad / "silent.mp4", 2, sound=np.zeros((1, 2 * RATE), np.float32))
    opposed = tone(440, 2, 2) * np.array([[1], [-1]], np.float32)
    film(bad / "opposed.mkv", 2, sound=opposed)
    film(bad / "short.mp4", 0.5, sound=tone(440, 0.5))
    film(bad / "black.mp4", 2, lambda i: np.zeros((SIZE[1], SIZE[0], 3), np.uint8), tone(440, 2))
    film(bad / "still.mp4", 2, lambda i: moving(9), tone(440, 2))
    (bad / "broken.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    content = film(bad / "cut.mkv", 3, sound=tone(440, 3)).read_bytes()
    (bad / "cut.mkv").write_bytes(content[:len(content) // 2])
    (bad / "empty.mp4").touch()
    (bad / "link.mp4").symlink_to("nothing.mp4")
    (bad / "circle.mp4").symlink_to("circle.mp4")
    film(bad / "blink.mp4", 0.08, sound=tone(440, 0.08))
    os.mkfifo(bad / "pipe.mp4")
    (bad / "notes.txt").write_text("no video")
    return root


def prepare(videos: Path, out: Path, *flags) -> tuple[str, list[dict], dict[str, tuple]]:
    """Run the script: what it said, its rows, and (reason, detail) of each video that was left out."""
    said = ok(script("prepare_data.py", "videos", "--videos", videos, "--out", out, *flags)).stdout
    return said, rows_of(out), skipped(out)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]


def skipped(out: Path) -> dict[str, tuple]:
    with (out / "skipped.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


def contents(out: Path) -> dict[str, bytes]:
    """All that a data folder holds, without the journals, whose lines come in the order of their ends."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.relative_to(out).parts[0] != "journal" and path.name != ".lock"}


@pytest.fixture(scope="module")
def made(videos, tmp_path_factory) -> tuple[Path, str, list[dict], dict[str, tuple]]:
    out = tmp_path_factory.mktemp("made") / "out"
    return out, *prepare(videos, out, "--no-still")


def test_sounds_pictures_and_rows_are_the_videos(made, videos):
    out, said, rows, _ = made
    assert [(row["video"], row["label"], row["text"]) for row in rows] == [
        ("dog_barking/one.mp4", "dog_barking", "dog barking"),
        ("dog_barking/one.webm", "dog_barking", "dog barking"),
        ("rain/-고양이 é.mp4", "rain", "rain"), ("rain/one.mp4", "rain", "rain")]
    assert len({row["audio_file_name"] for row in rows}) == len({row["image_file_name"] for row in rows}) == 4
    for row, hertz in zip(rows, (440, 660, 440, 880), strict=True):
        assert not Path(row["audio_file_name"]).name.startswith("-")
        waveform, rate = soundfile.read(out / row["audio_file_name"])
        info = soundfile.info(out / row["audio_file_name"])
        assert (info.channels, info.subtype, info.format) == (1, "PCM_16", "FLAC")
        assert rate == (48_000 if row["video"].endswith(".webm") else RATE)  # Opus has no other
        assert abs(len(waveform) / rate - 3) < 0.05
        spectrum = np.abs(np.fft.rfft(waveform))
        assert abs(spectrum.argmax() * rate / len(waveform) - hertz) < 2
        loudest = np.convolve(waveform ** 2, np.ones(rate // 5), "same").argmax() / rate
        assert abs(loudest - 2.25) < 0.1
        # of 8 candidates in 3 s the one nearest to the middle is at 1.3125 s
        assert row["window_start_s"] == 0 and row["frame_time_s"] == 1.3
        with Image.open(out / row["image_file_name"]) as image:
            assert image.size == SIZE and image.format == "PNG"  # small: no blocks of JPEG
            assert abs(level(image) - 13) < 0.6
    assert "bars cropped in 0 pictures" in said and "2 classes" in said and "prepare_data.py check" in said
    log: list[str] = []
    assert len(read_manifest(out, log.append)[0]) == 4 and not log  # no column that nothing reads
    with Image.open(out / "preview.png") as sheet:
        assert sheet.size[0] == 4 * 192 + 3 * 4


def test_each_video_that_cannot_be_used_is_listed_with_its_reason(made):
    _, said, _, left_out = made
    reasons = {Path(name).name: reason for name, (reason, _) in left_out.items()}
    assert reasons == {
        "mute.mp4": "no sound track", "no picture.mp4": "no video track", "silent.mp4": "silent",
        "opposed.mkv": "silent", "short.mp4": "shorter than 1 s", "black.mp4": "only black or blank frames",
        "still.mp4": "a still picture", "broken.mp4": "broken", "empty.mp4": "broken", "cut.mkv": "cut off",
        "link.mp4": "broken", "pipe.mp4": "broken", "circle.mp4": "broken", "blink.mp4": "shorter than 1 s"}
    details = {Path(name).name: detail for name, (_, detail) in left_out.items()}
    assert details["broken.mp4"].startswith("not a file that FFmpeg reads")
    assert "cancelled by the mono mix" in details["opposed.mkv"] and "0.5" in details["short.mp4"]
    assert "14 left out (" in said and "2 silent" in said and "5 broken" in said


def times(out: Path) -> dict[Path, int]:
    """When each file was written, but for skipped.csv, which every call writes."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != "skipped.csv"}


def test_a_second_call_makes_nothing_again(made, videos):
    out, *_ = made
    before = times(out)
    said, *_ = prepare(videos, out, "--no-still")
    assert "already complete" in said and "18 done before" in said
    assert times(out) == before


def test_other_flags_on_a_begun_folder_are_refused(made, videos):
    out, *_ = made
    (out / "metadata.jsonl").rename(out / "away")  # begun, not complete
    done = script("prepare_data.py", "videos", "--videos", videos, "--out", out, "--no-still", "--size", 64)
    (out / "away").rename(out / "metadata.jsonl")
    assert done.returncode == 2
    said = f"error: {out}: was begun with other flags (size 512 -> 64); give the old ones, or another --out"
    assert done.stderr.splitlines()[-1] == said


@pytest.fixture(scope="module")
def many(videos, tmp_path_factory) -> Path:
    """Thirty videos in three folders, ten of them silent."""
    root = tmp_path_factory.mktemp("many")
    for i in range(30):
        source = ("dog_barking/one.mp4", "rain/one.mp4", "bad/silent.mp4")[i % 3]
        (root / f"class {i % 3}").mkdir(exist_ok=True)
        shutil.copy2(videos / source, root / f"class {i % 3}" / f"{i}.mp4")
    return root


@pytest.fixture(scope="module")
def unbroken(many, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    prepare(many, out)
    return out


def test_after_kill_9_the_same_command_goes_on_to_the_same_bytes(many, unbroken, tmp_path):
    out = tmp_path / "out"
    command = ("prepare_data.py", "videos", "--videos", many, "--out", out)
    process = Started(*command)
    wait_for(lambda: process.poll() is not None or len(list(out.glob("audio/*.flac"))) > 3, "a clip",
             process.said)
    process.send_signal(signal.SIGKILL)
    assert process.end().returncode == -9 and not (out / "metadata.jsonl").exists()
    has_no_process(process.pid)
    (out / "audio/.left.1.tmp").touch()
    ok(script(*command))
    assert contents(out) == contents(unbroken)


def test_after_sigterm_what_was_made_is_kept(many, unbroken, tmp_path):
    out = tmp_path / "out"
    command = ("prepare_data.py", "videos", "--videos", many, "--out", out, "--workers", 1)
    process = Started(*command)
    wait_for(lambda: process.poll() is not None or len(list(out.glob("audio/*.flac"))) > 3, "a clip",
             process.said)
    process.send_signal(signal.SIGTERM)
    assert process.end().returncode == 143
    done = ok(script(*command)).stdout
    assert 3 <= int(done.partition(" videos or parts of them, ")[2].split()[0]) < 30, done
    assert contents(out) == contents(unbroken)


def test_a_torn_line_of_the_journal_is_made_again(many, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    (out / "metadata.jsonl").unlink()
    journal = out / "journal/1-of-1/done.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert "29 done before" in prepare(many, out)[0]
    assert "30 done before" in prepare(many, out)[0]  # what follows the torn line is whole
    gone = next((out / "images").iterdir())  # a file that somebody removed
    gone.unlink()
    assert "29 done before" in prepare(many, out)[0]
    assert contents(out) == contents(unbroken) and gone.exists()


def test_shares_are_made_at_the_same_time_and_joined(many, unbroken, tmp_path):
    out = tmp_path / "out"
    command = ("prepare_data.py", "videos", "--videos", many, "--out", out)
    shares = [Started(*command, "--shard", f"{i}/3", "--workers", 1) for i in (1, 2, 3)]
    told = [ok(share.end()).stdout for share in shares]
    assert not (out / "metadata.jsonl").exists()
    numbers = [int(said.partition("is done, ")[2].split()[0]) for said in told]
    assert sum(numbers) == 30 and min(numbers) > 0
    said, *_ = prepare(many, out)
    assert "30 done before" in said and contents(out) == contents(unbroken)


def test_new_and_changed_videos_are_made_and_the_others_are_left(many, unbroken, videos, tmp_path):
    root, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(many, root, copy_function=shutil.copy2)
    shutil.copytree(unbroken, out, copy_function=shutil.copy2)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("audio/*.flac")}
    shutil.copy(videos / "dog_barking/one.webm", root / "class 0/new.webm")
    changed = root / "class 0/0.mp4"
    changed.write_bytes((videos / "rain/one.mp4").read_bytes())
    said, rows, _ = prepare(root, out)
    assert "29 done before" in said and len(rows) == 21
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("audio/*.flac")}
    made = {name for name, when in after.items() if before.get(name) != when}
    assert made == {Path(row["audio_file_name"]).name for row in rows
                    if row["video"] in ("class 0/0.mp4", "class 0/new.webm")}
    shutil.rmtree(root)
    done = ok(script("prepare_data.py", "videos", "--videos", root, "--out", out))
    assert "already complete" in done.stdout and rows_of(out) == rows


def test_windows_of_a_long_video_follow_each_other(videos, tmp_path):
    film(tmp_path / "v/long.mp4", 5, sound=tone(440, 5))
    _, rows, _ = prepare(tmp_path / "v", tmp_path / "out", "--windows", 9, "--window-s", 2)
    assert [row["window_start_s"] for row in rows] == pytest.approx([0, 3.0], abs=0.1)
    assert all(row["window_start_s"] < row["frame_time_s"] < row["window_start_s"] + 2 for row in rows)
    for row in rows:
        with Image.open(tmp_path / "out" / row["image_file_name"]) as image:
            assert abs(level(image) - round(row["frame_time_s"] * FPS)) < 0.8


LIST = """file,start_s,length_s,label,text,split
a.mp4,1,1.5,dog_barking,a dog,train
b.mp4,0,,rain,,test
a.mp4,0,1,dog_barking,a dog at the start,train
b.mp4,1,,rain,,train
c.mp4,0,,rain,,train
a.mp4,1,1.5,dog_barking,a dog,train
a.mp4,40,,dog_barking,a dog,train
d.mp4,0,,"rain, heavy",,train
"""


def test_a_list_gives_starts_labels_captions_and_splits(videos, tmp_path):
    root = tmp_path / "v"
    root.mkdir()
    for name in "abd":
        shutil.copy(videos / "dog_barking/one.mp4", root / f"{name}.mp4")
    (tmp_path / "list.csv").write_text(LIST)
    (tmp_path / "labels.json").write_text('{"rain": {"en": "rain"}}')
    said, rows, _ = prepare(root, tmp_path / "out", "--labels", tmp_path / "list.csv", "--pick", "loudest")
    keys = ("video", "window_start_s", "label", "text", "split")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("a.mp4", 1.0, "dog_barking", "a dog", "train"), ("b.mp4", 0.0, "rain", "rain", "test"),
        ("a.mp4", 0.0, "dog_barking", "a dog at the start", "train"),
        ("d.mp4", 0.0, "rain, heavy", "rain, heavy", "train")]
    first, whole = rows[0], rows[1]
    assert soundfile.info(tmp_path / "out" / first["audio_file_name"]).duration == 1.5
    # the loudest moment of the video is at 2.25 s; candidates are at 2.03, 2.22, 2.41 and at 2.06, 2.44 s
    assert first["frame_time_s"] == 2.2 and whole["frame_time_s"] in (2.0, 2.4)
    waveform, rate = soundfile.read(tmp_path / "out" / first["audio_file_name"])
    known = tone(440, 3)[0][RATE:RATE + len(waveform)]
    assert np.corrcoef(waveform, known)[0, 1] > 0.99 and rate == RATE  # the second to 2.5 s of the video
    assert (tmp_path / "out/labels.json").read_text() == (tmp_path / "labels.json").read_text()
    with (tmp_path / "out/skipped.csv").open(newline="") as file:
        reasons = [(row["file"], row["reason"]) for row in csv.DictReader(file)]
    assert reasons == [("b.mp4", "its video is in split test as well"), ("c", "missing from the folder"),
                       ("a.mp4", "listed twice"), ("a.mp4", "ends before its window")]
    assert "no clip is of split val: 0 of train's 3 videos become val" in said


def test_the_judge_picks_the_frame_that_fits_the_label(world, tmp_path):
    rows = [row for row in rows_of(world) if "+" not in row["label"]]
    scenes = {name: np.asarray(Image.open(world / next(row for row in rows if row["label"] == name)[
        "image_file_name"]).convert("RGB").resize(SIZE)) for name in ("fire", "rain")}
    for name in scenes:
        film(tmp_path / f"v/{name}/both.mp4", 2, lambda i: scenes["fire" if i < 10 else "rain"],
             tone(440, 2))
    flags = ("--pick", "siglip", "--judge", JUDGE, "--workers", 1)
    _, rows, _ = prepare(tmp_path / "v", tmp_path / "out", *flags)
    assert [(row["label"], row["frame_time_s"] < 1) for row in rows] == [("fire", True), ("rain", False)]


def test_the_world_as_videos_is_the_world(tmp_path):
    sizes = ("--train", 4, "--val", 1, "--test", 1)
    ok(script("prepare_data.py", "world", "--out", tmp_path / "w", "--videos", *sizes))
    assert sorted(Counter(path.suffix for path in (tmp_path / "w/videos").iterdir()).values()) == [1, 1, 1, 3]
    flags = ("--labels", tmp_path / "w/videos.csv", "--window-s", 4, "--size", 64)
    _, rows, left_out = prepare(tmp_path / "w/videos", tmp_path / "out", *flags)
    known = rows_of(tmp_path / "w")
    keys = ("text", "label", "split", "properties")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in known]
    assert not left_out and (tmp_path / "out/labels.json").exists()
    for row, before in zip(rows, known, strict=True):
        pictures = [np.asarray(Image.open(folder / one["image_file_name"]).convert("RGB")).astype(float)
                    for folder, one in ((tmp_path / "w", before), (tmp_path / "out", row))]
        assert np.abs(pictures[0] - pictures[1]).mean() < 4
        sounds = [soundfile.read(folder / one["audio_file_name"])[0]
                  for folder, one in ((tmp_path / "w", before), (tmp_path / "out", row))]
        assert len(sounds[0]) == len(sounds[1]) and np.corrcoef(*sounds)[0, 1] > 0.99  # not a sample late


@pytest.mark.parametrize("make, flags, said", [
    (lambda d, v: (d / "v").mkdir(), [], "{d}/v: holds no file that may be a video; give their folder with "
     "--videos"),
    (lambda d, v: None, [], "{d}/v: no such folder; give the folder of the videos with --videos"),
    (lambda d, v: shutil.copytree(v / "rain", d / "v"), ["--out", "{d}/v/out"],
     "--out {d}/v/out: lies in --videos {d}/v, or holds it where files are written, and they would be taken "
     "for videos; give another --out"),
    (lambda d, v: shutil.copytree(v / "rain", d / "out/audio/v"), ["--videos", "{d}/out/audio/v"],
     "--out {d}/out: lies in --videos {d}/out/audio/v, or holds it where files are written, and they would "
     "be taken for videos; give another --out"),
    (lambda d, v: (film(d / "v/a.mp4", 1), (d / "v/b.mp4").write_bytes(b"x" * 99)), [],
     "{d}/v: not one of 2 clips can be used (1 broken; 1 no sound track); {d}/out/skipped.csv says why of "
     "each"),
    (lambda d, v: (shutil.copytree(v / "rain", d / "v"), (d / "out").mkdir(),
                   (d / "out/metadata.jsonl").write_text("mine")), [],
     "{d}/out/metadata.jsonl: is not of this command, whose manifest would take its place; give "
     "another --out, or move it away"),
    (lambda d, v: shutil.copytree(v / "rain", d / "v"), ["--labels", "{d}/none.csv"],
     "{d}/none.csv: no such file, expected a list"),
    (lambda d, v: None, ["--shard", "3/2"], "argument --shard: got '3/2', expected i/n, such as 2/4 for the "
     "second of four"),
    (lambda d, v: shutil.copytree(v / "rain", d / "v"), ["--pick", "siglip", "--judge", "{d}/none"],
     "judge '{d}/none': there is no such folder here"),
    (lambda d, v: (shutil.copytree(v / "rain", d / "v"), (d / "labels.json").write_text('{"0": "rain"}'),
                   (d / "list.csv").write_text("file\none\n")), ["--labels", "{d}/list.csv"],
     "{d}/labels.json: '0' has 'rain', expected {{\"en\": text}} of each label; correct it"),
], ids=["empty", "none", "out inside", "videos inside", "nothing usable", "by hand", "no list", "shard",
        "judge", "another labels.json"])
def test_what_cannot_be_prepared_ends_in_one_sentence(make, flags, said, videos, tmp_path):
    make(tmp_path, videos)
    flags = [flag.format(d=tmp_path) for flag in flags]
    done = script("prepare_data.py", "videos", "--videos", tmp_path / "v", "--out", tmp_path / "out", *flags)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith(f"error: {said.format(d=tmp_path)}"), last


def test_a_decoder_that_crashes_or_hangs_costs_its_clip_alone(videos, tmp_path, monkeypatch):
    real = clips.make_clips

    def make(wanted, options):
        if wanted.file == "rain/one.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        if wanted.file == "bad/silent.mp4":
            time.sleep(600)
        return real(wanted, options)
    args = prepare_data.build_parser().parse_args(
        ["videos", "--videos", str(videos), "--out", str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setattr(clips, "make_clips", make)
        patch.setattr(preparing, "HANG_S", 1.5)
        preparing.prepare_videos(args)
    left_out = skipped(tmp_path / "out")
    assert left_out["rain/one.mp4"][0] == "a decoder crashed on it"
    assert "SIGKILL" in left_out["rain/one.mp4"][1]
    assert left_out["bad/silent.mp4"][0] == "a decoder hung on it"
    assert len(rows_of(tmp_path / "out")) == 4  # the other good ones, and the still one
    preparing.prepare_videos(args)  # perhaps it was want of memory
    assert len(rows_of(tmp_path / "out")) == 5 and "rain/one.mp4" not in skipped(tmp_path / "out")


def test_what_could_not_be_read_is_tried_again(videos, tmp_path, monkeypatch):
    real = clips.read_sound

    def read(path, *where):
        if path.name == "one.mp4":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *where)
    shutil.copytree(videos / "dog_barking", tmp_path / "v")
    args = prepare_data.build_parser().parse_args(
        ["videos", "--videos", str(tmp_path / "v"), "--out", str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setattr(clips, "read_sound", read)
        preparing.prepare_videos(args)
    assert skipped(tmp_path / "out") == {"one.mp4": ("broken", "cannot be read (Input/output error)")}
    preparing.prepare_videos(args)
    assert not skipped(tmp_path / "out") and len(rows_of(tmp_path / "out")) == 2


def square(job: int) -> int:
    if job == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 400:
        raise KeyError("of the function")
    return job * job


def test_processes_outlive_a_job_that_ends_one(tmp_path):
    found = dict(each_in_processes(square, range(1, 300), 2, 60))
    assert len(found) == 299 and isinstance(found.pop(7), Lost)
    assert all(value == job * job for job, value in found.items())
    with pytest.raises(KeyError, match="of the function"):
        list(each_in_processes(square, range(390, 410), 2, 60))


def own_number(_) -> int:
    return os.getpid()


def test_a_process_is_replaced_after_some_jobs(monkeypatch):
    monkeypatch.setattr(workers, "MOST_JOBS", 3)
    counts = Counter(number for _, number in each_in_processes(own_number, range(12), 2, 60))
    assert counts.total() == 12 and max(counts.values()) == 3


def wanted(video: str, split: str | None = None) -> Wanted:
    return Wanted(video, f"{video}.mp4", 0.0, 10.0, "rain", (), split, "")


def test_splits_stay_when_videos_come_and_go():
    ids = [f"video {i}" for i in range(4000)]
    found = splits.split_videos([wanted(name) for name in ids], 0, print)
    counts = Counter(found.values())
    assert abs(counts["train"] / 4000 - 0.9) < 0.02 and abs(counts["val"] / 4000 - 0.05) < 0.015
    fewer = splits.split_videos([wanted(name) for name in ids[::3]], 0, print)
    assert all(found[name] == split for name, split in fewer.items())
    assert splits.split_videos([wanted(name) for name in ids], 1, print) != found
    # these must never change: data folders of today are added to tomorrow
    assert [splits.place(name, 0) for name in ("a", "고양이", "-_0")] == [79, 30, 82]
    assert splits.place("é", 0) == splits.place("e\u0301", 0)


def test_the_lists_splits_hold_and_no_video_is_in_two():
    told: list[str] = []
    clips = [wanted(f"v{i}", "train") for i in range(400)]
    clips += [wanted("t", "test"), wanted("v3", "test"), wanted("x")]
    found = splits.split_videos(clips, 0, told.append)
    assert found["t"] == found["v3"] == "test" and found["x"] in ("train", "val", "test")
    val = [name for name, split in found.items() if split == "val" and name != "x"]
    assert 8 < len(val) < 35 and told[0].startswith(f"no clip is of split val: {len(val)} of train's 399")
    assert splits.split_videos([*clips, wanted("y", "val")], 0, told.append)["v7"] == "train"


def test_names_of_files_are_safe_and_differ():
    names = [clips.file_name(Wanted(video, file, 0.0, None, None, (), None, ""), start)
             for video, file, start in (
        ("one", "a/one.mp4", 0), ("one", "b/one.mp4", 0), ("one", "a/one.webm", 0), ("one", "a/one.mp4", 0.5),
        ("--abc_-12345", "--abc_-12345_000030.mp4", 0), ("x/고양이 é", "x/고양이 é.mp4", 0),
        ("long" * 80, "long" * 80, 4 * 3600), ("bad\udce9", "bad\udce9.mp4", 0))]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert len(name.encode()) < 140 and name[0] not in "-." and not set(name) & set("/\\ :*?\"<>|\udce9")
    assert names[5].startswith("고양이_é-")


def plan(config: Path, *flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/plan.py", str(config), *map(str, flags)], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)


def test_the_default_and_the_default_on_videos_differ_in_their_data_alone():
    configs = [json.loads((ROOT / f"configs/{name}.json").read_text()) for name in ("tiny", "tiny_videos")]
    for config in configs:
        del config["data"], config["common"]["data_root"], config["common"]["run"]
    assert configs[0] == configs[1]


def test_the_chain_checks_the_videos_and_their_list_before_anything_runs(videos, tmp_path):
    config, root = ROOT / "configs/vggsound.json", tmp_path / "my vggsound"
    done = plan(config, "--data-root", root)
    assert done.returncode == 2 and f"{root}/videos: no such folder" in done.stderr.splitlines()[-1]
    (root / "videos").mkdir(parents=True)
    shutil.copy(videos / "rain/one.mp4", root / "videos/--abc_-1234_000030.mp4")
    done = plan(config, "--data-root", root)
    assert done.returncode == 2 and f"{root}/vggsound.csv: no such file" in done.stderr.splitlines()[-1]
    (root / "vggsound.csv").write_text('--abc_-1234,30,"rain, heavy",train\n')
    done = ok(plan(config, "--data-root", root))
    assert f"DATA=('videos --videos '\"'\"'{root}/videos'\"'\"' " in done.stdout
    mistaken = json.loads(config.read_text())
    mistaken["data"] += ["--shard", "1/2"]
    (tmp_path / "c.json").write_text(json.dumps(mistaken))
    assert "data: --shard makes a share" in plan(tmp_path / "c.json", "--data-root", root).stderr
    mistaken["data"][-2:] = ["--pikc", "middle"]
    (tmp_path / "c.json").write_text(json.dumps(mistaken))
    done = plan(tmp_path / "c.json", "--data-root", root)
    assert done.returncode == 2 and done.stderr.endswith(
        "--pikc middle (see prepare_data.py --help)\n")
    for name in ("train/metadata.csv", "metadata.csv", "metadata.jsonl"):  # made by hand: used as it is
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
        done = ok(plan(config, "--data-root", root))
        assert "DATA=()" in done.stdout and f"{root / name} is there, so prepare_data.py" in done.stderr
    assert "DATA=()" in ok(plan(ROOT / "configs/tiny.json", "--data-root", root)).stdout
