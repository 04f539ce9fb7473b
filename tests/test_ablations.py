"""The ablations' table: what a variant without any effect is called, and what one with an effect is."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from ablations import run
from clap2diffusion.base import statistics

SEEDS, CLIPS = 3, 60


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
