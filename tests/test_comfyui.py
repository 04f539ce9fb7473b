"""The nodes for ComfyUI. What needs no ComfyUI is always tested. The rest is where COMFYUI_PATH is set and
pytest's Python has ComfyUI's requirements beside ours."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import BASE, CLAP, ROOT
from safetensors.torch import load_file, save_file

from clap2diffusion.base.exits import UserError

NODES = ROOT / "comfyui"
COMFYUI = os.environ.get("COMFYUI_PATH", "")
needs_comfyui = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH is not set to a folder of ComfyUI")
# what ComfyUI's own requirements hold, and ComfyUI
OURS_MAY = {"torch", "safetensors", "transformers", "numpy", "scipy", "huggingface_hub", "comfy",
            "folder_paths", *sys.stdlib_module_names}


def module(name: str):
    """A file of the node folder that imports nothing of ComfyUI."""
    spec = importlib.util.spec_from_file_location(f"nodes_{name}", NODES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


adapter, hearing = module("adapter"), module("hearing")


@pytest.fixture(scope="module")
def proof():
    sys.path.insert(0, str(ROOT / "bench"))
    import comfyui_proof
    return comfyui_proof


@pytest.fixture(scope="module")
def made(proof, tmp_path_factory):
    """An adapter file with a LoRA, and the modules that it was written from."""
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    return path, *proof.tools.random_adapter(path, BASE, CLAP, 4, step=7, warning="no gate helped")


def with_header(path, place, change) -> str:
    """A copy of an adapter file whose header `change` has edited; its SHA-256 is left out."""
    from clap2diffusion.pictures.inputs import adapter_facts
    facts = adapter_facts(path)
    changed = place / "changed.safetensors"
    metadata = change(facts)
    save_file(load_file(path), changed, {} if metadata is None else {"clap2diffusion": json.dumps(metadata)})
    return str(changed)


# --- without ComfyUI ----------------------------------------------------------------------------------------

def test_the_folder_stands_alone():
    """A copy of it in custom_nodes finds all that it imports."""
    for path in NODES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= OURS_MAY, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] in OURS_MAY, path
            elif isinstance(node, ast.ImportFrom):
                assert (NODES / f"{node.module}.py").exists(), path


def test_the_file_as_the_nodes_read_it_is_what_was_trained(made):
    path, weights, unet = made
    read = adapter.read_adapter(str(path))
    embeds = torch.nn.functional.normalize(torch.randn(3, 512), dim=-1)
    tokens = adapter.audio_tokens(read, embeds)
    with torch.no_grad():
        expected = weights["audio_proj"](embeds)
        gate = torch.tanh(weights["audio_attn"].gate)
        assert tokens.shape == (3, 8, 128) and (tokens - expected).abs().max() < 1e-5
        pairs = adapter.keys_and_values(read, tokens)
        assert list(pairs) == [name for name in read.facts["attentions"] if name.endswith("attn2")]
        for (k, v), to_k, to_v in zip(pairs.values(), weights["audio_attn"].to_k, weights["audio_attn"].to_v):
            assert (k - to_k(expected)).abs().max() < 1e-4 and (v - gate * to_v(expected)).abs().max() < 1e-4
        lora = adapter.lora_tensors(read)
        attentions = read.facts["attentions"]
        assert len(lora) == 2 * 4 * len(attentions)
        for name in (attentions[0], attentions[-1]):
            for layer, known in (("to_q", "to_q"), ("to_out.0", "to_out_0")):
                key = f"lora_unet_{name.replace('.', '_')}_{known}.lora_"
                base = unet.get_submodule(f"{name}.{layer}")
                x = torch.randn(2, base.in_features)
                added = x @ (lora[f"{key}up.weight"] @ lora[f"{key}down.weight"]).T
                assert (base.base_layer(x) + added - base(x)).abs().max() < 1e-4
    said = adapter.describe(read)
    assert "stage2, step 7" in said and "rank 4" in said and "gate: 0.400" in said
    assert said.endswith("warning: no gate helped")


@pytest.mark.parametrize("change, says", [
    (lambda facts: None, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: [facts], "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"dims": None}, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"dims": facts["dims"] | {"width": 768}}, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"fingerprints": {}}, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"clap_model": None}, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"attentions": ["a.attn2"]}, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"attentions": 3}, "is not an adapter of CLAP2Diffusion"),
    (lambda facts: facts | {"attentions": []}, "does not name the UNet's attentions"),
    (lambda facts: facts | {"step": 8, "sha256": "0" * 64}, "does not match its SHA-256")])
def test_a_header_of_another_kind(change, says, made, tmp_path):
    with pytest.raises(ValueError, match=says):
        adapter.read_adapter(with_header(made[0], tmp_path, change))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x08" + bytes(40)])
def test_a_file_that_is_no_adapter(content, tmp_path):
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a"):
        adapter.read_adapter(str(path))


@pytest.mark.parametrize("change", [
    lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora.up" not in name},
    lambda tensors: {name: tensor for name, tensor in tensors.items() if "norm" not in name},
    lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()}])
def test_tensors_of_another_kind(change, made, tmp_path):
    """A file without its own SHA-256, which so many a program could have written."""
    facts = json.dumps(adapter.read_adapter(str(made[0])).facts)
    save_file(change(load_file(made[0])), tmp_path / "a.safetensors", {"clap2diffusion": facts})
    with pytest.raises(ValueError, match="is not an adapter of CLAP2Diffusion"):
        adapter.read_adapter(str(tmp_path / "a.safetensors"))


def test_another_clap_in_the_same_folder_is_loaded_anew(tmp_path):
    folder, tone = shutil.copytree(CLAP, tmp_path / "clap"), torch.sin(torch.arange(48000) / 10)[None, None]
    before, _ = hearing.embed(folder, hearing.fingerprint(folder), tone, 48000, 0.0)
    weights = load_file(folder / "model.safetensors")
    weights["audio_projection.linear2.weight"] = weights["audio_projection.linear2.weight"].flip(0)
    save_file(weights, folder / "new", {"format": "pt"})
    (folder / "new").replace(folder / "model.safetensors")
    after, _ = hearing.embed(folder, hearing.fingerprint(folder), tone, 48000, 0.0)
    assert not torch.allclose(before, after, atol=1e-3)


SD15 = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)] + [
    f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)] + ["mid_block.attentions.0"]
SD15_KEYS = [("input", i) for i in (1, 2, 4, 5, 7, 8)] + [
    ("output", i) for i in range(3, 12)] + [("middle", 0)]
SD15_MODULES = [f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"] + [
    f"output_blocks.{i}.1" for i in range(3, 12)]


def test_the_places_of_sd15():
    names = [f"{name}.transformer_blocks.0.{kind}" for name in SD15 for kind in ("attn1", "attn2")]
    modules = [f"{name}.transformer_blocks.0.attn2" for name in sorted(SD15_MODULES)]  # 10 and 11 before 3
    matched = adapter.match_attentions(names, modules)
    assert [matched[name][1] for name in names if name.endswith("attn2")] == SD15_KEYS
    module, _ = matched["up_blocks.3.attentions.2.transformer_blocks.0.attn2"]
    assert module == "output_blocks.11.1.transformer_blocks.0.attn2"


def test_the_places_of_sdxl():
    depths = {"down_blocks.1": 2, "down_blocks.2": 10, "up_blocks.0": 10, "up_blocks.1": 2}
    names = [f"{block}.attentions.{j}.transformer_blocks.{t}.attn2" for block, depth in depths.items()
             for j in range(2 + block.startswith("up")) for t in range(depth)]
    names += [f"mid_block.attentions.0.transformer_blocks.{t}.attn2" for t in range(10)]
    modules = [f"input_blocks.{i}.1.transformer_blocks.{t}.attn2" for i in (4, 5, 7, 8)
               for t in range(2 if i < 6 else 10)]
    modules += [f"output_blocks.{i}.1.transformer_blocks.{t}.attn2" for i in range(6)
                for t in range(10 if i < 3 else 2)]
    modules += [f"middle_block.1.transformer_blocks.{t}.attn2" for t in range(10)]
    matched = {name: key for name, (_, key) in adapter.match_attentions(names, modules).items()}
    assert len(set(matched.values())) == len(names) == 70
    assert matched["down_blocks.2.attentions.1.transformer_blocks.9.attn2"] == ("input", 8, 9)
    assert matched["up_blocks.1.attentions.0.transformer_blocks.1.attn2"] == ("output", 3, 1)
    assert matched["mid_block.attentions.0.transformer_blocks.3.attn2"] == ("middle", 0, 3)
    with pytest.raises(ValueError, match=r"the model has 24\+10\+36 .* the adapter expects 6\+1\+9"):
        adapter.match_attentions([f"{name}.transformer_blocks.0.attn2" for name in SD15], modules)


def test_the_clap_is_known_by_the_same_name(tmp_path):
    from clap2diffusion.base import hub
    assert hearing.fingerprint(CLAP) == hub.fingerprint(CLAP)
    for path in CLAP.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    settings = json.loads((CLAP / "preprocessor_config.json").read_text()) | {"frequency_min": 51}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert hearing.fingerprint(tmp_path) == hub.fingerprint(tmp_path) != hub.fingerprint(CLAP)
    (tmp_path / "model.safetensors").unlink()
    torch.save(load_file(CLAP / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert hearing.fingerprint(tmp_path) == hub.fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not a whole CLAP model"):
        hearing.fingerprint(tmp_path)


def test_where_a_clap_is_looked_for(tmp_path):
    place = tmp_path / "models"
    (place / "clap-x").mkdir(parents=True)
    (place / "clap-x/config.json").write_text("{}")
    assert hearing.find_clap("", "owner/clap-x", [str(place)]) == place / "clap-x"
    assert hearing.find_clap(f" {CLAP} ", "owner/clap-x", [str(place)]) == CLAP
    with pytest.raises(ValueError, match="hf download owner/clap-y --local-dir .*models/clap-y"):
        hearing.find_clap("", "owner/clap-y", [str(place)])


@pytest.mark.parametrize("rate, most", [(48000, 0.0), (44100, 2e-3), (22050, 2e-3), (96000, 2e-3)])
def test_a_sound_is_heard_as_in_training(rate, most, tmp_path):
    """Stereo, louder than full scale, longer than the window and begun late; the window before the end."""
    from clap2diffusion.dataset.encoders import CLAPAudioEncoder
    from clap2diffusion.pictures.generation import embed
    time_s, draw = np.arange(int(3 * rate)) / rate, np.random.default_rng(0)
    sweep = np.sin(2 * np.pi * (200 + 900 * time_s) * time_s)
    sound = np.stack([1.5 * sweep, 0.3 * sweep + 0.1 * draw.standard_normal(len(sweep))], 1)
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound, rate, subtype="FLOAT")
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0].T)[None]
    encoder = CLAPAudioEncoder(CLAP)
    for start_s in (0.0, 1.25, 60.0):
        got, notes = hearing.embed(CLAP, "name", samples, rate, start_s)
        assert (got - embed(encoder, str(path), start_s)).abs().max() <= most and not notes


def test_sounds_of_the_world_at_other_rates_are_heard_nearly_as_in_training(world, tmp_path):
    """docs/comfyui.md has the bound. It is not one of rounding: SciPy's filter is not quite soxr's."""
    import soxr

    from clap2diffusion.dataset.encoders import CLAPAudioEncoder
    from clap2diffusion.pictures.generation import embed
    encoder, moved = CLAPAudioEncoder(CLAP), []
    for sound in sorted((world / "audio").glob("test-*.wav"))[:10]:
        samples, rate = soundfile.read(sound, dtype="float32")
        for other in (44100, 32000, 16000):
            resampled = soxr.resample(samples, rate, other)
            soundfile.write(tmp_path / "sound.wav", resampled, other, subtype="FLOAT")
            got, _ = hearing.embed(CLAP, "name", torch.from_numpy(resampled)[None, None], other, 0.0)
            moved.append(float((got - embed(encoder, str(tmp_path / "sound.wav"))).abs().max()))
    assert len(moved) == 30 and 0 < max(moved) <= 1e-3, max(moved)


def test_what_counts_as_no_sound_and_what_is_refused():
    tone = torch.sin(torch.arange(48000) / 10)
    batch = torch.stack([torch.stack([tone, tone]), torch.stack([tone, -tone]), torch.zeros(2, 48000)])
    embeds, notes = hearing.embed(CLAP, "name", batch, 48000, 0.0)
    assert embeds.shape == (3, 512) and embeds.any(1).tolist() == [True, False, False]
    assert embeds[0].norm() == pytest.approx(1, abs=1e-5)
    assert notes == ["sound 2 of 3 is cancelled by the mono mix, which counts as no sound",
                     "sound 3 of 3 is silent, which counts as no sound"]
    with pytest.raises(ValueError, match="the sound is 0.050 s long, expected at least 0.1 s"):
        hearing.embed(CLAP, "name", tone[None, None, :2400], 48000, 0.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        hearing.embed(CLAP, "name", torch.full((1, 1, 48000), torch.inf), 48000, 0.0)


def test_the_proof_says_what_it_needs(proof, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"COMFYUI_PATH '{tmp_path}': holds no comfy/sd.py"):
        proof.comfyui_path()


def test_the_workflow_names_the_nodes_and_their_inputs():
    prompt = json.loads((NODES / "workflow.json").read_text())
    kinds = {node["class_type"] for node in prompt.values()}
    assert {"LoadAudio", "KSampler", "VAEDecode", "SaveImage", "CLAP2DiffusionLoad", "CLAP2DiffusionEncode",
            "CLAP2DiffusionApply"} < kinds
    for node in prompt.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in prompt


# --- with ComfyUI -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def comfy(made, proof):
    """The proof's module, the nodes, the small base as a MODEL, the adapter as Load gives it, two sounds and
    a batch to predict."""
    classes, draw = proof.node_classes(), torch.Generator().manual_seed(0)
    read, facts = classes["CLAP2DiffusionLoad"]().load("(the path below)", f' "{made[0]}" ')
    assert "stage2, step 7" in facts
    sounds = torch.nn.functional.normalize(torch.randn(2, 512, generator=draw), dim=-1)
    batch = {"latents": torch.randn(2, 4, 8, 8, generator=draw), "timestep": torch.tensor(500),
             "text": torch.randn(2, 77, 128, generator=draw),
             "no_text": torch.randn(2, 77, 128, generator=draw)}
    name = read.facts["fingerprints"]["clap"]
    return Namespace(proof=proof, classes=classes, model=proof.comfy_unet(BASE), adapter=read, batch=batch,
                     sound={"embeds": sounds, "clap": name}, apply=classes["CLAP2DiffusionApply"]().apply)


def predict(comfy, model):
    return comfy.proof.comfy_prediction(model, comfy.batch, True)


def apply(comfy, model=None, weight=1.0, start=0.0, end=1.0, lora=1.0, **more):
    given = {"adapter": comfy.adapter, "sound": comfy.sound, **more}
    return comfy.apply(model or comfy.model, weight=weight, start=start, end=end, lora=lora, **given)[0]


@needs_comfyui
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_prediction_is_stock_diffusers(size, comfy, tmp_path):
    rows = comfy.proof.prove_prediction(comfy.proof.PARSER.parse_args(
        ["--small"] * (size == "small")), tmp_path)
    assert len(rows) == 6 and max(row["largest difference"] for row in rows) < 1e-4
    assert min(row["what the node changes"] for row in rows) > 1e-2


@needs_comfyui
def test_the_whole_workflow_makes_a_picture(comfy, tmp_path):
    found = comfy.proof.prove_workflow(comfy.proof.PARSER.parse_args([]), tmp_path)
    assert found["nodes"] == 11


@needs_comfyui
def test_weight_and_lora_of_none_leave_the_model_as_it_was(comfy):
    plain = predict(comfy, comfy.model)
    assert torch.equal(predict(comfy, apply(comfy, weight=0.0, lora=0.0)), plain)
    assert not torch.allclose(predict(comfy, apply(comfy, lora=0.0)), plain, atol=1e-3)
    assert torch.equal(predict(comfy, comfy.model), plain)


@needs_comfyui
@pytest.mark.parametrize("start, end, heard", [(0.0, 0.4, False), (0.4, 0.6, True), (0.6, 1.0, False)])
def test_from_start_to_end(start, end, heard, comfy):
    """Timestep 500 is half of the way."""
    got = predict(comfy, apply(comfy, start=start, end=end, lora=0.0))
    assert torch.equal(got, predict(comfy, apply(comfy, lora=0.0) if heard else comfy.model))


@needs_comfyui
def test_one_sound_is_for_all_pictures_and_another_number_for_none(comfy):
    one = {**comfy.sound, "embeds": comfy.sound["embeds"][:1]}
    same = {**comfy.sound, "embeds": one["embeds"].repeat(2, 1)}
    three = {**comfy.sound, "embeds": one["embeds"].repeat(3, 1)}
    assert torch.allclose(predict(comfy, apply(comfy, sound=one)), predict(comfy, apply(comfy, sound=same)),
                          atol=1e-5)
    with pytest.raises(ValueError, match="3 sounds for 2 pictures"):
        predict(comfy, apply(comfy, sound=three))


@needs_comfyui
def test_two_adapters_add_up(comfy):
    other = {**comfy.sound, "embeds": comfy.sound["embeds"].flip(0)}
    here = apply(comfy, lora=0.0)
    assert torch.allclose(predict(comfy, apply(comfy, apply(comfy, lora=0.0, sound=other), lora=0.0)),
                          predict(comfy, apply(comfy, here, lora=0.0, sound=other)), atol=1e-5)
    half = apply(comfy, apply(comfy, weight=0.5, lora=0.0), weight=0.5, lora=0.0)
    assert torch.allclose(predict(comfy, half), predict(comfy, here), atol=1e-5)


class Neighbour:
    """A replacement as other IP-Adapter nodes have it: with add(), and what a callback returns is added."""

    def __init__(self, callback, **kwargs):
        self.callbacks = [(callback, kwargs)]

    def add(self, callback, **kwargs):
        self.callbacks.append((callback, kwargs))

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        for callback, kwargs in self.callbacks:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def put_neighbour(model, key: tuple, amount: float):
    """A clone of a model with a neighbour at a place, as such nodes put it there."""
    def callback(out, q, k, v, extra_options, amount=0.0, **kwargs):
        return amount * q
    model, kwargs = model.clone(), {"amount": amount, "sigma_start": 1e9, "sigma_end": 0.0}
    there = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    if key in there:
        there[key].add(callback, **kwargs)
    else:
        model.set_model_attn2_replace(Neighbour(callback, **kwargs), *key)
    return model


@needs_comfyui
@pytest.mark.parametrize("longer", [(), (0,)])
def test_other_nodes_stack_before_and_behind(longer, comfy):
    key = ("input", 3, *longer)  # the small base's first cross-attention
    plain, heard = predict(comfy, comfy.model), predict(comfy, apply(comfy, lora=0.0))
    alone = predict(comfy, put_neighbour(comfy.model, key, 0.5))
    before = predict(comfy, apply(comfy, put_neighbour(comfy.model, key, 0.5), lora=0.0))
    assert not torch.allclose(before, heard, atol=1e-3) and not torch.allclose(before, alone, atol=1e-3)
    # behind ours such nodes add() to what they find under their own, shorter key
    behind = predict(comfy, put_neighbour(apply(comfy, lora=0.0), key[:2], 0.5))
    assert torch.allclose(before, behind, atol=1e-5)
    assert torch.equal(predict(comfy, comfy.model), plain)
    assert torch.equal(predict(comfy, apply(comfy, lora=0.0)), heard)


@needs_comfyui
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, comfy):
    right, got = (predict(comfy, apply(comfy, comfy.proof.comfy_unet(BASE, kind)))
                  for kind in (torch.float32, dtype))
    assert (got - right).abs().max() < 0.05 * max(1.0, right.abs().max())


@needs_comfyui
def test_what_does_not_fit_is_said(comfy, tmp_path, made):
    with pytest.raises(ValueError, match="start 0.5 is not below end 0.5"):
        apply(comfy, start=0.5, end=0.5)
    with pytest.raises(ValueError, match="sound: was encoded with CLAP 1234"):
        apply(comfy, sound={**comfy.sound, "clap": "1234"})
    with pytest.raises(ValueError, match="negative: was encoded with CLAP 1234"):
        apply(comfy, negative={**comfy.sound, "clap": "1234"})
    tools = sys.modules["bench_tools"]
    tools.make_random(tmp_path / "small", "small")
    with pytest.raises(ValueError, match="cross-attention is 64 wide, .* expects 128; load a checkpoint"):
        apply(comfy, comfy.proof.comfy_unet(tmp_path / "small/base"))
    with pytest.raises(ValueError, match="is not a file"):
        comfy.classes["CLAP2DiffusionLoad"]().load("(the path below)", str(tmp_path / "none.safetensors"))
    encode = comfy.classes["CLAP2DiffusionEncode"]().encode
    audio = {"waveform": torch.sin(torch.arange(48000) / 10)[None, None], "sample_rate": 48000}
    sound, = encode(comfy.adapter, audio, 0.0, "")
    assert sound["embeds"].shape == (1, 512) and sound["clap"] == comfy.adapter.facts["fingerprints"]["clap"]
    for nothing in (None, audio | {"waveform": None}, audio | {"waveform": torch.zeros(0, 1, 9)}):
        with pytest.raises(ValueError, match="the audio holds no sound"):
            encode(comfy.adapter, nothing, 0.0, "")
    with pytest.raises(ValueError, match="is CLAP [0-9a-f]{16}, but .* was trained with CLAP [0-9a-f]{16}"):
        encode(comfy.adapter, audio, 0.0, str(tmp_path / "small/clap"))
    for rate in (None, 0, "48000"):
        with pytest.raises(ValueError, match=f"the audio's sample rate is {rate}, expected a number"):
            encode(comfy.adapter, audio | {"sample_rate": rate}, 0.0, str(CLAP))
