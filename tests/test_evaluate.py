"""evaluate.py: a perfect model scores 1, noise scores at chance, a judge that cannot read may not judge."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CLAP, JUDGE, ROOT, ok, script
from PIL import Image

import evaluate
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.dataset.manifest import read_manifest
from clap2diffusion.judging import evaluation
from clap2diffusion.pictures.generation import embed
from clap2diffusion.world import sound_world


@pytest.fixture(scope="module")
def large_world(tmp_path_factory):
    """100 test clips: 80 single ones, 10 heard and 10 unheard pairs."""
    out = tmp_path_factory.mktemp("large") / "world"
    ok(script("prepare_data.py", "world", "--out", out, "--train", 40, "--val", 2, "--test", 100))
    return out


@pytest.fixture
def small_run(run, tmp_path):
    """A run folder of the test's own with stage 3's result."""
    shutil.copytree(run / "stage3", tmp_path / "run/stage3")
    return tmp_path / "run"


def result(run, name: str = "evaluation") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def perfect_pictures(world):
    """In place of pictures(): a model that draws the real picture of the clip that it hears."""
    encoder, rows = CLAPAudioEncoder(CLAP), read_manifest(world)[0]
    known = [(embed(encoder, str(row.audio_path))[0], row.image_path) for row in rows if row.split == "test"]
    table, paths = torch.stack([one for one, _ in known]), [path for _, path in known]

    def pictures(pipe, audio_embeds, prompts, guidance, steps, seeds, audio_scale=1.0, size=None, **more):
        found = []
        for one, seed in zip(audio_embeds, seeds, strict=True):
            if one.any() and audio_scale:
                found.append(Image.open(paths[int((table @ one).argmax())]).convert("RGB"))
            else:
                state = sound_world.draw_state(np.random.default_rng(seed))
                found.append(sound_world.draw_scene(state))
        return found
    return pictures


def test_a_perfect_model_scores_as_the_real_pictures_and_silence_at_chance(
        small_run, large_world, monkeypatch):
    monkeypatch.setattr(evaluation, "pictures", perfect_pictures(large_world))
    evaluate.main(["--run", str(small_run), "--data-root", str(large_world), "--judge", str(JUDGE)])
    found = result(small_run)
    assert found["n"] == 100 and found["n_single"] == 80 and found["n_pairs"] == 20
    assert found["judge"]["n"] == 80
    for name, row in found["measures"].items():
        if name not in ("cmmd", "mix_unheard"):
            assert row["right"] == row["real"], name
    measures = found["measures"]
    assert measures["top1_en"]["right"][0] >= 0.99 and measures["top1_ko"]["right"][0] >= 0.99
    assert measures["recall_at_1"]["right"][0] == 1 and measures["median_rank"]["right"][0] == 1
    assert measures["top1_en"]["other"][0] <= 0.02 and measures["recall_at_1"]["other"][0] == 0
    for name, tolerance in (("top1_en", 0.12), ("iis_win_rate", 0.08), ("ais_win_rate", 0.08)):
        assert measures[name]["silence"][0] == pytest.approx(measures[name]["chance"], abs=tolerance), name
    assert measures["pairs_unheard"]["n"] == 10 and measures["pairs_unheard"]["right"][0] >= 0.8
    assert measures["cmmd"]["right"][0] < 0.02  # the same pictures; unbiased, so a little below 0
    counts = np.array(found["confusion"]["right"])
    assert counts.sum() == 80 and np.trace(counts) >= 79
    for values in found["properties"].values():
        assert values["right"][0] == values["real"][0] >= 0.9
        assert values["shuffled"][1] < 0.05 < values["shuffled"][2] + 0.1 and abs(values["shuffled"][0]) < 0.3
    assert found["clips"][3]["other_clip"] != 3
    assert found["clips"][3]["right"]["seen"] == found["clips"][3]["label"]
    # another's sound never shares a label with the clip
    assert all(
        set(clip["label"].split("+")).isdisjoint(found["clips"][clip["other_clip"]]["label"].split("+"))
               for clip in found["clips"])  # another's sound never shares a label with the clip


def test_noise_for_tokens_scores_at_chance_everywhere(small_run, large_world):
    evaluate.main(["--run", str(small_run), "--data-root", str(large_world), "--judge", str(JUDGE), "--noise",
                   "--steps", "3", "--quick"])
    found = result(small_run, "evaluation-noise")
    for name, row in found["measures"].items():
        if row["chance"] is None:
            continue
        value, low, high = row["right"]
        slack = {"median_rank": 15, "top5_en": 0.15, "top5_ko": 0.15}.get(name, 0.1)
        assert low - slack <= row["chance"] <= high + slack, (name, row)
        assert abs(value - row["chance"]) < 2 * slack, (name, row)
    assert found["measures"]["recall_at_1"]["right"][0] <= 0.05
    for name, values in found["properties"].items():
        assert abs(values["right"][0]) < 0.3, (name, values)


def test_the_figures_are_those_of_the_pictures_on_disk_and_a_second_run_makes_none(small_run, world):
    from transformers import AutoTokenizer, SiglipImageProcessorPil, SiglipModel
    command = ("evaluate.py", "--run", small_run, "--data-root", world, "--judge", JUDGE, "--steps", 2,
               "--guidance", 2)
    first = ok(script(*command))
    found = result(small_run)
    assert "zero-shot top-1, English" in first.stdout and (small_run / "evaluation.md").exists()
    assert (small_run / "evaluation.html").stat().st_size > 10_000

    model, processor = SiglipModel.from_pretrained(JUDGE), SiglipImageProcessorPil.from_pretrained(JUDGE)
    tokenizer = AutoTokenizer.from_pretrained(JUDGE)
    for language in ("en", "ko"):  # the library's own logits of what lies on the disk
        captions = [sound_world.class_caption((name,), language) for name in sound_world.CLASSES]
        ids = tokenizer(captions, padding="max_length", max_length=32, truncation=True,
                        return_tensors="pt")["input_ids"]
        for sound in ("right", "silence", "other", "real"):
            single = [clip for clip in found["clips"] if "+" not in clip["label"]]
            images = [Image.open(clip["real"] if sound == "real" else clip[sound]["picture"]).convert("RGB")
                      for clip in single]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
            right = [sound_world.CLASSES[int(i)] == clip["label"]
                     for i, clip in zip(logits.argmax(1), single, strict=True)]
            ours = found["measures"][f"top1_{language}"][sound][0]
            assert ours == pytest.approx(np.mean(right)), (language, sound)

    before = {path: path.stat().st_mtime_ns for path in (small_run / "evaluation").rglob("*.png")}
    assert len(before) >= 30
    next(iter(before)).unlink()  # one is lost: it alone is made again
    ok(script(*command))
    after = {path: path.stat().st_mtime_ns for path in (small_run / "evaluation").rglob("*.png")}
    assert after.keys() == before.keys() and sum(after[path] != before[path] for path in before) == 1
    again = result(small_run)["measures"]
    assert again.keys() == found["measures"].keys()
    # a picture made alone may differ by one level from the same one of a batch
    for name, row in again.items():
        for kind in ("right", "silence", "other", "real"):
            values, same = row.get(kind) or [], found["measures"][name].get(kind) or []
            assert values == pytest.approx(same, rel=0.02, abs=0.02), (name, kind)


def test_a_run_against_itself_shows_no_difference_and_against_another_pairs_the_clips(
        small_run, run, world, tmp_path):
    shutil.copytree(run / "stage1", tmp_path / "other/stage1")
    command = ["--data-root", str(world), "--judge", str(JUDGE), "--steps", "2", "--quick"]
    evaluate.main(["--run", str(small_run), "--against", str(small_run), *command])
    same = result(small_run)["against"]["comparison"]
    assert {"top1_en", "cmmd", "iis_win_rate", "median_rank"} <= same.keys()
    for row in same.values():
        assert row["difference"] == [0, 0, 0] and row["n_needed"] is None
        assert "no difference" in row["verdict"]
    evaluate.main(["--run", str(small_run), "--against", str(tmp_path / "other"), *command])
    found = result(small_run)
    row = found["against"]["comparison"]["iis_cosine"]
    assert row["a"] == found["measures"]["iis_cosine"]["right"][0]
    assert row["b"] == found["against"]["measures"]["iis_cosine"]["right"][0]
    assert row["difference"][0] == pytest.approx(row["a"] - row["b"])
    assert row["difference"][1] < row["difference"][2]
    assert "A - B, paired" in (small_run / "evaluation.md").read_text()


def test_a_judge_that_cannot_read_real_pictures_may_not_judge(small_run, world, tmp_path):
    from transformers import SiglipModel
    shutil.copytree(JUDGE, tmp_path / "judge")
    torch.manual_seed(0)
    model = SiglipModel.from_pretrained(JUDGE)
    for p in model.vision_model.parameters():
        p.data.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "judge")
    done = script("evaluate.py", "--run", small_run, "--data-root", world, "--judge", tmp_path / "judge")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "may not judge" in last and str(tmp_path / "judge") in last, done.stderr
    assert not (small_run / "evaluation.json").exists()


@pytest.mark.parametrize("flags, sentence", (
    (["--run", "nowhere"], "nowhere: holds no adapter.safetensors"),
    (["--against", "nowhere"], "nowhere: holds no adapter.safetensors"),
    (["--data-root", "nowhere"], "nowhere: no such data folder"),
    (["--judge", "assets/tiny/clap"], "is a 'clap' model; expected a SigLIP"),
    (["--judge", "nowhere"], "judge 'nowhere'"),
    (["--gate", "2"], "got 2.0, expected a number from 0 to 1"),
    (["--clips", "-1"], "got -1, expected a whole number of at least 0")))
def test_mistakes_end_in_one_sentence(flags, sentence, small_run, world):
    done = script("evaluate.py", *([] if "--run" in flags else ["--run", small_run]),
                  *([] if "--data-root" in flags else ["--data-root", world]), *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert sentence in done.stderr.strip().splitlines()[-1], done.stderr


def test_no_weight_is_shared_with_the_judge():
    """No tensor of the judge occurs in a model that it judges."""
    from safetensors.torch import load_file
    files = sorted((ROOT / "assets/tiny").rglob("*.safetensors"))
    judged = {(tuple(t.shape), t.double().sum().item()) for path in files if "judge" not in path.parts
              for t in load_file(path).values() if t.numel() > 64 and t.is_floating_point() and t.std() > 0}
    judge = {(tuple(t.shape), t.double().sum().item()) for path in files if "judge" in path.parts
             for t in load_file(path).values() if t.numel() > 64 and t.is_floating_point() and t.std() > 0}
    assert len(judge) > 50 and not judge & judged
