"""Faults of configs, flags and model paths: one sentence before torch loads or the data are read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE, CLAP, ENV, PATIENCE_S, ROOT, script
from faults import Case, check
from safetensors.numpy import load_file, save_file
from test_faults_data import folder, write_manifest

STAGE = "train_stage1.py"


def config(content: str | bytes, name: str = STAGE):
    """A config of that content, given to a stage."""
    def make(d: Path) -> list:
        (d / "c.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return [name, "--config", d / "c.json"]
    return make


def flags(*given, name: str = STAGE):
    return lambda d: [name, *(d / one[2:] if str(one).startswith("d/") else one for one in given)]


def dry_run(*given, name: str = STAGE):
    """--dry-run on two training and two validation rows, with a run folder that is not there."""
    def make(d: Path) -> list:
        rows = folder(d / "data")
        for row in rows[:2]:
            row["split"] = "val"
        write_manifest(d / "data", rows)
        return flags("--dry-run", "--data-root", "d/data", "--run", "d/run", "--cache-dir", "d/cache",
                     "--batch-size", "2", *given, name=name)(d)
    return make


def wrote_nothing(d: Path, done: subprocess.CompletedProcess) -> None:
    assert {path.name for path in d.iterdir()} <= {"data"}
    assert "downloading" not in done.stdout


def folder_as_config(d: Path) -> list:
    (d / "c.json").mkdir()
    return [STAGE, "--config", d / "c.json"]


def cut_weights(d: Path) -> list:
    shutil.copytree(BASE, d / "base")
    path = d / "base/unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return [STAGE, "--run", d / "run", "--base-model", d / "base"]


def cut_config(d: Path) -> list:
    shutil.copytree(BASE, d / "base")
    path = d / "base/unet/config.json"
    path.write_text(path.read_text()[:100])
    return [STAGE, "--run", d / "run", "--base-model", d / "base"]


def base_with(change, name: str = STAGE):
    """A copy of the base model that change(folder) makes faulty, given to a stage."""
    def make(d: Path) -> list:
        shutil.copytree(BASE, d / "base")
        change(d / "base")
        return [name, "--run", d / "run", "--cache-dir", d / "cache", "--clap-model", CLAP, "--base-model",
                d / "base"]
    return make


def config_with(name: str, **changes):
    """A change of a JSON file; a value of None takes the key away."""
    def change(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return change


def foreign_prefix(folder: Path) -> None:
    path = folder / "text_encoder/model.safetensors"
    save_file({"xx." + key: one for key, one in load_file(path).items()}, path)


def without_tensor(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["mid_block.resnets.0.conv1.bias"]
    save_file(tensors, path)


def tokenizer_with(folder: Path, **model) -> None:
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model": {**content["model"], **model}}))


def foreign_merges(folder: Path) -> None:
    tokenizer_with(folder, merges=["qqq zzz"])


def no_merges(folder: Path) -> None:
    tokenizer_with(folder, merges=[])


def whole_numbers(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: one.astype("int8") for name, one in load_file(path).items()}, path)


def flow_matching(folder: Path) -> None:
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}))


def lost(name: str):
    return lambda folder: (folder / name).unlink()


def one_file(d: Path) -> list:
    (d / "sd15.ckpt").write_bytes(b"PK")
    return [STAGE, "--run", d / "run", "--base-model", d / "sd15.ckpt"]


def pointer(folder: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 334643268\n")


def not_there_yet(d: Path, _) -> None:
    """Nothing was made: the fault was seen before anything else."""
    assert not (d / "run").exists()


CONFIGS = [
    Case("unknown key", config('{"stage1": {"learning_rat": 1}}'), 2,
         "error: {d}/c.json: stage1.learning_rat: unknown key; did you mean 'learning_rate'?"),
    Case("unknown key of the common section", config('{"common": {"batchsize": 1}}'), 2,
         "error: {d}/c.json: common.batchsize: unknown key; did you mean 'batch_size'?"),
    Case("unknown section", config('{"stagex": {}}'), 2,
         "error: {d}/c.json: unknown section 'stagex'; did you mean 'stage"),
    Case("a section that is no object", config('{"stage1": [1]}'), 2,
         "error: {d}/c.json: section 'stage1' is not an object {...}"),
    Case("text for a number", config('{"stage1": {"steps": "8"}}'), 2,
         'error: {d}/c.json: stage1.steps: got "8", expected a whole number'),
    Case("true for a number", config('{"stage1": {"learning_rate": true}}'), 2,
         "error: {d}/c.json: stage1.learning_rate: got true, expected a number"),
    Case("8.0 for a count", config('{"stage1": {"steps": 8.0}}'), 2,
         "error: {d}/c.json: stage1.steps: got 8.0, expected a whole number"),
    Case("null", config('{"stage1": {"steps": null}}'), 2,
         "error: {d}/c.json: stage1.steps: got null, expected a whole number"),
    Case("text for a switch", config('{"common": {"flip": "yes"}}'), 2,
         'error: {d}/c.json: common.flip: got "yes", expected true or false'),
    Case("a number for a text", config('{"common": {"run": 3}}'), 2,
         "error: {d}/c.json: common.run: got 3, expected text"),
    Case("a value out of range", config('{"stage1": {"caption_drop": 1.5}}'), 2,
         "error: {d}/c.json: stage1.caption_drop: got 1.5, expected a number from 0 to 1"),
    Case("a negative count", config('{"stage1": {"steps": -3}}'), 2,
         "error: {d}/c.json: stage1.steps: got -3, expected a whole number of at least 1"),
    Case("a size that is no multiple of 8", config('{"common": {"image_size": 100}}'), 2,
         "error: {d}/c.json: common.image_size: got 100, expected a multiple of 8"),
    Case("a choice that is none", config('{"common": {"precision": "fp16"}}'), 2,
         "error: {d}/c.json: common.precision: got 'fp16', expected one of bf16, fp32"),
    Case("a key that stands twice", config('{"stage1": {"clip": 1, "clip": 2}}'), 2,
         "error: {d}/c.json: key 'clip' stands twice"),
    Case("NaN", config('{"stage1": {"clip": NaN}}'), 2,
         "error: {d}/c.json: NaN is not a number that JSON or a setting can have"),
    Case("1e999", config('{"stage1": {"clip": 1e999}}'), 2,
         "error: {d}/c.json: stage1.clip: got inf, expected "),
    Case("a whole number of 5000 digits", config('{"stage1": {"steps": ' + "9" * 5000 + "}}"), 2,
         "error: {d}/c.json: Exceeds the limit (4300 digits)"),
    Case("a whole number of 400 digits", config('{"stage1": {"steps": ' + "9" * 400 + "}}"), 2,
         "error: {d}/c.json: stage1.steps: got 999*, expected a whole number of at least 1"),
    Case("a config that is not JSON", config('{"stage1": {'), 2, "error: {d}/c.json: line 1: not valid JSON"),
    Case("a config that is a list", config("[1]"), 2,
         "error: {d}/c.json: got a JSON list, expected an object {...}"),
    Case("a config that is not UTF-8", config(b'{"common": {"run": "\xff"}}'), 2,
         "error: {d}/c.json: is not UTF-8 text; expected a JSON file"),
    Case("a config nested 100,000 deep", config('{"stage1": ' + "[" * 100_000), 2,
         "error: {d}/c.json: maximum recursion depth exceeded"),
    Case("an empty config", config(""), 2, "error: {d}/c.json: line 1: not valid JSON"),
    Case("a missing config", flags("--config", "d/none.json"), 2,
         "error: {d}/none.json: cannot be read (No such file or directory); give an existing JSON file"),
    Case("a folder as config", folder_as_config, 2,
         "error: {d}/c.json: cannot be read (Is a directory); give an existing JSON file"),
    Case("a stage's own key in another's section", config('{"stage3": {"lora_rank": 8}}', "train_stage3.py"),
         2, "error: {d}/c.json: stage3.lora_rank: unknown key; "),
    Case("8-bit Adam in stage 3", config('{"stage3": {"adam_8bit": true}}', "train_stage3.py"), 2,
         "error: {d}/c.json: stage3.adam_8bit: unknown key; "),
    Case("a UNet in BF16 without autocast", flags("--precision", "fp32", "--frozen-dtype", "bf16"), 2,
         "error: --frozen-dtype bf16 needs --precision bf16"),
    Case("drops above 1 by flags",
         flags("--caption-drop", "0.9", "--audio-drop", "0.5", "--both-drop", "0.1"), 2,
         "error: --caption-drop 0.9, --audio-drop 0.5, --both-drop 0.1 are 1.5 together, expected at most 1"),
    Case("drops above 1 by a config", config('{"stage1": {"caption_drop": 1}}'), 2,
         "error: --caption-drop 1 ({d}/c.json [stage1]), --audio-drop 0.05, --both-drop 0.05 are 1.1 "),
    Case("drops above 1 in stage 3", flags("--audio-drop", "0.6", name="train_stage3.py"), 2,
         "error: --caption-drop 0.5, --audio-drop 0.6, --both-drop 0 are 1.1 together"),
    Case("drops of 1 that are not 1 in binary", dry_run(
        "--caption-drop", "0.33", "--audio-drop", "0.56", "--both-drop", "0.11"), 0,
         "caption_drop             0.33"),
    Case("a dry run of a model that is not here", dry_run("--clap-model", "nobody/such_clap"), 0,
         "CLAP model nobody/such_clap: not here; a run would look for it on the Hugging Face hub",
         wrote_nothing),
    Case("a dry run of stage 2 before stage 1", dry_run(name="train_stage2.py"), 0,
         "starts from              {d}/run/stage1/final.safetensors, which is not there yet; run first: "
         "python train_stage1.py --config configs/tiny.json --run {d}/run", wrote_nothing),
    Case("a dry run with a wrong model", dry_run("--base-model", "none"), 2,
         "error: base model 'none': there is no such folder here", wrote_nothing),
    Case("a dry run into a file", dry_run("--run", "d/data/metadata.jsonl"), 2,
         "error: {d}/data/metadata.jsonl/stage1: cannot be used as output folder ({d}/data/metadata.jsonl is "
         "no folder)", wrote_nothing),
    Case("a dry run with a wrong growth of rank",
         dry_run("--rank-growth", "0", "9", name="train_stage2.py"), 2,
         "error: --rank-growth 0 9: expected STEP RANK pairs that rise", wrote_nothing),
    Case("one validation clip", flags("--val-clips", "1"), 2,
         "error: --val-clips 1: validation compares each clip with another's sound; give at least 2"),
    Case("one validation clip by a config", config('{"common": {"val_clips": 1}}'), 2,
         "error: --val-clips 1 ({d}/c.json [common]): validation compares each clip"),
    Case("an abbreviated flag", flags("--batch", "2"), 2,
         "error: unrecognized arguments: --batch 2 (see train_stage1.py --help)"),
    Case("an unknown flag", flags("--no-such-flag"), 2,
         "error: unrecognized arguments: --no-such-flag (see train_stage1.py --help)"),
    Case("a flag out of range", flags("--batch-size", "0"), 2,
         "error: argument --batch-size: got 0, expected a whole number of at least 1"),
    Case("a word for a number", flags("--steps", "many"), 2,
         "error: argument --steps: got 'many', expected a whole number"),
    Case("a flag without its value", flags("--run"), 2, "error: argument --run: expected one argument"),
]
MODELS = [
    Case("base model missing", flags("--run", "d/run", "--clap-model", CLAP, "--base-model", "d/none"), 2,
         "error: base model '{d}/none': there is no such folder here; expected a folder as from_pretrained",
         not_there_yet),
    Case("CLAP missing", flags("--run", "d/run", "--base-model", BASE, "--clap-model", "d/none"), 2,
         "error: CLAP model '{d}/none': there is no such folder here; expected a folder", not_there_yet),
    Case("a folder that holds no CLAP", flags("--run", "d/run", "--base-model", BASE, "--clap-model", BASE),
         2, f"error: CLAP model '{BASE}': {BASE}/config.json is missing", not_there_yet),
    Case("truncated weights of the UNet", cut_weights, 2, "error: base model '{d}/base': "
         "{d}/base/unet/diffusion_pytorch_model.safetensors is not a whole file of weights"),
    Case("a model's config cut off", cut_config, 2,
         "error: base model '{d}/base': {d}/base/unet/config.json: not a JSON object"),
    Case("a text encoder whose tensors have another prefix", base_with(foreign_prefix), 2,
         "error: base model '{d}/base': {d}/base/text_encoder/model.safetensors: names that no CLIP text "
         "encoder has: 36 of 36 tensors, first xx.embeddings.position_embedding.weight;", not_there_yet),
    Case("a base model without its tokenizer.json", base_with(lost("tokenizer/tokenizer.json")), 2,
         "error: base model '{d}/base': {d}/base/tokenizer holds neither tokenizer.json nor vocab.json with "
         "merges.txt", not_there_yet),
    Case("a base model without its model_index.json", base_with(lost("model_index.json")), 2,
         "error: base model '{d}/base': {d}/base/model_index.json is missing", not_there_yet),
    Case("the UNet of a Stable Diffusion XL",
         base_with(config_with("unet/config.json", addition_embed_type="text_time")), 2,
         "error: base model '{d}/base': {d}/base/unet/config.json: addition_embed_type is 'text_time', a "
         "Stable Diffusion XL UNet; expected a Stable Diffusion 1.x or 2.x", not_there_yet),
    Case("a scheduler for flow matching", base_with(flow_matching), 2,
         "error: base model '{d}/base': {d}/base/scheduler/scheduler_config.json: is of "
         "FlowMatchEulerDiscreteScheduler, for flow matching", not_there_yet),
    Case("a scheduler without betas", base_with(config_with("scheduler/scheduler_config.json",
                                                            beta_end=None)), 2,
         "scheduler_config.json: DDIMScheduler without beta_end; expected beta_start", not_there_yet),
    Case("an inpainting model", base_with(config_with("unet/config.json", in_channels=9)), 2,
         "error: base model '{d}/base': {d}/base/unet/config.json: in_channels is 9, so this is an "
         "inpainting model; expected 4", not_there_yet),
    Case("a UNet with one tensor missing", base_with(without_tensor), 2,
         "error: base model {d}/base/unet: missing tensors: 1, first mid_block.resnets.0.conv1.bias; its "
         "weights are not those of a whole UNet2DConditionModel", not_there_yet),
    Case("a UNet's config that makes no UNet",
         base_with(config_with("unet/config.json", layers_per_block=[1, 1])), 2,
         "error: base model {d}/base/unet: no UNet2DConditionModel can be made of its files (",
         not_there_yet),
    Case("a UNet whose config has a list for a number",
         base_with(config_with("unet/config.json", in_channels=[4])), 2,
         "error: base model '{d}/base': {d}/base: its files hold a value of another type than such a model's "
         "(TypeError: ", not_there_yet),
    Case("an index without its scheduler", base_with(config_with("model_index.json", scheduler=None)), 2,
         "error: base model '{d}/base': {d}/base/model_index.json: scheduler is None; expected its library "
         "and class, such as DDIMScheduler", not_there_yet),
    Case("a noise schedule that is none",
         base_with(config_with("scheduler/scheduler_config.json", beta_schedule="nonsense")), 2,
         "scheduler_config.json: betas from 0.00085 to 0.012, 'nonsense'; expected 0 < beta_start <= "
         "beta_end < 1 and one of linear, scaled_linear, squaredcos_cap_v2", not_there_yet),
    Case("a scheduler that its library cannot make",
         base_with(config_with("scheduler/scheduler_config.json", timestep_spacing=3, trained_betas="x")), 2,
         "error: base model {d}/base: no StableDiffusionPipeline can be made of its files (", not_there_yet),
    Case("a tokenizer whose merges make no words of it", base_with(foreign_merges), 2,
         "error: base model {d}/base: no StableDiffusionPipeline can be made of its files (", not_there_yet),
    Case("a tokenizer without merges", base_with(no_merges), 2,
         "tokenizer.json: holds no merges, so words would be read as letters", not_there_yet),
    Case("a UNet in whole numbers", base_with(whole_numbers), 2,
         "weights are whole numbers, first conv_in.weight of type I8; expected floating point",
         not_there_yet),
    Case("a base model that is one .ckpt file", one_file, 2,
         "error: base model '{d}/sd15.ckpt': {d}/sd15.ckpt is one file; expected a folder in diffusers' "
         "layout, which this makes: python -c", not_there_yet),
    Case("a pointer of Git LFS in place of weights", base_with(pointer), 2,
         "{d}/base/vae/diffusion_pytorch_model.safetensors is a pointer of Git LFS in place of the file; "
         "fetch it with: git lfs pull", not_there_yet),
    Case("a model that only the hub has, without network",
         flags("--run", "d/run", "--base-model", "nobody/no-such-model"), 2,
         "error: base model 'nobody/no-such-model' is neither a folder here nor in the local model cache, "
         "and the hub gave no copy", not_there_yet),
]
CASES = CONFIGS + MODELS
# what only shows once libraries are loaded, which takes a fresh process six seconds; "a dry run of a model
# that is not here" loads them in one all the same
LOADED = {"a UNet's config that makes no UNet", "a scheduler that its library cannot make",
          "a tokenizer whose merges make no words of it", "drops of 1 that are not 1 in binary",
          "a dry run of stage 2 before stage 1", "a dry run into a file", "a UNet with one tensor missing"}


def plain(*command) -> subprocess.CompletedProcess:
    """Run a script in a fresh process, without network."""
    process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=ROOT,
                               text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True,
                               env={**ENV, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"})
    output = process.communicate(timeout=PATIENCE_S)
    done = subprocess.CompletedProcess(command, process.returncode, *output)
    done.pid = process.pid
    return done


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, tmp_path):
    start = script if case.fault in LOADED else plain
    check(case, start(*case.make(tmp_path)), tmp_path, {})


def test_the_cases_that_load_the_libraries_are_there():
    assert LOADED <= {case.fault for case in CASES}


@pytest.mark.parametrize("content", ['{"stage1": {"learning_rat": 1}}', "{"])
def test_a_wrong_config_is_seen_before_torch_is_loaded(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    program = ("import sys, runpy; sys.argv = ['train_stage1.py', '--config', sys.argv[1]]\n"
               "try: runpy.run_path('train_stage1.py', run_name='__main__')\n"
               "finally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "c.json"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n", done.stdout + done.stderr


def test_run_all_stages_finds_a_mistake_of_stage_3_before_anything_runs(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"common": {"run": str(tmp_path / "run")}, "stage3": {"window_lo": 0.3}}))
    done = subprocess.run(["bash", str(ROOT / "run_all_stages.sh"), str(path)], capture_output=True,
                          text=True,
                          env={**ENV, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: {path}: stage3.window_lo: unknown key; did you mean 'window_low'?"


@pytest.mark.parametrize("flags, said",
                         [(["--help"], "error: --help is for one stage alone"),
                          (["--stpes", "3"], "error: no stage knows --stpes; did you mean '--steps'?")])
def test_run_all_stages_refuses_a_flag_after_the_config(flags, said):
    done = subprocess.run(["bash", str(ROOT / "run_all_stages.sh"), str(ROOT / "configs/tiny.json"), *flags],
                          capture_output=True, text=True,
                          env={**ENV, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(said), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py", "train_stage3.py", "generate.py",
                                  "evaluate.py", "prepare_data.py"])
def test_help_loads_nothing_heavy(name):
    program = (f"import sys, runpy; sys.argv = ['{name}', '--help']\n"
               f"try: runpy.run_path('{name}', run_name='__main__')\nfinally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stdout.endswith("False\n")
    assert not done.stderr


def test_the_lines_that_mutants_py_changes_are_there():
    from tools.mutants import CHANGES
    for change in (change for changes in CHANGES.values() for change in changes):
        assert (ROOT / change["module"]).read_text().count(change["old"]) == 1, change
