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
from clap2diffusion.base.settings import changed_settings, check_same_settings, settings
from clap2diffusion.base.statistics import show_interval
from clap2diffusion.engine.changes import script_name, warn_of_other_code, why_other_steps
from clap2diffusion.engine.gate_sweep import asks_for_proof, find_warning
from clap2diffusion.pictures.pipelines import UNPROVEN
from common import load_checkpoint, save_checkpoint

# TensorBoard's tab "Custom scalars": the tags of a chart are patterns, or [value, low, high]
CHARTS = {"does the sound matter": {
    "loss by sound": ["Multiline", ["^val_right$", "^val_silence$", "^val_other$"]],
    **{name.replace("_", " "): ["Margin", [name, f"{name}_low", f"{name}_high"]]
       for name in ("val_right", "silence_minus_right", "other_minus_right")}}}


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
        if self._board:
            self._board.add_custom_scalars(CHARTS)
        else:
            self.text("no TensorBoard curves: the package tensorboard is not installed; log.jsonl has them")

    def text(self, line: str, stream=None) -> None:
        """A line in log.txt and on stream, by default stdout."""
        if processes.first():
            stream = stream or sys.stdout
            tqdm.write(line, file=stream)
            stream.flush()
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
        self.only_last = False  # the last validation was due to the last step alone
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
        regular = self.step == 0 or (every and self.step % every == 0)
        due = (regular or self.step >= last) and self.validated_step != self.step
        if due:
            self.only_last = not regular
        return due

    def record_validation(self, result: dict, metric: str, min_delta: float, log: Logger) -> bool:
        """Log a validation and return whether it is the best so far by `metric`. Early stopping counts those
        in a row that did not beat the last one that counted by min_delta. One at the last step alone does not
        count, so a run that gets more steps later stops where it would have stopped with them at once."""
        self.validated_step, self.last_validation = self.step, result
        self.first_validation = self.first_validation or result
        log.scalars(self.step, **result)
        log.text(f"step {self.step}: " + ", ".join(f"{k} {show_interval(v, 5)}" for k, v in result.items()
                                                   if not k.endswith("_by_quarter")))
        value = result[metric][0] if metric.startswith("val_") else -result[metric][0]  # lower is better
        if self.to_beat is None or (value < self.to_beat - min_delta and not self.only_last):
            self.to_beat, self.bad_validations = value, 0
        elif not self.only_last:
            self.bad_validations += 1
        better = self.best is None or value < self.best
        if better:
            self.best, self.best_step = value, self.step
        return better


class RunFolder:
    """A stage's folder: checkpoints/step-NNNNNNNN.safetensors, {best,final}.safetensors, result.json.
    Of several processes rank 0 holds the lock and writes; the others only read, as all do if dry_run.
    Raises UserError: the folder cannot be made or written, or another process holds it."""

    def __init__(self, path: Path, fresh: bool, log_dir: str, dry_run: bool = False):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.best, self.final = path / "best.safetensors", path / "final.safetensors"
        self.result, self.settings = path / "result.json", path / "config.json"
        self.goes_on_from = 0  # the step of a finished result that is to get more steps
        if processes.first() and not dry_run:
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
        for stale in [*files.remove_stale(self.path), *files.remove_stale(self.checkpoints),
                      *files.remove_stale(self.path, UNPROVEN)]:
            print(f"{stale}: left by an interrupted save, removed")

    def is_complete(self, cfg, models: Models, init: str, lr_at, code: dict[str, str]) -> bool:
        """True, with a line, if this stage has ended and nothing more is asked for: result.json is written
        last. False as well, with a line, if it goes on from its end to more steps (see why_other_steps()).
        init: the SHA-256 of the stage before's result, '' where there is none now. code: code_hashes().
        Raises UserError: it began from another result of the stage before, belongs to other models, or was
        made with other settings and --allow-changed is not given."""
        if not has_ended(self.path):
            return False
        made, saved, now = files.read_json(self.result), files.read_json(self.settings), settings(cfg)
        self._check_origin(made, models, init)
        changed, done, why = changed_settings(saved, now), made["steps"], ""
        by_itself = "" if made["ended"].startswith("all steps") else made["ended"]
        other_steps = saved.get("steps", now["steps"]) != now["steps"]
        if other_steps:
            why = why_other_steps(cfg, saved["steps"], done, made.get("best_step") == done, lr_at)
        more = other_steps and cfg.steps > done and not by_itself
        allowed = "go on with the new ones" if more else "keep it as it is"
        if (why or len(changed) > other_steps) and not cfg.allow_changed:
            raise UserError(f"{self.path}: is finished, and was made with other settings than asked for now ("
                            f"{'; '.join(changed)}){why and f'; {why}'}; give the old ones, begin anew with "
                            f"--fresh, which keeps a backup, or {allowed} with --allow-changed")
        warn_of_other_code(self.final, tensor_file.read_header(self.final), code, script_name())
        if more:
            self._announce(done, cfg.steps)
            return False
        other = f"; made with other settings than asked for now: {'; '.join(changed)}" * bool(changed)
        if other_steps and by_itself and not why:
            other = f"; it ended at step {done} by itself ({by_itself}): --steps {cfg.steps} changes nothing"
        print(f"{self.path}: already complete{other} (--fresh begins anew and keeps a backup)", flush=True)
        say_warning(self.path, find_warning(self.path) if not asks_for_proof(cfg) else "")
        return True

    def _check_origin(self, made: dict, models: Models, init: str) -> None:
        """Raises UserError: a finished result began from another one of the stage before, or is of other
        models."""
        if init and made.get("init") != init:
            raise UserError(f"{self.path}: began from another result of the stage before than the one there "
                            "now; begin it anew with --fresh, which keeps this one in a backup folder")
        recorded = tensor_file.read_header(self.final)["fingerprints"]
        if not models.match(recorded):
            raise UserError(f"{self.path}: is finished, and belongs to models {recorded}, this run has "
                            f"{models.fingerprints}; give the --base-model and --clap-model it was trained "
                            "with, or begin anew with --fresh, which keeps this one in a backup folder")

    def _announce(self, done: int, steps: int) -> None:
        """Note and say that a finished stage goes on. Raises UserError: it has no checkpoint left."""
        if not self.steps():
            raise UserError(f"{self.checkpoints}: holds no checkpoint to go on from to step {steps}; give "
                            f"--steps {done}, or begin anew with --fresh, which keeps a backup")
        self.goes_on_from = done
        print(f"{self.path}: is finished, and goes on from step {done} to step {steps}; its result of step "
              f"{done} goes to {self.kept(done)}", flush=True)

    def kept(self, step: int) -> Path:
        """The folder that keeps the result of a stage which goes on from there to more steps."""
        return self.path / f"ended-{step:08d}"

    def _keep_result(self, step: int) -> None:
        """Move a finished result away, so that nothing takes it for that of more steps. result.json goes
        first: what is left after a kill is a stage that is not finished."""
        self.kept(step).mkdir(exist_ok=True)
        for name in ("result.json", "final.safetensors", "adapter.safetensors", "samples.png", "sweep.json",
                     "sweep.png"):
            if (self.path / name).exists():
                (self.path / name).replace(self.kept(step) / name)

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

    def check_settings(self, path: Path, saved: dict, tensors: dict, now: dict, cfg, lr_at) -> None:
        """Raises UserError: the checkpoint `path`, which read_tensors() gave as saved and tensors, was made
        with other settings than now. --steps may differ where that changes none of the steps done already."""
        made, step = saved["settings"], saved["step"]
        best = json.loads(tensor_file.state_of("progress", path, saved, tensors).get("best_step", "0"))
        is_last = self.best.exists() and best == step
        if made["steps"] != now["steps"] and not why_other_steps(cfg, made["steps"], step, is_last, lr_at):
            made = {**made, "steps": now["steps"]}
        check_same_settings(path, made, now, cfg.allow_changed)

    def resume(self, objects: dict, header: dict, models: Models, cfg, lr_at) -> None:
        """Load the newest valid checkpoint, if there is one, after checking that it belongs to this run.
        --steps may differ where that changes none of the steps that are done."""
        found = self.newest_valid() if processes.first() else None
        step = processes.largest(found[0] if found else -1)
        if step >= 0:
            path = self.checkpoint(step)
            saved, tensors = found[1:] if found else tensor_file.read_tensors(path)
            for key in ("stage", "fingerprints", "dims", "init"):
                if saved[key] != header[key] and not (key == "fingerprints" and models.match(saved[key])):
                    raise UserError(f"{path}: was made with {key} {saved[key]!r}, this run has "
                                    f"{header[key]!r}; give another --run, or begin anew with --fresh")
            self.check_settings(path, saved, tensors, header["settings"], cfg, lr_at)
            warn_of_other_code(path, saved, header["code"], script_name())
            # --allow-changed may have changed the rates and the EMA's decay: this run's own stay
            optimizer, ema = objects["optimizer"], objects.get("ema")
            groups, decay = [{**group} for group in optimizer.param_groups], ema and ema.decay
            load_checkpoint(path, saved, tensors, objects)
            for group, own in zip(optimizer.param_groups, groups):
                group.update({**own, "params": group["params"]})
            if ema:
                ema.decay = decay
        if processes.first():
            done = self.goes_on_from or step
            if self.goes_on_from or self.kept(done).exists():  # or a kill has cut this short
                self._keep_result(done)  # before config.json speaks of more steps
            files.write_json(self.settings, header["settings"])

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


def has_ended(folder: Path) -> bool:
    """Whether a stage's folder holds a finished result."""
    return (folder / "result.json").exists() and (folder / "final.safetensors").exists()


def say_warning(path: Path, warning: str) -> None:
    """Say on stderr what a result warns of; '' says nothing."""
    if warning and processes.first():
        print(f"warning: {path}: {warning}", file=sys.stderr, flush=True)


def _check_log_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--log-dir {folder}: cannot be used ({error.strerror}); give a folder that can be "
                        "written") from None


def previous_path(cfg, stage: str) -> Path:
    """The final.safetensors of the stage before, by --init-from or in the run."""
    return Path(cfg.init_from or Path(cfg.run) / stage) / "final.safetensors"


def previous_stage(cfg, stage: str, models: Models) -> tuple[Path, dict, dict[str, Tensor]]:
    """The final.safetensors of the stage before: its path, header and tensors.
    Raises UserError: that stage has not run or not finished, or the file is another's."""
    path = previous_path(cfg, stage)
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
