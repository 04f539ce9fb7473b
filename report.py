"""What a run achieved: samples.png, report.json and report.md in the run folder, and its final adapter.safetensors.

    python report.py --run runs/tiny

The contact sheet has one column for each held-out sound: its spectrogram with its name, the true scene, the picture
after each stage, and the picture with the sound replaced by silence. All pictures of a column begin with the same noise
and have no text prompt.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from config import GUIDANCE, Number, UserError, new_parser, read_json, run_main, write_atomic, write_json

STAGES = ("stage1", "stage2", "stage3")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
CELL = 128  # pixels


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--run", default="runs/tiny", help="run folder with the three finished stages")
    add("--columns", type=Number(int, 1, 32), default=10, help="held-out sounds on the sheet, one a label if it can be")
    add("--guidance", type=Number(float, 1, 100), default=GUIDANCE, help="classifier-free guidance of the pictures")
    add("--steps", type=Number(int, 1, 1000), default=25, help="sampling steps of the pictures")
    add("--seed", type=Number(int, 0, 2 ** 31 - 1), default=0, help="seed of the starting noise; column i takes seed + i")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    return parser


def pick_rows(rows: list, n: int) -> list:
    """n test rows (validation rows if there is no test split): the first of each label, then further ones."""
    rows = [row for row in rows if row.split == "test"] or [row for row in rows if row.split == "val"]
    first = {row.label: row for row in reversed(rows)}
    single = sorted((row for row in first.values() if "+" not in (row.label or "")), key=rows.index)
    return (single + [row for row in rows if row not in single])[:n]


def spectrogram(extractor, waveform):
    """The log-mel spectrogram that CLAP sees, low pitches at the bottom, as a picture of one cell."""
    import numpy as np
    from PIL import Image
    mel = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="np")["input_features"][0, 0].T[::-1]
    low, high = np.percentile(mel, [2, 99.8])
    gray = (np.clip((mel - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(gray).resize((CELL, CELL), Image.Resampling.BILINEAR)


def contact_sheet(columns: list[list], names: list[str], row_names: list[str]):
    """Pictures by column and row, with the column's name under its spectrogram and the row's name at the left."""
    from PIL import Image, ImageDraw, ImageFont
    font, margin, gap = ImageFont.load_default(13), 104, 4
    height = len(row_names) * (CELL + gap) + 22
    sheet = Image.new("RGB", (margin + len(columns) * (CELL + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (column, name) in enumerate(zip(columns, names, strict=True)):
        x = margin + i * (CELL + gap)
        draw.text((x + CELL / 2, 11), name[:20], fill="black", font=font, anchor="mm")
        for j, image in enumerate(column):
            sheet.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC), (x, 22 + j * (CELL + gap)))
    for j, name in enumerate(row_names):
        draw.text((margin - 8, 22 + j * (CELL + gap) + CELL / 2), name, fill="black", font=font, anchor="rm")
    return sheet


def make_sheet(run: Path, settings: dict, args: argparse.Namespace):
    """Generate the pictures of the contact sheet with the stock pipeline, stage by stage."""
    import torch

    import common
    import data
    import generate
    import pretrained
    import stock

    device, _ = common.pick_device(args.device, "fp32")
    rows = []
    for row in pick_rows(data.read_manifest(settings["data_root"])[0], 2 * args.columns):
        try:  # what training has left out is left out here
            data.read_windows(row.audio_path, 10.0)
            data.load_image(row.image_path, settings["image_size"])
        except data.BadFile as error:
            print(f"{row.where}: left out: {error}", flush=True)
            continue
        rows = [*rows, row][:args.columns]
    base = pretrained.resolve_model(settings["base_model"], "base model", pretrained.BASE_PARTS)
    adapter_paths = [generate.find_adapter(str(run / stage)) for stage in STAGES]
    encoder = generate.load_clap("", generate.adapter_facts(adapter_paths[-1]), adapter_paths[-1])
    waveforms = [data.load_waveform(row.audio_path, encoder.sampling_rate, encoder.window_s)[0] for row in rows]
    audio_embeds = torch.cat([generate.embed(encoder, str(row.audio_path)) for row in rows])
    columns = [[spectrogram(encoder.extractor, waveform), data.load_picture(row.image_path, settings["image_size"])]
               for row, waveform in zip(rows, waveforms, strict=True)]
    sounds = [audio_embeds] * len(STAGES) + [torch.zeros_like(audio_embeds)]
    pipe = None
    for adapter_path, embeds in zip(adapter_paths + adapter_paths[-1:], sounds, strict=True):
        if pipe is None or embeds is sounds[0]:
            dtype = torch.bfloat16 if device.type == "cuda" and settings["precision"] == "bf16" else torch.float32
            pipe = stock.load_stock_pipeline(base, adapter_path, device, dtype)
        for i, column in enumerate(columns):
            column += stock.pictures(pipe, embeds[i:i + 1], [""], args.guidance, args.steps, [args.seed + i],
                                     size=settings["image_size"])
    names = [(row.label or row.text or row.id).replace("_", " ") for row in rows]
    return contact_sheet(columns, names, ["sound", "true scene", *(f"stage {i}" for i in (1, 2, 3)), "silence"])


def git_commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                               capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def make_report(run: Path) -> dict:
    """The report's content from the stages' result.json files.

    Raises:
        UserError: a stage is not finished.
    """
    stages = {}
    for stage in STAGES:
        path = run / stage / "result.json"
        if not path.exists():
            raise UserError(f"{path}: is missing, so {stage} is not finished; run the command that made {run} again, "
                            "bash run_all_stages.sh with its config and flags")
        stages[stage] = read_json(path)
    settings = {stage: read_json(run / stage / "config.json") for stage in STAGES}
    gate = stages["stage3"]
    return {
        "seconds": {stage: result["seconds"] for stage, result in stages.items()},
        "validation_loss": {stage: {"first": stages[stage]["first_validation"]["val_right"],
                                    "best": stages[stage]["validation"]["val_right"],
                                    "best_step": stages[stage]["best_step"]} for stage in ("stage1", "stage2")},
        "after": {stage: result["validation"] for stage, result in stages.items()},
        "gate": {"tanh_gate": gate["tanh_gate"], "steps": gate["steps"], "in_window": gate["in_window"],
                 "window": gate["window"], "ended": gate["ended"], "sweep_before": gate["sweep_before"],
                 "sweep_after": gate["sweep_after"]},
        "stock_difference": {stage: result["stock_difference"] for stage, result in stages.items()},
        "peak_memory_mb": {stage: result["peak_memory_mb"] for stage, result in stages.items()},
        "seeds": {stage: settings[stage]["seed"] for stage in STAGES},
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
    }


def to_markdown(report: dict, run: Path) -> str:
    """The report as a page to read."""
    def cell(values: list[float]) -> str:
        return f"{values[0]:.5f} [{values[1]:.5f}, {values[2]:.5f}]"

    lines = [f"# {run}", "", "Validation loss (fixed noise and timesteps, empty caption; mean and 95 % interval over clips)",
             "", "| after | right sound | silence | another's sound | silence - right | other - right | seconds |",
             "|---|---|---|---|---|---|---|"]
    for stage, values in report["after"].items():
        keys = ("val_right", "val_silence", "val_other", "silence_minus_right", "other_minus_right")
        lines.append(f"| {stage} | " + " | ".join(cell(values[key]) for key in keys)
                     + f" | {report['seconds'][stage]:.0f} |")
    gate = report["gate"]
    lines += ["", f"Gate: tanh(gate) {gate['tanh_gate']:.3f} after {gate['steps']} steps, window {gate['window']}, "
              f"in window: {'yes' if gate['in_window'] else 'no'} ({gate['ended']}).", "",
              "| tanh(gate) | loss before stage 3 | after |", "|---|---|---|"]
    lines += [f"| {a['tanh_gate']:.1f} | {a['loss']:.5f} | {b['loss']:.5f} |"
              for a, b in zip(gate["sweep_before"], gate["sweep_after"], strict=True)]
    lines += ["", f"Largest difference to stock diffusers: {max(report['stock_difference'].values()):.1e}. Peak memory: "
              f"{max(m['rss'] for m in report['peak_memory_mb'].values()):.0f} MB. Seeds {report['seeds']}. "
              f"Commit {report['git_commit']}. "
              + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run = Path(args.run)
    report = make_report(run)

    import stock
    sheet = make_sheet(run, report["settings"]["stage3"], args)
    for stale in run.glob(".*.tmp"):  # left by a report that was killed
        stale.unlink(missing_ok=True)
    stock.write_png(run / "samples.png", sheet)
    write_atomic(run / "adapter.safetensors", (run / STAGES[-1] / "adapter.safetensors").read_bytes())
    write_json(run / "report.json", report)
    write_atomic(run / "report.md", to_markdown(report, run).encode())
    print(f"{run / 'samples.png'}: the sounds and their pictures\n{run / 'report.md'}, {run / 'report.json'}: the figures\n"
          f"{run / 'adapter.safetensors'}: the adapter, for stock diffusers", flush=True)


if __name__ == "__main__":
    run_main(main)
