"""The commands of README.md and docs/ run as they stand, in a copy whose configs take a few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE_S, ROOT, answer, has_no_process, logged_steps, wait_for
from PIL import Image

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", "\n".join(PAGES), re.S)
COMMANDS = [*dict.fromkeys(line for language, block in BLOCKS if language == "bash"
                           for line in block.splitlines())]
SMALL = {"stage1": {"steps": 2}, "stage2": {"steps": 2},
         "stage3": {"steps": 2, "require_proof": False}}
TUXPAINT = Path("/usr/share/tuxpaint/stamps").exists()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without what git ignores, with configs for two steps, `my_data` and a `python`."""
    place = tmp_path_factory.mktemp("readme") / "copy"
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "data", "cache", ".cache", "__pycache__", ".pytest_cache"))
    for path in (place / "configs").glob("*.json"):
        config = json.loads(path.read_text())
        config["common"] |= {"base_model": "assets/tiny/base", "clap_model": "assets/tiny/clap",
                             "image_size": 64,
                             "batch_size": 4, "val_draws": 1, "val_clips": 8, "samples": 1,
                             "max_bad_share": 0.1}
        if "frozen_dtype" not in config["common"]:
            config["common"]["precision"] = "fp32"  # BF16 without hardware for it takes three times as long
        config |= SMALL
        config.pop("evaluate", None)
        if path.name == "tiny.json":
            config["evaluate"] = ["--quick"]
        if "data" in config and config["data"][0] == "world":
            config["data"] = ["world", "--out", "data/world", "--train", "40", "--val", "10", "--test", "10"]
        path.write_text(json.dumps(config))
    for name, old, new in (("prepare_data.py", "default=4800", "default=40"),
                           ("prepare_data.py", "default=100", "default=10"),
                           ("prepare_data.py", "default=300", "default=10"),
                           ("clap2diffusion/base/settings.py", " = 3.0, 1.0, 25, 4", " = 3.0, 1.0, 2, 2"),
                           ("clap2diffusion/judging/evaluation.py", "SWEEP_CLIPS = 10,", "SWEEP_CLIPS = 2,")):
        content = (place / name).read_text()
        assert content.count(old) == 1, f"{name} no longer says {old}"
        (place / name).write_text(content.replace(old, new))
    with answer(place / "bin"):
        run("python prepare_data.py world --out my_data --train 30 --val 10 --test 5", place)
        shutil.move(place / "my_data/settings.json", place / "settings.json")
        yield place


def path_to(place: Path) -> str:
    """PATH with the stand-in for Python first: scripts start in the tests' warm process."""
    return f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(command: str, place: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(["bash", "-c", command], cwd=place, env={**os.environ, "PATH": path_to(place)},
                          capture_output=True, text=True, timeout=3 * PATIENCE_S)
    assert done.returncode == 0, command + done.stdout[-1500:] + done.stderr[-3000:]
    return done


def test_the_commands_are_found():
    assert len(COMMANDS) >= 25 and COMMANDS[0] == "bash run_all_stages.sh"
    assert COMMANDS[1] == "bash run_tests.sh"


def heading_anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_to_pages_and_headings():
    paths, wrong = [ROOT / "README.md", *ROOT.glob("docs/*.md")], []
    for path in paths:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if link.startswith("http"):
                continue
            headings = ([heading_anchor(one) for one in re.findall(r"^#+ (.*)$", target.read_text(), re.M)]
                        if anchor and target.exists() else [])
            if not target.exists() or anchor and anchor not in headings:
                wrong.append(f"{path.name}: {link}")
    assert not wrong


QUESTIONS = {  # what a new user asks first, and what the answer must hold
    "downloaded": "5 GB", "how long": "docs/speed.md#", "log out": "tmux attach", "tokens": "--num-tokens",
    "two GPUs": "torchrun", "TensorBoard": "--logdir", "friend": "docs/use.md#", "ablation": "own-ablations"}


def test_the_readme_answers_the_first_questions_in_one_table():
    [table] = re.findall(r"^## I want to \.\.\.\n\n(.*?)\n\n", README, re.S | re.M)
    rows = table.splitlines()[2:]
    for question, here in QUESTIONS.items():
        [row] = [row for row in rows if question in row.split("|")[1]]
        assert here in row.split("|")[2], row
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    assert pages == set(re.findall(r"docs/([\w-]+\.md)", table))  # every page is reached from here


@pytest.mark.parametrize("command", [
    pytest.param(one, marks=pytest.mark.slow) if one.startswith("bash run_all_stages.sh configs/") else one
    for one in COMMANDS])
def test_command(command, copy):
    if command.startswith("sudo apt-get"):
        pytest.skip("installs a system package")
    if "tuxpaint" in command and not TUXPAINT:
        pytest.skip("Debian's tuxpaint-stamps-default is not installed")
    if "run_tests.sh" in command:
        command += " --collect-only -q -n 0"  # the tests themselves are running already
    if "tensorboard" in command:
        command += " --inspect"  # it would serve for ever
    if "run_demo.sh" in command:
        command += " --help"  # tests/test_demo_browser.py uses the page
    if "ablations/run.py" in command or "bench/" in command:
        pytest.skip("takes long; tests/test_slow.py runs it small")
    done = run(command, copy)
    if command.startswith("bash run_tests.sh --collect"):
        assert all(f"tests/{path.name}::" in done.stdout
                   for path in ROOT.glob("tests/test_*.py") if path.name != "test_slow.py")
    if command == COMMANDS[0]:
        assert "runs/tiny/samples.png" in done.stdout and (copy / "runs/tiny/report.md").exists()
        assert "zero-shot top-1, English" in done.stdout and (copy / "runs/tiny/evaluation.html").exists()
        config = json.loads((copy / "configs/tiny.json").read_text())
        del config["evaluate"]  # it was judged a moment ago
        (copy / "configs/tiny.json").write_text(json.dumps(config))
        again = run(command, copy)
        assert again.stdout.count("already complete") == 4  # the data and the three stages


@pytest.mark.parametrize("more, count", [("", 16), (" -k stays_small", 1),
                                         ("::test_what_is_read_first_stays_small", 1)])
def test_a_file_given_to_run_tests_is_what_it_runs(more, count, copy):
    done = run(f"bash run_tests.sh tests/test_house.py{more} --collect-only -q -n 0", copy)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) >= count and all(line.startswith("tests/test_house.py::") for line in found)
    assert count > 1 or len(found) == 1


def test_readme_python(copy):
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)  # test_stock.py runs those of docs/use.md
    (copy / "example.py").write_text(code)
    (copy / "out.png").unlink(missing_ok=True)
    run("python example.py", copy)
    assert Image.open(copy / "out.png").size == (64, 64)


@pytest.mark.slow
def test_run_all_stages_hands_a_signal_on_and_goes_on(copy):
    """SIGTERM to the chain in stage 1: exit code 143, no child left. The same command finishes."""
    config = json.loads((copy / "configs/tiny.json").read_text())
    config["common"] |= {"run": "runs/stopped", "log_every": 1}
    config.pop("evaluate", None)
    config["stage1"] = {"steps": 60, "validate_every": 0}
    (copy / "configs/stopped.json").write_text(json.dumps(config))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the stages are the shell's own children
    chain = subprocess.Popen(["bash", "run_all_stages.sh", "configs/stopped.json"], cwd=copy, text=True,
                             env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True)
    wait_for(lambda: len(logged_steps(copy / "runs/stopped/stage1/log.jsonl")) >= 5, "step 5")
    chain.send_signal(signal.SIGTERM)
    _, errors = chain.communicate(timeout=PATIENCE_S)
    assert chain.returncode == 143 and "stopped by SIGTERM" in errors
    assert not (copy / "runs/stopped/stage1/result.json").exists()
    has_no_process(chain.pid)
    done = run("bash run_all_stages.sh configs/stopped.json", copy)
    assert "resuming at step" in done.stdout and (copy / "runs/stopped/report.json").exists()
