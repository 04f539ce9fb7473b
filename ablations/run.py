"""The ablations behind our defaults: each a config here, three seeds, judged on the same clips and noise as the default.

    python ablations/run.py                        # all of them; what is done is skipped
    python ablations/run.py --only tokens-1 ema    # these, and the default they are compared with

default.json is configs/tiny.json with fewer steps; every other config differs from it in
the one thing it asks about. A variant is trained through the stages named in VARIANTS and judged after the last of them,
against the default after the same stage. Clips of all seeds are pooled; differences are paired by (seed, clip). Writes
ablations/results.json and ablations/results.md. `appended` is train_stage1.py copied and changed by appended.patch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from config import Number, RunFailed, UserError, new_parser, read_json, run_main, write_atomic, write_json  # noqa: E402

# name: (question, stages trained, --gate of the evaluation)
DEFAULT = "default"
VARIANTS = {
    "tokens-1": ("1 audio token instead of 8", (1,), None),
    "tokens-4": ("4 audio tokens", (1,), None),
    "tokens-16": ("16 audio tokens", (1,), None),
    "no-whiten": ("a first layer that is trained as torch starts it, instead of a fixed whitening", (1,), None),
    "caption-drop-0": ("captions never dropped, instead of in 0.8 of the samples", (1,), None),
    "caption-drop-0.5": ("captions dropped in half of the samples", (1,), None),
    "caption-drop-1": ("captions always dropped", (1,), None),
    "min-snr-5": ("Min-SNR 5 loss weights instead of the plain loss", (1,), None),
    "windows-2": ("two CLAP windows a clip (of 8 s) instead of one", (1,), None),
    "appended": ("audio tokens appended to the text tokens, instead of attended apart", (1,), None),
    "no-lora": ("stage 2 without LoRA: the adapter alone trains on", (2,), None),
    "ema": ("stage 2 with EMA 0.99", (2,), None),
    "pinned-0.2": ("stages 1 and 2 pinned at 0.2 instead of 0.4", (1, 2, 3), None),
    "pinned-0.99": ("stages 1 and 2 pinned at 0.99", (1, 2, 3), None),
    "gate-0": ("tanh(gate) 0: no sound, LoRA alone", (), 0.0),
    "gate-sweep-minimum": ("tanh(gate) at the sweep's minimum", (), "minimum"),
    "gate-1": ("tanh(gate) 1", (), 1.0)}
MEASURES = {"top1_en": "top-1", "pairs": "both of two found", "rho_loudness": "rho loudness", "rho_pitch": "rho pitch",
            "rho_rate": "rho rate", "rho_density": "rho density", "iis_cosine": "IIS cosine"}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], help="variants to run")
    add("--seeds", nargs="+", type=Number(int, 0), default=[0, 1, 2], help="training seeds")
    add("--clips", type=Number(int, 15), default=100, help="test clips judged, evenly spread over the split")
    add("--out", default="runs/ablations", help="folder of the runs")
    return parser


def call(*command) -> None:
    print("$ python", *command, flush=True)
    if subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent).returncode:
        raise RunFailed(f"{command[0]}: failed, see above; the same command goes on from there")


def copy_and_patch(script: Path) -> None:
    """train_stage1.py under another name with appended.patch: copying is enough."""
    shutil.copy(HERE.parent / "train_stage1.py", script)
    subprocess.run(["git", "apply", HERE / "appended.patch"], cwd=script.parent, check=True)


def make_long_world(world: Path, out: Path) -> None:
    """The world with training clips of 8 s: after each clip the same sources once more, as another take of them."""
    import io

    import numpy as np
    import soundfile

    import sound_world
    if (out / "metadata.jsonl").exists():
        return
    for kind in ("audio", "images"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    lines = []
    for line in (world / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "test":
            continue
        waveform, rate = soundfile.read(world / row["audio_file_name"], dtype="float32")
        if row["split"] == "train":
            sources = tuple(sound_world.Source(**source) for source in row["properties"]["sources"])
            state = sound_world.State(sources, row["properties"]["density"], 2 ** 31 + len(lines))
            waveform = np.concatenate([waveform, sound_world.synthesise(state)])
        sound = io.BytesIO()
        soundfile.write(sound, waveform, rate, format="WAV")
        write_atomic(out / row["audio_file_name"], sound.getvalue())
        write_atomic(out / row["image_file_name"], (world / row["image_file_name"]).read_bytes())
        lines.append(line)
    write_atomic(out / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


def train(name: str, seed: int, stages: tuple, out: Path, default: Path | None = None) -> Path:
    """Train a variant through its stages; returns the folder of the last one."""
    run, config = out / f"{name}-{seed}", HERE / f"{name}.json"
    for stage in stages:
        script, more = f"train_stage{stage}.py", []
        if name == "appended":
            script = "train_appended.py"
            copy_and_patch(HERE.parent / script)
            more = ["--name", "stage1"]
        if name == "windows-2":
            make_long_world(Path(read_json(config)["common"]["data_root"]), out / "long")
            more = ["--data-root", out / "long"]
        if stage == 2 and stages[0] == 2:
            more = ["--init-from", default / "stage1"]
        call(script, "--config", config, "--seed", seed, "--run", run, *more)
        if name == "appended":
            (HERE.parent / script).unlink()
    return run / f"stage{stages[-1]}"


class Appended:
    """Pictures of the `appended` variant, whose tokens the stock pipeline takes as prompt_embeds."""

    def __init__(self, folder: Path, args, clips):
        import torch
        from diffusers import StableDiffusionPipeline

        import common
        import generate
        import pretrained
        import runs
        header, tensors = runs.read_checkpoint(folder / "final.safetensors")
        base = pretrained.resolve_model(header["base_model"], "base model", pretrained.BASE_PARTS)
        encoder = common.CLAPAudioEncoder(pretrained.resolve_model(header["clap_model"], "CLAP model"))
        self.audio_embeds = torch.cat([generate.embed(encoder, str(row.audio_path)) for row in clips.rows])
        self.pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)
        dims = header["dims"]
        self.audio_proj = common.AudioProjectionMLP(dims["audio_embed"], dims["width"], dims["num_tokens"])
        runs.load_objects(folder / "final.safetensors", header, tensors, {"audio_proj": self.audio_proj})
        self.args = args

    def pictures(self, _: str, audio_embeds, seeds: list[int]) -> list:
        import torch
        images = []
        with torch.inference_mode():
            text = self.pipe.encode_prompt("", "cpu", 1, False)[0]
            for at in range(0, len(seeds), self.args.batch_size):
                tokens = self.audio_proj(audio_embeds[at:at + self.args.batch_size])
                silence = self.audio_proj(torch.zeros_like(audio_embeds[:1])).expand(len(tokens), -1, -1)
                some = text.expand(len(tokens), -1, -1)
                images += self.pipe(
                    prompt_embeds=torch.cat([some, tokens], 1), negative_prompt_embeds=torch.cat([some, silence], 1),
                    guidance_scale=self.args.guidance, num_inference_steps=self.args.steps,
                    generator=[torch.Generator().manual_seed(s) for s in seeds[at:at + len(tokens)]]).images
        return images


def judge_run(folder: Path, name: str, gate, args, judged) -> dict[str, list]:
    """Per-clip values of the right sound's pictures: {measure: list}; rho's are [in the sound, measured] pairs."""
    import evaluate
    clips = judged.clips
    options = evaluate.build_parser().parse_args(["--run", str(folder)])
    options.gate = gate
    if name == "appended":
        subject = Appended(folder, options, clips)
    else:
        subject = evaluate.Subject(str(folder), options)
        subject.load(clips)
    images = subject.pictures("right", subject.audio_embeds, list(range(len(clips.rows))))
    values = judged.measures(judged.judge.images(images))
    found = {key: values[key].tolist() for key in ("top1_en", "iis_cosine")}
    found["pairs"] = [float(v) for key in ("pairs_heard", "pairs_unheard") for v in values.get(key, ())]
    properties = evaluate.follow_properties(clips, {"right": images, "other": images}, list(range(len(clips.rows))))
    if properties is None:
        raise UserError(f"{clips.data_root}: fewer than 10 of the {len(clips.rows)} clips hold one sound, too few for a rho; "
                        "give more --clips or data with more test clips")
    return found | {f"rho_{key}": value["points"] for key, value in properties.items()}


def compare(variant: list[dict], default: list[dict]) -> dict:
    """Each measure of both, pooled over the seeds, with the paired difference variant - default."""
    import numpy as np

    import metrics
    found = {}
    for key in MEASURES:
        a, b = (np.concatenate([np.asarray(seed[key], float) for seed in runs]) for runs in (variant, default))
        statistic = metrics.spearman if key.startswith("rho") else None
        a, b = metrics.bootstrap(a, statistic), metrics.bootstrap(b, statistic)
        found[key] = {"variant": metrics.summary(*a), "default": metrics.summary(*b),
                      **metrics.compare(a, b, len(variant[0][key]) * len(variant))}
    return found


def to_markdown(results: dict, args: argparse.Namespace) -> str:
    """One line a variant: its value and the paired difference to the default, bold where the interval excludes 0."""
    def cell(row: dict) -> str:
        value, low, high = row["difference"]
        text = f"{row['variant'][0]:.3f} ({value:+.3f} [{low:+.3f}, {high:+.3f}])"
        return f"**{text}**" if low > 0 or high < 0 else text
    lines = [f"`python ablations/run.py`, seeds {', '.join(map(str, args.seeds))}, {args.clips} test clips each, pooled; value and "
             "difference to the default after the same stage, paired, 95 % interval; bold where it excludes 0.", "",
             "| variant | judged after | " + " | ".join(MEASURES.values()) + " | tanh(gate) |",
             "|---|---|" + "---|" * (len(MEASURES) + 1)]
    for stage, row in results["default"].items():
        lines.append(f"| default | {stage} | " + " | ".join(f"{row[key][0]:.3f}" for key in MEASURES) + " | |")
    for row in results["variants"].values():
        gates = ", ".join(f"{g:.2f}" for g in row["tanh_gate"])
        lines.append(f"| {row['question']} | {row['after']} | " + " | ".join(cell(row["measures"][key]) for key in MEASURES)
                     + f" | {gates} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    out, settings = Path(args.out), read_json(HERE / "default.json")["common"]
    import numpy as np

    import evaluate
    import metrics
    from judge import Judge
    defaults = {seed: out / f"{DEFAULT}-{seed}" for seed in args.seeds}
    for seed in args.seeds:
        train(DEFAULT, seed, (1, 2, 3), out)
    judged = evaluate.Judged(Judge("assets/tiny/judge"),
                             evaluate.Clips(settings["data_root"], "test", args.clips, settings["image_size"]))

    def values(folder: Path, name: str, gate=None) -> dict:
        kept = folder / f"judged-{args.clips}{'' if gate is None else f'-{gate:.2f}'}.json"
        if not kept.exists():
            write_json(kept, judge_run(folder, name, gate, args, judged))
        return read_json(kept)

    after = {f"stage {stage}": [values(defaults[seed] / f"stage{stage}", DEFAULT) for seed in args.seeds] for stage in (1, 2, 3)}
    results = {"seeds": args.seeds, "clips": args.clips, "variants": {}, "default": {
        stage: {key: metrics.interval(np.concatenate([np.asarray(one[key], float) for one in runs]),
                                      metrics.spearman if key.startswith("rho") else None) for key in MEASURES}
        for stage, runs in after.items()}}
    for name in args.only:
        question, stages, gate = VARIANTS[name]
        found, gates = [], []
        for seed in args.seeds:
            folder = defaults[seed] / "stage3"
            if stages:
                folder = train(name, seed, stages, out, defaults[seed])
            result = read_json(folder / "result.json")
            at = gate
            if gate == "minimum":
                at = min(result["sweep_after"], key=lambda row: row["loss"])["tanh_gate"]
            found.append(values(folder, name, at))
            gates += [result.get("tanh_gate") if at is None else at] if 3 in stages or not stages else []
        stage = f"stage {stages[-1] if stages else 3}"
        results["variants"][name] = {"question": question, "after": stage, "tanh_gate": gates,
                                     "measures": compare(found, after[stage])}
        write_json(HERE / "results.json", results)
        write_atomic(HERE / "results.md", to_markdown(results, args).encode())
        print(json.dumps({key: row["difference"] for key, row in results["variants"][name]["measures"].items()}), flush=True)
    print(to_markdown(results, args))


if __name__ == "__main__":
    run_main(main)
