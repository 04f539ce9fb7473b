"""Proof that the sound matters: pictures of held-out sounds, judged for the right sound, silence and another clip's sound.

    python evaluate.py --run runs/tiny                                    # every test clip, RUN/evaluation.{json,md,html}
    python evaluate.py --run runs/tiny --against runs/other               # the same clips and noise in both, paired
    python evaluate.py --run runs/sd15 --judge google/siglip2-so400m-patch14-384 --clips 500

The judge (a SigLIP) first reads the real pictures; if it cannot, nothing is judged. Every clip keeps its starting noise for
all sounds and runs. Pictures are kept in RUN/evaluation, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from itertools import combinations
from pathlib import Path

from config import (
    GUIDANCE,
    SCHEDULERS,
    Number,
    RunFailed,
    UserError,
    new_parser,
    read_json,
    run_main,
    write_atomic,
    write_json,
)

SOUNDS = ("right", "silence", "other")
LANGUAGES = {"en": "English", "ko": "Korean"}
QUICK_CLIPS = 100
MIXES, DIVERSITY_SEEDS, GATES = 10, 8, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MIN_DIVERSITY = 0.5


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    # what is judged
    add("--run", default="runs/tiny", help="run or stage folder (its adapter.safetensors), or an adapter file")
    add("--against", default="", help="another run to compare with, on the same clips and noise ('' = none)")
    add("--data-root", default="", help="folder with metadata.jsonl ('' = the one the run was trained on)")
    add("--split", choices=("train", "val", "test"), default="test", help="which clips")
    add("--clips", type=Number(int, 0), default=0, help="clips judged, evenly spread over the split (0 = all)")
    add("--quick", action="store_true", help=f"{QUICK_CLIPS} clips, no mixtures, half the noises: under two minutes on the default")
    # the judge
    add("--judge", default="assets/tiny/judge", help="SigLIP model: folder or hub name")
    add("--min-judge", type=Number(float, 0, 1), default=0.9,
        help="share of real pictures that the judge must read right before it may judge")
    # the pictures
    add("--guidance", type=Number(float, 1, 100), default=GUIDANCE, help="classifier-free guidance (1 = none)")
    add("--steps", type=Number(int, 1, 1000), default=25, help="sampling steps")
    add("--scheduler", choices=[*SCHEDULERS], default="base", help="base = the base model's own; dpm, unipc: made for few steps")
    add("--seed", type=Number(int, 0, 2 ** 31 - 1), default=0, help="clip i starts from the noise of seed + i")
    add("--gate", type=Number(float, 0, 1), default=None, help="tanh(gate) instead of the learned one")
    add("--noise", action="store_true", help="control: noise for the audio tokens, all must fall to chance; writes evaluation-noise.*")
    add("--base-model", default="", help="another base model for the same adapter ('' = the one it was trained with)")
    add("--clap-model", default="", help="where the adapter's CLAP lies now ('' = where it was in training)")
    add("--batch-size", type=Number(int, 1), default=50, help="pictures made at once")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
    return parser


# --- the clips ----------------------------------------------------------------------------------------------------------

def run_folder(adapter_path: Path, run: str) -> Path:
    """Where the evaluation of an adapter is written: the folder given, or the one its file lies in."""
    return Path(run) if Path(run).is_dir() else adapter_path.parent


def find_data(args: argparse.Namespace, adapter_path: Path) -> str:
    """--data-root, or the one in the config.json beside the adapter.

    Raises:
        UserError: neither is there.
    """
    config = adapter_path.parent / "config.json"
    if not args.data_root and not config.exists():
        raise UserError(f"{config}: is missing, so the clips are unknown; give the data folder with --data-root")
    return args.data_root or read_json(config)["data_root"]


def pick_clips(rows: list, n: int) -> list:
    """n rows, evenly spread in their order; all of them for 0 or more than there are."""
    return rows if not 0 < n < len(rows) else [rows[i * len(rows) // n] for i in range(n)]


class Clips:
    """The clips of one evaluation, their real pictures, and the classes the judge chooses from.

    The classes are all labels of the data, of every split; without any label each clip's caption is its class. `single` and
    `pairs` are the positions of clips with one label and with two ("a+b"). `heard` holds the pairs of labels that training or validation has.
    """

    def __init__(self, data_root: str, split: str, n: int, image_size: int):
        import numpy as np

        import data
        rows, _ = data.read_manifest(data_root)
        held_out = [row for row in rows if row.split == split]
        if not held_out:
            raise UserError(f"{data_root}: has no clip in split {split!r}; give another --split or --data-root")
        self.data_root, self.split, self.rows, self.real = Path(data_root), split, [], []
        for row in pick_clips(held_out, n):
            try:
                data.read_windows(row.audio_path, 10.0)
                self.real.append(data.load_picture(row.image_path, image_size))
            except data.BadFile as error:
                print(f"{row.where}: left out: {error}", flush=True)
                continue
            self.rows.append(row)
        if len(self.rows) < 2:
            raise UserError(f"{data_root}: split {split!r} has {len(self.rows)} usable clips; expected at least 2")
        self.labelled = any(row.label for row in self.rows)
        self.kinds = [tuple((row.label or "").split("+")) if self.labelled else (row.text,) for row in self.rows]
        known = [(row.label or "").split("+") for row in rows] if self.labelled else self.kinds
        self.classes = sorted({name for kind in known for name in kind if name})
        self.single = [i for i, kind in enumerate(self.kinds) if len(kind) == 1 and kind[0]]
        self.pairs = [i for i, kind in enumerate(self.kinds) if len(kind) == 2]
        self.truth = np.array([self.classes.index(self.kinds[i][0]) for i in self.single])
        self.heard = {frozenset((row.label or "").split("+")) for row in rows if row.split != "test"}
        self.reference = pick_clips([row for row in rows if row.split == "train" and row.split != split],
                                    max(len(self.rows), 100))
        self.image_size = image_size

    def reference_pictures(self) -> list:
        """Other real pictures, of the train split: how far apart two sets of real pictures are."""
        import data
        found = []
        for row in self.reference:
            try:
                found.append(data.load_picture(row.image_path, self.image_size))
            except data.BadFile:
                continue  # named when the features were cached
        return found

    def other_of(self, audio_embeds, seed: int) -> list[int]:
        """For each clip another one of as many labels that shares none and is no copy (common.other_sounds)."""
        import common
        others = [0] * len(self.rows)
        for arity in {len(kind) for kind in self.kinds}:
            members = [i for i, kind in enumerate(self.kinds) if len(kind) == arity]
            if len(members) < 2:
                members = list(range(len(self.rows)))
            found = common.other_sounds(["+".join(self.kinds[i]) for i in members], audio_embeds[members], seed)
            for i, j in zip(members, found, strict=True):
                if len(self.kinds[i]) == arity:
                    others[i] = members[j]
        return others


def class_captions(clips: Clips) -> dict[str, list[str]]:
    """What the judge reads of each class, by language: labels.json, else "This is a photo of LABEL." in English alone;
    where the clips have no labels, their captions."""
    path, labels = clips.data_root / "labels.json", clips.classes
    if not clips.labelled:
        return {"en": labels}
    given = read_json(path) if path.exists() else {}
    captions = {"en": [given.get(label, {}).get("en") or f"This is a photo of {label.replace('_', ' ')}."
                       for label in labels]}
    if all("ko" in given.get(label, {}) for label in labels):
        captions["ko"] = [given[label]["ko"] for label in labels]
    return captions


# --- the pictures -------------------------------------------------------------------------------------------------------

def open_picture(path: Path):
    from PIL import Image
    with Image.open(path) as image:
        return image.convert("RGB")


def noise_tokens(seed: int):
    """A forward hook that replaces audio_tokens (B, N, D) by layer-normalised noise of no sound at all."""
    import torch
    generator = torch.Generator().manual_seed(seed)

    def hook(module, inputs, audio_tokens):
        noise = torch.randn(audio_tokens.shape, generator=generator).to(audio_tokens.device, audio_tokens.dtype)
        return module.norm(noise)
    return hook


class Subject:
    """An adapter under evaluation: its embeddings of the clips and every picture it makes of them.

    Pictures are kept as PNG files in RUN/evaluation/KEY, KEY naming adapter and settings, and made only if missing.
    """

    def __init__(self, run: str, args: argparse.Namespace):
        import generate
        self.adapter_path = generate.find_adapter(run)
        self.facts = generate.adapter_facts(self.adapter_path)
        self.folder = run_folder(self.adapter_path, run)
        key = {name: getattr(args, name) for name in ("steps", "precision", "base_model", "noise")}
        if args.scheduler != "base":
            key["scheduler"] = args.scheduler
        key["adapter"] = hashlib.sha256(self.adapter_path.read_bytes()).hexdigest()
        self.pictures_dir = self.folder / "evaluation" / hashlib.sha256(
            json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.args, self.run, self.files = args, run, {}

    def load(self, clips: Clips) -> None:
        """Load the models and embed every clip; silent clips are the null audio."""
        import torch
        from tqdm import tqdm

        import common
        import generate
        import pretrained
        import stock
        args = self.args
        device, _ = common.pick_device(args.device, args.precision)
        base = pretrained.resolve_model(args.base_model or self.facts["base_model"], "base model", pretrained.BASE_PARTS)
        self.encoder = generate.load_clap(args.clap_model, self.facts, self.adapter_path)
        self.audio_embeds = torch.cat([generate.embed(self.encoder, str(row.audio_path)) for row in tqdm(
            clips.rows, desc=f"{self.run}: sounds", unit="clip", leave=False)])  # (n, E)
        self.pipe = stock.load_stock_pipeline(base, self.adapter_path, device, common.DTYPES[args.precision], args.scheduler)
        if args.noise:
            self.pipe.unet.encoder_hid_proj.image_projection_layers[0].register_forward_hook(noise_tokens(args.seed))
        self.pipe_scale = 1.0 if args.gate is None else self.scale_of(args.gate)
        self.pictures_dir.mkdir(parents=True, exist_ok=True)
        for stale in self.pictures_dir.glob(".*.tmp"):  # left by an evaluation that was killed
            stale.unlink(missing_ok=True)

    def scale_of(self, gate: float) -> float:
        import generate
        return generate.scale_of_gate(gate, self.facts, self.adapter_path)

    def pictures(self, name: str, audio_embeds, seeds: list[int], scale: float | None = None,
                 guidance: float | None = None) -> list:
        """One picture (PIL) for each of audio_embeds (m, E); a file's name tells what it was made from."""
        import io

        from tqdm import tqdm

        import stock
        scale, guidance = self.pipe_scale if scale is None else scale, guidance or self.args.guidance
        made_from = [embed.numpy().tobytes() + repr((seed, scale, guidance)).encode()
                     for embed, seed in zip(audio_embeds, seeds, strict=True)]
        paths = self.files[name] = [self.pictures_dir / f"{name}-{hashlib.sha256(key).hexdigest()[:16]}.png"
                                    for key in made_from]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        with tqdm(total=len(paths), initial=len(paths) - len(missing), desc=f"{self.run}: {name}", unit="picture") as bar:
            for at in range(0, len(missing), self.args.batch_size):
                chunk = missing[at:at + self.args.batch_size]
                images = stock.pictures(self.pipe, audio_embeds[chunk], [""] * len(chunk), guidance, self.args.steps,
                                        [seeds[i] for i in chunk], scale, self.facts["image_size"])
                for i, image in zip(chunk, images, strict=True):
                    png = io.BytesIO()
                    image.save(png, format="PNG")
                    write_atomic(paths[i], png.getvalue())
                bar.update(len(chunk))
        return [open_picture(path) for path in paths]

    def clip_pictures(self, clips: Clips, others: list[int]) -> dict[str, list]:
        """The pictures of every clip with the right sound, silence and another clip's sound, from the same noise."""
        import torch
        silence = torch.zeros_like(self.audio_embeds)
        seeds = [self.args.seed + i for i in range(len(clips.rows))]
        # with the null audio both halves of guidance are equal, so guidance does nothing: half the work without it
        return {"right": self.pictures("right", self.audio_embeds, seeds),
                "silence": self.pictures("silence", silence, seeds, guidance=1.0),
                "other": self.pictures("other", self.audio_embeds[others], seeds)}


# --- the judgement --------------------------------------------------------------------------------------------------------

class Judged:
    """The judge's view of the clips: embeddings of real pictures and captions, and its own accuracy."""

    def __init__(self, judge, clips: Clips):
        self.judge, self.clips = judge, clips
        self.real = judge.images(clips.real)  # (n, D)
        reference = clips.reference_pictures()
        self.reference = judge.images(reference) if reference else None
        self.names = {language: judge.captions(captions)
                      for language, captions in class_captions(clips).items()}
        self.captions = judge.captions([row.text or " ".join(kind) for row, kind in zip(clips.rows, clips.kinds)])

    def accuracy(self) -> dict[str, list[float]]:
        """Share of the real single-label pictures whose label the judge names, by language."""
        import metrics
        clips = self.clips
        return {language: metrics.interval(metrics.ranks_of_truth(self.real[clips.single] @ names.T, clips.truth) == 1)
                for language, names in self.names.items()}

    def measures(self, images) -> dict:
        """Every measure of one set of pictures, image embeddings (n, D), one a clip: {name: values of its clips}."""
        import numpy as np

        import metrics
        clips, found = self.clips, {}
        everyone = np.arange(len(clips.rows))
        for language, names in self.names.items():
            ranks = metrics.ranks_of_truth(images[clips.single] @ names.T, clips.truth)
            found[f"top1_{language}"] = ranks == 1
            if len(clips.classes) > 5:
                found[f"top5_{language}"] = ranks <= 5
        to_pictures, to_captions = images @ self.real.T, images @ self.captions.T
        found["iis_win_rate"] = metrics.win_rates(to_pictures, everyone)
        found["iis_cosine"] = to_pictures[everyone, everyone]
        found["ais_win_rate"] = metrics.win_rates(to_captions, everyone)
        found["ais_cosine"] = to_captions[everyone, everyone]
        ranks = metrics.ranks_of_truth(to_pictures, everyone)
        found |= {"recall_at_1": ranks == 1, "recall_at_5": ranks <= 5, "median_rank": ranks}
        if clips.pairs:
            truth = [{clips.classes.index(name) for name in clips.kinds[i]} for i in clips.pairs]
            both = metrics.both_found(images[clips.pairs] @ self.names["en"].T, truth)
            heard = np.array([frozenset(clips.kinds[i]) in clips.heard for i in clips.pairs])
            found |= {"pairs_heard": both[heard], "pairs_unheard": both[~heard]}
        return {name: np.asarray(values, float) for name, values in found.items() if len(values)}

    def bootstraps(self, images) -> dict[str, tuple]:
        """(value, draws) of each measure of one set of pictures."""
        import numpy as np

        import metrics
        found = {name: metrics.bootstrap(values, np.median if name == "median_rank" else None)
                 for name, values in self.measures(images).items()}
        return found | {"cmmd": metrics.cmmd(images, self.real)}


def about(clips: Clips) -> dict[str, dict]:
    """What each measure is, what chance gives, and which direction is better."""
    n, k = len(clips.rows), len(clips.classes)
    table = {
        "top1_en": ("zero-shot top-1, English (AIC)", "share of pictures whose label the judge ranks first", 1 / k),
        "top1_ko": ("zero-shot top-1, Korean (AIC)", "the same with Korean captions", 1 / k),
        "top5_en": ("zero-shot top-5, English", "share whose label is among the judge's first five", min(1, 5 / k)),
        "top5_ko": ("zero-shot top-5, Korean", "the same with Korean captions", min(1, 5 / k)),
        "iis_win_rate": ("image-image similarity, win rate", "share of other clips' real pictures that are less similar than "
                         "the true one (SonicDiffusion's definition)", 0.5),
        "iis_cosine": ("image-image similarity, raw cosine", "mean cosine to the true picture (MACS's definition)", None),
        "ais_win_rate": ("audio-image similarity, win rate", "share of other clips' captions that fit the picture less than "
                         "its own (SonicDiffusion's definition, through captions)", 0.5),
        "ais_cosine": ("audio-image similarity, raw cosine", "mean cosine to the clip's caption (MACS's definition)", None),
        "recall_at_1": ("retrieval R@1", f"the true picture is the nearest of {n}", 1 / n),
        "recall_at_5": ("retrieval R@5", f"the true picture is among the five nearest of {n}", min(1, 5 / n)),
        "median_rank": ("retrieval, median rank", f"of the true picture among {n}", (n + 1) / 2),
        "cmmd": ("CMMD", "distance of the distributions on the judge's embeddings, unbiased; the real column is real test "
                 "against real training pictures", None),
        "pairs_heard": ("both of two sounds found, pair heard in training", "the judge's two best classes are the two",
                        2 / (k * (k - 1)) if k > 1 else None),
        "pairs_unheard": ("both of two sounds found, pair never heard", "the judge's two best classes are the two",
                          2 / (k * (k - 1)) if k > 1 else None),
        "mix_unheard": ("both found in a mixture of two files", "two single clips at one level, mixed as generate.py --audio A B does, of "
                        "pairs never heard", 2 / (k * (k - 1)) if k > 1 else None)}
    lower = ("median_rank", "cmmd")
    return {name: {"title": title, "about": text, "chance": chance, "higher_is_better": name not in lower}
            for name, (title, text, chance) in table.items()}


def confusion(clips: Clips, seen) -> list[list[int]]:
    """Counts (k, k): rows are the sound's class, columns the class the judge sees, `seen` (n,) for every clip."""
    import numpy as np
    counts = np.zeros((len(clips.classes),) * 2, int)
    np.add.at(counts, (clips.truth, seen[clips.single]), 1)
    return counts.tolist()


def follow_properties(clips: Clips, pictures: dict[str, list], others: list[int]) -> dict | None:
    """Spearman's rho between each property of the sound and its measure in the picture; None if the data have none.

    `real` is the measure's own accuracy, on real renders; `right` pairs a clip with its picture; `shuffled` pairs it with
    the picture of another clip's sound, where nothing may be left.
    """
    import numpy as np

    import measure
    import metrics
    import sound_world
    known = [i for i in clips.single if clips.rows[i].properties and clips.kinds[i][0] in sound_world.CLASSES]
    if len(known) < 10:
        return None

    def heard(i: int, name: str) -> float:
        properties = clips.rows[i].properties
        return properties["density"] if name == "density" else properties["sources"][0][name]

    def seen(images: list, shown: list[int]) -> list[dict]:
        return [measure.measure(images[i], clips.kinds[j][0]) for i, j in zip(known, shown, strict=True)]
    shown_other = [others[i] for i in known]
    measured = {"real": seen(clips.real, known), "right": seen(pictures["right"], known),
                "shuffled": seen(pictures["other"], shown_other)}
    found = {}
    for name in measure.PROPERTIES:
        points = {kind: np.array([[heard(i, name), values[name]] for i, values in zip(known, table, strict=True)])
                  for kind, table in measured.items()}
        boots = {kind: metrics.bootstrap(pairs, metrics.spearman) for kind, pairs in points.items()}
        found[name] = {"n": len(known), **{kind: metrics.summary(*boot) for kind, boot in boots.items()},
                       "points": points["right"].tolist(), "_right": boots["right"]}
    return found


def diversity(judged: Judged, subject: Subject, right, seeds: int) -> dict:
    """Mode-collapse watch: how far apart pictures of a class lie, and whether other noise gives another picture.

    `distance` is the mean pairwise distance of the pictures of a class (each clip its own sound and noise; `right` holds
    their embeddings), `real_distance` that of the real pictures; `seed_distance` and `distinct_share` are of one sound of
    each class under several noises.
    """
    import numpy as np

    import metrics
    clips = judged.clips
    groups = {name: [i for i in clips.single if clips.kinds[i][0] == name] for name in clips.classes}
    groups = dict([(name, group) for name, group in groups.items() if group][:32])
    if not groups:
        return {}
    rows = [group[0] for group in groups.values() for _ in range(seeds)]
    noise = [subject.args.seed + 100_000 + k for _ in groups for k in range(seeds)]
    images = subject.pictures("seeds", subject.audio_embeds[rows], noise)
    embeds = judged.judge.images(images).reshape(len(groups), seeds, -1)
    pixels = np.stack([np.asarray(image, float) / 255 for image in images]).reshape(len(groups), seeds, -1)
    found = {"classes": len(groups), "seeds": seeds,
             "seed_distance": metrics.interval(np.array([metrics.pairwise_distance(x) for x in embeds])),
             "distinct_share": metrics.interval(np.array([metrics.distinct_share(x) for x in pixels]))}
    several = [group for group in groups.values() if len(group) > 1]
    if several:
        for name, all_embeds in (("distance", right), ("real_distance", judged.real)):
            found[name] = metrics.interval(np.array([metrics.pairwise_distance(all_embeds[group]) for group in several]))
    return found


def mixtures(judged: Judged, subject: Subject) -> tuple[tuple, list] | None:
    """Two single clips of a pair that training never heard, at one level while they sound and mixed as generate.py --audio
    A B --weights does: are both found? (Of sounds 20 dB apart nobody would hear both. By the RMS of a whole clip one crash
    in four seconds would be raised far above a steady sound.) Where the data say how high a sound is, one is low and the
    other high, as in the sound world's own pairs."""
    import torch
    from tqdm import tqdm

    import data
    import generate
    import metrics
    import sound_world
    clips, encoder = judged.clips, subject.encoder

    def of_class(name: str, fits) -> list[int]:
        found = [i for i in clips.single if clips.kinds[i][0] == name]
        return [i for i in found if clips.rows[i].properties and fits(clips.rows[i].properties["sources"][0]["pitch"])] or found
    unheard = [pair for pair in combinations(clips.classes, 2) if frozenset(pair) not in clips.heard]
    if not clips.pairs or not unheard:
        return None
    low = {name: of_class(name, lambda pitch: pitch <= sound_world.LOW_PITCH) for name in clips.classes}
    high = {name: of_class(name, lambda pitch: pitch >= sound_world.HIGH_PITCH) for name in clips.classes}
    jobs = [(low[a][k % len(low[a])], high[b][k % len(high[b])]) for pair in unheard[:45] for k in range(MIXES // 2)
            for a, b in (pair, pair[::-1]) if low[a] and high[b]]

    def waveform(i: int):
        return data.load_waveform(clips.rows[i].audio_path, encoder.sampling_rate, encoder.window_s)[0]

    def mixed(*waveforms):
        return generate.mix(waveforms, [1 / max(data.SILENT_PEAK, sound_world.active_rms(x)) for x in waveforms])
    embeds = torch.cat([encoder([mixed(waveform(i), waveform(j))])
                        for i, j in tqdm(jobs, desc=f"{subject.run}: mixing", unit="mix", leave=False)])
    images = subject.pictures("mix", embeds, [subject.args.seed + 200_000 + k for k in range(len(jobs))])
    truth = [{clips.classes.index(clips.kinds[i][0]) for i in job} for job in jobs]
    both = metrics.both_found(judged.judge.images(images) @ judged.names["en"].T, truth)
    return metrics.bootstrap(both), [(i, j, bool(good)) for (i, j), good in zip(jobs, both, strict=True)]


def gate_strip(clips: Clips, subject: Subject, n: int = 5) -> list[dict]:
    """For the first n classes one clip's pictures at tanh(gate) 0 to 1, from the same noise."""
    if abs(subject.facts["tanh_gate"]) < 1e-6:
        return []
    strips = []
    for name in clips.classes[:n]:
        i = next((i for i in clips.single if clips.kinds[i][0] == name), None)
        if i is not None:
            strips.append({"clip": i, "gates": list(GATES), "paths": []})
    for gate in GATES:
        some = [strip["clip"] for strip in strips]
        subject.pictures("gate", subject.audio_embeds[some], [subject.args.seed + i for i in some],
                         scale=subject.scale_of(gate))
        for strip, path in zip(strips, subject.files["gate"], strict=True):
            strip["paths"].append(str(path))
    return strips


# --- one evaluation -------------------------------------------------------------------------------------------------------

def training_curves(adapter_path: Path) -> dict:
    """What log.jsonl and result.json of the run's stages hold: {stage: {"log": [...], "sweep_before", "sweep_after"}}.

    A stage that was killed and went on wrote some steps twice; the last line of a step counts.
    """
    found = {}
    for stage in ("stage1", "stage2", "stage3"):
        folder = adapter_path.parent.parent / stage
        if not (folder / "log.jsonl").exists():
            continue
        steps: dict[int, dict] = {}
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a killed run
            steps.setdefault(entry["step"], {}).update(entry)
        result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
        found[stage] = {"log": [steps[step] for step in sorted(steps)],
                        **{key: result[key] for key in ("sweep_before", "sweep_after", "tanh_gate", "window") if key in result}}
    return found


def evaluate(subject: Subject, judged: Judged, others: list[int], quick: bool) -> tuple[dict, dict]:
    """Everything about one run: (its part of evaluation.json, {measure: (value, draws)} for the right sound)."""
    import metrics
    clips = judged.clips
    pictures = subject.clip_pictures(clips, others)
    embeds = {sound: judged.judge.images(images) for sound, images in pictures.items()}
    boots = {sound: judged.bootstraps(images) for sound, images in embeds.items()}
    boots["real"] = judged.bootstraps(judged.real)
    if judged.reference is not None:
        boots["real"]["cmmd"] = metrics.cmmd(judged.real, judged.reference)
    else:
        del boots["real"]["cmmd"]
    counts = {name: len(values) for name, values in judged.measures(embeds["right"]).items()} | {"cmmd": len(clips.rows)}
    table = {name: {**facts, "n": counts[name], **{kind: metrics.summary(*boots[kind][name])
                                                   for kind in (*SOUNDS, "real") if name in boots[kind]}}
             for name, facts in about(clips).items() if name in counts}
    seen = {sound: (embeds[sound] @ judged.names["en"].T).argmax(1) for sound in SOUNDS}
    found = {"measures": table, "confusion": {"classes": clips.classes,
                                              **{sound: confusion(clips, seen[sound]) for sound in SOUNDS}}}
    right = dict(boots["right"])
    if not quick and (mixed := mixtures(judged, subject)):
        right["mix_unheard"], jobs = mixed
        table["mix_unheard"] = {**about(clips)["mix_unheard"], "n": len(jobs), "right": metrics.summary(*mixed[0])}
        found["mixes"] = [{"clips": [i, j], "both_found": good} for i, j, good in jobs]
    properties = follow_properties(clips, pictures, others)
    if properties:
        right |= {f"rho_{name}": values.pop("_right") for name, values in properties.items()}
        found["properties"] = properties
    found["diversity"] = diversity(judged, subject, embeds["right"],
                                   DIVERSITY_SEEDS // 2 if quick else DIVERSITY_SEEDS)
    found["gate"] = {"tanh_gate": subject.facts["tanh_gate"], "strips": gate_strip(clips, subject)}
    found["clips"] = [{"id": row.id, "label": "+".join(clips.kinds[i]), "text": row.text, "other_clip": others[i],
                       "audio": str(row.audio_path), "real": str(row.image_path),
                       **{sound: {"picture": str(subject.files[sound][i]), "seen": clips.classes[seen[sound][i]]}
                          for sound in SOUNDS}}
                      for i, row in enumerate(clips.rows)]
    return found, right


def warnings_of(found: dict) -> list[str]:
    spread, lines = found["diversity"], []
    if spread and spread["distinct_share"][0] < MIN_DIVERSITY:
        lines.append(f"mode collapse: only {spread['distinct_share'][0]:.2f} of one sound's pictures are distinct, expected at "
                     f"least {MIN_DIVERSITY}")
    if "distance" in spread and spread["distance"][0] < MIN_DIVERSITY * spread["real_distance"][0]:
        lines.append(f"mode collapse: pictures of a class lie {spread['distance'][0] / spread['real_distance'][0]:.2f} times as "
                     f"far apart as real ones, expected at least {MIN_DIVERSITY}")
    return lines


def compare_runs(a: dict, b: dict, table: dict, n: dict) -> dict:
    """Each measure of the right sound in both runs, with the paired difference A - B and a verdict."""
    import metrics
    found = {}
    for name in a:
        if name in b:
            facts = table.get(name, {"title": f"rho of {name.removeprefix('rho_')}", "higher_is_better": True})
            found[name] = {"title": facts["title"], "a": a[name][0], "b": b[name][0],
                           **metrics.compare(a[name], b[name], n[name], facts["higher_is_better"])}
    return found


def number(values: list[float] | None, digits: int = 3) -> str:
    return "" if values is None else f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def to_markdown(e: dict) -> str:
    """The evaluation as a page to read."""
    judge = e["judge"]
    lines = [f"# Evaluation of {e['run']}", "",
             f"{e['n']} clips of split {e['split']} of {e['data_root']}; adapter of {e['trained']['stage']}, tanh(gate) "
             f"{e['gate']['tanh_gate']:.3f}; guidance {e['settings']['guidance']:g}, {e['settings']['steps']} steps"
             f"{'' if e['settings'].get('scheduler', 'base') == 'base' else ' of ' + e['settings']['scheduler']}, seed "
             f"{e['settings']['seed']}. Mean (or the statistic named) with a 95 % bootstrap interval over the clips.", "",
             "The judge reads real pictures: " + ", ".join(f"{LANGUAGES[k]} {number(v)}" for k, v in judge["accuracy"].items())
             + f" (n {judge['n']}, {judge['name']}).", "",
             "| measure | n | right sound | silence | another's sound | real pictures | chance |", "|---|---|---|---|---|---|---|"]
    for row in e["measures"].values():
        chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
        lines.append(f"| {row['title']} | {row['n']} | " + " | ".join(number(row.get(kind)) for kind in (*SOUNDS, "real"))
                     + f" | {chance} |")
    lines += ["", "Win rates and raw cosines are different definitions in use under the same names (SonicDiffusion's and "
              "MACS's); they are not comparable with each other."]
    if "properties" in e:
        lines += ["", "| property, Spearman's rho | n | right sound | shuffled sounds | real renders (the measure itself) |",
                  "|---|---|---|---|---|"]
        lines += [f"| {name} | {v['n']} | {number(v['right'])} | {number(v['shuffled'])} | {number(v['real'])} |"
                  for name, v in e["properties"].items()]
    if e["diversity"]:
        d = e["diversity"]
        lines += ["", f"Diversity: {d['distinct_share'][0]:.2f} of one sound's pictures under {d['seeds']} noises are distinct, mean "
                  f"pairwise distance {number(d['seed_distance'])} ({d['classes']} sounds)"
                  + (f"; within a class {number(d['distance'])}, real pictures {number(d['real_distance'])}" if "distance" in d
                     else "") + "."]
    lines += [f"\n**Warning: {line}.**" for line in e["warnings"]]
    classes, right = e["confusion"]["classes"], e["confusion"]["right"]
    wrong = [(right[i][j], classes[i], classes[j]) for i in range(len(classes)) for j in range(len(classes))
             if i != j and right[i][j]]
    lines += ["", "Confusions with the right sound: " + (", ".join(
        f"{a} seen as {b} ({count})" for count, a, b in sorted(wrong, reverse=True)[:12]) or "none") + "."]
    if "against" in e:
        lines += ["", f"## A = {e['run']} against B = {e['against']['run']}", "",
                  "| measure, right sound | n | A | B | A - B, paired | verdict | n needed |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {row['title']} | {row['n']} | {row['a']:.3f} | {row['b']:.3f} | {number(row['difference'])} | "
                  f"{row['verdict']} | {row['n_needed'] or ''} |" for row in e["against"]["comparison"].values()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import generate  # light: torch loads later
    adapter_path = generate.find_adapter(args.run)
    data_root = find_data(args, adapter_path)
    if args.against:
        generate.find_adapter(args.against)
    facts = generate.adapter_facts(adapter_path)
    if args.clips == 0 and args.quick:
        args.clips = QUICK_CLIPS

    import common
    import page
    import report
    from judge import Judge
    clips = Clips(data_root, args.split, args.clips, facts["image_size"])
    device, _ = common.pick_device(args.device, args.precision)
    judged = Judged(Judge(args.judge, device), clips)
    accuracy = judged.accuracy() if clips.single else {}
    print("the judge reads real pictures: " + ", ".join(f"{LANGUAGES[k]} {number(v)}" for k, v in accuracy.items())
          + f" (n {len(clips.single)})", flush=True)
    worst = min((values[0] for values in accuracy.values()), default=1.0)
    if worst < args.min_judge:
        raise RunFailed(f"judge {args.judge}: names only {worst:.3f} of {len(clips.single)} real pictures right, expected at "
                        f"least {args.min_judge:g}, so it may not judge; give another --judge, or lower --min-judge if the "
                        "labels themselves are hard to tell apart")

    subject = Subject(args.run, args)
    subject.load(clips)
    others = clips.other_of(subject.audio_embeds, args.seed)
    found, right = evaluate(subject, judged, others, args.quick)
    evaluation = {
        "format": 1, "run": args.run, "adapter": str(subject.adapter_path), "data_root": str(data_root), "split": args.split,
        "n": len(clips.rows), "n_single": len(clips.single), "n_pairs": len(clips.pairs), "quick": args.quick,
        "trained": {key: facts[key] for key in ("stage", "step", "base_model", "clap_model", "tanh_gate")},
        "settings": {key: getattr(args, key) for key in ("guidance", "steps", "scheduler", "seed", "gate", "noise", "precision", "clips")},
        "judge": {"name": args.judge, "accuracy": accuracy, "n": len(clips.single)},
        **found, "warnings": warnings_of(found), "training": training_curves(subject.adapter_path),
        "git_commit": report.git_commit()}
    if args.against:
        other = Subject(args.against, args)
        other.load(clips)
        found_b, right_b = evaluate(other, judged, others, args.quick)
        n = {name: row["n"] for name, row in evaluation["measures"].items()}
        n |= {f"rho_{name}": values["n"] for name, values in evaluation.get("properties", {}).items()}
        evaluation["against"] = {"run": args.against, "measures": found_b["measures"], "clips": found_b["clips"],
                                 "comparison": compare_runs(right, right_b, evaluation["measures"], n)}
    text, stem = to_markdown(evaluation), "evaluation-noise" if args.noise else "evaluation"
    write_json(subject.folder / f"{stem}.json", evaluation)
    write_atomic(subject.folder / f"{stem}.md", text.encode())
    page.write(evaluation, subject.folder / f"{stem}.html")
    print("\n" + text)
    print("\n".join(f"{subject.folder / f'{stem}.{kind}'}: {what}" for kind, what in (
        ("html", "sounds, pictures, plots: open it in a browser"), ("md", "the tables"), ("json", "every figure"))), flush=True)


if __name__ == "__main__":
    run_main(main)
