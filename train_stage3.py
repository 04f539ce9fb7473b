"""Stage 3: the gate alone, one scalar: how strongly the sound counts.

    pred (B, C, h, w) = (UNet + LoRA)(noisy_latents, timesteps, text_tokens, audio_tokens), tanh(gate) from 0

Learned: the gate. Stages 1 and 2 had it pinned. The verdict has three outcomes, each with its exit code:
"in the window" around their value: 0 if there the right sound is better than silence and than another's, each
with its 95 % interval above 0 on the validation clips, else 5; "settled elsewhere": 3; "walked away": 4.
The adapter is finished in any case. Evidence: sweep.png, the loss of each of the three against tanh(gate).
In: RUN/stage2/final.safetensors. Out: RUN/stage3/adapter.safetensors, for stock diffusers, LoRA included.

    python train_stage3.py                                                    # the built-in default, CPU
    python train_stage3.py --config configs/sd15.json --data-root my_data     # SD 1.5 and CLAP
    the same command again                                                    # resumes where it stood"""

import argparse
import functools

from clap2diffusion.base import settings
from clap2diffusion.base.exits import run_main
from clap2diffusion.base.settings import SHARE, SWITCH, Number

STAGE, GATE = "stage3", Number(float, -1, 1)


def build_parser() -> argparse.ArgumentParser:
    parser = settings.new_parser(
        __doc__, adam_8bit="stage 3 trains one number, whose two moments are 8 bytes: 8 bits would save "
        "nothing and round every step; give it to stages 1 and 2")
    add = parser.add_argument
    # what this stage starts from
    add("--init-from", default="", help="stage 2's folder to start from ('' = RUN/stage2)")
    # what a sample is shown: the gate is to weigh real sounds, so none is dropped unless asked for
    add("--caption-drop", type=SHARE, default=0.5, help="share with the empty caption and its sound")
    add("--audio-drop", type=SHARE, default=0.0, help="share with its caption and the null audio")
    add("--both-drop", type=SHARE, default=0.0, help="share with empty caption and null audio")
    # learning: a single scalar barely moves under warm-up and cosine, so there is neither
    add("--steps", type=Number(int, 1), default=2000, help="optimizer steps at most")
    add("--learning-rate", type=Number(float, 0, 10), default=0.1, help="of plain Adam, constant")
    add("--clip", type=Number(float, 1e-6), default=0.5, help="largest gradient norm")
    # the window, and walking away
    add("--window-low", type=GATE, default=0.35, help="lower end of the window of tanh(gate)")
    add("--window-high", type=GATE, default=0.45, help="upper end of the window of tanh(gate)")
    add("--min-steps", type=Number(int, 1), default=20, help="steps before the stage may end in the window")
    add("--window-steps", type=Number(int, 1), default=3, help="steps in a row in it that end the stage")
    add("--away-low", type=GATE, default=0.0, help="a gate below this walks away")
    add("--away-high", type=GATE, default=0.9, help="a gate above this walks away")
    add("--away-steps", type=Number(int, 1), default=100, help="steps in a row away that end the stage")
    add("--require-proof", **SWITCH, default=True,
        help="exit code by the verdict; else 0. The reason is a warning in the adapter in both cases")
    settings.common_flags(parser, STAGE)
    return parser


def predict(unet, audio_proj, noisy_latents, timesteps, text_tokens, audio_embeds):
    """What the UNet predicts (B, C, h, w) of noisy_latents for a text (B, L, D) and a sound (B, E)."""
    audio_tokens = audio_proj(audio_embeds)  # (B, N, D)
    return unet(noisy_latents, timesteps, (text_tokens, audio_tokens)).sample


def gate_loss(batch: dict, draws, model, scheduler, empty_text_embeds, cfg, device, autocast):
    """DDPM's simple loss (Ho et al. 2020, eq. 14) as a function of the gate; a scalar in float32.
    batch: latents_mean and latents_std (B, M, C, h, w), audio_embeds (B, k, E), text_embeds (B, L, D)."""
    import common  # not above: --help answers before torch loads
    latents = common.draw_latents(batch, draws).to(device)  # (B, C, h, w)
    noise = draws.normal(*latents.shape).to(device)
    timesteps = draws.integers(0, scheduler.config.num_train_timesteps, len(latents)).to(device)  # (B,)
    audio_embeds = common.draw_window(batch, draws)  # (B, E)
    text_tokens, audio_embeds = common.drop_conditions(
        batch["text_embeds"], audio_embeds, empty_text_embeds,
        cfg.caption_drop, cfg.audio_drop, cfg.both_drop, draws)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    with autocast():
        pred = model(noisy_latents, timesteps, text_tokens.to(device), audio_embeds.to(device))
    target = common.diffusion_target(scheduler, latents, noise, timesteps)
    return common.mse_per_sample(pred, target).mean()


def main(argv: list[str] | None = None) -> None:
    cfg = settings.read_settings(build_parser(), STAGE, argv)
    from clap2diffusion.base.hub import find_models  # imports come as late as errors allow: --help is quick
    models = find_models(cfg)
    import torch

    import common
    from clap2diffusion.base import processes
    from clap2diffusion.base.device import hold_unet
    from clap2diffusion.engine import gate_sweep
    from clap2diffusion.engine.stage import StageRun

    # device, output folder under its lock, features
    run = StageRun(STAGE, cfg, models, lambda step, cfg: cfg.learning_rate, starts_from="stage2")
    if run.complete:
        return gate_sweep.require_proof(run.folder.path, cfg)
    device, autocast, train, val = run.device, run.autocast, run.train, run.val
    empty = train.empty_text_embeds  # (L, D)

    # frozen and trainable models
    unet, scheduler = run.load_frozen()
    dims = run.before["dims"]
    audio_proj = common.AudioProjectionMLP(dims["audio_embed"], dims["width"], dims["num_tokens"]).to(device)
    audio_attn = common.AudioAttentionAdapter(unet, 0.0).to(device)
    audio_attn.attach(unet)
    hold_unet(unet, cfg)  # in fewer bits, with checkpointing, compiled: as the flags say
    lora = common.add_lora(unet, *dims["lora"], dropout=0.0)
    weights = {"audio_proj": audio_proj, "audio_attn": audio_attn, "lora": lora}
    run.load_before(weights)
    for parameter in common.trainable_parameters(weights):
        parameter.requires_grad_(parameter is audio_attn.gate)
    unet.eval()
    audio_attn.set_strength(0.0)

    # optimizer and everything that is saved and loaded
    parameters = common.trainable_parameters(weights)
    optimizer = torch.optim.Adam(parameters, lr=cfg.learning_rate)
    forward = functools.partial(predict, unet, audio_proj)  # for validation; model is the same for training
    progress = run.begin(forward, weights, optimizer, unet, dims, in_window=0, away=0, gates=[],
                         sweep_before=None)
    model = processes.wrap(forward, unet=unet, audio_proj=audio_proj, audio_attn=audio_attn)
    batches = run.batches()
    measured = forward, val, scheduler, device, autocast, cfg
    losses = functools.partial(common.validation_losses, *measured)

    with run.stepping():
        progress.sweep_before = progress.sweep_before or gate_sweep.sweep_gate(audio_attn, losses, ("right",))
        while True:
            # between steps: validate, decide, save, stop
            step, tanh_gate = progress.step, float(torch.tanh(audio_attn.gate.detach()))
            if progress.validation_due(cfg.validate_every, last=cfg.steps):
                progress.record_validation(common.validate(*measured), "val_right", 0.0, run.log)
            if step >= cfg.min_steps and progress.in_window >= cfg.window_steps:
                progress.ended = f"tanh(gate) in the window for {progress.in_window} steps"
            elif progress.away >= cfg.away_steps:
                progress.ended = "the gate walked away"
            elif step >= cfg.steps:
                progress.ended = "all steps" if progress.in_window else "all steps, outside the window"
            run.save_if_due()  # on a stop signal (Ctrl-C, SIGTERM) it saves and leaves
            if progress.ended:
                break
            run.sample_if_due()

            # the step
            total = 0.0
            optimizer.zero_grad(set_to_none=True)
            for micro in range(cfg.accumulation):
                batch, draws = next(batches), common.Draws(cfg.seed, step, micro)
                with processes.sync_at(model, micro == cfg.accumulation - 1):
                    loss = gate_loss(batch, draws, model, scheduler, empty, cfg, device, autocast)
                    (loss / cfg.accumulation).backward()
                total = total + loss.detach() / cfg.accumulation
            total = processes.mean(total)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            if run.check(step, total, grad_norm):  # finite; else this update is skipped
                optimizer.step()
            tanh_gate = float(torch.tanh(audio_attn.gate.detach()))
            inside = cfg.window_low <= tanh_gate <= cfg.window_high
            progress.in_window = progress.in_window + 1 if inside else 0
            progress.away = 0 if cfg.away_low <= tanh_gate <= cfg.away_high else progress.away + 1
            progress.gates = [*progress.gates[-99:], tanh_gate]
            run.step_done(total, grad_norm, tanh_gate=tanh_gate)

    # the sweep is the evidence; the adapter is finished whatever the verdict, which sets the exit code
    after, validation = gate_sweep.sweep_gate(audio_attn, losses), common.validate(*measured)
    found = gate_sweep.conclude(run.folder.path, progress, after, tanh_gate, validation, len(val), cfg)
    run.finish(scheduler, **found, validation=validation)
    gate_sweep.require_proof(run.folder.path, cfg)


if __name__ == "__main__":
    run_main(main)
