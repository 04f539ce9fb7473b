"""The evaluation as one HTML file, evaluation.html: sounds to play, pictures to see, tables and plots.

Everything is inside the file (sounds and pictures as data URIs, plots as SVG), and its own policy forbids the browser
to load anything else, so it reads the same from a disk, from a mail or without a network. It needs no JavaScript.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

import data
from config import write_atomic

SHEET_CLIPS, COMPARED_CLIPS = 30, 10
SOUND_RATE, SOUND_S = 24_000, 10.0
PICTURE_SIDE, SMALL_SIDE = 224, 128  # larger pictures are made smaller; small ones keep their pixels
MAX_MATRIX = 30  # classes up to which the confusions are a table
SOUNDS = {"right": "right sound", "silence": "silence", "other": "another's sound"}
LANGUAGES = {"en": "English", "ko": "Korean"}
STAGES = {"stage1": "stage 1", "stage2": "stage 2", "stage3": "stage 3"}
# Colours that plots are drawn in, and the page's own that take their place: light and dark follow the reader's choice.
INK, GRID = "#000001", "#000002"
LINES = {"right": "#000003", "silence": "#000004", "other": "#000005"}
PAGE_COLOURS = {INK: "currentColor", GRID: "var(--line)",
                **{colour: f"var(--{name})" for name, colour in LINES.items()}}

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f8; --ink: #1a1e23; --soft: #56606b; --line: #d5dae0;
  --right: #0b62c4; --silence: #6a6f76; --other: #b8410a; --warn: #fff3d6; --warn-edge: #b07400; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1e2227; --ink: #e8eaed; --soft: #a7b0ba; --line: #3a414a;
    --right: #74b4ff; --silence: #b3b9c1; --other: #ff9d66; --warn: #3a2e10; --warn-edge: #e0a63a; }
  img.spectrogram { filter: invert(1); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }
p { margin: .5rem 0; max-width: 48rem; }
a { color: var(--right); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; }
.lead { font-size: 1.15rem; }
.soft, figcaption, small { color: var(--soft); font-size: .85rem; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: .6rem .8rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
.card header { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 0 1rem; }
audio { display: block; width: 100%; height: 40px; margin: .5rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { line-height: 1.35; margin-top: .2rem; }
figcaption b { display: block; color: var(--ink); font-weight: 600; }
.shots { display: grid; gap: .6rem; grid-template-columns: repeat(4, 1fr); }
@media (max-width: 30rem) { .card .shots { grid-template-columns: repeat(2, 1fr); } }
.strip { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr));
  margin: .3rem 0 1.2rem; max-width: 48rem; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; background: var(--line); }
img.spectrogram { aspect-ratio: auto; height: 3rem; object-fit: fill; margin-bottom: .6rem; }
.missing { display: block; padding: .6rem; border: 1px dashed var(--soft); border-radius: 4px; font-size: .85rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { vertical-align: bottom; }
th:first-child, td.text { text-align: left; }
table.wide { width: 100%; }
table.wide th:first-child { min-width: 13rem; font-weight: 600; }
td small, th small { display: block; font-weight: 400; white-space: nowrap; }
th small { white-space: normal; }
td.text { min-width: 9rem; }
.matrix th { font-weight: 400; white-space: nowrap; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.matrix thead td { border: 0; background: none; }
.matrix tbody td { text-align: center; min-width: 2.4rem; border: 1px solid var(--line);
  background: color-mix(in srgb, var(--right) calc(var(--share) * 45%), var(--page)); }
.matrix td.none { color: var(--soft); }
.plots { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr));
  margin-bottom: 1.5rem; }
.plots.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.plots figure { max-width: 30rem; }
.plots svg { display: block; width: 100%; height: auto; }
.plots svg text { font-family: inherit !important; }
.pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.pairs .shots { grid-template-columns: repeat(3, 1fr); }
footer { margin-top: 2.5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
"""


def write(evaluation: dict, path: Path) -> None:
    """Write the page of an evaluation (the dict of evaluate.py).

    Raises:
        RunFailed: the file cannot be written; an old one is as it was. A missing picture or sound only leaves a note.
    """
    write_atomic(path, render(evaluation).encode())


def render(e: dict) -> str:
    """The whole page as text."""
    shown = pick_clips(e["clips"])
    sections = {"sheet": ("Sounds and pictures", sheet(e["clips"], shown)),
                "measures": ("Measures", measures(e)),
                "confusion": ("What the judge sees", confusions(e["confusion"])),
                "properties": ("Properties of the sound in the picture", properties(e.get("properties", {}))),
                "gate": ("Gate: how much sound", gate(e)),
                "training": ("Training", training(e["training"])),
                "against": ("A against B", against(e, shown[:COMPARED_CLIPS]) if "against" in e else "")}
    sections = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, (heading, _) in sections.items())
    bodies = "".join(f'<section id="{name}"><h2>{heading}</h2>{body}</section>\n'
                     for name, (heading, body) in sections.items())
    title = f"Evaluation of {escape(e['run'])}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><header><h1>{title}</h1><p class="lead">{summary(e["measures"])}</p>{warnings(e)}<nav>{links}</nav></header>
<main>
{bodies}</main>
{footer(e)}</body></html>
"""


# --- words and numbers ------------------------------------------------------------------------------------------------

def words(label: str) -> str:
    """A label as it is read: "dog_barking+rain" is "dog barking + rain". Escaped."""
    return escape(label.replace("_", " ").replace("+", " + "))


def name_of(clip: dict) -> str:
    return words(clip["label"] or clip["text"])


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + "\u00a0%"


def defined(values: list[float] | None) -> bool:
    """Whether there is a value: a correlation with something constant is nan."""
    return values is not None and values[0] is not None and math.isfinite(values[0])


def interval(values: list[float] | None, digits: int = 3) -> str:
    if not defined(values):
        return "undefined"
    return f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def summary(table: dict) -> str:
    """What was found in one sentence."""
    if "top1_en" in table:
        row, start = table["top1_en"], "the judge names what the picture should show"
        unit = f"of {row['n']} clips"
    else:
        row, start = table["iis_win_rate"], "a picture is closer to its true picture than to"
        unit = f"of the others ({row['n']} clips)"
    where = "in " if "top1_en" in table else ""
    text = (f"With the right sound {start} {where}{percent(row['right'][0])} {unit}; with silence {where}"
            f"{percent(row['silence'][0])}, with another clip's sound {where}{percent(row['other'][0])}; chance is "
            f"{percent(row['chance'])}.")
    if row["right"][1] <= max(row["silence"][2], row["other"][2]):
        text += " The intervals overlap, so this alone does not show that the sound matters."
    return text


def warnings(e: dict) -> str:
    lines = list(e["warnings"])
    if e["quick"]:
        lines.append("a quick evaluation: fewer clips, no mixtures, half the noises")
    return "".join(f'<p class="warning"><b>Warning:</b> {escape(line)}</p>' for line in lines)


# --- sounds and pictures as text --------------------------------------------------------------------------------------

def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def missing(what: str, path: str, reason: Exception) -> str:
    return f'<span class="missing">{what} missing: {escape(Path(path).name)} ({escape(str(reason))})</span>'


def encode(image) -> str:
    """A PIL picture as a data URI: every pixel of a small one, a smaller JPEG of a large one."""
    content, small = io.BytesIO(), max(image.size) <= SMALL_SIDE
    image.save(content, **({"format": "PNG", "optimize": True} if small else {"format": "JPEG", "quality": 85}))
    return data_uri("image/png" if small else "image/jpeg", content.getvalue())


def picture(path: str, alt: str) -> str:
    """An <img> of the square that the models see (the middle of the file), or a note; alt is HTML."""
    try:
        with data.open_image(Path(path)) as image:
            side = min(*image.size, PICTURE_SIDE)
        return f'<img src="{encode(data.load_picture(path, side))}" alt="{alt}">'
    except data.BadFile as error:
        return missing("picture", path, error)


def spectrogram(waveform: np.ndarray) -> str:
    """Frequency upwards, time to the right, as a data URI; 70 dB from white to black."""
    from PIL import Image
    n_fft, columns = 1024, 256
    padded = np.pad(waveform, n_fft // 2)
    starts = np.linspace(0, len(padded) - n_fft, columns).astype(int)
    frames = np.stack([padded[at:at + n_fft] for at in starts]) * np.hanning(n_fft)
    power = np.abs(np.fft.rfft(frames)) ** 2  # (columns, 513)
    edges = np.geomspace(2, n_fft // 2, 49).astype(int)  # bins of the rows, low to high
    rows = np.stack([power[:, low:max(high, low + 1)].mean(1) for low, high in zip(edges, edges[1:])])  # (48, columns)
    loud = 10 * np.log10(rows + 1e-12)
    gray = 255 - np.clip((loud - loud.max() + 70) / 70, 0, 1) * 255
    content = io.BytesIO()
    Image.fromarray(gray[::-1].astype(np.uint8)).save(content, format="PNG", optimize=True)
    return data_uri("image/png", content.getvalue())


def sound(path: str, name: str) -> str:
    """A player of the clip's first seconds with its spectrogram, or a note that the file is missing."""
    import soundfile
    content = io.BytesIO()
    try:
        waveform = data.load_waveform(path, SOUND_RATE, SOUND_S)[0]
        soundfile.write(content, waveform, SOUND_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    except (data.BadFile, soundfile.SoundFileError) as error:
        return missing("sound", path, error)
    return (f'<audio controls preload="none" src="{data_uri("audio/mpeg", content.getvalue())}" '
            f'aria-label="sound of {name}"></audio><img class="spectrogram" src="{spectrogram(waveform)}" '
            f'alt="spectrogram of {name}">')


# --- the sheet --------------------------------------------------------------------------------------------------------

def in_turn(indices: list[int], clips: list[dict]) -> list[int]:
    """The first clip of each label, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for i in indices:
        label = clips[i]["label"]
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], i))
    return [i for _, i in sorted(turns)]


def pick_clips(clips: list[dict], n: int = SHEET_CLIPS) -> list[int]:
    """Up to n clips, each label in turn; up to a third are pairs of labels, fewer where single labels need the room."""
    single = in_turn([i for i, clip in enumerate(clips) if "+" not in clip["label"]], clips)
    pairs = in_turn([i for i, clip in enumerate(clips) if "+" in clip["label"]], clips)
    labels = len({clips[i]["label"] for i in single})
    n_pairs = max(n - len(single), min(n // 3, max(n - labels, n // 10)))
    return single[:n - min(n_pairs, len(pairs))] + pairs[:n_pairs]


def verdict(seen: str, label: str, other_label: str = "") -> str:
    """What the judge saw, marked by a sign: the clip's label, the label of the sound given in its place, or neither."""
    sign = "✓" if seen in label.split("+") else "↪" if seen in other_label.split("+") else "✗"
    return f"{sign} {words(seen)}"


def shot(path: str, alt: str, name: str, note: str = "") -> str:
    return f"<figure>{picture(path, alt)}<figcaption><b>{name}</b>{note}</figcaption></figure>"


def card(clips: list[dict], i: int) -> str:
    """One clip: its sound, the true picture and what was made of the right sound, of silence and of another's sound."""
    clip, name = clips[i], name_of(clips[i])
    other = clips[clip["other_clip"]] if "other_clip" in clip else None
    shots = [shot(clip["real"], f"true picture of {name}", "true picture")]
    for kind, title in SOUNDS.items():
        note = verdict(clip[kind]["seen"], clip["label"], other["label"] if kind == "other" and other else "")
        title = f"sound of {name_of(other)}" if kind == "other" and other else title
        shots.append(shot(clip[kind]["picture"], f"picture made from {title}: {note}", title, note))
    return (f'<article class="card"><header><h3>{name}</h3><small>{escape(Path(clip["audio"]).name)}</small></header>'
            f'{sound(clip["audio"], name)}<div class="shots">{"".join(shots)}</div></article>\n')


def sheet(clips: list[dict], shown: list[int]) -> str:
    return (f"<p>{len(shown)} of {len(clips)} clips, each label in turn. All pictures of a clip begin with the same "
            "noise and have no text prompt, so only the sound differs. Below each stands what the judge sees: <b>✓</b> "
            "a label of this clip, <b>✗</b> another one, <b>↪</b> a label of the clip whose sound was given.</p>"
            f'<div class="cards">{"".join(card(clips, i) for i in shown)}</div>')


# --- tables -----------------------------------------------------------------------------------------------------------

def cell(values: list[float] | None) -> str:
    """A value with its interval below."""
    if not defined(values):
        return '<td class="none">–</td>'
    return f"<td>{values[0]:.3f}<small>[{values[1]:.3f}, {values[2]:.3f}]</small></td>"


def measures(e: dict) -> str:
    """The table of measures, and how much the pictures of one sound differ."""
    rows = ""
    for row in e["measures"].values():
        lower = "" if row["higher_is_better"] else "; lower is better"
        chance = "–" if row["chance"] is None else f"{row['chance']:.3f}"
        cells = "".join(cell(row.get(kind)) for kind in (*SOUNDS, "real"))
        rows += (f'<tr><th scope="row">{escape(row["title"])}<small>{escape(row["about"])}{lower}</small></th>'
                 f"<td>{row['n']}</td>{cells}<td>{chance}</td></tr>\n")
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("n", *SOUNDS.values(), "real pictures", "chance"))
    text = ("<p>Each value with its 95 % bootstrap interval over the clips.</p>"
            '<div class="scroll" tabindex="0"><table class="wide">'
            f'<thead><tr><th scope="col">measure</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
            "<p>Win rates and raw cosines are two definitions in use under the same names (SonicDiffusion's and "
            "MACS's); they are not comparable with each other.</p>")
    spread = e["diversity"]
    if spread:
        within = (f" Between the pictures of one class {interval(spread['distance'])}, between real ones "
                  f"{interval(spread['real_distance'])}." if "distance" in spread else "")
        text += (f"<p>Diversity: {spread['classes']} sounds, {spread['seeds']} noises each. Mean distance between the "
                 f"pictures of one sound {interval(spread['seed_distance'])}; share of distinct pictures "
                 f"{interval(spread['distinct_share'])}.{within}</p>")
    return text


def matrix(classes: list[str], counts: list[list[int]]) -> str:
    """Counts as a table; a cell's colour is its share of the row."""
    heads = "".join(f'<th scope="col">{words(name)}</th>' for name in classes)
    rows = ""
    for name, row in zip(classes, counts, strict=True):
        total = max(sum(row), 1)
        cells = "".join(f'<td style="--share:{count / total:.3f}"{"" if count else " class=none"}>{count}</td>'
                        for count in row)
        rows += f'<tr><th scope="row">{words(name)}</th>{cells}</tr>\n'
    return (f'<div class="scroll" tabindex="0"><table class="matrix"><thead><tr><td></td>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")


def commonest(classes: list[str], counts: list[list[int]], n: int = 20) -> str:
    """The commonest confusions in words."""
    wrong = sorted((-count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count)
    found = ", ".join(f"{words(classes[i])} seen as {words(classes[j])} ({-count})" for count, i, j in wrong[:n])
    return f"<p>Commonest confusions: {found or 'none'}.</p>"


def confusions(table: dict) -> str:
    """The confusion matrix of the right sound, those of silence and another's sound folded below it."""
    if not sum(map(sum, table["right"])):
        return ""
    text = "<p>Pictures of clips with one label. Rows: the clip's label; columns: the label that the judge sees.</p>"
    for kind, name in SOUNDS.items():
        counts = table[kind]
        body = matrix(table["classes"], counts) if len(counts) <= MAX_MATRIX else ""
        body += commonest(table["classes"], counts)
        right = sum(counts[i][i] for i in range(len(counts)))
        title = f"{name}: {right} of {sum(map(sum, counts))} pictures seen as the clip's label"
        text += f"<h3>{title.capitalize()}</h3>{body}" if kind == "right" else \
            f"<details><summary>{title.capitalize()}</summary>{body}</details>"
    return text


# --- plots ------------------------------------------------------------------------------------------------------------

def plot(draw: Callable, title: str, below: str = "") -> str:
    """A plot as SVG in the page's colours and font; `draw` is given the axes, title and below are HTML."""
    import matplotlib
    from matplotlib.figure import Figure
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    # A fixed salt, so that the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page", "text.parse_math": False,
                                "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "grid.color": GRID,
                                "axes.spines.top": False, "axes.spines.right": False,
                                **dict.fromkeys(names, INK)}):
        figure = Figure(figsize=(4.1, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return f"<figure><h3>{title}</h3>{page_svg(content.getvalue(), title)}<figcaption>{below}</figcaption></figure>"


def page_svg(svg: str, title: str) -> str:
    """What Matplotlib wrote, as a part of an HTML page."""
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1:]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # figure_1 and so on: the same in every plot, used by none
    for colour, page_colour in PAGE_COLOURS.items():
        body = body.replace(colour, page_colour)
    return f'<svg {view} role="img" aria-label="{title}" stroke-linejoin="round">{body}'


def property_plot(name: str, row: dict) -> str:
    """The value set in the sound against the one measured in the picture."""
    def draw(axes):
        points = np.array(row["points"], float)  # (n, 2)
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.5)
        axes.plot(points[:, 0], points[:, 1], "o", color=LINES["right"], markersize=3.5, alpha=0.55, markeredgewidth=0)
        axes.set(xlabel=f"{name} set in the sound", ylabel="measured in the picture")
    return plot(draw, f"{words(name)}: ρ {interval(row['right'], 2)}",
                f"shuffled sounds ρ {interval(row['shuffled'], 2)}; real pictures (the measure itself) ρ "
                f"{interval(row['real'], 2)}; n {row['n']}")


def properties(table: dict) -> str:
    """A plot of each property."""
    figures = "".join(property_plot(name, row) for name, row in table.items())
    return figures and ("<p>Spearman's rank correlation ρ with its 95 % interval. One point is one clip with its right "
                        f'sound; with shuffled sounds nothing may be left.</p><div class="plots">{figures}</div>')


def sweep_plot(stage: dict) -> str:
    """Validation loss against tanh(gate), with the window and the learned value."""
    def draw(axes):
        if "window" in stage:
            axes.axvspan(*stage["window"], color=LINES["silence"], alpha=0.2, linewidth=0, label="window")
        for key, style, line in (("sweep_before", "--", "silence"), ("sweep_after", "-", "right")):
            table = stage.get(key) or []
            x = [row["tanh_gate"] for row in table]
            axes.plot(x, [row["loss"] for row in table], style, color=LINES[line], marker="o", markersize=4,
                      label=f"{key.removeprefix('sweep_')} stage 3")
            axes.fill_between(x, [row["low"] for row in table], [row["high"] for row in table], color=LINES[line],
                              alpha=0.12, linewidth=0)
        if "tanh_gate" in stage:
            axes.axvline(stage["tanh_gate"], color=LINES["other"], linewidth=1.2,
                         label=f"learned: {stage['tanh_gate']:.3f}")
        axes.set(xlabel="tanh(gate)", ylabel="validation loss, right sound")
    figure = plot(draw, "Loss against tanh(gate)", "bands: 95 % interval over the clips")
    return f'<div class="plots large">{figure}</div>'


def gate(e: dict) -> str:
    """The sweep of stage 3 if it is known, and pictures from no sound to all of it."""
    text, stage = "", e["training"].get("stage3", {})
    if stage.get("sweep_before") or stage.get("sweep_after"):
        text += sweep_plot(stage)
    for strip in e["gate"]["strips"]:
        name = name_of(e["clips"][strip["clip"]])
        shots = "".join(shot(path, f"{name} at tanh(gate) {value:.1f}", f"{value:.1f}")
                        for value, path in zip(strip["gates"], strip["paths"], strict=True))
        text += f'<h3>{name}</h3><div class="strip">{shots}</div>'
    return text and (f"<p>tanh(gate) is how strongly the sound steers the picture: 0 is none of it. The adapter "
                     f"learned {e['gate']['tanh_gate']:.3f}. Each strip is one sound from the same noise.</p>{text}")


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, "valid")


def loss_plot(log: list[dict], name: str) -> str:
    """Training loss, smoothed, and validation losses of one stage."""
    def draw(axes):
        trained = np.array([[row["step"], row["loss"]] for row in log if "loss" in row])
        if len(trained):
            width = max(1, len(trained) // 10)
            axes.plot(smooth(trained[:, 0], width), smooth(trained[:, 1], width), color=INK, linewidth=1, alpha=0.5,
                      label="training" + (f", mean of {width}" if width > 1 else ""))
        for kind, line in LINES.items():
            rows = [(row["step"], *row[f"val_{kind}"]) for row in log if f"val_{kind}" in row]
            if rows:
                step, value, low, high = zip(*rows)
                axes.plot(step, value, {"right": "-", "silence": "--", "other": ":"}[kind], color=line, marker="o",
                          markersize=3, label=f"validation, {SOUNDS[kind]}")
                axes.fill_between(step, low, high, color=line, alpha=0.08, linewidth=0)
        axes.set(xlabel="step", ylabel="loss")
    return plot(draw, name)


def training(stages: dict) -> str:
    figures = "".join(loss_plot(stages[key]["log"], name) for key, name in STAGES.items()
                      if stages.get(key, {}).get("log"))
    return figures and ("<p>Losses of the stages. Validation has fixed noise and timesteps; bands are 95 % intervals "
                        f'over the validation clips.</p><div class="plots large">{figures}</div>')


# --- A against B ------------------------------------------------------------------------------------------------------

def against(e: dict, shown: list[int]) -> str:
    """Each measure of both runs with its verdict, and their pictures of some clips side by side."""
    other, rows = e["against"], ""
    for row in other["comparison"].values():
        rows += (f'<tr><th scope="row">{escape(row["title"])}</th><td>{row["n"]}</td><td>{row["a"]:.3f}</td>'
                 f'<td>{row["b"]:.3f}</td>{cell(row["difference"])}<td class="text">{escape(row["verdict"])}</td>'
                 f"<td>{row['n_needed'] or '–'}</td></tr>\n")
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("n", "A", "B", "A - B, paired"))
    pairs = ""
    for i in shown:
        a, b, name = e["clips"][i], other["clips"][i], name_of(e["clips"][i])
        shots = shot(a["real"], f"true picture of {name}", "true") + "".join(
            shot(clip["right"]["picture"], f"{run}: {name}", run, verdict(clip["right"]["seen"], clip["label"]))
            for run, clip in (("A", a), ("B", b)))
        pairs += f'<figure><h3>{name}</h3><div class="shots">{shots}</div></figure>'
    return (f"<p>A is {escape(e['run'])}, B is {escape(other['run'])}: the right sound, the same clips and the same "
            'noise in both.</p><div class="scroll" tabindex="0"><table class="wide">'
            f'<thead><tr><th scope="col">measure</th>{heads}<th scope="col" style="text-align:left">verdict</th>'
            f'<th scope="col">n needed</th></tr></thead><tbody>{rows}</tbody></table></div>'
            "<p>n needed: clips at which a difference of this size would show with 80 % power.</p>"
            f'<div class="pairs">{pairs}</div>')


def footer(e: dict) -> str:
    """How the evaluation was made."""
    trained, judge = e["trained"], e["judge"]
    settings = "; ".join(f"{name} {'learned' if value is None else value}" for name, value in e["settings"].items()
                         if name != "clips")
    accuracy = ", ".join(f"{LANGUAGES.get(key, key)} {interval(values)}" for key, values in judge["accuracy"].items())
    lines = [f"{e['n']} clips of split {e['split']} of {e['data_root']}: {e['n_single']} with one label, "
             f"{e['n_pairs']} with two.",
             f"The judge, {judge['name']}, reads the real pictures: {accuracy or 'not measured'} (n {judge['n']}).",
             f"Adapter of {trained['stage']}, step {trained['step']}, tanh(gate) {trained['tanh_gate']:.3f}; base "
             f"model {trained['base_model']}; CLAP {trained['clap_model']}.",
             f"Settings: {settings}.", f"Commit {e['git_commit']}."]
    return f"<footer>{''.join(f'<p class=soft>{escape(line)}</p>' for line in lines)}</footer>\n"
