"""The usual loop, to compare with: every step encodes its pictures, captions and sounds again.

    python bench/peer_loop.py DATA_ROOT BASE_MODEL CLAP_MODEL IMAGE_SIZE BATCH_SIZE STEPS PRECISION

Step for step what diffusers' examples/text_to_image/train_text_to_image_lora.py does: its defaults for
optimizer, learning rate, clipping, loader and precision; under bf16 the frozen weights are held in it. It
runs on the UNet, LoRA and audio adapter of our stage 2, and calls CLAP in every step besides. For peer.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from clap2diffusion.base.device import DTYPES, pick_device  # noqa: E402
from clap2diffusion.dataset.encoders import CLAPAudioEncoder  # noqa: E402
from clap2diffusion.dataset.loading import Decode  # noqa: E402
from clap2diffusion.dataset.manifest import read_manifest  # noqa: E402


def main(data_root: str, base: str, clap: str, image_size: int, batch_size: int, steps: int, precision: str):
    device, autocast = pick_device("auto", precision)

    def frozen(kind, part: str):
        model = kind.from_pretrained(base, subfolder=part)
        return model.requires_grad_(False).to(device, DTYPES[precision])

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    vae, text_encoder = frozen(AutoencoderKL, "vae"), frozen(CLIPTextModel, "text_encoder")
    unet, clap = frozen(UNet2DConditionModel, "unet"), CLAPAudioEncoder(clap).to(device)
    audio_proj = common.AudioProjectionMLP(clap.embed_dim, unet.config.cross_attention_dim).to(device)
    audio_attn = common.AudioAttentionAdapter(unet, 0.4).to(device)
    audio_attn.gate.requires_grad_(False)
    audio_attn.attach(unet)
    common.add_lora(unet, 8, 32.0, 0.1)
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn, "lora": common.LoraWeights(unet)}
    parameters = common.trainable_parameters(weights)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer, num_warmup_steps=500, num_training_steps=steps)
    rows = [row for row in read_manifest(data_root)[0] if row.split == "train"]
    decode = Decode(rows, image_size, clap.sampling_rate, clap.window_s, 1)

    def collate(picked: list[int]) -> tuple:
        """Pictures (B, 3, H, W), token ids (B, L) of the captions, B waveforms (samples,)."""
        images, sounds, _ = zip(*(decode[i] for i in picked), strict=True)
        captions = [rows[i].text for i in picked]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return torch.from_numpy(np.stack(images)), ids, [waveform for [waveform] in sounds]

    loader = torch.utils.data.DataLoader(
        range(len(rows)), batch_size, shuffle=True, collate_fn=collate, drop_last=True)

    step, bar = 0, tqdm(total=steps, unit="step")
    unet.train()
    while step < steps:
        for pixel_values, input_ids, waveforms in loader:
            with torch.no_grad():  # as in the published script nothing in it needs a gradient
                posterior = vae.encode(pixel_values.to(device, vae.dtype)).latent_dist
                latents = posterior.sample() * vae.config.scaling_factor
                text_tokens = text_encoder(input_ids.to(device), return_dict=False)[0]
            audio_embeds = clap(waveforms).clone()
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
            noisy_latents = scheduler.add_noise(latents, noise, timesteps)
            target = common.diffusion_target(scheduler, latents, noise, timesteps)
            with autocast():
                pred = unet(noisy_latents, timesteps, (text_tokens, audio_proj(audio_embeds))).sample
            loss = F.mse_loss(pred.float(), target.float())
            value = loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(step_loss=value)
            if step == steps:
                break


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:7]), sys.argv[7])
