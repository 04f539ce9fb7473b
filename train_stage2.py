"""Stage 2: LoRA on the UNet's attention together with the audio adapter of stage 1.

    pred (B, C, h, w) = (UNet + LoRA)(noisy_latents, timesteps, text_tokens, audio_tokens), tanh(gate) pinned

Learned: LoRA on to_q, to_k, to_v, to_out.0 of every attention, AudioProjectionMLP and the audio K, V.
In: RUN/stage1/final.safetensors. Out: RUN/stage2/adapter.safetensors, which stock diffusers loads, LoRA included.

    python train_stage2.py                                                    # the built-in default, CPU
    python train_stage2.py --config configs/sd15.json --data-root my_data     # SD 1.5 and CLAP
    the same command again                                                    # resumes where it stood
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from config import Number, UserError, common_flags, describe, new_parser, parse_config, run_main, settings

STAGE = "stage2"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    # the adapter and LoRA
    add("--init-from", default="", help="stage 1's folder to start from ('' = RUN/stage1)")
    add("--lora-rank", type=Number(int, 0, 1024), default=8, help="rank of LoRA's matrices (0 = no LoRA: the adapter alone)")
    add("--rank-growth", nargs="+", type=Number(int, 0), default=[],
        help="LoRA's active rank grows: STEP RANK STEP RANK ..., e.g. 0 2 200 4 400 8, the last one --lora-rank")
    add("--lora-alpha", type=Number(float, 0.01), default=32.0, help="LoRA is scaled by alpha / rank")
    add("--lora-dropout", type=Number(float, 0, 0.99), default=0.1, help="dropout on LoRA's input")
    add("--strength", type=Number(float, 0.01, 0.99), default=0.4, help="tanh(gate), pinned during this stage")
    # what a sample is shown: each share is of samples, not of batches
    add("--caption-drop", type=Number(float, 0, 1), default=0.5, help="share with the empty caption and its sound")
    add("--audio-drop", type=Number(float, 0, 1), default=0.05, help="share with its caption and the null audio")
    add("--both-drop", type=Number(float, 0, 1), default=0.05, help="share with empty caption and null audio")
    add("--high-noise-share", type=Number(float, 0, 1), default=0.0,
        help="share whose timestep comes from the noisiest fifth, where layout is decided (0 = all even)")
    # learning
    add("--steps", type=Number(int, 1), default=7000, help="optimizer steps")
    add("--learning-rate", type=Number(float, 0, 1), default=5e-5, help="peak learning rate of AdamW")
    add("--projection-lr-scale", type=Number(float, 0, 1), default=1.0,
        help="the projection's learning rate as a share of it: its inputs are large, so it may need a smaller one")
    add("--weight-decay", type=Number(float, 0, 1), default=0.01, help="AdamW's weight decay (0 = none)")
    add("--warmup-share", type=Number(float, 0, 1), default=0.1, help="share of steps in linear warm-up")
    add("--clip", type=Number(float, 1e-6), default=0.5, help="largest gradient norm")
    add("--min-snr-gamma", type=Number(float, 0, 1000), default=0.0, help="gamma of Min-SNR loss weights (0 = plain loss)")
    add("--adam-8bit", action=argparse.BooleanOptionalAction, default=False, help="AdamW with moments in 8 bits (bitsandbytes)")
    add("--ema-decay", type=Number(float, 0, 0.999999), default=0.0, help="decay of averaged weights (0 = no EMA)")
    add("--ema-on-cpu", action=argparse.BooleanOptionalAction, default=False, help="hold the averaged weights on the CPU")
    # stopping
    add("--best-metric", choices=("val_right", "silence_minus_right", "other_minus_right"), default="val_right",
        help="what decides best and early stopping")
    add("--patience", type=Number(int, 0), default=0, help="validations without improvement to stop after (0 = never)")
    add("--min-delta", type=Number(float, 0), default=0.0, help="smallest change that counts as improvement")
    common_flags(parser, STAGE)
    return parser


def rank_growth(cfg: argparse.Namespace) -> dict[int, int]:
    """LoRA's active rank from a step on, {step: rank}.

    Raises:
        UserError: steps or ranks do not rise, the first step is not 0 or the last rank is not --lora-rank.
    """
    steps, ranks = cfg.rank_growth[::2], cfg.rank_growth[1::2]
    if steps and not (len(steps) == len(ranks) and steps[0] == 0 and ranks[0] > 0 and ranks[-1] == cfg.lora_rank
                      and all(a < b for row in (steps, ranks) for a, b in zip(row, row[1:]))):
        raise UserError(f"--rank-growth {' '.join(map(str, cfg.rank_growth))}: expected STEP RANK pairs that rise, from step 0 "
                        f"to rank {cfg.lora_rank} (--lora-rank), such as 0 {max(1, cfg.lora_rank // 2)} 1000 {cfg.lora_rank}")
    return dict(zip(steps, ranks))


def lr_at(step: int, cfg: argparse.Namespace) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to 0 at the last step."""
    warmup_steps = round(cfg.warmup_share * cfg.steps)
    if step < warmup_steps:
        return cfg.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, cfg.steps - warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(build_parser(), STAGE, argv)
    growth = rank_growth(cfg)
    print(f"{cfg.name}: settings\n{describe(cfg)}", flush=True)
    if cfg.dry_run:
        return

    import pretrained  # a wrong path is told before torch is loaded
    base = pretrained.resolve_model(cfg.base_model, "base model", pretrained.BASE_PARTS)
    clap = pretrained.resolve_model(cfg.clap_model, "CLAP model")
    fingerprints = pretrained.fingerprints(base, clap)

    import torch  # heavy imports come after every error that needs none
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from tqdm import tqdm

    import common
    import features
    import parallel
    import runs
    import stock

    def adapter_loss(batch: dict, draws: common.Draws) -> torch.Tensor:
        """DDPM's simple loss (Ho et al. 2020, eq. 14) with the sound as condition; a scalar in float32."""
        latents = common.draw_latents(batch, draws).to(device)  # (B, C, h, w)
        noise = draws.normal(*latents.shape).to(device)
        timesteps = common.draw_timesteps(scheduler, len(latents), cfg.high_noise_share, draws).to(device)
        text_tokens, audio_embeds = common.drop_conditions(
            batch["text_embeds"], common.draw_window(batch, draws), train.empty_text_embeds,
            cfg.caption_drop, cfg.audio_drop, cfg.both_drop, draws)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        with autocast():
            pred = model(noisy_latents, timesteps, text_tokens.to(device), audio_embeds.to(device))
        target = common.diffusion_target(scheduler, latents, noise, timesteps)
        loss_weights = common.min_snr_weights(scheduler, timesteps, cfg.min_snr_gamma)
        return (loss_weights * common.mse_per_sample(pred, target)).mean()

    def predict(noisy_latents, timesteps, text_tokens, audio_embeds) -> torch.Tensor:
        audio_tokens = audio_proj(audio_embeds)  # (B, N, D)
        return unet(noisy_latents, timesteps, (text_tokens, audio_tokens)).sample

    # device, output folder under its lock, features
    device, autocast = common.pick_device(cfg.device, cfg.precision)
    folder = runs.RunFolder(Path(cfg.run) / cfg.name, cfg.fresh, cfg.log_dir)
    before_path = Path(cfg.init_from or Path(cfg.run) / "stage1") / "final.safetensors"
    before, before_tensors = runs.previous_stage(before_path, "stage1", fingerprints,
                                                 f"python train_stage1.py --config {cfg.config} --run {cfg.run}")
    num_tokens = before["dims"]["num_tokens"]
    if folder.is_complete(settings(cfg), before["sha256"]):
        return
    train, val = features.open_splits(cfg, base, clap, device)

    # frozen and trainable models
    torch.manual_seed(cfg.seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=common.DTYPES[cfg.frozen_dtype])
    unet.requires_grad_(False).to(device).eval()
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    common.check_dims(unet, train)
    audio_proj = common.AudioProjectionMLP(train.embed_dim, unet.config.cross_attention_dim, num_tokens).to(device)
    audio_attn = common.AudioAttentionAdapter(unet, cfg.strength).to(device)
    audio_attn.gate.requires_grad_(False)
    audio_attn.attach(unet)
    runs.load_objects(before_path, before, before_tensors, {"audio_proj": audio_proj, "audio_attn": audio_attn})
    audio_proj.proj[0].requires_grad_(not before["settings"].get("whiten"))  # a whitening stays as it is
    audio_attn.set_strength(cfg.strength)
    common.save_memory(unet, cfg)
    if cfg.lora_rank:
        common.add_lora(unet, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    print(f"{cfg.name}: starts from {before_path} (step {before['step']}, {num_tokens} audio tokens)", flush=True)

    # optimizer and everything that is saved and loaded
    lora = common.LoraWeights(unet)
    lora.sleep(growth.get(0, cfg.lora_rank))
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn, "lora": lora}
    parameters = common.trainable_parameters(weights)
    groups = common.parameter_groups(weights, audio_proj=cfg.projection_lr_scale)
    optimizer = common.make_adamw(groups, cfg)
    ema = common.make_ema(parameters, cfg.ema_decay)
    progress = runs.Progress()
    objects = {**weights, "optimizer": optimizer, "progress": progress, **({"ema": ema} if ema else {})}
    dims = {"audio_embed": train.embed_dim, "num_tokens": num_tokens, "width": unet.config.cross_attention_dim,
            "lora": [cfg.lora_rank, cfg.lora_alpha]}
    header = runs.make_header(STAGE, settings(cfg), train.cache.name, fingerprints, dims, before["sha256"])
    folder.resume(objects, header, cfg.allow_changed)
    if ema:
        ema.to("cpu" if cfg.ema_on_cpu else device)  # a checkpoint is read on the CPU
    log = runs.Logger(folder.folder, cfg.log_dir, purge_step=progress.step)
    common.log_header(log, cfg, device, weights, unet, train, val, progress)
    check = common.FiniteCheck(log, lambda step: features.sample_ids(train, cfg, step))
    model = parallel.wrap(predict, unet=unet, audio_proj=audio_proj, audio_attn=audio_attn)
    batches = iter(features.make_loader(train, cfg.batch_size, cfg.seed, progress.step * cfg.accumulation,
                                    cfg.steps * cfg.accumulation, cfg.workers, device))

    def validate() -> dict:
        unet.eval()  # no LoRA dropout while measuring
        with common.averaged(ema, parameters):
            return common.validate(predict, val, scheduler, device, autocast, cfg)

    with runs.StopSignal() as stop, \
            tqdm(total=cfg.steps, initial=progress.step, desc=cfg.name, unit="step", dynamic_ncols=True,
                 disable=not parallel.first()) as bar:
        while True:
            # validation, checkpoint and stopping, before the step
            step = progress.step
            if progress.validation_due(cfg.validate_every, last=cfg.steps):
                if progress.record_validation(validate(), cfg.best_metric, cfg.min_delta, log):
                    with common.averaged(ema, parameters):
                        runs.save_checkpoint(folder.best, weights, {**header, "step": step})
            if cfg.patience and progress.bad_validations >= cfg.patience:
                progress.ended = f"no improvement in {cfg.patience} validations"
            if step >= cfg.steps:
                progress.ended = progress.ended or "all steps"
            signum = parallel.largest(stop.signum)  # never stored back: a signal may come while the processes agree
            if signum or progress.ended or step % cfg.save_every == 0:
                folder.save(step, objects, header, cfg.keep)
            if signum:
                folder.stopped(signum, step)
            if progress.ended:
                break
            if cfg.sample_every and step and step % cfg.sample_every == 0:
                stock.sample_during(folder, weights, unet, base, header, val, cfg, log, step, device)

            # the step
            if step and step in growth:
                lora.wake(max(rank for at, rank in growth.items() if at < step), growth[step], common.Draws(cfg.seed, step).generator)
                log.text(f"step {step}: LoRA's active rank is {growth[step]}")
            unet.train()
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg) * group["lr_scale"]
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for micro in range(cfg.accumulation):
                batch = next(batches)
                with parallel.sync_at(model, micro == cfg.accumulation - 1):
                    loss = adapter_loss(batch, common.Draws(cfg.seed, step, micro)) / cfg.accumulation
                    loss.backward()
                total = total + loss.detach()
            total = parallel.mean(total)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            if check(step, total, grad_norm):
                optimizer.step()
                if ema:
                    common.step_ema(ema, parameters)
            progress.step += 1
            progress.step_seconds += time.perf_counter() - began
            common.log_step(log, bar, cfg, progress, total, grad_norm, lr=lr_at(step, cfg), device=device)

    # the weights that validated best become the stage's result
    unet.eval()
    folder.load_best(weights, progress)
    result = {"best_metric": cfg.best_metric, "best_step": progress.best_step,
              "validation": common.validate(predict, val, scheduler, device, autocast, cfg)}
    stock.finish(folder, weights, unet, base, header, val, scheduler, cfg, progress, log, result, device)


if __name__ == "__main__":
    run_main(main)
