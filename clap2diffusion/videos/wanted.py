"""A clip that is to be prepared: which part of which file, its label, captions and split. No heavy import."""

import os
from dataclasses import dataclass

from clap2diffusion.videos.file_names import plain, read_name

CLIP_S = 10.0  # the clips of VGGSound, AudioCaps and LLP
LEAST_S = 1.0  # a shorter window is none


@dataclass(frozen=True, slots=True)
class Wanted:
    """One clip that a list asks for. `file` is its name inside the folder of videos, None if there is none.
    The window begins at start_s seconds of that file (None: it is for the caller to say) and lasts length_s
    (None: as long as the encoder's). `whole` says that the file bears the video's id alone: start_s is then
    the list's, and window_start() tells a whole video from a file that was cut to its clip."""
    video_id: str
    file: str | None
    start_s: float | None
    length_s: float | None
    label: str | None
    texts: tuple[str, ...]
    split: str | None
    where: str
    reason: str = ""  # why it is of no use, in the same words for all such clips; '' = it is
    detail: str = ""  # more about this one
    whole: bool = False
    properties: str = ""  # a JSON object: what was drawn, where we made the video


def window_start(wanted: Wanted, duration_s: float) -> float:
    """Where in its file the window begins, in seconds. A file that bears the video's id alone was cut to the
    clip if it is as short as the clip and ends before the list's window does."""
    length = wanted.length_s or CLIP_S
    if wanted.whole and duration_s < min(length + LEAST_S, wanted.start_s + length - LEAST_S):
        return 0.0
    return wanted.start_s or 0.0


def caption_of(label: str) -> str:
    """The caption of a clip that has a label alone: `Baby_cry+Speech` becomes `Baby cry, Speech`."""
    return ", ".join(part.replace("_", " ").strip() for part in label.split("+"))


def join_labels(labels: list[str]) -> str | None:
    """Several labels as one, a+b, in the list's order; a plus inside a label would part it, and is spelt."""
    return "+".join(dict.fromkeys(label.strip().replace("+", " and ") for label in labels if label.strip())
                    ) or None


def read_video_id(file: str) -> str:
    """The video that a file belongs to: the id of its name where the name has one with a time or is one, so
    that the clips of a video share a split; else its path without suffix."""
    clip = read_name(file)
    random = clip and any(c.isupper() for c in clip.video_id) and any(c.islower() for c in clip.video_id)
    return clip.video_id if random else os.path.splitext(plain(file))[0]
