"""Fill the tables of README.md and docs/*.md from the reports of runs, so that no figure is typed by hand.

    python tools/make_docs.py             # every block and picture whose sources are there
    python tools/make_docs.py --check     # exit code 1 where a table differs from its source; writes nothing

A block stands between `<!-- NAME -->` and `<!-- end -->` in any of these pages. Its source is a part of a
report that a run wrote for itself. The table of faults comes from the tests; docs/world.png is drawn here."""

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (first: it ends in one sentence where packages are missing)

# isort: split
import numpy as np
from PIL import Image

from clap2diffusion.base.exits import RunFailed, run_main
from clap2diffusion.base.files import write_atomic
from clap2diffusion.base.settings import new_parser
from clap2diffusion.pictures.sheets import png_bytes, tile
from clap2diffusion.world import sound_world as world

ROOT = Path(__file__).resolve().parents[1]
# name: (its report, how the block's first line begins, how the line after its last one begins; "" = the end)
BLOCKS = {**{name: ("tests/faults.py", "", "") for name in ("faults", "faults-data", "faults-pictures",
                                                                 "faults-videos", "faults-sharing")},
          "stages": ("runs/tiny/report.md", "| after", "| stage |"),
          "quarters": ("runs/tiny/report.md", "| stage |", "| tanh(gate)"),
          "evaluation": ("runs/tiny/evaluation.md", "", "Win rates"),
          "properties": ("runs/tiny/evaluation.md", "| property", "Diversity"),
          "control": ("runs/tiny/evaluation-noise.md", "", "Win rates"),
          "control-properties": ("runs/tiny/evaluation-noise.md", "| property", "Diversity"),
          "tuxpaint": ("runs/tuxpaint/report.md", "| after", "| stage |"),
          "small-models": ("assets/tiny/report.md", "| what", ""),
          "ablations": ("ablations/results.md", "", ""),
          "ablations-worked": ("ablations/worked.md", "", ""),
          "bench-gpu-sd15-h100": ("bench/results/gpu-sd15-NVIDIA-H100-80GB-HBM3.md", "", ""),
          "probe-world": ("bench/results/probe-world.md", "", ""),
          "probe-tuxpaint": ("bench/results/probe-tuxpaint.md", "", ""),
          **{f"bench-{name}": (f"bench/results/{name}-CPU.md", "", "") for name in (
              "step-tiny", "loop-tiny", "step-sd15", "peer-sd15", "cache-build-tiny", "cache-rows",
              "startup-tiny", "generation-tiny", "ways", "live", "peer-tiny", "memory-sd15-512-1",
              "memory-sd15-128-1", "memory-tiny-64-8", "kill-sweep", "long-run",
              "videos-300", "videos-20000", "sharing-tiny", "sharing-sd15", "comfyui-sd15")}}
PICTURES = {"samples.png": "runs/tiny/samples.png", "sweep.png": "runs/tiny/stage3/sweep.png",
            "tuxpaint.png": "runs/tuxpaint/samples.png"}


def excerpt(report: Path, first: str, after: str) -> str:
    """The lines of a report from one that begins with `first` to before one that begins with `after`."""
    lines = [line for line in report.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
    start = next((i for i, line in enumerate(lines) if line and line.startswith(first)), None)
    if start is None:
        raise RunFailed(f"{report}: no line begins with {first!r}; BLOCKS in tools/make_docs.py says so")
    ends = (i for i in range(start + 1, len(lines)) if after and lines[i].startswith(after))
    return "\n".join(lines[start:next(ends, len(lines))]).strip() + "\n"


def list_faults(block: str) -> str:
    """Cases of the suite of faults and what the user sees, as tests/test_faults_*.py state them: those of
    pictures, those of videos, those of other data, those of exports, or all the rest."""
    sys.path[:0] = [str(ROOT / "tests")]
    import test_faults_config as config
    import test_faults_data as data
    import test_faults_media as media
    import test_faults_runs as runs
    import test_faults_signals as signals
    import test_faults_videos as videos
    import test_sharing as sharing
    groups = {
        "faults-pictures": {"Pictures": data.PICTURES, "Odd pictures": data.ODD_PICTURES,
                            "Pictures of other kinds": data.OTHER_PICTURES},
        "faults-videos": {"Sounds of videos and of their containers": media.CASES, **videos.GROUPS},
        "faults-sharing": {"Exports": sharing.CASES},
        "faults-data": {"Sounds": data.SOUNDS, "Sounds of other kinds": data.OTHER_SOUNDS,
                        "Manifests": data.MANIFESTS},
        "faults": {"Configs and flags": config.CONFIGS, "Models": config.MODELS,
                   "Checkpoints": runs.CHECKPOINTS, "Run folders and data": runs.FOLDERS,
                   "Making and judging pictures, making data": runs.PICTURES,
                   "Full disks": [case for case, _ in runs.FULL_DISKS],
                   "Processes": signals.PROCESSES}}[block]
    phases = f", and a signal in each of these phases: {', '.join(signals.NAMES)}, setting up the environment"
    phases = phases if block == "faults" else ""
    lines = [f"{sum(map(len, groups.values()))} cases{phases}.", ""]
    for title, cases in groups.items():
        lines += [f"| {title} | exit | what you see |", "|---|---|---|", *(case.line() for case in cases), ""]
    return "\n".join(lines).strip() + "\n"


def draw_world(path: Path) -> None:
    """Three scenes of each class, and ten of two sounds."""
    pairs = [(c, world.CLASSES[(i + 4) % 10]) for i, c in enumerate(world.CLASSES)]
    states = [world.low_and_high(world.draw_state(np.random.default_rng([9, i]), names))
              for i, names in enumerate([(c,) for c in world.CLASSES] * 3 + pairs)]
    scenes = [world.draw_scene(state).resize((96, 96), Image.Resampling.BICUBIC) for state in states]
    write_atomic(path, png_bytes(tile(scenes, columns=10), optimize=True))


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*BLOCKS], default=[*BLOCKS], help="blocks to write or check")
    add("--check", action="store_true", help="change nothing; say which blocks differ from their sources")
    args = parser.parse_args()
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = {path: path.read_text("utf-8") for path in paths}
    stale = []  # blocks and their pages
    for name, (source, first, after) in {name: BLOCKS[name] for name in args.only}.items():
        block = re.compile(rf"(?<=<!-- {name} -->\n)(?:(?!<!--).)*(?=<!-- end -->)", re.S)
        found = [path for path, text in pages.items() if block.search(text)]
        if not found or not (ROOT / source).exists():
            print(f"{name}: " + (f"{source} is not there" if found else "no page has such a block"))
            continue
        content = (list_faults(name) if name.startswith("faults") else
                   excerpt(ROOT / source, first, after))
        for path in found:
            if block.search(pages[path])[0] != content:
                stale.append((name, path))
                pages[path] = block.sub(lambda _, content=content: content, pages[path])
    differing = ", ".join(name for name, _ in stale)
    print(("differ: " if args.check else "rewritten: ") + (differing or "none"))
    if args.check and stale:
        names = ", ".join(dict.fromkeys(path.name for _, path in stale))
        raise RunFailed(f"{names}: {differing} differ from their sources; run tools/make_docs.py")
    if not args.check:
        for path in {path for _, path in stale}:
            write_atomic(path, pages[path].encode())
        draw_world(ROOT / "docs/world.png")
        for name, source in PICTURES.items():
            if (ROOT / source).exists():
                shutil.copy(ROOT / source, ROOT / "docs" / name)


if __name__ == "__main__":
    run_main(main)
