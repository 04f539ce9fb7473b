"""The feature cache: the frozen encoders run once, and the stages train from what they gave.

A folder holds shards (safetensors) of VAE latents and CLAP embeddings, others of text embeddings and, last of
all, index.json. Its name is a key of the models, the settings, the manifest and the files."""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clap2diffusion.base import files, hub, processes
from clap2diffusion.base.exits import RunFailed, UserError, stops_held
from clap2diffusion.base.workers import start_worker
from clap2diffusion.dataset.decoding import BadFile, decode_audio, load_image, open_audio, open_image
from clap2diffusion.dataset.manifest import Log, Row, read_manifest

CACHE_FORMAT = 3
SHARD_ROWS = 512


@functools.lru_cache(maxsize=1)  # of 200,000 rows it takes a second and 100 MB
def _parsed(path: Path, written_ns: int) -> dict:
    return json.loads(path.read_bytes())


def load_index(folder: Path) -> dict:
    """index.json of a cache folder. Raises OSError or ValueError."""
    return _parsed(folder / "index.json", (folder / "index.json").stat().st_mtime_ns)


def read_index(folder: Path, key: str) -> dict | None:
    """The index of a finished cache whose files all have the size they were written with, else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        index = load_index(folder)
        sizes = {name: (folder / name).stat().st_size for name in index["files"]}
        if index["key"] == key and index["files"] == sizes:
            return index
    return None


def model_fingerprints(base: Path, clap: Path) -> dict[str, str]:
    """A short name of the content of each model that makes features."""
    parts = [Path(base) / name for name in ("vae", "text_encoder", "tokenizer")]
    return {part.name: hub.fingerprint(part) for part in parts} | {"clap": hub.fingerprint(Path(clap))}


def cache_key(root: Path, rows: list[Row], bad: list[str], fingerprints: dict, settings: dict) -> str:
    """SHA-256 of all that the features depend on. A file counts by size and time: reading all takes hours."""
    made_with = [CACHE_FORMAT, SHARD_ROWS, fingerprints, settings]
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode())
    for row in rows:
        stats = []
        for name in (row.image, row.audio):
            try:
                stat = os.stat(os.path.join(root, name))
                stats.append([name, stat.st_size, stat.st_mtime_ns])
            except OSError:
                stats.append([name, None, None])
        digest.update(json.dumps([stats, row.text, row.label, row.split]).encode())
    digest.update(json.dumps(bad).encode())
    return digest.hexdigest()


def refuse_bad_rows(bad: list[str], total: int, limit: float, folder: Path, log: Log) -> None:
    """List the unusable rows, all of them in bad_rows.txt. Raises UserError if they are too many."""
    if not bad:
        return
    path, text = folder / "bad_rows.txt", "".join(line + "\n" for line in bad)
    if processes.first() and (not path.is_file() or path.read_text(encoding="utf-8") != text):
        files.write_atomic(path, text.encode())
    for line in bad[:20]:
        log(f"  unusable: {line}")
    if len(bad) > 20:
        log(f"  ... and {len(bad) - 20} more in {path}")
    summary = f"{len(bad)} of {total} rows cannot be used (limit {limit * 100:g} %), listed in {path}"
    if len(bad) > limit * total:
        raise UserError(f"{summary}; mend or remove them, or raise --max-bad-share")
    log(f"{summary}; they are left out")


class Loader(DataLoader):
    """torch's loader. Its processes leave signals to their parent; its failures are one sentence of ours."""

    def __init__(self, dataset: Dataset, batches, workers: int, **options):
        super().__init__(dataset, batch_sampler=batches, num_workers=workers,
                         worker_init_fn=functools.partial(start_worker, os.getpid()), **options)

    def __iter__(self):
        with stops_held():  # half an iterator complains when it is thrown away
            batches = super().__iter__()
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise RunFailed(f"a data loading process was killed ({reason}); it ran out of memory or of "
                            "shared memory: use Docker's --shm-size=8g or --workers 0") from None
        except RunFailed as error:  # torch puts the process's traceback and the class before the sentence
            raise RunFailed(str(error).strip().splitlines()[-1].rpartition("RunFailed: ")[2]) from None


class Decode(Dataset):
    """Row -> (image (3, H, W), k waveforms, flags), or the reason why it cannot be used. log_mel: an
    encoder's; its output then stands in the place of each waveform. None leaves the waveforms."""

    def __init__(self, rows: list[Row], image_size: int, rate: int, window_s: float, windows=1, log_mel=None):
        self.rows, self.image_size, self.log_mel = rows, image_size, log_mel
        self.audio = rate, window_s, windows

    def __getitem__(self, i: int):
        kind, path = "image", self.rows[i].image_path
        try:
            image = load_image(path, self.image_size)
            kind, path = "audio", self.rows[i].audio_path
            waveforms, flags = decode_audio(path, *self.audio)
        except BadFile as error:
            return f"{kind} {path.name}: {error}"
        return image, [*map(self.log_mel, waveforms)] if self.log_mel else waveforms, flags


def check_headers(rows: list[Row]) -> dict[int, str]:
    """The rows whose files' headers show that they cannot be used: position -> reason."""
    bad = {}
    bar = tqdm(rows, desc="checking files", unit="row", leave=False, disable=not processes.first())
    for i, row in enumerate(bar):
        kind, path = "image", row.image_path
        try:
            open_image(path).close()
            kind, path = "audio", row.audio_path
            open_audio(path).close()
        except BadFile as error:
            bad[i] = f"{kind} {path.name}: {error}"
    return bad


def check_decoding(rows: list[Row], known: dict[int, str], workers: int) -> dict[int, str]:
    """The rows not in `known` that cannot be decoded: position -> reason. It needs no encoder."""
    order = [i for i in range(len(rows)) if i not in known]
    loader = Loader(Decode(rows, 64, 48000, 10.0), [[i] for i in order], workers, collate_fn=list)
    results = tqdm(loader, desc="decoding files", unit="row", leave=False)
    return {i: result for i, [result] in zip(order, results) if isinstance(result, str)}


def build_features(data_root: str | Path, base_model: Path, clap_model: Path, image_size: int,
                   cache_dir: str | Path, windows: int = 1, flip: bool = False, batch_size: int = 16,
                   workers: int = 2, device="cpu", max_bad_share: float = 0.01, log: Log = print) -> Path:
    """The cache folder of a data folder's features. A finished one is used again, and no encoder is loaded. A
    half-built one goes on at the first missing shard.
    Raises UserError: no usable manifest, too many unusable rows, a cache folder that cannot be written.
    Raises RunFailed: the disk is full, an encoder gives NaN, a loading process was killed."""
    rows, bad = read_manifest(data_root, log)
    fingerprints = model_fingerprints(base_model, clap_model)
    settings = {"image_size": image_size, "windows": windows, "flip": flip}
    if files.read_json(Path(clap_model) / "config.json").get("audio_config", {}).get("enable_fusion"):
        settings["is_longer"] = False  # caches from before were made as if every clip were
    key = cache_key(Path(data_root).resolve(), rows, bad, fingerprints, settings)
    folder, total = Path(cache_dir) / key[:16], len(rows) + len(bad)
    held, index = contextlib.nullcontext(), read_index(folder, key)
    if processes.largest(index is None):
        if processes.first():
            try:
                held = files.lock(folder, wait=f"waiting for another process that is building {folder}")
            except OSError as error:
                raise UserError(f"{folder}: the feature cache cannot be written ({error.strerror}); choose "
                                "another --cache-dir") from None
        with held:
            processes.wait()
            index = read_index(folder, key)  # perhaps the process that we waited for has finished it
            if processes.largest(index is None):
                for stale in files.remove_stale(folder) if processes.first() else ():
                    log(f"removed {stale}, left by a build that was killed")
                processes.wait()
                header_bad = check_headers(rows)
                if len(bad) + len(header_bad) > max_bad_share * total:  # it ends here: find all to mend
                    header_bad |= check_decoding(rows, header_bad, workers)
                known = bad + [f"{rows[i].where}: {header_bad[i]}" for i in sorted(header_bad)]
                refuse_bad_rows(known, total, max_bad_share, folder, log)
                build = Build(folder, key, rows, header_bad, log)
                build.fill(base_model, clap_model, settings, batch_size, workers, device)
                processes.wait()  # for the shards of all
                index = build.index(bad, fingerprints=fingerprints, settings=settings, total=total)
                if processes.first():
                    files.write_atomic(folder / "index.json", json.dumps(index, ensure_ascii=False).encode())
                processes.wait()
    refuse_bad_rows(index["bad"], index["total"], max_bad_share, folder, log)
    log(f"features of {len(index['rows'])} rows ready in {folder}")
    return folder


class Build:
    """The shards of one cache folder. Those that are there and whole are kept."""

    def __init__(self, folder: Path, key: str, rows: list[Row], header_bad: dict[int, str], log: Log):
        self.folder, self.key, self.log = folder, key, log
        self.rows, self.header_bad = rows, header_bad
        self.captions = sorted({"", *(row.text for row in rows)})  # the empty one comes first
        self.texts, self.spans = (
            {f"{kind}-{i // SHARD_ROWS:05d}": all_[i:i + SHARD_ROWS] for i in range(0, len(all_), SHARD_ROWS)}
            for kind, all_ in (("text", self.captions), ("rows", range(len(rows)))))

    def fill(self, base: Path, clap: Path, settings: dict, batch_size: int, workers: int, device: str):
        """Encode what is missing; of several processes each takes its share of the shards."""
        texts, spans = ({name: every[name] for name in list(every)[processes.rank()::processes.world()]
                         if self._record(name) is None} for every in (self.texts, self.spans))
        if not texts and not spans:
            return
        from clap2diffusion.dataset.encoders import Encoders  # it takes seconds, so not before now
        encoders = Encoders(base, clap, device)
        with torch.inference_mode():
            for name, captions in texts.items():
                batches = (captions[i:i + batch_size] for i in range(0, len(captions), batch_size))
                self._save(name, [{"text_embeds": encoders.text(batch)} for batch in batches], {})
            self._encode_rows(spans, encoders, settings, batch_size, workers)

    def index(self, bad_lines=(), **known) -> dict:
        """What the finished shards hold, and what is known besides."""
        bad, entries = dict(self.header_bad), []
        text_ids = {caption: n for n, caption in enumerate(self.captions)}
        for shard, name in enumerate(self.spans):
            record = self._record(name)
            bad |= dict(record["bad"])
            for offset, (i, flags) in enumerate(record["rows"]):
                row = self.rows[i]
                entries.append({"id": row.id, "label": row.label, "split": row.split, "text_id":
                                text_ids[row.text], "shard": shard, "offset": offset, "flags": flags})
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.safetensors"))}
        return {"format": CACHE_FORMAT, "key": self.key, "rows": entries, "files": sizes,
                "bad": [*bad_lines, *(f"{self.rows[i].where}: {bad[i]}" for i in sorted(bad))], **known}

    def _record(self, name: str) -> dict | None:
        """What a shard says of itself; None if it is missing, cut, foreign or of another cache."""
        path = self.folder / f"{name}.safetensors"
        with contextlib.suppress(OSError, SafetensorError, ValueError, RecursionError, AttributeError):
            with safe_open(path, "pt") as shard:  # checks the header against the file's size
                record = json.loads((shard.metadata() or {}).get("record", "{}"))
                sizes = {shard.get_slice(key).get_shape()[0] for key in shard.keys()}
            if record.get("key") == f"{self.key}/{name}" and sizes <= {record.get("count")}:
                return record
        if path.exists():
            self.log(f"{path} is damaged: building it again")
        return None

    def _save(self, name: str, parts: list[dict[str, torch.Tensor]], record: dict) -> None:
        tensors = {key: torch.cat([part[key] for part in parts]) for key in (parts or [{}])[0]}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise RunFailed(f"{self.folder / name}: an encoder gives NaN or infinity; check the model's "
                            "files")
        record |= {"key": f"{self.key}/{name}", "count": len(next(iter(tensors.values()), ()))}
        content = save({key: t.contiguous() for key, t in tensors.items()}, {"record": json.dumps(record)})
        files.write_atomic(self.folder / f"{name}.safetensors", content)

    def _encode_rows(self, missing: dict[str, range], encoders, settings: dict, size: int, workers: int):
        """Write shards by batches of `size`. None spans two, so a build that goes on gives the same bits."""
        batches = {}
        for name, span in missing.items():
            usable = [i for i in span if i not in self.header_bad]
            batches[name] = [usable[i:i + size] for i in range(0, len(usable), size)]
        clap, threads = encoders.clap, torch.get_num_threads()
        decode = Decode(self.rows, settings["image_size"], clap.sampling_rate, clap.window_s,
                        settings["windows"], clap.log_mel)
        every = sum(batches.values(), [])
        loader, rest = Loader(decode, every, workers, collate_fn=list), sum(map(len, every))
        if encoders.device == "cpu":  # all of torch's threads wait for one that shares its core with a loader
            torch.set_num_threads(max(1, threads - workers))
        total = len(self.rows) - len(self.header_bad) if processes.world() == 1 else rest
        bar = tqdm(total=total, initial=total - rest, desc="features", unit="row",
                   disable=not processes.first())
        with contextlib.closing(iter(loader)) as decoded, bar:
            for name in missing:
                parts, good, bad = [], [], []
                for batch in batches[name]:
                    results = dict(zip(batch, next(decoded)))
                    bad += [(i, results.pop(i)) for i in batch if isinstance(results[i], str)]
                    good += [(i, flags) for i, (_, _, flags) in results.items()]
                    if results:
                        parts.append(encoders.rows(list(results.values()), settings["flip"], size))
                    bar.update(len(batch))
                self._save(name, parts, {"rows": good, "bad": bad})
        torch.set_num_threads(threads)
