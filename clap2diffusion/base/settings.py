"""Flags over JSON, without heavy imports: `--help` and wrong settings answer before torch loads.

A stage's parser is the only place where a key, its type, bounds, default and help live. A value comes from
the parser's default, then the JSON file given by --config, then the command line; the last one wins. Of the
JSON file every stage reads the section `common` and its own:

    {"common": {"batch_size": 16, "precision": "fp32"}, "stage1": {"steps": 600}, "data": ["world"]}

`data` and `evaluate` are the arguments that run_all_stages.sh gives to prepare_data.py and evaluate.py."""

import argparse
import difflib
import json
import math
import os
import sys
from pathlib import Path

from clap2diffusion.base.exits import UserError
from clap2diffusion.base.files import read_json

SECTIONS = ("common", "stage1", "stage2", "stage3")
# of pictures where none are asked for: classifier-free guidance and sampling steps. What is distilled for LCM
# has learned guidance: arXiv 2311.05556 draws with 1 (none, which also halves the work) to 2
GUIDANCE, LCM_GUIDANCE, STEPS, LCM_STEPS = 3.0, 1.0, 25, 4
LCM_MOST_STEPS = 50  # LCMScheduler's own limit: the steps of the teacher that it was distilled from
# diffusers' names of the schedulers that make pictures in few steps; "base" is the base model's own
SCHEDULERS = {"base": None, "dpm": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler",
              "ddim": "DDIMScheduler", "lcm": "LCMScheduler"}
# what may change between a checkpoint and its resumption: it concerns places, logs and memory alone. Models
# may lie elsewhere: their fingerprints and the features' content are compared.
FREE_SETTINGS = {"run", "name", "workers", "log_every", "save_every", "keep", "log_dir", "device", "fresh",
                 "allow_changed", "sample_every", "samples", "max_bad_share", "cache_dir", "init_from",
                 "val_batch_size", "checkpointing", "ema_on_cpu", "require_proof", "base_model",
                 "clap_model"}
FIXED_SETTINGS = {"whiten", "adam_8bit", "strength"}  # they are in the weights or in the optimizer's state


class Number:
    """An argparse type with bounds, for flags and JSON alike: Number(int, 1), Number(float, 0, 1)."""

    def __init__(self, kind: type, low: float = -math.inf, high: float = math.inf, multiple_of: int = 0):
        self.kind, self.low, self.high, self.multiple_of = kind, low, high, multiple_of
        self.__name__ = "whole number" if kind is int else "number"

    def __call__(self, text: str):
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a {self.__name__}") from None
        return self.check(value)

    def check(self, value):
        """Check a value that JSON has parsed already; a bool is no number and 8.0 is no whole number."""
        if type(value) is not self.kind and not (self.kind is float and type(value) is int):
            raise argparse.ArgumentTypeError(f"got {json.dumps(value)}, expected a {self.__name__}")
        # neither nan nor infinite, and no whole number of hundreds of digits
        inside = self.low <= value <= self.high and abs(value) <= sys.float_info.max
        if not inside:
            bounds = (f"of at least {self.low:g}" if self.high == math.inf else
                      f"from {self.low:g} to {self.high:g}")
            raise argparse.ArgumentTypeError(f"got {value}, expected a {self.__name__} {bounds}")
        if self.multiple_of and value % self.multiple_of:
            raise argparse.ArgumentTypeError(f"got {value}, expected a multiple of {self.multiple_of}")
        return self.kind(value)


SEED, SHARE, COUNT = Number(int, 0, 2 ** 31 - 1), Number(float, 0, 1), Number(int, 0)
SWITCH = {"action": argparse.BooleanOptionalAction}  # add("--flip", **SWITCH, ...) makes --flip and --no-flip


class Once(argparse.Action):
    """For a flag that one may want to give several times: the last one would win, and the others be lost."""

    def __init__(self, *args, instead: str, **more):
        """instead: what to do, for the error's sentence."""
        super().__init__(*args, **more)
        self.instead = instead

    def __call__(self, parser, args, values, option_string=None):
        if getattr(args, self.dest) is not self.default:
            raise UserError(f"{option_string}: is given twice; {self.instead}")
        setattr(args, self.dest, values)


def check_text(text: str, where: str) -> None:
    """Raises UserError: the text holds half a surrogate pair, as which a byte reaches Python that is not
    UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x} alone"
        raise UserError(f"{where}: got {text!a}: {what} is not UTF-8; write it in UTF-8, or give the file or "
                        "folder another name") from None


class _Parser(argparse.ArgumentParser):
    refused: dict[str, str] = {}

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what is not UTF-8 before anything is made of it."""
        where, encoding = "the command line", sys.getfilesystemencoding()
        for token in sys.argv[1:] if args is None else args:
            name, equals, value = token.partition("=")
            if token.startswith("--") and name.isascii():
                where, token = name, value if equals else name
            if encoding != "utf-8" and not token.isascii():  # its letters are not those that were typed
                raise UserError(f"{where}: got {token!a}, which was read as {encoding}; begin the command "
                                "with PYTHONUTF8=1, or set a locale such as LC_ALL=C.UTF-8")
            check_text(token, where)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        why = [f"; {reason}" for flag, reason in self.refused.items() if f"--{flag}" in message.split()]
        raise UserError(f"{message}{''.join(why)} (see {self.prog} --help)")


def new_parser(doc: str, prog: str | None = None, **refused: str) -> argparse.ArgumentParser:
    """A parser without abbreviations that shows the script's docstring and raises UserError on a bad flag.
    prog: the script's name, where another script builds its parser. refused: for flags that this script does
    not have but others have or had, the reason why."""
    parser = _Parser(prog=prog, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.refused = {key.replace("_", "-"): reason for key, reason in refused.items()}
    return parser


def nearest(key: str, known) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def _check_value(action: argparse.Action, value, where: str, many: bool):
    """One JSON value against the flag's action: type, bounds, choices. many: it is a list of such values."""
    switch = isinstance(action, argparse.BooleanOptionalAction)
    kind, expected = (list, "a list") if many else (bool, "true or false") if switch else (str, "text")
    if isinstance(action.type, Number) and not many:
        try:
            value = action.type.check(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: {error}") from None
    elif not isinstance(value, kind):
        raise UserError(f"{where}: got {json.dumps(value)}, expected {expected}")
    elif kind is str:
        check_text(value, where)
    if many:
        return [_check_value(action, item, where, many=False) for item in value]
    if action.choices and value not in action.choices:
        raise UserError(f"{where}: got {value!r}, expected one of {', '.join(map(str, action.choices))}")
    return value


def _merge_json(args: argparse.Namespace, parser: _Parser, actions: dict, section: str) -> None:
    """Put the values of the JSON file's sections into args, where no flag has set them."""
    content = read_json(args.config)
    for name, values in content.items():
        if name in ("data", "evaluate"):
            continue  # for run_all_stages.sh
        if name not in SECTIONS:
            raise UserError(f"{args.config}: unknown section {name!r}; {nearest(name, SECTIONS)}")
        if not isinstance(values, dict):
            raise UserError(f"{args.config}: section {name!r} is not an object {{...}}")
    for name in ("common", section):
        for key, value in content.get(name, {}).items():
            where = f"{args.config}: {name}.{key}"
            if key not in actions:
                why = parser.refused.get(key.replace("_", "-"))
                raise UserError(f"{where}: unknown key; {why or nearest(key, actions)}")
            value = _check_value(actions[key], value, where, many=actions[key].nargs in ("+", "*"))
            if args.origin.get(key) != "flag":
                setattr(args, key, value)
                args.origin[key] = f"{args.config} [{name}]"


def _with_origin(args: argparse.Namespace, key: str) -> str:
    """A setting as its flag, and where its value comes from if that is a file."""
    origin = args.origin.get(key, "flag")
    return f"--{key.replace('_', '-')} {vars(args)[key]:g}" + (f" ({origin})" if origin != "flag" else "")


def parse_config(parser: argparse.ArgumentParser, section: str, argv: list[str] | None) -> argparse.Namespace:
    """Merge default < JSON < flag. `origin` of the result says where each value came from that is no default.
    Raises UserError: an unknown key (with the nearest match), a wrong type, a value out of range, a bad flag,
    a UNet in fewer bits that is to run without autocast, drops above 1, one validation clip alone."""
    argv = sys.argv[1:] if argv is None else argv
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config")}
    given = {token.split("=")[0] for token in argv}
    args = parser.parse_args(argv)
    args.origin = {dest: "flag" for dest, a in actions.items() if given & set(a.option_strings)}
    if args.config:
        _merge_json(args, parser, actions, section)
    if getattr(args, "frozen_dtype", "fp32") != "fp32" and args.precision == "fp32":
        raise UserError(f"--frozen-dtype {args.frozen_dtype} needs --precision bf16: a UNet held in fewer "
                        "bits cannot compute in float32")
    drops = ("caption_drop", "audio_drop", "both_drop")
    shares = {key: vars(args)[key] for key in drops if key in vars(args)}
    total = math.fsum(shares.values())  # + makes 0.33 + 0.56 + 0.11 more than 1
    if total > 1:
        told = [_with_origin(args, key) for key in shares]
        raise UserError(f"{', '.join(told)} are {total:g} together, expected at most 1: a sample has one of "
                        "them, so lower the others as well")
    if args.val_clips == 1:
        raise UserError(f"{_with_origin(args, 'val_clips')}: validation compares each clip with another's "
                        "sound; give at least 2, or 0 for all")
    if {"window_low", "window_high"} <= vars(args).keys() and args.window_low >= args.window_high:
        raise UserError(f"{_with_origin(args, 'window_low')} is not below "
                        f"{_with_origin(args, 'window_high')}: no gate could come into the window")
    if getattr(args, "best_metric", "") == "val_right_noisy" and args.val_draws < 2:
        raise UserError("--best-metric val_right_noisy needs --val-draws 2 or more: one draw may miss the "
                        "noisier half of the timesteps")
    return args


def read_settings(parser: argparse.ArgumentParser, stage: str, argv: list[str] | None) -> argparse.Namespace:
    """A stage's settings by parse_config. Those that differ from the defaults are printed, one a line with
    where each came from; with --dry-run all of them."""
    cfg = parse_config(parser, stage, argv)
    found = settings(cfg)
    other = [key for key in found if vars(cfg)[key] != parser.get_default(key)]
    note = "" if cfg.dry_run else "; --dry-run and config.json in its folder show all"
    print(f"{cfg.name}: {len(other)} of {len(found)} settings are not the script's defaults{note}",
          *(f"  {key:<24} {found[key]!s:<40} {cfg.origin.get(key, '')}".rstrip()
            for key in (found if cfg.dry_run else other)), sep="\n", flush=True)
    return cfg


def adapter_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that stages 1 and 2 share, in which they do not differ."""
    add = parser.add_argument
    # what a sample is shown: each share is of samples, not of batches
    add("--caption-drop", type=SHARE, default=0.5, help="share with the empty caption and its sound")
    add("--audio-drop", type=SHARE, default=0.05, help="share with its caption and the null audio")
    add("--both-drop", type=SHARE, default=0.05, help="share with empty caption and null audio")
    add("--high-noise-share", type=SHARE, default=0.0,
        help="share whose timestep comes from the noisiest fifth, where layout is decided (0 = all even)")
    # learning
    add("--projection-lr-scale", type=SHARE, default=1.0,
        help="the projection's learning rate as a share of it: its inputs are large, so it may need less")
    add("--weight-decay", type=SHARE, default=0.01, help="AdamW's weight decay (0 = none)")
    add("--clip", type=Number(float, 1e-6), default=0.5, help="largest gradient norm")
    add("--min-snr-gamma", type=Number(float, 0, 1000), default=0.0,
        help="gamma of Min-SNR loss weights (0 = plain loss)")
    add("--adam-8bit", **SWITCH, default=False, help="AdamW with moments in 8 bits (bitsandbytes)")
    add("--ema-decay", type=Number(float, 0, 0.999999), default=0.0,
        help="decay of averaged weights (0 = no EMA); at step n at most (1 + n) / (10 + n), as diffusers "
        "has it, so 0.9999 is 0.9987 at step 7,000")
    add("--ema-on-cpu", **SWITCH, default=False, help="hold the averaged weights on the CPU")
    # stopping
    add("--best-metric", choices=("val_right", "val_right_noisy", "silence_minus_right", "other_minus_right"),
        default="val_right", help="what decides best and early stopping; _noisy = on the noisier half of the "
        "timesteps, where layout is decided (needs --val-draws 2 or more)")
    add("--patience", type=COUNT, default=0, help="validations without improvement to stop after (0 = never)")
    add("--min-delta", type=Number(float, 0), default=0.0, help="smallest change that counts as improvement")


def rank_growth(cfg: argparse.Namespace) -> dict[int, int]:
    """LoRA's active rank from a step on, {step: rank}, of --rank-growth and --lora-rank.
    Raises UserError: steps or ranks do not rise, or the first step is not 0, or the last rank is another."""
    steps, ranks, rank = cfg.rank_growth[::2], cfg.rank_growth[1::2], cfg.lora_rank
    rise = all(a < b for row in (steps, ranks) for a, b in zip(row, row[1:]))
    fits = len(steps) == len(ranks) and steps[:1] == [0] and ranks[0] > 0 and ranks[-1] == rank
    if steps and not (fits and rise):
        raise UserError(f"--rank-growth {' '.join(map(str, cfg.rank_growth))}: expected STEP RANK pairs that "
                        f"rise, from step 0 to rank {rank} (--lora-rank), such as 0 {max(1, rank // 2)} 1000 "
                        f"{rank}")
    return dict(zip(steps, ranks))


def model_flags(parser: argparse.ArgumentParser):
    """The flags of generate.py and of the page that say which adapter draws, with which models, and where.
    Gives add_argument of their group."""
    add = parser.add_argument_group("models").add_argument
    add("--run", default="runs/tiny",
        help="run or stage folder (its adapter.safetensors), or an adapter file (default: runs/tiny)")
    add("--base-model", default="",
        help="another base model for the same adapter ('' = the one it was trained with)")
    add("--clap-model", default="", help="where the adapter's CLAP lies now ('' = where it was in training)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    return add


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of generate.py and evaluate.py that say in how many steps and bits pictures are drawn."""
    add = parser.add_argument_group("steps and bits").add_argument
    add("--steps", type=Number(int, 1, 1000),
        help=f"sampling steps (default: {STEPS}; with --scheduler lcm {LCM_STEPS})")
    add("--scheduler", choices=[*SCHEDULERS], default="base",
        help="base = the base model's own; dpm, unipc: made for few steps, such as --steps 8; lcm: for 4 "
        "steps without guidance, with an LCM LoRA as --lora; ddim: what Hyper-SD's LoRAs ask for, with "
        "--guidance 1 (default: base)")
    add("--lora", default="", metavar="FILE", action=Once, instead="one LoRA can be used, so merge several "
        "into one file",
        help="a LoRA for the base model beside the adapter, such as an LCM LoRA: safetensors, with "
        "diffusers' or kohya's names ('' = none)")
    add("--lora-scale", type=Number(float, 0, 10), metavar="X", help="strength of --lora (default: 1)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="type the models are held and run in")
    add("--frozen-dtype", choices=("nf4",), default="",
        help="nf4 = the UNet's attention blocks in 4 bits, with --precision bf16 (default: as --precision)")
    add("--compile", action="store_true",
        help="torch.compile the UNet's transformer blocks (the first picture takes up to a minute longer)")


def check_sampling(args: argparse.Namespace) -> None:
    """Fill in the defaults of sampling_flags() and of guidance that depend on other flags.
    Raises UserError: flags that contradict each other."""
    lcm = args.scheduler == "lcm"
    if args.frozen_dtype and args.precision == "fp32":
        raise UserError(f"--frozen-dtype {args.frozen_dtype} needs --precision bf16: a UNet held in fewer "
                        "bits cannot compute in float32")
    if args.lora_scale is not None and not args.lora:
        raise UserError("--lora-scale is for --lora; give one or leave it out")
    if lcm and (args.steps or 0) > LCM_MOST_STEPS:
        raise UserError(f"--steps {args.steps}: --scheduler lcm takes at most {LCM_MOST_STEPS}; give fewer, "
                        f"such as {LCM_STEPS}, or another --scheduler")
    if args.steps is None:
        args.steps = LCM_STEPS if lcm else STEPS
    if args.guidance is None:
        args.guidance = LCM_GUIDANCE if lcm else GUIDANCE
    if args.lora_scale is None:
        args.lora_scale = 1.0


def common_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags that every stage has: places, data, device, validation, checkpoints and logs."""
    add = parser.add_argument
    # places
    add("--config", default="configs/tiny.json",
        help=f"JSON file with sections common and {stage} ('' = none)")
    add("--run", default="runs/tiny",
        help="run folder; this stage writes into a folder of its own name inside it")
    add("--name", default=Path(sys.argv[0]).stem.removeprefix("train_") or stage,
        help="name of this stage's folder in the run (default: the script's name without train_)")
    add("--data-root", default="data/world", help="folder with metadata.jsonl")
    add("--cache-dir", default="cache", help="folder of the feature caches, shared by stages and runs")
    add("--base-model", default="assets/tiny/base", help="Stable Diffusion model: folder or hub name")
    add("--clap-model", default="assets/tiny/clap", help="CLAP model: folder or hub name")
    add("--log-dir", default="", help="folder for TensorBoard's files ('' = inside the stage's folder)")
    # data
    add("--image-size", type=Number(int, 8, 4096, multiple_of=8), default=64,
        help="side of the training pictures in pixels")
    add("--windows", type=Number(int, 1, 64), default=1,
        help="CLAP windows taken from each clip; a step picks one")
    add("--flip", **SWITCH, default=False, help="mirror half of the pictures")
    add("--max-bad-share", type=SHARE, default=0.01, help="share of unusable rows above which to stop")
    add("--batch-size", type=Number(int, 1), default=2, help="samples in one forward pass")
    add("--accumulation", type=Number(int, 1), default=1, help="forward passes in one optimizer step")
    add("--workers", type=Number(int, -1, 64), default=-1,
        help="loader processes (0 = load in this process; -1 = 2 with CUDA; on a CPU 1 to decode files and 0 "
        "in training, where a read is quicker than a hand-over)")
    # device and numbers
    add("--seed", type=SEED, default=0, help="seed of order, noise, timesteps, drops, LoRA")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    add("--precision", choices=("bf16", "fp32"), default="bf16",
        help="autocast type of the forward pass; fp32 = none")
    # memory and speed
    add("--frozen-dtype", choices=("fp32", "bf16", "nf4"), default="fp32",
        help="type the frozen UNet is held in; nf4 = its attention blocks in 4 bits, the rest in bf16")
    add("--checkpointing", choices=("none", "down", "all"), default="none",
        help="blocks of the UNet whose activations are computed again in the backward pass instead of kept")
    add("--channels-last", **SWITCH, default=False, help="memory format of convolutions")
    add("--compile", **SWITCH, default=False, help="torch.compile the UNet (first step: minutes)")
    # validation
    add("--validate-every", type=COUNT, default=500, help="steps between validations (0 = only at both ends)")
    add("--val-draws", type=Number(int, 1, 100), default=4,
        help="fixed noise and timestep draws for each clip")
    add("--val-clips", type=COUNT, default=0, help="validation clips used, each label by its share (0 = all)")
    add("--val-batch-size", type=Number(int, 1), default=32,
        help="samples in one forward pass without gradient: validation, and encoding features (at most 16)")
    # checkpoints, logs, pictures
    add("--save-every", type=Number(int, 1), default=500, help="steps between checkpoints")
    add("--keep", type=Number(int, 2, 1000), default=5, help="newest checkpoints kept, beside best")
    add("--log-every", type=Number(int, 1), default=10, help="steps between log lines")
    add("--sample-every", type=COUNT, default=0, help="steps between sample pictures (0 = only at the end)")
    add("--samples", type=Number(int, 0, 64), default=8,
        help="validation clips in the sample pictures (0 = none)")
    add("--allow-changed", **SWITCH, default=False,
        help="resume although learning settings or data differ from the checkpoint's")
    add("--fresh", **SWITCH, default=False, help="begin anew; what is there is kept in a backup folder")
    add("--dry-run", action="store_true", help="print all settings, check what needs no model to be loaded, "
        "say what would be done, and end: nothing is written, downloaded or trained")


def settings(args: argparse.Namespace) -> dict:
    """The resolved settings as a dictionary, without what is none. The batch is that of all processes."""
    found = {key: vars(args)[key] for key in sorted(vars(args)) if key not in ("origin", "dry_run", "config")}
    return found | {"batch_size": args.batch_size * int(os.environ.get("WORLD_SIZE", 1))}


def changed_settings(saved: dict, now: dict) -> list[str]:
    """The settings that are in both and differ, as `key old -> new`, except those that may change freely.
    Features of another name (the files' times are in it) are the same if their content is, wherever their
    data lies now. The data folder may be spelled otherwise."""
    free = FREE_SETTINGS | {"content"}
    if Path(saved.get("data_root", "")).resolve() == Path(now.get("data_root", "")).resolve():
        free = free | {"data_root"}
    if saved.get("content") and saved["content"] == now.get("content"):
        free = free | {"features", "data_root"}
    return [f"{key} {saved[key]!r} -> {now[key]!r}" for key in sorted(saved.keys() & now.keys())
            if key not in free and saved[key] != now[key]]


def check_same_settings(path: Path, saved: dict, now: dict, allow_changed: bool) -> None:
    """A run goes on with the settings it began with; only logs and places may change.
    Raises UserError: a setting differs (both values shown)."""
    changed = changed_settings(saved, now)
    fixed = [one for one in changed if one.split(" ")[0] in FIXED_SETTINGS]
    if fixed:
        raise UserError(f"{path}: was made with {'; '.join(fixed)}, which cannot change within a run; give "
                        "the old one, or begin anew with --fresh")
    if changed and not allow_changed:
        raise UserError(f"{path}: was made with other settings ({'; '.join(changed)}); give the old ones, "
                        "begin anew with --fresh, or go on with the new ones with --allow-changed")
