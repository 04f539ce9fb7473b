"""What the tabs of the page do, over one Studio. layout.py places their parts."""

import argparse
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import gradio as gr
import numpy as np
import soundfile
import torch
from PIL import Image

from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.settings import GUIDANCE, SEED, Number, check_text
from clap2diffusion.dataset.decoding import BadFile, decode_audio
from clap2diffusion.demo.studio import LONGEST_S, STEPS, Stream, Studio
from clap2diffusion.pictures.generation import embed, embed_heard, embed_mix, hear, slerp, window_starts
from clap2diffusion.pictures.inputs import usable
from clap2diffusion.pictures.sheets import data_uri, png_bytes, spectrogram

MOST_PICTURES, MOST_STEPS, MOST_WINDOWS = 8, 12, 60  # of one sound, of an interpolation, of a storyboard


class Kind(NamedTuple):
    """A value that is no number, as BOUNDS has it."""
    kind: type
    words: str

    def check(self, value):
        if type(value) is not self.kind:
            raise argparse.ArgumentTypeError(f"got {json.dumps(value):.60}, expected {self.words}")
        return value


BOUNDS = {"strength": Number(float, 0, 10), "guidance": Number(float, 1, 100), "seed": SEED,
          "pictures": Number(int, 1, MOST_PICTURES), "mix": Number(float, 0, 1),
          "strip": Number(int, 2, MOST_STEPS), "a picture every": Number(float, 0.1, LONGEST_S),
          "prompt": Kind(str, "a text"), "heat map": Kind(bool, "true or false")}
NOTHING = "nothing is left to hear: the picture is made with no sound at all"
PROGRESS = gr.Progress()  # gradio gives a function with this default one that shows on the page


class Ended(Exception):
    """Someone pressed Stop, or left the page."""


def checked(**values) -> list:
    """Values of BOUNDS, each as the number or text it must be. Raises UserError: one is not."""
    found = []
    for key, value in values.items():
        name = key.replace("_", " ")
        bound = BOUNDS[name]
        if bound.kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2 ** 53:
            value = int(value)  # as JavaScript sends it
        if value is None:  # a field that was emptied
            raise UserError(f"{name}: is empty; give one")
        if isinstance(value, str):
            check_text(value, name)
        try:
            found.append(bound.check(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None
    return found


def name_of(path: str | None, what: str = "sound") -> str:
    """The name of an uploaded file as its owner knows it. Raises UserError: there is none."""
    if not path:
        raise UserError(f"there is no {what} yet; upload one, record one, or take an example")
    return Path(path).name


class Jobs:
    """What runs for whom, so that it can be stopped between two steps."""

    def __init__(self):
        self.stops: dict[tuple[str, str], threading.Event] = {}

    @contextmanager
    def begin(self, session: str, tab: str) -> Iterator[threading.Event]:
        stop = self.stops[session, tab] = threading.Event()
        try:
            yield stop
        finally:
            if self.stops.get((session, tab)) is stop:
                del self.stops[session, tab]

    def stop(self, session: str, tab: str = "") -> None:
        """Stop a session's work in one tab, or in all."""
        for (whose, where), event in [*self.stops.items()]:
            if whose == session and tab in ("", where):
                event.set()


class Page:
    """What the tabs do. Each function yields or returns the values of its tab's outputs, the message last:
    "" or one sentence."""

    def __init__(self, studio: Studio, place: Path):
        """place: a folder of our own for the sounds that the page hands out."""
        self.studio, self.place, self.jobs = studio, place, Jobs()
        self.taken: dict[Path | tuple, str] = {}  # clips of the run's data, or several, and their copies

    def sentence(self, error: Exception, *paths: str | None) -> str:
        """An error of ours as one sentence, with the files named as their owner named them."""
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = "the GPU is out of memory; close what else runs on it, or start with --precision bf16"
        for path in filter(None, paths):
            text = text.replace(str(path), Path(path).name)
        return text

    @contextmanager
    def work(self, request: gr.Request | None, tab: str, progress, steps: int, pictures: int):
        """Inside, each(i) gives what to call after each step of picture i, from 0. It moves the progress on,
        and raises Ended once the tab's work is to stop."""
        session = getattr(request, "session_hash", None) or ""
        with self.jobs.begin(session, tab) as stop:
            def each(i: int):
                def after(step: int) -> None:
                    if stop.is_set():
                        raise Ended
                    done = (i * steps + step) / (steps * pictures)
                    progress(done, desc=f"picture {i + 1} of {pictures}" if pictures > 1 else "drawing")
                after(0)
                return after
            yield each

    def notes(self, prompt: str, *paths: str) -> list[str]:
        """What of a prompt and of sounds is not read, as sentences. Raises UserError: not a sound."""
        found, window_s = self.studio.remarks(prompt), self.studio.encoder.window_s
        for path in paths:
            duration_s = self.studio.check_sound(path)
            if duration_s > window_s + 0.05:
                found.append(f"{Path(path).name}: {duration_s:.1f} s long, of which CLAP hears the first "
                             f"{window_s:g} s; the tab Long sound goes through all of it")
        return found

    def one_sound(self, sound: str, prompt: str = "", strength: float = 1.0, guidance: float = GUIDANCE,
                  seed: int = 0, count: int = 1, heat_map: bool = False,
                  request: gr.Request = None, progress=PROGRESS):
        """1 to 8 pictures of one sound, with the seeds seed, seed + 1, ...; heat_map: show where the sound
        acted. Gives the pictures, the spectrogram, what CLAP hears, a sentence if something was wrong."""
        made, shown, heard = [], None, ""
        try:
            name = name_of(sound)
            prompt, strength, guidance, seed, count, heat_map = checked(
                prompt=prompt, strength=strength, guidance=guidance, seed=seed, pictures=count,
                heat_map=heat_map)
            notes, encoder = self.notes(prompt, sound), self.studio.encoder
            waveform = hear(encoder, sound)
            if waveform is None:
                notes.append(f"{name} is silent or cancels itself out in mono: the pictures are made with no "
                             "sound at all")
            else:
                shown = spectrogram(waveform, encoder.sampling_rate)
            audio_embeds = embed_heard(encoder, waveform)
            heard, message = self.studio.listener.most_like(audio_embeds), "; ".join(notes)
            yield [], [], shown, heard, message
            with self.work(request, "one", progress, STEPS, count) as each:
                for i in range(count):
                    made = [*made, self.studio.picture(audio_embeds, prompt, seed + i, strength, guidance,
                                                       maps=True, each_step=each(i))]
                    yield made, show(made, heat_map), shown, heard, message
        except Ended:
            yield made, show(made, heat_map), shown, heard, "stopped"
        except (UserError, RunFailed, torch.OutOfMemoryError) as error:
            yield made, show(made, heat_map), shown, heard, self.sentence(error, sound)

    def two_sounds(self, first: str, second: str, mix: float = 0.5, count: int = 5, prompt: str = "",
                   seed: int = 0, request: gr.Request = None, progress=PROGRESS):
        """The picture of two sounds mixed as air does, the second's share of the levels being `mix`; and
        `count` pictures on the way from the first's embedding to the second's."""
        picture, strip, message = None, [], ""
        try:
            paths = [first, second]
            for path, what in zip(paths, ("first sound", "second sound")):
                name_of(path, what)
            mix, count, prompt, seed = checked(mix=mix, strip=count, prompt=prompt, seed=seed)
            notes = self.notes(prompt, *paths)
            ends = torch.cat([embed(self.studio.encoder, path) for path in paths])  # (2, E)
            with self.work(request, "two", progress, STEPS, count + 1) as each:
                mixed = embed_mix(self.studio.encoder, paths, [1 - mix, mix])
                message = "; ".join(notes + ([] if mixed.any() else [NOTHING]))
                picture, _ = self.studio.picture(mixed, prompt, seed, each_step=each(0))
                yield picture, strip, message
                for path, end in zip(paths, ends):
                    if not end.any():
                        raise UserError(f"{path} is silent, and nothing lies between a sound and silence; "
                                        "give two sounds that can be heard")
                for i, audio_embeds in enumerate(slerp(ends[:1], ends[1:], count).split(1)):
                    drawn, _ = self.studio.picture(audio_embeds, prompt, seed, each_step=each(i + 1))
                    strip = [*strip, (drawn, f"{100 * i / (count - 1):.0f} %")]
                    yield picture, strip, message
        except Ended:
            yield picture, strip, "stopped"
        except (UserError, RunFailed, torch.OutOfMemoryError) as error:
            yield picture, strip, self.sentence(error, first, second)

    def mixed(self, first: str, second: str, mix: float, prompt: str, seed: int):
        """The mix alone, as the slider is let go."""
        if not (first and second):
            return gr.skip(), ""
        try:
            mix, prompt, seed = checked(mix=mix, prompt=prompt, seed=seed)
            notes = self.notes(prompt, first, second)
            mixed = embed_mix(self.studio.encoder, [first, second], [1 - mix, mix])
            return (self.studio.picture(mixed, prompt, seed)[0],
                    "; ".join(notes + ([] if mixed.any() else [NOTHING])))
        except (UserError, RunFailed, torch.OutOfMemoryError) as error:
            return gr.skip(), self.sentence(error, first, second)

    def long_sound(self, sound: str, every: float = 2.0, prompt: str = "", seed: int = 0,
                   request: gr.Request = None, progress=PROGRESS):
        """A storyboard: a picture every so many seconds. Gives {"sound": its address, "windows": [{"start_s",
        "time", "picture": a PNG as a data address}, ...]} and a sentence if something was wrong."""
        board, message = None, ""
        try:
            name_of(sound)
            every, prompt, seed = checked(a_picture_every=every, prompt=prompt, seed=seed)
            duration_s, encoder = self.studio.check_sound(sound), self.studio.encoder
            message = "; ".join(self.studio.remarks(prompt))
            starts = window_starts(duration_s, encoder.window_s, every)
            if len(starts) > MOST_WINDOWS:
                raise UserError(f"a picture every {every:g} s makes {len(starts)} of {sound}, expected at "
                                f"most {MOST_WINDOWS}; raise it to {duration_s / (MOST_WINDOWS - 1):.1f} s "
                                "or more")
            board = {"sound": f"gradio_api/file={quote(sound)}", "windows": []}
            with self.work(request, "long", progress, STEPS, len(starts)) as each:
                for i, start_s in enumerate(starts):
                    audio_embeds = embed(encoder, sound, start_s)
                    drawn, _ = self.studio.picture(audio_embeds, prompt, seed, each_step=each(i))
                    window = {"start_s": round(start_s, 3), "time": clock(start_s), "number": i + 1,
                              "picture": data_uri("image/png", png_bytes(drawn)),
                              "silent": not audio_embeds.any().item()}
                    board = {**board, "windows": [*board["windows"], window]}
                    yield board, message
        except Ended:
            yield board, "stopped"
        except (UserError, RunFailed, torch.OutOfMemoryError) as error:
            yield board, self.sentence(error, sound)

    def live(self, sound: str, prompt: str = "", strength: float = 1.0, seed: int = 0,
             stream: Stream | None = None):
        """Add a sound file of at most CLAP's window to the session's stream, and draw the last window of it.
        Gives the picture, the pictures a second, a sentence if something was wrong, and the stream."""
        encoder = self.studio.encoder
        try:
            name_of(sound)
            self.studio.check_sound(sound, encoder.window_s + 0.05)
            with usable(sound):
                [waveform], flags = decode_audio(sound, encoder.sampling_rate, encoder.window_s)
        except UserError as error:
            return gr.skip(), "", self.sentence(error, sound), stream
        if flags:  # of stereo that cancels itself out, a trace of noise is left
            waveform = np.zeros_like(waveform)
        stream = self.feed((encoder.sampling_rate, waveform), stream)
        return *self.now(prompt, strength, seed, stream), stream

    def feed(self, sound: tuple[int, np.ndarray] | None, stream: Stream | None) -> Stream:
        """Add a piece of sound to the session's stream, which is begun if there is none."""
        stream = stream or Stream(self.studio)
        if sound is not None:
            stream.add(*sound)
        return stream

    def now(self, prompt: str, strength: float, seed: int, stream: Stream | None):
        """Draw the last window of a stream, if something has come since the last picture."""
        if not (stream and stream.fresh):
            return gr.skip(), gr.skip(), gr.skip()
        try:
            prompt, strength, seed = checked(prompt=prompt, strength=strength, seed=seed)
            picture, pace = stream.picture(prompt, strength, seed), stream.pace()
        except (UserError, RunFailed, torch.OutOfMemoryError) as error:
            return gr.skip(), "", self.sentence(error)
        rate = f"{pace:.1f} pictures a second" if pace else "the first picture"
        silent = ["silence: no sound at all"] if stream.silent else []
        return picture, rate, "; ".join(silent + self.studio.remarks(prompt))

    def left(self, request: gr.Request) -> None:
        """Someone has closed the page: nobody waits for the rest."""
        self.jobs.stop(request.session_hash)

    def take(self, row) -> str | None:
        """A clip of the run's data, copied to where the page may hand it out; None, with a word on the page,
        if it is gone."""
        if row.audio_path not in self.taken:
            copy = Path(tempfile.mkdtemp(dir=self.place)) / row.audio_path.name
            try:
                shutil.copyfile(row.audio_path, copy)
            except OSError as error:
                gr.Warning(f"{row.audio_path.name}: cannot be read ({error.strerror}); take another one")
                return None
            self.taken[row.audio_path] = str(copy)
        return self.taken[row.audio_path]

    def joined(self, rows: list) -> str | None:
        """The sounds of several clips one after another, as a file. What cannot be read is left out."""
        encoder, parts, key = self.studio.encoder, [], tuple(row.audio_path for row in rows)
        if key in self.taken:
            return self.taken[key]
        for row in rows:
            try:
                parts += decode_audio(row.audio_path, encoder.sampling_rate, encoder.window_s)[0]
            except BadFile:
                continue
        if not parts:
            return None
        path = Path(tempfile.mkdtemp(dir=self.place)) / "several-sounds.wav"
        soundfile.write(path, np.concatenate(parts), encoder.sampling_rate)
        self.taken[key] = str(path)
        return str(path)


def show(made: list[tuple[Image.Image, Image.Image]], heat_map: bool) -> list[Image.Image]:
    """The pictures, or the same under their heat."""
    return [pair[bool(heat_map)] for pair in made]


def clock(seconds: float) -> str:
    """62.5 -> 1:02.5"""
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"
