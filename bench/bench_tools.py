"""What the benchmarks share: models of real size with random weights, watched scripts, tables of results."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from config import RunFailed, write_atomic, write_json  # noqa: E402


def models(args, place: Path) -> list[str]:
    """Flags that name the base model and CLAP: the default's, or for --sd15 those of --models, made there if missing."""
    if not args.sd15:
        return ["--base-model", "assets/tiny/base", "--clap-model", "assets/tiny/clap"]
    folder = Path(args.models or place / "models")
    if not (folder / "clap/preprocessor_config.json").exists():  # the last that is written
        make_sd15(folder)
    return ["--base-model", str(folder / "base"), "--clap-model", str(folder / "clap")]


def model_flags(parser) -> None:
    parser.add_argument("--sd15", action="store_true", help="SD 1.5's architecture with random weights instead of the default's models")
    parser.add_argument("--models", default="", help="where --sd15's models lie, or are made and kept ('' = make them anew)")


def make_sd15(folder) -> None:
    """Stable Diffusion 1.5 and larger_clap's shapes from their published configs, with random weights."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512)
    tokenizer = CLIPTokenizer(model_max_length=77).train_new_from_iterator(["a photo of a dog barking"], 400)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False
                            ).save_pretrained(folder / "base")
    audio = dict(spec_size=256, num_mel_bins=64, patch_embeds_hidden_size=128, hidden_size=1024, depths=[2, 2, 12, 2],
                 num_attention_heads=[4, 8, 16, 32], enable_fusion=False)
    ClapModel(ClapConfig(text_config=dict(num_hidden_layers=1), audio_config=audio, projection_dim=512)).save_pretrained(
        folder / "clap")
    ClapFeatureExtractor(feature_size=64, sampling_rate=48000, hop_length=480, max_length_s=10, fft_window_size=1024,
                         truncation="rand_trunc", padding="repeatpad", frequency_min=50, frequency_max=14000
                         ).save_pretrained(folder / "clap")
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def call(*command) -> None:
    """Run a script of ours in a process of its own; its last line is the reason where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{' '.join(map(str, command))}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")


def watched(out: Path, *command, steps: int = 0) -> dict:
    """Run a training script under watch.py, to its end or for so many optimizer steps; `step_s` is the median between them."""
    out.unlink(missing_ok=True)
    os.environ |= {"WATCH_BEGAN": repr(time.time()), "WATCH_STEPS": str(steps)}
    call(HERE / "watch.py", out, *command)
    seen = json.loads(out.read_text())
    if len(seen["steps"]) > 1:
        seen["step_s"] = statistics.median(b - a for a, b in zip(seen["steps"], seen["steps"][1:]))
    return seen


def device_name(device: str = "auto") -> str:
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else f"CPU, {torch.get_num_threads()} threads"


def spread(values: list[float]) -> list[float]:
    """[median, lowest, highest]."""
    return [statistics.median(values), min(values), max(values)]


def show(value) -> str:
    """A table's cell: spreads as `median [low, high]`, numbers to four digits."""
    if isinstance(value, list):
        return f"{show(value[0])} [{show(value[1])}, {show(value[2])}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(name: str, script: str, argv: list[str] | None, about: str, rows: list[dict], device: str = "auto") -> None:
    """Write results/NAME-DEVICE.json and .md, a table with the command above it, and print the latter."""
    import torch
    machine = device_name(device)
    command = shlex.join(["python", f"bench/{script}", *(sys.argv[1:] if argv is None else argv)])
    path = Path(os.environ.get("BENCH_RESULTS", HERE / "results")) / f"{name}-{machine.split(',')[0].replace(' ', '-')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"`{command}`: {machine}, torch {torch.__version__}; {about}", "", f"| {' | '.join(rows[0])} |",
             "|" + "---|" * len(rows[0]), *(f"| {' | '.join(map(show, row.values()))} |" for row in rows)]
    write_json(path.with_suffix(".json"), {"command": command, "device": machine, "torch": torch.__version__, "about": about, "rows": rows})
    write_atomic(path.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines), flush=True)
