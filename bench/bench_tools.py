"""What the benchmarks share: flags, models of real size, a small world, watched scripts, times, tables.

    python bench/bench_tools.py OUT.json SCRIPT.py FLAGS    # any script whose optimizer is one of torch's

It runs a training script and writes down when each optimizer step ended, its memory, and the peak after the
first. With WATCH_STEPS=N it ends after N steps, whatever the script would do then. It patches nothing but
common.validation_losses, whose losses of each clip it keeps. watched() calls it."""

import argparse
import itertools
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (first: it ends in one sentence where packages are missing)

# isort: split
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

import common
from clap2diffusion.base.device import peak_memory_mb
from clap2diffusion.base.exits import RunFailed, run_main
from clap2diffusion.base.files import write_atomic, write_json
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.settings import Number, new_parser

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUN, RESIDENT = "RUN", Path("/proc/self/clear_refs")
TINY = ROOT / "assets/tiny/base", ROOT / "assets/tiny/clap"
SHAPES = {  # channels of UNet and VAE, text width and heads, CLAP's width and depths
    "sd15": ((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12, 128, [2, 2, 12, 2]),
    "small": ((32, 32, 64, 64), (32, 32, 64, 64), 64, 2, 16, [1, 1, 1, 1])}
FLAGS = {"steps": (Number(int, 3), "optimizer steps of each run"), "repeats": (Number(int, 1), "turns"),
         "batch_size": (Number(int, 1), "samples in a step"),
         "image_size": (Number(int, 64, 1024, multiple_of=64), "side of the pictures")}


def bench_parser(doc: str, **defaults: int) -> argparse.ArgumentParser:
    """A parser with --sd15, --small and --models, and with those of FLAGS that a default is given for."""
    parser = new_parser(doc)
    add = parser.add_argument
    add("--sd15", action="store_const", dest="size", const="sd15", default="tiny",
        help="SD 1.5's architecture with random weights")
    add("--small", action="store_const", dest="size", const="small",
        help="the same with few channels: shows that a benchmark runs, where assets/ is missing too")
    add("--models", default="", help="where the random models lie, or are made and kept ('' = made anew)")
    for name, default in defaults.items():
        kind, text = FLAGS[name]
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    return parser


def automain(parser: argparse.ArgumentParser):
    """Decorator of a benchmark's main(args, place), the last function of its file: called where the file is
    the script that was started, with a folder that is removed at the end. It exits as our scripts do."""
    def decorate(main):
        def run():
            args = parser.parse_args()
            with tempfile.TemporaryDirectory() as place:
                main(args, Path(place))
        if main.__module__ == "__main__":
            run_main(run)
    return decorate


def models(args, place: Path) -> tuple[Path, Path]:
    """Base model and CLAP: the default's, or for --sd15 and --small those of --models, made if missing."""
    if args.size == "tiny":
        return TINY
    folder = Path(args.models or place / "models")
    if not (folder / "clap/preprocessor_config.json").exists():  # make_random writes it last
        make_random(folder, args.size)
    return folder / "base", folder / "clap"


def make_random(folder: Path, size: str) -> None:
    """Stable Diffusion 1.5 and larger_clap in the shapes of their published configs, with random weights;
    or, `small`, with few channels."""
    import diffusers
    import transformers
    torch.manual_seed(0)
    unet_channels, vae_channels, width, heads, clap_width, depths = SHAPES[size]
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=width, attention_head_dim=8,
                                          block_out_channels=unet_channels)
    vae = diffusers.AutoencoderKL(
        block_out_channels=vae_channels, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512)
    tokenizer = transformers.CLIPTokenizer(model_max_length=77)
    tokenizer = tokenizer.train_new_from_iterator(["a photo of a dog barking"], 400)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        skip_prk_steps=True, steps_offset=1)
    diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(folder / "base")
    audio = {"patch_embeds_hidden_size": clap_width, "hidden_size": 8 * clap_width, "depths": depths}
    transformers.ClapModel(transformers.ClapConfig(
        text_config={"num_hidden_layers": 1}, audio_config=audio)).save_pretrained(folder / "clap")
    transformers.ClapFeatureExtractor(
        truncation="rand_trunc", frequency_min=50, frequency_max=14000).save_pretrained(folder / "clap")
    assert size == "small" or sum(p.numel() for p in unet.parameters()) == 859_520_964


def random_adapter(path: Path, base: Path, clap: Path, rank: int = 8,
                   **header) -> tuple[dict, torch.nn.Module]:
    """Write an adapter of a base's shapes with random weights; sound and LoRA (rank 0: none) both change the
    prediction, alpha is twice the rank. header: facts that differ. Returns the weights and the UNet."""
    import diffusers

    from clap2diffusion.base import hub
    from clap2diffusion.base.models import load_part
    from clap2diffusion.pictures.pipelines import write_adapter
    torch.manual_seed(0)
    unet = load_part(diffusers.UNet2DConditionModel, base, "base model", "unet")
    width = unet.config.cross_attention_dim
    weights = {"audio_proj": common.AudioProjectionMLP(512, width),
               "audio_attn": common.AudioAttentionAdapter(unet, 0.4)}
    for p in common.add_lora(unet, rank, 2.0 * rank, 0.0).parameters():  # peft's B is 0
        p.data.normal_(std=0.05)
    write_adapter(path, weights, unet, {
        "stage": "stage2", "step": 0, "base_model": str(base), "clap_model": str(clap),
        "fingerprints": {"unet": hub.fingerprint(base / "unet"), "clap": hub.fingerprint(clap)},
        "dims": {"audio_embed": 512, "num_tokens": 8, "width": width, "lora": [rank, 2.0 * rank]},
        "settings": {"image_size": 64}, **header})
    return weights, unet


def call(*command) -> None:
    """Run a script of ours in a process of its own; where it fails, its last line is the reason."""
    command = list(map(str, command))
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise RunFailed(f"{' '.join(command)}: {said.splitlines()[-1]}")


def make_world(folder: Path, train: int, val: int = 2) -> Path:
    """A small sound world with two test clips."""
    call("prepare_data.py", "world", "--out", folder, "--train", train, "--val", val, "--test", 2)
    return folder


def stage_flags(world: Path, models: tuple[Path, Path], image_size: int) -> list[str]:
    """Flags of a stage that trains on WORLD and spends as little as it can beside its steps."""
    return ["--config", "", "--data-root", str(world), "--cache-dir", str(world.with_name("cache")),
            "--base-model", str(models[0]), "--clap-model", str(models[1]), "--image-size", str(image_size),
            "--validate-every", "0", "--val-draws", "1", "--samples", "0", "--save-every", "1000000"]


def watch(out: Path) -> None:
    """Run the script of sys.argv and write what is seen of it. Times count from WATCH_BEGAN if it is set."""
    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in sys.argv else "cpu")
    began = float(os.environ.get("WATCH_BEGAN", time.time()))
    seen, measure = {"steps": [], "memory_mb": [], "rss_mb": [], "losses": []}, common.validation_losses

    def after_step(*_) -> None:
        seen["steps"].append(time.time() - began)
        memory, status = peak_memory_mb(device), Path("/proc/self/status").read_text(encoding="utf-8")
        seen["rss_mb"].append(int(status.split("VmRSS:")[1].split()[0]) / 1e3)
        seen["memory_mb"].append(memory.get("cuda_reserved", memory["rss"]))
        if len(seen["steps"]) == 1 and RESIDENT.exists():
            # begin the peak anew: loading maps whole files beside their copies
            RESIDENT.write_text("5", encoding="utf-8")
            if device.type == "cuda":  # what loading and validating reserved, too
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        if len(seen["steps"]) == int(os.environ.get("WATCH_STEPS", 0)):
            out.write_text(json.dumps(seen), encoding="utf-8")
            os._exit(0)

    def kept(*args, **options):
        losses, timesteps = measure(*args, **options)
        if not options:  # a stage's validation, and not the gate sweep
            seen["losses"].append(losses["right"].mean(1).tolist())
        return losses, timesteps

    register_optimizer_step_post_hook(after_step)
    common.validation_losses = kept
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        out.write_text(json.dumps(seen), encoding="utf-8")


def watched(place: Path, *command, steps: int = 0) -> dict:
    """What watch() sees of a training script that goes to its end or for so many steps.
    Besides: seconds to the first step, of the median step; and the peak of memory after the first step."""
    os.environ |= {"WATCH_BEGAN": repr(time.time()), "WATCH_STEPS": str(steps)}
    call(__file__, place / "seen.json", *command)
    seen = json.loads((place / "seen.json").read_text("utf-8"))
    seen |= {"first_s": seen["steps"][0], "peak_mb": seen["memory_mb"][-1]}
    if len(seen["steps"]) > 1:
        seen["step_s"] = statistics.median(b - a for a, b in itertools.pairwise(seen["steps"]))
    return seen


def watched_turns(place: Path, repeats: int, commands: dict, steps: int = 0,
                  tell=lambda found: None) -> dict[object, dict[str, list]]:
    """What watched() gives of each command, turn by turn; RUN in a command becomes a folder of its own.
    tell(found) is called with what there is, should the time run out: after each run of the first turn, and
    after each later turn."""
    found = {name: defaultdict(list) for name in commands}
    for turn in range(repeats):
        for name in tqdm(commands, **bar_options(desc=f"turn {turn + 1} of {repeats}", unit="run")):
            run = place / f"run-{name}-{turn}"
            command = [run if token == RUN else token for token in commands[name]]
            for key, value in watched(place, *command, steps=steps).items():
                found[name][key].append(value)
            if turn == 0 or name == [*commands][-1]:
                tell({name: seen for name, seen in found.items() if seen})
    return found


def clock() -> float:
    """Seconds, after the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(repeats: int, *functions) -> list[list[float]]:
    """Seconds of each function, called with the turn's number; the turn before the first is a warm-up."""
    found: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, seconds in zip(functions, found, strict=True):
            began = clock()
            function(turn)
            seconds.append(clock() - began)
    return [seconds[1:] for seconds in found]


def spread(values) -> list[float]:
    """[median, lowest, highest]."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def ratios(a, b) -> list[float]:
    """Spread of the ratios of what was measured turn by turn."""
    return spread(x / y for x, y in zip(a, b, strict=True))


def show(value) -> str:
    """A table's cell: spreads as `median [low, high]`, numbers to four digits."""
    if isinstance(value, list):
        return f"{show(value[0])} [{show(value[1])}, {show(value[2])}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(name: str, about: str, rows: list[dict], device: str = "auto", done: bool = True) -> None:
    """Write results/NAME-DEVICE.json and .md, a table with the command above it; print the latter if done."""
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device != "cpu" and torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    command = shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    folder = Path(os.environ.get("BENCH_RESULTS", HERE / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{machine.split(',')[0].replace(' ', '-')}"
    lines = [f"`{command}`: {machine}, torch {torch.__version__}; {about}", "", f"| {' | '.join(rows[0])} |",
             "|" + "---|" * len(rows[0]), *(f"| {' | '.join(map(show, row.values()))} |" for row in rows)]
    facts = {"command": command, "device": machine, "torch": torch.__version__, "about": about, "rows": rows}
    write_json(path.with_suffix(".json"), facts)
    write_atomic(path.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    if done:
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    out, *sys.argv = sys.argv[1:]  # the script sees its own flags
    watch(Path(out))
