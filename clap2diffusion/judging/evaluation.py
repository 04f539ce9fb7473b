"""One evaluation: pictures of the clips' sounds, what the judge and the world's own measure see, the files.

Every clip keeps its starting noise for all sounds and runs, so only the sound differs and runs are paired."""

import argparse
import functools
import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clap2diffusion.base import files, hub
from clap2diffusion.base.device import DTYPES, pick_device
from clap2diffusion.base.exits import RunFailed, UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.statistics import (
    FEWEST,
    bootstrap,
    interval,
    show_interval,
    stratified,
    summary,
)
from clap2diffusion.dataset.decoding import SILENT_PEAK, active_rms, load_waveform
from clap2diffusion.engine.gate_sweep import find_warning
from clap2diffusion.judging import metrics, page
from clap2diffusion.judging.clips import Clips, find_data
from clap2diffusion.judging.equal_weights import compare_adapters
from clap2diffusion.judging.history import TRAINED, History
from clap2diffusion.judging.judge import Judge
from clap2diffusion.judging.page import SOUNDS, TEMPLATES, TEXTS
from clap2diffusion.judging.report import git_commit
from clap2diffusion.pictures.generation import embed, load_clap, mix
from clap2diffusion.pictures.inputs import adapter_facts, find_adapter, scale_of_gate
from clap2diffusion.pictures.pipelines import load_stock_pipeline, pictures, sampling
from clap2diffusion.pictures.sheets import write_png
from common import other_sounds

MIXES, DIVERSITY_SEEDS, MIN_DIVERSITY, SWEEP_CLIPS = 10, 8, 0.5, 100
GATES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SETTINGS = ("guidance", "steps", "scheduler", "seed", "gate", "noise", "precision", "clips")
ASKED = ("lora", "lora_scale", "frozen_dtype", "compile")  # written down where they are used


class Subject:
    """An adapter under evaluation: its embeddings of the clips, and every picture it makes of them.
    Pictures are PNG files in FOLDER/evaluation/KEY, where KEY names adapter and settings. Only those that are
    missing are made. FOLDER is the run, or where the adapter file lies."""

    def __init__(self, run: str, args: argparse.Namespace):
        self.args, self.run, self.files, self.adapter_path = args, run, {}, find_adapter(run)
        self.facts, self.history = adapter_facts(self.adapter_path), History(self.adapter_path)
        self.folder = Path(run) if Path(run).is_dir() else self.adapter_path.parent
        key = {name: getattr(args, name) for name in ("steps", "precision", "base_model", "noise")}
        if args.scheduler != "base":
            key["scheduler"] = args.scheduler
        if args.lora:
            key["lora"] = hashlib.sha256(Path(args.lora).read_bytes()).hexdigest(), args.lora_scale
        if args.frozen_dtype:
            key["frozen_dtype"] = args.frozen_dtype
        key["adapter"] = self.sha256 = hashlib.sha256(self.adapter_path.read_bytes()).hexdigest()
        key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        self.pictures_dir = self.folder / "evaluation" / key

    def load(self, clips: Clips) -> None:
        """Load the models and embed every clip."""
        args = self.args
        device, _ = pick_device(args.device, args.precision)
        self.base = hub.find_trained(args.base_model, self.facts["base_model"], "base model",
                                     self.adapter_path)
        self.encoder = load_clap(args.clap_model, self.facts, self.adapter_path)
        self.audio_embeds = self.hear(clips)  # (n, E)
        dtype = DTYPES[args.precision]
        self.pipe = load_stock_pipeline(self.base, self.adapter_path, device, dtype, **sampling(args))
        if args.noise:  # layer-normalised noise in place of audio_tokens (B, N, D): no sound at all
            generator = torch.Generator().manual_seed(args.seed)
            self.pipe.unet.encoder_hid_proj.image_projection_layers[0].register_forward_hook(
                lambda module, _, x: module.norm(torch.randn(x.shape, generator=generator).to(x)))
        self.scale = 1.0 if args.gate is None else scale_of_gate(args.gate, self.facts, self.adapter_path)
        self.pictures_dir.mkdir(parents=True, exist_ok=True)
        files.remove_stale(self.pictures_dir)

    def hear(self, clips: Clips) -> Tensor:
        """Every clip's embedding (n, E); silent clips are the null audio."""
        rows = tqdm(clips.rows, **bar_options(desc=f"{self.run}: sounds", unit="clip", leave=False))
        return torch.cat([embed(self.encoder, str(row.audio_path)) for row in rows])

    def pictures(self, name: str, audio_embeds: Tensor, seeds: list[int], scale: float | None = None,
                 guidance: float | None = None) -> list[Image.Image]:
        """One picture for each of audio_embeds (m, E); a file's name tells what it was made from."""
        args, guidance = self.args, guidance or self.args.guidance
        scale = self.scale if scale is None else scale
        keys = [hashlib.sha256(vector.numpy().tobytes() + repr((seed, scale, guidance)).encode()).hexdigest()
                for vector, seed in zip(audio_embeds, seeds, strict=True)]
        paths = self.files[name] = [self.pictures_dir / f"{name}-{key[:16]}.png" for key in keys]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        done = len(paths) - len(missing)
        options = bar_options(total=len(paths), initial=done, desc=f"{self.run}: {name}", unit="picture")
        with tqdm(**options) as bar:
            for at in range(0, len(missing), args.batch_size):
                chunk = missing[at:at + args.batch_size]
                images = pictures(self.pipe, audio_embeds[chunk], [""] * len(chunk), guidance, args.steps,
                                  [seeds[i] for i in chunk], scale, self.facts["image_size"])
                for i, image in zip(chunk, images, strict=True):
                    write_png(paths[i], image)
                bar.update(len(chunk))
        return [Image.open(path).convert("RGB") for path in paths]


def pick_others(clips: Clips, audio_embeds: Tensor, seed: int) -> list[int]:
    """For each clip another one of as many labels that shares none and is no copy (common.other_sounds).
    Raises UserError: all clips are one recording."""
    alike = (audio_embeds @ audio_embeds.T > 0.999).numpy() | np.eye(len(audio_embeds), dtype=bool)
    if alike.all():
        raise UserError(f"{clips.data_root}: the {len(alike)} clips of split {clips.split} sound alike to "
                        "CLAP, so none can be given another's sound; expected at least two recordings")
    others, everyone = {}, list(range(len(clips.rows)))
    for arity in {len(kind) for kind in clips.kinds}:
        members = [i for i in everyone if len(clips.kinds[i]) == arity]
        pool = everyone if alike[np.ix_(members, members)].all() else members
        found = other_sounds(["+".join(clips.kinds[i]) for i in pool], audio_embeds[pool], seed)
        others |= {i: pool[j] for i, j in zip(pool, found, strict=True) if i in members}
    return [others[i] for i in everyone]


class Judged:
    """The judge's view of the clips: embeddings of real pictures and captions, and its own accuracy."""

    def __init__(self, judge: Judge, clips: Clips):
        self.judge, self.clips = judge, clips
        self.real = judge.images(clips.real)  # (n, D)
        self.names = {language: judge.captions(names) for language, names in clips.captions().items()}
        texts = [row.text or " ".join(kind) for row, kind in zip(clips.rows, clips.kinds)]
        self.captions = judge.captions(texts)  # (n, D)
        self.classes = next(iter(self.names.values()))  # (k, D)

    @functools.cached_property
    def real_distance(self) -> tuple[int, tuple | None]:
        """(n, CMMD's bootstrap) of the real pictures against others of their labels, a pair for each clip;
        None for fewer than FEWEST."""
        pairs = self.clips.reference_pictures()
        if len(pairs) < FEWEST:
            return len(pairs), None
        reference, own = self.judge.images([*pairs.values()]), np.eye(len(pairs), dtype=bool)
        return len(pairs), metrics.cmmd(self.real[[*pairs]], reference, own)

    def measures(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure of one picture a clip, of image embeddings (n, D): {name: values of its clips}."""
        clips, found, everyone = self.clips, {}, np.arange(len(self.clips.rows))
        for language, names in self.names.items():
            ranks = metrics.ranks_of_truth(images[clips.single] @ names.T, clips.truth)
            found[f"top1_{language}"] = ranks == 1
            if len(clips.classes) > 5:
                found[f"top5_{language}"] = ranks <= 5
        for name, references in (("iis", self.real), ("cis", self.captions)):
            similarity = images @ references.T
            found[f"{name}_win_rate"] = metrics.win_rates(similarity, everyone)
            found[f"{name}_cosine"] = similarity[everyone, everyone]
        ranks = metrics.ranks_of_truth(images @ self.real.T, everyone)
        found |= {"recall_at_1": ranks == 1, "recall_at_5": ranks <= 5, "median_rank": ranks}
        if clips.pairs:
            truth = [clips.indices(clips.kinds[i]) for i in clips.pairs]
            of_two = metrics.found_of_two(images[clips.pairs] @ self.classes.T, truth)
            heard = np.array([frozenset(clips.kinds[i]) in clips.heard for i in clips.pairs])
            for name, those in (("heard", heard), ("unheard", ~heard)):
                found |= {f"both_{name}": of_two[those] == 2, f"one_{name}": of_two[those] >= 1}
        return {name: np.asarray(values, float) for name, values in found.items() if len(values)}


def about(clips: Clips) -> dict[str, dict]:
    """What each measure is, what chance gives, and which direction is better. `one_drawn` is the floor of a
    generator that always draws one of two sounds rightly and guesses the other."""
    n, k = len(clips.rows), len(clips.classes)
    kinds = ("heard", "unheard", "mixed") if k > 1 else ()
    both = {f"both_{kind}": 2 / (k * (k - 1)) for kind in kinds}
    one = {f"one_{kind}": 1 - (k - 2) * (k - 3) / (k * (k - 1)) for kind in kinds}
    top = {f"top{m}_{text}": min(1, m / k) for m in (1, 5) for text in TEXTS}
    chance = {**top, "iis_win_rate": 0.5, "cis_win_rate": 0.5,
              "recall_at_1": 1 / n, "recall_at_5": min(1, 5 / n), "median_rank": (n + 1) / 2, **both, **one}
    return {name: {"title": texts["title"].format(n=n), "about": texts["about"].format(n=n),
                   "chance": chance.get(name), "one_drawn": 1 / (k - 1) if name in both else None,
                   "higher_is_better": name not in ("median_rank", "cmmd")}
            for name, texts in files.read_json(Path(__file__).parent / "measures.json").items()}


def measure_table(judged: Judged, embeds: dict[str, np.ndarray], others: list[int]
                  ) -> tuple[dict[str, dict], dict[str, tuple]]:
    """(each measure with its interval for each sound and for real pictures, the right sound's bootstraps)."""
    boots, own, enough = {}, np.eye(len(judged.real), dtype=bool), len(judged.real) >= FEWEST
    n = {"cmmd": len(judged.real)} if enough else {}  # of few clips a resample may hold one clip alone
    shared = {"right": own, "silence": None, "other": own[others]}  # pairs (picture, real) of one clip
    for kind, images in {**embeds, "real": judged.real}.items():
        values = judged.measures(images)
        n |= {name: len(of_clips) for name, of_clips in values.items()}
        boots[kind] = {name: bootstrap(of_clips, np.median if name == "median_rank" else None)
                       for name, of_clips in values.items()}
        if kind != "real" and enough:
            boots[kind]["cmmd"] = metrics.cmmd(images, judged.real, shared[kind])
    n_real, distance = judged.real_distance if enough else (0, None)
    boots["real"] |= {"cmmd": distance} if distance else {}
    table = {name: {**facts, "n": n[name],
                    **{kind: summary(*found[name]) for kind, found in boots.items() if name in found}}
             for name, facts in about(judged.clips).items() if name in n}
    if enough and n_real != n["cmmd"]:  # of the others training has no such label
        table["cmmd"]["title"] += f" (real pictures: n {n_real}{'' if distance else ', too few'})"
    return table, boots["right"]


def some_of(things: list, n: int) -> list:
    """n of them by a fixed seed, in order; all if there are fewer."""
    return [things[i] for i in stratified([*range(len(things))], n)]


def set_properties(clips: Clips, world) -> dict[int, dict]:
    """What was set in each single sound that we made ourselves, by its position: loudness and so on."""
    rows = {i: clips.rows[i].properties for i in clips.single if clips.kinds[i][0] in world.CLASSES}
    return {i: {**row["sources"][0], **row} for i, row in rows.items() if row and row.get("sources")}


def follow_properties(clips: Clips, pictures: dict[str, list], others: list[int], world) -> tuple[dict, dict]:
    """Spearman's rho between each property of the sound and its measure in the picture: (the part of
    evaluation.json, the right sound's bootstraps by measure); both are empty if the data have no properties.
    `real` is the measure's own accuracy, on real renders. `right` pairs a clip with its picture, `shuffled`
    with the picture of another clip's sound, where nothing may be left."""
    known = set_properties(clips, world)
    if len(known) < FEWEST:  # which properties_remark() says
        return {}, {}
    shown = {"real": (clips.real, known), "right": (pictures["right"], known),
             "shuffled": (pictures["other"], [others[i] for i in known])}
    seen = {kind: [world.measure(images[i], clips.kinds[j][0]) for i, j in zip(known, drawn, strict=True)]
            for kind, (images, drawn) in shown.items()}
    found, right = {}, {}
    for name in world.PROPERTIES:
        heard = [properties[name] for properties in known.values()]
        points = {kind: np.array([heard, [values[name] for values in measured]]).T
                  for kind, measured in seen.items()}
        boots = {kind: metrics.bootstrap_spearman(pairs) for kind, pairs in points.items()}
        found[name] = {"n": len(known), **{kind: summary(*boot) for kind, boot in boots.items()},
                       "points": points["right"].tolist()}
        right[f"rho_{name}"] = boots["right"]
    return found, right


def properties_remark(clips: Clips, world) -> list[str]:
    """Why there are no correlations, if the clips have properties that could be followed."""
    n = len(set_properties(clips, world))
    return [f"too few clips ({n}) with known properties for rank correlations: expected at least {FEWEST}"
            ] if 0 < n < FEWEST else []


def diversity(judged: Judged, subject: Subject, right: np.ndarray, seeds: int) -> dict:
    """Mode-collapse watch: how far apart a class's pictures lie, and does other noise give another picture.
    `distance` is the mean pairwise distance of the pictures of a class (each clip its own sound and noise;
    `right` holds their embeddings), `real_distance` that of the real pictures. `seed_distance` and
    `distinct_share` are of one sound of each class under several noises."""
    groups = some_of([group for group in judged.clips.of_class.values() if group], 32)
    if not groups:
        return {}
    rows = [group[0] for group in groups for _ in range(seeds)]
    noise = [subject.args.seed + 100_000 + k for _ in groups for k in range(seeds)]
    images = subject.pictures("seeds", subject.audio_embeds[rows], noise)
    embeds = judged.judge.images(images).reshape(len(groups), seeds, -1)
    pixels = np.stack([np.asarray(image, float) / 255 for image in images]).reshape(len(groups), seeds, -1)
    found = {"classes": len(groups), "seeds": seeds,
             "seed_distance": interval(np.array([metrics.pairwise_distance(x) for x in embeds])),
             "distinct_share": interval(np.array([metrics.distinct_share(x) for x in pixels]))}
    for name, shown in (("distance", right), ("real_distance", judged.real)):
        if distances := [metrics.pairwise_distance(shown[group]) for group in groups if len(group) > 1]:
            found[name] = interval(np.array(distances))
    return found


def pick_mixtures(clips: Clips, world) -> list[tuple[int, int]]:
    """Pairs of single clips whose labels training never heard together, in both orders; none if no clip has
    two labels. Where the data say how high a sound is, the first one is low and the second one high, as in
    the sound world's own pairs."""
    if not clips.pairs:
        return []
    known = set_properties(clips, world)
    low, high = ({name: [i for i in group if i in known and lowest <= known[i]["pitch"] <= highest] or group
                  for name, group in clips.of_class.items()}
                 for lowest, highest in ((0, world.LOW_PITCH), (world.HIGH_PITCH, 1)))
    unheard = [pair for pair in combinations(clips.classes, 2) if frozenset(pair) not in clips.heard]
    return [(low[a][k % len(low[a])], high[b][k % len(high[b])]) for pair in some_of(unheard, 45)
            for k in range(MIXES // 2) for a, b in (pair, pair[::-1]) if low[a] and high[b]]


def mixtures(judged: Judged, subject: Subject, jobs: list[tuple[int, int]]) -> np.ndarray:
    """How many of two sounds (n,) are found in the picture of two clips, mixed as generate.py --weights does.
    The two have one level while they sound. Of sounds 20 dB apart nobody would hear both, and by the RMS of a
    whole clip one crash in four seconds would be raised far above a steady sound."""
    clips, encoder, embeds, rate = judged.clips, subject.encoder, [], subject.encoder.sampling_rate
    for job in tqdm(jobs, **bar_options(desc=f"{subject.run}: mixing", unit="mix", leave=False)):
        waveforms = [load_waveform(clips.rows[i].audio_path, rate, encoder.window_s)[0] for i in job]
        weights = [1 / max(SILENT_PEAK, active_rms(waveform, rate)) for waveform in waveforms]
        embeds.append(encoder([mix(waveforms, weights)]))
    seeds = [subject.args.seed + 200_000 + k for k in range(len(jobs))]
    images = judged.judge.images(subject.pictures("mix", torch.cat(embeds), seeds))
    truth = [clips.indices(clips.kinds[i][0] for i in job) for job in jobs]
    return metrics.found_of_two(images @ judged.classes.T, truth)


def gate_strips(clips: Clips, subject: Subject, n: int = 5) -> list[dict]:
    """For n of the classes one clip's pictures at tanh(gate) 0 to 1, from the same noise."""
    if abs(subject.facts["tanh_gate"]) < 1e-6:
        return []
    some, paths = [group[0] for group in some_of([g for g in clips.of_class.values() if g], n)], []
    for gate in GATES:
        scale = scale_of_gate(gate, subject.facts, subject.adapter_path)
        subject.pictures("gate", subject.audio_embeds[some], [subject.args.seed + i for i in some], scale)
        paths.append(map(str, subject.files["gate"]))
    return [{"clip": i, "gates": list(GATES), "paths": list(strip)} for i, *strip in zip(some, *paths)]


def evaluate(subject: Subject, judged: Judged, others: list[int], quick: bool, world) -> tuple[dict, dict]:
    """Everything about one run: (its part of evaluation.json, the right sound's bootstraps by measure)."""
    clips, sounds = judged.clips, subject.audio_embeds
    seeds = [subject.args.seed + i for i in range(len(others))]
    # The two halves of guidance are equal for the null audio, so none gives the same for half the work.
    pictures = {"right": subject.pictures("right", sounds, seeds),
                "silence": subject.pictures("silence", torch.zeros_like(sounds), seeds, guidance=1.0),
                "other": subject.pictures("other", sounds[others], seeds)}
    embeds = {sound: judged.judge.images(images) for sound, images in pictures.items()}
    seen = {sound: (images @ judged.classes.T).argmax(1) for sound, images in embeds.items()}
    table, right = measure_table(judged, embeds, others)
    bins = [range(len(clips.classes) + 1)] * 2  # counts (k, k) by the sound's class and the one that is seen
    counts = {sound: np.histogram2d(clips.truth, classes[clips.single], bins)[0].astype(int).tolist()
              for sound, classes in seen.items()}
    found = {"measures": table, "confusion": {"classes": clips.classes, **counts}}
    if not quick and (jobs := pick_mixtures(clips, world)):
        of_two = mixtures(judged, subject, jobs)
        for name, good in (("both_mixed", of_two == 2), ("one_mixed", of_two >= 1)):
            right[name] = boot = bootstrap(good)
            table[name] = {**about(clips)[name], "n": len(jobs), "right": summary(*boot)}
        found["mixes"] = [{"clips": list(job), "found": int(count)} for job, count in zip(jobs, of_two)]
    properties, boots = follow_properties(clips, pictures, others, world)
    right |= boots
    if properties:
        found["properties"] = properties
    found["diversity"] = diversity(judged, subject, embeds["right"], DIVERSITY_SEEDS // (2 if quick else 1))
    found["gate"] = {"tanh_gate": subject.facts["tanh_gate"], "strips": gate_strips(clips, subject)}
    found["clips"] = [{"id": row.id, "label": "+".join(clips.kinds[i]), "text": row.text,
                       "other_clip": others[i], "audio": str(row.audio_path), "real": str(row.image_path),
                       **{sound: {"picture": str(subject.files[sound][i]),
                                  "seen": clips.classes[seen[sound][i]]} for sound in SOUNDS}}
                      for i, row in enumerate(clips.rows)]
    return found, right


def unproven(subject: Subject) -> list[str]:
    """What speaks against the training: why stage 3 did not show that the sound helps, from the adapter or
    the result beside it, and what its history says."""
    stages = subject.history.stages
    own = stages[-1].folder if stages else subject.adapter_path.parent
    warning = subject.facts["warning"] or (find_warning(own) if subject.facts["stage"] == "stage3" else "")
    if stages and stages[-1].warnings():  # which say the same of it
        warning = ""
    return [*([warning] if warning else []), *subject.history.warnings()]


def warnings_of(spread: dict) -> list[str]:
    """What the diversity says of mode collapse."""
    shares = {}
    if spread:
        shares["only {:.2f} of one sound's pictures are distinct"] = spread["distinct_share"][0]
    if "distance" in spread and spread["real_distance"][0] > 0:
        shares["pictures of a class lie {:.2f} times as far apart as real ones"] = (
            spread["distance"][0] / spread["real_distance"][0])
    return [f"mode collapse: {said.format(share)}, expected at least {MIN_DIVERSITY}"
            for said, share in shares.items() if share < MIN_DIVERSITY]


def compare_runs(a: dict, b: dict, found: dict, found_b: dict) -> dict:
    """Each measure of the right sound in both runs, with the paired difference A - B and a verdict.
    Raises RunFailed: the runs were not judged on equally many clips, on which ranks and retrieval depend."""
    rows = found["measures"] | {
        f"rho_{name}": {"title": f"rho of {name}", "n": row["n"], "higher_is_better": True}
        for name, row in found.get("properties", {}).items()}
    n = [{name: row["n"] for name, row in run["measures"].items()} for run in (found, found_b)]
    if n[0] != n[1]:
        raise RunFailed(f"the two runs were judged on other numbers of clips ({n[0]} and {n[1]}); ranks and "
                        "R@k depend on the number, so they cannot be compared")
    return {name: {"title": rows[name]["title"], "a": a[name][0], "b": b[name][0],
                   **metrics.compare(a[name], b[name], rows[name]["n"], rows[name]["higher_is_better"])}
            for name in a if name in b}


def check_judge(judged: Judged, args: argparse.Namespace) -> dict[str, list[float]]:
    """Share of the real single-label pictures whose label the judge names, by page.TEXTS, which is printed.
    Raises RunFailed: it is below --min-judge."""
    n, right = len(judged.clips.single), judged.measures(judged.real)
    accuracy = {language: interval(right[f"top1_{language}"]) for language in judged.names if n}
    parts = [f"{TEXTS[language]} {show_interval(values)}" for language, values in accuracy.items()]
    print(f"the judge reads real pictures: {', '.join(parts)} (n {n})", flush=True)
    worst = min((values[0] for values in accuracy.values()), default=1.0)
    if worst < args.min_judge:
        raise RunFailed(f"judge {args.judge}: names only {worst:.3f} of {n} real pictures right, expected at "
                        f"least {args.min_judge:g}, so it may not judge; give another --judge, or lower "
                        "--min-judge if the labels themselves are hard to tell apart")
    return accuracy


def sweep_guidance(subject: Subject, judge: Judge, clips: Clips) -> list[dict]:
    """What each of --guidance-sweep gives on these clips: {guidance, n, iis_win_rate, top1_...}, intervals.
    The highest win rate of image-image similarity is the best."""
    judged, audio_embeds, found = Judged(judge, clips), subject.hear(clips), []
    seeds = [subject.args.seed + 300_000 + i for i in range(len(clips.rows))]
    for guidance in subject.args.guidance_sweep:
        images = subject.pictures("guidance", audio_embeds, seeds, guidance=guidance)
        values = judged.measures(judge.images(images))
        found.append({"guidance": guidance, "n": len(seeds), **{
            name: interval(of_clips) for name, of_clips in values.items()
            if name == "iis_win_rate" or name.startswith("top1_")}})
    return found


def evaluate_run(args: argparse.Namespace, world) -> None:
    """Judge a run as the flags of evaluate.py say, and write evaluation.json, .md and .html into its folder.
    world: measures properties in pictures, as the module clap2diffusion.world.measure does.
    Raises RunFailed: the judge cannot read the real pictures.
    Raises UserError: data, models or the run to compare with are missing."""
    subject = Subject(args.run, args)
    facts, data_root = subject.facts, find_data(args, subject.adapter_path)
    clips = Clips(data_root, args.split, args.clips, facts["image_size"])
    remarks = [*clips.remarks(), *properties_remark(clips, world)]
    print(*(f"warning: {line}" for line in remarks), sep="\n", end="\n" * bool(remarks), flush=True)
    some = Clips(data_root, "val", SWEEP_CLIPS, facts["image_size"]) if args.guidance_sweep else None
    judged = Judged(Judge(args.judge, pick_device(args.device, args.precision, args.compile)[0]), clips)
    accuracy = check_judge(judged, args)
    subject.load(clips)
    sweep = sweep_guidance(subject, judged.judge, some) if some else []
    if sweep:
        args.guidance = max(sweep, key=lambda row: row["iis_win_rate"][0])["guidance"]
    others = pick_others(clips, subject.audio_embeds, args.seed)
    found, right = evaluate(subject, judged, others, args.quick, world)
    evaluation = {
        "format": 2, "run": args.run, "adapter": str(subject.adapter_path), "data_root": str(data_root),
        "split": args.split, "n": len(clips.rows), "n_single": len(clips.single), "n_pairs": len(clips.pairs),
        "labelled": clips.labelled, "quick": args.quick, "trained": {key: facts[key] for key in TRAINED},
        "settings": drawn_how(args),
        "judge": {"name": args.judge, "accuracy": accuracy, "n": len(clips.single)}, **found,
        "guidance_sweep": sweep,
        "warnings": [*unproven(subject), *remarks, *warnings_of(found["diversity"])],
        "adapter_sha256": subject.sha256, "unet": hub.fingerprint(subject.base / "unet"),
        "training": subject.history.curves(), "git_commit": git_commit()}
    if args.against:
        other = Subject(args.against, args)
        other.load(clips)
        found_b, right_b = evaluate(other, judged, others, args.quick, world)
        comparison = compare_runs(right, right_b, found, found_b)
        shared = compare_adapters(subject.adapter_path, other.adapter_path, args)
        evaluation["warnings"] += [f"{args.against}: {line}" for line in unproven(other)]
        if shared.all:
            evaluation["warnings"].append(f"{shared.line}, so every difference is 0 whatever was trained")
        evaluation["against"] = {"run": args.against, "measures": found_b["measures"],
                                 "clips": found_b["clips"], "comparison": comparison, "equal": shared.line}
    write_evaluation(subject.folder / f"evaluation{'-noise' if args.noise else ''}", evaluation)


def drawn_how(args: argparse.Namespace) -> dict:
    """The settings of the pictures, as evaluation.json has them."""
    asked = [key for key in ASKED if (args.lora if "lora" in key else getattr(args, key))]
    return {key: getattr(args, key) for key in (*SETTINGS, *asked)}


def write_evaluation(stem: Path, evaluation: dict) -> None:
    """Write the evaluation as stem.json, stem.md and stem.html, and print its tables."""
    text = TEMPLATES.get_template("evaluation.md.j2").render(e=evaluation)
    files.write_json(stem.with_suffix(".json"), evaluation)
    files.write_text(stem.with_suffix(".md"), text)
    files.write_text(stem.with_suffix(".html"), page.render(evaluation))
    print(f"\n{text}\n{stem}.html: sounds, pictures, plots: open it in a browser\n{stem}.md: the tables\n"
          f"{stem}.json: every figure", flush=True)
