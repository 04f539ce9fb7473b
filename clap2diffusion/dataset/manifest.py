"""The manifest of a data folder: its checked rows, and how a folder is begun and ended. No heavy import."""

import functools
import hashlib
import json
import os
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError

SPLITS = ("train", "val", "test")
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)  # there may be hundreds of thousands: names, not paths, and no dictionary
class Row:
    """One example. Names are inside the data folder, links resolved; `where` is the place in the manifest."""
    root: Path
    image: str
    audio: str
    text: str
    label: str | None
    split: str
    where: str = ""
    properties: dict | None = None  # what was drawn, where we made the data (the sound world)

    @property
    def id(self) -> str:
        return f"{self.audio}+{self.image}"

    @property
    def image_path(self) -> Path:
        return self.root / self.image

    @property
    def audio_path(self) -> Path:
        return self.root / self.audio


def _entries(root: Path) -> Iterator[tuple[str, str | None, object]]:
    """Yield (place, split by the file's name, object). The object is an Exception if a line is not JSON."""
    path = root / "metadata.jsonl"
    if path.is_file():
        # Bytes split at b"\n" only. str.splitlines would also split at U+2028, which JSON allows in a string.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    try:
                        item = json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        item = ValueError(f"not one JSON object ({error})")
                    yield f"{path.name} line {number}", None, item
        return
    lists = {split: root / f"{split}_metadata.json" for split in SPLITS}
    if not any(path.is_file() for path in lists.values()):
        raise UserError(f"{root}: no metadata.jsonl in this folder; make one with prepare_data.py")
    names = {"audio_path": "audio_file_name", "image_path": "image_file_name", "class": "label"}
    for split, path in lists.items():
        try:
            items = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error}); mend it or make it again") from None
        if not isinstance(items, list):
            raise UserError(f"{path}: got a JSON {type(items).__name__}, expected a list [...] of objects")
        for number, item in enumerate(items, 1):
            if isinstance(item, dict):
                item = {names.get(key, key): value for key, value in item.items()}
            yield f"{path.name} item {number}", split, item


def _inside(root: str, key: str, name: str, real_folder: Callable[[str], str]) -> str:
    """A manifest's name of a file -> its name inside the data folder, links resolved. Raises ValueError.
    The name is also tried in both Unicode normal forms. real_folder: os.path.realpath, cached since slow."""
    if not name or "\0" in name:
        raise ValueError(f"{key}: the name {name!r} is empty or holds a zero character")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{key}: {name!r} is absolute or holds '..'; expected a path inside the data folder")
    name = os.path.normpath(name)
    forms = [] if name.isascii() else [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    paths = [os.path.join(root, form) for form in (name, *forms)]
    try:
        for path in paths:
            with suppress(FileNotFoundError, NotADirectoryError):
                mode = os.lstat(path).st_mode
                break
        else:
            path, mode = paths[0], 0
        folder, file = os.path.split(path)
        path = str(Path(path).resolve()) if stat.S_ISLNK(mode) else os.path.join(real_folder(folder), file)
    except (OSError, RuntimeError) as error:  # a name too long, a circle of links
        raise ValueError(f"{key}: {name!r} cannot be looked up ({error})") from None
    if not path.startswith(os.path.join(root, "")):
        raise ValueError(f"{key}: {name!r} is a link that leaves the data folder")
    return path.removeprefix(os.path.join(root, ""))


def _row(root: Path, where: str, split: str | None, item: object, real_folder: Callable) -> Row:
    if isinstance(item, Exception):
        raise item
    if not isinstance(item, dict):
        raise ValueError(f"got a JSON {type(item).__name__}, expected an object {{...}}")
    for key in ("image_file_name", "audio_file_name", "text", "label", "split"):
        value = item.get(key)
        if value is None and key in ("label", "split"):
            continue
        if key not in item:
            raise ValueError(f"the key {key} is missing")
        if not isinstance(value, str):
            raise ValueError(f"{key}: got {json.dumps(value)[:80]}, expected text")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{key}: {value!r:.80} holds half of a character (\\ud800 to \\udfff)")
    split, label, properties = split or item.get("split"), item.get("label"), item.get("properties")
    image, audio = (_inside(str(root), key, item[key], real_folder)
                    for key in ("image_file_name", "audio_file_name"))
    if split is None:
        share = int(hashlib.sha256(unicodedata.normalize("NFC", audio).encode()).hexdigest(), 16) % 100
        split = "train" if share < 90 else "val" if share < 95 else "test"
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected train, val or test")
    return Row(root, image, audio, item["text"], label and sys.intern(label), sys.intern(split), where,
               properties if isinstance(properties, dict) else None)


def read_manifest(data_root: str | Path, log: Log | None = None) -> tuple[list[Row], list[str]]:
    """Read metadata.jsonl, or the founding project's {train,val,test}_metadata.json lists: rows, bad ones.
    A row without a split gets one from a hash of its audio name (90/5/5); `log` is told how many. Of rows
    that contradict each other (the same row twice, one sound in two splits) all but the first are bad: they
    come as "place: reason". Raises UserError: no folder, no manifest, no rows, a founding list not JSON."""
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder; make it with prepare_data.py or correct --data-root")
    root = root.resolve()
    rows, bad, seen, split_of, unsplit = [], [], {}, {}, 0
    real_folder = functools.cache(os.path.realpath)
    for where, split, item in _entries(root):
        try:
            row = _row(root, where, split, item, real_folder)
            same = (row.image, row.audio, row.text)
            if same in seen:
                raise ValueError(f"the same row as {seen[same]}")
            first = split_of.setdefault(row.audio, row)
            if first.split != row.split:
                raise ValueError(f"the sound is in split {row.split} here and in {first.split} at "
                                 f"{first.where}")
            seen[same] = where
            unsplit += split is None and item.get("split") is None
            rows.append(row)
        except ValueError as error:
            bad.append(f"{where}: {error}")
    if not rows and not bad:
        raise UserError(f"{root}: the manifest has no rows; make it again with prepare_data.py")
    if unsplit and log:
        log(f"{unsplit} rows name no split: assigned by a hash of the audio name, 90/5/5 train/val/test")
    return rows, bad


def begin_data_folder(out: Path, settings: dict) -> TextIO | None:
    """Make a data folder and hold it until the returned file is closed; None, with a line, if it is complete.
    Raises UserError if it holds data made with other settings or cannot be written."""
    try:
        held = files.lock(out, wait=f"waiting for another process that is making {out}")
        if not (out / "metadata.jsonl").exists():
            files.remove_stale(out, "**/.*.tmp")  # of a run that was killed
            for name in ("audio", "images"):
                (out / name).mkdir(exist_ok=True)
            return held
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    held.close()
    found = files.read_json(out / "settings.json") if (out / "settings.json").exists() else None
    if found != settings:
        raise UserError(f"{out}: holds data made with {json.dumps(found)}, asked for {json.dumps(settings)}; "
                        "give another --out, or delete that folder first")
    print(f"{out}: already complete", flush=True)
    return None


def write_manifest(out: Path, rows: list[dict], settings: dict) -> None:
    """Finish a data folder: settings.json and, last of all, metadata.jsonl, which says that it is whole."""
    files.remove_stale(out, "**/.*.tmp")  # a killed run's workers may have gone on after our start
    files.write_json(out / "settings.json", settings)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_atomic(out / "metadata.jsonl", lines.encode())
