"""Nothing is unpickled, no code is fetched, nothing leaves its folder, nothing listens to the network."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE, CLAP, ROOT, script

SOURCES = {path: path.read_text()
           for pattern in ("*.py", "clap2diffusion/**/*.py", "tools/*.py", "bench/*.py", "ablations/*.py")
           for path in ROOT.glob(pattern)}
FORBIDDEN = [r"\bpickle\b", r'torch\.load\((?!path, "cpu", weights_only=True)', r"allow_pickle",
             r"\bjoblib\b", r"\bmarshal\b", r"\bshelve\b", r"trust_remote_code", r"(?<![.\w])eval\(",
             r"(?<![.\w])exec\(", r"os\.system\(", r"shell=True", r"yaml\.load", r"[\"']0\.0\.0\.0[\"']",
             r"torch\.save\(", r"_object_list\(|gather_object\("]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_source_uses(pattern):
    found = [f"{path.name}: {line.strip()}" for path, text in SOURCES.items()
             for line in text.splitlines() if re.search(pattern, line)]
    # words about pickles in sentences are fine; calls are not
    found = [line for line in found if not re.search(r'pickled|"""|#', line)]
    assert len(SOURCES) > 20 and not found, found


def test_the_patterns_find_what_they_are_for():
    bad = ["import pickle", "torch.load(path)", "np.load(x, allow_pickle=True)", "import joblib",
           "import marshal", "import shelve", "trust_remote_code=True", "eval(text)", "exec(text)",
           "os.system(line)", "run(line, shell=True)", "yaml.load(x)", 'host="0.0.0.0"', "torch.save(x)",
           "dist.broadcast_object_list(x)"]
    assert all(re.search(pattern, line) for pattern, line in zip(FORBIDDEN, bad, strict=True))
    assert not re.search(FORBIDDEN[7], "unet.eval()") and not re.search(FORBIDDEN[8], "self.exec(x)")


class Attack:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_an_attack_by_pickle_would_be_seen(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model",
                                   "text_encoder/model", "clap/model", "judge/model"])
def test_a_pickle_in_place_of_model_weights_is_not_executed(place, tmp_path, config, run, world):
    """Nor in torch's own .bin, which from_pretrained takes where there is no safetensors file."""
    folder, name = place.split("/")
    source = {"clap": CLAP, "judge": ROOT / "assets/tiny/judge"}.get(folder, BASE)
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    weights = copy / (f"{name}.safetensors" if folder in ("clap", "judge") else f"{place}.safetensors")
    assert weights.exists()
    attack = pickle.dumps(Attack(tmp_path / "executed"))
    flag = {"clap": "--clap-model", "judge": "--judge"}.get(folder, "--base-model")
    for suffix in (".safetensors", ".bin"):
        weights.unlink(missing_ok=True)
        target = weights.with_suffix(suffix)
        target = target.with_name("pytorch_model.bin") if suffix == ".bin" and name == "model" else target
        if suffix == ".bin":
            torch.save({"weight": Attack(tmp_path / "executed")}, target)
        else:
            target.write_bytes(attack)
        if folder == "judge":
            shutil.copytree(run / "stage3", tmp_path / "run/stage3", dirs_exist_ok=True)
            done = script("evaluate.py", "--run", tmp_path / "run", "--quick", flag, copy)
        else:
            done = script("train_stage1.py", "--config", config, "--run", tmp_path / "run", "--cache-dir",
                          tmp_path / "cache", "--steps", 1, "--samples", 0, flag, copy)
        assert done.returncode in (1, 2), done.stdout[-500:] + done.stderr[-2000:]
        assert not (tmp_path / "executed").exists(), done.stdout[-500:] + done.stderr[-2000:]
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        assert done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr[-2000:]
        target.unlink()


@pytest.mark.parametrize("package, least, why",
                         [("torch", (2, 6), "CVE-2025-32434: torch.load ran code in spite of weights_only"),
                                                 ("pillow", (11, 3),
                                                  "CVE-2025-48379: a buffer overflow in writing DDS"),
                                                 ("transformers", (4, 53),
                                                  "several denials of service by regular expressions")])
def test_the_lowest_versions_have_no_hole_that_is_known(package, least, why):
    line = next(line
                for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith(package))
    found = tuple(int(n) for n in re.search(r">=([\d.]+)", line)[1].split("."))
    assert found >= least, why


def test_a_checkpoint_names_no_path_that_is_opened(run, tmp_path, config):
    """A tensor named ../x stays a name: nothing is written outside the run."""
    from safetensors.torch import load_file, save_file

    from clap2diffusion.base.tensor_file import digest, read_tensors
    header, tensors = read_tensors(run / "stage1/final.safetensors")
    header.pop("sha256")
    tensors["../../outside"] = torch.zeros(1)
    given = tmp_path / "given"
    given.mkdir()
    save_file(tensors, given / "final.safetensors",
              {"clap2diffusion": json.dumps({**header, "sha256": digest(header, tensors)})})
    assert "../../outside" in load_file(given / "final.safetensors")
    before = set(tmp_path.parent.iterdir())
    done = script("train_stage2.py", "--config", config, "--run", tmp_path / "run", "--init-from", given,
                  "--steps", 1, "--samples", 0)
    assert done.returncode == 0 and set(tmp_path.parent.iterdir()) == before
    assert not [path for path in tmp_path.rglob("*outside*")]
