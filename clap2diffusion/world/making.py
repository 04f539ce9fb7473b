"""The data folders that we make: the sound world, with the plain captions that a judge reads, and Tux Paint.

Tux Paint's stamps (Debian's tuxpaint-stamps-default) are real recordings and photographs."""

import argparse
import csv
import hashlib
import io
import json
import time
from collections import Counter
from itertools import combinations, cycle
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.workers import in_processes
from clap2diffusion.dataset.manifest import SPLITS, begin_data_folder, write_manifest
from clap2diffusion.pictures.sheets import write_png
from clap2diffusion.world import filming, sound_world
from clap2diffusion.world.filming import FORMATS
from clap2diffusion.world.sound_world import CLASSES, SAMPLING_RATE, UNHEARD_PAIRS

# Speech under the name of a plain sound: the letters' names, and Armstrong's words (the package's changelog).
SPOKEN = ("dreydl-", "apollo_lander")
INSTALL = "install them: sudo apt-get install -y tuxpaint-stamps-default"


def plan_labels(split: str, n: int) -> list[tuple[str, ...]]:
    """Labels of a split's examples in order: every fifth holds two sounds, in train every other one.
    Single sounds go round the ten classes, pairs in train and val round the 36 that may be heard. In test
    unheard and heard pairs take turns. Each time round, a pair's two sides change places."""
    def both_ways(pairs):
        return cycle([pair if (i + turn) % 2 == 0 else pair[::-1]
                      for turn in range(2) for i, pair in enumerate(pairs)])
    heard = both_ways([pair for pair in combinations(CLASSES, 2)
                       if pair not in UNHEARD_PAIRS and pair[::-1] not in UNHEARD_PAIRS])
    unheard, single = both_ways(UNHEARD_PAIRS), cycle((label,) for label in CLASSES)
    plan, every = [], 2 if split == "train" else 5
    for i in range(n):
        pairs = unheard if split == "test" and i // 5 % 2 == 0 else heard
        plan.append(next(pairs if i % every == every - 1 else single))
    return plan


def make_example(job: tuple[Path, int, int, int, tuple[str, ...], bool]) -> dict:
    """Draw, write and describe one example; it depends on nothing but its job, whose last item says whether
    it is written as a video too."""
    out, seed, split_index, i, labels, filmed = job
    rng, split = np.random.default_rng([seed, split_index, i]), SPLITS[split_index]
    state = sound_world.low_and_high(sound_world.draw_state(rng, labels))
    row = {"image_file_name": f"images/{split}-{i:05d}.png", "audio_file_name": f"audio/{split}-{i:05d}.wav",
           "text": sound_world.caption(state, rng), "label": "+".join(state.labels), "split": split,
           "properties": {"density": state.density, "sources": [vars(source) for source in state.sources]}}
    waveform, scene, sound = sound_world.synthesise(state), sound_world.draw_scene(state), io.BytesIO()
    soundfile.write(sound, waveform, SAMPLING_RATE, subtype="PCM_16", format="WAV")
    files.write_atomic(out / row["audio_file_name"], sound.getvalue())
    write_png(out / row["image_file_name"], scene)
    if filmed:
        name = video_name(split, i)
        files.write_atomic(out / "videos" / name, filming.film(scene, waveform, name.partition(".")[2]))
    return row


def video_name(split: str, i: int) -> str:
    return f"{split}-{i:05d}.{FORMATS[i % len(FORMATS)]}"


def write_video_list(out: Path, rows: list[dict]) -> None:
    """videos.csv: the list of the videos, for `prepare_data.py videos --labels`."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("file", "start_s", "label", "text", "split", "properties"))
    for row in rows:
        split, i = Path(row["image_file_name"]).stem.split("-")
        table.writerow((video_name(split, int(i)), 0, row["label"], row["text"], split,
                        json.dumps(row["properties"])))
    files.write_text(out / "videos.csv", text.getvalue())


def make_world(args: argparse.Namespace) -> None:
    """Write the sound world. After a stop the same command writes the files again, with the same bytes."""
    out, sizes = Path(args.out), {split: getattr(args, split) for split in SPLITS}
    settings = {"made_by": "world", "seed": args.seed, **sizes, **({"videos": True} if args.videos else {})}
    held = begin_data_folder(out, settings)
    if held is None:
        return
    with held:
        if args.videos:
            import av  # noqa: F401  (here it ends in one sentence if it is missing)
            (out / "videos").mkdir(exist_ok=True)
        began = time.time()
        jobs = [(out, args.seed, index, i, labels, args.videos) for index, split in enumerate(SPLITS)
                for i, labels in enumerate(plan_labels(split, sizes[split]))]
        rows = in_processes(make_example, jobs, args.workers, "sound world", "example")
        files.write_json(out / "labels.json", {label: {language: sound_world.class_caption((label,), language)
                                                 for language in ("en", "ko")} for label in CLASSES})
        if args.videos:
            write_video_list(out, rows)
        write_manifest(out, rows, settings)
        megabytes = sum(path.stat().st_size for path in out.rglob("*.*")) / 1e6
        counts, seconds = ", ".join(f"{n} {split}" for split, n in sizes.items()), time.time() - began
        print(f"{out}: {len(rows)} examples ({counts}), {megabytes:.0f} MB, {seconds:.0f} s", flush=True)


def same_recording(sounds: list[Path]) -> list[int]:
    """For each sound the index of the first one with the same recording.
    The package holds a recording encoded twice (badger and beaver) and one cut out of another (camel and
    dromedary). Bytes do not tell; the peak of the normalised cross-correlation does. All silences are one."""
    rate, window = 4000, 1 << 16  # 16 s; correlations are of twice that length, so nothing wraps round
    spectra, first, norms = [], [], []
    for i, path in enumerate(sounds):
        try:
            waveform, sound_rate = soundfile.read(path, dtype="float32", always_2d=True)
            waveform = soxr.resample(waveform.mean(1), sound_rate, rate)[:window]
        except soundfile.SoundFileError:
            waveform = np.zeros(1, np.float32)  # broken: whoever reads the manifest judges it
        norms.append(float(np.linalg.norm(waveform)))
        spectra.append(np.fft.rfft(waveform / max(norms[i], 1e-3), 2 * window).astype(np.complex64))
        peaks = [np.abs(np.fft.irfft(spectrum * spectra[i].conj())).max() for spectrum in spectra[:i]]
        matches = {first[j] for j in range(i) if peaks[j] > 0.6 or max(norms[i], norms[j]) < 1e-3}
        first.append(min(matches, default=i))
        first = [first[i] if k in matches else k for k in first]
    return first


def _copy_stamp(sound: Path, name: str, out: Path, size: int) -> tuple[dict, str, int] | str:
    """Copy a stamp: its row without a split, its picture's suffix, its rate in Hz; or what it lacks."""
    picture = next((p for p in (sound.with_suffix(".png"), sound.with_suffix(".svg")) if p.exists()), None)
    text = sound.with_suffix(".txt")
    if picture is None or not text.exists():
        return "no picture" if picture is None else "no text"
    words = text.read_text("utf-8", errors="replace").splitlines()
    if not words:
        return "an empty text"
    try:
        rate = soundfile.info(sound).samplerate
    except RuntimeError:
        return "a broken sound"
    content = picture.read_bytes()
    if picture.suffix == ".svg":
        import resvg_py
        options = {"width": size, "height": size, "skip_system_fonts": True}  # `size` is of the longer side
        content = bytes(resvg_py.svg_to_bytes(svg_path=str(picture), **options))
    row = {"image_file_name": f"images/{name}.png", "audio_file_name": f"audio/{name}.ogg",
           "text": words[0].strip(), "label": sound.stem}
    files.write_atomic(out / row["image_file_name"], content)
    files.write_atomic(out / row["audio_file_name"], sound.read_bytes())
    return row, picture.suffix, rate


def _copy_stamps(stamps: Path, sounds: list[Path], out: Path, size: int) -> tuple[list[dict], str]:
    """Copy all stamps: their rows, and what is in the folder in words."""
    rows, left_out, counts, kinds, rates = [], *(Counter() for _ in range(4))
    firsts = same_recording(sounds)
    for sound, first in zip(tqdm(sounds, **bar_options(desc="stamps", unit="stamp")), firsts):
        copied = _copy_stamp(sound, "-".join(sound.relative_to(stamps).with_suffix("").parts), out, size)
        if isinstance(copied, str):
            left_out[copied] += 1
            continue
        row, kind, rate = copied
        # 70 % train, 15 % val, 15 % test, by a hash: stamps with one recording's bytes share a split
        place = hashlib.sha256(sounds[first].read_bytes()).digest()[0] / 256
        rows.append(row | {"split": "train" if place < 0.70 else "val" if place < 0.85 else "test"})
        for counter, value in ((counts, rows[-1]["split"]), (kinds, kind), (rates, rate)):
            counter[value] += 1
    return rows, (f"{len(rows)} stamps ({', '.join(f'{counts[s]} {s}' for s in SPLITS)}; "
                  f"{', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}; sample rates "
                  f"{', '.join(f'{rate} Hz x {n}' for rate, n in sorted(rates.items()))}"
                  f"{''.join(f'; {n} left out: {why}' for why, n in left_out.items())})")


def make_tuxpaint(args: argparse.Namespace) -> None:
    """Copy each stamp that has a picture, a sound that is not speech, and a name. Raises UserError."""
    stamps, out, settings = Path(args.stamps), Path(args.out), {"made_by": "tuxpaint", "size": args.size}
    sounds = sorted(path for path in stamps.rglob("*.ogg") if "_desc" not in path.stem
                    and not path.name.startswith(SPOKEN) and "symbols" not in path.relative_to(stamps).parts)
    if not sounds:
        raise UserError(f"{stamps}: holds no stamps with sounds; {INSTALL}")
    held = begin_data_folder(out, settings)
    if held is None:
        return
    with held:
        rows, summary = _copy_stamps(stamps, sounds, out, args.size)
        if not rows:
            raise UserError(f"{stamps}: holds sounds but no stamps with picture and text; {INSTALL}")
        write_manifest(out, rows, settings)
        print(f"{out}: {summary}. The stamps are under the GPL-2: see the package's copyright file.")
