"""How much faster than what people run today? Stage 2 against the usual loop that encodes in every step.

    python bench/peer.py                # the default model; writes bench/results/peer-tiny-DEVICE.{json,md}
    python bench/peer.py --sd15 --image-size 256 --batch-size 1 --steps 5
    python bench/peer.py --published train_text_to_image_lora.py    # pip install datasets torchvision

Each is a process of its own, in turns, on the same UNet, LoRA, pictures, batch and resolution: ours with its
features cached (train_stage2.py), the loop (VAE, text encoder and CLAP in every step), and diffusers'
published script, which has no sound. Seconds a step are the median between optimizer steps; the first step's
time is from the start of the process; memory is the peak of the steps after the first one.

The loop does step for step what diffusers' examples/text_to_image/train_text_to_image_lora.py does: its
defaults for optimizer, learning rate, clipping, loader and precision; under bf16 the frozen weights are held
in it. It runs on the UNet, LoRA and audio adapter of our stage 2, and calls CLAP in every step besides."""

import json
from itertools import chain, islice, repeat
from pathlib import Path

import bench_tools as tools
import diffusers  # no `from`, as of transformers: naming a class loads it, which takes seconds
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.optimization import get_scheduler
from tqdm import tqdm

import common
from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.dataset.cache import Decode
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.dataset.manifest import read_manifest

PUBLISHED = "train_text_to_image_lora.py"
PARSER = tools.bench_parser(__doc__, steps=40, repeats=5, batch_size=16, image_size=64)
PARSER.add_argument("--loop", nargs=3, metavar=("DATA_ROOT", "BASE_MODEL", "CLAP_MODEL"),
                    help="run the loop alone, in the first of --precisions, and write no table")
PARSER.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"],
                    help="precisions to run each in")
PARSER.add_argument("--published", default="", help=f"diffusers' {PUBLISHED} of the installed version")


def link_pictures(world: Path, folder: Path) -> None:
    """The world's training pictures once more, as Hugging Face's imagefolder."""
    folder.mkdir()
    listed = []
    for row in map(json.loads, (world / "metadata.jsonl").read_text("utf-8").splitlines()):
        if row["split"] == "train":
            name = Path(row["image_file_name"]).name
            (folder / name).symlink_to(world / row["image_file_name"])
            listed.append(json.dumps({"file_name": name, "text": row["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(listed) + "\n", "utf-8")


def loop(args) -> None:
    """The usual loop, to compare with: every step encodes its pictures, captions and sounds again."""
    (data_root, base, clap), precision = args.loop, args.precisions[0]
    device, autocast = pick_device("auto", precision)

    def frozen(kind, part: str):
        model = kind.from_pretrained(base, subfolder=part)
        return model.requires_grad_(False).to(device, DTYPES[precision])

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = diffusers.DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    text_encoder, clap = frozen(transformers.CLIPTextModel, "text_encoder"), CLAPAudioEncoder(clap).to(device)
    vae, unet = frozen(diffusers.AutoencoderKL, "vae"), frozen(diffusers.UNet2DConditionModel, "unet")
    audio_proj = common.AudioProjectionMLP(clap.embed_dim, unet.config.cross_attention_dim).to(device)
    audio_attn = common.AudioAttentionAdapter(unet, 0.4).to(device)
    audio_attn.gate.requires_grad_(False)
    audio_attn.attach(unet)
    weights = {"proj": audio_proj, "attn": audio_attn, "lora": common.add_lora(unet, 8, 32.0, 0.1)}
    parameters = common.trainable_parameters(weights)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr_scheduler = get_scheduler("constant", optimizer, num_warmup_steps=500, num_training_steps=args.steps)
    rows = [row for row in read_manifest(data_root)[0] if row.split == "train"]
    decode = Decode(rows, args.image_size, clap.sampling_rate, clap.window_s, 1)

    def collate(picked: list[int]) -> tuple:
        """Pictures (B, 3, H, W), token ids (B, L) of the captions, B waveforms (samples,)."""
        images, sounds, _ = zip(*(decode[i] for i in picked), strict=True)
        captions = [rows[i].text for i in picked]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return torch.from_numpy(np.stack(images)), ids, [waveform for [waveform] in sounds]

    loader = torch.utils.data.DataLoader(range(len(rows)), args.batch_size, shuffle=True, collate_fn=collate,
                                         drop_last=True)
    batches = islice(chain.from_iterable(repeat(loader)), args.steps)
    bar = tqdm(batches, **bar_options(total=args.steps, unit="step"))
    unet.train()
    for pixel_values, input_ids, waveforms in bar:
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
        bar.set_postfix(step_loss=value)


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    if args.loop:
        return loop(args)
    if args.published and not Path(args.published).is_file():
        raise UserError(f"--published {args.published}: is not a file; expected diffusers' {PUBLISHED}")
    world = tools.make_world(place / "world", max(16, args.batch_size * 4))
    link_pictures(world, place / "pictures")
    base, clap = tools.models(args, place)
    ours = [*tools.stage_flags(world, (base, clap), args.image_size), "--batch-size", str(args.batch_size)]
    tools.call("train_stage1.py", *ours, "--run", place, "--steps", 1)  # which caches the features
    commands = {}
    for precision in args.precisions:
        frozen = ["--frozen-dtype", "bf16"] if precision == "bf16" else []
        commands["ours", precision] = ["train_stage2.py", *ours, "--init-from", place / "stage1", "--run",
                                       tools.RUN, "--steps", args.steps, "--precision", precision, *frozen]
        commands["loop", precision] = [
            __file__, "--loop", world, base, clap, "--image-size", args.image_size, "--batch-size",
            args.batch_size, "--steps", args.steps, "--precisions", precision]
        if args.published:
            commands[PUBLISHED, precision] = [
                Path(args.published).resolve(), "--pretrained_model_name_or_path", base, "--train_data_dir",
                place / "pictures", "--cache_dir", place / "datasets", "--output_dir", place / "published",
                "--resolution", args.image_size, "--train_batch_size", args.batch_size, "--rank", 8, "--seed",
                0, "--max_train_steps", args.steps, "--checkpointing_steps", 100000, "--mixed_precision",
                "no" if precision == "fp32" else "bf16"]
    about = (f"batch {args.batch_size}, {args.image_size} px, LoRA rank 8, {args.steps} steps, "
             f"{args.repeats} turns; median [lowest, highest]")

    def write(found: dict, done: bool = False) -> None:
        rows = [{"what": f"{name}, {precision}", "s a step": tools.spread(seen["step_s"]),
                 **{f"ours in {one} is faster by": tools.ratios(seen["step_s"], found["ours", one]["step_s"])
                    if ("ours", one) in found else "" for one in args.precisions},
                 "peak memory, MB": round(max(seen["peak_mb"])),
                 "first step done after, s": tools.spread(seen["first_s"])}
                for (name, precision), seen in found.items()]
        tools.write_results(f"peer-{args.size}", about, rows, done=done)

    write(tools.watched_turns(place, args.repeats, commands, args.steps, write), done=True)
