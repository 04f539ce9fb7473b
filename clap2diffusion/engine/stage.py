"""The upkeep of a stage's run: opening it, what happens between its steps, finishing it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from clap2diffusion.base import files, hub, processes
from clap2diffusion.base.device import DTYPES, peak_memory_mb, pick_device
from clap2diffusion.base.exits import Stopped, UserError, stops_awaited
from clap2diffusion.base.models import check_part, load_part
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.settings import settings
from clap2diffusion.dataset.dataset import make_loader, open_splits, sample_ids
from clap2diffusion.engine.run_folder import Logger, Progress, RunFolder, previous_stage
from clap2diffusion.pictures.pipelines import check_export, load_base_pipeline, sample_pictures, write_adapter
from clap2diffusion.pictures.sheets import write_png
from common import FiniteCheck, load_checkpoint, save_checkpoint, trainable_parameters


class StageRun:
    """One run of a stage: device, locked folder and cached features, then log, counters and checkpoints.

    Attributes: device; autocast(), a context; train, val, the cached data sets; before, the header of the
    result it starts from ({} for stage 1); complete, True if the stage has ended already: then nothing else
    is there. After begin(): progress, log, check.
    Raises UserError: no such device, a folder or data that cannot be used, no result of the stage before."""

    def __init__(self, stage: str, cfg, models: hub.Models, starts_from: str = ""):
        """starts_from: the stage whose result this one begins with, found in RUN or in --init-from."""
        self.stage, self.cfg, self.models, self.before = stage, cfg, models, {}
        self.device, self.autocast = pick_device(cfg.device, cfg.precision)
        check_part(UNet2DConditionModel, models.base, "base model", "unet")  # before hours of encoding
        load_base_pipeline(models.base, unet=None, vae=None, text_encoder=None)  # tokenizer and scheduler
        self.scheduler = hub.load_small(DDPMScheduler, models.base, "base model", "scheduler")
        self.folder = RunFolder(Path(cfg.run) / cfg.name, cfg.fresh, cfg.log_dir)
        if starts_from:
            self._found = previous_stage(cfg, starts_from, models)
            self.before = self._found[1]
        self.complete = self.folder.is_complete(settings(cfg), self.before.get("sha256", ""))
        if not self.complete:
            self.train, self.val = open_splits(cfg, models.base, models.clap, self.device)

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

    def begin(self, weights: dict, optimizer, unet: nn.Module, dims: dict, ema=None, **counters) -> Progress:
        """Register what is saved and loaded, resume from the newest checkpoint if there is one, open the log.
        counters: more of what Progress counts, with the values to begin with."""
        cfg, self.weights, self.unet = self.cfg, weights, unet
        self.progress = Progress(**counters)
        self.objects = {**weights, "optimizer": optimizer, "progress": self.progress}
        if ema:
            self.objects["ema"] = ema
        # what a checkpoint says about itself; the features' name and content change with the data
        features = {"features": self.train.cache.name, "content": self.train.content}
        self.header = {"stage": self.stage, "settings": settings(cfg) | features,
                       "base_model": cfg.base_model, "clap_model": cfg.clap_model,
                       "fingerprints": self.models.fingerprints, "dims": dims,
                       "init": self.before.get("sha256", "")}
        self.folder.resume(self.objects, self.header, self.models, cfg.allow_changed)
        if ema:
            ema.to("cpu" if cfg.ema_on_cpu else self.device)  # a checkpoint is read on the CPU
        self.log = Logger(self.folder.path, cfg.log_dir, purge_step=self.progress.step)
        self._log_header()
        self.check = FiniteCheck(self.log, lambda step: sample_ids(self.train, cfg, step))
        return self.progress

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
            f"latents {'x'.join(map(str, train.latent_shape))}; {self.device.type}, {cfg.precision} "
            f"autocast, frozen UNet in {cfg.frozen_dtype}",
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
        return iter(make_loader(self.train, cfg.batch_size, cfg.seed, done * cfg.accumulation,
                                cfg.steps * cfg.accumulation, cfg.workers, self.device))

    @contextmanager
    def stepping(self):
        """Inside, a stop signal waits for the next save_if_due(), and a bar shows the progress."""
        options = bar_options(total=self.cfg.steps, initial=self.progress.step, desc=self.cfg.name,
                              unit="step", dynamic_ncols=True, disable=not processes.first())
        with stops_awaited(speaks=processes.first()) as self.stops, tqdm(**options) as self.bar:
            yield

    def save_best(self) -> None:
        """Keep the weights as they are now as the best ones."""
        save_checkpoint(self.folder.best, self.weights, {**self.header, "step": self.progress.step})

    def save_if_due(self) -> None:
        """Save everything every --save-every steps, at the end and on a signal, and then raise Stopped."""
        step = self.progress.step
        signum = processes.largest(self.stops[0] if self.stops else 0)  # one may come while processes agree
        if signum or self.progress.ended or step % self.cfg.save_every == 0:
            self.folder.save(step, self.objects, self.header, self.cfg.keep)
        if signum:
            raise Stopped(signum, f"step {step} is saved in {self.folder.checkpoint(step)}; the same command "
                          "goes on from there")

    def sample_if_due(self) -> None:
        """Every --sample-every steps, write sample pictures of the present weights. Then a step begins."""
        step, path = self.progress.step, self.folder.path / "preview.safetensors"
        due = self.cfg.samples and self.cfg.sample_every and step and step % self.cfg.sample_every == 0
        if due and processes.first():
            write_adapter(path, self.weights, self.unet, {**self.header, "step": step})
            self._write_samples(path, f"samples-{step:08d}.png")
            path.unlink()
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
            return
        values = {"loss": float(loss), "grad_norm": float(grad_norm), **more}
        self.bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()}, refresh=False)
        self.log.scalars(progress.step, **values, s_per_step=progress.step_seconds / progress.step,
                         memory_mb=max(peak_memory_mb(self.device).values()))

    # --- the end
    def finish(self, scheduler, **result) -> None:
        """Export and prove the adapter, then write final.safetensors, then result.json with `result` in it.
        Weights without audio K and V of their own (a changed copy of a script) have no stock layout: they are
        saved and not exported."""
        if not processes.first():
            return
        header, proof = {**self.header, "step": self.progress.step}, {}
        if "audio_attn" in self.weights:
            proof = {"tanh_gate": float(torch.tanh(self.weights["audio_attn"].gate.detach())),
                     "stock_difference": self._export(header, scheduler)}
        save_checkpoint(self.folder.final, self.weights, header)  # which the next stage takes for proven
        memory, progress = peak_memory_mb(self.device), self.progress
        files.write_json(self.folder.result, {
            "stage": self.cfg.name, "steps": progress.step, "ended": progress.ended, "init": header["init"],
            "seconds": round(progress.wall_seconds(), 1), "step_seconds": round(progress.step_seconds, 1),
            "first_validation": progress.first_validation, "last_validation": progress.last_validation,
            **proof, "peak_memory_mb": memory, **result})
        right, other = result["validation"]["val_right"], result["validation"]["other_minus_right"]
        self.log.text(f"{self.cfg.name}: done ({progress.ended}); val_right {right[0]:.5f}, another's sound "
                      f"costs {other[0]:+.5f} [{other[1]:+.5f}, {other[2]:+.5f}]; peak memory "
                      + ", ".join(f"{name} {mb:.0f} MB" for name, mb in memory.items()))
        self.log.close()

    def _export(self, header: dict, scheduler) -> float:
        """Write adapter.safetensors and its sample pictures; the largest difference to stock diffusers."""
        path, weights, n = self.folder.path / "adapter.safetensors", self.weights, min(len(self.val), 4)
        write_adapter(path, weights, self.unet, header)
        rows = [self.val[i] for i in range(n)]
        generator = torch.Generator().manual_seed(self.cfg.seed)
        batch = {"noisy_latents": torch.randn((n, *self.val.latent_shape), generator=generator),
                 "timesteps": torch.linspace(0, scheduler.config.num_train_timesteps - 1, n).long(),
                 "text_tokens": torch.stack([row["text_embeds"] for row in rows]),
                 "audio_embeds": torch.stack([row["audio_embeds"][0] for row in rows])}
        difference = check_export(path, self.models.base, weights, self.unet, batch)
        self.log.text(f"{self.cfg.name}: {path} loads into a stock pipeline, largest difference "
                      f"{difference:.1e}")
        if self.cfg.samples:
            self._write_samples(path, "samples.png")
        return difference
