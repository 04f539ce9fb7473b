"""What a stage trains from: the cached features of a split and their order. No encoder is needed for it.

Shapes: F sides of a picture, C h w latents, k windows of a clip, E width of CLAP's output, L D text tokens.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from clap2diffusion.base import processes
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.statistics import stratified
from clap2diffusion.dataset import cache
from clap2diffusion.dataset.captions import describe_cut
from clap2diffusion.dataset.manifest import (
    Row,
    find_gaps,
    read_manifest,
    refuse_absent_files,
    refuse_one_recording,
)


def _layout(path: str) -> dict[str, tuple[int, list[int]]]:
    """Where in a shard each tensor begins, and the shape of one of its rows."""
    with open(path, "rb") as file:  # safetensors: the header's length, the header, the tensors
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, os.path.getsize(path))))
    return {name: (8 + size + spec["data_offsets"][0], spec["shape"][1:])
            for name, spec in header.items() if name != "__metadata__"}


class AudioImageDataset(Dataset):
    """The cached features of one split. Raises UserError: no finished cache, no usable rows in the split.
    An item: latents_mean and latents_std (F, C, h, w), scaled already, with F = 2 (plain, mirrored) if flips
    were cached, else 1; audio_embeds (k, E); text_embeds (L, D), all float32; index, the item's number."""

    def __init__(self, data_root: str | Path, split: str, folder: str | Path):
        self.data_root, self.split, self.cache = Path(data_root), split, Path(folder)
        try:
            index = cache.load_index(self.cache)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.cache}: not a finished feature cache ({error}); build it again") from None
        if index["format"] != cache.CACHE_FORMAT:
            raise UserError(f"{self.cache}: cache format {index['format']}, expected {cache.CACHE_FORMAT}; "
                            "build it again")
        self.content: str = index["content"]  # a name of its features, whatever the files' times were
        self._shards, self._texts = index["shards"], index["texts"]
        self.rows: list[dict] = [row for row in index["rows"] if row["split"] == split]
        if not self.rows:
            raise UserError(f"{data_root}: no usable row in split {split!r}; add rows with that split to the "
                            "manifest")
        self._layout = functools.cache(_layout)
        first = self[0]
        self.latent_shape = tuple(first["latents_mean"].shape[1:])  # (C, h, w)
        self.embed_dim = first["audio_embeds"].shape[-1]
        self.empty_text_embeds = self._read(*self._texts[0])["text_embeds"]  # (L, D)

    def _read(self, shard: int, i: int) -> dict[str, torch.Tensor]:
        """Row i of every tensor in a shard, by one short read. Raises RunFailed. Nothing stays open or
        mapped: a memory map counts towards the process's memory, page by page."""
        path, row = f"{self.cache}/{self._shards[shard]}", {}
        try:
            with open(path, "rb", buffering=0) as file:
                for name, (start, shape) in self._layout(path).items():
                    content = bytearray(4 * math.prod(shape))
                    file.seek(start + i * len(content))
                    if file.readinto(content) != len(content):
                        raise OSError("cut off")
                    row[name] = torch.frombuffer(content, dtype=torch.float32).view(shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFailed(f"{path}: cannot be read ({error}); start again, it will be rebuilt") from None
        return row

    def some_audio_embeds(self, n: int) -> torch.Tensor:
        """The first window of n rows, chosen by label (statistics.stratified), or of all of fewer: (n, E)."""
        chosen = stratified([row["label"] for row in self.rows], n)
        return torch.stack([self[i]["audio_embeds"][0] for i in chosen])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        item = self._read(row["shard"], row["offset"])
        return item | self._read(*self._texts[row["text_id"]]) | {"index": i}


def check_rows(cfg) -> tuple[list[Row], list[str]]:
    """What read_manifest() gives for a stage's settings, usable to train with by all that it shows.
    Raises UserError: as read_manifest does, too few rows for a batch or a validation, no file of the manifest
    is there, one recording only to validate with."""
    rows, bad = read_manifest(cfg.data_root, print)
    if len(bad) <= cfg.max_bad_share * (len(rows) + len(bad)):  # else it ends with the list of them
        everyone = cfg.batch_size * processes.world()
        for gap in find_gaps(rows, batch=everyone, whitened=getattr(cfg, "whiten", False)):
            raise UserError(f"{cfg.data_root}: {gap}")
        refuse_absent_files(cfg.data_root, rows)
        refuse_one_recording(cfg.data_root, rows)
    return rows, bad


def open_splits(cfg, base: Path, clap: Path, device: torch.device) -> list[AudioImageDataset]:
    """The cached train and validation features for a stage's settings, built first where they are missing.
    What the manifest alone shows is told before. Raises UserError: as check_rows and build_features do."""
    manifest = check_rows(cfg)
    rows = manifest[0]
    if cut := describe_cut(rows, base):
        print(cut, flush=True)
    n_val = sum(row.split == "val" for row in rows)
    for name in ("val_clips", "samples"):
        if getattr(cfg, name) > n_val:
            print(f"--{name.replace('_', '-')} {getattr(cfg, name)}: the val split has {n_val} clips, all of "
                  "them are taken", flush=True)
    workers = cfg.workers if cfg.workers >= 0 else 2 if device.type == "cuda" else 1
    folder = cache.build_features(
        cfg.data_root, base, clap, cfg.image_size, cfg.cache_dir, cfg.windows, cfg.flip,
        min(16, cfg.val_batch_size), workers, str(device), cfg.max_bad_share, manifest=manifest)
    return [AudioImageDataset(cfg.data_root, split, folder) for split in ("train", "val")]


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def step_batches(size: int, batch_size: int, seed: int, start: int, stop: int,
                 share: tuple[int, int] = (0, 1)) -> Iterator[list[int]]:
    """The batches of micro-steps [start, stop), cut from permutation(seed, 0), permutation(seed, 1), ... in a
    row: resuming is another `start`. share is (rank, world): each process takes its part of all's batch."""
    rank, world = share
    for micro_step in range(start, stop):
        first = (micro_step * world + rank) * batch_size
        places = range(first, first + batch_size)
        yield [int(_permutation(size, seed, at // size)[at % size]) for at in places]


def sample_ids(dataset: AudioImageDataset, cfg, step: int) -> list[str]:
    """The samples of an optimizer step, in all its micro-steps and processes."""
    batches = step_batches(len(dataset), cfg.batch_size * processes.world(), cfg.seed,
                           step * cfg.accumulation, (step + 1) * cfg.accumulation)
    return [dataset.rows[i]["id"] for batch in batches for i in batch]


def make_loader(dataset: AudioImageDataset, batch_size: int, seed: int, start: int, stop: int, workers: int,
                device: torch.device) -> cache.Loader:
    """This process's share of the batches of micro-steps [start, stop), once: the same bits with any workers.
    Raises UserError if there are fewer rows than a batch of all processes."""
    everyone = batch_size * processes.world()
    if len(dataset) < everyone:
        raise UserError(f"{dataset.data_root}: split {dataset.split!r} has {len(dataset)} usable rows, fewer "
                        f"than a batch of {everyone}; add rows or lower --batch-size")
    batches = step_batches(len(dataset), batch_size, seed, start, stop, (processes.rank(), processes.world()))
    workers = workers if workers >= 0 else 2 if device.type == "cuda" else 0
    return cache.Loader(dataset, batches, workers, persistent=True)
