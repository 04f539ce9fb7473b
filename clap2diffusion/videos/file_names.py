"""The files of a folder, listed once, and how the name of a file tells which clip of which video it is.
No heavy import."""

import os
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.manifest_file import SUFFIXES, VIDEOS

PICTURES = frozenset(f".{suffix}" for suffix in [*SUFFIXES["image_file_name"].split(), "heic", "heif", "jxl",
                                                 "psd", "svg"])
SOUNDS = frozenset(f".{suffix}" for suffix in {*SUFFIXES["audio_file_name"].split()} - {*VIDEOS.split()})
# what lies beside videos and is none: lists, notes, features, downloads that have not ended
OTHERS = frozenset(".csv .tsv .txt .json .jsonl .md .pdf .html .xml .srt .vtt .ass .npy .npz .pkl "
                   ".h5 .hdf5 .mat .pt .pth .safetensors .zip .tar .gz .part .ytdl .tmp .crdownload .log "
                   ".py .sh".split())
SIDECARS = {"thumbs.db", "desktop.ini"}
SIDECAR_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information"}
# A video's id on YouTube: 11 letters, digits, `_` and `-`. A name is never split at `_`: the id is counted.
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_NUMBER = r"\d+(?:\.\d+)?"
_CLIP = re.compile(rf"Y?([A-Za-z0-9_-]{{11}})(?:_({_NUMBER})(?:[_-]({_NUMBER}))?)?")
_TITLED = re.compile(r".*\[([A-Za-z0-9_-]{11})\]", re.DOTALL)  # yt-dlp's own names: Title [ID].webm
MOST_CLIP_S = 600  # two numbers further apart are milliseconds: no list here has clips of ten minutes
MISSING = "missing from the folder"
NEAR_S = 1.0  # a start in a name is a whole second, the list's may have decimals


class ClipName(NamedTuple):
    """What a name says: the video's id and where in the video the file begins (None: it says no time)."""
    video_id: str
    start_s: float | None


def plain(name: str) -> str:
    """A name as it is compared: macOS writes an accent as a letter of its own (NFD), others do not (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def read_name(file: str) -> ClipName | None:
    """The clip that a file's name tells of, or None. Known are ID.mp4, YID.mp4, Title [ID].mp4 (no time),
    ID_000030.mp4 and ID_30.mp4 (seconds), ID_30_40.mp4 (seconds) and ID_30000_40000.mp4 (milliseconds)."""
    name = file.rpartition("/")[2]
    stem = os.path.splitext(name)[0]
    if found := _CLIP.fullmatch(stem) or _CLIP.fullmatch(name):  # in a list a name may have no suffix
        video_id, start, end = found.groups()
        if start is None:
            return ClipName(video_id, None)
        milliseconds = end is not None and float(end) - float(start) > MOST_CLIP_S
        return ClipName(video_id, float(start) / (1000 if milliseconds else 1))
    found = _TITLED.fullmatch(stem)
    return ClipName(found[1], None) if found else None


def list_videos(root: str | Path) -> list[str]:
    """list_files() without what is a picture or no medium at all by its suffix. Sounds are among them: a list
    may ask for one, and then it is for the reader to say that it has no picture."""
    return [name for name in list_files(root) if suffix_of(name) not in PICTURES | OTHERS]


def suffix_of(name: str) -> str:
    """The suffix in lower case with its dot, or ''."""
    return os.path.splitext(name)[1].casefold()


def list_files(root: str | Path) -> list[str]:
    """The files below a folder as names inside it with /, sorted; folders are listed once, links to folders
    are followed once. Left out are sidecars (._x, .DS_Store, Thumbs.db, __MACOSX/) and hidden files.
    Raises UserError: it is no folder, or cannot be read."""
    root, found, seen = Path(root), [], set()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected one that holds the files")
    todo = [(str(root), "")]
    while todo:
        folder, inner = todo.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(".") or name.casefold() in SIDECARS:
                        continue
                    # a link that leads to itself is no folder; entry.is_dir() would raise
                    if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                        if name not in SIDECAR_FOLDERS:
                            todo.append((entry.path, f"{inner}{name}/"))
                    else:
                        found.append(inner + name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror}); let this user read it, or move it "
                            "away") from None
    return sorted(found)


class Files:
    """The files of a folder, looked up by clip or by name in dictionaries. `several` counts the clips that
    more than one file would do for, with the first such choice."""

    def __init__(self, names: list[str]):
        # a video comes before a sound, then the outermost, then the first by name
        self.names = sorted(names, key=lambda name: (suffix_of(name) in SOUNDS, name.count("/"), name))
        self.several, self.first_choice = 0, ("", "")

    @cached_property
    def _by_id(self) -> dict[str, list[tuple[float | None, str]]]:
        found = defaultdict(list)
        for name in self.names:
            if clip := read_name(name):
                found[clip.video_id].append((clip.start_s, name))
        return found

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Files by their path and by its last part, each with and without suffix, in small letters."""
        found = defaultdict(list)
        for name in self.names:
            path = plain(name).casefold()
            last = path.rpartition("/")[2]
            for form in {path, os.path.splitext(path)[0], last, os.path.splitext(last)[0]}:
                found[form].append(name)
        return found

    def clip(self, video_id: str, start_s: float) -> tuple[str | None, bool, str, str]:
        """The file of a clip; whether it bears the id alone, so that it may be the whole video; and why there
        is none, with a detail. A file whose name has the clip's start wins, the nearest; then one that bears
        the id alone; of equals the outermost, then the first by name. A video comes before any sound."""
        there = self._by_id.get(video_id, ())
        fits = [(suffix_of(name) in SOUNDS, start is None, 0 if start is None else abs(start - start_s), i)
                for i, (start, name) in enumerate(there) if start is None or abs(start - start_s) < NEAR_S]
        if not fits:
            return None, False, MISSING, f"{there[0][1]} begins at another second" if there else ""
        fits.sort()
        if len(fits) > 1 and fits[0][0] == fits[1][0]:  # a sound beside a video is no second choice
            self.several += 1
            if self.several == 1:
                self.first_choice = there[fits[0][3]][1], there[fits[1][3]][1]
        return there[fits[0][3]][1], fits[0][1], "", ""

    def named(self, name: str) -> tuple[str | None, str]:
        """The file that a list names, and why there is none: its path inside the folder, or else its last
        part anywhere in it; the suffix may be left out; both Unicode forms and upper and lower case count as
        one where no file has the exact name. Several of that name: none of them."""
        name = plain(name.replace("\\", "/").removeprefix("./"))
        fits = self._by_name.get(name.casefold()) or self._by_name.get(
            name.rpartition("/")[2].casefold()) or []
        for best in ([one for one in fits if plain(one) == name],
                     [one for one in fits if plain(one).casefold() == name.casefold()],
                     [one for one in fits if plain(one).rpartition("/")[2] == name], fits):
            if len(best) == 1:
                return best[0], ""
            if best:
                return None, "several files of that name"
        return None, MISSING
