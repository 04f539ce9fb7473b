"""export.py: what other libraries read of an adapter, checked by them and by hand, and what it refuses."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import BASE, CLAP, ENV, ROOT, ok, script, serving
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from faults import Case, check, hashes
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_models import HEADER, adapter, add_moved_lora, apart, forward, inputs, stock_forward

import export
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.hub import fingerprint
from clap2diffusion.judging.history import History
from clap2diffusion.pictures.inputs import adapter_facts
from clap2diffusion.pictures.pipelines import load_base_pipeline, write_adapter
from clap2diffusion.sharing import card, folders, layouts
from clap2diffusion.sharing.card import TRAINED, read_evaluation

KINDS = ("diffusers", "kohya", "peft", "hub")
APART = "its LoRA is left out of this file and lies in {}: load both"
SAME, COUNTS = 1e-5, 0.05  # without its LoRA a prediction is further off than COUNTS


class Made:
    """An adapter whose LoRA has alpha 4 times its rank and a B that is not 0, and what must be predicted."""

    def __init__(self, place: Path):
        self.path = place / "adapter.safetensors"
        plain = load_base_pipeline(BASE, vae=None, text_encoder=None, tokenizer=None).unet
        self.batch, self.names = inputs(plain), [*plain.attn_processors]
        unet, audio_proj, audio_attn = adapter(plain, 0.4)
        add_moved_lora(unet)
        header = {**HEADER, "base_model": str(BASE), "clap_model": str(CLAP),
                  "fingerprints": {"unet": fingerprint(BASE / "unet"), "clap": fingerprint(CLAP)},
                  "dims": {"audio_embed": 512, "num_tokens": 8, "width": 128, "lora": [8, 32.0]}}
        write_adapter(self.path, {"audio_proj": audio_proj, "audio_attn": audio_attn}, unet, header)
        self.pred = forward(unet, audio_proj, self.batch)  # by our own attention and peft's LoRA

    def off(self, unet) -> float:
        return apart(stock_forward(type("Pipe", (), {"unet": unet}), self.batch), self.pred)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def exports(made) -> dict[str, Path]:
    """The folder of each kind, by export.py's own main()."""
    folders = {to: made.path.with_name(f"export-{to}") for to in KINDS}
    for to in KINDS:
        export.main(["--run", str(made.path), "--to", to])
    return folders


def stock(folder: Path, name: str = "adapter.safetensors") -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, vae=None, text_encoder=None,
                                                   tokenizer=None)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=name, image_encoder_folder=None)
    return pipe


def by_hand(pipe, path: Path):
    """kohya's file added to the weights: W + alpha / rank * up @ down."""
    tensors = load_file(path)
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in pipe.unet.named_modules()}
    named = {key.split(".")[0] for key in tensors}
    assert len(named) == 4 * len(pipe.unet.attn_processors) and len(tensors) == 3 * len(named)
    for name in named:
        up, down = tensors.pop(f"{name}.lora_up.weight"), tensors.pop(f"{name}.lora_down.weight")
        layers[name].weight.data += tensors.pop(f"{name}.alpha") / down.shape[0] * up @ down
    return pipe.unet


# --- each library reads what is made for it
def test_every_export_predicts_what_was_trained(made, exports):
    pipe = stock(exports["diffusers"])
    assert made.off(pipe.unet) > COUNTS  # the file beside it has no LoRA
    pipe.load_lora_weights(exports["diffusers"])
    assert made.off(pipe.unet) < SAME
    assert made.off(PeftModel.from_pretrained(stock(exports["peft"]).unet, exports["peft"])) < SAME
    assert made.off(by_hand(stock(exports["kohya"]), exports["kohya"] / layouts.KOHYA_LORA)) < SAME
    pipe = stock(exports["kohya"])
    pipe.load_lora_weights(exports["kohya"], weight_name=layouts.KOHYA_LORA)
    assert made.off(pipe.unet) < SAME
    assert made.off(stock(exports["hub"]).unet) < SAME
    pipe = stock(exports["hub"], layouts.WITHOUT_LORA)
    assert made.off(pipe.unet) > COUNTS
    pipe.load_lora_weights(exports["hub"])
    assert made.off(pipe.unet) < SAME


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata()


def test_the_facts_are_in_every_file(made, exports):
    facts = adapter_facts(made.path)
    for to, name in (("diffusers", layouts.LORA), ("kohya", layouts.KOHYA_LORA), ("peft", layouts.PEFT_LORA)):
        own = adapter_facts(exports[to] / "adapter.safetensors")  # which compares the SHA-256
        assert own == {**facts, "warning": APART.format(name)}
        assert json.loads(metadata(exports[to] / name)["clap2diffusion"]) == facts
    assert (exports["hub"] / "adapter.safetensors").read_bytes() == made.path.read_bytes()
    assert facts["attentions"] == [name.removesuffix(".processor") for name in made.names]
    shown = metadata(exports["kohya"] / layouts.KOHYA_LORA)
    assert {key: value for key, value in shown.items() if key not in ("clap2diffusion", "format")} == {
        "ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_network_alpha": "8", "ss_steps": "1",
        "ss_output_name": "clap2diffusion_lora", "ss_sd_model_name": "base", "ss_v2": "False",
        "ss_resolution": "(64, 64)"}  # no version of a base model that it is not


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("to", ["kohya", pytest.param("hub", marks=pytest.mark.slow)])
def test_twice_the_same_bytes_and_an_earlier_export_is_replaced(to, made, exports, tmp_path, capsys):
    (tmp_path / ".new.new.tmp").mkdir()  # of a killed export
    (tmp_path / ".new.new.tmp/cut").touch()
    flags = ["--run", str(made.path), "--to", to, "--out", str(tmp_path / "new")]
    export.main(flags)
    assert "left by an interrupted export, removed" in capsys.readouterr().out
    first = digests(tmp_path / "new")
    assert first == digests(exports[to]) and set(json.loads(
        (tmp_path / "new/export.json").read_text())["files"]) | {"export.json"} == set(first)
    export.main(["--run", str(made.path), "--to", "diffusers", "--out", str(tmp_path / "new")])
    assert digests(tmp_path / "new") == digests(exports["diffusers"])  # nothing of the other kind is left
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def rewritten(path: Path, new: Path, change=lambda tensors: tensors, drop: tuple[str, ...] = (),
              **facts) -> Path:
    """A copy of an adapter with other tensors or facts and the right SHA-256."""
    old = {key: value for key, value in adapter_facts(path).items() if key not in drop}
    new.write_bytes(layouts.adapter_bytes(change(layouts.read_adapter(path)), {**old, **facts}))
    return new


def test_an_adapter_from_before_the_header_named_the_attentions(made, exports, tmp_path):
    """The export names them by the base model's config, and no other fact or tensor differs."""
    old = rewritten(made.path, tmp_path / "a.safetensors", drop=("attentions",))
    assert "attentions" not in adapter_facts(old)
    export.main(["--run", str(old), "--to", "diffusers"])
    facts = [adapter_facts(folder / "adapter.safetensors") for folder in (tmp_path / "export-diffusers",
                                                                          exports["diffusers"])]
    assert facts[0] == facts[1] and facts[0]["attentions"]
    assert all(torch.equal(tensor, load_file(old)[key]) for key, tensor in load_file(
        tmp_path / "export-diffusers/adapter.safetensors").items())


def test_ranks_may_differ_by_layer(made):
    rest, lora = layouts.split(layouts.read_adapter(made.path), adapter_facts(made.path)["attentions"])
    first, *_ = lora
    down, up = lora[first]
    lora[first] = down[:3].copy(), up[:, :3].copy()
    facts = {"base_model": "b", "step": 1, "image_size": 64, "dims": {"width": 128}}
    config = json.loads(layouts.peft_lora(lora, facts)[layouts.PEFT_CONFIG])
    assert config["r"] == config["lora_alpha"] == 8
    assert config["rank_pattern"] == config["alpha_pattern"] == {first: 3}
    assert not layouts.has_lora(rest)


@pytest.mark.parametrize("wrong", ["alpha", pytest.param("missing", marks=pytest.mark.slow), "unreadable"])
def test_an_export_that_fails_its_proof_leaves_nothing(wrong, made, exports, tmp_path, monkeypatch):
    def broken(lora, facts):
        some = dict(list(lora.items())[1:]) if wrong == "missing" else lora
        [(name, content)] = layouts.kohya_lora(some, facts).items()
        tensors = load_kohya(content)
        for key in [key for key in tensors if key.endswith("alpha")]:
            tensors[key] *= 4 if wrong == "alpha" else 1
        if wrong == "unreadable":
            tensors = {key.replace("lora_up", "lora_over"): tensor for key, tensor in tensors.items()}
        return {name: layouts.to_bytes(tensors, {})}

    def load_kohya(content: bytes) -> dict[str, np.ndarray]:
        from safetensors.numpy import load
        return {key: tensor.copy() for key, tensor in load(content).items()}
    from clap2diffusion.sharing import exporting
    monkeypatch.setitem(exporting.LORA_FILES, "kohya", broken)
    before = digests(shutil.copytree(exports["kohya"], tmp_path / "old"))
    out = tmp_path / ("new" if wrong == "alpha" else "old")
    with pytest.raises(RunFailed, match="--to kohya: .*; nothing was written"):
        export.main(["--run", str(made.path), "--to", "kohya", "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and digests(tmp_path / "old") == before


def zeroed(tensors: dict) -> dict:
    return {key: tensor * (0 if "lora.up" in key else 1) for key, tensor in tensors.items()}


def faint(tensors: dict) -> dict:
    return {key: tensor * (1e-5 if "lora.up" in key else 1) for key, tensor in tensors.items()}


def without_lora(tensors: dict) -> dict:
    return {key: tensor for key, tensor in tensors.items() if "_lora" not in key}


@pytest.mark.parametrize("change, says", [
    (zeroed, "is 0 (the best step of its stage 2 is step 0): the files are right, and it changes nothing"),
    pytest.param(faint, "; that is too little to tell whether it is there", marks=pytest.mark.slow),
    (without_lora, "holds no LoRA (it is of stage2), so the folder has none")], ids=lambda x: getattr(
        x, "__name__", "says"))
def test_a_lora_that_does_nothing_or_is_not_there_is_said(change, says, made, tmp_path, capsys):
    path = rewritten(made.path, tmp_path / "a.safetensors", change)
    export.main(["--run", str(path), "--to", "diffusers"])
    assert says in capsys.readouterr().out
    there = (tmp_path / "export-diffusers" / layouts.LORA).exists()
    assert there == (change is not without_lora)
    assert adapter_facts(tmp_path / "export-diffusers/adapter.safetensors")["warning"] == (
        "" if change is without_lora else APART.format(layouts.LORA))


# --- a folder for the hub
def evaluation(run: Path, **changes) -> dict:
    """As much of evaluation.json as the card reads, of this run's adapter, with two clips' pictures."""
    history, facts = History(run / "stage3/adapter.safetensors"), adapter_facts(
        run / "stage3/adapter.safetensors")
    clips = []
    for i in range(2):
        clips.append({"id": f"clip {i}", "label": f"dog_{i}"})
        for kind in ("right", "silence", "other"):
            path = run / f"evaluation/key/{kind}-{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (40 * i, 200, 30)).save(path)
            clips[i][kind] = {"picture": f"elsewhere/{path.relative_to(run)}"}
    measure = {"title": "top-1", "n": 12, "chance": 0.1, "right": [0.75, 0.5, 0.875],
               "silence": [0.125, 0.0, 0.25], "other": [0.0, 0.0, 0.0]}
    return {"trained": {key: facts[key] for key in TRAINED},
            "training": history.curves(), "n": 12, "split": "test", "warnings": ["mode collapse"],
            "settings": {"guidance": 3.0, "steps": 25, "seed": 0, "noise": False, "gate": None},
            "judge": {"name": "the judge"}, "measures": {"top1": measure}, "clips": clips, **changes}


@pytest.fixture(scope="module")
def hub_folder(run, tmp_path_factory) -> Path:
    """The hub folder of the small run with an evaluation, by the script as a user calls it."""
    place = tmp_path_factory.mktemp("hub")
    shutil.copytree(run, place / "run")
    (place / "run/evaluation.json").write_text(json.dumps(evaluation(place / "run")))
    done = ok(script("export.py", "--run", place / "run", "--to", "hub", "--out", place / "sounds",
                     "--license", "mit", "--data-license", "CC BY 4.0, recorded by me"))
    assert "largest difference" in done.stdout and "samples.png shows real pictures" in done.stdout
    assert f"README.md names the base model as {BASE}, which is a folder of this machine" in done.stdout
    return place / "sounds"


def test_the_card_says_what_is_known_and_no_more(hub_folder, run):
    page = huggingface_hub.ModelCard.load(hub_folder / "README.md")
    assert page.data.license == "mit" and page.data.base_model is None and "lora" in page.data.tags
    assert ("| top-1 | 12 | 0.750 [0.500, 0.875] | 0.125 [0.000, 0.250] | 0.000 [0.000, 0.000] | 0.100 |"
            in page.text and "Warning: mode collapse." in page.text)
    assert "- This adapter: mit\n- The base model: unknown: " in page.text
    assert "- The training data: CC BY 4.0, recorded by me" in page.text
    assert Image.open(hub_folder / "pictures.png").size == (104 + 2 * 132 - 4 + 4, 22 + 3 * 132 - 4 + 4)
    assert (hub_folder / "samples.png").read_bytes() == (run / "stage3/samples.png").read_bytes()
    config = json.loads((hub_folder / "config.json").read_text())
    assert config["adapter"] == adapter_facts(hub_folder / "adapter.safetensors")
    assert [stage["step"] for stage in config["training"]] == [10, 10, 10]
    assert config["training"][0]["settings"]["learning_rate"] == 1e-3
    assert not {"run", "data_root", "cache_dir"} & config["training"][0]["settings"].keys()


def test_the_cards_code_makes_the_picture_that_generate_makes(hub_folder, world, tmp_path, monkeypatch):
    sound = sorted((world / "audio").glob("test-*.wav"))[0]
    shutil.copytree(hub_folder, tmp_path / "hub")
    shutil.copy(sound, tmp_path / "hub/sound.wav")
    monkeypatch.chdir(tmp_path / "hub")
    first, second = re.findall(r"```python\n(.*?)```", (tmp_path / "hub/README.md").read_text(), re.S)
    first = first.replace("num_inference_steps=25", "num_inference_steps=4, generator=torch.manual_seed(0)")
    names: dict = {}
    exec(first, names)
    ok(script("generate.py", "--run", hub_folder / "adapter.safetensors", "--audio", sound, "--steps", 4,
              "--out", tmp_path / "ours.png"))
    theirs, ours = (np.asarray(Image.open(path)).astype(int) for path in ("out.png", tmp_path / "ours.png"))
    assert abs(theirs - ours).max() <= 2
    exec(first.replace(next(line for line in first.splitlines() if "load_ip_adapter" in line), second), names)
    assert abs(np.asarray(Image.open("out.png")).astype(int) - ours).max() <= 2


@pytest.mark.parametrize("changes, says", [
    (None, "It was not evaluated."),
    ({"trained": {"stage": "stage3"}}, "It was not evaluated as it is: "),
    ({"training": {"stages": []}}, "It was not evaluated as it is: "),
    ({"settings": {"noise": True, "gate": None}}, "It was not evaluated as it is: ")])
def test_figures_of_other_weights_are_not_on_the_card(changes, says, run, tmp_path):
    shutil.copytree(run / "stage3", tmp_path / "run/stage3")
    adapter_path = tmp_path / "run/stage3/adapter.safetensors"
    if changes:
        (tmp_path / "run/evaluation.json").write_text(json.dumps(evaluation(tmp_path / "run", **changes)))
    found, why = read_evaluation(tmp_path / "run", adapter_facts(adapter_path), History(adapter_path), "", "")
    assert found == {} and why.startswith(says)


def test_an_evaluation_knows_its_adapter_by_its_bytes(run, made, tmp_path):
    """The same stage, step, models and gate, no training beside it to compare, and other weights."""
    path = shutil.copy(made.path, tmp_path / "adapter.safetensors")
    facts, history = adapter_facts(path), History(path)
    found = evaluation(run) | {"trained": {key: facts[key] for key in TRAINED}, "training": history.curves(),
                                "unet": "u"}

    def shown(base: str = "u", **more) -> bool:
        (tmp_path / "evaluation.json").write_text(json.dumps(found | more))
        return bool(read_evaluation(tmp_path, facts, history, "s", base)[0])
    assert shown(adapter_sha256="s")
    assert not shown(adapter_sha256="t") and not shown("v", adapter_sha256="s")
    assert not shown()  # an old one, and no log to know it by
    for damaged in ({"settings": {}}, {"trained": 3}):
        with pytest.raises(UserError, match="evaluation.json: is not as evaluate.py writes it; run"):
            shown(**damaged)


def test_what_a_name_holds_has_no_meaning_on_the_card():
    assert card.plain("a\n# <b>[x](y) *z* `c`") == r"a # \<b>\[x\](y) \*z\* \`c\`"
    assert card.code("a `b`\nc") == "`` a `b` c ``" and card.code("a_b") == "`a_b`"
    assert ast.literal_eval(card.python('\U0001f600 <"\\')) == '\U0001f600 <"\\'


@pytest.mark.parametrize("content, licence", [
    (b"---\nlicense: [mit, other]\n---\n", "mit, other"), (b"\xff\xfe", ""), (b"---\nlicense: [a\n---\n", ""),
    (b"---\nlicense: other\nlicense_name: mine\n---\n", "mine"), (None, "")])
def test_the_licence_that_a_base_models_own_card_states(content, licence, tmp_path, capsys):
    if content:
        (tmp_path / "README.md").write_bytes(content)
    assert card.license_of(tmp_path / "README.md") == licence
    assert ("cannot be read" in capsys.readouterr().out) == bool(content and not licence)


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_killed_while_the_folder_takes_its_place(killed_at, tmp_path, monkeypatch):
    """At each of the last calls the earlier export or the new one is there whole, or comes back."""
    out, calls = tmp_path / "out", []

    def write(text: str) -> None:
        with folders.whole(out) as new:
            (new / "a").write_text(text)
            (new / "export.json").write_bytes(folders.facts_of("hub", b"", {"a": text.encode()}))

    class Killed(BaseException):
        pass

    def dying(call):
        def instead(*args, **options):
            calls.append(call)
            if len(calls) >= killed_at:  # nothing that would clean up works any more
                raise Killed
            return call(*args, **options)
        return instead
    write("old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        for place, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(place, name, dying(getattr(place, name)))
        write("new")
    with pytest.raises(RuntimeError), folders.whole(out):  # the next one fails
        raise RuntimeError
    folders.check_out(out)
    assert (out / "a").read_text() == ("old" if killed_at <= 3 else "new")
    write("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["a", "export.json"]


def test_no_moment_in_which_another_export_may_take_the_folder(tmp_path, monkeypatch):
    """Its lock is in the new folder until that has its name; what was edited meanwhile is kept."""
    rename, seen = Path.rename, []

    def look(path, target):
        seen.append((path / folders.LOCK).exists())
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", look)
    with folders.whole(tmp_path / "out"):
        pass
    assert seen == [True] and not (tmp_path / "out" / folders.LOCK).exists()
    with pytest.raises(UserError, match="a.txt is in it"), folders.whole(tmp_path / "out"):
        (tmp_path / "out/a.txt").touch()
    assert (tmp_path / "out/a.txt").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as its client asks for to upload a folder."""

    token, made, files = "hf_right", [], {}

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer(401, {"error": "Invalid username or password."})
        endpoint, path = f"http://{self.headers['Host']}", self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            self.made.append(json.loads(sent))
            return self.answer(200, {"url": f"{endpoint}/me/sounds"})
        if path.endswith("/preupload/main"):
            return self.answer(200, {"files": [{"path": one["path"], "uploadMode": "regular",
                                                "shouldIgnore": False} for one in json.loads(sent)["files"]]})
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in sent.splitlines()]
            self.files.update({line["value"]["path"]: base64.b64decode(line["value"]["content"])
                               for line in lines if line["key"] == "file"})
            return self.answer(200, {"success": True, "commitOid": "a" * 40,
                                     "commitUrl": f"{endpoint}/me/sounds/commit/{'a' * 40}"})
        self.answer(200, {"id": "me/sounds", "sha": "a" * 40, "siblings": [], "private": True})

    do_POST = do_GET

    def answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def pushed(folder: Path, endpoint: str, home: Path, token: str = "hf_right", name: str = "me/sounds",
           *more: str) -> subprocess.CompletedProcess:
    """export.py --push in a process that knows another hub."""
    env = {**ENV, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_TOKEN": token}
    return subprocess.run([sys.executable, "export.py", "--run", str(folder), "--to", "hub", "--push", name,
                           "--out", str(home / "out"), *more], cwd=ROOT, env=env, text=True,
                          capture_output=True)


@pytest.fixture
def local_hub():
    Hub.made, Hub.files = [], {}
    with serving(Hub) as url:
        yield url


def test_push_uploads_what_was_proved_into_a_private_repository(made, local_hub, tmp_path):
    done = ok(pushed(made.path, local_hub, tmp_path))
    assert Hub.made[0]["visibility"] == "private"
    assert "uploaded; a new repository is private without --public" in done.stdout
    sent = {name: hashlib.sha256(content).hexdigest() for name, content in Hub.files.items()}
    assert sent == digests(tmp_path / "out")
    assert 'load_ip_adapter("me/sounds", subfolder=""' in Hub.files["README.md"].decode()


@pytest.mark.parametrize("token, name, up, code, says", [
    ("", "me/sounds", True, 2, "--push me/sounds: there is no token of the hub here; log in with: hf auth "),
    ("hf_wrong", "me/sounds", True, 2, "--push me/sounds: the hub refuses this token (HTTP 401); log in "),
    ("hf_right", "a b/c", True, 2, "--push a b/c: is not a name that the hub takes ("),
    ("hf_right", "me/sounds", False, 1, "--push me/sounds: the hub did not take it (ConnectError); run the")])
def test_what_keeps_a_push_from_the_hub_is_told_before_any_work(token, name, up, code, says, made, local_hub,
                                                                tmp_path):
    done = pushed(made.path, local_hub if up else "http://127.0.0.1:9", tmp_path, token, name)
    assert done.returncode == code and done.stderr.strip().splitlines()[-1].startswith(f"error: {says}"), (
        done.stderr[-900:])
    assert not (tmp_path / "out").exists() and not Hub.made


# --- faults
@dataclass(frozen=True)
class Place:
    """A case's own folder, the small run and the adapter with a LoRA that does something."""
    d: Path
    run: Path
    adapter: Path

    def to(self, to: str, *more, run: Path | None = None) -> list:
        return ["export.py", "--run", run or self.adapter, "--to", to, "--out", self.d / "out", *more]


def made_before(change):
    """Into the folder of an earlier export that change(folder) touches."""
    def make(c: Place) -> list:
        (c.d / "out").mkdir()
        change(c.d / "out")
        return c.to("kohya")
    return make


def edited(folder: Path) -> None:
    content = b"a card"
    (folder / "README.md").write_bytes(content)
    (folder / "export.json").write_bytes(folders.facts_of("hub", b"", {"README.md": content}))
    (folder / "README.md").write_text("a card with my own words")


def other_unet(c: Place) -> list:
    """A base model of the same width whose UNet has a block of attention less."""
    shutil.copytree(BASE, c.d / "base")
    path = c.d / "base/unet/config.json"
    config = json.loads(path.read_text())
    config["down_block_types"][1] = "DownBlock2D"
    path.write_text(json.dumps(config))
    plain = UNet2DConditionModel.from_config(config)
    plain.save_pretrained(c.d / "base/unet")
    return c.to("diffusers", "--base-model", c.d / "base")


def altered(c: Place) -> list:
    content = bytearray(c.adapter.read_bytes())
    content[-1] ^= 1
    (c.d / "a.safetensors").write_bytes(content)
    return c.to("peft", run=c.d / "a.safetensors")


def moved(c: Place) -> list:
    return c.to("kohya", run=rewritten(c.adapter, c.d / "a.safetensors", base_model="/theirs/base"))


def linked(folder: Path) -> None:
    (folder / "export.json").write_bytes(folders.facts_of("hub", b"", {}))
    (folder / "mine").symlink_to(folder.parent)


def left_out(c: Place) -> list:
    return c.to("hub", run=rewritten(c.adapter, c.d / "a.safetensors", without_lora,
                                     warning=APART.format(layouts.LORA)))


def nothing_new(place: Path, done) -> None:
    assert not (place / "out").exists() and not list(place.glob(".*"))


CASES = [
    Case("exporting a run that is not there", lambda c: c.to("hub", run=c.d / "none"), 2,
         "error: {d}/none: holds no adapter.safetensors; expected a run folder", nothing_new),
    Case("exporting to what does not exist", lambda c: c.to("onnx"), 2,
         "error: argument --to: invalid choice: 'onnx' (choose from ", nothing_new),
    Case("exporting a LoRA that stage 1 does not have", lambda c: c.to("kohya", run=c.run / "stage1"), 2,
         "stage1/adapter.safetensors: holds no LoRA (it is of stage1), so there is nothing for kohya; give a "
         "run whose stage 2 trained one, or take --to diffusers", nothing_new),
    Case("exporting an altered adapter", altered, 2,
         "error: {d}/a.safetensors: its content does not match its SHA-256", nothing_new),
    Case("exporting without the base model", moved, 2,
         "error: base model '/theirs/base': there is no such folder *; {d}/a.safetensors was trained with it",
         nothing_new),
    Case("exporting with a base model of another UNet", other_unet, 2,
         "error: */adapter.safetensors: its * attentions to the sound do not fit this base model's UNet ",
         nothing_new),
    Case("an export into a file", lambda c: (c.d / "out").write_text("mine") and c.to("peft"), 2,
         "error: --out {d}/out: is not a folder; give a folder that is new or an earlier export"),
    Case("an export below a folder that is not there",
         lambda c: c.to("peft", "--out", c.d / "no/out"), 2,
         "error: --out {d}/no/out: {d}/no is not a folder that can be written to; make it first",
         nothing_new),
    Case("an export over a folder of one's own", made_before(lambda f: (f / "a.txt").touch()), 2,
         "error: --out {d}/out: is a folder that no export has made (a.txt is in it); give another one",
         lambda place, done: (place / "out/a.txt").unlink()),
    Case("an export over a card that was edited", made_before(edited), 2,
         "error: --out {d}/out: README.md was changed or added since the export; give another folder",
         lambda place, done: (place / "out/README.md").unlink()),
    Case("an export over a folder with a link of one's own", made_before(linked), 2,
         "error: --out {d}/out: mine was changed or added since the export; give another folder"),
    Case("exporting an export's adapter without its LoRA", left_out, 2,
         "error: {d}/a.safetensors: its LoRA is left out of this file by an export; give the run or the "
         "adapter that it was made from", nothing_new),
    Case("a licence that is no identifier", lambda c: c.to("hub", "--license", "CC BY 4.0"), 2,
         "error: --license 'CC BY 4.0': is no identifier of the hub, such as mit or cc-by-4.0; give one",
         nothing_new),
    Case("a licence for a folder that has no card", lambda c: c.to("kohya", "--license", "mit"), 2,
         "error: --license is for --to hub, got --to kohya; leave it out", nothing_new),
    Case("a public repository without a name", lambda c: c.to("hub", "--public"), 2,
         "error: --public is for --push NAME; give a name, or leave it out", nothing_new),
    Case("a disk that is full at an export", lambda c: c.to("kohya"), 1,
         "error: no space left in {d}/.out.new.tmp, * MB needed for adapter.safetensors", nothing_new)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, tmp_path, run, made):
    (tmp_path / "case").mkdir()
    command = case.make(Place(tmp_path / "case", run, made.path))
    done = script(*command, file_limit=100_000 if "disk" in case.fault else 0)
    check(case, done, tmp_path / "case", hashes(tmp_path / "case"))
