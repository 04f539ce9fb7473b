"""The rows of the lists of videos as people have them, each read as it lies on disk. No heavy import.

A list may have a UTF-8 mark, CRLF, blank lines, comments and a header that its kind does not have."""

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.manifest_file import COLUMNS, SPLIT_OF, Log, csv_faults, refuse_other_formats
from clap2diffusion.videos.file_names import YOUTUBE_ID, read_name
from clap2diffusion.videos.wanted import CLIP_S, join_labels

KINDS = {  # --list: how its rows look
    "vggsound": 'ID,start_s,"label",split',
    "vggsound-test": "ID_000300.mp4,label",
    "audiocaps": "header audiocap_id,youtube_id,start_time,caption",
    "audioset": 'ID, start_s, end_s, "/m/..,/m/.."',
    "llp": "tab separated, header filename event_labels, rows ID_start_end label,label",
    "plain": "a header of your own: file, and any of start_s, length_s, label, text, split",
    "folders": "no list: the folder's name is the label",
    "greatest-hits": "no list: *_denoised.mp4 with *_times.txt"}
NO_ROW = ("#", "sep=", "Sep=")  # how a comment begins, and a line that Excel writes
WITHOUT_LIST = ("folders", "greatest-hits")
# our key: the columns of a header that it is read from, as they are called in these lists and their copies
NAMES = {"file": ("file", "file_name", "filename", "video", "video_path", "path"),
         "id": ("youtube_id", "ytid", "yt_id", "video_id", "# youtube id"),
         "start_s": ("start_s", "start_seconds", "start_time", "start"), "length_s": ("length_s", "duration"),
         "end_s": ("end_s", "end_seconds", "end_time", "end"), "text": COLUMNS["text"],
         "label": (*COLUMNS["label"], "labels", "event_labels", "positive_labels"),
         "split": ("split", "subset"),
         "properties": ("properties",)}
KEY_OF = {column: key for key, columns in NAMES.items() for column in columns}
OTHERS = (  # columns of other tables that lie beside these lists, what each is, what to do
    ({"onset", "offset", "event_labels"}, "LLP's list of single events",
     "give AVVP_train.csv, AVVP_val_pd.csv or AVVP_test_pd.csv"),
    ({"mid", "display_name"}, "AudioSet's names of the classes", "give it with --ontology"),
    ({"segment_id", "start_time_seconds"}, "AudioSet's strong labels", "give balanced_train_segments.csv, "
     "unbalanced_train_segments.csv or eval_segments.csv"),
    ({"image_file_name", "audio_file_name"}, "a manifest of sounds and pictures",
     "its folder is ready for --data-root"))


class Row(NamedTuple):
    """A row of a list: the clip's video and start in that video, or the file that it names."""
    where: str
    video_id: str = ""
    start_s: float | None = None
    length_s: float | None = None
    label: str | None = None
    text: str | None = None
    split: str | None = None
    file: str | None = None
    fault: str = ""
    properties: str = ""


def split_of_name(path: Path) -> str | None:
    """The split that a list's own name tells: train.csv, AVVP_val_pd.csv, eval_segments.csv; else None."""
    found = {SPLIT_OF[word] for word in re.split(r"[^a-z]+", path.stem.casefold()) if word in SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


# ---- one line of each kind of list without a header: its row, or None if it is no line of that kind

def _vggsound(cells: list[str], where: str) -> Row | None:
    if len(cells) < 3 or not YOUTUBE_ID.fullmatch(cells[0]) or (start := _number(cells[1])) is None:
        return None
    named = len(cells) == 4 or cells[-1].casefold() in SPLIT_OF
    label = ", ".join(cells[2:-1] if named else cells[2:])  # more cells: the label was not quoted
    return None if _number(cells[2]) is not None else Row(
        where, cells[0], start, CLIP_S, label or None, split=cells[-1] if named else None)


def _vggsound_test(cells: list[str], where: str) -> Row | None:
    clip = read_name(cells[0]) if len(cells) > 1 else None
    if clip is None or clip.start_s is None or not os.path.splitext(cells[0])[1]:
        return None
    return Row(where, *clip, CLIP_S, ", ".join(cells[1:]) or None)


def _audioset(cells: list[str], where: str) -> Row | None:
    start, end = (_number(cell) for cell in cells[1:3]) if len(cells) > 3 else (None, None)
    if start is None or end is None or not YOUTUBE_ID.fullmatch(cells[0]):
        return None
    return Row(where, cells[0], start, end - start, join_labels(",".join(cells[3:]).split(",")),
                fault="" if end > start else "the clip ends before it begins")


def _llp(cells: list[str], where: str) -> Row | None:
    found = re.fullmatch(r"(.+)_(\d+)_(\d+)", cells[0]) if len(cells) == 2 else None
    if not found or os.path.splitext(cells[0])[1]:
        return None
    start, end = float(found[2]), float(found[3])
    good = YOUTUBE_ID.fullmatch(found[1]) and end > start
    return Row(where, found[1], start, end - start, join_labels(cells[1].split(",")),
                fault="" if good else "not an id of 11 characters with two seconds")


LINES: dict[str, Callable[[list[str], str], Row | None]] = {
    "vggsound": _vggsound, "audioset": _audioset, "vggsound-test": _vggsound_test, "llp": _llp}


# ---- the file of a list

def _cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """("vggsound.csv line 3", its cells without outer spaces) of every line that is neither blank nor a
    comment. The separator is the tab where the first such line has one, else the semicolon where it has no
    comma, else the comma."""
    before = 0
    with csv_faults(path, lambda: before + 1):
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = (line for line in file if line.strip() and not line.startswith(NO_ROW))
            first = next(lines, "")
            separator = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
            file.seek(0)
            rows = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
            for cells in rows:
                where, before = f"{path.name} line {before + 1}", rows.line_num
                cells = [cell.strip() for cell in cells]
                if any(cells) and not cells[0].startswith(NO_ROW):
                    yield where, cells


def _head(path: Path) -> list[list[str]]:
    """The cells of a list's first lines. Raises UserError: there is no list, or one in another format."""
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}, expected a list of "
                        "clips")
    refuse_other_formats(path, "a list of clips as CSV")
    head = [cells for _, cells in itertools.islice(_cells(path), 5)]
    if not head:
        raise UserError(f"{path}: is empty, expected a list of clips")
    return head


def _columns(cells: list[str]) -> dict[str, int]:
    """Our key: the place of its column in a header."""
    places = {cell.casefold(): i for i, cell in enumerate(cells)}
    return {key: min(places[column] for column in columns if column in places)
            for key, columns in NAMES.items() if not places.keys().isdisjoint(columns)}


def recognise(path: Path) -> str:
    """The kind of a list, from its first lines. Raises UserError: it is none that can be read."""
    head = _head(path)
    names, found = {cell.casefold() for cell in head[0]}, _columns(head[0])
    if twice := [cell for cell in head[0] if cell.casefold() in KEY_OF and head[0].count(cell) > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} stands twice in the header; keep one of them")
    for columns, what, remedy in OTHERS:
        if columns <= names:
            raise UserError(f"{path}: is {what}, not a list of clips; {remedy}")
    if found.keys() >= {"id", "text"}:
        return "audiocaps"
    if "event_labels" in names:
        return "llp"
    if found.keys() >= {"id", "label", "start_s"}:
        return "audioset" if "end_s" in found else "vggsound"
    for kind, read in LINES.items():
        if any(read(cells, "") for cells in head):
            return kind
    if "file" in found or "id" in found:
        return "plain"
    first = ",".join(head[0])
    raise UserError(f"{path}: its first line is {first!r:.120}, which is none of the lists that are read: "
                    + "; ".join(f"{kind} ({how})" for kind, how in KINDS.items() if kind not in WITHOUT_LIST))


def read_rows(path: Path, kind: str, log: Log) -> Iterator[Row]:
    """Every row of a list; one that cannot be read has its fault."""
    read, columns, first = LINES.get(kind), None, True
    for where, cells in _cells(path):
        if first:
            first, found = False, _columns(cells)
            if read is None or len(found) > 1 and read(cells, where) is None:
                columns, width = found, len(cells)
                unread = [cell for cell in cells if cell and cell.casefold() not in KEY_OF
                          and cell.casefold() not in ("audiocap_id", "audio_length")]
                if unread and kind == "plain":
                    log(f"{path}: columns that nothing reads: {', '.join(unread[:8])}")
                continue
            if read(cells, where) is None:
                log(f"{path}: the first line, {','.join(cells)!r:.80}, is taken as a header and left out")
                continue
        if columns is None or kind == "llp":
            yield read(cells, where) or Row(where, cells[0], fault=f"not a line of a list of kind {kind}")
        elif len(cells) != width:
            yield (read and read(cells, where)) or Row(
                where, cells[0], fault=f"has {len(cells)} cells, the header has {width}")
        else:
            yield _named_row(kind, where, {key: cells[i] for key, i in columns.items()})


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _named_row(kind: str, where: str, item: dict[str, str]) -> Row:
    """A row of a list with a header. item: our key and the cell."""
    times = {key: _number(item[key]) for key in ("start_s", "end_s", "length_s") if item.get(key)}
    start, length, label = times.get("start_s"), times.get("length_s"), item.get("label")
    fault = "a time that is not a number of seconds" if None in times.values() else ""
    if "end_s" in times and not fault:
        length = times["end_s"] - (start or 0)
    if length is not None and length <= 0:
        fault = "the clip ends before it begins"
    row = Row(where, item.get("id", ""), start, length, label or None, item.get("text") or None,
               item.get("split") or None, fault=fault)
    if kind == "plain":
        file, properties = item.get("file") or item.get("id"), item.get("properties", "")
        if properties and not _is_object(properties):
            fault = fault or "properties that are no JSON object"
        fault = fault or ("" if file else "names no file")
        return row._replace(file=file, fault=fault, properties=properties)
    if not YOUTUBE_ID.fullmatch(row.video_id) or start is None:
        row = row._replace(fault=fault or "not an id of 11 characters with a start in seconds")
    label = join_labels(label.split(",")) if label and kind == "audioset" else row.label
    return row._replace(length_s=length or CLIP_S, label=label)


def read_ontology(path: Path) -> dict[str, str]:
    """AudioSet's code and name of every class, of ontology.json or class_labels_indices.csv."""
    if path.is_file() and path.suffix.casefold() == ".json":
        try:
            items = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(items, list) and items:
                return {item["id"]: item["name"] for item in items}
        except (ValueError, KeyError, TypeError):
            pass  # said below
        raise UserError(f"{path}: is not AudioSet's ontology.json, which is a JSON list of objects with id "
                        "and name")
    _head(path)
    rows = [cells for _, cells in _cells(path)]
    columns = {name.casefold(): i for i, name in enumerate(rows[0])}
    if not columns.keys() >= {"mid", "display_name"}:
        raise UserError(f"{path}: is neither AudioSet's ontology.json nor its class_labels_indices.csv "
                        "(header index,mid,display_name)")
    code, name = columns["mid"], columns["display_name"]
    return {cells[code]: cells[name] for cells in rows[1:] if len(cells) == len(rows[0])}


def with_names(rows: list[Row], ontology: str | Path | None, log: Log) -> list[Row]:
    """AudioSet's rows with the names of the classes for their codes. Codes without a name stay; one line
    says so."""
    names, unknown = read_ontology(Path(ontology)) if ontology else {}, set()

    def name(code: str) -> str:
        if code not in names and re.match(r"/[a-z]/", code):
            unknown.add(code)
        return names.get(code, code)
    rows = [row._replace(label=join_labels([name(code) for code in (row.label or "").split("+")]))
            for row in rows]
    if unknown:
        log(f"{len(unknown)} classes have a code and no name ({min(unknown)}): "
            + ("the ontology has none" if ontology else "give --ontology ontology.json"))
    return rows
