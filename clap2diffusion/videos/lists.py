"""The lists of videos as people have them: which clips they ask for, in which files of a folder, with which
label, captions and split. No heavy import.

Lines that are no row of the list come back as clips without a file, with the reason: nothing is lost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.manifest_file import SPLIT_OF, Log
from clap2diffusion.videos.file_names import Files
from clap2diffusion.videos.list_rows import (
    KINDS,
    WITHOUT_LIST,
    Row,
    read_rows,
    recognise,
    split_of_name,
    with_names,
)
from clap2diffusion.videos.trees import is_greatest_hits, read_folders, read_greatest_hits
from clap2diffusion.videos.wanted import CLIP_S, Wanted, caption_of, read_video_id

UNREAD = "a row that cannot be read"


def _wanted(row: Row, files: Files) -> Wanted:
    """The clip of a row, with its file or the reason why there is none."""
    split, detail, file, whole = SPLIT_OF.get((row.split or "").casefold()), row.fault, None, False
    if row.split and not split:
        detail = detail or f"a split {row.split!r:.40} that is none of train, val, test"
    reason = UNREAD if detail else ""
    if not reason and row.file is not None:
        file, reason = files.named(row.file)
    elif not reason:
        file, whole, reason, detail = files.clip(row.video_id, row.start_s)
    cut = file is not None and row.file is None and not whole  # its name has the clip's start
    texts = (row.text,) if row.text else (caption_of(row.label),) if row.label else ()
    video_id = read_video_id(file or row.file) if row.file else row.video_id
    return Wanted(video_id, file, 0.0 if cut else row.start_s, row.length_s, row.label, texts, split,
                  row.where, reason=reason, detail=detail, whole=whole, properties=row.properties)


def _match(rows: list[Row], files: Files) -> list[Wanted]:
    """The clips of the rows, in order. A clip that stands there again with another caption has both; with
    nothing new, or another label or split, it is listed twice."""
    clips: list[Wanted] = []
    first: dict[tuple, int] = {}
    for row in rows:
        clip = _wanted(row, files)
        place = len(clips) if row.fault else first.setdefault(
            (row.video_id, row.start_s, clip.file or row.file), len(clips))
        if place == len(clips):
            clips.append(clip)
            continue
        before = clips[place]
        same = (before.label, before.split) == (clip.label, clip.split)
        if same and row.text and row.text not in before.texts:
            clips[place] = replace(before, texts=(*before.texts, row.text))
        else:
            detail = f"as {before.where}" + ("" if same else ", with another label or split")
            clips.append(replace(clip, reason="listed twice", detail=detail))
    return clips


def _kind_of(paths: list[Path], kind: str | None) -> str:
    """The one kind of the lists. Raises UserError: one is of another kind than the flag or the first says."""
    for path in paths:
        found = recognise(path)
        if kind and found != kind:
            said = f"--list says; give --list {found}, or leave --list out" if path == paths[0] else (
                f"{paths[0]} is; give lists of one kind")
            raise UserError(f"{path}: is a list of kind {found} ({KINDS[found]}), not {kind} as {said}")
        kind = found
    return kind


def _without_list(kind: str | None, root: Path, files: list[str], window_s: float) -> list[Wanted]:
    if kind not in (None, *WITHOUT_LIST):
        raise UserError(f"--list {kind} needs the list itself: give it with --labels")
    if kind == "greatest-hits" or kind is None and is_greatest_hits(root, files):
        return read_greatest_hits(root, files, window_s)
    return read_folders(files)


def read_list(lists: str | Path | Sequence[str | Path] | None, kind: str | None, files: list[str],
              ontology: str | Path | None = None, root: str | Path = ".", window_s: float = CLIP_S,
              log: Log = print) -> list[Wanted]:
    """The clips that a list asks for, matched with the files of a folder; rows without a file and rows listed
    twice are among them, with the reason.
    lists: the path of a list or of several of one kind, or None (kinds folders and greatest-hits). kind: one
    of KINDS, or None, which recognises it. files: names inside the folder `root` with /. ontology: AudioSet's
    ontology.json or class_labels_indices.csv. window_s: the longest window of greatest-hits, seconds.
    log: told once what is taken in another way than it is written.
    Raises UserError: a list of another kind than `kind`, one that is none of them, an empty one, or one of
    which no row has a file."""
    paths = [Path(path) for path in ([lists] if isinstance(lists, str | Path) else lists or [])]
    if not paths:
        return _without_list(kind, Path(root), files, window_s)
    if kind in WITHOUT_LIST:
        raise UserError(f"{paths[0]}: --list {kind} reads no list; leave out --labels, or --list")
    kind, rows = _kind_of(paths, kind), []
    if ontology and kind != "audioset":
        log(f"--ontology {ontology}: not used, it names the classes of AudioSet's lists alone")
    for path in paths:
        split = split_of_name(path) or ("test" if kind == "vggsound-test" else None)
        rows += [row._replace(split=row.split or split) for row in read_rows(path, kind, log)]
    if not rows:
        raise UserError(f"{paths[0]}: has a header and no row, expected a list of clips")
    if kind == "audioset":
        rows = with_names(rows, ontology, log)
    index = Files(files)
    clips = _match(rows, index)
    if index.several:
        used, other = index.first_choice
        log(f"{index.several} clips have several files; used is the one with the clip's second in its name, "
            f"else a video, the outermost, the first by name: {used!r:.120}, not {other!r:.120}")
    if files and not any(clip.file for clip in clips):
        raise UserError(f"{paths[0]}: none of its {len(clips)} clips is among the {len(files)} files; the "
                        f"first is {_wish(rows[0])}, the first file is {files[0]!r:.120}")
    return clips


def texts_beside(lists: Sequence[str]) -> Path | None:
    """labels.json beside the first list, with the texts of the classes for the judge, or None."""
    path = Path(lists[0]).with_name("labels.json") if lists else None
    return path if path and path.is_file() else None


def _wish(row: Row) -> str:
    """A clip in words, with the names that its file may have."""
    if row.file or row.fault:
        return f"{row.file or row.video_id!r:.80}"
    start, end = (int(1000 * time) for time in (row.start_s, row.start_s + row.length_s))
    name = row.video_id
    return (f"{name} from {row.start_s:g} s, read from {name}_{start // 1000:06d}.mp4, "
            f"{name}_{start}_{end}.mp4 or {name}.mp4")
