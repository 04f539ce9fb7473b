"""What holds for any input: readers of manifests, configs, checkpoints, sounds, pictures; the sampler."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import train_stage1
import train_stage2
import train_stage3
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.settings import Number, parse_config
from clap2diffusion.base.tensor_file import digest, read_tensors
from clap2diffusion.dataset.dataset import step_batches
from clap2diffusion.dataset.decoding import BadFile, decode_audio, load_image
from clap2diffusion.dataset.manifest import SPLITS, read_manifest
from common import load_checkpoint

settings.register_profile("suite", max_examples=150, deadline=None, derandomize=True,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("suite")
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: (st.lists(inner, max_size=3)
                                   | st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=8)
CORPUS = ROOT / "tools/corpus"  # what tools/fuzz.py found with the three functions below


def manifest(content: bytes, place: Path) -> None:
    """As each kind of manifest. An accepted row lies inside the folder."""
    names = ("metadata.jsonl", "metadata.csv", "train_metadata.json")
    for name in names:
        for old in names:
            (place / old).unlink(missing_ok=True)
        (place / name).write_bytes(content)
        try:
            rows, bad = read_manifest(place)
        except UserError as error:
            assert str(place) in str(error)
            continue
        assert rows or bad
        for row in rows:
            assert row.split in SPLITS and isinstance(row.text, str)
            for path in (row.audio_path, row.image_path):
                assert path.is_relative_to(place.resolve()) and ".." not in path.parts, path


def config(content: bytes, place: Path) -> None:
    """As the config of each stage. An accepted value is one that its flag accepts."""
    (place / "c.json").write_bytes(content)
    for number, stage in enumerate((train_stage1, train_stage2, train_stage3), 1):
        parser = stage.build_parser()
        try:
            found = parse_config(parser, f"stage{number}", ["--config", str(place / "c.json")])
        except UserError as error:
            assert str(place / "c.json") in str(error) or str(error).startswith("--frozen-dtype")
            continue
        for action in parser._actions:
            value = getattr(found, action.dest, None)
            if isinstance(action.type, Number) and not isinstance(value, list):
                assert action.type.check(value) == value
            assert not action.choices or value in action.choices


def checkpoint(content: bytes, place: Path) -> None:
    """As a checkpoint's whole file, and as the header of one whose digest is right."""
    path = place / "step-00000001.safetensors"
    tensors = {"audio_proj.a": torch.zeros(2), "b": torch.ones(1)}
    files = [content]
    try:
        header = json.loads(content)
        if isinstance(header, dict):
            header.pop("sha256", None)
            header["sha256"] = digest(header, tensors)
        files.append(save(tensors, {"clap2diffusion": json.dumps(header)}))
    except (ValueError, RecursionError):
        pass
    if len(content) > 8:  # a header of safetensors' own, with a length that fits
        files.append(struct.pack("<Q", len(content)) + content + bytes(16))
    for file in files:
        path.write_bytes(file)
        try:
            header, found = read_tensors(path)
            part = torch.nn.Linear(1, 1)
            load_checkpoint(path, header, found, {"audio_proj": part})
        except UserError as error:
            assert str(path) in str(error)


TARGETS = {"manifest": manifest, "config": config, "checkpoint": checkpoint}


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        (Path(temporary) / "audio").mkdir()
        yield Path(temporary)


@pytest.mark.parametrize("target", list(TARGETS))
def test_what_the_fuzzer_found_stays_mended(target, place):
    cases = sorted((CORPUS / target).iterdir())
    assert len(cases) >= 2
    for path in cases:
        TARGETS[target](path.read_bytes(), place)


@pytest.mark.parametrize("target", list(TARGETS))
def test_any_bytes_are_read_or_refused(target, place):
    given(st.binary(max_size=300)
          | st.text(max_size=200).map(str.encode))(lambda content: TARGETS[target](content, place))()


NAMES = st.sampled_from(["audio/0.wav", "audio/../0.wav", "../0.wav", "/etc/passwd", "", ".", "..", "audio",
                         "a\0b", "é", "e\u0301", "audio//0.wav", "./audio/./0.wav"])
ROW = st.fixed_dictionaries({}, optional={"image_file_name": NAMES | JSON, "audio_file_name": NAMES | JSON,
                                          "text": st.text(max_size=5) | JSON,
                                          "label": st.text(max_size=3) | JSON,
                                          "split": st.sampled_from(["train", "val", "test", "x"]) | JSON,
                                          "caption": st.text(max_size=5) | JSON, "file_name": NAMES | JSON,
                                          "category": st.integers() | JSON,
                                          "properties": JSON})


def test_any_rows_are_read_or_listed_as_bad(place):
    @given(st.lists(ROW | JSON, min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\n\n"]),
           st.booleans())
    def check(rows, newline, ascii_only):
        content = newline.join(json.dumps(row, ensure_ascii=ascii_only)
                               for row in rows).encode("utf-8", "surrogatepass")
        manifest(content, place)
        (place / "train_metadata.json").unlink(missing_ok=True)
        # a first row [...] could be a JSON list, which is another format
        (place / "metadata.jsonl").write_bytes(b'{"row": 0}\n' + content)
        try:
            good, bad = read_manifest(place)
        except UserError as error:
            assert f"no row of the manifest can be used ({len(rows) + 1}, " in str(error)
            return
        assert len(good) + len(bad) == len(rows) + 1  # none is lost, none is counted twice
    check()


def test_default_then_json_then_flag(place):
    """A flag wins over the config, the config over the default; the origin of each value is told."""
    parser = train_stage1.build_parser()
    numbers = {a.dest: a for a in parser._actions if isinstance(a.type, Number) and a.nargs is None}

    def legal(action):
        kind = action.type
        low, high = max(kind.low, -1e6), min(kind.high, 1e6)
        if kind.kind is int:
            step = kind.multiple_of or 1
            return st.integers(-(-int(low) // step), int(high) // step).map(lambda n: n * step)
        return st.floats(low, high, allow_nan=False)
    values = st.fixed_dictionaries({}, optional={key: legal(action) for key, action in numbers.items()})

    @given(values, values, values)
    def check(common, stage, flags):
        merged = {key: action.default for key, action in numbers.items()} | common | stage | flags
        assume(sum(merged[key] for key in ("caption_drop", "audio_drop", "both_drop")) <= 1)
        assume(merged["val_clips"] != 1)
        (place / "c.json").write_text(json.dumps({"common": common, "stage1": stage}))
        given_flags = [token for key, value in flags.items()
                       for token in (f"--{key.replace('_', '-')}={value}",)]
        found = parse_config(train_stage1.build_parser(), "stage1",
                             ["--config", str(place / "c.json"), *given_flags])
        for key, action in numbers.items():
            expected = flags.get(key, stage.get(key, common.get(key, action.default)))
            assert getattr(found, key) == expected
            places = (("flag", flags), ("[stage1]", stage), ("[common]", common), ("", numbers))
            origin = next(name for name, settings in places if key in settings)
            assert found.origin.get(key, "").endswith(origin) and bool(origin) == (key in found.origin)
    check()


def test_any_config_is_accepted_or_refused(place):
    keys = [a.dest for a in train_stage1.build_parser()._actions if a.option_strings]
    section = st.dictionaries(st.sampled_from(keys) | st.text(max_size=5), JSON, max_size=4)
    given(st.fixed_dictionaries({}, optional={"common": section, "stage1": section, "stage2": JSON,
                                              "stage3": section, "data": JSON}))(
        lambda content: config(json.dumps(content).encode(), place))()


HEADER = json.loads((CORPUS / "checkpoint/header").read_text())


def test_any_header_of_a_checkpoint_is_read_or_refused(place):
    def branches(inner):
        pairs = st.tuples(st.text(max_size=4) | JSON, inner)
        return (st.fixed_dictionaries({"items": st.lists(inner, max_size=3)})
                | st.fixed_dictionaries({"pairs": st.lists(pairs, max_size=3)}))
    tensors = st.fixed_dictionaries({"tensor": st.sampled_from(["audio_proj.a", "b", "none"])})
    trees = st.recursive(tensors | st.fixed_dictionaries({"value": JSON}) | JSON, branches, max_leaves=6)
    some = st.fixed_dictionaries({}, optional={key: JSON for key in HEADER})
    headers = some.map(lambda some: HEADER | some)
    given(headers | trees.map(lambda tree: HEADER | {"objects": {"audio_proj": tree}}))(
        lambda header: checkpoint(json.dumps(header).encode(), place))()


def damaged(content: bytes):
    """Bytes of a file with some changed, cut or repeated."""
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1) | st.integers(0, 100), st.integers(0, 255)),
                       max_size=5)

    def apply(edits, keep, more) -> bytes:
        found = bytearray(content)
        for at, value in edits:
            found[at % len(found)] = value
        return bytes(found[:max(1, int(keep * len(found)))]) + more
    return st.builds(apply, changes, st.floats(0, 1) | st.just(1.0), st.binary(max_size=20))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_any_sound_gives_finite_samples_or_a_reason(suffix, place):
    path = place / f"a.{suffix}"
    sf.write(path, np.random.default_rng(0).uniform(-.5, .5, (4000, 2)), 8000)

    @given(damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        try:
            clips, flags = decode_audio(path, 16000, 1.0, windows=2)
        except BadFile as error:
            assert str(error)
            return
        assert len(clips) == 2 and len(flags) <= 1
        for clip in clips:
            assert clip.dtype == np.float32 and 0 < len(clip) <= 16000 and np.isfinite(clip).all()
            assert np.abs(clip).max() < 2
    check()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_any_picture_gives_values_in_range_or_a_reason(kind, place):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=kind)

    @given(damaged(file.getvalue()))
    def check(content):
        (place / "picture").write_bytes(content)
        try:
            pixels = load_image(place / "picture", 32)
        except BadFile as error:
            assert str(error)
            return
        assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32 and np.abs(pixels).max() <= 1
    check()


@given(size=st.integers(1, 60), batch=st.integers(1, 12), seed=st.integers(0, 2 ** 31 - 1),
       world=st.integers(1, 4), start=st.integers(0, 40))
def test_each_epoch_shows_each_sample_once(size, batch, seed, world, start):
    """For any size, batch, seed, number of processes and step it goes on from."""
    stop = start + 3 * size // batch + 2

    def stream(first: int, processes: int) -> list[int]:
        """What all processes together see from micro-step `first` on."""
        each = [list(step_batches(size, batch * world // processes, seed, first, stop, (rank, processes)))
                for rank in range(processes)]
        return [i for together in zip(*each) for one in together for i in one]
    whole = stream(0, world)
    assert whole == stream(0, 1)  # the order is that of one process
    assert stream(start, world) == whole[start * batch * world:]
    for epoch in range(len(whole) // size):
        assert Counter(whole[epoch * size:(epoch + 1) * size]) == Counter(range(size))


def test_nothing_but_our_own_errors_is_meant(place):
    """The checks above fail where a reader breaks, that is, where it raises an error that is not ours."""
    def broken(content: bytes, place: Path) -> None:
        raise KeyError("a reader that forgot a case")
    with pytest.raises(KeyError):
        given(st.binary(max_size=3))(lambda content: broken(content, place))()
    with pytest.raises(UserError):
        parse_config(train_stage1.build_parser(), "stage1", ["--config", str(ROOT / "none.json")])
