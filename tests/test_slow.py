"""Long proofs, run by `bash run_tests.sh -m slow`: every stage killed at random steps, and SD 1.5's real shapes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import interrupt_sweep, ok, script

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_killed_and_terminated_at_three_random_steps_each(stage, config, run, tmp_path):
    steps = random.Random(stage).sample(range(1, 10), 3)
    interrupt_sweep(steps, [signal.SIGTERM, signal.SIGKILL], stage, config, run, tmp_path)


def test_ablations_run_small(tmp_path):
    """The driver on the small world: a config's variant, clips of 8 s, the patched copy, stage 2 without LoRA, a gate; then once more."""
    from conftest import ROOT
    place, world = tmp_path / "copy", tmp_path / "world"
    ok(script("prepare_data.py", "world", "--out", world, "--train", 40, "--val", 20, "--test", 20))
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "cache", "__pycache__"))
    for path in (place / "ablations").glob("*.json"):
        if path.stem == "results":
            continue
        config = json.loads(path.read_text())
        config["common"] |= {"data_root": str(world), "batch_size": 4, "val_draws": 1}
        for stage in ("stage1", "stage2", "stage3"):
            config[stage] |= {"steps": 3}
        path.write_text(json.dumps(config))
    command = [sys.executable, "ablations/run.py", "--seeds", "0", "--clips", "20", "--only", "tokens-1", "windows-2",
               "appended", "no-lora", "gate-0"]
    for _ in range(2):
        done = ok(subprocess.run(command, cwd=place, capture_output=True, text=True))
    assert done.stdout.count("already complete") == 7
    results = json.loads((place / "ablations/results.json").read_text())
    assert list(results["variants"]) == ["tokens-1", "windows-2", "appended", "no-lora", "gate-0"]
    assert results["variants"]["gate-0"]["tanh_gate"] == [0.0]
    assert results["variants"]["tokens-1"]["measures"]["iis_cosine"]["difference"][0] != 0


def make_sd15(folder) -> None:
    """Stable Diffusion 1.5 and larger_clap's shapes from their published configs, with random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512)
    tokenizer = CLIPTokenizer(model_max_length=77).train_new_from_iterator(["a photo of a dog barking"], 400)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False
                            ).save_pretrained(folder / "base")
    audio = dict(spec_size=256, num_mel_bins=64, patch_embeds_hidden_size=128, hidden_size=1024, depths=[2, 2, 12, 2],
                 num_attention_heads=[4, 8, 16, 32], enable_fusion=False)
    ClapModel(ClapConfig(text_config=dict(num_hidden_layers=1), audio_config=audio, projection_dim=512)).save_pretrained(
        folder / "clap")
    ClapFeatureExtractor(feature_size=64, sampling_rate=48000, hop_length=480, max_length_s=10, fft_window_size=1024,
                         truncation="rand_trunc", padding="repeatpad", frequency_min=50, frequency_max=14000
                         ).save_pretrained(folder / "clap")
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_sd15_config_fits_the_real_shapes(world, tmp_path):
    """configs/sd15.json itself, with paths, sizes and step counts given as flags: two steps of each stage, 64 px."""
    make_sd15(tmp_path)
    flags = ["--config", "configs/sd15.json", "--run", tmp_path / "run", "--data-root", world, "--cache-dir",
             tmp_path / "cache", "--base-model", tmp_path / "base", "--clap-model", tmp_path / "clap", "--image-size", 64,
             "--batch-size", 1, "--steps", 2, "--val-clips", 2, "--val-draws", 1, "--samples", 1, "--workers", 0]
    for stage in (1, 2, 3):
        ok(script(f"train_stage{stage}.py", *flags))
        result = json.loads((tmp_path / f"run/stage{stage}/result.json").read_text())
        print(f"stage {stage}: peak memory {result['peak_memory_mb']['rss']:.0f} MB, {result['seconds']:.1f} s for 2 steps")
        assert result["steps"] == 2 and result["stock_difference"] < 1e-4
    from safetensors import safe_open
    with safe_open(tmp_path / "run/stage3/adapter.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    assert shapes["image_proj.proj.0.weight"] == [1024, 512] and shapes["image_proj.proj.2.weight"] == [8 * 768, 1024]
    assert sum("to_k_ip" in key for key in shapes) == 16 and shapes["ip_adapter.1.to_k_ip.weight"] == [320, 768]
    assert sum("to_q_lora.down" in key for key in shapes) == 32 and shapes["ip_adapter.0.to_q_lora.down.weight"] == [8, 320]
