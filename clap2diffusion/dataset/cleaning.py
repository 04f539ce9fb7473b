"""The feature caches in a folder: their sizes, which of them nothing needs any more, and their removal."""

import argparse
import re
import shutil
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.cache import read_index

# a cache's folder and the files in it: nothing else is ever removed
NAME = re.compile(r"(probe-)?[0-9a-f]{16}")
FILES = re.compile(r"\.lock|\..*\.tmp|(rows|text)-\w+\.safetensors|(index|used|\d{8})\.json|bad_rows\.txt")


class Cache(NamedTuple):
    path: Path
    shards: dict[int, int]  # inode of a file -> its size; a shard may be linked into several caches
    used: float  # when a stage used it last, in seconds since 1970
    about: str
    old: str  # why nothing needs it any more, or ""


def find_caches(cache_dir: Path) -> list[Cache]:
    """The feature caches in a folder, the last used first. One is old if another was used later with the same
    data folder, models and settings, or if it cannot be read. Raises UserError: there is no such folder."""
    if not cache_dir.is_dir():
        raise UserError(f"--cache-dir {cache_dir}: no such folder; give the one that the stages were given")
    found, last = [], {}
    for path in cache_dir.iterdir():
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            inside = list(path.iterdir())
            if all(FILES.fullmatch(file.name) for file in inside):
                stats = {file.name: file.stat() for file in inside}
                used = stats.get("used.json") or max(stats.values(), key=lambda stat: stat.st_mtime,
                                                     default=path.stat())
                found.append((used.st_mtime, path, {stat.st_ino: stat.st_size for stat in stats.values()}))
    caches = []
    for used, path, shards in sorted(found, reverse=True):
        about, old = "not finished: the same command goes on with it", ""
        if path.name.startswith("probe-"):
            about = "embeddings of tools/probe.py"
        elif index := read_index(path):
            root = "an unknown folder"
            with suppress(UserError, KeyError):
                root = files.read_json(path / "used.json")["root"]
            gone = "" if Path(root).is_dir() else ", which is not there now"
            about = f"{len(index['rows'])} rows of {root}{gone}"
            later = last.setdefault((root, index["made_by"]), path.name)
            old = f"{later} was used later" if later != path.name else ""
        elif (path / "index.json").exists():
            about, old = "", "damaged, or of an older format"
        caches.append(Cache(path, shards, used, about, old))
    return caches


def _size_mb(caches: list[Cache], others: list[Cache]) -> float:
    """What the removal of caches frees, in MB: shards that others link to stay."""
    kept = Counter(inode for cache in others for inode in cache.shards)
    return sum({inode: size for cache in caches for inode, size in cache.shards.items()
                if not kept[inode]}.values()) / 1e6


def clean_caches(args: argparse.Namespace) -> None:
    """List the caches in --cache-dir; remove those that --remove names, or for `old` those that are old.
    Raises UserError: no such folder or cache, or a process is building one of them."""
    caches, held = find_caches(Path(args.cache_dir)), []
    for cache in caches:
        others = [one for one in caches if one is not cache]
        size, freed = sum(cache.shards.values()) / 1e6, _size_mb([cache], others)
        shared = f" ({size - freed:.1f} MB shared with others)" * (size > freed)
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.used))
        notes = [cache.about] * bool(cache.about) + [f"OLD: {cache.old}"] * bool(cache.old)
        print("  ".join([cache.path.name, f"used {used}", f"{size:.1f} MB{shared}", *notes]))
    names = {cache.path.name for cache in caches}
    if unknown := sorted(set(args.remove) - names - {"old"}):
        raise UserError(f"--remove {unknown[0]}: no such cache in {args.cache_dir}; expected `old` or a name "
                        "that is listed above")
    chosen = [cache for cache in caches
              if cache.path.name in args.remove or (cache.old and "old" in args.remove)]
    for cache in chosen:
        try:
            with files.lock(cache.path):
                (cache.path / "index.json").unlink(missing_ok=True)  # half a removal is no finished cache
                shutil.rmtree(cache.path)
            print(f"removed {cache.path}")
        except UserError:
            held.append(cache)
    left = [cache for cache in caches if cache not in chosen or cache in held]
    old = [cache for cache in left if cache.old]
    print(f"{args.cache_dir}: {len(left)} caches, {len(caches) - len(left)} removed; --remove old would free "
          f"{_size_mb(old, [cache for cache in left if cache not in old]):.1f} MB")
    if held:
        raise UserError(f"{held[0].path}: a process is building it, so it was not removed; wait for its end")
