"""What has changed since a checkpoint or a result was made: the code, the number of steps, the weights."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import common
from clap2diffusion.base import processes

PACKAGE = Path(__file__).resolve().parents[1]
ROOMS = ("base", "dataset", "pictures", "engine")  # those a stage is made of; no stage imports the others
MOST_NAMES = 5


def script_name() -> str:
    return Path(sys.argv[0]).name


def code_hashes() -> dict[str, str]:
    """The first 12 digits of the SHA-256 of each file that a stage runs: the script that was started as
    `script`, common.py, and the package's ROOMS. A script that is no file is left out."""
    files = {"script": Path(sys.argv[0]), "common.py": Path(common.__file__)}
    files |= {str(path.relative_to(PACKAGE.parent)): path
              for room in ROOMS for path in sorted((PACKAGE / room).glob("*.py"))}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in files.items()
            if path.is_file()}


def other_code(saved: dict, now: dict[str, str], script: str = "") -> str:
    """The files that differ between the header `saved` and code_hashes() now, as words; '' if none does.
    A header from before hashes were kept differs in nothing. script: its name; '' leaves it out, for the
    result of another stage."""
    made = saved.get("code") or now
    names = sorted(name for name in made.keys() | now.keys() if made.get(name) != now.get(name))
    names = [script if name == "script" else name for name in names if script or name != "script"]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def warn_of_other_code(path: Path, saved: dict, now: dict[str, str], script: str = "") -> None:
    """Say on stderr if what made the file `path`, whose header is `saved`, was other code. It is no error."""
    names = other_code(saved, now, script)
    if names and processes.first():
        print(f"warning: {path}: was made by other code than this: {names} changed since", file=sys.stderr,
              flush=True)


def why_other_steps(cfg: argparse.Namespace, saved_steps: int, done: int, best_is_last: bool,
                    lr_at: Callable | None) -> str:
    """Why a run with cfg.steps would not stand, after `done` steps, where one with saved_steps stands; '' if
    it stands there, bit for bit.

    lr_at(step, cfg): the script's schedule. It must give the same learning rates for all steps that are done:
    a constant rate does, also after a warm-up in steps; a decay to the end does not. None: unknown.
    best_is_last: the best weights are those of step `done`. A longer run would not have validated there if
    it was the last step alone that was the reason."""
    if done > cfg.steps:
        return f"{done} steps are done already"
    before = argparse.Namespace(**{**vars(cfg), "steps": saved_steps})
    if lr_at is None or any(lr_at(step, before) != lr_at(step, cfg) for step in range(done)):
        return "the schedule of the learning rate depends on --steps, so the steps that are done would differ"
    regular = cfg.validate_every and done % cfg.validate_every == 0
    if best_is_last and done == saved_steps != cfg.steps and not regular:
        return (f"its best weights are those of step {done}, where a run of {cfg.steps} steps with "
                f"--validate-every {cfg.validate_every} does not validate")
    return ""


def nothing_learned(result: dict) -> str:
    """Why the result of a stage, by the keys of its result.json, is what the stage began with; '' if it is
    not. Stage 3 keeps its last gate and has no best step."""
    if result.get("best_step") != 0:
        return ""
    return (f"best is step 0 by {result['best_metric']}: nothing that this stage learned is kept, its result "
            "is what it began with; train longer, with another learning rate or another --best-metric")
