"""From ComfyUI's AUDIO to CLAP's embeddings, as the adapter's training made them, on the CPU in float32.

Shapes: B sounds, C channels, T samples, E width of CLAP's embedding."""

import functools
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import scipy.signal
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor

MIN_CLIP_S = 0.1
SILENT_PEAK, CANCELLED_SHARE = 1e-5, 1e-3  # -100 dB of full scale; -60 dB of what the channels had
# what changes a sound's way through CLAP and shows in no tensor's shape, with the library's defaults
EXTRACTOR = {"feature_size": 64, "sampling_rate": 48000, "hop_length": 480, "max_length_s": 10,
             "fft_window_size": 1024, "padding_value": 0, "frequency_min": 0, "frequency_max": 14000,
             "top_db": None, "truncation": "fusion", "padding": "repeatpad"}
AUDIO_TOWER = {"window_size": 8, "num_mel_bins": 64, "spec_size": 256, "hidden_act": "gelu", "patch_size": 4,
               "patch_stride": [4, 4], "num_attention_heads": [4, 8, 16, 32], "enable_fusion": False,
               "fusion_type": None, "flatten_patch_embeds": True, "enable_patch_layer_norm": True,
               "projection_hidden_act": "relu", "layer_norm_eps": 1e-5}
READ = ("audio_model.", "audio_projection.")
DERIVED = ("position_ids", "num_batches_tracked", "relative_position_index")
TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
         "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def find_clap(given: str, trained: str, folders: list[str]) -> Path:
    """The folder of a CLAP: `given`, or else the one that the adapter names. It is looked for as a path, in
    `folders`, and in Hugging Face's cache. Nothing is downloaded. Raises ValueError."""
    name = given.strip() or trained
    last = name.rstrip("/").rpartition("/")[2]
    inside = [Path(place, part) for place in folders for part in (name, last)]
    for folder in [Path(name).expanduser(), *inside]:
        if (folder / "config.json").is_file():
            return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        import huggingface_hub
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
    place = Path(folders[0], last)
    raise ValueError(f"CLAP {name}: there is no such folder with a config.json, here or in {folders[0]}; put "
                     f"the CLAP of the adapter's training there (hf download {trained} --local-dir {place}) "
                     "or write its folder into the field clap")


def _read_json(path: Path) -> dict:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _preprocessor(folder: Path) -> dict:
    path = folder / "processor_config.json"  # the library's newest versions write this one alone
    nested = _read_json(path).get("feature_extractor") if path.exists() else None
    return nested if nested is not None else _read_json(folder / "preprocessor_config.json")


def _tensors(folder: Path):
    """(name, tensor) of the audio tower, from the container that the library takes."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or index.exists():
        names = {whole.name} if whole.exists() else set(_read_json(index)["weight_map"].values())
        for name in sorted(names):
            with safe_open(folder / name, framework="pt") as file:
                yield from ((key, file.get_tensor(key)) for key in file.keys() if key.startswith(READ))
    else:
        state = torch.load(folder / "pytorch_model.bin", "cpu", weights_only=True)
        yield from ((key, tensor) for key, tensor in state.items() if key.startswith(READ))


def _sample(tensor: Tensor) -> bytes:
    """Eight blocks of 4 KiB from the first to the last byte; all of a tensor that is smaller."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    blocks = 8 if len(content) > 8 * 4096 else 1
    length = 4096 if blocks > 1 else len(content)
    starts = [i * (len(content) - length) // max(1, blocks - 1) for i in range(blocks)]
    return b"".join(content[start:start + length].numpy().tobytes() for start in starts)


def fingerprint(folder: Path) -> str:
    """The 16 digits by which an adapter knows its CLAP: of the audio tower's tensors and of the settings on a
    sound's way. The same as training wrote into the adapter. Raises ValueError: files are missing, broken or
    no CLAP's."""
    digest = hashlib.sha256()
    try:
        config = _read_json(folder / "config.json")
        if config.get("model_type") not in ("clap", "clap_audio_model"):
            raise ValueError(f"its config.json is of a {config.get('model_type')}")
        found = [{key: given.get(key, default) for key, default in known.items()} for given, known in (
            (_preprocessor(folder), EXTRACTOR), (config.get("audio_config", config), AUDIO_TOWER))]
        plain = [{key: float(value) if type(value) in (int, float) else value for key, value in one.items()}
                 for one in found]
        digest.update(json.dumps(plain, sort_keys=True).encode())
        for name, tensor in sorted(_tensors(folder), key=lambda one: one[0]):
            if not name.endswith(DERIVED):
                kind = TYPES[str(tensor.dtype).removeprefix("torch.")]
                digest.update(f"{name} {kind} {list(tensor.shape)} ".encode() + _sample(tensor))
    except Exception as error:  # readers fail in many ways on what is cut or foreign
        raise ValueError(f"{folder}: is not a whole CLAP model ({type(error).__name__}: {error}); copy or "
                         "download it again") from None
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1)  # two sounds of one workflow need it loaded once
def load_clap(folder: Path, name: str) -> tuple:
    """CLAP's extractor and audio tower from a folder. name: its fingerprint, so that another CLAP in the
    same folder is loaded anew."""
    model = transformers.ClapAudioModelWithProjection.from_pretrained(folder, local_files_only=True)
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
    return extractor, model.float().eval()


def resample(mono: np.ndarray, rate: int, to_rate: int) -> np.ndarray:
    """(T,) at `rate` -> float32 at `to_rate`. Training uses soxr, which is no requirement of ComfyUI; this is
    SciPy's polyphase filter with soxr's pass band (0.913 of the lower Nyquist frequency) and 120 dB stop
    band."""
    if rate == to_rate:
        return mono.astype(np.float32)
    shared = math.gcd(rate, to_rate)
    up, down = to_rate // shared, rate // shared
    half, cutoff = 90 * max(up, down), 0.9565 / max(up, down)
    taps = scipy.signal.firwin(2 * half + 1, cutoff, window=("kaiser", 12.3))
    return scipy.signal.resample_poly(mono, up, down, window=taps).astype(np.float32)


def hear(waveform: np.ndarray, rate: int, to_rate: int, window_s: float, start_s: float) -> np.ndarray | str:
    """(C, T) -> one mono window at `to_rate`, or why it counts as no sound. A window that would go beyond the
    end begins earlier. Raises ValueError: it is too short or holds NaN or infinity."""
    total = waveform.shape[1]
    if total < MIN_CLIP_S * rate:
        raise ValueError(f"the sound is {total / rate:.3f} s long, expected at least {MIN_CLIP_S} s; give a "
                         "longer one")
    length = min(total, round(window_s * rate))
    start = min(round(start_s * rate), total - length)
    window = waveform[:, start:start + length]
    if not np.isfinite(window).all():
        raise ValueError("the sound holds NaN or infinite samples; give another one")
    peak = float(np.abs(window).max())
    mono = (window / max(peak, 1.0)).mean(axis=0)
    if peak < SILENT_PEAK:
        return "silent"
    if np.abs(mono).max() < CANCELLED_SHARE * min(peak, 1.0):
        return "cancelled by the mono mix"
    return resample(mono.astype(np.float32), rate, to_rate)[:round(window_s * to_rate)]


@torch.no_grad()
def embed(folder: Path, name: str, waveforms: Tensor, rate: int, start_s: float) -> tuple[Tensor, list[str]]:
    """Sounds (B, C, T) -> audio_embeds (B, E) of unit length, by the CLAP of a folder, whose fingerprint is
    `name`; and a note for each sound that is none: its embedding is zeros, the null audio.
    Raises ValueError: a sound cannot be used."""
    extractor, model = load_clap(folder, name)
    to_rate, rows, notes = extractor.sampling_rate, [], []
    for i, waveform in enumerate(waveforms.float().cpu().numpy()):
        heard = hear(waveform, int(rate), to_rate, extractor.nb_max_samples / to_rate, start_s)
        if isinstance(heard, str):
            notes.append(f"sound {i + 1} of {len(waveforms)} is {heard}, which counts as no sound")
            rows.append(torch.zeros(1, model.config.projection_dim))
            continue
        inputs = dict(extractor([heard], sampling_rate=to_rate, return_tensors="pt"))
        # a fused CLAP would else call the clip longer than its window, at random
        inputs["is_longer"] = torch.zeros_like(torch.as_tensor(inputs["is_longer"]), dtype=torch.bool)
        rows.append(F.normalize(model(**inputs).audio_embeds.float(), dim=-1))
    return torch.cat(rows), notes
