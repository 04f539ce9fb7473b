"""evaluate.py: a perfect model scores 1, noise scores at chance, a judge that cannot read may not judge."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import CLAP, JUDGE, ROOT, ok, script
from PIL import Image

import evaluate
from clap2diffusion.base import hub, tensor_file
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.files import read_json
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.dataset.manifest import read_manifest
from clap2diffusion.judging import evaluation, report
from clap2diffusion.judging.clips import Clips
from clap2diffusion.judging.equal_weights import compare_adapters
from clap2diffusion.judging.history import History
from clap2diffusion.judging.judge import Judge
from clap2diffusion.pictures.generation import embed
from clap2diffusion.pictures.inputs import adapter_facts
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


def perfect_pictures(world, splits=("test",)):
    """In place of pictures(): a model that draws the real picture of the clip that it hears."""
    encoder, rows = CLAPAudioEncoder(CLAP), read_manifest(world)[0]
    known = [(embed(encoder, str(row.audio_path))[0], row.image_path) for row in rows if row.split in splits]
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
    monkeypatch.setattr(evaluation, "MIXES", 2)  # of each pair of sounds; their pictures are of nothing here
    evaluate.main(["--run", str(small_run), "--data-root", str(large_world), "--judge", str(JUDGE)])
    found = result(small_run)
    assert found["n"] == 100 and found["n_single"] == 80 and found["n_pairs"] == 20
    assert found["judge"]["n"] == 80
    for name, row in found["measures"].items():
        if name != "cmmd" and "mixed" not in name:
            assert row["right"] == row["real"], name
    measures = found["measures"]
    assert measures["top1_en"]["right"][0] >= 0.99 and measures["top1_ko"]["right"][0] >= 0.99
    assert measures["recall_at_1"]["right"][0] == 1 and measures["median_rank"]["right"][0] == 1
    assert measures["top1_en"]["other"][0] <= 0.02 and measures["recall_at_1"]["other"][0] == 0
    for name, tolerance in (("top1_en", 0.12), ("iis_win_rate", 0.08), ("cis_win_rate", 0.08)):
        assert measures[name]["silence"][0] == pytest.approx(measures[name]["chance"], abs=tolerance), name
    assert measures["both_unheard"]["n"] == 10 and measures["both_unheard"]["right"][0] >= 0.8
    assert measures["one_unheard"]["right"][0] == 1 and measures["both_unheard"]["one_drawn"] == 1 / 9
    assert measures["cmmd"]["right"] == pytest.approx([0, 0, 0], abs=1e-6)  # the same pictures
    assert "R@1 of 100" in measures["recall_at_1"]["title"]
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


def test_the_guidance_is_chosen_on_validation_clips(small_run, world, monkeypatch, capsys):
    """By a model that draws what it hears at guidance 4 alone."""
    draw, drawn = perfect_pictures(world, ("val", "test")), []

    def pictures(pipe, audio_embeds, prompts, guidance, *args, **more):
        drawn.append(guidance)
        heard = audio_embeds if guidance == 4 else 0 * audio_embeds
        return draw(pipe, heard, prompts, guidance, *args, **more)
    monkeypatch.setattr(evaluation, "pictures", pictures)
    command = ["--run", str(small_run), "--data-root", str(world), "--judge", str(JUDGE)]
    evaluate.main([*command, "--guidance-sweep", "2", "4", "6"])
    found = result(small_run)
    assert [row["guidance"] for row in found["guidance_sweep"]] == [2, 4, 6]
    rates = [row["iis_win_rate"][0] for row in found["guidance_sweep"]]
    assert rates[1] == 1 > 0.7 > max(rates[0], rates[2]) and found["guidance_sweep"][0]["n"] == 20
    assert found["settings"]["guidance"] == 4 and found["measures"]["iis_win_rate"]["right"][0] == 1
    assert "Guidance 4 was chosen on 20 validation clips" in (small_run / "evaluation.md").read_text()
    assert {1.0, 2.0, 4.0, 6.0} == set(drawn)
    for flags, said in ((["--split", "val"], "leave it or --split val out"),
                        (["--against", str(small_run)], "unfair to the other")):
        with pytest.raises(UserError, match=said):
            evaluate.main([*command, "--guidance-sweep", "2", *flags])


def test_noise_for_tokens_scores_at_chance_everywhere(small_run, large_world):
    evaluate.main(["--run", str(small_run), "--data-root", str(large_world), "--judge", str(JUDGE), "--noise",
                   "--steps", "2", "--quick"])
    found = result(small_run, "evaluation-noise")
    for name, row in found["measures"].items():
        if row["chance"] is None:
            continue
        value, low, high = row["right"]
        slack = max(0.1, 0.5 * row["n"] ** -0.5)
        slack = {"median_rank": 15, "top5_en": 0.15, "top5_ko": 0.15}.get(name, slack)
        assert low - slack <= row["chance"] <= high + slack, (name, row)
        assert abs(value - row["chance"]) < 2 * slack, (name, row)
    assert found["measures"]["recall_at_1"]["right"][0] <= 0.05
    for name, values in found["properties"].items():
        assert abs(values["right"][0]) < 0.3, (name, values)


def test_the_figures_are_those_of_the_pictures_on_disk_and_a_second_run_makes_none(small_run, world):
    from transformers import AutoTokenizer, SiglipImageProcessorPil, SiglipModel
    command = ("evaluate.py", "--run", small_run, "--data-root", world, "--judge", JUDGE, "--steps", 2,
               "--guidance", 2, "--quick")
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
    itself = ["--run", str(small_run), "--against", str(small_run), *command]
    with pytest.raises(UserError, match=r"holds the same weights as .* \(projection, K/V, LoRA, gate\)"):
        evaluate.main(itself)
    assert not (small_run / "evaluation").exists()  # no picture was made
    evaluate.main([*itself, "--allow-equal"])
    said = "A and B hold equal weights: projection, K/V, LoRA, gate"
    assert result(small_run)["against"]["equal"] == said
    assert f"{said}, so every difference is 0 whatever was trained" in result(small_run)["warnings"]
    same = result(small_run)["against"]["comparison"]
    assert {"top1_en", "cmmd", "iis_win_rate", "median_rank"} <= same.keys()
    for row in same.values():
        assert row["difference"] == [0, 0, 0] and row["n_needed"] is None
        assert row["verdict"] == ("no difference shown at this n" if row["n"] >= 10 else
                                  f"too few clips ({row['n']}) to tell")
    evaluate.main(["--run", str(small_run), "--against", str(tmp_path / "other"), *command])
    found = result(small_run)
    assert found["against"]["equal"] == ""  # nothing is
    row = found["against"]["comparison"]["iis_cosine"]
    assert row["a"] == found["measures"]["iis_cosine"]["right"][0]
    assert row["b"] == found["against"]["measures"]["iis_cosine"]["right"][0]
    assert row["difference"][0] == pytest.approx(row["a"] - row["b"])
    assert row["difference"][1] < row["difference"][2]
    text = (small_run / "evaluation.md").read_text()
    assert "A - B, paired" in text and "Two runs are compared, not two methods" in text
    why = adapter_facts(small_run / "stage3/adapter.safetensors")["warning"]  # few steps prove nothing
    assert why and found["warnings"][0] == why and "not" in why
    n = len(found["against"]["comparison"])
    assert f"Of {n} comparisons of equal runs about {n / 20:.1f} would" in text


def test_runs_judged_on_other_numbers_of_clips_are_not_compared():
    row = {"title": "R@1", "higher_is_better": True}
    found = [{"measures": {"recall_at_1": {**row, "n": n}}} for n in (9, 10)]
    boots = {"recall_at_1": (0.5, np.zeros(2000))}
    assert evaluation.compare_runs(boots, boots, found[0], found[0])["recall_at_1"]["n"] == 9
    with pytest.raises(RunFailed, match="other numbers of clips"):
        evaluation.compare_runs(boots, boots, *found)


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


def test_the_judge_reads_captions_as_siglip_learned_them(tmp_path):
    """In lower case, with end-of-text, padded on the right: whatever the tokenizer's own files say."""
    judge = Judge(JUDGE)
    loud, quiet = judge.captions(["A DOG", "Rain Falling"]), judge.captions(["a dog", "rain falling"])
    np.testing.assert_array_equal(loud, quiet)
    ids = judge.tokenizer(["a dog"], **judge.padded)["input_ids"][0].tolist()
    end = ids.index(judge.tokenizer.eos_token_id)
    assert len(ids) == 32 and 0 < end < 8 and set(ids[end + 1:]) == {judge.tokenizer.pad_token_id}
    shutil.copytree(JUDGE, tmp_path / "left")
    config = json.loads((tmp_path / "left/tokenizer_config.json").read_text())
    (tmp_path / "left/tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    np.testing.assert_allclose(Judge(tmp_path / "left").captions(["a dog"]), judge.captions(["a dog"]))

    tokenizer = json.loads((JUDGE / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None  # as of a tokenizer that adds nothing
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "left/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "left/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="ends a text with token"):
        Judge(tmp_path / "left")


def test_the_reference_of_real_pictures_has_the_clips_own_mix_of_labels(tmp_path):
    """A reference by stride through rows in the order of their labels had half of the classes and no pair."""
    names, rows = ["a", "b", "c", "a+b"], []
    for i in range(240):  # train: the labels in turn; test: three of each, and many more of c
        rows.append({"label": names[i % 4], "split": "train", "color": i})
    rows += [{"label": name, "split": "test", "color": 0} for name in [*names * 3, *["c"] * 12]]
    (tmp_path / "x").mkdir()
    for i, row in enumerate(rows):
        color = (60 * names.index(row["label"]), row.pop("color"), 200)
        Image.new("RGB", (64, 64), color).save(tmp_path / f"x/{i}.png")
        soundfile.write(tmp_path / f"x/{i}.wav", np.sin(np.arange(4800) * (0.02 + i / 1e4)) / 2, 48000)
        row |= {"image_file_name": f"x/{i}.png", "audio_file_name": f"x/{i}.wav", "text": row["label"]}
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = Clips(tmp_path, "test", 0, 64)
    pairs = clips.reference_pictures()
    assert [*pairs] == [*range(24)]
    assert all(int(np.asarray(image)[0, 0, 0]) // 60 == names.index(clips.rows[i].label)
               for i, image in pairs.items())
    greens = {int(np.asarray(image)[0, 0, 1]) for image in pairs.values()}
    assert len(greens) == 24 and max(greens) > 120  # all different, from the whole split
    few = Clips(tmp_path, "test", 8, 64)  # the labels' own mix, not the first rows
    assert sorted(row.label for row in few.rows) == ["a", "a+b", "b", *"ccccc"]
    clips.train = [row for row in clips.train if row.label != "c"]
    assert [*clips.reference_pictures()] == [i for i, row in enumerate(clips.rows) if row.label != "c"]


# --- equal weights ------------------------------------------------------------------------------------------
FLAGS = argparse.Namespace(gate=None, base_model="", clap_model="")


def changed(source, path, change=None, **facts):
    """A copy of an adapter with other weights, change(tensors), and other facts."""
    from safetensors import safe_open
    from safetensors.numpy import save_file
    with safe_open(source, framework="np") as file:
        tensors = {key: file.get_tensor(key).copy() for key in file.keys()}
        said = json.loads(file.metadata()["clap2diffusion"]) | facts
    tensors = (change and change(tensors)) or tensors
    said.pop("sha256")
    said["sha256"] = tensor_file.digest(said, tensors)
    save_file(tensors, path, {"clap2diffusion": json.dumps(said)})
    return path


def times(pattern: str, factor: float):
    def change(tensors):
        for key in tensors:
            if pattern in key:
                tensors[key] *= np.float32(factor)
    return change


@pytest.fixture
def adapter(run, tmp_path):
    """Stage 3's, with a gate of 0.4 and a LoRA that does something."""
    def awake(tensors):
        for key in tensors:
            if "lora.up" in key:
                tensors[key][:] = np.random.default_rng(0).standard_normal(tensors[key].shape)
    return changed(run / "stage3/adapter.safetensors", tmp_path / "a.safetensors", awake, tanh_gate=0.4)


def without_lora(tensors):
    return {key: value for key, value in tensors.items() if "_lora" not in key}


@pytest.mark.parametrize("change, facts, differing", (
    (None, {}, []),
    (None, {"step": 77, "warning": "x", "base_model": "elsewhere"}, []),  # what makes no other picture
    (times("image_proj.norm.bias", 1.5), {}, ["projection"]),
    (times("to_k_ip", 1.5), {}, ["K/V"]),
    (times("to_v_ip", 1.5), {}, ["K/V"]),
    (times("7.to_v_ip", 1 + 1e-6), {"tanh_gate": 0.5}, ["K/V", "gate"]),
    (times("to_v_ip", 1.25), {"tanh_gate": 0.5}, ["gate"]),  # the gate is folded into V, and V is the same
    (times("to_v_ip", 0), {"tanh_gate": 0.0}, ["gate"]),
    (times("_lora.up", 1.5), {}, ["LoRA"]),
    (times("_lora.up", 0), {}, ["LoRA"]),
    (without_lora, {}, ["LoRA"])))
def test_what_two_adapters_share_is_told_by_part(change, facts, differing, adapter, tmp_path):
    other = changed(adapter, tmp_path / "b.safetensors", change, **facts)
    shared = compare_adapters(adapter, other, FLAGS)
    assert shared.differing == differing and shared.all == (not differing)
    assert shared.equal == [part for part in ("projection", "K/V", "LoRA", "gate") if part not in differing]
    assert compare_adapters(other, adapter, FLAGS)[:3] == shared[:3]
    if differing:
        assert shared.line.startswith("Equal in A and B: ")
        assert shared.line.endswith(f"; not equal: {', '.join(differing)}")


def test_lora_that_does_nothing_is_no_difference(adapter, tmp_path):
    """Its B is 0, as before the first step; A is drawn by seed, of any rank. Or there is none."""
    def asleep(tensors):
        times("_lora.up", 0)(tensors)
        times("_lora.down", 3)(tensors)
        for key in [key for key in tensors if "_lora" in key]:  # another rank
            tensors[key] = tensors[key][:2].copy() if "down" in key else tensors[key][:, :2].copy()
    a = changed(adapter, tmp_path / "a0.safetensors", times("_lora.up", 0))
    for name, change in (("b", asleep), ("c", without_lora)):
        other = changed(adapter, tmp_path / f"{name}.safetensors", change)
        shared = compare_adapters(a, other, FLAGS)
        assert shared.all and "LoRA (without effect in both)" in shared.equal
    none = changed(adapter, tmp_path / "d.safetensors", without_lora)
    assert compare_adapters(none, other, FLAGS).equal == ["projection", "K/V", "gate"]  # a part neither has


def test_equal_weights_on_other_models_may_be_compared(adapter, tmp_path):
    other = changed(adapter, tmp_path / "b.safetensors", fingerprints={"unet": "x", "clap": "y"})
    shared = compare_adapters(adapter, other, FLAGS)
    assert not shared.all and not shared.differing
    assert shared.line.endswith("; the models that they were trained with differ")
    same = argparse.Namespace(gate=None, base_model="base", clap_model="clap")  # both are judged with these
    assert compare_adapters(adapter, other, same).all
    gated = changed(adapter, tmp_path / "c.safetensors", times("to_v_ip", 1.25), tanh_gate=0.5)
    assert not compare_adapters(adapter, gated, FLAGS).all
    shared = compare_adapters(adapter, gated, argparse.Namespace(gate=0.3, base_model="", clap_model=""))
    assert shared.all and "gate (of --gate)" in shared.equal  # which takes the place of both


def test_equal_weights_are_refused_before_torch_loads(adapter, world, tmp_path):
    other = changed(adapter, tmp_path / "b.safetensors", step=5)
    code = ("import sys, evaluate\ntry:\n    evaluate.main()\nfinally:\n    print('torch' in sys.modules)")
    command = [sys.executable, "-c", code, "--run", adapter, "--against", other, "--data-root", world,
               "--judge", JUDGE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n" and "holds the same weights as" in done.stderr
    done = script("evaluate.py", *map(str, command[3:]))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith(f"error: --against {other}: holds the same weights as {adapter} (") and \
        last.endswith("or compare them all the same with --allow-equal")
    assert not (tmp_path / "evaluation").exists()
    done = script("evaluate.py", "--run", adapter, "--against", other, "--judge", "")
    assert done.returncode == 2 and "needs a judge" in done.stderr


# --- few clips, captions as classes -------------------------------------------------------------------------
@pytest.mark.parametrize("n", (2, 4, 9))
def test_few_clips_are_said_to_be_too_few_and_every_figure_is_finite(n, small_run, run, world, monkeypatch,
                                                                     capsys):
    monkeypatch.setattr(evaluation, "pictures", perfect_pictures(world))
    evaluate.main(["--run", str(small_run), "--against", str(run / "stage1"), "--data-root", str(world),
                   "--judge", str(JUDGE), "--clips", str(n), "--quick"])
    found = read_json(small_run / "evaluation.json")  # which refuses nan
    said = f"too few clips ({n}) to tell anything: expected at least 10; CMMD is left out"
    assert any(line.startswith(said) for line in found["warnings"]) and f"warning: {said}" in \
        capsys.readouterr().out
    comparison = found["against"]["comparison"]
    assert found["n"] == n and "cmmd" not in found["measures"] and "cmmd" not in comparison
    for row in comparison.values():
        assert row["verdict"] == f"too few clips ({row['n']}) to tell"
        assert np.isfinite(row["difference"]).all()
    text = (small_run / "evaluation.md").read_text()
    assert "nan" not in text and "Few: below 10 clips" in text and f"| {n} (few) |" in text
    assert "properties" not in found
    assert any("with known properties for rank correlations" in line for line in found["warnings"])
    page = (small_run / "evaluation.html").read_text()
    assert f"Too few clips ({found['n_single']}) to tell anything." in page


def test_ten_clips_have_every_measure_and_are_said_to_tell_little(small_run, world, monkeypatch):
    monkeypatch.setattr(evaluation, "pictures", perfect_pictures(world))
    evaluate.main(["--run", str(small_run), "--data-root", str(world), "--judge", str(JUDGE), "--quick"])
    found = read_json(small_run / "evaluation.json")
    assert "cmmd" in found["measures"]
    assert any(line.startswith("10 clips tell little: of a share of one half the 95 % interval is +- 0.31")
               for line in found["warnings"])
    assert not any("too few clips" in line for line in found["warnings"] if "known properties" not in line)


def test_clips_that_sound_alike_are_named_by_their_own_split():
    clips = argparse.Namespace(data_root="data", split="test", rows=[0] * 4,
                               kinds=[["a"], ["b"], ["a", "b"], ["a", "c"]])
    same, other = torch.eye(3)[:2]
    with pytest.raises(UserError, match="data: the 4 clips of split test sound alike to CLAP"):
        evaluation.pick_others(clips, torch.stack([same] * 4), 0)
    found = evaluation.pick_others(clips, torch.stack([same, other, same, same]), 0)
    assert found == [1, 0, 1, 1]  # the two pairs are copies, so they hear a single one
    clips.kinds[3] = ["a", "b", "c"]  # alone of its number, and silent
    assert evaluation.pick_others(clips, torch.stack([same, other, same, 0 * same]), 0)[3] in (0, 1, 2)


def relabelled(world, out, change):
    """The world with other rows: change(row, place) changes one. The labels' texts are left out."""
    shutil.copytree(world, out)
    (out / "labels.json").unlink()
    rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        change(row, i)
        row.pop("properties", None)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "metadata.jsonl").write_text(text, "utf-8")
    return out


def test_captions_that_stand_for_classes_are_said_to_and_are_not_called_english(
        small_run, world, tmp_path, monkeypatch, capsys):
    def korean(row, i):
        names = row.pop("label").split("+")
        row["text"] = sound_world.class_caption(tuple(names), "ko") + " +"
    data = relabelled(world, tmp_path / "ko", korean)
    monkeypatch.setattr(evaluation, "pictures", perfect_pictures(data))
    evaluate.main(["--run", str(small_run), "--data-root", str(data), "--judge", str(JUDGE), "--quick",
                   "--min-judge", "0"])
    out, found = capsys.readouterr().out, read_json(small_run / "evaluation.json")
    said = "no clip of split test has a label, so each clip's caption is its class ("
    assert f"warning: {said}" in out and any(line.startswith(said) for line in found["warnings"])
    page = (small_run / "evaluation.html").read_text()
    for text in (out, page, (small_run / "evaluation.md").read_text()):
        assert "English" not in text and "Korean" not in text
        assert "zero-shot top-1, captions as classes" in text
    assert "the judge reads real pictures: the clips' captions " in out
    assert not found["labelled"] and "without labels" in page
    classes = found["confusion"]["classes"]
    assert found["measures"]["top1_caption"]["chance"] == 1 / len(classes)
    assert set(classes) == {clip["text"] for clip in found["clips"]}
    seen = sum(clip["right"]["seen"] == clip["text"] for clip in found["clips"])
    assert found["measures"]["top1_caption"]["right"][0] == pytest.approx(seen / 10)
    right = sum(clip[kind]["seen"] == clip["text"] for clip in found["clips"]
                for kind in ("right", "silence", "other"))
    assert page.count("✓") == 1 + 2 * right  # explained once; below a picture and in its alternative text


@pytest.mark.parametrize("labels, texts, kinds", (
    (["dog", "rain"], None, ["en"]),
    (["개", "비"], None, ["label"]),
    (["개", "비"], {"개": {"ko": "개가 짖는다."}, "비": {"ko": "비가 온다."}}, ["ko"]),
    (["개", "비"], {"개": {"en": "a dog", "ko": "개"}}, ["label"]),
    (["개", "비"], {"개": {"en": "a dog"}, "비": {"en": "rain"}}, ["en"]),
    (["dog", "rain"], {"dog": {"en": "a dog", "ko": "개"}, "rain": {"ko": "비"}}, ["en", "ko"])))
def test_texts_of_unknown_language_are_not_called_english(labels, texts, kinds, world, tmp_path):
    data = relabelled(world, tmp_path / "w", lambda row, i: row.update(label=labels[i % 2]))
    if texts:
        (data / "labels.json").write_text(json.dumps(texts), "utf-8")
    assert [*Clips(data, "test", 0, 64).captions()] == kinds


def test_clips_without_a_label_among_others_are_counted(world, tmp_path):
    data = relabelled(world, tmp_path / "w", lambda row, i: row.update(label=["dog", "rain", ""][i % 3]))
    clips = Clips(data, "test", 0, 64)
    n = sum(not row.label for row in clips.rows)
    assert 3 <= n <= 4 and len(clips.single) == 10 - n
    assert f"{n} of 10 clips have no label and are left out where labels count" in clips.remarks()


# --- history ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def copied(run, config, tmp_path_factory):
    """A run with a copy of stage 2 beside the others."""
    place = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(run, place)
    ok(script("train_stage2.py", "--config", config, "--run", place, "--name", "huber", "--steps", 4,
              "--seed", 3, "--samples", 0))
    return place


@pytest.fixture
def huber(copied, tmp_path):
    return shutil.copytree(copied, tmp_path / "copied") / "huber"


def past(adapter_path) -> list[str]:
    return [stage.folder.name for stage in History(adapter_path).stages]


def test_the_history_of_an_adapter_is_found_by_its_files_not_by_its_place(huber, copied, run, tmp_path):
    adapter, folder = huber / "adapter.safetensors", huber.parent
    assert past(adapter) == ["stage1", "huber"]
    assert past(folder / "stage3/adapter.safetensors") == ["stage1", "stage2", "stage3"]
    shutil.copy(folder / "stage3/adapter.safetensors", folder)  # as the report does
    assert past(folder / "adapter.safetensors") == ["stage1", "stage2", "stage3"]
    (folder / "stage1").rename(folder / "stage1.before-20260101-000000")  # as --fresh does
    assert past(adapter) == ["stage1.before-20260101-000000", "huber"]
    assert History(adapter).stages[0].name == "stage1"
    moved = folder.rename(tmp_path / "moved") / "huber"
    assert past(moved / "adapter.safetensors") == ["stage1.before-20260101-000000", "huber"]
    shutil.copytree(moved, tmp_path / "alone/huber")  # it says where it began
    assert History(tmp_path / "alone/huber/adapter.safetensors").stages[0].folder == copied / "stage1"
    (tmp_path / "sent").mkdir()
    shutil.copy(moved / "adapter.safetensors", tmp_path / "sent")
    sent = History(tmp_path / "sent/adapter.safetensors")
    assert not sent.stages and "is not beside it, so its training is unknown" in sent.missing
    shutil.copytree(run / "stage2", tmp_path / "other")  # another's folder tells nothing of it
    shutil.copy(moved / "adapter.safetensors", tmp_path / "other")
    assert past(tmp_path / "other/adapter.safetensors") == []


def test_copies_of_stage_3_are_told_apart_though_they_train_nothing_but_the_gate(copied, config, tmp_path):
    folder = shutil.copytree(copied, tmp_path / "run")
    ok(script("train_stage3.py", "--config", config, "--run", folder, "--name", "another", "--seed", 3))
    for name in ("stage3", "another"):  # which the run's folder has no more than a copy of
        shutil.copy(folder / name / "adapter.safetensors", folder)
        assert past(folder / "adapter.safetensors") == ["stage1", "stage2", name]


def test_a_stage_before_that_was_trained_anew_is_not_taken_for_the_one_that_counted(huber, run, monkeypatch):
    """Another result lies in stage1 now, under the old name, in both places where it might be."""
    history = History(huber / "adapter.safetensors")
    init = history.stages[-1].header["init"]
    assert history.stages[0].header["sha256"] == init and not history.missing
    for place in (huber.parent / "stage1", history.stages[0].folder):
        if place.is_relative_to(huber.parent):
            header, tensors = tensor_file.read_tensors(place / "final.safetensors")
            states = {name: tensor_file.state_of(name, place, header, tensors) for name in header["objects"]}
            other = {key: value for key, value in header.items() if key not in ("sha256", "objects")}
            tensor_file.write_tensors(place / "final.safetensors", other | {"step": 9}, states)
    from clap2diffusion.judging import history as module
    monkeypatch.setattr(module, "_places", lambda folder, header: sorted(huber.parent.iterdir()))
    found = History(huber / "adapter.safetensors")
    assert [stage.folder.name for stage in found.stages] == ["huber"]
    assert f"huber began with a result of SHA-256 {init[:12]}, which is not there any more" in found.missing


def test_a_copied_stage_has_its_own_curves_and_its_own_report(huber, world, monkeypatch):
    """Best at step 0: both say that nothing was kept."""
    made = json.loads((huber / "result.json").read_text())
    (huber / "result.json").write_text(json.dumps(made | {"best_step": 0}))
    lost = "huber: best is step 0: nothing that this stage learned is kept"
    few = "stage1: 40 training clips meet a whitening of 512 directions: they span at most 39"
    monkeypatch.setattr(evaluation, "pictures", perfect_pictures(world))
    files = {path.name: path.read_bytes() for path in huber.iterdir() if path.is_file()}
    evaluate.main(["--run", str(huber), "--data-root", str(world), "--judge", str(JUDGE), "--quick",
                   "--steps", "2", "--columns", "2"])
    found = result(huber)
    assert [stage["name"] for stage in found["training"]["stages"]] == ["stage1", "huber"]
    assert [stage["log"][-1]["step"] for stage in found["training"]["stages"]] == [10, 4]
    assert found["warnings"].count(lost) == 1 and any(line.startswith(few) for line in found["warnings"])
    page = (huber / "evaluation.html").read_text()
    section = page[page.index('<section id="training">'):]
    assert section.count("<svg") == 2 and "huber, a stage 2" in section and "stage 3" not in section
    assert "was trained with it held at 0.400" in " ".join(page.split())

    said = json.loads((huber / "report.json").read_text())
    assert [*said["after"]] == ["stage1", "huber"] and said["after"]["huber"] == made["validation"]
    assert said["gate"] is None and said["warnings"][-1] == lost
    assert said["seeds"] == {"stage1": 0, "huber": 3}
    text = (huber / "report.md").read_text()
    assert "| huber |" in text and "| stage2 |" not in text and f"**Warning: {lost}.**" in text
    assert "tanh(gate)" not in text
    assert Image.open(huber / "report.png").size == (104 + 2 * 132, 22 + 5 * 132)  # two stages and silence
    for name in ("samples.png", "adapter.safetensors", "final.safetensors"):
        assert name not in files or (huber / name).read_bytes() == files[name]


def test_a_sheet_made_in_batches_has_each_picture_in_its_column(run, world, monkeypatch):
    def pictures(pipe, audio_embeds, prompts, guidance, steps, seeds, size):
        """A colour that tells sound and noise."""
        return [Image.new("RGB", (size, size), (int(255 * abs(one[0])), 50 * seed, int(255 * abs(one[1]))))
                for one, seed in zip(audio_embeds, seeds, strict=True)]
    monkeypatch.setattr(report, "pictures", pictures)
    asked = []
    monkeypatch.setattr(report, "load_stock_pipeline", lambda *args, **more: asked.append((args[3], more)))
    stages = History(run / "stage3/adapter.safetensors").stages
    alone, batched = (report.make_sheet(stages, evaluate.build_parser().parse_args(
        ["--data-root", str(world), "--columns", "5", "--batch-size", n, "--scheduler", "lcm", "--precision",
         "bf16", "--frozen-dtype", "nf4", "--lora", "mine"])) for n in ("1", "2"))
    how = {"scheduler": "lcm", "lora": "mine", "lora_scale": None, "frozen_dtype": "nf4", "compile": False}
    assert asked == 6 * [(torch.bfloat16, how)]  # as it was asked, each of three stages
    assert alone.tobytes() == batched.tobytes()
    silence = [alone.getpixel((104 + i * 132 + 64, 22 + 5 * 132 + 64)) for i in range(5)]
    assert silence == [(0, 50 * i, 0) for i in range(5)]  # each column its own noise, and no sound


def test_how_pictures_were_drawn_is_written_down():
    def told(*flags) -> dict:
        args = evaluate.build_parser().parse_args(["--steps", "4", *flags])
        return {key: value for key, value in evaluation.drawn_how(args).items() if key in evaluation.ASKED}
    assert told() == {}
    assert told("--lora", "x", "--lora-scale", "0") == {"lora": "x", "lora_scale": 0}
    assert told("--frozen-dtype", "nf4", "--compile") == {"frozen_dtype": "nf4", "compile": True}


def test_a_report_needs_the_stage_that_wrote_the_adapter(huber, copied):
    shutil.copy(copied / "stage1/adapter.safetensors", huber)
    done = script("evaluate.py", "--judge", "", "--run", huber)
    assert done.returncode == 2 and "of another one, so there is nothing to report" in done.stderr
    done = script("evaluate.py", "--judge", "", "--run", huber / "adapter.safetensors")
    assert done.returncode == 2 and "is a file; without a judge only a report is written" in done.stderr
    (copied.parent / "half").mkdir()
    shutil.copytree(copied / "stage1", copied.parent / "half/stage1")
    done = script("evaluate.py", "--judge", "", "--run", copied.parent / "half")
    assert done.returncode == 2 and "of one finished stage, give its own folder with --run" in done.stderr


# --- the commit ---------------------------------------------------------------------------------------------
def test_the_commit_says_what_differs_from_it(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path / "code", "-c", "user.name=a", "-c", "user.email=a@b.c", *args],
                       check=True, capture_output=True)
    code = tmp_path / "code"
    (code / "clap2diffusion/base").mkdir(parents=True)
    monkeypatch.setattr(hub, "SCRIPTS", code)
    assert report.git_commit() == "not a git checkout"
    for name in ("evaluate.py", "train_stage2.py", "clap2diffusion/base/a.py", "README.md"):
        (code / name).write_text("1\n")
    (code / ".gitignore").write_text("__pycache__/\n")
    git("init", "-q")
    assert report.git_commit() == "not a git checkout"  # of a repository that does not have the code
    git("add", ".")
    assert report.git_commit().startswith("unknown: git says: fatal: ")  # no commit yet
    git("commit", "-qm", "x")
    clean = report.git_commit()
    assert len(clean) == 40 and set(clean) <= set("0123456789abcdef")
    (code / "README.md").write_text("2\n")
    (code / "clap2diffusion/__pycache__").mkdir()
    (code / "clap2diffusion/__pycache__/a.pyc").write_text("")
    assert report.git_commit() == clean  # no code
    (code / "train_stage2.py").write_text("2\n")
    (code / "clap2diffusion/base/a.py").unlink()
    (code / "train_개.py").write_text("")
    (code / "clap2diffusion/neu").mkdir()
    (code / "clap2diffusion/neu/b.py").write_text("")
    assert report.git_commit() == (
        f"{clean}, but the code differs from it: train_stage2.py (changed), train_개.py (untracked), "
        "clap2diffusion/base/a.py (removed), clap2diffusion/neu/b.py (untracked)")
    git("add", "train_stage2.py")
    assert "train_stage2.py (changed)" in report.git_commit()  # staged is not committed
    for i in range(9):
        (code / f"x{i}.py").write_text("")
    assert report.git_commit().endswith(" and 5 more")
    monkeypatch.setenv("PATH", os.devnull)
    assert report.git_commit() == "unknown: there is no git"


def test_no_weight_is_shared_with_the_judge():
    """No tensor of the judge occurs in a model that it judges."""
    from safetensors.torch import load_file
    files = sorted((ROOT / "assets/tiny").rglob("*.safetensors"))
    judged = {(tuple(t.shape), t.double().sum().item()) for path in files if "judge" not in path.parts
              for t in load_file(path).values() if t.numel() > 64 and t.is_floating_point() and t.std() > 0}
    judge = {(tuple(t.shape), t.double().sum().item()) for path in files if "judge" in path.parts
             for t in load_file(path).values() if t.numel() > 64 and t.is_floating_point() and t.std() > 0}
    assert len(judge) > 50 and not judge & judged
