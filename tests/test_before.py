"""What was trained before the code moved into its rooms: old checkpoints resume, old results and adapters
load.

tests/before/ was made by the scripts of commit 4e6b73c on random models of minimal size and eight short
clips: `train_stageN.py --config small.json --run done` for each stage, with --run stopped for stages 1 and 2,
killed by SIGKILL in step 6 (save_every is 4), and picture.png by `generate.py --audio clips/audio/6.flac
--steps 4 --seed 3` from stage 3. Only what these tests read was kept. An old stage may print its settings
otherwise, so no log is here.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ok, script
from PIL import Image
from safetensors.torch import load_file

BEFORE = Path(__file__).parent / "before"
# the clips' time when the old cache was made: a cache's name holds the times of its files
MADE_AT = 1_700_000_000


@pytest.fixture
def place(tmp_path) -> Path:
    """A copy of tests/before with the times that its clips had; git keeps none."""
    copy = tmp_path / "before"
    shutil.copytree(BEFORE, copy)
    for path in (copy / "clips").rglob("*"):
        os.utime(path, (MADE_AT, MADE_AT))
    return copy


@pytest.mark.parametrize("stage, before", [(1, []), (2, ["--init-from", "done/stage1"])])
def test_an_old_checkpoint_resumes_and_ends_with_the_old_weights(stage, before, place):
    """By the command that began it. The features are made anew, under the name that the checkpoint knows."""
    done = ok(script(f"train_stage{stage}.py", "--config", "small.json", "--run", "stopped", *before,
                     cwd=place))
    assert "resuming at step 4" in done.stdout
    folder = place / f"stopped/stage{stage}"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 8 and result["best_step"] == 8 and result["stock_difference"] < 1e-4
    ours, old = (load_file(path / "final.safetensors") for path in (folder, place / f"done/stage{stage}"))
    assert ours.keys() == old.keys()
    assert all(torch.allclose(ours[key], old[key], rtol=0, atol=1e-5) for key in old)
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 5, 6, 7, 8]  # 5 was cut off


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_begins_from_an_old_result_and_ends_as_the_old_one(stage, place):
    command = ["--config", "small.json", "--run", "again", "--init-from", f"done/stage{stage - 1}",
               *(["--no-require-proof"] if stage == 3 else [])]
    done = ok(script(f"train_stage{stage}.py", *command, cwd=place))
    assert f"starts from done/stage{stage - 1}/final.safetensors (step 8, 2 audio tokens" in done.stdout
    ours, old = (load_file(place / f"{run}/stage{stage}/adapter.safetensors") for run in ("again", "done"))
    assert ours.keys() == old.keys() and any(key.endswith("to_v_lora.up.weight") for key in old)
    assert all(torch.allclose(ours[key], old[key], rtol=0, atol=1e-5) for key in old)


def test_old_stages_are_complete_for_the_same_command(place):
    """Stage 3 only if no proof is asked for: on random models the sound is no help, which is said now."""
    for stage in (1, 2, 3):
        command = (f"train_stage{stage}.py", "--config", "small.json", "--run", "done")
        done = ok(script(*command, *(["--no-require-proof"] if stage == 3 else []), cwd=place))
        assert f"done/stage{stage}: already complete (--fresh" in done.stdout
    done = script(*command, cwd=place)
    assert done.returncode == 5 and "the gate learned the pictures' look" in done.stderr.splitlines()[-1]


def test_an_old_adapter_makes_the_old_picture(place):
    ok(script("generate.py", "--run", "done", "--audio", "clips/audio/6.flac", "--out", "new.png", "--steps",
              4, "--seed", 3, cwd=place))
    old, new = (np.asarray(Image.open(place / name)).astype(int) for name in ("picture.png", "new.png"))
    assert old.std() > 10 and abs(old - new).max() <= 1


def test_a_config_with_warmup_share_is_told_what_to_write_instead(place):
    config = json.loads((place / "small.json").read_text())
    config["stage2"]["warmup_share"] = 0.1
    (place / "old.json").write_text(json.dumps(config))
    done = script("train_stage2.py", "--config", "old.json", "--run", "new", cwd=place)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and not (place / "new").exists(), done.stderr
    assert "warmup_share" in last and "warmup_steps" in last and "Traceback" not in done.stderr, last
