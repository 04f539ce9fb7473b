"""What a run achieved: samples.png, report.json and report.md in its folder, and its adapter.safetensors.

The contact sheet has one column for each held-out sound: its spectrogram with its name, the true scene, the
picture after each stage, and the picture of silence. All pictures of a column begin with the same noise and
have no text prompt."""

import argparse
import hashlib
import json
import platform
import subprocess
from collections import defaultdict
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from clap2diffusion.base import files, hub
from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.decoding import load_waveform
from clap2diffusion.dataset.manifest import usable_rows
from clap2diffusion.engine.gate_sweep import find_warning, read_sweep
from clap2diffusion.judging.clips import STAGES, pick_clips, read_results, readable
from clap2diffusion.judging.page import TEMPLATES
from clap2diffusion.pictures.generation import embed, load_clap
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter
from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures
from clap2diffusion.pictures.sheets import contact_sheet, spectrogram, write_png

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
SHEET_FLAGS = ("columns", "guidance", "steps", "seed", "data_root", "base_model", "clap_model")
FILES = ("samples.png", "adapter.safetensors", "report.md", "report.json")


def make_sheet(run: Path, settings: dict, args: argparse.Namespace) -> Image.Image:
    """Generate the pictures of the contact sheet with the stock pipeline, stage by stage.
    Raises UserError: the data or a model is missing, or no held-out clip can be used."""
    data_root, size = args.data_root or settings["data_root"], settings["image_size"]
    rows = usable_rows(data_root)
    rows = [row for row in rows if row.split == "test"] or [row for row in rows if row.split == "val"]
    picks = pick_clips([row.label or "" for row in rows], 2 * args.columns)
    rows, scenes = readable([rows[i] for i in picks], size)  # what training has left out is left out here
    if not rows:
        raise UserError(f"{data_root}: has no usable clip in split 'test' or 'val'; give another --data-root")
    rows = rows[:args.columns]
    adapter_path = find_adapter(str(run / STAGES[-1]))
    encoder = load_clap(args.clap_model, adapter_facts(adapter_path), adapter_path)
    rate = encoder.sampling_rate
    audio_embeds = torch.cat([embed(encoder, str(row.audio_path)) for row in rows])  # (n, E)
    columns = [[spectrogram(load_waveform(row.audio_path, rate, encoder.window_s)[0], rate), scene]
               for row, scene in zip(rows, scenes)]
    device, _ = pick_device(args.device, "fp32")
    dtype = DTYPES[settings["precision"]] if device.type == "cuda" else torch.float32
    base = hub.find_trained(args.base_model, settings["base_model"], "base model", adapter_path)
    for stage in STAGES:
        pipe = load_stock_pipeline(base, find_adapter(str(run / stage)), device, dtype)
        silence = [torch.zeros_like(audio_embeds)] if stage == STAGES[-1] else []
        for embeds in (audio_embeds, *silence):
            for i, column in enumerate(columns):
                seed = args.seed + i
                column += pictures(pipe, embeds[i:i + 1], [""], args.guidance, args.steps, [seed], size=size)
    names = [(row.label or row.text or row.id).replace("_", " ") for row in rows]
    return contact_sheet(columns, names, ["sound", "true scene", "stage 1", "stage 2", "stage 3", "silence"])


def git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, encoding="utf-8",
                                       cwd=Path(__file__).parent).strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def make_report(run: Path, args: argparse.Namespace) -> dict:
    """The report's content from the stages' result.json files. Raises UserError: a stage is not finished."""
    results = read_results(run)
    settings = {stage: files.read_json(run / stage / "config.json") for stage in STAGES}

    def each(key: str) -> dict:
        return {stage: result[key] for stage, result in results.items()}
    gate = {key: results["stage3"][key] for key in ("tanh_gate", "steps", "in_window", "window", "ended")}
    gate |= {key: read_sweep(results["stage3"][key]) for key in ("sweep_before", "sweep_after")}
    gate["warning"] = find_warning(run / "stage3")
    loss = {stage: {"first": results[stage]["first_validation"]["val_right"],
                    "best": results[stage]["validation"]["val_right"],
                    "best_step": results[stage]["best_step"]} for stage in ("stage1", "stage2")}
    return {
        "seconds": each("seconds"), "validation_loss": loss,
        "after": each("validation"), "gate": gate,
        "stock_difference": each("stock_difference"), "peak_memory_mb": each("peak_memory_mb"),
        "seeds": {stage: settings[stage]["seed"] for stage in STAGES}, "settings": settings,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(), "made_from": {
            "results": {stage: hashlib.sha256((run / stage / "result.json").read_bytes()).hexdigest()
                        for stage in STAGES},
            "sheet": {name: getattr(args, name) for name in SHEET_FLAGS}}}


def training_curves(run: Path) -> dict[str, dict]:
    """What the stages logged and measured: {stage: {"log": [...], "sweep_before": ..., ...}}.
    A stage that was killed and went on wrote some steps twice; the last line of a step counts."""
    found, keys = {}, ("sweep_before", "sweep_after", "tanh_gate", "window")
    for stage in STAGES:
        log, ended = run / stage / "log.jsonl", run / stage / "result.json"
        if log.exists():
            steps: dict[int, dict] = defaultdict(dict)
            for line in log.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # the last line of a killed run
                    entry = json.loads(line)
                    steps[entry["step"]].update(entry)
            result = files.read_json(ended) if ended.exists() else {}
            found[stage] = {"log": [steps[step] for step in sorted(steps)],
                            **{key: result[key] for key in keys if key in result}}
    return found


def write_report(run: Path, args: argparse.Namespace) -> None:
    """Write sheet, adapter and report of a finished run, unless they are there, made from the same.
    Raises UserError: a stage is not finished, or the data or a model is missing."""
    report = make_report(run, args)
    sheet_path, adapter_path, text_path, json_path = (run / name for name in FILES)
    with suppress(UserError, KeyError):  # damaged, or from before reports said what they were made from
        there = all((run / name).exists() for name in FILES)
        if there and files.read_json(json_path)["made_from"] == report["made_from"]:
            print(f"{json_path}: was made from these results, so sheet and report stay as they are",
                  flush=True)
            return
    sheet = make_sheet(run, report["settings"]["stage3"], args)
    files.remove_stale(run)
    write_png(sheet_path, sheet)
    files.write_atomic(adapter_path, (run / STAGES[-1] / "adapter.safetensors").read_bytes())
    text = TEMPLATES.get_template("report.md.j2").render(report=report, run=run)
    files.write_text(text_path, text)
    files.write_json(json_path, report)  # last: it says what the other files were made from
    print(f"{sheet_path}: the sounds and their pictures\n{text_path}, {json_path}: the figures\n"
          f"{adapter_path}: the adapter, for stock diffusers", flush=True)
