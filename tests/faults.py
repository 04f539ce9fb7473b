"""What the tables of faults share: a case, what must hold after every fault, and the lines that the README shows.

Each row of CASES in test_faults_data.py, test_faults_config.py and test_faults_runs.py is one case: it makes the faulty file, gives
the command, and states the exit code and the sentence. tools/make_readme.py writes the README's table from the same rows.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT, left_behind


@dataclass(frozen=True)
class Case:
    """A fault. `make` makes it and returns the command; `says`: a part of a line that the user sees, in which * stands for anything
    and {d} for the test's folder; `then`: what must hold besides, given the folder and the ended command.
    """
    fault: str
    make: Callable
    code: int
    says: str
    then: Callable | None = None

    def __str__(self) -> str:
        return self.fault

    def line(self) -> str:
        """The case as a line of the README's table."""
        says = re.sub(r"/?\{d\}/?", "", self.says).replace("|", "\\|").replace(str(ROOT) + "/", "")
        if says.endswith("0 unusable, 0 suspicious"):
            says = "nothing: it is used as it is meant, by value"
        return f"| {self.fault} | {self.code} | {'…'.join(says.removeprefix('error: ').split('*'))} |"


def pattern(says: str, place: Path) -> str:
    return ".*".join(re.escape(part) for part in says.replace("{d}", str(place)).split("*"))


def hashes(place: Path) -> dict[Path, str]:
    """Of every checkpoint and result under a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.rglob("*.safetensors") if path.is_file()}


def intact(done: subprocess.CompletedProcess, place: Path, before: dict[Path, str], code: int, allowed: tuple[str, ...] = ()) -> None:
    """What holds after every fault: the exit code; no traceback; on a refusal one last sentence that names its place; every
    checkpoint as it was (but for those named in `allowed`, which the case replaces); no temporary file; no process left.
    """
    said = done.stdout[-2000:] + done.stderr[-3000:]
    assert done.returncode == code, said
    assert "Traceback" not in done.stdout + done.stderr, said
    if code:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: " if code < 128 else "stopped by SIG"), said
        assert code >= 128 or re.search(r"/|\.py|--\w|\w\.json|sound world", last), f"names no place: {last}"
    for path, digest in before.items():
        if path.name not in allowed:
            assert path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest, path
    assert not list(place.rglob(".*.tmp"))
    assert not left_behind(done.pid)


def check(case: Case, done: subprocess.CompletedProcess, place: Path, before: dict[Path, str], allowed: tuple[str, ...] = ()) -> None:
    intact(done, place, before, case.code, allowed)
    said = done.stderr.strip().splitlines()[-1] if case.code else done.stdout + done.stderr
    lines = done.stdout + "\n" + said  # what is listed above the last sentence counts as well
    assert re.search(pattern(case.says, place), lines), f"expected {case.says!r} in:\n{lines[-700:]}"
    if case.then:
        case.then(place, done)
