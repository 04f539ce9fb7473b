"""The machine a run computes on: its device, number types and memory."""

import os
import resource
from pathlib import Path

import diffusers
import torch
import transformers

from clap2diffusion.base import processes
from clap2diffusion.base.exits import UserError

# nf4: what is not held in 4 bits
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}


def pick_device(device: str, precision: str):
    """Return (torch.device, autocast): autocast() is a context in bfloat16, or a plain one for fp32.

    Raises UserError: CUDA was asked for and is not there, or it has no BF16.
    """
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
    if found.type == "cuda" and precision == "bf16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(f"{torch.cuda.get_device_name()} has no BF16; use --precision fp32")
    return found, lambda: torch.autocast(found.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory in MB: resident set of the process, and on CUDA what was allocated and reserved."""
    status = Path("/proc/self/status")  # getrusage's figure also counts what the starting process held
    peak_kb = (int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists()
               else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    memory = {"rss": peak_kb / 1024}
    if device.type == "cuda":
        memory |= {"cuda_allocated": torch.cuda.max_memory_allocated() / 2 ** 20,
                   "cuda_reserved": torch.cuda.max_memory_reserved() / 2 ** 20}
    return {key: round(value, 1) for key, value in memory.items()}


def quiet_libraries() -> None:
    """Keep the libraries' notices off a user's first screen; their errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
