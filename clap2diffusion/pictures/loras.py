"""A LoRA of the user's own beside the adapter's, such as an LCM LoRA: checked before torch loads, then added.

What libraries do not know they leave out, so names and sizes are compared here first. Then every kind of
name, and every kind of factor, becomes the one form that diffusers takes as it is."""

import json
import math
import re
from pathlib import Path

from safetensors import safe_open

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.weights import INTEGERS, Stored, Unusable, find_weights, read_tensors

NAME = "beside"  # under which diffusers holds it, as the adapter's own is faceid_0; peft mixes up "lora"
# how diffusers has named a layer's two matrices, the newest first, then kohya; all as .lora.down and .lora.up
STYLES = [(re.compile(old), new) for old, new in (
    (r"\.lora_A\.weight$", ".lora.down.weight"), (r"\.lora_B\.weight$", ".lora.up.weight"),
    (r"\.lora_linear_layer\.", ".lora."), (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.processor\.(to_[qkv])_lora\.", r".\1.lora."), (r"\.lora_(down|up)\.weight$", r".lora.\1.weight"))]
HALF = re.compile(r"(.+)\.(?:lora\.(down|up)\.weight|(alpha))")
PARTS = {"unet.": "unet", "lora_unet_": "unet", "text_encoder.": "text_encoder",
         "lora_te_": "text_encoder"}
XL = ("lora_te1_", "lora_te2_", "text_encoder_2.", "lora_unet_input_blocks_", "lora_unet_output_blocks_")
CONFIG = "lora_adapter_metadata"  # diffusers' entry in the file's header: peft's LoraConfig of each part
Halves = dict[str, str]  # down, up and, if there is one, alpha of a layer: the tensor's name


def check_lora(name: str, base: Path) -> None:
    """Compare the names and sizes of the tensors of --lora with those of the base model's layers.
    Raises UserError: it is no LoRA for this base model, or of neither format."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--lora {path}: is not a file; expected a LoRA in one safetensors file")
    if path.suffix != ".safetensors":
        raise UserError(f"--lora {path}: expected a name that ends in .safetensors; other formats may run "
                        "code when they are read")
    try:
        tensors = read_tensors([path])
        _compare(tensors, base)
    except Unusable as error:
        raise UserError(f"--lora {path}: {error}".replace(f"{path}: {path} ", f"{path}: ")) from None


def _compare(tensors: dict[str, Stored], base: Path) -> None:
    """Raises Unusable."""
    if any(name.startswith("ip_adapter.") for name in tensors):
        raise Unusable("is an adapter to sounds or pictures, not a LoRA; give it with --run")
    found, shapes, foreign = _layers(tensors), {}, []
    for part in ("unet", "text_encoder"):
        weights = read_tensors(find_weights(base / part)[1])
        # of linear layers and convolutions
        shapes |= {(part, _plain(name.removesuffix(".weight"))): one.shape for name, one in weights.items()
                   if len(one.shape) in (2, 4) and name.endswith(".weight")
                   and not name.endswith("_embedding.weight")}
    for layer, halves in found.items():
        if layer not in shapes:
            foreign += halves.values()
    if foreign:
        raise Unusable(f"{len(foreign)} of its {len(tensors)} tensors belong to no layer of {base}, first "
                       f"{foreign[0]}; expected a LoRA " + (
                           "for this base model, not for Stable Diffusion XL" if
                           any(name.startswith(XL) for name in tensors) else
                           "for this base model, named as diffusers or kohya name it"))
    for layer, halves in found.items():
        _check_sizes(halves, tensors, shapes[layer], base)
    _alphas(next(iter(tensors.values())).path)


def _layers(tensors) -> dict[tuple[str, str], Halves]:
    """(part, layer as kohya writes it) -> the names of its tensors. A tensor that is of no part is a layer of
    its own. Raises Unusable: a tensor is of another kind than a LoRA's, or one is there twice."""
    found: dict[tuple[str, str], Halves] = {}
    for name in tensors:
        prefix, common = next((prefix for prefix in PARTS if name.startswith(prefix)), ""), name
        for old, new in STYLES:
            common = old.sub(new, common)
        match = HALF.fullmatch(common)
        if prefix and not match:
            raise Unusable(f"holds {name}, and is no plain LoRA; LoHa, LoKr, DoRA and biases cannot be used")
        layer = (PARTS[prefix], _plain(match[1].removeprefix(prefix))) if prefix else ("", name)
        halves, half = found.setdefault(layer, {}), match and match[2] or "alpha"
        if half in halves:
            raise Unusable(f"holds {halves[half]} and {name}, which are the same half of one layer; keep one")
        halves[half] = name
    return found


def _plain(layer: str) -> str:
    """A layer's name as kohya writes it. The newest transformers has no text_model."""
    return layer.replace(".", "_").removeprefix("text_model_")


def _check_sizes(halves: Halves, tensors: dict[str, Stored], shape: tuple[int, ...], base: Path) -> None:
    """Compare a layer's tensors with its weight's shape (out, in, ...). Raises Unusable."""
    if not {"down", "up"} <= halves.keys():
        raise Unusable(f"holds {next(iter(halves.values()))} without its other half; copy or download it "
                       "again")
    rank = (*tensors[halves["down"]].shape, 0)[0]
    expected = {"down": (max(1, rank), *shape[1:]), "up": (shape[0], max(1, rank), *(1 for _ in shape[2:]))}
    for half, name in halves.items():
        one = tensors[name]
        if half == "alpha":
            if math.prod(one.shape) != 1:
                raise Unusable(f"its {name} is {_show(one.shape)}, expected one number; copy or download it "
                               "again")
        elif one.shape != expected[half]:
            raise Unusable(f"its {name} is {_show(one.shape)}, the layer of {base} expects "
                           f"{_show(expected[half])}; give a LoRA that was made for this base model")
        elif one.dtype in INTEGERS:
            raise Unusable(f"its {name} is of whole numbers ({one.dtype}); expected floating point, such as "
                           "F16")


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _alphas(path: Path) -> dict[str, dict]:
    """part -> its LoraConfig, as the file's header has it. Raises Unusable."""
    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(CONFIG, "{}")
    try:
        configs = {part: {key.removeprefix(f"{part}."): value for key, value in json.loads(text).items()
                          if key.startswith(f"{part}.")} for part in ("unet", "text_encoder")}
        for config in configs.values():
            for alpha in (config.get("lora_alpha", 1), *(config.get("alpha_pattern") or {}).values()):
                alpha / 1  # raises what is no number
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"its header's {CONFIG} cannot be read ({error}); save it as diffusers does, with "
                       "save_lora_weights") from None
    if any(config.get("use_dora") for config in configs.values()):
        raise Unusable(f"its header's {CONFIG} says use_dora: DoRA cannot be used")
    return configs


def _factor(config: dict, layer: str, rank: int) -> float:
    """alpha / rank of a layer by a LoraConfig, as peft has it; 1 if there is none."""
    if not config:
        return 1.0
    alpha = next((alpha for name, alpha in (config.get("alpha_pattern") or {}).items()
                  if re.fullmatch(rf"(.*\.)?({name})", layer)), config.get("lora_alpha", 8))  # peft's default
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _as_diffusers(path: Path, pipe) -> dict:
    """A LoRA's tensors in diffusers' names, in float32, with alpha / rank in the second half. In a file's own
    F16 small numbers would lose their digits. diffusers' conversion of kohya's names guesses their dots."""
    from safetensors.torch import load_file
    names = {(part, _plain(name)): f"{part}.{name}" for part in ("unet", "text_encoder")
             for name, _ in getattr(pipe, part).named_modules()}
    tensors, configs, found = load_file(path), _alphas(path), {}
    for (part, layer), halves in _layers(tensors).items():
        name, (down, up) = names[part, layer], (tensors[halves[half]].float() for half in ("down", "up"))
        factor = (float(tensors[halves["alpha"]]) / len(down) if "alpha" in halves else
                  _factor(configs[part], name.removeprefix(f"{part}."), len(down)))
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * factor}
    return found


def add_lora(pipe, path: Path, scale: float) -> None:
    """Add a LoRA that check_lora() has passed to a diffusers pipeline that has its adapter. The adapter's own
    stays as it is.
    Raises UserError: diffusers did not take all of it, its values are not finite, or all are 0."""
    found = _as_diffusers(path, pipe)
    if not all(weight.isfinite().all() for weight in found.values()):
        raise UserError(f"--lora {path}: holds NaN or infinity; copy or download it again")
    if not any(weight.any() for name, weight in found.items() if "lora_B" in name):
        raise UserError(f"--lora {path}: all of it is 0, so it would change nothing; it was not trained")
    pipe.load_lora_weights(dict(found), adapter_name=NAME)
    # the one loaded last has switched the others off
    own = [name for name in getattr(pipe.unet, "peft_config", {}) if name != NAME]
    pipe.set_adapters([*own, NAME], [1.0] * len(own) + [scale])
    layers = [module for part in (pipe.unet, pipe.text_encoder) if part for module in part.modules()
              if NAME in getattr(module, "lora_B", {})]
    if 2 * len(layers) != len(found):
        raise UserError(f"--lora {path}: diffusers took {len(layers)} of its {len(found) // 2} layers; save "
                        "it as diffusers does, with save_lora_weights")
