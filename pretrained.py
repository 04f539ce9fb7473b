"""Models on disk or on the hub: where their folder is, whether it is whole, and a short name of its content.

No heavy import: a wrong path is told before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import pickletools
import zipfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from config import UserError

BASE_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def resolve_model(name: str, what: str, parts: tuple[str, ...] = ("",)) -> Path:
    """Return the local folder of a model given as a folder or as a hub name, downloading it only after saying so.

    Raises:
        UserError: the folder is missing or lacks a part, or the hub cannot be reached and has left no copy here.
    """
    patterns = [f"{part}/*" if part else "*" for part in parts] + ["model_index.json"]
    skip = [*([] if parts == ("",) else ["*.bin"]), "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*fp16*", "*non_ema*"]
    folder = Path(name)
    if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        import huggingface_hub  # only a hub name needs it
        download = {"allow_patterns": patterns, "ignore_patterns": skip}
        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **download))
        except Exception as error:
            if not isinstance(error, (OSError, ValueError)):  # huggingface_hub's "not in the cache" errors are these
                raise
        if not all((folder / part / f).exists() for part in parts for f in _needed(part)):
            try:
                huggingface_hub.HfApi().model_info(name, timeout=4)
                print(f"downloading {what} {name} from the Hugging Face hub", flush=True)
                folder = Path(huggingface_hub.snapshot_download(name, **download))
            except Exception as error:  # every kind of network failure of the hub's client ends in the same sentence
                raise UserError(f"{what} {name!r} is neither a folder here nor in the local model cache, and the hub "
                                f"gave no copy ({type(error).__name__}); give a local folder or go online") from None
    for part in parts:
        for needed in _needed(part):
            if not (folder / part / needed).exists():
                raise UserError(f"{what} {name!r}: {folder / part / needed} is missing; expected a folder as "
                                "from_pretrained loads it, or a hub name OWNER/NAME")
        if part in ("tokenizer", "scheduler"):
            continue
        if not _weights(folder / part):
            raise UserError(f"{what} {name!r}: {folder / part} holds no weights (*.safetensors or *.bin); expected a "
                            "folder as from_pretrained loads it")
        for path in _weights(folder / part):
            try:
                if path.suffix == ".safetensors":
                    with safe_open(path, "np"):  # reads the header alone, and compares it with the file's size
                        pass
                else:
                    _only_weights(path)
            except (SafetensorError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(f"{what} {name!r}: {path} is not a whole file of weights ({error}); copy or download it again") from None
    return folder


def _needed(part: str) -> tuple[str, ...]:
    return {"tokenizer": ("tokenizer_config.json",), "scheduler": ("scheduler_config.json",)}.get(part, ("config.json",))


def _weights(folder: Path) -> list[Path]:
    """The weight files that from_pretrained would load: safetensors before bin, no variants."""
    kinds = ([p for p in sorted(folder.glob(kind)) if not any(v in p.name for v in ("fp16", "non_ema"))]
             for kind in ("*.safetensors", "*.bin"))
    return next((files for files in kinds if files), [])


def _only_weights(path: Path) -> None:
    """ValueError if a .bin file of torch names anything but tensors. It is looked at, not executed; torch itself looks once more."""
    with zipfile.ZipFile(path) as archive:
        inner = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl")
        for op, what, _ in pickletools.genops(archive.read(inner)):
            if op.name == "STACK_GLOBAL" or (op.name == "GLOBAL" and what.split(".")[0].split()[0] not in ("torch", "collections")):
                raise ValueError(f"it would call {what or 'something'}, which no weights need")


def fingerprint(model_dir: Path) -> str:
    """A 16-digit name of a model folder's content: configs whole, weights by header and 32 blocks of 4 KiB.

    Sampling makes 4 GB as quick as 4 MB; another training run changes every block.

    Raises:
        UserError: a config is not JSON.
    """
    digest = hashlib.sha256()
    for path in [*sorted(p for p in Path(model_dir).iterdir() if p.suffix in (".json", ".txt")), *_weights(model_dir)]:
        size = path.stat().st_size
        if path.suffix == ".json":
            try:
                content = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if not k.startswith("_")}
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path}: not a JSON object ({error}); copy or download the model again") from None
            digest.update(json.dumps(content, sort_keys=True).encode())
            continue
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in np.linspace(0, max(0, size - 4096), 33, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def adapter_digest(facts: dict, tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of what an adapter's metadata say and of its tensors."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()


def fingerprints(base: Path, clap: Path) -> dict[str, str]:
    """Which models an adapter belongs to: the UNet it was trained in and the CLAP whose embeddings it reads."""
    return {"unet": fingerprint(base / "unet"), "clap": fingerprint(clap)}
