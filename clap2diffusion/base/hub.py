"""Models on disk or on the hub: where their folder is, whether it is whole, and a short name of its content.
No heavy import: a wrong path is told before torch is loaded."""

import errno
import functools
import hashlib
import json
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clap2diffusion.base.exits import DISK_FULL, RunFailed, UserError
from clap2diffusion.base.model_files import CLAPS, KINDS, PARTS, check_model, preprocessor, single_file
from clap2diffusion.base.weights import Unusable, containers, find_weights, read_config, read_tensors

SCRIPTS = Path(__file__).resolve().parents[2]  # where the scripts lie, and assets/
ABOUT_SAVING = ("transformers_version", "torch_dtype", "dtype", "architectures")  # not about the model
DERIVED = ("position_ids", "num_batches_tracked", "relative_position_index")  # some versions save them
TEXTS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
         "spiece.model", "tokenizer.model")  # what the libraries read of a folder beside its weights
# what changes a sound's way through CLAP and shows in no tensor's shape, with the library's defaults
CLAP_EXTRACTOR = {"feature_size": 64, "sampling_rate": 48000, "hop_length": 480, "max_length_s": 10,
                  "fft_window_size": 1024, "padding_value": 0, "frequency_min": 0, "frequency_max": 14000,
                  "top_db": None, "truncation": "fusion", "padding": "repeatpad"}
CLAP_AUDIO = {"window_size": 8, "num_mel_bins": 64, "spec_size": 256, "hidden_act": "gelu", "patch_size": 4,
              "patch_stride": [4, 4], "num_attention_heads": [4, 8, 16, 32], "enable_fusion": False,
              "fusion_type": None, "flatten_patch_embeds": True, "enable_patch_layer_norm": True,
              "projection_hidden_act": "relu", "layer_norm_eps": 1e-5}
CLAP_READ = ("audio_model.", "audio_projection.")


def find_beside(name: str, beside: Path | None = None) -> Path:
    """The file or folder of that name: as it is named, or, where a file `beside` names it, also beside that
    file and above, and beside the scripts. Path(name) if there is none."""
    places = [Path()] + ([*Path(beside).resolve().parents, SCRIPTS] if beside else [])
    return next((place / name for place in places if name and (place / name).exists()), Path(name))


def resolve_model(name: str, what: str, beside: Path | None = None) -> Path:
    """The folder of a model, which is one of KINDS, given as a folder or as a hub name. Before a download it
    says so. beside: the file that names the model; a relative name is looked for in the current folder,
    beside that file and above, and beside the scripts.
    Raises UserError: there is none, it is broken or of a kind that we do not train with, or the hub's copy
    is not here and cannot be had."""
    folder, looked = find_beside(name, beside), "here"
    if beside and not Path(name).is_absolute():
        looked = f"in {Path().resolve()}, beside {beside} or above it, or in {SCRIPTS}"
    if not folder.exists() and is_hub_name(name):
        folder = _download(name, what, looked)
    try:
        if folder.is_file():
            raise Unusable(single_file(folder, what))
        if not folder.is_dir():
            raise Unusable(f"there is no such folder {looked}; expected a folder as from_pretrained "
                           "loads it, or a hub name OWNER/NAME")
        check_model(folder, what)
        _say_variants(folder, what)
    except Unusable as error:
        raise UserError(f"{what} {name!r}: {error}") from None
    return folder


@functools.cache
def _say_variants(folder: Path, what: str) -> None:
    """Say, once, which parts have no plain weights, so that those of a variant such as fp16 are used."""
    for part in KINDS[what].parts:
        if part in ("", *PARTS) and (variant := find_weights(folder / part)[0].variant):
            print(f"{what} {folder / part}: holds no plain weights; its {variant} weights are used",
                  flush=True)


@contextmanager
def told(cls, what: str, place: Path):
    """What the libraries raise of a model's files becomes a UserError; no memory left stays what it is."""
    try:
        yield
    except Unusable as error:
        raise UserError(f"{what} {place}: {error}") from None
    except Exception as error:
        kind, text = type(error).__name__, " ".join(str(error).split())
        if isinstance(error, (UserError, RunFailed, MemoryError)) or kind == "OutOfMemoryError":
            raise
        raise UserError(f"{what} {place}: no {cls.__name__} can be made of its files ({kind}: {text:.200}); "
                        "copy or download it again") from None


def load_small(cls, folder: Path, what: str, subfolder: str = ""):
    """A tokenizer, scheduler or extractor of class `cls` from FOLDER/SUBFOLDER. Raises UserError."""
    place = Path(folder, subfolder)
    with told(cls, what, place):
        return cls.from_pretrained(place, local_files_only=True)


def find_trained(given: str, trained: str, what: str, adapter_path: Path) -> Path:
    """The model for an adapter: the one a flag gives, or else the one that the adapter was trained with.
    Raises UserError as resolve_model() does; of the adapter's own it names the flag."""
    if given:
        return resolve_model(given, what)
    try:
        return resolve_model(trained, what, beside=adapter_path)
    except UserError as error:
        raise UserError(f"{error}; {adapter_path} was trained with it: if it lies elsewhere now, say where "
                        f"with --{what.lower().replace(' ', '-')}") from None


def is_hub_name(name: str) -> bool:
    """Whether a model's name may be OWNER/NAME on the hub; there may be such a folder all the same."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _cached(name: str, what: str) -> tuple[Path | None, str]:
    """The whole copy of a hub model in the local model cache; or None and why the copy there is not whole."""
    import huggingface_hub  # only a hub name needs it
    first = "config.json" if KINDS[what].parts == ("",) else "model_index.json"
    with suppress(ValueError):  # a name that no hub model can have
        cached = huggingface_hub.try_to_load_from_cache(name, first)
        if isinstance(cached, str):
            try:
                check_model(Path(cached).parent, what)
                return Path(cached).parent, ""
            except Unusable as error:
                return None, str(error)
    return None, ""


def would_download(name: str, what: str) -> bool:
    """Whether resolve_model() would ask the hub for this model."""
    return not Path(name).exists() and is_hub_name(name) and _cached(name, what)[0] is None


def _download(name: str, what: str, looked: str) -> Path:
    """The local copy of a hub model; without a whole one it is downloaded, after saying so. looked: the
    places where there is no such folder. Raises UserError."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    copy, known = _cached(name, what)
    if copy:
        return copy
    try:
        listed = huggingface_hub.HfApi().model_info(name, timeout=4).siblings
        names = [one.rfilename for one in listed]
        print(f"downloading {what} {name} from the Hugging Face hub", flush=True)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted(names, what)))
    except GatedRepoError:
        raise UserError(f"{what} {name!r}: its authors give it on request; ask for access at "
                        f"https://huggingface.co/{name}, then log in with: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(f"{what} {name!r}: no such model on the hub, or a private one (log in with: hf "
                        f"auth login), and no such folder {looked}; check the name's spelling") from None
    except Exception as error:  # every kind of network failure of the hub's client ends in the same sentence
        reason = getattr(error, "errno", None)
        if reason in (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            raise (RunFailed if reason in DISK_FULL else UserError)(
                f"{what} {name!r}: its download cannot be written ({error.strerror}) to "
                f"{huggingface_hub.constants.HF_HUB_CACHE}; make room there or set HF_HOME to another "
                "folder") from None
        lacks = (f": its copy in the local model cache is not whole ({known})" if known else
                 f" is neither a folder {looked} nor in the local model cache")
        raise UserError(f"{what} {name!r}{lacks}, and the hub gave no copy ({type(error).__name__}); give a "
                        "local folder or go online") from None


def wanted(names: list[str], what: str) -> list[str]:
    """Of the files in a model's repository those that we load: configs, the tokenizer, and of each part's
    weights one container, the best that is there."""
    chosen = ["model_index.json"] if "model_index.json" in names else []
    for part in KINDS[what].parts:
        prefix = f"{part}/" if part else ""
        inside = [name[len(prefix):] for name in names
                  if name.startswith(prefix) and "/" not in name[len(prefix):]]
        small = (".json", ".txt", "spiece.model", "tokenizer.model")
        picked = [name for name in inside if name.endswith(small) and ".index." not in name]
        for container in containers(part in ("unet", "vae")):
            if container.whole in inside:
                picked.append(container.whole)
                break
            if container.index in inside:
                kind, variant = Path(container.whole).suffix, container.variant
                picked += [container.index, *(
                    name for name in inside if "-of-" in name and name.endswith(kind)
                    and (f".{variant}" in name if variant else name.count(".") == 1))]
                break
        chosen += [prefix + name for name in picked]
    return chosen


def _plain(config):
    """A config without what says nothing of the model: how, by whom and in which type it was saved."""
    if isinstance(config, dict):
        return {key: _plain(value) for key, value in config.items()
                if not key.startswith("_") and key not in ABOUT_SAVING}
    return [_plain(one) for one in config] if isinstance(config, list) else config


def _texts(folder: Path) -> list[Path]:
    """A folder's configs and vocabularies, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))


def _sound_path(folder: Path, config: dict) -> bytes:
    """What a CLAP's configs say of a sound's way, the same whichever version of the library wrote them."""
    found = [{key: given.get(key, default) for key, default in known.items()} for given, known in (
        (preprocessor(folder)[1], CLAP_EXTRACTOR), (config.get("audio_config", config), CLAP_AUDIO))]
    plain = [{key: float(value) if type(value) in (int, float) else value for key, value in one.items()}
             for one in found]
    return json.dumps(plain, sort_keys=True).encode()


def fingerprint(model_dir: Path) -> str:
    """A 16-digit name of a model folder's content: the files of TEXTS, and of each tensor the name, type,
    shape and eight blocks of 4 KiB from its first to its last byte. The same tensors in another container
    have the same name. Of a CLAP the audio tower and what is on a sound's way count alone. Sampling makes
    4 GB as quick as 4 MB: another training run changes every tensor, and a change between the blocks of a
    large one is not seen. Raises UserError: a config or the weights are broken."""
    folder, digest = Path(model_dir), hashlib.sha256()
    try:
        config = read_config(folder / "config.json") if (folder / "config.json").exists() else {}
        tensors = read_tensors(find_weights(folder)[1]) if config else {}
        if config.get("model_type") in CLAPS:
            tensors = {name: one for name, one in tensors.items() if name.startswith(CLAP_READ)}
            digest.update(_sound_path(folder, config))
        else:
            for path in [folder / name for name in TEXTS if (folder / name).exists()]:
                content = (json.dumps(_plain(read_config(path)), sort_keys=True).encode()
                           if path.suffix == ".json" else path.read_bytes())
                digest.update(f"{path.name} {len(content)} ".encode() + content)
    except Unusable as error:
        raise UserError(str(error)) from None
    for name, tensor in sorted(tensors.items()):
        if not name.endswith(DERIVED):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + tensor.sample())
    return digest.hexdigest()[:16]


def fingerprint_by_file(model_dir: Path) -> str:
    """The name that fingerprint() gave before: it holds the files' names and sizes. Adapters and checkpoints
    from then still carry it. It had none for a folder with weights of a variant alone, and no folder with
    another JSON file than an object: the first has fingerprint()'s, the second is named without that file."""
    folder, digest = Path(model_dir), hashlib.sha256()
    kinds = ([path for path in sorted(folder.glob(kind))
              if "fp16" not in path.name and "non_ema" not in path.name]
             for kind in ("*.safetensors", "*.bin"))
    weights = next((files for files in kinds if files), [])
    if not weights and [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        return fingerprint(folder)
    for path in [*_texts(folder), *weights]:
        size = path.stat().st_size
        if path.suffix == ".json":
            try:
                content = read_config(path)
            except Unusable:
                continue
            content = {key: value for key, value in content.items() if not key.startswith("_")}
            digest.update(json.dumps(content, sort_keys=True).encode())
            continue
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in np.linspace(0, max(0, size - 4096), 33, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def is_model(recorded: str, folder: Path) -> bool:
    """Whether the fingerprint that a file carries is this folder's, made as today or as before."""
    return recorded in (fingerprint(folder), fingerprint_by_file(folder))


class Models(NamedTuple):
    """Two folders; fingerprints name the UNet that an adapter is trained in and the CLAP that it reads."""
    base: Path
    clap: Path
    fingerprints: dict[str, str]

    def match(self, recorded: dict[str, str]) -> bool:
        """Whether a checkpoint's fingerprints are those of these models, made as today or as before."""
        folders = {"unet": self.base / "unet", "clap": self.clap}
        return recorded.keys() == folders.keys() and all(
            recorded[key] == self.fingerprints[key] or is_model(recorded[key], folders[key])
            for key in folders)


def find_models(cfg) -> Models | None:
    """The models of a stage's settings, before torch loads. With --dry-run nothing is downloaded: it is said
    which model would be, and there are none. Raises UserError: one is missing or broken."""
    named = {"base model": cfg.base_model, "CLAP model": cfg.clap_model}
    absent = [f"{what} {name}" for what, name in named.items() if cfg.dry_run and would_download(name, what)]
    if absent:
        print(f"{' and '.join(absent)}: not here; a run would look for it on the Hugging Face hub and "
              "download it first", flush=True)
        return None
    base, clap = resolve_model(cfg.base_model, "base model"), resolve_model(cfg.clap_model, "CLAP model")
    return Models(base, clap, {"unet": fingerprint(base / "unet"), "clap": fingerprint(clap)})
