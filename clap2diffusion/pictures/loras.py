"""A LoRA of the user's own beside the adapter's, such as an LCM LoRA: checked before torch loads, then added.

diffusers reads the file. What it does not know it leaves out, so names and sizes are compared here first."""

import re
from collections import defaultdict
from pathlib import Path

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.weights import Stored, Unusable, find_weights, read_tensors

NAME = "beside"  # under which diffusers holds it, as the adapter's own is faceid_0; peft mixes up "lora"
# diffusers' names of a layer's two matrices today and before, then kohya's, which also has a factor
HALVES = re.compile(r"(.+?)\.(?:lora_(?P<new>A|B)\.weight|lora\.(?P<old>down|up)\.weight|"
                    r"lora_(?P<kohya>down|up)\.weight|(?P<alpha>alpha))")
PARTS = {"unet.": "unet", "lora_unet_": "unet", "text_encoder.": "text_encoder",
         "lora_te_": "text_encoder"}
XL = ("lora_te1_", "lora_te2_", "text_encoder_2.", "lora_unet_input_blocks_", "lora_unet_output_blocks_")


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
    layers: dict[str, dict] = {}
    for part in ("unet", "text_encoder"):
        found = read_tensors(find_weights(base / part)[1])
        layers[part] = {_plain(name.removesuffix(".weight")): one.shape for name, one in found.items()
                        if name.endswith(".weight")}
    halves, foreign = defaultdict(dict), []
    for name, one in tensors.items():
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), None)
        match = HALVES.fullmatch(name)
        if not match and prefix:
            raise Unusable(f"holds {name}, and is no plain LoRA: LoHa, LoKr and DoRA cannot be used")
        layer = _plain(match[1].removeprefix(prefix)) if match and prefix else None
        if layer is None or layer not in layers[PARTS[prefix]]:
            foreign.append(name)
        else:
            half = match["new"] or match["old"] or match["kohya"] or "alpha"
            halves[PARTS[prefix], layer][{"A": "down", "B": "up"}.get(half, half)] = name, one.shape
    if foreign:
        raise Unusable(f"{len(foreign)} of its {len(tensors)} tensors belong to no layer of {base}, first "
                       f"{foreign[0]}; expected a LoRA " + (
                           "for this base model, not for Stable Diffusion XL" if
                           any(name.startswith(XL) for name in tensors) else
                           "for this base model, named as diffusers or kohya name it"))
    for (part, layer), found in halves.items():
        _check_sizes(found, layers[part][layer], base)


def _plain(layer: str) -> str:
    """A layer's name as kohya writes it. The newest transformers has no text_model."""
    return layer.replace(".", "_").removeprefix("text_model_")


def _check_sizes(found: dict[str, tuple], shape: tuple[int, ...], base: Path) -> None:
    """Compare the two matrices of a layer with its weight's shape (out, in, ...). Raises Unusable."""
    missing = [half for half in ("down", "up") if half not in found]
    if missing:
        raise Unusable(f"holds {next(iter(found.values()))[0]} without its other half; copy or download it "
                       "again")
    (down, a), (up, b) = found["down"], found["up"]
    rank = a[0] if a else 0
    for name, got, expected in ((down, a, (rank, *shape[1:])),
                                (up, b, (shape[0], rank, *(1 for _ in shape[2:])))):
        if got != expected:
            raise Unusable(f"its {name} is {_show(got)}, the layer of {base} expects {_show(expected)}; give "
                           "a LoRA that was made for this base model")


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _from_kohya(path: Path, pipe) -> dict:
    """A LoRA in kohya's names as diffusers names it, with alpha / rank folded into the second half.
    diffusers' own conversion guesses where a name's dots are, and fails on a text encoder's."""
    from safetensors.torch import load_file
    names = {(part, _plain(name)): f"{part}.{name}" for part in ("unet", "text_encoder")
             for name, _ in getattr(pipe, part).named_modules()}
    tensors, found = load_file(path), {}
    for name, down in tensors.items():
        if name.endswith(".lora_down.weight"):
            layer = name.removesuffix(".lora_down.weight")
            prefix = next(prefix for prefix in PARTS if layer.startswith(prefix))
            new = names[PARTS[prefix], _plain(layer.removeprefix(prefix))]
            factor = tensors[f"{layer}.alpha"].item() / len(down) if f"{layer}.alpha" in tensors else 1.0
            found[f"{new}.lora_A.weight"] = down
            found[f"{new}.lora_B.weight"] = tensors[f"{layer}.lora_up.weight"] * factor
    return found


def add_lora(pipe, path: Path, scale: float) -> None:
    """Add a LoRA to a diffusers pipeline that has its adapter, and keep the adapter's own as it is.
    Raises UserError: diffusers did not take all of it, its values are not finite, or all are 0."""
    tensors = read_tensors([path])
    if any(name.startswith("lora_") for name in tensors):
        pipe.load_lora_weights(_from_kohya(path, pipe), adapter_name=NAME)
    else:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=NAME,
                               local_files_only=True)
    # the one loaded last has switched the others off
    own = [name for name in getattr(pipe.unet, "peft_config", {}) if name != NAME]
    pipe.set_adapters([*own, NAME], [1.0] * len(own) + [scale])
    layers = [module for part in (pipe.unet, pipe.text_encoder) if part for module in part.modules()
              if NAME in getattr(module, "lora_B", {})]
    expected = len({HALVES.fullmatch(name)[1] for name in tensors})
    if len(layers) != expected:
        raise UserError(f"--lora {path}: diffusers took {len(layers)} of its {expected} layers; save it as "
                        "diffusers does, with save_lora_weights")
    ups = [layer.lora_B[NAME].weight for layer in layers]
    values = [*ups, *(layer.lora_A[NAME].weight for layer in layers)]
    if not all(weight.isfinite().all() for weight in values):
        raise UserError(f"--lora {path}: holds NaN or infinity; copy or download it again")
    if not any(weight.any() for weight in ups):
        raise UserError(f"--lora {path}: all of it is 0, so it would change nothing; it was not trained")
