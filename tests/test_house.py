"""The layout holds: imports go down the layers and in no circle, and what is read first is small."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# the lowest first; scripts on top
LAYERS = ["base", "common", "dataset", "pictures", "engine", "judging", "sharing", "videos", "world", "demo"]
STAGES = ["train_stage1.py", "train_stage2.py", "train_stage3.py"]
# all Python files beside README.md
HALL = [*STAGES, "common.py", "generate.py", "evaluate.py", "export.py", "prepare_data.py"]
MOST_LINES = {**dict.fromkeys(STAGES, 170), "common.py": 450, "README.md": 250,
              "clap2diffusion/__init__.py": 5}
PAGE_LINES, MAIN_LINES = 300, 90


def read_modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the hall and of the package, by its dotted name."""
    paths = {path.relative_to(root): path for pattern in ("*.py", "clap2diffusion/**/*.py")
             for path in root.glob(pattern)}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
            for name, path in paths.items()}


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The known modules that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # clap2diffusion.base.exits.UserError -> clap2diffusion.base.exits
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def layer(name: str) -> int:
    """0 is the lowest; the scripts of the hall stand above all layers."""
    parts = name.split(".")
    room = "common" if parts == ["common"] else parts[1] if len(parts) > 1 else ""
    return LAYERS.index(room) if room in LAYERS else len(LAYERS)


def faults_of_imports(root: Path) -> list[str]:
    """Arrows that go up and circles, as sentences."""
    modules = read_modules(root)
    arrows = {name: set(imports(tree, set(modules))) for name, tree in modules.items()}
    found = []
    for name, targets in arrows.items():
        for target in targets:
            if "." not in target and target != "common" and layer(name) < len(LAYERS):
                found.append(f"{name} imports the script {target}")
            elif layer(target) > layer(name):
                found.append(f"{name} imports {target}, which stands above it")
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def faults_of_sizes(root: Path) -> list[str]:
    """Files and functions that have outgrown their size, and files that do not belong into the hall."""
    found = [f"{path.name} is not one of the hall's files"
             for path in root.glob("*.py") if path.name not in HALL]
    limits = {root / name: limit for name, limit in MOST_LINES.items()}
    limits |= dict.fromkeys(root.glob("docs/**/*.md"), PAGE_LINES)
    for path, limit in limits.items():
        lines = len(path.read_text().splitlines())
        if lines > limit:
            found.append(f"{path.relative_to(root)} has {lines} lines, expected at most {limit}")
    for name in STAGES:
        nodes = ast.parse((root / name).read_text()).body
        [main] = [node for node in nodes if getattr(node, "name", "") == "main"]
        lines = main.end_lineno - main.lineno + 1
        if lines > MAIN_LINES:
            found.append(f"main of {name} has {lines} lines, expected at most {MAIN_LINES}")
    for path in root.glob("clap2diffusion/*/__init__.py"):
        if len(ast.parse(path.read_text()).body) != 1 or len(path.read_text().splitlines()) != 1:
            found.append(f"{path.relative_to(root)} holds more than one line that says what is in the room")
    return found


@pytest.fixture(scope="module")
def faults() -> list[str]:
    return faults_of_imports(ROOT) + faults_of_sizes(ROOT)


def test_nothing_imports_upwards_or_in_a_circle():
    assert not faults_of_imports(ROOT)


def test_every_room_has_its_layer():
    rooms = {path.parent.name for path in ROOT.glob("clap2diffusion/*/*.py")}
    assert rooms == set(LAYERS) - {"common"}


def test_what_is_read_first_stays_small():
    assert not faults_of_sizes(ROOT)


BREAKS = [  # (what is done, the file, what is added to it, what is said of it)
    ("a circle through a function", "clap2diffusion/base/files.py",
     "def f():\n    from clap2diffusion.base.settings import Number\n", "a circle: clap2diffusion.base."),
    ("a script imported", "clap2diffusion/engine/gate_sweep.py", "def f():\n    import train_stage1\n",
     "clap2diffusion.engine.gate_sweep imports the script train_stage1"),
    ("a script imported by common.py", "common.py", "from generate import main\n",
     "common imports the script generate"),
    ("an arrow upwards", "clap2diffusion/dataset/dataset.py", "import clap2diffusion.pictures.sheets as s\n",
     "clap2diffusion.dataset.dataset imports clap2diffusion.pictures.sheets, which stands above it"),
    ("an arrow from below common.py", "clap2diffusion/base/hub.py", "from common import Draws\n",
     "clap2diffusion.base.hub imports common, which stands above it"),
    ("a long stage", "train_stage2.py", "#\n" * 171, "train_stage2.py has "),
    ("a long main", "train_stage3.py", "def main():\n" + "    pass\n" * 90,
     "main of train_stage3.py has 91 lines"),
    ("a long common.py", "common.py", "#\n" * 451, "common.py has "),
    ("a long README", "README.md", "\n" * 251, "README.md has "),
    ("a long page", "docs/new.md", "\n" * 301, "docs/new.md has 301 lines, expected at most 300"),
    ("another file in the hall", "helpers.py", "", "helpers.py is not one of the hall's files"),
    ("code in an __init__.py", "clap2diffusion/base/__init__.py", "x = 1\n",
     "base/__init__.py holds more than"),
    ("more than the check of packages at the package's door", "clap2diffusion/__init__.py", "\nx = 1\n",
     "clap2diffusion/__init__.py has 7 lines, expected at most 5")]


@pytest.mark.parametrize("what, file, added, said", BREAKS, ids=[b[0] for b in BREAKS])
def test_a_broken_house_is_seen(what, file, added, said, faults, tmp_path):
    for pattern in ("*.py", "README.md", "docs/*.md", "clap2diffusion/**/*.py"):
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    path = tmp_path / file
    before = path.read_text() if path.exists() and "main" not in what else ""  # its own main is replaced
    path.write_text(before + added)
    now = faults_of_imports(tmp_path) + faults_of_sizes(tmp_path)
    assert any(said in fault for fault in now if fault not in faults), now
