"""Stage 3: the gate alone, one scalar: how strongly the sound counts.

    pred (B, C, h, w) = (UNet + LoRA)(noisy_latents, timesteps, text_tokens, audio_tokens), tanh(gate) free from 0

Learned: the gate. Stages 1 and 2 had it pinned, so a gate that returns to their value by itself says that the sound
lowers the loss; one that walks away says that it does not, and ends this stage with exit code 1. The sweep (loss
against tanh(gate) from 0 to 1 on the validation clips, before and after) is the evidence, as sweep.json and sweep.png.
In: RUN/stage2/final.safetensors. Out: RUN/stage3/adapter.safetensors, which stock diffusers loads, LoRA included.

    python train_stage3.py                                                    # the built-in default, CPU
    python train_stage3.py --config configs/sd15.json --data-root my_data     # SD 1.5 and CLAP
    the same command again                                                    # resumes where it stood
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from config import Number, RunFailed, common_flags, describe, new_parser, parse_config, run_main, settings

STAGE = "stage3"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, adam_8bit="stage 3 trains one number, whose two moments are 8 bytes: 8 bits would save nothing "
                        "and round every step; give it to stages 1 and 2")
    add = parser.add_argument
    # what this stage starts from
    add("--init-from", default="", help="stage 2's folder to start from ('' = RUN/stage2)")
    # what a sample is shown: the gate is to weigh real sounds, so none is dropped unless asked for
    add("--caption-drop", type=Number(float, 0, 1), default=0.5, help="share with the empty caption and its sound")
    add("--audio-drop", type=Number(float, 0, 1), default=0.0, help="share with its caption and the null audio")
    add("--both-drop", type=Number(float, 0, 1), default=0.0, help="share with empty caption and null audio")
    # learning: a single scalar barely moves under warm-up and cosine, so there is neither
    add("--steps", type=Number(int, 1), default=2000, help="optimizer steps at most")
    add("--learning-rate", type=Number(float, 0, 10), default=0.1, help="learning rate of plain Adam, constant")
    add("--clip", type=Number(float, 1e-6), default=0.5, help="largest gradient norm")
    # the window, and walking away
    add("--window-low", type=Number(float, -1, 1), default=0.35, help="lower end of the window of tanh(gate)")
    add("--window-high", type=Number(float, -1, 1), default=0.45, help="upper end of the window of tanh(gate)")
    add("--min-steps", type=Number(int, 1), default=20, help="steps before the stage may end in the window")
    add("--window-steps", type=Number(int, 1), default=3, help="steps in a row inside the window that end the stage")
    add("--away-low", type=Number(float, -1, 1), default=0.0, help="a gate below this walks away")
    add("--away-high", type=Number(float, -1, 1), default=0.9, help="a gate above this walks away")
    add("--away-steps", type=Number(int, 1), default=100, help="steps in a row away that end the stage in failure")
    common_flags(parser, STAGE)
    return parser


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(build_parser(), STAGE, argv)
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
    import metrics
    import parallel
    import runs
    import stock

    def gate_loss(batch: dict, draws: common.Draws) -> torch.Tensor:
        """DDPM's simple loss (Ho et al. 2020, eq. 14) as a function of the gate; a scalar in float32."""
        latents = common.draw_latents(batch, draws).to(device)  # (B, C, h, w)
        noise = draws.normal(*latents.shape).to(device)
        timesteps = draws.integers(0, scheduler.config.num_train_timesteps, len(latents)).to(device)
        text_tokens, audio_embeds = common.drop_conditions(
            batch["text_embeds"], common.draw_window(batch, draws), train.empty_text_embeds,
            cfg.caption_drop, cfg.audio_drop, cfg.both_drop, draws)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        with autocast():
            pred = model(noisy_latents, timesteps, text_tokens.to(device), audio_embeds.to(device))
        target = common.diffusion_target(scheduler, latents, noise, timesteps)
        return common.mse_per_sample(pred, target).mean()

    def predict(noisy_latents, timesteps, text_tokens, audio_embeds) -> torch.Tensor:
        audio_tokens = audio_proj(audio_embeds)  # (B, N, D)
        return unet(noisy_latents, timesteps, (text_tokens, audio_tokens)).sample

    # device, output folder under its lock, features
    device, autocast = common.pick_device(cfg.device, cfg.precision)
    folder = runs.RunFolder(Path(cfg.run) / cfg.name, cfg.fresh, cfg.log_dir)
    before_path = Path(cfg.init_from or Path(cfg.run) / "stage2") / "final.safetensors"
    before, before_tensors = runs.previous_stage(before_path, "stage2", fingerprints,
                                                 f"python train_stage2.py --config {cfg.config} --run {cfg.run}")
    dims = before["dims"]
    if folder.is_complete(settings(cfg), before["sha256"]):
        return
    train, val = features.open_splits(cfg, base, clap, device)

    # frozen and trainable models
    torch.manual_seed(cfg.seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=common.DTYPES[cfg.frozen_dtype])
    unet.requires_grad_(False).to(device)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    common.check_dims(unet, train)
    audio_proj = common.AudioProjectionMLP(train.embed_dim, unet.config.cross_attention_dim, dims["num_tokens"])
    audio_attn = common.AudioAttentionAdapter(unet, 0.0)
    audio_attn.attach(unet)
    common.save_memory(unet, cfg)
    if dims["lora"][0]:
        common.add_lora(unet, *dims["lora"], dropout=0.0)
    weights = {"audio_proj": audio_proj.to(device), "audio_attn": audio_attn.to(device),
               "lora": common.LoraWeights(unet)}
    runs.load_objects(before_path, before, before_tensors, weights)
    print(f"{cfg.name}: starts from {before_path} (step {before['step']}, {dims['num_tokens']} audio tokens, "
          f"LoRA rank {dims['lora'][0]})", flush=True)
    for parameter in common.trainable_parameters(weights):
        parameter.requires_grad_(False)
    unet.eval()
    audio_attn.set_strength(0.0)
    audio_attn.gate.requires_grad_(True)

    # optimizer and everything that is saved and loaded
    parameters = common.trainable_parameters(weights)
    optimizer = torch.optim.Adam(parameters, lr=cfg.learning_rate)
    progress = runs.Progress(in_window=0, away=0, sweep_before=None, sweep_after=None)
    objects = {**weights, "optimizer": optimizer, "progress": progress}
    header = runs.make_header(STAGE, settings(cfg), train.cache.name, fingerprints, dims, before["sha256"])
    folder.resume(objects, header, cfg.allow_changed)
    log = runs.Logger(folder.folder, cfg.log_dir, purge_step=progress.step)
    common.log_header(log, cfg, device, weights, unet, train, val, progress)
    check = common.FiniteCheck(log, lambda step: features.sample_ids(train, cfg, step))
    model = parallel.wrap(predict, unet=unet, audio_proj=audio_proj, audio_attn=audio_attn)
    batches = iter(features.make_loader(train, cfg.batch_size, cfg.seed, progress.step * cfg.accumulation,
                                    cfg.steps * cfg.accumulation, cfg.workers, device))

    def gate_sweep() -> list[dict]:
        """Validation loss with the right sound at each tanh(gate) from 0 to 1, on fixed noise; the gate is put back."""
        if not parallel.first():
            return []
        kept, table = audio_attn.gate.data.clone(), []
        for strength in [i / 10 for i in range(11)]:
            audio_attn.set_strength(strength)
            losses = common.validation_losses(predict, val, scheduler, device, autocast, cfg, sounds=("right",))
            mean, low, high = metrics.interval(losses["right"])
            table.append({"tanh_gate": strength, "loss": mean, "low": low, "high": high})
        audio_attn.gate.data.copy_(kept)
        return table

    with runs.StopSignal() as stop, \
            tqdm(total=cfg.steps, initial=progress.step, desc=cfg.name, unit="step", dynamic_ncols=True,
                 disable=not parallel.first()) as bar:
        progress.sweep_before = progress.sweep_before or gate_sweep()
        while True:
            # validation, checkpoint and stopping, before the step
            step, tanh_gate = progress.step, float(torch.tanh(audio_attn.gate.detach()))
            if progress.validation_due(cfg.validate_every, last=cfg.steps):
                progress.record_validation(common.validate(predict, val, scheduler, device, autocast, cfg),
                                           "val_right", 0.0, log)
            if step >= cfg.min_steps and progress.in_window >= cfg.window_steps:
                progress.ended = f"tanh(gate) in the window for {progress.in_window} steps"
            elif progress.away >= cfg.away_steps:
                progress.ended = "the gate walked away"
            elif step >= cfg.steps:
                progress.ended = "all steps, outside the window" if not progress.in_window else "all steps"
            if progress.ended:
                progress.sweep_after = progress.sweep_after or gate_sweep()
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
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for micro in range(cfg.accumulation):
                batch = next(batches)
                with parallel.sync_at(model, micro == cfg.accumulation - 1):
                    loss = gate_loss(batch, common.Draws(cfg.seed, step, micro)) / cfg.accumulation
                    loss.backward()
                total = total + loss.detach()
            total = parallel.mean(total)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            if check(step, total, grad_norm):
                optimizer.step()
            progress.step += 1
            tanh_gate = float(torch.tanh(audio_attn.gate.detach()))
            progress.in_window = progress.in_window + 1 if cfg.window_low <= tanh_gate <= cfg.window_high else 0
            progress.away = 0 if cfg.away_low <= tanh_gate <= cfg.away_high else progress.away + 1
            progress.step_seconds += time.perf_counter() - began
            common.log_step(log, bar, cfg, progress, total, grad_norm, tanh_gate=tanh_gate, device=device)

    # the sweep is the evidence, whatever the verdict
    runs.write_sweep(folder.folder, progress.sweep_before, progress.sweep_after, tanh_gate,
                     (cfg.window_low, cfg.window_high))
    if progress.ended == "the gate walked away":
        reason = "the sound raises the loss" if tanh_gate < cfg.away_low else "the loss asks for ever more sound"
        raise RunFailed(f"{folder.folder}: {reason}: tanh(gate) {tanh_gate:.2f} after {progress.step} steps, the window "
                        f"is [{cfg.window_low}, {cfg.window_high}]; see sweep.png there, and train stages 1 and 2 anew "
                        "or longer")
    in_window = cfg.window_low <= tanh_gate <= cfg.window_high
    result = {"in_window": in_window, "window": [cfg.window_low, cfg.window_high], "sweep_before": progress.sweep_before,
              "sweep_after": progress.sweep_after,
              "validation": common.validate(predict, val, scheduler, device, autocast, cfg)}
    stock.finish(folder, weights, unet, base, header, val, scheduler, cfg, progress, log, result, device)


if __name__ == "__main__":
    run_main(main)
