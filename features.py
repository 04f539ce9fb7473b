"""Features are computed once: the cache that the stages train from, the data set that reads it, the order of samples.

The frozen encoders run once: build_features() writes VAE latents, CLAP and text embeddings into a folder keyed by
(models, settings, manifest, files); AudioImageDataset reads it and knows no encoder.

Shapes: F flips (1 or 2), C latent channels, h w latent size, k windows of a clip, E CLAP width, L D text tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import parallel
import pretrained
from config import RunFailed, UserError, stops_held, write_atomic
from data import BadFile, BadRow, Log, Row, decode_audio, load_image, open_audio, open_image, read_manifest

CACHE_FORMAT = 3
SHARD_ROWS = 512


# --- loading ------------------------------------------------------------------------------------------------

def _start_worker(_: int) -> None:
    # Ctrl-C and a closed terminal reach the whole process group: the parent finishes its step and ends the workers.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: an orphan would wait for ever to hand over its last batch after kill -9 of the parent.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    torch.set_num_threads(1)


class _Loader(DataLoader):
    def __iter__(self):
        with stops_held():  # half an iterator complains when it is thrown away
            batches = super().__iter__()
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise RunFailed(f"a data loading process was killed ({str(error).splitlines()[0]}); it ran out of memory "
                            "or of shared memory: use Docker's --shm-size=8g or --workers 0") from None
        except RunFailed as error:  # torch puts the loading process' traceback before the sentence
            raise RunFailed(str(error).strip().splitlines()[-1].removeprefix("config.RunFailed: ")) from None


def _loader(dataset: Dataset, batch_sampler, workers: int, **options) -> DataLoader:
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": _start_worker}
    return _Loader(dataset, batch_sampler=batch_sampler, num_workers=workers, **options)


class _Decode(Dataset):
    """Row -> (image (3, H, W), k waveforms, flags), or the reason why not; waveforms as log_mel gives them, if it is given.

    No model in a worker.
    """

    def __init__(self, rows: list[Row], image_size: int, sampling_rate: int, window_s: float, windows: int, log_mel=None):
        self.rows, self.image_size, self.audio = rows, image_size, (sampling_rate, window_s, windows)
        self.log_mel = log_mel

    def __getitem__(self, i: int):
        row = self.rows[i]
        try:
            image = load_image(row.image_path, self.image_size)
        except BadFile as error:
            return f"image {row.image_path.name}: {error}"
        try:
            clips, flags = decode_audio(row.audio_path, *self.audio)
        except BadFile as error:
            return f"audio {row.audio_path.name}: {error}"
        return image, [self.log_mel(clip) for clip in clips] if self.log_mel else clips, flags


# --- cache --------------------------------------------------------------------------------------------------

def _read_shard(path: Path, key: str) -> dict | None:
    """The record of a whole shard of this cache; None if it is missing, cut, foreign or of another cache."""
    try:
        with safe_open(path, "pt") as shard:  # checks the header against the file's size
            record = json.loads((shard.metadata() or {}).get("record", "{}"))
            sizes = {shard.get_slice(name).get_shape()[0] for name in shard.keys()}
    except (OSError, SafetensorError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("key") == f"{key}/{path.stem}" and sizes <= {record.get("count")} else None


@functools.lru_cache(maxsize=1)  # of 200,000 rows it takes a second and 100 MB
def _load_index(path: Path, written_ns: int) -> dict:
    return json.loads(path.read_bytes())


def _read_index(folder: Path, key: str) -> dict | None:
    """The index of a finished cache whose files all have the size they were written with, else None."""
    try:
        index = _load_index(folder / "index.json", (folder / "index.json").stat().st_mtime_ns)
        whole = index["key"] == key and all((folder / n).stat().st_size == s for n, s in index["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if whole else None


def _fingerprints(base_model: Path, clap_model: Path) -> dict[str, str]:
    folders = {name: Path(base_model) / name for name in ("vae", "text_encoder", "tokenizer")}
    folders["clap"] = Path(clap_model)
    found = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model folder; give one that holds a {name}")
        found[name] = pretrained.fingerprint(folder)
    return found


def _cache_key(root: Path, rows: list[Row], bad: list[BadRow], fingerprints: dict, settings: dict) -> str:
    """SHA-256 over all that the features depend on; a file counts by size and time, reading them all takes hours."""
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, SHARD_ROWS, fingerprints, settings], sort_keys=True).encode())
    for row in rows:
        stats = []
        for name in (row.image, row.audio):
            try:
                stat = os.stat(os.path.join(root, name))
            except OSError:
                stat = None
            stats.append([name, stat and stat.st_size, stat and stat.st_mtime_ns])
        digest.update(json.dumps([stats, row.text, row.label, row.split]).encode())
    digest.update(json.dumps([str(row) for row in bad]).encode())
    return digest.hexdigest()


def _judge(bad: list[str], total: int, limit: float, folder: Path, log: Log) -> None:
    """List the unusable rows, all in bad_rows.txt; UserError if they are more than the limit's share."""
    if not bad:
        return
    path = folder / "bad_rows.txt"
    text = "".join(line + "\n" for line in bad)
    if parallel.first() and (not path.is_file() or path.read_text(encoding="utf-8") != text):
        write_atomic(path, text.encode())
    for line in bad[:20]:
        log(f"  unusable: {line}")
    if len(bad) > 20:
        log(f"  ... and {len(bad) - 20} more in {path}")
    summary = f"{len(bad)} of {total} rows cannot be used (limit {limit * 100:g} %), listed in {path}"
    if len(bad) > limit * total:
        raise UserError(f"{summary}; mend or remove them, or raise --max-bad-share")
    log(f"{summary}; they are left out")


def _header_check(rows: list[Row]) -> dict[int, str]:
    """The rows whose files' headers show that they cannot be used: position -> reason."""
    bad = {}
    for i, row in enumerate(tqdm(rows, desc="checking files", unit="row", leave=False, disable=not parallel.first())):
        for name, path, opener in (("image", row.image_path, open_image), ("audio", row.audio_path, open_audio)):
            try:
                opener(path).close()
            except BadFile as error:
                bad[i] = f"{name} {path.name}: {error}"
                break
    return bad


def _decode_check(rows: list[Row], known: dict[int, str], workers: int) -> dict[int, str]:
    """The rows not in `known` that cannot be decoded: position -> reason. No encoder is loaded for it."""
    order = [i for i in range(len(rows)) if i not in known]
    loader = _loader(_Decode(rows, 64, 48000, 10.0, 1), [[i] for i in order], workers, collate_fn=list)
    results = tqdm(loader, desc="decoding files", unit="row", leave=False)
    return {i: result for i, [result] in zip(order, results) if isinstance(result, str)}


class _Encoders:
    """The frozen encoders, float32, loaded for a build only."""

    def __init__(self, base_model: Path, clap_model: Path, device: str):
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        import common
        self.device = device
        self.vae = AutoencoderKL.from_pretrained(base_model, subfolder="vae").float().eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(base_model, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(base_model, subfolder="text_encoder")
        self.text_encoder = text_encoder.float().eval().to(device)
        self.clap = common.CLAPAudioEncoder(str(clap_model)).float().eval().to(device)

    def latents(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> mean and std of the scaled latents, each (B, C, h, w)."""
        config = self.vae.config
        # clone: torch aligns its memory, NumPy not, and the alignment changes last bits
        posterior = self.vae.encode(torch.from_numpy(images).clone().to(self.device)).latent_dist
        mean = (posterior.mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
        return mean.cpu(), (posterior.std * config.scaling_factor).cpu()

    def text(self, captions: list[str]) -> torch.Tensor:
        """Captions -> (B, L, D), padded and cut to the tokenizer's length as the pipelines do."""
        ids = self.tokenizer(captions, padding="max_length", max_length=self.tokenizer.model_max_length,
                             truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.cpu()

    def rows(self, decoded: list[tuple], flip: bool, batch_size: int) -> dict[str, torch.Tensor]:
        images = np.stack([image for image, _, _ in decoded])
        sides = [self.latents(side) for side in ([images, images[..., ::-1].copy()] if flip else [images])]
        clips = [clip for _, clips, _ in decoded for clip in clips]
        embeds = torch.cat([self.clap.embed(clips[i:i + batch_size]).cpu() for i in range(0, len(clips), batch_size)])
        silent = torch.tensor([bool(flags) for _, _, flags in decoded])
        embeds = embeds.unflatten(0, (len(decoded), -1)).masked_fill(silent[:, None, None], 0.0)  # the null audio
        return {"latents_mean": torch.stack([mean for mean, _ in sides], 1),  # (B, F, C, h, w)
                "latents_std": torch.stack([std for _, std in sides], 1),
                "audio_embeds": embeds}  # (B, k, E)


def build_features(data_root: str | Path, base_model: Path, clap_model: Path, image_size: int, cache_dir: str | Path,
                   windows: int = 1, flip: bool = False, batch_size: int = 16, workers: int = 2, device: str = "cpu",
                   max_bad_share: float = 0.01, log: Log = print) -> Path:
    """Make sure that the features of a data folder are cached; return the finished cache folder.

    A finished cache is reused without loading an encoder; a half-built one goes on at the first missing shard.

    Raises:
        UserError: no usable manifest, too many unusable rows, a cache folder that cannot be written.
        RunFailed: the disk is full, an encoder gives NaN, a loading process was killed.
    """
    rows, bad = read_manifest(data_root, log)
    fingerprints = _fingerprints(base_model, clap_model)
    settings = {"image_size": image_size, "windows": windows, "flip": flip}
    key = _cache_key(Path(data_root).resolve(), rows, bad, fingerprints, settings)
    folder, total = Path(cache_dir) / key[:16], len(rows) + len(bad)
    index = _read_index(folder, key)
    if parallel.largest(index is None):
        with _locked(folder, log):
            index = _read_index(folder, key)  # the process we waited for has finished it, perhaps
            if parallel.largest(index is None):
                if parallel.first():
                    for stale in sorted(folder.glob(".*.tmp")):
                        stale.unlink()
                        log(f"removed {stale}, left by a build that was killed")
                parallel.wait()
                header_bad = _header_check(rows)
                if len(bad) + len(header_bad) > max_bad_share * total:  # it ends here: find all there is to mend
                    header_bad |= _decode_check(rows, header_bad, workers)
                _judge([*map(str, bad), *(f"{rows[i].where}: {reason}" for i, reason in sorted(header_bad.items()))],
                       total, max_bad_share, folder, log)
                build = _Build(folder, key, rows, header_bad, log)
                build.fill(Path(base_model), Path(clap_model), settings, batch_size, workers, device)
                parallel.wait()
                index = build.index() | {"fingerprints": fingerprints, "settings": settings, "total": total}
                index["bad"] = [*map(str, bad), *index["bad"]]
                if parallel.first():
                    write_atomic(folder / "index.json", json.dumps(index, ensure_ascii=False).encode())
                parallel.wait()
    _judge(index["bad"], index["total"], max_bad_share, folder, log)
    log(f"features of {len(index['rows'])} rows ready in {folder}")
    return folder


@contextlib.contextmanager
def _locked(folder: Path, log: Log):
    """Hold the cache folder, for all processes of this run, against other runs; it is made if it is not there."""
    if parallel.first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")
        except OSError as error:
            raise UserError(f"{folder}: the feature cache cannot be written ({error.strerror}); "
                            "choose another --cache-dir") from None
        # A POSIX lock: unlike flock it does not pass to the loading processes, so kill -9 frees it at once.
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            log(f"waiting for another process that is building {folder}")
            fcntl.lockf(lock, fcntl.LOCK_EX)
    parallel.wait()
    try:
        yield
    finally:
        if parallel.first():
            lock.close()


class _Build:
    """The shards of one cache folder, of which those already there and whole are kept."""

    def __init__(self, folder: Path, key: str, rows: list[Row], header_bad: dict[int, str], log: Log):
        self.folder, self.key, self.log = folder, key, log
        self.rows, self.header_bad = rows, header_bad
        self.captions = sorted({"", *(row.text for row in rows)})  # the empty one comes first
        self.texts, self.spans = ({f"{kind}-{n:05d}": range(i, min(i + SHARD_ROWS, total))
                                   for n, i in enumerate(range(0, total, SHARD_ROWS))}
                                  for kind, total in (("text", len(self.captions)), ("rows", len(rows))))

    def fill(self, base_model: Path, clap_model: Path, settings: dict, batch_size: int, workers: int, device: str) -> None:
        """Encode what is missing; of several processes each takes its share of the shards."""
        texts, spans = ({name: span for n, (name, span) in enumerate(every.items())
                         if n % parallel.world() == parallel.rank() and self._existing(name) is None}
                        for every in (self.texts, self.spans))
        if texts or spans:
            encoders = _Encoders(base_model, clap_model, device)
            with torch.inference_mode():
                for name, span in texts.items():
                    self._encode_text(name, span, encoders, batch_size)
                self._encode_rows(spans, encoders, settings, batch_size, workers)

    def index(self) -> dict:
        """What the finished shards hold."""
        records = [self._existing(name) for name in self.spans]
        bad = {**self.header_bad, **{i: reason for record in records for i, reason in record["bad"]}}
        text_ids = {caption: n for n, caption in enumerate(self.captions)}
        entries = []
        for number, record in enumerate(records):
            for offset, (i, flags) in enumerate(record["rows"]):
                row = self.rows[i]
                entries.append({"id": row.id, "label": row.label, "split": row.split, "text_id": text_ids[row.text],
                                "shard": number, "offset": offset, "flags": flags})
        return {"format": CACHE_FORMAT, "key": self.key, "rows": entries,
                "files": {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.safetensors"))},
                "bad": [f"{self.rows[i].where}: {bad[i]}" for i in sorted(bad)]}

    def _existing(self, name: str) -> dict | None:
        path = self.folder / f"{name}.safetensors"
        record = _read_shard(path, self.key)
        if record is None and path.exists():
            self.log(f"{path} is damaged: building it again")
        return record

    def _save(self, name: str, tensors: dict[str, torch.Tensor], record: dict) -> dict:
        for tensor in tensors.values():
            if not torch.isfinite(tensor).all():
                raise RunFailed(f"{self.folder / name}: an encoder gives NaN or infinity; check the model's files")
        record |= {"key": f"{self.key}/{name}", "count": len(next(iter(tensors.values()), ()))}
        content = save({k: t.contiguous() for k, t in tensors.items()}, {"record": json.dumps(record)})
        write_atomic(self.folder / f"{name}.safetensors", content)
        return record

    def _encode_text(self, name: str, span: range, encoders: _Encoders, batch_size: int) -> None:
        captions = [self.captions[i] for i in span]
        parts = [encoders.text(captions[i:i + batch_size]) for i in range(0, len(captions), batch_size)]
        self._save(name, {"text_embeds": torch.cat(parts)}, {})

    def _encode_rows(self, missing: dict[str, range], encoders: _Encoders, settings: dict, batch_size: int,
                     workers: int) -> None:
        """Write the missing shards; batches never straddle shards, so that a build that goes on is bit-equal."""
        usable = {name: [i for i in span if i not in self.header_bad] for name, span in missing.items()}
        batches = {name: [part[i:i + batch_size] for i in range(0, len(part), batch_size)] for name, part in usable.items()}
        decoder = _Decode(self.rows, settings["image_size"], encoders.clap.sampling_rate, encoders.clap.window_s,
                          settings["windows"], encoders.clap.log_mel)
        loader = _loader(decoder, [batch for part in batches.values() for batch in part], workers, collate_fn=list)
        threads = torch.get_num_threads()
        if encoders.device == "cpu":  # a loader process that shares a core with one of torch's threads makes all of them wait
            torch.set_num_threads(max(1, threads - workers))
        total, rest = len(self.rows) - len(self.header_bad), sum(map(len, usable.values()))
        with contextlib.closing(iter(loader)) as decoded, \
                tqdm(total=total if parallel.world() == 1 else rest, initial=total - rest if parallel.world() == 1 else 0,
                     desc="features", unit="row", disable=not parallel.first()) as bar:
            for name, part in batches.items():
                tensors, good, bad = [], [], []
                for batch in part:
                    results = dict(zip(batch, next(decoded)))
                    bad += [(i, result) for i, result in results.items() if isinstance(result, str)]
                    results = {i: result for i, result in results.items() if not isinstance(result, str)}
                    good += [(i, flags) for i, (_, _, flags) in results.items()]
                    if results:
                        tensors.append(encoders.rows(list(results.values()), settings["flip"], batch_size))
                    bar.update(len(batch))
                joined = {key: torch.cat([t[key] for t in tensors]) for key in (tensors[0] if tensors else ())}
                self._save(name, joined, {"rows": good, "bad": bad})
        torch.set_num_threads(threads)


# --- training side ------------------------------------------------------------------------------------------

class _Shard:
    """One file of the cache and where its tensors lie in it, so that a row is one short read.

    Nothing is kept open or mapped: what was read from a mapped file counts as the process's memory until it is all of it.

    Raises:
        RunFailed: the file is gone, cut or of another kind.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:  # safetensors: the header's length, the header, the tensors
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, path.stat().st_size)))
            self.layout = {name: (8 + size + spec["data_offsets"][0], spec["shape"][1:])
                           for name, spec in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.broken(error) from None

    def broken(self, reason) -> RunFailed:
        return RunFailed(f"{self.path}: cannot be read ({reason}); start again, it will be rebuilt")

    def row(self, i: int) -> dict[str, torch.Tensor]:
        """Row i of every tensor, float32."""
        found = {}
        try:
            with open(self.path, "rb", buffering=0) as file:
                for name, (start, shape) in self.layout.items():
                    content = bytearray(4 * math.prod(shape))
                    file.seek(start + i * len(content))
                    if file.readinto(content) != len(content):
                        raise OSError("cut off")
                    found[name] = torch.frombuffer(content, dtype=torch.float32).view(shape)
        except OSError as error:
            raise self.broken(error) from None
        return found


class AudioImageDataset(Dataset):
    """The cached features of one split, read row by row as they are asked for.

    An item: latents_mean, latents_std (F, C, h, w) with F = 2 (plain, mirrored) if flips were cached, else 1, already
    scaled; audio_embeds (k, E); text_embeds (L, D), all float32; index, the item's number.

    Raises:
        UserError: the folder is not a finished cache, or the split has no usable rows.
    """

    def __init__(self, data_root: str | Path, split: str, cache: str | Path):
        self.data_root, self.cache, self.split = Path(data_root), Path(cache), split
        try:
            index = _load_index(self.cache / "index.json", (self.cache / "index.json").stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.cache}: not a finished feature cache ({error}); build it again") from None
        if index["format"] != CACHE_FORMAT:
            raise UserError(f"{self.cache}: cache format {index['format']}, expected {CACHE_FORMAT}; build it again")
        self.rows: list[dict] = [row for row in index["rows"] if row["split"] == split]
        if not self.rows:
            raise UserError(f"{data_root}: no usable row in split {split!r}; add rows with that split to the manifest")
        self.labels = sorted({row["label"] for row in self.rows if row["label"] is not None})
        self._shards: dict[tuple[str, int], _Shard] = {}
        first = self[0]
        self.latent_shape = tuple(first["latents_mean"].shape[1:])  # (C, h, w)
        self.flips = len(first["latents_mean"])
        self.windows, self.embed_dim = first["audio_embeds"].shape
        self.empty_text_embeds = self._read("text", 0, 0)["text_embeds"]  # (L, D)
        self.text_dim = self.empty_text_embeds.shape[-1]

    def _read(self, kind: str, shard: int, offset: int) -> dict[str, torch.Tensor]:
        if (kind, shard) not in self._shards:
            self._shards[kind, shard] = _Shard(self.cache / f"{kind}-{shard:05d}.safetensors")
        return self._shards[kind, shard].row(offset)

    def some_audio_embeds(self, n: int) -> torch.Tensor:
        """The first window of n rows, evenly spread, or of all if there are fewer: (n, E)."""
        rows = (self.rows[i * len(self) // n] for i in range(n)) if n < len(self) else self.rows
        return torch.stack([self._read("rows", row["shard"], row["offset"])["audio_embeds"][0] for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        item = self._read("rows", row["shard"], row["offset"])
        return item | self._read("text", *divmod(row["text_id"], SHARD_ROWS)) | {"index": i}


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def batch_indices(size: int, batch_size: int, seed: int, micro_step: int) -> list[int]:
    """The batch of a micro-step: a cut of the endless row permutation(seed, 0), permutation(seed, 1), ..."""
    start = micro_step * batch_size
    return [int(_permutation(size, seed, at // size)[at % size]) for at in range(start, start + batch_size)]


class StepSampler(Sampler):
    """Batch sampler without state: the batches of micro-steps [start, stop). Resuming is another `start`.

    Of `world` processes each takes `batch_size` neighbouring samples of the batch of all; share is (rank, world).
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int, share: tuple[int, int] = (0, 1)):
        self.size, self.batch_size, self.seed, self.start, self.stop, self.share = size, batch_size, seed, start, stop, share

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self.share
        for micro_step in range(self.start, self.stop):
            everyone = batch_indices(self.size, self.batch_size * world, self.seed, micro_step)
            yield everyone[rank * self.batch_size:(rank + 1) * self.batch_size]

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


def sample_ids(dataset: AudioImageDataset, cfg, step: int) -> list[str]:
    """The samples of an optimizer step, in all its micro-steps and processes."""
    return [dataset.rows[i]["id"] for micro in range(cfg.accumulation) for i in batch_indices(
        len(dataset), cfg.batch_size * parallel.world(), cfg.seed, step * cfg.accumulation + micro)]


def make_loader(dataset: Dataset, batch_size: int, seed: int, start: int, stop: int, workers: int, device: torch.device) -> DataLoader:
    """This process's share of the batches of micro-steps [start, stop); the same bits for any number of workers.

    Raises:
        UserError: fewer rows than a batch of all processes.
    """
    share = parallel.rank(), parallel.world()
    if len(dataset) < batch_size * share[1]:
        where = f"{dataset.data_root}: split {dataset.split!r}" if hasattr(dataset, "split") else "the data set"
        raise UserError(f"{where} has {len(dataset)} usable rows, fewer than a batch of {batch_size * share[1]}; "
                        "add rows or lower --batch-size")
    sampler = StepSampler(len(dataset), batch_size, seed, start, stop, share)
    workers = workers if workers >= 0 else 2 if device.type == "cuda" else 0
    return _loader(dataset, sampler, workers, persistent_workers=workers > 0)


def open_splits(cfg, base: Path, clap: Path, device) -> tuple[AudioImageDataset, AudioImageDataset]:
    """The cached train and validation features for a stage's settings, built first where they are missing."""
    cache = build_features(cfg.data_root, base, clap, cfg.image_size, cfg.cache_dir, cfg.windows, cfg.flip,
                           batch_size=min(16, cfg.val_batch_size),
                           workers=cfg.workers if cfg.workers >= 0 else 2 if device.type == "cuda" else 1, device=str(device), max_bad_share=cfg.max_bad_share)
    return AudioImageDataset(cfg.data_root, "train", cache), AudioImageDataset(cfg.data_root, "val", cache)
