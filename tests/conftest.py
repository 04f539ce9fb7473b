"""Shared by the tests: the small models of assets/tiny, a small sound world, and one short run of the three stages."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE, CLAP = ROOT / "assets/tiny/base", ROOT / "assets/tiny/clap"
ENV = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
for signum in (signal.SIGHUP, signal.SIGINT):  # nohup, or an & in a script, ignores them, and what is started here would too
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, signal.SIG_DFL)


@cache
def warm() -> subprocess.Popen:
    """A process that starts scripts with the libraries loaded (warm.py); what it starts becomes a child of this one."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    process = subprocess.Popen([sys.executable, str(ROOT / "tests/warm.py")], env=ENV, text=True, bufsize=1,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "0\n"
    return process


class Started:
    """One of our scripts, running in a session of its own, as a user started it."""

    def __init__(self, name: str, *args, cwd: Path = ROOT, file_limit: int = 0):
        self.args = [str(ROOT / name), *map(str, args)]
        self.output = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        job = {"argv": self.args, "cwd": str(cwd), "stdout": self.output[0].name, "stderr": self.output[1].name,
               "file_limit": file_limit}
        warm().stdin.write(json.dumps(job) + "\n")
        self.pid, self.returncode = int(warm().stdout.readline()), None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def said(self) -> str:
        """All that is on stdout and stderr so far."""
        return "".join(Path(file.name).read_text() for file in self.output)

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for its end. Raises TimeoutExpired, after killing it."""
        deadline = time.time() + timeout
        while self.poll() is None:
            if time.time() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout, *map(lambda file: Path(file.name).read_text(), self.output))
            time.sleep(0.002)
        done = subprocess.CompletedProcess(self.args, self.returncode, *(Path(file.name).read_text() for file in self.output))
        done.pid = self.pid
        return done


def left_behind(session: int) -> list[str]:
    """The processes that a script started in its session and did not end (a zombie is none)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def script(name: str, *args, cwd: Path = ROOT, file_limit: int = 0) -> subprocess.CompletedProcess:
    """Run one of our scripts as a user does and return what came out. file_limit: bytes after which the disk is full."""
    return Started(name, *args, cwd=cwd, file_limit=file_limit).end(600)


def ok(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def kill_at(step: int, signum: int, name: str, *args, folder: Path) -> subprocess.CompletedProcess:
    """Start a stage and send it a signal once its log says that `step` is done; returns the ended process."""
    process = Started(name, *args)
    log, deadline = folder / "log.jsonl", time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if log.exists() and any(json.loads(line)["step"] >= step and "loss" in line
                                for line in log.read_text().splitlines() if line.endswith("}")):
            process.send_signal(signum)
            break
        time.sleep(0.005)
    return process.end()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """40 training, 20 validation and 10 test examples of the sound world."""
    out = tmp_path_factory.mktemp("data") / "world"
    ok(script("prepare_data.py", "world", "--out", out, "--train", 40, "--val", 20, "--test", 10))
    return out


def write_config(path: Path, world: Path, run: Path, cache: Path, **common) -> Path:
    """The default's config, with everything small: a few steps, a few clips, log lines at every step."""
    path.write_text(json.dumps({
        "common": {"run": str(run), "data_root": str(world), "cache_dir": str(cache), "base_model": str(BASE),
                   "clap_model": str(CLAP), "image_size": 64, "batch_size": 4, "precision": "fp32", "val_draws": 1, "samples": 1,
                   "save_every": 3, "log_every": 1, "keep": 3, **common},
        "stage1": {"steps": 10, "learning_rate": 1e-3, "warmup_steps": 2, "validate_every": 5},
        "stage2": {"steps": 10, "learning_rate": 1e-3, "validate_every": 5, "ema_decay": 0.9},
        "stage3": {"steps": 10, "validate_every": 0}}))
    return path


@pytest.fixture(scope="session")
def config(world, tmp_path_factory) -> Path:
    """A config whose run folder no test writes to but the fixture `run`."""
    place = tmp_path_factory.mktemp("run")
    return write_config(place / "small.json", world, place / "run", place / "cache")


@pytest.fixture(scope="session")
def run(config) -> Path:
    """The three stages, ten steps each, by the real scripts."""
    for stage in (1, 2, 3):
        ok(script(f"train_stage{stage}.py", "--config", config))
    return Path(json.loads(config.read_text())["common"]["run"])


def interrupt_sweep(steps: list[int], signums: list[int], stage: int, config: Path, run: Path, out: Path) -> None:
    """For each (step, signal): stop the stage there, run the same command again, compare with the unbroken run."""
    import torch

    import runs
    name, unbroken = f"stage{stage}", runs.read_checkpoint(run / f"stage{stage}" / "final.safetensors")[1]
    before = ["--init-from", run / f"stage{stage - 1}"] if stage > 1 else []
    for step in steps:
        for signum in signums:
            place = out / f"{name}-{step}-{signum}"
            command = (f"train_{name}.py", "--config", config, "--run", place, "--workers", step % 3, *before)
            process = kill_at(step, signum, *command, folder=place / name)
            assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum), process.stderr[-2000:]
            if signum != signal.SIGKILL:
                last = process.stderr.strip().splitlines()[-1]
                assert "stopped by" in last and "checkpoints/step-" in last and "Traceback" not in process.stderr
            ok(script(*command))
            resumed = runs.read_checkpoint(place / name / "final.safetensors")[1]
            assert resumed.keys() == unbroken.keys()
            assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken), (name, step, signum)
