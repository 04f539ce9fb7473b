"""The clips of the data that a run was trained on, as far as they are here: examples, and names of sounds.
No torch is needed."""

import argparse
from pathlib import Path

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.hub import find_beside
from clap2diffusion.dataset.manifest import Row, usable_rows
from clap2diffusion.judging.clips import class_texts, find_data

EXAMPLES, MOST_LISTED = 10, 1000  # clips as examples, clips to choose from
PLAIN = "This is a sound of {}."  # what CLAP reads of a label for which labels.json has no text


def plain(label: str | None) -> str:
    """A label as people write it: "dog_barking+rain" is "dog barking and rain"."""
    return (label or "").replace("_", " ").replace("+", " and ")


class OwnData:
    """The clips of a run's data that training never saw. `why`: one sentence if there are none, or "".
    `examples`: up to ten Rows of the test split, one a label where labels allow; `listed`: up to MOST_LISTED
    of test and validation; `left_out`: how many more there are. `texts`: {label: what CLAP reads of it}."""

    def __init__(self, data_root: str, adapter_path: Path):
        self.examples: list[Row] = []
        self.listed: list[Row] = []
        self.left_out, self.texts, self.why = 0, {}, ""
        try:
            root = find_beside(find_data(argparse.Namespace(data_root=data_root), adapter_path), adapter_path)
            rows = usable_rows(root)
            labels = sorted({name for row in rows for name in (row.label or "").split("+") if name})
            path = root / "labels.json"
            given = class_texts(path) if path.exists() and labels else {}
        except UserError as error:
            self.why = str(error)
            return
        self.texts = {label: given.get(label, {}).get("en") or PLAIN.format(plain(label)) for label in labels}
        held_out = [row for split in ("test", "val") for row in rows if row.split == split]
        here = [row for row in held_out if row.audio_path.is_file()]
        self.examples = pick_examples([row for row in here if row.split == "test"] or here)
        self.listed, self.left_out = here[:MOST_LISTED], len(here[MOST_LISTED:])
        if not here:
            self.why = f"{root}: holds none of the {len(held_out)} sounds of its test and validation clips"


def pick_examples(rows: list[Row], n: int = EXAMPLES) -> list[Row]:
    """The first clip of each single label, up to n; if that leaves room, more in the order of the data."""
    first = {row.label: row for row in reversed(rows) if row.label and "+" not in row.label}
    chosen = [row for row in rows if first.get(row.label) is row][:n]
    return chosen + [row for row in rows if row not in chosen][:n - len(chosen)]
