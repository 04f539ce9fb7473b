"""Measure in a picture of the sound world what its sound set: size, height, marks and sky of the scene.

    measured = measure(image, "dog_barking")    # {"loudness": 0.52, "pitch": 0.31, "rate": 0.5, "density": 0.9}

Analysis by synthesis: the sky is the density whose background fits most pixels; the object is the template (the world's
own drawing at 1 to 5 marks and 20 widths) and place that lower the squared error of that background most. All places of a
template are tried at once, as a correlation by FFT. Only pictures of one known class are measured.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

import sound_world as world

PROPERTIES = (*world.SOURCE_PROPERTIES, "density")
WIDTHS = np.linspace(world.SINGLE_WIDTHS[0] - 2, world.SINGLE_WIDTHS[1] + 2, 20)
SIDE = world.IMAGE_SIZE
OUTLIER = 0.02  # squared colour distance, of [0, 1] channels, above which a pixel is no background


@cache
def _backgrounds() -> tuple[np.ndarray, np.ndarray]:
    """Densities (101,) and their backgrounds (101, 64, 3) by row, in [0, 1]."""
    densities = np.linspace(0, 1, 101)
    return densities, np.stack([world.background(float(t), SIDE - 9) for t in densities]) / 255


@cache
def _templates(label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The class's drawings, rim included, as (count, width) rows, spectra of mask and of masked colours, energy, reach."""
    shapes, masks, colours, energies, reaches = [], [], [], [], []
    for count in range(1, 6):
        for width in WIDTHS:
            picture, mask = world.draw_object(label, SIDE / 2, SIDE / 2, float(width), count)
            mask, colour = mask / 255, picture / 255
            rows, columns = np.nonzero(mask > 0.5)
            shapes.append((count, width))
            reaches.append((rows.min(), rows.max(), columns.min(), columns.max()))
            masks.append(np.fft.rfft2(mask))
            colours.append(np.fft.rfft2(mask[..., None] * colour, axes=(0, 1)))
            energies.append((mask[..., None] * colour ** 2).sum())
    return np.array(shapes), np.array(masks), np.array(colours), np.array(energies), np.array(reaches)


def fit(image: Image.Image, label: str) -> dict[str, float]:
    """The best object of class `label`: centre `x`, `y` and `width` in pixels, `count` of marks, `density` of the sky."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), float) / 255
    densities, backgrounds = _backgrounds()
    errors = ((pixels[None] - backgrounds[:, :, None]) ** 2).sum(-1)  # (101, 64, 64)
    sky = int(np.minimum(errors, OUTLIER).mean((1, 2)).argmin())
    shapes, masks, colours, energies, reaches = _templates(label)
    saved = errors[sky] - (pixels ** 2).sum(-1)  # error of the background, less the square that the object's shares
    spectrum = (np.fft.rfft2(saved)[None] * masks.conj()
                + 2 * (np.fft.rfft2(pixels, axes=(0, 1))[None] * colours.conj()).sum(-1))
    gain = np.fft.irfft2(spectrum, (SIDE, SIDE)) - energies[:, None, None]  # (templates, shift down, shift right)
    shift = np.fft.fftfreq(SIDE, 1 / SIDE)
    inside_y = (reaches[:, :1] + shift >= -1) & (reaches[:, 1:2] + shift <= SIDE)  # (templates, 64)
    inside_x = (reaches[:, 2:3] + shift >= -1) & (reaches[:, 3:] + shift <= SIDE)
    gain[~(inside_y[:, :, None] & inside_x[:, None, :])] = -np.inf
    best, down, right = np.unravel_index(gain.argmax(), gain.shape)
    count, width = shapes[best]
    return {"x": SIDE / 2 + shift[right], "y": SIDE / 2 + shift[down], "width": float(width), "count": int(count),
            "density": float(densities[sky])}


def measure(image: Image.Image, label: str) -> dict[str, float]:
    """The four properties that the picture shows, on the scale of the manifest's (0 to 1, fits may lie a little beyond)."""
    found = fit(image, label)
    low, high = world.SINGLE_WIDTHS
    margin = found["width"] / 2 + 2  # as sound_world.place has it
    return {"loudness": (found["width"] - low) / (high - low),
            "pitch": (SIDE - margin - found["y"]) / (SIDE - 2 * margin),
            "rate": (found["count"] - 0.5) / 5, "density": found["density"]}
