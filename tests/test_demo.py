"""The page, through its running server and API: what comes back is what generate.py and CLAP give."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
import torch
from conftest import CLAP, ENV, ROOT, ok, script, wait_for
from PIL import Image
from test_generate import RATE, write, write_adapter

from clap2diffusion.base.exits import UserError

pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")
gradio_client = pytest.importorskip("gradio_client")
from clap2diffusion.demo import __main__ as entry  # noqa: E402
from clap2diffusion.demo import own_data  # noqa: E402
from clap2diffusion.demo.page import Ended, Page  # noqa: E402
from tools.browser import serve  # noqa: E402

LINE = "there is no sound yet; upload one, record one, or take an example"


@pytest.fixture(scope="module")
def strong(tmp_path_factory, world) -> Path:
    """An untrained adapter on which every sound makes another picture, as a stage's folder of the world."""
    folder = tmp_path_factory.mktemp("strong")
    (folder / "config.json").write_text(json.dumps({"data_root": str(world)}))
    return write_adapter(folder / "adapter.safetensors", 0.4)


@pytest.fixture(scope="module")
def demo(strong):
    """The page's address. Whatever the tests do, there is no traceback in what it says."""
    with serve(strong, env=ENV, log=strong.parent / "said") as url:
        yield url
    said = (strong.parent / "said").read_text()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("stopped by SIGINT: "), said


@pytest.fixture(scope="module")
def client(demo):
    return gradio_client.Client(demo, verbose=False)


@pytest.fixture(scope="module")
def waves(tmp_path_factory) -> dict[str, Path]:
    """A tone of 4 s, noise of 4 s, 11 s of both, silence, text named .wav, and 601 s."""
    place, t = tmp_path_factory.mktemp("waves"), np.arange(4 * RATE) / RATE
    noise = 0.5 * np.clip(np.random.default_rng(0).standard_normal(len(t)) / 3, -1, 1)
    found = {"tone": 0.6 * np.sin(2 * np.pi * 900 * t), "noise": noise, "silence": np.zeros(RATE)}
    found["long"] = np.concatenate([found["tone"], noise, found["tone"]])[:11 * RATE]
    paths = {name: write(place / f"{name}.wav", wave) for name, wave in found.items()}
    soundfile.write(place / "opposed.wav", np.stack([noise, -noise], 1), RATE)
    (place / "text.wav").write_text("no sound " * 99)
    soundfile.write(place / "hours.wav", np.zeros(601 * 8000), 8000, subtype="PCM_U8")
    soundfile.write(place / "minute.wav", np.zeros(60 * 8000), 8000, subtype="PCM_U8")
    return paths | {name: place / f"{name}.wav" for name in ("text", "hours", "minute", "opposed")}


def sent(path: Path):
    return gradio_client.handle_file(path)


def draw(strong: Path, place: Path, *flags) -> None:
    """Have generate.py write PLACE/out.png or out-1.png, ... One picture at a time, as the page draws:
    several at once round otherwise."""
    ok(script("generate.py", "--run", strong, "--out", place / "out.png", "--batch-size", 1, *flags))


def pixels(picture) -> np.ndarray:
    return np.asarray(Image.open(picture).convert("RGB"))


def test_one_sound_is_generate_py_bit_for_bit(client, strong, waves, tmp_path):
    shown, spectrogram, heard, message = client.predict(
        sent(waves["tone"]), "at dusk", 0.8, 4, 7, 2, False, api_name="/one_sound")
    assert len(shown) == 2 and message == "" and Image.open(spectrogram).size == (256, 48)
    draw(strong, tmp_path, "--audio", waves["tone"], waves["tone"], "--each", "--prompt", "at dusk",
         "--audio-scale", 0.8, "--guidance", 4, "--seed", 7)
    for i in (0, 1):
        assert np.array_equal(pixels(shown[i]["image"]), pixels(tmp_path / f"out-{i + 1}.png")), i
    under_heat, *_ = client.predict(sent(waves["tone"]), "at dusk", 0.8, 4, 7, 1, True, api_name="/one_sound")
    assert Image.open(under_heat[0]["image"]).size == (128, 128)


def test_what_it_hears_is_claps_own_text_tower(client, world, waves):
    """Against transformers' whole ClapModel, with the texts of labels.json."""
    import transformers
    row = json.loads((world / "metadata.jsonl").read_text().splitlines()[-1])
    *_, heard, _ = client.predict(sent(world / row["audio_file_name"]), api_name="/one_sound")
    texts = {name: one["en"] for name, one in json.loads((world / "labels.json").read_text()).items()}
    used = sorted({name for line in (world / "metadata.jsonl").read_text().splitlines()
                   for name in json.loads(line)["label"].split("+")})
    model, tokenizer = (kind.from_pretrained(CLAP) for kind in (transformers.ClapModel,
                                                                transformers.AutoTokenizer))
    sound = soundfile.read(world / row["audio_file_name"], dtype="float32")[0]
    extractor = transformers.ClapFeatureExtractor.from_pretrained(CLAP)
    with torch.no_grad():
        tokens = tokenizer([texts[name] for name in used], padding=True, return_tensors="pt")
        words = model.get_text_features(**tokens)
        mel = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        audio = model.get_audio_features(input_features=mel["input_features"])
    near = torch.cosine_similarity(audio.pooler_output, words.pooler_output)
    best = [f"{used[i].replace('_', ' ')} {near[i]:.2f}" for i in near.argsort(descending=True)[:3]]
    assert heard == f"most like: {best[0]}; then {best[1]}, {best[2]}"


def test_two_sounds_are_mixed_and_interpolated_as_by_generate_py(client, strong, waves, tmp_path):
    picture, strip, message = client.predict(sent(waves["tone"]), sent(waves["noise"]), 0.25, 3, "", 5,
                                             api_name="/two_sounds")
    files = ("--audio", waves["tone"], waves["noise"], "--seed", 5)
    assert message == "" and [one["caption"] for one in strip] == ["0 %", "50 %", "100 %"]
    draw(strong, tmp_path, *files, "--weights", 0.75, 0.25)
    assert np.array_equal(pixels(picture), pixels(tmp_path / "out.png"))
    draw(strong, tmp_path, *files, "--interpolate", 3)
    for i, one in enumerate(strip, 1):
        assert np.array_equal(pixels(one["image"]), pixels(tmp_path / f"out-{i}.png")), i


def test_a_long_sound_becomes_a_storyboard(client, strong, waves, tmp_path):
    board, message = client.predict(sent(waves["long"]), 3, "", 0, api_name="/long_sound")
    draw(strong, tmp_path, "--audio", waves["long"], "--every", 3)
    notes = [json.loads(Image.open(tmp_path / f"out-{i + 1}.png").text["clap2diffusion"])
             for i in range(len(board["windows"]))]
    assert message == "" and not (tmp_path / f"out-{len(notes) + 1}.png").exists()
    assert [one["start_s"] for one in board["windows"]] == [note["start_s"] for note in notes]
    assert board["windows"][1]["time"] == "0:03.0"
    for i, one in enumerate(board["windows"], 1):
        content = io.BytesIO(base64.b64decode(one["picture"].partition(",")[2]))
        assert np.array_equal(pixels(content), pixels(tmp_path / f"out-{i}.png")), i


def test_live_follows_the_sound_alone(demo, waves):
    """The same sound makes the same picture, another one another; silence is no sound."""
    def last(*names: str) -> tuple[np.ndarray, str, str]:
        session = gradio_client.Client(demo, verbose=False)  # a stream of its own
        for name in names:
            picture, rate, message = session.predict(sent(waves[name]), "", 1, 3, api_name="/live")
        return pixels(picture), rate, message
    tone, first, message = last("tone")
    assert first == "the first picture" and message == ""
    assert np.array_equal(last("tone")[0], tone) and not np.array_equal(last("noise")[0], tone)
    picture, rate, _ = last("noise", "noise", "tone")
    heard_s = 4  # the window of the small CLAP: the noise has left it
    assert soundfile.info(waves["tone"]).duration == heard_s and np.array_equal(picture, tone)
    assert rate.endswith(" pictures a second") and float(rate.split()[0]) > 0
    assert last("silence")[2] == "silence: no sound at all"


@pytest.mark.parametrize("endpoint, values, says", [
    ("one_sound", [None], LINE),
    ("one_sound", ["text"], "text.wav: not a sound that libsndfile or FFmpeg reads ("),
    ("one_sound", ["hours"], "hours.wav: 601 s long, expected at most 600 s; cut out the part"),
    ("one_sound", ["silence"], "silence.wav is silent or cancels itself out in mono: the pictures are made"),
    ("one_sound", ["long"], "long.wav: 11.0 s long, of which CLAP hears the first 4 s; the tab Long"),
    ("one_sound", ["tone", "", 1, 3, -1], "seed: got -1, expected a whole number from 0 to 2.14748e+09"),
    ("one_sound", ["tone", "", 1, 3, 1.5], "seed: got 1.5, expected a whole number"),
    ("one_sound", ["tone", "", 1, 3, "many"], 'seed: got "many", expected a whole number'),
    ("one_sound", ["tone", "", None], "strength: is empty; give one"),
    ("one_sound", ["tone", "", -1], "strength: got -1, expected a number from 0 to 10"),
    ("one_sound", ["tone", "", 1, 3, 0, 9], "pictures: got 9, expected a whole number from 1 to 8"),
    ("one_sound", ["tone", "", 1, 3, 0, 1, "no"], 'heat map: got "no", expected true or false'),
    ("one_sound", ["tone", 5], "prompt: got 5, expected a text"),
    ("two_sounds", ["tone", "tone", 1.1], "mix: got 1.1, expected a number from 0 to 1"),
    ("live", ["opposed"], "silence: no sound at all"),
    ("live", ["tone", "", "x"], 'strength: got "x", expected a number'),
    ("one_sound", ["tone", "a very long prompt " * 40], "the prompt is too long: 362 tokens, of which 32"),
    ("two_sounds", ["tone", None], LINE.replace("no sound", "no second sound")),
    ("two_sounds", ["tone", "silence"], "silence.wav is silent, and nothing lies between a sound"),
    ("two_sounds", ["long", "tone"], "long.wav: 11.0 s long, of which CLAP hears the first 4 s; the"),
    ("live", ["text"], "text.wav: not a sound that libsndfile or FFmpeg reads ("),
    ("live", ["hours"], "hours.wav: 601 s long, expected at most 4.05 s"),
    ("long_sound", ["hours", 1], "hours.wav: 601 s long"),
    ("long_sound", ["minute", 0.5], "a picture every 0.5 s makes 113 of minute.wav, expected at most 60;"),
])
def test_an_error_is_one_sentence_in_the_message(endpoint, values, says, client, waves):
    client.reset_session()  # of Live, no sound is left from the test before
    values = [sent(waves[value]) if value in waves else value for value in values]
    message = client.predict(*values, api_name=f"/{endpoint}")[-1]
    assert message.startswith(says) and "/" not in message and len(message.splitlines()) == 1, message


def asked(demo: str, data: list, api_name: str = "one_sound") -> str:
    """What the page answers to a program that writes its own call."""
    address = f"{demo}/gradio_api/call/{api_name}"
    event = httpx.post(address, json={"data": data}).json()["event_id"]
    return httpx.get(f"{address}/{event}", timeout=60).text


def as_file(path) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def uploaded(demo: str, path: Path) -> str:
    with path.open("rb") as file:
        return httpx.post(f"{demo}/gradio_api/upload", files={"files": (path.name, file)}).json()[0]


def test_only_what_was_uploaded_is_read_and_nothing_is_fetched(demo, waves):
    rest = ["", 1, 4, 0, 1, False]
    for path in ("/etc/passwd", waves["tone"], "../README.md", "http://192.0.2.7/a.wav", "\0", "x" * 5000):
        assert "Sound: got a file or address that was not uploaded to" in asked(demo, [as_file(path), *rest])
    hidden = {"prompt": as_file("http://192.0.2.7/a.wav")}
    assert "Prompt: got a dict, expected a text" in asked(demo, [None, hidden, *rest[1:]])
    for value in ("/etc/passwd", 5, [], {"path": "a.wav", "more": as_file("http://192.0.2.7/a.wav")}):
        assert "Sound: got no file; with gradio_client" in asked(demo, [value, *rest])
    assert "got 0 values, expected 7; " in asked(demo, [])
    path = uploaded(demo, waves["noise"])
    Path(path).unlink()  # as an hour later
    said = asked(demo, [as_file(path), *rest])
    assert "Sound: the file is gone, since the page keeps files for an hour; give it again" in said


def test_a_fifth_microphone_is_heard_at_once(demo, waves):
    """A microphone holds its place for as long as it is on, so their number must have no limit."""
    events = httpx.get(f"{demo}/config").json()["dependencies"]
    [event] = [one["id"] for one in events if any(name == "stream" for _, name in one["targets"])]
    piece = as_file(uploaded(demo, waves["tone"]))
    for session in map(str, range(6)):
        call = {"fn_index": event, "data": [piece, None], "session_hash": session}
        assert httpx.post(f"{demo}/gradio_api/queue/join", json=call).is_success
        with httpx.stream("GET", f"{demo}/gradio_api/queue/data", params={"session_hash": session},
                          timeout=10) as said:
            assert any("process_streaming" in line for line in said.iter_lines()), session


def test_a_field_that_is_emptied_is_no_error(demo):
    """The list of the run's own clips, as the browser sends it."""
    config = httpx.get(f"{demo}/config").json()
    [own] = [one["id"] for one in config["components"] if one["props"].get("elem_id") == "one-own"]
    [event] = [one["id"] for one in config["dependencies"] if [own, "input"] in one["targets"]]
    call = {"fn_index": event, "data": [None], "session_hash": "own"}
    assert httpx.post(f"{demo}/gradio_api/run/predict", json=call).json()["data"] == [None]


def test_a_session_that_stops_frees_the_queue(demo, client, waves):
    """gradio_client's cancel, as closing the page or Stop: eight pictures are not drawn to the end."""
    other = gradio_client.Client(demo, verbose=False)
    job = other.submit(sent(waves["tone"]), "", 1, 3, 0, 8, False, api_name="/one_sound")
    wait_for(lambda: any(one[0] for one in job.outputs()), "the first picture")
    job.cancel()
    board, message = client.predict(sent(waves["noise"]), 30, "", 0, api_name="/long_sound")
    assert len(board["windows"]) == 1 and message == "" and len(job.outputs()[-1][0]) < 8


def test_stop_is_heard_between_two_steps():
    """In the session and tab that it is for; leaving the page stops all of a session's tabs."""
    page, done = Page(None, None), []
    me, other = SimpleNamespace(session_hash="me"), SimpleNamespace(session_hash="other")
    for stop in (lambda: page.jobs.stop("me", "one"), lambda: page.left(me)):
        with page.work(me, "one", lambda share, desc: done.append((share, desc)), 4, 2) as each:
            after = each(1)
            page.jobs.stop("me", "two")
            page.left(other)
            after(2)
            stop()
            with pytest.raises(Ended):
                after(3)
    assert done == [(0.5, "picture 2 of 2"), (0.75, "picture 2 of 2")] * 2 and not page.jobs.stops


def test_examples_are_one_a_label_of_the_test_split(world, strong):
    data = own_data.OwnData("", strong)
    rows = [json.loads(line) for line in (world / "metadata.jsonl").read_text().splitlines()]
    single = {row["label"] for row in rows if row["split"] == "test" and "+" not in row["label"]}
    labels = [row.label for row in data.examples]
    assert {row.split for row in data.examples} == {"test"} and len(labels) == 10
    assert set(labels[:len(single)]) == single and {row.split for row in data.listed} == {"test", "val"}
    assert len(data.listed) == 30 and data.left_out == 0 and not data.why


def test_without_its_data_the_page_says_so(tmp_path, strong):
    data = own_data.OwnData(str(tmp_path / "gone"), strong)
    assert not data.examples and data.why.startswith(f"{tmp_path}/gone: no such data folder; ")


def entered(*flags, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "clap2diffusion.demo", *map(str, flags)], cwd=ROOT,
                          env=ENV | more, capture_output=True, text=True)


def test_wrong_flags_are_one_sentence(strong, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, says in (
            (["--run", tmp_path / "none"], "holds no adapter.safetensors"),
            (["--run", strong, "--port", port], f"--port {port}: is taken by another program; give another"),
            (["--run", strong, "--host", "192.0.2.7"], "--host 192.0.2.7: is no address of this machine ("),
            (["--run", strong, "--base-model", tmp_path], "base model '"),
        ):
            with pytest.raises(UserError, match=says.replace("(", r"\(")):
                entry.main(list(map(str, flags)))
        monkeypatch.setattr(entry, "FIRST_PORT", port)
        assert entry.pick_port("127.0.0.1", None) > port
    monkeypatch.setattr(entry.packages, "is_missing", lambda name: name == "gradio")
    with pytest.raises(UserError, match="lacks gradio, .* is: bash run_demo.sh$"):
        entry.main(["--run", str(strong)])


def test_the_port_is_picked_once_the_models_are_loaded(strong, monkeypatch):
    """Two pages that start together both find the first port free."""
    from clap2diffusion.demo import serving
    with socket.socket() as other:
        def slow(*args) -> None:
            other.bind(("127.0.0.1", 0))
            other.listen()
            monkeypatch.setattr(entry, "FIRST_PORT", other.getsockname()[1])
            assert args[-1]() > other.getsockname()[1]
            done.append(True)
        done = []
        monkeypatch.setattr(serving, "serve", slow)
        entry.main(["--run", str(strong)])
    assert done


def test_a_wrong_run_ends_before_torch_loads(tmp_path):
    done = entered("--run", tmp_path, "--device", "cpu")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
