"""Stage 3's verdict: what the sound teaches passes, what only the pictures' look teaches does not."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess

import pytest
from conftest import BASE, CLAP, ROOT, ok, script
from PIL import Image

from clap2diffusion.base.exits import EXIT_FAILED, EXIT_USER
from clap2diffusion.engine.gate_sweep import EXIT_CODES, find_warning, judge_gate, read_verdict
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


def chain(world, place, steps: int):
    """The three stages, the first of so many steps, the second of one; the ended stage 3 and its command."""
    config = place / "config.json"
    config.write_text(json.dumps({
        "common": {"run": str(place / "run"), "data_root": str(world), "cache_dir": str(place / "cache"),
                   "base_model": str(BASE), "clap_model": str(CLAP), "precision": "fp32", "batch_size": 16,
                   "val_draws": 1, "validate_every": 0, "samples": 0},
        "stage1": {"steps": steps, "learning_rate": 0.005, "projection_lr_scale": 0.05, "weight_decay": 0.1,
                   "warmup_steps": 10, "caption_drop": 0.8, "high_noise_share": 0.3},
        "stage2": {"steps": 1, "learning_rate": 0.0003, "lora_rank": 0}, "stage3": {"steps": 60}}))
    for stage in (1, 2):
        ok(script(f"train_stage{stage}.py", "--config", config))
    command = ("train_stage3.py", "--config", config)
    return script(*command), command


def test_a_gate_in_the_window_fails_where_the_sound_is_no_help(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    take_sense(tmp_path / "world")
    done, command = chain(tmp_path / "world", tmp_path, 60)
    last, folder = done.stderr.strip().splitlines()[-1], tmp_path / "run/stage3"
    said = "the gate learned the pictures' look, not the sound (silence - right"
    assert done.returncode == 5 and said in last
    sweep = json.loads((folder / "sweep.json").read_text())
    assert 0.35 <= sweep["tanh_gate"] <= 0.45  # where it used to be called a success
    assert (folder / "sweep.png").exists() and sweep["verdict"] == "in the window"
    facts = adapter_facts(folder / "adapter.safetensors")
    assert said in facts["warning"] and facts["verdict"] == "in the window"

    done = ok(script(*command, "--no-require-proof"))  # without training on
    assert "already complete" in done.stdout and said in done.stderr.splitlines()[-1]
    done = script(*command)  # it has ended, and is no success for all that
    assert done.returncode == 5 and "already complete" in done.stdout and said in done.stderr
    sound = next((tmp_path / "world/audio").iterdir())
    done = ok(script("generate.py", "--run", tmp_path / "run", "--audio", sound, "--steps", 2, "--out",
                     tmp_path / "out.png"))
    assert "warning: " in done.stderr and said in done.stderr
    ok(script("evaluate.py", "--judge", "", "--run", tmp_path / "run", "--columns", 2, "--steps", 2))
    assert f"**Warning: {said}" in (tmp_path / "run/report.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    del result["warning"], result["verdict"]  # as an old one, when the window was enough
    (folder / "result.json").write_text(json.dumps(result))
    assert said in find_warning(folder) and script(*command).returncode == 5
    assert find_warning(tmp_path / "run/stage1") == "" and read_verdict(tmp_path / "run/stage1") == ("", "")


@pytest.mark.slow  # the fast tests have the other verdict, by the same chain
def test_a_sound_that_helps_passes(world, tmp_path):
    done, _ = chain(world, tmp_path, 80)
    ok(done)
    result = json.loads((tmp_path / "run/stage3/result.json").read_text())
    assert result["warning"] == "" and result["in_window"] and result["verdict"] == "in the window"
    assert min(result["validation"][f"{name}_minus_right"][1] for name in ("silence", "other")) > 0
    at = {row["tanh_gate"]: row for row in result["sweep_after"]}
    assert at[0.4]["right"][0] < min(at[0.4]["silence"][0], at[0.4]["other"][0])
    assert at[0.0]["right"] == at[0.0]["silence"] == at[0.0]["other"]  # no sound, no difference


def test_what_is_missing_is_named():
    def judged(silence: float, other: float, gate: float = 0.4, ended: str = "all steps", n=10):
        return judge_gate(ended, gate, {"silence_minus_right": [silence + 0.01, silence, silence + 0.02],
                                        "other_minus_right": [other + 0.01, other, other + 0.02]}, n, WINDOW)
    look = "the gate learned the pictures' look, not the sound ("
    assert judged(0.001, 0.001) == ("in the window", "")
    for silence, other in ((-0.001, 0.001), (0.001, -0.001), (0.0, 0.1), (-1, -1)):
        verdict, warning = judged(silence, other)
        assert verdict == "in the window" and warning.startswith(look)
        verdict, warning = judged(silence, other, 0.758, "all steps, outside the window")
        assert verdict == "settled elsewhere" and look in warning
    for gate in (0.34, 0.46):
        assert judged(1, 1, gate, "all steps, outside the window") == (
            "settled elsewhere", "settled elsewhere: the gate has not come into the window, and where it is "
            "the right sound is better than silence and than another")
    verdict, warning = judged(1, 1, n=9)
    assert verdict == "in the window" and warning.startswith("9 validation clips are too few")
    assert judged(1, 1, -0.2, "the gate walked away") == (
        "walked away", "walked away: the sound raises the loss")
    assert judged(1, 1, 0.95, "the gate walked away") == (
        "walked away", "walked away: the loss asks for ever more sound")


def test_each_outcome_has_an_exit_code_of_its_own_which_the_help_and_the_pages_name():
    codes = list(EXIT_CODES.values())
    assert list(EXIT_CODES) == ["in the window", "settled elsewhere", "walked away"]
    assert len({0, EXIT_FAILED, EXIT_USER, *codes}) == 6
    told = ok(script("train_stage3.py", "--help")).stdout
    pages = [" ".join((ROOT / "docs" / page).read_text().split()) for page in ("faults.md", "evidence.md")]
    for verdict, code in EXIT_CODES.items():
        assert verdict in told and all(verdict in page for page in pages)
        assert f"| {code} | stage 3's verdict" in pages[0] and f"({code})" in pages[1]
        assert f"[{code}]=" in (ROOT / "run_all_stages.sh").read_text()


STUB = """#!/bin/bash
case $1 in
    -*) exit 0 ;;  # has it all that requirements.txt asks for; its version
    tools/plan.py) echo "DATA=() STAGE1=() STAGE2=() STAGE3=() EVALUATE=() RUN=runs/x DEVICE=cpu"; exit 0 ;;
esac
echo "$1" >> called
[ "$1" != train_stage3.py ] || exit "$CODE"
"""


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 143])
def test_the_chain_judges_the_adapter_after_each_outcome_and_keeps_the_code(code, tmp_path):
    """After a failure of any other kind nothing follows. Python is a stand-in that notes what is called."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("run_all_stages.sh", "setup_env.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "c.json").write_text("{}")
    done = subprocess.run(["bash", "run_all_stages.sh", "c.json"], cwd=tmp_path, text=True,
                          env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CODE": str(code)},
                          capture_output=True)
    called = (tmp_path / "called").read_text().split()
    stages = [f"train_stage{n}.py" for n in (1, 2, 3)]
    assert done.returncode == code, done.stderr
    assert called == [*stages, *(["evaluate.py"] if code in (0, 3, 4, 5) else [])]
    if code in (3, 4, 5):
        what = {3: "the gate settled elsewhere", 4: "the gate walked away",
                5: "in the window, the sound is not"}[code]
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: runs/x: all is made and judged, but stage 3's verdict is no: {what}")
        assert f"(exit code {code}): {what}" in done.stdout
    else:
        assert "verdict" not in done.stdout + done.stderr
