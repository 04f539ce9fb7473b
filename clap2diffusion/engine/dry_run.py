"""What a stage would do, and what would stop it, by all that shows without loading a model."""

import os
from pathlib import Path

import torch

from clap2diffusion.base import hub, processes, tensor_file
from clap2diffusion.base.device import describe_numbers
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.settings import settings
from clap2diffusion.dataset.dataset import check_rows
from clap2diffusion.engine.changes import code_hashes
from clap2diffusion.engine.run_folder import RunFolder, has_ended, previous_path, previous_stage


def show_plan(cfg, models: hub.Models | None, device: torch.device, starts_from: str, lr_at) -> None:
    """Check the data's manifest, the result of the stage before and the stage's folder, and print the plan.
    Nothing is written. models: None if one of them is yet to be downloaded; then no result is compared with
    them. starts_from and lr_at: as StageRun takes them.
    Raises UserError: the run would end with this sentence."""
    rows, bad = check_rows(cfg)
    train = [row for row in rows if row.split == "train"]
    batch = cfg.batch_size * cfg.accumulation * processes.world()
    passes = cfg.steps * batch / len(train)
    folder = RunFolder(Path(cfg.run) / cfg.name, fresh=False, log_dir="", dry_run=True)
    _check_writable(folder.path)
    lines = {
        "data": f"{cfg.data_root}: {len(train)} train and {sum(row.split == 'val' for row in rows)} val rows"
                + f", {len(bad)} unusable" * bool(bad),
        "features": f"encoded into {cfg.cache_dir} first, where they are not there yet",
        "computes": describe_numbers(device, cfg),
        **({"starts from": _before(cfg, models, starts_from)} if starts_from else {}),
        "begins": _begins(cfg, folder, models, starts_from, lr_at),
        "trains": f"{cfg.steps} steps of {batch} samples, {passes:.3g} times the training rows",
        "writes to": str(folder.path)}
    print(f"{cfg.name}: the plan; with --dry-run nothing of it is done",
          *(f"  {key:<24} {text}" for key, text in lines.items()), sep="\n", flush=True)


def _before(cfg, models: hub.Models | None, stage: str) -> str:
    path = previous_path(cfg, stage)
    if not path.exists():
        return (f"{path}, which is not there yet; run first: python train_{stage}.py --config {cfg.config} "
                f"--run {cfg.run}")
    step = previous_stage(cfg, stage, models)[1]["step"] if models else tensor_file.read_header(path)["step"]
    return f"{path} (step {step})"


def _begins(cfg, folder: RunFolder, models: hub.Models | None, starts_from: str, lr_at) -> str:
    if cfg.fresh and folder.path.exists():
        return "anew; what is there now is kept in a backup folder"
    if has_ended(folder.path) and models:
        before = previous_path(cfg, starts_from) if starts_from else Path()
        init = tensor_file.read_header(before)["sha256"] if before.is_file() else ""
        if folder.is_complete(cfg, models, init, lr_at, code_hashes()):
            return "not at all: it is complete"
    steps = folder.steps()
    if not steps:
        return "at step 0"
    path = folder.checkpoint(steps[-1])
    try:
        saved, tensors = tensor_file.read_tensors(path)
    except tensor_file.Broken as error:
        return f"at the newest checkpoint that is whole, which this one is not: {error}"
    folder.check_settings(path, saved, tensors, settings(cfg), cfg, lr_at)
    return f"at step {steps[-1]}, from {path}"


def _check_writable(folder: Path) -> None:
    place = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "no permission" if place.is_dir() else f"{place} is no folder"
        raise UserError(f"{folder}: cannot be used as output folder ({why}); give a folder that can be "
                        "written with --run")
