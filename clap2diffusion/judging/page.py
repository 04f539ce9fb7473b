"""The evaluation as one HTML file, evaluation.html: sounds to play, pictures to see, tables and plots.

Everything is inside the file: sounds and pictures as data URIs, plots as SVG. Its own policy forbids the
browser to load anything else, so it reads the same from a disk, from a mail or without a network. It needs no
JavaScript. The markup, the texts and the style are in page.html.j2. The templates of the Markdown files,
evaluation.md.j2 and report.md.j2, share the words that are here."""

import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clap2diffusion.base.statistics import FEWEST, show_interval
from clap2diffusion.dataset.decoding import BadFile, load_picture, load_waveform, open_image
from clap2diffusion.engine.gate_sweep import NAMES as SOUNDS
from clap2diffusion.engine.gate_sweep import draw_sweep
from clap2diffusion.judging.clips import pick_clips
from clap2diffusion.pictures.sheets import data_uri, png_bytes, spectrogram

TEXTS = {"en": "English", "ko": "Korean",  # what the judge reads of a class
         "label": "the labels' own words", "caption": "the clips' captions"}
SHEET_CLIPS = 30
SOUND_RATE, SOUND_S = 24_000, 10.0
PICTURE_SIDE, SMALL_SIDE = 224, 128  # larger pictures are made smaller; small ones keep their pixels
MAX_MATRIX = 30  # classes up to which the confusions are a table
# The plots are drawn in these colours. Those of the page take their place and so follow light and dark.
INK, GRID, LINES = "#000001", "#000002", {"right": "#000003", "silence": "#000004", "other": "#000005"}
PAGE_COLOURS = {INK: "currentColor", GRID: "var(--line)", **{LINES[key]: f"var(--{key})" for key in LINES}}


@matplotlib.rc_context(fname=Path(__file__).with_name("page.mplstyle"))
def render(e: dict) -> str:
    """The page of an evaluation (the dict of evaluation.json). A missing picture or sound leaves a note."""
    shown = pick_clips([clip["label"] for clip in e["clips"]], SHEET_CLIPS)
    return TEMPLATES.get_template("page.html.j2").render(e=e, shown=shown).lstrip()


def confused(classes: list[str], counts: list[list[int]]) -> list[tuple[int, str, str]]:
    """(count, class, class seen in its place) of a confusion matrix, the commonest first."""
    found = [(count, classes[i], classes[j]) for i, row in enumerate(counts) for j, count in enumerate(row)
             if i != j and count]
    return sorted(found, key=lambda entry: -entry[0])


def heading(name: str, kind: str) -> str:
    """How a stage is called: "stage 2", or the name of a copy, "huber, a stage 2"."""
    own = kind.replace("stage", "stage ")
    return own if name == kind else f"{name}, a {own}"


def words(label: str) -> str:
    """A label as it is read: "dog_barking+rain" is "dog barking + rain"."""
    return label.replace("_", " ").replace("+", " + ")


def verdict(seen: str, label: str, other_label: str = "") -> str:
    """What the judge saw, marked as the clip's label, as that of the sound it was given, or as neither. A
    caption that is a class may have a + of its own."""
    sign = ("✓" if seen in (label, *label.split("+")) else
            "↪" if seen in (other_label, *other_label.split("+")) else "✗")
    return f"{sign} {words(seen)}"


def picture(path: str | Path) -> dict[str, str]:
    """The data URI `src` of the middle square, which the models see, or the `reason` why there is none. Of a
    small picture it has every pixel; a large one becomes a JPEG."""
    try:
        with open_image(Path(path)) as image:
            side = min(*image.size, PICTURE_SIDE)
        image, content = load_picture(path, side), io.BytesIO()
    except BadFile as error:
        return {"src": "", "reason": f"{Path(path).name} ({error})"}
    if side <= SMALL_SIDE:
        return {"src": data_uri("image/png", png_bytes(image, optimize=True))}
    image.save(content, format="JPEG", quality=85)
    return {"src": data_uri("image/jpeg", content.getvalue())}


def sound(path: str | Path) -> dict[str, str]:
    """Data URIs of the first seconds as MP3 (`src`) and of the `spectrogram`, or the `reason` why not."""
    content = io.BytesIO()
    try:
        waveform = load_waveform(path, SOUND_RATE, SOUND_S)[0]
        soundfile.write(content, waveform, SOUND_RATE, format="MP3", bitrate_mode="VARIABLE",
                        compression_level=0.5)
    except (BadFile, soundfile.SoundFileError) as error:
        return {"src": "", "reason": f"{Path(path).name} ({error})"}
    image = png_bytes(spectrogram(waveform, SOUND_RATE), optimize=True)
    return {"src": data_uri("audio/mpeg", content.getvalue()), "spectrogram": data_uri("image/png", image)}


def svg_of(axes: Axes, title: str) -> Markup:
    """A plot as SVG in the page's colours and font."""
    content = io.StringIO()
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower center", ncols=2)
    axes.figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    svg = content.getvalue()
    view, body = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', svg, re.DOTALL).groups()
    # also the names figure_1 and so on: the same in every plot, used by none
    body = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"', "", body, flags=re.DOTALL)
    for colour, page_colour in PAGE_COLOURS.items():
        body = body.replace(colour, page_colour)
    head = Markup('<svg {} role="img" aria-label="{}" stroke-linejoin="round">').format(Markup(view), title)
    return head + Markup(body)


def band(axes: Axes, x: list, values: list, low: list, high: list, line: str, alpha: float, **style) -> None:
    """A curve with its interval."""
    axes.plot(x, values, color=LINES[line], marker="o", **style)
    axes.fill_between(x, low, high, color=LINES[line], alpha=alpha, linewidth=0)


def property_plot(name: str, row: dict, title: str) -> Markup:
    """The value set in the sound against the one measured in the picture."""
    axes = Figure().add_subplot(xlabel=f"{name} set in the sound", ylabel="measured in the picture")
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.5)
    axes.plot(*zip(*row["points"]), "o", color=LINES["right"], markersize=3.5, alpha=0.55, markeredgewidth=0)
    return svg_of(axes, title)


def sweep_plot(stage: dict, title: str) -> Markup:
    """Validation loss with each sound against tanh(gate), with the window and the learned value."""
    axes = Figure().add_subplot()
    draw_sweep(axes, stage, {**LINES, "learned": INK})
    return svg_of(axes, title)


def loss_plot(log: list[dict], title: str) -> Markup:
    """Training loss, smoothed, and validation losses of one stage."""
    axes = Figure().add_subplot(xlabel="step", ylabel="loss")
    trained = np.array([[row["step"], row["loss"]] for row in log if "loss" in row])
    if len(trained):
        width = max(1, len(trained) // 10)
        steps, losses = (np.convolve(column, np.ones(width) / width, "valid") for column in trained.T)
        label = f"training, mean of {width}" if width > 1 else "training"
        axes.plot(steps, losses, color=INK, linewidth=1, alpha=0.5, label=label)
    for kind, style in (("right", "-"), ("silence", "--"), ("other", ":")):
        if rows := [(row["step"], *row[f"val_{kind}"]) for row in log if f"val_{kind}" in row]:
            label = f"validation, {SOUNDS[kind]}"
            band(axes, *zip(*rows), kind, 0.08, linestyle=style, markersize=3, label=label)
    return svg_of(axes, title)


TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                        autoescape=lambda name: name.endswith(".html.j2"), trim_blocks=True,
                        lstrip_blocks=True, keep_trailing_newline=True)
TEMPLATES.filters["interval"] = show_interval
TEMPLATES.globals |= {
    "SOUNDS": SOUNDS, "TEXTS": TEXTS, "FEWEST": FEWEST, "MAX_MATRIX": MAX_MATRIX, "zip": zip,
    "confused": confused, "words": words, "heading": heading, "verdict": verdict, "picture": picture,
    "sound": sound, "file_name": lambda path: Path(path).name, "property_plot": property_plot,
    "sweep_plot": sweep_plot, "loss_plot": loss_plot}
