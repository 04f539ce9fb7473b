"""One run in several processes: torchrun starts them, torch's DistributedDataParallel averages the gradients.

    torchrun --standalone --nproc-per-node 2 train_stage1.py --batch-size 4   # the losses of one with 8

Every process takes its share of a batch; rank 0 alone writes. Without torchrun there is one process, and
everything here does nothing."""

import contextlib
import datetime
import json
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = datetime.timedelta(hours=6)  # the others wait while rank 0 validates or writes
_control = None  # a gloo group for decisions, beside NCCL's for gradients


def begin(device: torch.device) -> None:
    """Join the processes that torchrun has started, if it has."""
    global _control
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # torchrun's store outlives a restart. With keys of their own, new processes wait for no dead ones.
        store, me, everyone = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=me, world_size=everyone, timeout=TIMEOUT)
        _control = dist.new_group(backend="gloo", timeout=TIMEOUT)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """True in the process that writes."""
    return rank() == 0


def wait() -> None:
    """Go on when all processes have come here."""
    if world() > 1:
        dist.barrier(group=_control)


def largest(value: int) -> int:
    """The largest value that any process has, the same in all of them: a stop signal, a missing cache."""
    if world() == 1:
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=_control)
    return int(values)


def mean(value: Tensor) -> Tensor:
    """The mean over the processes of a tensor on the training device; no wait for the device."""
    if world() > 1:
        value = value / world()
        dist.all_reduce(value)
    return value


def of_first(result: dict | None) -> dict:
    """Rank 0's result in every process; the others give None. It travels as JSON: nothing is unpickled."""
    if world() == 1:
        return result
    content = torch.frombuffer(bytearray(json.dumps(result).encode()), dtype=torch.uint8)
    size = largest(len(content) if first() else 0)
    content = content if first() else torch.empty(size, dtype=torch.uint8)
    dist.broadcast(content, 0, group=_control)
    return json.loads(content.numpy().tobytes())


def wrap(function, **parts: nn.Module):
    """`function`, whose trainable weights are in `parts`, with gradients averaged over the processes."""
    if world() == 1:
        return function
    module = nn.ModuleDict(parts)
    module.forward = function  # DistributedDataParallel wraps a module, not a function
    # every process loads the same weights, so there is nothing to send at the start
    return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False, init_sync=False)


def sync_at(model, last: bool):
    """Context of one forward and backward pass: of several only the last averages the gradients."""
    return contextlib.nullcontext() if last or world() == 1 else model.no_sync()
