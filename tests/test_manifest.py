"""What the manifest alone shows is told at once, what is cut is told once, and the libraries are heard."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE, ENV, ROOT, ok, script, write_config
from PIL import Image

from clap2diffusion.dataset.captions import cut_texts, text_limit
from clap2diffusion.dataset.manifest import read_manifest

LONG = "a red dog and a blue cat sit in the rain below an old tree while it rains and rains and rains again"


@pytest.fixture
def place(tmp_path, world):
    """A copy of the world's manifest and links to its files; rewrite(change) changes its rows."""
    root = tmp_path / "data"
    root.mkdir()
    for name in ("audio", "images"):
        shutil.copytree(world / name, root / name)
    rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]

    def rewrite(change) -> Path:
        changed = change([dict(row) for row in rows])
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        return root
    return rewrite


def stage(tmp_path: Path, root: Path, *flags) -> subprocess.CompletedProcess:
    config = write_config(tmp_path / "c.json", root, tmp_path / "run", tmp_path / "cache")
    return script("train_stage1.py", "--config", config, "--steps", 1, "--val-clips", 2, *flags)


def one_recording(rows: list[dict]) -> list[dict]:
    """Every sound of val has a name of its own."""
    return [row | {"audio_file_name": f"copies/{i}.wav"} if row["split"] == "val" else row
            for i, row in enumerate(rows)]


def one_sound(split: str):
    def change(rows: list[dict]) -> list[dict]:
        first = next(row for row in rows if row["split"] == split)
        return [row | {"audio_file_name": first["audio_file_name"]} if row["split"] == split else row
                for row in rows]
    return change


GAPS = [  # the rows that are left or changed, the flags, the sentence
    (lambda rows: [row for row in rows if row["split"] != "val"], (), "split 'val' has no row (40 train, "),
    (lambda rows: [row for row in rows if row["split"] != "train"], (), "split 'train' has no row (0 train"),
    (lambda rows: rows[:3] + [row for row in rows if row["split"] != "train"], (),
     "split 'train' has 3 rows, fewer than a batch of 4; add rows or lower --batch-size"),
    (lambda rows: rows[:1] + [row for row in rows if row["split"] != "train"], ("--batch-size", 1),
     "split 'train' has one sound only (1 train, 20 val, 10 test), expected at least two: they are whitened"),
    (one_sound("val"), (), "split 'val' has one sound only (40 train, 20 val, 10 test), expected at least"),
    (one_sound("train"), (), "split 'train' has one sound only (40 train, 20 val, 10 test), expected"),
    (lambda rows: [row | {"audio_file_name": f"sounds/{row['audio_file_name']}"} for row in rows], (),
     "none of the 70 sounds that the manifest names is there; the first is "),
]


@pytest.mark.parametrize("change, flags, says", GAPS, ids=[gap[2][:40] for gap in GAPS])
def test_a_stage_tells_what_the_manifest_shows_before_encoding(change, flags, says, place, tmp_path):
    done = stage(tmp_path, place(change), *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/data: ") and says in last, last
    assert not (tmp_path / "cache").exists()


def test_a_validation_split_of_one_recording_is_told_before_encoding(place, tmp_path):
    root = place(one_recording)
    (root / "copies").mkdir()
    for i in range(70):
        shutil.copy(root / "audio/train-00000.wav", root / f"copies/{i}.wav")
    done = stage(tmp_path, root)
    assert done.returncode == 2 and "20 sounds of split 'val' hold one recording" in done.stderr
    assert not (tmp_path / "cache").exists()
    shutil.copy(root / "audio/train-00001.wav", root / "copies/50.wav")
    assert "stage1: done" in ok(stage(tmp_path, root)).stdout


def test_a_stage_says_at_each_start_what_is_cut_and_what_is_not_there(place, tmp_path):
    """Two long captions; more clips asked for than there are. A start that encodes nothing says it too."""
    def change(rows: list[dict]) -> list[dict]:
        rows[2]["text"] = rows[5]["text"] = LONG
        return rows
    root = place(change)
    for run in ("first", "second"):
        done = ok(stage(tmp_path, root, "--val-clips", 50, "--run", tmp_path / run))
        assert ("2 of 70 captions are longer than the base model reads and are cut; the first is "
                "metadata.jsonl line 3: 51 tokens, of which 32 are read; left out: ") in done.stdout
        assert "--val-clips 50: the val split has 20 clips, all of them are taken" in done.stdout
        assert "note from" not in done.stdout + done.stderr


@pytest.mark.parametrize("text", [LONG, "a dog " * 40,
                                  "caf\u00e9 " * 30, "\uac1c\uac00 \uc9d6\ub294\ub2e4 " * 10])
def test_what_is_left_out_is_what_the_encoder_does_not_read(text):
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    limit = text_limit(BASE)
    cut = cut_texts([text, "short"], BASE)
    assert [*cut] == [text] and limit == cut[text].limit == 32
    assert cut[text].tokens == len(tokenizer(text, verbose=False)["input_ids"])
    read = tokenizer.decode(tokenizer(text, truncation=True, max_length=limit)["input_ids"],
                            skip_special_tokens=True)
    assert "".join((read + cut[text].left_out).split()) == "".join(text.split())


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_limit_itself_is_not_cut(extra):
    """Words of one token each: `limit - 2` of them fill the encoder beside begin- and end-of-text."""
    limit = text_limit(BASE)
    cut = cut_texts([" ".join(["a"] * (limit - 2 + extra))], BASE)
    assert [one.left_out for one in cut.values()] == (["a"] if extra > 0 else [])


def test_check_counts_with_the_tokenizer_alone(place, tmp_path):
    """No torch is loaded, no network is asked."""
    def change(rows: list[dict]) -> list[dict]:
        rows[2]["text"] = LONG
        return rows
    program = ("import sys, runpy\nsys.argv = ['prepare_data.py', 'check', '--data-root', sys.argv[1]]\n"
               "try: runpy.run_path('prepare_data.py', run_name='__main__')\n"
               "finally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, place(change)], cwd=ROOT, capture_output=True,
                          text=True, env={**ENV, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"})
    assert done.returncode == 0, done.stderr
    assert "caption cut: 1\n  metadata.jsonl line 3: 51 tokens, of which 32 are read" in done.stdout
    assert done.stdout.endswith("False\n")


def test_generate_says_once_what_it_leaves_out(run, world, tmp_path):
    import soundfile
    sound, rate = soundfile.read(next((world / "audio").iterdir()))
    soundfile.write(tmp_path / "long.wav", [*sound] * 3, rate)
    done = ok(script("generate.py", "--run", run, "--audio", tmp_path / "long.wav", "--steps", 2, "--prompt",
                     LONG, "--out", tmp_path / "x.png"))
    assert done.stdout.count("51 tokens, of which 32 are read; left out: ") == 1
    assert done.stdout.count("long.wav: 12.0 s long, of which CLAP hears the first 4 s") == 1
    assert "note from" not in done.stdout + done.stderr


def test_a_library_s_warning_is_said_once_as_a_note(run, world, tmp_path):
    """A key that diffusers does not know; and on a normal run there is no note."""
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base/vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_such_key": 3}))
    sound = next((world / "audio").iterdir())
    command = ("generate.py", "--run", run, "--audio", sound, "--steps", 2, "--out", tmp_path / "x.png")
    said = ok(script(*command, "--base-model", tmp_path / "base")).stdout
    assert said.count("note from diffusers: The config attributes {'no_such_key': 3} were passed to "
                      "AutoencoderKL, but are not expected and will be ignored.") == 1
    assert said.count("note from") == 1
    assert "note from" not in ok(script(*command)).stdout


def test_notes_leave_out_what_means_nothing_and_repeat_nothing(capsys):
    from clap2diffusion.base.device import quiet_libraries
    quiet_libraries()
    quiet_libraries()
    logger = logging.getLogger("diffusers.a_test")
    for message in ("\x1b[1mone\x1b[0m\n thing", "one thing", "No LoRA keys associated to NoneType found "
                    "with the prefix='text_encoder'. This is safe to ignore"):
        logger.warning(message)
    logger.info("nothing")
    assert capsys.readouterr() == ("note from diffusers: one thing\n", "")


def test_a_split_may_be_a_folder_of_the_names_and_unread_columns_are_named(tmp_path):
    rows = [{"image": f"{folder}/{i}.png", "file_name": f"{folder}/{i}.wav", "caption": "t", "weight": 1,
             "Category": 3} for i, folder in enumerate(("train", "validation", "test", "other"))]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    found, bad = read_manifest(tmp_path, said.append)
    assert not bad and [row.split for row in found][:3] == ["train", "val", "test"]
    assert [row.label for row in found] == ["3"] * 4
    assert said == ["1 rows name no split: assigned by a hash of the audio name, 90/5/5 train/val/test",
                    "columns of the manifest that nothing reads: 'weight'"]


def test_an_evaluation_says_how_many_rows_it_leaves_out(place, capsys):
    from clap2diffusion.judging.clips import Clips
    root = place(lambda rows: rows)
    assert len(Clips(str(root), "test", 4, 64).rows) == 4 and not capsys.readouterr().out
    place(lambda rows: [row | {"split": "x"} for row in rows[:2]] + rows[2:])
    assert len(Clips(str(root), "test", 4, 64).rows) == 4
    said = "2 rows cannot be used and are left out; prepare_data.py check lists them"
    assert capsys.readouterr().out == f"{root}: {said}\n"


def test_a_tokenizer_whose_config_names_no_limit(run, world, tmp_path):
    """The text encoder's own number is taken: the same picture, and the same words left out."""
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base/tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    command = ("generate.py", "--run", run, "--audio", next((world / "audio").iterdir()), "--steps", 2,
               "--prompt", LONG)
    plain = ok(script(*command, "--out", tmp_path / "plain.png")).stdout
    other = ok(script(*command, "--out", tmp_path / "other.png", "--base-model", tmp_path / "base")).stdout
    assert plain.splitlines()[0] == other.splitlines()[0] and "of which 32 are read" in other
    with Image.open(tmp_path / "plain.png") as first, Image.open(tmp_path / "other.png") as second:
        assert first.tobytes() == second.tobytes()
