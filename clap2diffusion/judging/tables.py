"""The Jinja2 templates of the page, the evaluation's and the report's Markdown, and what they share."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clap2diffusion.base.statistics import show_interval

SOUNDS = {"right": "right sound", "silence": "silence", "other": "another's sound"}
LANGUAGES = {"en": "English", "ko": "Korean"}


def confused(classes: list[str], counts: list[list[int]]) -> list[tuple[int, str, str]]:
    """(count, class, class seen in its place) of a confusion matrix, the commonest first."""
    found = [(count, classes[i], classes[j]) for i, row in enumerate(counts) for j, count in enumerate(row)
             if i != j and count]
    return sorted(found, key=lambda entry: -entry[0])


TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                        autoescape=lambda name: name.endswith(".html.j2"), trim_blocks=True,
                        lstrip_blocks=True, keep_trailing_newline=True)
TEMPLATES.filters["interval"] = show_interval
TEMPLATES.globals |= {"SOUNDS": SOUNDS, "LANGUAGES": LANGUAGES, "confused": confused, "zip": zip}
