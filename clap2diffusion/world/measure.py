"""Measure in a picture of the sound world what its sound set: size, height, marks and sky of the scene.

    measured = measure(image, "dog_barking")  # {"loudness": 0.52, "pitch": 0.31, "rate": 0.5, "density": 0.9}

Analysis by synthesis. The sky is the density whose background fits most pixels. The object is the template
(the world's own drawing at 1 to 5 marks and 20 widths) and the place that lower the squared error of that
background most; a correlation by FFT tries all places of a template at once. The class must be known.

Judging takes this module as its `world`: CLASSES, PROPERTIES, LOW_PITCH, HIGH_PITCH and measure."""

from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from clap2diffusion.world import sound_world

CLASSES, SIDE = sound_world.CLASSES, sound_world.IMAGE_SIZE
LOW_PITCH, HIGH_PITCH = sound_world.LOW_PITCH, sound_world.HIGH_PITCH
PROPERTIES = ("loudness", "pitch", "rate", "density")
LOW, HIGH = sound_world.SINGLE_WIDTHS
WIDTHS = np.linspace(LOW - 2, HIGH + 2, 20).tolist()
OUTLIER = 0.02  # squared colour distance, of [0, 1] channels, above which a pixel is not background
DENSITIES = np.linspace(0, 1, 101).tolist()
BACKGROUNDS = np.stack([sound_world.background(t, SIDE - 9) for t in DENSITIES]) / 255  # (101, 64, 3), by row


@cache
def _templates(label: str) -> tuple[np.ndarray, ...]:
    """A class's drawings with rim: count and width, conjugate spectra of the mask and of the masked colours
    (channel first), energy, reach."""
    templates = []
    for count, width in product(range(1, 6), WIDTHS):
        image, centre = Image.new("RGB", (SIDE, SIDE), sound_world.RIM), SIDE / 2
        covered = sound_world.paste(image, [(label, centre, centre, width, count)], np.random.default_rng(0))
        mask, colour = np.asarray(covered) / 255, np.asarray(image) / 255
        rows, columns = np.nonzero(mask > 0.5)
        cover, reach = mask[..., None], (rows.min(), rows.max(), columns.min(), columns.max())
        spectra = np.fft.rfft2(mask).conj(), np.fft.rfft2((cover * colour).transpose(2, 0, 1)).conj()
        templates.append(((count, width), *spectra, (cover * colour ** 2).sum(), reach))
    return tuple(map(np.array, zip(*templates)))


def measure(image: Image.Image, label: str) -> dict[str, float]:
    """The properties that a picture shows, on the manifest's scale, 0 to 1. A fit may lie a little beyond."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), float) / 255
    squares = (pixels ** 2).sum(-1)  # (64, 64)
    # (p - b)^2 as p^2 - 2 p b + b^2: one matrix product a row, for all densities
    saved = (BACKGROUNDS ** 2).sum(-1).T[:, :, None] - 2 * BACKGROUNDS.swapaxes(0, 1) @ pixels.swapaxes(1, 2)
    sky = int(np.minimum(squares[:, None] + saved, OUTLIER).mean((0, 2)).argmin())
    shapes, masks, colours, energies, reaches = _templates(label)
    saved = saved[:, sky]  # (64, 64), less what the object's own error holds too
    spectrum = np.fft.rfft2(saved) * masks
    for channel, of_pixels in enumerate(np.fft.rfft2(pixels.transpose(2, 0, 1))):
        spectrum += 2 * of_pixels * colours[:, channel]
    gain = np.fft.irfft2(spectrum, (SIDE, SIDE)) - energies[:, None, None]  # (templates, down, right)
    shift = np.fft.fftfreq(SIDE, 1 / SIDE)
    inside_y = (reaches[:, :1] + shift >= -1) & (reaches[:, 1:2] + shift <= SIDE)  # (templates, 64)
    inside_x = (reaches[:, 2:3] + shift >= -1) & (reaches[:, 3:] + shift <= SIDE)
    gain[~(inside_y[:, :, None] & inside_x[:, None, :])] = -np.inf
    best, down, _ = np.unravel_index(gain.argmax(), gain.shape)
    count, width = map(float, shapes[best])
    margin, y = width / 2 + 2, SIDE / 2 + shift[down]  # the margin of sound_world.place
    return {"loudness": (width - LOW) / (HIGH - LOW), "pitch": (SIDE - margin - y) / (SIDE - 2 * margin),
            "rate": (count - 0.5) / 5, "density": DENSITIES[sky]}
