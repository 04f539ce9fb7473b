"""The page as a user starts it, for the tests of its API and of its look."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ENV, ROOT, wait_for


def start_demo(run: Path, *flags) -> tuple[subprocess.Popen, str]:
    """Start the page of a run, and wait until it is open: the process, and the page's address. What it says
    is in process.said, a file; end it with stop_demo()."""
    said = tempfile.NamedTemporaryFile("r", encoding="utf-8")
    with open(said.name, "w") as out:
        command = [sys.executable, "-m", "clap2diffusion.demo", "--run", run, *flags]
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENV, stdout=out,
                                   stderr=subprocess.STDOUT)
    process.said = said

    def text() -> str:
        return Path(said.name).read_text()

    def opened() -> re.Match | None:
        return re.search(r"^open (http\S+) ", text(), re.MULTILINE)
    wait_for(lambda: opened() or process.poll() is not None, "the page", text, 120)
    assert opened(), text()
    return process, opened()[1]


def stop_demo(process: subprocess.Popen) -> int:
    """End the page as Ctrl-c does. Its exit code."""
    process.send_signal(2)
    return process.wait(60)
