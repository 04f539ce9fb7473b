"""The page of run_demo.sh in a Chromium that Playwright drives, for screenshots.py and the tests."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABS = {"One sound": "one-go", "Two sounds": "two-go", "Long sound": "long-go", "Live": "live-picture"}
LOCAL = re.compile(r"^(http://127\.0\.0\.1:\d+/|data:|blob:)")


def find_chromium() -> str:
    """The path of a Chromium or Chrome that is installed, or ''."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def what_lacks() -> str:
    """What this machine lacks to show the page in a browser, and what brings it; '' if nothing."""
    for module, file in (("gradio", "demo"), ("playwright", "browser")):
        if not find_spec(module):
            return f"{module} is not installed: pip install -r requirements-{file}.txt"
    return "" if find_chromium() else "no Chromium is installed: sudo apt-get install -y chromium"


@contextlib.contextmanager
def serve(run: Path, *flags, env: dict[str, str] | None = None, log: Path | None = None):
    """Start the page for this run on a free port; gives its address once it answers. Ends it afterwards as
    Ctrl-c does. log: a file for all that it says. Raises RuntimeError: it ended first, or with another code
    than that of Ctrl-c."""
    with tempfile.TemporaryDirectory() as place:
        log = log or Path(place, "log")
        command = [sys.executable, "-m", "clap2diffusion.demo", "--run", str(run), *map(str, flags)]
        with log.open("w", encoding="utf-8") as said:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            while not (found := re.search(r"^open (http\S+) ", log.read_text("utf-8"), re.MULTILINE)):
                if process.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                yield found[1]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            code = process.wait(60)
        if code != 128 + signal.SIGINT:
            raise RuntimeError(f"the page ended (exit code {code}): {log.read_text('utf-8')[-2000:]}")


@contextlib.contextmanager
def chromium(microphone: Path):
    """A Chromium without a window, whose microphone is a WAV file that plays over and over."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=[
            "--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}"])
        yield browser
        browser.close()


class Page:
    """The page in a window of its own, as a user works it. Parts are named by their elem_id."""

    def __init__(self, browser, url: str, tab: str = "One sound", **window):
        """window: of Playwright's Browser.new_context, such as viewport and color_scheme. What the page asks
        of other machines is in `foreign` and gets no answer; errors of its console are in `complaints`."""
        self.foreign, self.complaints = [], []
        self.context = browser.new_context(permissions=["microphone"], **window)
        self.context.set_default_timeout(60_000)
        self.context.route(lambda address: not LOCAL.match(address), self._refuse)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#one-go")
        self.open_tab(tab)

    def _refuse(self, route) -> None:
        self.foreign.append(route.request.url)
        route.abort()

    def close(self) -> None:
        self.context.close()

    def open_tab(self, tab: str) -> None:
        """tab: the words on it. In a narrow window some tabs are behind the button with three dots."""
        button = self.page.get_by_role("tab", name=tab, exact=True)
        if not button.first.is_visible():
            self.page.locator(".overflow-menu > button").click()
            button = self.page.locator(".overflow-dropdown button", has_text=tab)
        button.first.click()
        self.page.wait_for_selector(f"#{TABS[tab]}")

    def _empty(self, part: str, source: str) -> None:
        """Take away what an audio part holds, and turn it to "Upload file" or "Record audio"."""
        for name in ("Clear", source):
            button = self.page.locator(f'#{part} [aria-label="{name}"]:visible')
            if button.count():
                button.click()

    def upload(self, part: str, path: Path) -> None:
        """Give an audio part a file in place of what it has."""
        self._empty(part, "Upload file")
        self.page.set_input_files(f"#{part} input[type=file]", str(path))
        self.page.wait_for_selector(f'#{part} [data-testid="waveform-controls"]', state="attached")

    def record(self, part: str, seconds: float) -> None:
        """Speak into an audio part that also takes files."""
        self._empty(part, "Record audio")
        self.page.click(f"#{part} .record-button:visible")
        self.page.wait_for_timeout(1000 * seconds)
        self.page.click(f"#{part} .stop-button:visible")
        self.page.wait_for_selector(f'#{part} [data-testid="waveform-controls"]', state="attached")

    def listen(self) -> None:
        """Press Record in Live, once Gradio's recorder is loaded: it is two workers and a moment."""
        while not self.page.workers:
            self.page.wait_for_timeout(100)
        self.page.wait_for_timeout(500)
        self.page.click("#live-audio .record-button:visible")

    def set(self, part: str, value) -> None:
        """Write into a text, number or slider part."""
        field = self.page.locator(f"#{part} textarea, #{part} input:not([type=range])").first
        field.fill(str(value))
        field.press("Tab")

    def addresses(self, part: str) -> list[str]:
        """Where the pictures that a part shows come from."""
        return self.page.locator(f"#{part} img").evaluate_all("all => all.map(img => img.src)")

    def wait_for_pictures(self, part: str, n: int = 1, other_than: list[str] = (),
                          seconds: float = 120) -> list[str]:
        """Wait until a part shows n pictures, and none of those it showed before. Returns their addresses."""
        deadline = time.monotonic() + seconds
        while len(now := self.addresses(part)) != n or set(now) & set(other_than):
            if time.monotonic() > deadline:
                said = self.page.inner_text("body")[:2000]
                raise TimeoutError(f"{len(now)} pictures in {part}, expected {n}; the page says: {said}")
            self.page.wait_for_timeout(30)
        return now

    def text(self, part: str) -> str:
        """What a part says; '' if it is hidden."""
        place = self.page.locator(f"#{part}")
        return place.inner_text().strip() if place.count() and place.is_visible() else ""
