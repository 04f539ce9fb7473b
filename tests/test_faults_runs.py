"""Faults of checkpoints, run folders, disks and processes: real stages, stopped and damaged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import BASE, CLAP, ROOT, ok, script
from faults import Case, check, hashes
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from clap2diffusion.base.tensor_file import digest, read_tensors, unflatten
from clap2diffusion.pictures.inputs import adapter_facts


@dataclass(frozen=True)
class Place:
    """What a case is made from: its own folder, the finished small run, that run's config and its data."""
    d: Path
    run: Path
    config: Path
    world: Path

    def stage(self, n: int, *more) -> list:
        return [f"train_stage{n}.py", "--config", self.config, "--run", self.d, *more]

    def half_done(self, last: int = 9) -> Path:
        """Put stage 1 here as it was after step `last`. Returns its folder of checkpoints."""
        shutil.copytree(self.run / "stage1", self.d / "stage1")
        for path in [*(self.d / "stage1").glob("*.*"), *(self.d / "stage1/checkpoints").iterdir()]:
            if path.name in ("result.json", "final.safetensors", "adapter.safetensors",
                             "samples.png") or path.stem > f"step-{last:08d}":
                path.unlink()
        return self.d / "stage1/checkpoints"


    def cached_rows(self) -> Path:
        """Copy the finished run's feature cache here. Returns its file of rows."""
        name = json.loads((self.run / "stage1/config.json").read_text())["features"]
        shutil.copytree(self.config.parent / "cache" / name, self.d / "cache" / name)
        return self.d / "cache" / name / "rows-00000.safetensors"


class Attack:
    """Whoever unpickles this leaves a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def foreign(path: Path) -> bytes:
    """A whole safetensors file that another program has written."""
    save_file({"weight": torch.zeros(3)}, path)
    return path.read_bytes()


def flipped(content: bytes) -> bytes:
    content = bytearray(content)
    content[-1000] ^= 1
    return bytes(content)


UNREADABLE = "not a checkpoint of ours (SafetensorError: "
DAMAGE: dict[str, tuple[Callable, str]] = {  # what a file becomes, and what is said of it
    "truncated": (lambda p, d: p.read_bytes()[:-50], UNREADABLE),
    "empty": (lambda p, d: b"", UNREADABLE),
    "another program's": (lambda p, d: foreign(d / "foreign"),
                          "not a checkpoint of ours (KeyError: 'clap2diffusion')"),
    "one bit flipped in the": (lambda p, d: flipped(p.read_bytes()),
                               "its content does not match its SHA-256"),
    "a pickle as": (lambda p, d: pickle.dumps(Attack(d / "executed")), UNREADABLE),
}


def nothing_ran(d: Path, _) -> None:
    assert not (d / "executed").exists()


def ends_as_the_unbroken(d: Path, done) -> None:
    nothing_ran(d, done)
    ours, unbroken = (load_file(place / "stage1/final.safetensors") for place in (d, done.unbroken))
    assert ours.keys() == unbroken.keys() and all(torch.equal(ours[key], unbroken[key]) for key in unbroken)


def damaged_newest(kind: str):
    def make(c: Place) -> list:
        newest = c.half_done() / "step-00000009.safetensors"
        newest.write_bytes(DAMAGE[kind][0](newest, c.d))
        return c.stage(1)
    return make


def damaged_given(kind: str):
    def make(c: Place) -> list:
        (c.d / "given").mkdir()
        path = c.d / "given/final.safetensors"
        path.write_bytes(DAMAGE[kind][0](c.run / "stage1/final.safetensors", c.d))
        return c.stage(2, "--init-from", c.d / "given")
    return make


def two_damaged(c: Place) -> list:
    """The two newest are broken; --keep 2 must not drop the good one below them."""
    c.half_done(10)
    for step in (9, 10):
        (c.d / f"stage1/checkpoints/step-{step:08d}.safetensors").write_bytes(b"")
    return c.stage(1, "--keep", 2)


def keeps_two(d: Path, done) -> None:
    ends_as_the_unbroken(d, done)
    whole, broken = (sorted(path.name for path in (d / "stage1/checkpoints").glob(f"*.{kind}"))
                     for kind in ("safetensors", "broken"))
    assert whole == ["step-00000009.safetensors", "step-00000010.safetensors"] and len(broken) == 2


def best_damaged(c: Place) -> list:
    c.half_done(10)
    (c.d / "stage1/best.safetensors").write_bytes(b"")
    return c.stage(1)


def final_lost(c: Place) -> list:
    shutil.copytree(c.run / "stage1", c.d / "stage1")
    (c.d / "stage1/final.safetensors").unlink()
    return c.stage(1)


def renamed_copy(c: Place) -> list:
    """The user has kept a copy of a checkpoint beside the others."""
    folder = c.half_done()
    shutil.copy(folder / "step-00000006.safetensors", folder / "step-00000006-good.safetensors")
    return c.stage(1)


def decays_by_a_half(d: Path, done) -> None:
    header, tensors = read_tensors(d / "stage1/checkpoints/step-00000010.safetensors")
    groups = unflatten(header["objects"]["optimizer"], tensors)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5] * len(groups)


def all_damaged(c: Place) -> list:
    for path in c.half_done().iterdir():
        path.write_bytes(b"")
    return c.stage(1)


def rewritten(change):
    """A result of stage 1, changed by a program that writes the right digest."""
    def make(c: Place) -> list:
        header, tensors = read_tensors(c.run / "stage1/final.safetensors")
        header.pop("sha256")
        change(header, tensors)
        (c.d / "given").mkdir()
        save_file(tensors, c.d / "given/final.safetensors",
                  {"clap2diffusion": json.dumps({**header, "sha256": digest(header, tensors)})})
        return c.stage(2, "--init-from", c.d / "given")
    return make


NORM = "audio_proj.norm.weight"


def drop(header: dict, tensors: dict) -> None:
    del tensors[NORM]
    pairs = header["objects"]["audio_proj"]["pairs"]
    pairs[:] = [pair for pair in pairs if pair[0] != "norm.weight"]


def dangle(header: dict, tensors: dict) -> None:
    del tensors[NORM]


def add(header: dict, tensors: dict) -> None:
    tensors["audio_proj.more"] = torch.zeros(2)
    header["objects"]["audio_proj"]["pairs"].append(["more", {"tensor": "audio_proj.more"}])


def narrow(header: dict, tensors: dict) -> None:
    tensors[NORM] = tensors[NORM][:5].clone()


def stale(c: Place) -> list:
    (c.half_done() / ".step-00000011.safetensors.123.tmp").write_bytes(b"half")
    return c.stage(1)


def older_by_time(c: Place) -> list:
    """The file of step 6 is made the newest by its time."""
    path = c.half_done() / "step-00000006.safetensors"
    os.utime(path, (time.time() + 1000,) * 2)
    return c.stage(1)


def undeletable(c: Place) -> list:
    (c.half_done() / "step-00000003.safetensors").mkdir()
    return c.stage(1)


def resumed(*flags, last: int = 9):
    def make(c: Place) -> list:
        c.half_done(last)
        return c.stage(1, *flags)
    return make


def other_base(c: Place) -> list:
    shutil.copytree(BASE, c.d / "base")
    weights = c.d / "base/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes()))
    c.half_done()
    return c.stage(1, "--base-model", c.d / "base")


def other_data(c: Place) -> list:
    shutil.copytree(c.world, c.d / "world")
    lines = (c.d / "world/metadata.jsonl").read_text().splitlines()
    (c.d / "world/metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    c.half_done()
    return c.stage(1, "--data-root", c.d / "world", "--cache-dir", c.d / "cache")


def finished(*flags):
    def make(c: Place) -> list:
        shutil.copytree(c.run / "stage1", c.d / "stage1")
        return c.stage(1, *flags)
    return make


def stage_3(*flags, change=None):
    """The finished stage 3 here, and beside it the stage 2 that it began from."""
    def make(c: Place) -> list:
        for n in (2, 3):
            shutil.copytree(c.run / f"stage{n}", c.d / f"stage{n}")
        if change:
            change(c)
        return c.stage(3, *flags)
    return make


def stage_3_begun(*flags):
    """A stage 3 that begins from the finished run's stage 2."""
    return lambda c: c.stage(3, "--init-from", c.run / "stage2", *flags)


def by_other_code(stage_1, name: str):
    """stage_1(c) makes the place and the command; then the header of the file `name` knows other code."""
    def make(c: Place) -> list:
        command, path = stage_1(c), c.d / "stage1" / name
        header, tensors = read_tensors(path)
        header.pop("sha256")
        header["code"] |= {"script": "0" * 12, "clap2diffusion/engine/gone.py": "1" * 12}
        header["sha256"] = digest(header, tensors)
        save_file(tensors, path, {"clap2diffusion": json.dumps(header)})
        return command
    return make


OTHER_CODE = "was made by other code than this: clap2diffusion/engine/gone.py, train_stage1.py changed since"


def of_old(stage_1, *names: str):
    """The same with headers and results as they were written before they held names, history and code."""
    def make(c: Place) -> list:
        command = stage_1(c)
        for name in names:
            header, tensors = read_tensors(c.d / "stage1" / name)
            for key in ("sha256", "code", "name", "history", "best_step", "warning"):
                header.pop(key, None)
            save_file(tensors, c.d / "stage1" / name,
                      {"clap2diffusion": json.dumps({**header, "sha256": digest(header, tensors)})})
        return command
    return make


def says_nothing_of_code(d: Path, done) -> None:
    assert "other code" not in done.stdout + done.stderr


def as_it_was(d: Path, done) -> None:
    """A finished stage 1 was neither trained on nor written anew."""
    before_the_models(d, done)
    for name in ("final.safetensors", "adapter.safetensors", "result.json", "config.json"):
        assert (d / "stage1" / name).read_bytes() == (done.unbroken / "stage1" / name).read_bytes()


def spelled_otherwise(c: Place) -> list:
    return [*finished()(c), "--data-root", f"{c.world}/../{c.world.name}/", "--base-model",
            os.path.relpath(BASE)]


def moved_models(stage_1):
    """Copies of both models, in another place."""
    def make(c: Place) -> list:
        shutil.copytree(CLAP, c.d / "clap")
        shutil.copytree(BASE, c.d / "base")
        return [*stage_1(c), "--clap-model", c.d / "clap", "--base-model", c.d / "base"]
    return make


def other_base_finished(c: Place) -> list:
    command = other_base(c)
    shutil.rmtree(c.d / "stage1")
    shutil.copytree(c.run / "stage1", c.d / "stage1")
    return command


def learned_nothing(d: Path, done) -> None:
    """It is the last line, and in the headers that the page and generate.py read."""
    said = f"warning: {d}/stage1: {NOTHING}"
    assert done.stderr.strip().splitlines()[-1].startswith(said)
    assert said in (d / "stage1/log.txt").read_text()
    result = json.loads((d / "stage1/result.json").read_text())
    header, ours = read_tensors(d / "stage1/final.safetensors")
    begun = load_file(d / "stage1/checkpoints/step-00000000.safetensors")
    assert all(torch.equal(value, begun[key]) for key, value in ours.items())
    facts = adapter_facts(d / "stage1/adapter.safetensors")
    for found in (result, header, facts):
        assert found["best_step"] == 0 and found["warning"].startswith(NOTHING)


def began_from_nothing(c: Place) -> list:
    ok(script(*c.stage(1, "--learning-rate", 0, "--steps", 1)))
    return c.stage(2, "--steps", 1)


def learned_nothing_before(c: Place) -> list:
    """A finished stage of before results held a warning, by the step of its best weights alone."""
    command = finished()(c)
    path = c.d / "stage1/result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: v for k, v in result.items() if k != "warning"}, "best_step": 0}))
    return command


def has_gone_on(d: Path, done) -> None:
    """To 12 steps; the result of ten is kept. hashes() has its files by their old names."""
    assert json.loads((d / "stage1/result.json").read_text())["steps"] == 12
    for name in ("result.json", "final.safetensors", "adapter.safetensors"):
        assert (d / "stage1/ended-00000010" / name).read_bytes() == (
            done.unbroken / "stage1" / name).read_bytes()


def ended_early(c: Place) -> list:
    """A finished stage 3 whose gate was in the window at step 10 of 50."""
    command = stage_3("--steps", 40)(c)
    for name, change in (("result", {"ended": "tanh(gate) in the window for 3 steps"}),
                         ("config", {"steps": 50})):
        path = c.d / f"stage3/{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return command


def has_a_usable_adapter(verdict: str):
    """The stage is finished whatever its verdict, and everything says which it was."""
    def then(d: Path, done) -> None:
        result = json.loads((d / "stage3/result.json").read_text())
        facts = adapter_facts(d / "stage3/adapter.safetensors")
        assert result["verdict"] == facts["verdict"] == verdict
        assert facts["warning"] == result["warning"] and result["warning"] in done.stderr.splitlines()[-1]
        assert result["stock_difference"] < 1e-4 and (d / "stage3/final.safetensors").exists()
    return then


def without_proof(d: Path, done) -> None:
    has_a_usable_adapter("settled elsewhere")(d, done)
    assert done.stderr.strip().splitlines()[-1].startswith(f"warning: {d}/stage3: settled elsewhere: ")


def keeps_a_backup(d: Path, done) -> None:
    [backup] = d.glob("stage1.before-*")
    assert (backup / "final.safetensors").read_bytes() == (
        done.unbroken / "stage1/final.safetensors").read_bytes()
    assert str(backup) in done.stdout and json.loads((d / "stage1/result.json").read_text())["steps"] == 1


def at(name: str, make):
    """The run folder is what make(path) leaves there."""
    def build(c: Place) -> list:
        make(c.d / name)
        return ["train_stage1.py", "--config", c.config, "--run", c.d / name]
    return build


def before_the_models(d: Path, done) -> None:
    assert "features of" not in done.stdout and "starting at" not in done.stdout


def unfinished(c: Place) -> list:
    (c.d / "stage1").mkdir()
    return c.stage(2)


def another_stage_1(c: Place) -> list:
    """A finished stage 2 beside another stage 1 than the one it began from."""
    shutil.copytree(c.run / "stage2", c.d / "stage2")
    shutil.copytree(c.run / "stage1", c.d / "stage1")
    header, tensors = read_tensors(c.d / "stage1/final.safetensors")
    header.pop("sha256")
    tensors[NORM] = tensors[NORM] + 1
    save_file(tensors, c.d / "stage1/final.safetensors",
              {"clap2diffusion": json.dumps({**header, "sha256": digest(header, tensors)})})
    return c.stage(2)


def damaged_shard(kind: str):
    """The feature cache of the finished run, with one shard replaced."""
    def make(c: Place) -> list:
        shard = c.cached_rows()
        shard.write_bytes(DAMAGE[kind][0](shard, c.d))
        return c.stage(1, "--cache-dir", c.d / "cache", "--steps", 1, "--samples", 0)
    return make


def poisoned(share: str):
    """The feature cache with NaN in the latents of some training rows, as a broken encoder would leave it."""
    def make(c: Place) -> list:
        shard = c.cached_rows()
        with safe_open(shard, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
        tensors["latents_mean"][slice(0, 40) if share == "all" else slice(7, 8)] = torch.nan
        save_file(tensors, shard, metadata)
        return c.stage(1, "--cache-dir", c.d / "cache", "--samples", 0, "--workers", 0, "--save-every", 1,
                       "--keep", 20)
    return make


def skips_one_update(d: Path, done) -> None:
    """Ten steps of four show each of forty rows once. The step with the bad row changes nothing."""
    losses = [json.loads(line) for line in (d / "stage1/log.jsonl").read_text().splitlines()]
    [bad] = [line["step"] for line in losses if "loss" in line and line["loss"] != line["loss"]]
    states = {step: read_tensors(d / f"stage1/checkpoints/step-{step:08d}.safetensors")[1]
              for step in range(11)}
    for step in range(1, 11):
        same = all(torch.equal(value, states[step - 1][key])
                   for key, value in states[step].items() if key in states[step - 1])
        assert same == (step == bad) and all(value.isfinite().all() for value in states[step].values()), step


def generate(*flags, run: str = "run"):
    """generate.py with a good sound in front."""
    def make(c: Place) -> list:
        sound = sorted((c.world / "audio").glob("test-*.wav"))[0]
        given = [c.d / str(one)[2:] if str(one).startswith("d/") else one for one in flags]
        return ["generate.py", "--run", c.run if run == "run" else c.d / run, "--audio", sound, "--out",
                c.d / "o.png", "--steps", 2, *given]
    return make


def with_lora(make, name: str = "l.safetensors"):
    """generate.py with the LoRA that make(path, the small models' LCM LoRA as bytes) writes."""
    def build(c: Place) -> list:
        make(c.d / name, (ROOT / "assets/tiny/lcm_lora.safetensors").read_bytes())
        return generate("--lora", c.d / name)(c)
    return build


def attacks(path: Path, _) -> None:
    path.write_bytes(pickle.dumps(Attack(path.parent / "executed")))


def lora_tensors(change):
    """The LoRA with change(name, tensor) of each of its tensors."""
    def make(path: Path, whole: bytes) -> None:
        tensors = dict(change(name, one) for name, one in load(whole).items())
        path.write_bytes(save({name: one.contiguous() for name, one in tensors.items()}))
    return make


def generate_from(make):
    def build(c: Place) -> list:
        path = c.d / "a.wav"
        make(path)
        return ["generate.py", "--run", c.run, "--audio", path, "--out", c.d / "o.png"]
    return build


def damaged_adapter(kind: str):
    def make(c: Place) -> list:
        (c.d / "given").mkdir()
        content = DAMAGE[kind][0](c.run / "stage3/adapter.safetensors", c.d)
        (c.d / "given/adapter.safetensors").write_bytes(content)
        return generate(run="given")(c)
    return make


def sent(script_name: str, **models):
    """An adapter that came from another machine, where its base model or CLAP lay in another folder."""
    def make(c: Place) -> list:
        header, tensors = {}, {}
        with safe_open(c.run / "stage3/adapter.safetensors", "np") as file:
            header |= json.loads(file.metadata()["clap2diffusion"]) | models
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
        header.pop("sha256")
        header["sha256"] = digest(header, tensors)
        (c.d / "given").mkdir()
        save_file({key: torch.from_numpy(value) for key, value in tensors.items()},
                  c.d / "given/adapter.safetensors", {"clap2diffusion": json.dumps(header)})
        if script_name == "evaluate.py":
            return [script_name, "--run", c.d / "given", "--data-root", c.world, "--quick"]
        return generate(run="given")(c)
    return make


def other_clap(c: Place) -> list:
    shutil.copytree(CLAP, c.d / "clap")
    weights = c.d / "clap/model.safetensors"
    tensors = load_file(weights)
    tensors["audio_projection.linear2.bias"][0] += 1e-3  # of the part that hears
    save_file(tensors, weights, {"format": "pt"})
    return generate("--clap-model", "d/clap")(c)


def no_picture(d: Path, _) -> None:
    assert not (d / "o.png").exists() and not (d / "executed").exists()


def world_into(make, *flags):
    def build(c: Place) -> list:
        make(c.d / "out")
        return ["prepare_data.py", "world", "--out", c.d / "out", "--train", 4, "--val", 2, "--test", 2,
                *flags]
    return build


def made_with_another_seed(path: Path) -> None:
    ok(script("prepare_data.py", "world", "--out", path, "--train", 4, "--val", 2, "--test", 2, "--seed", 1))


def stops_at_a_limit(d: Path, done) -> None:
    assert not (d / "out/metadata.jsonl").exists()


def bad_rows(*flags):
    """Among 71 rows a text as sound, an empty picture and half a line."""
    def make(c: Place) -> list:
        shutil.copytree(c.world, c.d / "world")
        lines = (c.world / "metadata.jsonl").read_text().splitlines()
        (c.d / "world" / json.loads(lines[3])["audio_file_name"]).write_bytes(b"not a sound")
        (c.d / "world" / json.loads(lines[5])["image_file_name"]).write_bytes(b"")
        (c.d / "world/metadata.jsonl").write_text("\n".join(lines) + '\n{"half": ')
        return c.stage(1, "--data-root", c.d / "world", "--cache-dir", c.d / "cache", "--steps", 1,
                       "--samples", 0, *flags)
    return make


def lists_all_three(d: Path, done) -> None:
    assert all(word in done.stdout for word in ("train-00003.wav", "train-00005.png", "line 71"))


def trains_on_the_rest(d: Path, done) -> None:
    lists_all_three(d, done)
    assert "38 train" in done.stdout


def left_out(*command, stages=(1, 2, 3)):
    """A finished run whose data have since lost two test pictures and a test sound."""
    def make(c: Place) -> list:
        for n in stages:
            shutil.copytree(c.run / f"stage{n}", c.d / f"run/stage{n}")
        shutil.copytree(c.world, c.d / "world")
        tests = [one for one in map(json.loads, (c.world / "metadata.jsonl").read_text().splitlines())
                 if one["split"] == "test"]
        (c.d / "world" / tests[0]["image_file_name"]).write_bytes(b"")
        (c.d / "world" / tests[1]["image_file_name"]).unlink()
        sound = c.d / "world" / tests[2]["audio_file_name"]
        sound.write_bytes(sound.read_bytes()[:-1000])
        for path in (c.d / "run").glob("stage*/config.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "data_root": str(c.d / "world")}))
        return [*command, "--run", c.d / "run", "--steps", 2]
    return make


def says_which(d: Path, done) -> None:
    assert done.stdout.count("left out: ") == 3 and "truncated" in done.stdout
    assert "no such file" in done.stdout


def made_in_bf16(c: Place) -> list:
    ok(script(*c.stage(1, "--precision", "bf16", "--frozen-dtype", "bf16", "--steps", 1, "--samples", 0)))
    return c.stage(2, "--precision", "fp32", "--frozen-dtype", "fp32", "--steps", 1, "--samples", 0)


def few_rows(c: Place) -> list:
    return c.stage(1, "--batch-size", 41, "--cache-dir", c.config.parent / "cache")


FINISHED = "error: {d}/stage1: is finished, and was made with other settings than asked for now ("
NOTHING = "best is step 0 by val_right: nothing that this stage learned is kept"
RESUME = "{d}/stage1/checkpoints/step-00000009.safetensors: "
CHECKPOINTS = [
    *(Case(f"{kind} newest checkpoint", damaged_newest(kind), 0,
           RESUME + says + "*; falling back to the one before", ends_as_the_unbroken)
      for kind, (_, says) in DAMAGE.items()),
    Case("the two newest damaged, with --keep 2", two_damaged, 0,
         "{d}/stage1/checkpoints/step-00000009.safetensors: *; falling back to the one before", keeps_two),
    Case("every checkpoint damaged", all_damaged, 2, "error: {d}/stage1/checkpoints: no checkpoint there is "
         "whole; begin anew with --fresh, which keeps them"),
    *(Case(f"{kind} checkpoint given by name", damaged_given(kind), 2,
           "error: {d}/given/final.safetensors: " + says, nothing_ran)
      for kind, (_, says) in DAMAGE.items()),
    Case("another stage's file", lambda c: c.stage(2, "--init-from", c.run / "stage2"), 2,
         "/stage2/final.safetensors: is of stage2, expected a result of stage1"),
    Case("an unknown format version", rewritten(lambda header, tensors: header.update(format=99)), 2,
         "error: {d}/given/final.safetensors: format version 99, expected 1"),
    Case("a missing tensor", rewritten(drop), 2,
         "error: {d}/given/final.safetensors: audio_proj.norm.weight is absent, this run expects (128,)"),
    Case("a tensor that is named and not there", rewritten(dangle), 2,
         "error: {d}/given/final.safetensors: the header of audio_proj does not fit its tensors (KeyError: "),
    Case("an unexpected tensor", rewritten(add), 2,
         "error: {d}/given/final.safetensors: audio_proj.more is (2,), this run expects absent"),
    Case("a tensor of another size", rewritten(narrow), 2,
         "error: {d}/given/final.safetensors: audio_proj.norm.weight is (5,), this run expects (128,)"),
    Case("a result of other models",
         lambda c: ["train_stage2.py", *other_base(c)[1:], "--init-from", c.run / "stage1"], 2,
         "/stage1/final.safetensors: belongs to models "),
    Case("temporary files of a killed save", stale, 0,
         "/.step-00000011.safetensors.123.tmp: left by an interrupted save, removed", ends_as_the_unbroken),
    Case("file times that lie", older_by_time, 0, "resuming at step 9", ends_as_the_unbroken),
    Case("a copy of a checkpoint under a name of the user's", renamed_copy, 0, "resuming at step 9",
         ends_as_the_unbroken),
    Case("the best weights damaged", best_damaged, 0,
         "{d}/stage1/best.safetensors: not a checkpoint of ours (*; the weights of the last step are taken"),
    Case("the result lost from a finished run", final_lost, 0, "stage1: done (all steps)",
         ends_as_the_unbroken),
    Case("an old checkpoint that cannot be deleted", undeletable, 0,
         "/step-00000003.safetensors: could not be deleted", ends_as_the_unbroken),
]
FOLDERS = [
    Case("the run folder is a file", at("f", lambda p: p.write_text("")), 2,
         "error: {d}/f/stage1: cannot be used as output folder (Not a directory)", before_the_models),
    Case("the run folder is a link to nothing", at("f", lambda p: p.symlink_to(p.parent / "none")), 2,
         "error: {d}/f/stage1: cannot be used as output folder (", before_the_models),
    Case("a run folder that cannot be written",
         lambda c: ["train_stage1.py", "--config", c.config, "--run", "/proc/run"], 2,
         "error: /proc/run/stage1: cannot be used as output folder (", before_the_models),
    Case("a log folder that is a file",
         lambda c: (c.d / "f").write_text("x") and c.stage(1, "--log-dir", c.d / "f"), 2,
         "error: --log-dir {d}/f: cannot be used (File exists); give a folder that can be written",
         before_the_models),
    Case("a cache folder that cannot be written", lambda c: c.stage(1, "--cache-dir", "/proc/cache"), 2,
         "the feature cache cannot be written (*); choose another --cache-dir"),
    Case("stage 2 without stage 1", lambda c: c.stage(2), 2, "error: {d}/stage1/final.safetensors: "
         "stage1 has not run; run first: python train_stage1.py --config "),
    Case("stage 2 after an unfinished stage 1", unfinished, 2, "error: {d}/stage1/final.safetensors: "
         "stage1 is not finished; run first: python train_stage1.py --config "),
    Case("stage 3 without stage 2", lambda c: c.stage(3), 2, "error: {d}/stage2/final.safetensors: "
         "stage2 has not run; run first: python train_stage2.py --config "),
    Case("a finished stage 2 beside another stage 1", another_stage_1, 2,
         "error: {d}/stage2: began from another result of the stage before than the one there now"),
    Case("resuming with another learning rate", resumed("--learning-rate", 0.5), 2,
         RESUME + "was made with other settings (learning_rate 0.001 -> 0.5); give the old ones, begin anew "
         "with --fresh, or go on with the new ones with --allow-changed"),
    Case("the same, allowed", resumed("--learning-rate", 0.5, "--allow-changed"), 0, "resuming at step 9"),
    Case("another weight decay, allowed", resumed("--weight-decay", 0.5, "--allow-changed"), 0,
         "resuming at step 9", decays_by_a_half),
    Case("without the whitening, allowed", resumed("--no-whiten", "--allow-changed"), 2, RESUME + "was made "
         "with whiten True -> False, which cannot change within a run; give the old one, or begin anew with "
         "--fresh"),
    Case("with 8-bit Adam, allowed", resumed("--adam-8bit", "--allow-changed"), 2,
         RESUME + "was made with adam_8bit False -> True, which cannot change within a run"),
    Case("resuming with other dimensions", resumed("--num-tokens", 4), 2,
         RESUME + "was made with dims *'num_tokens': 8*, this run has *'num_tokens': 4"),
    Case("resuming with another base model", other_base, 2, RESUME + "was made with fingerprints "),
    Case("resuming with other data", other_data, 2, RESUME + "was made with other settings ("),
    Case("resuming with another log interval", resumed("--log-every", 2), 0, "resuming at step 9",
         ends_as_the_unbroken),
    Case("fewer steps asked for than are done", resumed("--steps", 4, "--allow-changed"), 0,
         "stage1: done (all steps)"),
    Case("the same command again when all is done", finished(), 0, "{d}/stage1: already complete"),
    Case("another learning rate on a finished run", finished("--learning-rate", 0.5), 2,
         FINISHED + "learning_rate 0.001 -> 0.5); give the old ones, begin anew with --fresh, which keeps a "
         "backup, or keep it as it is with --allow-changed", as_it_was),
    Case("several changes on a finished run, the whitening among them", finished(
        "--no-whiten", "--seed", 3, "--batch-size", 2), 2, FINISHED + "batch_size 4 -> 2; seed 0 -> 3; "
        "whiten True -> False); give the old ones", as_it_was),
    Case("another learning rate on a finished run, allowed",
         finished("--learning-rate", 0.5, "--allow-changed"), 0, "{d}/stage1: already complete; made with "
         "other settings than asked for now: learning_rate 0.001 -> 0.5 (--fresh begins anew", as_it_was),
    Case("other places and logs on a finished run",
         finished("--log-every", 3, "--workers", 1, "--samples", 2), 0,
         "{d}/stage1: already complete (--fresh", as_it_was),
    Case("the same folders, spelled otherwise, on a finished run", spelled_otherwise, 0,
         "{d}/stage1: already complete (--fresh", as_it_was),
    Case("the same models in another place, on a finished run", moved_models(finished()), 0,
         "{d}/stage1: already complete (--fresh", as_it_was),
    Case("the same models in another place, on a resumed run", moved_models(resumed()), 0,
         "resuming at step 9", ends_as_the_unbroken),
    Case("another base model in a finished run", other_base_finished, 2, "error: {d}/stage1: is finished, "
         "and belongs to models *; give the --base-model and --clap-model it was trained with", as_it_was),
    Case("more steps on a finished run whose rate falls to its end", finished("--steps", 20), 2,
         FINISHED + "steps 10 -> 20); the schedule of the learning rate depends on --steps, so the steps "
         "that are done would differ; give the old ones, begin anew with --fresh, which keeps a backup, or "
         "go on with the new ones with --allow-changed", as_it_was),
    Case("more steps on a finished run whose rate falls to its end, allowed",
         finished("--steps", 12, "--allow-changed", "--samples", 0), 0, "{d}/stage1: is finished, and goes "
         "on from step 10 to step 12; its result of step 10 goes to {d}/stage1/ended-00000010",
         has_gone_on),
    Case("fewer steps on a finished run", finished("--steps", 4), 2,
         FINISHED + "steps 10 -> 4); 10 steps are done already; give the old ones, begin anew with --fresh, "
         "which keeps a backup, or keep it as it is with --allow-changed", as_it_was),
    Case("more steps and another setting on a finished stage 3", stage_3("--steps", 12, "--seed", 1), 2,
         "error: {d}/stage3: is finished, and was made with other settings than asked for now (seed 0 -> 1; "
         "steps 10 -> 12); give the old ones"),
    Case("more steps on a finished stage 3 without its checkpoints",
         stage_3("--steps", 12, change=lambda c: shutil.rmtree(c.d / "stage3/checkpoints")), 2,
         "error: {d}/stage3/checkpoints: holds no checkpoint to go on from to step 12; give --steps 10"),
    Case("more steps on a stage 3 that ended by itself", ended_early, 0, "{d}/stage3: already complete; it "
         "ended at step 10 by itself (tanh(gate) in the window for 3 steps): --steps 40 changes nothing"),
    Case("another script on a finished run", by_other_code(finished(), "final.safetensors"), 0,
         "warning: {d}/stage1/final.safetensors: " + OTHER_CODE),
    Case("another script on a resumed run",
         by_other_code(resumed(), "checkpoints/step-00000009.safetensors"), 0,
         "warning: " + RESUME + OTHER_CODE, ends_as_the_unbroken),
    Case("a finished run from before the code was noted", of_old(finished(), "final.safetensors"), 0,
         "{d}/stage1: already complete (--fresh", says_nothing_of_code),
    Case("a resumed run from before the code was noted",
         of_old(resumed(), "checkpoints/step-00000009.safetensors"), 0, "resuming at step 9",
         says_nothing_of_code),
    Case("more steps on a resumed run whose rate falls to its end", resumed("--steps", 20), 2,
         RESUME + "was made with other settings (steps 10 -> 20)"),
    Case("a stage that learns nothing", lambda c: c.stage(1, "--learning-rate", 0, "--steps", 2), 0,
         "warning: {d}/stage1: " + NOTHING, learned_nothing),
    Case("a stage 2 that begins from a stage 1 that learned nothing", began_from_nothing, 0,
         "warning: {d}/stage1/final.safetensors: " + NOTHING),
    Case("a finished run of before, which learned nothing", learned_nothing_before, 0,
         "warning: {d}/stage1: " + NOTHING),
    Case("a gate that ends outside the window", stage_3_begun("--steps", 2, "--require-proof"), 3,
         "error: {d}/stage3: settled elsewhere: the gate has not come into the window, and *: tanh(gate) 0.* "
         "after 2 steps, the window is [0.35, 0.45]; over the last 2 steps it was between *; the adapter is "
         "finished and carries this as a warning; see sweep.png there",
         has_a_usable_adapter("settled elsewhere")),
    Case("the same, without a proof", stage_3_begun("--steps", 2), 0, "stage3: done (all steps, outside the "
         "window)", without_proof),
    Case("a window in which no gate can be", lambda c: c.stage(3, "--window-low", 0.5), 2,
         "error: --window-low 0.5 is not below --window-high 0.45: no gate could come into the window"),
    Case("a fresh start over a finished run", finished("--fresh", "--steps", 1, "--samples", 0), 0,
         "{d}/stage1: the old run is kept in {d}/stage1.before-", keeps_a_backup),
    Case("fewer rows than a batch", few_rows, 2, "has 40 rows, fewer than a batch of 41"),
    Case("bad rows above the limit", bad_rows(), 2, "error: 3 of 71 rows cannot be used (limit 1 %), listed "
         "in *bad_rows.txt; mend or remove them, or raise --max-bad-share", lists_all_three),
    Case("a few bad rows below the limit", bad_rows("--max-bad-share", 0.1), 0,
         "3 of 71 rows cannot be used (limit 10 %), listed in *bad_rows.txt; they are left out",
         trains_on_the_rest),
    Case("a result that was trained in BF16, carried on in float32", made_in_bf16, 0, "stage2: done"),
    Case("CUDA asked for without a GPU", lambda c: c.stage(1, "--device", "cuda"), 2,
         "error: --device cuda: torch sees no CUDA device here; use --device cpu or auto", before_the_models),
    Case("a pickle as feature shard", damaged_shard("a pickle as"), 0, "/rows-00000.safetensors is damaged",
         nothing_ran),
    Case("a truncated feature shard", damaged_shard("truncated"), 0, "/rows-00000.safetensors is damaged"),
    Case("a row whose loss is NaN", poisoned("one"), 0,
         ": loss nan, gradient norm nan: update skipped; samples *train-00007", skips_one_update),
    Case("three updates in a row whose loss is NaN", poisoned("all"), 1,
         "error: {d}/stage1: loss or gradient not finite in steps 0 to 2; nothing of these steps was kept"),
]
PICTURES = [
    Case("no run to make a picture with", generate(run="none"), 2,
         "error: {d}/none: holds no adapter.safetensors; expected a run folder with a finished stage",
         no_picture),
    *(Case(f"{kind} adapter", damaged_adapter(kind), 2,
           "error: {d}/given/adapter.safetensors: not an adapter of ours", no_picture)
      for kind in ("truncated", "empty", "another program's", "a pickle as")),
    Case("one bit flipped in the adapter", damaged_adapter("one bit flipped in the"), 2,
         "error: {d}/given/adapter.safetensors: its content does not match its SHA-256", no_picture),
    Case("an adapter whose base model lies elsewhere now", sent("generate.py", base_model="/theirs/base"), 2,
         "error: base model '/theirs/base': there is no such folder *; {d}/given/adapter.safetensors was "
         "trained with it: if it lies elsewhere now, say where with --base-model", no_picture),
    Case("an adapter whose CLAP lies elsewhere now", sent("generate.py", clap_model="/theirs/clap"), 2,
         "error: CLAP model '/theirs/clap': there is no such folder *; {d}/given/adapter.safetensors was "
         "trained with it: if it lies elsewhere now, say where with --clap-model", no_picture),
    Case("judging an adapter whose base model lies elsewhere now",
         sent("evaluate.py", base_model="/theirs/base"), 2, "say where with --base-model"),
    Case("judging an adapter whose CLAP lies elsewhere now",
         sent("evaluate.py", clap_model="/theirs/clap"), 2, "say where with --clap-model"),
    Case("another CLAP than the adapter's", other_clap, 2,
         "error: {d}/clap: is CLAP *, but * was trained with CLAP ", no_picture),
    Case("a sound that is missing", generate_from(lambda p: None), 2,
         "error: --audio {d}/a.wav: is not a file; expected a sound or video file", no_picture),
    Case("a folder as sound for a picture", generate_from(lambda p: p.mkdir()), 2,
         "error: --audio {d}/a.wav: is not a file; expected a sound or video file", no_picture),
    Case("a text as sound for a picture", generate_from(lambda p: p.write_text("no sound")), 2,
         "error: {d}/a.wav: not a sound that libsndfile or FFmpeg reads", no_picture),
    Case("a picture into a folder that is not there", generate("--out", "d/no/o.png"), 2,
         "error: --out {d}/no/o.png: {d}/no is not a folder that can be written to; make it first"),
    Case("a picture that is no PNG", generate("--out", "d/o.jpg"), 2,
         "error: --out {d}/o.jpg: expected a name that ends in .png"),
    Case("a broken picture to begin from",
         lambda c: (c.d / "i.png").write_bytes(b"x") and generate("--init-image", "d/i.png")(c), 2,
         "error: --init-image {d}/i.png: not a picture that Pillow reads", no_picture),
    Case("a LoRA that is not there", generate("--lora", "d/l.safetensors"), 2,
         "error: --lora {d}/l.safetensors: is not a file; expected a LoRA in one safetensors file",
         no_picture),
    Case("a pickle as LoRA", with_lora(attacks, "l.bin"), 2,
         "error: --lora {d}/l.bin: expected a name that ends in .safetensors; other formats may run code",
         no_picture),
    Case("a pickle as LoRA, by another name", with_lora(attacks), 2,
         "error: --lora {d}/l.safetensors: is not a whole file of weights", no_picture),
    Case("a truncated LoRA", with_lora(lambda p, whole: p.write_bytes(whole[:-1])), 2,
         "error: --lora {d}/l.safetensors: is not a whole file of weights (*; copy or download it again",
         no_picture),
    Case("a LoRA of Stable Diffusion XL", with_lora(lora_tensors(lambda name, x: (
        f"lora_te2_{name[5:].replace('.', '_', 6)}", x))), 2,
         "error: --lora {d}/l.safetensors: * tensors belong to no layer of */base, first lora_te2_*; "
         "expected a LoRA for this base model, not for Stable Diffusion XL", no_picture),
    Case("a LoRA of another base model's size", with_lora(lora_tensors(lambda name, x: (
        name, x.repeat(2, 1) if x.ndim == 2 else x))), 2, "; give a LoRA that was made for this base model",
         no_picture),
    Case("a LoRA with NaN", with_lora(lora_tensors(lambda name, x: (name, x * float("nan")))), 2,
         "error: --lora {d}/l.safetensors: holds NaN or infinity; copy or download it again", no_picture),
    Case("a LoRA that was not trained", with_lora(lora_tensors(lambda name, x: (
        name, x * ("lora_B" not in name)))), 2,
         "error: --lora {d}/l.safetensors: all of it is 0, so it would change nothing", no_picture),
    Case("4 bits in float32 for a picture", generate("--frozen-dtype", "nf4"), 2,
         "error: --frozen-dtype nf4 needs --precision bf16", no_picture),
    Case("judging with a LoRA that is not there", lambda c: [
        "evaluate.py", "--run", c.run, "--lora", c.d / "l.safetensors"], 2,
         "error: --lora {d}/l.safetensors: is not a file"),
    Case("judging a run that is not there", lambda c: ["evaluate.py", "--run", c.d / "none"], 2,
         "error: {d}/none: holds no adapter.safetensors"),
    Case("a report of a run that is not finished", lambda c: ["evaluate.py", "--judge", "", "--run", c.d], 2,
         "error: {d}/stage1/result.json: is missing, so stage1 is not finished"),
    Case("a report after test files were lost", left_out("evaluate.py", "--judge", "", "--columns", 10), 0,
         "left out: zero bytes", says_which),
    Case("judging after test files were lost", left_out("evaluate.py", "--quick", stages=[3]), 0,
         "left out: zero bytes",
         says_which),
    Case("data made with other settings", world_into(made_with_another_seed), 2,
         "error: {d}/out: holds data made with "),
    Case("a data folder that is a file", world_into(lambda p: p.write_text("")), 2,
         "error: {d}/out: cannot be written ("),
    Case("no stamps of Tux Paint",
         lambda c: ["prepare_data.py", "tuxpaint", "--stamps", c.d, "--out", c.d / "out"], 2,
         "error: {d}: holds no stamps with sounds; install them: "),
]
FULL_DISKS = [  # (case, bytes at which the disk is full); an adapter has 7,023,912, best weights 7,026,540
    (Case("a disk that is full at a checkpoint", resumed(), 1,
          "error: no space left in {d}/stage1/checkpoints, * MB needed for step-00000009.safetensors"),
     10_000_000),
    (Case("a disk that is full at the best weights", lambda c: c.stage(1), 1,
          "error: no space left in {d}/stage1, * MB needed for best.safetensors"), 7_025_000),
    (Case("a disk that is full before the first step", lambda c: c.stage(1), 1,
          "error: {d}/stage1: tried before training, with every weight that trains moved: no space left in "
          "{d}/stage1, * MB needed for unproven.safetensors"), 100_000),
    (Case("a disk that is full at the feature cache", lambda c: c.stage(1, "--cache-dir", c.d / "cache"), 1,
          "error: no space left in {d}/cache/*, * MB needed for "), 100_000),
    (Case("a disk that is full while the data are made", world_into(lambda p: None), 1,
          "error: no space left in {d}/out/audio, * MB needed for ", stops_at_a_limit), 20_000),
    (Case("a disk that is full at the picture", generate(), 1, "error: no space left "), 2_000),
]
CASES = CHECKPOINTS + FOLDERS + PICTURES + [case for case, _ in FULL_DISKS]
REPLACED = ("best.safetensors", "step-00000003.safetensors", "step-00000006.safetensors",
            "step-00000009.safetensors", "step-00000010.safetensors", "rows-00000.safetensors")
LIMITS = {case.fault: limit for case, limit in FULL_DISKS}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, tmp_path, run, config, world):
    command = case.make(Place(tmp_path, run, config, world))
    before = {} if "--fresh" in command or case.then is has_gone_on else hashes(tmp_path)
    done = script(*command, file_limit=LIMITS.get(case.fault, 0))
    done.unbroken = run
    check(case, done, tmp_path, before, REPLACED if case.code == 0 or "every" in case.fault else ())
