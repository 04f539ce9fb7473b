"""The losses of 20 steps of each stage, and the gate's walk, are those in golden.json. A change of the
mathematics moves them.

`python tests/test_golden.py` writes golden.json anew; do so only after a change that is meant to change them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import BASE, CLAP, ROOT, ok, script

GOLDEN = ROOT / "tests/golden.json"
TOLERANCE = 2e-3  # relative; another processor rounds otherwise, of which 20 of Adam's steps make 1e-4
STAGES = ("stage1", "stage2", "stage3")


def settings(place: Path, world: Path) -> Path:
    config = place / "golden-config.json"
    config.write_text(json.dumps(
        {"common": {"run": str(place / "run"), "data_root": str(world), "cache_dir": str(place / "cache"),
                    "base_model": str(BASE), "clap_model": str(CLAP), "batch_size": 4, "precision": "fp32",
                    "val_draws": 1, "val_clips": 2, "samples": 0, "log_every": 1, "validate_every": 0},
         "stage1": {"steps": 20, "learning_rate": 3e-4, "warmup_steps": 2, "min_snr_gamma": 5.0},
         "stage2": {"steps": 20, "learning_rate": 3e-4},
         "stage3": {"steps": 20, "learning_rate": 0.1, "require_proof": False}}))
    return config


def curves(run: Path, stage: str) -> dict[str, list[float]]:
    """The loss of every step; of stage 3 also tanh(gate), since a gate near 0 hardly moves the loss."""
    lines = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if "loss" in line]
            for name in ("loss", "tanh_gate")[:1 + (stage == "stage3")]}


def differs(found: dict, golden: dict) -> float:
    """Mean difference of the curve that differs most, relative to its mean. Single steps differ more."""
    assert all(len(curve) == 20 for curve in found.values())
    return max(sum(abs(a - b) for a, b in zip(found[name], curve, strict=True)) / sum(map(abs, curve))
               for name, curve in golden.items())


def begun(config: Path, stage: str) -> list:
    """Flags that let a stage begin from one step of the stage before: 20 steps would round too much."""
    return ["--init-from",
            config.parent / "begun" / f"stage{int(stage[-1]) - 1}"] if stage != "stage1" else []


def train(config: Path) -> None:
    for run, more in (("begun", ["--steps", 1]), ("run", [])):
        for stage in STAGES:
            ok(script(f"train_{stage}.py", "--config", config, "--run", config.parent / run,
                      *begun(config, stage), *more))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    config = settings(tmp_path_factory.mktemp("golden"), world)
    train(config)
    return config


@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_are_the_golden_ones(stage, trained):
    golden = json.loads(GOLDEN.read_text())
    assert differs(curves(trained.parent / "run", stage), golden[stage]) < TOLERANCE


SIGN = "scheduler.add_noise(latents, noise, timesteps)", "scheduler.add_noise(latents, -noise, timesteps)"
BREAKS = [  # (what, stage, flags, file, text, what takes its place)
    ("another seed", "stage1", ["--seed", "1"], "", "", ""),
    ("a swapped sign of the noise", "stage1", [], "train_stage1.py", *SIGN),
    ("a dropped weight of the loss", "stage1", [], "train_stage1.py",
     "loss_weights * common.mse_per_sample", "common.mse_per_sample"),
    ("a sound that is not heard", "stage1", [], "train_stage1.py", "(device), audio_embeds.to(device)",
     "(device), 0 * audio_embeds.to(device)"),
    ("captions that are never dropped", "stage1", ["--caption-drop", "0"], "", "", ""),
    ("a gradient up the hill", "stage1", [], "train_stage1.py", "(loss / cfg.accumulation).backward()",
     "(-loss / cfg.accumulation).backward()"),
    ("a swapped sign of the noise", "stage2", [], "train_stage2.py", *SIGN),
    ("an adapter that does not learn", "stage2", ["--learning-rate", "1e-9"], "", "", ""),
    ("a swapped sign of the noise", "stage3", [], "train_stage3.py", *SIGN),
    ("a gate that climbs", "stage3", [], "train_stage3.py", "(loss / cfg.accumulation).backward()",
     "(-loss / cfg.accumulation).backward()"),
]


@pytest.mark.parametrize("what, stage, flags, file, text, other", BREAKS,
                         ids=[f"{b[1]}: {b[0]}" for b in BREAKS])
def test_a_broken_stage_is_told_from_the_golden_one(what, stage, flags, file, text, other, trained, tmp_path):
    (tmp_path / "clap2diffusion").symlink_to(ROOT / "clap2diffusion")
    for path in ROOT.glob("*.py"):
        content = path.read_text()
        if path.name == file:
            assert text in content, f"{file} no longer says {text}"
            content = content.replace(text, other)
        (tmp_path / path.name).write_text(content)
    ok(script(tmp_path / f"train_{stage}.py", "--config", trained, "--run", tmp_path / "run",
              *begun(trained, stage), *flags))
    assert differs(curves(tmp_path / "run", stage),
                   json.loads(GOLDEN.read_text())[stage]) > 5 * TOLERANCE, what


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/golden")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    ok(script("prepare_data.py", "world", "--out", place / "world", "--train", 40, "--val", 20, "--test", 10))
    train(settings(place, place / "world"))
    GOLDEN.write_text(json.dumps({stage: curves(place / "run", stage) for stage in STAGES}, indent=1) + "\n")
