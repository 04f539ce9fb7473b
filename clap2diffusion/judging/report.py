"""What training achieved: sheet, report.json and report.md of a run, with its adapter.safetensors, or of one
stage, whatever its name. They tell of the adapter's own history: the stages that led to it (history.py).

The contact sheet has one column for each held-out sound: its spectrogram with its name, the true scene, the
picture after each stage, and the picture of silence. All pictures of a column begin with the same noise and
have no text prompt."""

import argparse
import hashlib
import platform
import subprocess
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
from clap2diffusion.judging.clips import pick_clips, readable
from clap2diffusion.judging.history import History, Stage
from clap2diffusion.judging.page import TEMPLATES, heading
from clap2diffusion.pictures.generation import embed, load_clap
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter
from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures, sampling
from clap2diffusion.pictures.sheets import contact_sheet, spectrogram, write_png

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
SHEET_FLAGS = ("columns", "guidance", "steps", "seed", "data_root", "base_model", "clap_model")
CODE = ("*.py", "*.sh", "clap2diffusion")  # what git_commit() compares with the commit
MOST_NAMED = 8


def make_sheet(stages: list[Stage], args: argparse.Namespace) -> Image.Image:
    """Generate the pictures of the contact sheet with the stock pipeline, stage by stage.
    Raises UserError: the data or a model is missing, or no held-out clip can be used."""
    settings = stages[-1].settings
    data_root, size = args.data_root or settings["data_root"], settings["image_size"]
    rows = usable_rows(data_root)
    rows = [row for row in rows if row.split == "test"] or [row for row in rows if row.split == "val"]
    picks = pick_clips([row.label or "" for row in rows], 2 * args.columns)
    rows, scenes = readable([rows[i] for i in picks], size)  # what training has left out is left out here
    if not rows:
        raise UserError(f"{data_root}: has no usable clip in split 'test' or 'val'; give another --data-root")
    rows = rows[:args.columns]
    adapter_path = find_adapter(str(stages[-1].folder))
    encoder = load_clap(args.clap_model, adapter_facts(adapter_path), adapter_path)
    rate = encoder.sampling_rate
    audio_embeds = torch.cat([embed(encoder, str(row.audio_path)) for row in rows])  # (n, E)
    columns = [[spectrogram(load_waveform(row.audio_path, rate, encoder.window_s)[0], rate), scene]
               for row, scene in zip(rows, scenes)]
    device, _ = pick_device(args.device, args.precision, args.compile)
    base = hub.find_trained(args.base_model, settings["base_model"], "base model", adapter_path)
    for stage in stages:
        pipe = load_stock_pipeline(base, find_adapter(str(stage.folder)), device,
                                   DTYPES[args.precision], **sampling(args))
        silence = [torch.zeros_like(audio_embeds)] if stage is stages[-1] else []
        for embeds in (audio_embeds, *silence):
            for at in range(0, len(rows), args.batch_size):
                chunk = range(at, min(at + args.batch_size, len(rows)))
                images = pictures(pipe, embeds[chunk], [""] * len(chunk), args.guidance, args.steps,
                                  [args.seed + i for i in chunk], size=size)
                for i, image in zip(chunk, images, strict=True):
                    columns[i].append(image)
    names = [(row.label or row.text or row.id).replace("_", " ") for row in rows]
    after = [heading(stage.name, stage.name) for stage in stages]
    return contact_sheet(columns, names, ["sound", "true scene", *after, "silence"])


def _git(*args: str) -> str:
    return subprocess.check_output(["git", *args], stderr=subprocess.PIPE, encoding="utf-8",
                                   errors="replace", cwd=hub.SCRIPTS)


def git_commit() -> str:
    """The commit that the code lies in, and which of the scripts and files of the package are not as it has
    them, new ones included. Where git does not know, why."""
    try:
        if not _git("ls-files", "evaluate.py").strip():
            return "not a git checkout"  # the code lies in a folder of another repository
        commit = _git("rev-parse", "HEAD").strip()
        lines = _git("-c", "core.quotePath=false", "status", "--porcelain", "--no-renames",
                     "--untracked-files=all", "--", *CODE).splitlines()
    except OSError:
        return "unknown: there is no git"
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[0]
        return "not a git checkout" if "not a git repository" in said else f"unknown: git says: {said}"
    if not lines:
        return commit
    how = {"?": "untracked", "D": "removed"}
    lines.sort(key=lambda line: line.count("/"))  # the scripts first
    named = [f"{line[3:]} ({how.get(line[:2].strip()[0], 'changed')})" for line in lines[:MOST_NAMED]]
    more = f" and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
    return f"{commit}, but the code differs from it: {', '.join(named)}{more}"


def make_report(history: History, args: argparse.Namespace) -> dict:
    """The report's content from the result.json files of an adapter's stages.
    Raises UserError: the last stage has none."""
    stages = [stage for stage in history.stages if stage.result]
    names = {stage: stage.name for stage in stages}
    if len({*names.values()}) < len(stages):  # stages of several runs may have one name
        names = {stage: str(stage.folder) for stage in stages}

    def each(key: str) -> dict:
        return {names[stage]: stage.result[key] for stage in stages if key in stage.result}
    last, gate = stages[-1], None
    if last.kind == "stage3":
        gate = {key: last.result[key] for key in ("tanh_gate", "steps", "in_window", "window", "ended")}
        gate |= {key: read_sweep(last.result[key]) for key in ("sweep_before", "sweep_after")}
        gate |= {"warning": find_warning(last.folder), "verdict": last.result.get("verdict", "")}
    loss = {names[stage]: {"first": stage.result["first_validation"]["val_right"],
                           "best": stage.result["validation"]["val_right"],
                           "best_step": stage.result["best_step"]}
            for stage in stages if "best_step" in stage.result}
    missing = [history.missing] if history.missing else []
    missing += [f"{stage.folder / 'result.json'}: is missing, so {stage.name} is left out"
                for stage in history.stages if not stage.result]
    return {
        "stages": {names[stage]: str(stage.folder) for stage in stages}, "seconds": each("seconds"),
        "validation_loss": loss, "after": each("validation"), "gate": gate,
        "warnings": [*history.warnings(), *missing],
        "stock_difference": each("stock_difference"), "peak_memory_mb": each("peak_memory_mb"),
        "seeds": {names[stage]: stage.settings["seed"] for stage in stages},
        "settings": {names[stage]: stage.settings for stage in stages},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(), "made_from": {
            "results": {names[stage]: hashlib.sha256((stage.folder / "result.json").read_bytes()).hexdigest()
                        for stage in stages},
            "sheet": {name: getattr(args, name) for name in SHEET_FLAGS}}}


def write_report(run: Path, args: argparse.Namespace) -> None:
    """Write sheet and report of a finished run or stage, and a run's adapter, unless they are there, made
    from the same. A stage's folder has samples.png and its adapter already: there the sheet is report.png.
    Raises UserError: the stage's weights or result are missing, or the data or a model."""
    adapter_path = find_adapter(str(run))
    history = History(adapter_path)
    if not history.stages or not history.stages[-1].result:
        raise UserError(f"{adapter_path.parent}: final.safetensors and result.json of the stage that wrote "
                        "the adapter are not there, or of another one, so there is nothing to report; give "
                        "the folder as the stage left it")
    report, of_stage = make_report(history, args), history.stages[-1].folder == run
    sheet_path, text_path, json_path = (run / name for name in (
        "report.png" if of_stage else "samples.png", "report.md", "report.json"))
    copy = run / "adapter.safetensors"
    with suppress(UserError, KeyError):  # damaged, or from before reports said what they were made from
        there = all(path.exists() for path in (sheet_path, text_path, json_path, copy))
        if there and files.read_json(json_path)["made_from"] == report["made_from"]:
            print(f"{json_path}: was made from these results, so sheet and report stay as they are",
                  flush=True)
            return
    sheet = make_sheet([stage for stage in history.stages if stage.result], args)
    files.remove_stale(run)
    write_png(sheet_path, sheet)
    if not of_stage:
        files.write_atomic(copy, adapter_path.read_bytes())
    text = TEMPLATES.get_template("report.md.j2").render(report=report, run=run)
    files.write_text(text_path, text)
    files.write_json(json_path, report)  # last: it says what the other files were made from
    print(f"{sheet_path}: the sounds and their pictures\n{text_path}, {json_path}: the figures\n"
          f"{copy}: the adapter, for stock diffusers", flush=True)
