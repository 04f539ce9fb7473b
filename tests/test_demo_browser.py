"""The page of run_demo.sh in a real Chromium: each tab, the microphone, an error, a phone, dark mode.

One server and one browser for all of it. The microphone is a WAV file that Chromium plays (its fake capture).
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ENV, ROOT, ok, script
from PIL import Image

from tools.browser import TABS, Page, chromium, serve, what_lacks

pytestmark = pytest.mark.skipif(bool(what_lacks()), reason=what_lacks() or "-")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# a hook that no library takes away again: every address that the server's process asks for or connects to
WATCH = """import os, sys
def hear(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(repr(args[1:2] if event == "socket.connect" else args[:1]) + "\\n")
sys.addaudithook(hear)
"""
CONTRAST, OVER_THE_EDGE = (ROOT / f"tests/{name}.js" for name in ("contrast", "over_the_edge"))
NAME = "run ${1+1} <b>"  # to a careless page this is a program
OFFLINE = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, world) -> Path:
    """Sounds: two of the world, one after the other (long), ten minutes of silence and more, and a text that
    has a sound's name."""
    place = tmp_path_factory.mktemp("browser")
    first, second = (soundfile.read(world / f"audio/test-0000{number}.wav") for number in (1, 2))
    rate = first[1]
    both = np.concatenate([first[0], second[0]])
    for name, samples in (("first", first[0]), ("second", second[0]), ("long", both)):
        soundfile.write(place / f"{name}.wav", samples, rate, subtype="PCM_16")
    soundfile.write(place / "long-silence.wav", np.zeros(1000 * 601, np.int16), 1000)
    (place / "text.wav").write_text("no sound at all\n")
    (place / "sitecustomize.py").write_text(WATCH)
    return place


@pytest.fixture(scope="module")
def url(run, place):
    env = {key: value for key, value in ENV.items() if key not in OFFLINE}
    env |= {"WATCHED": str(place / "watched"), "PYTHONPATH": f"{place}:{ENV['PYTHONPATH']}"}
    (place / NAME).symlink_to(run)
    with serve(place / NAME, env=env, log=place / "stderr") as url:
        yield url


@pytest.fixture(scope="module")
def browser(place):
    with chromium(place / "first.wav") as browser:
        yield browser


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    """Every window that these tests opened."""
    return []


@pytest.fixture(scope="module")
def page(browser, url, pages) -> Page:
    pages.append(Page(browser, url))
    return pages[-1]


def shown(page: Page, address: str) -> Image.Image:
    """The picture at an address, as the browser gets it."""
    return Image.open(io.BytesIO(page.context.request.get(address).body())).convert("RGB")


def make(page: Page, tab: str, part: str, n: int = 1) -> list[str]:
    """Press the tab's button; the addresses of n new pictures in a part."""
    before = page.addresses(part)
    page.page.click(f"#{TABS[tab]}")
    return page.wait_for_pictures(part, n, other_than=before)


def test_names_are_shown_as_they_are(page):
    assert NAME in page.page.inner_text("#head")


def test_an_upload_gives_the_picture_that_generate_makes(page, run, place):
    page.upload("one-audio", place / "first.wav")
    page.set("one-seed", 3)
    page.set("one-prompt", "a scene by day")
    [address] = make(page, "One sound", "one-pictures")
    ok(script("generate.py", "--run", run, "--audio", place / "first.wav", "--seed", 3, "--prompt",
              "a scene by day", "--out", place / "out.png"))
    expected = Image.open(place / "out.png").convert("RGB")
    assert shown(page, address).tobytes() == expected.tobytes()
    assert page.addresses("one-spectrogram") and page.text("one-message") == ""
    assert "most like" in page.text("one-heard").lower()


def test_the_heat_map_is_a_switch_over_the_picture(page):
    """Nothing is drawn anew: the seed that says what is drawn has changed in between."""
    plain = page.addresses("one-pictures")
    page.set("one-seed", 4)
    page.page.locator("#one-map input").check()
    heat = page.wait_for_pictures("one-pictures", other_than=plain)
    page.page.locator("#one-map input").uncheck()
    again = page.wait_for_pictures("one-pictures", other_than=heat)
    first, under, last = (shown(page, address).tobytes() for [address] in (plain, heat, again))
    assert first == last != under


def test_an_example_and_stop(page):
    """An example is one click away; eight pictures of it are stopped after some."""
    page.page.locator("#one-examples button").first.click()
    page.page.wait_for_selector('#one-audio [data-testid="waveform-controls"]')
    page.set("one-count", 8)
    make(page, "One sound", "one-pictures")
    page.page.click("#one-stop")
    page.page.wait_for_function("() => document.querySelector('#one-message').innerText.includes('stopped')")
    page.page.wait_for_timeout(500)
    assert 1 <= len(page.addresses("one-pictures")) < 8
    page.set("one-count", 1)


def test_a_recording_gives_another_picture_and_several_are_several(page):
    """What the microphone hears is not the file bit for bit: it starts anywhere in it."""
    before = shown(page, page.addresses("one-pictures")[0])
    page.record("one-audio", 1.2)
    page.set("one-count", 2)
    addresses = make(page, "One sound", "one-pictures", 2)
    pictures = [shown(page, address).tobytes() for address in addresses]
    assert len(pictures) == 2 and len({*pictures, before.tobytes()}) == 3, page.text("one-message")
    page.set("one-count", 1)


@pytest.mark.parametrize("file, says", [("text.wav", "text.wav"), ("long-silence.wav", "expected at most")])
def test_an_error_is_the_sentence_on_the_page(file, says, page, place):
    """And it goes away once the input is right."""
    page.upload("one-audio", place / file)
    page.page.click("#one-go")
    page.page.wait_for_selector("#one-message:visible")
    said = page.text("one-message")
    assert says in said and "Traceback" not in said and len(said.splitlines()) == 1, said
    page.upload("one-audio", place / "second.wav")
    make(page, "One sound", "one-pictures")
    assert page.text("one-message") == ""


def test_two_sounds_are_mixed_and_led_over_into_each_other(page, place):
    page.open_tab("Two sounds")
    page.upload("two-first", place / "first.wav")
    page.upload("two-second", place / "second.wav")
    page.set("two-count", 3)
    [mix] = make(page, "Two sounds", "two-picture")
    strip = page.wait_for_pictures("two-strip", 3)
    assert len({shown(page, address).tobytes() for address in [mix, *strip]}) == 4, page.text("two-message")


def test_a_long_sound_is_a_board_that_plays(page, place):
    page.open_tab("Long sound")
    page.upload("long-audio", place / "long.wav")
    page.set("long-every", 2)
    pictures = make(page, "Long sound", "long-board", 3)  # windows of 4 s that begin at 0, 2 and 4 s
    assert len(set(pictures)) == 3 and page.text("long-message") == ""
    page.page.locator("#long-board button").nth(2).click()
    page.page.wait_for_function("() => document.querySelector('#long-board audio').currentTime >= 4")


def test_live_follows_the_microphone_and_says_its_pace(page):
    page.open_tab("Live")
    page.listen()
    first = page.wait_for_pictures("live-picture")
    second = page.wait_for_pictures("live-picture", other_than=first)
    third = page.wait_for_pictures("live-picture", other_than=first + second)
    assert len({shown(page, address).tobytes() for address in (*second, *third)}) == 2
    assert any(digit.isdigit() for digit in page.text("live-rate")), page.text("live-rate")
    page.page.click("#live-audio .stop-button:visible")
    assert page.text("live-message") == ""


def test_a_phone_shows_all_controls_without_scrolling_sideways(browser, url, pages):
    pages.append(Page(browser, url, **PHONE))
    for tab in TABS:
        pages[-1].open_tab(tab)
        wide = pages[-1].page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390 and not pages[-1].page.evaluate(OVER_THE_EDGE.read_text()), tab
    pages[-1].close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_stands_out_from_its_ground(scheme, browser, url, pages, place):
    """By the contrast that WCAG 2.2 asks for: 4.5, and 3 for large letters; of the error sentence too."""
    pages.append(Page(browser, url, color_scheme=scheme))
    page = pages[-1]
    ground = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) < 100) == (scheme == "dark"), ground
    page.page.click("#one-go")
    page.page.wait_for_selector("#one-message:visible")  # no sound was given
    for tab in TABS:
        page.open_tab(tab)
        assert not page.page.evaluate(CONTRAST.read_text()), tab
    page.close()


def test_the_program_of_the_docs(url, world, tmp_path):
    """As docs/demo.md has it, from a folder where the sounds lie as they do here."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/demo.md").read_text(), re.S)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/world").symlink_to(world)
    done = subprocess.run([sys.executable, "-c", code.replace("http://127.0.0.1:7860", url)], cwd=tmp_path,
                          env=ENV, capture_output=True, text=True)
    heard, *paths = ok(done).stdout.splitlines()
    assert heard.startswith("most like") and len(paths) == 4 and paths[2] == "" and paths[3].endswith("png 5")
    assert all(Image.open(path).size == (64, 64) for path in (paths[0], paths[1], paths[3].split()[0]))


def test_nothing_is_asked_of_another_machine_and_the_console_is_quiet(url, pages, place):
    """By the page in the browser, and by the server's process: a hook in Python hears of every connection."""
    assert len(pages) >= 4 and [page.foreign for page in pages] == [[]] * len(pages)
    said = {said for page in pages for said in page.complaints}
    assert said <= {"Waveform load error: MediaError"}  # of the text file, which has no waveform
    assert not pages[0].page.locator('[aria-label="Share"]').count()  # it would upload to Hugging Face
    asked = set((place / "watched").read_text().splitlines())
    assert asked and not [one for one in asked if "127.0.0.1" not in one and "'localhost'" not in one], asked
