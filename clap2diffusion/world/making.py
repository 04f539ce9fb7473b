"""The sound world as a data folder: sounds, pictures, manifest, and the plain captions that a judge reads."""

import argparse
import io
import time
from itertools import combinations, cycle
from pathlib import Path

import numpy as np
import soundfile

from clap2diffusion.base.files import write_atomic, write_json
from clap2diffusion.base.workers import in_processes
from clap2diffusion.dataset.manifest import SPLITS, begin_data_folder, write_manifest
from clap2diffusion.world import sound_world
from clap2diffusion.world.sound_world import CLASSES, SAMPLING_RATE


def plan_labels(split: str, n: int) -> list[tuple[str, ...]]:
    """Labels of a split's examples in order: every fifth holds two sounds, in train every other one.

    Single sounds go round the ten classes, pairs in train and val round the 36 that may be heard. In test
    unheard and heard pairs take turns. Each time round, a pair's two sides change places.
    """
    def both_ways(pairs):
        return cycle([pair if (i + turn) % 2 == 0 else pair[::-1]
                      for turn in range(2) for i, pair in enumerate(pairs)])
    heard = both_ways([pair for pair in combinations(CLASSES, 2) if not sound_world.is_unheard(pair)])
    unheard, single = both_ways(sound_world.UNHEARD_PAIRS), cycle((label,) for label in CLASSES)
    plan, every = [], 2 if split == "train" else 5
    for i in range(n):
        pairs = unheard if split == "test" and i // 5 % 2 == 0 else heard
        plan.append(next(pairs if i % every == every - 1 else single))
    return plan


def make_example(job: tuple[Path, int, int, int, tuple[str, ...]]) -> dict:
    """Draw, write and describe one example; it depends on nothing but its job."""
    out, seed, split_index, i, labels = job
    rng, split = np.random.default_rng([seed, split_index, i]), SPLITS[split_index]
    state = sound_world.low_and_high(sound_world.draw_state(rng, labels))
    row = {"image_file_name": f"images/{split}-{i:05d}.png", "audio_file_name": f"audio/{split}-{i:05d}.wav",
           "text": sound_world.caption(state, rng), "label": "+".join(state.labels), "split": split,
           "properties": {"density": state.density, "sources": [vars(source) for source in state.sources]}}
    picture, sound = io.BytesIO(), io.BytesIO()
    sound_world.draw_scene(state).save(picture, format="PNG")
    soundfile.write(sound, sound_world.synthesise(state), SAMPLING_RATE, subtype="PCM_16", format="WAV")
    write_atomic(out / row["image_file_name"], picture.getvalue())
    write_atomic(out / row["audio_file_name"], sound.getvalue())
    return row


def make_world(args: argparse.Namespace) -> None:
    """Write the sound world. After a stop the same command writes the files again, with the same bytes."""
    out, sizes = Path(args.out), {split: getattr(args, split) for split in SPLITS}
    settings = {"made_by": "world", "seed": args.seed, **sizes}
    held = begin_data_folder(out, settings)
    if held is None:
        return
    with held:
        began = time.time()
        jobs = [(out, args.seed, index, i, labels) for index, split in enumerate(SPLITS)
                for i, labels in enumerate(plan_labels(split, sizes[split]))]
        rows = in_processes(make_example, jobs, args.workers, "sound world", "example")
        write_json(out / "labels.json", {label: {language: sound_world.class_caption((label,), language)
                                                 for language in ("en", "ko")} for label in CLASSES})
        write_manifest(out, rows, settings)
        megabytes = sum(path.stat().st_size for path in out.rglob("*.*")) / 1e6
        counts, seconds = ", ".join(f"{n} {split}" for split, n in sizes.items()), time.time() - began
        print(f"{out}: {len(rows)} examples ({counts}), {megabytes:.0f} MB, {seconds:.0f} s", flush=True)
