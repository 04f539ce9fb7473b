"""Tensors with a JSON header and a SHA-256 in one safetensors file, as checkpoints are. Nothing is pickled.
An exported adapter carries the same digest."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.files import write_atomic

FORMAT = 1
HEADER = {"stage": str, "step": int, "settings": dict, "fingerprints": dict, "dims": dict, "init": str,
          "objects": dict}


class Broken(UserError):
    """A checkpoint that is missing, truncated, foreign or altered."""


def digest(header: dict, tensors: dict) -> str:
    """SHA-256 of a header and of tensors, NumPy's or torch's on the CPU."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, np.ndarray):
            found.update(np.ascontiguousarray(tensor))
        else:  # NumPy has no bfloat16, so the bytes are taken
            import torch
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def flatten(value, name: str, tensors: dict):
    """Split a state into JSON, which is returned, and tensors, which go into `tensors` under their path."""
    if hasattr(value, "data_ptr"):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, since an optimizer's keys are integers
        return {"pairs": [[key, flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"items": [flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def unflatten(tree, tensors: dict):
    """The state that flatten() has split. Raises KeyError or TypeError if they do not fit together."""
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "pairs" in tree:
        return {key: unflatten(item, tensors) for key, item in tree["pairs"]}
    if "items" in tree:
        return [unflatten(item, tensors) for item in tree["items"]]
    return tree["value"]


def write_tensors(path: Path, header: dict, states: dict) -> None:
    """Write {name: state} and a header into one file. States nest dictionaries and lists of tensors and JSON.
    Raises RunFailed: a tensor is not finite (nothing is written), or the disk is full."""
    from safetensors.torch import save
    tensors: dict = {}
    objects = {name: flatten(state, name, tensors) for name, state in states.items()}
    header = {"format": FORMAT, **header, "objects": objects}
    places: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in places:  # safetensors refuses shared memory, as the tables of 8-bit Adam are
            tensors[name] = tensor.clone()
        places.add(tensor.data_ptr())
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunFailed(f"{path}: {name} is not finite, so it was not written; what was saved before is "
                            "as it was")
    header = json.loads(json.dumps(header))
    header["sha256"] = digest(header, tensors)
    write_atomic(path, save(tensors, {"clap2diffusion": json.dumps(header)}))


def read_header(path: Path) -> dict:
    """The header of a file that read_tensors() reads, without its tensors and without checking its SHA-256.
    Raises Broken: it is missing, truncated or foreign."""
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["clap2diffusion"])
        if not isinstance(header["fingerprints"], dict) or not isinstance(header["sha256"], str):
            raise TypeError("its fingerprints or its SHA-256 are of another type")
        return header
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise Broken(f"{path}: not a checkpoint of ours ({type(error).__name__}: {error}); expected an "
                     "unbroken safetensors file that a stage has written") from None


def read_tensors(path: Path) -> tuple[dict, dict]:
    """Return (header, tensors) of a file whose SHA-256 is right; the header still holds `sha256`.
    Raises Broken: it is missing, truncated, foreign or altered.
    Raises UserError: its format version is unknown, or the file system does not let us read it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        header = json.loads(metadata["clap2diffusion"])
        recorded = header.pop("sha256")
    except FileNotFoundError:
        raise Broken(f"{path}: does not exist; expected a checkpoint that a stage has written") from None
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"{path}: not a checkpoint of ours ({type(error).__name__}: {error}); expected an "
                     "unbroken safetensors file that a stage has written") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); make it readable and run the same command "
                        "again") from None
    if recorded != digest(header, tensors):
        raise Broken(f"{path}: its content does not match its SHA-256; the file was altered, use another "
                     "checkpoint")
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: format version {header.get('format')}, expected {FORMAT}; use the code "
                        "that wrote it")
    for key, kind in HEADER.items():
        if not isinstance(header.get(key), kind):
            raise Broken(f"{path}: its header has {header.get(key)!r:.60} as {key}, expected "
                         f"{kind.__name__}; use another checkpoint")
    return {**header, "sha256": recorded}, tensors


def state_of(name: str, path: Path, header: dict, tensors: dict) -> dict:
    """The state that write_tensors() was given under a name, out of what read_tensors(path) gave.
    Raises UserError: there is none, or header and tensors do not fit together."""
    if name not in header["objects"]:
        raise UserError(f"{path}: holds {', '.join(header['objects'])}, expected {name!r} as well")
    try:
        state = unflatten(header["objects"][name], tensors)
        if not isinstance(state, dict):
            raise TypeError(f"got a {type(state).__name__}, expected a dictionary")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: the header of {name} does not fit its tensors ({type(error).__name__}: "
                        f"{error}); use another checkpoint") from None
    return state
