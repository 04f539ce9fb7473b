"""The containers of sounds: what they say of their length, and how libsndfile is made to read all of it.

libsndfile believes a header that says 0, guesses the length of an MP3 from its first frame, and cannot seek
in a FLAC behind an ID3 tag. inspect() reads sizes and headers, never samples. Where libsndfile would go wrong
it gets a MendedFile: other first or last bytes or another length, and the same sound.
"""

import functools
import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import BinaryIO

# Sizes that programs write when they cannot go back to fill in the true one: near 2^31, 2^32, 2^63 and 2^64,
# and SoX's own.
UNKNOWN = (range(0x7F00_0000, 0x7F00_0100), range(0x7FFF_0000, 0x8000_0100), range(0xFFFF_0000, 1 << 32),
           range((1 << 63) - (1 << 20), 1 << 63), range((1 << 64) - (1 << 20), 1 << 64))
NO_LENGTH = "its header has no length, as when a recorder is stopped or writes to a pipe; used to its end"
UNUSED = "its header says {} bytes of sound; the {} behind them are not used"
SECOND = "a second file begins behind its sound; it is not used"
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
MIDI = "MIDI: notes, not a sound; render it with a synthesizer"
PLAYLIST = "a playlist, which only names other files; give one of those"
# What is neither a sound nor a picture, and what to do.
NO_MEDIA = ((b"version https://git-lfs", "a pointer of Git LFS; run git lfs pull"),
            (b"<!doctype html", "a web page; download it again"), (b"<html", "a web page; download it again"),
            (b"{", "JSON, perhaps an error page; download it again"),
            (b"<", "XML, perhaps an error page; download it again"),
            (b"\x1f\x8b", "compressed with gzip; unpack it"), (b"pk\3\4", "a ZIP archive; unpack it"),
            (b"rar!", "a RAR archive; unpack it"), (b"7z\xbc\xaf", "a 7-Zip archive; unpack it"),
            (b"#extm3u", PLAYLIST), (b"[playlist]", PLAYLIST), (b"ffconcat", PLAYLIST),
            (b"v=0\no=", PLAYLIST), (b"v=0\r\no=", PLAYLIST),
            (b"\0\x05\x16\x07", "a sidecar file of macOS; remove it"))


class BadFile(Exception):
    """A sound or picture that cannot be used; the message is the reason."""


@dataclass
class Facts:
    """What a sound file's bytes say.

    fault: why it cannot be used. foreign: whether FFmpeg reads it, and libsndfile does not. coded: whether
    its samples are in fact coded surround sound. open_end: why nothing shows that it is whole, or "". frames:
    its samples by our count, where libsndfile only guesses.
    seeks: False where libsndfile could not go on after it was told to seek.
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
    seeks: bool = True
    fault: str = ""
    foreign: bool = False
    coded: bool = False

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
        if reason := MIDI if first.startswith(b"MThd") else no_media(first):
            return Facts(size, fault=reason)
        if first[:4] in CHUNKED and (first[8:12] in CHUNKED_TYPES or first[:1].islower()):
            return _chunked(file, size, start)
        for magic, look in ((b"fLaC", _flac), (b"OggS", _ogg), (b".snd", _au), (b"Creative Voice", _voc)):
            if first.startswith(magic):
                return look(file, size, start)
        if foreign_name(first):
            return Facts(size, foreign=True)
        return _mpeg(file, size, start) or Facts(size)


def foreign_name(start: bytes) -> str:
    """The container that begins like this, of those that FFmpeg reads and libsndfile does not, or ""."""
    return next((name for offset, magic, name in FOREIGN if start[offset:].startswith(magic)
                 and (offset != 188 or start[:1] == b"G")), "")  # of every packet of a transport stream


# --- containers that FFmpeg reads: MP4, Matroska, AVI, Windows Media ----------------------------------------

ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the object that says a file's size


def missing_part(path: Path) -> str | None:
    """What an MP4, a Matroska, an AVI or a Windows Media file lacks of what it says that it has, as a reason;
    "" if it is whole, None if it does not say."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        said, names = _said_size(file)
    if size < said:
        return f"truncated: {size} of {said} bytes"
    if names and b"moov" not in names:
        return "an MP4 without its index (moov), as where a recorder is stopped; mend it with untrunc"
    return "" if said else None


def _said_size(file: BinaryIO) -> tuple[int, set[bytes]]:
    """How many bytes a file says that it has, 0 where it does not, as where a recorder is stopped; and the
    names of an MP4's boxes."""
    head, place, end, names = _at(file, 0, 1 << 16), 0, 0, set()
    if head.startswith(b"\x1aE\xdf\xa3"):  # the EBML head, then one Segment
        size, n = _ebml_size(head[4:])
        place = 4 + n + size + 4  # of the Segment's size
        size, n = _ebml_size(head[place:place + 8])
        end = place + n + size if size else 0
    elif head.startswith(b"0&\xb2u") and (at := head.find(ASF_FILE)) > 0:
        live = head[at + 88] & 1 if at + 88 < len(head) else True
        end = 0 if live else int.from_bytes(head[at + 40:at + 48], "little")
    elif head[8:12] == b"AVI ":  # one RIFF, or several of a gigabyte
        while (box := _at(file, place, 8)).startswith(b"RIFF") and len(box) == 8:
            size = int.from_bytes(box[4:], "little")
            if size in (0, MOST["I"]):
                return 0, names
            end = place = place + 8 + size + size % 2
    elif foreign_name(head) in ("MP4 or M4A", "QuickTime"):
        while len(box := _at(file, place, 16)) >= 8:
            size = int.from_bytes(box[:4]) if box[:4] != b"\0\0\0\1" else int.from_bytes(box[8:])
            names.add(box[4:8])
            if size < 8:  # 0: to the end of the file
                break
            end = place = place + size
    return end, names


def _ebml_size(data: bytes) -> tuple[int, int]:
    """A size as Matroska codes it, 0 for an unknown one, and how many bytes it takes."""
    n = 9 - data[0].bit_length() if data and data[0] else 1
    size, most = int.from_bytes(data[:n]) & (1 << 7 * n) - 1, (1 << 7 * n) - 1
    return (0 if size == most else size), n


def no_media(start: bytes) -> str:
    """What a file that begins like this is, if neither a sound nor a picture, and what to do; or ""."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n\t").lower()
    return next((what for mark, what in NO_MEDIA if start.startswith(mark)), "")


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


@functools.cache
def _crc_table(polynomial: int, bits: int) -> list[int]:
    """The checksum of each single byte."""
    table = []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> bits - 1 & 1 else 0)
        table.append(crc & (1 << bits) - 1)
    return table


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    """The checksum of Ogg and FLAC, of 8, 16 or 32 bits."""
    table, mask = _crc_table(polynomial, bits), (1 << bits) - 1
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
GSM_IN_WAV, GSM_BYTES, GSM_SAMPLES = 0x31, 65, 320  # a block
# How frames of surround sound begin that a WAV holds as if they were samples, as copied from a DVD or a
# digital cable. Each has at most 16 KB.
SURROUND = re.compile(rb"\x72\xf8\x1f\x4e|\xf8\x72\x4e\x1f|\x7f\xfe\x80\x01[\xfc-\xff]|"
                      rb"\xfe\x7f\x01\x80.[\xfc-\xff]|\xff\x1f\x00\xe8.\x07|\x1f\xff\xe8\x00\x07", re.DOTALL)


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
    facts, (form, first, pad) = Facts(size, start), CHUNKED[_at(file, start, 4)]
    changes, long, codec, where, said = {}, 0, 0, 0, 0  # changes: place -> the header's right bytes
    for name, where, said in _chunks(file, start + first, form, pad):  # noqa: B007
        if name == b"ds64":
            long = where + 8
        elif name == b"fmt ":
            codec = int.from_bytes(_at(file, where, 2), "little" if form[0] == "<" else "big")
            if pad == 8 and codec == 0xFFFE:  # libsndfile does not look on for the codec in a W64
                changes[where] = _at(file, where + 24, 2)
        elif name in (b"data", b"SSND"):
            break
    else:
        return facts
    if long and said == 0xFFFF_FFFF:
        said = int.from_bytes(_at(file, long, 8), "little")
    left = size - where
    if codec in (1, 0xFFFE) and _is_surround(_at(file, where, 1 << 16)):
        facts.foreign = facts.coded = True  # libsndfile takes it for noise
        return facts
    if codec in MPEG_IN_WAV:  # libsndfile would guess its length from the header's bit rate
        return _mpeg(file, size, where, left - said if 0 < said < left else 0) or facts
    empty = 8 if name == b"SSND" else 4 if pad == 1 else 0  # before the sound: numbers of AIFF and CAF
    behind = where + max(0, said + -said % pad)
    if said <= empty < left and not _only_chunks(file, behind, form, pad, size) or _unknown(said, left):
        facts.open_end = NO_LENGTH
        if said <= empty or form[-1] == "Q":  # what libsndfile does not take for unknown
            field, kind = (long, "<Q") if long else (where - struct.calcsize(form[-1]), form[0] + form[-1])
            changes[field] = struct.pack(kind, min(left + (24 if pad == 8 else 0), MOST[kind[1]]))
            if left > MOST[kind[1]]:
                facts.open_end = "its header has no length and it is longer than 4 GB; the rest is not used"
    elif said > size:
        facts.fault = f"truncated: {left} of {said} bytes"
    elif said > left:  # no more than the header is missing: a program has counted that too
        facts.open_end = f"its header says {said} bytes of sound, the file has {left}"
    elif _at(file, behind, 4) == _at(file, start, 4):  # over which libsndfile stumbles
        facts.cut, facts.open_end = size - behind, SECOND
    elif left - said > 4096 and not _only_chunks(file, behind, form, pad, size):
        facts.open_end = UNUSED.format(said, left - said)
    if pad == 8 and 0 < said < left:  # in a W64 libsndfile plays what is behind the sound
        facts.cut = left - said
    if codec == GSM_IN_WAV:  # libsndfile makes one block more, of noise, where the size is odd
        facts.frames = (left if facts.open_end == NO_LENGTH else min(said, left)) // GSM_BYTES * GSM_SAMPLES
    if changes:
        head = bytearray(_at(file, start, where - start))
        for place, right in changes.items():
            head[place - start:place - start + len(right)] = right
        facts.head, facts.start = bytes(head), where
    return facts


def _is_surround(data: bytes) -> bool:
    """Whether samples are frames of AC-3 or DTS. AC-3's mark is short: it must stand at the start as well."""
    short = data[:2] in (b"\x0b\x77", b"\x77\x0b")
    marks = data.count(data[:2]) if short else 4 * len(SURROUND.findall(data))
    return len(data) > 8192 and marks > len(data) // 4096


def _unknown(said: int, left: int) -> bool:
    """Whether a size is one that stands for "unknown"."""
    return said > left and any(said in sizes for sizes in UNKNOWN)


def _au(file: BinaryIO, size: int, start: int) -> Facts:
    facts, head = Facts(size, start), _at(file, start, 12)
    offset, said = (int.from_bytes(head[i:i + 4], "big") for i in (4, 8))
    left = size - start - offset
    if said == 0 < left or _unknown(said, left):
        facts.open_end, facts.head, facts.start = NO_LENGTH, head[:8] + b"\xff" * 4, start + 12
    elif said > left:
        facts.fault = f"truncated: {left} of {said} bytes"
    elif left - said > 4096:
        facts.open_end = UNUSED.format(said, left - said)
    return facts


def _voc(file: BinaryIO, size: int, start: int) -> Facts:
    """Facts of a VOC. libsndfile plays the heads of all blocks behind the first as samples."""
    facts, place, blocks = Facts(size), int.from_bytes(_at(file, 20, 2), "little"), 0
    while len(head := _at(file, place, 4)) == 4 and 0 < head[0] < 10 and blocks < 2:
        blocks += head[0] in (1, 2, 3, 6, 9)  # sound, more of it, silence, a repetition, sound
        place += 4 + int.from_bytes(head[1:], "little")
    facts.foreign = blocks > 1
    return facts


# --- Ogg ----------------------------------------------------------------------------------------------------

def _ogg(file: BinaryIO, size: int, start: int) -> Facts:
    """Facts of an Ogg by the headers of its pages. libsndfile shortens a cut one without a word."""
    facts, streams, page, place, last, hole = Facts(size, start), {}, b"", start, start, ""
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
        facts.seeks = facts.seeks and not page[5] & 1  # to a packet in two pages of an Opus it fails
        last, place = place, place + content + sum(page[27:content])
    facts.foreign = not any(content.startswith((b"\x01vorbis", b"OpusHead")) for content in streams.values())
    if place > size or 0 < len(page) < 28 and page.startswith(b"OggS"):
        facts.fault = "truncated: the last Ogg page is missing"
    elif not _at(file, last, 6)[5] & 4 and not facts.open_end:
        facts.open_end = "its last Ogg page has no end mark, as when a recorder is stopped; used to its end"
        # With the mark: without, libsndfile refuses some.
        page = _at(file, last, place - last)
        facts.tail, place = _changed_page(page, 5, bytes([page[5] | 4])), last
    facts.cut = size - place if facts.open_end else 0
    facts.open_end = facts.open_end or hole
    page = _page(file, start)
    content = 27 + page[26] if page else 0
    if page[content:content + 8] == b"OpusHead":
        if page[content + 12:content + 16] == bytes(4):  # of no rate libsndfile makes 8000 Hz
            facts.start = start + len(page)
            facts.head = page = _changed_page(page, content + 12, (48000).to_bytes(4, "little"))
    if len(streams) == 1 and not facts.fault:
        _leave_out(file, facts, start, page)
    return facts


def _page(file: BinaryIO, place: int) -> bytes:
    """The whole Ogg page at a place, or b""."""
    head = _at(file, place, 282)
    n = 27 + head[26] + sum(head[27:27 + head[26]]) if len(head) > 27 and head.startswith(b"OggS\0") else 0
    page = _at(file, place, n)
    return page if len(page) == n else b""


def _leave_out(file: BinaryIO, facts: Facts, start: int, page: bytes) -> None:
    """Leave out the packets that an Ogg has before its time 0, as ffmpeg -ss and -c copy write them. Such an
    Opus libsndfile takes for malformed, such a Vorbis it plays with them. `page`: the first, at `start`."""
    kept, place, tags, left_out, head = page, start + len(page), True, 0, page[28:]
    opus = head.startswith(b"OpusHead")
    while page := _page(file, place):
        place += len(page)
        n, until = page[26], int.from_bytes(page[6:14], "little", signed=True)
        if tags:  # they may have several pages
            kept, tags = kept + page, page[26 + n] == 255
            continue
        # The last may end early. One that begins or ends within a packet is left as it is.
        if page[5] & 5 or page[26 + n] == 255 or place > facts.size - facts.cut:
            return
        sizes, packets, at = page[27:27 + n], [], 27 + n  # packets: their part of `sizes`, and their bytes
        for part in re.findall(rb"\xff*[^\xff]", sizes, re.DOTALL):
            packets.append((part, page[at:at + sum(part)]))
            at += sum(part)
        if opus:
            samples = [_opus_samples(packet) for _, packet in packets]
        else:  # of two sizes of blocks, each of which overlaps the one before it by half
            blocks = [1 << (head[28] >> 4 if packet[:1] and packet[0] & 2 else head[28] & 15)
                      for _, packet in packets]
            samples = [0, *(sum(pair) // 4 for pair in pairwise(blocks))]
        while packets and sum(samples[not opus:]) > max(until, 0):
            packets.pop(0)
            left_out += samples.pop(0)
        if packets or not left_out:
            break
    if left_out and page:
        sizes = b"".join(part for part, _ in packets)
        page = page[:26] + bytes([len(sizes)]) + sizes + b"".join(packet for _, packet in packets)
        facts.head, facts.start = kept + _changed_page(page, 5, page[5:6]), place
        left_out /= 48000 if opus else int.from_bytes(head[12:16], "little")
        facts.open_end = facts.open_end or (f"its first {left_out:.2f} s lie before its time 0, as when it "
                                            "was cut without encoding it again; they are not used")


def _opus_samples(packet: bytes) -> int:
    """The samples of an Opus packet, at 48 kHz (RFC 6716, section 3.1)."""
    if not packet:
        return 0
    kind, frames = packet[0] >> 3, (1, 2, 2, 0)[packet[0] % 4]
    frame = 120 << kind % 4 if kind > 15 else 480 << kind % 2 if kind > 11 else 480 * (1, 2, 4, 6)[kind % 4]
    return frame * (frames or packet[1] & 63 if len(packet) > 1 else frames)


def _changed_page(page: bytes, place: int, right: bytes) -> bytes:
    """An Ogg page with the right bytes at a place, and a checksum that counts them."""
    page = page[:place] + right + page[place + len(right):]
    checksum = _crc(page[:22] + bytes(4) + page[26:], 0x04C1_1DB7, 32)
    return page[:22] + checksum.to_bytes(4, "little") + page[26:]


# --- FLAC ---------------------------------------------------------------------------------------------------

def _flac(file: BinaryIO, size: int, start: int) -> Facts:
    """Facts of a FLAC. Its frames count the samples. They say its length where its header has none or that
    of the longer FLAC from which it was cut without encoding it again (ffmpeg -c copy)."""
    facts, head = Facts(size, start), _at(file, start, 26)
    if (second := _find(file, start + 4, b"fLaC\0\0\0\x22")) > 0:
        facts.cut, facts.open_end = size - second, SECOND
        size = second
    if len(head) < 26:
        return facts
    said, block_size = int.from_bytes(head[18:], "big") % (1 << 36), int.from_bytes(head[10:12], "big")
    place, block = start + 4, _at(file, start + 4, 4)
    while len(block) == 4:  # of metadata
        place += 4 + int.from_bytes(block[1:], "big")
        block = _at(file, place, 4) if block[0] < 128 else b""
    head_1, tail = _at(file, place, 16), max(place, size - (1 << 20))  # a frame is seldom over 100 KB
    first, last = _flac_frame(head_1, block_size), _at(file, tail, max(0, size - tail))
    if not first or not (frames := _flac_frames(last, head_1[:2], block_size)):
        return facts
    begin, (at, *frame) = first[0], frames[-1]
    places = (place + (size - place) * i * i // 256 for i in range(16))  # uneven, for equal parts
    parts = (_at(file, one, min(size - one, 1 << 17)) for one in places)
    numbers = [n for part in parts for _, n, _ in _flac_frames(part, head_1[:2], block_size)[:1]] + frame[:1]
    if numbers != sorted(numbers) or frame[1] - begin > said > 0:
        facts.open_end, facts.seeks = SECOND, False
        return facts
    whole = _crc(last[at:], 0x8005, 16) == 0
    length = frame[whole] - begin  # a cut frame is left out
    if said == 0:
        facts.open_end = facts.open_end or NO_LENGTH
    elif length < said and (begin or whole):
        facts.open_end = f"its header says {said} samples, its frames hold {length}; used up to there"
    else:
        return facts
    facts.seeks = not begin
    number = int.from_bytes(head[18:], "big") - said + length
    facts.head, facts.start = head[:18] + number.to_bytes(8, "big"), start + 26
    return facts


def _flac_frames(data: bytes, mark: bytes, block_size: int) -> list[tuple[int, int, int]]:
    """(place, numbers) of FLAC frames in `data` that begin with `mark`. Where one follows on another, those
    that follow on none are left out: their bytes look so by chance."""
    found = [(hit.start(), *numbers) for hit in re.finditer(re.escape(mark), data)
             if (numbers := _flac_frame(data[hit.start():hit.start() + 16], block_size))]
    return [two for one, two in pairwise(found) if one[2] == two[1]] or found[-1:]


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


def _next_frame(data: bytes) -> int:
    """The first place in `data` where three MPEG frames of one kind follow each other, or -1."""
    at = -1
    while (at := data.find(b"\xff", at + 1)) >= 0:
        place = at
        for _ in range(3):
            header = data[place:place + 4]
            found = FRAME_SIZES.get(header[1:3]) if len(header) == 4 and header[0] == 0xFF else None
            if not found or _kind(header) != _kind(data[at:at + 4]):
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
    if skipped and 2 * (last - first) < end - first:  # a few frames, or what looks like them, in another file
        return None
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
