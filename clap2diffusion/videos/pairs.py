"""Two folders, one of sounds and one of pictures, become a data folder: files of one base name are a pair."""

import argparse
import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from clap2diffusion.base.exits import DISK_FULL, RunFailed, UserError
from clap2diffusion.base.progress import bar_options
from clap2diffusion.dataset.manifest import begin_data_folder, find_gaps, read_manifest, write_manifest
from clap2diffusion.dataset.manifest_file import SPLIT_OF
from clap2diffusion.videos.file_names import OTHERS, PICTURES, Files, list_files, plain, suffix_of
from clap2diffusion.videos.list_rows import read_rows, recognise
from clap2diffusion.videos.splits import split_videos
from clap2diffusion.videos.summary import Skipped, describe_rows, describe_skipped, write_skipped
from clap2diffusion.videos.wanted import Wanted, caption_of

SECOND = "another file of that name is used"
SEVERAL = "several files of that name in several folders"


@dataclass(frozen=True, slots=True)
class Pair:
    """A sound and a picture, as names inside their folders, and what is known of them."""
    sound: str
    picture: str
    label: str | None = None
    text: str = ""
    split: str | None = None


def _stem(name: str) -> str:
    return os.path.splitext(plain(name))[0]


# in this order: the path without suffix, the base name; each first as it is written, then in small letters
KEYS: tuple[Callable[[str], str], ...] = (
    _stem, lambda name: _stem(name).casefold(), lambda name: _stem(name).rpartition("/")[2],
    lambda name: _stem(name).rpartition("/")[2].casefold())


def match_names(sounds: list[str], pictures: list[str]) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """The pairs (sound, picture) of two folders' names, and what is left over. Names are compared without
    suffix: first with their sub-folders, then the base name alone; each time first as they are written, then
    in small letters; both Unicode forms count as one. Of files that differ in the suffix alone the first by
    name is used. A base name in several folders that are not the same on both sides makes no pair."""
    pairs, skipped = [], []
    left = [set(sounds), set(pictures)]
    several: set[str] = set()
    for key in KEYS:
        groups = [defaultdict(list), defaultdict(list)]
        for group, names in zip(groups, left, strict=True):
            for name in sorted(names):
                group[key(name)].append(name)
        for base in sorted(groups[0].keys() & groups[1].keys()):
            found = [group[base] for group in groups]
            used = [names[0] for names in found]
            clear = all(len({_stem(name) for name in names}) == 1 for names in found)
            several.update(() if clear else found[0] + found[1])
            if clear:
                pairs.append(tuple(used))
                for names, rest in zip(found, left, strict=True):
                    skipped += [Skipped(SECOND, name, detail=names[0]) for name in names[1:]]
                    rest.difference_update(names)
    for names, missing in ((left[0], "no picture of that name"), (left[1], "no sound of that name")):
        skipped += [Skipped(SEVERAL if name in several else missing, name) for name in sorted(names)]
    return sorted(pairs), skipped


def _bring(source: Path, target: Path) -> str:
    """Bring a file into the data folder: 'linked' as a hard link, or 'copied' where the file system has none.
    Raises RunFailed: no space is left. Raises OSError: the file cannot be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = Path(os.path.realpath(source))
    target.unlink(missing_ok=True)  # of a run that was killed
    with suppress(OSError):
        os.link(source, target)
        return "linked"
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunFailed(f"no space left in {target.parent} for {target.name}; free some and run the same "
                            "command again") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return "copied"


def _pair(sound: str, picture: str) -> Pair:
    """A pair with what its place tells: the label is the folder of both, the split the one that both are
    below."""
    folders = [[plain(folder) for folder in name.split("/")[:-1]] for name in (sound, picture)]
    last = [names[-1] if names else "" for names in folders]
    same = last[0].casefold() == last[1].casefold() and last[0].casefold() not in ("", *SPLIT_OF)
    splits = {next((SPLIT_OF[name.casefold()] for name in names if name.casefold() in SPLIT_OF), None)
              for names in folders}
    return Pair(sound, picture, last[0] if same else None, caption_of(last[0]) if same else "",
                splits.pop() if len(splits) == 1 else None)


def add_labels(pairs: list[Pair], path: Path) -> tuple[list[Pair], list[Skipped]]:
    """The pairs with labels, captions and splits of a list with the header file,label,text,split, and its
    rows that are of no pair. A row names the sound or the picture, with or without suffix and sub-folder.
    Raises UserError: the list is none, or of other files."""
    if (kind := recognise(path)) != "plain":
        raise UserError(f"{path}: is a list of kind {kind}; for pairs expected a header such as "
                        "file,label,text,split")
    sides = [{name: i for i, name in enumerate(names)} for names in
             ([pair.sound for pair in pairs], [pair.picture for pair in pairs])]
    files, skipped, done = [Files(list(side)) for side in sides], [], {}
    for row in read_rows(path, "plain", print):
        fault, split = row.fault, SPLIT_OF.get((row.split or "").casefold())
        if row.split and not split:
            fault = fault or "a split that is none of train, val, test"
        named = [lookup.named(row.file or "")[0] for lookup in files]
        place = next((side[name] for side, name in zip(sides, named, strict=True) if name), None)
        fault = fault or ("in the list, and no pair" if place is None else
                          "listed twice" if place in done else "")
        if fault:
            skipped.append(Skipped(fault, row.file or "", row.where))
        else:
            label = row.label or pairs[place].label
            text = row.text or (caption_of(label) if label else "")
            done[place] = replace(pairs[place], label=label, text=text, split=split or pairs[place].split)
    if not done:
        first = f"its first row names {skipped[0].file!r:.120}" if skipped else "it has a header alone"
        raise UserError(f"{path}: no row names a file of a pair: {first}, the first pair is "
                        f"{pairs[0].sound!r:.120} and {pairs[0].picture!r:.120}")
    if len(done) < len(pairs):
        print(f"{path}: {len(pairs) - len(done)} of {len(pairs)} pairs are not in it; they are used, with "
              "their folder as label where both lie in such a one")
    return [done.get(i, pair) for i, pair in enumerate(pairs)], skipped


def _settings(args: argparse.Namespace, pairs: list[Pair]) -> dict:
    """What makes the data folder what it is: the names and sizes of all files, the list and the seed."""
    names = hashlib.sha256()
    for pair in pairs:
        for path in (Path(args.audio, pair.sound), Path(args.images, pair.picture)):
            size = path.stat().st_size if path.exists() else 0
            names.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
    labels = hashlib.sha256(Path(args.labels).read_bytes()).hexdigest()[:16] if args.labels else None
    return {"made_by": "pairs", "seed": args.seed, "pairs": len(pairs), "files": names.hexdigest()[:16],
            "labels": labels}


def _list(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The names in both folders. Raises UserError: a folder is empty, or --out is not beside them."""
    target, found = os.path.realpath(args.out), []
    for flag, folder, what in (("--audio", args.audio, "sound"), ("--images", args.images, "picture")):
        real = os.path.realpath(folder)
        if (common := os.path.commonpath((real, target))) in (real, target):
            how = "is" if real == target else "lies in" if common == real else "holds"
            raise UserError(f"--out {args.out}: {how} the folder of {flag} {folder}, whose files are linked "
                            "or copied there; give a folder beside it")
        names = [name for name in list_files(folder) if suffix_of(name) not in OTHERS
                 and (suffix_of(name) in PICTURES) == (what == "picture")]
        if not names:
            raise UserError(f"{flag} {folder}: holds no file that is a {what} by its suffix")
        found.append(names)
    return found[0], found[1]


def _bring_all(args: argparse.Namespace, pairs: list[Pair],
               skipped: list[Skipped]) -> tuple[list[dict], Counter]:
    """Bring the files of all pairs: the rows, and how many files were linked and copied. What cannot be read
    is added to `skipped`."""
    out, rows, brought = Path(args.out), [], Counter()
    wanted = [Wanted(_stem(one.sound), one.sound, None, None, one.label, (), one.split, "") for one in pairs]
    splits = split_videos(wanted, args.seed, print, "pairs")
    for pair in tqdm(pairs, **bar_options(desc="pairs", unit="pair")):
        row = {"image_file_name": f"images/{pair.picture}", "audio_file_name": f"audio/{pair.sound}",
               "text": pair.text} | ({"label": pair.label} if pair.label else {})
        targets = out / row["audio_file_name"], out / row["image_file_name"]
        sources = Path(args.audio, pair.sound), Path(args.images, pair.picture)
        try:
            "".join(row.values()).encode()
            ways = [_bring(*one) for one in zip(sources, targets, strict=True)]
        except UnicodeEncodeError:
            skipped.append(Skipped("a name that is not UTF-8", ascii(pair.sound), "", ascii(pair.picture)))
        except OSError as error:
            skipped.append(Skipped("cannot be read", pair.sound, "", f"{error.filename}: {error.strerror}"))
            for target in targets:
                target.unlink(missing_ok=True)
        else:
            brought.update(ways)
            rows.append(row | {"split": splits[_stem(pair.sound)]})
    return rows, brought


def make_pairs(args: argparse.Namespace) -> None:
    """Make the data folder args.out from the folders args.audio and args.images and the list args.labels.
    Raises UserError: there is no pair, or what _list() and add_labels() refuse."""
    sounds, pictures = _list(args)
    matched, skipped = match_names(sounds, pictures)
    if not matched:
        raise UserError(f"--audio {args.audio}: no sound has the base name of a picture of {args.images}; "
                        f"the first sound is {sounds[0]!r:.120}, the first picture {pictures[0]!r:.120}")
    pairs = [_pair(*names) for names in matched]
    if args.labels:
        pairs, left = add_labels(pairs, Path(args.labels))
        skipped += left
    out, settings = Path(args.out), _settings(args, pairs)
    held = begin_data_folder(out, settings)
    if held is None:
        return
    with held:
        rows, brought = _bring_all(args, pairs, skipped)
        write_skipped(out, skipped)
        if not rows:
            raise UserError(f"--audio {args.audio}: no pair can be read ({describe_skipped(skipped)}); "
                            f"{out}/skipped.csv lists them")
        write_manifest(out, rows, settings)
        print(f"{out}: {describe_rows(rows)}; {brought['linked']} files linked, {brought['copied']} copied")
        if skipped:
            print(f"{out}/skipped.csv: {len(skipped)} left out: {describe_skipped(skipped)}")
        for gap in find_gaps(read_manifest(out)[0]):
            print(f"{out}: {gap}; --labels with a column split names them, or try another --seed and --out")
