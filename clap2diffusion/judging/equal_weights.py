"""Which weights two adapters share. Two that hold the same ones make the same pictures: nothing is compared.

The file has sqrt(E), tanh(gate) and LoRA's scale folded in (pictures.pipelines.stock_layout). K/V is compared
without the gate, and LoRA by what it does: one whose B is 0 changes nothing, whatever A was drawn."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from clap2diffusion.base.exits import UserError
from clap2diffusion.judging.history import History
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter

ROUNDING = 2.0 ** -22  # relative; each of two products in float32 is rounded by up to 2^-24


class Shared(NamedTuple):
    """The parts that two adapters have equal and those that differ; a part that neither has is in none. all:
    nothing differs, nor do the models that they are judged with. line: this in words, '' if all differ."""
    equal: list[str]
    differing: list[str]
    all: bool
    line: str


def read_weights(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def _of(weights: dict, pattern: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in weights.items() if re.search(pattern, key)}


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def _same_but_for_gate(a: dict, b: dict, gate_a: float, gate_b: float) -> bool:
    """V of two adapters, each with its tanh(gate) folded in. Of a gate of 0 no V is left to compare."""
    if gate_a == gate_b or not gate_a or not gate_b:
        return _same(a, b) or gate_a != gate_b
    pairs = [(a[key] * gate_b, b[key] * gate_a) for key in a if key in b and a[key].shape == b[key].shape]
    return len(pairs) == len(a) == len(b) and all(
        bool((np.abs(x - y) <= ROUNDING * np.abs(x)).all()) for x, y in pairs)


def _lora(weights: dict) -> dict[str, np.ndarray]:
    """The LoRA that does something: A and B of the layers where neither is 0."""
    layers = {key.rsplit(".", 2)[0] for key in _of(weights, "_lora")}
    active = {layer for layer in layers
              if weights[f"{layer}.up.weight"].any() and weights[f"{layer}.down.weight"].any()}
    return {key: value for key, value in _of(weights, "_lora").items() if key.rsplit(".", 2)[0] in active}


def compare_adapters(path_a: Path, path_b: Path, args: argparse.Namespace) -> Shared:
    """What two adapters share, judged with the flags of evaluate.py: --gate takes the place of both gates,
    and --base-model and --clap-model of both models. Raises UserError: one is no adapter of ours."""
    facts_a, facts_b = adapter_facts(path_a), adapter_facts(path_b)
    a, b = read_weights(path_a), read_weights(path_b)
    gates = facts_a["tanh_gate"], facts_b["tanh_gate"]
    lora_a, lora_b = _lora(a), _lora(b)
    same = {"projection": _same(_of(a, "^image_proj"), _of(b, "^image_proj")),
            "K/V": _same(_of(a, "to_k_ip"), _of(b, "to_k_ip")) and _same_but_for_gate(
                _of(a, "to_v_ip"), _of(b, "to_v_ip"), *gates)}
    if lora_a or lora_b:
        same["LoRA"] = _same(lora_a, lora_b)
    elif _of(a, "_lora") or _of(b, "_lora"):
        same["LoRA (without effect in both)"] = True
    pinned = "stage3" not in (facts_a["stage"], facts_b["stage"])
    gate = "gate (of --gate)" if args.gate is not None else "gate (pinned)" if pinned else "gate"
    same[gate] = args.gate is not None or gates[0] == gates[1]
    models = all(getattr(args, flag) or facts_a["fingerprints"].get(key) == facts_b["fingerprints"].get(key)
                 for key, flag in (("unet", "base_model"), ("clap", "clap_model")))
    equal = [name for name in same if same[name]]
    differing = [name for name in same if not same[name]]
    line = f"A and B hold equal weights: {', '.join(equal)}"
    if differing:  # then "equal weights" would say too much, of a gate that was pinned above all
        line = f"Equal in A and B: {', '.join(equal)}; not equal: {', '.join(differing)}" if equal else ""
    elif not models:
        line += "; the models that they were trained with differ"
    return Shared(equal, differing, not differing and models, line)


def check_against(args: argparse.Namespace) -> Shared:
    """compare_adapters() of --run and --against, said at once.
    Raises UserError: all weights are equal, and --allow-equal is not given."""
    paths = find_adapter(args.run), find_adapter(args.against)
    shared = compare_adapters(*paths, args)
    if shared.all and not args.allow_equal:
        why = [line for path in dict.fromkeys(paths) for line in History(path).warnings() if "step 0" in line]
        raise UserError(f"--against {args.against}: holds the same weights as {args.run} "
                        f"({', '.join(shared.equal)}), so every figure would be the same"
                        f"{''.join(f' ({line})' for line in why)}; give another run, train one of them "
                        "otherwise, or compare them all the same with --allow-equal")
    if shared.line:
        print(f"A is {args.run}, B is {args.against}. {shared.line}", flush=True)
    return shared
