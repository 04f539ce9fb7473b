"""The files of a data folder: what their headers say, and their samples and pixels."""

import contextlib
import functools
import io
import shlex
import warnings
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.Image import Transpose

from clap2diffusion.dataset.containers import BadFile, Facts, MendedFile, foreign_name, inspect, no_media
from clap2diffusion.dataset.media import MediaSound, Unread

MIN_CLIP_S, MIN_RATE, MAX_RATE = 0.1, 1000, 768_000
BLOCK, MP3_LEAD, OPEN_END_S, LAST = 1 << 16, 20 * 1152, 0.25, 1 << 10
MIN_SIDE, MAX_PIXELS, MAX_SHAPE_RATIO = 8, 100_000_000, 8
SILENT_PEAK, CANCELLED_SHARE = 1e-5, 1e-3  # -100 dB of full scale; -60 dB of what the channels had
# EXIF's orientation -> the turn or flip that makes a picture upright
UPRIGHT = dict(enumerate((Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM,
                          Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE,
                          Transpose.ROTATE_90), 2))
SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC = 254, 258, 262  # tags of TIFF
# What of a file the pixels need: chunks of PNG (and the colours and orientation), tags of TIFF
PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf")
TIFF_TAGS = (*range(254, 267), 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332,
             338, 339, 347, *range(512, 522), *range(529, 533), 34675)


def _check_plain_file(path: Path) -> None:
    if not path.exists():
        raise BadFile("no such file")
    if not path.is_file():
        raise BadFile("a folder, expected a file" if path.is_dir() else "not a regular file")
    if not path.stat().st_size:
        raise BadFile("zero bytes")


def _checked(opened, faults: list[tuple[bool, str]]):
    """An opened file. Raises BadFile with the first of its faults that is true, and closes it."""
    for wrong, reason in faults:
        if wrong:
            opened.close()
            raise BadFile(reason)
    return opened


class Sound(sf.SoundFile):
    """A sound as libsndfile reads it, from a mended file where its container needs that. `frames` is its
    length, by our count where we count. `open_end`: why nothing shows that the file is whole, or ""."""

    notes = ()  # what is odd about it besides, as MediaSound.notes

    def __init__(self, path: Path, facts: Facts):
        self.path, self.open_end, self._counted = path, facts.open_end, facts.frames
        self._seeks = None if facts.seeks else False
        # of NAME it would read the macOS sidecar ._NAME, where the first bytes are of no format it knows
        sidecar = path.with_name(f"._{path.name}").exists() or Path("._").exists()
        self._mended = MendedFile(path, facts) if facts.mended or sidecar else None
        super().__init__(self._mended or str(path))

    @property
    def frames(self) -> int:
        return super().frames if self._counted is None else self._counted

    def seekable(self) -> bool:
        """Whether seeking works. libsndfile says so of files in which it then fails, and of Vorbis, where it
        ends up to 1792 samples beside the place."""
        if self._seeks is None:
            self._seeks = False  # self.seek() may ask again
            try:
                self._seeks = self.subtype != "VORBIS" and super().seekable() and self.seek(0) == 0
            except RuntimeError:
                pass
        return self._seeks

    def close(self) -> None:
        super().close()
        if self._mended:
            self._mended.close()

    def has_its_end(self) -> bool:
        """Whether the last samples can be read: they show that a compressed file is whole. They are many,
        because SDS and PAF end in a block of which libsndfile reads no part. Of an MP3 we have counted the
        frames. Raises RuntimeError."""
        if not self.seekable() or self.open_end or self.format == "MP3":
            return True
        self.seek(self.frames - min(LAST, self.frames))
        return len(self.read(LAST)) >= min(LAST, self.frames)

    def _from(self, start: int, length: int, dtype: str) -> np.ndarray:
        # The first frames behind a place in an MP3 need bits of earlier ones, which libmpg123 has not read.
        lead = min(start, MP3_LEAD) if self.format == "MP3" else 0
        self.seek(start - lead)
        return self.read(lead + length, dtype=dtype, always_2d=True)[lead:]

    def windows(self, starts: list[int], length: int, dtype: str) -> list[np.ndarray]:
        """Stretches (samples, channels) of `length` samples, or of fewer where the sound ends. Where seeking
        fails it is read from its start, a block at a time. Raises RuntimeError."""
        if self.seekable():
            return [self._from(start, length, dtype) for start in starts]
        parts, place = [[np.empty((0, self.channels), dtype)] for _ in starts], 0
        while place < max(starts) + length and len(block := self.read(BLOCK, dtype=dtype, always_2d=True)):
            for part, start in zip(parts, starts):
                if start - place < len(block) and start + length > place:  # an empty slice holds the block
                    part.append(block[max(0, start - place):start + length - place])
            place += len(block)
        return [np.concatenate(part) for part in parts]


def _in_shell(path: Path, suffix: str) -> tuple[str, str]:
    """The name of a file, and another one with `suffix`, as arguments of a program that converts it."""
    other = f"{path.stem}-2" if path.suffix.lower() == suffix else path.stem
    start = "./" if path.name.startswith("-") or ":" in path.name else ""  # "12:30.m4a" is no address
    return shlex.quote(f"{start}{path.name}"), shlex.quote(f"{start}{other}{suffix}")


def _elsewhere(path: Path) -> str:
    return "; if it plays elsewhere convert it: ffmpeg -i {} {}".format(*_in_shell(path, ".flac"))


def _open_sound(path: Path) -> Sound | MediaSound:
    """A sound by libsndfile, or by FFmpeg where libsndfile does not read it. Raises BadFile."""
    _check_plain_file(path)
    facts, said = inspect(path), ""
    if facts.fault:
        raise BadFile(facts.fault)
    if facts.foreign:
        sound = MediaSound(path, facts.open_end)
        return _checked(sound, [(facts.coded and sound.subtype.startswith("pcm_"),
                                 "its samples are coded surround sound (AC-3 or DTS), which FFmpeg does not "
                                 "find in it either; save it with its own suffix, .ac3 or .dts")])
    try:
        return Sound(path, facts)
    except (RuntimeError, TypeError, ValueError, OSError) as error:  # sf's own errors are RuntimeErrors
        said = getattr(error, "error_string", str(error))
        if "does not exist" in said:  # so it says where an MP3's name is all that the file has of one
            said = "Format not recognised."
    try:
        return MediaSound(path)
    except Unread:
        raise BadFile(f"not a sound that libsndfile or FFmpeg reads ({said}); if it plays elsewhere, "
                      "save it there as FLAC") from None


def open_audio(path: Path) -> Sound | MediaSound:
    """Open a sound, also that of a video, and check what its bytes say; of what FFmpeg reads its end is
    decoded. Raises BadFile."""
    try:
        sound = _open_sound(path)
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror or error})") from None
    rate, frames = sound.samplerate, sound.frames  # libsndfile gives no rate below 1
    return _checked(sound, [
        (not MIN_RATE <= rate <= MAX_RATE, f"sampling rate {rate} Hz, expected {MIN_RATE} to {MAX_RATE}"),
        (frames <= 0, "zero length: a header without samples"),
        (frames > 1 << 48, "the header does not say how long it is; encode it again"),
        (frames < MIN_CLIP_S * rate, f"{frames / rate:.3f} s long, expected at least {MIN_CLIP_S} s")])


def read_windows(path: Path, window_s: float, windows=1, start_s=0.0) -> tuple[list[np.ndarray], int]:
    """Stretches (samples, channels) of a sound as its file has them, and its rate in Hz: one from start_s, or
    several evenly from there to the end; the whole if it is shorter than window_s. Raises BadFile."""
    with open_audio(path) as sound:
        return windows_of(sound, window_s, windows, start_s), sound.samplerate


def windows_of(sound: Sound | MediaSound, window_s: float, windows=1, start_s=0.0) -> list[np.ndarray]:
    """The stretches of read_windows(), of an open sound. Raises BadFile."""
    rate, total, path = sound.samplerate, sound.frames, sound.path
    length = min(total, round(window_s * rate))
    # Files of float64 are read as such: float32 has no 1e300.
    dtype = "float64" if sound.subtype == "DOUBLE" else "float32"
    first, last = min(round(start_s * rate), total - length), total - length
    starts = np.linspace(first, last, windows).round().astype(int).tolist()
    try:
        if not sound.has_its_end():
            raise BadFile("truncated, or the times in it are wrong: fewer than its "
                          f"{total} samples can be read{_elsewhere(path)}")
        blocks = sound.windows(starts, length, dtype)
    except RuntimeError as error:
        raise BadFile("truncated, damaged or of a kind that libsndfile does not read: it stops within "
                      f"its {total} samples ({error}){_elsewhere(path)}") from None
    # An open end may lie within a frame of the codec. Of an Ogg the last page is known to be there.
    least = length - (round(OPEN_END_S * rate) if sound.open_end or sound.format == "OGG" else 0)
    if short := [len(block) for block in blocks if len(block) < least]:
        raise BadFile(f"truncated: {short[0]} of {length} samples can be read{_elsewhere(path)}")
    if not all(np.isfinite(block).all() for block in blocks):
        raise BadFile("holds NaN or infinite samples")
    return blocks


def to_mono(blocks: list[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """Windows (samples, channels) -> the means of their channels (samples,), with peaks scaled to at most 1,
    and flags of the clip: "silent" or "cancelled by the mono mix"."""
    peak = max(float(np.abs(block).max()) for block in blocks)
    # Scaled before the mean, which could overflow. All windows by one factor, so they stay in proportion.
    monos = [(block / max(peak, 1.0)).mean(axis=1) for block in blocks]
    if peak < SILENT_PEAK:
        return monos, ["silent"]
    cancelled = max(np.abs(mono).max() for mono in monos) < CANCELLED_SHARE * min(peak, 1.0)
    return monos, ["cancelled by the mono mix"] if cancelled else []


def decode_audio(path: str | Path, sampling_rate: int, window_s: float, windows=1,
                 start_s=0.0) -> tuple[list[np.ndarray], list[str]]:
    """`windows` mono float32 waveforms (samples,) of at most window_s seconds at sampling_rate, and flags, by
    read_windows() and to_mono(). Raises BadFile."""
    blocks, rate = read_windows(Path(path), window_s, windows, start_s)
    monos, flags = to_mono(blocks)
    limit = round(window_s * sampling_rate)  # what is longer the CLAP extractor would crop at random
    return [soxr.resample(mono.astype(np.float32), rate, sampling_rate)[:limit] for mono in monos], flags


def load_waveform(path: str | Path, sampling_rate: int, window_s: float, windows=1) -> list[np.ndarray]:
    """The waveforms of decode_audio() from the clip's start, without the flags. Raises BadFile."""
    return decode_audio(path, sampling_rate, window_s, windows)[0]


def active_rms(waveform: np.ndarray, sampling_rate: int) -> float:
    """RMS of (samples,) while it sounds: the mean power of 20 ms blocks, each weighted by its power. Silence
    hardly counts. Over the whole clip five barks would be 7 dB above one; here they are as loud."""
    block = sampling_rate // 50
    blocks = np.pad(waveform, (0, -len(waveform) % block)).reshape(-1, block)
    power = np.mean(blocks ** 2, axis=1)
    return float(np.sqrt(np.sum(power ** 2) / np.sum(power)))


def _png_pixels(content: bytes) -> bytes:
    """A PNG without texts, times and what else its pixels do not need, and without a profile or orientation
    whose checksum is wrong or that unpacks to more than a megabyte, as Pillow refuses."""
    kept, at = [content[:8]], 8
    while at + 12 <= len(content):
        end, name = at + 12 + int.from_bytes(content[at:at + 4]), content[at + 4:at + 8]
        body, checksum = content[at + 8:end - 4], int.from_bytes(content[end - 4:end])
        whole = zlib.crc32(name + body) == checksum
        if whole and name == b"iCCP":
            unpacking = zlib.decompressobj()
            with contextlib.suppress(zlib.error):
                unpacking.decompress(body.partition(b"\0")[2][1:], 1 << 20)
            whole = unpacking.eof
        if name in PNG_CHUNKS and (whole or name[0] < 97):  # small first letters are for what can be left out
            kept.append(content[at:end])
        at = end
    return b"".join([*kept, content[at:]])


def _jpeg_pixels(content: bytes) -> bytes:
    """A JPEG without comments and without the application segments that say nothing of its pixels, or that
    are too short to say it."""
    needed = {0xE0: (b"JFIF", 16), 0xE1: (b"Exif", 16), 0xE2: (b"ICC_PROFILE", 16), 0xEE: (b"Adobe", 14)}
    kept, at = [content[:2]], 2
    while content[at:at + 1] == b"\xff" and content[at + 1] != 0xDA:
        kind, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2:at + 4])
        starts, length = needed.get(kind, (b"", 0))
        extra = kind == 0xFE or 0xE0 <= kind <= 0xEF
        if not extra or starts and content[at + 4:end].startswith(starts) and end - at - 2 >= length:
            kept.append(content[at:end])
        at = end
    return _ended_jpeg(b"".join([*kept, content[at:]]))


def _ended_jpeg(content: bytes) -> bytes:
    """A JPEG with its end mark, if that alone is missing: then other bytes before it change no pixel."""
    if content.find(b"\xff\xd9", content.rfind(b"\xff\xda")) < 0:
        with contextlib.suppress(Exception):
            one, other = (content.rstrip(b"\xff\0") + more + b"\xff\xd9" for more in (b"", b"\x55" * 5000))
            if np.array_equal(*(np.asarray(Image.open(io.BytesIO(ended))) for ended in (one, other))):
                return one
    return content


def _tiff_pixels(content: bytes) -> bytes:
    """The first picture of a TIFF, without the tags that say nothing of its pixels."""
    order = "little" if content[:2] == b"II" else "big"
    at = int.from_bytes(content[4:8], order)
    count = int.from_bytes(content[at:at + 2], order)
    tags = [content[at + 2 + 12 * i:at + 14 + 12 * i] for i in range(count)]
    kept = [tag for tag in tags if int.from_bytes(tag[:2], order) in TIFF_TAGS]
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    return content[:at] + directory + content[at + len(directory):]


PIXELS = {b"\x89PNG\r\n\x1a\n": _png_pixels, b"\xff\xd8\xff": _jpeg_pixels, b"II*\0": _tiff_pixels,
          b"MM\0*": _tiff_pixels}


@contextlib.contextmanager
def _refusing(what: str):
    """Inside, whatever Pillow raises becomes a BadFile that says `what`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, for which the limit here is stricter, and of odd tags
            yield
    except (BadFile, MemoryError):
        raise
    except Exception as error:  # a signal's Stopped is none
        raise BadFile(f"{what} ({' '.join(str(error).split()) or type(error).__name__})") from None


def _j2k_bits(file) -> int:
    """Bits of a JPEG 2000's first component."""
    file.seek(0)
    start = file.read(1 << 20)
    return start[start.find(b"\xff\x4f\xff\x51") + 42] % 128 + 1


def _check_jpeg_end(file) -> None:
    """Raises BadFile: a JPEG ends in zeros and without its end mark. They decode as a gray rest."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
    if not any(file.read()):
        file.seek(0)
        content = file.read()
        if content.find(b"\xff\xd9", content.rfind(b"\xff\xda")) < 0:
            n = len(content.rstrip(bytes(1)))
            raise BadFile(f"truncated: only zeros behind {n} of {len(content)} bytes, as a broken download "
                          "leaves them")


def _open_source(source, decode: bool) -> Image.Image:
    with _refusing("not a picture that Pillow reads"):
        try:
            image = Image.open(source)
        except UnidentifiedImageError:
            raise _Unknown("not a picture that Pillow reads") from None
    tags, form = getattr(image, "tag_v2", {}), image.format
    (short, long), size = sorted(image.size), f"{image.width}x{image.height} pixels"
    _checked(image, [
        (short * long > MAX_PIXELS, f"{size}, expected at most {MAX_PIXELS // 1_000_000} million"),
        (short < MIN_SIDE, f"{size}, expected sides of at least {MIN_SIDE}"),
        (long > MAX_SHAPE_RATIO * short, f"{size}, expected a shape of at most {MAX_SHAPE_RATIO}:1"),
        (form in ("EPS", "WMF", "EMF"), f"{form}, a drawing, not pixels; save it as PNG"),
        (image.mode == "F", "floating-point pixels have no known white; save it with 8 or 16 bits"),
        (tags.get(SUBFILE_TYPE, 0) & 1,
         "a camera's raw picture, of which only a preview can be read; develop it and save it as JPEG"),
        (form == "JPEG2000" and image.mode != "I;16" and _j2k_bits(image.fp) > 8,
         "JPEG 2000 of more than 8 bits a colour, in which Pillow makes white black; save it as PNG")])
    if decode:
        with contextlib.ExitStack() as closing, _refusing("truncated or damaged picture"):
            closing.callback(image.close)
            if form == "JPEG":
                _check_jpeg_end(image.fp)
            drawn = image.tile[0][1] if form == "GIF" and "transparency" not in image.info else None
            image.load()
            if drawn not in (None, (0, 0, *image.size)):  # around the first frame nothing is drawn
                frame = image.convert("RGB").crop(drawn)
                image = Image.new("RGB", image.size, "white")
                image.paste(frame, drawn)
            closing.pop_all()
    return image


def open_image(path: Path, decode=False) -> Image.Image:
    """Open a picture and check its header; decode it only if asked. Metadata that Pillow stumbles over are
    left out. Raises BadFile."""
    with _refusing("not a picture that Pillow reads"):
        _check_plain_file(path)
    try:
        return _open_source(path, decode)
    except BadFile as error:
        with contextlib.suppress(BadFile, OSError, IndexError), open(path, "rb") as file:
            start = file.read(8)
            for signature, pixels in PIXELS.items():
                if start.startswith(signature):
                    return _open_source(io.BytesIO(pixels(start + file.read())), decode)
        if isinstance(error, _Unknown):
            raise BadFile(f"{error}{_other_format(path)}") from None
        raise


class _Unknown(BadFile):
    """A picture of no format that Pillow knows."""


# How pictures begin that Pillow does not read, from a byte on; what they are, and what to do.
CONVERT = "; convert it to PNG: convert {0} {1}"  # of ImageMagick
VIDEO = "; take pictures and sounds out of it: prepare_data.py videos"
FOREIGN_PICTURES = (
    (4, b"ftypheic", "HEIC, as iPhones write it" + CONVERT), (4, b"ftypheix", "HEIC" + CONVERT),
    (4, b"ftypmif1", "HEIF" + CONVERT), (4, b"ftypmsf1", "HEIF" + CONVERT),
    (4, b"ftyp", "a video, MP4" + VIDEO),
    (0, b"\xff\x0a", "JPEG XL; convert it to PNG: djxl {0} {1}"),
    (4, b"JXL ", "JPEG XL; convert it to PNG: djxl {0} {1}"),
    (0, b"\xff\xd8\xff", "a JPEG of another kind, or damaged" + CONVERT),
    (0, b"v/1\x01", "OpenEXR" + CONVERT), (0, b"#?RADIANCE", "Radiance HDR" + CONVERT),
    (0, b"SDPX", "DPX" + CONVERT), (0, b"XPDS", "DPX" + CONVERT),
    (0, b"8BPS", "a Photoshop file of another kind, or cut; save it with 8 bits"),
    (0, b"II*\0", "a TIFF with other pixels, or cut; save it as RGB or gray with 8 or 16 bits"),
    (0, b"MM\0*", "a TIFF with other pixels, or cut; save it as RGB or gray with 8 or 16 bits"))


def _other_format(path: Path) -> str:
    """What a file is that Pillow does not read, and what to do, as the end of a sentence."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(1000)
        found = [what for at, mark, what in FOREIGN_PICTURES if start[at:].startswith(mark)]
        what = "SVG" + CONVERT if b"<svg" in start else found[0] if found else no_media(start)
        if not what and (name := foreign_name(start)):
            what = name + VIDEO
        found = f": {what}" if what else "; if it is one" + CONVERT[1:]
        return found.format(*_in_shell(path, ".png"))
    return ""


def _upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF or XMP orientation; EXIF that cannot be read counts as none, and none is written."""
    turn = None
    with contextlib.suppress(Exception):
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of an ICC profile to sRGB for pictures of a mode; None if the profile is broken or of
    other colours than the mode's. LAB is its own profile."""
    with contextlib.suppress(Exception):
        source = ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.getOpenProfile(
            io.BytesIO(profile))
        colours = {"L": "GRAY", "LAB": "Lab"}.get(mode, mode)
        if mode == "LAB" or source.profile.xcolor_space.strip() == colours:
            return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    return None


def _rgb_on_white(image: Image.Image, profile: bytes | None, bits=16, inverted=False) -> Image.Image:
    """A decoded picture of any mode as RGB in sRGB. What is transparent lies on white. bits, inverted: of
    gray in more than 8 bits, how many it has, and whether 0 is white."""
    if image.mode.startswith("I"):  # 16 bits of gray: a plain convert would clip nearly all to white
        gray, most = np.asarray(image).astype(np.int64), 2 ** bits - 1
        if gray.min() < 0 or gray.max() > 65535:
            raise BadFile("more than 16 bits a pixel; save it with 8 or 16 bits")
        gray = np.rint(np.minimum(most - gray if inverted else gray, most) * (65535 / most)).astype(np.int64)
        hidden = gray == image.info.get("transparency")  # one level of PNG's that counts as transparent
        image = Image.fromarray(np.rint(gray / 257).astype(np.uint8))
        image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    alpha = None
    if image.has_transparency_data:  # also a palette's: its hidden colours must not show through
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    transform = _to_srgb(profile, image.mode)
    image = transform.apply(image) if transform else image.convert("RGB")
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha) if alpha else image


def load_image(path: str | Path, size: int) -> np.ndarray:
    """A picture as (3, size, size) float32 in [-1, 1]: upright, in sRGB by its ICC profile, on white, centre
    crop. Raises BadFile."""
    with open_image(Path(path), decode=True) as image, _refusing("damaged picture"):
        profile = image.info.get("icc_profile")  # animated pictures open at their first frame
        image = ImageOps.invert(image) if image.format == "XBM" else image  # Pillow takes its ink for white
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits, inverted = min(tags.get(BITS_PER_SAMPLE, (16,))[0], 16), tags.get(PHOTOMETRIC) == 0
        image = _upright(image)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = _rgb_on_white(image, profile, bits, inverted)
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
    # Convolutions round differently in other layouts, and pickling in a worker changes the layout.
    return np.ascontiguousarray(pixels)


def load_picture(path: str | Path, size: int) -> Image.Image:
    """load_image() as a PIL picture, for showing and judging. Raises BadFile."""
    return Image.fromarray(((load_image(path, size).transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8))
