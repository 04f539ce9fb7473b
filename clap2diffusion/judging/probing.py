"""How much of the pictures CLAP's embeddings can tell, by a linear probe and by the adapter's projection.

Shapes: n clips, m held-out ones, E width of CLAP's embedding, D of the judge's, C its components."""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clap2diffusion.base import files, hub
from clap2diffusion.base.device import pick_device
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.base.statistics import interval, show_interval, stratified
from clap2diffusion.dataset.cache import cache_key, file_stats
from clap2diffusion.dataset.decoding import BadFile, load_picture
from clap2diffusion.dataset.encoders import CLAPAudioEncoder
from clap2diffusion.dataset.manifest import usable_rows
from clap2diffusion.judging.clips import find_judge
from clap2diffusion.judging.judge import Judge
from clap2diffusion.judging.metrics import win_rates
from clap2diffusion.pictures.generation import embed
from common import AudioProjectionMLP, whitening

CHUNK, FOLDS, TRAINED_FOLDS, COMPONENTS = 100, 5, 1, 64
RIDGES = 10.0 ** np.arange(-5, 4)  # of the sounds' mean squared singular value
CURVE = (0.1, 0.25, 0.5, 1.0)  # of the config's number of samples
KINDS = {"clips": "held-out clips", "classes": "held-out classes"}
WHITENINGS = {False: "no whitening", True: "whitened"}
Folds = dict[str, list[tuple[np.ndarray, np.ndarray]]]


def embed_clips(args: argparse.Namespace, stage1: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, list]:
    """Of clips of train and val: audio_embeds (n, E), the judge's picture embeddings (n, D), labels (n,).
    They are kept in chunks. Silent clips, copies of a sound or picture, and what cannot be read are left out.
    Raises UserError: no data or model, or fewer than 20 clips."""
    clap, root = hub.resolve_model(stage1.clap_model, "CLAP model"), Path(stage1.data_root)
    fingerprints = {"clap": hub.fingerprint(clap), "judge": hub.fingerprint(find_judge(args.judge))}
    rows = [row for row in usable_rows(root) if row.split != "test"]
    rows = [rows[i] for i in stratified([row.label or "" for row in rows], args.clips, args.seed)]
    key = cache_key(rows, [*map(file_stats, rows)], [], fingerprints, {"probe": stage1.image_size})
    folder, models, found = Path(args.cache_dir) / f"probe-{key[:16]}", (), []
    folder.mkdir(parents=True, exist_ok=True)
    options = bar_options(desc="embedding", unit=f" x {CHUNK} clips", leave=False)
    for at in tqdm(range(0, len(rows), CHUNK), **options):
        path, chunk = folder / f"{at:08d}.json", []
        if not path.exists():
            device = pick_device(args.device, "fp32")[0]
            models = models or (CLAPAudioEncoder(clap).to(device), Judge(args.judge, device))
            for row in rows[at:at + CHUNK]:
                try:
                    picture = load_picture(row.image_path, stage1.image_size)
                    sound = embed(models[0], str(row.audio_path))[0].tolist()
                except (BadFile, UserError) as error:
                    print(f"{row.where}: left out: {error}", flush=True)
                else:
                    chunk.append([sound, models[1].images([picture])[0].tolist(), row.label or row.id])
            files.write_json(path, {"clips": chunk})
        found += files.read_json(path)["clips"]
    sounds, pictures = {}, {}  # a copy would be trained on and held out
    found = [clip for clip in found if any(clip[0])
             and sounds.setdefault(str(clip[0]), clip) is pictures.setdefault(str(clip[1]), clip) is clip]
    if len(found) < 20:
        raise UserError(f"{root}: has {len(found)} usable clips in train and val; expected at least 20")
    sounds, pictures, labels = zip(*found)
    return np.array(sounds), np.array(pictures), list(labels)


def spectrum(x: np.ndarray) -> dict[str, float]:
    """Of sounds (n, E) of unit length: mean cosine of two, directions that hold 90 % of the variance, and p
    of variance_k ~ k^-p over the first half of the directions that n clips can show."""
    n = len(x)
    variances = np.linalg.eigvalsh(np.cov(x.T))[::-1].clip(min=1e-12)
    shown = np.arange(1, max(3, min(n - 1, len(variances)) // 2) + 1)
    return {"cosine": float((x.sum(0) @ x.sum(0) - n) / (n * (n - 1))),
            "directions": int(np.searchsorted(variances.cumsum(), 0.9 * variances.sum()) + 1),
            "power": float(-np.polyfit(np.log(shown), np.log(variances[:len(shown)]), 1)[0])}


def make_folds(labels: list[str], seed: int) -> Folds:
    """Pairs of training and held-out positions. `clips`: any clips are held out. `classes`: a held-out clip
    shares no label, "a" or both of "a+b", with a training clip; none if there are fewer than 4 labels."""
    rng, kinds = np.random.default_rng([seed, 41]), [set(label.split("+")) for label in labels]
    parts = np.array_split(rng.permutation(len(labels)), FOLDS)
    folds = [(np.concatenate(parts[:i] + parts[i + 1:]), parts[i]) for i in range(FOLDS)]
    found, names = {"clips": folds, "classes": []}, sorted(set().union(*kinds))
    parts = min(FOLDS, len(names) // 2) if len(names) > 3 else 0
    for group in np.array_split(rng.permutation(len(names)), parts) if parts else ():
        out = {names[i] for i in group}
        held = np.array([i for i, kind in enumerate(kinds) if kind <= out], int)
        if len(held) > 1:
            train = np.array([i for i, kind in enumerate(kinds) if not kind & out], int)
            found["classes"].append((train, held))
    return found


def win_rate(predicted: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Of each held-out clip (m,): by the cosine of predicted and true pictures (m, C), both centred."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (predicted, pictures))
    return win_rates(a @ b.T, np.arange(len(a)))


class Ridge:
    """Ridge regression, its strength by generalised cross-validation (Golub, Heath & Wahba 1979)."""

    def __init__(self, x: np.ndarray, held_out: np.ndarray):
        """x (n, E), held_out (m, E): sounds."""
        mean = x.mean(0)
        self.u, self.s, axes = np.linalg.svd(x - mean, full_matrices=False)
        self.held_out = (held_out - mean) @ axes.T  # (m, r)

    def predict(self, y: np.ndarray) -> np.ndarray:
        """Pictures of the training clips (n, C), centred -> of the held-out ones (m, C)."""
        z, best, best_error = self.u.T @ y, 0.0, math.inf
        for strength in RIDGES[::-1] * (self.s ** 2).mean():
            kept = self.s ** 2 / (self.s ** 2 + strength)
            freedom = 1 - (kept.sum() + 1) / len(y)  # the mean takes one
            left = (y ** 2).sum() - ((1 - (1 - kept) ** 2)[:, None] * z ** 2).sum()
            if freedom > 1e-6 and (error := left / freedom ** 2) < best_error:
                best, best_error = strength, error
        return (self.held_out * self.s / (self.s ** 2 + best)) @ z


def linear_probe(x: np.ndarray, y: np.ndarray, folds: list, whiten: bool, orders: list) -> list[np.ndarray]:
    """Win rates (n,) for each order of the pictures y (n, C); nan for a clip that was never held out."""
    found = [np.full(len(x), np.nan) for _ in orders]
    for train, held in folds:
        heard = x
        if whiten:
            mean, matrix = (part.numpy() for part in whitening(torch.from_numpy(x[train])))
            heard = (x * math.sqrt(x.shape[1]) - mean) @ matrix
        ridge = Ridge(heard[train], heard[held])
        for rates, order in zip(found, orders):
            mean = y[order[train]].mean(0)
            rates[held] = win_rate(ridge.predict(y[order[train]] - mean), y[order[held]] - mean)
    return found


def train_projection(x: np.ndarray, y: np.ndarray, fold: tuple, whiten: bool, rate: float,
                     stage1: argparse.Namespace, width: int) -> list[np.ndarray]:
    """Win rates (m,) after each share of CURVE of stage 1's samples. The adapter's projection, and one linear
    layer that stands for K, V and what they do, by AdamW at `rate`, constant after the warm-up."""
    torch.manual_seed(stage1.seed)
    (train, held), rng = fold, np.random.default_rng([stage1.seed, 43])
    mean = y[train].mean(0)
    sounds, pictures = torch.from_numpy(x).float(), torch.from_numpy(y - mean).float()
    projection = AudioProjectionMLP(x.shape[1], width, stage1.num_tokens)
    head = nn.Linear(width * stage1.num_tokens, y.shape[1])
    if whiten:
        projection.whiten(sounds[train])
    scaled = [p for p in projection.parameters() if p.requires_grad]
    groups = [{"params": scaled, "scale": stage1.projection_lr_scale},
              {"params": list(head.parameters()), "scale": 1.0}]
    optimizer, found = torch.optim.AdamW(groups, weight_decay=stage1.weight_decay, fused=True), []
    marks = [max(1, round(share * stage1.steps)) for share in CURVE]
    warmup = max(1.0, stage1.warmup_steps * (stage1.steps if stage1.warmup_steps < 1 else 1))
    for step in range(1, marks[-1] + 1):
        some = train[rng.integers(len(train), size=stage1.batch_size * stage1.accumulation)]
        loss = (head(projection(sounds[some]).flatten(1)) - pictures[some]).square().sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"] * min(1.0, step / warmup)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*scaled, *head.parameters()], stage1.clip)
        optimizer.step()
        if step in marks:
            with torch.inference_mode():
                predicted = head(projection(sounds[held]).flatten(1)).numpy()
            found += [win_rate(predicted, y[held] - mean)] * marks.count(step)
    return found


def by_label(rates: np.ndarray, labels: list[str]) -> np.ndarray:
    """The mean of each label's clips, as many as there are labels with a held-out clip."""
    names = np.unique(labels, return_inverse=True)[1][~np.isnan(rates)]
    rates = rates[~np.isnan(rates)]
    return np.array([rates[names == name].mean() for name in np.unique(names)])


def probe_linear(x: np.ndarray, y: np.ndarray, labels: list[str], folds: Folds,
                 args: argparse.Namespace) -> tuple[list[str], float, str]:
    """(the rows of the table, p that permuted sounds do as well, the best result in words). p is that of the
    largest of all cells, each in standard deviations of its permutations, so that no cell is picked."""
    rng = np.random.default_rng([args.seed, 47])
    orders = [np.arange(len(x)), *(rng.permutation(len(x)) for _ in range(args.permutations))]
    rows, deviations, best = [], [], (-math.inf, "")
    cells = [(kind, whiten) for kind in KINDS if folds[kind] for whiten in WHITENINGS]
    for kind, whiten in tqdm(cells, **bar_options(desc="linear probe", unit="cell", leave=False)):
        real, *permuted = linear_probe(x, y, folds[kind], whiten, orders)
        told = by_label(real, labels)
        luck = np.array([by_label(one, labels).mean() for one in permuted])
        found = f"{show_interval(interval(told))} | {len(told)}"
        rows.append(f"| {KINDS[kind]} | {WHITENINGS[whiten]} | {found} | "
                    f"{luck.mean():.3f} ({luck.min():.3f} to {luck.max():.3f}) |")
        all_orders = np.concatenate([[told.mean()], luck])
        deviations.append((all_orders - all_orders.mean()) / max(all_orders.std(), 1e-9))  # p is exact so
        words = f"{told.mean():.3f} of {KINDS[kind]}, where permuted sounds give {luck.mean():.3f}"
        best = max(best, (deviations[-1][0], words))
    largest = np.max(deviations, 0)
    return rows, float((largest[1:] >= largest[0]).sum() + 1) / len(orders), best[1]


def probe_projection(x: np.ndarray, y: np.ndarray, folds: Folds, args: argparse.Namespace,
                     stage1: argparse.Namespace, width: int) -> tuple[list[str], str]:
    """(the rows of the table, what to take). The config's whitening and rate stay unless another try is
    better with a paired 95 % interval over the held-out clips. The fewest samples within one standard error
    of the most will do."""
    rows, found = [], {}
    own = (stage1.whiten, min(args.rates, key=lambda rate: abs(math.log(rate))) * stage1.learning_rate)
    tries = [(whiten, rate * stage1.learning_rate) for whiten in WHITENINGS for rate in args.rates]
    for whiten, rate in tqdm(tries, **bar_options(desc="the projection", unit="run", leave=False)):
        curves = {kind: [train_projection(x, y, fold, whiten, rate, stage1, width)
                         for fold in folds[kind][:TRAINED_FOLDS]] for kind in KINDS if folds[kind]}
        points = {kind: [np.concatenate(point) for point in zip(*curve)] for kind, curve in curves.items()}
        for kind, point in points.items():
            shown = " | ".join(f"{rates.mean():.3f}" for rates in point)
            rows.append(f"| {KINDS[kind]} | {WHITENINGS[whiten]} | {rate:g} | {shown} |")
        found[whiten, rate] = [np.concatenate(point) for point in zip(*points.values())]  # (clips,) at each
    best = max(found, key=lambda one: max(rates.mean() for rates in found[one]))
    top = {one: max(found[one], key=np.mean) for one in (own, best)}
    gain = interval(top[best] - top[own])
    taken = best if gain[1] > 0 else own
    why = (f"better than the config's by {show_interval(gain)}" if taken != own else
           f"the config's; the best of the others is better by {show_interval(gain)}, which shows nothing")
    curve, error = found[taken], top[taken].std() / math.sqrt(len(top[taken]))
    enough = next(share for share, rates in zip(CURVE, curve) if rates.mean() >= top[taken].mean() - error)
    batch, steps = stage1.batch_size * stage1.accumulation, max(1, round(enough * stage1.steps))
    flag, more = "--whiten" if taken[0] else "--no-whiten", "; it still rises" if enough == CURVE[-1] else ""
    return rows, (f"{flag} and --learning-rate {taken[1]:g} ({why}), and at least {steps * batch:,} samples "
                  f"({steps:,} steps of {batch}){more}")


def probe(args: argparse.Namespace, stage1: argparse.Namespace) -> None:
    """Print, and write to --out, the spectrum, both probes, and what follows from them.
    args: of tools/probe.py. stage1: the settings of train_stage1.py. Raises UserError: as embed_clips()."""
    x, pictures, labels = embed_clips(args, stage1)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    mean, folds, facts = pictures.mean(0), make_folds(labels, args.seed), spectrum(x)
    _, s, axes = np.linalg.svd(pictures - mean, full_matrices=False)
    y = (pictures - mean) @ axes[:COMPONENTS].T / (np.linalg.norm(s) / math.sqrt(len(x)))  # total variance 1
    config = Path(stage1.base_model) / "unet/config.json"
    width = files.read_json(config)["cross_attention_dim"] if config.exists() else 768
    linear, p, best = probe_linear(x, y, labels, folds, args)
    said = f"**Nothing to be learned was found.** The best is {best} (p {p:.2f}). A run would learn the " \
        "pictures' look at most."
    lines = [
        f"{len(x)} clips of {stage1.data_root}, {len(set(labels))} labels; CLAP {stage1.clap_model}, judge "
        f"{args.judge}; seed {args.seed}.", "",
        f"CLAP: mean cosine of two clips {facts['cosine']:.3f}; 90 % of the variance in "
        f"{facts['directions']} of {x.shape[1]} directions; it falls as k^-{facts['power']:.2f}.", "",
        "| linear probe on | sounds | win rate, 95 % interval over labels | labels | permuted sounds |",
        "|---|---|---|---|---|", *linear, ""]
    if p <= 0.05:
        rows, take = probe_projection(x, y, folds, args, stage1, width)
        batch = stage1.batch_size * stage1.accumulation
        samples = " | ".join(f"{round(share * stage1.steps) * batch:,} samples" for share in CURVE)
        lines += [f"| the projection on | sounds | learning rate | {samples} |",
                  "|---|---|---|" + "---|" * len(CURVE), *rows, ""]
        said = f"**The sounds tell of the pictures:** {best} (p {p:.2f}). Take {take}."
    text = "\n".join([*lines, said]) + "\n"
    print(text, end="", flush=True)
    if args.out:
        files.write_text(Path(args.out), text)
