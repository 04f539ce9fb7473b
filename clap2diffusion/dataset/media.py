"""Sounds of the containers that libsndfile does not read (MP4, WebM, Matroska, AVI, AMR ...), read by PyAV.

FFmpeg hides what is missing: a cut file just ends. So the end is looked for and compared with what the
container says. Samples are placed by their time stamps: t = 0 is where the file begins for a player, that is
with the earlier of its sound and its picture.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from clap2diffusion.dataset.containers import NO_LENGTH, BadFile, missing_part, no_media

LAST_S = 0.3  # of a sound is decoded to see where it ends
LEAD_S = 1.0  # decoded before a window: codecs need the packets before (Opus 80 ms, an MP3 up to 10 frames)
GAP_S = 0.03  # time stamps that differ less from the count of samples are taken for jitter
END_S = 0.1  # a sound may end so much before what the container says
BACK_S = (1, 4, 16, 64, 256, 1024, 4096, 16384)  # steps back from a place where nothing can be read
RAW_FORMATS = {"aac", "ac3", "eac3", "dts", "amr", "amrnb", "amrwb", "loas", "truehd", "spdif"}
COUNTED_FORMATS = RAW_FORMATS | {"wav"}  # without time stamps; FFmpeg's own count drifts, or it seeks wrongly
NO_LENGTH_FORMATS = RAW_FORMATS | {"mpegts", "mpeg", "nut"}
MATROSKA_DURATION = (b"D\x89\x84", b"D\x89\x88")  # of 4 or 8 bytes
DRM = "encrypted (DRM): only its own player decodes it; use a copy that is not"
ENCRYPTED = {"enca", "encv", "drms", "drmi", "aavd"}


class Unread(BadFile):
    """A file of no format that FFmpeg knows."""


def _refuse(*_args, **_options):
    raise PermissionError("a file may not open another one")


@contextlib.contextmanager
def open_container(path: str | Path) -> Iterator:
    """Open what FFmpeg reads, for reading: an av.container.InputContainer. FFmpeg sees neither the name nor
    any other file, so a playlist opens nothing. Raises BadFile."""
    import av
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            start = file.read(256)
        except OSError as error:
            raise BadFile(f"cannot be read ({error.strerror})") from None
        if reason := no_media(start):
            raise BadFile(reason)
        file.seek(0)
        try:
            container = stack.enter_context(av.open(
                _Nameless(file), "r", metadata_errors="replace", io_open=_refuse,
                container_options={"protocol_whitelist": "none"}))
        except (av.FFmpegError, OSError, ValueError) as error:
            if reason := missing_part(Path(path)):
                raise BadFile(reason) from None
            raise Unread(f"not a file that FFmpeg reads ({getattr(error, 'strerror', error)})") from None
        yield container


class _Nameless:
    """A file without its name, which FFmpeg would judge the format by. Its methods are the file's own: a
    signal that arrives while FFmpeg calls them waits until FFmpeg is done."""

    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _chosen(streams):
    from av.stream import Disposition
    return next((s for s in streams if s.disposition & Disposition.default), streams[0] if streams else None)


def sound_stream(container):
    """The sound track that players play: the one flagged as default, else the first. None without one."""
    return _chosen(container.streams.audio)


def video_stream(container):
    """The picture track that players show, by the same rule. A cover picture is none."""
    from av.stream import Disposition
    return _chosen([s for s in container.streams.video if not s.disposition & Disposition.attached_pic])


def codec_tag(stream) -> str:
    """The four letters by which a container names a codec, "" where they are none."""
    with contextlib.suppress(UnicodeDecodeError):
        return stream.codec_tag if stream.codec_context is not None else ""
    return ""


def _start_s(stream) -> float | None:
    if stream is None or stream.start_time is None:
        return None
    return float(stream.start_time * stream.time_base)


def origin_s(container) -> float:
    """The time stamp, in seconds, that is t = 0 of the file: that of its earliest sample that is heard or
    picture that is shown, in the tracks of sound_stream() and video_stream(). It moves the container's place:
    seek afterwards."""
    starts = [_start_s(video_stream(container))]
    if (stream := sound_stream(container)) is not None and stream.codec_context is not None:
        first = next((frame for packet in _packets(container, stream) for frame in _decode(packet)[0]), None)
        starts.append(float(first.pts * first.time_base) if first and first.pts is not None else None)
    return min((start for start in starts if start is not None), default=0.0)


def _packets(container, stream) -> Iterator:
    """The packets of a stream from the container's place on. Ends where it cannot be read on."""
    import av
    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


def _decode(packet) -> tuple[list, bool]:
    """The frames of a packet, and whether it is damaged."""
    import av
    try:
        frames = packet.decode()
        return frames, packet.is_corrupt or any(frame.is_corrupt for frame in frames)
    except av.FFmpegError:
        return [], True


# FFmpeg's names of sample formats -> numpy's types
SAMPLES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}


def _samples(frame, channels: int, dtype: str) -> np.ndarray:
    """The samples of a decoded frame, (samples, channels), in [-1, 1]."""
    own, kind = frame.layout.nb_channels, SAMPLES[frame.format.name.removesuffix("p")]
    if frame.format.is_planar:
        block = np.stack([np.frombuffer(plane, kind, frame.samples) for plane in frame.planes], axis=1)
    else:
        block = np.frombuffer(frame.planes[0], kind, frame.samples * own).reshape(-1, own)
    block = block.astype(dtype)
    if kind[0] != "f":
        full = 2.0 ** (8 * int(kind[1]) - 1)
        block = (block - full) / full if kind == "u1" else block / full
    # as where a broadcast changes to surround sound
    return block if own == channels else block.mean(1, keepdims=True).repeat(channels, 1)


def _places(times: list[float], lengths: list[int], tick: float, gap: float, base: int) -> list[int]:
    """Where each of the frames that follow each other begins. All in samples; a time is NaN where none is
    given. Times are rounded to ticks (1 ms in Matroska), so frames are counted, and the whole stretch lies
    where it fits the times best, and if all frames have one size, on the grid of that size through `base`. A
    new stretch begins where a time is further than `gap` from the count: samples are missing, or twice
    there."""
    counts, sizes = np.cumsum([0, *lengths]), {*lengths[1:-1]}
    grid = sizes.pop() if len(sizes) == 1 else 0
    starts, first, places, end = np.asarray(times) - counts[:-1], 0, [], 0
    while first < len(lengths):
        known = np.flatnonzero(~np.isnan(starts[first:])) + first
        far = [k for k in known if abs(starts[k] - starts[known[0]]) > gap]
        last = far[0] if far else len(lengths)
        fits = starts[known[known < last]]
        place = end - counts[first]
        if len(fits):
            low, high = fits.max() - tick / 2, fits.min() + tick / 2
            place = (low + high) / 2 if low <= high else np.median(fits)
            border = place + counts[first + 1]  # the first frame may have lost its begin to an edit list
            snapped = base + round((border - base) / grid) * grid if grid > 2 * tick else border
            if abs(snapped - border) <= tick:
                place += snapped - border
        places += [round(float(place)) + int(count) for count in counts[first:last]]
        first, end = last, places[-1] + lengths[last - 1]
    return places


class MediaSound:
    """The chosen sound track of a container, as decoding.Sound is of a file that libsndfile reads. `frames`
    is its length from t = 0, `open_end` why nothing shows that it is whole, or "", `notes` what is odd
    about it: (kind, detail)."""

    format, extra_info = "FFMPEG", ""

    def __init__(self, path: Path, open_end=""):
        """Opens it, decodes its first frame and its end. Raises BadFile."""
        self.path, self.notes, self.open_end = path, [], open_end
        self._stack, self._at_start = contextlib.ExitStack(), True
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._stack.close)
            self._open()
            self._read_start()
            self._find_end()
            on_error.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self._stack.close()

    def _open(self) -> None:
        from av.stream import Discard
        self._stack.close()
        self.container, self._at_start = self._stack.enter_context(open_container(self.path)), True
        self.stream = sound_stream(self.container)
        if self.stream is None:
            raise BadFile(missing_part(self.path) or "has no sound track")
        if codec_tag(self.stream) in ENCRYPTED:
            raise BadFile(DRM)
        if self.stream.codec_context is None:
            raise BadFile("its sound track is in a codec that FFmpeg cannot decode")
        self.stream.codec_context.thread_count = 1
        for other in self.container.streams:
            if other is not self.stream:
                other.discard = Discard.all

    def _read_start(self) -> None:
        frame, damaged = None, 0
        self._at_start = False
        for packet in _packets(self.container, self.stream):
            if packet.has_sidedata("encryption_info"):
                raise BadFile(DRM)
            frames, failed = _decode(packet)
            damaged += failed
            if frame := next(iter(frames), None):
                break
        if frame is None:
            raise BadFile("damaged: none of its sound can be decoded" if damaged else
                          "zero length: a header without samples")
        self.samplerate, self.channels = frame.sample_rate, frame.layout.nb_channels
        self.subtype = "DOUBLE" if frame.format.name.startswith("dbl") else self.stream.codec_context.name
        # Samples in a unit of the time stamps, and the time stamp of t = 0, in samples.
        self._unit, self._origin = float(self.stream.time_base) * self.samplerate, 0.0
        begin = 0.0 if frame.pts is None else self._place(frame.pts)
        picture = _start_s(video_stream(self.container))
        self._origin = min(begin, begin if picture is None else picture * self.samplerate)
        self._tick = max(1.0, self._unit)
        self._begin = round(begin - self._origin)
        self._base = self._begin + frame.samples
        self._counted = frame.samples if self.container.format.name in COUNTED_FORMATS else 0
        self.late_s = (begin - self._origin) / self.samplerate
        tracks = len(self.container.streams.audio)
        if tracks > 1:
            self.notes.append(("several sound tracks", f"{tracks}; the default one, stream "
                               f"{self.stream.index}, is used"))
        if self.late_s > END_S:
            self.notes.append(("sound begins later than the picture",
                               f"by {self.late_s:.2f} s; silent until then"))

    def _place(self, time_stamp: int | None) -> float:
        """A time stamp of the sound track in samples from t = 0; NaN for none."""
        return np.nan if time_stamp is None else time_stamp * self._unit - self._origin

    def _seek(self, place: float) -> Iterator:
        """The packets from `place`, in samples, or before it, on."""
        import av
        for back_s in (0, *BACK_S):
            second = place / self.samplerate - back_s
            if second <= 0:
                break
            self._at_start = False
            with contextlib.suppress(av.FFmpegError):
                self.container.seek(int((second * self.samplerate + self._origin) / self._unit),
                                    stream=self.stream)
                packets = _packets(self.container, self.stream)
                first = next(packets, None)
                if first is not None and self._place(first.pts) <= place:
                    return chain([first], packets)
        if not self._at_start:
            self._open()
        self._at_start = False
        return _packets(self.container, self.stream)

    def _read(self, start: float, stop: float) -> tuple[list[int], list, dict[float, str]]:
        """The frames from `start` or before it to `stop`: their places, themselves, and where there are
        packets that cannot be used, with the reason, which has a {} for the second. Places are in samples."""
        times, frames, damaged, place = [], [], {}, np.nan
        for n, packet in enumerate(self._seek(0 if self._counted else start)):
            here = n * self._counted if self._counted else self._place(packet.pts)
            if packet.size and here + (self._counted or (packet.duration or np.inf) * self._unit) <= start:
                continue
            decoded, failed = _decode(packet)
            place = here if not np.isnan(here) else place
            if failed:
                damaged[place] = "damaged: its sound at {:.1f} s cannot be decoded"
            for frame in decoded:
                if frame.sample_rate != self.samplerate:  # or where it was sought lies within a packet
                    damaged[place] = (f"its sampling rate changes from {self.samplerate} to "
                                      f"{frame.sample_rate} Hz at {{:.1f}} s")
                    continue
                times.append(here if self._counted else self._place(frame.pts))
                frames.append(frame)
            if times and times[-1] >= stop + GAP_S * self.samplerate:
                break
        lengths = [frame.samples for frame in frames]
        gap = max(GAP_S * self.samplerate, 1.5 * self._tick)
        return _places(times, lengths, self._tick, gap, self._base), frames, damaged

    def _said_end(self, kinds: set[str], lacking: str | None) -> tuple[float | None, bool]:
        """Where the container says that the sound ends, in samples from t = 0, or None where it has no
        length; and whether it says so of the sound alone, not of the file. kinds: FFmpeg's names of its
        format. lacking: missing_part() of it."""
        if kinds & NO_LENGTH_FORMATS:
            return None, False
        with open(self.path, "rb") as file:  # without a length FFmpeg guesses one from the bit rate
            head = file.read(1 << 16)
        if ("matroska" in kinds and not any(mark in head for mark in MATROSKA_DURATION)
                or kinds & {"avi", "asf"} and lacking is None):
            return None, False
        if (duration := self.stream.duration) is not None:
            alone = bool(kinds & {"mov", "avi"}) or video_stream(self.container) is None
            return self._place((self.stream.start_time or 0) + duration), alone
        if self.container.duration is None:
            return None, False
        end_s = (self.container.duration + (self.container.start_time or 0)) / 1e6
        return end_s * self.samplerate - self._origin, video_stream(self.container) is None

    def _find_end(self) -> None:
        """Find where the sound ends, and compare it with what the container says. Raises BadFile."""
        kinds = {*self.container.format.name.split(",")}
        lacking = None if "mov" in kinds else missing_part(self.path)  # an MP4's index says more
        said, alone = self._said_end(kinds, lacking)
        guess, rate = said, self.samplerate
        if guess is None:
            guess = (self.container.duration or 0) / 1e6 * rate
            if not guess:
                for packet in self._seek(0):
                    if packet.pts is not None:
                        guess = max(guess, self._place(packet.pts + (packet.duration or 0)))
        for back_s in (LAST_S, *BACK_S):
            places, frames, damaged = self._read(guess - back_s * rate, np.inf)
            if places or guess < back_s * rate:
                break
        self.frames = max((place + frame.samples for place, frame in zip(places, frames)), default=0)
        if said is None:
            self.open_end = self.open_end or NO_LENGTH
            # Its last packets may be cut; those behind a place that was sought often are, and do not count.
            whole = [place for place, frame in zip(places, frames)
                     if all(abs(place - other) > frame.samples / 2 for other in damaged)]
            cut = [place for place in damaged if place > max(whole, default=0)]
            self.frames = int(min([self.frames, *cut]))
        missing_s = 0.0 if said is None else (said - self.frames) / rate
        if "mov" in kinds:  # its index says whether all packets of the sound are there
            cut = self._is_cut() or missing_s > END_S and not self.stream.frames
        elif "matroska" in kinds:
            cut = missing_s > END_S and (lacking or lacking is None and not self._goes_on(said))
        else:  # of a cut AVI or Windows Media FFmpeg estimates the length
            cut = missing_s > END_S and lacking is None and (alone or not self._goes_on(said))
        if cut:
            raise BadFile(f"truncated: {self.frames / rate:.1f} of {said / rate:.1f} s can be decoded")
        if lacking:
            raise BadFile(lacking)
        if abs(missing_s) > 5 * END_S:
            self.notes.append(("length differs", f"its container says {said / rate:.1f} s, its sound ends at "
                               f"{self.frames / rate:.1f} s"))

    def _is_cut(self) -> bool:
        """Whether the last packet that the index of an MP4 names lies behind the end of the file."""
        if not (n := len(self.stream.index_entries)):
            return False
        last = self.stream.index_entries[n - 1]
        return last.pos + last.size > self.path.stat().st_size

    def _goes_on(self, said: float) -> bool:
        """Whether another track goes on to where the container says that it ends, when the sound does not."""
        import av
        end_s, said_s = 0.0, (said + self._origin) / self.samplerate
        with open_container(self.path) as container, contextlib.suppress(av.FFmpegError):
            container.seek(int((said_s - 1) * 1e6))
            for packet in container.demux():
                if packet.pts is not None:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        return end_s > said_s - END_S

    def has_its_end(self) -> bool:
        """True: its end was found when it was opened."""
        return True

    def windows(self, starts: list[int], length: int, dtype: str) -> list[np.ndarray]:
        """Stretches (samples, channels) of `length` samples; where the container has none, zeros. Raises
        BadFile where a packet in them cannot be decoded."""
        windows, rate = [], self.samplerate
        for start in starts:
            window, stop = np.zeros((length, self.channels), dtype), start + length
            places, frames, damaged = self._read(start - LEAD_S * rate, stop)
            for place in damaged:  # a part that was copied out of a video may begin with the rest of a packet
                if start <= place < stop and not 0 < self._begin - place <= END_S * rate:
                    raise BadFile(damaged[place].format(place / rate))
            end = places[0] if places else 0
            for place, frame in zip(places, frames):
                if place > end + END_S * rate and start < place and end < stop:
                    self.notes.append(("a gap in its sound", f"{(place - end) / rate:.2f} s at "
                                       f"{end / rate:.1f} s, filled with silence"))
                end = place + frame.samples
                if place < stop and end > start:
                    part = _samples(frame, self.channels, dtype)[max(0, start - place):stop - place]
                    window[max(0, place - start):][:len(part)] = part
            if end < min(stop, self.frames) - END_S * rate:
                raise BadFile(f"damaged: its sound cannot be read on from {end / rate:.1f} s")
            windows.append(window)
        return windows


@dataclass(frozen=True)
class MediaFacts:
    """Which tracks a container has."""
    has_sound: bool
    has_video: bool


def facts(path: str | Path) -> MediaFacts:
    """The facts of a file by its headers. Decodes nothing. Raises BadFile."""
    with open_container(path) as container:
        return MediaFacts(sound_stream(container) is not None, video_stream(container) is not None)
