"""The proof that stock diffusers predicts what a stage trains, before its first step and at its end."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE, ROOT, ok, script
from diffusers import UNet2DConditionModel
from test_models import HEADER, adapter, inputs

import common
import train_stage1
from clap2diffusion.base.device import hold_unet
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.pictures import pipelines
from clap2diffusion.pictures.inputs import find_adapter
from clap2diffusion.pictures.pipelines import check_export, rehearse_export, write_adapter

FOLD = "fold it into stock_layout() in clap2diffusion/pictures/pipelines.py, as tanh(gate) is folded"


class Stage:
    """What stage 2 holds before its first step: LoRA's B is 0, the adapter is as stage 1 may have left it."""

    def __init__(self, folder: Path, held: str = "fp32"):
        dtype = torch.float32 if held == "fp32" else torch.bfloat16
        unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=dtype)
        self.unet, self.audio_proj, self.audio_attn = adapter(unet.eval().requires_grad_(False), 0.4)
        self.audio_attn.gate.requires_grad_(False)
        hold_unet(self.unet, argparse.Namespace(frozen_dtype=held, checkpointing="none", channels_last=False,
                                                compile=False))
        self.lora = common.add_lora(self.unet, 4, 8.0, 0.1)
        self.weights = {"audio_proj": self.audio_proj, "audio_attn": self.audio_attn, "lora": self.lora}
        self.forward = functools.partial(train_stage1.predict, self.unet, self.audio_proj)
        self.folder, self.batch = folder, inputs(self.unet)

    def rehearse(self) -> float:
        return rehearse_export(self.folder, BASE, self.forward, self.weights, self.unet, HEADER,
                               common.trainable_parameters(self.weights), self.batch)

    def check_unmoved(self) -> float:
        path = self.folder / "adapter.safetensors"
        write_adapter(path, self.weights, self.unet, HEADER)
        return check_export(path, BASE, self.forward, self.weights, self.unet, self.batch)

    def state(self) -> list:
        """Bits, types and places of all weights, the modes of all modules, torch's generator."""
        modules = (self.unet, self.audio_proj, self.audio_attn)
        named = {(i, name): p for i, part in enumerate(modules) for name, p in part.named_parameters()}
        return [{key: p.detach().clone().view(torch.uint8) if p.ndim else float(p)
                 for key, p in named.items()},
                {key: (p.dtype, p.data_ptr(), p.requires_grad) for key, p in named.items()},
                [module.training for part in modules for module in part.modules()], torch.get_rng_state()]


@pytest.mark.parametrize("held, training", [("fp32", True), ("bf16", False), ("nf4", True)])
def test_the_rehearsal_finds_no_difference_and_changes_nothing(held, training, tmp_path):
    stage = Stage(tmp_path, held)
    stage.unet.train(training)
    (bits, places, modes, random), difference = stage.state(), stage.rehearse()
    bits_after, places_after, modes_after, random_after = stage.state()
    assert difference < 1e-5 and not list(tmp_path.iterdir())
    assert places == places_after and modes == modes_after and torch.equal(random, random_after)
    assert bits.keys() == bits_after.keys() and len(bits) > 200
    for key, value in bits.items():
        assert value == bits_after[key] if isinstance(value, float) else torch.equal(value, bits_after[key])


# --- parts that an export may not know: each begins where it does nothing -----------------------------------

class Scaled(torch.nn.Linear):
    """An audio V times a factor that trains."""
    factor: torch.nn.Parameter

    def forward(self, x):
        return super().forward(x) * self.factor


def a_factor_a_layer(stage) -> str:
    for linear in stage.audio_attn.to_v:
        linear.__class__, linear.factor = Scaled, torch.nn.Parameter(torch.ones(()))
    return "audio_attn.to_v.0.factor, audio_attn.to_v.1.factor, audio_attn.to_v.2.factor and "


def a_bias_on_one_value(stage) -> str:
    linear = stage.audio_attn.to_v[3]
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    return "audio_attn.to_v.3.bias;"


def a_factor_in_predict(stage) -> str:
    factor = torch.nn.ParameterDict({"tokens": torch.nn.Parameter(torch.ones(()))})
    stage.weights["factor"] = factor

    def predict(noisy_latents, timesteps, text_tokens, audio_embeds):
        audio_tokens = stage.audio_proj(audio_embeds) * factor["tokens"]
        return stage.unet(noisy_latents, timesteps, (text_tokens, audio_tokens)).sample
    stage.forward = predict
    return "factor.tokens;"


def a_weight_of_the_unet(stage) -> str:
    stage.weights["last"] = stage.unet.conv_out.requires_grad_()
    return "last.weight, last.bias;"


def a_lora_on_a_convolution(stage) -> str:
    conv, plain = stage.unet.conv_in, stage.unet.conv_in.forward
    up = torch.nn.Conv2d(conv.out_channels, conv.out_channels, 1, bias=False)
    torch.nn.init.zeros_(up.weight)
    stage.weights["conv_lora"] = up
    conv.forward = lambda x: plain(x) + up(plain(x).float()).to(x.dtype)
    return "conv_lora.weight;"




PARTS = [a_factor_a_layer, a_bias_on_one_value, a_factor_in_predict, a_weight_of_the_unet,
         a_lora_on_a_convolution]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_part_that_the_export_does_not_know_is_named_before_training(part, tmp_path):
    stage = Stage(tmp_path)
    names = part(stage)
    assert stage.check_unmoved() < 1e-4  # where it begins it does nothing, and the file is right
    with pytest.raises(RunFailed) as failure:
        stage.rehearse()
    said = str(failure.value)
    assert said.startswith(f"{tmp_path}: tried before training, with every weight that trains moved: ")
    assert f"nothing in the exported file depends on {names}" in said and FOLD in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]  # check_unmoved()'s own


def test_what_is_done_with_an_exported_weight_beside_is_found(tmp_path):
    stage = Stage(tmp_path)

    def predict(noisy_latents, timesteps, text_tokens, audio_embeds):
        audio_tokens = stage.audio_proj(audio_embeds) + stage.audio_proj.norm.bias
        return stage.unet(noisy_latents, timesteps, (text_tokens, audio_tokens)).sample
    stage.forward = predict
    assert stage.check_unmoved() < 1e-4  # the bias begins at 0
    with pytest.raises(RunFailed, match="every weight that trains is in the exported file, but not all "):
        stage.rehearse()


@pytest.mark.parametrize("lost", ["image_proj.proj.2.bias", "ip_adapter.7.to_out_lora"])
def test_a_tensor_that_the_export_leaves_at_its_beginning_is_found(lost, tmp_path, monkeypatch):
    stage, layout = Stage(tmp_path), pipelines.stock_layout
    begun = {key: value.detach().clone() for key, value in layout(stage.weights, stage.unet).items()}
    assert any(lost in key for key in begun)
    monkeypatch.setattr(pipelines, "stock_layout", lambda *a: {
        key: begun[key] if lost in key else value for key, value in layout(*a).items()})
    assert stage.check_unmoved() < 1e-4
    with pytest.raises(RunFailed, match="nothing in the exported file depends on (audio_proj|lora)[.]"):
        stage.rehearse()


# --- in a stage ---------------------------------------------------------------------------------------------

def changed(place: Path, *edits: tuple[str, str, str]) -> Path:
    """A copy of the project whose train_scalar.py is train_stage1.py, with (file, old, new) edited."""
    shutil.copytree(ROOT / "clap2diffusion", place / "clap2diffusion")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, place)
    shutil.copy(ROOT / "train_stage1.py", place / "train_scalar.py")
    for name, old, new in edits:
        text = (place / name).read_text()
        assert text.count(old) == 1, f"{name} no longer says {old}"
        (place / name).write_text(text.replace(old, new))
    return place / "train_scalar.py"


BEGIN = ("common.py", "copies.append(linear)\n",
         "copies.append(linear)\n        self.scale = nn.Parameter(torch.ones(len(self.to_v)))\n")
USE = ("common.py", "gate = torch.tanh(self.adapter.gate)",
       "gate = torch.tanh(self.adapter.gate * self.adapter.scale[self.index])")
EXPORT = ("clap2diffusion/pictures/pipelines.py", "to_v.weight * torch.tanh(audio_attn.gate)",
          "to_v.weight * torch.tanh(audio_attn.gate * audio_attn.scale[i])")


def test_a_changed_stage_fails_before_its_first_step_until_its_part_is_exported(config, tmp_path):
    command = ("--config", config, "--run", tmp_path / "run", "--steps", 2)
    done = script(changed(tmp_path / "a", BEGIN, USE), *command)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/run/scalar: tried before training, ") and FOLD in last
    assert "depends on audio_attn.scale;" in last
    assert "step 0:" not in done.stdout and not list(tmp_path.glob("run/scalar/**/*.safetensors"))
    with pytest.raises(UserError, match="holds no adapter.safetensors"):
        find_adapter(str(tmp_path / "run/scalar"))
    done = ok(script(changed(tmp_path / "b", BEGIN, USE, EXPORT), *command))
    assert "moved, stock diffusers predicts the same, largest difference" in done.stdout
    assert json.loads((tmp_path / "run/scalar/result.json").read_text())["stock_difference"] < 1e-4


def test_a_stage_whose_last_proof_fails_leaves_no_adapter(config, tmp_path):
    edit = ("train_scalar.py", "    run.folder.load_best(",
            "    run.forward = lambda *batch: 2 * forward(*batch)\n    run.folder.load_best(")
    folder = tmp_path / "run/scalar"
    done = script(changed(tmp_path / "a", edit), "--config", config, "--run", tmp_path / "run", "--steps", 2)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith(f"error: {folder}: no adapter was made, checkpoints stay: stock diffusers'"), last
    assert {path.name for path in folder.glob("**/*.safetensors")} == {
        "best.safetensors", "step-00000000.safetensors", "step-00000002.safetensors"}
    assert not (folder / "result.json").exists()
    with pytest.raises(UserError, match="holds no adapter.safetensors"):
        find_adapter(str(folder))


def test_what_the_optimizer_trains_and_no_checkpoint_would_keep_is_refused(config, tmp_path):
    ema = "    ema = common.make_ema(parameters, cfg.ema_decay)\n"
    edit = ("train_scalar.py", ema, ema + "    optimizer.add_param_group({'lr_scale': 1.0, 'params': ["
            "torch.nn.Parameter(torch.ones(7))]})\n")
    done = script(changed(tmp_path / "a", edit), "--config", config, "--run", tmp_path / "run", "--steps", 2)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no part of `weights` holds 1 of the tensors that the optimizer trains (shape (7,))" in last


def test_an_unproven_file_of_a_killed_run_is_removed(config, tmp_path):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / pipelines.UNPROVEN).write_bytes(b"cut")
    done = ok(script("train_stage1.py", "--config", config, "--run", tmp_path, "--steps", 1))
    assert f"{pipelines.UNPROVEN}: left by an interrupted save, removed" in done.stdout
    assert not (tmp_path / "stage1" / pipelines.UNPROVEN).exists()
