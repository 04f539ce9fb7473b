"""docs/use.md, "Stock pipelines": each block is run as it stands, and each sentence checked by its numbers.

`Runs.ours` is what a prediction must be. It is computed without diffusers' IP-Adapter and without peft: LoRA
is added to the UNet's weights by hand, and our own attention listens to the sound."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from test_models import HEADER, adapter, add_moved_lora, apart, forward, inputs, merge_lora, stock_forward

from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures, write_adapter

SECTION = (ROOT / "docs/use.md").read_text().split("\n## Stock pipelines\n")[1].split("\n## ")[0]
START, *TOPICS = SECTION.split("\n### ")
START = "".join(re.findall(r"```python\n(.*?)```", START, re.S))
TOPICS = {topic.split("\n")[0]: re.findall(r"```python\n(.*?)```", topic, re.S) for topic in TOPICS}
SAME, WRONG = 1e-5, 0.3  # predictions reach 2.2; what goes wrong in silence is further off than WRONG
OFF = 20  # of 255 levels, between pictures


class Runs:
    """A folder as the page expects it: runs/tiny and runs/other with different LoRAs, runs/first without
    (stage 1), and my_loras/mine.safetensors."""

    def __init__(self, place: Path, world: Path):
        self.place, self.adapters = place, {}
        self.unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet").eval().requires_grad_(False)
        self.batch = inputs(self.unet, 1)
        for seed, name in enumerate(("tiny", "other", "first")):
            unet, audio_proj, audio_attn = adapter(self.unet, 0.4)
            torch.manual_seed(seed)
            for linear in [*audio_attn.to_k, *audio_attn.to_v]:
                linear.weight.data += 0.05 * torch.randn_like(linear.weight)
            if name != "first":
                add_moved_lora(unet)
            (place / "runs" / name).mkdir(parents=True)
            weights = {"audio_proj": audio_proj, "audio_attn": audio_attn}
            write_adapter(self.path(name), weights, unet, HEADER)
            self.adapters[name] = audio_proj, audio_attn
        self.mine = {f"{name.removesuffix('.processor')}.{layer}.lora.{half}.weight": 0.2 * torch.randn(shape)
                     for name in self.unet.attn_processors for layer in ("to_q", "to_out.0")
                     for width in [self.unet.get_submodule(name.removesuffix(".processor")).inner_dim]
                     for half, shape in (("down", (4, width)), ("up", (width, 4)))}
        StableDiffusionPipeline.save_lora_weights(place / "my_loras", unet_lora_layers=self.mine,
                                                  weight_name="mine.safetensors")
        (place / "assets").symlink_to(ROOT / "assets")
        (place / "data").mkdir()
        (place / "data/world").symlink_to(world)

    def path(self, name: str) -> Path:
        return self.place / "runs" / name / "adapter.safetensors"

    def ours(self, name: str = "tiny", scale: float = 1.0, lora: float = 1.0, mine: float = 0.0):
        """What must be predicted with the sound times `scale`, its LoRA times `lora`, mine times `mine`."""
        unet, (audio_proj, audio_attn) = copy.deepcopy(self.unet), self.adapters[name]
        if lora and name != "first":
            merge_lora(unet, self.path(name), lora)
        for key, up in self.mine.items():
            if key.endswith(".lora.up.weight"):
                linear = unet.get_submodule(key.removesuffix(".lora.up.weight"))
                linear.weight.data += mine * up @ self.mine[key.replace(".up.", ".down.")]
        audio_attn.set_strength(0.4 * scale)
        audio_attn.attach(unet)
        return forward(unet, audio_proj, self.batch)

    @torch.inference_mode()
    def base(self, pipe=None):
        """What the base model predicts, or a pipeline without an adapter."""
        unet, batch = pipe.unet if pipe else self.unet, self.batch
        return unet(batch["noisy_latents"], batch["timesteps"], batch["text_tokens"]).sample

    def off(self, pipe, *of, **what) -> float:
        """How far a pipeline's prediction is from ours(*of, **what)."""
        return apart(stock_forward(pipe, self.batch), self.ours(*of, **what))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    return Runs(tmp_path_factory.mktemp("stock"), world)


@pytest.fixture
def start(runs, tmp_path, monkeypatch):
    """What the page's first block makes, in a folder of the test's own."""
    for path in runs.place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(START, names)
    names["pipe"].set_progress_bar_config(disable=True)
    return names


def run(topic: str, names: dict) -> dict:
    for block in TOPICS[topic]:
        exec(block, names)
    return names


def mine(pipe) -> None:
    pipe.load_lora_weights("my_loras", weight_name="mine.safetensors", adapter_name="mine")


def draw(pipe, *rows, prompt="", guidance: float = 3.0, seeds=(0,), **more) -> np.ndarray:
    """Pictures (n, 64, 64, 3) of a stock pipeline in a few steps."""
    images = pipe(prompt, ip_adapter_image_embeds=[torch.cat(rows)] if rows else None, num_inference_steps=4,
                  guidance_scale=guidance, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                  **more).images
    return np.stack([np.asarray(image).astype(int) for image in images])


def ours(pipe, *rows, prompts=("",), guidance: float = 3.0, seeds=(0,)) -> np.ndarray:
    """The same by our own pictures(), which gives each row of the batch its own sound."""
    images = pictures(pipe, torch.cat(rows)[:, 0], list(prompts), guidance, 4, list(seeds))
    return np.stack([np.asarray(image).astype(int) for image in images])


def levels(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(abs(a - b).max())


def test_every_block_has_its_test():
    tests = Path(__file__).read_text()
    assert START and len(TOPICS) >= 12
    for topic, blocks in TOPICS.items():
        assert blocks and f'run("{topic}", start)' in tests, topic


def test_the_start_is_our_own_prediction_and_lora_counts(runs, start):
    pipe = start["pipe"]
    assert pipe.get_active_adapters() == ["faceid_0"]
    assert runs.off(pipe) < SAME
    assert runs.off(pipe, lora=0) > WRONG  # so that everything below can show what happens to it
    assert apart(runs.ours("tiny"), runs.ours("other")) > WRONG
    assert apart(runs.ours(mine=1), runs.ours()) > WRONG
    for name in runs.adapters:  # as generate.py, evaluate.py and the report load one after the other
        assert runs.off(load_stock_pipeline(BASE, runs.path(name)), name) < SAME


# --- calls --------------------------------------------------------------------------------------------------

def test_guidance_and_rows(start):
    pipe, null, sound = start["pipe"], start["null"], start["sound"]
    run("Guidance and rows", start)
    assert start["embeds"].shape == sound.shape and start["image"].size == (64, 64)
    right = draw(pipe, null, sound)
    assert levels(right, ours(pipe, sound)) <= 1
    assert levels(draw(pipe, sound, guidance=1.0), ours(pipe, sound, guidance=1.0)) <= 1
    with pytest.raises(ValueError, match="not enough values to unpack"):
        draw(pipe, sound)
    assert levels(draw(pipe, null, sound, guidance=1.0), ours(pipe, sound, guidance=1.0)) > OFF
    assert levels(draw(pipe, sound, null), right) > OFF  # the negative one first
    several = ours(pipe, sound, sound, prompts=["", ""], seeds=(0, 1))
    assert levels(draw(pipe, null, sound, seeds=(0, 1), num_images_per_prompt=2), several) <= 1
    prompts = ["rain falling", "a dog"]
    two = ours(pipe, sound, sound, prompts=prompts, seeds=(0, 1))
    assert levels(draw(pipe, null, sound, prompt=prompts, seeds=(0, 1)), two) <= 1
    text, no_text = pipe.encode_prompt(prompts[0], "cpu", 1, True)
    given = draw(pipe, null, sound, prompt=None, prompt_embeds=text, negative_prompt_embeds=no_text)
    assert levels(given, two[:1]) <= 1


def test_a_batch_of_sounds_is_mixed_up_by_a_stock_pipeline(start):
    pipe, null, sound = start["pipe"], start["null"], start["sound"]
    other = sound.roll(1, -1)
    got = draw(pipe, null, null, sound, other, prompt=["", ""], seeds=(0, 1))
    assert levels(got, ours(pipe, sound, other, prompts=["", ""], seeds=(0, 1))) > OFF


def test_guidance_that_ends_in_a_call_leaves_both_rows(start):
    pipe, null, sound = start["pipe"], start["null"], start["sound"]

    def end(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale, tensors["prompt_embeds"] = 0.0, tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    def one_row(unet, args, kwargs):
        [rows] = kwargs["added_cond_kwargs"]["image_embeds"]
        return args, {**kwargs, "added_cond_kwargs": {"image_embeds": [rows[-len(args[0]):]]}}

    call = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    got = draw(pipe, null, sound, **call)
    with pipe.unet.register_forward_pre_hook(one_row, with_kwargs=True):
        assert levels(draw(pipe, null, sound, **call), got) > OFF


def test_rows_without_an_adapter_are_ignored_and_length_counts(runs, start):
    pipe, null, sound = start["pipe"], start["null"], start["sound"]
    assert float(sound.norm()) == pytest.approx(1.0, abs=1e-5)
    assert levels(draw(pipe, null, 3 * sound), draw(pipe, null, sound)) > OFF
    bare = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    assert levels(draw(bare, null, sound), draw(bare)) == 0


def test_half_precision(runs, start):
    null, sound, right = start["null"], start["sound"], draw(start["pipe"], start["null"], start["sound"])
    half = run("Half precision", start)["half"]
    assert start["embeds"].dtype == torch.bfloat16 and start["image"].size == (64, 64)
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}  # adapter and LoRA as well
    assert runs.off(half) < 0.1 < WRONG
    with pytest.raises(RuntimeError, match="same dtype"):
        draw(half, null, sound)
    assert levels(draw(half, null.to(half.dtype), sound.to(half.dtype)), right) < 40
    other = StableDiffusionPipeline.from_pretrained("assets/tiny/base", safety_checker=None,
                                                    dtype=torch.float16)
    start["load"](other, "runs/tiny")
    late = start["pipe"].to(torch.float16)
    assert apart(*(stock_forward(pipe, runs.batch) for pipe in (other, late))) == 0 and runs.off(late) < 0.05


# --- strengths and LoRAs ------------------------------------------------------------------------------------

def test_how_strong(runs, start):
    pipe = run("How strong", start)["pipe"]
    assert runs.off(pipe, scale=0.5, lora=0.7) < SAME
    pipe.set_ip_adapter_scale(0.0)
    pipe.set_adapters("faceid_0")
    assert runs.off(pipe, scale=0) < SAME and apart(stock_forward(pipe, runs.batch), runs.base()) > WRONG
    pipe.set_adapters("faceid_0", 0.0)
    assert apart(stock_forward(pipe, runs.batch), runs.base()) < SAME
    pipe.set_ip_adapter_scale(1.0)
    silent = {**runs.batch, "audio_embeds": torch.zeros(1, 512)}
    assert apart(stock_forward(pipe, silent), runs.base()) > WRONG  # the null audio
    pipe.set_ip_adapter_scale(0.5)
    pipe.set_adapters("faceid_0")
    start["load"](pipe, "runs/tiny")
    assert runs.off(pipe) < SAME


def test_the_scale_of_a_call_is_that_of_every_lora(runs, start):
    pipe, batch = start["pipe"], runs.batch
    mine(pipe)
    pipe.set_adapters(["faceid_0", "mine"], [1.0, 0.8])
    with torch.inference_mode():
        pred = pipe.unet(batch["noisy_latents"], batch["timesteps"], batch["text_tokens"],
                         cross_attention_kwargs={"scale": 0.5},
                         added_cond_kwargs={"image_embeds": [batch["audio_embeds"][:, None]]}).sample
    assert apart(pred, runs.ours(lora=0.5, mine=0.4)) < SAME
    assert runs.off(pipe, lora=1, mine=0.8) < SAME


def test_a_disabled_lora_stays_so(runs, start):
    pipe = start["pipe"]
    pipe.disable_lora()
    pipe.set_adapters("faceid_0")
    assert runs.off(pipe, lora=0) < SAME
    pipe.delete_adapters("faceid_0")
    start["load"](pipe, "runs/other")
    assert runs.off(pipe, "other", lora=0) < SAME
    pipe.enable_lora()
    assert runs.off(pipe, "other") < SAME


def test_a_lora_of_your_own(runs, start):
    pipe = run("A LoRA of your own beside it", start)["pipe"]
    assert runs.off(pipe, mine=0.8) < SAME
    start["load"](pipe, "runs/first")
    pipe.set_adapters(["mine"])
    assert runs.off(pipe, "first", mine=1) < SAME


def test_the_one_loaded_last_switches_the_others_off(runs, start):
    pipe = start["pipe"]
    mine(pipe)
    assert pipe.get_active_adapters() == ["mine"] and runs.off(pipe, lora=0, mine=1) < SAME
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    mine(pipe)
    start["load"](pipe, "runs/tiny")
    assert pipe.get_active_adapters() == ["faceid_0"] and runs.off(pipe) < SAME
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    mine(pipe)
    start["load"](pipe, "runs/first")  # which has none, so nothing is switched off
    assert runs.off(pipe, "first", mine=1) < SAME


def test_the_name_faceid_0_is_taken(runs, start):
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.load_lora_weights("my_loras", weight_name="mine.safetensors", adapter_name="faceid_0")
    start["load"](pipe, "runs/tiny")
    assert runs.off(pipe) > WRONG and runs.off(pipe, lora=0, mine=1) < SAME


# --- one after the other, and away --------------------------------------------------------------------------

def test_another_run(runs, start):
    pipe = run("Another run's adapter", start)["pipe"]
    fresh = load_stock_pipeline(BASE, runs.path("other"))
    assert apart(*(stock_forward(one, runs.batch) for one in (pipe, fresh))) < SAME
    assert runs.off(pipe, "other") < SAME
    mine(pipe)
    pipe.set_adapters(["faceid_0", "mine"])
    pipe.delete_adapters("faceid_0")
    start["load"](pipe, "runs/tiny")
    assert runs.off(pipe) < SAME  # mine is off
    pipe.set_adapters(["faceid_0", "mine"])
    assert runs.off(pipe, mine=1) < SAME


@pytest.mark.parametrize("name", ["other", "first"])
def test_another_run_without_that_line_keeps_the_old_lora(runs, start, name):
    pipe = start["pipe"]
    start["load"](pipe, f"runs/{name}")
    assert runs.off(pipe, name) > WRONG
    pipe.delete_adapters("faceid_0")
    start["load"](pipe, f"runs/{name}")
    assert runs.off(pipe, name) < SAME
    pipe.delete_adapters("faceid_0")  # does no harm where there is none
    start["load"](pipe, "runs/tiny")
    assert runs.off(pipe) < SAME


def test_two_at_once(runs, start):
    pipe = run("Two adapters at once", start)["pipe"]
    assert pipe.get_active_adapters() == ["faceid_0", "faceid_1"] and start["image"].size == (64, 64)
    pipe.unload_ip_adapter()
    pipe.unload_lora_weights()
    pipe.load_ip_adapter(["runs/tiny", "runs/other"], subfolder=["", ""],
                         weight_name=["adapter.safetensors"] * 2, image_encoder_folder=None)
    assert pipe.get_active_adapters() == ["faceid_1"]
    pipe.set_ip_adapter_scale([1.0, 0.0])

    @torch.inference_mode()
    def off(what) -> float:
        batch, embeds = runs.batch, [runs.batch["audio_embeds"][:, None]] * 2
        return apart(what, pipe.unet(batch["noisy_latents"], batch["timesteps"], batch["text_tokens"],
                                     added_cond_kwargs={"image_embeds": embeds}).sample)

    assert off(runs.ours("tiny")) > WRONG
    pipe.set_adapters(["faceid_0"])
    assert off(runs.ours("tiny")) < SAME
    pipe.set_ip_adapter_scale([0.0, 1.0])
    pipe.set_adapters(["faceid_0", "faceid_1"], [0.0, 1.0])
    assert off(runs.ours("other")) < SAME


def test_away(runs, start):
    pipe = start["pipe"]
    mine(pipe)
    run("Take it away", start)
    assert torch.equal(runs.base(pipe), runs.base()) and pipe.get_list_adapters() == {}
    start["load"](pipe, "runs/tiny")
    pipe.unload_ip_adapter()
    assert pipe.get_list_adapters() == {"unet": ["faceid_0"]}
    assert apart(runs.base(pipe), runs.base()) > WRONG
    start["load"](pipe, "runs/tiny")
    pipe.unload_lora_weights()
    assert runs.off(pipe, lora=0) < SAME


def test_away_and_keep_yours(runs, start):
    pipe = run("Take it away and keep your LoRA", start)["pipe"]
    bare = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    mine(bare)
    assert pipe.get_active_adapters() == ["mine"] and pipe.get_list_adapters() == {"unet": ["mine"]}
    assert apart(runs.base(pipe), runs.base(bare)) < SAME and apart(runs.base(pipe), runs.base()) > WRONG


# --- other pipelines, memory, fusing, saving ----------------------------------------------------------------

def test_a_picture_to_begin_with(runs, start):
    pipe, null, sound = start["pipe"], start["null"], start["sound"]
    other = run("A picture to begin with", start)["with_picture"]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    fresh = StableDiffusionImg2ImgPipeline.from_pretrained(BASE, safety_checker=None)
    start["load"](fresh, "runs/tiny")
    got, right = (draw(one, null, sound, image=photo, strength=0.8) for one in (other, fresh))
    assert levels(got, right) <= 1 and runs.off(other) < SAME
    other.unload_ip_adapter()
    other.unload_lora_weights()
    assert torch.equal(runs.base(pipe), runs.base())
    for dtype, more in ((torch.float32, {}), (torch.bfloat16, {"dtype": torch.bfloat16})):
        half = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, dtype=torch.bfloat16)
        start["load"](half, "runs/tiny")
        made = StableDiffusionImg2ImgPipeline.from_pipe(half, **more)
        assert {made.unet.dtype, half.unet.dtype, half.dtype} == {dtype}


def test_memory(runs, start):
    pipe, null, sound = start["pipe"], start["null"], start["sound"]
    right = draw(pipe, null, sound, seeds=(0, 1), num_images_per_prompt=2)
    run("Memory", start)  # the way back as well
    assert runs.off(pipe) < SAME
    assert levels(draw(pipe, null, sound, seeds=(0, 1), num_images_per_prompt=2), right) <= 1
    pipe.enable_attention_slicing()
    for _ in range(2):
        with pytest.raises(AttributeError, match="'tuple' object has no attribute 'shape'"):
            draw(pipe, null, sound)
        pipe.disable_attention_slicing()  # alone it is not enough
    sliced = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    sliced.enable_attention_slicing()
    with pytest.raises(TypeError, match="slice_size"):
        start["load"](sliced, "runs/tiny")


@pytest.mark.slow
def test_a_compiled_unet_sees_what_changes(runs, start):
    """Traced and run by torch itself: what a compiler makes of it afterwards is no matter of ours."""
    pipe = start["pipe"]
    pipe.unet.compile(backend="eager")
    assert runs.off(pipe) < SAME
    pipe.set_ip_adapter_scale(0.5)
    pipe.set_adapters("faceid_0", 0.7)
    assert runs.off(pipe, scale=0.5, lora=0.7) < SAME
    run("Another run's adapter", start)
    assert runs.off(pipe, "other") < SAME


@pytest.mark.parametrize("replace", [lambda unet: unet.set_default_attn_processor(),
                                     lambda unet: unet.fuse_qkv_projections(),
                                     lambda unet: unet.set_attn_processor(copy.deepcopy(
                                         unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor))])
def test_what_replaces_the_attention(start, replace):
    replace(start["pipe"].unet)
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'shape'"):
        draw(start["pipe"], start["null"], start["sound"])


def test_fuse(runs, start):
    pipe = run("Fuse", start)["pipe"]
    pipe.delete_adapters("faceid_0")
    start["load"](pipe, "runs/other")
    assert runs.off(pipe, "other") < SAME
    pipe.fuse_lora()
    assert runs.off(pipe, "other") < SAME
    pipe.set_adapters("faceid_0", 0.0)
    assert runs.off(pipe, "other") < SAME  # out of reach
    pipe.unload_lora_weights()
    assert runs.off(pipe, "other") < SAME
    start["load"](pipe, "runs/tiny")
    assert runs.off(pipe) > WRONG


def test_save(runs, start):
    for name in ("tiny", "first"):
        load_stock_pipeline(BASE, runs.path(name)).save_pretrained(f"with {name}")
    with pytest.raises(RuntimeError, match="meta"):
        runs.base(StableDiffusionPipeline.from_pretrained("with tiny"))
    dropped = StableDiffusionPipeline.from_pretrained("with first")
    assert levels(draw(dropped, start["null"], start["sound"]), draw(dropped)) == 0
    assert torch.equal(runs.base(dropped), runs.base())
    run("Save", start)
    plain, saved = (load_file(folder / "unet/diffusion_pytorch_model.safetensors")
                    for folder in (BASE, Path("saved")))
    assert saved.keys() == plain.keys() and all(torch.equal(saved[key], plain[key]) for key in plain)
    saved = StableDiffusionPipeline.from_pretrained("saved")
    start["load"](saved, "runs/tiny")
    assert runs.off(saved) < SAME


def test_the_files_have_a_lora_or_none(runs):
    found = {name: [float(tensor.abs().max()) for key, tensor in load_file(runs.path(name)).items()
                    if "_lora.up." in key] for name in runs.adapters}
    assert not found["first"] and len(found["tiny"]) == 4 * len(runs.unet.attn_processors)
    assert min(found["tiny"] + found["other"]) > 0.05
