"""Train the default's small models from scratch on the sound world, on a CPU: assets/tiny/{base,clap,judge}.

    python tools/make_tiny_models.py                      # all parts; a finished part is skipped
    python tools/make_tiny_models.py --only clap judge    # these parts; two processes may share the work
    python tools/make_tiny_models.py --smoke --out /tmp/tiny   # right shapes in a minute, knows nothing

base   a StableDiffusionPipeline: VAE, UNet, CLIP text encoder, tokenizer, scheduler. It learns from pictures
       and captions only; no sound and nothing computed from a sound reaches it.
clap   a ClapModel and its feature extractor: sounds and captions, contrastively (Wu et al. 2023, arXiv
       2211.06687). Fixed directions of the audio embedding tell which classes sound, and their properties.
judge  a SiglipModel (Zhai et al. 2023, arXiv 2303.15343): real renders and captions, never a generated one.

Every example is drawn from the generator [seed, 1000 + part, i], which no split of the data folder uses. The
report (report.json, report.md) holds measurements on examples that were drawn apart from the training ones.
"""

import argparse
import json
import math
import shutil
import string
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (first: it ends in one sentence where packages are missing)

# isort: split
import diffusers
import jinja2
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from tqdm import tqdm

from clap2diffusion.base import files, workers
from clap2diffusion.base.device import quiet_libraries
from clap2diffusion.base.exits import run_main
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.settings import Number, new_parser
from clap2diffusion.dataset.encoders import CLAPAudioEncoder, log_mel
from clap2diffusion.judging import metrics
from clap2diffusion.judging.judge import Judge
from clap2diffusion.pictures.sheets import tile
from clap2diffusion.world import sound_world as world

NAMES = {one: [world.class_caption((c,), one) for c in world.CLASSES] for one in ("en", "ko")}  # captions
PICTURES, SOUNDS, HELD_OUT = 1000, 1001, 1002  # first part of each generator's key after the seed
L, WIDTH, PAIRS = 32, 0.05, 0.35  # text tokens; deviation of the VAE's posterior; share of two sounds
HERE = Path(__file__).resolve().parent
CONFIGS = files.read_json(HERE / "tiny_models.json")
EXTRACTOR = transformers.ClapFeatureExtractor(**CONFIGS["extractor"])
BARE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
COUNTS = {  # of the flags: (lowest, default, help)
    "threads": (1, 2, "CPU threads"),
    "pictures": (64, 20000, "scenes drawn for VAE, UNet and judge"),
    "sounds": (64, 10000, "clips synthesised for CLAP"),
    "vae_steps": (1, 4400, "steps: three quarters on 16 crops, the rest on 8 scenes"),
    "unet_steps": (1, 4800, "UNet, first part: steps of 32 latents"),
    "layout_steps": (1, 1000, "UNet, later parts: the noisiest timesteps, then half as many again"),
    "detail_steps": (1, 1600, "UNet, last parts: the middle timesteps, five times"),
    "clap_steps": (1, 6000, "steps of 32 clips and 16 mixtures"),
    "judge_steps": (1, 2000, "steps of 64 pictures")}


# --- examples

def scene(key: tuple[int, int, int]) -> tuple:
    """Pixels (64, 64, 3), four captions and four more that say everything, labels."""
    rng = np.random.default_rng(key)
    state = world.draw_state(rng, pairs=PAIRS)
    captions = [world.caption(state, rng, detail) for detail in [None] * 4 + [world.EVERY_DETAIL] * 4]
    return np.asarray(world.draw_scene(state)), captions, state.labels


def sound(key: tuple[int, int, int]) -> tuple:
    """Log-mel (1, 251, 64), four captions, presence (10,), properties (31,), NaN where nothing sounds."""
    rng = np.random.default_rng(key)
    state = world.draw_state(rng, pairs=0.5)
    presence, properties = np.zeros(10, np.float32), np.full(31, np.nan, np.float32)
    for source in state.sources:
        c = world.CLASSES.index(source.label)
        presence[c] = 1
        properties[3 * c:3 * c + 3] = source.loudness, source.pitch, source.rate
    properties[30] = state.density
    captions = [world.caption(state, rng) for _ in range(4)]
    features = log_mel(EXTRACTOR, world.synthesise(state))["input_features"][0]
    return features.astype(np.float16), captions, presence, properties


def draw(function, seed: int, part: int, n: int, what: str) -> list[tuple]:
    """What the function gives of the examples 0..n-1 of a part, as columns."""
    found = workers.in_processes(function, [(seed, part, i) for i in range(n)], 2, what, "example")
    return list(zip(*found, strict=True))


def as_images(pictures: np.ndarray) -> Tensor:
    """uint8 (B, 64, 64, 3) -> float (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- training

def train(what: str, parameters, loss_at, steps: int, learning_rate: float, ema=None) -> float:
    """AdamW with warm-up and cosine over loss_at(step) -> scalar; returns the seconds it took."""
    parameters, began = list(parameters), time.time()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    with tqdm(range(steps), **bar_options(desc=what, unit="step", mininterval=5)) as bar:
        for step in bar:
            rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = learning_rate * max(rate, 0.01)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if ema:
                ema.step(parameters)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    return round(time.time() - began, 1)


def train_tokenizer(kind, captions: list[list[str]], vocabulary: int) -> tuple:
    """A byte-level BPE of transformers' own kind, trained on the captions, and what a model is to know of it.
    Every byte is in the alphabet, so that a word the world never says does not end the sentence."""
    every = [" ".join(map(chr, range(0xAC00, 0xAC40))), " ".join(string.printable.strip())]
    tokenizer = kind(model_max_length=L).train_new_from_iterator(
        [*(c for some in captions for c in some), *every], vocabulary, initial_alphabet=ByteLevel.alphabet())
    facts = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return tokenizer, {"vocab_size": len(tokenizer), **facts}


def encode_text(tokenizer, captions: list[list[str]]) -> Tensor:
    """k captions of each of n examples -> ids (n, k, L)."""
    flat = [c for some in captions for c in some]
    ids = tokenizer(flat, padding="max_length", max_length=L, truncation=True, return_tensors="pt").input_ids
    return ids.view(len(captions), -1, L)


def make_vae(pictures: np.ndarray, kept: Path, args: argparse.Namespace) -> tuple:
    """The VAE and the seconds it took. It is kept: a stopped UNet does not cost it."""
    if (kept / "training.json").exists():
        return diffusers.AutoencoderKL.from_pretrained(kept).eval(), files.read_json(kept / "training.json")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, 2000])
    vae = diffusers.AutoencoderKL(**CONFIGS["vae"]).to(memory_format=torch.channels_last)

    def crop(i: int) -> np.ndarray:
        """A square of 32 pixels: of three places the one with most in it, as the sky teaches little."""
        places = rng.integers(33, size=(3, 2))
        return max((pictures[i, y:y + 32, x:x + 32] for y, x in places), key=np.std)

    def vae_loss(step: int) -> Tensor:
        whole = step >= 0.75 * args.vae_steps  # group norms see a whole scene's statistics at last
        picks = rng.integers(len(pictures), size=8 if whole else 16)
        x = as_images(pictures[picks] if whole else np.stack([crop(i) for i in picks]))
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + WIDTH * torch.randn_like(posterior.mean)).sample
        edges = sum(F.mse_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))  # for sharp borders
        return F.mse_loss(y, x) + edges + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()
    seconds = train("VAE", vae.parameters(), vae_loss, args.vae_steps, 2e-3)
    with torch.no_grad():  # the posterior's width is the noise the decoder was trained with, everywhere
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * math.log(WIDTH)
    save(kept, {"vae": seconds}, vae.to(memory_format=torch.contiguous_format))
    return vae.eval(), {"vae": seconds}


def save(folder: Path, seconds: dict, *parts) -> None:
    for part in parts:
        part.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(seconds) + "\n", "utf-8")


def make_base(out: Path, args: argparse.Namespace) -> None:
    """VAE (64 px -> 16 x 16 x 4), then UNet and text encoder together, on captions, a tenth of them empty.
    UNet and text encoder learn in parts. After the first, at the usual captions and even timesteps, a caption
    sets the class, the size and the sky, but neither height nor count: captions seldom name them, a layout is
    decided at the few noisiest timesteps, and marks in the middle. So in the later parts two of three
    captions say everything, and timesteps come more often from there: first from the noisy end, then, five
    times over, from the middle."""
    from diffusers.training_utils import EMAModel
    pictures, captions, _ = draw(scene, args.seed, PICTURES, args.pictures, "scenes")
    pictures = np.stack(pictures)
    vae, seconds = make_vae(pictures, out.with_name(".vae"), args)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(as_images(pictures[i:i + 64])).latent_dist.mean
                             for i in range(0, len(pictures), 64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents.clone() * vae.config.scaling_factor  # (n, 4, 16, 16)
    torch.manual_seed(args.seed + 3)  # so that a VAE kept from a stopped run changes nothing
    rng = np.random.default_rng([args.seed, 2003])
    tokenizer, facts = train_tokenizer(transformers.CLIPTokenizer, [eight[:4] for eight in captions], 1200)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**facts, **CONFIGS["text_encoder"]))
    unet = diffusers.UNet2DConditionModel(**CONFIGS["unet"])
    # The last timestep is pure noise (Lin et al. 2024, arXiv 2305.08891), which needs v-prediction. In the
    # usual schedule a little of the picture shines through, so the starting noise, not the condition, sets
    # sky and layout when sampling.
    scheduler = diffusers.DDIMScheduler(**CONFIGS["scheduler"])
    noiser = diffusers.DDPMScheduler.from_config(scheduler.config)
    ids, empty = encode_text(tokenizer, captions), encode_text(tokenizer, [[""]])[0, 0]
    parameters = [*unet.parameters(), *text_encoder.parameters()]

    def unet_loss(first: int, last: int, low: int, high: int, share: float, step: int) -> Tensor:
        """The loss on captions first..last-1, a `share` of the timesteps drawn from low..high-1."""
        i = rng.integers(len(latents), size=32)
        x, text = latents[i], ids[i, rng.integers(first, last, size=32)]
        text = torch.where(torch.from_numpy(rng.random(32) < 0.1)[:, None], empty, text)
        noise, timesteps = torch.randn_like(x), torch.randint(1000, (32,))
        timesteps = torch.where(torch.rand(32) < share, torch.randint(low, high, (32,)), timesteps)
        hidden = text_encoder(text).last_hidden_state
        pred = unet(noiser.add_noise(x, noise, timesteps), timesteps, hidden).sample
        return F.mse_loss(pred, noiser.get_velocity(x, noise, timesteps))
    seconds["unet"] = 0.0
    details = [(args.detail_steps, 2, 8, 300, 700, 0.7)] * 5
    for steps, *how in ((args.unet_steps, 0, 4, 0, 1000, 0.0), (args.layout_steps, 2, 8, 800, 1000, 0.6),
                        (args.layout_steps * 3 // 2, 2, 8, 500, 1000, 0.6), *details):
        ema = EMAModel(parameters, decay=0.998)
        seconds["unet"] += train("UNet", parameters, partial(unet_loss, *how), steps, 1.5e-3, ema)
        ema.copy_to(parameters)
    save(out, seconds, diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler, **BARE))


def mixer(features: Tensor, presence: Tensor, properties: Tensor, rng: np.random.Generator):
    """A function that draws sums of a low and a high single sound, as one microphone hears them."""
    single = np.flatnonzero(presence.sum(1) == 1)
    loudness, pitch = properties[single, :30].view(-1, 10, 3)[..., :2].nan_to_num().sum(1).numpy().T
    kinds = presence.argmax(1).numpy()[single]
    low, high = np.flatnonzero(pitch <= world.LOW_PITCH), np.flatnonzero(pitch >= world.HIGH_PITCH)

    def mix() -> tuple[Tensor, Tensor, Tensor]:
        """16 of them: log-mel, presence, properties. Their captions are nobody's."""
        a, b = rng.choice(low, 128), rng.choice(high, 128)
        fits = (kinds[a] != kinds[b]) & (abs(loudness[a] - loudness[b]) <= world.PAIR_LOUDNESS)
        a, b = single[a[fits][:16]], single[b[fits][:16]]
        power = 10 ** (features[a].float() / 10) + 10 ** (features[b].float() / 10)  # powers add
        both = torch.where(properties[a].isnan(), properties[b], properties[a])
        both[:, 30] = torch.nan
        return 10 * power.log10(), presence[a] + presence[b], both
    return mix


def axes_loss(audio_embeds: Tensor, axes: Tensor, rest: Tensor, present: Tensor, values: Tensor) -> Tensor:
    """Give every class and property a fixed direction of its own.
    So two sounds add up, and no property is lost in a corner of the space: present is 8 along its direction
    and absent 0, a property runs from -4 to 4; what does not sound has 0. The embedding's length is fixed, so
    what these leave over goes to one direction that is the same for all. Were it to go anywhere, each pair
    would have a place of its own, and nothing learned of other pairs would tell about it."""
    embeds = F.normalize(audio_embeds, dim=-1) * math.sqrt(512)
    along, known = embeds @ axes, ~values.isnan()
    loss = 4 * F.binary_cross_entropy_with_logits(along[:, :10] - 4, present)
    loss = loss + 8 * (along[:, 10:] / 8 + 0.5 - values)[known].square().mean()
    loss = loss + 2 * (along[:, 10:40] / 8)[~known[:, :30]].square().mean()  # of what does not sound
    elsewhere = 1 - (along.square().sum(1) + (embeds @ rest).clamp(min=0).square()) / 512
    return loss + 4 * elsewhere.mean()


def make_clap(out: Path, args: argparse.Namespace) -> None:
    """HTSAT-style audio tower (128 x 128 mel image, 3 stages), two-layer text tower, 512-wide embeddings."""
    torch.manual_seed(args.seed + 1)
    rng = np.random.default_rng([args.seed, 2001])
    features, captions, *rest = draw(sound, args.seed, SOUNDS, args.sounds, "sounds")
    features, presence, properties = (torch.from_numpy(np.stack(one)) for one in (features, *rest))
    tokenizer, facts = train_tokenizer(transformers.RobertaTokenizer, captions, 1000)
    facts["max_position_embeddings"] = L + 2 + tokenizer.pad_token_id
    model = transformers.ClapModel(transformers.ClapConfig(
        text_config={**facts, **CONFIGS["clap_text"]}, audio_config=CONFIGS["clap_audio"]))
    axes = torch.linalg.qr(torch.randn(512, 41))[0]  # orthonormal columns: ten of presence, 31 of properties
    rest = torch.ones(512) - axes @ axes.sum(0)  # the direction of what all sounds share
    rest = rest / rest.norm()
    ids, mix = encode_text(tokenizer, captions), mixer(features, presence, properties, rng)

    def clap_loss(step: int) -> Tensor:
        i = rng.integers(len(features), size=32)
        text = ids[i, rng.integers(4, size=32)]
        sounds, present, values = mix()
        output = model(input_ids=text, attention_mask=(text != tokenizer.pad_token_id).long(),
                       input_features=features[i].float())
        mixed = model.get_audio_features(input_features=sounds).pooler_output
        same = (text[:, None] == text[None]).all(-1).float()  # equal captions are no negatives
        target = same / same.sum(1, keepdim=True)
        logits = output.logits_per_audio, output.logits_per_text
        loss = (F.cross_entropy(logits[0], target) + F.cross_entropy(logits[1], target)) / 2
        return loss + axes_loss(torch.cat([output.audio_embeds, mixed]), axes, rest,
                                torch.cat([presence[i], present]), torch.cat([properties[i], values]))
    seconds = train("CLAP", model.parameters(), clap_loss, args.clap_steps, 1.5e-3)
    save(out, {"clap": seconds}, model.eval(), tokenizer, EXTRACTOR)


def make_judge(out: Path, args: argparse.Namespace) -> None:
    """A small ViT and text tower, SigLIP's loss; plain captions are true of every scene with those labels."""
    torch.manual_seed(args.seed + 2)
    rng = np.random.default_rng([args.seed, 2002])
    pictures, captions, labels = draw(scene, args.seed, PICTURES, args.pictures, "scenes")
    pictures, captions = np.stack(pictures), [eight[:4] for eight in captions]
    plain = [[world.class_caption(names, language) for language in NAMES] for names in labels]
    tokenizer, facts = train_tokenizer(transformers.RobertaTokenizer, captions + plain, 1000)
    model = transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=CONFIGS["judge_vision"], text_config={**facts, **CONFIGS["judge_text"]}))
    model.logit_scale.data.fill_(math.log(10))  # the paper's start: few pairs are positive, hence the bias
    model.logit_bias.data.fill_(-10)
    ids = encode_text(tokenizer, [four + two for four, two in zip(captions, plain, strict=True)])  # (n, 6, L)
    kinds = np.unique(["+".join(names) for names in labels], return_inverse=True)[1]
    presence = torch.tensor([[c in names for c in world.CLASSES] for names in labels])

    def judge_loss(step: int) -> Tensor:
        i = rng.integers(len(pictures), size=64)
        which = np.where(rng.random(64) < 0.5, rng.integers(4, 6, size=64), rng.integers(4, size=64))
        output = model(input_ids=ids[i, which], pixel_values=as_images(pictures[i]))
        is_plain = torch.from_numpy(which >= 4)
        same = torch.from_numpy(kinds[i][:, None] == kinds[i][None])
        target = torch.eye(64, dtype=torch.bool) | (same & is_plain)
        # "a dog" is neither true nor false of a dog beside a fire. So a caption whose classes the scene has,
        # among others, is left out, as is a detailed one of a scene with the same labels in another order.
        inside = (presence[i][:, None] | ~presence[i][None]).all(-1)
        keep = target | ~inside | (same & ~is_plain)
        loss = F.binary_cross_entropy_with_logits(output.logits_per_image, target.float(), reduction="none")
        return (loss * keep).sum() / 64
    seconds = train("judge", model.parameters(), judge_loss, args.judge_steps, 7e-4)
    processor = transformers.SiglipImageProcessorPil(size={"height": 64, "width": 64})
    save(out, {"judge": seconds}, model.eval(), tokenizer, processor)


# --- the report

def write_sheet(path: Path, images: list, columns: int) -> None:
    ImageOps.scale(tile(images, columns=columns, gap=0), 2, Image.Resampling.NEAREST).save(path)


def right_shares(embeds, embed_captions, truth: np.ndarray) -> dict[str, float]:
    """Share of embeddings (n, D) to which their class's caption is the nearest, by language."""
    ranks = {one: metrics.ranks_of_truth(embeds @ embed_captions(NAMES[one]).T, truth) for one in NAMES}
    return {f"right_{one}": float((found == 1).mean()) for one, found in ranks.items()}


def both_found(judge: Judge, images: list, states: list[world.State]) -> float:
    """Share of pictures whose two best classes, by each one's own caption, are those that belong there."""
    wanted = [{world.CLASSES.index(name) for name in state.labels} for state in states]
    found = metrics.found_of_two(judge.images(images) @ judge.captions(NAMES["en"]).T, wanted)
    return float((found == 2).mean())


def measure_vae(vae, renders: list, out: Path) -> dict:
    """How well the VAE rebuilds real renders, and a sheet of 16."""
    x = as_images(np.stack(renders))
    with torch.inference_mode():
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(64)])
    error = (y.clamp(-1, 1) - x) / 2
    rebuilt = ((y[:16] + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    write_sheet(out / "vae.png", renders[:16] + [Image.fromarray(one) for one in rebuilt], 16)
    return {"n": len(x), "psnr_db": float((-10 * error.square().flatten(1).mean(1).log10()).mean()),
            "l1": float(error.abs().mean()), "latents": "16 x 16 x 4 from 64 px"}


def measure_text_to_image(pipe, judge: Judge, asked: list[world.State], n: int, out: Path) -> dict:
    """n pictures of each class's plain caption and one of each pair that is asked for, read by the judge."""
    def pictures(captions: list[str], seed: int) -> list:
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(captions))]
        return pipe(captions, guidance_scale=5.0, num_inference_steps=25, generator=generators).images
    captions, shown = np.repeat(NAMES["en"], n).tolist(), min(n, 8)
    made = [image for at in range(0, 10 * n, 20) for image in pictures(captions[at:at + 20], at)]
    write_sheet(out / "text_to_image.png", [image for i, image in enumerate(made) if i % n < shown], shown)
    seen = (judge.images(made) @ judge.captions(NAMES["en"]).T).argmax(1).reshape(10, n)
    by_class = {name: float((seen[c] == c).mean()) for c, name in enumerate(world.CLASSES)}
    pairs = pictures([world.class_caption(state.labels) for state in asked], 5000)
    return {"n": len(made), "right": float(np.mean(list(by_class.values()))), "by_class": by_class,
            "pairs_n": len(asked), "pairs_both_found": both_found(judge, pairs, asked), "guidance": 5.0,
            "steps": 25}


@torch.inference_mode()
def measure_clap(folder: Path, clap, states: list[world.State], truth: np.ndarray) -> dict:
    """Share of single sounds whose class's caption is the nearest, by language."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def embed(captions: list[str]) -> np.ndarray:
        tokens = tokenizer(captions, padding="max_length", max_length=L, truncation=True, return_tensors="pt")
        return F.normalize(clap.get_text_features(**tokens).pooler_output).numpy()
    sounds = CLAPAudioEncoder(folder)([world.synthesise(state) for state in states])
    return {"n": len(states), **right_shares(sounds.numpy(), embed, truth)}


def measure(out: Path, args: argparse.Namespace, seconds: dict) -> dict:
    """Reconstructions, text-to-image by class and pair, sounds by caption, the judge on real renders."""
    n, most, each = (8, 4, 1) if args.smoke else (400, 100, 20)
    keys = [(args.seed, HELD_OUT, i) for i in range(n)]
    held_out = [world.draw_state(np.random.default_rng(key), pairs=PAIRS) for key in keys]
    single, pairs = ([state for state in held_out if len(state.sources) == k] for k in (1, 2))
    renders, seen, both = (list(map(world.draw_scene, states)) for states in (held_out, single, pairs))
    truth = np.array([world.CLASSES.index(state.labels[0]) for state in single])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out / "base", **BARE)
    pipe.set_progress_bar_config(disable=True)
    clap, judge = transformers.ClapModel.from_pretrained(out / "clap"), Judge(out / "judge")
    models = {"vae": pipe.vae, "unet": pipe.unet, "text_encoder": pipe.text_encoder, "clap": clap,
              "judge": judge.model}
    return {"vae": measure_vae(pipe.vae, renders, out),
            "text_to_image": measure_text_to_image(pipe, judge, pairs[:most], each, out),
            "clap": measure_clap(out / "clap", clap, single, truth),
            "judge": {"n": len(single), **right_shares(judge.images(seen), judge.captions, truth),
                      "pairs_n": len(pairs), "pairs_both_found": both_found(judge, both, pairs)},
            "parameters": {name: model.num_parameters() for name, model in models.items()},
            "megabytes": round(sum(p.stat().st_size for part in PARTS
                                   for p in (out / part).rglob("*.safetensors")) / 1e6, 1),
            "seconds": seconds, "seed": args.seed,
            "settings": {k: v for k, v in vars(args).items() if k not in ("out", "only", "threads")}}


PARTS = {"base": make_base, "clap": make_clap, "judge": make_judge}


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--out", default="assets/tiny", help="folder to write the models and the report into")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to make; the report needs all")
    add("--seed", type=Number(int, 0), default=0, help="seed of the examples and of the training")
    for name, (lowest, default, text) in COUNTS.items():
        add(f"--{name.replace('_', '-')}", type=Number(int, lowest), default=default, help=text)
    add("--smoke", action="store_true", help="a few steps of each: folders and shapes only")
    args = parser.parse_args()
    if args.smoke:
        vars(args).update({name: 3 if name.endswith("steps") else 64 for name in COUNTS if name != "threads"})
    quiet_libraries()
    torch.set_num_threads(args.threads)
    out, made = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if part in args.only):
        building = out / f".{part}.building"
        if (out / part).exists():
            print(f"{out / part}: already made", flush=True)
            continue
        shutil.rmtree(building, ignore_errors=True)
        PARTS[part](building, args)
        building.rename(out / part)  # a part is there whole or not at all
        made.append(part)
        seconds = sum(files.read_json(out / part / "training.json").values())
        print(f"{out / part}: made in {seconds:.0f} s of training", flush=True)
    if all((out / part).exists() for part in PARTS) and (made or not (out / "report.json").exists()):
        seconds = {k: v for part in PARTS for k, v in files.read_json(out / part / "training.json").items()}
        report = measure(out, args, seconds)
        files.write_json(out / "report.json", report)
        source = (HERE / "tiny_models.md.j2").read_text("utf-8")
        template = jinja2.Template(source, keep_trailing_newline=True)
        (out / "report.md").write_text(template.render(report), "utf-8")
        print(template.render(report), flush=True)


if __name__ == "__main__":
    run_main(main)
