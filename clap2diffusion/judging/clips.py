"""What is judged, found and checked before torch loads: a run's stages, and the clips with their classes."""

import argparse
from collections import defaultdict
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np

from clap2diffusion.base import files, hub
from clap2diffusion.base.exits import UserError
from clap2diffusion.base.statistics import FEWEST, stratified
from clap2diffusion.dataset.decoding import BadFile, load_picture, read_windows
from clap2diffusion.dataset.manifest import Row, usable_rows
from clap2diffusion.judging.equal_weights import check_against
from clap2diffusion.judging.history import History
from clap2diffusion.pictures.inputs import adapter_facts, check_distilled, find_adapter

STAGES = ("stage1", "stage2", "stage3")
FEW = 50  # clips; below it a share of one half is known to no better than +- 0.14
PLAIN = "This is a photo of {}."  # what the judge reads of a label for which labels.json has no text


def class_texts(path: Path) -> dict[str, dict[str, str]]:
    """{label: {"en": text, "ko": text}} of labels.json; either text may be missing. Raises UserError."""
    texts = files.read_json(path)
    for label, of_label in texts.items():
        if not isinstance(of_label, dict) or not all(isinstance(text, str) for text in of_label.values()):
            raise UserError(f'{path}: {label!r:.80} has {of_label!r:.80}, expected {{"en": text}} of each '
                            "label; correct it, or move it away: it would be taken for the classes' texts")
    return texts


def check_run(args: argparse.Namespace) -> bool:
    """Look at what is to be judged, or without a judge reported on. Returns whether a report can be written:
    of a run whose three stages have ended, or of one stage's folder.
    Raises UserError: no adapter, data or judge; without a judge, a stage that has not ended; with --against,
    two adapters of equal weights."""
    run = Path(args.run)
    reported = (run / "result.json").exists() or all((run / s / "result.json").exists() for s in STAGES)
    if not args.judge and not reported:
        check_finished(run)
    adapter_path = find_adapter(args.run)
    facts = adapter_facts(adapter_path)
    if args.lora or args.scheduler == "lcm":
        base = hub.find_trained(args.base_model, facts["base_model"], "base model", adapter_path)
        check_distilled(args, base)
    if args.judge:
        find_data(args, adapter_path)
        if args.against:
            check_against(args)
        find_judge(args.judge)
    return reported


def find_judge(name: str) -> Path:
    """The folder of a judge. Raises UserError: no such model, or one that is no fixed-size SigLIP."""
    return hub.resolve_model(name, "judge", beside=hub.SCRIPTS)  # the default judge lies beside the scripts


def check_finished(run: Path) -> None:
    """Raises UserError: this is no folder of a run, or one of its stages is not finished."""
    if run.is_file():
        raise UserError(f"--run {run}: is a file; without a judge only a report is written, of a run or of a "
                        "stage, so give its folder")
    for path in (run / stage / "result.json" for stage in STAGES):
        if not path.exists():
            raise UserError(f"{path}: is missing, so {path.parent.name} is not finished; run the command "
                            f"that made {run} again, bash run_all_stages.sh with its config and flags; of "
                            "one finished stage, give its own folder with --run")


def find_data(args: argparse.Namespace, adapter_path: Path) -> str:
    """--data-root, or the one that the adapter's stage was trained on. Raises UserError: it is unknown."""
    if args.data_root:
        return args.data_root
    config, stages = adapter_path.parent / "config.json", History(adapter_path).stages
    if not config.exists() and not stages:
        raise UserError(f"{config}: is missing, so the clips are unknown; give the data folder with "
                        "--data-root")
    return (stages[-1].settings if stages else files.read_json(config))["data_root"]


def pick_clips(labels: list[str], n: int, seed: int = 0) -> list[int]:
    """Up to n clips, each label in turn. Up to a third are pairs, fewer where single labels need the room.
    Which clip shows a label, and which labels are shown where they are too many, the seed chooses."""
    rng, turns, turn = np.random.default_rng([seed, 29]), defaultdict(count), {}
    for i in rng.permutation(len(labels)).tolist():
        turn[i] = next(turns[labels[i]])
    in_turn = sorted(turn, key=lambda i: turn[i])  # one of each, then another one, ...
    single, pairs = ([i for i in in_turn if ("+" in labels[i]) == paired] for paired in (False, True))
    n_labels = len({labels[i] for i in single})
    n_pairs = max(n - len(single), min(n // 3, max(n - n_labels, n // 10)))
    single, pairs = single[:n - min(n_pairs, len(pairs))], pairs[:n_pairs]
    return [i for some in (single, pairs) for i in sorted(some, key=lambda i: (turn[i], labels[i]))]


def readable(rows: list[Row], image_size: int) -> tuple[list[Row], list]:
    """The rows whose sound and picture can be read, and their pictures (PIL). The others are printed."""
    found, real = [], []
    for row in rows:
        try:
            read_windows(row.audio_path, 10.0)
            real.append(load_picture(row.image_path, image_size))
            found.append(row)
        except BadFile as error:
            print(f"{row.where}: left out: {error}", flush=True)
    return found, real


class Clips:
    """The clips of one evaluation, their real pictures, and the classes the judge chooses from.

    The classes are the labels of every split's rows. Where no clip of the split has one, a clip's caption is
    its class, which remarks() says.
    `single` and `pairs` are the positions of clips with one label and with two ("a+b"), `of_class` those of
    the single ones of each class. `heard` holds the pairs of labels that training or validation has."""

    def __init__(self, data_root: str, split: str, n: int, image_size: int):
        rows = usable_rows(data_root)
        held_out = [row for row in rows if row.split == split]
        if not held_out:
            raise UserError(f"{data_root}: has no clip in split {split!r}; give another --split or "
                            "--data-root")
        self.data_root, self.split, self.image_size = Path(data_root), split, image_size
        chosen = stratified([row.label or "" for row in held_out], n)
        self.rows, self.real = readable([held_out[i] for i in chosen], image_size)
        if len(self.rows) < 2:
            raise UserError(f"{data_root}: split {split!r} has {len(self.rows)} usable clips; expected at "
                            "least 2")
        self.labelled = any(row.label for row in self.rows)
        kinds_of = {row.where: (row.label or "").split("+") for row in rows}
        self.kinds = [kinds_of[row.where] if self.labelled else [row.text] for row in self.rows]
        known = kinds_of.values() if self.labelled else self.kinds
        self.classes = sorted({name for kind in known for name in kind if name})
        self.single = [i for i, kind in enumerate(self.kinds) if len(kind) == 1 and kind[0]]
        self.pairs = [i for i, kind in enumerate(self.kinds) if len(kind) == 2]
        mixed = np.random.default_rng(31).permutation(self.single).tolist()  # who is first is by seed
        self.of_class = {name: [i for i in mixed if self.kinds[i][0] == name] for name in self.classes}
        self.truth = np.array([self.classes.index(self.kinds[i][0]) for i in self.single], int)
        self.heard = {frozenset(kinds_of[row.where]) for row in rows if row.split != "test"}
        self.train = [row for row in rows if row.split == "train" and row.split != split]

    def indices(self, names) -> set[int]:
        return {self.classes.index(name) for name in names}

    def reference_pictures(self, seed: int = 0) -> dict[int, object]:
        """For each clip, by its position, another real picture of its labels, from the train split: how far
        apart two sets of real pictures are that differ in nothing else. The seed chooses. A clip whose labels
        training never has, or not often enough, is not in it."""
        left, found = defaultdict(list), {}
        for i in np.random.default_rng([seed, 23]).permutation(len(self.train)):
            left[self.train[i].label].append(self.train[i])
        for i, row in enumerate(self.rows):
            while left[row.label] and i not in found:
                with suppress(BadFile):  # named when the features were cached
                    found[i] = load_picture(left[row.label].pop().image_path, self.image_size)
        return found

    def captions(self) -> dict[str, list[str]]:
        """What the judge reads of each class, by what it is (page.TEXTS): "en" and "ko" are the texts of
        labels.json, where it has every label's, and "en" as well PLAIN with a label of ASCII letters. "label"
        is PLAIN where a label has others: nobody knows its language. "caption" is the clips' own captions,
        where they have no labels. The first one decides what is seen."""
        path = self.data_root / "labels.json"
        if not self.labelled:
            return {"caption": self.classes}
        texts = class_texts(path) if path.exists() else {}
        given = [texts.get(label, {}) for label in self.classes]
        kind = "en" if all(text.get("en") or label.isascii()
                           for label, text in zip(self.classes, given)) else "label"
        found = {kind: [text.get("en") or PLAIN.format(label.replace("_", " "))
                        for label, text in zip(self.classes, given)]}
        if all(text.get("ko") for text in given):
            found["ko"] = [text["ko"] for text in given]
        if kind == "label" and "ko" in found:  # labels.json has every text, in this language alone
            del found[kind]
        return found

    def remarks(self) -> list[str]:
        """What must be said of the clips before their figures: how few they are, and what stands for a
        class."""
        n, found = len(self.rows), []
        if n < FEWEST:
            found.append(f"too few clips ({n}) to tell anything: expected at least {FEWEST}; CMMD is left "
                         "out, and intervals are too narrow")
        elif n < FEW:
            found.append(f"{n} clips tell little: of a share of one half the 95 % interval is +- "
                         f"{0.98 / n ** 0.5:.2f}, and a smaller difference cannot show")
        unlabelled = sum(not row.label for row in self.rows)
        if not self.labelled:
            found.append(f"no clip of split {self.split} has a label, so each clip's caption is its class "
                         f"({len(self.classes)} classes): the judge must tell captions apart, and two that "
                         "say the same in other words are two classes")
        elif unlabelled:
            found.append(f"{unlabelled} of {n} clips have no label and are left out where labels count")
        return found
