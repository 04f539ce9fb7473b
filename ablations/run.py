"""The ablations behind our defaults: a config each, three seeds, judged on the default's clips and noise.

    python ablations/run.py                        # all of them; what is done is skipped
    python ablations/run.py --only tokens-1 ema    # these, and the default they are compared with

default.json is configs/tiny.json with fewer steps. A variant NAME has a config NAME.json, which differs from
it in the one thing it asks about, or a patch NAME.patch for a copy of a stage's script, or both. It is
trained through the stages named in VARIANTS and judged after the last of them, against the default after the
same stage, paired by seed and clip. Intervals hold for other clips and other seeds
(metrics.over_clips_and_seeds). Each stage's folder under --out keeps its judged-*.json, from which a table is
written. docs/own-ablations.md says how to add a variant."""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clap2diffusion  # noqa: F401  (first: it ends in one sentence where packages are missing)

# isort: split
import numpy as np
import soundfile
import torch
from scipy.stats import false_discovery_control

import common
import evaluate
from clap2diffusion.base import files, hub, statistics, tensor_file
from clap2diffusion.base.exits import RunFailed, UserError, run_main
from clap2diffusion.base.settings import Number, check_sampling, new_parser
from clap2diffusion.judging import metrics
from clap2diffusion.judging.clips import Clips
from clap2diffusion.judging.evaluation import Judged, Subject, follow_properties
from clap2diffusion.judging.judge import Judge
from clap2diffusion.pictures.generation import embed, load_clap
from clap2diffusion.pictures.pipelines import load_base_pipeline
from clap2diffusion.world import measure, sound_world

HERE = Path(__file__).resolve().parent
VARIANTS = {  # name: (question, stages trained); none: the default's stage 3 under another gate
    "tokens-1": ("1 audio token instead of 8", (1,)),
    "tokens-4": ("4 audio tokens", (1,)),
    "tokens-16": ("16 audio tokens", (1,)),
    "no-whiten": ("a first layer that is trained as torch starts it, instead of a fixed whitening", (1,)),
    "caption-drop-0": ("captions never dropped, instead of in 0.8 of the samples", (1,)),
    "caption-drop-0.5": ("captions dropped in half of the samples", (1,)),
    "caption-drop-1": ("captions always dropped", (1,)),
    "min-snr-5": ("Min-SNR 5 loss weights instead of the plain loss", (1,)),
    "windows-2": ("two CLAP windows a clip (of 8 s) instead of one", (1,)),
    "appended": ("audio tokens appended to the text tokens, instead of attended apart", (1,)),
    "huber": ("Huber's loss (delta 0.1) instead of the squared error", (1,)),
    "scalar": ("a trained scalar a layer on the audio attention's output", (1,)),
    "lora-not-mid": ("stage 2 without LoRA in the mid block", (2,)),
    "no-lora": ("stage 2 without LoRA: the adapter alone trains on", (2,)),
    "ema": ("stage 2 with EMA 0.99", (2,)),
    "pinned-0.2": ("stages 1 and 2 pinned at 0.2 instead of 0.4", (1, 2, 3)),
    "pinned-0.99": ("stages 1 and 2 pinned at 0.99", (1, 2, 3)),
    "gate-0": ("tanh(gate) 0: no sound, LoRA alone", ()),
    "gate-sweep-minimum": ("tanh(gate) at the sweep's minimum", ()),
    "gate-1": ("tanh(gate) 1", ())}
MEASURES = {"top1_en": "top-1", "both": "both of two found", "one": "at least one",
            "rho_loudness": "rho loudness", "rho_pitch": "rho pitch", "rho_rate": "rho rate",
            "rho_density": "rho density", "iis_cosine": "IIS cosine"}


def make_long_world(world: Path, out: Path) -> None:
    """The world with training clips of 8 s: after each clip another take of the same sources."""
    if (out / "metadata.jsonl").exists():
        return
    for kind in ("audio", "images"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    lines = [line for line in (world / "metadata.jsonl").read_text("utf-8").splitlines(keepends=True)
             if json.loads(line)["split"] != "test"]
    for i, row in enumerate(map(json.loads, lines)):
        waveform, rate = soundfile.read(world / row["audio_file_name"], dtype="float32")
        if row["split"] == "train":
            sources = tuple(sound_world.Source(**source) for source in row["properties"]["sources"])
            state = sound_world.State(sources, row["properties"]["density"], 2 ** 31 + i)
            waveform = np.concatenate([waveform, sound_world.synthesise(state)])
        sound = io.BytesIO()
        soundfile.write(sound, waveform, rate, format="WAV")
        files.write_atomic(out / row["audio_file_name"], sound.getvalue())
        files.write_atomic(out / row["image_file_name"], (world / row["image_file_name"]).read_bytes())
    files.write_atomic(out / "metadata.jsonl", "".join(lines).encode())


def patched_script(name: str, stage: int, folder: Path) -> Path:
    """FOLDER/train_NAME.py, a copy of a stage's script changed by NAME.patch.
    Raises RunFailed: the patch does not apply to today's script."""
    original, patch = HERE.parent / f"train_stage{stage}.py", HERE / f"{name}.patch"
    script = Path(shutil.copy(original, folder / f"train_{name}.py"))
    done = subprocess.run(["git", "apply", "-p0", patch], cwd=folder)
    if done.returncode or script.read_bytes() == original.read_bytes():
        script.unlink()
        raise RunFailed(f"{patch}: does not apply to {original.name} as it is today (git's words are above); "
                        f"make the change in a copy of it, train_{name}.py, and write the patch anew: "
                        f"diff -U1 {original.name} train_{name}.py > {patch}")
    return script


def train(name: str, seed: int, stages: tuple, out: Path, default: Path) -> Path:
    """Train a variant through its stages; returns the folder of the last one."""
    run, own, patch = out / f"{name}-{seed}", HERE / f"{name}.json", HERE / f"{name}.patch"
    config = own if own.exists() else HERE / "default.json"
    for stage in stages:
        script, more = f"train_stage{stage}.py", []
        # a patch's first line names the script that it changes
        patched = patch.exists() and patch.read_text("utf-8").startswith(f"--- {script}")
        if patched:  # in the run's folder: yours of this name, beside README.md, stays as it is
            run.mkdir(parents=True, exist_ok=True)
            script, more = patched_script(name, stage, run), ["--name", f"stage{stage}"]
        if name == "windows-2":
            make_long_world(Path(files.read_json(config)["common"]["data_root"]), out / "long")
            more += ["--data-root", out / "long"]
        if stages[0] == 2:
            more += ["--init-from", default / "stage1"]
        command = [script, "--config", config, "--seed", seed, "--run", run, *more]
        print("$ python", *command, flush=True)
        done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent,
                              env={**os.environ, "PYTHONPATH": str(HERE.parent)})
        if done.returncode:
            raise RunFailed(f"{script}: failed, see above; the same command goes on from there")
    return run / f"stage{stages[-1]}"


@torch.inference_mode()
def appended_pictures(path: Path, clips: Clips, options: argparse.Namespace) -> list:
    """Pictures of the `appended` variant, whose tokens the stock pipeline takes as prompt_embeds."""
    header, tensors = tensor_file.read_tensors(path)
    base = hub.resolve_model(header["base_model"], "base model", beside=path)
    encoder = load_clap("", header, path)
    audio_embeds = torch.cat([embed(encoder, str(row.audio_path)) for row in clips.rows])
    pipe = load_base_pipeline(base)
    dims = header["dims"]
    audio_proj = common.AudioProjectionMLP(dims["audio_embed"], dims["width"], dims["num_tokens"])
    common.load_checkpoint(path, header, tensors, {"audio_proj": audio_proj})
    text, images = pipe.encode_prompt("", "cpu", 1, False)[0], []
    for at in range(0, len(audio_embeds), options.batch_size):
        tokens = audio_proj(audio_embeds[at:at + options.batch_size])
        silence = audio_proj(torch.zeros_like(audio_embeds[:1])).expand(len(tokens), -1, -1)
        heard, nothing = (torch.cat([text.expand(len(x), -1, -1), x], 1) for x in (tokens, silence))
        generators = [torch.Generator().manual_seed(seed) for seed in range(at, at + len(tokens))]
        images += pipe(prompt_embeds=heard, negative_prompt_embeds=nothing, generator=generators,
                       guidance_scale=options.guidance, num_inference_steps=options.steps).images
    return images


def judge_run(folder: Path, name: str, judged: Judged, gate: float | None = None) -> dict[str, list]:
    """Per-clip values of the right sound's pictures, {measure: list}; of a rho [in the sound, measured]. A
    file in the folder keeps them, named by clips and measures. Raises UserError: too few clips for a rho."""
    what = hashlib.sha256(repr([[row.id for row in judged.clips.rows], [*MEASURES]]).encode()).hexdigest()
    kept = folder / f"judged-{what[:8]}{'' if gate is None else f'-{gate:.2f}'}.json"
    if kept.exists():
        return files.read_json(kept)
    clips, everyone = judged.clips, list(range(len(judged.clips.rows)))
    options = evaluate.build_parser().parse_args(["--run", str(folder)])
    check_sampling(options)
    options.gate = gate
    if name == "appended":
        images = appended_pictures(folder / "final.safetensors", clips, options)
    else:
        subject = Subject(str(folder), options)
        subject.load(clips)
        images = subject.pictures("right", subject.audio_embeds, everyone)
    values = judged.measures(judged.judge.images(images))
    found = {key: values[key].tolist() for key in ("top1_en", "iis_cosine")}
    for name in ("both", "one"):
        found[name] = [value for kind in ("heard", "unheard") for value in values.get(f"{name}_{kind}", ())]
    properties, _ = follow_properties(clips, {"right": images, "other": images}, everyone, measure)
    if not properties:
        raise UserError(f"{clips.data_root}: fewer than 10 of the {len(everyone)} clips hold one sound, too "
                        "few for a rho; give more --clips or data with more test clips")
    files.write_json(kept, found | {f"rho_{key}": value["points"] for key, value in properties.items()})
    return files.read_json(kept)


def estimates(runs: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """A measure of each seed's run (S,), and its resampled values (S, 2000): the same clips in every seed."""
    resampled = metrics.bootstrap_spearman if key.startswith("rho") else statistics.bootstrap
    values, draws = zip(*(resampled(np.asarray(run[key])) for run in runs))
    return np.array(values), np.array(draws)


def compare(variant: list[dict], default: list[dict]) -> list[dict]:
    """Of each measure the variant's `value`, its `difference` [mean, low, high] to the default, each seed's
    own (`by_seed`), and the `p` of the difference."""
    found = []
    for key in MEASURES:
        (a, draws_a), (b, draws_b) = estimates(variant, key), estimates(default, key)
        n, draws = len(variant[0][key]), (draws_a - draws_b).mean(0)
        difference, p = metrics.over_clips_and_seeds(a - b, draws, n)
        found.append({"value": a.mean(), "difference": difference, "by_seed": a - b, "p": p})
    return found


def show(rows: list[list[dict]]) -> list[list[str]]:
    """The cells of a table of compare()'s rows. Bold is what is left of p < 0.05 after the correction for all
    the comparisons in it (false discovery rate, Benjamini & Hochberg 1995)."""
    corrected = iter(false_discovery_control([cell["p"] for row in rows for cell in row]))

    def cell(found: dict) -> str:
        value, low, high = found["difference"]
        text = f"{found['value']:.3f}<br>{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        text = "<br>".join(f"**{line}**" for line in text.split("<br>")) if next(corrected) < 0.05 else text
        return f"{text}<br>{', '.join(f'{one:+.3f}' for one in found['by_seed'])}"
    return [[cell(found) for found in row] for row in rows]


def after_stage(stage: int, folders: dict[int, Path]) -> str:
    """Which stage was judged, and the seeds of which the best weights are those that it began with."""
    kept = [str(seed) for seed, folder in folders.items()
            if files.read_json(folder / f"stage{stage}/result.json").get("best_step") == 0]
    return f"stage {stage}" + f"; best is step 0 in seed {', '.join(kept)}" * bool(kept)


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], help="variants to run")
    add("--seeds", nargs="+", type=Number(int, 0), default=[0, 1, 2], help="training seeds")
    add("--clips", type=Number(int, 15), default=100, help="test clips judged, each label by its share")
    add("--out", default="runs/ablations", help="folder of the runs")
    add("--table", default="", help="file of the table ('' = results.md in --out)")
    args = parser.parse_args()
    out, settings = Path(args.out), files.read_json(HERE / "default.json")["common"]
    defaults = {seed: out / f"default-{seed}" for seed in args.seeds}
    for seed, folder in defaults.items():
        train("default", seed, (1, 2, 3), out, folder)
    judged = Judged(Judge("assets/tiny/judge"),
                    Clips(settings["data_root"], "test", args.clips, settings["image_size"]))
    only = "" if args.only == [*VARIANTS] else f" --only {' '.join(args.only)}"
    head = [f"`python ablations/run.py{only}`, seeds {', '.join(map(str, args.seeds))}, the same "
            f"{args.clips} test clips for each. In a cell: the mean over the seeds; its difference to the "
            "default after the same stage, paired, with the 95 % interval over clips and seeds (min F'); "
            "each seed's own difference. Bold: p < 0.05, corrected for the table's comparisons "
            "(Benjamini-Hochberg).", "",
            f"| variant | judged after | {' | '.join(MEASURES.values())} | tanh(gate) |",
            "|---|---|" + "---|" * (len(MEASURES) + 1)]
    after, names, rows = {}, [], []
    for stage in (1, 2, 3):
        after[stage] = [judge_run(folder / f"stage{stage}", "default", judged)
                        for folder in defaults.values()]
        cells = [f"{estimates(after[stage], key)[0].mean():.3f}" for key in MEASURES]
        head.append(f"| default | {after_stage(stage, defaults)} | {' | '.join(cells)} | |")
    for name in args.only:
        question, stages = VARIANTS[name]
        found, gates, last = [], [], (stages or (3,))[-1]
        folders = {seed: out / f"{name}-{seed}" if stages else default for seed, default in defaults.items()}
        for seed, default in defaults.items():
            folder = train(name, seed, stages, out, default) if stages else default / "stage3"
            result = files.read_json(folder / "result.json")
            gate = {"gate-0": 0.0, "gate-1": 1.0}.get(name)
            if name == "gate-sweep-minimum":
                gate = min(result["sweep_after"], key=lambda row: row["right"][0])["tanh_gate"]
            found.append(judge_run(folder, name, judged, gate))
            gates += [f"{result['tanh_gate'] if gate is None else gate:.2f}"] if last == 3 else []
        rows.append(compare(found, after[last]))
        names.append((f"| {question} | {after_stage(last, folders)} |", ", ".join(gates)))
        lines = [f"{begin} {' | '.join(row)} | {gates} |" for (begin, gates), row in zip(names, show(rows))]
        files.write_atomic(Path(args.table or out / "results.md"), ("\n".join(head + lines) + "\n").encode())
        print(lines[-1], flush=True)
    print("\n".join(head + lines))


if __name__ == "__main__":
    run_main(main)
