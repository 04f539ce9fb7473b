"""The tensors in a model's folder: in safetensors or torch's own format, whole or in shards, plain or of a
variant such as fp16. Nothing of a pickle is executed."""

import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

LFS = b"version https://git-lfs"
TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}
TORCH_TYPES = dict(zip(("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
                        "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), TYPES, strict=True))
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
SAMPLE_BYTES, SAMPLES = 4096, 8


class Unusable(ValueError):
    """A model's folder cannot be used; the text names the file and says what is wrong and what to do."""


class Container(NamedTuple):
    """How a folder holds its weights: the files' names, and what from_pretrained must be told of them."""
    whole: str
    index: str
    variant: str
    use_safetensors: bool


class Stored(NamedTuple):
    """A tensor's type and shape, and where it lies: in a file from an offset on, or read by torch."""
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    tensor: object = None

    def sample(self) -> bytes:
        """Eight blocks of 4 KiB from its first to its last byte, in the order of a contiguous tensor; all of
        a tensor that is smaller."""
        size = math.prod(self.shape) * TYPES[self.dtype]
        blocks = SAMPLES if size > SAMPLES * SAMPLE_BYTES else 1
        length = SAMPLE_BYTES if blocks > 1 else size
        starts = [i * (size - length) // max(1, blocks - 1) for i in range(blocks)]
        if self.tensor is not None:
            import torch
            content = self.tensor.contiguous().reshape(-1).view(torch.uint8)
            return b"".join(content[start:start + length].numpy().tobytes() for start in starts)
        sampled = b""
        with self.path.open("rb") as file:
            for start in starts:
                file.seek(self.offset + start)
                sampled += file.read(length)
        return sampled


def containers(of_diffusers: bool) -> Iterator[Container]:
    """What may hold the weights, the best first. Copies without the moving average are none of them."""
    stems = ("diffusion_pytorch_model",) * 2 if of_diffusers else ("model", "pytorch_model")
    for variant in ("", ".fp16", ".bf16"):
        for stem, kind in zip(stems, ("safetensors", "bin")):
            yield Container(f"{stem}{variant}.{kind}", f"{stem}.{kind}.index{variant}.json", variant[1:],
                            kind == "safetensors")


def read_config(path: Path) -> dict:
    """A JSON object. Raises Unusable."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Unusable(f"{path} is missing or cannot be read ({error.strerror}); copy or download the model "
                       "again") from None
    except (ValueError, RecursionError) as error:
        lfs = path.read_bytes().startswith(LFS)
        raise Unusable(lfs_pointer(path) if lfs else f"{path}: not a JSON object ({error}); copy or download "
                       "the model again") from None
    if not isinstance(content, dict):
        raise Unusable(f"{path}: not a JSON object; copy or download the model again")
    return content


def lfs_pointer(path: Path) -> str:
    return f"{path} is a pointer of Git LFS in place of the file; fetch it with: git lfs pull"


def find_weights(folder: Path) -> tuple[Container, list[Path]]:
    """The files that hold a folder's weights, and how from_pretrained reads them.
    Raises Unusable: there are none, or a shard is missing."""
    of_diffusers = "_class_name" in read_config(folder / "config.json")
    for container in containers(of_diffusers):
        # with both at hand, diffusers takes the shards and transformers the one file
        for name in (container.index, container.whole)[::1 if of_diffusers else -1]:
            path = folder / name
            if path.is_symlink() and not path.exists():
                raise Unusable(f"{path} is a link to {path.readlink()}, which is missing; download it again")
            if path.exists():
                return container, _shards(path) if name == container.index else [path]
    expected = next(containers(of_diffusers)).whole
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (
        ".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf"))
    if not others:
        raise Unusable(f"{folder} holds no weights (*.safetensors or *.bin); expected {expected}, as "
                       "from_pretrained loads it")
    why = ("the copy without the moving average, which makes worse pictures" if "non_ema" in others[0] else
           "a name that from_pretrained does not know")
    raise Unusable(f"{folder} holds {others[0]}, {why}; expected {expected}: rename the file if it is that, "
                   "or download it")


def _shards(index: Path) -> list[Path]:
    content = read_config(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or "metadata" not in content:
        raise Unusable(f"{index}: expected weight_map, which names the shards, and metadata; download it "
                       "again")
    paths = sorted({index.parent / str(name) for name in names.values()})
    missing = [path for path in paths if path.parent != index.parent or not path.exists()]
    if missing:
        raise Unusable(f"{index} names {missing[0].name}, which is missing ({len(missing)} of {len(paths)} "
                       "shards); download it")
    return paths


def read_tensors(files: list[Path]) -> dict[str, Stored]:
    """Name, type, shape and place of every tensor. Raises Unusable: a file is cut, foreign or would run
    code."""
    found = {}
    for path in files:
        try:
            with path.open("rb") as file:
                begin = file.read(len(LFS))
            if begin == LFS:
                raise Unusable(lfs_pointer(path))
            found |= _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
        except Unusable:
            raise
        except Exception as error:  # both readers fail in many ways on what is cut or foreign
            named = re.search(r"GLOBAL ([\w.]+)", str(error))  # what torch's reader refuses
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "weights_only" in why:  # torch's advice is to run the file's code
                why = "torch's reader of weights alone refuses it"
            if named:
                why = f"it would call {named[1]}, which no weights need"
            raise Unusable(f"{path} is not a whole file of weights ({why}); copy or download it "
                           "again") from None
    if not found:
        raise Unusable(f"{files[0]} holds no tensors; download it again")
    return found


def _safetensors(path: Path) -> dict[str, Stored]:
    with safe_open(path, "np"):  # compares the header with the file's size
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = [name for name, one in header.items() if one["dtype"] not in TYPES]
    if unknown:
        raise ValueError(f"its tensor {unknown[0]!r} is of type {header[unknown[0]]['dtype']}")
    return {name: Stored(one["dtype"], tuple(one["shape"]), path, 8 + length + one["data_offsets"][0])
            for name, one in header.items()}


def _torch_file(path: Path) -> dict[str, Stored]:
    """Of a file that torch.save has written, today (a ZIP archive) or before version 1.6. torch's reader of
    weights alone refuses whatever would run code."""
    import torch  # which loads for this format alone
    found = {}
    for name, tensor in torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)).items():
        if not torch.is_tensor(tensor) or not isinstance(name, str):
            raise ValueError(f"its entry {name!r} is no tensor with a name")
        found[name] = Stored(TORCH_TYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape),
                             path, 0, tensor)
    return found
