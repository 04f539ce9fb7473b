"""Stage 1: the adapter learns to turn CLAP's embedding into audio tokens that the frozen UNet can use.

    audio_embeds (B, E) -> AudioProjectionMLP -> audio_tokens (B, N, D) -> audio K, V of every cross-attention
    pred (B, C, h, w) = UNet(noisy_latents, timesteps, text_tokens, audio_tokens), tanh(gate) at --strength

Learned: AudioProjectionMLP (with --whiten all but its first layer) and the audio K, V.
Out: RUN/stage1/adapter.safetensors, which stock diffusers loads as an IP-Adapter. RUN is the folder of --run.

    python train_stage1.py                                                    # the built-in default, CPU
    python train_stage1.py --config configs/sd15.json --data-root my_data     # SD 1.5 and CLAP
    the same command again                                                    # resumes where it stood"""

import argparse
import functools
import math

from clap2diffusion.base import settings
from clap2diffusion.base.exits import run_main
from clap2diffusion.base.settings import SHARE, SWITCH, Number

STAGE = "stage1"


def build_parser() -> argparse.ArgumentParser:
    parser = settings.new_parser(__doc__)
    add = parser.add_argument
    # the adapter
    add("--num-tokens", type=Number(int, 1, 256), default=8, help="audio tokens N")
    add("--whiten", **SWITCH, default=True,
        help="the projection's first layer whitens the training set's embeddings and is not trained")
    add("--strength", type=Number(float, 0.01, 0.99), default=0.4, help="tanh(gate), pinned in this stage")
    # learning
    add("--steps", type=Number(int, 1), default=3000, help="optimizer steps")
    add("--learning-rate", type=SHARE, default=1e-4, help="peak learning rate of AdamW")
    add("--warmup-steps", type=Number(float, 0), default=100.0, help="linear; below 1 a share of --steps")
    settings.adapter_flags(parser)  # what a sample is shown, loss weights, AdamW, averaging, stopping
    settings.common_flags(parser, STAGE)
    return parser


def lr_at(step: int, cfg: argparse.Namespace) -> float:
    """Learning rate of a step: linear warm-up, then a cosine that reaches 0 after the last step."""
    warmup_steps = round(cfg.warmup_steps * (cfg.steps if cfg.warmup_steps < 1 else 1))
    if step < warmup_steps:
        return cfg.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, cfg.steps - warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def predict(unet, audio_proj, noisy_latents, timesteps, text_tokens, audio_embeds):
    """What the UNet predicts (B, C, h, w) of noisy_latents for a text (B, L, D) and a sound (B, E)."""
    audio_tokens = audio_proj(audio_embeds)  # (B, N, D)
    return unet(noisy_latents, timesteps, (text_tokens, audio_tokens)).sample


def adapter_loss(batch: dict, draws, model, scheduler, empty_text_embeds, cfg, device, autocast):
    """DDPM's simple loss (Ho et al. 2020, eq. 14) with the sound as condition; a scalar in float32.
    batch: latents_mean and latents_std (B, M, C, h, w), audio_embeds (B, k, E), text_embeds (B, L, D)."""
    import common  # not above: --help answers before torch loads
    latents = common.draw_latents(batch, draws).to(device)  # (B, C, h, w)
    noise = draws.normal(*latents.shape).to(device)
    timesteps = common.draw_timesteps(scheduler, len(latents), cfg.high_noise_share, draws).to(device)  # (B,)
    audio_embeds = common.draw_window(batch, draws)  # (B, E)
    text_tokens, audio_embeds = common.drop_conditions(
        batch["text_embeds"], audio_embeds, empty_text_embeds,
        cfg.caption_drop, cfg.audio_drop, cfg.both_drop, draws)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    with autocast():
        pred = model(noisy_latents, timesteps, text_tokens.to(device), audio_embeds.to(device))
    target = common.diffusion_target(scheduler, latents, noise, timesteps)
    loss_weights = common.min_snr_weights(scheduler, timesteps, cfg.min_snr_gamma)  # (B,)
    return (loss_weights * common.mse_per_sample(pred, target)).mean()


def main(argv: list[str] | None = None) -> None:
    cfg = settings.read_settings(build_parser(), STAGE, argv)
    from clap2diffusion.base.hub import find_models  # imports come as late as errors allow: --help is quick
    models = find_models(cfg)
    import torch

    import common
    from clap2diffusion.base import processes
    from clap2diffusion.base.device import hold_unet
    from clap2diffusion.engine.stage import StageRun

    # device, output folder under its lock, features
    run = StageRun(STAGE, cfg, models, lr_at)
    if run.complete:
        return
    device, autocast, train, val = run.device, run.autocast, run.train, run.val
    empty = train.empty_text_embeds  # (L, D)

    # frozen and trainable models
    unet, scheduler = run.load_frozen()
    width = unet.config.cross_attention_dim
    audio_proj = common.AudioProjectionMLP(train.embed_dim, width, cfg.num_tokens).to(device)
    if cfg.whiten:
        audio_proj.whiten(train.some_audio_embeds(4096))  # more change it little
    audio_attn = common.AudioAttentionAdapter(unet, cfg.strength).to(device)
    audio_attn.gate.requires_grad_(False)
    audio_attn.attach(unet)
    hold_unet(unet, cfg)  # in fewer bits, with checkpointing, compiled: as the flags say

    # optimizer and everything that is saved and loaded
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn}
    parameters = common.trainable_parameters(weights)
    optimizer = common.make_adamw(common.parameter_groups(weights, audio_proj=cfg.projection_lr_scale), cfg)
    ema = common.make_ema(parameters, cfg.ema_decay)
    dims = {"audio_embed": train.embed_dim, "num_tokens": cfg.num_tokens, "width": width}
    forward = functools.partial(predict, unet, audio_proj)  # for validation; model is the same for training
    progress = run.begin(forward, weights, optimizer, unet, dims, ema)
    model = processes.wrap(forward, unet=unet, audio_proj=audio_proj, audio_attn=audio_attn)
    batches = run.batches()

    with run.stepping():
        while True:
            # between steps: validate, keep the best, save, stop
            step = progress.step
            if progress.validation_due(cfg.validate_every, last=cfg.steps):
                with common.averaged(ema, parameters):
                    result = common.validate(forward, val, scheduler, device, autocast, cfg)
                    if progress.record_validation(result, cfg.best_metric, cfg.min_delta, run.log):
                        run.save_best()
            if cfg.patience and progress.bad_validations >= cfg.patience:
                progress.ended = f"no improvement in {cfg.patience} validations"
            elif step >= cfg.steps:
                progress.ended = "all steps"
            run.save_if_due()  # on a stop signal (Ctrl-C, SIGTERM) it saves and leaves
            if progress.ended:
                break
            run.sample_if_due()

            # the step
            total = 0.0
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg) * group["lr_scale"]
            optimizer.zero_grad(set_to_none=True)
            for micro in range(cfg.accumulation):
                batch, draws = next(batches), common.Draws(cfg.seed, step, micro)
                with processes.sync_at(model, micro == cfg.accumulation - 1):
                    loss = adapter_loss(batch, draws, model, scheduler, empty, cfg, device, autocast)
                    (loss / cfg.accumulation).backward()
                total = total + loss.detach() / cfg.accumulation
            total = processes.mean(total)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            if run.check(step, total, grad_norm):  # finite; else this update is skipped
                optimizer.step()
                common.step_ema(ema, parameters)
            run.step_done(total, grad_norm, lr=lr_at(step, cfg))

    # the weights that validated best (with an EMA: their averages) become the stage's result
    run.folder.load_best(weights, progress)
    validation = common.validate(forward, val, scheduler, device, autocast, cfg)
    run.finish(scheduler, best_metric=cfg.best_metric, best_step=progress.best_step, validation=validation)


if __name__ == "__main__":
    run_main(main)
