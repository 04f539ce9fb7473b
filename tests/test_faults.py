"""Faults a user meets: the exit code, one sentence that names the place, no traceback, an intact run."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BASE, CLAP, ENV, ROOT, ok, script

import runs


def user_error(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr and last.startswith("error: ")
    for word in words:
        assert word in last, last


def with_json(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text, words", [
    ('{"stage1": {"learning_rat": 1}}', ["stage1.learning_rat", "did you mean 'learning_rate'"]),
    ('{"stagex": {}}', ["unknown section 'stagex'", "did you mean"]),
    ('{"stage1": {"steps": "8"}}', ["stage1.steps", 'got "8"', "whole number"]),
    ('{"stage1": {"steps": 8.0}}', ["got 8.0", "whole number"]),
    ('{"stage1": {"learning_rate": true}}', ["got true", "number"]),
    ('{"stage1": {"steps": null}}', ["got null"]),
    ('{"common": {"flip": "yes"}}', ["common.flip", "true or false"]),
    ('{"stage1": {"caption_drop": 1.5}}', ["got 1.5", "from 0 to 1"]),
    ('{"common": {"image_size": 100}}', ["got 100", "multiple of 8"]),
    ('{"stage1": {"clip": NaN}}', ["NaN"]),
    ('{"stage1": {"clip": 1e999}}', ["inf"]),
    ('{"stage1": {"clip": 1, "clip": 2}}', ["'clip' stands twice"]),
    ('{"common": {"precision": "fp16"}}', ["got 'fp16'", "bf16, fp32"]),
    ('{"stage1": {', ["line 1", "not valid JSON"]),
    ("[1]", ["list", "expected an object"]),
])
def test_a_wrong_config_is_named(tmp_path, text, words):
    path = with_json(tmp_path, text)
    began = time.time()
    user_error(script("train_stage1.py", "--config", path), str(path), *words)
    assert time.time() - began < 3  # nothing heavy was loaded


@pytest.mark.parametrize("flags, words", [
    (["--batch", "2"], ["--batch"]), (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["--steps", "many"], ["'many'", "whole number"]), (["--config", "missing.json"], ["missing.json", "cannot be read"]),
])
def test_a_wrong_flag_is_named(flags, words):
    user_error(script("train_stage1.py", *flags), *words)


def test_run_all_stages_finds_a_mistake_of_stage_3_before_anything_runs(tmp_path):
    path = with_json(tmp_path, '{"stage3": {"window_lo": 0.3}}')
    done = subprocess.run(["bash", str(ROOT / "run_all_stages.sh"), str(path)], capture_output=True, text=True,
                          env={**ENV, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    user_error(done, "stage3.window_lo", "did you mean 'window_low'")


def test_missing_models_are_named_within_five_seconds_before_the_data(config, tmp_path):
    began = time.time()
    user_error(script("train_stage1.py", "--config", config, "--run", tmp_path, "--base-model", tmp_path / "none"),
               str(tmp_path / "none"), "from_pretrained")
    assert time.time() - began < 20
    user_error(script("train_stage1.py", "--config", config, "--run", tmp_path, "--clap-model", BASE), str(BASE),
               "config.json is missing")


def test_a_hub_name_without_network_is_one_sentence(config, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train_stage1.py"), "--config", str(config), "--run", str(tmp_path),
                           "--base-model", "nobody/no-such-model"], capture_output=True, text=True,
                          env={**ENV, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    user_error(done, "nobody/no-such-model", "local folder")


def test_a_missing_manifest_and_an_unwritable_run_folder(config, tmp_path):
    user_error(script("train_stage1.py", "--config", config, "--run", tmp_path, "--data-root", tmp_path / "no"),
               str(tmp_path / "no"))
    (tmp_path / "file").write_text("")
    user_error(script("train_stage1.py", "--config", config, "--run", tmp_path / "file"), str(tmp_path / "file"),
               "cannot be used as output folder")


def test_bad_rows_are_listed_all_at_once_and_stop_the_run_above_the_limit(config, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    lines = (world / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "world" / json.loads(lines[3])["audio_file_name"]).write_bytes(b"not a sound")
    (tmp_path / "world" / json.loads(lines[5])["image_file_name"]).write_bytes(b"")
    (tmp_path / "world/metadata.jsonl").write_text("\n".join(lines) + '\n{"half": ')
    common = ("train_stage1.py", "--config", config, "--run", tmp_path / "r", "--data-root", tmp_path / "world",
              "--cache-dir", tmp_path / "cache", "--steps", 1, "--samples", 0)
    done = script(*common)
    user_error(done, "3 of 71 rows cannot be used", "bad_rows.txt", "--max-bad-share")
    assert all(word in done.stdout for word in ("train-00003.wav", "train-00005.png", "line 71"))
    done = ok(script(*common, "--max-bad-share", 0.1))
    assert "3 of 71 rows cannot be used" in done.stdout and "39 train" not in done.stdout and "38 train" in done.stdout


def test_stage_2_without_stage_1_says_what_to_run(config, tmp_path):
    user_error(script("train_stage2.py", "--config", config, "--run", tmp_path), "stage1", "has not run",
               f"python train_stage1.py --config {config} --run {tmp_path}")
    (tmp_path / "stage1").mkdir()
    user_error(script("train_stage2.py", "--config", config, "--run", tmp_path), "is not finished")


def test_wrong_files_as_checkpoint_and_adapter_are_refused(config, run, world, tmp_path):
    """Another stage's result, a pickle that would run code, a flipped byte, a truncated file."""
    user_error(script("train_stage2.py", "--config", config, "--run", tmp_path, "--init-from", run / "stage2"),
               "is of stage2, expected a result of stage1")
    evil, marker = tmp_path / "evil", tmp_path / "executed"
    evil.mkdir()

    class Attack:
        def __reduce__(self):
            return (Path.touch, (marker,))

    good = (run / "stage1/final.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[-1000] ^= 1
    for content, word in ((pickle.dumps(Attack()), "not a checkpoint of ours"), (good[:-50], "not a checkpoint of ours"),
                          (b"", "not a checkpoint of ours"), (bytes(flipped), "does not match its SHA-256")):
        (evil / "final.safetensors").write_bytes(content)
        user_error(script("train_stage2.py", "--config", config, "--run", tmp_path, "--init-from", evil), word, str(evil))
    (evil / "adapter.safetensors").write_bytes(pickle.dumps(Attack()))
    sound = next((world / "audio").iterdir())
    user_error(script("generate.py", "--audio", sound, "--run", evil, "--out", tmp_path / "o.png"), "not an adapter")
    assert not marker.exists()


def test_broken_newest_checkpoints_are_named_and_the_one_before_is_used(config, run, tmp_path):
    shutil.copytree(run / "stage1", tmp_path / "stage1")
    for name in ("result.json", "final.safetensors", "adapter.safetensors"):
        (tmp_path / "stage1" / name).unlink()
    newest, second = (tmp_path / f"stage1/checkpoints/step-000000{step}.safetensors" for step in ("10", "09"))
    newest.write_bytes(newest.read_bytes()[:1000])
    second.write_bytes(b"")
    (tmp_path / "stage1/checkpoints/.step-00000011.safetensors.1.tmp").write_bytes(b"half")
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--keep", 2))
    assert all(str(p) in done.stderr for p in (newest, second)) and "falling back" in done.stderr
    assert "resuming at step 6" in done.stdout  # with two broken ones above it, keeping two must not drop the good one
    assert sorted(runs.RunFolder(tmp_path / "stage1").steps()) == [9, 10]
    assert len(list((tmp_path / "stage1/checkpoints").glob("*.broken"))) == 2
    assert "left by an interrupted save, removed" in done.stdout and not list(tmp_path.rglob("*.tmp"))
    import torch
    ours, unbroken = (runs.read_checkpoint(p / "stage1/final.safetensors")[1] for p in (tmp_path, run))
    assert all(torch.equal(ours[key], unbroken[key]) for key in unbroken)


def test_resuming_with_other_settings_shows_both_values(config, run, tmp_path):
    shutil.copytree(run / "stage1", tmp_path / "stage1")
    (tmp_path / "stage1/result.json").unlink()
    command = ("train_stage1.py", "--config", config, "--run", tmp_path)
    user_error(script(*command, "--learning-rate", 0.5), "learning_rate 0.001 -> 0.5", "--allow-changed")
    user_error(script(*command, "--num-tokens", 4), "'num_tokens': 8", "'num_tokens': 4")
    ok(script(*command, "--learning-rate", 0.5, "--allow-changed", "--log-every", 2))
    (tmp_path / "stage1/result.json").unlink()
    ok(script(*command, "--learning-rate", 0.5, "--allow-changed", "--steps", 4))  # fewer than are done: it ends


def test_a_finished_stage_is_left_alone_and_a_fresh_start_keeps_it(config, run, tmp_path):
    shutil.copytree(run / "stage1", tmp_path / "stage1")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "stage1").rglob("*.safetensors")}
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path))
    assert "already complete" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "stage1").rglob("*.safetensors")}
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--fresh", "--steps", 1, "--samples", 0))
    [backup] = tmp_path.glob("stage1.before-*")
    assert (backup / "final.safetensors").exists() and str(backup) in done.stdout


def test_two_runs_in_one_folder_the_second_names_the_first(config, tmp_path):
    holder = runs.RunFolder(tmp_path / "stage1")
    user_error(script("train_stage1.py", "--config", config, "--run", tmp_path), str(tmp_path / "stage1"),
               f"process {os.getpid()} is working")
    assert holder.folder.exists()


def test_a_full_disk_keeps_the_old_checkpoint(config, run, tmp_path):
    shutil.copytree(run / "stage1", tmp_path / "stage1")
    for path in [tmp_path / "stage1/result.json", tmp_path / "stage1/checkpoints/step-00000010.safetensors"]:
        path.unlink()
    newest = tmp_path / "stage1/checkpoints/step-00000009.safetensors"
    before = newest.read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_stage1.py"), "--config", str(config), "--run", str(tmp_path)],
        capture_output=True, text=True, env=ENV,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)))
    user_error(done, "no space left in", "MB needed", code=1)
    assert newest.read_bytes() == before and not list(tmp_path.rglob("*.tmp"))


def test_a_wrong_clap_and_unusable_sounds_are_refused(run, world, tmp_path):
    sound = next((world / "audio").iterdir())
    other = tmp_path / "clap"
    shutil.copytree(CLAP, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4096:] = bytes(4096)
    (other / "model.safetensors").write_bytes(weights)
    common = ("generate.py", "--run", run, "--out", tmp_path / "o.png", "--audio")
    user_error(script(*common, sound, "--clap-model", other), str(other), "was trained with CLAP")
    (tmp_path / "a.wav").write_text("no sound")
    user_error(script(*common, tmp_path / "a.wav"), str(tmp_path / "a.wav"))
    user_error(script(*common, tmp_path), str(tmp_path), "not a file")
    user_error(script("generate.py", "--run", tmp_path, "--audio", sound), str(tmp_path), "run_all_stages.sh")
    user_error(script("generate.py", "--run", run, "--audio", sound, "--out", tmp_path / "no/o.png"), "make it first")
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py", "train_stage3.py", "generate.py", "report.py",
                                  "prepare_data.py"])
def test_help_answers_at_once(name):
    script(name, "--help")  # warm the file cache
    began = time.time()
    done = ok(script(name, "--help"))
    assert "usage:" in done.stdout and time.time() - began < 1.0
    assert not done.stderr


@pytest.mark.parametrize("ending, code", [("pass", 0), ("raise config.RunFailed('it broke')", 1), ("raise KeyError('nobody foresaw it')", 1)])
def test_a_worker_that_ignores_signals_does_not_keep_a_finished_program_alive(ending, code):
    """Python ends its children with SIGTERM and waits; a stage whose loader was still open once waited for ever."""
    program = f"""
import multiprocessing, signal, time
import config
def ignore(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)
def main():
    ready = multiprocessing.Event()
    child = multiprocessing.Process(target=ignore, args=(ready,), daemon=True)
    child.start()
    ready.wait()
    print(child.pid)
    {ending}
config.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert not Path(f"/proc/{int(done.stdout)}").exists()
