"""The manifest of a data folder: its checked rows, and how a folder is begun and ended. No heavy import."""

import functools
import hashlib
import json
import os
import stat
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.manifest_file import (
    COLUMNS,
    SPLIT_OF,
    SPLITS,
    BadRow,
    Entry,
    Log,
    describe_unread,
    read_entries,
)


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


class _Names:
    """What the names of a manifest are looked up in. Folders are resolved and listed once: both are slow."""

    def __init__(self, root: Path):
        self.root = str(root)
        self.real_folder, self._listed = functools.cache(os.path.realpath), functools.cache(self._list)

    @staticmethod
    def _plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    def _list(self, folder: str) -> dict[str, str]:
        with suppress(OSError):
            return {self._plain(name): name for name in os.listdir(folder)}
        return {}

    def in_other_case(self, name: str) -> str | None:
        """The file whose name differs from `name` in upper and lower case alone."""
        found = []
        for part in os.path.normpath(name).split("/"):
            found.append(self._listed(os.path.join(self.root, *found)).get(self._plain(part)))
            if found[-1] is None:
                return None
        return "/".join(found)


def _why_absent(names: _Names, key: str, name: str) -> None:
    """Raise BadRow if a name that no file has shows why. One that shows nothing is found missing later."""
    if name.startswith("file:"):
        raise BadRow("file address", f"{key}: {name!r:.200} is an address; expected a path inside the data "
                     "folder")
    if "://" in name:
        raise BadRow("web address", f"{key}: {name!r:.200} is a web address; download the file, and name it "
                     "by its path inside the data folder")
    if "\\" in name:
        raise BadRow("backslashes", f"{key}: {name!r:.200} is written with backslashes, as on Windows; "
                     "expected a path inside the data folder with /")
    if name != name.strip():
        raise BadRow("spaces", f"{key}: {name!r:.200} begins or ends with a space, and no file has that name")
    if found := names.in_other_case(name):
        raise BadRow("letter case", f"{key}: no file is called {name!r:.200}, but {found!r:.200} is there; "
                     "upper and lower case count")


def _inside(names: _Names, key: str, name: str, inner: str) -> str:
    """A manifest's name of a file -> its name inside the data folder, links resolved. Raises BadRow.
    The name is also tried in both Unicode normal forms. inner: the folder that it is relative to."""
    root = names.root
    if not name or "\0" in name:
        raise BadRow("no name", f"{key}: the name {name!r} is empty or holds a zero character")
    if name.startswith("/") or ".." in name.split("/"):
        raise BadRow("outside", f"{key}: {name!r} is absolute or holds '..'; expected a path inside the data "
                     "folder")
    given = name = inner + name
    name = os.path.normpath(name)
    forms = [] if name.isascii() else [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    paths = [os.path.join(root, form) for form in (name, *forms)]
    try:
        for path in paths:
            with suppress(FileNotFoundError, NotADirectoryError):
                mode = os.lstat(path).st_mode
                break
        else:
            _why_absent(names, key, given)
            path, mode = paths[0], 0
        folder, file = os.path.split(path)
        path = (str(Path(path).resolve()) if stat.S_ISLNK(mode)
                else os.path.join(names.real_folder(folder), file))
    except (OSError, RuntimeError) as error:  # a name too long, a circle of links
        raise BadRow("not looked up", f"{key}: {name!r} cannot be looked up ({error})") from None
    if not path.startswith(os.path.join(root, "")):
        raise BadRow("link", f"{key}: {name!r} is a link that leaves the data folder; copy the files, or "
                     "give the folder that holds both")
    return path.removeprefix(os.path.join(root, ""))


def _split(entry: Entry, item: dict, audio: str) -> tuple[str, bool]:
    """The split of a row: its own, its file's, that of the folder of both names as they are written, or by a
    hash of the audio file's name; and whether it was the hash. Raises BadRow."""
    own = item.get("split")
    if own is not None:
        split = SPLIT_OF.get(own.strip().casefold())
        if split is None:
            raise BadRow("split", f"split: got {own!r:.80}, expected train, val or test")
        if entry.split not in (None, split):
            raise BadRow("two splits", f"split: got {own!r}, but its file is of split {entry.split}")
        return split, False
    written = (item["image_file_name"], item["audio_file_name"])
    folders = {SPLIT_OF.get(name.partition("/")[0].casefold()) for name in written if "/" in name}
    if split := entry.split or (folders.pop() if len(folders) == 1 else None):
        return split, False
    share = int(hashlib.sha256(unicodedata.normalize("NFC", audio).encode(
        errors="surrogateescape")).hexdigest(), 16) % 100
    return "train" if share < 90 else "val" if share < 95 else "test", True


def _row(names: _Names, root: Path, entry: Entry) -> tuple[Row, bool]:
    """The row, and whether its split is by the hash. Raises BadRow."""
    item = entry.item
    if isinstance(item, BadRow):
        raise item
    if not isinstance(item, dict):
        raise BadRow("no object", f"got a JSON {type(item).__name__}, expected an object {{...}}")
    for key in ("image_file_name", "audio_file_name", "text", "label", "split"):
        value = item.get(key)
        if value is None and key in ("label", "split"):
            continue
        if key not in item:
            raise BadRow(f"no {key}", f"the key {key} is missing (also read: {', '.join(COLUMNS[key][1:])})")
        if not isinstance(value, str):
            raise BadRow(f"{key} no text", f"{key}: got {json.dumps(value)[:80]}, expected text")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise BadRow("half a character",
                         f"{key}: {value!r:.80} holds half of a character (\\ud800 to \\udfff)")
    image, audio = (_inside(names, key, item[key], entry.folder)
                    for key in ("image_file_name", "audio_file_name"))
    split, hashed = _split(entry, item, audio)
    label, properties = item.get("label"), item.get("properties")
    return Row(root, image, audio, item["text"], label and sys.intern(label), sys.intern(split), entry.where,
               properties if isinstance(properties, dict) else None), hashed


def read_manifest(data_root: str | Path, log: Log | None = None) -> tuple[list[Row], list[str]]:
    """Read the manifest of a data folder: rows, bad ones. It is metadata.jsonl, metadata.csv, one of these in
    each split's folder, or the founding project's {train,val,test}_metadata.json.
    A row without a split gets that of the folder that its files are in, such as train/, or else one from a
    hash of its audio name (90/5/5); `log` is told how many. Of rows that contradict each other (the same row
    twice, one sound in two splits) all but the first are bad: they come as "place: reason".
    Raises UserError: no folder, no manifest, no rows, a file in another format, or no usable row for one
    cause."""
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder; make it with prepare_data.py or correct --data-root")
    root = root.resolve()
    rows, bad, kinds, seen, split_of, unsplit, unread = [], [], set(), {}, {}, 0, set()
    names = _Names(root)
    for entry in read_entries(root, unread, log):
        where = entry.where
        try:
            row, hashed = _row(names, root, entry)
            same = (row.image, row.audio, row.text)
            if same in seen:
                raise BadRow("twice", f"the same row as {seen[same]}")
            first = split_of.setdefault(row.audio, row)
            if first.split != row.split:
                raise BadRow("two splits", f"the sound is in split {row.split} here and in {first.split} at "
                             f"{first.where}")
            seen[same] = where
            unsplit += hashed
            rows.append(row)
        except BadRow as error:
            kinds.add(error.kind)
            bad.append(f"{where}: {error}")
    if not rows and not bad:
        raise UserError(f"{root}: the manifest has no rows; make it again with prepare_data.py")
    if not rows and len(kinds) == 1:
        raise UserError(f"{root}: no row of the manifest can be used ({len(bad)}, all for one cause); "
                        f"{bad[0]}")
    if unsplit and log:
        log(f"{unsplit} rows name no split: assigned by a hash of the audio name, 90/5/5 train/val/test")
    if unread and log:
        log(f"columns of the manifest that nothing reads: {describe_unread(unread)}")
    return rows, bad


def usable_rows(data_root: str | Path) -> list[Row]:
    """The rows of read_manifest() that can be used; a line says how many are left out."""
    rows, bad = read_manifest(data_root)
    if bad:
        print(f"{data_root}: {len(bad)} rows cannot be used and are left out; prepare_data.py check lists "
              "them", flush=True)
    return rows


def refuse_absent_files(data_root: str | Path, rows: list[Row]) -> None:
    """Raise UserError if not one of the sounds, or of the pictures, is there. Ends at the first that is."""
    for kind, name in (("sounds", "audio_path"), ("pictures", "image_path")):
        if rows and not any(os.path.lexists(getattr(row, name)) for row in rows):
            raise UserError(f"{data_root}: none of the {len(rows)} {kind} that the manifest names is there; "
                            f"the first is {getattr(rows[0], name)} of {rows[0].where}; names are relative "
                            "to the folder of the manifest")


def refuse_one_recording(data_root: str | Path, rows: list[Row]) -> None:
    """Raise UserError if all sounds of val are one recording under several names. Ends at the first other."""
    paths = [row.audio_path for row in rows if row.split == "val" and row.audio_path.is_file()]
    if len(paths) > 1 and len({path.stat().st_size for path in paths}) == 1:
        contents = (hashlib.sha256(path.read_bytes()).digest() for path in paths)
        first = next(contents)
        if all(content == first for content in contents):
            raise UserError(f"{data_root}: the {len(paths)} sounds of split 'val' hold one recording, the "
                            f"first is {paths[0]}; expected at least two: validation compares each with "
                            "another's")


def find_gaps(rows: list[Row], splits=("train", "val"), batch: int = 1, whitened: bool = True) -> list[str]:
    """What the manifest alone shows to be too little for training, a sentence each: a split of `splits`
    without a row, fewer training rows than a batch of all processes, one sound only in val (which is compared
    with another's) or in train (whose embeddings are whitened)."""
    gaps, counts = [], Counter(row.split for row in rows)
    sounds = Counter(split for split, _ in {(row.split, row.audio) for row in rows})
    total = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    for split in splits:
        if not counts[split]:
            gaps.append(f"split {split!r} has no row ({total}); name the split of some rows {split!r}")
        elif split == "train" and counts[split] < batch:
            gaps.append(f"split 'train' has {counts[split]} rows, fewer than a batch of {batch}; add rows or "
                        "lower --batch-size")
        elif sounds[split] < 2 and (split == "val" or split == "train" and whitened):
            why = ("validation compares each with another's" if split == "val" else
                   "they are whitened (a stage takes one with --no-whiten)")
            gaps.append(f"split {split!r} has one sound only ({total}), expected at least two: {why}")
    return gaps


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
    if not (out / "settings.json").exists():
        raise UserError(f"{out / 'metadata.jsonl'}: is not of this command, which would overwrite it; give "
                        "another --out, or move it away")
    found = files.read_json(out / "settings.json")
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
