"""Make a data folder: sounds, pictures and the manifest metadata.jsonl that joins them.

    python prepare_data.py world --out data/world             # the built-in sound world, nothing to download
    python prepare_data.py tuxpaint --out data/tuxpaint       # real recordings and photographs of Tux Paint's stamps
    python prepare_data.py check --data-root my_data          # every row of a folder that is unusable or suspicious

A manifest has one JSON object a line: image_file_name, audio_file_name, text, label, split (train, val or test). The
sound world adds `properties`: what was drawn, for measuring later, and labels.json: a plain caption of each label in
English and Korean, for judging. The same flags always give the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

from config import Number, RunFailed, UserError, new_parser, read_json, run_main, write_atomic, write_json

SPLITS = ("train", "val", "test")
# Speech under the name of a plain sound: the letters' names, and Armstrong's words (the package's changelog).
SPOKEN = ("dreydl-", "apollo_lander")
APT_LINE = "sudo apt-get install -y tuxpaint-stamps-default"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="ten synthesised sounds and their scenes", allow_abbrev=False)
    world.add_argument("--out", default="data/world", help="folder to write")
    world.add_argument("--seed", type=Number(int, 0), default=0, help="seed of every example")
    world.add_argument("--train", type=Number(int, 1), default=4800, help="training examples")
    world.add_argument("--val", type=Number(int, 1), default=100, help="validation examples")
    world.add_argument("--test", type=Number(int, 1), default=300, help="test examples")
    world.add_argument("--workers", type=Number(int, 1, 64), default=2, help="processes")
    tux = commands.add_parser("tuxpaint", help="stamps of Debian's tuxpaint-stamps-default", allow_abbrev=False)
    tux.add_argument("--out", default="data/tuxpaint", help="folder to write")
    tux.add_argument("--stamps", default="/usr/share/tuxpaint/stamps", help="where the package lies")
    tux.add_argument("--size", type=Number(int, 16, 4096), default=512, help="side in pixels of a rendered SVG")
    check = commands.add_parser("check", help="list what is unusable or suspicious in a data folder; changes nothing", allow_abbrev=False)
    check.add_argument("--data-root", default="data/world", help="folder with metadata.jsonl")
    check.add_argument("--max-bad-share", type=Number(float, 0, 1), default=0.01, help="share of unusable rows above which the exit code is 2")
    check.add_argument("--max-suspicious-share", type=Number(float, 0, 1), default=1.0, help="the same for suspicious ones")
    check.add_argument("--show", type=Number(int, 0), default=20, help="rows listed of each kind (0 = all)")
    check.add_argument("--workers", type=Number(int, 1, 64), default=2, help="processes")
    return parser


def manifest_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@contextlib.contextmanager
def locked(out: Path):
    """Hold the folder against other processes that make the same data. A POSIX lock: worker processes do not inherit it, so kill -9 frees it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"waiting for another process that is making {out}", flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def already_made(out: Path, settings: dict) -> bool:
    """True, with a line, if the folder was made with the same settings; the manifest is written last.

    Raises:
        UserError: the folder holds data made with other settings, or cannot be written.
    """
    if (out / "metadata.jsonl").exists():
        found = read_json(out / "settings.json") if (out / "settings.json").exists() else None
        if found != settings:
            raise UserError(f"{out}: holds data made with {json.dumps(found)}, asked for {json.dumps(settings)}; give "
                            "another --out, or delete that folder first")
        print(f"{out}: already complete", flush=True)
        return True
    try:
        for name in ("audio", "images"):
            (out / name).mkdir(parents=True, exist_ok=True)
            for stale in (out / name).glob(".*.tmp"):  # left by a run that was killed
                stale.unlink()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    return False


def finish(out: Path, rows: list[dict], settings: dict) -> None:
    for stale in out.rglob(".*.tmp"):  # a killed run's workers may have written on for a moment after our start
        stale.unlink()
    write_json(out / "settings.json", settings)
    write_atomic(out / "metadata.jsonl", manifest_lines(rows))


# --- the sound world ----------------------------------------------------------------------------------------------------

def plan_labels(split: str, n: int) -> list[tuple[str, ...]]:
    """Labels of a split's examples in order: every fifth holds two sounds, in train every other; the others go round
    the ten classes.

    In train and val the pairs go round the 36 that may be heard; in test unheard and heard ones take turns. The next time
    round a pair's two sides are changed over.
    """
    from itertools import combinations, cycle

    import sound_world

    def both_ways(pairs):
        turned = [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]
        return cycle([pair[::-1] for pair in turned] + turned)
    heard = both_ways([pair for pair in combinations(sound_world.CLASSES, 2) if not sound_world.is_unheard(pair)])
    unheard, single = both_ways(sound_world.UNHEARD_PAIRS), cycle(sound_world.CLASSES)
    plan: list[tuple[str, ...]] = []
    for i in range(n):
        if i % 2 == 0 if split == "train" else i % 5 < 4:
            plan.append((next(single),))
        else:
            plan.append(next(unheard) if split == "test" and i // 5 % 2 == 0 else next(heard))
    return plan


def start_worker(parent: int) -> None:
    """A worker waits for its next job for ever when its parent is killed with -9: leave as soon as it is gone. Signals are
    the parent's: Ctrl-C and a closed terminal reach the whole process group."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_processes(function, jobs: list, workers: int, what: str, unit: str) -> list:
    """[function(job) for job in jobs] by several processes, with a bar; a signal drops the jobs that have not begun.

    Raises:
        RunFailed: one of the processes was killed.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import active_children

    from tqdm import tqdm
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))
    try:
        return list(tqdm(pool.map(function, jobs, chunksize=8), total=len(jobs), desc=what, unit=unit))
    except BrokenProcessPool:
        raise RunFailed(f"{what}: a process of it was killed, perhaps for want of memory; run the same command again, with fewer --workers") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + 5  # for the jobs that have begun
        for worker in active_children():  # one waits for ever if a killed one held the queue's lock, and it ignores the pool's SIGTERM
            worker.join(max(0, deadline - time.monotonic()))
            worker.kill()


def make_example(job: tuple[Path, int, int, int, tuple[str, ...]]) -> dict:
    """Draw, write and describe one example; depends on nothing but its job."""
    import numpy as np
    import soundfile

    import sound_world
    out, seed, split_index, i, labels = job
    rng = np.random.default_rng([seed, split_index, i])
    state = sound_world.low_and_high(sound_world.draw_state(rng, labels))
    name = f"{SPLITS[split_index]}-{i:05d}"
    row = {"image_file_name": f"images/{name}.png", "audio_file_name": f"audio/{name}.wav",
           "text": sound_world.caption(state, rng), "label": "+".join(state.labels), "split": SPLITS[split_index],
           "properties": {"density": state.density, "sources": [vars(source) for source in state.sources]}}
    picture, sound = io.BytesIO(), io.BytesIO()
    sound_world.draw_scene(state).save(picture, format="PNG")
    soundfile.write(sound, sound_world.synthesise(state), sound_world.SAMPLING_RATE, subtype="PCM_16", format="WAV")
    write_atomic(out / row["image_file_name"], picture.getvalue())
    write_atomic(out / row["audio_file_name"], sound.getvalue())
    return row


def make_world(args: argparse.Namespace) -> None:
    """Write the sound world. A stopped run goes on; files that are there are written again with the same bytes."""
    out, settings = Path(args.out), {"made_by": "world", "seed": args.seed,
                                     **{split: getattr(args, split) for split in SPLITS}}
    if already_made(out, settings):
        return
    import sound_world
    began = time.time()
    jobs = [(out, args.seed, index, i, labels) for index, split in enumerate(SPLITS)
            for i, labels in enumerate(plan_labels(split, getattr(args, split)))]
    rows = in_processes(make_example, jobs, args.workers, "sound world", "example")
    write_json(out / "labels.json", {label: {language: sound_world.class_caption((label,), language)
                                             for language in ("en", "ko")} for label in sound_world.CLASSES})
    finish(out, rows, settings)
    size = sum(path.stat().st_size for path in out.rglob("*.*")) / 1e6
    print(f"{out}: {len(rows)} examples ({', '.join(f'{getattr(args, s)} {s}' for s in SPLITS)}), {size:.0f} MB, "
          f"{time.time() - began:.0f} s", flush=True)


# --- Tux Paint's stamps -------------------------------------------------------------------------------------------------

def same_recording(sounds: list[Path]) -> list[int]:
    """For each sound the index of the first one with the same recording.

    The package holds the same recording encoded twice (badger and beaver) and cut out of a longer one (camel and
    dromedary), so bytes do not tell: the peak of the normalised cross-correlation does. All silences are one.
    """
    import numpy as np
    import soundfile
    import soxr
    rate, window = 4000, 1 << 16  # 16 s; correlations are of twice that length, so nothing wraps round
    spectra, first, silent = [], [], []
    for i, path in enumerate(sounds):
        try:
            waveform, sound_rate = soundfile.read(path, dtype="float32", always_2d=True)
            waveform = soxr.resample(waveform.mean(1), sound_rate, rate)[:window]
        except soundfile.SoundFileError:
            waveform = np.zeros(1, np.float32)  # broken: the reader of the manifest judges it
        norm = float(np.linalg.norm(waveform))
        spectra.append(np.fft.rfft(waveform / max(norm, 1e-3), 2 * window).astype(np.complex64))
        if norm < 1e-3:
            silent.append(i)
        peaks = [np.abs(np.fft.irfft(spectrum * spectra[i].conj())).max() for spectrum in spectra[:i]]
        matches = {first[j] for j in range(i) if peaks[j] > 0.6 or (norm < 1e-3 and j in silent)}
        first.append(min(matches, default=i))
        first = [first[i] if k in matches else k for k in first]
    return first


def split_of(content: bytes) -> str:
    """70 % train, 15 % val, 15 % test by the bytes of a recording's first sound, so that its stamps share a split."""
    place = hashlib.sha256(content).digest()[0] / 256
    return "train" if place < 0.70 else "val" if place < 0.85 else "test"


def render_svg(path: Path, size: int) -> bytes:
    """An SVG as PNG bytes with its transparency, `size` pixels on its longer side."""
    import resvg_py
    return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True))


def make_tuxpaint(args: argparse.Namespace) -> None:
    """Copy each stamp that has a picture, a sound that is no speech, and a name."""
    stamps, out = Path(args.stamps), Path(args.out)
    sounds = sorted(p for p in stamps.rglob("*.ogg")
                    if "_desc" not in p.stem and not p.name.startswith(SPOKEN)
                    and "symbols" not in p.relative_to(stamps).parts)
    if not sounds:
        raise UserError(f"{stamps}: holds no stamps with sounds; install them: {APT_LINE}")
    settings = {"made_by": "tuxpaint", "size": args.size}
    if already_made(out, settings):
        return
    import soundfile
    from tqdm import tqdm
    rows, kinds, rates, left_out = [], Counter(), Counter(), Counter()
    firsts = same_recording(sounds)
    for sound, first in zip(tqdm(sounds, desc="stamps", unit="stamp"), firsts, strict=True):
        picture = next((p for p in (sound.with_suffix(s) for s in (".png", ".svg")) if p.exists()), None)
        text = sound.with_suffix(".txt")
        if picture is None or not text.exists():
            left_out["no picture" if picture is None else "no text"] += 1
            continue
        words = text.read_text("utf-8", errors="replace").splitlines()
        try:
            rate = soundfile.info(sound).samplerate
        except RuntimeError:
            rate = 0
        if not rate or not words:
            left_out["a broken sound" if words else "an empty text"] += 1
            continue
        relative = sound.relative_to(stamps).with_suffix("")
        name = "-".join(relative.parts)
        if picture.suffix == ".svg":
            write_atomic(out / f"images/{name}.png", render_svg(picture, args.size))
        else:
            write_atomic(out / f"images/{name}.png", picture.read_bytes())
        write_atomic(out / f"audio/{name}.ogg", sound.read_bytes())
        kinds[picture.suffix] += 1
        rates[rate] += 1
        rows.append({"image_file_name": f"images/{name}.png", "audio_file_name": f"audio/{name}.ogg",
                     "text": words[0].strip(), "label": relative.name,
                     "split": split_of(sounds[first].read_bytes())})
    if not rows:
        raise UserError(f"{stamps}: holds sounds but no stamps with picture and text; install them: {APT_LINE}")
    finish(out, rows, settings)
    counts = Counter(row["split"] for row in rows)
    print(f"{out}: {len(rows)} stamps ({', '.join(f'{counts[s]} {s}' for s in SPLITS)}; "
          f"{', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}; sample rates "
          f"{', '.join(f'{rate} Hz x {n}' for rate, n in sorted(rates.items()))}"
          + "".join(f"; {n} left out: {why}" for why, n in left_out.items())
          + "). The stamps are under the GPL-2: see the package's copyright file.", flush=True)


# --- looking a data folder over -----------------------------------------------------------------------------------------

SMALL_SIDE, LONG_SHAPE, SHORT_CLIP_S, CLIPPED_SHARE = 64, 3, 1.0, 5e-3


def look_at(job: tuple[str, Path]) -> tuple[str, list[tuple[str, str]]]:
    """("sound" or "picture", path) -> (why it cannot be used or "", [(what is suspicious, the detail)]).

    Of a sound ten seconds are decoded; a picture is decoded whole, as training does.
    """
    import re

    import numpy as np

    import data
    kind, path = job
    try:
        if kind == "picture":
            with data.open_image(path) as image:
                (width, height), found = image.size, []
            data.load_image(path, 64)
            if min(width, height) < SMALL_SIDE:
                found.append(("tiny picture", f"{width}x{height} pixels, a side under {SMALL_SIDE}"))
            if max(width, height) > LONG_SHAPE * min(width, height):
                found.append(("extreme picture", f"{width}x{height} pixels, more than {LONG_SHAPE}:1; the middle square is all that is used"))
            return "", found
        with data.open_audio(path) as sound:
            seconds, rates = sound.frames / sound.samplerate, re.search(r"Bytes/sec +: (\d+) \(should be (\d+)\)", sound.extra_info)
        blocks, rate = data.read_windows(path, 10.0)
    except data.BadFile as error:
        return str(error), []
    found = [(flag, "its features are those of silence") for flag in data.to_mono(blocks)[1]]
    peak = float(np.abs(blocks[0]).max())
    inner = blocks[0][1:-1]
    flat = (np.abs(inner) >= 0.98 * peak) & (inner == blocks[0][:-2]) & (inner == blocks[0][2:])  # the top of a loud sine is round
    if peak >= 0.98 and flat.mean() > CLIPPED_SHARE:
        found.append(("clipped", f"{flat.mean():.1%} of its samples stand at full scale with their neighbours"))
    if seconds < SHORT_CLIP_S:
        found.append(("shorter than a second", f"{seconds:.2f} s"))
    if rates:
        found.append(("wrong rate claimed", f"its header says {rate} Hz and {rates[1]} bytes a second, which are {rates[2]}"))
    return "", found


def same_content(paths: list[Path]) -> dict[Path, Path]:
    """Path -> the first of the paths with the same bytes, where that is another one. Only files of one size are read."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        if path.is_file():
            by_size.setdefault(path.stat().st_size, []).append(path)
    first, again = {}, {}
    for path in (path for same in by_size.values() if len(same) > 1 for path in same):
        with path.open("rb") as file:
            earlier = first.setdefault(hashlib.file_digest(file, "sha256").digest(), path)
        if earlier != path:
            again[path] = earlier
    return again


def names_label(text: str, label: str) -> bool:
    """Whether a caption says its label (of `dog_barking+rain` one of the two) in so many words."""
    def words(what: str) -> str:
        return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in what.casefold()).split())} "
    return any(words(part).strip() and words(part) in words(text) for part in label.split("+"))


def check_data(args: argparse.Namespace) -> None:
    """List a data folder's unusable and suspicious rows by kind.

    Raises:
        UserError: there is no manifest, or more rows than the limits are unusable or suspicious.
    """
    from data import Row, read_manifest
    rows, bad = read_manifest(args.data_root, print)
    found: dict[str, list[str]] = {"unusable": [str(row) for row in bad]}
    files = list(dict.fromkeys([("sound", row.audio_path) for row in rows] + [("picture", row.image_path) for row in rows]))
    seen = dict(zip(files, in_processes(look_at, files, args.workers, "checking", "file")))
    again = {kind: same_content([path for one, path in files if one == kind]) for kind in ("sound", "picture")}
    splits: dict[Path, Row] = {}
    suspicious = set()
    for row in rows:
        kinds = []
        for kind, path in (("picture", row.image_path), ("sound", row.audio_path)):
            reason, more = seen[kind, path]
            if reason:
                found["unusable"].append(f"{row.where}: {kind} {path.name}: {reason}")
                break
            kinds += [(what, f"{kind} {path.name}: {detail}") for what, detail in more]
            earlier = again[kind].get(path)
            other = splits.setdefault(earlier or path, row)
            if other.split != row.split:
                kinds.append((f"{kind} in two splits", f"{path.name} is in {row.split} here and in {other.split} at {other.where}"))
            elif earlier:
                kinds.append((f"{kind} twice", f"{path.name} has the content of {earlier.name}"))
        else:
            if not row.text.strip():
                kinds.append(("empty caption", "the row has no words"))
            elif row.label and names_label(row.text, row.label):
                kinds.append(("caption names the label", f"{row.text[:60]!r} says {row.label!r}"))
            suspicious |= {row.where} if kinds else set()
            for what, detail in kinds:
                found.setdefault(what, []).append(f"{row.where}: {detail}")
    for what, lines in found.items():
        print(f"{what}: {len(lines)}")
        shown = lines[:args.show or None]
        print("".join(f"  {line}\n" for line in shown), end="")
        if len(lines) > len(shown):
            print(f"  ... and {len(lines) - len(shown)} more (--show 0 lists all)")
    total, counts = len(rows) + len(bad), Counter(row.split for row in rows)
    summary = (f"{args.data_root}: {total} rows ({', '.join(f'{counts[split]} {split}' for split in SPLITS)}), "
               f"{len(found['unusable'])} unusable, {len(suspicious)} suspicious")
    for n, limit, flag in ((len(found["unusable"]), args.max_bad_share, "--max-bad-share"),
                           (len(suspicious), args.max_suspicious_share, "--max-suspicious-share")):
        if n > limit * total:
            raise UserError(f"{summary}; mend or remove what is listed above, or raise {flag} {limit:g}")
    print(summary, flush=True)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command == "check":
        return check_data(args)
    with locked(Path(args.out)) if args.command == "world" or Path(args.stamps).is_dir() else contextlib.nullcontext():
        {"world": make_world, "tuxpaint": make_tuxpaint}[args.command](args)


if __name__ == "__main__":
    run_main(main)
