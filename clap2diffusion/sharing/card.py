"""The hub folder's model card: the evaluation's figures, pictures, code and licences. Nothing is guessed:
what the run does not say is called unknown."""

import argparse
import json
import re
from pathlib import Path

import huggingface_hub
import jinja2
import yaml
from PIL import Image

from clap2diffusion.base import files, hub
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.statistics import show_interval
from clap2diffusion.judging.clips import pick_clips
from clap2diffusion.judging.history import TRAINED, History
from clap2diffusion.pictures.sheets import contact_sheet, png_bytes
from clap2diffusion.sharing import folders, layouts

TEMPLATE = Path(__file__).with_name("card.md.j2")
PLACES = ("run", "data_root", "cache_dir", "log_dir", "init_from")  # folders of this machine
SOUNDS = {"right": "right sound", "silence": "silence", "other": "other sound"}
COLUMNS = 8


def on_hub(name: str) -> bool:
    """Whether others find a model under this name, which is no folder of this machine."""
    return hub.is_hub_name(name) and not Path(name).exists()


def _is_of(found: dict, facts: dict, history: History, adapter: str, unet: str) -> bool:
    """Whether an evaluation is of the adapter of this SHA-256, in the UNet of this fingerprint, as it is."""
    asked = found["settings"]
    if asked["noise"] or asked["gate"] is not None or asked.get("lora"):
        return False
    if any(found["trained"].get(key) != facts[key] for key in TRAINED):
        return False
    if "adapter_sha256" in found:
        return found["adapter_sha256"] == adapter and found["unet"] == unet
    # the first versions did not write these two; what was logged tells one training from another
    logs = [[stage["log"] for stage in one["stages"]] for one in (found.get("training", {"stages": []}),
                                                                  history.curves())]
    return bool(history.stages) and logs[0] == json.loads(json.dumps(logs[1]))


def read_evaluation(folder: Path, facts: dict, history: History, adapter: str, unet: str) -> tuple[dict, str]:
    """The evaluation of this very adapter and why there is none: ({...}, '') or ({}, a sentence).
    adapter: its file's SHA-256. unet: the fingerprint of the base model's UNet.
    Raises UserError: evaluation.json is damaged."""
    path = folder / "evaluation.json"
    if not path.exists():
        return {}, "It was not evaluated."
    found = files.read_json(path)
    try:
        if _is_of(found, facts, history, adapter, unet):
            return found, ""
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not as evaluate.py writes it; run evaluate.py again, or move it "
                        "away") from None
    return {}, ("It was not evaluated as it is: the evaluation beside it is of other weights, of another "
                "base model or gate, or of one more LoRA.")


def plain(text: str) -> str:
    """Text in one line of Markdown in which no letter has a meaning of its own."""
    return re.sub(r"([\\`*<\[\]])", r"\\\1", " ".join(str(text).split()))


def code(text: str) -> str:
    """Text in one line of Markdown as code; the fence is longer than any in it."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def python(text: str) -> str:
    """Text as a string of Python's; other letters than ASCII stay as they are."""
    return json.dumps(text, ensure_ascii=False)


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
    try:
        columns = [[Image.open(path(clip, kind)).convert("RGB") for kind in SOUNDS] for clip in picked]
    except OSError as error:
        print(f"pictures.png is left out: a picture of the evaluation cannot be read ({error})", flush=True)
        return b""
    return png_bytes(contact_sheet(columns, names, list(SOUNDS.values())))


def contact_sheet_of(folder: Path, adapter_path: Path, adapter: str) -> bytes:
    """samples.png, made with this adapter by its stage or by evaluate.py; b'' if there is none. adapter: its
    file's SHA-256."""
    copy = folder / layouts.ADAPTER
    own = copy.is_file() and folders.sha256(copy.read_bytes()) == adapter
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


def license_of(card: Path) -> str:
    """The licence that a model's own card states, '' if there is none. A card that cannot be read is said."""
    if not card.is_file():  # a model from the hub may have brought it
        return ""
    try:
        data = huggingface_hub.ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"{card}: cannot be read ({type(error).__name__}), so the base model's licence is unknown; "
              "--base-license says it", flush=True)
        return ""
    own = data.license
    if own == "other":
        own = data.get("license_name") or own
    return ", ".join(map(str, own)) if isinstance(own, list) else str(own or "")


def licenses(args: argparse.Namespace, base: Path, base_name: str) -> dict[str, str]:
    """What is known of the licences of this adapter, its base model and its data, each as a sentence."""
    own = args.base_license or license_of(base / "README.md")
    page = f" Its page may say: https://huggingface.co/{base_name}" if on_hub(base_name) else ""
    unknown = "unknown: whoever made this did not say; ask before you use it"
    return {"This adapter": args.license or unknown,
            "The base model": own or "unknown: neither the run nor whoever made this said." + page,
            "The training data": args.data_license or unknown}


def make_card(args: argparse.Namespace, request: argparse.Namespace, facts: dict) -> dict[str, bytes]:
    """README.md, config.json and the pictures. What they show that may not be public is printed."""
    history, adapter = History(request.adapter_path), folders.sha256(request.adapter_path.read_bytes())
    unet = hub.fingerprint(request.base / "unet")
    other = not hub.is_model(facts["fingerprints"]["unet"], request.base / "unet")
    evaluation, why_none = read_evaluation(request.folder, facts, history, adapter, unet)
    found = {"pictures.png": pictures(evaluation, request.folder),
             "samples.png": contact_sheet_of(request.folder, request.adapter_path, adapter)}
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
    environment.filters |= {"plain": plain, "code": code, "python": python}
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        card_data=data, name=name, adapter=args.push or ".", base_model=base_name,
        facts=facts, unet=unet, other_unet=other, rank=max(ranks, default=0),
        evaluation=evaluation, why_none=why_none, pictures=found,
        licenses=licenses(args, request.base, base_name), sounds=SOUNDS, interval=show_interval,
        stages=[*facts.get("history", []), facts])
    card = huggingface_hub.ModelCard(re.sub(r"\n{3,}", "\n\n", text))  # which reads what it says
    # half a surrogate pair, of a name that is no UTF-8, as write_text() has it
    return {"README.md": (str(card).strip() + "\n").encode(errors="backslashreplace"), **found,
            "config.json": (json.dumps(training_of(facts, history), indent=2, ensure_ascii=False)
                            + "\n").encode(errors="backslashreplace")}
