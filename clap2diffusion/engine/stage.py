"""The upkeep of a stage's run: opening it, what happens between its steps, finishing it."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from clap2diffusion.base import files, hub, processes, tensor_file
from clap2diffusion.base.device import DTYPES, describe_numbers, peak_memory_mb, pick_device
from clap2diffusion.base.exits import RunFailed, Stopped, UserError, stops_awaited
from clap2diffusion.base.models import check_part, load_part
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.settings import settings
from clap2diffusion.dataset.dataset import make_loader, open_splits, sample_ids
from clap2diffusion.engine import run_folder
from clap2diffusion.engine.changes import code_hashes, nothing_learned, warn_of_other_code
from clap2diffusion.engine.dry_run import show_plan
from clap2diffusion.engine.gate_sweep import asks_for_proof, find_warning
from clap2diffusion.engine.run_folder import Logger, Progress, RunFolder, previous_stage, say_warning
from clap2diffusion.engine.watching import NoMeter, Watch, open_meter
from clap2diffusion.pictures.pipelines import (
    UNPROVEN,
    check_export,
    load_base_pipeline,
    rehearse_export,
    sample_pictures,
    write_adapter,
)
from clap2diffusion.pictures.sheets import write_png
from common import FiniteCheck, load_checkpoint, save_checkpoint, trainable_parameters


class StageRun:
    """One run of a stage: device, locked folder and cached features, then log, counters and checkpoints.

    Attributes: device; autocast(), a context; train, val, the cached data sets; before, the header of the
    result it starts from ({} for stage 1); complete, True if the stage has ended already: then nothing was
    loaded and nothing else is there. After begin(): progress, log, check. --dry-run ends the program here.
    Raises UserError: no such device, a folder or data that cannot be used, no result of the stage before, or
    a finished stage that was made with other settings."""

    def __init__(self, stage: str, cfg, models: hub.Models | None, lr_at: Callable | None = None,
                 starts_from: str = ""):
        """lr_at(step, cfg): the schedule of the learning rate, by which a finished stage knows whether it can
        go on to more steps; without it there are none. starts_from: the stage whose result this one begins
        with, found in RUN or in --init-from. models: None with --dry-run alone, see find_models()."""
        self.stage, self.cfg, self.models, self.before, self.lr_at = stage, cfg, models, {}, lr_at
        self.code = code_hashes()  # now: features may take hours, in which a file can be edited
        self.device, self.autocast = pick_device(cfg.device, cfg.precision, cfg.compile)
        if cfg.dry_run:
            if models:
                self._check_models()
            show_plan(cfg, models, self.device, starts_from, lr_at)
            raise SystemExit(0)
        path, before = Path(cfg.run) / cfg.name, starts_from and run_folder.previous_path(cfg, starts_from)
        ended = run_folder.has_ended(path) and not cfg.fresh
        if not ended:
            self._check_models()  # before the folder is made
        self.folder = RunFolder(path, cfg.fresh, cfg.log_dir)
        init = tensor_file.read_header(before)["sha256"] if ended and before and before.exists() else ""
        self.complete = self.folder.is_complete(cfg, models, init, lr_at, self.code)
        if self.complete:
            return
        if ended:
            self._check_models()
        if starts_from:
            self._found = previous_stage(cfg, starts_from, models)
            self.before = self._found[1]
        self.train, self.val = open_splits(cfg, models.base, models.clap, self.device)

    def _check_models(self) -> None:
        """Load what is small of the base model and look at its UNet: before hours of encoding."""
        base = self.models.base
        check_part(UNet2DConditionModel, base, "base model", "unet")
        load_base_pipeline(base, unet=None, vae=None, text_encoder=None)  # tokenizer and scheduler
        self.scheduler = hub.load_small(DDPMScheduler, base, "base model", "scheduler")

    def load_frozen(self) -> tuple[UNet2DConditionModel, DDPMScheduler]:
        """The base model's UNet, frozen and in eval mode, and its noise schedule. Seeds torch's generator.
        Raises UserError: the cached features do not fit the UNet; both sides are named."""
        torch.manual_seed(self.cfg.seed)
        unet = load_part(UNet2DConditionModel, self.models.base, "base model", "unet",
                         DTYPES[self.cfg.frozen_dtype])
        text_dim, width = self.train.empty_text_embeds.shape[-1], unet.config.cross_attention_dim
        if text_dim != width:
            raise UserError(f"text embeddings are {text_dim} wide, the UNet's cross-attention expects {width}"
                            "; text encoder and UNet must be of one base model")
        channels, expected = self.train.latent_shape[0], unet.config.in_channels
        if channels != expected:
            raise UserError(f"latents have {channels} channels, the UNet expects {expected}; VAE and UNet "
                            "must be of one base model")
        return unet.to(self.device), self.scheduler

    def load_before(self, weights: dict) -> None:
        """Load weights from the result of the stage before, and say so."""
        load_checkpoint(*self._found, weights)
        dims = self.before["dims"]
        lora = f", LoRA rank {dims['lora'][0]}" if "lora" in dims else ""
        print(f"{self.cfg.name}: starts from {self._found[0]} (step {self.before['step']}, "
              f"{dims['num_tokens']} audio tokens{lora})", flush=True)
        warning = self.before.get("warning") or find_warning(self._found[0].parent)
        say_warning(self._found[0], warning)
        warn_of_other_code(self._found[0], self.before, self.code)

    def begin(self, forward, weights: dict, optimizer, unet: nn.Module, dims: dict, ema=None,
              **counters) -> Progress:
        """Register what is saved and loaded, resume from the newest checkpoint if there is one, open the log,
        and prove that what is going to train can be exported.
        forward(noisy_latents, timesteps, text_tokens, audio_embeds): the UNet's prediction, as it is trained.
        counters: more of what Progress counts, with the values to begin with.
        Raises RunFailed: stock diffusers would predict something else."""
        cfg, self.forward, self.weights, self.unet = self.cfg, forward, weights, unet
        self.progress = Progress(**counters)
        self.objects = {**weights, "optimizer": optimizer, "progress": self.progress}
        if ema:
            self.objects["ema"] = ema
        # what a checkpoint says about itself; the features' name and content change with the data
        features = {"features": self.train.cache.name, "content": self.train.content}
        self.header = {"stage": self.stage, "settings": settings(cfg) | features,
                       "base_model": cfg.base_model, "clap_model": cfg.clap_model,
                       "fingerprints": self.models.fingerprints, "dims": dims,
                       "init": self.before.get("sha256", ""), "name": cfg.name, "history": self._history(),
                       "code": self.code}
        proof = self._rehearse_export(optimizer) if processes.first() else ""  # before the folder changes
        self.folder.resume(self.objects, self.header, self.models, cfg, self.lr_at)
        if ema:
            ema.to("cpu" if cfg.ema_on_cpu else self.device)  # a checkpoint is read on the CPU
        self.log = Logger(self.folder.path, cfg.log_dir, purge_step=self.progress.step)
        self._log_header()
        if proof:
            self.log.text(f"{cfg.name}: {proof}")
        self.watch = Watch(open_meter(self.device) if processes.first() else NoMeter())
        if self.watch.meter.about:
            self.log.text(f"{cfg.name}: {self.watch.meter.about}")
        self.check = FiniteCheck(self.log, lambda step: sample_ids(self.train, cfg, step))
        return self.progress

    def _rehearse_export(self, optimizer) -> str:
        """Prove that what is going to train can be exported; says what was found.
        Raises RunFailed: it cannot, or the optimizer trains what is not in `weights`."""
        began, own = time.monotonic(), {p for part in self.weights.values() for p in part.parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if strangers := [str(tuple(p.shape)) for p in parameters if p not in own]:
            raise RunFailed(f"{self.folder.path}: no part of `weights` holds {len(strangers)} of the tensors "
                            f"that the optimizer trains (shape {', '.join(strangers[:3])}), so no checkpoint "
                            "would keep them; put the module that they are in into `weights`")
        if "audio_attn" not in self.weights:
            return ("`weights` holds no audio_attn, so nothing is exported to stock diffusers; "
                    "final.safetensors alone will hold what is trained")
        difference = rehearse_export(
            self.folder.path, self.models.base, self.forward, self.weights, self.unet,
            {**self.header, "step": 0}, parameters, self._proof_batch(self.scheduler))
        return (f"with every weight that trains moved, stock diffusers predicts the same, largest difference "
                f"{difference:.1e} ({time.monotonic() - began:.1f} s)")

    def _history(self) -> list[dict]:
        """The results of the stages before, the first stage's first: stage, name and folder, step, the step
        of the best weights (None where there is none), and the SHA-256 of their final.safetensors."""
        if not self.before:
            return []
        folder, before = self._found[0].parent, self.before
        return [*before.get("history", []),
                {"stage": before["stage"], "name": before.get("name", folder.name), "folder": str(folder),
                 "step": before["step"], "best_step": before.get("best_step"), "sha256": before["sha256"]}]

    def _log_header(self) -> None:
        cfg, train, world = self.cfg, self.train, processes.world()
        trainable = sum(p.numel() for p in trainable_parameters(self.weights))
        modules = [self.unet, *(part for part in self.weights.values() if isinstance(part, nn.Module))]
        total = sum(p.numel() for module in modules for p in module.parameters())
        several = f" x {world} processes" if world > 1 else ""
        for line in (
            f"{trainable:,} of {total:,} parameters train ({trainable / total:.1%}); base {cfg.base_model}, "
            f"CLAP {cfg.clap_model}",
            f"{len(train)} train and {len(self.val)} validation clips, {train.embed_dim}-wide embeddings, "
            f"latents {'x'.join(map(str, train.latent_shape))}; {describe_numbers(self.device, cfg)}",
            f"effective batch {cfg.batch_size * cfg.accumulation * world} ({cfg.batch_size} x "
            f"{cfg.accumulation}{several}), EMA {getattr(cfg, 'ema_decay', 0) or 'off'}, seed {cfg.seed}, "
            f"memory so far {peak_memory_mb(self.device)['rss']:.0f} MB",
            f"{'resuming' if self.progress.step else 'starting'} at step {self.progress.step} of {cfg.steps}",
        ):
            self.log.text(f"{cfg.name}: {line}")

    # --- the loop
    def batches(self) -> Iterator[dict]:
        """This process's training batches, from the current step to the last."""
        cfg, done = self.cfg, self.progress.step
        loader = make_loader(self.train, cfg.batch_size, cfg.seed, done * cfg.accumulation,
                             cfg.steps * cfg.accumulation, cfg.workers, self.device)
        return self.watch.waiting(iter(loader))

    @contextmanager
    def stepping(self):
        """Inside, a stop signal waits for the next save_if_due(), and a bar shows the progress."""
        options = bar_options(total=self.cfg.steps, initial=self.progress.step, desc=self.cfg.name,
                              unit="step", dynamic_ncols=True, disable=not processes.first())
        with stops_awaited(speaks=processes.first()) as self.stops, tqdm(**options) as self.bar:
            self.watch.restart()
            yield

    def save_best(self) -> None:
        """Keep the weights as they are now as the best ones."""
        self.watch.lap("validation")
        save_checkpoint(self.folder.best, self.weights, {**self.header, "step": self.progress.step})
        self.watch.lap("saves")

    def save_if_due(self) -> None:
        """Save everything every --save-every steps, at the end and on a signal, and then raise Stopped."""
        step = self.progress.step
        self.watch.lap("validation")  # all that was done since the step
        if self.progress.validated_step == step and (line := self.watch.conclude()):
            self.log.text(f"{self.cfg.name}: {line}")
        signum = processes.largest(self.stops[0] if self.stops else 0)  # one may come while processes agree
        if signum or self.progress.ended or step % self.cfg.save_every == 0:
            self.folder.save(step, self.objects, self.header, self.cfg.keep)
        if signum:
            raise Stopped(signum, f"step {step} is saved in {self.folder.checkpoint(step)}; the same command "
                          "goes on from there")
        self.watch.lap("saves")

    def sample_if_due(self) -> None:
        """Every --sample-every steps, write sample pictures of the present weights. Then a step begins."""
        step, path = self.progress.step, self.folder.path / UNPROVEN
        due = self.cfg.samples and self.cfg.sample_every and step and step % self.cfg.sample_every == 0
        if due and processes.first():
            write_adapter(path, self.weights, self.unet, {**self.header, "step": step})
            self._write_samples(path, f"samples-{step:08d}.png")
            path.unlink()
        self.watch.lap("samples")
        self._step_began = time.perf_counter()

    def _write_samples(self, adapter_path: Path, name: str) -> None:
        sheet = sample_pictures(adapter_path, self.models.base, self.val, self.cfg, self.device)
        write_png(self.folder.path / name, sheet)
        self.log.image(self.progress.step, "samples", sheet)

    def step_done(self, loss: Tensor, grad_norm: Tensor, **more: float) -> None:
        """Count a step. Only log steps fetch the loss from the device."""
        progress = self.progress
        progress.step += 1
        progress.step_seconds += time.perf_counter() - self._step_began
        self.bar.update()
        if progress.step % self.cfg.log_every and progress.step != self.cfg.steps:
            self.watch.lap("steps")
            return
        values = {"loss": float(loss), "grad_norm": float(grad_norm), **more}
        self.watch.lap("steps")  # after the device has caught up
        device = self.watch.read(progress.step)
        shown = {key: f"{value:.4g}" for key, value in values.items()}
        shown |= {key[:3]: f"{device[key]:.0f}%" for key in ("gpu_percent", "cpu_percent") if key in device}
        self.bar.set_postfix(shown, refresh=False)
        self.log.scalars(progress.step, **values, s_per_step=progress.step_seconds / progress.step,
                         memory_mb=max(peak_memory_mb(self.device).values()), **device)
        self.watch.lap("steps")

    # --- the end
    def finish(self, scheduler, **result) -> None:
        """Export and prove the adapter, then write final.safetensors, then result.json with `result` in it.
        Weights without audio K and V of their own (a changed copy of a script) have no stock layout: they are
        saved and not exported. The headers say of the result: best_step, and as `warning` why it may be worth
        nothing, which is said last."""
        if not processes.first():
            return
        result["warning"] = result.get("warning") or nothing_learned(result)
        told = {key: result[key] for key in ("best_step", "verdict", "warning") if key in result}
        header, proof = {**self.header, "step": self.progress.step, **told}, {}
        if "audio_attn" in self.weights:
            proof = {"tanh_gate": float(torch.tanh(self.weights["audio_attn"].gate.detach())),
                     "stock_difference": self._export(header, scheduler)}
        save_checkpoint(self.folder.final, self.weights, header)  # which the next stage takes for proven
        memory, progress = peak_memory_mb(self.device), self.progress
        files.write_json(self.folder.result, {
            "stage": self.cfg.name, "steps": progress.step, "ended": progress.ended, "init": header["init"],
            "seconds": round(progress.wall_seconds(), 1), "step_seconds": round(progress.step_seconds, 1),
            "first_validation": progress.first_validation, "last_validation": progress.last_validation,
            **proof, "peak_memory_mb": memory, "clips": {"train": len(self.train), "val": len(self.val)},
            **result})
        right, other = result["validation"]["val_right"], result["validation"]["other_minus_right"]
        self.log.text(f"{self.cfg.name}: done ({progress.ended}); val_right {right[0]:.5f}, another's sound "
                      f"costs {other[0]:+.5f} [{other[1]:+.5f}, {other[2]:+.5f}]; peak memory "
                      + ", ".join(f"{name} {mb:.0f} MB" for name, mb in memory.items()))
        if result["warning"] and not asks_for_proof(self.cfg):  # else require_proof() says it
            self.log.text(f"warning: {self.folder.path}: {result['warning']}", sys.stderr)
        self.log.close()

    def _export(self, header: dict, scheduler) -> float:
        """Write adapter.safetensors and its sample pictures; the largest difference to stock diffusers."""
        unproven, path = self.folder.path / UNPROVEN, self.folder.path / "adapter.safetensors"
        try:
            write_adapter(unproven, self.weights, self.unet, header)
            difference = check_export(unproven, self.models.base, self.forward, self.weights, self.unet,
                                      self._proof_batch(scheduler))
            os.replace(unproven, path)
        except RunFailed as error:
            raise RunFailed(f"{self.folder.path}: no adapter was made, checkpoints stay: {error}") from None
        finally:
            unproven.unlink(missing_ok=True)
        self.log.text(f"{self.cfg.name}: {path} loads into a stock pipeline, largest difference "
                      f"{difference:.1e}")
        for part in (self.unet, *self.weights.values()):
            if isinstance(part, nn.Module):
                part.cpu()  # nothing trains any more: the pictures get the room
        if self.cfg.samples:
            self._write_samples(path, "samples.png")
        return difference

    def _proof_batch(self, scheduler) -> dict[str, Tensor]:
        """What the export is proven with: up to four validation clips, noise, timesteps from 0 on."""
        n, steps = min(len(self.val), 4), scheduler.config.num_train_timesteps
        rows, generator = [self.val[i] for i in range(n)], torch.Generator().manual_seed(self.cfg.seed)
        return {"noisy_latents": torch.randn((n, *self.val.latent_shape), generator=generator),
                "timesteps": torch.linspace(0, steps - 1, n).long(),
                "text_tokens": torch.stack([row["text_embeds"] for row in rows]),
                "audio_embeds": torch.stack([row["audio_embeds"][0] for row in rows])}
