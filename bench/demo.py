"""Pictures a second of the page's tab Live: sound in pieces as a microphone sends them, a picture of each.

    python bench/demo.py                    # after the default run; writes bench/results/live-*
    python bench/demo.py --audio rain.wav   # another sound
    python bench/demo.py --smoke            # of an adapter that was trained for one step

Each piece goes through Page.feed() and Page.now(), which the tab's two events call: the
window's embedding, the few steps, the picture. CPU seconds of a picture are those of all threads."""

import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the page, before torch loads

# isort: split
import bench_tools as tools
import numpy as np
import soundfile

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.settings import Number, model_flags, new_parser
from clap2diffusion.demo.own_data import OwnData
from clap2diffusion.pictures.inputs import adapter_facts, check_models, find_adapter

PIECE_S = 0.25
PARSER = new_parser(__doc__)
model_flags(PARSER)
add = PARSER.add_argument
add("--data-root", default="", help="where its data lie now ('' = where they were in training)")
add("--audio", default="", help="sound to stream, again and again ('' = the examples of the run's data)")
add("--pictures", type=Number(int, 2), default=60, help="pictures that are timed, after 5 to warm up")
add("--smoke", action="store_true", help="two pictures, of a small sound world and an adapter made for it")


def pieces(args, data: OwnData):
    """Pieces (samples,) of PIECE_S seconds, for ever, with their rate in Hz."""
    paths = [args.audio] if args.audio else [row.audio_path for row in data.examples]
    if not paths:
        raise UserError(f"{data.why}; give a sound with --audio")
    while True:
        for path in paths:
            samples, rate = soundfile.read(path, dtype="int16")
            for at in range(0, len(samples), round(PIECE_S * rate)):
                yield rate, samples[at:at + round(PIECE_S * rate)]


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    from clap2diffusion.demo.page import Page  # here: --help needs no gradio
    from clap2diffusion.demo.studio import LIVE_SCHEDULER, LIVE_STEPS, Studio
    if args.smoke:
        args.pictures, args.run, args.data_root = 2, place / "run", str(place / "world")
        flags = tools.stage_flags(tools.make_world(place / "world", 16), tools.TINY, 64)
        tools.call("train_stage1.py", *flags, "--run", args.run, "--batch-size", 1, "--steps", 1,
                   "--val-clips", 2)
    adapter_path = find_adapter(args.run)
    facts = adapter_facts(adapter_path)
    base, data = check_models(args, facts, adapter_path), OwnData(args.data_root, adapter_path)
    page, stream = Page(Studio(adapter_path, facts, base, data, args.clap_model, args.device), place), None
    took, cpu = [], []
    for i, piece in zip(range(args.pictures + 5), pieces(args, data)):
        began, worked = time.perf_counter(), time.process_time()
        stream = page.feed(piece, stream)
        picture, _, message = page.now("", 1.0, 0, stream)
        if message:
            raise UserError(message)
        if i >= 5:
            took.append(time.perf_counter() - began)
            cpu.append(time.process_time() - worked)
    rows = [{"picture": f"{picture.width} px", "pictures a second": round(len(took) / sum(took), 2),
             "s a picture, median": float(np.median(took)), "slowest, s": max(took),
             "CPU s a picture": float(np.mean(cpu))}]
    about = (f"{LIVE_STEPS} steps of {LIVE_SCHEDULER}, pieces of {PIECE_S} s, {args.pictures} pictures in a "
             "row")
    tools.write_results("live", about, rows, device=args.device)
