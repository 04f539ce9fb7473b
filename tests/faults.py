"""What the tables of faults share: a case, what must hold after every fault, and its line in the documents.

Each row of CASES in test_faults_data.py, test_faults_config.py and test_faults_runs.py is one case. It makes
the faulty file, gives the command, and states the exit code and the sentence. tools/make_docs.py writes the
table of faults in docs/ from the same rows.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT, has_no_process


@dataclass(frozen=True)
class Case:
    """A fault.

    `make` makes it and returns the command. `says` is a part of a line that the user sees; in it * stands for
    anything and {d} for the test's folder. `then` checks what else must hold, given the folder and the ended
    command.
    """
    fault: str
    make: Callable
    code: int
    says: str
    then: Callable | None = None

    def __str__(self) -> str:
        return self.fault

    def line(self) -> str:
        """The case as a row of the table of faults."""
        says = re.sub(r"/?\{d\}/?", "", self.says).replace("|", "\\|").replace(str(ROOT) + "/", "")
        if says.endswith("0 unusable, 0 suspicious"):
            says = "nothing: it is used as it is meant, by value"
        return f"| {self.fault} | {self.code} | {'…'.join(says.removeprefix('error: ').split('*'))} |"


def pattern(says: str, place: Path) -> str:
    return ".*".join(re.escape(part) for part in says.replace("{d}", str(place)).split("*"))


def hashes(place: Path) -> dict[Path, str]:
    """SHA-256 of every checkpoint and result under a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in place.rglob("*.safetensors") if path.is_file()}


def intact(done: subprocess.CompletedProcess, place: Path, before: dict[Path, str], code: int,
           allowed: tuple[str, ...] = ()) -> None:
    """What holds after every fault.

    The exit code is right and there is no traceback. A refusal ends with one sentence that names its place.
    Every checkpoint is as it was, except those in `allowed`, which the case replaces. No temporary file and
    no process is left.
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
    has_no_process(done.pid)
    assert not list(place.rglob(".*.tmp"))


def check(case: Case, done: subprocess.CompletedProcess, place: Path, before: dict[Path, str],
          allowed: tuple[str, ...] = ()) -> None:
    intact(done, place, before, case.code, allowed)
    said = done.stderr.strip().splitlines()[-1] if case.code else done.stdout + done.stderr
    lines = done.stdout + "\n" + said  # what is listed above the last sentence counts as well
    assert re.search(pattern(case.says, place), lines), f"expected {case.says!r} in:\n{lines[-700:]}"
    if case.then:
        case.then(place, done)
