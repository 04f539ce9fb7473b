"""How busy the device is: in a run's logs, at log steps alone, and live; by a stand-in for the driver."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in_nvml
import torch
from conftest import ENV, ROOT, ok, script, wait_for

from clap2diffusion.engine import watching

PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import stand_in_nvml
sys.modules["pynvml"] = stand_in_nvml
stand_in_nvml.FAILS |= {fails!r}
import types, torch
import train_stage1
from clap2diffusion.base.exits import run_main
from clap2diffusion.engine import stage, watching
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(uuid="aaaabbbbcccc"[4 * index:][:4])
stage.open_meter = lambda device: watching.open_meter(torch.device("cuda", 2))  # there is no such device here
made = stage.make_loader
def slow_loader(*args):
    for batch in made(*args):
        now[0] += {wait}
        yield batch
stage.make_loader = slow_loader
now = [0.0]  # a clock of its own, on which all but the loader takes no time
def clock():
    now[0] += 0.01
    return now[0]
watching.time = types.SimpleNamespace(perf_counter=clock)
try:
    run_main(train_stage1.main)
finally:
    print("asked", dict(stand_in_nvml.CALLS))
"""


@pytest.fixture
def nvml(monkeypatch):
    """The stand-in, in the place of the driver's module."""
    monkeypatch.setitem(sys.modules, "pynvml", stand_in_nvml)
    monkeypatch.setattr(stand_in_nvml, "FAILS", set())
    stand_in_nvml.CALLS.clear()
    return stand_in_nvml


def watched(config: Path, place: Path, fails: set, steps: int, wait: float) -> tuple[list[dict], str, dict]:
    """A real stage 1 that takes itself to be on the third GPU: log lines of steps, log.txt, what was asked.
    wait: seconds for each batch, by the clock that it looks at."""
    program = place / "train_stage1.py"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), fails=fails, wait=wait))
    done = ok(script(program, "--config", config, "--run", place / "run", "--log-every", 2, "--steps", steps,
                     "--validate-every", 4, "--workers", 0))
    folder = place / "run/stage1"
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    [asked] = re.findall(r"^asked (.*)$", done.stdout, re.M)
    return ([line for line in logged if "loss" in line], (folder / "log.txt").read_text(),
            json.loads(asked.replace("'", '"')))


def test_the_driver_s_figures_stand_beside_the_loss_at_log_steps_alone(config, tmp_path):
    """The loop waits long for its loader: the GPU is 40 % busy, and the log says why."""
    logged, text, asked = watched(config, tmp_path, set(), 7, 1.0)
    assert [line["step"] for line in logged] == [2, 4, 6, 7]
    for line in logged:
        assert (line["gpu_percent"], line["gpu_memory_mb"], line["gpu_watts"], line["gpu_celsius"]) == (
            40.0, 5 * 1024, 312.5, 64.0)  # the mean of the samples, MB of bytes, W of mW
        assert "cpu_percent" not in line and "gpu_memory_total_mb" not in line
    assert all(asked[f"DeviceGet{name}"] == 4 for name in ("MemoryInfo", "PowerUsage", "Temperature"))
    assert asked["DeviceGetSamples"] == 6 and asked["Init"] == 1  # at the start and where the loop begins
    assert "stage1: Stand-in 2; gpu_percent is the mean since the log line before\n" in text
    said = [line for line in text.splitlines() if "GPU 40 % busy" in line]
    assert len(said) == 2, text  # at steps 4 and 7
    for line, steps in zip(said, ("2 to 4", "4 to 7")):
        assert f"stage1: steps {steps}: GPU 40 % busy, 5,120 MB held, 312 W, 64 °C; time: loader 9" in line
        assert line.endswith("; the GPU sits idle, most likely because of the loader; what helps: "
                             "more --workers, or --cache-dir on a faster disk")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(tmp_path / "run/stage1/tensorboard")).Reload()
    assert [(one.step, one.value) for one in board.Scalars("gpu_watts")] == [
        (step, 312.5) for step in (2, 4, 6, 7)]
    assert board.Scalars("gpu_percent")[0].value == 40 and board.Scalars("gpu_celsius")[0].value == 64


def test_figures_that_the_driver_does_not_have_are_left_out(config, tmp_path):
    fails = {"DeviceGetPowerUsage", "DeviceGetSamples"}
    logged, text, _ = watched(config, tmp_path, fails, 4, 0.0)
    assert all(line["gpu_percent"] == 99 and "gpu_watts" not in line for line in logged)
    assert "gpu_percent is what the driver saw last\n" in text and "sits idle" not in text
    assert "GPU 99 % busy, 5,120 MB held, 64 °C; time: " in text


@pytest.mark.parametrize("fails", ["Init", "DeviceGetHandleByUUID"])
def test_without_a_driver_nothing_is_said(fails, nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="aaaa"))
    nvml.FAILS.add(fails)
    meter = watching.open_meter(torch.device("cuda", 0))
    assert isinstance(meter, watching.NoMeter) and (meter.read(), meter.about) == ({}, "")


def test_without_the_package_nothing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert isinstance(watching.open_meter(torch.device("cuda", 0)), watching.NoMeter)


@pytest.mark.parametrize("visible, properties, handle", [
    ("2,0", {"uuid": "aaaa"}, 0),  # the second that is left is the driver's first
    ("GPU-cc,GPU-aa", {"uuid": "cccc"}, 2),
    ("", {"uuid": "bbbb"}, 1),
    ("x,MIG-bbbb-1", {"uuid": "bbbb"}, 11),  # the slice, not the GPU that it is of
    ("", {"uuid": "bbbb-1"}, 11),
    ("", {"pci_domain_id": 0, "pci_bus_id": 59, "pci_device_id": 0}, 2),  # an older torch
    ("", {"uuid": "zzzz"}, None)])
def test_the_device_is_the_run_s_own(visible, properties, handle, nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    assert watching.Driver().handle_of(1) == handle


def test_without_new_samples_the_driver_s_last_counts(nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="aaaa"))
    meter = watching.open_meter(torch.device("cuda", 0))
    assert meter.read()["gpu_percent"] == 40
    monkeypatch.setattr(nvml, "PERCENT", [])
    assert meter.read()["gpu_percent"] == 99


# --- the reason ---------------------------------------------------------------------------------------------

IDLE = [("loader", 40, "the loader"), ("validation", 40, "validation"), ("saves", 40, "saves"),
        ("samples", 40, "sample pictures"), ("steps", 40, "steps too small to fill it"),
        ("loader", 70, ""), ("loader", 71, ""), ("validation", 69.9, "validation"),
        ("loader", None, "the loader"), ("validation", None, ""), ("steps", None, "")]


@pytest.mark.parametrize("part, percent, reason", IDLE, ids=str)
def test_the_likely_reason_is_the_part_that_takes_the_time(part, percent, reason, monkeypatch):
    """Four tenths of the time go to one part beside the steps. Without a driver only a wait is a sign."""
    now = [0.0]
    monkeypatch.setattr(watching.time, "perf_counter", lambda: now[0])
    meter = SimpleNamespace(restart=lambda: None, read=lambda: {} if percent is None else {
        "gpu_percent": percent})
    watch = watching.Watch(meter)
    watch.restart()
    for step in (10, 20, 30):
        for one, seconds in (("steps", 6), (part, 4 if step > 10 else 400)):  # the first tells nothing
            now[0] += seconds
            watch.lap(one)
        watch.read(step)
    said = watch.conclude()
    assert said.startswith("steps 10 to 30: ") and not watch.conclude()
    shares = {"loader": 0.4, "steps": 1.0} if part == "steps" else {part: 0.4, "steps": 0.6}
    assert f"{part} {shares[part]:.0%}" in said
    assert (f"idle, most likely because of {reason}" in said) if reason else "idle" not in said, said


# --- a CPU --------------------------------------------------------------------------------------------------

def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_cpu_s_share_counts_this_process_and_its_children():
    import multiprocessing
    meter = watching.CpuMeter()
    burn(0.2)
    before = meter._before[1]
    assert meter.read()["cpu_percent"] > 0 and meter._before[1] - before >= 0.2

    def of_others() -> float:
        return meter._now()[1] - time.process_time()
    child, before = multiprocessing.get_context("fork").Process(target=burn, args=(0.5,)), of_others()
    child.start()
    wait_for(lambda: of_others() - before > 0.25, "the time of a child that lives", seconds=60)
    child.join()
    assert of_others() - before >= 0.45  # and of one that has ended


def test_a_stage_on_a_cpu_logs_its_share(run):
    lines = [json.loads(line) for line in (run / "stage2/log.jsonl").read_text().splitlines()]
    shares = [line["cpu_percent"] for line in lines if "loss" in line]
    assert len(shares) == 10 and 0 < sum(shares) / 10 <= 100.0 * (os.cpu_count() + 1)
    assert not any("cpu_percent" in line or "gpu_percent" in line for line in lines if "loss" not in line)
    text = (run / "stage2/log.txt").read_text()
    [said] = [line for line in text.splitlines() if "steps 5 to 10" in line]
    assert re.search(r"stage2: steps 5 to 10: CPU \d+ % of \d+00 %; time: .*steps \d+%", said), said


# --- live ---------------------------------------------------------------------------------------------------

def watch_once(run: Path) -> str:
    return ok(script("tools/watch.py", run)).stdout


def test_what_is_shown_of_a_run(run, tmp_path):
    said = watch_once(run)
    for stage in (1, 2, 3):
        done = rf"^stage{stage}  done at step \d+ \(all steps.*\), val_right 0\.\d+$"
        assert re.search(done, said, re.M), said
    assert re.search(r"^CPU +\d+ processors, ", said, re.M) and "stage3: done" in said
    half = tmp_path / "run/stage1"
    half.mkdir(parents=True)
    (half / "config.json").write_text('{"steps": 400}')
    said = watch_once(tmp_path / "run")
    assert "stage1  before its first log line, of 400 steps\nstage2  not begun\n" in said
    rows = [{"step": 0, "val_right": [0.5, 0.4, 0.6]},
            *({"step": step, "loss": 1 / step, "lr": 1e-4, "s_per_step": 2.0, "memory_mb": 1234.0,
               "gpu_percent": 93.0, "gpu_watts": 312.0} for step in (50, 100))]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (half / "log.jsonl").write_text(text + '{"step": 150, "lo')  # a line that is being written
    said = watch_once(tmp_path / "run")
    assert f"stage1  {'█' * 6}{'░' * 18}  100 of 400 (25%)\n" in said
    assert "2 s a step, at least 0:10:00 left; last log line 0:00:0" in said
    assert "GPU 93 % busy, 312 W, 1,234 MB at most\n" in said and "loss 0.01, lr 0.0001\n" in said
    assert "█▁  loss, 2 log lines\n" in said and "val_right 0.50000\n" in said


def test_a_stage_that_cannot_be_read_does_not_end_the_screen(tmp_path):
    """Half a result, a line without a step, infinite losses, more steps done than are asked for now."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from watch import describe_stage
    finally:
        sys.path.pop(0)
    (tmp_path / "config.json").write_text('{"steps": 10}')
    log, name = tmp_path / "log.jsonl", tmp_path.name
    for text, says in (('{"loss": 1}', "cannot be read now (KeyError: 'step')"),
                       ('{"loss": 1, "step": "x"}', "cannot be read now (TypeError: ")):
        log.write_text(f"{text}\n")
        [said] = describe_stage(tmp_path)
        assert said.startswith(f"{name}  {says}")
    log.write_text("".join(json.dumps({"step": step, "loss": loss, "s_per_step": 60}) + "\n"
                           for step, loss in ((5, 2.0), (10, float("inf")), (20, 1.0))))
    said = "\n".join(describe_stage(tmp_path))
    assert "20 of 10 (200%)" in said and "at least 0:00:00 left" in said and "█▁  loss, 3 log lines" in said
    (tmp_path / "result.json").write_text('{"steps": 20}')
    (tmp_path / "final.safetensors").write_text("")
    assert describe_stage(tmp_path) == [f"{name}  cannot be read now (KeyError: 'validation')"]


@pytest.mark.parametrize("which, says", [
    ("runs", "holds the runs a, b; give one of them, such as {d}/runs/a"),
    ("runs/a/stage1", "is the folder of one stage; give the run's, {d}/runs/a")], ids=["runs", "stage"])
def test_a_folder_that_is_no_run(which, says, tmp_path):
    for run in "ab":
        (tmp_path / f"runs/{run}/stage1").mkdir(parents=True)
        (tmp_path / f"runs/{run}/stage1/config.json").write_text("{}")
    done = script("tools/watch.py", tmp_path / which)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / which}: {says.format(d=tmp_path)}"


def test_what_a_driver_says_of_what_it_does_not_know_is_left_out(nvml, monkeypatch):
    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates",
                        lambda handle: SimpleNamespace(gpu=2 ** 32 - 1))
    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", lambda handle: 2 ** 32 - 1)
    assert watching.Driver().read(0) == {
        "gpu_memory_mb": 3 * 1024, "gpu_memory_total_mb": 80 * 1024, "gpu_celsius": 64}


def test_a_run_that_is_not_there(tmp_path):
    done = script("tools/watch.py", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/none: no such run; expected the folder of --run, such as runs/tiny")


@pytest.mark.parametrize("how", ["the key q", "the end of the process", "an unnoticed end"])
def test_the_screen_ends_and_gives_the_terminal_back(how, tmp_path):
    """On a terminal, of a run that has not begun."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(["sleep", "600"]) as chain:
        watch = subprocess.Popen([sys.executable, ROOT / "tools/watch.py", tmp_path / "none", "--until",
                                  str(chain.pid)], stdin=theirs, stdout=theirs, env={**ENV, "TERM": "xterm"})
        os.close(theirs)
        shown = b""
        while b"q leaves" not in shown:
            shown += os.read(ours, 4096)
        assert b"\x1b[?1049h" in shown and b"\x1b[?7l" in shown  # lines that are too wide are cut
        assert b"stage1  not begun" in shown and watch.poll() is None
        if how == "the key q":
            os.write(ours, b"q")
        else:
            chain.kill()
        if how == "the end of the process":  # else it is left as a zombie
            chain.wait()
        assert watch.wait(60) == 0
        assert b"\x1b[?1049l" in os.read(ours, 4096)
        chain.kill()
    os.close(ours)
