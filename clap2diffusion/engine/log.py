"""What a stage writes down while it runs: log.txt, log.jsonl and TensorBoard's files."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from clap2diffusion.base import processes


class Logger:
    """A line-buffered log.txt, an append-only log.jsonl and TensorBoard's files; of rank 0 alone."""

    def __init__(self, folder: Path, log_dir: str = "", purge_step: int | None = None):
        self.folder = folder
        if not processes.first():
            return
        self._text = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")
        self._jsonl = (folder / "log.jsonl").open("a+", buffering=1, encoding="utf-8")
        if self._jsonl.tell() and not (folder / "log.jsonl").read_bytes().endswith(b"\n"):
            self._jsonl.write("\n")  # a full disk cut the last line; the next one must not be lost with it
        place = Path(log_dir) / folder.parent.name / folder.name if log_dir else folder / "tensorboard"
        self._board = SummaryWriter(place, purge_step=purge_step)

    def text(self, line: str) -> None:
        if processes.first():
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def scalars(self, step: int, **values: float | list[float]) -> None:
        """Numbers, or [value, low, high]."""
        if not processes.first():
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            for suffix, one in zip(("", "_low", "_high"), value if isinstance(value, list) else [value]):
                self._board.add_scalar(name + suffix, one, step)

    def image(self, step: int, name: str, image) -> None:
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        for file in (self._text, self._jsonl, self._board):
            file.close()
