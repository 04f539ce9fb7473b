"""What of a data folder is done: a line of JSON for each finished clip, in a file for each share of the work.
It outlives kill -9, and a later run reads which clips it need not make again."""

import contextlib
import json
import os
import time
from pathlib import Path

from clap2diffusion.base.files import sync_disk
from clap2diffusion.videos.wanted import Wanted

FOLDER, NAME = "journal", "done.jsonl"  # in it a folder for each share of the work, with its own lock
BATCH, BATCH_S = 256, 5.0  # lines are written when so many have come, or after so many seconds


def key_of(clip: Wanted) -> str:
    """What a clip is called in the journal: its file and where in it the window begins."""
    return f"{clip.file}@{'' if clip.start_s is None else round(clip.start_s * 1000)}"


class Journal:
    """The journals of a data folder; new lines go to this share's. `done`: for each key the place of its
    newest line."""

    def __init__(self, out: Path, share: str):
        self.out, self.waiting, self.last = out, [], time.monotonic()
        self.done: dict[str, tuple[Path, int]] = {}
        self.path = out / FOLDER / share / NAME
        self._files = {}
        for path in sorted(out.glob(f"{FOLDER}/*/{NAME}")):
            self._read(path)
        self._end_line()
        self._own = self.path.open("ab")

    def _read(self, path: Path) -> None:
        place = 0
        with path.open("rb") as lines:
            for line in lines:
                # of a killed run the last one may be cut
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self.done[json.loads(line)["key"]] = path, place
                place += len(line)

    def _end_line(self) -> None:
        """A line that a killed run left half is cut away."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if not content.endswith(b"\n"):
            self.path.write_bytes(content[:content.rfind(b"\n") + 1])

    def line(self, key: str) -> dict:
        """The newest line of a key that is in `done`."""
        path, place = self.done[key]
        if path not in self._files:
            self._files[path] = path.open("rb")
        self._files[path].seek(place)
        return json.loads(self._files[path].readline())

    def is_done(self, key: str, asked: list) -> bool:
        """Whether a key was asked for in the same way and its files are there with the same lengths. What
        could not be read is not done."""
        if key not in self.done:
            return False
        line = self.line(key)
        if any("again" in clip for clip in line["clips"]):
            return False
        return line["asked"] == asked and all(
            _length(self.out / clip[name]) == length for clip in line["clips"] if "bytes" in clip
            for name, length in zip(("image_file_name", "audio_file_name"), clip["bytes"], strict=True))

    def add(self, key: str, asked: list, clips: list[dict]) -> None:
        """Note that a key is done. It is written once its files are on the disk."""
        self.waiting.append((key, json.dumps({"key": key, "asked": asked, "clips": clips}) + "\n"))
        if len(self.waiting) >= BATCH or time.monotonic() - self.last > BATCH_S:
            self.flush()

    def flush(self) -> None:
        """Wait for the disk, then write the waiting lines."""
        if self.waiting:
            sync_disk(self.out)
            for key, line in self.waiting:
                self.done[key] = self.path, self._own.tell()
                self._own.write(line.encode())
            self._own.flush()
            os.fsync(self._own.fileno())
        self.waiting, self.last = [], time.monotonic()


def _length(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
