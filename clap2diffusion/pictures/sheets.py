"""Pictures side by side, a sound as a picture, and PNG files. No torch is needed."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from clap2diffusion.base.files import write_atomic

CELL, GAP = 128, 4  # pixels


def png_bytes(image, settings: dict | None = None, optimize: bool = False) -> bytes:
    """A picture as a PNG file, with its settings, if any, as JSON in the text chunk `clap2diffusion`."""
    chunk, content = PngInfo(), io.BytesIO()
    if settings is not None:
        chunk.add_text("clap2diffusion", json.dumps(settings))
    image.save(content, format="PNG", pnginfo=chunk, optimize=optimize)
    return content.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """A file's content as an address that a page may show; kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_png(path: Path, image, settings: dict | None = None) -> None:
    """Write png_bytes() completely or not at all."""
    write_atomic(path, png_bytes(image, settings))


def tile(images: list, labels: list[str] | None = None, columns: int = 8, gap: int = GAP) -> Image.Image:
    """Pictures of one size in rows of `columns`, `gap` pixels apart, each with its label below it."""
    columns, below = min(columns, len(images)), 20 if labels else 0
    width, height = images[0].width + gap, images[0].height + gap + below
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, image in enumerate(images):
        x, y = i % columns * width, i // columns * height
        sheet.paste(image, (x, y))
        if labels:
            middle = x + image.width / 2, y + image.height + below / 2
            draw.text(middle, labels[i], fill="black", font=font, anchor="mm")
    return sheet


def contact_sheet(columns: list[list], names: list[str], row_names: list[str]) -> Image.Image:
    """Pictures by column and row in cells of one size, columns' names above, rows' names at the left."""
    cells = tile([image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
                  for row in zip(*columns, strict=True) for image in row], columns=len(columns))
    left, top, font = 104, 22, ImageFont.load_default(13)
    sheet = Image.new("RGB", (left + cells.width + GAP, top + cells.height + GAP), "white")
    sheet.paste(cells, (left, top))
    draw = ImageDraw.Draw(sheet)
    places = [(left + i * (CELL + GAP) + CELL / 2, top / 2, name[:20], "mm") for i, name in enumerate(names)]
    places += [(left - 8, top + j * (CELL + GAP) + CELL / 2, name, "rm") for j, name in enumerate(row_names)]
    for x, y, name, anchor in places:
        draw.text((x, y), name, fill="black", font=font, anchor=anchor)
    return sheet


def spectrogram(waveform: np.ndarray, sampling_rate: int) -> Image.Image:
    """A sound (samples,) in gray, 256 x 48: time to the right, pitch upwards, white to black over 70 dB.
    The rows go from 47 Hz to 12 kHz in equal ratios, whatever the sampling rate."""
    n_fft = round(sampling_rate * 1024 / 24_000)  # 43 ms, so a bin is 23.4 Hz wide
    padded = np.pad(waveform, n_fft // 2)
    starts = np.linspace(0, len(padded) - n_fft, 256).astype(int)
    frames = np.stack([padded[at:at + n_fft] for at in starts]) * np.hanning(n_fft)
    power = np.abs(np.fft.rfft(frames)) ** 2  # (256, bins)
    edges = np.geomspace(2, min(512, n_fft // 2), 49).astype(int)  # the bins of the rows, low to high
    rows = np.stack([power[:, low:max(high, low + 1)].mean(1) for low, high in zip(edges, edges[1:])])
    loud = 10 * np.log10(rows + 1e-12)  # (48, 256) in dB
    gray = 255 - np.clip((loud - loud.max() + 70) / 70, 0, 1) * 255
    return Image.fromarray(gray[::-1].astype(np.uint8))
