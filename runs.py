"""What a run leaves on disk: files that are whole or absent, checkpoints, the locked run folder, the logs.

A checkpoint is one safetensors file with every registered object and a JSON header; nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

import parallel
from config import RunFailed, Stopped, UserError, read_json, stop_signals, write_atomic, write_json

FORMAT = 1
MODULES = ("audio_proj", "audio_attn", "lora")
HEADER = {"stage": str, "step": int, "settings": dict, "fingerprints": dict, "dims": dict, "init": str, "objects": dict}


def _flatten(value, name: str, tensors: dict[str, Tensor]):
    """Split a state into JSON and tensors: tensors go into `tensors` under their path, the rest is returned."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, since an optimizer's keys are integers
        return {"pairs": [[key, _flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"items": [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _unflatten(tree, tensors: dict[str, Tensor]):
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "pairs" in tree:
        return {key: _unflatten(item, tensors) for key, item in tree["pairs"]}
    if "items" in tree:
        return [_unflatten(item, tensors) for item in tree["items"]]
    return tree["value"]


def _digest(header: dict, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: Path, objects: dict, header: dict) -> None:
    """Write every registered object's state_dict and a JSON header with its SHA-256 into one safetensors file (rank 0 does).

    Raises:
        RunFailed: a trainable weight is not finite (nothing is written), or the disk is full.
    """
    if not parallel.first():
        return
    tensors: dict[str, Tensor] = {}
    header = {"format": FORMAT, **header,
              "objects": {name: _flatten(part.state_dict(), name, tensors) for name, part in objects.items()}}
    places = set()
    for name, tensor in tensors.items():  # safetensors refuses what shares memory, as the tables of 8-bit Adam do
        if tensor.data_ptr() in places:
            tensors[name] = tensor.clone()
        places.add(tensor.data_ptr())
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise RunFailed(f"{path}: {bad[0]} is not finite, so it was not written; the checkpoint before is good")
    header = json.loads(json.dumps(header))
    metadata = {"clap2diffusion": json.dumps({**header, "sha256": _digest(header, tensors)})}
    write_atomic(path, safetensors_bytes(tensors, metadata))


class Broken(UserError):
    """A checkpoint that is missing, truncated, foreign or altered."""


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return (header, tensors) of a checkpoint whose SHA-256 is right; the header still holds `sha256`.

    Raises:
        Broken: missing, truncated, foreign or altered.
        UserError: of an unknown format version, or the file system does not let us read it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        header = json.loads(metadata["clap2diffusion"])
        recorded = header.pop("sha256")
    except FileNotFoundError:
        raise Broken(f"{path}: does not exist; expected a checkpoint that a stage has written") from None
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"{path}: not a checkpoint of ours ({type(error).__name__}: {error}); expected an unbroken "
                     "safetensors file that a stage has written") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); make it readable and run the same command again") from None
    if recorded != _digest(header, tensors):
        raise Broken(f"{path}: its content does not match its SHA-256; the file was altered, use another checkpoint")
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: format version {header.get('format')}, expected {FORMAT}; use the code that wrote it")
    for key, kind in HEADER.items():
        if not isinstance(header.get(key), kind):
            raise Broken(f"{path}: its header has {header.get(key)!r:.60} as {key}, expected {kind.__name__}; use another checkpoint")
    return {**header, "sha256": recorded}, tensors


def load_objects(path: Path, header: dict, tensors: dict[str, Tensor], objects: dict) -> None:
    """Load the registered objects from what read_checkpoint returned; nothing may be missing or of another size.

    Raises:
        UserError: an object or a tensor is missing, or a shape differs (both sides shown).
    """
    for name, part in objects.items():
        if name not in header["objects"]:
            raise UserError(f"{path}: holds {', '.join(header['objects'])}, expected {name!r} as well")
        try:
            state = _unflatten(header["objects"][name], tensors)
            if not isinstance(state, dict) or name in MODULES and not all(isinstance(value, Tensor) for value in state.values()):
                raise TypeError("expected a dictionary, of a module one of tensors")
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: the header of {name} does not fit its tensors ({type(error).__name__}: {error}); use another "
                            "checkpoint") from None
        if name in MODULES:
            own = part.state_dict()
            for key in own.keys() | state.keys():
                have, want = (tuple(s[key].shape) if key in s else "absent" for s in (state, own))
                if have != want:
                    raise UserError(f"{path}: {name}.{key} is {have}, this run expects {want}; the dimensions must agree")
        part.load_state_dict(state)


# --- the run folder ---------------------------------------------------------------------------------------------------

class Progress:
    """Where a stage stands. Saved and loaded with the rest, so a resumed stage stops and decides as an unbroken one.

    `step_seconds` is the time inside steps, wall_seconds() all of a stage's time, earlier sessions included. `ended` is
    not saved: it follows from the counters, and settings that were changed by permission must count.
    """

    def __init__(self, **extra):
        self.__dict__.update(step=0, best=None, best_step=0, to_beat=None, bad_validations=0, first_validation=None,
                             last_validation=None, validated_step=-1, step_seconds=0.0, earlier_seconds=0.0, **extra)
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
        """Log a validation and return whether it is the best so far by `metric`."""
        self.validated_step, self.last_validation = self.step, result
        self.first_validation = self.first_validation or result
        log.scalars(self.step, **result)
        log.text(f"step {self.step}: " + ", ".join(f"{key} {mean:.5f} [{low:.5f}, {high:.5f}]"
                                                  for key, (mean, low, high) in result.items()))
        value = result[metric][0]
        return self.improved(value if metric == "val_right" else -value, min_delta)

    def improved(self, value: float, min_delta: float) -> bool:
        """Record a validation's deciding value (lower is better) and return whether it is the best so far.

        Early stopping counts the validations in a row that did not beat the last one that counted by min_delta.
        """
        if self.to_beat is None or value < self.to_beat - min_delta:
            self.to_beat, self.bad_validations = value, 0
        else:
            self.bad_validations += 1
        better = self.best is None or value < self.best
        if better:
            self.best, self.best_step = value, self.step
        return better


class RunFolder:
    """A stage's folder under a lock: checkpoints/step-NNNNNNNN.safetensors, best.safetensors, final.safetensors.

    Of several processes rank 0 holds the lock and writes; the others only read.

    Raises:
        UserError: the folder cannot be made or written, or another process holds it.
    """

    def __init__(self, folder: Path, fresh: bool = False, log_dir: str = ""):
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        if parallel.first():
            self._take(folder, fresh)
            if log_dir:
                self._check_log_dir(Path(log_dir))
        parallel.wait()

    def _take(self, folder: Path, fresh: bool) -> None:
        try:
            if fresh and folder.exists() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # torchrun restarts with the same flags
                backup = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
                with self._lock(folder):
                    folder.rename(backup)
                print(f"{folder}: the old run is kept in {backup}")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._held = self._lock(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be used as output folder ({error.strerror}); give a folder that can be "
                            "written with --run") from None
        for stale in [*folder.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
            print(f"{stale}: left by an interrupted save, removed")
            stale.unlink()

    @staticmethod
    def _check_log_dir(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise UserError(f"--log-dir {folder}: cannot be used ({error.strerror}); give a folder that can be written") from None

    @staticmethod
    def _lock(folder: Path):
        file = (folder / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder}: process {file.read().strip() or '?'} is working in this folder; wait for it, "
                            "or give another --run") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    @property
    def best(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def final(self) -> Path:
        return self.folder / "final.safetensors"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def is_complete(self, settings: dict, init: str = "") -> bool:
        """True, with a line, if this stage has ended: result.json is written last.

        Raises:
            UserError: it began from another result of the stage before than the one that is there now.
        """
        if not self.result.exists() or not self.final.exists():
            return False
        made = read_json(self.result)
        if init and made.get("init") != init:
            raise UserError(f"{self.folder}: began from another result of the stage before than the one there now; begin "
                            "it anew with --fresh, which keeps this one in a backup folder")
        changed = changed_settings(read_json(self.folder / "config.json"), settings)
        asked = f"; it was made with other settings than asked for now: {'; '.join(changed)}" if changed else ""
        print(f"{self.folder}: already complete{asked} (--fresh begins anew and keeps a backup)", flush=True)
        return True

    def steps(self) -> list[int]:
        return sorted(int(p.stem[5:]) for p in self.checkpoints.glob("step-" + "[0-9]" * 8 + ".safetensors"))

    def path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def newest_valid(self) -> tuple[Path, dict, dict[str, Tensor]] | None:
        """The valid checkpoint of the highest step; broken ones are named, renamed and passed over."""
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                return path, *read_checkpoint(path)
            except Broken as error:
                print(f"{error}; falling back to the one before", file=sys.stderr, flush=True)
                path.rename(f"{path}.broken")  # so that it is not counted among the newest that are kept
        if list(self.checkpoints.glob("*.broken")):
            raise UserError(f"{self.checkpoints}: no checkpoint there is whole; begin anew with --fresh, which keeps them")
        return None

    def save(self, step: int, objects: dict, header: dict, keep: int) -> None:
        """Save this step's checkpoint, read it back, and only then drop the ones before the last `keep`."""
        if not parallel.first():
            return
        save_checkpoint(self.path(step), objects, {**header, "step": step})
        read_checkpoint(self.path(step))
        for old in self.steps()[:-keep]:
            try:
                self.path(old).unlink()
            except OSError as error:
                print(f"{self.path(old)}: could not be deleted ({error.strerror})", file=sys.stderr)

    def resume(self, objects: dict, header: dict, allow_changed: bool) -> None:
        """Load the newest valid checkpoint, if there is one, after checking that it belongs to this run."""
        found = self.newest_valid() if parallel.first() else None  # which names and renames broken ones
        step = parallel.largest(found[1]["step"] if found else -1)
        if step >= 0 and not found:
            found = self.path(step), *read_checkpoint(self.path(step))
        if found:
            path, saved, tensors = found
            for key in ("stage", "fingerprints", "dims", "init"):
                if saved[key] != header[key]:
                    raise UserError(f"{path}: was made with {key} {saved[key]!r}, this run has {header[key]!r}; give "
                                    "another --run, or begin anew with --fresh")
            check_same_settings(path, saved["settings"], header["settings"], allow_changed)
            optimizer, ema = objects["optimizer"], objects.get("ema")
            groups, decay = [{**group, "params": None} for group in optimizer.param_groups], ema and ema.decay
            load_objects(path, saved, tensors, objects)
            for group, own in zip(optimizer.param_groups, groups):  # rates are this run's, which --allow-changed may have changed
                group.update({key: value for key, value in own.items() if key != "params"})
            if ema:
                ema.decay = decay
        if parallel.first():
            write_json(self.folder / "config.json", header["settings"])

    def load_best(self, weights: dict, progress: Progress) -> None:
        """Load the weights that validated best; if their file is lost, those of the last step stay, and a line says so."""
        try:
            header, tensors = read_checkpoint(self.best)
        except Broken as error:
            print(f"{error}; the weights of the last step are taken", file=sys.stderr, flush=True)
            progress.best_step = progress.step
            return
        load_objects(self.best, header, tensors, weights)
        progress.best_step = header["step"]  # a run that was killed after it may have found a better one

    def stopped(self, signum: int, step: int) -> None:
        raise Stopped(signum, f"step {step} is saved in {self.path(step)}; the same command goes on from there")


def previous_stage(path: Path, stage: str, fingerprints: dict, command: str) -> tuple[dict, dict[str, Tensor]]:
    """Read the final.safetensors of the stage before.

    Raises:
        UserError: that stage has not run or not finished (the command to run is named), or the file is another's.
    """
    if not path.exists():
        state = "is not finished" if path.parent.exists() else "has not run"
        raise UserError(f"{path}: {stage} {state}; run first: {command}")
    header, tensors = read_checkpoint(path)
    if header["stage"] != stage:
        raise UserError(f"{path}: is of {header['stage']}, expected a result of {stage}")
    if header["fingerprints"] != fingerprints:
        raise UserError(f"{path}: belongs to models {header['fingerprints']}, this run has {fingerprints}; "
                        "give the --base-model and --clap-model it was trained with")
    return header, tensors


def make_header(stage: str, settings: dict, features: str, fingerprints: dict, dims: dict, init: str = "") -> dict:
    """What a checkpoint says about itself, beside its objects and its step.

    features: name of the feature cache, which changes with the data; init: SHA-256 of the result it began from.
    """
    return {"stage": stage, "settings": {**settings, "features": features}, "base_model": settings["base_model"],
            "clap_model": settings["clap_model"], "fingerprints": fingerprints, "dims": dims, "init": init}


FREE_SETTINGS = {"run", "name", "workers", "log_every", "save_every", "keep", "log_dir", "device", "allow_changed",
                 "fresh", "sample_every", "samples", "max_bad_share", "cache_dir", "init_from", "val_batch_size", "checkpointing",
                 "ema_on_cpu"}


FIXED_SETTINGS = {"whiten", "adam_8bit", "strength"}  # they are in the weights or in the optimizer's state


def changed_settings(saved: dict, now: dict) -> list[str]:
    """The settings that are in both and differ, as `key old -> new`, but for those that may change freely."""
    return [f"{key} {saved[key]!r} -> {now[key]!r}" for key in sorted(saved.keys() & now.keys())
            if key not in FREE_SETTINGS and saved[key] != now[key]]


def check_same_settings(path: Path, saved: dict, now: dict, allow_changed: bool) -> None:
    """Resuming goes on with the settings it began with; what only concerns logs and places may change.

    Raises:
        UserError: a setting differs (both values shown).
    """
    changed = changed_settings(saved, now)
    fixed = [one for one in changed if one.split(" ")[0] in FIXED_SETTINGS]
    if fixed:
        raise UserError(f"{path}: was made with {'; '.join(fixed)}, which cannot change within a run; give the old one, or begin anew with --fresh")
    if changed and not allow_changed:
        raise UserError(f"{path}: was made with other settings ({'; '.join(changed)}); give the old ones, begin anew with "
                        "--fresh, or go on with the new ones with --allow-changed")


class StopSignal:
    """While entered, the first SIGTERM, SIGINT or SIGHUP only sets `signum`; a later one ends the process at once.

    SIGPIPE (config._Output: nobody reads what is said) counts as a first one. One that nobody has asked for is raised at the end.
    """

    def __enter__(self) -> StopSignal:
        self.signum, self._old = 0, {}
        for signum in stop_signals():
            self._old[signum] = signal.signal(signum, self._handle)
        self._old[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, self._unread)
        return self

    def _unread(self, signum: int, frame) -> None:
        if not self.signum:
            self.signum, self._at = signum, time.monotonic()

    def _handle(self, signum: int, frame) -> None:
        if not self.signum:
            self.signum, self._at = signum, time.monotonic()
            if parallel.first():
                with contextlib.suppress(OSError):  # the terminal may be what went away
                    os.write(2, f"\n{signal.Signals(signum).name}: saving after this step or validation; a second one ends at once\n".encode())
        elif time.monotonic() - self._at > 1:  # one Ctrl-C can arrive twice: from the terminal and from a parent script
            os._exit(128 + signum)

    def __exit__(self, kind, *exc) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        if self.signum and kind is None:  # it came after the last look at it
            os.kill(os.getpid(), self.signum)


class Logger:
    """A line-buffered log.txt, an append-only log.jsonl, and TensorBoard's scalars and pictures; of rank 0 alone."""

    def __init__(self, folder: Path, log_dir: str = "", purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter
        self.folder = folder
        if not parallel.first():
            return
        self._text = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")
        self._jsonl = (folder / "log.jsonl").open("a+", buffering=1, encoding="utf-8")
        if self._jsonl.tell() and not (folder / "log.jsonl").read_bytes().endswith(b"\n"):
            self._jsonl.write("\n")  # a full disk cut the last line: the next one shall not be lost with it
        place = Path(log_dir) / folder.parent.name / folder.name if log_dir else folder / "tensorboard"
        self._board = SummaryWriter(place, purge_step=purge_step)

    def text(self, line: str) -> None:
        if not parallel.first():
            return
        from tqdm import tqdm
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def scalars(self, step: int, **values: float) -> None:
        if not parallel.first():
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            for suffix, one in zip(("", "_low", "_high"), value if isinstance(value, list) else [value]):
                self._board.add_scalar(name + suffix, one, step)

    def image(self, step: int, name: str, image) -> None:
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        for file in (self._text, self._jsonl, self._board):
            file.close()


def write_sweep(folder: Path, before: list[dict], after: list[dict], tanh_gate: float, window: tuple) -> None:
    """Write the gate sweep as sweep.json and as a plot, sweep.png: loss and its 95 % interval against tanh(gate)."""
    if not parallel.first():
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    write_json(folder / "sweep.json", {"before": before, "after": after, "tanh_gate": tanh_gate})
    figure, axes = plt.subplots(figsize=(6, 4), dpi=120)
    for table, label, style in ((before, "before", "o--"), (after, "after", "o-")):
        x, y = [row["tanh_gate"] for row in table], np.array([row["loss"] for row in table])
        axes.plot(x, y, style, label=label)
        axes.fill_between(x, [row["low"] for row in table], [row["high"] for row in table], alpha=0.12)
    axes.axvspan(*window, color="gray", alpha=0.2, label="window")
    axes.axvline(tanh_gate, color="black", linewidth=1, label=f"learned: {tanh_gate:.3f}")
    axes.set(xlabel="tanh(gate)", ylabel="validation loss, right sound", title="How much sound lowers the loss")
    axes.legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(folder / "sweep.png", content.getvalue())
    plt.close(figure)
