"""Long proofs, run by `bash run_tests.sh -m slow`: stages killed at random steps, SD 1.5's shapes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, interrupt_sweep, ok, script

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_killed_and_terminated_at_three_random_steps_each(stage, config, run, tmp_path):
    steps = random.Random(stage).sample(range(1, 10), 3)
    interrupt_sweep(steps, [signal.SIGTERM, signal.SIGKILL], stage, config, run, tmp_path)


def test_ablations_run_small(tmp_path):
    """The driver on the small world, twice: a config, more windows, a patched copy, no LoRA, a gate."""
    place, world = tmp_path / "copy", tmp_path / "world"
    ok(script("prepare_data.py", "world", "--out", world, "--train", 40, "--val", 20, "--test", 20))
    shutil.copytree(ROOT, place,
                    ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "cache", "__pycache__"))
    for path in (place / "ablations").glob("*.json"):
        config = json.loads(path.read_text())
        config["common"] |= {"data_root": str(world), "batch_size": 4, "val_draws": 1}
        for stage in ("stage1", "stage2", "stage3"):
            config[stage] |= {"steps": 3}
        path.write_text(json.dumps(config))
    names = ["tokens-1", "windows-2", "appended", "scalar", "no-lora", "gate-0"]
    command = [sys.executable, "ablations/run.py", "--seeds", "0", "--clips", "20", "--only", *names]
    for _ in range(2):
        done = ok(subprocess.run(command, cwd=place, capture_output=True, text=True))
    assert done.stdout.count("already complete") == 8
    from ablations.run import VARIANTS  # which loads torch; the suite collects this file as well
    table = (place / "runs/ablations/results.md").read_text().splitlines()[4:]
    rows = [[cell.strip(" *") for cell in line.strip("| ").split(" | ")] for line in table if line]
    variants = [row for row in rows if row[0] != "default"]
    assert [row[0] for row in variants] == [VARIANTS[name][0] for name in names]
    assert variants[-1][-1] == "0.00"  # tanh(gate) of gate-0
    # IIS cosine of tokens-1 less the default's
    assert float(variants[0][9].split("<br>")[1].split(" ")[0]) != 0


@pytest.mark.parametrize("name, tables", [("run", 12), ("gpu", 6)])
def test_benchmarks_run_small(name, tables):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tables += name == "run" and find_spec("gradio") is not None  # bench/demo.py needs it
    done = ok(subprocess.run(["bash", f"bench/{name}.sh", "--smoke"], cwd=ROOT,
                             env={**os.environ, "PATH": path}, capture_output=True, text=True))
    assert done.stdout.count("`python bench/") == tables, done.stdout[-3000:]


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    sys.path.insert(0, str(ROOT / "bench"))
    from bench_tools import make_random
    place = tmp_path_factory.mktemp("sd15")
    make_random(place, "sd15")
    return place


@pytest.mark.parametrize("name", ("sd15", "sd15_safe"))
def test_sd15_config_fits_the_real_shapes(name, sd15, world, tmp_path):
    """The config itself, with paths, sizes and step counts given as flags: two steps of each stage, 64 px."""
    flags = ["--config", f"configs/{name}.json", "--run", tmp_path / "run", "--data-root", world,
             "--cache-dir", tmp_path / "cache", "--base-model", sd15 / "base", "--clap-model", sd15 / "clap",
             "--image-size", 64, "--batch-size", 1, "--steps", 2, "--val-clips", 2, "--val-draws", 1,
             "--samples", 1, "--workers", 0]
    for stage in (1, 2, 3):
        ok(script(f"train_stage{stage}.py", *flags, *(["--no-require-proof"] if stage == 3 else [])))
        result = json.loads((tmp_path / f"run/stage{stage}/result.json").read_text())
        print(f"stage {stage}: peak memory {result['peak_memory_mb']['rss']:.0f} MB, {result['seconds']:.1f} "
              "s for 2 steps")
        assert result["steps"] == 2 and result["stock_difference"] < 1e-4
    from safetensors import safe_open
    with safe_open(tmp_path / "run/stage3/adapter.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    assert shapes["image_proj.proj.0.weight"] == [1024, 512]
    assert shapes["image_proj.proj.2.weight"] == [8 * 768, 1024]
    assert sum("to_k_ip" in key for key in shapes) == 16
    assert shapes["ip_adapter.1.to_k_ip.weight"] == [320, 768]
    assert sum("to_q_lora.down" in key for key in shapes) == 32
    assert shapes["ip_adapter.0.to_q_lora.down.weight"] == [8, 320]


def test_every_export_predicts_the_same_on_the_real_shapes(sd15, tmp_path):
    command = [sys.executable, "bench/sharing.py", "--sd15", "--models", str(sd15)]
    ok(subprocess.run(command, cwd=ROOT, env={**os.environ, "BENCH_RESULTS": str(tmp_path)},
                      capture_output=True, text=True))
    [path] = tmp_path.glob("sharing-sd15-*.json")
    *same, without = json.loads(path.read_text())["rows"]
    assert len(same) == 6 and all(float(row["largest difference"]) < 1e-4 for row in same), same
    assert float(without["largest difference"]) > 0.01
