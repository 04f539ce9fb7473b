"""Whole files, written completely or not at all and read strictly; and the one lock on a folder."""

import ctypes
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from clap2diffusion.base.exits import DISK_FULL, RunFailed, UserError


def write_atomic(path: Path, content: bytes, synced: bool = True) -> None:
    """Write through a temporary file in the same folder, fsync, rename, fsync the folder.
    synced=False leaves the two fsyncs out: the caller calls sync_disk() before it counts on the file.
    Raises RunFailed: no space is left, or the file cannot be written; the old file is as it was."""
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # a name may have 255 bytes
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if synced:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunFailed(f"no space left in {path.parent}, {len(content) / 1e6:.1f} MB needed for "
                            f"{path.name}; free some and run the same command again") from None
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):  # the disk may be the trouble: what is raised above says it
            temporary.unlink(missing_ok=True)


def sync_disk(folder: Path) -> None:
    """Wait until all that was written to the file system of a folder is on the disk. It is for many small
    files: two fsyncs each would take as long as making them. Raises RunFailed."""
    sync = getattr(ctypes.CDLL(None), "syncfs", None)  # Linux's; Python has none of its own
    if sync is None:
        os.sync()
        return
    place = os.open(folder, os.O_RDONLY)
    failed = sync(place)
    os.close(place)
    if failed:
        raise RunFailed(f"{folder}: the disk did not take what was written; mend it and run the same command "
                        "again")


def write_text(path: Path, text: str) -> None:
    """write_atomic() in UTF-8. Half a surrogate pair, which UTF-8 cannot hold, is written as \\udce9, as JSON
    writes it."""
    write_atomic(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value) -> None:
    """Write a value as JSON that one can read, by write_text()."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove_stale(folder: Path, pattern: str = ".*.tmp") -> list[Path]:
    """Remove what killed saves left in a folder; the pattern `**/.*.tmp` looks into its folders as well."""
    stale = sorted(folder.glob(pattern))
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def lock(folder: Path, wait: str = "", flag: str = "--run") -> TextIO:
    """Hold a folder until the returned file is closed or this process ends. The folder is made if need be.
    A POSIX lock: unlike flock's it does not pass to forked workers, so kill -9 frees it at once.
    wait: what to print before waiting for another process that holds it; '' refuses, naming that process and
    the `flag` that gives another folder.
    Raises UserError: it refuses. Raises OSError: the folder cannot be made or written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            file.seek(0)
            raise UserError(f"{folder}: process {file.read().strip() or '?'} is working in this folder; wait "
                            f"for it, or give another {flag}") from None
        print(wait, flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    if not wait:  # a made data folder holds the same bytes whoever made it
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    return file


def _no_duplicates(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key {key!r} stands twice")
    return dict(pairs)


def _refuse_constant(text: str):
    raise UserError(f"{text} is not a number that JSON or a setting can have")


def read_json(path: str | Path) -> dict:
    """Read a JSON object strictly: duplicate keys, NaN and Infinity are errors.
    Raises UserError: the file is missing, is not UTF-8 or is not one JSON object."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an existing JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; expected a JSON file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not valid JSON ({error.msg})") from None
    except (UserError, RecursionError, ValueError) as error:  # nested too deeply; too many digits
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a JSON {type(value).__name__}, expected an object {{...}}")
    return value
