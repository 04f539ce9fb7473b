"""A Python that is too old or lacks packages: one sentence, the line that helps, exit code 2."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, ok, script

from clap2diffusion.base import packages

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in (".", "tools", "ablations", "bench")
                 for path in (ROOT / folder).glob("*.py") if "__main__" in path.read_text())
ALL = "torch, diffusers, transformers, peft, safetensors, numpy, pillow, soundfile, soxr, tqdm"
BARE_ENV = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(python: str | Path, *args, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([python, *map(str, args)], cwd=cwd, env=BARE_ENV | more, capture_output=True,
                          text=True)


def one_sentence(done: subprocess.CompletedProcess, says: str) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {says}\n"), done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The project's files in a folder whose .venv has no package in it."""
    place = tmp_path_factory.mktemp("bare")
    for pattern in ("*.py", "clap2diffusion/**/*.py", "tools/*.py", "ablations/*.py", "bench/*.py"):
        for path in ROOT.glob(pattern):
            copy = place / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for name in (".venv", "other"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / name], check=True)
    return place


def test_all_scripts_are_among_these():
    assert len(SCRIPTS) >= 14 and {"generate.py", "tools/plan.py", "ablations/run.py"} < set(SCRIPTS)


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"bench/{path.name}" for path in sorted((ROOT / "bench").glob(
    "*.py")) if f"bench/{path.name}" not in SCRIPTS)])
def test_a_script_with_a_python_that_has_nothing(name, bare):
    done = run(bare / "other/bin/python", name, cwd=bare)
    one_sentence(done, f"{bare}/other/bin/python lacks {ALL}; activate the environment that has everything: "
                 "source .venv/bin/activate")


def test_the_line_that_helps(bare, tmp_path):
    """It is a path from where the user stands, and it is never the .venv that lacks the packages itself."""
    done = run(bare / ".venv/bin/python", "generate.py", "--help", cwd=bare)
    one_sentence(done, f"{bare}/.venv/bin/python lacks {ALL}; set up one that has everything: "
                 "bash setup_env.sh")
    done = run(bare / "other/bin/python", "../generate.py", cwd=bare / "tools")
    assert done.stderr.endswith("everything: source ../.venv/bin/activate\n")
    shutil.copy(bare / "generate.py", tmp_path)
    shutil.copytree(bare / "clap2diffusion", tmp_path / "clap2diffusion")  # no .venv there
    done = run(bare / "other/bin/python", "generate.py", cwd=tmp_path)
    assert done.stderr.endswith("; set up one that has everything: bash setup_env.sh\n")


def test_one_package_that_is_missing_is_the_one_named():
    program = ("import runpy, sys; sys.modules['soxr'] = None; sys.argv = ['generate.py']\n"
               "runpy.run_path('generate.py', run_name='__main__')")
    done = run(sys.executable, "-c", program)
    assert " lacks soxr; " in done.stderr and done.returncode == 2


def test_a_folder_without_code_is_no_package(tmp_path, monkeypatch):
    """pip leaves one when it is interrupted, and a working folder may have that name."""
    (tmp_path / "hollow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.is_missing("hollow") and not packages.is_missing("torch")


def test_the_list_is_part_of_requirements():
    assert all(packages.listed(module) for module in packages.NEEDED)
    assert not packages.listed("lpips") and not packages.listed("")


@pytest.mark.parametrize("oldest", [(3, 6), (3, 10)])
def test_a_python_that_is_too_old(oldest):
    program = f"import sys; sys.version_info = ({oldest[0]}, {oldest[1]}, 1); import clap2diffusion"
    done = run(sys.executable, "-S", "-c", program)
    assert f" is Python {oldest[0]}.{oldest[1]}, expected 3.11 or newer; " in done.stderr
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [*SCRIPTS, "clap2diffusion/__init__.py", "clap2diffusion/base/packages.py"])
def test_an_old_python_can_read_it(name):
    """Or it would end in a SyntaxError before it can say anything."""
    ast.parse((ROOT / name).read_text(), feature_version=(3, 7))


def test_help_asks_for_no_package_that_only_a_part_needs():
    hidden = ["bitsandbytes", "matplotlib", "tensorboard", "scipy", "jinja2", "resvg_py", "hypothesis", "av"]
    for name in ("train_stage3.py", "generate.py", "evaluate.py", "prepare_data.py"):
        program = (f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden}))\n"
                   f"sys.argv = ['{name}', '--help']; runpy.run_path('{name}', run_name='__main__')")
        ok(run(sys.executable, "-c", program))


HIDE = """import sys
for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
    del sys.modules[name]
sys.modules["bitsandbytes"] = None
import train_stage1
from clap2diffusion.base.exits import run_main
sys.argv[0] = "train_stage1.py"
run_main(train_stage1.main)
"""


def test_a_package_that_a_flag_needs(config, tmp_path):
    (tmp_path / "program.py").write_text(HIDE)
    done = script(tmp_path / "program.py", "--config", config, "--run", tmp_path / "run", "--adam-8bit")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert " cannot import bitsandbytes" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("error, says", [
    ('ImportError("cannot import name Far from diffusers", name="diffusers")',
     "error: * cannot import diffusers (cannot import name Far from diffusers); *"),
    ('ModuleNotFoundError("No module named torch.far", name="torch.far")',
     "error: * cannot import torch.far (No module named torch.far); *"),
    ('ModuleNotFoundError("No lpips", name="lpips")', "ModuleNotFoundError: No lpips")])
def test_another_version_of_a_package(error, says, tmp_path):
    """What a copied script imports beside our packages is not in our environment: it keeps its traceback."""
    (tmp_path / "program.py").write_text("from clap2diffusion.base.exits import run_main\n"
                                         f"def main(): raise {error}\nrun_main(main)\n")
    done = script(tmp_path / "program.py")
    assert fnmatch(done.stderr.splitlines()[-1], says) and done.returncode == (1 if "lpips" in says else 2)


def test_pytest_without_the_packages(tmp_path):
    """One sentence, where every file of tests would end in a traceback."""
    for module in ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments"):
        path = Path(find_spec(module).origin)
        path = path.parent if path.name == "__init__.py" else path
        (tmp_path / path.name).symlink_to(path)
    done = run(sys.executable, "-S", "-m", "pytest", "tests", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and f" lacks {ALL}; " in done.stderr
    assert not done.stdout and len(done.stderr.splitlines()) == 1


def test_only_what_libsndfile_does_not_read_needs_pyav(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(8000)), 8000)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(40))
    program = ("import sys; sys.modules['av'] = None; from pathlib import Path\n"
               "from clap2diffusion.dataset.decoding import read_windows\n"
               "[block], rate = read_windows(Path(sys.argv[1]), 1.0); print(block.shape, rate)")
    assert run(sys.executable, "-c", program, tmp_path / "a.wav").stdout == "(8000, 1) 8000\n"
    done = run(sys.executable, "-c", program, tmp_path / "a.mp4")
    assert "ModuleNotFoundError: No module named 'av" in done.stderr
