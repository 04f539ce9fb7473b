"""Models as the world has them: other containers, broken parts, other kinds, and what a hub answers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import BASE, CLAP, ENV, JUDGE, ROOT, ok, script, serving
from PIL import Image
from safetensors.torch import load_file, save_file

from clap2diffusion.base import hub
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.models import load_part
from clap2diffusion.dataset.captions import text_limit
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.judging.judge import Judge
from clap2diffusion.pictures.pipelines import load_base_pipeline

TEXT_SIDE = ("text_model.", "text_projection.", "logit_scale_")
CLASSES = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
           "text_encoder": transformers.CLIPTextModel, "": transformers.ClapAudioModelWithProjection}


def copied(source: Path, place: Path) -> Path:
    shutil.copytree(source, place / source.name)
    return place / source.name


def weights(folder: Path) -> Path:
    [path] = folder.glob("*.safetensors")
    return path


def rewritten(folder: Path, change) -> None:
    """The folder's safetensors file with change(tensors) in it."""
    path = weights(folder)
    save_file(change(load_file(path)), path)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- containers: the same tensors are the same model
def stem(folder: Path, kind: str) -> str:
    if "_class_name" in json.loads((folder / "config.json").read_text()):
        return "diffusion_pytorch_model"
    return "model" if kind == "safetensors" else "pytorch_model"


def as_bin(folder: Path, variant: str = "", old: bool = False) -> None:
    path = weights(folder)
    torch.save(OrderedDict(load_file(path)), folder / f"{stem(folder, 'bin')}{variant}.bin",
               _use_new_zipfile_serialization=not old)
    path.unlink()


def as_shards(folder: Path, variant: str = "", kind: str = "safetensors") -> None:
    path = weights(folder)
    tensors, name = load_file(path), stem(folder, kind)
    path.unlink()
    keys, placed = list(tensors), {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        shard = f"{name}{variant}-0000{i + 1}-of-00002.{kind}"
        content = {key: tensors[key] for key in part}
        (save_file if kind == "safetensors" else torch.save)(content, folder / shard)
        placed |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": placed}
    (folder / f"{name}.{kind}.index{variant}.json").write_text(json.dumps(index))


def under_another_order(folder: Path) -> None:
    """A .bin whose tensors are views: one storage for two, and one that is transposed."""
    path = weights(folder)
    tensors = load_file(path)
    a, b, other = [key for key, one in tensors.items() if one.dtype == torch.float32 and one.ndim > 1][:3]
    joined = torch.cat([tensors[a].flatten(), tensors[b].flatten()])
    tensors[a] = joined[:tensors[a].numel()].view(tensors[a].shape)
    tensors[b] = joined[tensors[a].numel():].view(tensors[b].shape)
    tensors[other] = tensors[other].transpose(0, 1).contiguous().transpose(0, 1)
    torch.save({key: torch.nn.Parameter(one, False) for key, one in tensors.items()},
               folder / f"{stem(folder, 'bin')}.bin")
    path.unlink()


CONTAINERS = {
    ".bin": as_bin, ".bin of torch before 1.6": lambda f: as_bin(f, old=True),
    "fp16 safetensors": lambda f: weights(f).rename(f / f"{stem(f, 'safetensors')}.fp16.safetensors"),
    "fp16 .bin": lambda f: as_bin(f, ".fp16"),
    "shards": as_shards, "fp16 shards": lambda f: as_shards(f, ".fp16"),
    ".bin shards": lambda f: as_shards(f, kind="bin"), "views and parameters": under_another_order}


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_tensors_in_another_container_are_found_loaded_and_the_same_model(part, container, tmp_path):
    source, what = (BASE, "base model") if part else (CLAP, "CLAP model")
    copy = copied(source, tmp_path)
    CONTAINERS[container](copy / part)
    assert hub.resolve_model(str(copy), what) == copy
    assert hub.fingerprint(copy / part) == hub.fingerprint(source / part)
    unread = () if part else TEXT_SIDE
    ours, expected = (load_part(CLASSES[part], folder, what, part, unread=unread).state_dict()
                      for folder in (copy, source))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in expected)


def test_half_the_bits_are_another_model_and_load_in_float32(tmp_path):
    copy = copied(BASE, tmp_path)
    rewritten(copy / "unet", lambda tensors: {key: one.half() for key, one in tensors.items()})
    weights(copy / "unet").rename(copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert hub.resolve_model(str(copy), "base model") == copy
    assert hub.fingerprint(copy / "unet") != hub.fingerprint(BASE / "unet")
    found, expected = (load_part(CLASSES["unet"], folder, "base model", "unet") for folder in (copy, BASE))
    assert torch.equal(found.conv_in.weight, expected.conv_in.weight.half().float())


def test_plain_weights_win_over_variants_and_a_copy_without_the_average_is_no_choice(tmp_path):
    copy = copied(BASE, tmp_path)
    path = weights(copy / "unet")
    other = {key: one + 1 for key, one in load_file(path).items()}
    for name in ("fp16.safetensors", "non_ema.safetensors"):
        save_file(other, path.with_name(f"diffusion_pytorch_model.{name}"))
    torch.save(other, path.with_name("diffusion_pytorch_model.bin"))
    assert hub.fingerprint(copy / "unet") == hub.fingerprint(BASE / "unet")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
                 "diffusion_pytorch_model.fp16.safetensors"):
        (copy / "unet" / name).unlink()
    with pytest.raises(UserError, match=r"holds diffusion_pytorch_model\.non_ema\.safetensors, the copy w"):
        hub.resolve_model(str(copy), "base model")


@pytest.mark.parametrize("change", [
    lambda f: rewritten(f, lambda tensors: {key: one + 1e-3 if key == "audio_projection.linear2.bias" else one
                                            for key, one in tensors.items()}),
    lambda f: edit(f / "preprocessor_config.json", hop_length=480),
    lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(
        '"window_size": 8', '"window_size": 4'))])
def test_other_content_is_another_model(change, tmp_path):
    copy = copied(CLAP, tmp_path)
    change(copy)
    assert hub.fingerprint(copy) != hub.fingerprint(CLAP)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_two_models_of_a_variant_alone_are_two_models(part, tmp_path):
    """For caches as well, whose names are made as they were before."""
    copy, names = copied(BASE, tmp_path) / part, set()
    weights(copy).rename(copy / f"{stem(copy, 'safetensors')}.fp16.safetensors")
    for _ in range(2):
        rewritten(copy, lambda tensors: {
            key: one * 2 if one.is_floating_point() else one for key, one in tensors.items()})
        names |= {hub.fingerprint(copy), hub.fingerprint_by_file(copy)}
    assert len(names) == 2


def test_a_clap_that_another_version_saved_is_the_same_clap(tmp_path):
    """Its extractor inside processor_config.json, the defaults written out, no text tower, more files."""
    copy = copied(CLAP, tmp_path)
    extractor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({
        "feature_extractor": {**extractor, "frequency_min": 50.0}, "processor_class": "ClapProcessor"}))
    (copy / "generation_config.json").write_text("{}")
    audio = json.loads((copy / "config.json").read_text())["audio_config"]
    del audio["enable_fusion"]
    edit(copy / "config.json", tie_word_embeddings=True, audio_config={**audio, "chunk_size_feed_forward": 0})
    rewritten(copy, lambda tensors: {key: one for key, one in tensors.items() if not key.startswith("text_")})
    assert hub.resolve_model(str(copy), "CLAP model") == copy
    assert hub.fingerprint(copy) == hub.fingerprint(CLAP)
    sound = np.random.default_rng(0).standard_normal(48000).astype(np.float32) / 9
    heard = [CLAPAudioEncoder(folder)([sound]) for folder in (copy, CLAP)]
    assert torch.allclose(*heard, rtol=0, atol=1e-6)  # the place of a tensor in memory changes last bits


def test_a_clap_without_what_follows_from_its_config_hears_the_same(tmp_path):
    copy = copied(CLAP, tmp_path)
    rewritten(copy, lambda tensors: {key: one for key, one in tensors.items() if not key.endswith(
        ("num_batches_tracked", "relative_position_index"))})
    assert hub.fingerprint(copy) == hub.fingerprint(CLAP)
    sound = np.random.default_rng(0).standard_normal(48000).astype(np.float32) / 9
    assert torch.equal(*(CLAPAudioEncoder(folder)([sound]) for folder in (copy, CLAP)))


def test_files_that_no_library_reads_are_not_part_of_a_model(tmp_path):
    copy = copied(BASE, tmp_path)
    for name in ("unet/notes.txt", "text_encoder/extra.json", "tokenizer/extra.json"):
        (copy / name).write_text("[1]")
    for part in ("unet", "text_encoder", "tokenizer"):
        assert hub.fingerprint(copy / part) == hub.fingerprint(BASE / part)
        assert len(hub.fingerprint_by_file(copy / part)) == 16


def test_a_change_inside_a_large_tensor_is_another_model(tmp_path):
    copy = copied(BASE, tmp_path)
    name = "embeddings.token_embedding.weight"

    def change(tensors):
        flat = tensors[name].flatten()
        flat[len(flat) // 7 * 3:len(flat) // 7 * 3 + 512] += 1
        return {**tensors, name: flat.view(tensors[name].shape)}
    rewritten(copy / "text_encoder", change)
    assert hub.fingerprint(copy / "text_encoder") != hub.fingerprint(BASE / "text_encoder")


def test_how_a_model_was_saved_is_not_part_of_its_name(tmp_path):
    copy = copied(CLAP, tmp_path)
    edit(copy / "config.json", transformers_version="4.27", torch_dtype="float32", architectures=["X"],
         _name_or_path="/elsewhere")
    for name in ("tokenizer.json", "tokenizer_config.json", "training.json"):
        (copy / name).unlink()
    rewritten(copy, lambda tensors: {key: one for key, one in tensors.items()
                                     if not key.endswith(("position_ids", "num_batches_tracked"))})
    assert hub.fingerprint(copy) == hub.fingerprint(CLAP)


def test_a_fingerprint_from_before_is_accepted_and_another_one_is_not(tmp_path):
    assert hub.fingerprint_by_file(CLAP) == "0ff699cfccf353d9"  # in every adapter made before
    assert hub.is_model("0ff699cfccf353d9", CLAP) and hub.is_model(hub.fingerprint(CLAP), CLAP)
    assert not hub.is_model("0ff699cfccf353d8", CLAP)
    models = hub.Models(BASE, CLAP, {"unet": hub.fingerprint(BASE / "unet"), "clap": hub.fingerprint(CLAP)})
    before = {"unet": "43887f577a991251", "clap": "0ff699cfccf353d9"}
    assert models.match(models.fingerprints) and models.match(before)
    assert models.match({**before, "clap": models.fingerprints["clap"]})
    assert not models.match({**before, "unet": "0" * 16}) and not models.match({})


# --- real models' files pass
def test_a_base_model_as_the_hub_has_stable_diffusion_1_5(tmp_path):
    """vocab.json and merges.txt alone; no prediction type; position_ids; text_model. before all names; a VAE
    with the names that diffusers gave its attention at first."""
    copy = copied(BASE, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE / "tokenizer")
    content = json.loads((copy / "tokenizer/tokenizer.json").read_text())
    merges = [" ".join(one) if isinstance(one, list) else one for one in content["model"]["merges"]]
    (copy / "tokenizer/vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (copy / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (copy / "tokenizer/tokenizer.json").unlink()
    scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                 "trained_betas": None, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
                 "skip_prk_steps": True}
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    edit(copy / "model_index.json", scheduler=["diffusers", "PNDMScheduler"],
         safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
         feature_extractor=["transformers", "CLIPImageProcessor"])
    rewritten(copy / "text_encoder", lambda tensors: {
        **{f"text_model.{key}": one for key, one in tensors.items()},
        "text_model.embeddings.position_ids": torch.arange(32)[None]})
    config = {**json.loads((BASE / "vae/config.json").read_text()), "mid_block_add_attention": True}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL.from_config(config)
    shutil.rmtree(copy / "vae")
    vae.save_pretrained(copy / "vae")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def first_names(tensors):
        renamed = {}
        for key, one in tensors.items():
            for new, old in names.items():
                key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            renamed[key] = one
        return renamed

    rewritten(copy / "vae", first_names)
    assert any("proj_attn" in key for key in load_file(weights(copy / "vae")))
    assert hub.resolve_model(str(copy), "base model") == copy
    pipe, plain = load_base_pipeline(copy), load_base_pipeline(BASE)
    assert torch.equal(pipe.vae.encoder.mid_block.attentions[0].to_q.weight,
                       vae.encoder.mid_block.attentions[0].to_q.weight)
    assert pipe.tokenizer("a dog barks").input_ids == tokenizer("a dog barks").input_ids
    ours, theirs = (p.encode_prompt("a dog barks", "cpu", 1, False)[0] for p in (pipe, plain))
    assert torch.equal(ours, theirs)


# --- what cannot be used, in one sentence
def fault(source: Path, change):
    def make(place: Path) -> Path:
        copy = copied(source, place)
        return change(copy) or copy
    return make


def drop(name: str):
    return lambda copy: (copy / name).unlink()


def write(name: str, content: bytes):
    return lambda copy: [(copy / name).write_bytes(content), None][1]


def config_of(name: str, **changes):
    return lambda copy: edit(copy / name, **changes)


def lora(copy: Path) -> Path:
    place = copy.parent / "lora"
    place.mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, place / "pytorch_lora_weights.safetensors")
    return place


def single(name: str):
    def make(copy: Path) -> Path:
        (copy.parent / name).write_bytes(b"PK\x03\x04")
        return copy.parent / name
    return make


def cut_old(copy: Path) -> None:
    as_bin(copy, old=True)
    path = copy / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def lost_shard(copy: Path) -> None:
    as_shards(copy / "unet")
    (copy / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def half_an_index(copy: Path) -> None:
    as_shards(copy / "unet")
    index = copy / "unet/diffusion_pytorch_model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={key: name for key, name in placed.items() if key != "conv_out.bias"})


def tokenizer_of(copy: Path, **model) -> None:
    path = copy / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    edit(path, model={**content["model"], **model})


def empty_merges(copy: Path) -> None:
    content = json.loads((copy / "tokenizer/tokenizer.json").read_text())
    (copy / "tokenizer/vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (copy / "tokenizer/tokenizer.json").unlink()


def numbered(copy: Path) -> None:
    as_bin(copy)
    path = copy / "pytorch_model.bin"
    torch.save(dict(enumerate(torch.load(path).values())), path)


def write_pickle(copy: Path) -> None:
    weights(copy).unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"a": np.zeros(3)}))


def more_tokens(copy: Path) -> None:
    path = copy / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 49407, "content": "<new>"})
    path.write_text(json.dumps(content))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 492265880\n"
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
ANOTHER_TYPE = "its files hold a value of another type than such a model's ("
FAULTS = {
    "another pipeline": (config_of("model_index.json", _class_name="StableDiffusionXLPipeline"),
                         "is a StableDiffusionXLPipeline; expected a Stable Diffusion 1.x or 2.x"),
    "a broken index": (write("model_index.json", b"{"), "model_index.json: not a JSON object"),
    "depth": (config_of(UNET, in_channels=5), "in_channels is 5, so this is a depth-to-image model"),
    "InstructPix2Pix": (config_of(UNET, in_channels=8), "in_channels is 8, so this is an InstructPix2Pix"),
    "upscaler": (config_of(UNET, in_channels=7), "in_channels is 7, so this is an upscaler"),
    "16 latent channels": (config_of(VAE, latent_channels=16), "in_channels is 4, the VAE's latents have 16"),
    "classes": (config_of(UNET, class_embed_type="projection"), "class_embed_type is 'projection', a UNet"),
    "image projection": (config_of(UNET, encoder_hid_dim_type="text_image_proj"),
                         "encoder_hid_dim_type is 'text_image_proj', a UNet that needs more than a text"),
    "a ControlNet": (config_of(UNET, _class_name="ControlNetModel"), "is of ControlNetModel; expected UNet"),
    "a tiny autoencoder": (config_of(VAE, _class_name="AutoencoderTiny"), "is of AutoencoderTiny; expected"),
    "T5": (config_of(TEXT, model_type="t5"), "is a 't5' model; expected CLIP's text encoder"),
    "another text encoder": (config_of(TEXT, hidden_size=96), "text embeddings are 96 wide, the UNet's"),
    "no betas": (lambda copy: (copy / SCHEDULER).write_text('{"_class_name": "EDMEulerScheduler"}') and None,
                 "EDMEulerScheduler without beta_start"),
    "predicts the sample": (config_of(SCHEDULER, prediction_type="sample"), "prediction_type is 'sample'"),
    "more tokens": (more_tokens, "has tokens up to number 49407, the text encoder knows 1073"),
    "a UNet of other widths": (config_of(UNET, block_out_channels=[48, 64, 128]),
                               "says block_out_channels.0 48; config and weights must be of one model"),
    "a LoRA": (lora, "holds a LoRA (pytorch_lora_weights.safetensors), which is no base model"),
    "one part alone": (lambda copy: copy / "unet", "holds one model alone (UNet2DConditionModel)"),
    "a .ckpt": (single("sd15.ckpt"),
                "sd15.ckpt is one file; expected a folder in diffusers' layout, which this makes: python -c"),
    "a single safetensors": (single("x.safetensors"), "x.safetensors is one file; expected a folder"),
    "a pointer of Git LFS": (write("unet/diffusion_pytorch_model.safetensors", LFS),
                             "is a pointer of Git LFS in place of the file; fetch it with: git lfs pull"),
    "an empty file": (write("vae/diffusion_pytorch_model.safetensors", b""), "is not a whole file of "),
    "a web page": (write("vae/diffusion_pytorch_model.safetensors", b"<!doctype html><html>" * 99),
                   "is not a whole file of weights"),
    "another name": (lambda copy: weights(copy / "unet").rename(copy / "unet/model.safetensors") and None,
                     "holds model.safetensors, a name that from_pretrained does not know; expected "),
    "Flax alone": (lambda copy: weights(copy / "text_encoder").rename(
        copy / "text_encoder/flax_model.msgpack") and None, "holds flax_model.msgpack, a name that"),
    "a link to nothing": (lambda copy: [weights(copy / "vae").unlink(), (
        copy / "vae/diffusion_pytorch_model.safetensors").symlink_to("/none/blob"), None][-1],
        "is a link to /none/blob, which is missing"),
    "a beta that is text": (config_of(SCHEDULER, beta_end="much"), "DDIMScheduler without beta_end"),
    "a shard missing": (lost_shard, "names diffusion_pytorch_model-00002-of-00002.safetensors, which is "
                        "missing (1 of 2 shards)"),
    "no weights": (drop("vae/diffusion_pytorch_model.safetensors"), "holds no weights (*.safetensors or "),
    "no tokenizer_config": (drop("tokenizer/tokenizer_config.json"), "tokenizer_config.json is missing"),
    "no scheduler named": (config_of("model_index.json", scheduler=None),
                           "model_index.json: scheduler is None; expected its library and class, such as"),
    "a scheduler of nothing": (config_of("model_index.json", scheduler=[None, None]),
                               "scheduler is [None, None]; expected its library and class"),
    "an unknown scheduler": (config_of("model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
                             "scheduler is ['diffusers', 'NoSuchScheduler']; expected its library and"),
    "a Unigram tokenizer": (lambda copy: tokenizer_of(copy, type="Unigram", vocab=[["a", 0.0]]),
                            "tokenizer.json: is a Unigram tokenizer; expected CLIP's, BPE"),
    "added tokens that are text": (config_of("tokenizer/tokenizer.json", added_tokens=["a"]), ANOTHER_TYPE),
    "no text config": (config_of(TEXT, text_config=None), ANOTHER_TYPE),
    "channels in a list": (config_of(UNET, in_channels=[4]), ANOTHER_TYPE),
    "classes in a list": (config_of(UNET, class_embed_type=[1]), ANOTHER_TYPE),
    "an added embedding in a list": (config_of(UNET, addition_embed_type=["text_time"]), ANOTHER_TYPE),
    "a vocabulary's size as text": (config_of(TEXT, vocab_size="1073"), ANOTHER_TYPE),
    "betas of no schedule": (config_of(SCHEDULER, beta_schedule="nonsense"), "'nonsense'; expected 0 < beta"),
    "betas below 0": (config_of(SCHEDULER, beta_start=-1), "betas from -1 to 0.012, 'scaled_linear'; expec"),
    "no noise steps": (config_of(SCHEDULER, num_train_timesteps=0), "num_train_timesteps is 0; expected a"),
    "noise steps as text": (config_of(SCHEDULER, num_train_timesteps="1000"), "steps is '1000'; expected a"),
    "a limit of text": (config_of("tokenizer/tokenizer_config.json", model_max_length="x"),
                        "tokenizer_config.json: model_max_length is 'x'; expected a number of tokens"),
    "a limit of 0": (config_of("tokenizer/tokenizer_config.json", model_max_length=0), "length is 0; expect"),
    "no merges": (lambda copy: tokenizer_of(copy, merges=[]), "tokenizer.json: holds no merges, so words wo"),
    "empty merges.txt": (empty_merges, "merges.txt: holds no merges, so words would be read as letters"),
    "an index of half the tensors": (half_an_index, "diffusion_pytorch_model.safetensors.index.json and its "
                                     "shards do not name the same tensors: 1 differ, first conv_out.bias"),
    "whole numbers for weights": (lambda copy: rewritten(copy / "unet", lambda tensors: {
        key: one.to(torch.int8) for key, one in tensors.items()}),
        "weights are whole numbers, first conv_in.weight of type I8; expected floating point"),
    "a VAE's foreign keys": (lambda copy: rewritten(copy / "vae", lambda tensors: {
        f"first_stage_model.{key}": one for key, one in tensors.items()}),
        "names that no VAE has: 136 of 136 tensors, first first_stage_model.decoder.conv_in.bias"),
}
CLAP_FAULTS = {
    "no preprocessor": (drop("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "another model": (config_of("config.json", model_type="wav2vec2"), "is a 'wav2vec2' model; expected a"),
    "an old file that is cut": (cut_old, "pytorch_model.bin is not a whole file of weights ("),
    "another model's extractor": (config_of("preprocessor_config.json",
                                            feature_extractor_type="Wav2Vec2FeatureExtractor"),
                                  "is of Wav2Vec2FeatureExtractor; expected ClapFeatureExtractor"),
    "an empty extractor": (write("preprocessor_config.json", b"{}"), "is of None; expected ClapFeature"),
    "a rate that is text": (config_of("preprocessor_config.json", sampling_rate="48000"), ANOTHER_TYPE),
    "a rate of 0": (config_of("preprocessor_config.json", sampling_rate=0), "sampling_rate is 0; expected a"),
    "tensors without names": (numbered, "its entry 0 is no tensor with a name"),
    "a pickle": (write_pickle, "pytorch_model.bin is not a whole file of weights (torch's reader of weights "
                 "alone refuses it); copy"),
    "one file": (single("clap.pt"), "clap.pt is one file; expected a folder such as that of laion/clap-hts"),
    "no patch embedding": (lambda copy: rewritten(copy, lambda tensors: {
        key: one for key, one in tensors.items() if "patch_embed.proj" not in key}),
        "holds no audio_model.audio_encoder.patch_embed.proj.weight, which every CLAP has"),
    "the authors' own format": (lambda copy: rewritten(copy, lambda tensors: {
        f"module.{key}": one for key, one in tensors.items()}), "names that no CLAP has: 140 of 140 tensors"),
}


@pytest.mark.parametrize("name", [*FAULTS, *CLAP_FAULTS])
def test_what_the_files_show_is_told_in_one_sentence(name, tmp_path):
    change, says = {**FAULTS, **CLAP_FAULTS}[name]
    source, what = (BASE, "base model") if name in FAULTS else (CLAP, "CLAP model")
    given = fault(source, change)(tmp_path)
    with pytest.raises(UserError) as error:
        hub.resolve_model(str(given), what)
    assert str(error.value).startswith(f"{what} '{given}': ") and says in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part, lost", [("unet", "mid_block.resnets.0.conv1.bias"),
                                        ("vae", "encoder.down_blocks.1.resnets.0.conv1.weight"),
                                        ("text_encoder", "encoder.layers.1.mlp.fc1.weight"),
                                        ("", "audio_projection.linear2.bias")])
def test_what_only_loading_shows_is_an_error_with_count_and_first_name(part, lost, tmp_path):
    source, what = (BASE, "base model") if part else (CLAP, "CLAP model")
    copy, unread = copied(source, tmp_path), () if part else TEXT_SIDE
    rewritten(copy / part, lambda tensors: {key: one for key, one in tensors.items() if key != lost})
    hub.resolve_model(str(copy), what)
    with pytest.raises(UserError, match=f"missing tensors: 1, first {lost}"):
        load_part(CLASSES[part], copy, what, part, unread=unread)
    whole = load_file(weights(source / part))
    place = weights(copy / part)
    save_file({**whole, f"{lost}.more": torch.zeros(1)}, place)
    with pytest.raises(UserError, match=f"unexpected tensors: 1, first {lost}.more"):
        load_part(CLASSES[part], copy, what, part, unread=unread)
    save_file({**whole, lost: torch.zeros(1)}, place)
    with pytest.raises(UserError, match=f"tensors of another size: 1, first {lost}"):
        load_part(CLASSES[part], copy, what, part, unread=unread)


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("factor, says", [(float("nan"), "tensors hold NaN or infinity, first "),
                                          (0, "all weights are 0; copy or download it again")])
def test_weights_without_content_are_not_trained_on(part, factor, says, tmp_path):
    source, what = (BASE, "base model") if part else (CLAP, "CLAP model")
    copy = copied(source, tmp_path)
    rewritten(copy / part, lambda tensors: {
        key: one * factor if one.is_floating_point() else one for key, one in tensors.items()})
    with pytest.raises(UserError, match=says):
        load_part(CLASSES[part], copy, what, part, unread=() if part else TEXT_SIDE)


@pytest.mark.parametrize("part, name, value", [("vae", "latent_channels", -4), ("vae", "norm_num_groups", 7),
                                               ("text_encoder", "hidden_act", 5),
                                               ("text_encoder", "num_attention_heads", "4")])
def test_what_a_library_raises_of_a_config_is_one_sentence(part, name, value, tmp_path):
    copy = copied(BASE, tmp_path)
    edit(copy / part / "config.json", **{name: value})
    with pytest.raises(UserError, match=f"base model .*: no {CLASSES[part].__name__} can be made of its fi"):
        load_part(CLASSES[part], copy, "base model", part)


def test_no_memory_left_is_no_fault_of_the_model():
    for kind in (MemoryError, torch.OutOfMemoryError):
        with pytest.raises(kind), hub.told(dict, "base model", BASE):
            raise kind("no memory")


def test_an_image_encoder_that_is_named_and_a_projection_that_nobody_reads_are_no_fault(tmp_path):
    copy = copied(BASE, tmp_path)
    edit(copy / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    edit(copy / "tokenizer/tokenizer_config.json", model_max_length=None)
    rewritten(copy / "text_encoder", lambda tensors: {**tensors, "text_projection.weight": torch.ones(4, 4)})
    assert hub.resolve_model(str(copy), "base model") == copy and text_limit(copy) == 32
    pipe, plain = load_base_pipeline(copy), load_base_pipeline(BASE)
    assert torch.equal(*(p.encode_prompt("a dog barks", "cpu", 1, False)[0] for p in (pipe, plain)))


def test_weights_of_a_variant_alone_are_named_once(tmp_path, capsys):
    copy = copied(BASE, tmp_path)
    CONTAINERS["fp16 safetensors"](copy / "vae")
    for _ in range(2):
        hub.resolve_model(str(copy), "base model")
    assert capsys.readouterr().out == (
        f"base model {copy}/vae: holds no plain weights; its fp16 weights are used\n")


def test_a_judge_with_a_tensor_missing_judges_nothing(tmp_path):
    copy = copied(JUDGE, tmp_path)
    rewritten(copy, lambda tensors: {key: one for key, one in tensors.items()
                                     if key != "vision_model.post_layernorm.bias"})
    with pytest.raises(UserError, match="missing tensors: 1, first vision_model.post_layernorm.bias"):
        Judge(copy)


def test_the_stock_pipeline_does_not_take_a_unet_with_a_tensor_missing(tmp_path, capsys):
    """It is said once, by us."""
    copy = copied(BASE, tmp_path)
    rewritten(copy / "unet", lambda tensors: {key: tensors[key] for key in tensors if key != "conv_out.bias"})
    with pytest.raises(UserError, match="missing tensors: 1, first conv_out.bias"):
        load_base_pipeline(copy)
    assert "Some weights" not in capsys.readouterr().out


# --- the hub
class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as its client asks for to download a model."""

    files: dict[str, dict[str, bytes]] = {}
    gated: set[str] = set()
    asked: list[str] = []

    def log_message(self, *_) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        self.asked.append(f"{self.command} {path}")
        owner_name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        files, commit = self.files.get(owner_name), "a" * 40
        if files is None:
            return self.answer(401 if "private" in path else 404, X_Error_Code="RepoNotFound",
                               X_Error_Message="Repository not found")
        if path.startswith("api/models/"):
            listed = [{"rfilename": name, "size": len(content), "path": name, "type": "file", "oid": "b" * 40}
                      for name, content in files.items()]
            info = {"id": owner_name, "sha": commit, "siblings": listed, "tags": [], "downloads": 0,
                    "private": False}
            body = json.dumps(listed if "/tree/" in path else info).encode()
            return self.answer(200, body, Content_Type="application/json")
        if owner_name in self.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        content = files[path.split(f"{owner_name}/resolve/", 1)[1].split("/", 1)[1]]
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit,
                    Content_Type="application/octet-stream", Accept_Ranges="bytes")

    do_HEAD = do_GET


@pytest.fixture
def local_hub():
    Hub.files, Hub.gated, Hub.asked = {}, set(), []
    with serving(Hub) as url:
        yield url


def resolve(name: str, what: str, endpoint: str, home: Path) -> subprocess.CompletedProcess:
    """hub.resolve_model in a process that knows another hub and has an empty cache."""
    program = ("import sys\nfrom clap2diffusion.base import hub\n"
               "from clap2diffusion.base.exits import run_main\n"
               "run_main(lambda: print(hub.resolve_model(*sys.argv[1:])))")
    return subprocess.run([sys.executable, "-c", program, name, what], cwd=ROOT, text=True,
                          capture_output=True, env={
                              **ENV, "HF_ENDPOINT": endpoint, "HF_HOME": str(home),
                              "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"})


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def test_a_hub_model_with_bin_alone_is_downloaded_and_loads(local_hub, tmp_path):
    copy = copied(CLAP, tmp_path)
    as_bin(copy, old=True)
    Hub.files["someone/clap"] = {**listing(copy), "README.md": b"#", "flax_model.msgpack": b"x" * 99,
                                 "onnx/model.onnx": b"x"}
    done = resolve("someone/clap", "CLAP model", local_hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    said, folder = done.stdout.splitlines()
    assert said == "downloading CLAP model someone/clap from the Hugging Face hub"
    assert hub.fingerprint(Path(folder)) == hub.fingerprint(CLAP)
    load_part(CLASSES[""], Path(folder), "CLAP model", unread=TEXT_SIDE)
    names = {path.name for path in Path(folder).iterdir()}
    assert "pytorch_model.bin" in names and not names & {"flax_model.msgpack", "onnx"}
    asked = len(Hub.asked)
    again = resolve("someone/clap", "CLAP model", local_hub, tmp_path / "home")
    assert again.stdout.splitlines() == [folder] and len(Hub.asked) == asked  # from the cache, no question


def test_of_a_base_model_one_container_a_part_is_downloaded(local_hub, tmp_path):
    copy = copied(BASE, tmp_path)
    as_shards(copy / "unet", ".fp16")
    as_bin(copy / "text_encoder")
    files = listing(copy)
    files |= {"vae/diffusion_pytorch_model.bin": b"x", "vae/diffusion_pytorch_model.fp16.safetensors": b"x",
              "unet/diffusion_pytorch_model.non_ema.safetensors": b"x", "v1-5-pruned.ckpt": b"x",
              "safety_checker/model.safetensors": b"x"}
    Hub.files["someone/sd"] = files
    done = resolve("someone/sd", "base model", local_hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert set(listing(copy)) - {"training.json"} == set(listing(folder))
    assert hub.fingerprint(folder / "unet") == hub.fingerprint(BASE / "unet")


@pytest.mark.parametrize("name, says", [
    ("someone/gated", "error: CLAP model 'someone/gated': its authors give it on request; ask for access at "
     "https://huggingface.co/someone/gated, then log in with: hf auth login"),
    ("someone/mistyped", "error: CLAP model 'someone/mistyped': no such model on the hub, or a private one"),
    ("someone/private", "error: CLAP model 'someone/private': no such model on the hub, or a private one")])
def test_what_the_hub_refuses_is_told_apart(name, says, local_hub, tmp_path):
    Hub.files["someone/gated"], Hub.gated = listing(CLAP), {"someone/gated"}
    done = resolve(name, "CLAP model", local_hub, tmp_path / "home")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(says), done.stderr


def test_no_network_is_told(tmp_path):
    done = resolve("someone/clap", "CLAP model", "http://127.0.0.1:9", tmp_path / "home")
    assert done.returncode == 2
    assert "is neither a folder here nor in the local model cache, and the hub gave no copy" in done.stderr


def test_a_hub_that_does_not_answer_is_waited_for_once_and_for_less_than_five_seconds(monkeypatch):
    """By what is asked of the hub's client; by a clock it would depend on what else the machine does."""
    waits = []

    class Silent:
        def get(self, *args, timeout, **more):
            waits.append(timeout)
            raise TimeoutError
    monkeypatch.setattr(huggingface_hub.hf_api, "get_session", Silent)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it sleeps {seconds} s"))
    with pytest.raises(UserError, match="the hub gave no copy"):
        hub.resolve_model("someone/clap", "CLAP model")
    assert len(waits) == 1 and 0 < waits[0] < 5


def test_a_copy_in_the_cache_that_is_not_whole_is_told(local_hub, tmp_path):
    Hub.files["someone/clap"] = listing(CLAP)
    done = resolve("someone/clap", "CLAP model", local_hub, tmp_path / "home")
    weights(Path(done.stdout.splitlines()[-1])).unlink()
    done = resolve("someone/clap", "CLAP model", "http://127.0.0.1:9", tmp_path / "home")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith(
        "error: CLAP model 'someone/clap': its copy in the local model cache is not whole (/"), last
    assert "holds no weights" in last and last.endswith("give a local folder or go online")


@pytest.mark.parametrize("number, kind", [(errno.ENOSPC, RunFailed), (errno.EACCES, UserError)])
def test_a_download_that_cannot_be_written_is_no_fault_of_the_network(number, kind, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(kind, match=rf"its download cannot be written \({os.strerror(number)}\) to .*HF_HOME"):
        hub.resolve_model("someone/no-such-clap", "CLAP model")


# --- names in an adapter's header
def test_a_missing_clap_is_told_before_torch_loads(run, world, tmp_path):
    program = ("import sys, runpy\n"
               "try: runpy.run_path('generate.py', run_name='__main__')\n"
               "finally: print('torch' in sys.modules)")
    sound = next((world / "audio").iterdir())
    done = subprocess.run([sys.executable, "-c", program, "--run", run, "--audio", sound, "--out",
                           tmp_path / "a.png", "--clap-model", tmp_path / "none"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n", done.stdout + done.stderr
    assert done.stderr.startswith(f"error: CLAP model '{tmp_path}/none': there is no such folder here")


def test_a_run_elsewhere_finds_its_models_beside_itself_or_beside_the_scripts(run, world, tmp_path):
    """The run's models are given by relative names; the command runs in a third folder."""
    from clap2diffusion.base.tensor_file import digest
    from clap2diffusion.pictures.inputs import adapter_facts
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    (place / "runs/mine").mkdir(parents=True)
    elsewhere.mkdir()

    def adapter(base: str, clap: str) -> None:
        from safetensors import safe_open
        from safetensors.numpy import save_file as save
        source = run / "stage1/adapter.safetensors"
        facts = {**adapter_facts(source), "base_model": base, "clap_model": clap}
        with safe_open(source, "np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        facts["sha256"] = digest(facts, tensors)
        save(tensors, place / "runs/mine/adapter.safetensors", {"clap2diffusion": json.dumps(facts)})

    sound = next((world / "audio").iterdir())
    command = ("generate.py", "--run", place / "runs/mine", "--audio", sound, "--out", elsewhere / "a.png",
               "--steps", 1)
    adapter("models/base", "assets/tiny/clap")
    shutil.copytree(BASE, place / "models/base")
    ok(script(*command, cwd=elsewhere))
    assert (elsewhere / "a.png").exists()
    shutil.rmtree(place / "models")
    done = script(*command, cwd=elsewhere)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: base model 'models/base' is neither"), done.stderr
    for part in (str(elsewhere), str(place / "runs/mine/adapter.safetensors"), str(ROOT)):
        assert part in last, last


def test_generate_takes_the_adapters_clap_from_another_container(run, world, tmp_path):
    copy = copied(CLAP, tmp_path)
    as_bin(copy)
    sound, pictures = next((world / "audio").iterdir()), []
    for clap in (CLAP, copy):
        ok(script("generate.py", "--run", run, "--audio", sound, "--out", tmp_path / "a.png", "--steps", 1,
                  "--clap-model", clap))
        pictures.append(np.asarray(Image.open(tmp_path / "a.png")))
    assert np.array_equal(*pictures)
