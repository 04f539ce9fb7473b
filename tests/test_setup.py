"""setup_env.sh and run_demo.sh: which Python is taken, what pip is asked for, what is said."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import PATIENCE_S, ROOT, has_no_process, wait_for

STAND_IN = """#!/bin/bash
case "$1 $2" in
    "- "* | "-c "*) exec "$REAL" "$@" ;;  # does it have the packages; its version
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python; exit ;;
    "-m pip")
        echo "${@:3}" >> pip
        if [ "$PIP" = waits ]; then exec sleep 300; fi
        exit "${PIP:-0}" ;;
esac
echo "$0 $*" >> started
"""
HAS, LACKS = "numpy>=2\n", "no-such-package>=1  # of nobody\n"


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with the scripts, requirements that are met or not, and stand-ins for every Python."""
    for name in ("setup_env.sh", "run_demo.sh", "run_tests.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        write_program(tmp_path / "bin" / name)
    for name, text in (("", HAS), ("-demo", LACKS), ("-browser", LACKS)):
        (tmp_path / f"requirements{name}.txt").write_text(text)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    return tmp_path


def write_program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN)
    path.chmod(0o755)


def start(place: Path, *command: str, **env: str) -> subprocess.Popen:
    path = f"{place / 'bin'}:/usr/bin:/bin"
    return subprocess.Popen(["bash", *command], cwd=place, text=True, start_new_session=True,
                            env={"PATH": path, "REAL": sys.executable, **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(place: Path, *command: str, code: int = 0, **env: str) -> tuple[str, str]:
    """stdout and stderr of a script that ends with this exit code."""
    process = start(place, *command, **env)
    said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, said
    return said


def asked_pip(place: Path) -> list[str]:
    """What pip was asked to install, without the options. The try at PyTorch's own index is left out."""
    lines = (place / "pip").read_text().splitlines() if (place / "pip").exists() else []
    return [line.removeprefix("install --quiet --disable-pip-version-check ") for line in lines
            if "index-url" not in line]


def test_help_and_a_missing_run_need_no_python(place):
    for name in ("python", "python3"):
        (place / "bin" / name).unlink()
    out, _ = run(place, "run_demo.sh", "--port", "1", "--help")
    assert "bash run_demo.sh --run runs/sd15" in out and "#" not in out.splitlines()[0]
    for flags, run_folder in ((["--run", "runs/far"], "runs/far"), (["--run=runs/far"], "runs/far"),
                              (["--run", "runs/tiny", "--run", "x"], "x"), (["--run", ""], "''")):
        _, errors = run(place, "run_demo.sh", *flags, code=2)
        assert errors.startswith(f"error: {run_folder}: no such run in {place}; ")
        assert len(errors.splitlines()) == 1
        assert "bash run_all_stages.sh" in errors and "--run" in errors
    shutil.rmtree(place / "runs")
    assert "error: runs/tiny: no such run" in run(place, "run_demo.sh", "--port", "1", code=2)[1]
    assert not (place / ".venv").exists()


def test_a_python_that_has_everything_is_used_as_it_is(place):
    (place / "requirements-demo.txt").write_text(HAS)
    run(place, "run_demo.sh", "--port", "8000", "--run", "runs/tiny")
    assert (place / "started").read_text().endswith(
        "/bin/python3 -m clap2diffusion.demo --port 8000 --run runs/tiny\n")
    assert not asked_pip(place) and not (place / ".venv").exists()


def test_the_venv_of_training_gets_what_the_page_needs_and_keeps_its_torch(place):
    """pip gets both files at once, so that a package that both name suits both."""
    write_program(place / ".venv/bin/python")
    out, _ = run(place, "run_demo.sh")
    assert "setting up .venv with what it lacks of requirements.txt requirements-demo.txt (once)" in out
    assert asked_pip(place) == ["-r requirements.txt -r requirements-demo.txt"]
    assert (place / "started").read_text().endswith("/.venv/bin/python -m clap2diffusion.demo\n")


def test_the_tests_take_a_python_without_the_page_but_a_new_one_gets_it(place):
    run(place, "run_tests.sh")
    assert not asked_pip(place) and "/bin/python3 -m pytest -n 2" in (place / "started").read_text()
    (place / "requirements.txt").write_text(LACKS)
    out, _ = run(place, "run_tests.sh")
    assert "setting up .venv with requirements.txt requirements-demo.txt requirements-browser.txt" in out
    assert asked_pip(place) == [
        "torch==2.13.0 -r requirements.txt -r requirements-demo.txt -r requirements-browser.txt"]


def test_one_sentence_where_no_venv_can_be_made(place):
    (place / ".venv").write_text("a file is in its way, as a folder that may not be written to")
    _, errors = run(place, "run_demo.sh", code=1)
    assert errors.splitlines()[-1].startswith(f"error: {place}/.venv could not be made with python3 (")
    assert not asked_pip(place)


def test_one_sentence_where_pip_cannot(place):
    _, errors = run(place, "run_demo.sh", code=1, PIP="3")
    assert errors.splitlines()[-1].startswith(
        "error: pip could not install -r requirements.txt -r requirements-demo.txt into .venv (")
    assert not (place / "started").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_page_is_set_up(signum, place):
    """pip ends with it, and the exit code says which signal it was."""
    process = start(place, "run_demo.sh", PIP="waits")
    wait_for((place / "pip").exists, "pip")
    os.kill(process.pid, signum)
    assert process.wait(PATIENCE_S) == 128 + signum
    has_no_process(process.pid)


def test_what_the_files_of_requirements_say_is_met_here():
    """Where the page's packages are installed, run_demo.sh takes this Python as it is."""
    if not find_spec("gradio"):
        pytest.skip("gradio is not installed: pip install -r requirements-demo.txt")
    command = "REQUIREMENTS=(requirements.txt requirements-demo.txt); . ./setup_env.sh"
    done = subprocess.run(["bash", "-euc", command], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    assert done.returncode == 0 and done.stdout.startswith("Python: "), done.stdout + done.stderr
    assert "setting up" not in done.stdout
