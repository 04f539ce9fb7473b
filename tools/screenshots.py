"""The pictures of docs/demo.md: the page's four tabs, and Live in a phone's window at night.

    python tools/screenshots.py                  # runs/tiny and sounds of data/world, into docs/
    python tools/screenshots.py --run runs/mine --sounds dog.wav rain.wav sea.wav siren.wav --out /tmp

Needs a trained run, a Chromium, and what requirements-demo.txt and requirements-browser.txt name."""

import argparse
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clap2diffusion.base.exits import UserError, run_main  # noqa: E402
from clap2diffusion.base.settings import new_parser  # noqa: E402

SOUNDS = [f"data/world/audio/test-{number:05}.wav" for number in (7, 1, 5, 2)]  # dog, sea, siren, fire
WIDE, PHONE = {"width": 1180, "height": 900}, {"width": 390, "height": 844}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--run", default="runs/tiny", help="run or stage folder, or an adapter file (default: runs/tiny)")
    add("--sounds", nargs="+", default=SOUNDS, metavar="FILE",
        help="two sounds or more; all of them, one after the other, are the long sound")
    add("--out", default="docs", help="folder of demo-tabs.png and demo-phone-dark.png (default: docs)")
    return parser


def join(paths: list[str], out: Path) -> Path:
    """Write a WAV file of these sounds, one after the other."""
    import numpy as np
    import soundfile
    sounds = [soundfile.read(path) for path in paths]
    soundfile.write(out, np.concatenate([samples for samples, _ in sounds]), sounds[0][1], subtype="PCM_16")
    return out


def shoot(page):
    """What a window shows, as a PIL picture of the whole page."""
    from PIL import Image
    page.page.mouse.move(0, 0)
    page.page.wait_for_timeout(700)  # what fades in or out
    return Image.open(io.BytesIO(page.page.screenshot(full_page=True))).convert("RGB")


def show_tabs(browser, url: str, sounds: list[str], long: Path) -> list:
    """A picture of each of the four tabs in use."""
    from tools.browser import Page
    page, pictures = Page(browser, url, viewport=WIDE, color_scheme="light"), []
    page.upload("one-audio", sounds[0])
    page.set("one-count", 4)
    page.page.click("#one-go")
    page.wait_for_pictures("one-pictures", 4)
    pictures.append(shoot(page))
    page.open_tab("Two sounds")
    page.upload("two-first", sounds[0])
    page.upload("two-second", sounds[1])
    page.page.click("#two-go")
    page.wait_for_pictures("two-strip", 5)
    pictures.append(shoot(page))
    page.open_tab("Long sound")
    page.upload("long-audio", long)
    page.page.click("#long-go")
    n = 0
    while n != len(page.addresses("long-board")) or not n:  # one after the other
        n = len(page.addresses("long-board"))
        page.page.wait_for_timeout(4000)
    pictures.append(shoot(page))
    page.open_tab("Live")
    listen(page)
    pictures.append(shoot(page))
    page.close()
    return pictures


def listen(page) -> None:
    """Press Record in Live and wait until its pictures follow the sound."""
    page.listen()
    first = page.wait_for_pictures("live-picture")
    page.wait_for_pictures("live-picture", other_than=first)
    page.page.wait_for_timeout(3000)


def side_by_side(pictures: list, columns: int = 2, gap: int = 12):
    """Pictures as a table, each as wide as the others, none cut."""
    from PIL import Image
    width = max(picture.width for picture in pictures)
    rows = [pictures[at:at + columns] for at in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), "#8a8f98")
    y = gap
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), y))
        y += height + gap
    return sheet


def save(picture, path: Path) -> None:
    """A PNG of 128 colours: a quarter of the bytes, and the eye sees no difference."""
    picture.quantize(128, dither=0).save(path, optimize=True)
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KB)")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from tools.browser import Page, chromium, serve, what_lacks
    lack = what_lacks()
    if lack:
        raise UserError(lack)
    for path in args.sounds:
        if not Path(path).is_file():
            raise UserError(f"--sounds {path}: is not a file; expected a sound file")
    if len(args.sounds) < 2:
        raise UserError("--sounds: got one file, expected two or more; the page mixes the first two")
    with tempfile.TemporaryDirectory() as place:
        long = join(args.sounds, Path(place) / "long.wav")
        microphone = join(args.sounds[:1], Path(place) / "microphone.wav")
        with serve(args.run) as url, chromium(microphone) as browser:
            tabs = show_tabs(browser, url, args.sounds, long)
            phone = Page(browser, url, tab="Live", viewport=PHONE, color_scheme="dark", has_touch=True,
                         is_mobile=True, device_scale_factor=2)
            listen(phone)
            save(shoot(phone), Path(args.out) / "demo-phone-dark.png")
            phone.close()
        save(side_by_side(tabs), Path(args.out) / "demo-tabs.png")


if __name__ == "__main__":
    run_main(main)
