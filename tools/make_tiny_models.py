"""Train the small models of the default from scratch on the sound world, on a CPU: assets/tiny/{base,clap,judge}.

    python tools/make_tiny_models.py                      # all parts; a finished part is skipped
    python tools/make_tiny_models.py --only clap judge    # these parts; two processes may share the work
    python tools/make_tiny_models.py --smoke --out /tmp/tiny   # right shapes in a minute, knows nothing

base   a StableDiffusionPipeline: VAE, UNet, CLIP text encoder, tokenizer, scheduler. It learns from pictures and captions
       only; no sound and nothing computed from a sound reaches it.
clap   a ClapModel and its feature extractor: sounds and captions, contrastively (Wu et al. 2023, arXiv 2211.06687), with
       two linear heads on the audio embedding that are thrown away: which classes sound, and their properties.
judge  a SiglipModel (Zhai et al. 2023, arXiv 2303.15343): real renders and captions, never a generated picture.

Every example is drawn from the generator [seed, 1000 + part, i], which no split of the data folder uses. The report
(report.json, report.md) holds the measurements on examples that were drawn apart from the training ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import string
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sound_world as world  # noqa: E402
from config import Number, new_parser, run_main  # noqa: E402

PARTS = ("base", "clap", "judge")
PICTURES, SOUNDS, HELD_OUT = 1000, 1001, 1002  # first part of each generator's key after the seed
L = 32  # text tokens
WIDTH = 0.05  # standard deviation of the VAE's posterior


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--out", default="assets/tiny", help="folder to write the models and the report into")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to make; the report needs all three")
    add("--seed", type=Number(int, 0), default=0, help="seed of the examples and of the training")
    add("--threads", type=Number(int, 1), default=2, help="CPU threads")
    add("--pictures", type=Number(int, 64), default=20000, help="scenes drawn for VAE, UNet and judge")
    add("--sounds", type=Number(int, 64), default=10000, help="clips synthesised for CLAP")
    add("--vae-steps", type=Number(int, 1), default=4400, help="steps: three quarters on 16 crops, the rest on 8 scenes")
    add("--unet-steps", type=Number(int, 1), default=4800, help="UNet, first part: steps of 32 latents")
    add("--layout-steps", type=Number(int, 1), default=1000, help="UNet, later parts: the noisiest timesteps, then half as many again")
    add("--detail-steps", type=Number(int, 1), default=1600, help="UNet, last parts: the middle timesteps, five times")
    add("--clap-steps", type=Number(int, 1), default=6000, help="steps of 32 clips and 16 mixtures")
    add("--judge-steps", type=Number(int, 1), default=2000, help="steps of 64 pictures")
    add("--smoke", action="store_true", help="a few steps of each: folders and shapes only")
    return parser


# --- examples ---------------------------------------------------------------------------------------------------------

def example(seed: int, part: int, i: int, pairs: float = 0.35) -> tuple[world.State, np.random.Generator]:
    """Example i of a part: its state (a share `pairs` holds two sounds, of every kind) and a generator for its captions."""
    rng = np.random.default_rng([seed, part, i])
    return world.draw_state(rng, pairs=pairs, allow_unheard=True), rng


def _picture(key: tuple[int, int, int]):
    state, rng = example(*key)
    return np.asarray(world.draw_scene(state)), [world.caption(state, rng) for _ in range(4)], state.labels


def _scene(key: tuple[int, int, int]):
    """_picture with four more captions that say everything."""
    state, rng = example(*key)
    captions = [world.caption(state, rng, detail) for detail in [None] * 4 + [world.EVERY_DETAIL] * 4]
    return np.asarray(world.draw_scene(state)), captions, state.labels


def _sound(key: tuple[int, int, int]):
    """One clip as 16-bit samples, four captions, presence (10,) and properties (31,) with NaN where nothing sounds."""
    state, rng = example(*key, pairs=0.5)
    presence, properties = np.zeros(10, np.float32), np.full(31, np.nan, np.float32)
    for source in state.sources:
        c = world.CLASSES.index(source.label)
        presence[c] = 1
        properties[3 * c:3 * c + 3] = source.loudness, source.pitch, source.rate
    properties[30] = state.density
    return (_extractor()(world.synthesise(state), sampling_rate=48000, return_tensors="np")["input_features"][0]
            .astype(np.float16), [world.caption(state, rng) for _ in range(4)], presence, properties, state.labels)


def draw(function, seed: int, part: int, n: int, what: str) -> list:
    """function over the examples 0..n-1 of a part, in two processes, in order."""
    from tqdm import tqdm
    keys = [(seed, part, i) for i in range(n)]
    with ProcessPoolExecutor(2) as pool:
        return list(tqdm(pool.map(function, keys, chunksize=32), total=n, desc=what, unit="example"))


def _extractor():
    from transformers import ClapFeatureExtractor
    return ClapFeatureExtractor(feature_size=64, sampling_rate=48000, hop_length=768, max_length_s=4,
                                fft_window_size=2048, frequency_min=50, frequency_max=14000,
                                truncation="rand_trunc", padding="repeatpad")


def as_images(pictures: np.ndarray):
    """uint8 (B, 64, 64, 3) -> float (B, 3, 64, 64) in [-1, 1]."""
    import torch
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- training -----------------------------------------------------------------------------------------------------------

def train(what: str, parameters, loss_at, steps: int, learning_rate: float, ema=None) -> float:
    """AdamW with warm-up and cosine over loss_at(step) -> scalar; returns the seconds it took."""
    import torch
    from tqdm import tqdm
    parameters, began = list(parameters), time.time()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    with tqdm(range(steps), desc=what, unit="step", mininterval=5) as bar:
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


def train_tokenizer(kind, captions: list[str], vocabulary: int):
    """A byte-level BPE of transformers' own kind, trained on the captions; a sequence is L tokens long.

    Every byte is in the alphabet, so that a word the world never says does not end the sentence.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    every = [" ".join(map(chr, range(0xAC00, 0xAC40))), " ".join(string.printable.strip())]
    return kind(model_max_length=L).train_new_from_iterator([*captions, *every], vocabulary,
                                                            initial_alphabet=ByteLevel.alphabet())


def encode_text(tokenizer, captions: list[str]):
    return tokenizer(captions, padding="max_length", max_length=L, truncation=True, return_tensors="pt")["input_ids"]


def make_base(out: Path, args: argparse.Namespace) -> dict:
    """VAE (64 px -> 16 x 16 x 4), then UNet and text encoder together, on captions, a tenth of them empty.

    UNet and text encoder learn in parts. After the first, at the usual captions and even timesteps, a caption sets the
    class, the size and the sky, but neither height nor count: captions seldom name them, a layout is decided at the few
    noisiest timesteps, and marks in the middle. So in the later parts two of three captions say everything, and
    timesteps are drawn more often from there: first from the noisy end, then, five times over, from the middle.
    """
    import torch
    import torch.nn.functional as F
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, 2000])
    drawn = draw(_scene, args.seed, PICTURES, args.pictures, "scenes")
    pictures, captions = np.stack([d[0] for d in drawn]), [d[1] for d in drawn]

    vae = AutoencoderKL(block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
                        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        sample_size=world.IMAGE_SIZE, mid_block_add_attention=False)
    vae.to(memory_format=torch.channels_last)

    def crops() -> np.ndarray:
        """16 squares of 32 pixels, of three places the one with the most in it: the sky alone teaches little."""
        found = []
        for i in rng.integers(len(pictures), size=16):
            places = [pictures[i, y:y + 32, x:x + 32] for y, x in rng.integers(33, size=(3, 2))]
            found.append(max(places, key=lambda place: place.std()))
        return np.stack(found)

    def vae_loss(step: int):
        whole = step >= 0.75 * args.vae_steps  # group norms see a whole scene's statistics at last
        x = as_images(pictures[rng.integers(len(pictures), size=8)] if whole else crops())
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + WIDTH * torch.randn_like(posterior.mean)).sample
        edges = sum(F.mse_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))  # sharp borders, not only right colours
        return F.mse_loss(y, x) + edges + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()

    kept, seconds = out.with_name(".vae"), {}  # so that a stopped UNet does not cost the VAE
    if (kept / "training.json").exists():
        vae, seconds = AutoencoderKL.from_pretrained(kept), json.loads((kept / "training.json").read_text())
    else:
        seconds["vae"] = train("VAE", vae.parameters(), vae_loss, args.vae_steps, 2e-3)
        with torch.no_grad():  # the posterior's width is the noise the decoder was trained with, everywhere
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = 2 * math.log(WIDTH)
        vae.to(memory_format=torch.contiguous_format).save_pretrained(kept)
        (kept / "training.json").write_text(json.dumps(seconds) + "\n")
    vae.eval()
    with torch.inference_mode():
        latents = torch.cat([vae.encode(as_images(pictures[i:i + 64])).latent_dist.mean
                             for i in range(0, len(pictures), 64)])  # (n, 4, 16, 16)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents.clone() * vae.config.scaling_factor

    torch.manual_seed(args.seed + 3)  # so that a VAE kept from a stopped run changes nothing
    rng = np.random.default_rng([args.seed, 2003])
    tokenizer = train_tokenizer(CLIPTokenizer, [c for eight in captions for c in eight[:4]], 1200)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=L, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=128,
        attention_head_dim=4, norm_num_groups=16)
    # The last timestep is pure noise (Lin et al. 2024, arXiv 2305.08891), which needs v-prediction. In the usual schedule a
    # little of the picture shines through, so the starting noise, not the condition, sets sky and layout when sampling.
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    noiser = DDPMScheduler.from_config(scheduler.config)
    ids = encode_text(tokenizer, [c for eight in captions for c in eight]).view(-1, 8, L)
    empty = encode_text(tokenizer, [""])[0]
    parameters = [*unet.parameters(), *text_encoder.parameters()]

    def unet_loss(first: int, last: int, low: int, high: int, share: float):
        """The loss on captions first..last-1, a `share` of the timesteps drawn from low..high-1."""
        def loss_at(step: int):
            i = rng.integers(len(latents), size=32)
            x, text = latents[i], ids[i, rng.integers(first, last, size=32)]
            text = torch.where(torch.from_numpy(rng.random(32) < 0.1)[:, None], empty, text)
            noise, timesteps = torch.randn_like(x), torch.randint(1000, (32,))
            timesteps = torch.where(torch.rand(32) < share, torch.randint(low, high, (32,)), timesteps)
            hidden = text_encoder(text).last_hidden_state
            pred = unet(noiser.add_noise(x, noise, timesteps), timesteps, hidden).sample
            return F.mse_loss(pred, noiser.get_velocity(x, noise, timesteps))
        return loss_at

    seconds["unet"] = 0.0
    for steps, *how in ((args.unet_steps, 0, 4, 0, 1000, 0.0), (args.layout_steps, 2, 8, 800, 1000, 0.6),
                        (args.layout_steps * 3 // 2, 2, 8, 500, 1000, 0.6), *[(args.detail_steps, 2, 8, 300, 700, 0.7)] * 5):
        ema = EMAModel(parameters, decay=0.998)
        seconds["unet"] += train("UNet", parameters, unet_loss(*how), steps, 1.5e-3, ema)
        ema.copy_to(parameters)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
                            scheduler=scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(out)
    return seconds


def make_clap(out: Path, args: argparse.Namespace) -> dict:
    """HTSAT-style audio tower (128 x 128 mel image, 3 stages) and a two-layer text tower, 512-wide embeddings."""
    import torch
    import torch.nn.functional as F
    from transformers import ClapConfig, ClapModel, RobertaTokenizer
    torch.manual_seed(args.seed + 1)
    rng = np.random.default_rng([args.seed, 2001])
    drawn = draw(_sound, args.seed, SOUNDS, args.sounds, "sounds")
    features = torch.from_numpy(np.stack([d[0] for d in drawn]))  # (n, 1, 251, 64) float16
    captions = [d[1] for d in drawn]
    presence, properties = (torch.from_numpy(np.stack([d[k] for d in drawn])) for k in (2, 3))
    tokenizer = train_tokenizer(RobertaTokenizer, [c for four in captions for c in four], 1000)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id}
    model = ClapModel(ClapConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=192, max_position_embeddings=L + 2 + tokenizer.pad_token_id, **special),
        audio_config=dict(spec_size=128, num_mel_bins=64, patch_size=8, patch_stride=[4, 4], patch_embeds_hidden_size=24,
                          hidden_size=96, depths=[1, 1, 2], num_attention_heads=[2, 4, 8], enable_fusion=False,
                          attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
        projection_dim=512))
    axes = torch.linalg.qr(torch.randn(512, 41))[0]  # orthonormal columns: ten of presence, 31 of properties
    rest = torch.ones(512) - axes @ axes.sum(0)  # the direction of what all sounds share
    rest = rest / rest.norm()
    ids = encode_text(tokenizer, [c for four in captions for c in four]).view(-1, 4, L)

    single = np.flatnonzero(presence.sum(1) == 1)
    loudness, pitch = properties[single, :30].view(-1, 10, 3)[..., :2].nan_to_num().sum(1).numpy().T
    kinds = presence.argmax(1).numpy()[single]
    low, high = np.flatnonzero(pitch <= world.LOW_PITCH), np.flatnonzero(pitch >= world.HIGH_PITCH)

    def mixes():
        """16 sums of a low and a high single sound as one microphone hears them: powers add. Their captions are nobody's."""
        a, b = rng.choice(low, 128), rng.choice(high, 128)
        fits = (kinds[a] != kinds[b]) & (abs(loudness[a] - loudness[b]) <= world.PAIR_LOUDNESS)
        a, b = single[a[fits][:16]], single[b[fits][:16]]
        power = 10 ** (features[a].float() / 10) + 10 ** (features[b].float() / 10)
        both = torch.where(properties[a].isnan(), properties[b], properties[a])
        both[:, 30] = torch.nan
        return 10 * power.log10(), presence[a] + presence[b], both

    def clap_loss(step: int):
        i = rng.integers(len(features), size=32)
        text = ids[i, rng.integers(4, size=32)]
        sounds, present, values = mixes()
        output = model(input_ids=text, attention_mask=(text != tokenizer.pad_token_id).long(),
                       input_features=features[i].float())
        mixed = model.get_audio_features(input_features=sounds).pooler_output
        present, values = torch.cat([presence[i], present]), torch.cat([properties[i], values])
        same = (text[:, None] == text[None]).all(-1).float()  # equal captions are no negatives of each other
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(output.logits_per_audio, target) + F.cross_entropy(output.logits_per_text, target)) / 2
        # Every class and property has a fixed direction of its own, so that two sounds add up and no property is lost in
        # a corner of the space: present is 8 along its direction and absent 0, a property runs from -4 to 4; what does not
        # sound has 0.
        # The embedding's length is fixed, so what these leave over goes to one direction that is the same for all: were it
        # to go anywhere, each pair would have a place of its own that nothing learned of other pairs tells about.
        embeds = F.normalize(torch.cat([output.audio_embeds, mixed]), dim=-1) * math.sqrt(512)
        along = embeds @ axes
        loss = loss + 4 * F.binary_cross_entropy_with_logits(along[:, :10] - 4, present)
        known = ~values.isnan()
        loss = loss + 8 * (along[:, 10:] / 8 + 0.5 - values)[known].square().mean()
        loss = loss + 2 * (along[:, 10:40] / 8)[~known[:, :30]].square().mean()  # of what does not sound
        elsewhere = 1 - (along.square().sum(1) + (embeds @ rest).clamp(min=0).square()) / 512
        return loss + 4 * elsewhere.mean()

    model.train()
    seconds = train("CLAP", model.parameters(), clap_loss, args.clap_steps, 1.5e-3)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    _extractor().save_pretrained(out)
    return {"clap": seconds}


def make_judge(out: Path, args: argparse.Namespace) -> dict:
    """A small ViT and text tower with SigLIP's loss; plain captions count as true for every scene with those labels."""
    import torch
    import torch.nn.functional as F
    from transformers import RobertaTokenizer, SiglipConfig, SiglipImageProcessorPil, SiglipModel
    torch.manual_seed(args.seed + 2)
    rng = np.random.default_rng([args.seed, 2002])
    drawn = draw(_picture, args.seed, PICTURES, args.pictures, "scenes")
    pictures, captions, labels = np.stack([d[0] for d in drawn]), [d[1] for d in drawn], [d[2] for d in drawn]
    plain = [[world.class_caption(names, language) for language in ("en", "ko")] for names in labels]
    tokenizer = train_tokenizer(RobertaTokenizer, [c for four in captions for c in four] + sum(plain, []), 1000)
    tower = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    model = SiglipModel(SiglipConfig(
        vision_config=dict(image_size=64, patch_size=8, num_hidden_layers=4, **tower),
        text_config=dict(vocab_size=len(tokenizer), max_position_embeddings=L, num_hidden_layers=2, projection_size=128,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, **tower)))
    model.logit_scale.data.fill_(math.log(10))  # the paper's start: few pairs are positive, so the bias is low
    model.logit_bias.data.fill_(-10)
    ids = encode_text(tokenizer, [c for row, both in zip(captions, plain, strict=True) for c in row + both]).view(-1, 6, L)
    kinds = sorted(set(labels))
    label_ids = np.array([kinds.index(names) for names in labels])
    presence = torch.tensor([[c in names for c in world.CLASSES] for names in labels])

    def judge_loss(step: int):
        i = rng.integers(len(pictures), size=64)
        which = np.where(rng.random(64) < 0.5, rng.integers(4, 6, size=64), rng.integers(4, size=64))
        logits = model(input_ids=ids[i, which], pixel_values=as_images(pictures[i])).logits_per_image  # (64, 64)
        is_plain = torch.from_numpy(which >= 4)
        same = torch.from_numpy(label_ids[i][:, None] == label_ids[i][None])
        target = torch.eye(64, dtype=torch.bool) | (same & is_plain)
        # "a dog" is neither true nor false of a dog beside a fire: a caption whose classes the scene has, but not only
        # those, is left out, and so is a detailed caption of another scene with the same labels in another order
        inside = (presence[i][:, None] | ~presence[i][None]).all(-1)
        keep = target | ~inside | (same & ~is_plain)
        loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        return (loss * keep).sum() / 64

    seconds = train("judge", model.parameters(), judge_loss, args.judge_steps, 7e-4)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(out)
    return {"judge": seconds}


# --- the report -----------------------------------------------------------------------------------------------------------

def sheet(images: list, columns: int, scale: int = 2):
    from PIL import Image
    width, height = images[0].size
    page = Image.new("RGB", (columns * width * scale, -(-len(images) // columns) * height * scale))
    for i, image in enumerate(images):
        page.paste(image.resize((width * scale, height * scale), Image.Resampling.NEAREST),
                   (i % columns * width * scale, i // columns * height * scale))
    return page


def measure(out: Path, args: argparse.Namespace, seconds: dict) -> dict:
    """Reconstructions, text-to-image by class and pair, sounds by caption, the judge on real renders."""
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image
    from transformers import AutoTokenizer, ClapModel

    import metrics
    from judge import Judge
    n = 8 if args.smoke else 400
    held_out = [example(args.seed, HELD_OUT, i)[0] for i in range(n)]
    single = [state for state in held_out if len(state.sources) == 1]
    pairs = [state for state in held_out if len(state.sources) == 2]
    renders = {state: world.draw_scene(state) for state in held_out}
    names = {language: [world.class_caption((c,), language) for c in world.CLASSES] for language in ("en", "ko")}

    pipe = StableDiffusionPipeline.from_pretrained(out / "base", safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    x = as_images(np.stack([np.asarray(renders[state]) for state in held_out]))
    with torch.inference_mode():
        y = torch.cat([pipe.vae.decode(pipe.vae.encode(part).latent_dist.mean).sample for part in x.split(64)])
    error = (y.clamp(-1, 1) - x) / 2
    psnr = float((-10 * error.square().flatten(1).mean(1).log10()).mean())
    rebuilt = [Image.fromarray(((im + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()) for im in y[:16]]
    sheet([renders[state] for state in held_out[:16]] + rebuilt, 16).save(out / "vae.png")

    judge = Judge(out / "judge")
    truth = torch.tensor([world.CLASSES.index(state.labels[0]) for state in single])
    captions = {language: judge.captions(names[language]) for language in names}  # (10, D)
    seen = judge.images([renders[s] for s in single])
    right = {language: float(np.mean((seen @ captions[language].T).argmax(1) == truth.numpy())) for language in names}

    def both_found(images: list, states: list) -> float:
        """Share of pictures whose two best classes, by the caption of each class alone, are the two that belong there."""
        wanted = [{world.CLASSES.index(name) for name in s.labels} for s in states]
        return float(metrics.both_found(judge.images(images) @ captions["en"].T, wanted).mean())

    count = 1 if args.smoke else 20
    wanted = [c for c in range(10) for _ in range(count)]
    made = []
    for at in range(0, len(wanted), 20):
        made += pipe([names["en"][c] for c in wanted[at:at + 20]], guidance_scale=5.0, num_inference_steps=25,
                     generator=[torch.Generator().manual_seed(at + k) for k in range(len(wanted[at:at + 20]))]).images
    guessed = (judge.images(made) @ captions["en"].T).argmax(1).tolist()
    by_class = {world.CLASSES[c]: float(np.mean([g == c for g, w in zip(guessed, wanted, strict=True) if w == c]))
                for c in range(10)}
    sheet([made[c * count + k] for c in range(10) for k in range(min(count, 8))], min(count, 8)).save(
        out / "text_to_image.png")
    asked = pairs[:4 if args.smoke else 100]
    made_pairs = pipe([world.class_caption(s.labels) for s in asked], guidance_scale=5.0, num_inference_steps=25,
                      generator=[torch.Generator().manual_seed(5000 + i) for i in range(len(asked))]).images

    clap, tokenizer = ClapModel.from_pretrained(out / "clap"), AutoTokenizer.from_pretrained(out / "clap")
    extractor = _extractor()
    with torch.inference_mode():
        features = extractor([world.synthesise(s) for s in single], sampling_rate=48000, return_tensors="pt")
        audio = clap.get_audio_features(features["input_features"]).pooler_output
        found = {}
        for language in names:
            ids = encode_text(tokenizer, names[language])
            text = clap.get_text_features(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long())
            similarity = torch.nn.functional.normalize(audio) @ torch.nn.functional.normalize(text.pooler_output).T
            found[language] = float((similarity.argmax(1) == truth).float().mean())

    size = sum(p.stat().st_size for p in out.rglob("*.safetensors"))
    return {
        "vae": {"n": n, "psnr_db": psnr, "l1": float(error.abs().mean()), "latents": "16 x 16 x 4 from 64 px"},
        "text_to_image": {"n": len(wanted), "right": float(np.mean(list(by_class.values()))), "by_class": by_class,
                          "pairs_n": len(asked), "pairs_both_found": both_found(made_pairs, asked),
                          "guidance": 5.0, "steps": 25},
        "clap": {"n": len(single), "right_en": found["en"], "right_ko": found["ko"]},
        "judge": {"n": len(single), "right_en": right["en"], "right_ko": right["ko"], "pairs_n": len(pairs),
                  "pairs_both_found": both_found([renders[s] for s in pairs], pairs)},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in
                       {"vae": pipe.vae, "unet": pipe.unet, "text_encoder": pipe.text_encoder, "clap": clap,
                        "judge": judge.model}.items()},
        "megabytes": round(size / 1e6, 1), "seconds": seconds, "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "only", "threads")},
    }


def to_markdown(report: dict) -> str:
    t2i, clap, judge, vae = report["text_to_image"], report["clap"], report["judge"], report["vae"]
    classes = ", ".join(f"{name} {share:.2f}" for name, share in t2i["by_class"].items())
    return f"""# The small models

Made by `python tools/make_tiny_models.py` (seed {report['seed']}); everything below on examples held out of training.

| what | n | value |
|---|---|---|
| VAE reconstruction, PSNR | {vae['n']} | {vae['psnr_db']:.1f} dB (L1 {vae['l1']:.4f} of full range) |
| text-to-image, right class by the judge | {t2i['n']} | {t2i['right']:.3f} |
| text-to-image, both of a pair found (chance 1 in 45) | {t2i['pairs_n']} | {t2i['pairs_both_found']:.3f} |
| CLAP, right class of a sound by caption, English / Korean | {clap['n']} | {clap['right_en']:.3f} / {clap['right_ko']:.3f} |
| judge, right class of a real render, English / Korean | {judge['n']} | {judge['right_en']:.3f} / {judge['right_ko']:.3f} |
| judge, both of a pair found in a real render | {judge['pairs_n']} | {judge['pairs_both_found']:.3f} |

Text-to-image by class: {classes}.
Parameters: {', '.join(f'{name} {count:,}' for name, count in report['parameters'].items())}; {report['megabytes']} MB.
Seconds of training: {', '.join(f'{name} {s:.0f}' for name, s in report['seconds'].items())}.
"""


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.smoke:
        args.pictures = args.sounds = 64
        args.vae_steps = args.unet_steps = args.layout_steps = args.detail_steps = args.clap_steps = args.judge_steps = 3
    import torch

    import common
    common.quiet_libraries()
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for part, make in (("base", make_base), ("clap", make_clap), ("judge", make_judge)):
        if part not in args.only:
            continue
        if (out / part).exists():
            print(f"{out / part}: already made", flush=True)
            continue
        building = out / f".{part}.building"
        shutil.rmtree(building, ignore_errors=True)
        seconds = make(building, args)
        (building / "training.json").write_text(json.dumps(seconds) + "\n")
        building.rename(out / part)  # a part is there whole or not at all
        made.append(part)
        print(f"{out / part}: made in {sum(seconds.values()):.0f} s of training", flush=True)
    if all((out / part).exists() for part in PARTS) and (made or not (out / "report.json").exists()):
        seconds = {k: v for part in PARTS for k, v in json.loads((out / part / "training.json").read_text()).items()}
        report = measure(out, args, seconds)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "report.md").write_text(to_markdown(report))
        print(to_markdown(report), flush=True)


if __name__ == "__main__":
    run_main(main)
