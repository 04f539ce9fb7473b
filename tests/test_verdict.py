"""Stage 3's verdict: what the sound teaches passes, what only the pictures' look teaches does not."""

from __future__ import annotations

import argparse
import json
import random
import shutil

import pytest
from conftest import BASE, CLAP, ok, script
from PIL import Image

from clap2diffusion.engine.gate_sweep import find_warning, judge_gate
from clap2diffusion.pictures.inputs import adapter_facts

WINDOW = argparse.Namespace(window_low=0.35, window_high=0.45, away_low=0.0, away_high=0.9)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("verdict") / "world"
    ok(script("prepare_data.py", "world", "--out", out, "--train", 200, "--val", 24, "--test", 2))
    return out


def take_sense(world) -> None:
    """Give each clip of a split another's sound, at random, and darken all pictures: a look, and no sense."""
    rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]
    for split in ("train", "val"):
        of = [row for row in rows if row["split"] == split]
        sounds = random.Random(0).sample([row["audio_file_name"] for row in of], len(of))
        for row, sound in zip(of, sounds):
            row["audio_file_name"] = sound
    for row in rows:
        path = world / row["image_file_name"]
        Image.open(path).convert("RGB").point(lambda v: int(v * 0.55)).save(path)
    (world / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def chain(world, place):
    """The three stages, the second of one step; the ended stage 3 and its command."""
    config = place / "config.json"
    config.write_text(json.dumps({
        "common": {"run": str(place / "run"), "data_root": str(world), "cache_dir": str(place / "cache"),
                   "base_model": str(BASE), "clap_model": str(CLAP), "precision": "fp32", "batch_size": 16,
                   "val_draws": 2, "validate_every": 0, "samples": 0},
        "stage1": {"steps": 110, "learning_rate": 0.005, "projection_lr_scale": 0.05, "weight_decay": 0.1,
                   "warmup_steps": 10, "caption_drop": 0.8, "high_noise_share": 0.3},
        "stage2": {"steps": 1, "learning_rate": 0.0003, "lora_rank": 0}, "stage3": {"steps": 100}}))
    for stage in (1, 2):
        ok(script(f"train_stage{stage}.py", "--config", config))
    command = ("train_stage3.py", "--config", config)
    return script(*command), command


def test_a_gate_in_the_window_fails_where_the_sound_is_no_help(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    take_sense(tmp_path / "world")
    done, command = chain(tmp_path / "world", tmp_path)
    last, folder = done.stderr.strip().splitlines()[-1], tmp_path / "run/stage3"
    said = "the gate learned the pictures' look, not the sound (silence - right"
    assert done.returncode == 1 and said in last
    sweep = json.loads((folder / "sweep.json").read_text())
    assert 0.35 <= sweep["tanh_gate"] <= 0.45  # where it used to be called a success
    assert (folder / "sweep.png").exists() and not (folder / "result.json").exists()

    ok(script(*command, "--no-require-proof"))  # without training on
    assert said in adapter_facts(folder / "adapter.safetensors")["warning"]
    done = script(*command)  # it has ended, and is no success for all that
    assert done.returncode == 1 and "already complete" in done.stdout and said in done.stderr
    sound = next((tmp_path / "world/audio").iterdir())
    done = ok(script("generate.py", "--run", tmp_path / "run", "--audio", sound, "--steps", 2, "--out",
                     tmp_path / "out.png"))
    assert "warning: " in done.stderr and said in done.stderr
    ok(script("evaluate.py", "--judge", "", "--run", tmp_path / "run", "--columns", 2, "--steps", 2))
    assert f"**Warning: {said}" in (tmp_path / "run/report.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    del result["warning"]  # as an old one, when the window was enough
    (folder / "result.json").write_text(json.dumps(result))
    assert said in find_warning(folder) and find_warning(tmp_path / "run/stage2") == ""


def test_a_sound_that_helps_passes(world, tmp_path):
    done, _ = chain(world, tmp_path)
    ok(done)
    result = json.loads((tmp_path / "run/stage3/result.json").read_text())
    assert result["warning"] == "" and result["in_window"]
    assert min(result["validation"][f"{name}_minus_right"][1] for name in ("silence", "other")) > 0
    at = {row["tanh_gate"]: row for row in result["sweep_after"]}
    assert at[0.4]["right"][0] < min(at[0.4]["silence"][0], at[0.4]["other"][0])
    assert at[0.0]["right"] == at[0.0]["silence"] == at[0.0]["other"]  # no sound, no difference


def test_what_is_missing_is_named():
    def judged(silence: float, other: float, gate: float = 0.4, ended: str = "all steps", n=10) -> str:
        return judge_gate(ended, gate, {"silence_minus_right": [silence + 0.01, silence, silence + 0.02],
                                        "other_minus_right": [other + 0.01, other, other + 0.02]}, n, WINDOW)
    assert judged(0.001, 0.001) == ""
    for silence, other in ((-0.001, 0.001), (0.001, -0.001), (0.0, 0.1), (-1, -1)):
        assert judged(silence, other).startswith("the gate learned the pictures' look, not the sound (")
    assert judged(1, 1, 0.46, "all steps, outside the window") == "the gate has not come into the window"
    assert judged(1, 1, n=9).startswith("9 validation clips are too few")
    assert judged(1, 1, -0.2, "the gate walked away") == "the sound raises the loss"
    assert judged(1, 1, 0.95, "the gate walked away") == "the loss asks for ever more sound"
