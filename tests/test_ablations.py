"""The ablations: the table tells an effect from none, and the worked ones of docs/own-ablations.md work."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import JUDGE, ROOT, ok, script
from safetensors.torch import load_file

from ablations import run
from clap2diffusion.base import statistics
from clap2diffusion.base.exits import RunFailed

SEEDS, CLIPS = 3, 60
WORKED = {"huber": 1, "scalar": 1, "lora-not-mid": 2}  # with the stage of each


def judged(rng: np.random.Generator, clips: np.ndarray, effect: float = 0.0) -> list[dict]:
    """Three seeds' judged clips. A training seed shifts all clips of its run, as training seeds do."""
    runs = []
    for _ in range(SEEDS):
        values = clips + 0.15 * rng.standard_normal() + 0.3 * rng.standard_normal(CLIPS) + effect
        noise = rng.standard_normal(CLIPS) * (1 + 0.5 * rng.random())
        rho = np.stack([clips, clips + noise], 1)
        runs.append({key: (rho if key.startswith("rho") else values).tolist() for key in run.MEASURES})
    return runs


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


@pytest.fixture(scope="module")
def run_folder(request):
    """The fixture `run` of conftest.py under a name that the module does not use."""
    return request.getfixturevalue("run")


def test_a_null_variant_with_a_seed_effect_is_bold_in_at_most_one_of_twenty_cells():
    rng, bold, uncorrected, cells = np.random.default_rng(0), 0, 0, 0
    for _ in range(12):
        clips = rng.standard_normal(CLIPS)
        default = judged(rng, clips)
        rows = [run.compare(judged(rng, clips), default) for _ in range(3)]
        shown = [cell for row in run.show(rows) for cell in row]
        bold += sum("**" in cell for cell in shown)
        pooled = [np.concatenate([seed["top1_en"] for seed in runs])
                  for runs in (judged(rng, clips), default)]
        uncorrected += scipy.stats.ttest_rel(*pooled).pvalue < 0.05  # as 3 x 60 independent clips
        cells += len(shown)
    assert bold <= 0.05 * cells and uncorrected >= 2


def test_a_real_effect_is_bold_and_the_seeds_own_differences_are_shown():
    rng = np.random.default_rng(1)
    clips = rng.standard_normal(CLIPS)
    default, better = judged(rng, clips), judged(rng, clips, effect=4.0)
    [found] = [run.compare(better, default)]
    [cells] = run.show([found])
    top1 = dict(zip(run.MEASURES, cells))["top1_en"]
    by_seed = [np.mean(a["top1_en"]) - np.mean(b["top1_en"]) for a, b in zip(better, default)]
    assert top1.startswith("**") and top1.endswith(", ".join(f"{one:+.3f}" for one in by_seed))
    assert found[0]["difference"][0] == pytest.approx(np.mean(by_seed))
    _, low, high = found[0]["difference"]
    within = scipy.stats.t.interval(0.95, SEEDS - 1, np.mean(by_seed), scipy.stats.sem(by_seed))
    assert high - low > 0.6 * (within[1] - within[0])  # the seeds' spread is in it


def test_one_seed_shows_nothing_about_others():
    rng = np.random.default_rng(2)
    clips = rng.standard_normal(CLIPS)
    cells = run.show([run.compare(judged(rng, clips, 9.0)[:1], judged(rng, clips)[:1])])
    assert not any("**" in cell for cell in cells[0])


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> dict:
    """Folders of the worked ablations and of the `stage1` and `stage2` beside them, in the same few steps."""
    place, folders = tmp_path_factory.mktemp("worked"), {"stage2": config.parent / "run/stage2"}
    for name, stage in {"stage1": 1, **WORKED}.items():
        copy = "train_stage1.py" if name == "stage1" else run.patched_script(name, stage, place)
        more = (["--init-from", config.parent / "run/stage1"] if stage == 2 else
                ["--best-metric", "silence_minus_right"])  # by val_right the best of so few steps is step 0
        ok(script(copy, "--config", config, "--run", place, *more))
        folders[name] = place / name  # a copied script's results lie in a folder of its name
    return folders


@pytest.mark.parametrize("name", WORKED)
def test_a_worked_ablation_is_short_and_stands_in_the_docs(name):
    changed = [line for line in (ROOT / f"ablations/{name}.patch").read_text().splitlines()[2:]
               if line.startswith(("+", "-"))]
    assert 0 < len(changed) < 15
    assert "\n".join(["```diff", *changed, "```"]) in (ROOT / "docs/own-ablations.md").read_text()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "huber"))
                                  for name in WORKED])
def test_a_worked_ablation_gives_other_weights_and_a_comparison(name, run_folder, trained, world):
    stage = trained[f"stage{WORKED[name]}"]
    own, plain = (load_file(folder / "adapter.safetensors") for folder in (trained[name], stage))
    assert own.keys() == plain.keys()  # what stock diffusers loads
    assert any(not torch.equal(own[key], plain[key]) for key in own)
    result = json.loads((trained[name] / "result.json").read_text())
    assert result["best_step"] > 0 and result["stock_difference"] < 1e-4
    done = ok(script("evaluate.py", "--run", trained[name], "--against", stage, "--data-root", world,
                     "--judge", JUDGE, "--steps", 2, "--quick"))
    assert "A - B, paired" in done.stdout
    page = (trained[name] / "evaluation.md").read_text()
    assert "A - B, paired" in page and str(stage) in page
    compared = json.loads((trained[name] / "evaluation.json").read_text())["against"]["comparison"]
    assert compared["iis_cosine"]["difference"] != [0, 0, 0]


def test_the_scalar_is_folded_into_v(run_folder, trained):
    """In a checkpoint the scalars stand apart; in the stage's result they are in V, as stages 2 and 3 and
    stock diffusers know it."""
    result = json.loads((trained["scalar"] / "result.json").read_text())
    parts = load_file(trained["scalar"] / "best.safetensors")
    whole = load_file(trained["scalar"] / "final.safetensors")
    stock = load_file(trained["scalar"] / "adapter.safetensors")
    assert whole.keys() == load_file(run_folder / "stage1/final.safetensors").keys()
    scales = {}
    for i in range(sum(key.endswith(".scale") for key in parts)):
        named = f"audio_attn.to_v.{i}"
        scales[i] = parts[f"{named}.parametrizations.weight.0.scale"]
        folded = scales[i] * parts[f"{named}.parametrizations.weight.original"]
        torch.testing.assert_close(whole[f"{named}.weight"], folded)
        torch.testing.assert_close(stock[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"],
                                   folded * result["tanh_gate"])
    assert len(scales) == sum("to_v_ip" in key for key in stock) and all(one != 1 for one in scales.values())


def test_without_lora_in_the_mid_block_its_lora_stays_zero_and_the_others_do_not(trained):
    stock = load_file(trained["lora-not-mid"] / "adapter.safetensors")
    ups = {key: bool(weight.any()) for key, weight in stock.items() if "_lora.up." in key}
    layers = sorted({int(key.split(".")[1]) for key in ups})
    silent = sorted({int(key.split(".")[1]) for key, moved in ups.items() if not moved})
    assert silent == layers[-2:]  # diffusers names the mid block's attentions last
    assert all(moved for key, moved in ups.items() if int(key.split(".")[1]) not in silent)


def test_a_variant_leaves_your_own_copy_of_its_name_as_it_is(tmp_path, monkeypatch):
    """The copy from which its patch was made lies beside README.md, as the page has it."""
    monkeypatch.setattr(run, "HERE", tmp_path / "ablations")
    shutil.copytree(ROOT / "ablations", run.HERE)
    said = "import sys, common\nprint(common, sys.argv)\n"
    (tmp_path / "common.py").write_text("")
    (tmp_path / "train_stage1.py").write_text(f"{said}loss = 1\n")
    (run.HERE / "huber.patch").write_text(
        "--- train_stage1.py\n+++ train_huber.py\n@@ -2,2 +2,2 @@\n print(common, sys.argv)\n"
        "-loss = 1\n+loss = 2\n")
    mine = tmp_path / "train_huber.py"
    mine.write_text("an hour of work\n")
    folder = run.train("huber", 0, (1,), tmp_path / "out", tmp_path)
    assert folder == tmp_path / "out/huber-0/stage1" and mine.read_text() == "an hour of work\n"
    assert (folder.parent / "train_huber.py").read_text() == f"{said}loss = 2\n"


def test_a_patch_that_does_not_apply_says_how_to_make_it_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path / "ablations")
    run.HERE.mkdir()
    shutil.copy(ROOT / "ablations/huber.patch", run.HERE)
    (tmp_path / "train_stage1.py").write_text("print('another script')\n")
    with pytest.raises(RunFailed, match=r"huber.patch: does not apply to train_stage1.py as it is today .*: "
                                        r"diff -U1 train_stage1.py train_huber.py > "):
        run.patched_script("huber", 1, tmp_path)
    assert not (tmp_path / "train_huber.py").exists()
    (run.HERE / "huber.patch").write_text("")  # git says nothing of an empty one in some versions
    with pytest.raises(RunFailed, match="does not apply"):
        run.patched_script("huber", 1, tmp_path)
