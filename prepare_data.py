"""Make a data folder: sounds, pictures and the manifest metadata.jsonl that joins them.

    python prepare_data.py world --out data/world         # the built-in sound world, nothing to download
    python prepare_data.py tuxpaint --out data/tuxpaint   # real recordings and photos: Tux Paint's stamps
    python prepare_data.py videos --videos my_videos --labels list.csv --out data/mine   # from videos
    python prepare_data.py pairs --audio sounds --images pictures --out data/mine   # two folders of files
    python prepare_data.py check --data-root my_data      # every unusable or suspicious row of a folder
    python prepare_data.py clean                          # the feature caches, their sizes, which are old

A manifest has one JSON object a line: image_file_name, audio_file_name, text, label, split (train, val or
test). metadata.csv is read as well, and so are Hugging Face's names for the columns. The sound world adds
`properties` (what was drawn, for measuring later) and labels.json (a plain caption of each label in English
and Korean, for judging). The same flags always give the same bytes."""

import argparse

from clap2diffusion.base.exits import run_main
from clap2diffusion.base.settings import SWITCH, Number, new_parser
from clap2diffusion.videos.list_rows import KINDS


def shard(text: str) -> tuple[int, int]:
    """`2/4` -> (2, 4). Raises ArgumentTypeError."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected i/n, such as 2/4 for the second of four")
    return int(i), int(n)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, "prepare_data.py")
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="ten synthesised sounds and their scenes", allow_abbrev=False)
    add = world.add_argument
    add("--out", default="data/world", help="folder to write")
    add("--seed", type=Number(int, 0), default=0, help="seed of every example")
    add("--train", type=Number(int, 1), default=4800, help="training examples")
    add("--val", type=Number(int, 1), default=100, help="validation examples")
    add("--test", type=Number(int, 1), default=300, help="test examples")
    add("--videos", **SWITCH, default=False,
        help="write each example as a short video too, with a list of them, videos.csv")
    add("--workers", type=Number(int, 1, 64), default=2, help="processes")
    add_videos(commands)
    tux = commands.add_parser("tuxpaint", allow_abbrev=False,
                              help="stamps of Debian's tuxpaint-stamps-default")
    add = tux.add_argument
    add("--out", default="data/tuxpaint", help="folder to write")
    add("--stamps", default="/usr/share/tuxpaint/stamps", help="where the package lies")
    add("--size", type=Number(int, 16, 4096), default=512, help="side in pixels of a rendered SVG")
    pairs = commands.add_parser("pairs", allow_abbrev=False,
                                help="a folder of sounds and one of pictures, matched by base name")
    add = pairs.add_argument
    add("--audio", required=True, help="folder of sounds; its sub-folders are read too")
    add("--images", required=True, help="folder of pictures; it may be the same")
    add("--out", required=True, help="folder to write: hard links, copies on another file system")
    add("--labels", default="", help="CSV with a header: file, and any of label, text, split ('' = none)")
    add("--seed", type=Number(int, 0), default=0, help="seed of the splits")
    check = commands.add_parser("check", allow_abbrev=False,
                                help="list what is unusable or suspicious in a data folder; changes nothing")
    add = check.add_argument
    add("--data-root", default="data/world", help="folder with metadata.jsonl")
    add("--max-bad-share", type=Number(float, 0, 1), default=0.01,
        help="share of unusable rows above which the exit code is 2")
    add("--max-suspicious-share", type=Number(float, 0, 1), default=1.0, help="the same for suspicious ones")
    add("--splits", nargs="*", default=["train", "val"], choices=("train", "val", "test"),
        help="splits that must have rows, val two sounds; else the exit code is 2 (default: train val)")
    add("--base-model", default="assets/tiny/base",
        help="base model whose tokenizer counts the captions: folder or hub name ('' = none)")
    add("--show", type=Number(int, 0), default=20, help="rows listed of each kind (0 = all)")
    add("--workers", type=Number(int, 1, 64), default=2, help="processes")
    clean = commands.add_parser("clean", allow_abbrev=False,
                                help="list the feature caches with their sizes; remove those that are named")
    add = clean.add_argument
    add("--cache-dir", default="cache", help="folder of the feature caches")
    add("--remove", nargs="+", default=[], metavar="NAME",
        help="caches to remove, or `old` for all that nothing needs any more; let no stage train from them "
        "meanwhile (default: none)")
    return parser


def add_videos(commands) -> None:
    """The flags of the command `videos`."""
    parser = commands.add_parser("videos", allow_abbrev=False,
                                 help="a folder of videos; the same command goes on after a stop")
    add = parser.add_argument
    add("--videos", required=True, help="folder of the videos, with any folders inside it")
    add("--out", default="data/videos", help="folder to write")
    add("--labels", nargs="+", default=[], metavar="FILE",
        help="lists of the clips: labels, captions, splits (default: none; the folders' names are labels)")
    add("--list", metavar="KIND", choices=KINDS,
        help=f"kind of the lists: {', '.join(KINDS)} (default: recognised)")
    add("--ontology", default="",
        help="AudioSet's ontology.json or class_labels_indices.csv: names of its classes")
    add("--window-s", type=Number(float, 1, 60), default=10.0, help="seconds of sound in a clip, at most")
    add("--windows", type=Number(int, 1, 1000), default=1,
        help="windows of a video that no list cuts, evenly from its start to its end; fewer in a short one")
    add("--pick", choices=("middle", "loudest", "siglip"), default="middle",
        help="frame of the window: nearest to its middle, to its loudest moment, or the one that fits the "
        "label best by --judge; never a black, blank or blurred one if there is another")
    add("--judge", default="assets/tiny/judge", help="SigLIP model of --pick siglip: folder or hub name")
    add("--still", **SWITCH, default=True, help="also videos of one still picture")
    add("--size", type=Number(int, 16, 4096), default=512,
        help="shorter side of a stored picture in pixels, at most; none is enlarged")
    add("--seed", type=Number(int, 0), default=0, help="seed of the splits that no list gives")
    add("--workers", type=Number(int, 1, 256), default=2, help="processes")
    add("--shard", type=shard, default=(1, 1), metavar="i/n",
        help="make the i-th of n shares of the videos, on machines that share the folders; the same command "
        "without it joins them (default: all)")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command == "check":
        from clap2diffusion.dataset.checking import check_data as command
    elif args.command == "clean":
        from clap2diffusion.dataset.cleaning import clean_caches as command
    elif args.command == "pairs":
        from clap2diffusion.videos.pairs import make_pairs as command
    elif args.command == "videos":
        from clap2diffusion.videos.preparing import prepare_videos as command
    elif args.command == "world":
        from clap2diffusion.world.making import make_world as command
    else:
        from clap2diffusion.world.making import make_tuxpaint as command
    command(args)


if __name__ == "__main__":
    run_main(main)
