"""The sound world: ten sounds and the scenes that belong to them, drawn from one random state per example.

    state = draw_state(rng)                 # what is heard and seen: labels and continuous properties
    waveform = synthesise(state)            # (192000,) float32 at 48 kHz, 4 s
    image = draw_scene(state)               # 64 x 64 RGB
    text = caption(state, rng)              # English or Korean, in varying detail

Four properties run through both sides; each is uniform in [0, 1]:

| property           | in the sound                                       | in the picture                          |
|--------------------|----------------------------------------------------|-----------------------------------------|
| loudness, a source | level of the source, 24 dB from 0 to 1             | size of the object                      |
| pitch, a source    | fundamental or centre frequency, 2 octaves         | height of the object (high sounds high) |
| rate, a source     | events a second (strikes, barks, crests, drops...) | count of the object's marks, 1 to 5     |
| density, a scene   | level of a steady bed of noise under everything    | sky, from clear pale day to deep dusk   |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SAMPLING_RATE = 48000  # Hz
DURATION_S = 4.0
IMAGE_SIZE = 64  # pixels
CLASSES = ("thunder", "ocean_waves", "fire", "applause", "siren", "helicopter", "dog_barking", "rain",
           "glass_breaking", "engine")
# Nine of the 45 pairs that no training or validation clip holds: every class but the last is in about two of them.
UNHEARD_PAIRS = tuple((CLASSES[i], CLASSES[(i + 3) % 10]) for i in range(9))
SOURCE_PROPERTIES = ("loudness", "pitch", "rate")
LOW_PITCH, HIGH_PITCH = 0.4, 0.6  # of two sounds in the data one is at most low, the other at least high
PAIR_LOUDNESS = 0.3  # two sources differ by 7 dB at most: what lies far below another sound nobody hears


@dataclass(frozen=True)
class Source:
    """One thing that sounds and is drawn. Properties are in [0, 1]; `x` is its place from left to right."""
    label: str
    loudness: float
    pitch: float
    rate: float
    x: float

    @property
    def count(self) -> int:
        """Number of marks drawn with the object, 1 to 5, from `rate`."""
        return min(5, 1 + int(self.rate * 5))


@dataclass(frozen=True)
class State:
    """Everything that one example shows and sounds: one or two sources, left to right, and the scene's density.

    `seed` is for the details that carry no meaning (the jitter of drops, the noise of a wave).
    """
    sources: tuple[Source, ...]
    density: float
    seed: int

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(source.label for source in self.sources)


def draw_state(rng: np.random.Generator, labels: tuple[str, ...] | None = None, pairs: float = 0.2,
               allow_unheard: bool = False) -> State:
    """Draw one example's state. With `labels` these sources are used; otherwise a share `pairs` holds two sounds."""
    if labels is None:
        if rng.random() < pairs:
            while True:
                labels = tuple(str(label) for label in rng.choice(CLASSES, 2, replace=False))
                if allow_unheard or not is_unheard(labels):
                    break
        else:
            labels = (str(rng.choice(CLASSES)),)
    while True:
        sources = tuple(Source(label, *(float(v) for v in rng.random(4))) for label in labels)
        if abs(sources[0].loudness - sources[-1].loudness) <= PAIR_LOUDNESS:
            break
    return State(sources, float(rng.random()), int(rng.integers(2 ** 31)))


def low_and_high(state: State) -> State:
    """A state as the data hold it: of a pair, what stands left is low (pitch 0 to LOW_PITCH), what stands right is high
    (HIGH_PITCH to 1).

    One microphone does not tell left from right. So the place of each of two things is something that is heard in itself,
    whatever sounds beside it: what an adapter learned of one pair holds for a pair that it never heard.
    """
    if len(state.sources) == 1:
        return state
    left, right = state.sources
    return replace(state, sources=(replace(left, pitch=LOW_PITCH * left.pitch),
                                   replace(right, pitch=HIGH_PITCH + (1 - HIGH_PITCH) * right.pitch)))


def is_unheard(labels: tuple[str, ...]) -> bool:
    return any(set(labels) == set(pair) for pair in UNHEARD_PAIRS)


# The picture.
# An object is drawn in its own box: x to the right and y downwards, both from -1 to 1, marks included.
# It is pasted like a sticker with a pale rim, so it stands out by day and at dusk alike.

SUPERSAMPLING = 4
SINGLE_WIDTHS = (26.0, 46.0)  # pixels, at loudness 0 and 1
PAIR_WIDTHS = (20.0, 30.0)
MARK_WIDTH = 3.0  # pixels: no stroke of a mark is thinner, so that it survives an 8 x 8 latent
RIM = (250, 248, 240)
SKY_DAY, SKY_DUSK = ((150, 204, 246), (226, 242, 252)), ((20, 18, 52), (84, 52, 98))  # top and bottom
GROUND_DAY, GROUND_DUSK = (190, 184, 164), (58, 54, 66)


class Pen:
    """Draws in the box of one object; lengths are in half box widths."""

    def __init__(self, layer: Image.Image, x: float, y: float, width: float):
        """Box centre `x`, `y` and its `width` in pixels of the final picture."""
        self.draw = ImageDraw.Draw(layer)
        self.x, self.y, self.scale = x * SUPERSAMPLING, y * SUPERSAMPLING, width * SUPERSAMPLING / 2
        self.mark = MARK_WIDTH * SUPERSAMPLING / self.scale  # the thinnest mark, in half box widths

    def at(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(self.x + self.scale * px, self.y + self.scale * py) for px, py in points]

    def polygon(self, fill, *points) -> None:
        self.draw.polygon(self.at(points), fill=fill)

    def ellipse(self, fill, x: float, y: float, rx: float, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.draw.ellipse(sum(self.at([(x - rx, y - ry), (x + rx, y + ry)]), ()), fill=fill)

    def pie(self, fill, x: float, y: float, rx: float, ry: float, start: float, end: float) -> None:
        """A slice of an ellipse; degrees clockwise from three o'clock."""
        self.draw.pieslice(sum(self.at([(x - rx, y - ry), (x + rx, y + ry)]), ()), start, end, fill=fill)

    def stroke(self, fill, width: float, *points) -> None:
        """A line with round ends and joints."""
        self.draw.line(self.at(points), fill=fill, width=max(1, round(width * self.scale)), joint="curve")
        for px, py in (points[0], points[-1]):
            self.ellipse(fill, px, py, width / 2)

    def fan(self, fill, x: float, y: float, angles, inner: float, outer: float, width: float) -> None:
        """Rays around a point; degrees clockwise from three o'clock."""
        for angle in np.radians(angles):
            c, s = float(np.cos(angle)), float(np.sin(angle))
            self.stroke(fill, width, (x + inner * c, y + inner * s), (x + outer * c, y + outer * s))


def _spread(count: int, low: float, high: float) -> np.ndarray:
    """`count` evenly spaced places around the middle of `low` to `high`; five of them reach both ends."""
    reach = (high - low) / 2 * (count + 1) / 6 if count > 1 else 0.0
    return (low + high) / 2 + np.linspace(-reach, reach, count)


def _draw_thunder(pen: Pen, count: int, rng: np.random.Generator) -> None:
    for x in _spread(count, -0.78, 0.78):
        x, w, end = float(x), max(0.16, 0.5 * pen.mark), 1 - 0.12 * float(rng.random())
        pen.polygon((255, 196, 0), (x - 0.4 * w, -0.3), (x + w, -0.3), (x + 0.5 * w, 0.22),
                    (x + 1.1 * w, 0.22), (x - 0.7 * w, end), (x - 0.3 * w, 0.48), (x - 1.1 * w, 0.48))
    dark, light = (54, 56, 84), (92, 94, 128)
    for x, y, r in ((-0.6, -0.4, 0.38), (0.6, -0.4, 0.38), (-0.15, -0.58, 0.42), (0.3, -0.5, 0.4)):
        pen.ellipse(dark, x, y, r)
    pen.stroke(dark, 0.4, (-0.72, -0.2), (0.72, -0.2))
    pen.stroke(light, 0.16, (-0.42, -0.66), (-0.2, -0.82), (0.06, -0.76))


def _draw_ocean_waves(pen: Pen, count: int, rng: np.random.Generator) -> None:
    deep, blue, foam = (8, 62, 150), (24, 116, 214), (236, 248, 255)
    step, base = 2 / count, 0.3
    height = (1.25, 1.1, 0.95, 0.85, 0.8)[count - 1]
    pen.polygon(blue, (-1, base - 0.05), (1, base - 0.05), (0.94, 1), (-0.94, 1))
    for i in range(count):
        def crest(points, left=-1 + i * step):
            return [(left + step * px, base - height * py) for px, py in points]
        back = ((0, 0), (0.2, 0.22), (0.34, 0.6), (0.5, 0.9), (0.66, 1.0), (0.86, 0.88), (0.97, 0.6))
        pen.polygon(blue, *crest(back + ((0.78, 0.66), (0.66, 0.5), (0.68, 0.25), (0.84, 0.08), (1, 0))))
        pen.stroke(foam, max(0.28 - 0.04 * count, 0.6 * pen.mark),
                   *crest(((0.4, 0.72), (0.52, 0.88), (0.68, 0.93), (0.84, 0.8), (0.92, 0.62))))
    y = 0.6 + 0.06 * float(rng.random())
    swell = [(x, y + 0.07 * np.sin(9 * x)) for x in np.linspace(-0.97, 0.97, 25)]
    pen.polygon(deep, *swell, (0.94, 1), (-0.94, 1))


def _draw_fire(pen: Pen, count: int, rng: np.random.Generator) -> None:
    half = (0.62, 0.46, 0.36, 0.3, 0.26)[count - 1]
    tongue = ((0, -1), (0.35, -0.55), (0.85, -0.1), (1, 0.4), (0.7, 0.85), (0, 1), (-0.7, 0.85), (-1, 0.4),
              (-0.8, -0.05), (-0.3, -0.45))
    places = _spread(count, -0.72, 0.72)
    tops = [-1 + 0.55 * abs(float(x)) + 0.12 * float(rng.random()) for x in places]
    outer, middle, inner = (232, 60, 12), (255, 150, 10), (255, 228, 70)
    for colour, wide, tall in ((outer, 1.0, 1.0), (middle, 0.62, 0.72), (inner, 0.34, 0.4)):
        for x, top in zip(places, tops):
            h = (0.75 - top) / 2 * tall
            pen.polygon(colour, *((x + wide * half * px, 0.75 - h + h * py) for px, py in tongue))
    pen.stroke((74, 38, 18), 0.26, (-0.82, 0.58), (0.82, 0.86))
    pen.stroke((112, 62, 30), 0.26, (-0.82, 0.86), (0.82, 0.58))


def _draw_applause(pen: Pen, count: int, rng: np.random.Generator) -> None:
    def hand(side: int, skin, shade, sleeve) -> None:
        c, s = float(np.cos(0.42)), float(np.sin(0.42))

        def turn(*points):  # leaning inwards; `side` mirrors
            return [(side * (0.5 + c * px + s * py), 0.34 - s * px + c * py) for px, py in points]
        for i, tip in enumerate((-0.7, -0.74, -0.66, -0.5)):
            pen.stroke((skin, shade)[i % 2], 0.19, *turn((-0.24 + 0.16 * i, -0.1), (-0.25 + 0.18 * i, tip)))
        pen.stroke(skin, 0.2, *turn((0.2, 0.1), (0.46, -0.16)))  # thumb, outside
        pen.polygon(skin, *turn((-0.33, -0.2), (0.34, -0.2), (0.3, 0.36), (-0.24, 0.36), (-0.33, 0.2)))
        pen.polygon(sleeve, *turn((-0.32, 0.32), (0.28, 0.32), (0.32, 0.68), (-0.36, 0.68)))
    hand(-1, (255, 196, 140), (222, 140, 88), (214, 40, 60))
    hand(1, (255, 196, 140), (222, 140, 88), (30, 120, 120))
    pen.fan((240, 90, 20), 0, 0.15, -90 + _spread(count, -66, 66), 0.88, 1.06, max(0.22, 1.3 * pen.mark))


def _draw_siren(pen: Pen, count: int, rng: np.random.Generator) -> None:
    pen.fan((255, 150, 0), 0, 0.28, -90 + _spread(count, -74, 74), 0.8, 1.02, max(0.24, 1.3 * pen.mark))
    pen.pie((226, 16, 40), 0, 0.4, 0.56, 0.76, 180, 360)
    pen.polygon((226, 16, 40), (-0.56, 0.38), (0.56, 0.38), (0.56, 0.6), (-0.56, 0.6))
    pen.stroke((255, 150, 160), 0.16, (-0.32, 0.32), (-0.28, 0.06), (-0.14, -0.1))
    pen.polygon((28, 44, 120), (-0.8, 0.56), (0.8, 0.56), (0.92, 1), (-0.92, 1))


def _draw_helicopter(pen: Pen, count: int, rng: np.random.Generator) -> None:
    green, dark, glass = (28, 130, 66), (30, 44, 40), (180, 232, 246)
    pen.stroke(dark, 0.15, (-0.6, -0.85), (0.92, -0.85))
    pen.stroke(dark, 0.14, (0.2, -0.85), (0.2, -0.5))
    pen.polygon(green, (-0.95, -0.34), (0.1, -0.38), (0.1, 0.0), (-0.9, -0.16))
    pen.stroke(dark, 0.13, (-0.92, -0.55), (-0.88, 0.02))
    pen.ellipse(green, 0.28, -0.12, 0.62, 0.46)
    pen.pie(glass, 0.36, -0.1, 0.46, 0.34, -90, 12)
    pen.stroke(dark, 0.12, (0.05, 0.28), (0.0, 0.5))
    pen.stroke(dark, 0.12, (0.5, 0.28), (0.55, 0.5))
    pen.stroke(dark, 0.13, (-0.3, 0.52), (0.8, 0.52), (0.92, 0.4))
    for x in _spread(count, -0.85, 0.85):
        slant = 0.06 * float(rng.random())
        pen.stroke((20, 90, 220), max(0.22, 1.2 * pen.mark), (float(x), 0.78), (float(x) - slant, 0.9))


def _draw_dog_barking(pen: Pen, count: int, rng: np.random.Generator) -> None:
    brown, dark, pale = (164, 96, 40), (88, 46, 18), (226, 170, 108)
    pen.polygon(brown, (-0.95, 1), (-0.8, 0.1), (-0.1, 0.2), (0.05, 1))
    pen.polygon((214, 30, 40), (-0.92, 0.62), (-0.02, 0.5), (0.02, 0.74), (-0.96, 0.88))
    pen.ellipse(brown, -0.42, -0.28, 0.5, 0.5)
    pen.polygon((190, 30, 50), (-0.1, -0.05), (0.36, -0.1), (0.2, 0.4), (-0.2, 0.3))
    pen.stroke(pale, 0.22, (-0.25, 0.3), (0.2, 0.44))
    pen.polygon(pale, (-0.3, -0.5), (0.0, -0.44), (0.3, -0.42), (0.4, -0.22), (0.32, -0.04), (-0.2, 0.02))
    pen.ellipse((20, 16, 16), 0.3, -0.36, 0.15, 0.13)
    pen.ellipse((20, 16, 16), -0.2, -0.46, 0.09)
    pen.polygon(dark, (-0.5, -0.78), (-0.74, -0.72), (-1.0, -0.2), (-0.94, 0.22), (-0.72, 0.26), (-0.5, -0.1))
    pen.fan((236, 80, 20), -0.1, 0.08, _spread(count, -66, 66), 0.84, 1.0, max(0.22, 1.3 * pen.mark))


def _draw_rain(pen: Pen, count: int, rng: np.random.Generator) -> None:
    pink, light, blue = (206, 30, 130), (246, 110, 180), (20, 110, 230)
    for x in _spread(count, -0.8, 0.8):
        x, y, r = float(x), -0.66 + 0.04 * float(rng.uniform(-1, 1)), max(0.19, 0.66 * pen.mark)
        pen.ellipse(blue, x, y, r)
        pen.polygon(blue, (x - 0.92 * r, y - 0.4 * r), (x, y - 2.1 * r), (x + 0.92 * r, y - 0.4 * r))
    pen.stroke((70, 40, 40), 0.14, (0, 0.2), (0, 0.8), (0.08, 0.9), (0.22, 0.9), (0.3, 0.78))
    pen.pie(pink, 0, 0.42, 1.0, 0.78, 180, 360)
    pen.pie(light, 0, 0.42, 0.4, 0.78, 180, 360)


def _draw_glass_breaking(pen: Pen, count: int, rng: np.random.Generator) -> None:
    edge, fill = (0, 112, 124), (150, 238, 232)
    for x in _spread(count, -0.8, 0.8):
        y, r, turn = -0.76 + 0.2 * x * x, max(0.25, 0.85 * pen.mark), rng.uniform(-0.3, 0.3)
        pen.polygon(edge, *((x + r * np.sin(a + turn), y - r * np.cos(a + turn)) for a in (0, 2.2, 4.0)))
    bowl = ((-0.68, -0.3), (-0.44, -0.02), (-0.2, -0.36), (0.08, 0.02), (0.34, -0.38), (0.66, -0.16),
            (0.56, 0.22), (0.24, 0.5), (-0.24, 0.5), (-0.58, 0.22))
    pen.polygon(fill, *bowl)
    pen.stroke(edge, 0.14, *bowl, bowl[0])
    pen.stroke(edge, 0.12, (0.08, 0.02), (-0.04, 0.18), (0.1, 0.34))
    pen.stroke(edge, 0.18, (0, 0.52), (0, 0.88))
    pen.stroke(edge, 0.18, (-0.46, 0.91), (0.46, 0.91))


def _draw_engine(pen: Pen, count: int, rng: np.random.Generator) -> None:
    body, dark, glass = (246, 196, 20), (34, 34, 40), (70, 120, 166)
    trail = ((-0.8, 0.24), (-0.78, -0.2), (-0.56, -0.58), (-0.14, -0.78), (0.3, -0.78))
    for x, y in trail[:count]:
        pen.ellipse((70, 66, 80), x, y + 0.03 * float(rng.uniform(-1, 1)), max(0.2, 0.7 * pen.mark))
    pen.polygon(body, (-0.4, 0.3), (-0.2, -0.22), (0.46, -0.22), (0.74, 0.3))
    pen.polygon(glass, (-0.22, 0.22), (-0.1, -0.08), (0.08, -0.08), (0.08, 0.22))
    pen.polygon(glass, (0.22, 0.22), (0.22, -0.08), (0.4, -0.08), (0.56, 0.22))
    pen.polygon(body, (-0.56, 0.28), (0.8, 0.28), (1, 0.42), (1, 0.7), (-0.56, 0.7))
    for x in (-0.18, 0.62):
        pen.ellipse(dark, x, 0.72, 0.27)
        pen.ellipse((200, 200, 204), x, 0.72, 0.11)


_DRAW = dict(thunder=_draw_thunder, ocean_waves=_draw_ocean_waves, fire=_draw_fire, applause=_draw_applause,
             siren=_draw_siren, helicopter=_draw_helicopter, dog_barking=_draw_dog_barking, rain=_draw_rain,
             glass_breaking=_draw_glass_breaking, engine=_draw_engine)


def _mix(a, b, t: float) -> np.ndarray:
    return np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t


def place(state: State, index: int) -> tuple[float, float, float]:
    """Box of a source's object: centre x, centre y and width in pixels."""
    source = state.sources[index]
    alone = len(state.sources) == 1
    low, high = SINGLE_WIDTHS if alone else PAIR_WIDTHS
    width = low + (high - low) * source.loudness
    x = 32 + 8 * (source.x - 0.5) if alone else (16.5, 47.5)[index] + (31 - width) * 0.5 * (source.x - 0.5)
    margin = width / 2 + 2
    return x, (IMAGE_SIZE - margin) + (2 * margin - IMAGE_SIZE) * source.pitch, width


def background(density: float, horizon: int) -> np.ndarray:
    """Sky and ground by row, (64, 3) in [0, 255]; the ground begins at row `horizon`."""
    column = _mix(*_mix(SKY_DAY, SKY_DUSK, density), np.linspace(0, 1, IMAGE_SIZE)[:, None])
    column[horizon:] = _mix(GROUND_DAY, GROUND_DUSK, density)
    return column


def draw_object(label: str, x: float, y: float, width: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One object alone with its rim: colours (64, 64, 3) and mask (64, 64), both in [0, 255]."""
    layer = Image.new("RGBA", (IMAGE_SIZE * SUPERSAMPLING,) * 2)
    _DRAW[label](Pen(layer, x, y, width), count, np.random.default_rng(0))
    return _sticker(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), RIM), layer)


def _sticker(image: Image.Image, layer: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Paste the supersampled objects with their rim; the picture (64, 64, 3) and where it was covered (64, 64)."""
    objects = layer.reduce(SUPERSAMPLING)
    covered = objects.getchannel("A").filter(ImageFilter.MaxFilter(3))
    image.paste(RIM, mask=covered)
    image.paste(objects, mask=objects)
    return np.asarray(image), np.asarray(covered)


def draw_scene(state: State) -> Image.Image:
    """Draw the state as a 64 x 64 RGB picture. The same state gives the same bytes."""
    rng = np.random.default_rng(state.seed)
    column = background(state.density, IMAGE_SIZE - 9 + int(rng.integers(-1, 2)))
    image = Image.fromarray(np.repeat(column[:, None], IMAGE_SIZE, 1).round().astype(np.uint8))
    layer = Image.new("RGBA", (IMAGE_SIZE * SUPERSAMPLING,) * 2)
    for index, source in enumerate(state.sources):
        _DRAW[source.label](Pen(layer, *place(state, index)), source.count, rng)
    return Image.fromarray(_sticker(image, layer)[0])


# The words.
# One caption belongs to the picture and the sound of an example; its words name levels of the properties.

NAMES = {  # the first is the canonical one
    "en": {
        "thunder": ("thunder", "a thunderstorm", "a storm cloud with lightning", "rolling thunder"),
        "ocean_waves": ("ocean waves", "sea waves", "breaking waves", "ocean surf"),
        "fire": ("a fire burning", "a campfire", "a crackling fire", "flames on logs"),
        "applause": ("applause", "clapping hands", "people clapping", "hands applauding"),
        "siren": ("a siren", "a police siren", "an emergency beacon", "a wailing siren"),
        "helicopter": ("a helicopter", "a chopper", "a flying helicopter", "a helicopter hovering"),
        "dog_barking": ("a dog barking", "a barking dog", "a brown dog barking", "a dog"),
        "rain": ("rain falling", "rain on an umbrella", "falling rain", "raindrops"),
        "glass_breaking": ("glass breaking", "a breaking glass", "shattering glass", "a broken wine glass"),
        "engine": ("a car engine", "a yellow car", "a car with its engine running", "a running engine")},
    "ko": {
        "thunder": ("천둥", "번개 구름", "천둥 번개", "뇌우"),
        "ocean_waves": ("파도", "바다 파도", "출렁이는 파도", "바다 물결"),
        "fire": ("모닥불", "타오르는 불", "장작불", "불꽃"),
        "applause": ("박수", "박수갈채", "박수 치는 손", "박수 소리"),
        "siren": ("사이렌", "경찰 사이렌", "경광등", "울리는 사이렌"),
        "helicopter": ("헬리콥터", "헬기", "날아가는 헬리콥터", "떠 있는 헬기"),
        "dog_barking": ("짖는 개", "강아지", "짖는 강아지", "멍멍 짖는 개"),
        "rain": ("비", "내리는 비", "우산과 비", "빗방울"),
        "glass_breaking": ("깨지는 유리", "깨진 유리잔", "깨지는 유리잔", "부서지는 유리"),
        "engine": ("자동차 엔진", "노란 자동차", "시동 걸린 자동차", "엔진 소리")}}
MARKS = {  # English singular and plural, Korean noun and counter
    "thunder": ("bolt", "bolts", "번개", "줄기"), "ocean_waves": ("crest", "crests", "물결", "개"),
    "fire": ("flame", "flames", "불길", "개"), "applause": ("clap", "claps", "손뼉", "번"),
    "siren": ("ray", "rays", "빛", "줄기"), "helicopter": ("gust", "gusts", "바람", "줄기"),
    "dog_barking": ("bark", "barks", "짖음", "번"), "rain": ("drop", "drops", "물방울", "개"),
    "glass_breaking": ("shard", "shards", "조각", "개"), "engine": ("puff", "puffs", "연기", "개")}
NUMBERS = {"en": ("one", "two", "three", "four", "five"), "ko": ("한", "두", "세", "네", "다섯")}
# Levels from 0 to 1 in equal steps; the middle of a range is nothing to remark on.
SIZES = {"en": ("tiny", "small", "", "big", "huge"), "ko": ("아주 작은", "작은", "", "큰", "아주 큰")}
LOUDNESSES = {"en": ("faint", "quiet", "", "loud", "very loud"),
              "ko": ("희미한", "조용한", "", "시끄러운", "아주 시끄러운")}
PITCHES = {"en": ("very low", "low", "", "high", "very high"),
           "ko": ("아주 낮은", "낮은", "", "높은", "아주 높은")}
RATES = {"en": ("very slow", "slow", "steady", "fast", "very fast"),
         "ko": ("아주 느린", "느린", "꾸준한", "빠른", "아주 빠른")}
EVERY_DETAIL = 1 / 0.6  # the rarest of size, pitch, count and sky is then always said
SKIES = {"en": ("under a clear pale sky", "by day", "in the evening", "at deep dusk"),
         "ko": ("맑은 하늘 아래", "낮에", "저녁에", "어두운 밤하늘 아래")}


def _level(words: tuple[str, ...], value: float) -> str:
    return words[min(len(words) - 1, int(value * len(words)))]


def _and(a: str, b: str, language: str) -> str:
    """Join two phrases; the Korean particle depends on whether the last syllable ends in a consonant."""
    if language == "en":
        return f"{a} and {b}"
    return f"{a}{'과' if (ord(a[-1]) - 0xAC00) % 28 else '와'} {b}"


def _with_adjectives(name: str, adjectives: list[str]) -> str:
    """Put adjectives before a name and after its article: "an engine" -> "a loud engine"."""
    article, _, rest = name.partition(" ") if name.startswith(("a ", "an ")) else ("", "", name)
    phrase = " ".join(adjectives + [rest])
    return phrase if not article else f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _describe(source: Source, language: str, rng: np.random.Generator, detail: float) -> str:
    """Name a source with each property's word in a share `detail` of the cases."""
    adjectives = []
    for levels, value in ((SIZES, source.loudness), (LOUDNESSES, source.loudness), (PITCHES, source.pitch),
                          (RATES, source.rate)):
        word = _level(levels[language], value)
        if word and rng.random() < (0.6 if levels is not RATES else 0.3) * detail:
            adjectives.append(word)
    phrase = _with_adjectives(str(rng.choice(NAMES[language][source.label])), adjectives)
    if rng.random() >= 0.6 * detail:
        return phrase
    singular, plural, noun, counter = MARKS[source.label]
    number = NUMBERS[language][source.count - 1]
    if language == "ko":
        return f"{noun} {number} {counter}의 {phrase}"
    return f"{phrase}, {number} {singular if source.count == 1 else plural}"


def caption(state: State, rng: np.random.Generator, detail: float | None = None) -> str:
    """Say in English (75 %) or Korean what is seen and heard, from bare nouns to every property.

    `detail` is drawn if it is not given: 0 names the sources alone, 1 most properties, EVERY_DETAIL all of them.
    """
    language = "en" if rng.random() < 0.75 else "ko"
    pair = len(state.sources) == 2
    if detail is None:
        detail = 0.0 if rng.random() < 0.25 else float(rng.uniform(0.4, 1.0)) * (0.6 if pair else 1.0)
    phrases = [_describe(source, language, rng, detail) for source in state.sources]
    sky = _level(SKIES[language], state.density) if rng.random() < 0.7 * detail else ""
    text, style = phrases[0], rng.random()
    if pair and language == "en":
        a, b = phrases
        comma = "," if "," in a else ""
        text = (f"{a} on the left{comma} and {b} on the right" if style < 0.2 else
                f"{a}{comma} next to {b}" if style < 0.35 else
                f"{a}{comma} with {b} at its right" if style < 0.5 else f"{a}{comma} and {b}")
    elif pair:
        text = f"왼쪽에 {phrases[0]}, 오른쪽에 {phrases[1]}" if style < 0.3 else _and(*phrases, language)
    if not sky:
        return text
    return f"{sky} {text}" if language == "ko" else f"{text}{',' if ',' in text else ''} {sky}"


def class_caption(labels: tuple[str, ...], language: str = "en") -> str:
    """The plain caption of one or two classes, for judging: "a dog barking and rain falling"."""
    names = [NAMES[language][label][0] for label in labels]
    return names[0] if len(names) == 1 else _and(*names, language)


# --- the sounds -------------------------------------------------------------------------------------------
# Every class is a carrier (noise band or tone) under an envelope of pulses: one function (source, rng) -> (N,) of any
# level; `synthesise` sets the level. Pitch moves every frequency by the same 2 octaves, and rate moves only the
# spacing of the pulses, never their shape. Classes of single events (thunder, ocean_waves, dog_barking,
# glass_breaking) sound exactly `source.count` times; the others follow `source.rate` continuously.

SAMPLES = int(DURATION_S * SAMPLING_RATE)  # N
TIME = np.arange(SAMPLES, dtype=np.float32) / SAMPLING_RATE  # (N,) seconds
LOG2_HZ = np.log2(np.maximum(np.fft.rfftfreq(SAMPLES, 1 / SAMPLING_RATE), 1)).astype(np.float32)  # (N/2+1,)
PINK = np.where(LOG2_HZ > 5, np.exp2(-LOG2_HZ / 2), 0).astype(np.float32)  # 3 dB less an octave, from 32 Hz
LEVEL_DB = (-38.0, -14.0)  # dBFS of a source while it sounds, at loudness 0 and 1
BED_DB = (-75.0, -30.0)  # dBFS of the steady bed, at density 0 and 1


def span(low: float, factor: float, value: float) -> float:
    """`low` at value 0, `low * factor` at value 1, even ratios between, as pitch and tempo are heard."""
    return low * factor ** value


def shaped_noise(rng: np.random.Generator, magnitude: np.ndarray) -> np.ndarray:
    """Gaussian noise (N,) of unit RMS whose spectrum follows `magnitude` (N / 2 + 1,)."""
    spectrum = rng.standard_normal(2 * magnitude.size, dtype=np.float32).view(np.complex64) * magnitude
    noise = np.fft.irfft(spectrum, SAMPLES)
    return noise / np.sqrt(np.mean(noise ** 2))


def band(rng: np.random.Generator, centre_hz: float, octaves: float) -> np.ndarray:
    """Noise (N,) of unit RMS, a bell of standard deviation `octaves` about `centre_hz` on the octave axis."""
    return shaped_noise(rng, np.exp(-0.5 * ((LOG2_HZ - np.float32(np.log2(centre_hz))) / octaves) ** 2))


def beats(rng: np.random.Generator, events_per_s: float, jitter: float) -> np.ndarray:
    """Times in seconds, one in each period, off its beat by up to twice `jitter` of it."""
    times = (np.arange(np.ceil(DURATION_S * events_per_s - 1e-9)) + rng.uniform(0, jitter)) / events_per_s
    return times + rng.uniform(0, jitter, times.size) / events_per_s


def strikes(rng: np.random.Generator, source: Source) -> np.ndarray:
    """Times of exactly `source.count` events, evenly spread but for a human-like irregularity."""
    return beats(rng, source.count / DURATION_S, 0.2)


def pulses(times: np.ndarray, attack_s: float, decay_s: float,
           heights: np.ndarray | None = None) -> np.ndarray:
    """Envelope (N,): at each time a rise over about `attack_s`, then an exponential fall of `decay_s`."""
    t = TIME[:min(SAMPLES, int(8 * (attack_s + decay_s) * SAMPLING_RATE))]
    shape = (1 - np.exp(-t / attack_s)) ** 2 * np.exp(-t / decay_s)
    shape /= shape.max()
    envelope = np.zeros(SAMPLES + shape.size, np.float32)
    for i, start in enumerate((times * SAMPLING_RATE).astype(int)):
        if 0 <= start < SAMPLES:
            envelope[start:start + shape.size] += shape if heights is None else shape * np.float32(heights[i])
    return envelope[:SAMPLES]


def buzz(hz: float | np.ndarray, sharpness: float) -> np.ndarray:
    """Harmonic tone (N,) at `hz`, a number or (N,). `sharpness` sets how many harmonics; none alias."""
    # Phase in float64 and wrapped: float32 would lose the fine steps of late samples.
    cycles = np.cumsum(hz, dtype=np.float64) / SAMPLING_RATE if np.ndim(hz) else np.arange(SAMPLES) * (
        float(hz) / SAMPLING_RATE)
    tone = np.exp(sharpness * (np.cos(((cycles % 1) * 2 * np.pi).astype(np.float32)) - 1))
    tone -= tone.mean()
    return tone / np.sqrt(np.mean(tone ** 2))


def thunder(source: Source, rng: np.random.Generator) -> np.ndarray:
    centre, times = span(60, 4, source.pitch), strikes(rng, source)
    rumble = band(rng, centre, 0.5) * pulses(times, 0.03, 0.35)
    return rumble + 0.5 * band(rng, 5 * centre, 0.6) * pulses(times, 0.004, 0.07)  # the crack before the roll


def ocean_waves(source: Source, rng: np.random.Generator) -> np.ndarray:
    swell = pulses(strikes(rng, source), 0.16, 0.22)
    return band(rng, span(350, 4, source.pitch), 0.9) * (0.12 + swell)


def fire(source: Source, rng: np.random.Generator) -> np.ndarray:
    centre, times = span(900, 4, source.pitch), beats(rng, span(4, 8, source.rate), 0.9)
    crackle = band(rng, centre, 0.7) * pulses(times, 0.0004, 0.005, rng.uniform(0.5, 1, times.size))
    return crackle + 0.07 * band(rng, centre / 8, 0.6)  # the roar below, three octaves down


def applause(source: Source, rng: np.random.Generator) -> np.ndarray:
    """A crowd that claps in time, some 16 hands to a beat, over others that do not."""
    together = np.repeat(beats(rng, span(1.2, 5, source.rate), 0.1), 16)
    together = together + rng.normal(0.03, 0.015, together.size)
    scattered = rng.uniform(0, DURATION_S, 240)
    heights = np.concatenate([rng.uniform(0.3, 1, together.size), rng.uniform(0.1, 0.35, scattered.size)])
    hands = pulses(np.concatenate([together, scattered]), 0.0008, 0.009, heights)
    return band(rng, span(800, 4, source.pitch), 0.45) * hands


def siren(source: Source, rng: np.random.Generator) -> np.ndarray:
    wail = np.sin(2 * np.pi * (span(0.4, 6, source.rate) * TIME + rng.random(dtype=np.float32)))
    return buzz(span(450, 4, source.pitch) * np.exp2(0.4 * wail), 1.5)


def helicopter(source: Source, rng: np.random.Generator) -> np.ndarray:
    centre = span(110, 4, source.pitch)
    chop = pulses(beats(rng, span(3, 5, source.rate), 0.02), 0.012, 0.022)
    return (band(rng, centre, 0.4) + 0.25 * band(rng, 6 * centre, 0.5)) * (0.06 + chop) + 0.12 * buzz(
        4 * centre, 0.5)  # a thin turbine whine, steady


def dog_barking(source: Source, rng: np.random.Generator) -> np.ndarray:
    times, hz = strikes(rng, source), span(260, 4, source.pitch)
    bark = pulses(times, 0.02, 0.05)
    # The voice rises and falls with the breath, and the breath itself is rough.
    return buzz(hz * (0.75 + 0.35 * np.minimum(bark, 1)), 5) * bark + 0.3 * band(rng, 4 * hz, 0.5) * bark


def rain(source: Source, rng: np.random.Generator) -> np.ndarray:
    """A fine steady hiss, and single drops that ring over it."""
    centre, times = span(2400, 4, source.pitch), beats(rng, span(3, 7, source.rate), 0.6)
    drops = band(rng, centre, 0.2) * pulses(times, 0.003, 0.014, rng.uniform(0.8, 1.2, times.size))
    return 3 * drops + 0.7 * band(rng, centre, 0.45)


def glass_breaking(source: Source, rng: np.random.Generator) -> np.ndarray:
    """A crash of noise, then shards: inharmonic partials that start a little later and ring on."""
    centre, times = span(2000, 4, source.pitch), strikes(rng, source)
    out = 0.8 * band(rng, 1.2 * centre, 0.4) * pulses(times, 0.0008, 0.03)
    t = TIME[:SAMPLING_RATE // 2]
    for start in (times * SAMPLING_RATE).astype(int):
        for _ in range(9):
            begin = start + int(rng.uniform(0, 0.12) * SAMPLING_RATE)
            hz, decay_s = centre * rng.uniform(0.75, 1.6), rng.uniform(0.04, 0.1)
            ring = np.sin(np.float32(2 * np.pi * hz) * t) * np.exp(-t / np.float32(decay_s))
            out[begin:begin + t.size] += 0.5 * ring[:max(0, SAMPLES - begin)]
    return out


def engine(source: Source, rng: np.random.Generator) -> np.ndarray:
    """A harmonic growl that putters: firing strokes at `rate`, over the steady turn of the shaft."""
    hz = span(55, 4, source.pitch)
    stroke = pulses(beats(rng, span(2.5, 5, source.rate), 0.05), 0.01, 0.035)
    return buzz(hz, 12) * (0.2 + stroke) + 0.1 * band(rng, 12 * hz, 0.4) * stroke


SYNTHESISERS: dict[str, Callable[[Source, np.random.Generator], np.ndarray]] = {
    function.__name__: function for function in (
        thunder, ocean_waves, fire, applause, siren, helicopter, dog_barking, rain, glass_breaking, engine)}


def active_rms(waveform: np.ndarray) -> float:
    """RMS of (N,) while it sounds: power of 20 ms blocks, weighted by itself so that silence does not count.

    Over the whole clip five barks would be 7 dB above one; here they are as loud: rate stays out of loudness.
    """
    block = SAMPLING_RATE // 50
    power = np.mean(np.pad(waveform, (0, -len(waveform) % block)).reshape(-1, block) ** 2, axis=1)  # (200,)
    return float(np.sqrt(np.sum(power ** 2) / np.sum(power)))


def decibels(limits: tuple[float, float], value: float) -> np.float32:
    """Gain for a value in [0, 1] between two levels in dBFS."""
    return np.float32(10 ** ((limits[0] + (limits[1] - limits[0]) * value) / 20))


def synthesise(state: State) -> np.ndarray:
    """The clip of a state: (192000,) float32 in [-1, 1], mono, 48 kHz. Same state, same samples."""
    # A generator for each part: changing one source leaves the other and the bed as they were.
    waveform = decibels(BED_DB, state.density) * shaped_noise(np.random.default_rng((state.seed, 0)), PINK)
    for i, source in enumerate(state.sources, start=1):
        sound = SYNTHESISERS[source.label](source, np.random.default_rng((state.seed, i)))
        waveform += decibels(LEVEL_DB, source.loudness) / np.float32(active_rms(sound)) * sound
    # Levels carry meaning, so the clip is never rescaled: only peaks above 0.8 are bent, to stay below 1.
    over = np.abs(waveform) - np.float32(0.8)
    bent = np.sign(waveform) * (0.8 + 0.2 * np.tanh(over * 5))
    return np.where(over > 0, bent, waveform).astype(np.float32)
