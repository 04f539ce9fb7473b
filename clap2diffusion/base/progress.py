"""Progress: a bar on a terminal; in a file or pipe a line at the start, now and then, and at the end."""

import sys

EVERY_S = 30  # between two lines


class _Lines:
    """What tqdm writes, as lines: no carriage returns, no moves of the cursor, no blanks to wipe a bar."""

    def __init__(self):
        self.last = ""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line and line != self.last:
            self.last = line
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar_options(**options) -> dict:
    """tqdm's keyword arguments for every bar: `options`, and more of them where stderr is no terminal."""
    if sys.stderr.isatty():
        return options
    return {**options, "file": _Lines(), "leave": True, "dynamic_ncols": False,
            "mininterval": EVERY_S, "maxinterval": EVERY_S,  # tqdm's monitor would write more often
            "bar_format": "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"}
