"""A stage's folder under its lock: checkpoints, best and final weights, logs; and where the stage stands."""

import errno
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from clap2diffusion.base import files, processes, tensor_file
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.hub import Models
from clap2diffusion.base.settings import changed_settings, check_same_settings
from clap2diffusion.base.statistics import show_interval
from common import load_checkpoint, save_checkpoint


class Logger:
    """A line-buffered log.txt, an append-only log.jsonl and TensorBoard's files; of rank 0 alone."""

    def __init__(self, folder: Path, log_dir: str, purge_step: int):
        self.folder = folder
        if not processes.first():
            return
        self._text = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")
        self._jsonl = (folder / "log.jsonl").open("a+", buffering=1, encoding="utf-8")
        if self._jsonl.tell() and not (folder / "log.jsonl").read_bytes().endswith(b"\n"):
            self._jsonl.write("\n")  # a full disk cut the last line; the next one must not be lost with it
        place = Path(log_dir) / folder.parent.name / folder.name if log_dir else folder / "tensorboard"
        self._board = _open_board(place, purge_step)
        if self._board is None:
            self.text("no TensorBoard curves: the package tensorboard is not installed; log.jsonl has them")

    def text(self, line: str) -> None:
        if processes.first():
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def scalars(self, step: int, **values: float | list | None) -> None:
        """Numbers, [value, low, high], or lists of these."""
        if not processes.first():
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        named = dict(values)
        for name in [name for name in values if name.endswith("_by_quarter")]:
            named |= {f"{name}_{q}": one for q, one in enumerate(named.pop(name), 1)}
        for name, value in named.items():
            for suffix, one in zip(("", "_low", "_high"), value if isinstance(value, list) else [value]):
                if one is not None and self._board:
                    self._board.add_scalar(name + suffix, one, step)

    def image(self, step: int, name: str, image) -> None:
        if self._board:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        for file in filter(None, (self._text, self._jsonl, self._board)):
            file.close()


def _open_board(place: Path, purge_step: int):
    """TensorBoard's writer; None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(place, purge_step=purge_step)


class Progress:
    """Where a stage stands. It is saved with the rest, so a resumed stage decides as an unbroken one does.
    `step_seconds` is the time inside steps, wall_seconds() all of it, earlier sessions included. `ended` is
    not saved: it follows from the counters, and settings that were changed by permission must count."""

    def __init__(self, **extra):
        self.step, self.best_step, self.validated_step, self.bad_validations = 0, 0, -1, 0
        self.best = self.to_beat = self.first_validation = self.last_validation = None
        self.step_seconds = self.earlier_seconds = 0.0
        self.__dict__.update(extra)
        self.ended, self._began = "", time.monotonic()

    def wall_seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self._began

    def state_dict(self) -> dict:
        state = {**self.__dict__, "earlier_seconds": self.wall_seconds()}
        return {key: json.dumps(value) for key, value in state.items() if key not in ("ended", "_began")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update({key: json.loads(value) for key, value in state.items()})

    def validation_due(self, every: int, last: int) -> bool:
        """Before the first step, every so many steps, and at the last one; not again after a resume."""
        due = self.step == 0 or self.step >= last or (every and self.step % every == 0)
        return bool(due) and self.validated_step != self.step

    def record_validation(self, result: dict, metric: str, min_delta: float, log: Logger) -> bool:
        """Log a validation and return whether it is the best so far by `metric`. Early stopping counts those
        in a row that did not beat the last one that counted by min_delta."""
        self.validated_step, self.last_validation = self.step, result
        self.first_validation = self.first_validation or result
        log.scalars(self.step, **result)
        log.text(f"step {self.step}: " + ", ".join(f"{k} {show_interval(v, 5)}" for k, v in result.items()
                                                   if not k.endswith("_by_quarter")))
        value = result[metric][0] if metric.startswith("val_") else -result[metric][0]  # lower is better
        if self.to_beat is None or value < self.to_beat - min_delta:
            self.to_beat, self.bad_validations = value, 0
        else:
            self.bad_validations += 1
        better = self.best is None or value < self.best
        if better:
            self.best, self.best_step = value, self.step
        return better


class RunFolder:
    """A stage's folder: checkpoints/step-NNNNNNNN.safetensors, {best,final}.safetensors, result.json.
    Of several processes rank 0 holds the lock and writes; the others only read.
    Raises UserError: the folder cannot be made or written, or another process holds it."""

    def __init__(self, path: Path, fresh: bool, log_dir: str):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.best, self.final = path / "best.safetensors", path / "final.safetensors"
        self.result = path / "result.json"
        if processes.first():
            self._take(fresh)
            if log_dir:
                _check_log_dir(Path(log_dir))
        processes.wait()

    def _take(self, fresh: bool) -> None:
        try:
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun, with the same flags
            if fresh and self.path.exists() and not again:
                backup = self.path.with_name(f"{self.path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
                with files.lock(self.path):
                    self.path.rename(backup)
                print(f"{self.path}: the old run is kept in {backup}")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._held = files.lock(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be used as output folder ({error.strerror}); give a folder "
                            "that can be written with --run") from None
        for stale in [*files.remove_stale(self.path), *files.remove_stale(self.checkpoints)]:
            print(f"{stale}: left by an interrupted save, removed")

    def is_complete(self, settings: dict, init: str) -> bool:
        """True, with a line, if this stage has ended: result.json is written last.
        Raises UserError: it began from another result of the stage before than the one that is there now."""
        if not self.result.exists() or not self.final.exists():
            return False
        made = files.read_json(self.result)
        if init and made.get("init") != init:
            raise UserError(f"{self.path}: began from another result of the stage before than the one there "
                            "now; begin it anew with --fresh, which keeps this one in a backup folder")
        changed = changed_settings(files.read_json(self.path / "config.json"), settings)
        other = f"; it was made with other settings than asked for now: {'; '.join(changed)}" * bool(changed)
        print(f"{self.path}: already complete{other} (--fresh begins anew and keeps a backup)", flush=True)
        return True

    def steps(self) -> list[int]:
        return sorted(int(p.stem[5:]) for p in self.checkpoints.glob("step-" + "[0-9]" * 8 + ".safetensors"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def newest_valid(self) -> tuple[int, dict, dict[str, Tensor]] | None:
        """Step, header and tensors of the highest valid checkpoint; broken ones are named and renamed."""
        for step in reversed(self.steps()):
            path = self.checkpoint(step)
            try:
                return step, *tensor_file.read_tensors(path)
            except tensor_file.Broken as error:
                print(f"{error}; falling back to the one before", file=sys.stderr, flush=True)
                path.rename(f"{path}.broken")  # so that it is not counted among the newest that are kept
        if list(self.checkpoints.glob("*.broken")):
            raise UserError(f"{self.checkpoints}: no checkpoint there is whole; begin anew with --fresh, "
                            "which keeps them")
        return None

    def save(self, step: int, objects: dict, header: dict, keep: int) -> None:
        """Save this step's checkpoint, read it back, and only then drop the ones before the last `keep`."""
        if not processes.first():
            return
        save_checkpoint(self.checkpoint(step), objects, {**header, "step": step})
        tensor_file.read_tensors(self.checkpoint(step))
        for old in map(self.checkpoint, self.steps()[:-keep]):
            try:
                old.unlink()
            except OSError as error:
                print(f"{old}: could not be deleted ({error.strerror})", file=sys.stderr)

    def resume(self, objects: dict, header: dict, models: Models, allow_changed: bool) -> None:
        """Load the newest valid checkpoint, if there is one, after checking that it belongs to this run."""
        found = self.newest_valid() if processes.first() else None
        step = processes.largest(found[0] if found else -1)
        if step >= 0:
            path = self.checkpoint(step)
            saved, tensors = found[1:] if found else tensor_file.read_tensors(path)
            for key in ("stage", "fingerprints", "dims", "init"):
                if saved[key] != header[key] and not (key == "fingerprints" and models.match(saved[key])):
                    raise UserError(f"{path}: was made with {key} {saved[key]!r}, this run has "
                                    f"{header[key]!r}; give another --run, or begin anew with --fresh")
            check_same_settings(path, saved["settings"], header["settings"], allow_changed)
            # --allow-changed may have changed the rates and the EMA's decay: this run's own stay
            optimizer, ema = objects["optimizer"], objects.get("ema")
            groups, decay = [{**group} for group in optimizer.param_groups], ema and ema.decay
            load_checkpoint(path, saved, tensors, objects)
            for group, own in zip(optimizer.param_groups, groups):
                group.update({**own, "params": group["params"]})
            if ema:
                ema.decay = decay
        if processes.first():
            files.write_json(self.path / "config.json", header["settings"])

    def load_best(self, weights: dict, progress: Progress) -> None:
        """Load the weights that validated best. If their file is lost, a line says so; the last ones stay."""
        try:
            header, tensors = tensor_file.read_tensors(self.best)
        except tensor_file.Broken as error:
            print(f"{error}; the weights of the last step are taken", file=sys.stderr, flush=True)
            progress.best_step = progress.step
            return
        load_checkpoint(self.best, header, tensors, weights)
        progress.best_step = header["step"]  # a run that was killed after it may have found a better one


def _check_log_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--log-dir {folder}: cannot be used ({error.strerror}); give a folder that can be "
                        "written") from None


def previous_stage(cfg, stage: str, models: Models) -> tuple[Path, dict, dict[str, Tensor]]:
    """The final.safetensors of the stage before: its path, header and tensors.
    Raises UserError: that stage has not run or not finished, or the file is another's."""
    path = Path(cfg.init_from or Path(cfg.run) / stage) / "final.safetensors"
    if not path.exists():
        state = "is not finished" if path.parent.exists() else "has not run"
        raise UserError(f"{path}: {stage} {state}; run first: python train_{stage}.py --config {cfg.config} "
                        f"--run {cfg.run}")
    header, tensors = tensor_file.read_tensors(path)
    if header["stage"] != stage:
        raise UserError(f"{path}: is of {header['stage']}, expected a result of {stage}")
    if not models.match(header["fingerprints"]):
        raise UserError(f"{path}: belongs to models {header['fingerprints']}, this run has "
                        f"{models.fingerprints}; give the --base-model and --clap-model it was trained with")
    return path, header, tensors
