"""The page of an evaluation: one file that needs nothing else, every number, whole in a browser."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from jinja2 import UndefinedError
from PIL import Image

from clap2diffusion.base.exits import RunFailed
from clap2diffusion.judging import page
from clap2diffusion.judging.clips import pick_clips
from clap2diffusion.judging.evaluation import write_evaluation
from clap2diffusion.judging.page import SOUNDS

HOSTILE = """<b>"x"&'$"""
CLASSES = [HOSTILE, "dog_barking", "rain"]
LABELS = [HOSTILE, "dog_barking", "rain", "dog_barking", "dog_barking+rain"]
OTHERS = [1, 2, 0, 0, 4]
SECONDS = 1.5
ADDRESSES = {"src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"}


def make_picture(path: Path, seed: int, side: int = 64) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return str(path)


def make_sound(path: Path, pitch: float, seconds: float = SECONDS, rate: int = 16_000) -> str:
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate), rate)
    return str(path)


def three(value: float) -> list[float]:
    return [value, value - 0.0123, value + 0.0117]


def make_clips(folder: Path, first_seed: int) -> list[dict]:
    return [{"id": f"clip {i}", "label": label, "text": f"text of {label}", "other_clip": OTHERS[i],
             "audio": make_sound(folder / f"{i}.wav", 200 + 100 * i),
             "real": make_picture(folder / f"{i}.png", i),
             **{kind: {"picture": make_picture(folder / f"{kind}-{i}.png", first_seed + 10 * i + k),
                       "seen": CLASSES[(i + k) % 3]}
                for k, kind in enumerate(SOUNDS)}} for i, label in enumerate(LABELS)]


def make_log() -> dict:
    rows = [{"step": step, "loss": 0.3 / (1 + step)} for step in range(1, 40)]
    return {"log": [{"step": 0, **{f"val_{kind}": three(0.25) for kind in SOUNDS}}, *rows]}


@pytest.fixture
def evaluation(tmp_path) -> dict:
    """A small evaluation with every part, its files made on the spot."""
    def measure(title: str, values: list[float], chance: float | None, higher: bool = True) -> dict:
        return {"title": title, "about": f"about {title} {HOSTILE}", "chance": chance, "n": 241,
                "one_drawn": 0.1111 if title == "mixture" else None,
                "higher_is_better": higher,
                **{kind: three(value) for kind, value in zip((*SOUNDS, "real"), values)}}
    clips = make_clips(tmp_path, 100)
    found = {"top1_en": measure("zero-shot top-1", [0.975, 0.09, 0.031, 0.996], 0.1),
             "median_rank": measure("median rank", [9, 148, 190, 1], None, higher=False),
             "both_mixed": measure("mixture", [0.383], 0.022)}
    sweep = [{"tanh_gate": x / 10, **{kind: three(0.5 - x / 100) for kind in SOUNDS}} for x in range(11)]
    old_sweep = [{"tanh_gate": x / 10, "loss": 0.5 - x / 100, "low": 0.4, "high": 0.6} for x in range(11)]
    comparison = {"top1_en": {"title": f"top-1 {HOSTILE}", "a": 0.975, "b": 0.913,
                              "difference": three(0.0617), "verdict": "A better", "n": 241, "n_needed": 377},
                  "cmmd": {"title": "CMMD", "a": 3.1, "b": 3.1, "difference": three(0), "n": 241,
                           "n_needed": None, "verdict": "no difference shown at this n"}}
    (tmp_path / "b").mkdir()
    return {"format": 1, "run": f"runs/{HOSTILE}", "adapter": "adapter.safetensors",
            "data_root": "data/world",
            "split": "test", "n": 5, "n_single": 4, "n_pairs": 1, "labelled": True, "quick": False,
            "trained": {"stage": "stage3", "step": 4321, "base_model": "base", "clap_model": "clap",
                        "tanh_gate": 0.4242},
            "settings": {"guidance": 5.5, "steps": 27, "seed": 12, "gate": None, "precision": "fp32",
                         "clips": 0},
            "judge": {"name": f"judge {HOSTILE}", "accuracy": {"en": three(0.9871), "ko": three(0.9654)},
                      "n": 4},
            "measures": found, "mixes": [{"clips": [0, 1], "found": 2}],
            "confusion": {"classes": CLASSES, "right": [[17, 1, 0], [0, 18, 0], [2, 0, 16]],
                          "silence": [[6, 6, 6]] * 3, "other": [[0, 9, 9], [9, 0, 9], [9, 9, 0]]},
            "properties": {name: {"n": 97, "real": three(0.985), "right": three(0.811),
                                  "shuffled": three(-0.021),
                                  "points": np.random.default_rng(0).random((9, 2)).tolist()}
                           for name in ("pitch", HOSTILE)},
            "diversity": {"classes": 3, "seeds": 8, "seed_distance": three(0.2134),
                          "distinct_share": three(0.9712),
                          "distance": three(0.3111), "real_distance": three(0.3345)},
            "gate": {"tanh_gate": 0.4242,
                     "strips": [{"clip": 0, "gates": [0.0, 0.5, 1.0],
                                 "paths": [clip["right"]["picture"] for clip in clips[:3]]}]},
            "clips": clips, "warnings": [f"low diversity {HOSTILE}"],
            "training": {"missing": "", "stages": [
                {"name": "stage1", "stage": "stage1", "folder": "runs/a/stage1", **make_log(),
                 "best_step": 30},
                {"name": "huber", "stage": "stage2", "folder": f"runs/{HOSTILE}/huber", **make_log(),
                 "best_step": 0},
                {"name": "stage3", "stage": "stage3", "folder": "runs/b/stage3", **make_log(),
                 "sweep_before": old_sweep, "sweep_after": sweep, "tanh_gate": 0.4242,
                 "window": [0.35, 0.45]}]},
            "against": {"run": f"runs/other {HOSTILE}", "measures": found, "comparison": comparison,
                        "equal": "Equal in A and B: projection; not equal: K/V, LoRA, gate",
                        "clips": make_clips(tmp_path / "b", 300)},
            "guidance_sweep": [{"guidance": 5.5, "n": 77, "iis_win_rate": three(0.888)}],
            "git_commit": "0123456789abcdef-dirty"}


class Tags(HTMLParser):
    """Every opening tag with its attributes, and all the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.text += text

    def of(self, name: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag == name]


def content(uri: str) -> bytes:
    return base64.b64decode(uri.split(",", 1)[1])


def section(evaluation: dict, name: str) -> str:
    """The HTML of one section of the page."""
    return re.search(rf'<section id="{name}">.*?</section>', page.render(evaluation), re.DOTALL)[0]


def cards(evaluation: dict) -> list[str]:
    """The HTML of each clip on the sheet."""
    return re.findall(r"<article.*?</article>", section(evaluation, "sheet"), re.DOTALL)


def lead(evaluation: dict) -> str:
    """What was found, in words, at the top of the page."""
    return re.search(r'<p class="lead">(.*?)</p>', page.render(evaluation), re.DOTALL)[1]


def test_the_page_needs_nothing_outside_itself(evaluation):
    text = page.render(evaluation)
    tags = Tags(text)
    found = [value for _, attrs in tags.tags for name, value in attrs.items() if name in ADDRESSES]
    assert len(found) > 30
    assert not [value for value in found if not value.startswith(("data:", "#"))]
    assert not re.search(r"https?:|//|url\((?!#)|@import|file:", re.sub(r"base64,[\w+/=]*", "", text))
    assert {"script", "iframe", "object"}.isdisjoint(tag for tag, _ in tags.tags)
    assert not [name for _, attrs in tags.tags for name in attrs if name.startswith("on")]
    policy, = (attrs["content"]
               for attrs in tags.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")


def test_every_section_and_every_number_is_there(evaluation):
    tags = Tags(page.render(evaluation))
    sections = [attrs["id"] for attrs in tags.of("section")]
    assert sections == ["sheet", "measures", "confusion", "properties", "gate", "training", "against"]
    assert [attrs["href"] for attrs in tags.of("a")] == [f"#{name}" for name in sections]
    text = re.sub(r"\s+", " ", tags.text)
    for wanted in (
            "With the right sound the judge names what the picture should show in 97.5 % of 241 clips; "
            "with silence in "
            "9 %, with another clip's sound in 3.1 %; chance is 10 %.", f"Warning: low diversity {HOSTILE}",
            "0.975[0.963, 0.987]", "148.000[147.988, 148.012]", "0.383[0.371, 0.395]", "lower is better",
            "they are not comparable with each other", "0.213 [0.201, 0.225]", "0.971 [0.959, 0.983]",
            "0.335 [0.322, 0.346]", "51 of 54 pictures", f"rain seen as {HOSTILE} (2)",
            "pitch: ρ 0.81 [0.80, 0.82]",
            "ρ -0.02 [-0.03, -0.01]", "ρ 0.98 [0.97, 1.00]; n 97", "learned 0.424", "learned: 0.424",
            "window",
            "0.062[0.049, 0.073]", "A better", "no difference shown at this n", "377",
            "English 0.987 [0.975, 0.999]",
            "Korean 0.965 [0.953, 0.977]", "(n 4)",
            "guidance 5.5; steps 27; seed 12; gate learned; precision fp32",
            "step 4321", "Commit 0123456789abcdef-dirty", "4 with one label, 1 with two",
            "validation, silence"):
        assert wanted in text, wanted
    assert len(tags.of("audio")) == 5 and all(attrs["preload"] == "none" for attrs in tags.of("audio"))
    assert len(tags.of("svg")) == 2 + 1 + 3
    assert len(tags.of("img")) == 5 * (1 + 4) + 3 + 5 * 3
    assert all(attrs.get("alt") for attrs in tags.of("img"))
    assert all(attrs["aria-label"] for attrs in tags.of("svg"))


def test_a_row_of_the_table_has_its_values_in_the_columns_named(evaluation):
    table = section(evaluation, "measures")
    row = re.search(r"<tr><th[^>]*>zero-shot top-1.*?</tr>", table, re.DOTALL)[0]
    assert re.findall(r"<td>([^<]*)", row) == ["241", "0.975", "0.090", "0.031", "0.996", "0.100"]
    heads = re.findall(r'<th scope="col">([^<]*)', html.unescape(table))
    assert heads == ["measure", "n", "right sound", "silence", "another's sound", "real pictures", "chance"]
    mixed = re.search(r"<tr><th[^>]*>mixture.*?</tr>", table, re.DOTALL)[0]
    assert re.findall(r"<td[^>]*>([^<]*)", mixed) == ["241", "0.383", "–", "–", "–", "0.022"]


def test_the_confusion_matrix_has_labels_as_rows(evaluation):
    first = re.search(r'<table class="matrix">.*?</table>', section(evaluation, "confusion"), re.DOTALL)[0]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', first, re.DOTALL)
    assert [html.unescape(name) for name, _ in rows] == [HOSTILE, "dog barking", "rain"]
    counts = [re.findall(r">(\d+)<", cells) for _, cells in rows]
    assert counts == [["17", "1", "0"], ["0", "18", "0"], ["2", "0", "16"]]
    many = [str(i) for i in range(page.MAX_MATRIX + 1)]
    counts = np.eye(len(many), dtype=int).tolist()
    evaluation["confusion"] = {"classes": many, **dict.fromkeys(SOUNDS, counts)}
    assert "<table" not in section(evaluation, "confusion")


def test_hostile_text_is_escaped(evaluation):
    for clip in evaluation["clips"]:  # a file's name is text too
        renamed = Path(clip["audio"]).with_name(f"{HOSTILE.replace('/', '')}{Path(clip['audio']).name}")
        Path(clip["audio"]).rename(renamed)
        clip["audio"] = str(renamed)
    evaluation["clips"][0]["real"] = f"gone {HOSTILE}.png"
    for key in ("split", "data_root", "git_commit"):
        evaluation[key] = f"{key} {HOSTILE}"
    for key in ("base_model", "clap_model", "stage"):
        evaluation["trained"][key] = f"{key} {HOSTILE}"
    evaluation["against"]["comparison"]["cmmd"]["verdict"] = HOSTILE
    evaluation["measures"]["top1_en"]["title"] = HOSTILE
    text = page.render(evaluation)
    assert HOSTILE not in text and '<b>"' not in text and "&'" not in text and "&amp;amp;" not in text
    tags = Tags(text)
    assert all(not attrs for attrs in tags.of("b"))
    assert f"gone {HOSTILE}.png" in tags.text and tags.text.count(HOSTILE) > 20
    assert f"sound of {HOSTILE}" in [attrs["aria-label"] for attrs in tags.of("audio")]


@pytest.mark.parametrize("damage",
                         [lambda path: path.unlink(), lambda path: path.write_bytes(b"no such thing")])
def test_a_missing_or_broken_file_leaves_a_note_in_its_place(evaluation, damage):
    whole = Tags(page.render(evaluation))
    assert "missing:" not in whole.text
    damage(Path(evaluation["clips"][3]["audio"]))
    damage(Path(evaluation["clips"][3]["silence"]["picture"]))
    tags = Tags(page.render(evaluation))
    assert "sound missing: 3.wav (" in tags.text and "picture missing: silence-3.png (" in tags.text
    assert len(tags.of("audio")) == len(whole.of("audio")) - 1
    assert len(tags.of("img")) == len(whole.of("img")) - 2  # the picture and the spectrogram


def test_what_an_evaluation_may_lack(evaluation):
    for key in ("properties", "mixes", "against"):
        del evaluation[key]
    evaluation["training"] = {"missing": "", "stages": []}
    evaluation |= {"diversity": {}, "gate": {"tanh_gate": 0.0, "strips": []}, "warnings": [],
                   "quick": True}
    evaluation["judge"]["accuracy"] = {}
    for clip in evaluation["clips"]:
        del clip["other_clip"]
    table = evaluation["measures"]
    table["iis_win_rate"] = {**table.pop("top1_en"), "chance": 0.5}
    evaluation["confusion"] = {"classes": CLASSES, **dict.fromkeys(SOUNDS, [[0] * 3] * 3)}
    tags = Tags(page.render(evaluation))
    assert [attrs["id"] for attrs in tags.of("section")] == ["sheet", "measures"]
    assert "closer to its true picture than to 97.5\u00a0% of the others" in re.sub("[ \n]+", " ", tags.text)
    assert "Warning: a quick evaluation" in tags.text and "another's sound" in tags.text
    assert "not measured" in tags.text


def test_values_that_are_not_defined_are_said_to_be(evaluation):
    evaluation["properties"]["pitch"]["right"] = [float("nan")] * 3
    evaluation["measures"]["median_rank"]["real"] = [None] * 3
    text = page.render(evaluation)
    assert "pitch: ρ undefined" in text
    assert "nan" not in re.sub(r"base64,[\w+/=]*", "", text).split("</style>")[1]


def test_overlapping_intervals_are_said_to_show_nothing(evaluation):
    assert "overlap" not in lead(evaluation)
    evaluation["measures"]["top1_en"]["other"] = [0.95, 0.94, 0.965]
    assert "does not show that the sound matters" in lead(evaluation)


def test_the_sheet_shows_every_label_first_and_pairs_too():
    def pick(*labels):
        return [labels[i] for i in pick_clips(labels, page.SHEET_CLIPS)]
    singles, pairs = [f"s{i}" for i in range(10)], [f"s{i}+s{j}" for i in range(10) for j in range(i)]
    found = pick(*sorted(singles * 24), *pairs)
    assert found[:20] == singles * 2 and len(found) == 30 and len(set(found[20:])) == 10
    assert pick("b", "a", "a", "a+b", "b") == ["a", "b", "a", "b", "a+b"]
    assert pick(*singles * 5) == singles * 3
    some, many = pick(*pairs * 2), [f"t{i}" for i in range(40)]
    assert some == sorted(set(some)) and len(some) == 30 and set(some) < set(pairs)
    found = pick(*many, *pairs)
    assert len({*found[:27]} & {*many}) == 27 and len({*found[27:]} & {*pairs}) == 3
    assert found[:27] != sorted(many[:27])  # by seed, not the first ones


def test_the_training_shown_is_that_of_the_adapter_alone(evaluation):
    text = html.unescape(section(evaluation, "training"))
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["stage 1", "huber, a stage 2", "stage 3"]
    assert f"best at step 0; runs/{HOSTILE}/huber" in text and "best at step 30; runs/a/stage1" in text
    assert "window" in section(evaluation, "gate")
    evaluation["training"]["stages"].pop()  # judged is stage 2: no sweep, and its gate was not learned
    evaluation["trained"]["stage"] = "stage2"
    gate = " ".join(section(evaluation, "gate").split())
    assert "<svg" not in gate and "was trained with it held at 0.424" in gate
    evaluation["training"] = {"missing": f"{HOSTILE} is not there", "stages": []}
    assert f"{HOSTILE} is not there." in html.unescape(section(evaluation, "training"))


def test_what_two_runs_share_stands_above_their_comparison(evaluation):
    said = evaluation["against"]["equal"]
    assert f"{said}.</p>" in html.unescape(section(evaluation, "against"))
    assert f"{said}." in page.TEMPLATES.get_template("evaluation.md.j2").render(e=evaluation)
    evaluation["against"]["equal"] = ""
    assert "hold equal weights" not in section(evaluation, "against")


def test_a_row_of_few_clips_is_marked(evaluation):
    assert "too few" not in page.render(evaluation).lower()
    evaluation["measures"]["top1_en"]["n"] = 9
    assert "241</td>" in section(evaluation, "measures")
    assert section(evaluation, "measures").count("<td>9<small>too few</small></td>") == 1
    assert "below 10 clips an interval is too narrow" in section(evaluation, "measures")
    assert "Too few clips (9) to tell anything." in lead(evaluation)
    assert "| 9 (few) |" in page.TEMPLATES.get_template("evaluation.md.j2").render(e=evaluation)


def test_a_caption_with_a_plus_is_one_class():
    assert page.verdict("a dog + rain", "a dog + rain") == "✓ a dog  +  rain"
    assert page.verdict("a dog + rain", "fire", "a dog + rain").startswith("↪")


def test_verdicts_are_marked_by_a_sign():
    assert page.verdict("rain", "rain", "siren") == "✓ rain"
    assert page.verdict("dog_barking", "rain+dog_barking") == "✓ dog barking"
    assert page.verdict("siren", "rain", "siren+fire") == "↪ siren"
    assert page.verdict("fire", "rain", "siren") == "✗ fire"


def test_a_card_names_the_other_sound_and_what_was_seen(evaluation):
    [card] = [card for card in cards(evaluation) if "1.wav" in card]  # barking, with the rain's sound
    words = [html.unescape(text) for text in re.findall(r">\s*([^<]*[^<\s])\s*<", card)]
    # seen are classes 1, 2 and 0
    assert words == ["dog barking", "1.wav", "true picture", "right sound", "✓ dog barking", "silence",
                     "✗ rain",
                     "sound of rain", f"✗ {HOSTILE}"]  # seen are classes 1, 2 and 0


def test_sounds_are_mp3_of_at_most_ten_seconds(tmp_path):
    for seconds, wanted in ((1.5, 1.5), (13.0, 10.0)):
        stereo = np.random.default_rng(0).normal(0, 0.1, (round(44_100 * seconds), 2))
        soundfile.write(tmp_path / "a.wav", stereo, 44_100)
        uri = page.sound(tmp_path / "a.wav")["src"]
        assert uri.startswith("data:audio/mpeg;base64,") and len(uri) < 90_000
        info = soundfile.info(io.BytesIO(content(uri)))
        assert info.format == "MP3" and info.channels == 1
        assert wanted <= info.duration < wanted + 0.15  # the encoder rounds up to whole frames


def test_a_spectrogram_has_low_pitches_at_the_bottom(tmp_path):
    def loudest(pitch: float) -> int:
        uri = page.sound(make_sound(tmp_path / "a.wav", pitch))["spectrogram"]
        return int(np.asarray(Image.open(io.BytesIO(content(uri)))).mean(1).argmin())
    assert loudest(200) > loudest(1000) + 5 > loudest(5000) + 10
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    assert page.sound(tmp_path / "silent.wav")["spectrogram"].startswith("data:image/png;")


def test_small_pictures_keep_their_pixels_and_large_ones_shrink(tmp_path):
    def shown(side):
        path = make_picture(tmp_path / "a.png", 0, side)
        uri = page.picture(path)["src"]
        return np.asarray(Image.open(path)), Image.open(io.BytesIO(content(uri))), len(uri)
    true, small, _ = shown(64)
    assert small.format == "PNG" and np.array_equal(true, np.asarray(small))
    _, large, size = shown(512)
    assert large.format == "JPEG" and large.size == (page.PICTURE_SIDE, page.PICTURE_SIDE) and size < 20_000


def test_thirty_clips_of_ten_seconds_and_large_pictures_stay_small(evaluation, tmp_path):
    clip = evaluation["clips"][0]
    noise = np.random.default_rng(0).normal(0, 0.2, 480_000)
    soundfile.write(tmp_path / "long.wav", noise, 48_000)
    clip["audio"] = str(tmp_path / "long.wav")
    paths = [make_picture(tmp_path / f"large-{i}.png", i, 512) for i in range(4)]
    clip["real"], *rest = paths
    for kind, path in zip(SOUNDS, rest, strict=True):
        clip[kind]["picture"] = path
    [card] = [card for card in cards(evaluation) if "long.wav" in card]
    assert 30 * len(card) < 5_000_000


def test_the_same_evaluation_gives_the_same_file_whole_or_not_at_all(evaluation, tmp_path):
    path = tmp_path / "evaluation.html"
    write_evaluation(tmp_path / "evaluation", copy.deepcopy(evaluation))
    first = path.read_bytes()
    write_evaluation(tmp_path / "evaluation", evaluation)
    assert path.read_bytes() == first and first.endswith(b"</html>\n")
    del evaluation["git_commit"]
    with pytest.raises(UndefinedError):
        write_evaluation(tmp_path / "evaluation", evaluation)
    assert path.read_bytes() == first and not list(tmp_path.glob(".*"))
    evaluation["git_commit"] = ""
    with pytest.raises(RunFailed, match="cannot be written"):
        write_evaluation(tmp_path / "nowhere" / "evaluation", evaluation)


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it."""
    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        channels = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_contrast_in_light_and_in_dark():
    style = (Path(page.__file__).parent / "page.html.j2").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    themes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks]
    assert len(themes) == 2
    for theme in themes:
        for ink in ("ink", "soft", "right"):
            for paper in ("page", "card"):
                assert contrast(theme[ink], theme[paper]) >= 4.5, (ink, paper)
        assert contrast(theme["ink"], theme["warn"]) >= 4.5
        assert all(contrast(theme[line], theme["page"]) >= 3 for line in page.LINES)


# --- in a real browser --------------------------------------------------------------------------------------

# The page itself is shown unchanged, in a frame as wide as a phone; only what is around it has a script.
# Chromium dumps
# a document when it has loaded, and that waits for the frame `hold` until it is closed.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<pre id="found"></pre><iframe id="hold"></iframe>
<script>const hold = document.getElementById("hold").contentDocument.open();</script>
<iframe id="page" src="evaluation.html" style="width:%dpx;height:800px;border:0"></iframe><script>
const frame = document.getElementById("page");
frame.onload = () => look().catch(error => console.error(error)).then(() => hold.close());
async function look() {
  const page = frame.contentDocument, root = page.documentElement;
  const length = audio => new Promise(done => {
    audio.onloadedmetadata = () => done(audio.duration);
    audio.onerror = () => done("error: " + audio.error.message);
    audio.preload = "metadata";
    audio.load();
  });
  const images = [...page.images];
  const whole = image => {  // a picture that breaks off leaves its last pixels transparent
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return context.getImageData(canvas.width - 1, canvas.height - 1, 1, 1).data[3] == 255;
  };
  await Promise.allSettled(images.map(image => image.decode()));
  const found = {
    broken: images.filter(image => !image.naturalWidth || !whole(image)).map(image => image.alt),
    images: images.length,
    seconds: await Promise.all([...page.querySelectorAll("audio")].map(length)),
    width: frame.contentWindow.innerWidth, scrollWidth: root.scrollWidth,
    wide: [...page.body.querySelectorAll("*")]
      .filter(x => !x.closest(".scroll table, svg, details:not([open])"))
      .filter(x => x.getBoundingClientRect().right > frame.contentWindow.innerWidth + 0.5)
      .map(x => x.outerHTML.slice(0, 80)),
    svg: [...page.querySelectorAll("svg")].map(x => x.getBoundingClientRect().height),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(x => x.name.slice(0, 80)) };
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
}
</script></body>"""


def browse(path: Path, width: int) -> tuple[dict, list[str]]:
    """Open the page in a frame `width` pixels wide: (what the script found, the browser's console)."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed, so no page can be opened")
    frame = path.with_name("frame.html")
    frame.write_text(FRAME % width, encoding="utf-8")
    done = subprocess.run([browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                           "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
                           "--enable-logging=stderr", f"--user-data-dir={path.parent / 'profile'}",
                           "--window-size=1400,900", "--dump-dom", frame.as_uri()], capture_output=True,
                          text=True, timeout=300)
    found = re.search(r'<pre id="found">FOUND(.*?)END</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line
                                                 for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_everything_loads_and_nothing_sticks_out(evaluation, tmp_path, width):
    name = "gone_with_a_name_that_is_much_longer_than_a_picture_is_wide.png"
    evaluation["clips"][0]["silence"]["picture"] = name
    (tmp_path / "evaluation.html").write_text(page.render(evaluation), encoding="utf-8")
    found, console = browse(tmp_path / "evaluation.html", width)
    assert not found["broken"] and found["images"] == 5 * (1 + 4) + 3 + 5 * 3 - 1
    assert len(found["seconds"]) == 5
    assert all(SECONDS <= seconds < SECONDS + 0.15 for seconds in found["seconds"]), found["seconds"]
    assert found["width"] == width and found["scrollWidth"] <= width and not found["wide"]
    assert len(found["svg"]) == 6 and min(found["svg"]) > 150
    assert not [name for name in found["fetched"] if not name.startswith("data:")]
    assert not console
