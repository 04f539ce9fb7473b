"""The README's commands run as they stand, in a copy of the project whose configs take a few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
SMALL = {"stage1": {"steps": 2}, "stage2": {"steps": 2}, "stage3": {"steps": 2}}
TUXPAINT = Path("/usr/share/tuxpaint/stamps").exists()


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project without what git ignores; configs for two steps; `my_data` as the README describes it."""
    place = tmp_path_factory.mktemp("readme") / "copy"
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "data", "cache", ".cache", "__pycache__", ".pytest_cache"))
    for path in (place / "configs").glob("*.json"):
        config = json.loads(path.read_text())
        config["common"] |= {"base_model": "assets/tiny/base", "clap_model": "assets/tiny/clap", "image_size": 64,
                             "batch_size": 4, "val_draws": 1, "val_clips": 8, "samples": 1, "max_bad_share": 0.1}
        if "frozen_dtype" not in config["common"]:
            config["common"]["precision"] = "fp32"  # BF16 without hardware for it takes three times as long
        config |= SMALL
        config.pop("evaluate", None)
        if path.name == "tiny.json":
            config["evaluate"] = ["--quick"]
        if "data" in config and config["data"][0] == "world":
            config["data"] = ["world", "--out", "data/world", "--train", "40", "--val", "10", "--test", "10"]
        path.write_text(json.dumps(config))
    prepare = place / "prepare_data.py"
    prepare.write_text(prepare.read_text().replace("default=4800", "default=40").replace("default=100", "default=10")
                       .replace("default=300", "default=10"))
    for name in ("report.py", "evaluate.py", "generate.py"):
        path = place / name
        path.write_text(path.read_text().replace("default=25", "default=2"))
    run("python prepare_data.py world --out my_data --train 30 --val 10 --test 5", place)
    shutil.move(place / "my_data/settings.json", place / "settings.json")
    return place


def run(command: str, place: Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=place, env={**os.environ, "PATH": path}, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, command + done.stdout[-1500:] + done.stderr[-3000:]
    return done


def test_the_commands_are_found():
    assert len(COMMANDS) >= 14 and COMMANDS[0] == "bash run_all_stages.sh" and COMMANDS[1] == "bash run_tests.sh"


def test_the_tables_are_what_their_sources_say():
    """Of the sources that are in the repository; the tool says which table differs, and would have written it."""
    command = [sys.executable, "tools/make_readme.py", "--check", "--only", "small-models", "ablations", "faults", *(
        name for name in re.findall("<!-- (bench-.*) -->", README))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "differ: none" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("command", [pytest.param(one, marks=pytest.mark.slow) if one.startswith("bash run_all_stages.sh configs/") else one for one in COMMANDS])
def test_readme_command(command, copy):
    if command.startswith("sudo apt-get"):
        pytest.skip("installs a system package")
    if "tuxpaint" in command and not TUXPAINT:
        pytest.skip("Debian's tuxpaint-stamps-default is not installed")
    if "run_tests.sh" in command:
        command += " --collect-only -q"  # the tests themselves are running already
    if "ablations/run.py" in command or "bench/" in command:
        pytest.skip("takes long; tests/test_slow.py runs it small")
    done = run(command, copy)
    if command == COMMANDS[0]:
        assert "runs/tiny/samples.png" in done.stdout and (copy / "runs/tiny/report.md").exists()
        assert "zero-shot top-1, English" in done.stdout and (copy / "runs/tiny/evaluation.html").exists()
        config = json.loads((copy / "configs/tiny.json").read_text())
        (copy / "configs/tiny.json").write_text(json.dumps({**config, "evaluate": []}))  # it was judged a moment ago
        again = run(command, copy)
        assert again.stdout.count("already complete") == 4  # the data and the three stages


def test_readme_python(copy):
    [code] = [block for language, block in BLOCKS if language == "python"]
    (copy / "example.py").write_text(code)
    (copy / "out.png").unlink(missing_ok=True)
    run("python example.py", copy)
    assert Image.open(copy / "out.png").size == (64, 64)


@pytest.mark.slow
def test_run_all_stages_hands_a_signal_on_and_goes_on(copy):
    """SIGTERM to the chain in stage 1: exit code 143, a checkpoint, no child left; the same command finishes."""
    import signal
    import time
    config = json.loads((copy / "configs/tiny.json").read_text())
    config["common"] |= {"run": "runs/stopped", "log_every": 1}
    config["evaluate"] = []
    config["stage1"] = {"steps": 60, "validate_every": 0}
    (copy / "configs/stopped.json").write_text(json.dumps(config))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    chain = subprocess.Popen(["bash", "run_all_stages.sh", "configs/stopped.json"], cwd=copy, text=True,
                             env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, deadline = copy / "runs/stopped/stage1/log.jsonl", time.time() + 200
    while time.time() < deadline and not (log.exists() and '"step": 5,' in log.read_text()):
        time.sleep(0.05)
    chain.send_signal(signal.SIGTERM)
    _, errors = chain.communicate(timeout=120)
    assert chain.returncode == 143 and "stopped by SIGTERM" in errors
    assert not (copy / "runs/stopped/stage1/result.json").exists()
    left = subprocess.run(["pgrep", "-f", "configs/stopped.json"], capture_output=True, text=True).stdout
    assert left == ""
    done = run("bash run_all_stages.sh configs/stopped.json", copy)
    assert "resuming at step" in done.stdout and (copy / "runs/stopped/report.json").exists()
