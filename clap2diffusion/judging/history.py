"""What led to an adapter: its stage and those before it, with what they logged.

A stage's final.safetensors names the result that it began with by its SHA-256, as `init`, and tells of all
stages before, as `history`. So they are known by what the files say and not by the names of folders: a copied
stage, a folder that was moved and a backup are found, and a stage that was trained anew since is not mistaken
for the one before."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from clap2diffusion.base import files
from clap2diffusion.base.statistics import few_to_whiten
from clap2diffusion.base.tensor_file import HEADER, Broken, read_header
from clap2diffusion.pictures.inputs import adapter_facts

FINAL = "final.safetensors"
TRAINED = ("stage", "step", "base_model", "clap_model", "tanh_gate")  # of an adapter, in evaluation.json
NOTHING_KEPT = "best is step 0: nothing that this stage learned is kept"
UNFOLDED = {"image_proj.norm.weight": "audio_proj.norm.weight",  # tensors that an adapter has as they are
            "image_proj.proj.2.bias": "audio_proj.proj.2.bias"}


class Stage:
    """A stage as it ended: `header` of its final.safetensors, `result` of its result.json ({} if that is
    missing), `settings` of its config.json or else of the header, `folder`, `kind` (stage1, stage2, stage3)
    and `name`, which for a copied script is another."""

    def __init__(self, folder: Path, header: dict):
        self.folder, self.header, self.kind = folder, header, header["stage"]
        self.name = header["settings"].get("name", self.kind)
        self.result, config = (files.read_json(path) if path.exists() else {}
                               for path in (folder / "result.json", folder / "config.json"))
        self.settings = config or header["settings"]

    def log(self) -> list[dict]:
        """What it logged, by step. A stage that was killed and went on wrote some steps twice; the last line
        of a step counts. A stage that went on to more steps keeps its earlier result in a folder in its own;
        the log is one for both."""
        steps: dict[int, dict] = defaultdict(dict)
        paths = [folder / "log.jsonl" for folder in (self.folder, self.folder.parent)]
        for path in [path for path in paths if path.exists()][:1]:
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # the last line of a killed run
                    entry = json.loads(line)
                    steps[entry["step"]].update(entry)
        return [steps[step] for step in sorted(steps) if step <= self.header["step"]]

    def warnings(self) -> list[str]:
        """What must be said of its training: nothing learned was kept, too few clips for its whitening."""
        found = [NOTHING_KEPT if self.result.get("best_step") == 0 and self.result.get("steps") else ""]
        if self.kind == "stage1" and self.settings.get("whiten") and "clips" in self.result:
            found.append(few_to_whiten(self.result["clips"]["train"], self.header["dims"]["audio_embed"]))
        return [f"{self.name}: {line}" for line in found if line]


class History:
    """The stages that led to an adapter, the first one first, and why some of them are `missing`, or ''.
    `told` is what the adapter itself says of the stages before its own."""

    def __init__(self, adapter_path: Path):
        self.stages: list[Stage] = []
        self.told = adapter_facts(adapter_path).get("history", [])
        folder, header = _own_stage(adapter_path)
        self.missing = "" if header else (
            f"{adapter_path}: the folder of the stage that wrote it is not beside it, so its training is "
            "unknown")
        while header:
            self.stages.insert(0, Stage(folder, header))
            init = header["init"]
            if not init:
                return
            found = ((place, _header(place)) for place in _places(folder, header))
            folder, header = next(((place, one) for place, one in found if one.get("sha256") == init),
                                  (folder, {}))
        if self.stages:
            self.missing = (f"{self.stages[0].folder} began with a result of SHA-256 {init[:12]}, which is "
                            "not there any more, so the training before it is unknown")

    def warnings(self) -> list[str]:
        """What must be said of the stages, also of those that only the adapter tells of."""
        found = {stage.header["sha256"] for stage in self.stages}
        lost = [one for one in self.told if one["sha256"] not in found and one.get("best_step") == 0]
        return [*(f"{one['name']}: {NOTHING_KEPT}" for one in lost),
                *(line for stage in self.stages for line in stage.warnings())]

    def curves(self) -> dict:
        """For evaluation.json: what each stage logged and measured, and what is missing."""
        keys = ("sweep_before", "sweep_after", "tanh_gate", "window", "verdict", "best_step")
        return {"missing": self.missing, "stages": [
            {"name": stage.name, "stage": stage.kind, "folder": str(stage.folder), "log": stage.log(),
             **{key: stage.result[key] for key in keys if key in stage.result}} for stage in self.stages]}


def _header(folder: Path) -> dict:
    """The header of a stage's final.safetensors; {} if there is none, or one that is not ours."""
    with suppress(Broken):
        header = read_header(folder / FINAL)
        if all(isinstance(header.get(key), kind) for key, kind in HEADER.items()):
            return header
    return {}


def _own_stage(adapter_path: Path) -> tuple[Path, dict]:
    """The folder of the stage that wrote an adapter, and its final.safetensors' header, {} if there is none.
    It is the file's own folder, or, since a run's adapter is a copy of its last stage's, one in it."""
    inside = sorted(path.parent for path in adapter_path.parent.glob(f"*/{FINAL}"))
    for folder in (adapter_path.parent, *inside):
        header = _header(folder)
        if header and _is_of(adapter_path, folder / FINAL, header):
            return folder, header
    return adapter_path.parent, {}


def _is_of(adapter_path: Path, final_path: Path, header: dict) -> bool:
    """Whether an adapter was exported from these weights: of one stage, step and models, and with equal
    tensors where the export changes nothing. Copies of stage 3 have all of that in common: the name differs,
    which the first versions did not write."""
    facts = adapter_facts(adapter_path)
    keys = ["stage", "step", "fingerprints", "dims", *({"name", "history"} & facts.keys())]
    if any(facts[key] != header.get(key) for key in keys):
        return False
    with safe_open(adapter_path, framework="np") as adapter, safe_open(final_path, framework="np") as final:
        return all(bool((adapter.get_tensor(ours) == final.get_tensor(theirs)).all())
                   for ours, theirs in UNFOLDED.items() if theirs in final.keys())


def _places(folder: Path, header: dict) -> Iterator[Path]:
    """Where the result may lie with which the stage in `folder` began: beside it, and where it was then. A
    stage that went on to more steps keeps its earlier results in folders in its own, as ended-00000600."""
    settings = header["settings"]
    given = [Path(told["folder"]) for told in header.get("history", [])[-1:]]
    given += [Path(settings["init_from"])] if settings.get("init_from") else []
    for run in dict.fromkeys((folder.parent, folder.parent.parent, Path(settings.get("run", folder.parent)))):
        if run == folder.parent.parent and not folder.name.startswith("ended-"):
            continue
        for pattern in (f"*/{FINAL}", f"*/ended-*/{FINAL}"):
            yield from sorted(path.parent for path in run.glob(pattern))
    for place in given:
        yield place
        yield from sorted(path.parent for path in place.glob(f"ended-*/{FINAL}"))
