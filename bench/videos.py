"""What preparing videos costs, beside plain decoding by FFmpeg.

    python bench/videos.py                              # 300 clips; writes bench/results/videos-300-*
    python bench/videos.py --clips 20000 --seconds 4    # a quarter of an hour on two cores

Clips are made on the spot: a few short videos with motion and sound, under many names (hard links). Ours is
`prepare_data.py videos` with one worker, without its start and its contact sheet: 55 clips less 15. Plain is
what a script does: the sound of the window to mono FLAC and the frame in its middle to JPEG, by PyAV in one
process, and by the program ffmpeg, called twice a clip, where it is installed. Memory is the peak of all
processes together at a tenth of the clips and at all. Restart: the seconds until the first new clip after
kill -9, and of a call when all is done."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_tools as tools
import numpy as np
import soundfile

from clap2diffusion.base.settings import Number

PARSER = tools.bench_parser(__doc__, repeats=3)
add = PARSER.add_argument
add("--clips", type=Number(int, 20), default=300, help="clips")
add("--seconds", type=Number(int, 2, 600), default=10, help="length of a clip")
add("--side", type=Number(int, 64, 4096, multiple_of=2), default=256, help="height of its picture in pixels")
KINDS = 6  # different videos
FPS, RATE = 25, 44_100


def make_video(path: Path, seed: int, seconds: int, side: int) -> None:
    """A video whose picture pans over noise of several scales, under a noisy tone; in H.264 and AAC, as
    downloads have them."""
    import av
    rng = np.random.default_rng(seed)
    width = side * 4 // 3 // 2 * 2
    big = np.zeros((side * 2, width * 2, 3))
    for scale in (4, 16, 64):
        noise = rng.uniform(0, 80, (side * 2 // scale + 1, width * 2 // scale + 1, 3))
        big += np.kron(noise, np.ones((scale, scale, 1)))[:side * 2, :width * 2]
    big, t = big.astype(np.uint8), np.arange(seconds * RATE) / RATE
    sound = (0.3 * np.sin(2 * np.pi * (200 + 100 * seed) * t) + 0.05 * rng.standard_normal(len(t)))
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, side, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        for i in range(seconds * FPS):
            x, y = (i * 2) % width, i % side
            picture = np.ascontiguousarray(big[y:y + side, x:x + width])
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        for at in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, at:at + 1024].astype(np.float32), format="fltp",
                                               layout="mono")
            frame.sample_rate, frame.pts = RATE, at
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def make_clips(clips: Path, n: int, seconds: int, side: int) -> Path:
    """A folder of n videos, hard links to a few real ones beside it."""
    kinds = clips.with_name("kinds")
    if not kinds.exists():
        kinds.mkdir(parents=True)
        for seed in range(KINDS):
            make_video(kinds / f"{seed}.mp4", seed, seconds, side)
    clips.mkdir()
    for i in range(n):
        (clips / f"label {i % 20}").mkdir(exist_ok=True)
        os.link(kinds / f"{i % KINDS}.mp4", clips / f"label {i % 20}" / f"{i:06d}.mp4")
    return clips


def command(clips: Path, out: Path, workers: int, seconds: int) -> list[str]:
    return [sys.executable, str(tools.ROOT / "prepare_data.py"), "videos", "--videos", str(clips), "--out",
            str(out), "--workers", str(workers), "--window-s", str(seconds)]


def family_mb(pid: int) -> float:
    """Memory of a process and its children, each page that they share counted once, in MB."""
    pids, total = [pid], 0
    with contextlib.suppress(OSError, ValueError):
        pids += Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    for one in pids:
        with contextlib.suppress(OSError, IndexError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="utf-8")
            total += int(lines.split("\nPss:")[1].split()[0])
    return total / 1e3


def prepare(clips: Path, out: Path, workers: int, seconds: int) -> tuple[float, float]:
    """Seconds and peak memory in MB of one preparation."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command(clips, out, workers, seconds), cwd=tools.ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, family_mb(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0
    return time.perf_counter() - began, peak


def plain(path: Path, out: Path, seconds: int) -> None:
    """What a short script with PyAV does for a clip."""
    import av
    with av.open(str(path)) as container:
        blocks, resampler = [], av.AudioResampler("s16", "mono")
        for frame in container.decode(audio=0):
            if frame.time >= seconds:
                break
            blocks += [part.to_ndarray() for part in resampler.resample(frame)]
        content = io.BytesIO()
        soundfile.write(content, np.concatenate(blocks, 1)[0], frame.sample_rate, format="FLAC")
        out.with_suffix(".flac").write_bytes(content.getvalue())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(seconds / 2 / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= seconds / 2:
                break
        frame.to_image().save(out.with_suffix(".jpg"), quality=95, subsampling=0)


def by_program(path: Path, out: Path, seconds: int) -> None:
    """The two calls of the program ffmpeg that scripts make for a clip."""
    for flags in (["-ss", "0", "-t", str(seconds), "-i", str(path), "-vn", "-ac", "1", f"{out}.flac"],
                  ["-ss", str(seconds / 2), "-i", str(path), "-frames:v", "1", "-q:v", "2", f"{out}.jpg"]):
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", "-threads", "1", *flags], check=True)


def each(function, clips: Path, out: Path, n: int, seconds: int) -> float:
    """Seconds a clip of a function over the first n clips."""
    out.mkdir(exist_ok=True)
    paths = sorted(clips.rglob("*.mp4"))[:n]
    began = time.perf_counter()
    for i, path in enumerate(paths):
        function(path, out / str(i), seconds)
    return (time.perf_counter() - began) / len(paths)


def ours(few: Path, many: Path, place: Path, seconds: int) -> float:
    """Seconds a clip with one worker, without the start: of the difference of two folders."""
    times = []
    for clips in (few, many):
        shutil.rmtree(place / "ours", ignore_errors=True)
        times.append(prepare(clips, place / "ours", 1, seconds)[0])
    return (times[1] - times[0]) / (count(many) - count(few))


def count(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.mp4"))


def time_restart(clips: Path, out: Path, seconds: int) -> tuple[float, float]:
    """Seconds from a restart after kill -9 to its first new clip, and of a call when all is done."""
    def sounds() -> int:
        return sum(1 for _ in os.scandir(out / "audio")) if (out / "audio").exists() else 0
    quiet = {"cwd": tools.ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(clips, out, 2, seconds), **quiet)
    while sounds() < count(clips) * 3 // 4:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # its workers see that it is gone
    newest = max(entry.stat().st_mtime_ns for entry in os.scandir(out / "audio"))
    began = time.perf_counter()
    process = subprocess.Popen(command(clips, out, 2, seconds), **quiet)
    while max((entry.stat().st_mtime_ns for entry in os.scandir(out / "audio")), default=0) <= newest:
        time.sleep(0.05)
    first = time.perf_counter() - began
    assert process.wait() == 0
    began = time.perf_counter()
    subprocess.run(command(clips, out, 2, seconds), check=True, **quiet)
    return first, time.perf_counter() - began


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    sizes = {"few": 15, "some": 55,  # the contact sheet shows 12
              "tenth": max(2, args.clips // 10), "all": args.clips}
    few, some, tenth, clips = (make_clips(place / name, n, args.seconds, args.side)
                               for name, n in sizes.items())
    seen: dict[str, list[float]] = {"ours": [], "plain": [], "ffmpeg": []}
    program = bool(shutil.which("ffmpeg"))
    for _ in range(args.repeats):
        seen["ours"].append(ours(few, some, place, args.seconds))
        seen["plain"].append(each(plain, some, place / "plain", 40, args.seconds))
        if program:
            seen["ffmpeg"].append(each(by_program, some, place / "program", 40, args.seconds))
    peaks = {}
    for folder in (tenth, clips):
        shutil.rmtree(place / "peak", ignore_errors=True)
        total, peaks[folder] = prepare(folder, place / "peak", 2, args.seconds)
    first, again = time_restart(clips, place / "restart", args.seconds)
    found = {"ours, s a clip": tools.spread(seen["ours"]),
             "PyAV alone, s a clip": tools.spread(seen["plain"]),
             "ours / PyAV alone": tools.ratios(seen["ours"], seen["plain"])}
    if program:
        found |= {"the program ffmpeg, s a clip": tools.spread(seen["ffmpeg"]),
                  "ours / the program ffmpeg": tools.ratios(seen["ours"], seen["ffmpeg"])}
    found |= {"all clips with 2 workers, s": total, f"peak memory at {count(tenth)} clips, MB": peaks[tenth],
              f"at {args.clips} clips, MB": peaks[clips], "first new clip after kill -9, s": first,
              "a call when all is done, s": again}
    about = f"clips of {args.seconds} s, {args.side} px, H.264 and AAC, {args.repeats} turns of 40 clips"
    tools.write_results(f"videos-{args.clips}", about, [{"what": what, "value": value}
                                                        for what, value in found.items()], device="cpu")
