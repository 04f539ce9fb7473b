"""What a preparation leaves beside its rows: skipped.csv, and a summary of what came of it."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from clap2diffusion.base import files
from clap2diffusion.dataset.manifest_file import SPLITS

MOST_CLASSES = 12  # so many are named in the summary


class Skipped(NamedTuple):
    """Something that became no row: the reason, which is counted, the file or clip, where it was asked for
    (a line of a list), what more is known of it, and the second of the video at which it begins."""
    reason: str
    file: str
    where: str = ""
    detail: str = ""
    start_s: str = ""


def write_skipped(out: Path, skipped: list[Skipped]) -> None:
    """Write skipped.csv, in the order given; with its header alone where nothing was skipped."""
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerow(Skipped._fields)
    table.writerows(skipped)
    files.write_text(out / "skipped.csv", content.getvalue())


def describe_rows(rows: list[dict]) -> str:
    """Rows by split and class: `90 rows (80 train, 5 val, 5 test), 3 classes (dog 50, cat 30, bird 10)`."""
    splits = Counter(row["split"] for row in rows)
    counts = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
    return f"{len(rows)} rows ({counts}), {describe_classes(Counter(row.get('label') for row in rows))}"


def describe_classes(counts: Counter) -> str:
    """The most frequent classes of {label or None: count}."""
    bare, classes = counts[None], Counter({label: count for label, count in counts.items() if label})
    if not classes:
        return "no class"
    most = classes.most_common(MOST_CLASSES)
    named = ", ".join(f"{label} {count}" for label, count in most)
    rest = f" and {len(classes) - len(most)} more" if len(classes) > len(most) else ""
    return f"{len(classes)} classes ({named}{rest})" + (f", {bare} without a class" if bare else "")


def describe_skipped(skipped: list[Skipped]) -> str:
    """What was skipped, by reason, the most frequent first; '' where nothing was."""
    reasons = sorted(Counter(one.reason for one in skipped).items(), key=lambda one: (-one[1], one))
    return "; ".join(f"{count} {reason}" for reason, count in reasons)
