"""Real recordings and photographs as a data folder: Tux Paint's stamps (Debian's tuxpaint-stamps-default)."""

import argparse
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.files import write_atomic
from clap2diffusion.dataset.manifest import SPLITS, begin_data_folder, write_manifest

# Speech under the name of a plain sound: the letters' names, and Armstrong's words (the package's changelog).
SPOKEN = ("dreydl-", "apollo_lander")
INSTALL = "install them: sudo apt-get install -y tuxpaint-stamps-default"


def same_recording(sounds: list[Path]) -> list[int]:
    """For each sound the index of the first one with the same recording.

    The package holds a recording encoded twice (badger and beaver) and one cut out of another (camel and
    dromedary). Bytes do not tell; the peak of the normalised cross-correlation does. All silences are one.
    """
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


def split_of(content: bytes) -> str:
    """70 % train, 15 % val, 15 % test, by a hash: stamps with one recording's bytes share a split."""
    place = hashlib.sha256(content).digest()[0] / 256
    return "train" if place < 0.70 else "val" if place < 0.85 else "test"


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
    write_atomic(out / row["image_file_name"], content)
    write_atomic(out / row["audio_file_name"], sound.read_bytes())
    return row, picture.suffix, rate


def _copy_stamps(stamps: Path, sounds: list[Path], out: Path, size: int) -> tuple[list[dict], str]:
    """Copy all stamps: their rows, and what is in the folder in words."""
    rows, left_out, counts, kinds, rates = [], *(Counter() for _ in range(4))
    firsts = same_recording(sounds)
    for sound, first in zip(tqdm(sounds, desc="stamps", unit="stamp"), firsts):
        copied = _copy_stamp(sound, "-".join(sound.relative_to(stamps).with_suffix("").parts), out, size)
        if isinstance(copied, str):
            left_out[copied] += 1
            continue
        row, kind, rate = copied
        rows.append(row | {"split": split_of(sounds[first].read_bytes())})
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
