"""The usual loop, to compare with: every step encodes its pictures, captions and sounds again.

Step for step what diffusers' examples/text_to_image/train_text_to_image_lora.py does (its defaults for optimizer, learning
rate, clipping, loader and precision; under bf16 the frozen weights are held in it), on the UNet, LoRA and audio adapter of
our stage 2, with CLAP called in every step besides. Run by peer.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Number, new_parser, run_main  # noqa: E402


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data-root", required=True, help="data folder")
    add("--base-model", required=True, help="Stable Diffusion, a folder")
    add("--clap-model", required=True, help="CLAP, a folder")
    add("--image-size", type=Number(int, 64, 1024), default=512, help="side of the pictures")
    add("--batch-size", type=Number(int, 1), default=16, help="samples in a step")
    add("--steps", type=Number(int, 1), default=10, help="optimizer steps")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="fp32 is the published script's default")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as the stages' flag")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from tqdm import tqdm
    from transformers import CLIPTextModel, CLIPTokenizer

    import common
    import data
    import features
    device, autocast = common.pick_device(args.device, args.precision)
    dtype = common.DTYPES[args.precision]
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.base_model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(args.base_model, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(args.base_model, subfolder="vae").requires_grad_(False).to(device, dtype)
    text_encoder = CLIPTextModel.from_pretrained(args.base_model, subfolder="text_encoder").requires_grad_(False).to(device, dtype)
    unet = UNet2DConditionModel.from_pretrained(args.base_model, subfolder="unet").requires_grad_(False).to(device, dtype)
    clap = common.CLAPAudioEncoder(args.clap_model).to(device)
    audio_proj = common.AudioProjectionMLP(clap.embed_dim, unet.config.cross_attention_dim).to(device)
    audio_attn = common.AudioAttentionAdapter(unet, 0.4).to(device)
    audio_attn.gate.requires_grad_(False)
    audio_attn.attach(unet)
    common.add_lora(unet, 8, 32.0, 0.1)
    lora = common.LoraWeights(unet)
    parameters = common.trainable_parameters({"audio_proj": audio_proj, "audio_attn": audio_attn, "lora": lora})
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=args.steps)

    rows, _ = data.read_manifest(args.data_root)
    decode = features._Decode([row for row in rows if row.split == "train"], args.image_size, clap.sampling_rate, clap.window_s, 1)
    captions = [row.text for row in decode.rows]

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return len(captions)

        def __getitem__(self, i):
            image, [waveform], _ = decode[i]
            input_ids = tokenizer(captions[i], max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
                                  return_tensors="pt").input_ids[0]
            return torch.from_numpy(image), input_ids, waveform

    def collate(samples):
        images, input_ids, waveforms = zip(*samples, strict=True)
        return torch.stack(images).float(), torch.stack(input_ids), waveforms

    loader = torch.utils.data.DataLoader(Samples(), shuffle=True, collate_fn=collate, batch_size=args.batch_size, drop_last=True)
    step, bar = 0, tqdm(total=args.steps, unit="step")
    unet.train()
    while step < args.steps:
        for pixel_values, input_ids, waveforms in loader:
            with torch.no_grad():  # as in the published script nothing in it needs a gradient
                latents = vae.encode(pixel_values.to(device, dtype)).latent_dist.sample() * vae.config.scaling_factor
                text_tokens = text_encoder(input_ids.to(device), return_dict=False)[0]
            audio_embeds = clap(list(waveforms)).clone()
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
            if step == args.steps:
                break


if __name__ == "__main__":
    run_main(main)
