"""Folders of videos without a list: any tree, whose folders name the labels, and The Greatest Hits."""

import os
import re
from pathlib import Path

from clap2diffusion.dataset.manifest_file import SPLIT_OF
from clap2diffusion.videos.file_names import plain
from clap2diffusion.videos.wanted import LEAST_S, Wanted, caption_of, read_video_id

HIT_LEAD_S = 0.5  # a window begins so long before its first hit


def read_folders(files: list[str]) -> list[Wanted]:
    """A clip of every file of a tree. The folder that it lies in is its label; a folder that is called as a
    split gives the split and no label."""
    clips = []
    for file in files:
        *folders, _ = file.split("/")
        splits = [SPLIT_OF[folder.casefold()] for folder in folders if folder.casefold() in SPLIT_OF]
        label = plain(folders[-1]) if folders and folders[-1].casefold() not in SPLIT_OF else None
        texts = (caption_of(label),) if label else ()
        clips.append(Wanted(read_video_id(file), file, None, None, label, texts,
                            splits[0] if splits else None, file))
    return clips


def _hits(path: Path) -> list[tuple[float, str]]:
    """(seconds, material) of every hit or scratch with a material, in order: `3.96 wood hit static`."""
    lines = (line.split() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    return sorted((float(words[0]), words[1]) for words in lines
                  if len(words) > 2 and words[2] in ("hit", "scratch") and words[1] != "None"
                  and re.fullmatch(r"\d+(\.\d+)?", words[0]))


def _videos(files: list[str]) -> dict[str, str]:
    """The videos of The Greatest Hits, each with its best file: denoised before the microphone's, large
    before the thumbnail."""
    videos: dict[str, tuple] = {}
    for file in files:
        stem, suffix = os.path.splitext(file)
        video = re.sub(r"_(denoised|mic)(_thumb)?$", "", stem)
        if video != stem and suffix.casefold() not in (".wav", ".txt"):
            rank = ("_denoised" not in stem[len(video):], stem.endswith("_thumb"), file)
            videos[video] = min(rank, videos.get(video, rank))
    return {video: file for video, (*_, file) in videos.items()}


def is_greatest_hits(root: Path, files: list[str]) -> bool:
    """Whether a folder without a list holds The Greatest Hits: videos with their times files."""
    return any((root / f"{video}_times.txt").is_file() for video in _videos(files))


def read_greatest_hits(root: Path, files: list[str], window_s: float) -> list[Wanted]:
    """Clips of The Greatest Hits: one for each run of hits on one material, from half a second before its
    first hit to the next hit on another material, window_s at most."""
    clips = []
    for video, file in _videos(files).items():
        times = root / f"{video}_times.txt"
        hits, end = _hits(times) if times.is_file() else [], 0.0
        if not hits:
            reason = "no hit with a material" if times.is_file() else "no times file"
            clips.append(Wanted(video, file, None, None, None, (), None, file, reason=reason))
        for i, (time, material) in enumerate(hits):
            if time < end:
                continue
            start = max(time - HIT_LEAD_S, end)
            other = next((later for later, what in hits[i:] if what != material), start + window_s)
            end = min(start + window_s, max(other, start + LEAST_S))
            clips.append(Wanted(video, file, start, round(end - start, 3), material, (caption_of(material),),
                                None, f"{video}_times.txt at {time:g} s"))
    return clips
