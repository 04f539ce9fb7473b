"""An example of the sound world as a short video, in the containers and codecs that people have."""

import io

import numpy as np
from PIL import Image

from clap2diffusion.world.sound_world import SAMPLING_RATE

# suffix -> container, and codecs with options of picture and sound
CODECS = {"mp4": ("mp4", "libx264", {"crf": "10", "preset": "veryfast"}, "aac"),
          "webm": ("webm", "libvpx-vp9", {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"},
                   "libopus"),
          "mkv": ("matroska", "libx264", {"crf": "10", "preset": "veryfast"}, "libopus"),
          "mov": ("mov", "libx264", {"crf": "10", "preset": "veryfast"}, "aac")}
FORMATS = tuple(CODECS)
SCALE, FPS, SOUND_BITS = 4, 10, 192_000  # colours are stored at half the size, so a pixel becomes 4 x 4
BLOCK = 1024  # samples handed to the encoder at once


def film(scene: Image.Image, waveform: np.ndarray, suffix: str) -> bytes:
    """A video file: the picture, enlarged, for as long as the sound (samples,) at SAMPLING_RATE lasts."""
    import av
    form, video_codec, options, audio_codec = CODECS[suffix]
    size, content = (scene.width * SCALE, scene.height * SCALE), io.BytesIO()
    image = scene.convert("RGB").resize(size, Image.Resampling.NEAREST)
    samples = np.clip(waveform, -1, 1).astype(np.float32)
    no_ids = {"fflags": "bitexact"}  # Matroska's would be random
    with av.open(content, "w", format=form, options=no_ids) as container:
        video = container.add_stream(video_codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.thread_count = 1  # so the bytes are the same on every machine
        sound = container.add_stream(audio_codec, rate=SAMPLING_RATE, layout="mono")
        sound.bit_rate = SOUND_BITS
        for i in range(round(len(samples) / SAMPLING_RATE * FPS)):
            frame = av.VideoFrame.from_image(image)
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for at in range(0, len(samples), BLOCK):
            block = av.AudioFrame.from_ndarray(samples[None, at:at + BLOCK], format="flt", layout="mono")
            block.sample_rate, block.pts = SAMPLING_RATE, at
            container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    return content.getvalue()
