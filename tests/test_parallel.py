"""Several processes of one run: the losses of one, a single writer, stopping and restarting together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENV, PATIENCE_S, ROOT, logged_steps, ok, script, wait_for

import common
from clap2diffusion.base import processes
from clap2diffusion.base.tensor_file import read_tensors

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(name: str, *args, restarts: int = 0) -> subprocess.Popen:
    return subprocess.Popen([*TORCHRUN, "--max-restarts", str(restarts), "--", str(ROOT / name),
                             *map(str, args)], cwd=ROOT,
                            env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def logged(folder: Path, key: str = "loss") -> list[float]:
    return [json.loads(line)[key]
            for line in (folder / "log.jsonl").read_text().splitlines() if f'"{key}"' in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "final.safetensors")[1]


def test_shares_of_the_draws_are_the_draws_of_one(monkeypatch):
    def draw(draws):
        return draws.normal(4, 3), draws.integers(0, 1000, 4), draws.uniform(4)
    monkeypatch.setattr(processes, "world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(draw(common.Draws(3, 5)))
    monkeypatch.undo()
    one = common.Draws(3, 5)
    for a, b, whole in zip(*shares, (one.normal(8, 3), one.integers(0, 1000, 8), one.uniform(8)),
                           strict=True):
        assert torch.equal(torch.cat([a, b]), whole)


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(config, tmp_path):
    """The signal arrives when this step's value was read already: the next step must see it."""
    program = """
import os, signal, sys
from clap2diffusion.base import exits, processes
agreed = []
def largest(value):
    agreed.append(value)
    if len([v for v in agreed if v is not True and v is not False]) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return value
processes.largest = largest
import train_stage1
sys.argv[0] = "train_stage1.py"
exits.run_main(train_stage1.main)
"""
    (tmp_path / "program.py").write_text(program)
    done = script(tmp_path / "program.py", "--config", config, "--run", tmp_path)
    assert done.returncode == 143 and "stopped by SIGTERM: step" in done.stderr, done.stderr[-500:]


def test_one_process_and_two_follow_the_same_losses(config, run, tmp_path):
    """Stage 2, which has all that trains: accumulation, LoRA, averages; batches of 8 and of 2 x 4."""
    flags = ["--config", config, "--precision", "fp32", "--steps", 6, "--validate-every", 3, "--samples", 0,
             "--workers", 0, "--accumulation", 2, "--lora-dropout", 0, "--init-from", run / "stage1"]
    two = torchrun("train_stage2.py", *flags, "--batch-size", 4, "--run", tmp_path / "two")
    ok(script("train_stage2.py", *flags, "--batch-size", 8, "--run", tmp_path / "one"))
    done = ok(ended(two))
    one, two = tmp_path / "one/stage2", tmp_path / "two/stage2"
    assert logged(two) == pytest.approx(logged(one), rel=1e-4) and len(logged(two)) == 6
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-3)
    assert logged(two, "val_right")[-1][0] == pytest.approx(logged(one, "val_right")[-1][0], rel=1e-4)
    for key, value in weights(one).items():
        assert torch.allclose(weights(two)[key], value, atol=2e-4), key
    # one of them speaks
    assert done.stdout.count("features of 70 rows ready") == 1 and "2 processes" in done.stdout
    settings = [json.loads((folder / "config.json").read_text()) for folder in (one, two)]
    assert settings[0]["batch_size"] == settings[1]["batch_size"] == 8
    # and one process goes on from what two have saved
    (two / "result.json").unlink()
    done = ok(script("train_stage2.py", *flags, "--batch-size", 8, "--run", tmp_path / "two"))
    assert "resuming at step 6" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage, rate", [(1, 3e-4), (3, 0.05)])
def test_fifty_steps_of_one_process_and_of_two(stage, rate, config, run, tmp_path):
    flags = ["--config", config, "--precision", "fp32", "--steps", 50, "--learning-rate", rate, "--samples",
             0, "--save-every", 50]
    flags += ["--init-from", run / f"stage{stage - 1}"] if stage > 1 else ["--validate-every", 25]
    flags += ["--min-steps", 50] if stage == 3 else []
    ok(script(f"train_stage{stage}.py", *flags, "--batch-size", 8, "--run", tmp_path / "one"))
    ok(ended(torchrun(f"train_stage{stage}.py", *flags, "--batch-size", 4, "--run", tmp_path / "two")))
    one, two = (logged(tmp_path / f"{name}/stage{stage}") for name in ("one", "two"))
    assert len(one) == 50 and two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_and_the_same_command_goes_on(config, tmp_path):
    flags = ["--config", config, "--steps", 30, "--save-every", 100, "--validate-every", 0, "--samples", 0,
             "--batch-size", 2]
    ok(ended(torchrun("train_stage1.py", *flags, "--run", tmp_path / "whole")))
    folder = tmp_path / "cut/stage1"
    process = torchrun("train_stage1.py", *flags, "--run", tmp_path / "cut")
    wait_for(lambda: len(logged_steps(folder / "log.jsonl")) >= 5, "step 5")
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    saved = sorted(int(path.stem[5:]) for path in (folder / "checkpoints").glob("step-*.safetensors"))
    assert len(saved) == 2 and saved[0] == 0 and 5 <= saved[1] < 30, done.stderr
    assert done.stderr.count("is saved in") == 2  # both say where; one has written
    assert not list(folder.rglob("*.tmp"))
    done = ok(ended(torchrun("train_stage1.py", *flags, "--run", tmp_path / "cut")))
    assert f"resuming at step {saved[1]}" in done.stdout
    whole = weights(tmp_path / "whole/stage1")
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())


@pytest.mark.slow
@pytest.mark.parametrize("rank", (0, 1))
def test_a_killed_process_is_restarted_and_the_run_ends_with_the_same_bits(rank, config, tmp_path):
    flags = ["--config", config, "--steps", 24, "--save-every", 4, "--validate-every", 8, "--samples", 0,
             "--batch-size", 2]
    ok(ended(torchrun("train_stage1.py", *flags, "--run", tmp_path / "whole")))
    folder = tmp_path / "cut/stage1"
    # a restart must not begin afresh
    process = torchrun("train_stage1.py", *flags, "--fresh", "--run", tmp_path / "cut", restarts=2)
    wait_for(lambda: len(logged_steps(folder / "log.jsonl")) >= 10, "step 10")
    children = [int(pid)
                for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = {int(dict(item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0")
                      if "=" in item).get("RANK", -1)): pid for pid in children}
    os.kill(ranks[rank], signal.SIGKILL)
    done = ok(ended(process))
    assert "resuming at step" in done.stdout
    whole = weights(tmp_path / "whole/stage1")
    assert all(torch.equal(value, whole[key]) for key, value in weights(folder).items())
