"""Loader processes and the order of samples: which rows a micro-step takes, and who reads or decodes them."""

import functools
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clap2diffusion.base import processes
from clap2diffusion.base.exits import RunFailed, UserError, stops_held
from clap2diffusion.base.workers import start_worker
from clap2diffusion.dataset.decoding import BadFile, decode_audio, load_image
from clap2diffusion.dataset.manifest import Row


def _start_loader_process(parent: int, _: int) -> None:
    start_worker(parent)
    torch.set_num_threads(1)


class Loader(DataLoader):
    """torch's loader. Its processes leave signals to their parent; its failures are one sentence of ours."""

    def __init__(self, dataset: Dataset, batches, workers: int, **options):
        if workers:
            start = functools.partial(_start_loader_process, os.getpid())
            options |= {"prefetch_factor": 2, "worker_init_fn": start}
        super().__init__(dataset, batch_sampler=batches, num_workers=workers, **options)

    def __iter__(self):
        with stops_held():  # half an iterator complains when it is thrown away
            batches = super().__iter__()
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise RunFailed(f"a data loading process was killed ({reason}); it ran out of memory or of "
                            "shared memory: use Docker's --shm-size=8g or --workers 0") from None
        except RunFailed as error:  # torch puts the process's traceback and the class before the sentence
            raise RunFailed(str(error).strip().splitlines()[-1].rpartition("RunFailed: ")[2]) from None


class Decode(Dataset):
    """Row -> (image (3, H, W), k waveforms, flags), or the reason why it cannot be used.

    log_mel: an encoder's; its output then stands in the place of each waveform. None leaves the waveforms.
    """

    def __init__(self, rows: list[Row], image_size: int, rate: int, window_s: float, windows=1, log_mel=None):
        self.rows, self.image_size, self.log_mel = rows, image_size, log_mel
        self.audio = rate, window_s, windows

    def __getitem__(self, i: int):
        kind, path = "image", self.rows[i].image_path
        try:
            image = load_image(path, self.image_size)
            kind, path = "audio", self.rows[i].audio_path
            waveforms, flags = decode_audio(path, *self.audio)
        except BadFile as error:
            return f"{kind} {path.name}: {error}"
        return image, [*map(self.log_mel, waveforms)] if self.log_mel else waveforms, flags


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def batch_indices(size: int, batch_size: int, seed: int, micro_step: int) -> list[int]:
    """The batch of a micro-step: a cut of the endless row permutation(seed, 0), permutation(seed, 1), ..."""
    places = range(micro_step * batch_size, (micro_step + 1) * batch_size)
    return [int(_permutation(size, seed, at // size)[at % size]) for at in places]


class StepSampler:
    """Batch sampler without state: the batches of micro-steps [start, stop). Resuming is another `start`.

    share is (rank, world): each process takes `batch_size` neighbouring samples of the batch of all.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int, share=(0, 1)):
        rank, world = share
        self.mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self.batch_of = functools.partial(batch_indices, size, batch_size * world, seed)
        self.micro_steps = range(start, stop)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batch_of(micro_step)[self.mine] for micro_step in self.micro_steps)


def sample_ids(dataset, cfg, step: int) -> list[str]:
    """The samples of an optimizer step, in all its micro-steps and processes."""
    return [dataset.rows[i]["id"] for micro in range(cfg.accumulation) for i in batch_indices(
        len(dataset), cfg.batch_size * processes.world(), cfg.seed, step * cfg.accumulation + micro)]


def make_loader(dataset: Dataset, batch_size: int, seed: int, start: int, stop: int, workers: int,
                device: torch.device) -> Loader:
    """This process's share of the batches of micro-steps [start, stop): the same bits with any workers.

    Raises UserError if there are fewer rows than a batch of all processes.
    """
    everyone = batch_size * processes.world()
    if len(dataset) < everyone:
        split = getattr(dataset, "split", "")
        where = f"{dataset.data_root}: split {split!r}" if split else "the data set"
        raise UserError(f"{where} has {len(dataset)} usable rows, fewer than a batch of {everyone}; add rows "
                        "or lower --batch-size")
    sampler = StepSampler(len(dataset), batch_size, seed, start, stop, (processes.rank(), processes.world()))
    workers = workers if workers >= 0 else 2 if device.type == "cuda" else 0
    return Loader(dataset, sampler, workers, persistent_workers=workers > 0)
