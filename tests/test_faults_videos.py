"""Faults of videos: which frame is used and what it looks like, or why there is none.

Each case makes a small video with PyAV. `says` is what is said of the picture of its first 2 s: "used" and
why candidates fell out, or why there is no picture (exit code 2 here: it is skipped for that reason)."""

from __future__ import annotations

import io
import re
import struct
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from faults import Case, pattern
from PIL import Image, ImageFilter

from clap2diffusion.dataset import frames as module
from clap2diffusion.dataset.decoding import BadFile
from clap2diffusion.dataset.frames import candidate_times, pick, read_frames

av = pytest.importorskip("av")

RATE, LENGTH_S = 10, 2.0
WIDTH, HEIGHT = 96, 64
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # KR, KB
CORNERS = np.array([[200, 40, 30], [30, 180, 60], [40, 60, 190], [220, 200, 40]])  # red green / blue yellow
WHITE = np.array([255, 255, 255])


# --- making videos ------------------------------------------------------------------------------------------

def scene(i: int, width=WIDTH, height=HEIGHT) -> np.ndarray:
    """Frame i as (height, width, 3) RGB: a colour in each quarter, a white square in the middle, and stripes
    in the middle row that move to the right, so that no two frames are alike."""
    rgb = np.zeros((height, width, 3), np.uint8)
    half_h, half_w = height // 2, width // 2
    rgb[:half_h, :half_w], rgb[:half_h, half_w:], rgb[half_h:, :half_w], rgb[half_h:, half_w:] = CORNERS
    stripes = (np.arange(width) // (width // 12) + i) % 3 == 0
    rgb[half_h - height // 8:half_h + height // 8, stripes] = 10 + (i * 37) % 120
    rgb[half_h - height // 16:half_h + height // 16, half_w - width // 16:half_w + width // 16] = 255
    return rgb


def scenes(n=int(RATE * LENGTH_S), **size) -> list[np.ndarray]:
    return [scene(i, **size) for i in range(n)]


def coded(rgb: np.ndarray, matrix, full: bool, bits: int) -> list[np.ndarray]:
    """Planes 4:4:4 of R'G'B' in [0, 1], by the equations of BT.601, BT.709 and BT.2020."""
    kr, kb = matrix
    y = rgb @ np.array([kr, 1 - kr - kb, kb])
    cb, cr = (rgb[..., 2] - y) / (2 * (1 - kb)), (rgb[..., 0] - y) / (2 * (1 - kr))
    top, unit = 2 ** bits - 1, 2 ** (bits - 8)
    if full:
        planes = y * top, cb * top + 128 * unit, cr * top + 128 * unit
    else:
        planes = (219 * y + 16) * unit, (224 * cb + 128) * unit, (224 * cr + 128) * unit
    return [np.clip(np.rint(plane), 0, top).astype(np.uint8 if bits == 8 else np.uint16) for plane in planes]


def yuv_frame(rgb: np.ndarray, matrix=BT601, full=False, bits=8, fields=False):
    """An RGB picture, 0 to 255 or float R'G'B' in [0, 1], as yuv420p of 8 or 10 bits. fields: the lines of
    colour belong to the fields in turn, as in interlaced video."""
    signal = rgb / 255 if rgb.dtype == np.uint8 else rgb
    y, cb, cr = coded(signal, matrix, full, bits)
    if fields:
        lines = np.arange(len(rgb)).reshape(-1, 4)[:, [0, 0, 1, 1]].reshape(-1)
        cb, cr = cb[lines], cr[lines]
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], "yuv420p" if bits == 8 else f"yuv420p{bits}le")
    for plane, values in zip(frame.planes, (y, cb[::2, ::2], cr[::2, ::2])):
        rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        rows[:, :plane.width] = values
        plane.update(rows.tobytes())
    return frame


@dataclass
class Made:
    """How a video is written. pts: time stamps in 1/1000 s; colours: matrix, range, primaries and transfer as
    numbers of H.273; sound: its seconds, from sound_from_s on."""
    codec: str = "libx264"
    options: dict | None = None
    pts: list[int] | None = None
    colours: tuple = ()
    pixel: Fraction | None = None
    matrix: tuple = BT601
    full: bool = False
    bits: int = 8
    fields: bool = False
    pixels: str | None = None
    container: dict | None = None
    kind: str | None = None
    rate: int = RATE


def video(path: Path, pictures: list[np.ndarray], change=None, **how) -> None:
    """Write pictures as a video of RATE frames a second; change(path) then makes the fault."""
    made = Made(**how)
    with av.open(str(path), "w", format=made.kind, options=made.container or {}) as out:
        stream = out.add_stream(made.codec, rate=made.rate)
        context = stream.codec_context
        if made.rate == RATE:  # MPEG-2 has only rates of its own
            context.time_base = Fraction(1, 1000)
        stream.width, stream.height = pictures[0].shape[1], pictures[0].shape[0]
        exact = {"libx264": {"crf": "8", "preset": "ultrafast"}, "mpeg4": {"b": "4000000"},
                 "mpeg2video": {"b": "4000000"}}
        stream.options = (exact.get(made.codec, {}) if made.options is None else made.options)
        for name, value in zip(("colorspace", "color_range", "color_primaries", "color_trc"), made.colours):
            setattr(context, name, value)
        if made.pixel:
            context.sample_aspect_ratio = made.pixel
        for i, picture in enumerate(pictures):
            if made.pixels:
                frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[2] == 4 else "rgb24")
                frame = frame.reformat(format=made.pixels)
            else:
                frame = yuv_frame(picture, made.matrix, made.full, made.bits, made.fields)
            if i == 0:
                stream.pix_fmt = frame.format.name
            frame.pts, frame.time_base = (made.pts or range(0, 10**9, 1000 // made.rate))[i], Fraction(1,
                 1000)
            for name, value in zip(("colorspace", "color_range", "color_primaries", "color_trc"),
                                   made.colours):
                setattr(frame, name, value)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if change:
        change(path)


def makes(name="a.mp4", pictures=None, change=None, **how):
    def make(folder: Path) -> Path:
        video(folder / name, pictures() if callable(pictures) else pictures or scenes(), change, **how)
        return folder / name
    return make


def changed(*pairs: tuple[bytes, bytes], more=None):
    """Replace bytes of a file, each where they stand first, and then call more(path)."""
    def change(path: Path) -> None:
        content = path.read_bytes()
        for old, new in pairs:
            assert old in content, old
            content = content.replace(old, new, 1)
        path.write_bytes(content)
        if more:
            more(path)
    return change


def put(box: bytes, offset: int, new: bytes):
    """Overwrite bytes of an MP4 that lie `offset` behind the first of a box's name."""
    def change(path: Path) -> None:
        content = path.read_bytes()
        at = content.index(box) + len(box) + offset
        path.write_bytes(content[:at] + new + content[at + len(new):])
    return change


def matrix(*numbers: float):
    """The display matrix of an MP4's track: a, b, c, d."""
    a, b, c, d = (round(number * 65536) for number in numbers)
    return put(b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def cut_to(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def remuxed(keep, then=None):
    """Copy the packets for which keep(packet's number, packet) is true."""
    def change(path: Path) -> None:
        source = path.rename(path.with_name("whole" + path.suffix))
        with av.open(str(source)) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for i, packet in enumerate(old.demux(video=0)):
                if packet.size and keep(i, packet):
                    packet.stream = stream
                    new.mux(packet)
        source.unlink()
        if then:
            then(path)
    return change


SUBTITLES = b"".join(b"%d\n00:00:%02d,000 --> 00:00:%02d,900\nWhat is said.\n\n" % (i + 1, i,
     i) for i in range(3))


def with_tracks(sound_s=LENGTH_S, sound_from_s=0.0, video_from_s=0.0, lines=False, cover=False, second=False):
    """Put a sound beside the picture, and what else is asked for."""
    def change(path: Path) -> None:
        source = path.rename(path.with_name("alone" + path.suffix))
        with av.open(str(source)) as old, av.open(str(path), "w") as new:
            other = new.add_stream("libx264", rate=RATE) if second else None
            stream = new.add_stream_from_template(old.streams.video[0])
            sound = new.add_stream("pcm_s16le" if path.suffix in (".mkv", ".mov") else "aac", rate=8000)
            if lines:
                text = av.open(io.BytesIO(SUBTITLES), format="srt")
                spoken = new.add_stream_from_template(text.streams.subtitles[0])
            if cover:
                content = io.BytesIO()
                Image.new("RGB", (200, 200), "magenta").save(content, "JPEG")
                new.add_attachment("cover.jpg", "image/jpeg", content.getvalue())
            if second:
                other.width, other.height, other.pix_fmt = 64, 64, "yuv420p"
                other.disposition, stream.disposition = 0, av.stream.Disposition.default
                blank = yuv_frame(np.full((64, 64, 3), 128, np.uint8))
                for i in range(5):
                    blank.pts, blank.time_base = i, Fraction(1, RATE)
                    new.mux(other.encode(blank))
                new.mux(other.encode())
            samples = (np.sin(np.arange(int(sound_s * 8000)) / 4) * 9000).astype(np.int16)
            for i in range(0, len(samples), 1000):
                block = av.AudioFrame.from_ndarray(samples[None, i:i + 1000], "s16", "mono")
                block.rate, block.pts, block.time_base = 8000, i + int(sound_from_s * 8000), Fraction(1, 8000)
                new.mux(sound.encode(block))
            new.mux(sound.encode())
            for line in text.demux() if lines else ():
                if line.size:
                    line.stream = spoken
                    new.mux(line)
            for packet in old.demux(video=0):
                if packet.size:
                    packet.pts += int(video_from_s / packet.time_base)
                    packet.dts += int(video_from_s / packet.time_base)
                    packet.stream = stream
                    new.mux(packet)
        source.unlink()
    return change


# --- what is looked at --------------------------------------------------------------------------------------

@dataclass
class Seen:
    """picked, its image as (height, width, 3) int, all candidates, and the number of packets sent to the
    decoder."""
    picked: object
    image: np.ndarray
    frames: list
    packets: int


def see(path: Path, start_s=0.0, length_s=LENGTH_S, **how) -> tuple[str, Seen | None]:
    """What is said of a video's picture, and what comes out of it."""
    packets = 0
    def count(context, runs, *rest):
        nonlocal packets
        packets += sum(map(len, runs))
        return decode(context, runs, *rest)
    decode, module._decode = module._decode, count
    try:
        found = read_frames(path, candidate_times(start_s, length_s))
        picked = pick(found, **how)
        image = np.asarray(picked.frame.image).astype(int)
    except BadFile as error:
        return str(error), None
    finally:
        module._decode = decode
    said = ["used"] + ["still image"] * picked.still + ["black bars cropped"] * picked.bars
    missing = 8 - len(found)
    said += [f"{missing} of 8 candidates: no frame there"] * bool(missing)
    said += [f"{n} {reason}" for reason, n in picked.fell_out.items() if not picked.still]
    return "; ".join(said), Seen(picked, image, found, packets)


def near(seen_colour, colour, most: float) -> None:
    assert np.abs(np.asarray(seen_colour).reshape(-1, 3).mean(0) - colour).max() <= most, (seen_colour,
         colour)


def corners(image: np.ndarray) -> np.ndarray:
    """The colours of the four quarters, 4 x 3, each as the mean of a patch near its corner."""
    h, w = (side // 8 for side in image.shape[:2])
    patches = [image[h:2 * h, w:2 * w], image[h:2 * h, -2 * w:-w], image[-2 * h:-h, w:2 * w],
               image[-2 * h:-h, -2 * w:-w]]
    return np.array([patch.reshape(-1, 3).mean(0) for patch in patches])


def shows(order=(0, 1, 2, 3), size=(WIDTH, HEIGHT), most=4.0, time_s=None):
    """The quarters have the scene's colours in this order, and the picture has this size (width, height)."""
    def then(_, seen: Seen) -> None:
        assert seen.image.shape[:2] == size[::-1], seen.image.shape
        off = np.abs(corners(seen.image) - CORNERS[list(order)]).max()
        assert off <= most, (off, corners(seen.image))
        if time_s is not None:
            assert abs(seen.picked.frame.time_s - time_s) < 0.001, seen.picked.frame
    return then


def few(packets: int, time_s: float):
    def then(folder, seen: Seen) -> None:
        shows(time_s=time_s, most=8)(folder, seen)
        assert seen.packets <= packets, seen.packets
    return then


TURNED = dict(size=(HEIGHT, WIDTH))
TURNS = [
    Case("phone video, filmed upright: turned right by its display matrix",
         makes(change=matrix(0, 1, -1, 0)), 0, "used", shows((2, 0, 3, 1), **TURNED)),
    Case("phone video, turned left", makes(change=matrix(0, -1, 1, 0)), 0, "used", shows((1, 3, 0, 2),
         **TURNED)),
    Case("phone video, upside down", makes(change=matrix(-1, 0, 0, -1)), 0, "used", shows((3, 2, 1, 0))),
    Case("front camera, mirrored by its display matrix", makes(change=matrix(-1, 0, 0, 1)), 0, "used",
         shows((1, 0, 3, 2))),
    Case("flipped top to bottom", makes(change=matrix(1, 0, 0, -1)), 0, "used", shows((2, 3, 0, 1))),
    Case("front camera, filmed upright and mirrored", makes(change=matrix(0, 1, 1, 0)), 0, "used",
         shows((0, 2, 1, 3), **TURNED)),
    Case("the same, to the other side", makes(change=matrix(0, -1, -1, 0)), 0, "used",
         shows((3, 1, 2, 0), **TURNED)),
    Case("a display matrix 5 degrees beside a quarter turn",
         makes(change=matrix(0.087, 0.996, -0.996, 0.087)), 0, "used", shows((2, 0, 3, 1), **TURNED)),
    Case("a display matrix of zeros", makes(change=matrix(0, 0, 0, 0)), 0, "used", shows()),
    Case("phone video in MOV", makes("a.mov", change=matrix(0, 1, -1, 0)), 0, "used", shows((2, 0, 3, 1),
         **TURNED)),
    Case("non-square pixels, 16:11 (PAL widescreen)", makes(pixel=Fraction(16, 11)), 0, "used",
         shows(size=(140, 64))),
    Case("non-square pixels, 8:9 (NTSC)", makes(pixel=Fraction(8, 9)), 0, "used", shows(size=(85, 64))),
    Case("non-square pixels and turned", makes(pixel=Fraction(2, 1), change=matrix(0, 1, -1, 0)), 0, "used",
         shows((2, 0, 3, 1), size=(64, 192))),
    Case("odd width and height", makes("a.mkv", lambda: scenes(width=97, height=65), codec="ffv1",
                                       pixels="yuv444p"),
         0, "used", shows(size=(97, 65))),
]


def woven(n=50) -> list[np.ndarray]:
    """Interlaced: the second field is half a frame later. A white bar moves 8 pixels a field."""
    def field(k: int) -> np.ndarray:
        rgb = scene(0)
        rgb[:, (8 * k) % 72:(8 * k) % 72 + 12] = 255
        return rgb
    made = []
    for i in range(n):
        rgb = field(2 * i)
        rgb[1::2] = field(2 * i + 1)[1::2]
        made.append(rgb)
    return made


def combs(image: np.ndarray) -> float:
    """How much neighbouring lines differ, against lines of the same field."""
    x = image.mean(axis=2)
    return np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean() / (np.abs(x[2:] - x[:-2]).mean() + 1)


def without_combs(_, seen: Seen) -> None:
    assert combs(seen.image) < 1, combs(seen.image)
    assert combs(woven()[5]) > 5
    near(seen.image[4:12, -4:], CORNERS[1], 5)


FIELDS = {"preset": "ultrafast", "crf": "8", "x264-params": "tff=1"}
SHAPES = [
    Case("interlaced, H.264", makes("a.ts", woven, options=FIELDS, fields=True), 0, "used", without_combs),
    Case("interlaced, MPEG-2", makes("a.mpg", woven, codec="mpeg2video", fields=True, rate=25,
                                     options={"b": "9000000", "flags": "+ildct+ilme"}), 0, "used*",
                                     without_combs),
    Case("interlaced, but it says that it is not", makes("a.mp4", woven, fields=True), 0, "used",
         without_combs),
]


# --- colours ------------------------------------------------------------------------------------------------

def says_colours(name: str, matrix_, full: bool, tags: tuple, **size):
    return makes(name, lambda: scenes(**size), matrix=matrix_, full=full, colours=tags)


# Light of BT.709 primaries in those of BT.2020, and the same of Display P3: BT.2087 and SMPTE EG 432-1
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1775, 0], [0.0332, 0.9668, 0], [0.0171, 0.0724, 0.9105]])


def linear(rgb: np.ndarray) -> np.ndarray:
    signal = rgb / 255
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def as_srgb(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pq(nits: np.ndarray) -> np.ndarray:
    y = np.clip(nits / 10000, 0, 1) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """Light of a display of 1000 cd/m2 -> signal: BT.2100's inverse OOTF and OETF."""
    light = nits / 1000
    luma = np.maximum(light @ np.array([0.2627, 0.6780, 0.0593]), 1e-6)[..., None]
    scene_light = light * luma ** (1 / 1.2 - 1)
    return np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light),
                    0.17883277 * np.log(np.maximum(12 * scene_light - 0.28466892, 1e-6)) + 0.55991073)


def hdr(transfer, highlight=1000.0):
    """The scenes with white at 203 cd/m2, and a patch in the upper row of `highlight` cd/m2."""
    def pictures() -> list[np.ndarray]:
        made = []
        for rgb in scenes():
            nits = 203 * linear(rgb) @ TO_2020.T
            nits[:8, 44:52] = highlight
            made.append(transfer(nits))
        return made
    return pictures


X265 = {"preset": "ultrafast", "crf": "8", "x265-params": "log-level=none"}


def tone_mapped(_, seen: Seen) -> None:
    """Colours below the knee stay as they are; white is light and has no hue; the highlight is lighter."""
    image = seen.image
    off = corners(image) - CORNERS
    assert np.abs(off[2]).max() <= 8 and np.abs(off).max() <= 26, off
    white = image[30:34, 46:50].reshape(-1, 3).mean(0)
    assert 215 <= white.min() and white.max() - white.min() <= 4, white
    highlight = image[2:6, 46:50].reshape(-1, 3).mean(0)
    assert highlight.min() >= 250, highlight


def hdr_video(name: str, transfer, number: int, **more):
    return makes(name, hdr(transfer, **more), codec="libx265", options=X265, bits=10, matrix=BT2020,
                 colours=(9, 1, 9, number))


def wide(to) -> list[np.ndarray]:
    return [as_srgb(linear(rgb) @ to.T) for rgb in scenes()]


COLOURS = [
    Case("8 bit, BT.601, as it says", says_colours("a.mp4", BT601, False, (6, 1, 6, 6)), 0, "used", shows()),
    Case("8 bit, BT.709, as it says", says_colours("a.mp4", BT709, False, (1, 1, 1, 1)), 0, "used", shows()),
    Case("8 bit, full range (phones, screen recorders)", says_colours("a.mp4", BT709, True, (1, 2, 1, 1)), 0,
         "used", shows()),
    Case("8 bit, full range, MJPEG: of 20 frames 8 are decoded", makes("a.avi", codec="mjpeg",
         pixels="yuvj420p",
                                           options={"b": "4000000"}),
         0, "used", few(8, 0.8)),
    Case("8 bit, full range, VP9", makes("a.webm", codec="libvpx-vp9", matrix=BT709, full=True, colours=(1, 2,
         1, 1),
                                         options={"crf": "8", "b": "4M", "deadline": "realtime",
                                                  "cpu-used": "8"}),
         0, "used", shows()),
    Case("8 bit, says nothing, small: BT.601", says_colours("a.mp4", BT601, False, ()), 0, "used", shows()),
    Case("8 bit, says nothing, HD: BT.709",
         makes("a.mp4", lambda: scenes(8, width=1280, height=720), matrix=BT709), 0,
         "used; 3 of 8 candidates: no frame there*", shows(size=(1280, 720))),
    Case("10 bit HDR: PQ (HDR10), BT.2020", hdr_video("a.mp4", pq, 16), 0, "used*", tone_mapped),
    Case("10 bit HDR: HLG (phones), BT.2020", hdr_video("a.mp4", hlg, 18), 0, "used*", tone_mapped),
    Case("10 bit, BT.2020 without HDR", makes("a.mp4", lambda: wide(TO_2020), codec="libx265", options=X265,
                                              bits=10,
                                             matrix=BT2020, colours=(9, 1, 9, 14)), 0, "used", shows(most=6)),
    Case("Display P3 (phones)", makes("a.mp4", lambda: wide(TO_P3), matrix=BT709, colours=(1, 1, 12, 1)), 0,
         "used", shows(most=6)),
    Case("Dolby Vision, profile 5: its colours mean nothing to other players",
         makes("a.mp4", change=put(b"stsd", 12, b"dvav")), 2, "Dolby Vision without a picture*"),
    Case("RGB, lossless", makes("a.mkv", codec="ffv1", pixels="bgr0"), 0, "used", shows()),
    Case("4:4:4, 10 bit", makes("a.mkv", codec="ffv1", pixels="yuv444p10le"), 0, "used", shows()),
    Case("gray", makes("a.mkv", codec="ffv1", pixels="gray"), 0, "used",
         lambda _, seen: near(seen.image[8, 8], np.full(3, 86.7), 4)),
]


# --- times, and files that are not whole --------------------------------------------------------------------

def at(seen: Seen, asked_s: float) -> float:
    """The time stamp of the frame that was taken for a time."""
    return next(frame.time_s for frame in seen.frames if abs(frame.asked_s - asked_s) < 1e-6)


def times_are(expected: dict[float, float]):
    def then(_, seen: Seen) -> None:
        found = {asked: round(at(seen, asked), 3) for asked in expected}
        assert found == pytest.approx(expected, abs=0.002), found
    return then


def all_in_colour(_, seen: Seen) -> None:
    """No candidate is gray mush or patched: each is one of the scenes in every block of 8 x 8."""
    for frame in seen.frames:
        image = np.asarray(frame.image).astype(int)
        off = np.array([np.abs(image - rgb).mean(axis=2) for rgb in scenes(60)])
        blocks = off.reshape(60, HEIGHT // 8, 8, WIDTH // 8, 8).mean(axis=(2, 4)).max(axis=(1, 2))
        assert blocks.min() <= 16, (frame, blocks.min())


def before(time_s: float):
    def then(folder, seen: Seen) -> None:
        all_in_colour(folder, seen)
        assert all(frame.time_s < time_s for frame in seen.frames), seen.frames
    return then


GOPS = {"preset": "ultrafast", "crf": "8", "g": "5"}
ONE_GOP = {"preset": "veryfast", "crf": "8", "g": "250"}


def four_hours(path: Path) -> Path:
    """A frame every two seconds, a keyframe every 20."""
    pictures = [scene(i) for i in range(24)]
    video(path / "a.mkv", [pictures[i % 24] for i in range(7200)], codec="mpeg4", options={"b": "4000000",
         "g": "10"},
          pts=range(0, 10**8, 2000))
    return path / "a.mkv"


def damaged(at_share: float, n: int, after=b"mdat"):
    """Overwrite n bytes in the middle of the frames."""
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        place = content.index(after) + int((len(content) - content.index(after)) * at_share)
        content[place:place + n] = np.random.default_rng(0).integers(0, 256, n, dtype=np.uint8).tobytes()
        path.write_bytes(content)
    return change


def without(start: int, n: int):
    """Leave out n bytes."""
    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:start] + content[start + n:])
    return change


FAST = {"movflags": "faststart"}
# the times of the frames: none for 0.7 s, then five at once
UNEVEN = [0, 100, 800, 820, 840, 860, 880, 1000, 1500, 1600, 1990]
TIMES = [
    Case("variable frame rate: the frame that is shown at that time", makes(pictures=lambda: scenes(11),
         pts=UNEVEN), 0,
         "used; 4 near-duplicate", times_are({0.125: 0.1, 0.375: 0.1, 0.625: 0.1, 0.875: 0.86, 1.125: 1.0,
                                              1.375: 1.0,
                                        1.625: 1.6, 1.875: 1.6})),
    Case("the same in Matroska", makes("a.mkv", lambda: scenes(11), pts=UNEVEN), 0,
         "used; 4 near-duplicate", times_are({0.125: 0.1, 0.625: 0.1, 0.875: 0.86, 1.875: 1.6})),
    Case("picture begins later than the sound",
         makes("a.mkv", change=with_tracks(sound_s=3, video_from_s=1.0)), 0,
         "used; 4 of 8 candidates: no frame there",
         times_are({1.125: 1.1, 1.875: 1.8})),
    Case("sound begins later than the picture", makes("a.mkv", change=with_tracks(sound_from_s=1.0)), 0,
         "used", times_are({0.125: 0.1, 1.875: 1.8})),
    Case("picture ends before the sound", makes("a.mkv", lambda: scenes(10), change=with_tracks()), 0,
         "used; 2 of 8 candidates: no frame there*", before(1.0)),
    Case("moov at the end of the MP4", makes(), 0, "used", shows(time_s=0.8)),
    Case("moov at the start", makes(container=FAST), 0, "used", shows(time_s=0.8)),
    Case("fragmented MP4, as streams are recorded", makes(container={"movflags": "frag_keyframe+empty_moov"},
                                                         options=GOPS), 0, "used", shows(time_s=0.8)),
    Case("cut off in the middle, moov at the start", makes(container=FAST, options=GOPS, change=cut_to(0.6)),
         0,
         "used; * of 8 candidates: no frame there*", before(1.3)),
    Case("cut off in the middle, moov at the end", makes(change=cut_to(0.6)), 2,
         "truncated: *"),
    Case("cut off in the middle, Matroska", makes("a.mkv", options=GOPS, change=cut_to(0.6)), 0,
         "used; * of 8 candidates: no frame there*", before(1.3)),
    Case("cut off in the middle, MPEG transport stream", makes("a.ts", options=GOPS, change=cut_to(0.6)), 0,
         "used; * of 8 candidates: no frame there*", before(1.3)),
    Case("cut off in the middle, WebM (VP8)",
         makes("a.webm", codec="libvpx", options={"crf": "8", "b": "2M", "deadline": "realtime",
                                                  "cpu-used": "8", "g": "5"},
               change=cut_to(0.6)), 0, "used; * of 8 candidates: no frame there*", before(1.3)),
    Case("bytes overwritten in the middle: the frames made from them fall out",
         makes(container=FAST, options=GOPS, change=damaged(0.5, 600)), 0,
         "used; * of 8 candidates: no frame there*", all_in_colour),
    Case("bytes overwritten, MPEG-4", makes("a.avi", codec="mpeg4", options={"b": "4000000", "g": "5"},
                                            change=damaged(0.5, 600, b"movi")), 0,
                                            "used*", all_in_colour),
    Case("the first frame is no keyframe (a cut stream), H.264",
         makes("a.ts", options={"preset": "ultrafast", "crf": "8", "g": "10"}, change=remuxed(lambda i,
              p: i >= 4)), 0,
         "used; * of 8 candidates: no frame there*", all_in_colour),
    Case("the first frame is no keyframe, MPEG-2",
         makes("a.ts", lambda: scenes(50), codec="mpeg2video", rate=25, options={"b": "4000000", "g": "20"},
               change=remuxed(lambda i, p: i >= 4)), 0, "used; * of 8 candidates: no frame there*",
               all_in_colour),
    Case("the first frame is no keyframe, MPEG-4 in Matroska",
         makes("a.mkv", codec="mpeg4", options={"b": "4000000", "g": "10"}, change=remuxed(lambda i,
              p: i >= 4)), 0,
         "used; * of 8 candidates: no frame there*", all_in_colour),
    Case("no keyframe at all", makes("a.mkv", codec="mpeg4", options={"b": "4000000", "g": "50"},
                                     change=remuxed(lambda i, p: i >= 4)), 2,
                                     "no frame of its video can be decoded*"),
    Case("packets of a transport stream are lost in the middle",
         makes("a.ts", options=GOPS, change=without(188 * 20, 188 * 4)), 0,
         "used; * of 8 candidates: no frame there*", all_in_colour),
    Case("an MP4 that calls every frame a keyframe, MPEG-4",
         makes(codec="mpeg4", options={"b": "4000000", "g": "50"}, change=changed((b"stss", b"free"))), 0,
         "used",
         all_in_colour),
    Case("an MP4 that calls every frame a keyframe, H.264", makes(options=ONE_GOP, change=changed((b"stss",
         b"free"))),
         0, "used", all_in_colour),
    Case("a file of four hours: only the window is decoded",
         lambda d: (four_hours(d), dict(start_s=14001.0, length_s=16.0)), 0, "used", few(20, 14008.0)),
    Case("one frame, under a sound", makes("a.mkv", lambda: scenes(1), change=with_tracks()), 0,
         "used; still image",
         shows(time_s=0.0)),
    Case("zero bytes", lambda d: (d / "a.mp4").write_bytes(b"") or d / "a.mp4", 2,
         "not a file that FFmpeg reads*"),
    Case("a header without frames", makes(container=FAST, change=lambda p: p.write_bytes(
        p.read_bytes()[:p.read_bytes().index(b"mdat") + 4])), 2, "no frame of its video can be decoded*"),
    Case("a text named .mp4", lambda d: (d / "a.mp4").write_text("no video\n" * 99) and d / "a.mp4", 2,
         "not a file that FFmpeg reads*"),
]


# --- tracks -------------------------------------------------------------------------------------------------

def only_sound(d: Path) -> Path:
    with wave.open(str(d / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(32000))
    return d / "a.wav"


def sound_with_cover(d: Path) -> Path:
    """An MP3 with a picture of its album."""
    cover = io.BytesIO()
    Image.new("RGB", (200, 200), "magenta").save(cover, "JPEG")
    apic = b"\0image/jpeg\0\3\0" + cover.getvalue()
    frame = b"APIC" + struct.pack(">I", len(apic)) + b"\0\0" + apic
    size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
    with av.open(str(d / "b.mp3"), "w") as out:
        stream = out.add_stream("libmp3lame", rate=16000)
        block = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), "s16p", "mono")
        block.rate = 16000
        out.mux(stream.encode(block))
        out.mux(stream.encode())
    (d / "a.mp3").write_bytes(b"ID3\3\0\0" + size + frame + (d / "b.mp3").read_bytes())
    return d / "a.mp3"


def with_alpha(i: int) -> np.ndarray:
    """The scene, whose left half is transparent over hidden black."""
    rgba = np.dstack([scene(i), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[:, :WIDTH // 2] = 0
    return rgba


def on_white(_, seen: Seen) -> None:
    found = corners(seen.image)
    assert np.abs(found[[0, 2]] - 255).max() <= 4 and np.abs(found[[1, 3]] - CORNERS[[1,
         3]]).max() <= 8, found


def alpha(name: str, codec: str, pixels: str, **options):
    return makes(name, lambda: [with_alpha(i) for i in range(20)], codec=codec, pixels=pixels,
                 options=options)


TRACKS = [
    Case("no video track", only_sound, 2, "no video in it"),
    Case("a sound with the picture of its album", sound_with_cover, 2, "no video in it"),
    Case("a video with a cover picture", makes("a.mkv", change=with_tracks(cover=True)), 0, "used", shows()),
    Case("with subtitles: they are not in the picture", makes("a.mkv", change=with_tracks(lines=True)), 0,
         "used",
         shows()),
    Case("two video tracks: the default one", makes("a.mkv", change=with_tracks(second=True)), 0, "used",
         shows()),
    Case("transparent, VP9: it lies on white", alpha("a.webm", "libvpx-vp9", "yuva420p", crf="8", b="2M",
                                                     **{"deadline": "realtime", "cpu-used": "8"}), 0, "used",
                                                     on_white),
    Case("transparent, VP8", alpha("a.webm", "libvpx", "yuva420p", crf="8", b="2M", **{
        "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}), 0, "used", on_white),
    Case("transparent, ProRes 4444", alpha("a.mov", "prores_ks", "yuva444p10le", profile="4"), 0, "used",
         on_white),
    Case("transparent, QuickTime RLE", alpha("a.mov", "qtrle", "argb"), 0, "used", on_white),
]


# --- black bars, and candidates that fall out ---------------------------------------------------------------

def barred(top=0, bottom=0, left=0, right=0, level=0, n=20, mark=False):
    """The scenes inside bars of these sizes. mark: a channel's sign in the upper bar of some frames."""
    def pictures() -> list[np.ndarray]:
        made = []
        for rgb in scenes(n):
            whole = np.full((HEIGHT + top + bottom, WIDTH + left + right, 3), level, np.uint8)
            whole[top:top + HEIGHT, left:left + WIDTH] = rgb
            if mark:
                whole[2:6, 4:12] = 200
            made.append(whole)
        return made
    return pictures


def lossy(**bars):
    return makes(pictures=barred(**bars), options={"preset": "veryfast", "crf": "23"})


def night(i: int) -> np.ndarray:
    """A dark scene: a lamp in the middle, whose light fades to black towards the edges."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    light = 255 * np.exp(-((x - 48 - 2 * np.sin(i)) ** 2 + (y - 32) ** 2) / 120)
    return np.repeat(light[..., None], 3, 2).astype(np.uint8)


def night_window(i: int) -> np.ndarray:
    """A dark room: black, but for a lit window that is not as wide as the picture."""
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[20:44, 30:60] = scene(i, 30 * 2, 24 * 2)[::2, ::2]
    return rgb


def only(kinds: str):
    """One picture a letter, 0.25 s each: . the scene, b black, w white, g a flat gray, s the scene blurred,
    n dark noise, f one scene again and again."""
    def pictures() -> list[np.ndarray]:
        made = []
        for i, kind in enumerate(kinds):
            rgb = scene(i)
            if kind == "s":
                rgb = np.asarray(Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(5)))
            if kind in "bwg":
                rgb = np.full_like(rgb, {"b": 0, "w": 255, "g": 119}[kind])
            if kind == "n":
                rgb = np.random.default_rng(i).integers(0, 12, rgb.shape, dtype=np.uint8)
            if kind == "f":
                rgb = scene(kinds.index("f"))
            made.append(rgb)
        return made
    return makes(pictures=pictures, pts=range(0, 250 * len(kinds), 250))


def with_flag(make, **how):
    return lambda folder: (make(folder), how)


def taken(time_s: float):
    def then(_, seen: Seen) -> None:
        assert abs(seen.picked.frame.time_s - time_s) < 0.001, seen.picked.frame
    return then


def same_size(_, seen: Seen) -> None:
    assert seen.image.shape == (HEIGHT, WIDTH, 3)


def tall(_, seen: Seen) -> None:
    """Only the lower bar is cropped."""
    assert seen.image.shape == (HEIGHT + 12, WIDTH, 3)


def darkness(image: Image.Image) -> float:
    """A score for the tests: how dark the stripes are."""
    return -float(np.asarray(image)[24:40].mean())


def darkest(_, seen: Seen) -> None:
    scores = [darkness(frame.image) for frame in seen.frames]
    assert seen.picked.frame is seen.frames[int(np.argmax(scores))] is not seen.frames[3]


BARS = [
    Case("letterbox", lossy(top=12, bottom=12), 0, "used; black bars cropped", shows(most=8)),
    Case("pillarbox: a phone video in a wide frame", lossy(left=40, right=40), 0, "used; black bars cropped*",
         shows(most=8)),
    Case("bars on all sides", lossy(top=12, bottom=12, left=20, right=20), 0, "used; black bars cropped",
         shows(most=8)),
    Case("bars that are not quite black", lossy(top=12, bottom=12, level=14), 0, "used; black bars cropped",
         shows(most=8)),
    Case("a bar on one side only", lossy(bottom=16), 0, "used; black bars cropped", shows(most=8)),
    Case("bars, filmed upright", makes(pictures=barred(left=16, right=16), change=matrix(0, 1, -1, 0)), 0,
         "used; black bars cropped", shows((2, 0, 3, 1), **TURNED)),
    Case("a sign in the bar: it stays, and so does that bar", lossy(top=12, bottom=12, mark=True), 0,
         "used; black bars cropped", tall),
    Case("a dark scene is not cropped", makes(pictures=lambda: [night(i) for i in range(20)]), 0, "used*",
         same_size),
    Case("a lit window in the dark is not cropped",
         makes(pictures=lambda: [night_window(i) for i in range(20)]), 0,
         "used*", same_size),
]
CANDIDATES = [
    Case("the middle one of 8", only("........"), 0, "used", taken(0.75)),
    Case("black in the middle: the nearest that is not", only("..bbbb.."), 0, "used; 4 black", taken(0.25)),
    Case("black with the noise of a codec", only(".nnnn..."), 0, "used; 4 black", taken(1.25)),
    Case("blank: one colour, as behind a title", only("..wggw.."), 0, "used; 4 blank", taken(0.25)),
    Case("blurred, in motion or out of focus", only("...s...."), 0, "used; 1 blurred", taken(1.0)),
    Case("near-duplicates of another", only("..fff..."), 0, "used; 2 near-duplicate", taken(0.75)),
    Case("black from start to end", only("bbbbbbbb"), 2, "only black or blank frames"),
    Case("black and blank", only("bbbbwwgg"), 2, "only black or blank frames"),
    Case("one picture under music", only("ffffffff"), 0, "used; still image", taken(0.75)),
    Case("one picture under music, after a black start", only("bfffffff"), 0, "used; still image",
         taken(0.75)),
    Case("slides: two pictures are no still image", only("ffff...."), 0, "used; 3 near-duplicate"),
    Case("`--pick loudest`", with_flag(only("........"), how="loudest", loudest_s=1.6), 0, "used",
         taken(1.5)),
    Case("`--pick loudest`, black there", with_flag(only("......b."), how="loudest", loudest_s=1.6), 0,
         "used; 1 black", taken(1.25)),
    Case("`--pick siglip`: the best by the judge", with_flag(only("........"), how="siglip", score=darkness),
         0,
         "used", darkest),
]


# --- names, and files that would have FFmpeg open others ----------------------------------------------------

def named(name: str):
    """A video of that name, given as it stands in its folder, and beside it what it must not be taken for."""
    def make(d: Path) -> Path:
        makes("plain.mp4", scenes(5))(d)
        makes("b.mp4")(d).rename(d / name)
        (d / "a0.mp4").write_bytes(b"")
        return d / name
    return make


def pointing(name: str, text: str):
    """A text by which a player would open plain.mp4, which lies beside it."""
    def make(d: Path) -> Path:
        makes("plain.mp4")(d)
        (d / name).write_text(text.replace("DIR", str(d)))
        return d / name
    return make


M3U8 = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nplain.mp4\n#EXT-X-ENDLIST\n"
SDP = ("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
       "a=rtpmap:96 H264/90000\n")
DASH = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S">
<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>plain.mp4</BaseURL>
</Representation></AdaptationSet></Period></MPD>"""
NAMES = [
    *(Case(f"a name {what}: `{name}`".replace("|", "\\|"), named(name), 0, "used", shows(time_s=0.8))
      for what, name in (
        ("in Unicode", "Übung 日本 🐕.mp4"), ("with a dash in front", "-i.mp4"), ("like an address",
             "http:a.mp4"),
        ("like a list of FFmpeg's", "concat:a0.mp4|plain.mp4"), ("like a pattern", "a%d.mp4"),
        ("like a device", "pipe:0.mp4"), ("with quotes and spaces", "it's \"a\" b.mp4"), ("without an end",
             "a"),
        ("of another kind", "a.jpg"))),
    Case("a playlist (HLS) named .mp4 opens nothing", pointing("a.mp4", M3U8), 2,
         "a playlist*"),
    Case("a list of FFmpeg's (ffconcat)", pointing("a.mp4", "ffconcat version 1.0\nfile 'DIR/plain.mp4'\n"),
         2,
         "a playlist*"),
    Case("a session description (SDP)", pointing("a.sdp", SDP), 2, "a playlist*"),
    Case("a manifest (DASH)", pointing("a.mpd", DASH), 2, "XML*"),
    Case("a folder", lambda d: (d / "a.mp4").mkdir() or d / "a.mp4", 2, "cannot be read*"),
    Case("no such file", lambda d: d / "a.mp4", 2, "cannot be read*"),
]


GROUPS = {"Turns and shapes of videos": TURNS + SHAPES, "Colours of videos": COLOURS,
          "Times, and videos that are not whole": TIMES, "Tracks": TRACKS,
          "Bars, and candidates that fall out": BARS + CANDIDATES, "Names": NAMES}


@pytest.mark.parametrize("case", [case for cases in GROUPS.values() for case in cases], ids=str)
def test_case(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = case.make(tmp_path)
    path, how = made if isinstance(made, tuple) else (made, {})
    said, seen = see(Path(path.name), **how)  # as a name that FFmpeg might misread
    assert (seen is None) == (case.code == 2), said
    assert re.fullmatch(pattern(case.says, tmp_path), said), said
    if case.then:
        case.then(tmp_path, seen)


CODECS = {
    "h264.mp4": ("libx264", {"crf": "20", "g": "12", "bf": "3", "b-pyramid": "normal"}),
    "h264.ts": ("libx264", {"crf": "20", "x264-params": "keyint=10:open-gop=1:bframes=4"}),
    "hevc.mkv": ("libx265", X265 | {"preset": "faster"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "9"}),
    "av1.mkv": ("libsvtav1", {"preset": "13"}),
    "mpeg4.avi": ("mpeg4", {"b": "4000000", "g": "7"}), "mjpeg.mov": ("mjpeg", {"b": "4000000"})}


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_of_a_whole_decoding(name, tmp_path):
    """Bit for bit, though frames that nobody needs are not decoded."""
    codec, options = CODECS[name]
    path = makes(name, scenes(45), codec=codec, options=options,
                 pixels="yuvj420p" if codec == "mjpeg" else None)(tmp_path)
    with av.open(str(path)) as container:
        first = container.streams.video[0].start_time * float(container.streams.video[0].time_base)
        whole = [(frame.time - first, frame.to_ndarray()) for frame in container.decode(video=0)]
    for start_s, length_s in ((0.0, 4.5), (1.3, 1.0), (3.6, 0.9), (0.0, 0.4)):
        found = read_frames(path, candidate_times(start_s, length_s))
        assert len(found) == 8
        for frame in found:
            time_s, pixels = max((pair for pair in whole if pair[0] <= frame.asked_s + 1e-6),
                                 key=lambda p: p[0])
            assert frame.time_s == pytest.approx(time_s, abs=1e-3)
            assert np.array_equal(frame.decoded.to_ndarray(), pixels)


def test_only_the_wanted_part_of_a_long_file_is_read(tmp_path):
    path = makes("a.mkv", [scene(i) for i in range(24)] * 40, codec="mjpeg", pixels="yuvj420p",
                 options={"b": "4000000"}, pts=range(0, 10**8, 2000))(tmp_path)
    with open("/proc/self/io") as file:
        before_ = int(file.readline().split()[1])
    read_frames(path, candidate_times(500.0, 10.0))
    with open("/proc/self/io") as file:
        read = int(file.readline().split()[1]) - before_
    assert read < path.stat().st_size / 3, (read, path.stat().st_size)


def test_times_far_apart_and_in_any_order(tmp_path):
    """Times far apart, in any order, and one twice: each has its frame."""
    path = makes("a.mkv", [scene(i) for i in range(24)] * 5, codec="mpeg4", options={"b": "4000000",
         "g": "10"},
                 pts=range(0, 10**8, 2000))(tmp_path)
    asked = [200.5, 3.0, 120.0, 3.0]
    assert [round(frame.time_s, 3) for frame in read_frames(path, asked)] == [200.0, 2.0, 120.0, 2.0]
