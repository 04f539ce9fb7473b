"""Write the README's tables and pictures from the files that the runs left, so that no figure in them is typed by hand.

    python tools/make_readme.py                   # every block and picture whose sources are there
    python tools/make_readme.py --check           # exit code 1 where a table differs from its source; changes nothing

A block stands between `<!-- NAME -->` and `<!-- end -->`. Sources: runs/tiny and runs/tuxpaint (stages and evaluation),
ablations/results.md, assets/tiny/report.json; docs/world.png is drawn here.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import RunFailed, new_parser, read_json, run_main, write_atomic  # noqa: E402

SHOWN_IN = {"loudness": "size", "pitch": "height", "rate": "marks", "density": "sky"}


def interval(values: list[float] | None, digits: int = 3) -> str:
    return "" if values is None else f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def table(head: list[str], rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def stages(run: Path) -> list[str]:
    """Each stage's last validation, and where the gate went."""
    results = {n: read_json(run / f"stage{n}" / "result.json") for n in (1, 2, 3)}
    keys = ("val_right", "val_silence", "val_other", "silence_minus_right", "other_minus_right")
    sweep = min(results[3]["sweep_after"], key=lambda row: row["loss"])
    memory = max(mb for result in results.values() for mb in result["peak_memory_mb"].values())
    return [*table(["after", "right sound", "silence", "another's sound", "silence - right", "other - right"],
                   [[f"stage {n}", *(interval(result["validation"][key], 5) for key in keys)]
                    for n, result in results.items()]), "",
            "Steps: " + " + ".join(str(result["steps"]) for result in results.values())
            + f"; best weights: step {results[1]['best_step']} of stage 1, step {results[2]['best_step']} of stage 2. tanh(gate) went "
            f"from 0 to {results[3]['tanh_gate']:.3f}, {'inside' if results[3]['in_window'] else 'outside'} the window "
            f"{results[3]['window'][0]:g} to {results[3]['window'][1]:g}; the sweep's lowest loss is at {sweep['tanh_gate']:g}. Largest difference "
            f"between our forward and stock diffusers: {max(result['stock_difference'] for result in results.values()):.1e}. Peak memory "
            f"{memory:.0f} MB. Seconds: {', '.join(str(round(result['seconds'])) for result in results.values())}."]


def evaluation(path: Path) -> list[str]:
    e = read_json(path)
    accuracy = ", ".join(f"{language} {interval(value)}" for language, value in e["judge"]["accuracy"].items())
    rows = [[row["title"], row["n"], *(interval(row.get(kind)) for kind in ("right", "silence", "other", "real")),
             "" if row["chance"] is None else f"{row['chance']:.3f}"] for row in e["measures"].values()]
    return [f"{e['n']} clips ({e['n_single']} of one sound, {e['n_pairs']} of two), seed {e['settings']['seed']}, guidance "
            f"{e['settings']['guidance']:g}, {e['settings']['steps']} steps; the judge is right on real pictures: {accuracy}. Mean (or the "
            "statistic named) and 95 % bootstrap interval over clips:", "",
            *table(["measure", "n", "right sound", "silence", "another's sound", "real pictures", "chance"], rows)]


def properties(path: Path) -> list[str]:
    return table(["property, Spearman's rho", "n", "right sound", "shuffled", "real renders"],
                 [[f"{name} -> {SHOWN_IN[name]}", row["n"], *(interval(row[kind]) for kind in ("right", "shuffled", "real"))]
                  for name, row in read_json(path)["properties"].items()])


def small_models(path: Path) -> list[str]:
    r = read_json(path)
    parameters, t2i, clap, judge = ({name: f"{n:,}" for name, n in r["parameters"].items()}, r["text_to_image"], r["clap"],
                                    r["judge"])
    rows = [["VAE, 64 px to 16 x 16 x 4", parameters["vae"], "PSNR of reconstructions", r["vae"]["n"], f"{r['vae']['psnr_db']:.1f} dB"],
            ["UNet and text encoder", f"{parameters['unet']} + {parameters['text_encoder']}",
             "text-to-image shows the class asked for, by the judge", t2i["n"], f"{t2i['right']:.3f}"],
            ["", "", "shows both of a pair (chance 1 in 45)", t2i["pairs_n"], f"{t2i['pairs_both_found']:.3f}"],
            ["CLAP, 512-wide", parameters["clap"], "class of a sound by caption, English / Korean", clap["n"],
             f"{clap['right_en']:.3f} / {clap['right_ko']:.3f}"],
            ["judge, SigLIP-like", parameters["judge"], "class of a real render, English / Korean", judge["n"],
             f"{judge['right_en']:.3f} / {judge['right_ko']:.3f}"],
            ["", "", "both of a pair in a real render", judge["pairs_n"], f"{judge['pairs_both_found']:.3f}"]]
    return [*table(["model", "parameters", "measured", "n", "value"], rows), "",
            f"{r['megabytes']} MB; seconds of training: " + ", ".join(f"{k} {v:.0f}" for k, v in r["seconds"].items()) + "."]


BLOCKS = {"stages": (stages, "runs/tiny"), "evaluation": (evaluation, "runs/tiny/evaluation.json"),
          "properties": (properties, "runs/tiny/evaluation.json"),
          "control": (evaluation, "runs/tiny/evaluation-noise.json"),
          "control-properties": (properties, "runs/tiny/evaluation-noise.json"),
          "tuxpaint": (stages, "runs/tuxpaint"), "small-models": (small_models, "assets/tiny/report.json"),
          "ablations": (lambda path: path.read_text().splitlines(), "ablations/results.md")}


PICTURES = {"samples.png": "runs/tiny/samples.png", "sweep.png": "runs/tiny/stage3/sweep.png",
            "tuxpaint.png": "runs/tuxpaint/samples.png"}


def draw_world(path: Path) -> None:
    """Three scenes of each class, and ten of two sounds."""
    import numpy as np
    from PIL import Image

    import sound_world as world
    labels = [(c,) for _ in range(3) for c in world.CLASSES] + [(c, world.CLASSES[(i + 4) % 10]) for i, c in enumerate(world.CLASSES)]
    page = Image.new("RGB", (10 * 100 - 4, 4 * 100 - 4), "white")
    for i, names in enumerate(labels):
        names = tuple(sorted(names, key=world.CLASSES.index))
        scene = world.draw_scene(world.draw_state(np.random.default_rng([9, i]), names))
        page.paste(scene.resize((96, 96), Image.Resampling.BICUBIC), (i % 10 * 100, i // 10 * 100))
    page.save(path, optimize=True)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=[*BLOCKS], default=[*BLOCKS], help="blocks to write or check")
    parser.add_argument("--check", action="store_true", help="change nothing; say which blocks differ from their sources")
    args = parser.parse_args(argv)
    readme, differing = ROOT / "README.md", []
    text = readme.read_text()
    for name in args.only:
        write, source = BLOCKS[name]
        found = re.search(rf"(<!-- {name} -->\n)((?:(?!<!--).)*)(<!-- end -->)", text, re.S)
        if not found or not (ROOT / source).exists():
            print(f"{name}: " + ("no such block in README.md" if not found else f"{source} is not there"))
            continue
        block = "\n".join(write(ROOT / source)) + "\n"
        if block != found[2]:
            differing.append(name)
            text = text[:found.start(2)] + block + text[found.end(2):]
    print("differ: " + (", ".join(differing) or "none"))
    if args.check and differing:
        raise RunFailed(f"README.md: {', '.join(differing)} differ from their sources; run python tools/make_readme.py")
    if not args.check:
        write_atomic(readme, text.encode())
        draw_world(ROOT / "docs/world.png")
        for name, source in PICTURES.items():
            if (ROOT / source).exists():
                shutil.copy(ROOT / source, ROOT / "docs" / name)


if __name__ == "__main__":
    run_main(main)
