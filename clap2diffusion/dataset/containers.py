"""The containers of sounds: what they say of their length, and how libsndfile is made to read all of it.

libsndfile believes a header that says 0, guesses the length of an MP3 from its first frame, and cannot seek
in a FLAC behind an ID3 tag. inspect() reads sizes and headers, never samples. Where libsndfile would go wrong
it gets a MendedFile: other first or last bytes or another length, and the same sound.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO

# Sizes that programs write when they cannot go back to fill in the true one: near 2^31, 2^32, 2^63 and 2^64,
# and SoX's own.
UNKNOWN = (range(0x7F00_0000, 0x7F00_0100), range(0x7FFF_0000, 0x8000_0100), range(0xFFFF_0000, 1 << 32),
           range((1 << 63) - (1 << 20), 1 << 63), range((1 << 64) - (1 << 20), 1 << 64))
NO_LENGTH = "its header has no length, as when a recorder is stopped or writes to a pipe; used to its end"
FOREIGN = ((0, b"\x1aE\xdf\xa3", "WebM or Matroska"), (4, b"ftyp", "MP4 or M4A"), (4, b"moov", "QuickTime"),
           (4, b"mdat", "QuickTime"), (4, b"wide", "QuickTime"),
           (0, b"0&\xb2u\x8ef\xcf\x11", "Windows Media"), (0, b"#!AMR", "AMR"), (0, b"#!SILK", "SILK"),
           (0, b"\x02#!SILK", "SILK"), (0, b"FLV\1", "Flash video"), (0, b"wvpk", "WavPack"),
           (0, b"MAC ", "Monkey's Audio"), (0, b"TTA1", "TTA"), (0, b"\x0b\x77", "AC-3"),
           (0, b"\x7f\xfe\x80\x01", "DTS"), (0, b".RMF", "RealMedia"), (0, b"DSD ", "DSD"),
           (0, b"FRM8", "DSD"), (0, b"ADIF", "AAC"), (0, b"\xff\xf1", "AAC"), (0, b"\xff\xf9", "AAC"),
           (0, b"\0ds.", "little-endian AU"), (0, b"BW64", "BW64"), (0, b"ea3", "OpenMG"),
           (0, b"\x06\x0e\x2b\x34", "MXF"), (0, b"nut/", "NUT"), (0, b"FWS", "Flash"), (0, b"CWS", "Flash"),
           (8, b"AVI ", "AVI video"), (0, b"\0\0\1\xba", "MPEG video"),
           (188, b"\x47\x40", "MPEG transport stream"))
USELESS = ((b"version https://git-lfs", "a pointer of Git LFS, not the sound itself; run git lfs pull"),
           (b"<!doctype html", "a web page, not a sound; download it again"),
           (b"<html", "a web page, not a sound; download it again"),
           (b"mthd", "MIDI: notes, not a sound; render it with a synthesizer"))


@dataclass
class Facts:
    """What a sound file's bytes say.

    fault: why it cannot be used. convert: whether FFmpeg may read what libsndfile does not. open_end: why
    nothing shows that it is whole, or "". frames: its samples by our count, where libsndfile only guesses.
    Mended, the file is `head`, then its bytes from `start` on without the last `cut`, then `tail`. libsndfile
    is told the length `claims`, unless that is 0.
    """
    size: int
    start: int = 0
    cut: int = 0
    head: bytes = b""
    tail: bytes = b""
    claims: int = 0
    frames: int | None = None
    open_end: str = ""
    fault: str = ""
    convert: bool = False

    @property
    def mended(self) -> bool:
        return any((self.start, self.cut, self.head, self.tail, self.claims))


class MendedFile(io.RawIOBase):
    """A file as its Facts mend it, for reading. Only the head and the tail are held in memory."""

    def __init__(self, path: Path, facts: Facts):
        self.file, self.facts, self.position = open(path, "rb"), facts, 0
        self.body = facts.size - facts.cut - facts.start
        self.length = facts.claims or len(facts.head) + self.body + len(facts.tail)

    def readinto(self, buffer) -> int:
        n, facts = len(buffer), self.facts
        data = facts.head[self.position:self.position + n]
        at = self.position + len(data) - len(facts.head)  # of the body
        if 0 <= at < self.body:
            self.file.seek(facts.start + at)
            data += self.file.read(min(n - len(data), self.body - at))
        if (at := self.position + len(data) - len(facts.head) - self.body) >= 0:
            data += facts.tail[at:at + n - len(data)]
        if facts.claims:  # libmpg123 looks for a tag at the end that is claimed: zeros are none
            data = data.ljust(n, b"\0")
        buffer[:len(data)] = data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.length)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        self.file.close()
        super().close()


def inspect(path: Path) -> Facts:
    """Facts of a sound file. Reads its sizes and the headers of its parts, and decodes nothing."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = _behind_tags(file, 0)
        first = _at(file, start, 256)
        for text, reason in USELESS:
            if first.lower().startswith(text):
                return Facts(size, fault=reason)
        if first[:4] in CHUNKED and (first[8:12] in CHUNKED_TYPES or first[:1].islower()):
            return _chunked(file, size, start)
        for magic, look in ((b"fLaC", _flac), (b"OggS", _ogg), (b".snd", _au)):
            if first.startswith(magic):
                return look(file, size, start)
        for offset, magic, name in FOREIGN:
            if first[offset:].startswith(magic) and (offset != 188 or first[:1] == b"G"):  # of every packet
                return Facts(size, fault=f"{name}, which libsndfile does not read", convert=True)
        return _mpeg(file, size, start) or Facts(size)


def _at(file: BinaryIO, place: int, n: int) -> bytes:
    if not 0 <= place < 1 << 43:  # a chunk claims a size that no file has
        return b""
    file.seek(place)
    return file.read(n)


def _find(file: BinaryIO, place: int, mark: bytes) -> int:
    """Where `mark` stands next at or behind `place`, or -1."""
    while len(block := _at(file, place, 1 << 20)) >= len(mark):
        if (at := block.find(mark)) >= 0:
            return place + at
        place += len(block) - len(mark) + 1
    return -1


def _behind_tags(file: BinaryIO, place: int) -> int:
    """The place behind the ID3v2 tags that begin at `place`."""
    while (tag := _at(file, place, 10)).startswith(b"ID3") and len(tag) == 10 and max(tag[6:]) < 128:
        place += 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]) + (10 if tag[5] & 16 else 0)
    return place


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    """The checksum of Ogg and FLAC, of 8, 16 or 32 bits."""
    table, mask = [], (1 << bits) - 1
    for i in range(256):
        crc = i << bits - 8
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> bits - 1 & 1 else 0)
        table.append(crc & mask)
    crc = 0
    for byte in data:
        crc = crc << 8 & mask ^ table[crc >> bits - 8 ^ byte]
    return crc


# --- containers that say a size: WAV, RF64, W64, AIFF, CAF, AU ----------------------------------------------

# Magic -> the head of a chunk, where the first chunk lies, to how many bytes chunks are padded.
CHUNKED = {b"RIFF": ("<4sI", 12, 2), b"RIFX": (">4sI", 12, 2), b"RF64": ("<4sI", 12, 2),
           b"FORM": (">4sI", 12, 2), b"caff": (">4sQ", 8, 1), b"riff": ("<4s12xQ", 40, 8)}
MOST = {"I": (1 << 32) - 1, "Q": (1 << 64) - 1}
CHUNKED_TYPES = (b"WAVE", b"AIFF", b"AIFC")
MPEG_IN_WAV = (0x50, 0x55)


def _chunks(file: BinaryIO, place: int, form: str, pad: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, place of its content, size) of each chunk. Ends at what is no chunk."""
    n = struct.calcsize(form)
    while len(head := _at(file, place, n)) == n:
        name, size = struct.unpack(form, head)
        if not all(32 <= byte < 127 for byte in name):
            return
        size -= n if n == 24 else 0  # a W64 counts the heads of its chunks
        yield name, place + n, size
        place += n + max(0, size + -size % pad)


def _only_chunks(file: BinaryIO, place: int, form: str, pad: int, end: int) -> bool:
    """Whether between `place` and the file's end there are chunks, or nothing."""
    for _, content, said in _chunks(file, place, form, pad):
        place = content + said + -said % pad
    return end <= place < end + pad


def _chunked(file: BinaryIO, size: int, start: int) -> Facts:
    facts, (form, first, pad) = Facts(size, start, convert=True), CHUNKED[_at(file, start, 4)]
    long = codec = where = said = 0
    for name, where, said in _chunks(file, start + first, form, pad):  # noqa: B007
        if name == b"ds64":
            long = where + 8
        elif name == b"fmt ":
            codec = int.from_bytes(_at(file, where, 2), "little" if form[0] == "<" else "big")
        elif name in (b"data", b"SSND"):
            break
    else:
        return facts
    if long and said == 0xFFFF_FFFF:
        said = int.from_bytes(_at(file, long, 8), "little")
    left = size - where
    if codec in MPEG_IN_WAV:  # libsndfile would guess its length from the header's bit rate
        return _mpeg(file, size, where, left - said if 0 < said < left else 0) or facts
    empty = 8 if name == b"SSND" else 4 if pad == 1 else 0  # before the sound: numbers of AIFF and CAF
    behind = where + max(0, said + -said % pad)
    if said <= empty < left and not _only_chunks(file, behind, form, pad, size) or _unknown(said, left):
        facts.open_end = NO_LENGTH
        if said <= empty or form[-1] == "Q":  # what libsndfile does not take for unknown
            field, kind = (long, "<Q") if long else (where - struct.calcsize(form[-1]), form[0] + form[-1])
            head = bytearray(_at(file, start, where - start))
            struct.pack_into(kind, head, field - start, min(left + (24 if pad == 8 else 0), MOST[kind[1]]))
            if left > MOST[kind[1]]:
                facts.open_end = "its header has no length and it is longer than 4 GB; the rest is not used"
            facts.head, facts.start = bytes(head), where
    elif said > size:
        facts.fault, facts.convert = f"truncated: {left} of {said} bytes", False
    elif said > left:  # no more than the header is missing: a program has counted that too
        facts.open_end = f"its header says {said} bytes of sound, the file has {left}"
    elif _at(file, behind, 4) == _at(file, start, 4):  # over which libsndfile stumbles
        facts.cut, facts.open_end = size - behind, "a second file begins behind its sound; it is not used"
    elif left - said > 4096 and not _only_chunks(file, behind, form, pad, size):
        facts.open_end = f"its header says {said} bytes of sound; the {left - said} behind them are not used"
    return facts


def _unknown(said: int, left: int) -> bool:
    """Whether a size is one that stands for "unknown"."""
    return said > left and any(said in sizes for sizes in UNKNOWN)


def _au(file: BinaryIO, size: int, start: int) -> Facts:
    facts, head = Facts(size, start, convert=True), _at(file, start, 12)
    offset, said = (int.from_bytes(head[i:i + 4], "big") for i in (4, 8))
    left = size - start - offset
    if said == 0 < left or _unknown(said, left):
        facts.open_end, facts.head, facts.start = NO_LENGTH, head[:8] + b"\xff" * 4, start + 12
    elif said > left:
        facts.fault, facts.convert = f"truncated: {left} of {said} bytes", False
    return facts


# --- Ogg ----------------------------------------------------------------------------------------------------

def _ogg(file: BinaryIO, size: int, start: int) -> Facts:
    """Facts of an Ogg by the headers of its pages. libsndfile shortens a cut one without a word."""
    facts, streams, page, place, last = Facts(size, start, convert=True), {}, b"", start, start
    hole = ""
    while len(page := _at(file, place, 300)) > 27:
        if not page.startswith(b"OggS\0"):
            if (found := _find(file, place, b"OggS\0")) < 0:
                break
            hole, place = f"{found - place} bytes between its pages are no Ogg", found
            continue
        content = 27 + page[26]
        if page[5] & 2 and place > start and not _at(file, last, 6)[5] & 2:
            facts.open_end = "a second Ogg stream follows, as in a recorded broadcast; used up to there"
            break
        if page[5] & 2:
            streams[page[14:18]] = page[content:content + 8]
        last, place = place, place + content + sum(page[27:content])
    if not any(content.startswith((b"\x01vorbis", b"OpusHead")) for content in streams.values()):
        names = {b"\x7fFLAC": "FLAC", b"Speex": "Speex"}
        found = [names[content[:5]] for content in streams.values() if content[:5] in names]
        facts.fault = f"Ogg with {found[0] if found else 'another codec'}, which libsndfile does not read"
    elif place > size or 0 < len(page) < 28 and page.startswith(b"OggS"):
        facts.fault, facts.convert = "truncated: the last Ogg page is missing", False
    elif not _at(file, last, 6)[5] & 4 and not facts.open_end:
        facts.open_end = "its last Ogg page has no end mark, as when a recorder is stopped; used to its end"
        # With the mark, and a checksum that counts it: without, libsndfile refuses some.
        page = bytearray(_at(file, last, place - last))
        page[5] |= 4
        page[22:26] = bytes(4)
        page[22:26] = _crc(page, 0x04C1_1DB7, 32).to_bytes(4, "little")
        facts.tail, place = bytes(page), last
    facts.cut = size - place if facts.open_end else 0
    facts.open_end = facts.open_end or hole
    return facts


# --- FLAC ---------------------------------------------------------------------------------------------------

def _flac(file: BinaryIO, size: int, start: int) -> Facts:
    """Facts of a FLAC. Where its header has no length, the last frame's header says it."""
    facts, head = Facts(size, start), _at(file, start, 26)
    if len(head) == 26 and int.from_bytes(head[18:], "big") % (1 << 36) == 0:
        facts.open_end = NO_LENGTH
        last = _at(file, max(start + 42, size - (1 << 20)), 1 << 20)  # a frame is seldom over 100 KB
        at = len(last)
        while (at := last.rfind(b"\xff", 0, at)) >= 0:
            if frame := _flac_frame(last[at:at + 16], int.from_bytes(head[10:12], "big")):
                total = frame[1] if _crc(last[at:], 0x8005, 16) == 0 else frame[0]  # a cut frame is left out
                length = int.from_bytes(head[18:], "big") | total
                facts.head, facts.start = head[:18] + length.to_bytes(8, "big"), start + 26
                break
    return facts


def _flac_frame(head: bytes, block_size: int) -> tuple[int, int] | None:
    """The numbers of the first sample of the FLAC frame that begins with `head`, and of the one behind it."""
    if len(head) < 16 or head[0] != 0xFF or head[1] not in (0xF8, 0xF9) or head[2] < 0x10 or head[3] & 1:
        return None
    ones = f"{head[4]:08b}".index("0") if head[4] < 0xFF else 8  # the number is coded as UTF-8 codes a letter
    n = 4 + max(1, ones)
    number = head[4] & 0x7F >> ones
    for byte in head[5:n]:
        number = number << 6 | byte & 0x3F
    code = head[2] >> 4
    samples = 192 if code == 1 else 144 << code if code < 6 else 1 << code
    if code in (6, 7):  # one or two bytes say it
        samples, n = int.from_bytes(head[n:n + code - 5], "big") + 1, n + code - 5
    n += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    first = number if head[1] & 1 else number * block_size
    return (first, first + samples) if _crc(head[:n], 7, 8) == head[n] else None


# --- MPEG audio: MP3, MP2, MP1 ------------------------------------------------------------------------------

KBPS = {(1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
        (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
        (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
        (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}  # by version and layer
GAP = 1000  # bytes between frames over which libmpg123 still finds the next one


def _frame_sizes() -> dict[bytes, tuple[int, int]]:
    """Bytes 1 and 2 of a frame's header -> its bytes and its samples."""
    sizes = {}
    for (version, divider, bits), layer in product(((1, 1, 3), (2, 2, 2), (2, 4, 0)), (1, 2, 3)):
        samples = 384 if layer == 1 else 576 if layer == 3 and version == 2 else 1152
        unit = 4 if layer == 1 else 1
        bit_rates = enumerate(KBPS[version, layer if version == 1 else min(layer, 2)], 1)
        rates = enumerate((44100, 48000, 32000))
        for (i, kbps), (j, rate), padding, more in product(bit_rates, rates, (0, 1), range(4)):
            n = (samples // 8 // unit * kbps * 1000 // (rate // divider) + padding) * unit
            crc, private = divmod(more, 2)
            first = 0xE0 | bits << 3 | 4 - layer << 1 | crc
            sizes[bytes((first, i << 4 | j << 2 | padding << 1 | private))] = n, samples
    return sizes


FRAME_SIZES = _frame_sizes()


def _kind(header: bytes) -> tuple:
    """What no frame of one stream may change: version and layer, the rate, whether it is mono."""
    return header[1] & 0xFE, header[2] & 0x0C, header[3] >> 6 == 3


def _frame(header: bytes) -> tuple[int, int] | None:
    return FRAME_SIZES.get(header[1:3]) if len(header) == 4 and header[0] == 0xFF else None


def _next_frame(data: bytes) -> int:
    """The first place in `data` where three MPEG frames of one kind follow each other, or -1."""
    at = -1
    while (at := data.find(b"\xff", at + 1)) >= 0:
        place = at
        for _ in range(3):
            header = data[place:place + 4]
            if not (found := _frame(header)) or _kind(header) != _kind(data[at:at + 4]):
                break
            place += found[0]
        else:
            return at
    return -1


def _mpeg(file: BinaryIO, size: int, start: int, behind: int = 0) -> Facts | None:
    """Facts of the MPEG audio from `start` on, behind which `behind` bytes follow. None if none is found."""
    data, end = _at(file, start, 65_536), size - behind
    if (skipped := _next_frame(data)) < 0:
        free = len(data) > 4 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[2] & 0xF0 == 0
        estimated = "MPEG audio in the free format, whose length is only estimated"
        return Facts(size, start, behind, open_end=estimated) if free else None
    first = start + skipped
    head = _at(file, first, 256)
    n, samples = FRAME_SIZES[head[1:3]]
    count, last, rest = _count_frames(file, first, end)
    # Tags behind the last frame do not matter to libmpg123, but it warns of more.
    facts, said = Facts(size, first, size - last if behind or end - last > GAP else 0), 0
    tag = next((at for mark in (b"Xing", b"Info", b"VBRI") if (at := head.find(mark, 4, 48)) > 0), 0)
    if tag:  # this frame holds no sound
        count -= 1
        said = int.from_bytes(head[tag + 14:tag + 18] if head[tag:tag + 1] == b"V" else
                              head[tag + 8:tag + 12] if head[tag + 7] & 1 else b"", "big")
    if count < said - 2:
        facts.fault = f"truncated: {count} of {said} frames"
        return facts
    facts.open_end = rest
    if not said or count > said + 2 or head[tag:tag + 1] == b"V":
        # libsndfile divides the length by the first frame's. With a longer one it reads on to the true end.
        facts.frames, facts.start = count * samples, first + (n if tag else 0)
        facts.claims = 64 * (last - first)
    return facts


def _count_frames(file: BinaryIO, place: int, end: int) -> tuple[int, int, str]:
    """How many whole frames lie between `place` and `end`, where they end, what is odd about what follows."""
    kind, count, base, data, last = None, 0, place, b"", place
    while place + 4 <= end:
        if place + 4 > base + len(data):
            base, data = place, _at(file, place, 1 << 20)
        header = data[place - base:place - base + 4]
        found = FRAME_SIZES.get(header[1:3]) if header[0] == 0xFF else None
        if found and _kind(header) == (kind := kind or _kind(header)):
            if place + found[0] > end:
                return count, last, "its last frame is cut, as when a recorder is stopped; used up to there"
            last = place = place + found[0]
            count += 1
        elif found and _next_frame(_at(file, place, 65_536)) == 0:
            return count, last, f"its sampling rate or channels change after frame {count}; used up to there"
        elif (behind := _behind_tags(file, place)) > place:
            place, data = behind, b""
        elif (gap := _next_frame(_at(file, place, 65_536))) >= 0:
            if gap > GAP:
                return count, last, f"{gap} bytes behind frame {count} are no MPEG audio; used up to there"
            place += gap
        elif end - last > GAP and data[place - base:place - base + 8] != b"APETAGEX":
            return count, last, f"{end - last} bytes behind frame {count} are no MPEG audio; used up to there"
        else:
            break
    return count, last, ""
