"""Which split a video is in: the list's, or one by a hash of its id. No video is in two."""

import hashlib
import unicodedata

from clap2diffusion.dataset.manifest_file import SPLITS, Log
from clap2diffusion.videos.wanted import Wanted


def place(video_id: str, seed: int) -> int:
    """0 to 99, evenly, by a seeded hash of a video's id: it stays when other videos come or go."""
    text = f"{seed}:{unicodedata.normalize('NFC', video_id)}".encode(errors="surrogateescape")
    return int(hashlib.sha256(text).hexdigest(), 16) % 100


def split_by_hash(video_id: str, seed: int) -> str:
    """90 % train, 5 % val, 5 % test."""
    where = place(video_id, seed)
    return "train" if where < 90 else "val" if where < 95 else "test"


def listed_splits(clips: list[Wanted]) -> dict[str, str]:
    """The list's split of every video that it has one for. One whose clips the list has in several is in the
    one that comes last of train, val, test: the clips of the others are for the caller to leave out."""
    found: dict[str, str] = {}
    for clip in clips:
        if clip.split:
            found[clip.video_id] = max(found.get(clip.video_id, clip.split), clip.split, key=SPLITS.index)
    return found


def split_videos(clips: list[Wanted], seed: int, log: Log, what: str = "videos") -> dict[str, str]:
    """The split of every video: listed_splits(), or by a hash of its id. Where the list gives no val, a
    twentieth of train's videos become val; `log` is told. what: what the clips are, in that line."""
    given = listed_splits(clips)
    found = {clip.video_id: given.get(clip.video_id) or split_by_hash(clip.video_id, seed) for clip in clips}
    train = [video for video, split in given.items() if split == "train"]
    if train and "val" not in found.values():
        moved = [video for video in train if place(video, seed) < 5]
        found |= dict.fromkeys(moved, "val")
        log(f"no clip is of split val: {len(moved)} of train's {len(train)} {what} become val, by a hash "
            "of their ids")
    if missing := len(found) - len(given):
        of = f"of {len(found)} " if given else ""
        log(f"{missing} {of}{what} have no split: assigned by a hash of their ids, 90/5/5 train/val/test")
    return found
