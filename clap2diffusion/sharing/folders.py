"""The folder of an export: what may be overwritten, and how a new one takes its place whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clap2diffusion.base import files
from clap2diffusion.base.exits import UserError

FACTS, FORMAT, LOCK = "export.json", 1, ".lock"  # a folder that holds export.json is an export


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def facts_of(to: str, adapter: bytes, contents: dict[str, bytes]) -> bytes:
    """export.json: from which adapter which files were made."""
    facts = {"format": FORMAT, "to": to, "made_from": sha256(adapter),
             "files": {name: sha256(contents[name]) for name in sorted(contents)}}
    return (json.dumps(facts, indent=2) + "\n").encode()


def check_out(out: Path) -> None:
    """Raises UserError: `out` is there and is not an export as it was written, or cannot be made."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent} is not a folder that can be written to; make it first")
    if not out.is_dir():
        if out.exists() or out.is_symlink():
            raise UserError(f"--out {out}: is not a folder; give a folder that is new or an earlier export")
        return
    if out.is_mount():
        raise UserError(f"--out {out}: a disk or volume is mounted there, so it cannot be replaced as a "
                        "whole; give a folder in it")
    # a link is what somebody put there, whatever it points to; LOCK is of an export killed at its very end
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    found -= {LOCK}
    if not found:
        return
    if FACTS not in found:
        raise UserError(f"--out {out}: is a folder that no export has made ({min(found)} is in it); give "
                        "another one, so that nothing of yours is overwritten")
    known = files.read_json(out / FACTS).get("files")
    if not isinstance(known, dict):
        raise UserError(f"--out {out}: its {FACTS} is not of an export; give another folder")
    for name in sorted(found - {FACTS}):
        if (out / name).is_symlink() or known.get(name) != sha256((out / name).read_bytes()):
            raise UserError(f"--out {out}: {name} was changed or added since the export; give another "
                            "folder, so that it is not overwritten")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """An empty folder to write into, which afterwards is `out`; after an error nothing is left of it.
    Raises UserError: another process exports to this folder, or what is in it was changed meanwhile."""
    name = out.name if len(out.name) <= 40 else f"{out.name[:31]}-{sha256(os.fsencode(out.name))[:8]}"
    temporary, old = (out.with_name(f".{name}.{kind}.tmp") for kind in ("new", "old"))
    left = temporary.exists()
    with files.lock(temporary, flag="--out"):
        if left:
            print(f"{temporary}: left by an interrupted export, removed", flush=True)
        _empty(temporary)
        if old.exists() and not out.exists():  # killed after it had moved the earlier export aside
            old.rename(out)
        try:
            yield temporary
            check_out(out)  # the proof took a while
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            temporary.rename(out)  # with its lock: without it another export would take the folder as left
            (out / LOCK).unlink()
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
