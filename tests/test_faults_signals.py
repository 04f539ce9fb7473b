"""A signal in every phase: the program ends in good order, and the same command goes on."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import (
    ENV,
    PATIENCE_S,
    ROOT,
    Started,
    has_no_process,
    left_behind,
    logged_steps,
    ok,
    script,
    wait_for,
    write_config,
)
from faults import Case, check, hashes, intact
from safetensors.torch import load_file

from clap2diffusion.base.files import read_json

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
LOADER = Case("a loader process is killed, by the kernel for want of memory or by a full /dev/shm", None, 1,
              "error: a data loading process was killed*; it ran out of memory or of shared memory: use "
              "Docker's --shm-size=8g or --workers 0")
MAKER = Case(
    "a process that makes the data is killed", None, 1,
    "error: sound world: a process of it was killed, perhaps for want of memory; run the same command again")
SECOND = Case("a second run in the same folder", None, 2,
              "error: {d}/stage1: process * is working in this folder; wait for it, or give another --run")
GPU = Case("the GPU is out of memory", None, 1,
           "error: the GPU is out of memory; checkpoints are intact; lower --batch-size; a stage can "
           "raise --accumulation by the same factor, lower --val-batch-size, "
           "or take --checkpointing all or --frozen-dtype nf4, with --allow-changed")
LOGS = Case("a disk that is full at the logs", None, 1,
            "error: no space left for /runs/log.txt; free some and run again")
PROCESSES = [LOADER, MAKER, SECOND, GPU, LOGS]


def reaches(process: Started, marker: str | Path) -> bool:
    """Wait until the process has said a regular expression, a file matches a path with a pattern, or a
    log.jsonl tells of five steps. False if it has ended first."""
    def there() -> bool:
        if isinstance(marker, Path) and marker.name == "log.jsonl":
            return len(logged_steps(marker)) >= 5
        if isinstance(marker, Path):
            return any(marker.parent.glob(marker.name))
        return re.search(marker, process.said()) is not None
    wait_for(lambda: there() or process.poll() is not None, str(marker), process.said)
    return process.poll() is None


def when(process: Started, marker: str | Path) -> None:
    assert reaches(process, marker), f"it ended before {marker}:\n{process.said()[-3000:]}"


def phases(d: Path, world: Path, run: Path, base_config: Path) -> dict[str, tuple[list, str | Path]]:
    """Phase: (a command that is in it for a while, what shows that it is)."""
    slow = write_config(d / "slow.json", world, d / "run", d / "cache", val_draws=8, val_clips=4)

    def stage(n: int, *more) -> list:
        return [f"train_stage{n}.py", "--config", slow, *more]

    def plain(n: int, *more) -> list:
        return [f"train_stage{n}.py", "--config", base_config, "--run", d / "run", *more]
    sound = sorted((world / "audio").glob("test-*.wav"))[0]
    return {
        "making data": (["prepare_data.py", "world", "--out", d / "made", "--train", 80, "--val", 4,
                         "--test", 4], d / "made/images/train-*"),
        "checking data": (["prepare_data.py", "check", "--data-root", world], r"checking: +0 of"),
        "cache": (plain(1, "--cache-dir", d / "new-cache", "--windows", 3, "--flip"), r"features: +[0-9]"),
        "validation": (stage(1), r"starting at step 0"),
        "step": (plain(1, "--steps", 400), d / "run/stage1/log.jsonl"),
        "save": (plain(1, "--steps", 400, "--save-every", 1), d / "run/stage1/checkpoints/.step-*.tmp"),
        "gate sweep": (stage(3, "--init-from", run / "stage2", "--val-draws", 2), r"starting at step 0"),
        "sample pictures": (plain(1, "--samples", 6), r"loads into a stock pipeline"),
        "evaluation": (["evaluate.py", "--run", d / "judged", "--quick", "--steps", 2], r"pictures"),
        "generation": (["generate.py", "--run", run, "--audio", sound, "--out", d / "o.png", "--steps", 100],
                       r"picture: +0 of 100"),
    }


NAMES = ["making data", "checking data", "cache", "validation", "step", "save", "gate sweep",
         "sample pictures", "evaluation", "generation"]


def stop_in(phase: str, signum: int, d: Path, world: Path, run: Path, config: Path) -> None:
    whole = d
    for i in range(10):  # on a busy machine the phase may be over before we notice it
        d = whole / str(i)
        d.mkdir()
        command, marker = phases(d, world, run, config)[phase]
        if phase == "evaluation":
            shutil.copytree(run / "stage3", d / "judged/stage3")
        process = Started(*command)
        if not reaches(process, marker) and process.returncode == 0:
            continue
        before = hashes(d / "run") if phase not in ("step", "save") else {}
        process.send_signal(signum)
        done = process.end()
        if done.returncode:
            break
    else:
        pytest.fail(f"{phase} was over before the signal, every time")
    intact(done, d, before, 128 + signum)
    assert done.stderr.strip().splitlines()[-1].startswith(f"stopped by {signal.Signals(signum).name}: ")
    assert "the same command goes on" in done.stderr or "nothing was left half-written" in done.stderr
    more = ["--steps", 12, "--allow-changed"] if phase in ("step", "save") else []
    ok(script(*command, *more))
    if phase == "sample pictures":
        ours, unbroken = (load_file(place / "stage1/final.safetensors") for place in (d / "run", run))
        assert all(torch.equal(ours[key], unbroken[key]) for key in unbroken)
    if phase == "making data":
        ok(script("prepare_data.py", "world", "--out", d / "unbroken", *command[4:]))
        assert all((d / "unbroken" / path.relative_to(d / "made")).read_bytes() == path.read_bytes()
                   for path in (d / "made").rglob("*.*"))


@pytest.mark.parametrize("phase, signum", [(name, (TERM, INT, HUP)[i % 3]) for i, name in enumerate(NAMES)],
                         ids=lambda value: value.name if isinstance(value, signal.Signals) else value)
def test_a_signal_in_each_phase(phase, signum, tmp_path, world, run, config):
    stop_in(phase, signum, tmp_path, world, run, config)


@pytest.mark.slow
@pytest.mark.parametrize("phase, signum", [(name, (TERM, INT, HUP)[(i + n) % 3])
                                           for i, name in enumerate(NAMES) for n in (1, 2)],
                         ids=lambda value: value.name if isinstance(value, signal.Signals) else value)
def test_the_other_signals_in_each_phase(phase, signum, tmp_path, world, run, config):
    stop_in(phase, signum, tmp_path, world, run, config)


def test_a_second_signal_ends_at_once(tmp_path, world, config):
    """The first one waits for the end of a validation that takes minutes."""
    process = Started("train_stage1.py", "--config",
                      write_config(tmp_path / "slow.json", world, tmp_path / "run", tmp_path / "cache",
                                   val_draws=100, val_clips=0))
    when(process, "stage1: +0 of")  # it listens to signals now, and validates
    process.send_signal(TERM)
    when(process, "SIGTERM: saving after this step or validation; a second one ends at once")
    time.sleep(1.2)  # a signal within a second of the first counts as the same Ctrl-C
    assert process.poll() is None  # it validates still
    process.send_signal(TERM)
    done = process.end()
    # at once: it saved nothing and said nothing
    assert done.returncode == 143 and "stopped by" not in done.stderr
    assert not list((tmp_path / "run/stage1/checkpoints").iterdir())
    has_no_process(done.pid)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS], ids=lambda value: value.name)
def test_a_killed_loader_process_is_one_sentence(signum, tmp_path, config):
    """SIGKILL is what the kernel sends for want of memory, SIGBUS what a full /dev/shm brings."""
    process = Started("train_stage1.py", "--config", config, "--run", tmp_path, "--workers", 1, "--steps",
                      3000)
    when(process, tmp_path / "stage1/log.jsonl")
    [worker] = [int(pid) for pid in left_behind(process.pid) if int(pid) != process.pid]
    os.kill(worker, signum)
    done = process.end()
    check(LOADER, done, tmp_path, {})
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--workers", 0, "--steps", 6,
                     "--allow-changed"))
    assert "resuming at step" in done.stdout


def test_a_killed_process_of_the_data_is_one_sentence(tmp_path):
    process = Started("prepare_data.py", "world", "--out", tmp_path / "made", "--train", 2000, "--val", 4,
                      "--test", 4)
    when(process, tmp_path / "made/images/train-*")
    worker = next(int(pid) for pid in left_behind(process.pid) if int(pid) != process.pid)
    os.kill(worker, signal.SIGKILL)
    done = process.end()
    # the killed one's own, which the next start removes
    for unfinished in tmp_path.rglob(f".*.{worker}.tmp"):
        unfinished.unlink()
    check(MAKER, done, tmp_path, {})
    assert not (tmp_path / "made/metadata.jsonl").exists()


IDLE = """import os, signal, time
from pathlib import Path
from clap2diffusion.base.exits import run_main
from clap2diffusion.base.workers import in_processes
def job(_):
    time.sleep(1)  # until the other one waits for a job, with the lock of the queue
    pool = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    [os.kill(int(pid), signal.SIGKILL) for pid in pool if int(pid) != os.getpid()]
def main(): in_processes(job, [0], 2, "sound world", "job")
run_main(main)
"""


def test_a_process_that_is_killed_with_a_lock_does_not_hang_the_others(tmp_path):
    """The killed one was idle, so all the work is done. The other one waits for its lock."""
    (tmp_path / "program.py").write_text(IDLE)
    done = ok(Started(tmp_path / "program.py").end())
    has_no_process(done.pid)


@pytest.mark.parametrize("error, case", [("torch.OutOfMemoryError('CUDA out of memory')", GPU),
                                         ("OSError(28, 'No space left on device', '/runs/log.txt')", LOGS)],
                         ids=["memory", "disk"])
def test_what_torch_and_the_system_raise_ends_in_one_sentence(error, case, tmp_path):
    (tmp_path / "program.py").write_text("import torch\nfrom clap2diffusion.base.exits import run_main\n"
                                         f"def main(): raise {error}\nrun_main(main)\n")
    check(case, script(tmp_path / "program.py"), tmp_path, {})


@pytest.mark.parametrize("ending, code", [("pass", 0), ("raise exits.RunFailed('it broke')", 1),
                                          ("raise KeyError('nobody foresaw it')", 1)])
def test_a_worker_that_ignores_signals_does_not_keep_a_finished_program_alive(ending, code):
    """Python sends its children SIGTERM and waits. A stage with an open loader once waited for ever."""
    program = f"""
import multiprocessing, signal, time
from clap2diffusion.base import exits
def ignore(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)
def main():
    ready = multiprocessing.Event()
    child = multiprocessing.Process(target=ignore, args=(ready,), daemon=True)
    child.start()
    ready.wait()
    print(child.pid)
    {ending}
exits.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENV, capture_output=True, text=True,
                          timeout=PATIENCE_S)
    assert done.returncode == code, done.stderr
    assert not Path(f"/proc/{int(done.stdout)}").exists()


LAST_SIGNALS = {  # a program that gets a signal, and what it says before it ends; it must never say "lost"
    "swallowed in a callback": ("""
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def main():
    one = Swallows()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # the repetition waits until "went on" is said
    del one
    print("went on", flush=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    time.sleep(20)
    print("lost", flush=True)
""", "went on\n"),
    "made an error by a library": ("""
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        print("lost", flush=True)
    except BaseException:
        raise exits.UserError("/models/vae: no AutoencoderKL can be made of its files") from None
""", ""),
    "held": ("""
def main():
    with exits.stops_held():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        print("held", flush=True)
    time.sleep(20)
    print("lost", flush=True)
""", "held\n"),
    "after a stage's last look at it": ("""
def main():
    with exits.stops_awaited():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        print("saved", flush=True)
    print("lost", flush=True)
""", "saved\n")}


@pytest.mark.parametrize("program, said", LAST_SIGNALS.values(), ids=LAST_SIGNALS.keys())
def test_a_signal_is_not_lost(program, said, tmp_path):
    """Python swallows what a handler raises inside __del__ or at a fork, so the signal comes again."""
    path = tmp_path / "program.py"
    path.write_text("import os, signal, time\nfrom clap2diffusion.base import exits\n"
                    f"{program}\nexits.run_main(main)\n")
    done = script(path)
    assert done.returncode == 143 and done.stdout == said, done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("stopped by SIGTERM")


def step_of_newest(folder: Path) -> int:
    return max((int(path.stem[5:]) for path in (folder / "checkpoints").glob("step-*")), default=-1)


@pytest.mark.parametrize("signum, code", [(INT, 130), (None, 141)],
                         ids=["Ctrl-C takes `| tee log` along", "`| head` has read enough"])
def test_a_stage_whose_output_nobody_reads_saves(signum, code, tmp_path, config):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = Started("train_stage1.py", "--config", config, "--run", tmp_path, "--steps", 3000,
                      "--save-every", 2000, "--workers", 1, output=str(tmp_path / "pipe"))

    def five_steps() -> bool:
        with suppress(BlockingIOError):
            os.read(reader, 1 << 20)  # so that the pipe is never full
        return len(logged_steps(tmp_path / "stage1/log.jsonl")) >= 5
    wait_for(five_steps, "step 5")
    os.close(reader)
    if signum:
        process.send_signal(signum)
    assert process.end().returncode == code
    has_no_process(process.pid)
    assert step_of_newest(tmp_path / "stage1") >= 5 and not list(tmp_path.rglob(".*.tmp"))


def test_a_closed_terminal_in_a_validation_saves(tmp_path, world):
    """The terminal is a real one. It is gone when the validation writes its figures."""
    config = write_config(tmp_path / "slow.json", world, tmp_path / "run", tmp_path / "cache", val_draws=16)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # a bar needs columns
    process = Started("train_stage1.py", "--config", config, output=os.ttyname(theirs))
    os.set_blocking(ours, False)
    said = []

    def listens() -> bool:
        """The bar comes when the stage listens to signals, before the validation."""
        with suppress(BlockingIOError):
            said.append(os.read(ours, 4096))
        return b"stage1:   0%" in b"".join(said)
    wait_for(lambda: listens() or process.poll() is not None, "the bar", lambda: str(b"".join(said)))
    assert process.poll() is None, said
    os.close(theirs)
    os.close(ours)
    process.send_signal(HUP)
    assert process.end().returncode == 129
    has_no_process(process.pid)
    assert step_of_newest(tmp_path / "run/stage1") == 0 and not list(tmp_path.rglob(".*.tmp"))


def test_two_runs_in_one_folder_and_kill_9_frees_it(tmp_path, config):
    """The second names the first. What the first one leaves at its death is no obstacle.

    The first one saves nothing while the second is there: a save in progress has a temporary file.
    """
    first = Started("train_stage1.py", "--config", config, "--run", tmp_path, "--steps", 3000, "--workers", 2,
                    "--save-every", 3000, "--validate-every", 0)
    when(first, tmp_path / "stage1/log.jsonl")
    before = {path: digest for path, digest in hashes(tmp_path).items() if path.stem == "best"}
    second = script("train_stage1.py", "--config", config, "--run", tmp_path)
    check(SECOND, second, tmp_path, {})
    assert f"process {first.pid} is" in second.stderr
    assert all(path.exists() for path in before) and first.poll() is None
    first.send_signal(signal.SIGKILL)
    has_no_process(first.end().pid)
    (tmp_path / "stage1/.best.safetensors.1.tmp").write_bytes(b"half a save")
    ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--steps", 8, "--allow-changed"))
    assert not list(tmp_path.rglob(".*.tmp"))


# --- the chain ----------------------------------------------------------------------------------------------

def chain_place(d: Path, setup: bool = False) -> Path:
    """A folder from which the chain runs: links to the project's files, and a config of few steps."""
    place = d / "copy"
    place.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh", ".txt") or path.name in ("assets", "clap2diffusion", "tools"):
            (place / path.name).symlink_to(path)
    config = read_json(ROOT / "configs/tiny.json")
    config["common"] |= {"batch_size": 4, "val_draws": 1, "samples": 1, "precision": "fp32", "log_every": 1,
                         "save_every": 2}
    config |= {"data": ["world", "--train", "40", "--val", "10", "--test", "10"],
               "stage1": {"steps": 30, "validate_every": 0}, "stage2": {"steps": 2},
               "stage3": {"steps": 2, "require_proof": False}}
    config.pop("evaluate")
    (place / "tiny.json").write_text(json.dumps(config))
    return place


PATH = {**ENV, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("signum, code", [(TERM, 143), (INT, 130), (HUP, 129)],
                         ids=lambda value: str(getattr(value, "name", value)))
def test_a_signal_while_the_environment_is_set_up(signum, code, tmp_path):
    """python3 is a stand-in whose pip takes for ever. It and the chain end; set-up begins anew."""
    place, programs = chain_place(tmp_path), tmp_path / "bin"
    programs.mkdir()
    stub = """#!/bin/bash
[ "$1" = - ] && exit 1
[ "$1 $2" = "-m venv" ] && { mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 0; }
[ "$1 $2" = "-m pip" ] && { echo $$ > pip; exec sleep 300; }
exit 0
"""
    for name in ("python3", "python", "nvidia-smi"):
        (programs / name).write_text(stub)
        (programs / name).chmod(stat.S_IRWXU)
    for _ in range(2):
        chain = subprocess.Popen(["bash", "run_all_stages.sh", "tiny.json"], cwd=place,
                                 env={**ENV, "PATH": f"{programs}:/usr/bin:/bin"}, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        wait_for((place / "pip").exists, "pip")
        chain.send_signal(signum)
        out, errors = chain.communicate(timeout=PATIENCE_S)
        assert chain.returncode == code and "setting up .venv" in out, out + errors
        has_no_process(chain.pid)
        (place / "pip").unlink()


def test_set_up_by_itself_says_how_to_use_what_it_finds(tmp_path):
    """From any folder; the sentence of a Python that lacks packages sends its reader here."""
    place = chain_place(tmp_path)
    command = ["bash", place / "setup_env.sh"]
    done = ok(subprocess.run(command, cwd=tmp_path, env=PATH, capture_output=True, text=True))
    assert done.stdout.endswith(f"use it: {Path(sys.executable).parent}/python3 generate.py --help\n")
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (place / ".venv/bin/python").chmod(stat.S_IRWXU)
    done = ok(subprocess.run(command, cwd=tmp_path, env=PATH, capture_output=True, text=True))
    assert done.stdout.endswith(f"use it: source {place}/.venv/bin/activate\n")


@pytest.mark.slow
def test_a_stage_that_fails_behind_a_pipe_stops_the_chain(tmp_path):
    """`bash run_all_stages.sh | tee log`: no stage after the failed one starts; the rerun skips the finished
    ones.
    """
    place = chain_place(tmp_path)
    (place / "runs/tiny").mkdir(parents=True)
    (place / "runs/tiny/stage2").write_text("in the way")
    command = ["bash", "-o", "pipefail", "-c", "bash run_all_stages.sh tiny.json 2>&1 | tee log"]
    done = subprocess.run(command, cwd=place, env=PATH, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert "runs/tiny/stage2: cannot be used as output folder" in done.stdout.splitlines()[-1], done.stdout
    assert not (place / "runs/tiny/stage3").exists() and (place / "runs/tiny/stage1/result.json").exists()
    (place / "runs/tiny/stage2").unlink()
    done = subprocess.run(command, cwd=place, env=PATH, capture_output=True, text=True)
    # the data and stage 1
    assert done.returncode == 0 and done.stdout.count("already complete") == 2, done.stdout
    assert (place / "runs/tiny/report.json").exists()


STAND_IN = """import os, sys, time
from pathlib import Path
Path("seen").write_text(os.environ["CHOSEN"] + " ".join(sys.argv[1:3]))
while not Path("go").exists():
    time.sleep(0.01)
sys.exit(3)
"""


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_tmux_starts_what_is_right_and_tells_running_from_finished(tmp_path):
    """The chain's first script is a stand-in that waits. The server is older, and has other variables."""
    place = chain_place(tmp_path)
    (place / "prepare_data.py").unlink()
    (place / "prepare_data.py").write_text(STAND_IN)
    (tmp_path / "temporary").mkdir()
    environment = {**PATH, "TMUX_TMPDIR": str(tmp_path), "TMPDIR": str(tmp_path / "temporary"),
                   "CHOSEN": "a b\nc; $x "}
    environment.pop("TMUX", None)

    def tmux(*command) -> str:
        return subprocess.run(["tmux", *command], env={**environment, "CHOSEN": "other"}, capture_output=True,
                              text=True).stdout.strip()

    def start(*more, **others) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "run_all_stages.sh", "--tmux", *more], cwd=place,
                              env=environment | others, capture_output=True, text=True)
    try:
        tmux("new-session", "-d", "-s", "older", "sleep", "600")
        for wrong, says in ((["none.json"], "error: none.json: no such config"),
                            (["tiny.json", "--batch-sizes", "3"], "error: no stage knows --batch-sizes; "),
                            (["tiny.json", "--seed", "x"], "error: argument --seed: ")):
            done = start(*wrong)
            assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(says), done.stderr
            assert "started" not in done.stdout and tmux("list-sessions", "-F", "#S") == "older"
        done = ok(start("tiny.json", "--seed", "3"))
        assert all(line in done.stdout for line in (
            "come back: tmux attach -t clap2diffusion\n", "leave it running: Ctrl-b, then d\n",
            "stop it, which saves first: tmux kill-session -t clap2diffusion\n"))
        wait_for((place / "seen").exists, "the chain's first script")
        wait_for((place / "seen").read_text, "its words")
        assert (place / "seen").read_text() == environment["CHOSEN"] + "world --train"
        assert not list((tmp_path / "temporary").iterdir())
        done = start("tiny.json", TMUX=tmux("display-message", "-p", "#{socket_path},#{pid},0"))
        assert done.returncode == 2 and f"is running (bash in {place})" in done.stderr, done.stderr
        assert "come back to it: tmux switch-client -t clap2diffusion" in done.stderr  # no tmux inside tmux
        windows = ("list-windows", "-t", "=clap2diffusion", "-F", "#W #{window_active}")
        assert tmux(*windows).splitlines() == ["chain 1", "watch 0"]
        wait_for(lambda: "stage1  not begun" in tmux("capture-pane", "-p", "-t", "=clap2diffusion:watch"),
                 "the second window's words")
        (place / "go").touch()
        wait_for(lambda: tmux("list-panes", "-t", "=clap2diffusion", "-F", "#{pane_dead}") == "1", "its end")
        wait_for(lambda: tmux(*windows) == "chain 1", "the end of the second window")
        (place / "go").unlink()
        (place / "seen").unlink()
        done = ok(start("tiny.json"))
        # on a busy machine tmux may not know the code of a pane that is dead
        assert re.search(f"the run before it, in {re.escape(str(place))}, has ended(;| with exit code 3;)",
                         done.stdout), done.stdout
        wait_for((place / "seen").exists, "the second chain's first script")
        sessions = tmux("list-panes", "-s", "-t", "=clap2diffusion", "-F", "#{pane_pid}").split()
        tmux("kill-session", "-t", "clap2diffusion")
        assert len(sessions) == 2
        for session in map(int, sessions):
            has_no_process(session)
    finally:
        tmux("kill-server")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_in_tmux_the_chain_outlives_its_client_and_the_server_s_death_saves(tmp_path):
    """Start in a real tmux, close the client, kill the server in stage 1, start again."""
    place = chain_place(tmp_path)
    config = read_json(place / "tiny.json")
    config["stage1"]["steps"] = 400
    (place / "tiny.json").write_text(json.dumps(config))
    environment = {**PATH, "TMUX_TMPDIR": str(tmp_path), "TERM": "xterm"}

    def tmux(*command) -> subprocess.CompletedProcess:
        return subprocess.run(["tmux", *command], env=environment, capture_output=True, text=True)
    start = ["bash", "run_all_stages.sh", "--tmux", "tiny.json"]
    log = place / "runs/tiny/stage1/log.jsonl"
    try:
        done = ok(subprocess.run(start, cwd=place, env=environment, capture_output=True, text=True))
        assert "tmux attach -t clap2diffusion" in done.stdout
        again = subprocess.run(start, cwd=place, env=environment, capture_output=True, text=True)
        assert again.returncode == 2 and "is running" in again.stderr
        client = subprocess.Popen(["script", "-qc", "tmux attach -t clap2diffusion", "/dev/null"],
                                  env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        wait_for(lambda: len(logged_steps(log)) >= 5, "step 5")
        assert tmux("list-clients").stdout.strip()
        client.kill()  # a closed terminal
        client.wait()
        at = len(logged_steps(log))
        wait_for(lambda: len(logged_steps(log)) > at + 1, "a step after the client's death")
        panes = [int(pid) for pid in tmux("list-panes", "-a", "-F", "#{pane_pid}").stdout.split()]
        tmux("kill-server")
        for session in panes:  # each pane's shell leads a session
            has_no_process(session)
        assert not (place / "runs/tiny/stage1/result.json").exists() and not list(place.rglob(".*.tmp"))
        stopped_at = max(int(path.stem[5:])
                         for path in (place / "runs/tiny/stage1/checkpoints").glob("step-*"))
        assert stopped_at >= 5
        config["stage1"]["steps"] = stopped_at + 4
        (place / "tiny.json").write_text(json.dumps(config))
        ok(subprocess.run([*start, "--allow-changed"], cwd=place, env=environment, capture_output=True,
                          text=True))
        wait_for((place / "runs/tiny/report.json").exists, "the report")
        shown = tmux("capture-pane", "-p", "-S", "-2000", "-t", "clap2diffusion").stdout
        assert f"resuming at step {stopped_at}" in shown
    finally:
        tmux("kill-server")
