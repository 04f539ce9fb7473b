"""The command `prepare_data.py videos`: a folder of videos becomes a data folder of sounds and pictures.

A complete folder has metadata.jsonl. Beside it lie settings.json, skipped.csv, preview.png and the journal,
by which the same command goes on after a kill, and adds videos that have come since."""

import argparse
import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

from tqdm import tqdm

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.workers import Lost, each_in_processes
from clap2diffusion.dataset.manifest_file import Log, find_manifest
from clap2diffusion.videos.file_names import list_videos
from clap2diffusion.videos.journal import FOLDER, Journal, key_of
from clap2diffusion.videos.lists import read_list, texts_beside
from clap2diffusion.videos.splits import listed_splits
from clap2diffusion.videos.wanted import Wanted

HANG_S = 300  # a window that takes longer hangs: the slowest disk and codec need seconds


def read_plan(args: argparse.Namespace, log: Log) -> tuple[dict, list[Wanted] | None]:
    """The settings that a data folder is made with, and the clips that it shall have: None if it is complete
    and its videos are gone. No torch.
    Raises UserError: no videos, a list that cannot be read or fits none, folders inside each other, no
    judge, a labels.json beside the list that is of something else."""
    videos, out = Path(args.videos), Path(args.out)
    settings = {"made_by": "videos", "labels": [Path(name).name for name in args.labels], "list": args.list,
                "window_s": args.window_s, "windows": args.windows, "pick": args.pick,
                "judge": args.judge if args.pick == "siglip" else "", "still": args.still, "size": args.size,
                "seed": args.seed}
    check_begun(out, settings)
    if not videos.is_dir():
        if (out / "metadata.jsonl").exists():
            return settings, None
        raise UserError(f"{videos}: no such folder; give the folder of the videos with --videos")
    here, there = out.resolve(), videos.resolve()
    written = [here / name for name in ("audio", "images", FOLDER)]
    if here.is_relative_to(there) or any(there.is_relative_to(folder) for folder in written):
        raise UserError(f"--out {out}: lies in --videos {videos}, or holds it where files are written, and "
                        "they would be taken for videos; give another --out")
    if args.pick == "siglip":
        from clap2diffusion.judging.clips import find_judge
        find_judge(args.judge)
    if texts := texts_beside(args.labels):
        from clap2diffusion.judging.clips import class_texts
        class_texts(texts)
    names = list_videos(videos)
    if not names:
        raise UserError(f"{videos}: holds no file that may be a video; give their folder with --videos")
    return settings, read_list(args.labels or None, args.list, names, args.ontology or None, videos,
                               args.window_s, log)


def check_begun(out: Path, settings: dict) -> None:
    """Raises UserError: a data folder holds what was made otherwise, or by hand."""
    path = out / "settings.json"
    if not path.exists():
        if manifest := find_manifest(out):
            raise UserError(f"{manifest}: is not of this command, whose manifest would take its place; give "
                            "another --out, or move it away")
        return
    known = files.read_json(path)
    if known.get("made_by") != settings["made_by"]:
        raise UserError(f"{out}: holds data made by {known.get('made_by')!r:.40}; give another --out")
    if differ := [f"{key} {json.dumps(known.get(key))} -> {json.dumps(settings.get(key))}"
                  for key in {**known, **settings} if known.get(key) != settings.get(key)]:
        raise UserError(f"{out}: was begun with other flags ({', '.join(differ)}); give the old ones, or "
                        "another --out")


def hold(out: Path, share: str, alone: bool) -> list:
    """Make the folders and hold this share of them, or the whole if `alone`, while the returned files are
    open. Another process that has it is waited for. Raises UserError: it cannot be written."""
    def lock(folder: Path):
        return files.lock(folder, wait=f"waiting for another process that is making {folder}")
    try:
        held = [lock(out)]
        shares = {out / FOLDER / share, *(out.glob(f"{FOLDER}/*/") if alone else ())}
        held += [lock(folder) for folder in sorted(shares)]
        for name in ("audio", "images"):
            (out / name).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    if alone:
        for folder in (out, out / "audio", out / "images"):
            files.remove_stale(folder)  # of a run that was killed
        return held
    held.pop(0).close()  # other shares may begin; a run of the whole waits for this share's lock
    return held


def why_not(clip: Wanted, given: dict[str, str], seen: set[str]) -> tuple[str, str] | None:
    """Why a clip cannot be made, as reason and detail, before its file is looked at; else None."""
    if clip.reason:
        return clip.reason, clip.detail
    if clip.split and clip.split != given[clip.video_id]:
        return f"its video is in split {given[clip.video_id]} as well", ""
    if key_of(clip) in seen:
        return "listed twice", "the same part of the same file"
    seen.add(key_of(clip))
    return None


def asked_of(clip: Wanted, args: argparse.Namespace) -> list:
    """What the files of a clip depend on, beside the settings. A video that was changed has other ones."""
    with contextlib.suppress(OSError):
        stat = os.stat(Path(args.videos) / clip.file)
        words = (clip.label or clip.texts[:1]) if args.pick == "siglip" else None
        return [stat.st_size, stat.st_mtime_ns, clip.start_s, clip.length_s, clip.whole, words and str(words)]
    return []


def in_share(video_id: str, share: tuple[int, int]) -> bool:
    digest = hashlib.sha256(video_id.encode(errors="surrogateescape")).hexdigest()
    return int(digest, 16) % share[1] == share[0] - 1


def make_missing(args: argparse.Namespace, clips: list[Wanted], journal: Journal) -> int:
    """Make what the journal does not have yet, and note it there. Returns how many clips that were."""
    from clap2diffusion.videos.clips import CRASHED, Options, make_clips, unusable
    todo = [clip for clip in clips if not journal.is_done(key_of(clip), asked_of(clip, args))]
    print(f"{args.videos}: {len(clips)} videos or parts of them, {len(clips) - len(todo)} done before",
          flush=True)
    if not todo:
        return 0
    # a manifest says that the folder is whole: until then there is none
    (Path(args.out) / "metadata.jsonl").unlink(missing_ok=True)
    options = Options(Path(args.videos), Path(args.out), args.window_s, args.windows, args.pick, args.still,
                      args.size, args.judge, max(1, (os.cpu_count() or 1) // args.workers))
    jobs = ((clip, asked_of(clip, args)) for clip in todo)
    made = each_in_processes(functools.partial(_first, make_clips, options), jobs, args.workers,
                             HANG_S * args.windows)
    try:
        for (clip, asked), found in tqdm(made, **bar_options(total=len(todo), desc="videos", unit="clip")):
            if isinstance(found, Lost):
                what = "a decoder hung on it" if found.reason.startswith("not done") else CRASHED
                found = [unusable(clip.start_s, what, found.reason)]
            journal.add(key_of(clip), asked, found)
    finally:
        made.close()
        journal.flush()
    return len(todo)


def _first(function, options, job: tuple):
    """function() of a job's clip; what its files depend on comes back with the job."""
    return function(job[0], options)


def prepare_videos(args: argparse.Namespace) -> None:
    """Make the clips of a folder of videos or of a share of them, then the manifest. Raises UserError."""
    from clap2diffusion.videos.finishing import finish

    def log(text: str) -> None:
        print(text, flush=True)
    out = Path(args.out)
    settings, clips = read_plan(args, log)
    if clips is None:
        log(f"{out}: already complete; {args.videos} is no longer there, so nothing can be added")
        return
    alone = args.shard == (1, 1)
    held = hold(out, f"{args.shard[0]}-of-{args.shard[1]}", alone)
    check_begun(out, settings)  # again: another process may have begun it meanwhile
    if not (out / "settings.json").exists():
        files.write_json(out / "settings.json", settings)
    given = listed_splits(clips)
    journal, seen = Journal(out, f"{args.shard[0]}-of-{args.shard[1]}"), set()
    reasons = [why_not(clip, given, seen) for clip in clips]
    mine = [clip for clip, reason in zip(clips, reasons, strict=True)
            if not reason and in_share(clip.video_id, args.shard)]
    made = make_missing(args, mine, journal)
    if alone:
        if others := len(journal.done.keys() - {key_of(clip) for clip in mine}):
            log(f"{out}: {others} made before are no longer asked for: their files stay, without rows")
        finish(args, clips, reasons, journal, log)
    else:
        log(f"{out}: share {args.shard[0]} of {args.shard[1]} is done, {made} made now; when all are done, "
            "the same command without --shard joins them")
    for file in held:
        file.close()
