"""The real stage scripts, end to end on the small models: what trains, what does not, resume, pictures."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE, CLAP, ROOT, interrupt_sweep, kill_at, ok, script, write_config
from PIL import Image
from safetensors.torch import load_file

import evaluate
from clap2diffusion.base.settings import changed_settings
from clap2diffusion.base.tensor_file import read_tensors, unflatten, write_tensors
from clap2diffusion.dataset.cache import build_features
from clap2diffusion.dataset.dataset import AudioImageDataset
from clap2diffusion.dataset.decoding import load_waveform
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.engine.changes import other_code, why_other_steps
from clap2diffusion.engine.run_folder import Progress
from clap2diffusion.pictures.generation import embed
from clap2diffusion.pictures.inputs import adapter_facts

STAGES = (1, 2, 3)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final.safetensors")


def test_the_three_stages_leave_what_the_readme_promises(run):
    for stage in STAGES:
        folder = run / f"stage{stage}"
        result = json.loads((folder / "result.json").read_text())
        assert result["steps"] == 10 and result["stock_difference"] < 1e-4
        told = {"val_right", "silence_minus_right", "other_minus_right"}
        assert set(result["validation"]) == told | {"val_silence", "val_other", "val_right_noisy"} | {
            f"{name}_by_quarter" for name in told}
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()
                 if '"loss"' in line]
        assert steps == list(range(1, 11))
        assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
            f"step-{step:08d}.safetensors" for step in (6, 9, 10)]
        assert any((folder / "tensorboard").iterdir())
        assert Image.open(folder / "samples.png").size == (64, 64)
        assert not list(folder.rglob("*.tmp"))
    sweep = json.loads((run / "stage3/sweep.json").read_text())
    assert [row["tanh_gate"] for row in sweep["before"]] == [i / 10 for i in range(11)]
    assert len({row["right"][0] for row in sweep["before"]}) == 11  # the gate matters to the loss
    assert Image.open(run / "stage3/sweep.png").size[0] > 300


def test_tensorboard_shows_the_three_sounds_in_one_chart(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    board = EventAccumulator(str(run / "stage1/tensorboard")).Reload()
    [event] = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    tags = board.Tags()["scalars"]
    drawn = [[tag for tag in tags if re.search(pattern, tag)]  # as TensorBoard does
             for pattern in charts.pop("loss by sound").multiline.tag]
    assert drawn == [["val_right"], ["val_silence"], ["val_other"]]
    assert [scalar.step for scalar in board.Scalars("val_right")] == [0, 5, 10]
    for title in ("val right", "silence minus right", "other minus right"):
        [one] = charts.pop(title).margin.series
        assert {one.value, one.lower, one.upper} <= set(tags) and one.value == title.replace(" ", "_")
    assert not charts


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_trainable_gets_a_gradient_and_moves_and_nothing_else_does(
        stage, config, run, tmp_path, monkeypatch):
    """Runs the script's own main() and watches the list it clips and the UNet it loads."""
    import diffusers
    seen, unets, plain = {}, [], torch.nn.utils.clip_grad_norm_
    load = diffusers.UNet2DConditionModel.from_pretrained

    def clip(parameters, max_norm):
        for i, p in enumerate(parameters):
            was = seen.setdefault(i, {"first": p.detach().clone(), "gradient": 0.0, "moved": False})
            was["gradient"] = max(was["gradient"], float(p.grad.abs().max()) if p.grad is not None else 0.0)
            was["moved"] |= not torch.equal(p, was["first"])
        return plain(parameters, max_norm)

    def from_pretrained(*args, **kwargs):
        loaded = load(*args, **kwargs)  # with what loading found, or alone
        unets.append(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(sys, "argv", [f"train_stage{stage}.py"])
    module = __import__(f"train_stage{stage}")
    before = ["--init-from", str(run / f"stage{stage - 1}")] if stage > 1 else []
    module.main(["--config", str(config), "--run", str(tmp_path), "--steps", "3", "--samples", "0",
                 "--workers", "0", *before])
    blocks = 2 * len([name for name in unets[0].attn_processors if name.endswith("attn2.processor")])
    lora = 2 * 4 * len(unets[0].attn_processors)
    # of the projection the second layer and the norm
    assert len(seen) == {1: 4 + blocks, 2: 4 + blocks + lora, 3: 1}[stage]
    assert all(was["gradient"] > 0 and was["moved"] for was in seen.values())
    untouched = load(BASE, subfolder="unet").state_dict()
    for name, p in unets[0].named_parameters():
        if ".lora_" not in name:
            assert torch.equal(p, untouched[name.replace(".base_layer", "")]), name
    gate, earlier = final(tmp_path / f"stage{stage}"), final(run / "stage2")
    whitening = [key for key in gate if key.startswith("audio_proj.proj.0.")]
    assert len(whitening) == 2
    assert stage == 1 or all(torch.equal(gate[key], earlier[key]) for key in whitening)
    if stage < 3:
        assert gate["audio_attn.gate"].tanh().item() == pytest.approx(0.4)
    else:
        changed = [key for key in gate if not torch.equal(gate[key], earlier[key])]
        assert changed == ["audio_attn.gate"]


def test_without_a_whitening_the_first_layer_is_trained(config, tmp_path):
    """In stage 2 as well, which learns from stage 1's checkpoint that there is none."""
    for stage, more in ((1, ["--no-whiten"]), (2, [])):
        ok(script(f"train_stage{stage}.py", "--config", config, "--run", tmp_path, "--steps", 2, "--samples",
                  0, *more))
        first, last = (read_tensors(tmp_path / f"stage{stage}/checkpoints/step-{n:08d}.safetensors")[1]
                       for n in (0, 2))
        assert not torch.equal(first["audio_proj.proj.0.weight"], last["audio_proj.proj.0.weight"])


@pytest.mark.parametrize("stage, step, signum",
                         [(1, 4, signal.SIGTERM), (2, 7, signal.SIGKILL), (3, 5, signal.SIGINT)])
def test_a_stopped_stage_goes_on_and_ends_with_the_same_weights(stage, step, signum, config, run, tmp_path):
    interrupt_sweep([step], [signum], stage, config, run, tmp_path)


def test_two_loader_processes_and_none_give_the_same_weights_and_another_seed_others(config, run, tmp_path):
    ok(script("train_stage1.py", "--config", config, "--run", tmp_path / "two", "--workers", 2, "--samples",
              0))
    assert all(torch.equal(value, final(run / "stage1")[key])
               for key, value in final(tmp_path / "two/stage1").items())
    ok(script("train_stage1.py", "--config", config, "--run", tmp_path / "seed", "--seed", 1, "--samples", 0))
    assert not torch.equal(final(tmp_path / "seed/stage1")["audio_proj.proj.0.weight"],
                           final(run / "stage1")["audio_proj.proj.0.weight"])


def test_the_headers_say_where_a_result_comes_from(run):
    """Which results it began from, what became of each, and what code made it."""
    headers = [read_tensors(run / f"stage{stage}/final.safetensors")[0] for stage in STAGES]
    results = [json.loads((run / f"stage{stage}/result.json").read_text()) for stage in STAGES]
    history = [{"stage": f"stage{n}", "name": f"stage{n}", "folder": str(run / f"stage{n}"), "step": 10,
                "best_step": results[n - 1]["best_step"], "sha256": headers[n - 1]["sha256"]} for n in (1, 2)]
    for stage, header in zip(STAGES, headers, strict=True):
        facts = adapter_facts(run / f"stage{stage}/adapter.safetensors")
        assert header["history"] == facts["history"] == history[:stage - 1]
        assert header["name"] == facts["name"] == f"stage{stage}"
        code = header["code"]
        script_hash = hashlib.sha256((ROOT / f"train_stage{stage}.py").read_bytes()).hexdigest()
        assert script_hash.startswith(code["script"]) and len(code["script"]) == 12
        assert {"common.py", "clap2diffusion/engine/stage.py", "clap2diffusion/base/exits.py"} < set(code)
        assert not any("judging" in name or "world" in name for name in code)
    assert headers[0]["best_step"] == results[0]["best_step"] and "best_step" not in headers[2]
    assert headers[2]["verdict"] == results[2]["verdict"] == facts["verdict"] == "settled elsewhere"


def test_a_finished_stage_says_so_without_loading_a_model(config, run, tmp_path, monkeypatch, capsys):
    """Neither the base model's parts nor the data nor the stage before, which may be gone."""
    from clap2diffusion.engine import stage as upkeep
    for name in ("check_part", "load_base_pipeline", "load_part", "open_splits", "previous_stage"):
        monkeypatch.setattr(upkeep, name, lambda *args, **kwargs: pytest.fail("something was loaded"))
    monkeypatch.setattr(upkeep.hub, "load_small", lambda *args: pytest.fail("the scheduler was loaded"))
    for stage in STAGES:
        shutil.copytree(run / f"stage{stage}", tmp_path / f"stage{stage}")
        monkeypatch.setattr(sys, "argv", [f"train_stage{stage}.py"])
        module = __import__(f"train_stage{stage}")
        module.main(["--config", str(config), "--run", str(tmp_path)])
        assert f"{tmp_path}/stage{stage}: already complete (--fresh" in capsys.readouterr().out
        shutil.rmtree(tmp_path / f"stage{stage}")


def goes_on(command: list, place: Path, less: int, more: int, killed_at: int = 0):
    """A finished stage of `less` steps that is asked for `more`, and one that had them from the start: all
    weights and everything measured are equal bit for bit."""
    folder = next(command[i + 1] for i, one in enumerate(command) if one == "--name")
    ok(script(*command, "--run", place / "whole", "--steps", more))
    ok(script(*command, "--run", place / "grown", "--steps", less))
    short = final(place / "grown" / folder)
    command = [*command, "--run", place / "grown", "--steps", more]
    if killed_at:
        kept = place / "grown" / folder / f"ended-{less:08d}"
        kept.mkdir()  # as a kill leaves it that comes while the result is put away
        (kept.parent / "result.json").rename(kept / "result.json")
        kill_at(killed_at, signal.SIGKILL, *command, folder=place / "grown" / folder)
        assert not (place / "grown" / folder / "result.json").exists()
        assert not (place / "grown" / folder / "final.safetensors").exists()  # no stage begins from it
    done = ok(script(*command))
    whole, grown = (place / run / folder for run in ("whole", "grown"))
    for name in ("final.safetensors", "adapter.safetensors", f"checkpoints/step-{more:08d}.safetensors"):
        a, b = load_file(whole / name), load_file(grown / name)  # the last with optimizer and averages
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    results = [json.loads((place / "result.json").read_text()) for place in (whole, grown)]
    timed = ("seconds", "step_seconds", "peak_memory_mb", "init")
    assert {k: v for k, v in results[0].items() if k not in timed} == {
        k: v for k, v in results[1].items() if k not in timed}
    assert json.loads((grown / "config.json").read_text())["steps"] == more
    kept = grown / f"ended-{less:08d}"
    assert json.loads((kept / "result.json").read_text())["steps"] == less
    assert all(torch.equal(value, final(kept)[key]) for key, value in short.items())
    assert any(not torch.equal(value, b[key]) for key, value in short.items())
    return done


def test_a_finished_stage_3_goes_on_to_more_steps_as_if_it_had_had_them(config, run, tmp_path):
    done = goes_on(["train_stage3.py", "--config", config, "--name", "stage3", "--init-from", run / "stage2",
                    "--min-steps", 50], tmp_path, 3, 6)
    assert "stage3: is finished, and goes on from step 3 to step 6" in done.stdout
    before, after = (json.loads((tmp_path / "grown/stage3" / name).read_text())["sweep_after"]
                     for name in ("ended-00000003/result.json", "result.json"))
    assert len(after) == 11 and before[0]["right"] == after[0]["right"]


COSINE = "    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))"


def changed_copy(place: Path, old: str, new: str) -> Path:
    """A copy of stage 1 in which a line is another, beside links to what it imports."""
    place.mkdir()
    (place / "clap2diffusion").symlink_to(ROOT / "clap2diffusion")
    (place / "common.py").symlink_to(ROOT / "common.py")
    content = (ROOT / "train_stage1.py").read_text()
    assert content.count(old) == 1
    (place / "train_constant.py").write_text(content.replace(old, new))
    return place / "train_constant.py"


def test_a_constant_rate_goes_on_to_more_steps_as_if_it_had_had_them_also_after_a_kill(config, tmp_path):
    """With averaged weights, and early stopping, which counts validations in a row."""
    copy = changed_copy(tmp_path / "scripts", COSINE, "    return cfg.learning_rate")
    done = goes_on([copy, "--config", config, "--name", "constant", "--validate-every", 3, "--ema-decay", 0.9,
                    "--patience", 9], tmp_path, 6, 12, killed_at=8)
    assert "resuming at step" in done.stdout


def test_data_of_the_same_content_may_lie_elsewhere():
    made = {"data_root": "data", "features": "a", "content": "c"}
    assert changed_settings(made, {"data_root": "/mnt/data", "features": "b", "content": "c"}) == []
    assert len(changed_settings(made, {"data_root": "/mnt/data", "features": "b", "content": "d"})) == 2
    assert len(changed_settings(made, {"data_root": "/mnt/data"})) == 1  # before features are known


def test_other_code_is_named_and_an_old_header_knows_none():
    now = {"script": "1", "common.py": "1"}
    assert other_code({}, now, "train_x.py") == other_code({"code": now}, now, "train_x.py") == ""
    assert other_code({"code": {**now, "script": "0"}}, now, "train_x.py") == "train_x.py"
    assert other_code({"code": {**now, "script": "0"}}, now) == ""  # the script of another stage
    gone = other_code({"code": {"common.py": "1", "gone.py": "0"}}, now, "train_x.py")
    assert gone == "gone.py, train_x.py"
    many = {f"{i}.py": "0" for i in range(7)}
    assert other_code({"code": many}, {}) == "0.py, 1.py, 2.py, 3.py, 4.py and 2 more"


def test_a_validation_at_the_last_step_alone_does_not_count_for_early_stopping():
    """A run that gets more steps later has not validated there with them from the start."""
    def after(every: int) -> Progress:
        progress, log = Progress(), argparse.Namespace(scalars=lambda *a, **b: None, text=lambda line: None)
        for progress.step, loss in ((0, 1.0), (3, 2.0), (6, 3.0), (7, 4.0)):
            if progress.validation_due(every, last=7):
                progress.record_validation({"val_right": [loss, loss, loss]}, "val_right", 0.0, log)
        return progress
    assert (after(3).bad_validations, after(3).only_last, after(3).validated_step) == (2, True, 7)
    assert (after(1).bad_validations, after(1).only_last) == (3, False)
    assert after(3).last_validation["val_right"][0] == 4.0


def test_when_more_steps_change_those_that_are_done():
    import train_stage1
    cfg = argparse.Namespace(steps=20, learning_rate=1.0, warmup_steps=3, validate_every=5)

    def constant(step, cfg):
        warmup_steps = round(cfg.warmup_steps * (cfg.steps if cfg.warmup_steps < 1 else 1))
        return cfg.learning_rate * min(1, (step + 1) / max(1, warmup_steps))
    assert why_other_steps(cfg, 10, 10, True, constant) == why_other_steps(cfg, 40, 20, False, constant) == ""
    assert "depends on --steps" in why_other_steps(cfg, 10, 10, False, train_stage1.lr_at)
    assert why_other_steps(cfg, 10, 3, False, train_stage1.lr_at) == ""  # still in the warm-up
    assert "depends on --steps" in why_other_steps(cfg, 10, 10, False, None)  # a script that does not say
    assert why_other_steps(cfg, 30, 21, False, constant) == "21 steps are done already"
    assert "does not validate" in why_other_steps(cfg, 12, 12, True, constant)
    assert why_other_steps(cfg, 12, 12, False, constant) == ""  # the best step is one that both validate
    cfg.warmup_steps = 0.1
    assert "depends on --steps" in why_other_steps(cfg, 10, 10, False, constant)  # a share of the steps
    cfg.warmup_steps, cfg.validate_every = 3, 0
    assert "does not validate" in why_other_steps(cfg, 12, 12, True, constant)


def test_a_copied_script_runs_under_another_name(config, run, tmp_path):
    shutil.copy(ROOT / "train_stage2.py", tmp_path / "train_ablation.py")
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copytree(ROOT / "clap2diffusion", tmp_path / "clap2diffusion",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(run / "stage1", tmp_path / "run/stage1")
    ok(script(tmp_path / "train_ablation.py", "--config", config, "--run", "run", "--steps", 2, cwd=tmp_path))
    assert (tmp_path / "run/ablation/adapter.safetensors").exists() and not (tmp_path / "run/stage2").exists()


def test_the_ablation_that_appends_tokens_is_a_copy_and_a_small_patch(tmp_path):
    import subprocess
    shutil.copy(ROOT / "train_stage1.py", tmp_path / "train_appended.py")
    subprocess.run(["git", "apply", ROOT / "ablations/appended.patch"], cwd=tmp_path, check=True)
    old, new = (ROOT / "train_stage1.py").read_text(), (tmp_path / "train_appended.py").read_text()
    compile(new, "train_appended.py", "exec")
    assert "torch.cat([text_tokens, audio_tokens], 1)" in new and "audio_attn" not in new
    assert len(set(new.splitlines()) - set(old.splitlines())) <= 8


def test_each_ablation_differs_from_the_default_in_what_it_asks_about():
    """And the ablations' default from the shipped one in the length of training alone."""
    def flat(path) -> dict:
        sections = json.loads(path.read_text())
        return {(section, key): value for section in ("common", "stage1", "stage2", "stage3")
                for key, value in sections[section].items()}

    def differing(a: dict, b: dict) -> set:
        return {key for _, key in {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}}
    default, tiny = flat(ROOT / "ablations/default.json"), flat(ROOT / "configs/tiny.json")
    assert differing(default, tiny) == {"steps", "min_steps", "validate_every", "save_every", "samples",
                                        "run", "require_proof"}
    expected = {"tokens": {"num_tokens"}, "caption": {"caption_drop", "audio_drop", "both_drop"},
                "min": {"min_snr_gamma"}, "windows": {"windows"}, "no-lora": {"lora_rank"},
                "no-whiten": {"whiten"}, "ema": {"ema_decay"}, "pinned": {"strength"}}
    configs = [path
               for path in (ROOT / "ablations").glob("*.json") if path.stem not in ("default", "results")]
    assert len(configs) == 13
    for path in configs:
        asked = expected.get(path.stem, expected.get(path.stem.split("-")[0]))
        assert differing(flat(path), default) <= asked, path
        assert differing(flat(path), default), path


def test_the_config_for_real_data_is_not_thin(world):
    """What docs/real-data.md says of it, number by number."""
    config = json.loads((ROOT / "configs/sd15_long.json").read_text())
    batch = config["common"]["batch_size"] * config["common"]["accumulation"]
    assert config["stage1"]["steps"] * batch >= 480_000 and config["common"]["val_clips"] >= 2 * 309
    for stage in ("stage1", "stage2"):
        assert config[stage]["caption_drop"] == 0.8 and config[stage]["high_noise_share"] == 0.3
        assert config[stage]["best_metric"] == "val_right_noisy"
    asked = evaluate.build_parser().parse_args(config["evaluate"])
    assert asked.clips == 1000 and asked.guidance_sweep == [3, 5, 7.5] and not asked.quick
    for stage in (1, 2, 3):
        ok(script(f"train_stage{stage}.py", "--config", "configs/sd15_long.json", "--dry-run", "--data-root",
                  world, "--batch-size", 4))
    done = script("train_stage1.py", "--config", "configs/sd15_long.json", "--val-draws", 1)
    assert done.returncode == 2 and "val_right_noisy needs --val-draws 2" in done.stderr.splitlines()[-1]


def test_options_work_together(config, run, tmp_path):
    """Accumulation, EMA, bf16-held UNet, flips, windows, early stop, pictures on the way."""
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--steps", 6, "--accumulation",
                     2, "--ema-decay", 0.9, "--precision", "bf16", "--frozen-dtype", "bf16", "--flip",
                     "--windows", 2, "--validate-every", 1, "--patience", 2, "--min-delta", 10,
                     "--sample-every", 1, "--samples", 1, "--val-clips", 3, "--best-metric",
                     "other_minus_right", "--log-dir", tmp_path / "boards"))
    result = json.loads((tmp_path / "stage1/result.json").read_text())
    assert result["ended"] == "no improvement in 2 validations" and result["steps"] == 2
    assert (tmp_path / "stage1/samples-00000001.png").exists() and any((tmp_path / "boards").rglob("events*"))
    assert "effective batch 8 (4 x 2), EMA 0.9" in done.stdout
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path / "b", "--steps", 1,
                     "--precision", "fp32", "--projection-lr-scale", 0))
    assert "; cpu, float32 without autocast, frozen UNet in fp32" in done.stdout
    first, last = (read_tensors(tmp_path / f"b/stage1/checkpoints/step-{n:08d}.safetensors")[1]
                   for n in (0, 1))
    moved = {key.split(".")[0]
             for key in first if key.startswith("audio_") and not torch.equal(first[key], last[key])}
    assert moved == {"audio_attn"}  # the projection's learning rate is 0
    done = script("train_stage1.py", "--config", config, "--precision", "fp32", "--frozen-dtype", "bf16")
    assert done.returncode == 2 and "--frozen-dtype bf16 needs --precision bf16" in done.stderr


def test_a_gate_that_walks_away_ends_in_a_verdict_with_the_sweep_on_disk(config, run, tmp_path):
    """With stage 2's audio V made ten times larger the sound raises the loss, and the gate stays at zero."""
    spoiled = tmp_path / "spoiled"
    header, tensors = read_tensors(run / "stage2/final.safetensors")
    for key in tensors:
        if ".to_v." in key and "audio_attn" in key:
            tensors[key] = tensors[key] * 10
    spoiled.mkdir()

    facts = {key: value for key, value in header.items() if key not in ("objects", "sha256")}
    write_tensors(spoiled / "final.safetensors", facts,
                  {name: unflatten(tree, tensors) for name, tree in header["objects"].items()})
    command = ("train_stage3.py", "--config", config, "--run", tmp_path, "--init-from", spoiled, "--steps",
               60, "--away-low", 0.2, "--away-steps", 10, "--batch-size", 8, "--require-proof")
    done = script(*command)
    assert done.returncode == 4, done.stdout + done.stderr
    said = "walked away: the sound raises the loss: tanh(gate) "
    assert said in done.stderr.strip().splitlines()[-1]
    assert (tmp_path / "stage3/sweep.png").exists()
    facts = adapter_facts(tmp_path / "stage3/adapter.safetensors")
    assert facts["verdict"] == "walked away" and facts["warning"].startswith(said)
    again = script(*command)
    assert again.returncode == 4 and "already complete" in again.stdout  # it says so without training on
    assert said in again.stderr.strip().splitlines()[-1]


def test_generate_is_what_a_user_does_in_five_lines(run, world, tmp_path):
    from diffusers import StableDiffusionPipeline
    rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]
    dog, rain = (next(world / row["audio_file_name"] for row in rows if row["label"] == label)
                 for label in ("dog_barking", "rain"))
    out = tmp_path / "out.png"
    ok(script("generate.py", "--audio", dog, rain, dog, "--each", "--run", run, "--out", out, "--steps", 4,
              "--seed", 7))
    pictures = [Image.open(tmp_path / f"out-{i}.png") for i in (1, 2, 3)]
    facts = json.loads(pictures[1].text["clap2diffusion"])
    assert facts["audio"] == str(rain) and facts["seed"] == 8 and facts["guidance"] == 3.0
    assert facts["trained"]["stage"] == "stage3" and facts["base_model"] == str(BASE)

    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, requires_safety_checker=False)
    pipe.load_ip_adapter(str(run / "stage3"), subfolder="", weight_name="adapter.safetensors",
                         image_encoder_folder=None)
    encoder = CLAPAudioEncoder(CLAP)
    embeds = encoder(load_waveform(dog, encoder.sampling_rate, encoder.window_s))[None]

    def draw():
        return pipe("", ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embeds), embeds])],
                    guidance_scale=3.0, num_inference_steps=4,
                    generator=torch.Generator().manual_seed(7)).images[0]

    picture = draw()
    pipe.disable_lora()
    assert abs(_array(picture) - _array(draw())).max() > 20  # the run's LoRA is not zero
    ok(script("generate.py", "--audio", dog, "--run", run, "--out", out, "--steps", 4, "--seed", 7))
    assert abs(_array(picture) - _array(Image.open(out))).max() <= 1
    # a batch rounds otherwise, the picture is the same
    assert abs(_array(picture) - _array(pictures[0])).max() <= 1
    ok(script("generate.py", "--audio", rain, "--run", run, "--out", out, "--steps", 4, "--seed", 7))
    # another sound, same noise: another picture
    assert abs(_array(Image.open(out)) - _array(picture)).max() > 0


def _array(image):
    import numpy as np
    return np.asarray(image).astype(int)


def test_a_silent_clip_is_the_null_audio_everywhere(config, world, run, tmp_path):
    import soundfile
    shutil.copytree(world, tmp_path / "world")
    row = json.loads((world / "metadata.jsonl").read_text().splitlines()[0])
    path = tmp_path / "world" / row["audio_file_name"]
    soundfile.write(path, torch.zeros(48000).numpy(), 48000)
    cache = build_features(tmp_path / "world", BASE, CLAP, 64, tmp_path / "cache", workers=0)
    embeds = [AudioImageDataset(tmp_path / "world", "train", cache)[i]["audio_embeds"] for i in (0, 1)]
    assert not embeds[0].any() and embeds[1].norm() == pytest.approx(1.0, abs=1e-4)
    assert not embed(CLAPAudioEncoder(CLAP), str(path)).any()


@pytest.mark.parametrize("what", ["all silent", "all equal"])
def test_a_stage_on_degenerate_sounds_ends_with_small_finite_weights(what, config, world, tmp_path):
    import soundfile
    root = shutil.copytree(world, tmp_path / "world")
    rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    for row in train:
        path = root / row["audio_file_name"]
        if what == "all silent":
            soundfile.write(path, torch.zeros(48000).numpy(), 48000)
        elif row is not train[0]:
            shutil.copy(root / train[0]["audio_file_name"], path)
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path / "run", "--data-root", root,
                     "--steps", 3, "--validate-every", 0))
    heard = "all are silent" if what == "all silent" else "all sound alike to CLAP"
    assert f"warning: of {len(train)} training clips {heard}: the adapter is not whitened" in done.stderr
    weights = final(tmp_path / "run/stage1")
    assert all(w.isfinite().all() and w.abs().max() < 100 for w in weights.values())


def test_report_holds_what_was_run(run, tmp_path):
    """`evaluate.py --judge ''` writes sheet and report alone."""
    run = shutil.copytree(run, tmp_path / "run")
    ok(script("evaluate.py", "--judge", "", "--run", run, "--columns", 3, "--steps", 2))
    report = json.loads((run / "report.json").read_text())
    for stage in ("stage1", "stage2", "stage3"):
        result = json.loads((run / stage / "result.json").read_text())
        assert report["after"][stage] == result["validation"]
        assert report["seconds"][stage] == result["seconds"]
    assert report["validation_loss"]["stage1"]["best"] == report["after"]["stage1"]["val_right"]
    assert report["gate"]["steps"] == 10 and len(report["gate"]["sweep_after"]) == 11
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and report["git_commit"]
    assert Image.open(run / "samples.png").size == (104 + 3 * 132, 22 + 6 * 132)
    assert "| stage3 |" in (run / "report.md").read_text()


def test_a_stage_does_not_go_on_from_another_stage_1(config, run, tmp_path):
    """Stage 1 is trained anew under a finished, then a half-done stage 2. Both are refused until --fresh."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/stage1")
    command = ("--config", config, "--run", tmp_path / "run", "--samples", 0)
    ok(script("train_stage1.py", *command, "--seed", 5, "--steps", 1))
    for _ in range(2):
        done = script("train_stage2.py", *command)
        assert done.returncode == 2 and "--fresh" in done.stderr.strip().splitlines()[-1], done.stderr
        (tmp_path / "run/stage2/result.json").unlink(missing_ok=True)
    ok(script("train_stage2.py", *command, "--fresh", "--steps", 1))


def test_another_small_world_makes_another_cache_and_the_same_one_is_reused(config, run, world, tmp_path):
    other = write_config(tmp_path / "c.json", world, tmp_path / "run", tmp_path / "cache", windows=1)
    first = ok(script("train_stage1.py", "--config", other, "--steps", 1, "--samples", 0))
    again = ok(script("train_stage1.py", "--config", other, "--steps", 1, "--samples", 0, "--name", "b"))
    assert "encod" not in again.stderr and len(list((tmp_path / "cache").iterdir())) == 1
    assert "features:" in first.stderr and "features:" not in again.stderr
