"""The sound world: ten sounds and the scenes that belong to them, made from one random state per example.

    state = draw_state(rng)                 # what is heard and seen: labels and continuous properties
    waveform = synthesise(state)            # (192000,) float32 at 48 kHz, 4 s
    image = draw_scene(state)               # 64 x 64 RGB
    text = caption(state, rng)              # English or Korean, in varying detail

Four properties are both heard and seen; each is uniform in [0, 1]:

| property           | in the sound                                    | in the picture                      |
|--------------------|-------------------------------------------------|-------------------------------------|
| loudness, a source | level of the source, 24 dB from 0 to 1          | size of the object                  |
| pitch, a source    | fundamental or centre frequency, 2 octaves      | height of the object (high is high) |
| rate, a source     | events a second (strikes, barks, crests, drops) | count of the object's marks, 1 to 5 |
| density, a scene   | level of a steady bed of noise under everything | sky, from pale day to deep dusk     |
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clap2diffusion.dataset.decoding import active_rms

SAMPLING_RATE = 48000  # Hz
DURATION_S = 4.0
IMAGE_SIZE = 64  # pixels
CLASSES = ("thunder", "ocean_waves", "fire", "applause", "siren", "helicopter", "dog_barking", "rain",
           "glass_breaking", "engine")
# Nine of the 45 pairs are in no training or validation clip. All classes but the last are in about two each.
UNHEARD_PAIRS = tuple((CLASSES[i], CLASSES[(i + 3) % 10]) for i in range(9))
LOW_PITCH, HIGH_PITCH = 0.4, 0.6  # of two sounds in the data one is at most low, the other at least high
PAIR_LOUDNESS = 0.3  # two sources differ by 7 dB at most: nobody hears a sound that is far below another
# FIGURES: what Artist draws of a class, in order, and one hand. WORDS of a language: `names` of a class, the
# plain one first; `marks`, in English one and many, in Korean noun and counter; `levels` of a property,
# 0 to 1; `pairs`, ways to join two sounds, each up to its limit of a draw in [0, 1).
FIGURES, WORDS = (json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
                  for name in ("figures.json", "words.json"))


@dataclass(frozen=True)
class Source:
    """One thing that sounds and is drawn. All numbers are in [0, 1]; `x` is its place from left to right."""
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
    """One or two sources, left to right, the scene's density, and a seed for details without a meaning."""
    sources: tuple[Source, ...]
    density: float
    seed: int

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(source.label for source in self.sources)


def draw_state(rng, labels: tuple[str, ...] = (), pairs=0.2) -> State:
    """Draw one example's state: the sources `labels`, or any (UNHEARD_PAIRS too), a share `pairs` of two."""
    if not labels:
        labels = rng.choice(CLASSES, 2, replace=False) if rng.random() < pairs else [rng.choice(CLASSES)]
    while True:
        sources = tuple(Source(str(label), *rng.random(4).tolist()) for label in labels)
        if abs(sources[0].loudness - sources[-1].loudness) <= PAIR_LOUDNESS:
            return State(sources, float(rng.random()), int(rng.integers(2 ** 31)))


def low_and_high(state: State) -> State:
    """A state as the data hold it: the left one of a pair is low (to LOW_PITCH), the right one high. One
    microphone does not tell left from right, so the place must be heard in each sound itself. What an adapter
    learns from one pair then holds for a pair that it never heard."""
    if len(state.sources) == 1:
        return state
    left, right = state.sources
    return replace(state, sources=(replace(left, pitch=LOW_PITCH * left.pitch),
                                   replace(right, pitch=HIGH_PITCH + (1 - HIGH_PITCH) * right.pitch)))


# The picture. An object is drawn in its box, marks included: x to the right and y down, both from -1 to 1.
# It is pasted like a sticker with a pale rim, so it stands out both by day and at dusk.

SUPERSAMPLING = 4
SINGLE_WIDTHS = (26.0, 46.0)  # pixels, at loudness 0 and 1
PAIR_WIDTHS = (20.0, 30.0)
MARK_WIDTH = 3.0  # pixels: no stroke of a mark is thinner, so it survives in an 8 x 8 latent
RIM = (250, 248, 240)
SKY_DAY, SKY_DUSK = ((150, 204, 246), (226, 242, 252)), ((20, 18, 52), (84, 52, 98))  # top and bottom
GROUND_DAY, GROUND_DUSK = (190, 184, 164), (58, 54, 66)


class Artist:
    """Draws the figure of a class: shapes that never change, and `count` marks. Lengths: half box widths."""

    def __init__(self, layer: Image.Image, x: float, y: float, width: float, count: int, rng):
        """Box centre `x`, `y` and its `width` in pixels of the final picture."""
        self.draw, self.count, self.rng = ImageDraw.Draw(layer), count, rng
        self.x, self.y, self.scale = x * SUPERSAMPLING, y * SUPERSAMPLING, width * SUPERSAMPLING / 2
        self.mark = MARK_WIDTH * SUPERSAMPLING / self.scale  # the thinnest mark, in half box widths

    def at(self, points) -> list[tuple[float, float]]:
        return [(self.x + self.scale * px, self.y + self.scale * py) for px, py in points]

    def polygon(self, fill, *points) -> None:
        self.draw.polygon(self.at(points), fill=tuple(fill))

    def ellipse(self, fill, x: float, y: float, rx: float, ry: float = 0, start=0, end=360) -> None:
        """An ellipse or a slice of it, in degrees clockwise from three o'clock; without `ry` a circle."""
        (left, top), (right, bottom) = self.at([(x - rx, y - (ry or rx)), (x + rx, y + (ry or rx))])
        self.draw.pieslice((left, top, right, bottom), start, end, fill=tuple(fill))

    def stroke(self, fill, width: float, *points) -> None:
        """A line with round ends and joints."""
        self.draw.line(self.at(points), tuple(fill), max(1, round(width * self.scale)), joint="curve")
        for px, py in (points[0], points[-1]):
            self.ellipse(fill, px, py, width / 2)

    def spread(self, most: float) -> list[float]:
        """A place for each mark, evenly spaced around 0; five of them reach from -most to `most`."""
        reach = most * (self.count + 1) / 6 if self.count > 1 else 0.0
        return np.linspace(-reach, reach, self.count).tolist()

    def rays(self, fill, x, y, middle: float, most: float, inner: float, outer: float, width: float) -> None:
        """Around a point, up to `most` degrees to both sides of `middle`, clockwise from three o'clock."""
        for angle in np.radians([middle + turn for turn in self.spread(most)]):
            c, s = float(np.cos(angle)), float(np.sin(angle))
            ends = (x + inner * c, y + inner * s), (x + outer * c, y + outer * s)
            self.stroke(fill, max(width, 1.3 * self.mark), *ends)

    def bolts(self, fill) -> None:
        for x in self.spread(0.78):
            w, end = max(0.16, 0.5 * self.mark), 1 - 0.12 * float(self.rng.random())
            self.polygon(fill, (x - 0.4 * w, -0.3), (x + w, -0.3), (x + 0.5 * w, 0.22), (x + 1.1 * w, 0.22),
                         (x - 0.7 * w, end), (x - 0.3 * w, 0.48), (x - 1.1 * w, 0.48))

    def waves(self, blue, deep, foam, back, lip) -> None:
        """`back` and `lip`: outlines of one wave and of its foam, of which y is up."""
        step, base, height = 2 / self.count, 0.3, (1.25, 1.1, 0.95, 0.85, 0.8)[self.count - 1]
        self.polygon(blue, (-1, base - 0.05), (1, base - 0.05), (0.94, 1), (-0.94, 1))
        for i in range(self.count):
            wave, crest = ([(-1 + i * step + step * px, base - height * py) for px, py in points]
                           for points in (back, lip))
            self.polygon(blue, *wave)
            self.stroke(foam, max(0.28 - 0.04 * self.count, 0.6 * self.mark), *crest)
        y = 0.6 + 0.06 * float(self.rng.random())
        swell = [(x, y + 0.07 * np.sin(9 * x)) for x in np.linspace(-0.97, 0.97, 25)]
        self.polygon(deep, *swell, (0.94, 1), (-0.94, 1))

    def flames(self, tongue, *layers) -> None:
        """Each of the layers: colour, share of a tongue's width and of its height."""
        half, places = (0.62, 0.46, 0.36, 0.3, 0.26)[self.count - 1], self.spread(0.72)
        tops = [-1 + 0.55 * abs(x) + 0.12 * float(self.rng.random()) for x in places]
        for colour, wide, tall in layers:
            for x, top in zip(places, tops):
                h = (0.75 - top) / 2 * tall
                self.polygon(colour, *((x + wide * half * px, 0.75 - h + h * py) for px, py in tongue))

    def hand(self, sleeve, side: int) -> None:
        """One of two hands that lean inwards; `side` -1 mirrors it."""
        c, s = float(np.cos(0.42)), float(np.sin(0.42))
        for shape, fill, *values in FIGURES["hand"]:
            turned = [(side * (0.5 + c * v[0] + s * v[1]), 0.34 - s * v[0] + c * v[1])
                      if isinstance(v, list) else v for v in values]
            getattr(self, shape)(fill or sleeve, *turned)

    def gusts(self, fill) -> None:
        for x in self.spread(0.85):
            self.stroke(fill, max(0.22, 1.2 * self.mark), (x, 0.78), (x - 0.06 * self.rng.random(), 0.9))

    def drops(self, fill) -> None:
        for x in self.spread(0.8):
            y, r = -0.66 + 0.04 * float(self.rng.uniform(-1, 1)), max(0.19, 0.66 * self.mark)
            self.ellipse(fill, x, y, r)
            self.polygon(fill, (x - 0.92 * r, y - 0.4 * r), (x, y - 2.1 * r), (x + 0.92 * r, y - 0.4 * r))

    def shards(self, fill) -> None:
        for x in self.spread(0.8):
            y, r, turn = -0.76 + 0.2 * x * x, max(0.25, 0.85 * self.mark), self.rng.uniform(-0.3, 0.3)
            self.polygon(fill, *((x + r * np.sin(a + turn), y - r * np.cos(a + turn)) for a in (0, 2.2, 4.0)))

    def puffs(self, fill, *trail) -> None:
        for x, y in trail[:self.count]:
            self.ellipse(fill, x, y + 0.03 * self.rng.uniform(-1, 1), max(0.2, 0.7 * self.mark))


def _mix(a, b, t: float) -> np.ndarray:
    return np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t


def place(state: State, index: int) -> tuple[float, float, float]:
    """Box of a source's object: centre x, centre y and width in pixels."""
    source, alone = state.sources[index], len(state.sources) == 1
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


def paste(image: Image.Image, objects: list[tuple], rng: np.random.Generator) -> Image.Image:
    """Paste objects (label, x, y, width, count) with their rim; return what they cover, in mode L."""
    layer = Image.new("RGBA", (IMAGE_SIZE * SUPERSAMPLING,) * 2)
    for label, *box in objects:
        artist = Artist(layer, *box, rng)
        for shape, *values in FIGURES[label]:
            getattr(artist, shape)(*values)
    layer = layer.reduce(SUPERSAMPLING)
    covered = layer.getchannel("A").filter(ImageFilter.MaxFilter(3))
    image.paste(RIM, mask=covered)
    image.paste(layer, mask=layer)
    return covered


def draw_scene(state: State) -> Image.Image:
    """Draw the state as a 64 x 64 RGB picture. The same state gives the same bytes."""
    rng = np.random.default_rng(state.seed)
    column = background(state.density, IMAGE_SIZE - 9 + int(rng.integers(-1, 2)))
    image = Image.fromarray(np.repeat(column[:, None], IMAGE_SIZE, 1).round().astype(np.uint8))
    paste(image, [(one.label, *place(state, i), one.count) for i, one in enumerate(state.sources)], rng)
    return image


# The words. A caption fits both the picture and the sound: it names things and levels of their properties.

EVERY_DETAIL = 1 / 0.6  # a caption then always says even the rarest of size, pitch, count and sky


def _level(words: list[str], value: float) -> str:
    return words[min(len(words) - 1, int(value * len(words)))]


def _join(pattern: str, a: str, b: str) -> str:
    """Put phrases into a pattern of words.json. English sets a comma after a phrase that holds one itself."""
    # the Korean particle depends on whether the last syllable ends in a consonant
    particle = "과" if (ord(a[-1]) - 0xAC00) % 28 else "와"
    return pattern.format(a=a, b=b, comma="," if "," in a else "", particle=particle)


def _describe(source: Source, language: str, rng: np.random.Generator, detail: float) -> str:
    """Name a source. A share `detail` of the cases says a word about each property."""
    words, size = WORDS[language], source.loudness
    properties = (("size", size, 0.6), ("loudness", size, 0.6), ("pitch", source.pitch, 0.6),
                  ("rate", source.rate, 0.3))
    adjectives = [word for what, value, share in properties
                  if (word := _level(words["levels"][what], value)) and rng.random() < share * detail]
    article, name = re.fullmatch("(an? )?(.+)", str(rng.choice(words["names"][source.label]))).groups()
    phrase = " ".join([*adjectives, name])
    if article:
        phrase = f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
    if rng.random() >= 0.6 * detail:
        return phrase
    number, mark = words["numbers"][source.count - 1], words["marks"][source.label]
    if language == "ko":
        return f"{mark[0]} {number} {mark[1]}의 {phrase}"
    return f"{phrase}, {number} {mark[0] if source.count == 1 else mark[1]}"


def caption(state: State, rng: np.random.Generator, detail: float | None = None) -> str:
    """Say in English (75 %) or Korean what is seen and heard, from bare nouns to every property. A `detail`
    of 0 names the sources alone, 1 most properties, EVERY_DETAIL all of them; None draws it."""
    language, pair = "en" if rng.random() < 0.75 else "ko", len(state.sources) == 2
    if detail is None:
        detail = 0.0 if rng.random() < 0.25 else float(rng.uniform(0.4, 1.0)) * (0.6 if pair else 1.0)
    words, phrases = WORDS[language], [_describe(one, language, rng, detail) for one in state.sources]
    sky = _level(words["levels"]["sky"], state.density) if rng.random() < 0.7 * detail else ""
    text, style = phrases[0], rng.random()
    if pair:
        text = _join(next(pattern for limit, pattern in words["pairs"] if style < limit), *phrases)
    return _join(words["under_sky"], text, sky) if sky else text


def class_caption(labels: tuple[str, ...], language: str = "en") -> str:
    """The plain caption of one or two classes, for judging: "a dog barking and rain falling"."""
    names = [WORDS[language]["names"][label][0] for label in labels]
    return names[0] if len(names) == 1 else _join(WORDS[language]["pairs"][-1][1], *names)


# The sounds.
SAMPLES = int(DURATION_S * SAMPLING_RATE)  # N
TIME = np.arange(SAMPLES, dtype=np.float32) / SAMPLING_RATE  # (N,) seconds
LOG2_HZ = np.log2(np.maximum(np.fft.rfftfreq(SAMPLES, 1 / SAMPLING_RATE), 1)).astype(np.float32)  # (N/2+1,)
PINK = np.where(LOG2_HZ > 5, np.exp2(-LOG2_HZ / 2), 0).astype(np.float32)  # 3 dB less an octave, above 32 Hz
LEVEL_DB = (-38.0, -14.0)  # dBFS of a source while it sounds, at loudness 0 and 1
BED_DB = (-75.0, -30.0)  # dBFS of the steady bed, at density 0 and 1


def shaped_noise(rng: np.random.Generator, magnitude: np.ndarray) -> np.ndarray:
    """Gaussian noise (N,) of unit RMS whose spectrum follows `magnitude` (N / 2 + 1,)."""
    spectrum = rng.standard_normal(2 * magnitude.size, dtype=np.float32).view(np.complex64) * magnitude
    noise = np.fft.irfft(spectrum, SAMPLES)
    return noise / np.sqrt(np.mean(noise ** 2))


def pulses(times: np.ndarray, attack_s: float, decay_s: float, heights=1.0) -> np.ndarray:
    """Envelope (N,) of pulses: a rise over about `attack_s`, then an exponential fall of `decay_s`."""
    t = TIME[:min(SAMPLES, int(8 * (attack_s + decay_s) * SAMPLING_RATE))]
    shape = (1 - np.exp(-t / attack_s)) ** 2 * np.exp(-t / decay_s)
    shape /= shape.max()
    envelope = np.zeros(SAMPLES + shape.size, np.float32)
    starts = (times * SAMPLING_RATE).astype(int)
    for start, height in zip(starts, np.broadcast_to(np.float32(heights), starts.shape)):
        if 0 <= start < SAMPLES:
            envelope[start:start + shape.size] += shape * height
    return envelope[:SAMPLES]


def buzz(hz: float | np.ndarray, sharpness: float) -> np.ndarray:
    """Harmonic tone (N,) at `hz`, a number or (N,). `sharpness` sets how many harmonics; none alias."""
    # Phase in float64 and wrapped: float32 would lose the fine steps of late samples.
    cycles = np.cumsum(hz, dtype=np.float64) / SAMPLING_RATE if np.ndim(hz) else np.arange(SAMPLES) * (
        float(hz) / SAMPLING_RATE)
    tone = np.exp(sharpness * (np.cos(((cycles % 1) * 2 * np.pi).astype(np.float32)) - 1))
    tone -= tone.mean()
    return tone / np.sqrt(np.mean(tone ** 2))


class Voice:
    """Sounds a source of each class at any level: a carrier (noise band or tone) under an envelope of pulses.

    Pitch moves every frequency by the same 2 octaves, rate only the spacing of the pulses, never their shape.
    Thunder, ocean_waves, dog_barking and glass_breaking sound exactly `source.count` times; the others follow
    `source.rate` continuously."""

    def __init__(self, source: Source, rng: np.random.Generator):
        self.source, self.rng = source, rng

    def hz(self, low: float) -> float:
        return low * 4 ** self.source.pitch  # even ratios, as pitch and tempo are heard

    def per_s(self, low: float, factor: float) -> float:
        return low * factor ** self.source.rate

    def band(self, centre_hz: float, octaves: float) -> np.ndarray:
        """Noise (N,) of unit RMS: on the octave axis a bell of deviation `octaves` about `centre_hz`."""
        bell = np.exp(-0.5 * ((LOG2_HZ - np.float32(np.log2(centre_hz))) / octaves) ** 2)
        return shaped_noise(self.rng, bell)

    def beats(self, per_s: float, jitter: float) -> np.ndarray:
        """Times in seconds, one in each period, off its beat by up to twice `jitter` of it."""
        times = (np.arange(np.ceil(DURATION_S * per_s - 1e-9)) + self.rng.uniform(0, jitter)) / per_s
        return times + self.rng.uniform(0, jitter, times.size) / per_s

    def strikes(self) -> np.ndarray:
        """Times of exactly `source.count` events, evenly spread but for a human-like irregularity."""
        return self.beats(self.source.count / DURATION_S, 0.2)

    def thunder(self) -> np.ndarray:
        centre, times = self.hz(60), self.strikes()
        rumble = self.band(centre, 0.5) * pulses(times, 0.03, 0.35)
        return rumble + 0.5 * self.band(5 * centre, 0.6) * pulses(times, 0.004, 0.07)  # a crack, before it

    def ocean_waves(self) -> np.ndarray:
        return (0.12 + pulses(self.strikes(), 0.16, 0.22)) * self.band(self.hz(350), 0.9)

    def fire(self) -> np.ndarray:
        centre, times = self.hz(900), self.beats(self.per_s(4, 8), 0.9)
        crackle = self.band(centre, 0.7) * pulses(times, 0.0004, 0.005, self.rng.uniform(0.5, 1, times.size))
        return crackle + 0.07 * self.band(centre / 8, 0.6)  # the roar below, three octaves down

    def applause(self) -> np.ndarray:
        """A crowd that claps in time, some 16 hands to a beat, over others that do not."""
        rng, together = self.rng, np.repeat(self.beats(self.per_s(1.2, 5), 0.1), 16)
        together = together + rng.normal(0.03, 0.015, together.size)
        scattered = rng.uniform(0, DURATION_S, 240)
        heights = np.concatenate([rng.uniform(0.3, 1, together.size), rng.uniform(0.1, 0.35, scattered.size)])
        hands = pulses(np.concatenate([together, scattered]), 0.0008, 0.009, heights)
        return self.band(self.hz(800), 0.45) * hands

    def siren(self) -> np.ndarray:
        wail = np.sin(2 * np.pi * (self.per_s(0.4, 6) * TIME + self.rng.random(dtype=np.float32)))
        return buzz(self.hz(450) * np.exp2(0.4 * wail), 1.5)

    def helicopter(self) -> np.ndarray:
        centre = self.hz(110)
        chop = pulses(self.beats(self.per_s(3, 5), 0.02), 0.012, 0.022)
        air = (self.band(centre, 0.4) + 0.25 * self.band(6 * centre, 0.5)) * (0.06 + chop)
        return air + 0.12 * buzz(4 * centre, 0.5)  # a thin turbine whine, steady

    def dog_barking(self) -> np.ndarray:
        times, hz = self.strikes(), self.hz(260)
        bark = pulses(times, 0.02, 0.05)
        # The voice rises and falls with the breath, and the breath itself is rough.
        voice = buzz(hz * (0.75 + 0.35 * np.minimum(bark, 1)), 5) * bark
        return voice + 0.3 * self.band(4 * hz, 0.5) * bark

    def rain(self) -> np.ndarray:
        """A fine steady hiss, and single drops that ring over it."""
        centre, times = self.hz(2400), self.beats(self.per_s(3, 7), 0.6)
        drops = self.band(centre, 0.2) * pulses(times, 0.003, 0.014, self.rng.uniform(0.8, 1.2, times.size))
        return 3 * drops + 0.7 * self.band(centre, 0.45)

    def glass_breaking(self) -> np.ndarray:
        """A crash of noise, then shards: inharmonic partials that start a little later and ring on."""
        rng, centre, times = self.rng, self.hz(2000), self.strikes()
        out = 0.8 * self.band(1.2 * centre, 0.4) * pulses(times, 0.0008, 0.03)
        t = TIME[:SAMPLING_RATE // 2]
        for start in (times * SAMPLING_RATE).astype(int):
            for _ in range(9):
                begin = start + int(rng.uniform(0, 0.12) * SAMPLING_RATE)
                hz, decay_s = centre * rng.uniform(0.75, 1.6), rng.uniform(0.04, 0.1)
                ring = np.sin(np.float32(2 * np.pi * hz) * t) * np.exp(-t / np.float32(decay_s))
                out[begin:begin + t.size] += 0.5 * ring[:max(0, SAMPLES - begin)]
        return out

    def engine(self) -> np.ndarray:
        """A harmonic growl that putters: firing strokes at `rate`, over the steady turn of the shaft."""
        hz = self.hz(55)
        stroke = pulses(self.beats(self.per_s(2.5, 5), 0.05), 0.01, 0.035)
        return buzz(hz, 12) * (0.2 + stroke) + 0.1 * self.band(12 * hz, 0.4) * stroke


def decibels(limits: tuple[float, float], value: float) -> np.float32:
    """Gain for a value in [0, 1] between two levels in dBFS."""
    return np.float32(10 ** ((limits[0] + (limits[1] - limits[0]) * value) / 20))


def synthesise(state: State) -> np.ndarray:
    """The clip of a state: (192000,) float32 in [-1, 1], mono, 48 kHz. Same state, same samples."""
    # A generator for each part: changing one source leaves the other and the bed as they were.
    waveform = decibels(BED_DB, state.density) * shaped_noise(np.random.default_rng((state.seed, 0)), PINK)
    for i, source in enumerate(state.sources, start=1):
        sound = getattr(Voice(source, np.random.default_rng((state.seed, i))), source.label)()
        waveform += decibels(LEVEL_DB, source.loudness) / np.float32(active_rms(sound, SAMPLING_RATE)) * sound
    # Levels carry meaning, so the clip is never rescaled. Only peaks above 0.8 are bent, to stay below 1.
    over = np.abs(waveform) - np.float32(0.8)
    bent = np.sign(waveform) * (0.8 + 0.2 * np.tanh(over * 5))
    return np.where(over > 0, bent, waveform).astype(np.float32)
