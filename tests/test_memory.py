"""What saves memory changes nothing else: checkpointing, 4-bit weights, 8-bit Adam, EMA on the CPU."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import torch
from conftest import BASE, ok, script
from test_models import inputs

import common
from clap2diffusion.base.device import DTYPES, hold_unet
from clap2diffusion.base.tensor_file import read_tensors


def cfg(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"frozen_dtype": "fp32", "checkpointing": "none", "channels_last": False,
                                 "compile": False, **given})


def adapted(**given):
    """The small UNet with adapter and LoRA under memory settings, seeded, float32 unless asked otherwise."""
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    dtype = DTYPES[given.get("frozen_dtype", "fp32")]
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet",
                                                dtype=dtype).requires_grad_(False).eval()
    audio_attn = common.AudioAttentionAdapter(unet, 0.4)
    audio_attn.attach(unet)
    hold_unet(unet, cfg(**given))
    common.add_lora(unet, 4, 8.0, 0.0)
    lora = common.LoraWeights(unet)
    for name, p in lora.tensors.items():
        if ".lora_B." in name:
            p.data.normal_(0, 0.02)  # zeros would hide A's gradients
    return unet, audio_attn, lora


def gradients(unet, audio_attn, lora, batch, kept: list) -> list[torch.Tensor]:
    """Gradients of every trainable weight. `kept` gets the bytes that autograd saves for the backward."""
    def pack(x):
        kept.append(x.numel() * x.element_size())
        return x
    parameters = common.trainable_parameters({"audio_attn": audio_attn, "lora": lora})
    audio_tokens = torch.randn(2, 8, unet.config.cross_attention_dim,
                               generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        pred = unet(batch["noisy_latents"], batch["timesteps"], (batch["text_tokens"], audio_tokens)).sample
        loss = pred.square().mean()
    return list(torch.autograd.grad(loss, parameters))


def test_gradients_under_checkpointing_equal_those_without():
    kept, found = {}, {}
    for blocks in ("none", "down", "all"):
        unet, audio_attn, lora = adapted(checkpointing=blocks)
        kept[blocks] = []
        found[blocks] = gradients(unet, audio_attn, lora, inputs(unet, 2), kept[blocks])
    for blocks in ("down", "all"):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8)
                   for a, b in zip(found["none"], found[blocks], strict=True))
    sizes = {blocks: sum(sizes) for blocks, sizes in kept.items()}
    assert sizes["all"] < 0.5 * sizes["none"] and sizes["all"] < sizes["down"] < 0.9 * sizes["none"], sizes


def test_channels_last_changes_the_layout_and_not_the_numbers():
    plain, last = (adapted(channels_last=on) for on in (False, True))
    assert last[0].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    batch = inputs(plain[0], 2)
    for a, b in zip(gradients(*plain, batch, []), gradients(*last, batch, []), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-7)


# QLoRA (Dettmers et al. 2023), appendix E
NF4 = torch.tensor([-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0])


def test_four_bit_weights_are_the_plain_ones_rounded_to_qloras_sixteen_levels():
    import bitsandbytes
    unet, _, lora = adapted(frozen_dtype="nf4")
    plain = dict(adapted(frozen_dtype="bf16")[0].named_parameters())
    held = {name: module
            for name, module in unet.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len([name for name in held if "attn2.to_q" in name]) == len(common.cross_attentions(unet))
    for name, module in held.items():
        whole = bitsandbytes.functional.dequantize_4bit(module.weight.data,
                                                        module.weight.quant_state).float().reshape(-1, 64)
        own = plain[f"{name}.weight"].float().reshape(-1, 64)  # blocks of 64, each with its own scale
        scale = own.abs().amax(1, keepdim=True)
        nearest = NF4[(own / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)] * scale
        # the scales are held in 8 bits themselves
        assert ((whole - nearest).abs() < 0.05 * scale).float().mean() > 0.99, name
    assert all(p.dtype == torch.float32 and p.requires_grad for p in lora.tensors.values())


def test_four_bit_weights_pass_gradients_on_after_a_validation():
    """With AVX512-BF16, bitsandbytes packs a 4-bit weight in eval mode for a kernel without gradients."""
    parts = adapted(frozen_dtype="nf4")
    width, generator = parts[0].config.cross_attention_dim, torch.Generator().manual_seed(1)
    batch, tokens = inputs(parts[0], 2), torch.randn(2, 8, width, generator=generator)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        before = gradients(*parts, batch, [])
        parts[0].eval()
        with torch.inference_mode():
            parts[0](batch["noisy_latents"], batch["timesteps"], (batch["text_tokens"], tokens))
        after = gradients(*parts, batch, [])
    assert all(g.any() for g in before) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_settings_that_save_memory_work_together_and_resume_bit_for_bit(config, run, tmp_path):
    """Stage 2 with all of them runs unbroken, then again from its middle checkpoint in the same folder."""
    flags = ["--config", config, "--steps", 4, "--save-every", 2, "--validate-every", 4, "--samples", 0,
             "--workers", 0, "--init-from", run / "stage1", "--precision", "bf16", "--frozen-dtype", "nf4",
             "--checkpointing", "all", "--adam-8bit", "--ema-decay", 0.5, "--ema-on-cpu", "--channels-last",
             "--accumulation", 2, "--run", tmp_path]
    ok(script("train_stage2.py", *flags))
    folder = tmp_path / "stage2"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4 and result["stock_difference"] < 1e-4
    header, state = read_tensors(folder / "checkpoints/step-00000004.safetensors")
    moments = [t for name, t in state.items() if name.startswith("optimizer.") and t.dtype == torch.uint8]
    # of the large tensors; small ones stay in float32
    assert moments and sum(t.numel() for t in moments) > 1e6
    whole = read_tensors(folder / "final.safetensors")[1]
    shutil.copytree(folder, tmp_path / "kept")
    for name in ("result.json", "final.safetensors", "best.safetensors",
                 "checkpoints/step-00000004.safetensors"):
        (folder / name).unlink()
    shutil.copy(tmp_path / "kept/best.safetensors", folder / "best.safetensors")
    done = ok(script("train_stage2.py", *flags))
    assert "resuming at step 2" in done.stdout
    again = read_tensors(folder / "final.safetensors")[1]
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_growing_rank_changes_no_output_and_moves_nothing_asleep(config, run, tmp_path):
    ok(script("train_stage2.py", "--config", config, "--steps", 6, "--save-every", 1, "--keep", 9,
              "--validate-every", 0, "--samples", 0, "--workers", 0, "--init-from", run / "stage1",
              "--lora-rank", 8, "--rank-growth", 0, 2, 2, 4, 4, 8, "--weight-decay", 0.5, "--ema-decay", 0,
              "--run", tmp_path))
    active = {0: 2, 1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8}  # a checkpoint is saved before its step wakes ranks
    for step, rank in active.items():
        _, state = read_tensors(tmp_path / f"stage2/checkpoints/step-{step:08d}.safetensors")
        for name, tensor in state.items():
            if name.startswith("lora.") and ".lora_A." in name:
                assert not tensor[rank:].any() and tensor[:rank].any(1).all(), (step, name)
            elif name.startswith("lora.") and ".lora_B." in name:
                assert not tensor[:, rank:].any(), (step, name)
                assert step == 0 or step in (3, 5) or tensor[:, :rank].any(0).all(), (step, name)
    header, _ = read_tensors(tmp_path / "stage2/final.safetensors")
    assert header["dims"]["lora"][0] == 8
    unet, audio_attn, lora = adapted()
    batch, tokens = inputs(unet, 2), torch.randn(2, 8, unet.config.cross_attention_dim,
                                                 generator=torch.Generator().manual_seed(1))
    lora = common.LoraWeights(unet, active=2)
    for name, p in lora.tensors.items():
        if ".lora_B." in name:
            p.data[:, 2:] = 0
    outputs = []
    for grow in (False, True):
        if grow:
            lora.wake(4, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            outputs.append(unet(batch["noisy_latents"], batch["timesteps"],
                                (batch["text_tokens"], tokens)).sample)
    assert torch.equal(*outputs)
    assert all(p[2:].any() for name, p in lora.tensors.items() if ".lora_A." in name)


@pytest.mark.parametrize("stage, flags, words", [
    (3, ["--adam-8bit"], "one number"),
    (1, ["--frozen-dtype", "nf4", "--precision", "fp32"], "--precision bf16"),
    (2, ["--rank-growth", "0", "4", "9"], "pairs that rise"),
    (2, ["--rank-growth", "0", "4", "9", "2"], "pairs that rise")])
def test_settings_that_cannot_be_are_one_sentence(stage, flags, words, config, run, tmp_path):
    done = script(f"train_stage{stage}.py", "--config", config, "--run", tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_averages_on_the_cpu_are_the_same_averages():
    from diffusers.training_utils import EMAModel
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    ours, theirs = common.make_ema(parameters, 0.9), EMAModel(parameters, decay=0.9)
    for value in (1.0, 2.0, 4.0):
        parameters[0].data.fill_(value)
        common.step_ema(ours, parameters)
        theirs.step(parameters)
    assert torch.equal(ours.shadow_params[0], theirs.shadow_params[0]) and 0 < ours.shadow_params[0][0] < 4


@pytest.mark.slow
def test_a_compiled_unet_follows_the_plain_one(config, tmp_path):
    losses = {}
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        ok(script("train_stage1.py", "--config", config, "--run", tmp_path / name, "--steps", 5, "--samples",
                  0, "--precision", "fp32", flag))
        losses[name] = [json.loads(line)["loss"]
                        for line in (tmp_path / name / "stage1/log.jsonl").read_text().splitlines()
                        if '"loss"' in line]
    assert losses["compiled"][0] == pytest.approx(losses["plain"][0], rel=1e-5)
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)  # four Adam steps magnify rounding
