"""Models loaded for use: every part of every model goes through load_part, so none is used in part."""

from collections.abc import Iterable
from pathlib import Path

import torch

from clap2diffusion.base.device import quiet_libraries
from clap2diffusion.base.hub import DERIVED, told
from clap2diffusion.base.weights import Unusable, find_weights, read_tensors


def load_part(cls, folder: Path, what: str, subfolder: str = "", dtype: torch.dtype = torch.float32,
              unread: tuple[str, ...] = ()):
    """A frozen model of class `cls` from FOLDER/SUBFOLDER in `dtype`, in eval mode, on the CPU. unread: how
    the names of tensors begin that the file holds and `cls` does not need.
    Raises UserError: a tensor is missing, has another size, has no place in the model or is not finite, or
    all weights are 0."""
    quiet_libraries()
    place = Path(folder, subfolder)
    with told(cls, what, place):
        container, _ = find_weights(place)
        model, info = cls.from_pretrained(
            place, dtype=dtype, variant=container.variant or None, use_safetensors=container.use_safetensors,
            output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True)
        _refuse(cls, (name for name in info["missing_keys"] if not name.endswith(DERIVED)),
                info["mismatched_keys"], (name for name in info["unexpected_keys"]
                                          if not (name.endswith("position_ids") or name.startswith(unread))))
        _check_values(model)
    return model.requires_grad_(False).eval()


def check_part(cls, folder: Path, what: str, subfolder: str = "") -> None:
    """Compare the names and sizes of a part's tensors with those of `cls` by its config. No weight is read,
    so it takes a fraction of a second. Raises UserError, as load_part() does."""
    place = Path(folder, subfolder)
    with told(cls, what, place), torch.device("meta"):
        expected = cls.from_config(cls.load_config(place, local_files_only=True)).state_dict()
        found = read_tensors(find_weights(place)[1])
        _refuse(cls, expected.keys() - found.keys(), (name for name in expected.keys() & found.keys()
                                                      if tuple(expected[name].shape) != found[name].shape),
                found.keys() - expected.keys())


def _check_values(model: torch.nn.Module) -> None:
    broken = [name for name, tensor in model.state_dict().items()
              if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite()]
    if broken:
        raise Unusable(f"{len(broken)} tensors hold NaN or infinity, first {broken[0]}; copy or download it "
                       "again")
    if not any(weight.any() for weight in model.parameters() if weight.ndim > 1):
        raise Unusable("all weights are 0; copy or download it again")


def _refuse(cls, missing: Iterable, of_another_size: Iterable, unexpected: Iterable) -> None:
    for wrong, names in {"missing tensors": missing, "tensors of another size": of_another_size,
                         "unexpected tensors": unexpected}.items():
        names = sorted(name if isinstance(name, str) else name[0] for name in names)
        if names:
            raise Unusable(f"{wrong}: {len(names)}, first {names[0]}; its weights are not those of a whole "
                           f"{cls.__name__}; copy or download it again")
