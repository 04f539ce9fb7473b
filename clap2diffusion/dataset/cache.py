"""The feature cache: the frozen encoders run once, and the stages train from what they gave.

A folder holds shards (safetensors) of VAE latents and CLAP embeddings, others of text embeddings and, last of
all, index.json. Its name is a key of the models, the settings, the manifest and the files. Each shard says of
what it was made. What lies in another folder already, of the same models and settings, is not encoded again:
its shards are linked into the new folder, so they take no room twice and either folder may be deleted."""

import contextlib
import functools
import hashlib
import json
import os
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clap2diffusion.base import files, hub, processes
from clap2diffusion.base.exits import RunFailed, UserError, stops_held
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.workers import start_worker, usable_workers
from clap2diffusion.dataset.decoding import BadFile, decode_audio, load_image, open_audio, open_image
from clap2diffusion.dataset.manifest import Log, Row, read_manifest

CACHE_FORMAT, KEY_FORMAT = 4, 3  # of the files, and of the name, which runs from before have in their headers
SHARD_ROWS = 512
UNREADABLE = OSError, SafetensorError, ValueError, RecursionError, AttributeError, TypeError, KeyError


@functools.lru_cache(maxsize=1)  # of 200,000 rows it takes a second and 100 MB
def _parsed(path: Path, written_ns: int) -> dict:
    return json.loads(path.read_bytes())


def load_index(folder: Path) -> dict:
    """index.json of a cache folder. Raises OSError or ValueError."""
    return _parsed(folder / "index.json", (folder / "index.json").stat().st_mtime_ns)


def read_index(folder: Path) -> dict | None:
    """The index of a finished cache whose files all have the size they were written with, else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        index = load_index(folder)
        sizes = {name: (folder / name).stat().st_size for name in index["files"]}
        if index["format"] == CACHE_FORMAT and index["key"][:16] == folder.name and index["files"] == sizes:
            return index
    return None


def model_fingerprints(base: Path, clap: Path, name=hub.fingerprint) -> dict[str, str]:
    """A short name of the content of each model that makes features."""
    parts = [Path(base) / part for part in ("vae", "text_encoder", "tokenizer")]
    return {part.name: name(part) for part in parts} | {"clap": name(Path(clap))}


def file_stats(row: Row) -> list[list]:
    """[name, size, time] of a row's picture and sound; None where there is no such file."""
    stats = []
    for name in (row.image, row.audio):
        try:
            stat = os.stat(os.path.join(row.root, name))
            stats.append([name, stat.st_size, stat.st_mtime_ns])
        except OSError:
            stats.append([name, None, None])
    return stats


def short_name(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def sizes_of(stats: list[list]) -> tuple:
    return tuple(size for _, size, _ in stats)


def content_name(row: Row) -> str:
    """A short name of a row's picture and sound by their bytes: all up to 64 MiB, else 64 even blocks of
    1 MiB and the size. Raises OSError."""
    digest, block = hashlib.sha256(), 1 << 20
    for path in (row.image_path, row.audio_path):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode())
            if size <= 64 * block:
                digest.update(file.read())
            for i in range(64 if size > 64 * block else 0):
                file.seek((size - block) * i // 63)
                digest.update(file.read(block))
    return digest.hexdigest()[:24]


def cache_key(rows: list[Row], stats: list, bad: list[str], fingerprints: dict, settings: dict) -> str:
    """SHA-256 of all that the features depend on. A file counts by size and time: reading all takes hours."""
    made_with = [KEY_FORMAT, SHARD_ROWS, fingerprints, settings]
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode())
    for row, found in zip(rows, stats, strict=True):
        digest.update(json.dumps([found, row.text, row.label, row.split]).encode())
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

    def __init__(self, dataset: Dataset, batches, workers: int, persistent=False, **options):
        workers = usable_workers(workers)
        super().__init__(dataset, batch_sampler=batches, num_workers=workers,
                         persistent_workers=persistent and workers > 0,
                         worker_init_fn=functools.partial(start_worker, os.getpid()), **options)

    def __iter__(self):
        with stops_held():  # half an iterator complains when it is thrown away
            batches = super().__iter__()
        try:
            yield from batches
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            held, reason = error.__traceback__, str(error).splitlines()[0]
            sentence = (f"a data loading process was killed ({reason}); it ran out of memory or of shared "
                        "memory: use Docker's --shm-size=8g or --workers 0")
        except RunFailed as error:  # torch puts the process's traceback and the class before the sentence
            held, sentence = error.__traceback__, str(error).strip().splitlines()[-1]
            sentence = sentence.rpartition("RunFailed: ")[2]
        # The processes end when nothing holds `batches`. Python waits for them at its end, and they for it.
        traceback.clear_frames(held)
        self._iterator = batches = held = None  # torch's own, where processes persist
        raise RunFailed(sentence)


class Decode(Dataset):
    """Row -> (image (3, H, W), k waveforms, flags), or the reason why it cannot be used. log_mel: an
    encoder's; its output then stands in the place of each waveform, and content_name follows the flags."""

    def __init__(self, rows: list[Row], image_size: int, rate: int, window_s: float, windows=1, log_mel=None):
        self.rows, self.image_size, self.log_mel = rows, image_size, log_mel
        self.audio = rate, window_s, windows

    def __getitem__(self, i: int):
        kind, path = "image", self.rows[i].image_path
        try:
            image = load_image(path, self.image_size)
            kind, path = "audio", self.rows[i].audio_path
            waveforms, flags = decode_audio(path, *self.audio)
            if self.log_mel:
                return image, [*map(self.log_mel, waveforms)], flags, content_name(self.rows[i])
        except (BadFile, OSError) as error:
            return f"{kind} {path.name}: {error}"
        return image, waveforms, flags


def check_headers(rows: list[Row], known: set[int]) -> dict[int, str]:
    """The rows not in `known` whose files' headers show that they cannot be used: position -> reason."""
    bad, order = {}, [i for i in range(len(rows)) if i not in known]
    for i in tqdm(order, **bar_options(desc="checking files", unit="row", leave=False)):
        kind, path, row = "image", rows[i].image_path, rows[i]
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
    results = tqdm(loader, **bar_options(desc="decoding files", unit="row", leave=False))
    return {i: result for i, [result] in zip(order, results) if isinstance(result, str)}


def link_shard(source: Path, target: Path) -> bool:
    """Put a shard of another cache at `target`; False if it has gone meanwhile."""
    if target.exists() and (target == source or target.stat().st_size == source.stat().st_size):
        return True
    with contextlib.suppress(FileNotFoundError):
        try:
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            os.link(source, temporary)
            os.replace(temporary, target)
        except OSError:  # a file system without links
            files.write_atomic(target, source.read_bytes())
        return True
    return False


def read_record(path: Path) -> tuple[dict, str]:
    """What a shard says of itself, and a name that its header gives: two caches may number theirs alike.
    Raises one of UNREADABLE: it is missing, cut or foreign."""
    with safe_open(path, "pt") as shard:  # checks the header against the file's size
        record = json.loads((shard.metadata() or {}).get("record", "{}"))
        sizes = {shard.get_slice(key).get_shape()[0] for key in shard.keys()}
    if not sizes <= {record["count"]}:
        raise ValueError("its tensors have other lengths than it says")
    with path.open("rb") as file:  # safetensors: the header's length, the header, the tensors
        header = file.read(int.from_bytes(file.read(8), "little"))
    return record, f"{path.name.partition('-')[0]}-{hashlib.sha256(header).hexdigest()[:16]}.safetensors"


class Known(NamedTuple):
    """What the caches of a folder hold of a data folder. The shards are linked into its own cache by now."""
    rows: list  # (position of a row, [shard, offset, flags, content name])
    texts: dict[str, list]  # caption -> [shard, offset]


def find_known(folder: Path, key: str, rows: list[Row], stats: list, made_by: str) -> Known:
    """What lies in the caches beside `folder` that was made by the same models with the same settings. Files
    of the same data folder with the same name, size and time are taken to be as they were; of others that
    have the sizes of known ones the content is compared. The folder's own shards are not looked at."""
    by_stats, by_content, sizes, texts, paths, linked = {}, {}, set(), {}, {}, {}
    for path in sorted(folder.parent.glob("*/*.safetensors")):
        with contextlib.suppress(*UNREADABLE):
            record, name = read_record(path)
            own = path.parent == folder and record["key"].startswith(f"{key}/")
            if own or record["made_by"] != made_by or name in paths:
                continue
            paths[name] = path
            texts |= {caption: [name, offset] for offset, caption in enumerate(record.get("made_of", ()))}
            for offset, (_, flags, content, found) in enumerate(record.get("rows", ())):
                by_content[content] = by_stats[short_name([record["root"], found])] = [
                    name, offset, flags, content]
                sizes.add(sizes_of(found))

    def link(name: str) -> bool:
        if name not in linked:
            linked[name] = link_shard(paths[name], folder / name)
        return linked[name]
    known = Known([], {})
    for i, row in enumerate(tqdm(rows if by_content else (), disable=not by_content, **bar_options(
            desc="looking for known files", unit="row", leave=False))):
        place = by_stats.get(short_name([str(row.root), stats[i]]))
        if place is None and sizes_of(stats[i]) in sizes:
            with contextlib.suppress(OSError):  # a missing file is named later
                place = by_content.get(content_name(row))
        if place and link(place[0]):
            known.rows.append((i, place))
    known.texts.update((text, texts[text]) for text in {"", *(row.text for row in rows)} & texts.keys()
                       if link(texts[text][0]))
    return known


def build_features(data_root: str | Path, base_model: Path, clap_model: Path, image_size: int,
                   cache_dir: str | Path, windows: int = 1, flip: bool = False, batch_size: int = 16,
                   workers: int = 2, device="cpu", max_bad_share: float = 0.01, log: Log = print,
                   manifest: tuple[list[Row], list[str]] | None = None) -> Path:
    """The cache folder of a data folder's features. A finished one is used again, and no encoder is loaded. A
    half-built one goes on at the first missing shard. Rows that another cache knows are not encoded again.
    manifest: what read_manifest() gave, where that is known already.
    Raises UserError: no usable manifest, too many unusable rows, a cache folder that cannot be written.
    Raises RunFailed: the disk is full, an encoder gives NaN, a loading process was killed."""
    rows, bad = manifest or read_manifest(data_root, log)
    settings = {"image_size": image_size, "windows": windows, "flip": flip}
    if files.read_json(Path(clap_model) / "config.json").get("audio_config", {}).get("enable_fusion"):
        settings["is_longer"] = False  # caches from before were made as if every clip were
    # the name is made as it always was: checkpoints hold it
    by_file = model_fingerprints(base_model, clap_model, hub.fingerprint_by_file)
    stats = [file_stats(row) for row in rows]
    key = cache_key(rows, stats, bad, by_file, settings)
    folder, total = Path(cache_dir) / key[:16], len(rows) + len(bad)
    held, index = contextlib.nullcontext(), read_index(folder)
    if processes.largest(index is None):
        if processes.first():
            try:
                held = files.lock(folder, wait=f"waiting for another process that is building {folder}")
            except OSError as error:
                raise UserError(f"{folder}: the feature cache cannot be written ({error.strerror}); choose "
                                "another --cache-dir") from None
        with held:
            processes.wait()
            index = read_index(folder)  # perhaps the process that we waited for has finished it
            if processes.largest(index is None):
                for stale in files.remove_stale(folder) if processes.first() else ():
                    log(f"removed {stale}, left by a build that was killed")
                processes.wait()
                made_by = short_name([CACHE_FORMAT, model_fingerprints(base_model, clap_model), settings])
                found = None
                if processes.first():  # one looks at the files, for all
                    known = find_known(folder, key, rows, stats, made_by)
                    header_bad = check_headers(rows, {i for i, _ in known.rows})
                    if len(bad) + len(header_bad) > max_bad_share * total:  # it ends here: find all to mend
                        header_bad |= check_decoding(rows, header_bad, workers)
                    found = [*known, list(header_bad.items())]
                *known, header_bad = processes.of_first(found)
                known, header_bad = Known(*known), dict(header_bad)
                known_bad = bad + [f"{rows[i].where}: {header_bad[i]}" for i in sorted(header_bad)]
                refuse_bad_rows(known_bad, total, max_bad_share, folder, log)
                refuse_lost_splits(data_root, rows, header_bad)
                if known.rows:
                    log(f"{len(known.rows)} of {len(rows)} rows are known from caches in {folder.parent}")
                build = Build(folder, key, made_by, rows, stats, header_bad, log, known)
                build.fill(base_model, clap_model, settings, batch_size, workers, device)
                processes.wait()  # for the shards of all
                if processes.first():
                    build.finish(bad, total)
                processes.wait()
                index = load_index(folder)
    refuse_bad_rows(index["bad"], index["total"], max_bad_share, folder, log)
    if processes.first():
        with contextlib.suppress(RunFailed):  # for `prepare_data.py clean`; the cache may be read-only
            files.write_json(folder / "used.json", {"root": str(Path(data_root).resolve()), **settings})
    log(f"features of {len(index['rows'])} rows ready in {folder}")
    return folder


def refuse_lost_splits(data_root: str | Path, rows: list[Row], bad: dict[int, str]) -> None:
    """Raises UserError: every row of a split that has some cannot be used."""
    usable = {row.split for i, row in enumerate(rows) if i not in bad}
    for row in rows:
        if row.split not in usable:
            raise UserError(f"{data_root}: no usable row in split {row.split!r}: none of its files can be "
                            "used; mend them")


class Build:
    """The shards of one cache folder. Those that are there and whole are kept."""

    def __init__(self, folder: Path, key: str, made_by: str, rows: list[Row], stats: list[list],
                 header_bad: dict[int, str], log: Log, known: Known):
        """made_by: a short name of the models and settings. stats: file_stats() of the rows before anything
        is read, so that a file that changes meanwhile is another one the next time."""
        self.folder, self.key, self.made_by, self.log, self.known = folder, key, made_by, log, known
        self.rows, self.stats, self.header_bad = rows, stats, header_bad
        self.places = dict(known.rows)
        self.captions = sorted({"", *(row.text for row in rows)})  # the empty one comes first
        new = [text for text in self.captions if text not in known.texts]
        self.texts, spans = (
            {f"{kind}-{i // SHARD_ROWS:05d}": all_[i:i + SHARD_ROWS] for i in range(0, len(all_), SHARD_ROWS)}
            for kind, all_ in (("text", new), ("rows", range(len(rows)))))
        new = {name: [i for i in span if i not in self.places and i not in header_bad]
               for name, span in spans.items()}
        self.spans = {name: span for name, span in new.items() if span}

    def fill(self, base: Path, clap: Path, settings: dict, batch_size: int, workers: int, device: str):
        """Encode what is missing; of several processes each takes its share of the shards."""
        texts, spans = ({name: every[name] for name in list(every)[processes.rank()::processes.world()]
                         if self._record(name, every[name]) is None} for every in (self.texts, self.spans))
        if not texts and not spans:
            return
        from clap2diffusion.dataset.encoders import Encoders  # it takes seconds, so not before now
        encoders = Encoders(base, clap, device)
        with torch.inference_mode():
            for name, captions in texts.items():
                batches = (captions[i:i + batch_size] for i in range(0, len(captions), batch_size))
                self._save(name, [{"text_embeds": encoders.text(batch)} for batch in batches],
                           {"made_of": captions})
            self._encode_rows(spans, encoders, settings, batch_size, workers)

    def finish(self, bad_lines: list[str], total: int) -> None:
        """Write index.json. total: rows of the manifest, unusable ones too."""
        shards: dict[str, int] = {}  # name -> its number
        bad, places = dict(self.header_bad), {}

        def number(name: str) -> int:
            return shards.setdefault(name, len(shards))
        texts = {caption: [number(name), offset] for caption, (name, offset) in self.known.texts.items()}
        for name, captions in self.texts.items():
            shard = number(f"{name}.safetensors")
            texts |= {caption: [shard, offset] for offset, caption in enumerate(captions)}
        for i, (name, *place) in self.places.items():
            places[i] = number(name), *place
        for name, span in self.spans.items():
            record, shard = self._record(name, span), number(f"{name}.safetensors")
            bad |= dict(record["bad"])
            for offset, (i, flags, content, _) in enumerate(record["rows"]):
                places[i] = shard, offset, flags, content
        text_ids, entries, what = {text: n for n, text in enumerate(self.captions)}, [], []
        for i, (shard, offset, flags, content) in sorted(places.items()):
            row = self.rows[i]
            entries.append({"id": row.id, "label": row.label, "split": row.split, "text_id":
                            text_ids[row.text], "shard": shard, "offset": offset, "flags": flags})
            what.append([row.id, row.label, row.split, row.text, content])
        bad_lines = [*bad_lines, *(f"{self.rows[i].where}: {bad[i]}" for i in sorted(bad))]
        index = {"format": CACHE_FORMAT, "key": self.key, "made_by": self.made_by,
                 "content": short_name([self.made_by, what, bad_lines]), "shards": list(shards),
                 "texts": [texts[text] for text in self.captions], "rows": entries, "bad": bad_lines,
                 "total": total, "files": {name: (self.folder / name).stat().st_size for name in shards}}
        files.write_atomic(self.folder / "index.json", json.dumps(index).encode())

    def _record(self, name: str, span: list) -> dict | None:
        """What a shard says of itself; None if it is missing, cut, foreign or not of just this span."""
        path = self.folder / f"{name}.safetensors"
        with contextlib.suppress(*UNREADABLE):  # of a shard
            record, _ = read_record(path)
            if record["key"] == f"{self.key}/{name}" and record["made_by"] == self.made_by and span == (
                    record["made_of"] if "made_of" in record else
                    sorted([i for i, *_ in record["rows"]] + [i for i, _ in record["bad"]])):
                return record
            self.log(f"{path} holds other rows: building it again")
            return None
        if path.exists():
            self.log(f"{path} is damaged, or of an older format: building it again")
        return None

    def _save(self, name: str, parts: list[dict[str, torch.Tensor]], record: dict) -> None:
        tensors = {key: torch.cat([part[key] for part in parts]) for key in (parts or [{}])[0]}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise RunFailed(f"{self.folder / name}: an encoder gives NaN or infinity; check the model's "
                            "files")
        record |= {"key": f"{self.key}/{name}", "made_by": self.made_by, "root": str(self.rows[0].root),
                   "count": len(next(iter(tensors.values()), ()))}
        content = save({key: t.contiguous() for key, t in tensors.items()}, {"record": json.dumps(record)})
        files.write_atomic(self.folder / f"{name}.safetensors", content)

    def _encode_rows(self, missing: dict[str, list], encoders, settings: dict, size: int, workers: int):
        """Write shards by batches of `size`. None spans two, so a build that goes on gives the same bits."""
        batches = {name: [span[i:i + size] for i in range(0, len(span), size)]
                   for name, span in missing.items()}
        clap, threads = encoders.clap, torch.get_num_threads()
        decode = Decode(self.rows, settings["image_size"], clap.sampling_rate, clap.window_s,
                        settings["windows"], clap.log_mel)
        every = sum(batches.values(), [])
        loader, rest = Loader(decode, every, workers, collate_fn=list), sum(map(len, every))
        if encoders.device == "cpu":  # all of torch's threads wait for one that shares its core with a loader
            torch.set_num_threads(max(1, threads - loader.num_workers))
        total = sum(map(len, self.spans.values())) if processes.world() == 1 else rest
        bar = tqdm(total=total, initial=total - rest, disable=not processes.first(),
                   **bar_options(desc="features", unit="row"))
        with contextlib.closing(iter(loader)) as decoded, bar:
            for name in missing:
                parts, good, bad = [], [], []
                for batch in batches[name]:
                    results = dict(zip(batch, next(decoded)))
                    bad += [(i, results.pop(i)) for i in batch if isinstance(results[i], str)]
                    good += [(i, flags, content, self.stats[i])
                             for i, (_, _, flags, content) in results.items()]
                    if results:
                        decoded_rows = [result[:3] for result in results.values()]
                        parts.append(encoders.rows(decoded_rows, settings["flip"], size))
                    bar.update(len(batch))
                self._save(name, parts, {"rows": good, "bad": bad})
        torch.set_num_threads(threads)
