"""evaluate.py: a perfect model scores 1, noise scores at chance, a judge that cannot read may not judge."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import CLAP, JUDGE, ROOT, ok, script
from PIL import Image

import evaluate
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.dataset.manifest import read_manifest
from clap2diffusion.judging import evaluation
from clap2diffusion.judging.clips import Clips
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
                   "--steps", "3", "--quick"])
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


def test_no_weight_is_shared_with_the_judge():
    """No tensor of the judge occurs in a model that it judges."""
    from safetensors.torch import load_file
    files = sorted((ROOT / "assets/tiny").rglob("*.safetensors"))
    judged = {(tuple(t.shape), t.double().sum().item()) for path in files if "judge" not in path.parts
              for t in load_file(path).values() if t.numel() > 64 and t.is_floating_point() and t.std() > 0}
    judge = {(tuple(t.shape), t.double().sum().item()) for path in files if "judge" in path.parts
             for t in load_file(path).values() if t.numel() > 64 and t.is_floating_point() and t.std() > 0}
    assert len(judge) > 50 and not judge & judged
