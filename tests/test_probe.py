"""tools/probe.py: what it finds where there is something, what it says where there is nothing."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from conftest import CLAP, JUDGE, ok, script

import train_stage1
from clap2diffusion.base.settings import parse_config
from clap2diffusion.judging import probing

ARGS = argparse.Namespace(seed=0, permutations=19, rates=[1.0], judge="judge", out="")


def made(told: float, n: int = 240) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sounds, pictures that follow them by a share `told`, and 12 labels that say nothing."""
    rng = np.random.default_rng(1)
    hidden, noise = rng.standard_normal((n, 6)), rng.standard_normal((n, 40))
    x = hidden @ rng.standard_normal((6, 64)) + 0.1 * rng.standard_normal((n, 64)) + 3
    y = told * hidden @ rng.standard_normal((6, 40)) + noise
    return (x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True),
            [f"label {i % 12}" for i in range(n)])


@pytest.mark.parametrize("told, said", ((1.0, "**The sounds tell of the pictures:** 0.9"),
                                        (0.0, "**Nothing to be learned was found.** The best is 0.5")))
def test_it_tells_sense_from_luck(told, said, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(probing, "embed_clips", lambda args, stage1: made(told))
    flags = ["--steps", "60", "--learning-rate", "0.003"]
    stage1 = parse_config(train_stage1.build_parser(), "stage1", flags)
    probing.probe(argparse.Namespace(**{**vars(ARGS), "out": str(tmp_path / "probe.md")}), stage1)
    text = capsys.readouterr().out
    assert said in text and (tmp_path / "probe.md").read_text() == text
    assert ("Take --" in text) == bool(told)
    assert text.count("| held-out classes | ") == (4 if told else 2)


def test_permuted_sounds_are_called_sense_in_one_of_twenty():
    calls = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((40, 12)), rng.standard_normal((40, 8))
        labels = [f"{i % 8}" for i in range(40)]
        folds = probing.make_folds(labels, seed)
        _, p, _ = probing.probe_linear(x, y, labels, folds, argparse.Namespace(seed=seed, permutations=19))
        calls += p <= 0.05
    assert calls <= 9  # 5 expected; more than 9 in 1 of 35


@pytest.mark.parametrize("width", (9, 80))
def test_ridge_is_the_closed_form_at_the_strength_of_least_generalised_error(width):
    """Also where the sounds have more directions than there are clips, and the weakest ridge fits all."""
    rng = np.random.default_rng(2)
    x, held = rng.standard_normal((30, width)) + 1, rng.standard_normal((5, width))
    y = x @ rng.standard_normal((width, 3)) / 9 + rng.standard_normal((30, 3))
    y -= y.mean(0)
    found, centred, errors, answers = probing.Ridge(x, held).predict(y), x - x.mean(0), [], []
    for strength in probing.RIDGES * (np.linalg.svd(centred)[1] ** 2).mean():
        inverse = np.linalg.inv(centred.T @ centred + strength * np.eye(width))
        hat = centred @ inverse @ centred.T + np.ones((30, 30)) / 30  # the mean is fitted too
        errors.append(((y - hat @ y) ** 2).sum() / (1 - np.trace(hat) / 30) ** 2)
        answers.append((held - x.mean(0)) @ inverse @ centred.T @ y)
    best = int(np.argmin(errors))
    np.testing.assert_allclose(found, answers[best], rtol=1e-6)
    assert best > 0


def test_no_label_of_a_held_out_class_is_trained_on():
    labels = [f"{a}+{b}" if b else a for a in "abcdefgh" for b in ("", "a", "h")] * 3
    folds = probing.make_folds(labels, 0)
    assert sorted(np.concatenate([held for _, held in folds["clips"]])) == [*range(len(labels))]
    assert len(folds["classes"]) == 4
    for train, held in folds["classes"]:
        names = [{name for i in part for name in labels[i].split("+")} for part in (train, held)]
        assert len(train) and not names[0] & names[1]
    assert probing.make_folds(["a", "b", "c"] * 9, 0)["classes"] == []


def test_the_tool_on_a_small_world_goes_on_where_it_stopped(world, tmp_path):
    (tmp_path / "few.json").write_text(json.dumps({"stage1": {"steps": 20, "learning_rate": 0.003}}))
    command = ("tools/probe.py", "--config", tmp_path / "few.json", "--data-root", world, "--clap-model",
               CLAP, "--judge", JUDGE, "--cache-dir", tmp_path, "--clips", 30, "--permutations", 19,
               "--rates", 1, "--out", tmp_path / "probe.md")
    done = ok(script(*command))
    assert "30 clips of" in done.stdout and "| linear probe on |" in (tmp_path / "probe.md").read_text()
    kept = next(tmp_path.glob("probe-*/*.json"))
    written = kept.stat().st_mtime_ns
    assert ok(script(*command)).stdout == done.stdout and kept.stat().st_mtime_ns == written
    done = script("tools/probe.py", "--data-root", tmp_path / "nowhere")
    assert done.returncode == 2 and "no such data folder" in done.stderr.strip().splitlines()[-1]
