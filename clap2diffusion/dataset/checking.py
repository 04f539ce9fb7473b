"""A data folder looked over: rows that cannot be used, and rows that can be but look wrong."""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.hub import SCRIPTS, resolve_model
from clap2diffusion.base.workers import in_processes
from clap2diffusion.dataset import decoding
from clap2diffusion.dataset.captions import Cut, cut_texts
from clap2diffusion.dataset.manifest import SPLITS, Row, find_gaps, read_manifest, refuse_absent_files

SMALL_SIDE, LONG_SHAPE, SHORT_CLIP_S, CLIPPED_SHARE = 64, 3, 1.0, 5e-3
PATHS = {"picture": "image_path", "sound": "audio_path"}  # of a row
Finding = tuple[str, str]  # what is suspicious, the detail


def _look_at_picture(path: Path) -> Iterator[Finding]:
    with decoding.open_image(path) as image:
        short, long = sorted(image.size)
        size = f"{image.width}x{image.height} pixels"
    decoding.load_image(path, 64)  # the whole of it is decoded, as training does
    if short < SMALL_SIDE:
        yield "tiny picture", f"{size}, a side under {SMALL_SIDE}"
    if long > LONG_SHAPE * short:
        yield "extreme picture", f"{size}, more than {LONG_SHAPE}:1; the middle square is all that is used"


def _look_at_sound(path: Path) -> Iterator[Finding]:
    with decoding.open_audio(path) as sound:
        seconds, log, open_end = sound.frames / sound.samplerate, sound.extra_info, sound.open_end
        subtype = sound.subtype
        taken_for = f"{subtype} at {sound.samplerate} Hz" if sound.format == "RAW" else ""
        [block], rate = decoding.windows_of(sound, 10.0), sound.samplerate
        yield from sound.notes
    for flag in decoding.to_mono([block])[1]:
        yield flag, "its features are those of silence"
    peak, inner = float(np.abs(block).max()), block[1:-1]
    # Level with both neighbours: the top of a loud sine is round.
    flat = (np.abs(inner) >= 0.98 * peak) & (inner == block[:-2]) & (inner == block[2:])
    if peak >= 0.98 and flat.mean() > CLIPPED_SHARE:
        yield "clipped", f"{flat.mean():.1%} of its samples stand at full scale with their neighbours"
    if open_end:
        yield "perhaps not whole", open_end
    if taken_for:
        yield "without a header", f"its name makes it {taken_for}"
    if seconds < SHORT_CLIP_S:
        yield "shorter than a second", f"{seconds:.2f} s"
    rates = re.search(r"Bytes/sec +: (\d+) \(should be (\d+)\)", log)
    # some programs write 0, and encoders of ADPCM what they like
    if rates and "ADPCM" not in subtype and int(rates[1]) and abs(int(rates[1]) / int(rates[2]) - 1) > 0.01:
        yield "wrong rate claimed", (f"its header says {rate} Hz, but {rates[1]} bytes a second, expected "
                                     f"{rates[2]}")


def look_at(job: tuple[str, Path]) -> tuple[str, list[Finding]]:
    """("sound" or "picture", path) -> (why it cannot be used or "", what is suspicious about it)."""
    kind, path = job
    try:
        return "", list((_look_at_picture if kind == "picture" else _look_at_sound)(path))
    except decoding.BadFile as error:
        return str(error), []


def same_content(paths: list[Path]) -> dict[Path, Path]:
    """Path -> the first path with the same bytes, where that is another. Only files of one size are read."""
    paths = [path for path in paths if path.is_file()]
    sizes = Counter(path.stat().st_size for path in paths)
    first, again = {}, {}
    for path in (path for path in paths if sizes[path.stat().st_size] > 1):
        with path.open("rb") as file:
            earlier = first.setdefault(hashlib.file_digest(file, "sha256").digest(), path)
        if earlier != path:
            again[path] = earlier
    return again


def names_label(text: str, label: str) -> bool:
    """Whether a caption says its label (of `dog_barking+rain` one of the two) in so many words."""
    text, *parts = (re.sub(r"[\W_]+", " ", f" {what.casefold()} ") for what in (text, *label.split("+")))
    return any(part.strip() and part in text for part in parts)


def _look_at_rows(rows: list[Row], workers: int, cut: dict[str, Cut]
                  ) -> Iterator[tuple[Row, str, list[Finding]]]:
    """Yield each row with why it cannot be used or "", and with what is suspicious about it. cut: captions
    that are too long."""
    files = list(dict.fromkeys((kind, getattr(row, name)) for kind, name in PATHS.items() for row in rows))
    seen = dict(zip(files, in_processes(look_at, files, workers, "checking", "file")))
    again = {kind: same_content([path for one, path in files if one == kind]) for kind in PATHS}
    first_row: dict[Path, Row] = {}  # the first row that holds a content
    for row in rows:
        found = []
        for kind, path in ((kind, getattr(row, name)) for kind, name in PATHS.items()):
            reason, more = seen[kind, path]
            if reason:
                yield row, f"{kind} {path.name}: {reason}", []
                break
            found += [(what, f"{kind} {path.name}: {detail}") for what, detail in more]
            earlier = again[kind].get(path)
            other = first_row.setdefault(earlier or path, row)
            if other.split != row.split:
                places = f"{path.name} is in {row.split} here and in {other.split} at {other.where}"
                found.append((f"{kind} in two splits", places))
            elif earlier:
                found.append((f"{kind} twice", f"{path.name} has the content of {earlier.name}"))
        else:
            if not row.text.strip():
                found.append(("empty caption", "the row has no words"))
            elif row.label and names_label(row.text, row.label):
                found.append(("caption names the label", f"{row.text[:60]!r} says {row.label!r}"))
            if row.text in cut:
                found.append(("caption cut", str(cut[row.text])))
            yield row, "", found


def check_data(args: argparse.Namespace) -> None:
    """List a data folder's unusable and suspicious rows by kind. Raises UserError without a manifest, with
    more unusable or suspicious rows than the limits, or with too little in a split of --splits."""
    rows, bad = read_manifest(args.data_root, print)
    if not bad:
        refuse_absent_files(args.data_root, rows)
    cut, usable = {}, []
    if args.base_model:
        cut = cut_texts((row.text for row in rows),
                        resolve_model(args.base_model, "base model", beside=SCRIPTS))
    kinds, suspicious, total = {"unusable": bad}, 0, len(rows) + len(bad)
    for row, reason, found in _look_at_rows(rows, args.workers, cut):
        suspicious += bool(found)
        usable += [row] * (not reason)
        for what, detail in [("unusable", reason)] if reason else found:
            kinds.setdefault(what, []).append(f"{row.where}: {detail}")
    for what, lines in kinds.items():
        print(f"{what}: {len(lines)}", *lines[:args.show or None], sep="\n  ")
        if 0 < args.show < len(lines):
            print(f"  ... and {len(lines) - args.show} more (--show 0 lists all)")
    unusable, counts = len(kinds["unusable"]), Counter(row.split for row in rows)
    splits = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    summary = f"{args.data_root}: {total} rows ({splits}), {unusable} unusable, {suspicious} suspicious"
    for n, limit, flag in ((unusable, args.max_bad_share, "--max-bad-share"),
                           (suspicious, args.max_suspicious_share, "--max-suspicious-share")):
        if n > limit * total:
            raise UserError(f"{summary}; mend or remove what is listed above, or raise {flag} {limit:g}")
    if gaps := find_gaps(usable, args.splits):
        print(f"too little to train from: {len(gaps)}", *gaps, sep="\n  ")
        raise UserError(f"{summary}; {gaps[0]}; or name with --splits the splits that must have rows")
    print(summary, flush=True)
