"""Names, outputs and machines that are not UTF-8, not a terminal, or lack shared memory."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT, ok, script
from PIL import Image
from test_faults_data import folder, write_manifest
from tqdm import tqdm

from clap2diffusion.base import exits, files, progress, settings, workers
from clap2diffusion.base.exits import UserError

PLAIN_C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # then Python reads names as ASCII
KOREAN = "개가 짖는다"


def begun(name: str, *args, shell: str = "", **env) -> subprocess.CompletedProcess:
    """One of our scripts by its own Python, as the environment matters. shell: redirections behind it."""
    command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, env=ENV | env, capture_output=True, cwd=ROOT)


def good_data(tmp_path: Path) -> Path:
    rows = folder(tmp_path / "data")
    for row in rows[:2]:
        row["split"] = "val"
    write_manifest(tmp_path / "data", rows)
    return tmp_path / "data"


# --- what the output cannot show ----------------------------------------------------------------------------

def test_a_prompt_that_the_output_cannot_show_is_drawn_all_the_same(run, world, tmp_path):
    sound, out = next((world / "audio").iterdir()), tmp_path / "out.png"
    done = begun("generate.py", "--run", run, "--audio", sound, "--steps", "2", "--prompt", KOREAN, "--out",
                 out, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert json.loads(Image.open(out).text["clap2diffusion"])["prompt"] == KOREAN
    assert ascii(KOREAN) in done.stdout.decode("ascii")


def test_closed_outputs_end_nothing(tmp_path):
    assert begun("prepare_data.py", "check", "--data-root", good_data(tmp_path),
                 shell="<&- >&- 2>&-").returncode == 0


# --- what is not UTF-8 --------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, where", [
    (["generate.py", "--audio", "a.wav", "--prompt", b"caf\xe9"], "--prompt"),
    (["generate.py", "--audio", "a.wav", b"--prompt=caf\xe9"], "--prompt"),
    (["generate.py", "--audio", "a.wav", b"caf\xe9.wav", "--steps", "2"], "--audio"),
    (["train_stage1.py", "--run", b"caf\xe9"], "--run"),
    (["evaluate.py", "--run", b"caf\xe9"], "--run"),
    (["prepare_data.py", "check", "--data-root", b"caf\xe9"], "--data-root"),
    (["prepare_data.py", b"ch\xe9ck"], "the command line"),
    (["train_stage2.py", b"--r\xe9n", "runs/tiny"], "the command line"),
], ids=str)
def test_an_argument_that_is_not_utf_8_is_refused(command, where):
    done = begun(*command)
    [said] = done.stderr.decode().splitlines()
    assert done.returncode == 2 and said.startswith(f"error: {where}: got '")
    assert "the byte 0xE9 is not UTF-8; write it in UTF-8" in said


def test_a_locale_that_misreads_letters_is_told(tmp_path):
    done = begun("generate.py", "--audio", "a.wav", "--prompt", KOREAN, **PLAIN_C)
    said = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and said.startswith("error: --prompt: got ") and "PYTHONUTF8=1" in said
    assert begun("prepare_data.py", "check", "--data-root", good_data(tmp_path), **PLAIN_C).returncode == 0


def test_half_a_surrogate_pair_in_a_config_is_refused(tmp_path):
    config = tmp_path / "c.json"
    for half, said in (("\udce9", "the byte 0xE9 is not UTF-8"), ("\ud83d", "\\ud83d alone is not UTF-8")):
        config.write_text(json.dumps({"common": {"data_root": half}}), "utf-8")
        done = script("train_stage1.py", "--config", config)
        assert done.returncode == 2 and f"error: {config}: common.data_root: got " in done.stderr
        assert said in done.stderr


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    files.write_json(tmp_path / "a.json", {"prompt": "caf\udce9 " + KOREAN})
    assert KOREAN in (tmp_path / "a.json").read_text("utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"prompt": "caf\udce9 " + KOREAN}
    with pytest.raises(UserError, match="0xE9"):
        settings.check_text("caf\udce9", "x")


@pytest.mark.parametrize("command", [
    ["generate.py", "--audio", "a.wav", "--out", "n" * 300 + ".png"], ["generate.py", "--audio", "n" * 300],
    ["evaluate.py", "--run", "n" * 300],
    ["prepare_data.py", "check", "--data-root", "n" * 300]], ids=lambda command: " ".join(command)[:40])
def test_a_name_that_is_too_long_is_the_users_error(command):
    done = script(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "nnn" in done.stderr.splitlines()[-1]


def test_the_longest_name_can_be_written(tmp_path):
    files.write_text(tmp_path / ("n" * 255), KOREAN)
    assert (tmp_path / ("n" * 255)).read_text("utf-8") == KOREAN and len(list(tmp_path.iterdir())) == 1


# --- what a stage shows -------------------------------------------------------------------------------------

def test_only_settings_that_differ_from_the_defaults_are_shown(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"common": {"steps": 7, "keep": 5}, "stage1": {"flip": true}, "stage2": {"steps": 8}}')
    done = script("train_stage1.py", "--config", path, "--data-root", tmp_path / "none", "--seed", "0",
                  "--no-whiten")
    assert done.returncode == 2 and done.stdout.splitlines() == [  # keep and seed are given, and the defaults
        "stage1: 4 of 52 settings are not the script's defaults; --dry-run and config.json in its folder "
        "show all",
        f"  data_root                {tmp_path / 'none'!s:<40} flag",
        f"  flip                     {'True':<40} {path} [stage1]",
        f"  steps                    {'7':<40} {path} [common]",
        f"  whiten                   {'False':<40} flag"]


def test_a_dry_run_shows_all_settings_and_where_the_run_stands(config, tmp_path):
    """A run is stopped in the middle; then finished; nothing of it changes."""
    def tried(*more) -> tuple[int, dict[str, str], str]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        done = script("train_stage1.py", "--config", config, "--run", tmp_path, "--dry-run", *more)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        lines = [line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("  ")]
        return done.returncode, {key: (*rest, "")[0] for key, *rest in lines}, done.stderr

    code, shown, _ = tried()
    assert code == 0 and shown["begins"] == "at step 0"
    assert shown["trains"] == "10 steps of 4 samples, 1 times the training rows"
    assert shown["data"].endswith("40 train and 20 val rows") and shown["weight_decay"] == "0.01"
    ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--steps", 4, "--seed", 1))
    kept = json.loads((tmp_path / "stage1/config.json").read_text())
    assert kept.keys() - {"features", "content"} <= shown.keys() and kept["keep"] == 3
    code, shown, _ = tried("--steps", 4, "--seed", 1)
    assert code == 0 and shown["begins"] == "not at all: it is complete"
    for name in ("result.json", "final.safetensors"):
        (tmp_path / "stage1" / name).unlink()
    code, shown, _ = tried("--steps", 4, "--seed", 1)
    newest = tmp_path / "stage1/checkpoints/step-00000004.safetensors"
    assert code == 0 and shown["begins"] == f"at step 4, from {newest}"
    code, _, said = tried("--steps", 4, "--seed", 2)
    assert code == 2 and "seed 1 -> 2" in said.splitlines()[-1]
    code, _, said = tried("--batch-size", 41)
    assert code == 2 and "fewer than a batch of 41" in said.splitlines()[-1]
    code, shown, _ = tried("--steps", 4, "--seed", 2, "--fresh")
    assert code == 0 and shown["begins"] == "anew; what is there now is kept in a backup folder"


def test_a_library_that_nobody_asked_for_says_nothing_of_its_kernels():
    """diffusers and peft import bitsandbytes, which on some CPUs misses a kernel that no stage runs."""
    program = """
import train_stage1
import clap2diffusion.engine.stage, peft, sys, logging
assert "bitsandbytes" in sys.modules
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named kernels")
logger.warning("a thing that counts")
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENV, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "note from bitsandbytes: a thing that counts\n", done
    assert done.stderr == ""


# --- text in UTF-8 ------------------------------------------------------------------------------------------

def without_encoding(source: str) -> list[str]:
    """Calls that open or read text in the locale's encoding instead of one that they name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            given = {key.arg for key in node.keywords
                     if key.arg != "text" or ast.unparse(key.value) == "True"}
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            named = "encoding" in given or any(text.startswith("utf-8") for text in texts)
            others = ("os", "Image", "tarfile", "zipfile", "av", "context")
            binary = texts and "b" in texts[-1] or owner in others
            if (name in ("read_text", "write_text") and owner != "files" and not named
                    or name == "open" and not binary and not named
                    or given & {"text", "universal_newlines"} and not named):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_every_text_file_is_opened_as_utf_8():
    assert len(without_encoding("open(p)\np.read_text()\nrun(c, text=True)\np.open('a')")) == 4
    assert not without_encoding("open(p, 'rb')\np.read_text('utf-8')\nos.open(p, 0)\np.write_text(t, 'utf-8')"
                                "\nf(text=t)")
    paths = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv", "shared"} & {*p.relative_to(ROOT).parts}]
    found = [f"{path}: {one}" for path in paths for one in without_encoding(path.read_text("utf-8"))
             if not (path.name == "files.py" and "write_text(path, json.dumps" in one)]
    assert len(paths) > 40 and not found, found


# --- progress -----------------------------------------------------------------------------------------------

def test_progress_in_a_file_is_a_line_now_and_then(capsys, monkeypatch):
    for _ in tqdm(range(2000), **progress.bar_options(desc="rows", unit="row", leave=False)):
        pass
    said = capsys.readouterr().err
    assert [line.split(" [")[0] for line in said.splitlines()] == ["rows: 0 of 2000", "rows: 2000 of 2000"]
    assert "\r" not in said and said.endswith("]\n")
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with tqdm(**progress.bar_options(total=5, desc="rows", unit="row")) as bar:
        for loss in range(5):
            bar.set_postfix({"loss": loss}, refresh=False)
            bar.update()
    said = capsys.readouterr().err
    assert "\r" not in said and len(said.splitlines()) >= 5 and said.splitlines()[-1].endswith(", loss=4]")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.bar_options(desc="rows", leave=False) == {"desc": "rows", "leave": False}


def test_a_stage_writes_few_lines_into_a_file(config, run, tmp_path):
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path / "run"))
    said = [line for line in done.stderr.splitlines() if line.startswith("stage1:")]
    assert "\r" not in done.stderr and len(said) == 2, done.stderr
    assert said[0].startswith("stage1: 0 of 10 [") and said[1].startswith("stage1: 10 of 10 [")
    assert "loss=" in said[1]


# --- machines without shared memory -------------------------------------------------------------------------

NO_SEMAPHORES = """import _multiprocessing
class SemLock(_multiprocessing.SemLock):
    def __new__(cls, *args):
        raise FileNotFoundError(2, "No such file or directory")
_multiprocessing.SemLock = SemLock
"""
ALONE = "semaphores cannot be made (No such file or directory), perhaps for want of a /dev/shm"


@pytest.fixture
def no_shm(tmp_path) -> dict:
    """The environment of a machine whose semaphores cannot be made, as without /dev/shm."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_SEMAPHORES, "utf-8")
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}


def test_check_works_without_shared_memory(no_shm, tmp_path):
    done = begun("prepare_data.py", "check", "--data-root", good_data(tmp_path), **no_shm)
    assert done.returncode == 0 and done.stderr.decode().count(ALONE) == 1, done.stderr
    assert b"4 rows (2 train, 2 val, 0 test), 0 unusable" in done.stdout


def test_world_works_without_shared_memory(no_shm, tmp_path):
    sizes = ("--train", "2", "--val", "1", "--test", "1")
    done = begun("prepare_data.py", "world", "--out", tmp_path / "world", *sizes, **no_shm)
    assert done.returncode == 0 and done.stderr.decode().count(ALONE) == 1, done.stderr
    ok(script("prepare_data.py", "world", "--out", tmp_path / "again", *sizes))
    for path in (tmp_path / "world").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "world")).read_bytes()


def test_a_stage_works_without_shared_memory(no_shm, config, tmp_path):
    flags = ("--config", config, "--run", tmp_path / "run", "--steps", "3", "--workers", "2")
    done = begun("train_stage1.py", *flags, **no_shm)
    assert done.returncode == 0 and done.stderr.decode().count(ALONE) == 1, done.stderr.decode()[-2000:]


def test_workers_are_kept_where_they_can_be():
    assert workers.usable_workers(2) == 2 and workers.usable_workers(0) == 0


def test_too_little_shared_memory_is_told():
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...\n"
                         "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space")
    assert exits._sentence_of(error).endswith("use Docker's --shm-size=8g or --workers 0")
