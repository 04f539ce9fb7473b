"""Stage 2: LoRA on the UNet's attention together with the audio adapter of stage 1.

    pred (B, C, h, w) = (UNet + LoRA)(noisy_latents, timesteps, text_tokens, audio_tokens), tanh(gate) pinned

Learned: LoRA on to_q, to_k, to_v, to_out.0 of every attention, AudioProjectionMLP and the audio K, V.
In: RUN/stage1/final.safetensors. Out: RUN/stage2/adapter.safetensors, for stock diffusers, LoRA included.

    python train_stage2.py                                                    # the built-in default, CPU
    python train_stage2.py --config configs/sd15.json --data-root my_data     # SD 1.5 and CLAP
    the same command again                                                    # resumes where it stood"""

import argparse
import functools
import math

from clap2diffusion.base import settings
from clap2diffusion.base.exits import run_main
from clap2diffusion.base.settings import SHARE, Number

STAGE = "stage2"


def build_parser() -> argparse.ArgumentParser:
    parser = settings.new_parser(__doc__, warmup_share="it is warmup_steps now: below 1 a share of steps")
    add = parser.add_argument
    # the adapter and LoRA
    add("--init-from", default="", help="stage 1's folder to start from ('' = RUN/stage1)")
    add("--lora-rank", type=Number(int, 0, 1024), default=8, help="rank of LoRA's matrices (0 = no LoRA)")
    add("--rank-growth", nargs="+", type=Number(int, 0), default=[], help="STEP RANK pairs: 0 2 200 4 400 8")
    add("--lora-alpha", type=Number(float, 0.01), default=32.0, help="LoRA is scaled by alpha / rank")
    add("--lora-dropout", type=Number(float, 0, 0.99), default=0.1, help="dropout on LoRA's input")
    add("--strength", type=Number(float, 0.01, 0.99), default=0.4, help="tanh(gate), pinned in this stage")
    # learning
    add("--steps", type=Number(int, 1), default=7000, help="optimizer steps")
    add("--learning-rate", type=SHARE, default=5e-5, help="peak learning rate of AdamW")
    add("--warmup-steps", type=Number(float, 0), default=0.1, help="linear; below 1 a share of --steps")
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
    growth = settings.rank_growth(cfg)
    from clap2diffusion.base.hub import find_models  # imports come as late as errors allow: --help is quick
    models = find_models(cfg)
    import torch

    import common
    from clap2diffusion.base import processes
    from clap2diffusion.base.device import hold_unet
    from clap2diffusion.engine.stage import StageRun

    # device, output folder under its lock, features
    run = StageRun(STAGE, cfg, models, lr_at, starts_from="stage1")
    if run.complete:
        return
    device, autocast, train, val = run.device, run.autocast, run.train, run.val
    empty = train.empty_text_embeds  # (L, D)

    # frozen and trainable models
    unet, scheduler = run.load_frozen()
    dims = {**run.before["dims"], "lora": [cfg.lora_rank, cfg.lora_alpha]}
    audio_proj = common.AudioProjectionMLP(dims["audio_embed"], dims["width"], dims["num_tokens"]).to(device)
    audio_attn = common.AudioAttentionAdapter(unet, cfg.strength).to(device)
    audio_attn.gate.requires_grad_(False)
    audio_attn.attach(unet)
    run.load_before({"audio_proj": audio_proj, "audio_attn": audio_attn})
    audio_proj.proj[0].requires_grad_(not run.before["settings"].get("whiten"))  # a whitening stays as it is
    audio_attn.set_strength(cfg.strength)
    hold_unet(unet, cfg)  # in fewer bits, with checkpointing, compiled: as the flags say
    lora = common.add_lora(unet, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, growth.get(0))

    # optimizer and everything that is saved and loaded
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn, "lora": lora}
    parameters = common.trainable_parameters(weights)
    optimizer = common.make_adamw(common.parameter_groups(weights, audio_proj=cfg.projection_lr_scale), cfg)
    ema = common.make_ema(parameters, cfg.ema_decay)
    forward = functools.partial(predict, unet, audio_proj)  # for validation; model is the same for training
    progress = run.begin(forward, weights, optimizer, unet, dims, ema)
    model = processes.wrap(forward, unet=unet, audio_proj=audio_proj, audio_attn=audio_attn)
    batches = run.batches()

    with run.stepping():
        while True:
            # between steps: validate, keep the best, save, stop
            step = progress.step
            if progress.validation_due(cfg.validate_every, last=cfg.steps):
                unet.eval()  # no LoRA dropout while measuring
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
            if step and step in growth:
                lora.wake(growth[step], common.Draws(cfg.seed, step).generator)
                run.log.text(f"step {step}: LoRA's active rank is {growth[step]}")
            unet.train()
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
    unet.eval()
    run.folder.load_best(weights, progress)
    validation = common.validate(forward, val, scheduler, device, autocast, cfg)
    run.finish(scheduler, best_metric=cfg.best_metric, best_step=progress.best_step, validation=validation)


if __name__ == "__main__":
    run_main(main)
