"""The adapter, the gate, the export and a step's mechanics against independent computations."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BASE, CLAP
from diffusers import (
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

import common
import train_stage1
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.statistics import interval
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.pictures import pipelines
from clap2diffusion.pictures.pipelines import check_export, write_adapter


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(BASE, subfolder="unet").eval().requires_grad_(False)


def inputs(unet, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    width, size, channels = unet.config.cross_attention_dim, unet.config.sample_size, unet.config.in_channels
    return {"noisy_latents": torch.randn(batch, channels, size, size, generator=generator),
            "timesteps": torch.tensor([700, 30][:batch]),
            "text_tokens": torch.randn(batch, 7, width, generator=generator),
            "audio_embeds": torch.nn.functional.normalize(torch.randn(batch, 512, generator=generator),
                                                          dim=-1)}


def adapter(unet, strength: float, num_tokens: int = 8):
    """A copy of the UNet with an untrained adapter whose audio K and V are moved away from the text's."""
    torch.manual_seed(1)
    unet = copy.deepcopy(unet)
    audio_proj = common.AudioProjectionMLP(512, unet.config.cross_attention_dim, num_tokens)
    audio_attn = common.AudioAttentionAdapter(unet, strength)
    for linear in [*audio_attn.to_k, *audio_attn.to_v]:
        linear.weight.data += 0.05 * torch.randn_like(linear.weight)
    audio_attn.attach(unet)
    return unet, audio_proj, audio_attn


def add_moved_lora(unet, rank: int = 8, size: float = 0.02) -> None:
    """LoRA as stage 2 adds it, on a UNet in eval mode. B begins at 0, where LoRA does nothing and no test
    could tell whether it is there; here it is random."""
    common.add_lora(unet, rank, 4.0 * rank, 0.1)
    unet.eval()
    for name, p in unet.named_parameters():
        if ".lora_B." in name:
            p.data += size * torch.randn_like(p)


def merge_lora(unet, adapter_path, weight: float = 1.0) -> None:
    """Add the LoRA of an exported file to a plain UNet's own weights, by hand."""
    tensors = load_file(adapter_path)
    for i, name in enumerate(unet.attn_processors):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        for key, linear in (("to_q", attn.to_q), ("to_k", attn.to_k), ("to_v", attn.to_v),
                            ("to_out", attn.to_out[0])):
            up, down = (tensors[f"ip_adapter.{i}.{key}_lora.{half}.weight"] for half in ("up", "down"))
            linear.weight.data += weight * up @ down


@torch.inference_mode()
def stock_forward(pipe, batch) -> torch.Tensor:
    """What a stock pipeline's UNet predicts, as the pipeline calls it; in float32."""
    dtype, embeds = pipe.unet.dtype, batch["audio_embeds"][:, None]
    return pipe.unet(batch["noisy_latents"].to(dtype), batch["timesteps"], batch["text_tokens"].to(dtype),
                     added_cond_kwargs={"image_embeds": [embeds.to(dtype)]}).sample.float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two predictions, which are about 1 in size."""
    return float((a - b).abs().max())


def forward(unet, audio_proj, batch) -> torch.Tensor:
    with torch.inference_mode():
        tokens = audio_proj(batch["audio_embeds"])
        return unet(batch["noisy_latents"], batch["timesteps"], (batch["text_tokens"], tokens)).sample


def test_gate_zero_is_the_base_model_bit_for_bit(unet):
    batch = inputs(unet)
    with torch.inference_mode():
        base = unet(batch["noisy_latents"], batch["timesteps"], batch["text_tokens"]).sample
    ours, audio_proj, audio_attn = adapter(unet, 0.0)
    assert torch.equal(forward(ours, audio_proj, batch), base)
    audio_attn.set_strength(0.1)
    assert not torch.equal(forward(ours, audio_proj, batch), base)


def test_gate_has_a_gradient_at_zero(unet):
    batch = inputs(unet)
    ours, audio_proj, audio_attn = adapter(unet, 0.0)
    tokens = audio_proj(batch["audio_embeds"])
    ours(batch["noisy_latents"], batch["timesteps"],
         (batch["text_tokens"], tokens)).sample.square().mean().backward()
    assert audio_attn.gate.grad.abs() > 0


def test_attention_is_text_plus_tanh_gate_times_audio_in_float64(unet):
    """One cross-attention, written out by hand with NumPy in float64."""
    ours, audio_proj, audio_attn = adapter(unet, 0.4)
    name, attn = next(iter(common.cross_attentions(ours).items()))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 5, attn.to_q.in_features, generator=generator)
    text, audio = (torch.randn(1, n, attn.to_k.in_features, generator=generator) for n in (7, 8))
    with torch.inference_mode():
        got = attn(x, encoder_hidden_states=(text, audio))[0].double().numpy()

    def attend(keys, key_weight, value_weight):
        q, k, v = (a[0].double().numpy() @ w.double().numpy().T for a, w in
                   ((x, attn.to_q.weight), (keys, key_weight), (keys, value_weight)))
        width = q.shape[1] // attn.heads
        out = []
        for h in range(attn.heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        return np.concatenate(out, axis=1)

    mixed = attend(text, attn.to_k.weight, attn.to_v.weight) + 0.4 * attend(
        audio, audio_attn.to_k[0].weight.detach(), audio_attn.to_v[0].weight.detach())
    expected = mixed @ attn.to_out[0].weight.double().numpy().T + attn.to_out[0].bias.double().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_projection_equals_float64_and_has_clip_sized_tokens():
    torch.manual_seed(0)
    audio_proj = common.AudioProjectionMLP(16, 24, 3)
    x = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    w0, b0, w1, b1 = (p.detach().double() for p in audio_proj.proj.parameters())
    h = x.double() * 4 @ w0.T + b0
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    y = (h @ w1.T + b1).view(2, 3, 24)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(audio_proj(x).double(), y, atol=1e-5, rtol=1e-5)
    assert audio_proj(x).norm(dim=-1).mean().item() == pytest.approx(math.sqrt(24), rel=0.02)
    with pytest.raises(ValueError, match="audio_embeds are 7 wide, the adapter expects 16"):
        audio_proj(torch.zeros(1, 7))


HEADER = {"stage": "stage2", "step": 1, "base_model": "", "clap_model": "", "fingerprints": {}, "dims": {},
          "settings": {"image_size": 64}}


def checked(path, unet, weights, batch) -> float:
    predict = functools.partial(train_stage1.predict, unet, weights["audio_proj"])
    return check_export(path, BASE, predict, weights, unet, batch)


LORA_COUNTS = 0.1  # without LoRA every prediction below is further off than this


@pytest.mark.parametrize("num_tokens", [1, 5, 8])
@pytest.mark.parametrize("pipeline", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline,
                                      StableDiffusionInpaintPipeline])
def test_export_equals_our_forward_in_stock_pipelines(unet, tmp_path, pipeline, num_tokens):
    batch = inputs(unet)
    ours, audio_proj, audio_attn = adapter(unet, 0.4, num_tokens)
    add_moved_lora(ours)
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, {"audio_proj": audio_proj, "audio_attn": audio_attn}, ours, HEADER)
    pipe = pipeline.from_pretrained(BASE, safety_checker=None, requires_safety_checker=False)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    expected = forward(ours, audio_proj, batch)
    assert apart(stock_forward(pipe, batch), expected) < 1e-4
    pipe.set_ip_adapter_scale(0.5)
    assert apart(stock_forward(pipe, batch), expected) > 1e-3  # it sees a change of the strength
    pipe.set_ip_adapter_scale(1.0)
    pipe.disable_lora()
    assert apart(stock_forward(pipe, batch), expected) > LORA_COUNTS


@pytest.mark.parametrize("broken", ["proj.0.weight", "to_v_ip", "lora.down", "lora.up"])
def test_check_export_fails_on_a_broken_file(unet, tmp_path, monkeypatch, broken):
    ours, audio_proj, audio_attn = adapter(unet, 0.4)
    add_moved_lora(ours, 4)
    path, layout = tmp_path / "adapter.safetensors", pipelines.stock_layout
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn}
    write_adapter(path, weights, ours, HEADER)
    assert checked(path, ours, weights, inputs(unet)) < 1e-4
    monkeypatch.setattr(pipelines, "stock_layout", lambda *a: {
        key: value * (1.5 if broken in key else 1) for key, value in layout(*a).items()})
    write_adapter(path, weights, ours, HEADER)
    with pytest.raises(RunFailed, match="differs from ours"):
        checked(path, ours, weights, inputs(unet))


def test_check_export_fails_on_a_file_without_the_lora(unet, tmp_path, monkeypatch):
    ours, audio_proj, audio_attn = adapter(unet, 0.4)
    add_moved_lora(ours)
    path, layout = tmp_path / "adapter.safetensors", pipelines.stock_layout
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn}
    monkeypatch.setattr(pipelines, "stock_layout", lambda *a: {
        key: value for key, value in layout(*a).items() if "_lora." not in key})
    write_adapter(path, weights, ours, HEADER)
    with pytest.raises(RunFailed, match="differs from ours"):
        checked(path, ours, weights, inputs(unet))


def test_export_with_a_unet_held_in_bf16_is_compared_with_the_base_in_float32(unet, tmp_path):
    ours, audio_proj, audio_attn = adapter(unet, 0.4)
    ours = ours.to(torch.bfloat16)
    add_moved_lora(ours)  # which stays float32, as in training
    path = tmp_path / "adapter.safetensors"
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn}
    write_adapter(path, weights, ours, HEADER)
    assert checked(path, ours, weights, inputs(unet)) < 1e-4
    ours = ours.float()
    with_lora = forward(ours, audio_proj, inputs(unet))
    ours.disable_adapters()
    assert apart(forward(ours, audio_proj, inputs(unet)), with_lora) > LORA_COUNTS


def test_a_fused_clap_is_told_that_no_clip_is_longer_than_its_window(tmp_path):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel
    torch.manual_seed(0)
    config = ClapConfig.from_pretrained(CLAP)
    config.audio_config.enable_fusion, config.audio_config.fusion_type = True, "aff_2d"
    ClapModel(config).save_pretrained(tmp_path)
    extractor = ClapFeatureExtractor.from_pretrained(CLAP, truncation="fusion")
    extractor.save_pretrained(tmp_path)
    encoder = CLAPAudioEncoder(tmp_path)
    wave = np.sin(np.arange(100_000) * 0.05).astype(np.float32)
    found = extractor([wave], sampling_rate=48000, return_tensors="pt")["input_features"]  # (1, 4, T, mels)
    with torch.inference_mode():
        right, wrong = (F.normalize(encoder.model(input_features=found, is_longer=torch.tensor([[longer]])
                                                  ).audio_embeds, dim=-1) for longer in (False, True))
    torch.testing.assert_close(encoder([wave]), right, atol=1e-5, rtol=1e-4)
    assert (encoder([wave]) - wrong).abs().max() > 1e-4  # what the extractor alone gives of a single clip


def test_clap_embeddings_are_unit_length_repeatable_and_equal_transformers_own():
    from transformers import ClapFeatureExtractor, ClapModel
    encoder = CLAPAudioEncoder(CLAP)
    n = encoder.extractor.nb_max_samples
    waves = [np.sin(np.arange(n // k) * 0.05 * k).astype(np.float32) for k in (1, 3)]
    embeds = encoder(waves)
    model, extractor = ClapModel.from_pretrained(CLAP).eval(), ClapFeatureExtractor.from_pretrained(CLAP)
    with torch.inference_mode():
        features = extractor(waves, sampling_rate=encoder.sampling_rate,
                             return_tensors="pt")["input_features"]
        expected = torch.nn.functional.normalize(model.get_audio_features(features).pooler_output, dim=-1)
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder(waves), embeds) and torch.allclose(embeds.norm(dim=-1), torch.ones(2))
    for bad in (np.zeros((2, n), np.float32), np.zeros(0, np.float32), np.zeros(n + 1, np.float32),
                np.full(n, np.nan, np.float32)):
        with pytest.raises(ValueError, match="waveform"):
            encoder([bad])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_and_target_equal_float64(kind):
    scheduler = DDPMScheduler.from_pretrained(BASE, subfolder="scheduler", prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    latents, noise, pred = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    timesteps = torch.tensor([1, 500, 999])
    alphas = scheduler.alphas_cumprod.double().numpy()[timesteps.numpy()].reshape(3, 1, 1, 1)
    target = noise.double().numpy()
    if kind == "v_prediction":
        target = np.sqrt(alphas) * noise.double().numpy() - np.sqrt(1 - alphas) * latents.double().numpy()
    pred = pred.to(torch.bfloat16)  # what autocast hands over
    expected = ((pred.double().numpy() - target) ** 2).reshape(3, -1).mean(1)
    got = common.mse_per_sample(pred, common.diffusion_target(scheduler, latents, noise, timesteps))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_conditions_are_dropped_by_sample_in_the_asked_shares():
    n = 20000
    text, audio, empty = torch.ones(n, 1, 1), torch.ones(n, 2), torch.full((1, 1), 7.0)
    text, audio = common.drop_conditions(text, audio, empty, 0.5, 0.05, 0.1, common.Draws(0))
    no_text, no_audio = text[:, 0, 0] == 7, audio[:, 0] == 0
    shares = [float((a & b).float().mean()) for a, b in
              ((no_text, ~no_audio), (~no_text, no_audio), (no_text, no_audio), (~no_text, ~no_audio))]
    np.testing.assert_allclose(shares, [0.5, 0.05, 0.1, 0.35], atol=0.012)


def test_randomness_depends_on_the_key_alone():
    a = common.Draws(3, 17, 0).normal(4)
    torch.randn(99)
    assert torch.equal(a, common.Draws(3, 17, 0).normal(4))
    for key in ((3, 18, 0), (4, 17, 0), (3, 17, 1)):
        assert not torch.equal(a, common.Draws(*key).normal(4))


def test_latents_are_drawn_from_the_cached_posterior():
    batch = {"latents_mean": torch.tensor([[1.0, -1.0]]).expand(4000, 2).reshape(4000, 2, 1, 1, 1),
             "latents_std": torch.full((4000, 2, 1, 1, 1), 0.1)}
    latents = common.draw_latents(batch, common.Draws(0)).flatten()
    assert (latents > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)  # mirrored or not, by halves
    assert latents[latents > 0].std().item() == pytest.approx(0.1, abs=0.005)


def test_other_is_never_the_same_recording_and_shares_no_label_if_it_can_be():
    labels, embeds = ["dog", "dog+fire", "rain", "dog", "fire"], torch.eye(5)
    embeds[3] = embeds[0]  # the same recording under another name
    for seed in range(20):
        others = common.other_sounds(labels, embeds, seed)
        assert others[0] in (2, 4) and others[1] == 2 and others[2] in (0, 1, 3, 4) and others[3] in (2, 4)
    assert common.other_sounds(["x", "x", "x"], embeds[[0, 3, 2]], 0)[:2] == [2, 2]
    with pytest.raises(UserError, match="one recording only"):
        common.other_sounds(["x", "y"], embeds[[0, 3]], 0)


def test_whitening_makes_faint_directions_as_loud_as_strong_ones():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    spread = torch.tensor([10.0] * 4 + [0.7] * 8 + [1e-4] * 4)  # classes, what else is heard, noise
    x = (torch.randn(5000, 16) * spread) @ rotation + 3.0
    proj = common.AudioProjectionMLP(16, 8, 2)
    before = proj.proj[0].weight.detach().clone()
    proj.whiten(x / 4)  # / sqrt(16), which forward multiplies by
    first = proj.proj[0].weight.detach().double() / proj.NEAR_LINEAR
    folded = torch.linalg.lstsq(before.double(), first).solution  # (16, 16): the whitening
    variances = torch.cov(((x.double() - x.double().mean(0)) @ folded.T @ rotation.double().T).T).diagonal()
    covariance = torch.cov(x.double().T)
    values = torch.linalg.eigvalsh(covariance)
    expected = (spread.double() ** 2 / (spread.double() ** 2 + 0.1 * values.mean())) ** 2
    assert variances.numpy() == pytest.approx((expected * 16 / expected.sum()).numpy(), rel=0.1, abs=1e-5)
    hidden = proj.proj[0](x).detach() / proj.NEAR_LINEAR
    assert not proj.proj[0].weight.requires_grad and not proj.proj[0].bias.requires_grad
    # as torch's own start
    assert abs(hidden.mean(0)).max() < 0.3 and hidden.std() == pytest.approx(3 ** -0.5, rel=0.2)


@pytest.mark.parametrize("n", (58, 2000))
@pytest.mark.parametrize("power", (1, 2))
def test_a_whitening_amplifies_nothing_that_training_never_saw(n, power):
    """A cone of sounds with a power-law spectrum, as CLAP's: hidden activations of held-out sounds."""
    torch.manual_seed(0)
    directions, axis = torch.linalg.qr(torch.randn(512, 512))[0], F.normalize(torch.randn(512), dim=0)
    spectrum = torch.arange(1, 513).double().pow(-power).sqrt()
    faint = torch.randn(n + 500, 512).double() * spectrum @ directions.double().T
    x = F.normalize(0.8 * F.normalize(faint, dim=1).float() + axis, dim=1)
    proj = common.AudioProjectionMLP(512, 8, 2)
    proj.whiten(torch.cat([x[:n], torch.zeros(n, 512)]))  # as many silent clips, which are no sounds
    norms = proj.proj[0](x * 512 ** 0.5).norm(dim=1)
    assert 0.5 < (norms[n:].mean() / norms[:n].mean()).item() < 1.3
    centre = proj.proj[0](x[:n] * 512 ** 0.5).mean(0)
    assert centre.abs().max() < 0.3 * norms[:n].mean() / 32  # the sounds', not the zeros'


@pytest.mark.parametrize("what, sounds", [
    ("one row", lambda x: x[:1]), ("all silent", lambda x: 0 * x), ("all but one silent", lambda x: x * (
        torch.arange(len(x)) == 3)[:, None]), ("all equal", lambda x: x[:1].expand(len(x), -1)),
    ("equal but for rounding", lambda x: F.normalize(x[:1] + 1e-7 * x, dim=1)),
    ("hardly to be told apart", lambda x: F.normalize(x[:1] + 5e-3 * x, dim=1)),
    ("two that differ", lambda x: x[:2]), ("all equal but one", lambda x: torch.cat([x[:1].expand(99, -1),
                                                                                    x[1:2]])),
])
def test_weights_stay_small_where_the_sounds_are_degenerate(what, sounds, capsys):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(100, 512), dim=1)
    proj = common.AudioProjectionMLP(512, 8, 2)
    proj.whiten(sounds(x))
    first = proj.proj[0]
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in (first.weight, first.bias))
    hidden = first(sounds(x) * 512 ** 0.5)
    assert hidden.abs().max() < 10 and proj(sounds(x)).isfinite().all()
    alike = what not in ("two that differ", "all equal but one")
    assert ("the adapter is not whitened" in capsys.readouterr().err) == alike
    assert not first.weight.requires_grad


def test_the_help_says_what_an_ema_decay_comes_to():
    import train_stage2
    parameter = torch.nn.Parameter(torch.ones(1))
    said = f"0.9999 is {common.make_ema([parameter], 0.9999).get_decay(7000):.4f} at step 7,000"
    assert said == "0.9999 is 0.9987 at step 7,000"
    assert said in " ".join(train_stage2.build_parser().format_help().split())


def test_timesteps_are_even_but_for_the_share_asked_for():
    from diffusers import DDPMScheduler
    draws = common.Draws(0)
    even = common.draw_timesteps(DDPMScheduler(), 20000, 0.0, draws)
    half = common.draw_timesteps(DDPMScheduler(), 20000, 0.5, draws)
    assert even.min() == 0 and even.max() == 999
    assert (even >= 800).float().mean() == pytest.approx(0.2, abs=0.01)
    assert half.min() == 0 and half.max() == 999
    assert (half >= 800).float().mean() == pytest.approx(0.6, abs=0.01)


class SortedClips:
    """A validation split sorted by class: 20 classes of 30 clips, each embedding names its class."""
    rows = [{"label": f"class {i // 30}"} for i in range(600)]
    empty_text_embeds = torch.zeros(4, 8)

    def __getitem__(self, i: int) -> dict:
        noise = torch.randn(24, generator=torch.Generator().manual_seed(i))
        embeds = F.normalize(torch.eye(24)[i // 30] + 0.1 * noise, dim=0)
        return {"audio_embeds": embeds[None], "latents_mean": torch.zeros(1, 2, 4, 4)}


def test_validation_takes_clips_of_all_labels_and_tells_losses_by_quarter():
    from diffusers import DDPMScheduler
    scheduler, heard, drawn = DDPMScheduler(), [], []

    def predict(noisy_latents, timesteps, text_tokens, audio_embeds):
        """Wrong by t / 1000 with a sound, by 1 without."""
        noise = noisy_latents / (1 - scheduler.alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
        if audio_embeds.any():
            heard.append(audio_embeds[:, :20].argmax(1))
            drawn.append(timesteps)
            return noise + timesteps[:, None, None, None] / 1000
        return noise + 1
    cfg = argparse.Namespace(val_clips=20, val_draws=4, val_batch_size=50, seed=0)
    result = common.validate(predict, SortedClips(), scheduler, torch.device("cpu"), nullcontext, cfg)
    assert len(heard) == 8 and sorted(heard[0].tolist()) == [*range(20)]  # its first 20 are of one class
    squares = torch.stack(drawn[::2], 1).double() ** 2 / 1e6  # (20, 4): the right sound's, by draw
    assert [row[0] for row in result["val_right_by_quarter"]] == pytest.approx(
        squares.mean(0).tolist(), rel=1e-3)
    assert result["val_right"][0] == pytest.approx(squares.mean().item(), rel=1e-3)
    assert result["val_right_noisy"][0] == pytest.approx(squares[:, 2:].mean().item(), rel=1e-3)
    assert [row[0] for row in result["silence_minus_right_by_quarter"]] == pytest.approx(
        (1 - squares).mean(0).tolist(), rel=1e-3)
    assert [row[0] for row in result["other_minus_right_by_quarter"]] == pytest.approx([0] * 4, abs=1e-5)
    low, high = interval(squares[:, 2:].mean(1).numpy())[1:]
    assert result["val_right_noisy"][1:] == pytest.approx([low, high], rel=1e-3)
    cfg.val_draws = 1  # anywhere: some clips in each quarter
    one = common.validate(predict, SortedClips(), scheduler, torch.device("cpu"), nullcontext, cfg)
    assert one["val_right_by_quarter"][0][0] < 0.0625 < 0.5625 < one["val_right_by_quarter"][3][0]


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_min_snr_weights_are_the_papers(prediction):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps).double()
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    weights = common.min_snr_weights(scheduler, timesteps, 5.0)
    assert weights.double().numpy() == pytest.approx(expected.numpy(), rel=1e-4)
    assert (common.min_snr_weights(scheduler, timesteps, 0.0) == 1).all()


def test_three_steps_that_are_not_finite_end_the_run():
    class Log:
        folder, lines = "run", []

        def text(self, line):
            self.lines.append(line)

    check = common.FiniteCheck(Log(), lambda step: [f"sound of step {step}"])
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    assert check(0, one, one) and not check(1, nan, one) and check(2, one, torch.tensor(200.0))
    assert "samples sound of step 1" in Log.lines[0] and "200" in Log.lines[1]
    assert not check(3, one, nan) and not check(4, one, nan)
    with pytest.raises(RunFailed, match="steps 3 to 5"):
        check(5, one, torch.tensor(float("inf")))


@pytest.mark.parametrize("name",
                         ["train_stage1.adapter_loss", "train_stage2.adapter_loss", "train_stage3.gate_loss"])
def test_a_stages_loss_is_the_error_of_the_predicted_noise(name):
    """Called as a benchmark would: the model is a function, and every other caption and sound is dropped."""
    module, function = name.split(".")
    generator, seen = torch.Generator().manual_seed(0), {}
    scheduler = DDPMScheduler()
    batch = {"latents_mean": torch.randn(6, 1, 4, 8, 8, generator=generator),
             "latents_std": torch.zeros(6, 1, 4, 8, 8), "text_embeds": torch.ones(6, 7, 16),
             "audio_embeds": torch.ones(6, 1, 10)}

    def model(noisy_latents, timesteps, text_tokens, audio_embeds):
        seen.update(noisy=noisy_latents, timesteps=timesteps, text=text_tokens, audio=audio_embeds)
        return torch.full_like(noisy_latents, 0.5)
    cfg = argparse.Namespace(high_noise_share=0.0, min_snr_gamma=0.0, caption_drop=0.5, audio_drop=0.0,
                             both_drop=0.5)
    loss = getattr(importlib.import_module(module), function)
    found = loss(batch, common.Draws(0), model, scheduler, torch.zeros(7, 16), cfg, torch.device("cpu"),
                 nullcontext)
    alphas = scheduler.alphas_cumprod[seen["timesteps"]].double().view(6, 1, 1, 1)
    noise = (seen["noisy"] - alphas.sqrt() * batch["latents_mean"][:, 0]) / (1 - alphas).sqrt()
    assert abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    assert found.item() == pytest.approx(((noise - 0.5) ** 2).mean().item(), rel=1e-3)
    assert not seen["text"].any() and 0 < seen["audio"].mean() < 1
