"""The real stage scripts, end to end on the small models: what trains, what does not, resume, pictures."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE, CLAP, ROOT, interrupt_sweep, ok, script, write_config
from PIL import Image
from safetensors.torch import load_file

import evaluate
from clap2diffusion.base.tensor_file import read_tensors, unflatten, write_tensors
from clap2diffusion.dataset.cache import build_features
from clap2diffusion.dataset.dataset import AudioImageDataset
from clap2diffusion.dataset.decoding import load_waveform
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.pictures.generation import embed

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
                "min": {"min_snr_gamma"}, "windows": {"windows"}, "appended": set(), "no-lora": {"lora_rank"},
                "no-whiten": {"whiten"}, "ema": {"ema_decay"}, "pinned": {"strength"}}
    configs = [path
               for path in (ROOT / "ablations").glob("*.json") if path.stem not in ("default", "results")]
    assert len(configs) == 14
    for path in configs:
        asked = expected.get(path.stem, expected.get(path.stem.split("-")[0]))
        assert differing(flat(path), default) <= asked, path
        assert path.stem == "appended" or differing(flat(path), default), path


def test_the_config_for_real_data_is_not_thin():
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
        ok(script(f"train_stage{stage}.py", "--config", "configs/sd15_long.json", "--dry-run"))
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
    assert "fp32 autocast" in done.stdout
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
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the sound raises the loss: tanh(gate) " in done.stderr.strip().splitlines()[-1]
    assert (tmp_path / "stage3/sweep.png").exists() and not (tmp_path / "stage3/result.json").exists()
    assert script(*command).returncode == 1  # and says so again, without training on


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
