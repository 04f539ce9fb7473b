"""The end of `prepare_data.py videos`: the manifest, what was left out, a contact sheet, a summary."""

import argparse
import json
import random
import shlex
from collections import Counter
from pathlib import Path

import soundfile
from PIL import Image, ImageOps

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.manifest_file import SPLITS, Log
from clap2diffusion.pictures.sheets import spectrogram, tile, write_png
from clap2diffusion.videos.journal import Journal, key_of
from clap2diffusion.videos.lists import texts_beside
from clap2diffusion.videos.splits import split_by_hash, split_videos
from clap2diffusion.videos.summary import Skipped, describe_classes, describe_skipped, write_skipped
from clap2diffusion.videos.wanted import Wanted

SHOWN, CELL = 12, (192, 144)  # rows of the contact sheet; pixels of a picture in it


def _text(value: str) -> str:
    """A text that UTF-8 can hold: a file's name may have bytes that are none."""
    return value.encode(errors="replace").decode()


def rows_of(clip: Wanted, made: dict, split: str) -> list[dict]:
    """The manifest's rows of a clip: one for each of its captions."""
    row = {key: made[key] for key in ("image_file_name", "audio_file_name")}
    more = {"split": split, "video": _text(clip.file), "window_start_s": made["start_s"],
            "frame_time_s": made["frame_s"], **({"still": True} if made["still"] else {}),
            **({"properties": json.loads(clip.properties)} if clip.properties else {})}
    label = {"label": _text(clip.label)} if clip.label else {}
    return [{**row, "text": _text(text), **label, **more} for text in dict.fromkeys(clip.texts or ("",))]


class Made:
    """What a data folder holds: lines of the manifest and of skipped.csv, and counts."""

    def __init__(self):
        self.lines: list[str] = []
        self.skipped: list[Skipped] = []
        self.rows, self.classes, self.flags = Counter(), Counter(), Counter()
        self.videos: dict[str, set[str]] = {split: set() for split in SPLITS}
        self.seconds, self._firsts = 0.0, {}  # the file of a clip -> the number of its first line

    def add(self, clip: Wanted, made: dict, split: str) -> None:
        name = made["audio_file_name"]
        if name in self._firsts:
            self.skip(clip, made["start_s"], "listed twice", "the same part of the same file")
            return
        self._firsts[name] = len(self.lines)
        rows = rows_of(clip, made, split)
        self.lines += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        self.rows[split] += len(rows)
        self.classes[clip.label or None] += 1
        self.videos[split].add(clip.video_id)
        self.seconds += made["length_s"]
        self.flags.update(key for key in ("still", "bars") if made[key])

    def skip(self, clip: Wanted, start_s: float | None, reason: str, detail: str) -> None:
        start = "" if start_s is None else f"{start_s:g}"
        self.skipped.append(Skipped(reason, clip.file or clip.video_id, clip.where, detail, start))

    def describe(self) -> list[str]:
        """Rows by split and class, hours of sound, what was odd: a line each."""
        counts = [f"{split:<6}{self.rows[split]:>8} rows of {len(self.videos[split])} videos"
                  for split in SPLITS]
        return [*counts, describe_classes(self.classes),
                f"{self.seconds / 3600:.2f} hours of sound; bars cropped in {self.flags['bars']} pictures; "
                f"{self.flags['still']} clips are a still picture under sound"]

    def sample(self, seed: int) -> list[dict]:
        """A row of each of SHOWN clips, or of all if they are fewer."""
        firsts = random.Random(seed).sample([*self._firsts.values()], min(SHOWN, len(self._firsts)))
        return [json.loads(self.lines[i]) for i in firsts]


def preview(out: Path, rows: list[dict]) -> Image.Image:
    """The contact sheet: of each row its frame, below it its sound's spectrogram, and its label."""
    cells, names = [], []
    for row in rows:
        cell = Image.new("RGB", (CELL[0], CELL[1] + 50), "white")
        with Image.open(out / row["image_file_name"]) as image:
            small = ImageOps.contain(image.convert("RGB"), CELL)
        cell.paste(small, ((CELL[0] - small.width) // 2, (CELL[1] - small.height) // 2))
        waveform, rate = soundfile.read(out / row["audio_file_name"], dtype="float32")
        cell.paste(spectrogram(waveform, rate).resize((CELL[0], 48)).convert("RGB"), (0, CELL[1] + 2))
        cells.append(cell)
        label = row.get("label") or row["text"] or "(no label)"
        names.append(label if len(label) <= 28 else f"{label[:27]}…")
    return tile(cells, names, columns=4)


def _has(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def finish(args: argparse.Namespace, clips: list[Wanted], reasons: list, journal: Journal, log: Log) -> None:
    """Write what the journal and the list say, the manifest last of all, and tell what it is.
    Raises UserError: no clip can be used."""
    split_of = split_videos(clips, args.seed, log)
    out, made = Path(args.out), gather(clips, reasons, journal, split_of)
    told = describe_skipped(made.skipped)
    write_skipped(out, made.skipped)
    if not made.lines:
        raise UserError(f"{args.videos}: not one of {len(made.skipped)} clips can be used ({told}); "
                        f"{out / 'skipped.csv'} says why of each")
    texts = texts_beside(args.labels)
    if texts and not _has(out / "labels.json", texts.read_bytes()):
        files.write_atomic(out / "labels.json", texts.read_bytes())
    content = "".join(made.lines).encode()
    complete = _has(out / "metadata.jsonl", content)
    if not complete:
        write_png(out / "preview.png", preview(out, made.sample(args.seed)))
        files.write_atomic(out / "metadata.jsonl", content)
    log(f"{out}: " + ("already complete" if complete else f"{len(made.lines)} rows"))
    for line in made.describe():
        log(f"  {line}")
    log(f"  {len(made.skipped)} left out" + (f" ({told}); {out / 'skipped.csv'} lists them" if told else ""))
    for remark in _remarks(made, clips, args.seed):
        log(f"  {remark}")
    if not complete:
        log(f"  look at {out / 'preview.png'}\nnext: python prepare_data.py check --data-root "
            f"{shlex.quote(str(out))}")


def gather(clips: list[Wanted], reasons: list, journal: Journal, split_of: dict[str, str]) -> Made:
    """What the journal and the list say, in the order of the list."""
    made = Made()
    for clip, reason in zip(clips, reasons, strict=True):
        if reason:
            made.skip(clip, clip.start_s, *reason)
            continue
        for one in journal.line(key_of(clip))["clips"]:
            if "reason" in one:
                made.skip(clip, one["start_s"], one["reason"], one["detail"])
            else:
                made.add(clip, one, split_of[clip.video_id])
    return made


def _remarks(made: Made, clips: list[Wanted], seed: int) -> list[str]:
    """What the splits lack for training, and what to do."""
    lacks = [split for split in ("train", "val") if made.rows[split] < 2]
    if not lacks:
        return []
    remedy = "prepare more videos, or name the splits in a list (--list plain: columns file, split)"
    videos = {video for found in made.videos.values() for video in found}
    if not any(clip.split for clip in clips):
        for other in range(1000):
            counts = Counter(split_by_hash(video, other) for video in videos)
            if min(counts["train"], counts["val"]) > 1:
                remedy = f"with --seed {other} and another --out they have some; or {remedy}"
                break
    return [f"too little for training in split {' and '.join(lacks)}: {remedy}"]
