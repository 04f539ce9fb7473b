"""Models on disk or on the hub: where their folder is, whether it is whole, and a short name of its content.
No heavy import: a wrong path is told before torch is loaded."""

import hashlib
import json
import pickletools
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from clap2diffusion.base.exits import UserError

BASE_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def _download(name: str, what: str, parts: tuple[str, ...]) -> Path:
    """The local copy of a hub model; without one it is downloaded, after saying so. Raises UserError."""
    import huggingface_hub  # only a hub name needs it
    skipped = ["*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*fp16*", "*non_ema*"]
    kinds = {"allow_patterns": [f"{part}/*" if part else "*" for part in parts] + ["model_index.json"],
             "ignore_patterns": skipped if parts == ("",) else [*skipped, "*.bin"]}
    folder = Path(name)
    with suppress(OSError, ValueError):  # huggingface_hub's "not in the cache" errors are these
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **kinds))
    if all((folder / _config(part)).exists() for part in parts):
        return folder
    try:
        huggingface_hub.HfApi().model_info(name, timeout=4)
        print(f"downloading {what} {name} from the Hugging Face hub", flush=True)
        return Path(huggingface_hub.snapshot_download(name, **kinds))
    except Exception as error:  # every kind of network failure of the hub's client ends in the same sentence
        raise UserError(f"{what} {name!r} is neither a folder here nor in the local model cache, and the hub "
                        f"gave no copy ({type(error).__name__}); give a local folder or go online") from None


def resolve_model(name: str, what: str, parts: tuple[str, ...] = ("",)) -> Path:
    """Return the folder of a model given as a folder or as a hub name. It says so before it downloads.
    Raises UserError: the folder is missing or not whole, or the hub's copy is not here and cannot be had."""
    folder = Path(name)
    if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = _download(name, what, parts)
    for part in parts:
        if not (folder / _config(part)).exists():
            raise UserError(f"{what} {name!r}: {folder / _config(part)} is missing; expected a folder as "
                            "from_pretrained loads it, or a hub name OWNER/NAME")
        if part in ("tokenizer", "scheduler"):
            continue
        weights = _weights(folder / part)
        if not weights:
            raise UserError(f"{what} {name!r}: {folder / part} holds no weights (*.safetensors or *.bin); "
                            "expected a folder as from_pretrained loads it")
        for path in weights:
            try:
                if path.suffix == ".safetensors":
                    with safe_open(path, "np"):  # reads the header alone and compares it with the file's size
                        pass
                else:
                    _check_pickle(path)
            except (SafetensorError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(f"{what} {name!r}: {path} is not a whole file of weights ({error}); copy or "
                                "download it again") from None
    return folder


def _config(part: str) -> Path:
    return Path(part, f"{part}_config.json" if part in ("tokenizer", "scheduler") else "config.json")


def _weights(folder: Path) -> list[Path]:
    """The weight files that from_pretrained would load: safetensors before bin, no variants."""
    kinds = ([p for p in sorted(folder.glob(kind)) if not any(v in p.name for v in ("fp16", "non_ema"))]
             for kind in ("*.safetensors", "*.bin"))
    return next((files for files in kinds if files), [])


def _check_pickle(path: Path) -> None:
    """ValueError if a .bin file of torch names anything but tensors. Nothing of it is executed."""
    with zipfile.ZipFile(path) as archive:
        inner = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl")
        for op, what, _ in pickletools.genops(archive.read(inner)):
            if op.name == "STACK_GLOBAL" or (
                    op.name == "GLOBAL" and what.split(".")[0].split()[0] not in ("torch", "collections")):
                raise ValueError(f"it would call {what or 'something'}, which no weights need")


def fingerprint(model_dir: Path) -> str:
    """A 16-digit name of a model folder's content: configs whole, weights by header and 32 blocks of 4 KiB.
    Sampling makes 4 GB as quick as 4 MB; another training run changes every block.
    Raises UserError: a config is not JSON."""
    digest = hashlib.sha256()
    texts = sorted(p for p in Path(model_dir).iterdir() if p.suffix in (".json", ".txt"))
    for path in [*texts, *_weights(model_dir)]:
        size = path.stat().st_size
        if path.suffix == ".json":
            try:
                content = json.loads(path.read_text("utf-8"))
                content = {key: value for key, value in content.items() if not key.startswith("_")}
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path}: not a JSON object ({error}); copy or download the model "
                                "again") from None
            digest.update(json.dumps(content, sort_keys=True).encode())
            continue
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in np.linspace(0, max(0, size - 4096), 33, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


class Models(NamedTuple):
    """Two folders; fingerprints name the UNet that an adapter is trained in and the CLAP that it reads."""
    base: Path
    clap: Path
    fingerprints: dict[str, str]


def find_models(cfg) -> Models:
    """The models of a stage's settings, before torch loads. Raises UserError: one is missing or broken."""
    base = resolve_model(cfg.base_model, "base model", BASE_PARTS)
    clap = resolve_model(cfg.clap_model, "CLAP model")
    return Models(base, clap, {"unet": fingerprint(base / "unet"), "clap": fingerprint(clap)})
