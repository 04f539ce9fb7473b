"""Settings, exits and whole files, without heavy imports: `--help` and configuration errors answer before torch loads.

A stage's parser is the only place where a key, its type, bounds, default and help live. A value comes from the
parser's default, then the JSON file given by --config, then the command line; the last one wins. The JSON file
has a section `common` that every stage reads and one section for each stage:

    {"common": {"base_model": "assets/tiny/base", "batch_size": 16}, "stage1": {"steps": 600}, "data": ["world"]}

`data` and `evaluate` are the arguments that run_all_stages.sh gives to prepare_data.py and evaluate.py.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

SECTIONS = ("common", "stage1", "stage2", "stage3")
GUIDANCE = 3.0  # classifier-free guidance of pictures where none is asked for
SCHEDULERS = {"base": None, "dpm": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}  # diffusers' names
EXIT_FAILED, EXIT_USER = 1, 2
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class UserError(Exception):
    """The user's input is wrong: one sentence that says what, where, got, expected and what to do. Exit code 2."""


class RunFailed(Exception):
    """The work itself failed (non-finite losses, a gate that walks away, a full disk). Exit code 1."""


class Stopped(BaseException):
    """A signal ended the program in good order. Exit code 128 + signal number. No library's `except Exception` eats it."""

    def __init__(self, signum: int, detail: str = "nothing was left half-written, the same command goes on"):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {detail}")
        self.signum = signum


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
        try:
            inside = self.low <= value <= self.high and math.isfinite(value)
        except OverflowError:  # a whole number of hundreds of digits
            inside = False
        if not inside:
            raise argparse.ArgumentTypeError(f"got {value}, expected {self.range()}")
        if self.multiple_of and value % self.multiple_of:
            raise argparse.ArgumentTypeError(f"got {value}, expected a multiple of {self.multiple_of}")
        return self.kind(value)

    def range(self) -> str:
        if self.high == math.inf:
            return f"a {self.__name__} of at least {self.low:g}"
        return f"a {self.__name__} from {self.low:g} to {self.high:g}"


class _Parser(argparse.ArgumentParser):
    refused: dict[str, str] = {}

    def error(self, message: str):
        why = [f"; {reason}" for flag, reason in self.refused.items() if f"--{flag}" in message.split()]
        raise UserError(f"{message}{''.join(why)} (see {self.prog} --help)")


def new_parser(doc: str, **refused: str) -> argparse.ArgumentParser:
    """A parser without abbreviations that shows the script's docstring and raises UserError on a bad flag.

    refused: why this script has no such flag, for flags that others have.
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.refused = {key.replace("_", "-"): reason for key, reason in refused.items()}
    return parser


def _no_duplicates(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key {key!r} stands twice")
    return dict(pairs)


def _not_finite(text: str):
    raise UserError(f"{text} is not a number that JSON or a setting can have")


def read_json(path: str | Path) -> dict:
    """Read a JSON object strictly: duplicate keys, NaN and Infinity are errors.

    Raises:
        UserError: the file is missing, is not UTF-8 or is not one JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_not_finite)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an existing JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; expected a JSON file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not valid JSON ({error.msg})") from None
    except (UserError, RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a JSON {type(value).__name__}, expected an object {{...}}")
    return value


def nearest(key: str, known) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def _check_value(action: argparse.Action, value, where: str):
    """One JSON value against the flag's action: type, bounds, choices."""
    def fail(expected: str):
        raise UserError(f"{where}: got {json.dumps(value)}, expected {expected}")

    if isinstance(action, argparse.BooleanOptionalAction):
        return value if isinstance(value, bool) else fail("true or false")
    if action.nargs in ("+", "*"):
        if not isinstance(value, list):
            fail("a list")
        return [_check_item(action, item, where) for item in value]
    return _check_item(action, value, where)


def _check_item(action: argparse.Action, value, where: str):
    if isinstance(action.type, Number):
        try:
            value = action.type.check(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: {error}") from None
    elif not isinstance(value, str):
        raise UserError(f"{where}: got {json.dumps(value)}, expected text")
    if action.choices and value not in action.choices:
        raise UserError(f"{where}: got {value!r}, expected one of {', '.join(map(str, action.choices))}")
    return value


def parse_config(parser: argparse.ArgumentParser, section: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Merge default < JSON < flag. The result's `origin` says where each value that is not a default came from.

    Raises:
        UserError: an unknown key (with the nearest match), a wrong type, a value out of range, a bad flag, a UNet in
            fewer bits that is to run without autocast.
    """
    argv = sys.argv[1:] if argv is None else argv
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config")}
    flags = {option for a in parser._actions for option in a.option_strings}
    given = {token.split("=")[0] for token in argv if token.split("=")[0] in flags}
    args = parser.parse_args(argv)
    args.origin = {dest: "flag" for dest, a in actions.items() if given & set(a.option_strings)}
    if args.config:
        content = read_json(args.config)
        for name, values in content.items():
            if name in ("data", "evaluate"):
                continue  # what run_all_stages.sh gives to prepare_data.py and evaluate.py; a stage has no use for it
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
                value = _check_value(actions[key], value, where)
                if args.origin.get(key) != "flag":
                    setattr(args, key, value)
                    args.origin[key] = f"{args.config} [{name}]"
    if getattr(args, "frozen_dtype", "fp32") != "fp32" and args.precision == "fp32":
        raise UserError(f"--frozen-dtype {args.frozen_dtype} needs --precision bf16: a UNet held in fewer bits cannot compute in float32")
    return args


def common_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags that every stage has: places, data, device, validation, checkpoints and logs."""
    add = parser.add_argument
    # places
    add("--config", default="configs/tiny.json", help=f"JSON file with sections common and {stage} ('' = none)")
    add("--run", default="runs/tiny", help="run folder; this stage writes into a folder of its own name inside it")
    add("--name", default=Path(sys.argv[0]).stem.removeprefix("train_") or stage,
        help="name of this stage's folder in the run (default: the script's name without train_)")
    add("--data-root", default="data/world", help="folder with metadata.jsonl")
    add("--cache-dir", default="cache", help="folder of the feature caches, shared by stages and runs")
    add("--base-model", default="assets/tiny/base", help="Stable Diffusion model: folder or hub name")
    add("--clap-model", default="assets/tiny/clap", help="CLAP model: folder or hub name")
    add("--log-dir", default="", help="folder for TensorBoard's files ('' = inside the stage's folder)")
    # data
    add("--image-size", type=Number(int, 8, 4096, multiple_of=8), default=64, help="side of the training pictures in pixels")
    add("--windows", type=Number(int, 1, 64), default=1, help="CLAP windows taken from each clip; a step picks one")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the pictures")
    add("--max-bad-share", type=Number(float, 0, 1), default=0.01, help="share of unusable rows above which to stop")
    add("--batch-size", type=Number(int, 1), default=2, help="samples in one forward pass")
    add("--accumulation", type=Number(int, 1), default=1, help="forward passes in one optimizer step")
    add("--workers", type=Number(int, -1, 64), default=-1,
        help="loader processes (0 = load in this process; -1 = 2 with CUDA; on a CPU 1 to decode files and 0 in training, where "
        "a read is quicker than a hand-over)")
    # device and numbers
    add("--seed", type=Number(int, 0, 2 ** 31 - 1), default=0, help="seed of order, noise, timesteps, drops, LoRA")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if torch sees it")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="autocast type of the forward pass; fp32 = none")
    # memory and speed
    add("--frozen-dtype", choices=("fp32", "bf16", "nf4"), default="fp32",
        help="type the frozen UNet is held in; nf4 = its attention blocks in 4 bits, the rest in bf16")
    add("--checkpointing", choices=("none", "down", "all"), default="none",
        help="blocks of the UNet whose activations are computed again in the backward pass instead of kept")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=False, help="memory format of convolutions")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the UNet (first step: minutes)")
    # validation
    add("--validate-every", type=Number(int, 0), default=500, help="steps between validations (0 = only at both ends)")
    add("--val-draws", type=Number(int, 1, 100), default=4, help="fixed noise and timestep draws for each clip")
    add("--val-clips", type=Number(int, 0), default=0, help="validation clips used (0 = all)")
    add("--val-batch-size", type=Number(int, 1), default=32,
        help="samples in one forward pass without gradient: validation, and at most 16 of them the encoding of features")
    # checkpoints, logs, pictures
    add("--save-every", type=Number(int, 1), default=500, help="steps between checkpoints")
    add("--keep", type=Number(int, 2, 1000), default=5, help="newest checkpoints kept, beside best")
    add("--log-every", type=Number(int, 1), default=10, help="steps between log lines")
    add("--sample-every", type=Number(int, 0), default=0, help="steps between sample pictures (0 = only at the end)")
    add("--samples", type=Number(int, 0, 64), default=8, help="validation clips in the sample pictures (0 = none)")
    add("--allow-changed", action=argparse.BooleanOptionalAction, default=False,
        help="resume although learning settings or data differ from the checkpoint's")
    add("--fresh", action=argparse.BooleanOptionalAction, default=False,
        help="begin anew; what is there is kept in a backup folder")
    add("--dry-run", action="store_true", help="print the resolved settings and end")


def settings(args: argparse.Namespace) -> dict:
    """The resolved settings as a plain dictionary, without what is not a setting. A batch is that of all processes."""
    found = {key: value for key, value in sorted(vars(args).items()) if key not in ("origin", "dry_run", "config")}
    return found | {"batch_size": args.batch_size * int(os.environ.get("WORLD_SIZE", 1))}


def describe(args: argparse.Namespace) -> str:
    """The resolved settings, one a line, with where each that is not a default came from."""
    return "\n".join(f"  {key:<24} {value!s:<40} {args.origin.get(key, '')}".rstrip()
                     for key, value in settings(args).items())


def write_atomic(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, fsync, rename, fsync the folder.

    Raises:
        RunFailed: no space is left, or the file cannot be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunFailed(f"no space left in {path.parent}, {len(content) / 1e6:.1f} MB needed for {path.name}; free "
                            "some and run the same command again") from None
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):  # the disk may be the trouble: what is raised above says it
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def stop_signals() -> list[int]:
    """The signals that end a program in good order; a hang-up only if nohup has not asked to ignore it."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


_asked: list[tuple[int, float]] = []  # the signals that came, and when


def _raise_stopped(signum: int, frame) -> None:
    """Raise Stopped, and look again until it has arrived: Python swallows what is raised inside a callback, as of a fork."""
    if signum != signal.SIGALRM:
        _asked.append((signum, time.monotonic()))
    in_flight = sys.exc_info()[1]
    while in_flight is not None and not isinstance(in_flight, Stopped):
        in_flight = in_flight.__context__
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    if in_flight is None:
        raise Stopped(_asked[0][0])
    if _asked[-1][1] - _asked[0][1] > 1:  # a second one ends at once; a Ctrl-C can come twice, from the terminal and from a parent script
        os._exit(128 + _asked[-1][0])


@contextmanager
def stops_held():
    """A signal that comes meanwhile counts when this ends: for what a library must not be interrupted in, such as forks."""
    came: list[int] = []
    old = {signum: signal.signal(signum, lambda signum, frame: came.append(signum)) for signum in stop_signals()}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
    if came:
        os.kill(os.getpid(), came[0])


class _Output:
    """stdout or stderr. When nobody reads it any more (Ctrl-C took `| tee log` along, the terminal is closed) a stage is to save all the same:
    from then on it goes nowhere, and SIGPIPE, to which a stage listens, asks it to stop.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._or_nowhere(self.stream.write, text)

    def flush(self) -> None:
        self._or_nowhere(self.stream.flush)

    def _or_nowhere(self, call, *args):
        try:
            return call(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) or not callable(signal.getsignal(signal.SIGPIPE)):
                raise
            self.to_nowhere()
            os.kill(os.getpid(), signal.SIGPIPE)
            return 0

    def to_nowhere(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)


def run_main(main) -> None:
    """Call main() and turn its end into an exit code; the last line on stderr is the one sentence of the error."""
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    for signum in [*stop_signals(), signal.SIGALRM]:
        signal.signal(signum, _raise_stopped)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one speaks; all may complain
        sys.stdout = _Output(open(os.devnull, "w"))
    try:
        code, message = main() or 0, ""
    except Stopped as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        code, message = 128 + error.signum, str(error)
    except (UserError, RunFailed) as error:
        code, message = EXIT_USER if isinstance(error, UserError) else EXIT_FAILED, f"error: {error}"
    except OSError as error:
        code = EXIT_FAILED
        if error.errno in (errno.EPIPE, errno.EIO):  # as of `| head`
            code, message = 128 + signal.SIGPIPE, ""
        elif error.errno in DISK_FULL:
            message = f"error: no space left for {error.filename or 'the logs'}; free some and run again"
        elif error.errno and error.filename:
            message = f"error: {error.filename}: {error.strerror}; make it a file or folder that can be used, and run the same command again"
        elif type(error) is OSError and not error.errno:  # what transformers and diffusers raise of a model's folder
            message = f"error: {str(error).strip().splitlines()[0]}"
        else:
            raise
    except RuntimeError as error:  # torch raises these two from anywhere; their names need no import of torch
        if type(error).__name__ == "OutOfMemoryError":
            message = ("error: the GPU is out of memory; checkpoints are intact; lower --batch-size; a stage can raise --accumulation by the same "
                       "factor, lower --val-batch-size, or take --checkpointing all or --frozen-dtype nf4, with --allow-changed")
        elif type(error).__name__ in ("DistBackendError", "DistNetworkError") or "closed by peer" in str(error):
            message = "error: another process of this run has ended; its own message says why"
        elif "DataLoader worker (pid" in str(error):
            message = ("error: a data loading process was killed; it ran out of memory or of shared memory: use "
                       "Docker's --shm-size=8g or --workers 0")
        else:
            raise
        code = EXIT_FAILED
    finally:  # also of an error that nobody foresaw
        if "multiprocessing" in sys.modules:  # loader workers ignore SIGTERM, with which Python would end them and then wait
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    for stream, text in ((sys.stdout, ""), (sys.stderr, message and f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            stream.to_nowhere()
    sys.exit(code)


def plan(argv: list[str] | None = None) -> None:
    """Print shell assignments for run_all_stages.sh: each stage's flags, after checking all of them against all stages.

    Raises:
        UserError: a flag no stage knows, or any mistake that a stage itself would find in its settings.
    """
    import shlex

    import evaluate
    import train_stage1
    import train_stage2
    import train_stage3

    _, config, *flags = sys.argv[1:] if argv is None else argv
    groups: list[list[str]] = []  # a flag with its values
    for token in flags:
        if token.startswith("--"):
            groups.append([token])
        elif groups:
            groups[-1].append(token)
        else:
            raise UserError(f"got {token!r} after the config, expected a flag --name")
    parsers = [stage.build_parser() for stage in (train_stage1, train_stage2, train_stage3)]
    known = [{option for action in parser._actions for option in action.option_strings} for parser in parsers]
    for flag in (group[0].split("=")[0] for group in groups):
        if flag in ("--config", "--name", "--init-from", "--dry-run", "--help"):
            raise UserError(f"{flag} is for one stage alone; give it to python train_stageN.py")
        if not any(flag in options for options in known):
            raise UserError(f"no stage knows {flag}; {nearest(flag, set().union(*known))}")
    resolved = []
    for number, (parser, options) in enumerate(zip(parsers, known, strict=True), start=1):
        args = ["--config", config, *(t for group in groups if group[0].split("=")[0] in options for t in group)]
        resolved.append(parse_config(parser, f"stage{number}", args))
        print(f"STAGE{number}=({shlex.join(args)})")
    train_stage2.rank_growth(resolved[1])
    for key in ("run", "data_root", "base_model", "clap_model", "image_size"):
        if len({getattr(cfg, key) for cfg in resolved}) > 1:
            raise UserError(f"{config}: {key} differs between the stages; set it once, in the section common")
    lists = {}
    for key, script in (("data", "prepare_data.py"), ("evaluate", "evaluate.py")):
        lists[key] = read_json(config).get(key, [])
        if not isinstance(lists[key], list) or not all(isinstance(token, str) for token in lists[key]):
            raise UserError(f"{config}: {key} is {json.dumps(lists[key])}, expected a list of texts, as for {script}")
    evaluate.build_parser().parse_args(lists["evaluate"])
    own_data = resolved[0].origin.get("data_root") == "flag"
    print(f"DATA=({'' if own_data else shlex.join(lists['data'])})\nEVALUATE=({shlex.join(lists['evaluate'])})\n"
          f"RUN={shlex.quote(resolved[0].run)}\nDEVICE={resolved[0].device}")


if __name__ == "__main__":
    import config  # the module that the stages raise UserError from, not this copy of it

    config.run_main(config.plan)
