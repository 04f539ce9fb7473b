"""The hub folder's model card: the evaluation's figures, pictures, code and licences. Nothing is guessed:
what the run does not say is called unknown."""

import argparse
import json
import re
from pathlib import Path

import huggingface_hub
import jinja2
from PIL import Image

from clap2diffusion.base import files, hub
from clap2diffusion.base.statistics import show_interval
from clap2diffusion.judging.clips import pick_clips
from clap2diffusion.judging.history import History
from clap2diffusion.pictures.sheets import contact_sheet, png_bytes
from clap2diffusion.sharing import folders, layouts

TEMPLATE = Path(__file__).with_name("card.md.j2")
PLACES = ("run", "data_root", "cache_dir", "log_dir", "init_from")  # folders of this machine
SOUNDS = {"right": "right sound", "silence": "silence", "other": "other sound"}
TRAINED = ("stage", "step", "base_model", "clap_model", "tanh_gate")
COLUMNS = 8


def on_hub(name: str) -> bool:
    """Whether others find a model under this name, which is no folder of this machine."""
    return hub.is_hub_name(name) and not Path(name).exists()


def read_evaluation(folder: Path, facts: dict, history: History) -> tuple[dict, str]:
    """The evaluation of this very adapter and why there is none: ({...}, '') or ({}, a sentence).
    Raises UserError: evaluation.json is damaged."""
    path = folder / "evaluation.json"
    if not path.exists():
        return {}, "It was not evaluated."
    found = files.read_json(path)
    logs = [[stage["log"] for stage in one["stages"]] for one in (found.get("training", {"stages": []}),
                                                                  history.curves())]
    same = all(found.get("trained", {}).get(key) == facts[key] for key in TRAINED) and (
        not history.stages or logs[0] == json.loads(json.dumps(logs[1])))
    asked = found["settings"]
    if not same or asked["noise"] or asked["gate"] is not None or asked.get("lora"):
        return {}, ("It was not evaluated as it is: the evaluation beside it is of other weights, of another "
                    "gate, or of one more LoRA.")
    return found, ""


def pictures(evaluation: dict, folder: Path) -> bytes:
    """Some of the evaluation's pictures side by side as a PNG; b'' if they are not there any more."""
    def path(clip: dict, kind: str) -> Path:
        return folder / Path(*Path(clip[kind]["picture"]).parts[-3:])  # evaluation/KEY/NAME.png
    clips = [clip for clip in evaluation.get("clips", [])
             if all(kind in clip and path(clip, kind).is_file() for kind in SOUNDS)]
    if not clips:
        return b""
    picked = [clips[i] for i in pick_clips([clip["label"] or "" for clip in clips], COLUMNS)]
    names = [(clip["label"] or clip["id"]).replace("_", " ") for clip in picked]
    columns = [[Image.open(path(clip, kind)) for kind in SOUNDS] for clip in picked]
    return png_bytes(contact_sheet(columns, names, list(SOUNDS.values())))


def contact_sheet_of(folder: Path, adapter_path: Path) -> bytes:
    """samples.png, made with this adapter by its stage or by evaluate.py; b'' if there is none."""
    copy = folder / layouts.ADAPTER
    own = copy.is_file() and folders.sha256(copy.read_bytes()) == folders.sha256(adapter_path.read_bytes())
    for place in [folder] * own + [adapter_path.parent]:
        if (place / "samples.png").is_file():
            return (place / "samples.png").read_bytes()
    return b""


def training_of(facts: dict, history: History) -> dict:
    """config.json: the adapter's facts and how it was trained, without the folders of this machine."""
    return {"adapter": facts, "training": [
        {"name": stage.name, "stage": stage.kind, "step": stage.header["step"],
         **{key: stage.result[key] for key in ("best_step", "seconds", "tanh_gate", "verdict", "clips")
            if key in stage.result},
         "settings": {key: value for key, value in stage.settings.items() if key not in PLACES}}
        for stage in history.stages], "missing": history.missing, "warnings": history.warnings()}


def licenses(args: argparse.Namespace, base: Path, base_name: str) -> dict[str, str]:
    """What is known of the licences of this adapter, its base model and its data, each as a sentence."""
    own = args.base_license
    if not own and (base / "README.md").is_file():  # a model from the hub may have brought its card
        own = huggingface_hub.ModelCard.load(base / "README.md", ignore_metadata_errors=True).data.license
    page = f" Its page may say: https://huggingface.co/{base_name}" if on_hub(base_name) else ""
    unknown = "unknown: whoever made this did not say; ask before you use it"
    return {"This adapter": args.license or unknown,
            "The base model": own or "unknown: neither the run nor whoever made this said." + page,
            "The training data": args.data_license or unknown}


def make_card(args: argparse.Namespace, request: argparse.Namespace, facts: dict) -> dict[str, bytes]:
    """README.md, config.json and the pictures. What they show that may not be public is printed."""
    history = History(request.adapter_path)
    evaluation, why_none = read_evaluation(request.folder, facts, history)
    found = {"pictures.png": pictures(evaluation, request.folder),
             "samples.png": contact_sheet_of(request.folder, request.adapter_path)}
    found = {name: content for name, content in found.items() if content}
    if "samples.png" in found:
        print("samples.png shows real pictures and spectrograms of your data: see whether they may be public",
              flush=True)
    base_name = args.base_model or facts["base_model"]
    for what, name in (("base model", base_name), ("CLAP model", facts["clap_model"])):
        if not on_hub(name):
            print(f"README.md names the {what} as {name}, which is a folder of this machine; others need to "
                  "be told where to find it", flush=True)
    data = huggingface_hub.ModelCardData(
        license=args.license or None, base_model=base_name if on_hub(base_name) else None,
        library_name="diffusers", tags=["clap", "audio-to-image", "ip-adapter", "stable-diffusion",
                                        *(["lora"] if request.has_lora else [])])
    ranks = {len(down) for down, _ in layouts.split(request.tensors, facts["attentions"])[1].values()}
    name = args.push.split("/")[-1] or request.folder.resolve().name
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        card_data=data, name=name, adapter=args.push or ".", base_model=base_name,
        facts=facts, rank=max(ranks, default=0), evaluation=evaluation, why_none=why_none, pictures=found,
        licenses=licenses(args, request.base, base_name), sounds=SOUNDS, interval=show_interval,
        stages=[*facts.get("history", []), facts])
    card = huggingface_hub.ModelCard(re.sub(r"\n{3,}", "\n\n", text))  # which reads what it says
    return {"README.md": (str(card).strip() + "\n").encode(), **found, "config.json": (json.dumps(
        training_of(facts, history), indent=2, ensure_ascii=False) + "\n").encode()}
