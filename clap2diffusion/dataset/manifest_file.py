"""The file behind a manifest: JSON lines, CSV or the founding project's lists, and the names of its columns.

Hugging Face's folders are read as well: the columns image_file_name, file_name, ..., and one metadata file in
each split's folder, whose names are relative to that folder. No heavy import."""

import contextlib
import csv
import difflib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base.exits import UserError

Log = Callable[[str], None]
SPLITS = ("train", "val", "test")
# what others call the splits; Hugging Face's datasets knows a folder by the same words
SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
            "dev": "val", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
# our key: the columns that it is read from; file_name is a picture or a sound by its suffix
COLUMNS = {"image_file_name": ("image_file_name", "image", "image_path"),
           "audio_file_name": ("audio_file_name", "audio", "audio_path"),
           "text": ("text", "caption", "prompt", "transcription"), "label": ("label", "class", "category"),
           "split": ("split",), "file_name": ("file_name",), "properties": ("properties",)}
NOTES = {"video", "window_start_s", "frame_time_s", "still"}  # of prepare_data.py videos, for people
KEY_OF = {column: key for key, columns in COLUMNS.items() for column in columns}
VIDEOS = "3g2 3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg ogv ts webm wmv"  # their sound is read
SUFFIXES = {"image_file_name": "avif bmp gif jfif jpeg jpg jp2 png ppm tga tif tiff webp",
            "audio_file_name": "aac ac3 aif aifc aiff amr au caf flac m4a mka mp3 oga ogg opus rf64 snd w64 "
                               f"wav wma wv {VIDEOS}"}
OTHER_FORMATS = (  # how a file begins, what it is, what to do
    (b"\x1f\x8b", "compressed with gzip", "unpack it with gunzip"),
    (b"BZh", "compressed with bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd"),
    (b"PK\x03\x04", "a ZIP archive or an Excel table (.xlsx)", "unpack it, or save the table as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel table (.xls)", "save it as CSV UTF-8"),
    (b"PAR1", "a Parquet table", "write it as JSON lines or CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML", "download the file itself"))


class BadRow(ValueError):
    """A row that cannot be used. `kind` is the cause without the row's own names and numbers."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class Entry(NamedTuple):
    """One row as it is written: its place, the split that its file stands for, the folder that its names are
    relative to ("" or "train/"), and its object, renamed to our keys, or the BadRow that it is."""
    where: str
    split: str | None
    folder: str
    item: object


def read_entries(root: Path, unread: set[str], log: Log | None = None) -> Iterator[Entry]:
    """Every row of a data folder's manifest. Columns that nothing reads are added to `unread`.
    Raises UserError: there is no manifest, or one in another format; the sentence says in which."""
    files = _files(root, log)
    if not files:
        near = [path for pattern in ("*", "*/*", "*/*/*") for path in sorted(root.glob(pattern))
                if path.name.casefold().startswith("metadata.") and path.is_file()]
        hint = f"; {near[0].relative_to(root)} is none of them" if near else ""
        raise UserError(f"{root}: no metadata.jsonl in this folder, and no metadata.csv{hint}; give the "
                        "folder that holds it, or make one with prepare_data.py")
    for path, split, folder, read in files:
        for place, item in read(path):
            if isinstance(item, dict):
                try:
                    item = _renamed(item, unread)
                except BadRow as error:
                    item = error
            yield Entry(f"{folder}{path.name} {place}", split, folder, item)


def find_manifest(root: Path) -> Path | None:
    """The file of a data folder's manifest, or the first of several; None where there is none."""
    return next((path for path, *_ in _files(root, None)), None)


def _files(root: Path, log: Log | None) -> list[tuple[Path, str | None, str, Callable]]:
    """The manifest's files: (path, split, folder of its names, reader)."""
    def pick(folder: str) -> list[tuple[str, Callable]]:
        there = [(name, read) for name, read in (("metadata.jsonl", _json_lines), ("metadata.csv", _csv_rows))
                 if (root / folder / name).is_file()]
        if len(there) == 2 and log:
            log(f"{root / folder}: metadata.jsonl is read, metadata.csv is not")
        return there[:1]

    [*top] = pick("")
    parts = {f"{name}/": split for name, split in SPLIT_OF.items() if (root / name).is_dir()}
    below = [(folder, split, *one) for folder, split in parts.items() for one in pick(folder)]
    if top:
        if below and log:
            log(f"{root}: {top[0][0]} is read, {below[0][0]}{below[0][2]} is not")
        return [(root / name, None, "", read) for name, read in top]
    if below:
        return [(root / folder / name, split, folder, read) for folder, split, name, read in below]
    lists = {split: root / f"{split}_metadata.json" for split in SPLITS}
    return [(path, split, "", _list_items) for split, path in lists.items() if path.is_file()]


def refuse_other_formats(path: Path, expected: str) -> bytes:
    """The first 4,096 bytes of a file. Raises UserError if they are no UTF-8 text, or of a format that is
    known and is not the expected one."""
    with path.open("rb") as file:
        head = file.read(4096)
    for begin, what, remedy in OTHER_FORMATS:
        if head.lstrip(b" \t\r\n").startswith(begin):
            raise UserError(f"{path}: is {what}, expected {expected}; {remedy}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[:64].count(0) > len(head[:64]) / 4:
        raise UserError(f"{path}: is text in UTF-16 or UTF-32, expected UTF-8; save it as UTF-8, "
                        "or convert it with iconv -f UTF-16 -t UTF-8")
    return head


def _refuse_other_formats(path: Path) -> None:
    """Raise UserError if a manifest's first bytes are no UTF-8 text, or of another format."""
    head = refuse_other_formats(path, "JSON lines or CSV")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, _, rest = first.partition(b"\n")
    lines = path.suffix == ".jsonl"
    if lines and b"\r" in first.strip() and not rest.strip() and b"\n" not in first:
        raise UserError(f"{path}: its lines end with CR alone, expected LF; convert it with tr '\\r' '\\n'")
    if lines and first.startswith(b"["):
        raise UserError(f"{path}: holds a JSON list, expected one object a line; convert it with "
                        "python -c 'import json,sys; [print(json.dumps(x)) for x in json.load(sys.stdin)]'")
    if lines and line.strip() == b"{":
        raise UserError(f"{path}: holds JSON objects that go over several lines, expected each on a line of "
                        "its own, as json.dumps writes it without indent")
    names = {name.strip(b" \"\r").decode("latin-1").casefold() for name in line.replace(
        b";", b",").replace(b"\t", b",").split(b",")}
    if lines and len(names & KEY_OF.keys()) > 1:
        raise UserError(f"{path}: holds CSV, expected JSON lines; rename it to metadata.csv")
    if not lines and first.startswith(b"{"):
        raise UserError(f"{path}: holds JSON, expected CSV with a header; rename it to metadata.jsonl")


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow("key twice", f"the key {next(k for k in keys if keys.count(k) > 1)!r:.80} stands twice")
    return found


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """("line 3", its object, or the BadRow that it is) of each line that is not blank."""
    _refuse_other_formats(path)
    # Bytes split at b"\n" only. str.splitlines would also split at U+2028, which JSON allows in a string.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                try:
                    item = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
                except BadRow as error:
                    item = error
                except (ValueError, RecursionError) as error:
                    item = BadRow("not JSON", f"not one JSON object ({error})")
                yield f"line {number}", item


@contextlib.contextmanager
def csv_faults(path: Path, line: Callable[[], int]) -> Iterator[None]:
    """Inside, a CSV file that cannot be read becomes a UserError. line(): where the row being read begins."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte 0x{error.object[error.start]:02x}); save it as "
                        "CSV UTF-8, or convert it with iconv -t UTF-8 -f and its encoding") from None
    except csv.Error as error:
        raise UserError(f"{path}: line {line()} or after it: not valid CSV ({error}); a quote inside a cell "
                        'is written twice, ""') from None


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    """("line 3", {column: text}) of each row of a CSV file with a header; empty cells are left out, those of
    the text aside. The separator is the one that makes the most known columns of the header."""
    _refuse_other_formats(path)
    before = 0
    with csv_faults(path, lambda: before + 1):
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((line for line in file if line.strip() and not line.lower().startswith("sep=")), "")
            options = {"strict": True, "skipinitialspace": True}
            if not header:
                return

            def known(separator: str) -> int:
                names = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
                return sum(name.strip().casefold() in KEY_OF for name in names)
            separator = max(",;\t|", key=known)
            file.seek(0)
            rows, names = csv.reader(file, delimiter=separator, **options), None
            for cells in rows:
                place, before = f"line {before + 1}", rows.line_num
                if not any(cell.strip() for cell in cells) or (
                        names is None and cells[0].lower().startswith("sep=")):
                    continue
                if names is None:
                    names = [cell.strip() for cell in cells]
                    if twice := [name for name in names if name and names.count(name) > 1]:
                        raise UserError(f"{path}: the column {twice[0]!r:.80} stands twice in the header")
                    if not any(name.casefold() in KEY_OF for name in names):
                        raise UserError(f"{path}: {place} names no column that is known, got {names[:6]}, "
                                        f"expected a header such as image_file_name,audio_file_name,text")
                elif len(cells) != len(names):
                    quote = f"; quote cells that hold {separator!r}" * (len(cells) > len(names))
                    yield place, BadRow(
                        "cells", f"has {len(cells)} cells, the header has {len(names)}{quote}")
                else:
                    yield place, {name: cell for name, cell in zip(names, cells)
                                  if cell or KEY_OF.get(name.casefold()) == "text"}


def _list_items(path: Path) -> Iterator[tuple[str, object]]:
    """("item 3", object) of one of the founding project's lists."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend it or make it again") from None
    if not isinstance(items, list):
        raise UserError(f"{path}: got a JSON {type(items).__name__}, expected a list [...] of objects")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


@functools.lru_cache(maxsize=1024)
def _keys(columns: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
    """Our key: the columns that hold it, the first choice first; and the columns that nothing reads."""
    plain = {column: column.strip().casefold() for column in columns}
    found = {key: [column for name in names for column in columns if plain[column] == name]
             for key, names in COLUMNS.items()}
    unread = [column for column in columns if plain[column] and plain[column] not in KEY_OF.keys() | NOTES]
    return {key: names for key, names in found.items() if names}, unread


def _renamed(item: dict, unread: set[str]) -> dict:
    """The object with our keys alone. Raises BadRow: two columns of one meaning differ, or a file_name that
    shows no kind of file."""
    found, rest = _keys(tuple(item))
    unread.update(rest)
    result, source = {}, {}

    def put(key: str, column: str) -> None:
        value = item[column]
        if key in source and value not in (None, "") and result[key] not in (None, "", value):
            raise BadRow("two columns", f"the columns {source[key]} and {column} are read as one and differ "
                         f"({result[key]!r:.40} and {value!r:.40}); keep one of them")
        if result.get(key) in (None, ""):
            result[key], source[key] = value, column

    for key, columns in found.items():
        for column in columns:
            if key != "file_name":
                put(key, column)
                continue
            value = item[column]
            suffix = value.rpartition(".")[2].casefold() if isinstance(value, str) else ""
            kinds = [kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes.split()]
            if not kinds:
                raise BadRow("file_name", f"file_name: {value!r:.80} shows by no suffix whether it is a "
                             "picture or a sound; name the column image_file_name or audio_file_name")
            put(kinds[0], column)
    if type(result.get("label")) is int:
        result["label"] = str(result["label"])
    return result


def describe_unread(unread: set[str]) -> str:
    """The columns that nothing reads, with the known one that each resembles."""
    known = [column for column in KEY_OF if column != "properties"]
    near = {column: difflib.get_close_matches(column.casefold(), known, 1, 0.75) for column in sorted(unread)}
    named = [f"{column!r:.40}" + (f" (did you mean {match[0]!r}?)" if match else "")
             for column, match in sorted(near.items(), key=lambda one: not one[1])]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
