"""What the tests share: the small models, a small sound world, one short run of the three stages."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from clap2diffusion.base import packages

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: a sum's last bits depend on its threads
# one sentence, instead of one traceback for each file of tests
packages.check((*packages.NEEDED, "bitsandbytes", "matplotlib", "tensorboard", "scipy", "jinja2", "resvg_py",
                "hypothesis"))
ROOT = Path(__file__).resolve().parent.parent
BASE, CLAP, JUDGE = (ROOT / "assets/tiny" / name for name in ("base", "clap", "judge"))
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
LONG_FIRST = [f"test_{name}.py" for name in (
    "readme", "evaluate", "faults_signals", "stages", "faults_runs", "verdict", "faults_data",
    "demo_browser", "golden", "ablations", "terminals", "parallel", "stock", "page", "hub", "faults_config",
    "manifest", "generate", "memory", "probe", "before", "sharing", "demo", "watching")]
PATIENCE_S = 600  # a condition that a test waits for comes within it, on a busy machine too
for signum in (signal.SIGHUP, signal.SIGINT):  # nohup, or an & in a script, has them ignored
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, signal.SIG_DFL)


def pytest_collection_modifyitems(items) -> None:
    """Files in the order of LONG_FIRST, then the rest: processes that take a file at a time end together."""
    order = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n, a process takes a file at a time: its tests share what is made once, and follow in order."""
    from xdist.scheduler import LoadFileScheduling
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def wait_for(condition, what: str, said=str, seconds: float = PATIENCE_S) -> None:
    """Wait until condition() is true. After `seconds` the test fails and shows what said() returns."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came:\n{said()[-3000:]}"
        time.sleep(0.002)


@cache
def warm() -> subprocess.Popen:
    """A process that starts scripts with the libraries loaded (warm.py). What it starts becomes our child."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    process = subprocess.Popen([sys.executable, str(ROOT / "tests/warm.py")], env=ENV, text=True, bufsize=1,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "0\n"
    return process


class Started:
    """One of our scripts, running in a session of its own, as a user started it."""

    def __init__(self, name: str, *args, cwd: Path = ROOT, file_limit: int = 0, output: str = ""):
        """output: a terminal or named pipe for both streams, instead of the files that said() reads."""
        self.args = [str(ROOT / name), *map(str, args)]
        self.output = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        stdout, stderr = (output or file.name for file in self.output)
        job = {"argv": self.args, "cwd": str(cwd), "stdout": stdout, "stderr": stderr,
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

    def end(self, timeout: float = PATIENCE_S) -> subprocess.CompletedProcess:
        """Wait for its end. Raises TimeoutExpired, after killing it."""
        if self.poll() is None:
            watched = os.pidfd_open(self.pid)  # readable once the process has ended
            ended, _, _ = select.select([watched], [], [], timeout)
            os.close(watched)
            if not ended:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(
                    self.args, timeout, *(Path(file.name).read_text() for file in self.output))
            self.poll()
        done = subprocess.CompletedProcess(
            self.args, self.returncode, *(Path(file.name).read_text() for file in self.output))
        done.pid = self.pid
        return done


def left_behind(session: int) -> list[str]:
    """The processes that a script started in its session and did not end. A zombie has ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def has_no_process(session: int) -> None:
    """Nothing that a script started goes on after its end. What was killed takes a moment."""
    wait_for(lambda: not left_behind(session), "the end of its processes", seconds=60)


def script(name: str, *args, cwd: Path = ROOT, file_limit: int = 0) -> subprocess.CompletedProcess:
    """Run one of our scripts as a user does. file_limit: size in bytes at which the disk counts as full."""
    return Started(name, *args, cwd=cwd, file_limit=file_limit).end()


def ok(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@contextmanager
def answer(bin_dir: Path):
    """Inside, bin_dir holds a `python` that has the warm process run scripts and pytest, the real one the
    rest."""
    bin_dir.mkdir()
    folder = tempfile.TemporaryDirectory()  # not bin_dir: a socket's path may have 107 bytes
    place, client = f"{folder.name}/socket", ROOT / "tests/ask.py"
    (bin_dir / "tests.py").write_text("import sys, pytest\nsys.exit(pytest.main())\n")
    for name in ("python", "python3"):
        (bin_dir / name).write_text(f'''#!/bin/sh
if [ "$1 $2" = "-m pytest" ]; then shift 2; set -- "{bin_dir}/tests.py" "$@"; fi
case "$1" in
    *.py) exec "{sys.executable}" -S "{client}" "{place}" "$@" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
''')
        (bin_dir / name).chmod(0o755)

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as file:
                asked = json.loads(file.readline())
                if not asked:
                    return
                name, *args = asked["argv"]
                done = script(Path(asked["cwd"]) / name, *args, cwd=Path(asked["cwd"]))
                json.dump({"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}, file)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(place)
            last.sendall(b"{}\n")
            thread.join()
    folder.cleanup()


@contextmanager
def serving(handler):
    """Inside, requests to the address that is given are a handler's, of http.server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def logged_steps(log: Path) -> list[dict]:
    """The whole lines of steps in a log.jsonl that may be written to just now."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}") and '"loss"' in line]


def kill_at(step: int, signum: int, name: str, *args, folder: Path) -> subprocess.CompletedProcess:
    """Start a stage and send it a signal once its log says that `step` is done. Returns the ended process."""
    process, log = Started(name, *args), folder / "log.jsonl"
    wait_for(lambda: process.poll() is not None or any(line["step"] >= step for line in logged_steps(log)),
             f"step {step}", process.said)
    process.send_signal(signum)
    return process.end()


def shared(factory, name: str, make) -> Path:
    """A folder for this whole test session, filled by make(folder). pytest-xdist's processes share it.

    Tests read it and write nothing there, except more feature caches.
    """
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another process may have failed in the middle
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """40 training, 20 validation and 10 test examples of the sound world."""
    sizes = ("--train", 40, "--val", 20, "--test", 10)
    return shared(tmp_path_factory, "world",
                  lambda out: ok(script("prepare_data.py", "world", "--out", out, *sizes)))


def write_config(path: Path, world: Path, run: Path, cache: Path, **common) -> Path:
    """The default's config, with everything small: a few steps, a few clips, log lines at every step."""
    path.write_text(
        json.dumps({"common": {"run": str(run), "data_root": str(world), "cache_dir": str(cache),
                               "base_model": str(BASE), "clap_model": str(CLAP), "image_size": 64,
                               "batch_size": 4, "precision": "fp32", "val_draws": 1, "val_clips": 8,
                               "samples": 0, "save_every": 3, "log_every": 1, "keep": 3, **common},
                    "stage1": {"steps": 10, "learning_rate": 1e-3, "warmup_steps": 2, "validate_every": 5},
                    "stage2": {"steps": 10, "learning_rate": 1e-3, "validate_every": 5, "ema_decay": 0.9,
                               "best_metric": "silence_minus_right"},  # by val_right the best LoRA is 0
                    # 44 of its validations are the gate's sweep
                    "stage3": {"steps": 10, "validate_every": 0, "val_clips": 4, "require_proof": False}}))
    return path


@pytest.fixture(scope="session")
def config(world, tmp_path_factory) -> Path:
    """A config whose run folder only the fixture `run` writes to."""
    place = shared(tmp_path_factory, "small", lambda place: write_config(
        place / "small.json", world, place / "run", place / "cache"))
    return place / "small.json"


@pytest.fixture(scope="session")
def run(config, tmp_path_factory) -> Path:
    """The three stages, ten steps each, by the real scripts."""
    def train(_) -> None:
        for stage in (1, 2, 3):
            ok(script(f"train_stage{stage}.py", "--config", config, "--samples", 1))
    shared(tmp_path_factory, "trained", train)
    return config.parent / "run"


def interrupt_sweep(steps: list[int], signums: list[int], stage: int, config: Path, run: Path,
                    out: Path) -> None:
    """For each step and signal: stop the stage there, repeat the command, compare with the unbroken run."""
    import torch

    from clap2diffusion.base.tensor_file import read_tensors
    name, unbroken = f"stage{stage}", read_tensors(run / f"stage{stage}" / "final.safetensors")[1]
    before = ["--init-from", run / f"stage{stage - 1}"] if stage > 1 else []
    for step in steps:
        for signum in signums:
            place = out / f"{name}-{step}-{signum}"
            command = (f"train_{name}.py", "--config", config, "--run", place, "--workers", step % 3, *before)
            for _ in range(5):  # on a busy machine the signal may come after the last step
                shutil.rmtree(place, ignore_errors=True)
                process = kill_at(step, signum, *command, folder=place / name)
                if not (place / name / "final.safetensors").exists():
                    break
            expected = -9 if signum == signal.SIGKILL else 128 + signum
            assert process.returncode == expected, process.stderr[-2000:]
            if signum != signal.SIGKILL:
                last = process.stderr.strip().splitlines()[-1]
                assert "stopped by" in last and "checkpoints/step-" in last
                assert "Traceback" not in process.stderr
            ok(script(*command))
            resumed = read_tensors(place / name / "final.safetensors")[1]
            assert resumed.keys() == unbroken.keys()
            assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken), (name, step, signum)
