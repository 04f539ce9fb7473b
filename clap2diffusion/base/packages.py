"""Which Python runs this, and what it lacks. Standard library only, and no syntax newer than Python 3.6."""

import os
import sys
from importlib.util import find_spec

OLDEST = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# what training and drawing need; some scripts need more of requirements.txt (see exits.run_main)
NEEDED = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "PIL", "soundfile", "soxr",
          "tqdm")
DISTRIBUTIONS = {"PIL": "pillow", "resvg_py": "resvg-py"}  # where pip's name is not the module's


def listed(module: str) -> bool:
    """Whether requirements.txt has this module."""
    with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as file:
        return any(line.startswith(DISTRIBUTIONS.get(module, module) + ">=") for line in file)


def is_missing(module: str) -> bool:
    spec = find_spec(module)
    return spec is None or spec.origin is None  # a folder of that name without any code has no origin


def sentence(lack: str) -> str:
    """What a Python lacks, and the line that brings one which does not."""
    activate = os.path.relpath(os.path.join(ROOT, ".venv/bin/activate"))
    setup = os.path.relpath(os.path.join(ROOT, "setup_env.sh"))
    in_venv = os.path.realpath(sys.prefix) == os.path.realpath(os.path.join(ROOT, ".venv"))
    if os.path.exists(activate) and not in_venv:
        remedy = "activate the environment that has everything: source " + activate
    else:
        remedy = "set up one that has everything: bash " + setup
    return "error: {} {}; {}".format(sys.executable or "this Python", lack, remedy)


def check(modules: tuple = NEEDED) -> None:
    """End the program with one sentence and exit code 2 if this Python is too old or lacks a module."""
    missing = [DISTRIBUTIONS.get(module, module) for module in modules if is_missing(module)]
    if sys.version_info < OLDEST:
        lack = "is Python {}.{}, expected {}.{} or newer".format(*(tuple(sys.version_info[:2]) + OLDEST))
    elif missing:
        lack = "lacks " + ", ".join(missing)
    else:
        return
    print(sentence(lack), file=sys.stderr)
    sys.exit(2)
