"""The machine a run computes on: device, number types, memory, and how the frozen UNet is held on it."""

import os
import resource
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from clap2diffusion.base import processes
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.notes import print_notes_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}  # nf4: what is not in 4 bits


def pick_device(device: str, precision: str, compile: bool = False):
    """Return (torch.device, autocast): autocast() is a context in bfloat16, or a plain one for fp32.
    Raises UserError: CUDA was asked for and is not there, or it has no BF16, or torch.compile was asked for
    and what it compiles with is not there."""
    quiet_libraries()
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    found = torch.device("cpu")
    if cuda and device != "cpu":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if found.index >= torch.cuda.device_count():
            raise UserError(f"local rank {found.index} has no GPU: torch sees {torch.cuda.device_count()}; "
                            "give torchrun --nproc-per-node that many processes")
        torch.cuda.set_device(found)
    processes.begin(found)
    bf16 = precision == "bf16"
    if found.type == "cuda" and bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no BF16; use --precision fp32")
    if compile:
        _check_compiler(found)
    return found, lambda: torch.autocast(found.type, dtype=torch.bfloat16, enabled=bf16)


def _check_compiler(device: torch.device) -> None:
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    if given := os.environ.get(variable):
        names = (given,)
    if not any(map(shutil.which, names)):
        raise UserError(f"--compile: torch compiles with {' or '.join(names)}, which is not installed here; "
                        "install it (apt install g++), or leave --compile out")


def describe_numbers(device: torch.device, cfg) -> str:
    """The device and the number types of a stage, for its log."""
    numbers = "BF16 autocast" if cfg.precision == "bf16" else "float32 without autocast"
    return f"{device.type}, {numbers}, frozen UNet in {cfg.frozen_dtype}"


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory in MB: resident set of the process, and on CUDA what was allocated and reserved."""
    status = Path("/proc/self/status")  # getrusage's figure also counts what the starting process held
    peak_kb = (int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) if status.exists()
               else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    memory = {"rss": peak_kb / 1024}
    if device.type == "cuda":
        memory |= {"cuda_allocated": torch.cuda.max_memory_allocated() / 2 ** 20,
                   "cuda_reserved": torch.cuda.max_memory_reserved() / 2 ** 20}
    return {key: round(value, 1) for key, value in memory.items()}


def quiet_libraries() -> None:
    """Turn the libraries' warnings into notes, each said once, and their progress bars off."""
    for library in (transformers, diffusers):
        notices = library.utils.logging
        notices.set_verbosity_warning()
        notices.disable_progress_bar()
        notices.disable_default_handler()
        print_notes_of(library.__name__)


def hold_unet(unet: nn.Module, cfg) -> None:
    """Hold and run the frozen UNet as --frozen-dtype nf4, --checkpointing, --channels-last and --compile ask.
    After the audio K and V were copied from it and before LoRA comes on top (QLoRA, Dettmers et al. 2023)."""
    if cfg.frozen_dtype == "nf4":
        to_nf4(unet)
    if cfg.checkpointing != "none":
        unet.enable_gradient_checkpointing()  # never the reentrant kind
        for block in [unet.mid_block, *unet.up_blocks] if cfg.checkpointing == "down" else ():
            for module in block.modules():
                module.gradient_checkpointing = False
    if cfg.channels_last:
        unet.to(memory_format=torch.channels_last)
    if cfg.compile:
        unet.compile()


def to_nf4(unet: nn.Module) -> None:
    """Replace the linear layers of the attention blocks by bitsandbytes' Linear4bit with the same weights."""
    import bitsandbytes
    linears = {name: module for name, module in unet.named_modules()
               if isinstance(module, nn.Linear) and "attentions." in name}
    for name, linear in linears.items():
        # Linear4bit draws weights that nobody needs. LoRA's draw must be that of a run without NF4.
        with torch.random.fork_rng(devices=[]):
            held = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None,
                compute_dtype=torch.bfloat16, quant_type="nf4")
        held.load_state_dict(linear.state_dict())
        held.requires_grad_(False)
        # On a CPU with AVX512-BF16 a pass in eval mode would pack the weight for a kernel without gradients.
        held.support_avx512bf16_for_cpu = False
        unet.set_submodule(name, held.to(linear.weight.device))  # which packs the weight
    unet.is_loaded_in_4bit = True  # what peft asks before it puts LoRA on a Linear4bit
