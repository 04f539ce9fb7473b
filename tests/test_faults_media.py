"""Faults of sounds in containers that libsndfile does not read: videos, phone recordings, broadcasts."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from conftest import ROOT
from faults import Case, pattern
from PIL import Image
from test_faults_data import RATE, TONES, USED, in_pcm, melody, plays, sound

from clap2diffusion.dataset import media
from clap2diffusion.dataset.checking import look_at
from clap2diffusion.dataset.decoding import BadFile, decode_audio, load_waveform, open_audio, read_windows

FPS = 25
NO_LENGTH = "its header has no length"


def write(path, tracks, *, video=0.0, flash=(), starts=(0.0,), codec="libx264", options=None, form=None,
          encoder=None, rates=(44100,), layout=None, gap=None, **stream_options) -> None:
    """A container with sounds (samples,) or (samples, channels) by name of their codec: tracks = [(codec,
    samples)]. video: seconds of a picture track of `codec`, black but white in the frames of `flash`. starts:
    time stamps at which picture (the last one) and sounds begin. gap: (second, seconds) left out of a sound.
    form: the muxer. encoder: options of the sounds' encoders. stream_options: attributes of their streams."""
    with av.open(path if isinstance(path, io.BytesIO) else str(path), "w", format=form,
                 options=options or {}) as out:
        sounds, jobs = [], []
        for i, (name, samples) in enumerate(tracks):
            samples = np.atleast_2d(np.asarray(samples, np.float32).T)  # (channels, samples)
            rate = rates[min(i, len(rates) - 1)]
            samples = np.tile(samples, (2, 1)) if layout == "stereo" and len(samples) == 1 else samples
            shape = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
            stream = out.add_stream(name, rate=rate, layout=shape, options={"strict": "-2"} | (encoder or {}))
            for key, value in stream_options.items():
                setattr(stream, key, value[i])
            sounds.append((stream, samples, rate, starts[min(i, len(starts) - 1)]))
        if video:
            picture = out.add_stream(codec, rate=FPS, options={"g": "10"})
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        for stream, samples, rate, start in sounds:
            size = round(rate / FPS) if video or gap else rate
            for at in range(0, samples.shape[1], size):
                if gap and gap[0] * rate <= at < (gap[0] + gap[1]) * rate:
                    continue
                block = np.ascontiguousarray(samples[:, at:at + size])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=stream.layout.name)
                frame.sample_rate, frame.pts = rate, at + round(start * rate)
                frame.time_base = Fraction(1, rate)
                jobs.append((at / rate + start, stream, frame))
        for n in range(round(video * FPS)):
            pixels = np.full((64, 64, 3), 255 * (n in flash), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = n + round(starts[-1] * FPS), Fraction(1, FPS)
            jobs.append((n / FPS + starts[-1], picture, frame))
        for _, stream, frame in sorted(jobs, key=lambda job: job[0]):
            out.mux(stream.encode(frame))
        for stream in out.streams:
            out.mux(stream.encode(None))


def made(name: str, *tracks, change=None, rates=(44100,), **options):
    """Row 2's sound is a container with the melody in each codec of `tracks` ("aac", or ("aac", samples)),
    its bytes changed by change(bytes). The suffix of `name` chooses the muxer, unless `form` does."""
    def make(path: Path) -> None:
        write(path, [(track, melody(rates[0])) if isinstance(track, str) else track for track in tracks],
              rates=rates, **options)
        if change:
            path.write_bytes(change(bytearray(path.read_bytes())))
    return sound(name, make)


def cut_to(share: float):
    return lambda content: content[:int(len(content) * share)]


def noise(seconds: float, rate: int = 44100, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-.3, .3, (round(seconds * rate), channels)).astype(np.float32)


def zeroed(packet: int, name: str = "aac"):
    """Destroys a packet of the sound of an MP4 or AVI."""
    def change(content: bytearray) -> bytearray:
        with av.open(io.BytesIO(content)) as container:
            packets = [p for p in container.demux(container.streams.audio[0]) if p.size]
        place, size = packets[packet].pos, packets[packet].size
        content[place:place + size] = b"\xff" * size
        return content
    return change


def no_duration(content: bytearray) -> bytearray:
    """A Matroska as a browser records it: no length, and no size of its Segment."""
    for mark in media.MATROSKA_DURATION:
        if (at := content.find(mark)) > 0:
            content[at:at + 2] = b"\xec" + content[at + 2:at + 3]  # a Void as long
            content[at + 1] = 0x80 | mark[2] & 0x7F
            del content[at + 2]
            content.insert(at + 2, 0)
    at = content.index(b"\x18\x53\x80\x67") + 4
    content[at:at + 8] = b"\x01" + b"\xff" * 7
    return content


def begins_with_a_rest(content: bytearray) -> bytearray:
    """An AVI whose sound begins with the rest of a packet, as where a part was copied out of a video."""
    return zeroed(0, "ac3")(content)


def camcorder(path: Path) -> None:
    """A DV of 2 s: raw PAL pictures, in one of which some bytes look like three frames of MPEG audio."""
    with av.open(str(path), "w", format="dv") as out:
        picture = out.add_stream("dvvideo", rate=FPS)
        picture.width, picture.height, picture.pix_fmt = 720, 576, "yuv420p"
        track = out.add_stream("pcm_s16le", rate=48000, layout="stereo")
        samples = np.repeat(np.rint(melody(48000)[:2 * 48000] * 32767).astype(np.int16), 2).reshape(-1, 3840)
        for n, block in enumerate(samples):
            frame = av.VideoFrame.from_ndarray(np.full((864, 720), 128, np.uint8), format="yuv420p")
            frame.pts, frame.time_base = n, Fraction(1, FPS)
            out.mux(picture.encode(frame))
            frame = av.AudioFrame.from_ndarray(block[None], format="s16", layout="stereo")
            frame.sample_rate, frame.pts = 48000, n * 1920
            out.mux(track.encode(frame))
    content = bytearray(path.read_bytes())
    content[12_000:12_000 + 3 * 417] = 3 * (b"\xff\xfb\x90\x00" + bytes(413))
    path.write_bytes(content)


def only_head(content: bytearray) -> bytearray:
    return no_duration(content)[:content.index(b"\x1f\x43\xb6\x75")]


def never_finished(content: bytearray) -> bytearray:
    """An AVI as a recorder leaves it that is stopped: no sizes, no lengths, no index."""
    at = content.index(b"auds") + 32
    content[4:8] = content[at:at + 4] = bytes(4)
    return content[:content.index(b"idx1")]


def mean_of_5_1(d: Path, _) -> None:
    path = d / "data/audio/a.mka"
    blocks, rate = read_windows(path, 4.0)
    assert blocks[0].shape == (4 * rate, 6)
    np.testing.assert_allclose(blocks[0], surround()[:4 * rate], atol=1e-4)


def surround() -> np.ndarray:
    return np.stack([0.1 * (c + 1) * melody(44100)[:6 * 44100] / 0.6 for c in range(6)], axis=1)


def silent_until(seconds: float, name: str, tones=TONES):
    """Nothing before, then the melody at its place."""
    def then(d: Path, _) -> None:
        [whole] = load_waveform(d / "data/audio" / name, RATE, 100.0)
        assert np.abs(whole[:round((seconds - 0.03) * RATE)]).max() < 1e-3
        for i, tone in enumerate(tones):
            heard = heard_at(whole, seconds + 0.5 * i)
            assert abs(heard - tone) < 10, (i, tone, heard)
    return then


def heard_at(waveform: np.ndarray, second: float) -> float:
    """The tone, in Hz, in the second half of the half second from there."""
    part = waveform[round((second + 0.2) * RATE):round((second + 0.45) * RATE)]
    return np.abs(np.fft.rfft(part * np.hanning(len(part)))).argmax() * RATE / len(part)


def second_track_is_used(d: Path, _) -> None:
    [whole] = load_waveform(d / "data/audio/a.mkv", RATE, 100.0)
    assert [round(heard_at(whole, 0.5 * i) / 10) for i in range(6)] == [t // 10 for t in TONES[5::-1]]


def has_the_gap(d: Path, _) -> None:
    """Four to five seconds are missing; what is behind them is at its time."""
    [whole] = load_waveform(d / "data/audio/a.mkv", RATE, 100.0)
    assert abs(len(whole) / RATE - 12) < 0.1
    assert np.abs(whole[round(4.1 * RATE):round(4.9 * RATE)]).max() < 1e-3
    for i in (*range(7), *range(11, 24)):
        assert abs(heard_at(whole, 0.5 * i) - TONES[i]) < 10
    [window], _ = decode_audio(d / "data/audio/a.mkv", RATE, 1.0, start_s=4.5)
    assert np.abs(window[:RATE // 4]).max() < 1e-3 and abs(heard_at(window, 0.5) - TONES[10]) < 10


def in_wav(path: Path) -> None:
    """AC-3 as a digital cable carries it, in a WAV as if it were samples."""
    coded = io.BytesIO()
    write(coded, [("ac3", np.tile(melody(48000), (2, 1)).T)], rates=(48000,), form="spdif")
    sf.write(path, np.frombuffer(coded.getvalue(), "<i2").reshape(-1, 2), 48000, format="WAV")


def playlist(line: str):
    """Names a good file beside it."""
    def make(path: Path) -> None:
        write(path.with_name("real.ts"), [("aac", melody(44100))])
        path.write_text(line.format(path.with_name("real.ts")))
    return make


def encrypted(name: str):
    keys = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
            "encryption_kid": "a7e61c373e219033c21091fa607bf3b8"}
    return made(name, "aac", options=keys)


WMA = {"layout": "stereo", "encoder": {"b": "128000"}}
FAST = {"movflags": "faststart"}
CASES = [
    *(Case(f"{what} as sound", made(name, codec, **options), 0, USED, plays(name))
      for what, name, codec, options in (
          ("AAC in M4A", "a.m4a", "aac", {}), ("ALAC in M4A", "a.m4a", "alac", {}),
          ("AAC in MP4, beside a picture", "a.mp4", "aac", {"video": 12.0}),
          ("MP4 with its index at the front", "a.mp4", "aac", {"video": 12.0, "options": FAST}),
          ("MP4 in fragments", "a.mp4", "aac", {"options": {"movflags": "frag_keyframe+empty_moov+delay_moov",
                                                           "frag_duration": "1000000"}}),
          ("MP3 in MP4", "a.mp4", "libmp3lame", {"video": 12.0}), ("Opus in MP4", "a.mp4", "libopus", {
              "rates": (48000,)}),
          ("Opus in WebM", "a.webm", "libopus", {"rates": (48000,), "video": 2.0, "codec": "libvpx"}),
          ("Vorbis in Matroska", "a.mkv", "vorbis", {"layout": "stereo", "video": 12.0}),
          ("AAC in Matroska", "a.mkv", "aac", {"video": 12.0}), ("FLAC in Matroska", "a.mka", "flac", {}),
          ("16-bit samples in QuickTime", "a.mov", "pcm_s16le", {"video": 12.0}),
          ("24-bit samples in QuickTime", "a.mov", "pcm_s24be", {}),
          ("8-bit samples in AVI", "a.avi", "pcm_u8", {}), ("float64 in Matroska", "a.mka", "pcm_f64le", {}),
          ("MP3 in AVI", "a.avi", "libmp3lame", {"video": 12.0, "codec": "mpeg4"}),
          ("AC-3 in AVI", "a.avi", "ac3", {"video": 12.0, "codec": "mpeg4"}),
          ("Windows Media sound", "a.wma", "wmav2", WMA),
          ("Windows Media video", "a.wmv", "wmav2", WMA | {"video": 12.0, "codec": "wmv2"}),
          ("a phone's 3GP with AMR", "a.3gp", "libopencore_amrnb", {"rates": (8000,), "video": 12.0}),
          ("Flash video", "a.flv", "libmp3lame", {"video": 12.0, "codec": "flv1"}),
          ("WavPack", "a.wv", "wavpack", {}), ("TTA", "a.tta", "tta", {}),
          ("FLAC in Ogg", "a.oga", "flac", {}), ("G.722 in a WAV", "a.wav", "g722", {"rates": (16000,)}))),
    *(Case(f"{what} as sound", made(name, codec, **options), 0, NO_LENGTH, plays(name))
      for what, name, codec, options in (
          ("raw AAC", "a.aac", "aac", {}), ("AMR", "a.amr", "libopencore_amrnb", {"rates": (8000,)}),
          ("AC-3", "a.ac3", "ac3", {}), ("an MPEG transport stream", "a.ts", "aac", {"video": 12.0}),
          ("an MPEG program stream", "a.mpg", "mp2", {"video": 12.0, "codec": "mpeg2video"}),
          ("a NUT", "a.nut", "mp2", {}))),
    Case("WebM without a length, as browsers record it",
         made("a.webm", "libopus", rates=(48000,), change=no_duration), 0, NO_LENGTH, plays("a.webm")),
    Case("WebM without a length that is cut",
         made("a.webm", "libopus", rates=(48000,), change=lambda c: cut_to(0.77)(no_duration(c))), 0,
         NO_LENGTH, plays("a.webm", 9.3)),
    Case("an AVI whose recorder was stopped", made("a.avi", "pcm_s16le", change=never_finished), 0,
         NO_LENGTH, plays("a.avi")),
    Case("an MP4 of 5.1 channels", made("a.mka", ("flac", surround())), 0, USED, mean_of_5_1),
    Case("AC-3 of a digital cable in a WAV", sound("a.wav", in_wav), 0, USED, plays("a.wav")),
    Case("AC-3 in a WAV that FFmpeg does not find either", sound("a.wav", in_pcm(b"\x0b\x77")), 2,
         "its samples are coded surround sound (AC-3 or DTS)"),
    Case("sound that begins 0.8 s later than the picture",
         made("a.mp4", "aac", video=12.0, starts=(0.8, 0.0)), 0,
         "sound begins later than the picture: by 0.*silent until then", silent_until(0.8, "a.mp4")),
    Case("sound that begins 0.8 s later, in Matroska",
         made("a.mkv", "libopus", rates=(48000,), video=12.0, starts=(0.8, 0.0)),
         0, "sound begins later than the picture: by 0.*silent until then", silent_until(0.8, "a.mkv")),
    Case("sound that begins earlier than the picture", made("a.mp4", "aac", video=12.0, starts=(0.0, 0.8)), 0,
         USED, plays("a.mp4")),
    Case("an AVI whose sound begins with the rest of a packet",
         made("a.avi", "ac3", video=12.0, change=begins_with_a_rest), 0, USED, plays("a.avi")),
    Case("a DV of a camcorder whose picture holds what looks like MPEG audio", sound("a.dv", camcorder), 0,
         USED, plays("a.dv", 2.0)),
    Case("MPEG video with MPEG sound", made("a.mpg", "mp2", rates=(48000,), video=12.0, codec="mpeg2video"),
         0, NO_LENGTH, plays("a.mpg")),
    Case("a second without packets within a sound", made("a.mkv", "libmp3lame", gap=(4.0, 1.0)), 0,
         "a gap in its sound: * s at 4.0 s, filled with silence", has_the_gap),
    Case("two sound tracks, the second is the default",
         made("a.mkv", "aac", ("aac", melody(44100)[:6 * 22050][::-1].copy()), disposition=(0, 1)), 0,
         "several sound tracks: 2; the default one, stream 1, is used", second_track_is_used),
    Case("sound that ends before the picture, in WebM",
         made("a.webm", ("libopus", melody(48000)[:2 * 48000]),
              rates=(48000,), video=4.0, codec="libvpx"), 0,
         "length differs: its container says 4.0 s, its sound ends at 2.0 s", plays("a.webm", 2.0)),
    Case("a video without sound", made("a.mp4", video=2.0), 2, "has no sound track"),
    Case("a picture as sound", sound("a.m4a", lambda p: Image.new("RGB", (64, 64)).save(p, "PNG")), 2,
         "has no sound track"),
    Case("an encrypted MP4", encrypted("a.mp4"), 2,
         "encrypted (DRM): only its own player decodes it; use a copy that is not"),
    Case("a damaged packet within an MP4", made("a.mp4", "aac", change=zeroed(100)), 2,
         "damaged: its sound at 2.3 s cannot be decoded"),
    *(Case(f"{what} that is cut", made(name, codec, change=cut_to(0.6), **options), 2, says)
      for what, name, codec, options, says in (
          ("an MP4 with its index at the front", "a.mp4", "aac", {"video": 12.0, "options": FAST},
           "truncated: 6.* of 12.0 s can be decoded"),
          ("an MP4 with its index at the end", "a.mp4", "aac", {"video": 12.0}, "truncated: * of * bytes"),
          ("a Matroska", "a.mkv", "aac", {"video": 12.0}, "truncated: 7.* of 12.0 s can be decoded"),
          ("a WebM", "a.webm", "libopus", {"rates": (48000,)}, "truncated: 7.* of 12.0 s can be decoded"),
          ("an AVI", "a.avi", "libmp3lame", {}, "truncated: * of * bytes"),
          ("a Windows Media sound", "a.wma", "wmav2", WMA, "truncated: * of * bytes"),
          ("a WavPack", "a.wv", "wavpack", {}, "truncated: 7.0 of 12.0 s can be decoded"),
          ("a FLAC in Ogg", "a.oga", "flac", {}, "truncated: the last Ogg page is missing"),
          ("a Flash video", "a.flv", "libmp3lame", {"video": 12.0, "codec": "flv1"},
           "truncated: 7.* of 12.0 s can be decoded"))),
    Case("an MP4 cut by its last packet", made("a.mp4", "aac", options=FAST, change=lambda c: c[:-10]), 2,
         "truncated: 12.0 of 12.0 s can be decoded"),
    Case("an MP4 whose recorder was stopped before its index",
         made("a.mp4", "aac", change=lambda c: c[:c.index(b"moov") - 4]), 2,
         "an MP4 without its index (moov)"),
    Case("a Matroska that has only its head", made("a.mkv", "aac", change=only_head), 2,
         "not a file that FFmpeg reads (End of file)"),
    *(Case(f"{what} as sound", sound("a.mp4", playlist(text)), 2, "a playlist, which only names other files")
      for what, text in (
          ("a playlist (m3u8)", "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\n{}\n#EXT-X-ENDLIST\n"),
          ("a list for FFmpeg", "ffconcat version 1.0\nfile {}\n"),
          ("a description of a stream (SDP)", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns={}\n"))),
    Case("a list for FFmpeg behind a comment",
         sound("a.mp4", playlist("# mine\nffconcat version 1.0\nfile {}\n")), 2,
         "not a sound that libsndfile or FFmpeg reads"),
    *(Case(f"a file called {name}", made(name, "aac"), 0, USED, plays(name))
      for name in ("a.12:30.m4a", "a.http:x.m4a", "a.%03d.m4a", "a.ünï 日本.m4a")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, tmp_path, capfd):
    case.make(tmp_path)
    capfd.readouterr()
    [path] = (tmp_path / "data/audio").glob("a.*")
    reason, found = look_at(("sound", path))
    said = reason or "; ".join(f"{what}: {detail}" for what, detail in found)
    assert bool(reason) == (case.code == 2), said
    assert said == "" if case.says == USED else re.search(pattern(case.says, tmp_path), said), said
    if case.then:
        case.then(tmp_path, None)
    assert capfd.readouterr() == ("", "")  # FFmpeg's own lines are never shown


# --- where a sound lies in time -----------------------------------------------------------------------------

FLASHES = (10, 37, 61)  # frames of the picture, at 25 a second


def clicks(rate: int, seconds: float = 3.0) -> np.ndarray:
    """A burst of 3 ms at the moment of each flash."""
    x, n = np.zeros(round(seconds * rate), np.float32), round(0.003 * rate)
    for flash in FLASHES:
        at = round(flash / FPS * rate)
        x[at:at + n] = 0.8 * np.sin(np.arange(n) * 1.5)
    return x


@pytest.mark.parametrize("name, codec, picture, options", [
    ("a.mp4", "aac", "libx264", {}), ("a.mp4", "libmp3lame", "libx264", {}),
    ("a.mp4", "libopus", "libx264", {"rates": (48000,)}), ("a.mov", "pcm_s16le", "mpeg4", {}),
    ("a.mp4", "aac", "libx264", {"options": {"use_editlist": "0"}}),
    ("a.mp4", "aac", "libx264", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("a.mp4", "aac", "libx264", {"starts": (0.0, 0.4)}), ("a.mp4", "aac", "libx264", {"starts": (0.4, 0.0)}),
    ("a.webm", "libopus", "libvpx", {"rates": (48000,)}),
    ("a.mkv", "vorbis", "libx264", {"layout": "stereo"}),
    ("a.mkv", "aac", "libx264", {"starts": (0.4, 0.0)}), ("a.mkv", "libmp3lame", "libx264", {}),
    ("a.avi", "libmp3lame", "mpeg4", {}), ("a.ts", "aac", "libx264", {}), ("a.flv", "aac", "libx264", {}),
    ("a.mpg", "mp2", "mpeg2video", {}), ("a.3gp", "libopencore_amrnb", "libx264", {"rates": (8000,)}),
    ("a.wmv", "wmav2", "wmv2", {"layout": "stereo", "encoder": {"b": "128000"}})], ids=str)
def test_a_click_and_a_flash_made_at_one_moment_come_out_at_one(tmp_path, name, codec, picture, options):
    """Within a frame of the picture, whatever priming, edit lists and late starts the container has."""
    rate, starts = options.get("rates", (44100,))[0], options.get("starts", (0.0,))
    shift = round((starts[-1] - starts[0]) * FPS)  # the file's picture begins so many frames later
    write(tmp_path / name, [(codec, clicks(rate))], video=3.0, codec=picture,
          flash=[flash - shift for flash in FLASHES], **options)
    with media.open_container(tmp_path / name) as container:
        begin, stream = media.origin_s(container), media.video_stream(container)
    with media.open_container(tmp_path / name) as container:
        stream = media.video_stream(container)
        flashes = [frame.time - begin for frame in container.decode(stream)
                   if frame.to_ndarray(format="gray").mean() > 128]
    [block], rate = read_windows(tmp_path / name, 10.0)
    loud = np.abs(block).max(axis=1)
    heard = np.flatnonzero(loud > 0.3 * loud.max()) / rate
    heard = [b for a, b in zip([-1.0, *heard], heard) if b - a > 0.5]
    assert len(heard) == len(flashes) == len(FLASHES), (heard, flashes)
    np.testing.assert_allclose(heard, flashes, atol=1 / FPS)


@pytest.mark.parametrize("name, codec, options", [
    ("a.m4a", "aac", {"encoder": {"aac_pns": "0"}}), ("a.mp4", "libmp3lame", {}),
    ("a.webm", "libopus", {"rates": (48000,)}), ("a.mkv", "vorbis", {"layout": "stereo"}),
    ("a.mkv", "aac", {"encoder": {"aac_pns": "0"}}), ("a.mov", "pcm_s16le", {}), ("a.wma", "wmav2", WMA),
    ("a.amr", "libopencore_amrnb", {"rates": (8000,)}), ("a.flv", "libmp3lame", {}), ("a.mka", "flac", {}),
    ("a.ts", "aac", {"encoder": {"aac_pns": "0"}}), ("a.avi", "libmp3lame", {}), ("a.wv", "wavpack", {})],
    ids=str)
def test_windows_are_stretches_of_the_whole_to_the_sample(tmp_path, name, codec, options):
    """Sought windows, of which codecs need the packets before, against PyAV's own decode of all packets."""
    rate = options.get("rates", (44100,))[0]
    write(tmp_path / name, [(codec, noise(8.0, rate)[:, 0] * np.linspace(0.2, 1, 8 * rate))], **options)
    with av.open(str(tmp_path / name)) as container:
        whole = np.concatenate([frame.to_ndarray().reshape(frame.layout.nb_channels, -1) if
                                frame.format.is_planar else frame.to_ndarray().reshape(
                                    -1, frame.layout.nb_channels).T
                                for frame in container.decode(audio=0)], axis=1).astype(np.float64)
    whole /= {"s": 2.0 ** 15}.get(container_format(tmp_path / name), 1.0)
    for start_s in (0.0, 0.3, 1.01, 2.5, 4.777, 6.9):
        [block], found = read_windows(tmp_path / name, 1.0, start_s=start_s)
        start = min(round(start_s * rate), open_audio(tmp_path / name).frames - rate)
        assert found == rate and len(block) == rate
        tolerance = 2e-3 if codec != "libopencore_amrnb" else 0.1  # AMR never forgets how it began
        np.testing.assert_allclose(block[:, 0], whole[0, start:start + rate], atol=tolerance)


def container_format(path: Path) -> str:
    with av.open(str(path)) as container:
        return container.streams.audio[0].format.name.removesuffix("p")[:1].replace("f", "")


def test_two_processes_read_the_same(tmp_path):
    """A cache is built by several."""
    write(tmp_path / "a.mp4", [("aac", melody(44100))])
    line = ("import hashlib, sys; from clap2diffusion.dataset.decoding import decode_audio\n"
            "content = b''.join(x.tobytes() for x in decode_audio(sys.argv[1], 48000, 2.0, 3)[0])\n"
            "print(hashlib.sha256(content).hexdigest())")
    done = {subprocess.run([sys.executable, "-c", line, str(tmp_path / "a.mp4")], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout for _ in range(2)}
    assert len(done) == 1


def test_a_long_file_is_not_decoded(tmp_path, monkeypatch):
    """Of an hour of sound the window, a second before it and the end are decoded: 300 of 90,000 packets."""
    write(tmp_path / "a.mkv", [("pcm_s16le", np.zeros(3600 * 8000, np.float32))], rates=(8000,))
    decoded, own = [], media._decode
    monkeypatch.setattr(media, "_decode", lambda packet: decoded.append(1) or own(packet))
    [block], _ = read_windows(tmp_path / "a.mkv", 4.0, start_s=3000.0)
    assert len(block) == 4 * 8000 and 0 < len(decoded) < 300


def test_a_manifest_of_videos_is_checked_cached_and_drawn_from(tmp_path):
    """The sound of a video in a manifest is that of a WAV; a video as picture is refused with what helps."""
    from clap2diffusion.dataset.cache import Decode
    from clap2diffusion.dataset.manifest import read_manifest
    from clap2diffusion.pictures.inputs import sound_duration
    made("a.mp4", "aac", video=12.0)(tmp_path)
    rows, _ = read_manifest(tmp_path / "data", print)
    _, [waveform], flags = Decode(rows, 64, RATE, 4.0)[1]
    assert not flags and abs(heard_at(waveform, 1.0) - TONES[2]) < 10
    assert sound_duration(str(tmp_path / "data/audio/a.mp4")) == pytest.approx(12, abs=0.1)
    for name in ("a.mp4", "a.mkv", "a.avi"):
        write(tmp_path / name, [("aac", melody(44100))], video=2.0)
        reason, _ = look_at(("picture", tmp_path / name))
        assert "take pictures and sounds out of it: prepare_data.py videos" in reason


@pytest.mark.parametrize("make, says", [
    (lambda p: None, "cannot be read (No such file"),
    (lambda p: p.mkdir(), "cannot be read (Is a "),
    (lambda p: p.write_bytes(b""), "not a file that FFmpeg reads"),
    (lambda p: p.write_text("<html>"), "a web page; download it again")],
    ids=["none", "folder", "empty", "page"])
def test_what_is_no_container_is_a_bad_file(tmp_path, make, says):
    make(tmp_path / "a.mp4")
    with pytest.raises(BadFile, match=re.escape(says)), media.open_container(tmp_path / "a.mp4"):
        pass


def test_the_facts_of_a_container(tmp_path):
    write(tmp_path / "a.mp4", [("aac", melody(44100))], video=2.0)
    write(tmp_path / "b.mp4", [("aac", melody(44100))])
    assert media.facts(tmp_path / "a.mp4") == media.MediaFacts(has_sound=True, has_video=True)
    assert media.facts(tmp_path / "b.mp4") == media.MediaFacts(has_sound=True, has_video=False)
