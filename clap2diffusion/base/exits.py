"""How a program ends: its own errors, exit codes and signals. No heavy import."""

import contextlib
import errno
import os
import signal
import sys
import time

from clap2diffusion.base import packages
from clap2diffusion.base.notes import print_notes_of

print_notes_of("bitsandbytes")  # here, since every script comes by before diffusers and peft import it
EXIT_FAILED, EXIT_USER = 1, 2  # 3 to 5 are stage 3's verdicts, see engine/gate_sweep.py
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
UNREAD = (errno.EPIPE, errno.EIO)  # what a write to a pipe or terminal gives when nobody reads it any more


class UserError(Exception):
    """The user's input is wrong; one sentence says what, where, got, expected, what to do. Exit code 2."""


class RunFailed(Exception):
    """The work itself failed (non-finite losses, a full disk): exit code 1. Or it is done and its verdict is
    no: `code` says which."""

    def __init__(self, message: str, code: int = EXIT_FAILED):
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """A signal ended the program in good order. Exit code 128 + signal. No `except Exception` catches it."""

    def __init__(self, signum: int, detail: str = "nothing was left half-written, the same command goes on"):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {detail}")
        self.signum = signum


def stop_signals() -> list[int]:
    """The signals that end a program in good order. SIGHUP is one of them unless nohup has it ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


_asked: list[tuple[int, float]] = []  # the signals that came, and when


def _raise_stopped(signum: int, frame) -> None:
    """Raise Stopped again and again until it arrives: Python swallows what is raised in some callbacks."""
    if signum != signal.SIGALRM:
        _asked.append((signum, time.monotonic()))
    in_flight = sys.exc_info()[1]
    while in_flight is not None and not isinstance(in_flight, Stopped):
        in_flight = in_flight.__context__
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    if in_flight is None:
        raise Stopped(_asked[0][0])
    # A second signal ends at once. One Ctrl-C may come twice, from the terminal and from a parent script.
    if _asked[-1][1] - _asked[0][1] > 1:
        os._exit(128 + _asked[-1][0])


@contextlib.contextmanager
def stops_held(*more: int, heard=lambda signum, first: None):
    """Hold signals back until this ends. For library code that must not be interrupted, such as a fork.
    Gives the list of what came. If no error ends this, the first of them is sent again at the end.
    more: signals beside those of stop_signals(). heard(signum, whether it is the first): called at each."""
    came: list[int] = []

    def hold(signum: int, frame) -> None:
        first = not came
        came.append(signum)
        heard(signum, first)  # which another signal may interrupt
    old = {s: signal.signal(s, hold) for s in [*stop_signals(), *more]}
    try:
        yield came
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
    if came:
        os.kill(os.getpid(), came[0])


def stops_awaited(speaks: bool = True):
    """As stops_held(), for a loop that looks at the list: a second SIGTERM, SIGINT or SIGHUP ends at once.
    SIGPIPE (from _Output: nobody reads the output any more) counts as a first signal.
    speaks: whether this process says that it has heard the signal; of several processes one does."""
    times: list[float] = []

    def heard(signum: int, first: bool) -> None:
        times.append(time.monotonic())
        if signum == signal.SIGPIPE:
            return
        if first and speaks:
            with contextlib.suppress(OSError):  # the terminal may be what went away
                os.write(2, f"\n{signal.Signals(signum).name}: saving after this step or validation; "
                            "a second one ends at once\n".encode())
        if times[-1] - times[0] > 1:  # one Ctrl-C may come twice
            os._exit(128 + signum)
    return stops_held(signal.SIGPIPE, heard=heard)


class _Output:
    """stdout or stderr that outlives its reader: a closed terminal, or a Ctrl-C that takes `| tee log` along,
    must not keep a stage from saving. From then on the output goes nowhere, and SIGPIPE, to which a stage
    listens, asks the stage to stop."""

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
            if error.errno not in UNREAD or not callable(signal.getsignal(signal.SIGPIPE)):
                raise
            self.to_nowhere()
            os.kill(os.getpid(), signal.SIGPIPE)
            return 0

    def to_nowhere(self) -> None:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.stream.fileno())


def _output(stream) -> _Output:
    """stdout or stderr; nowhere if it is closed. A letter that it cannot show is written as an escape."""
    stream = stream or open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(AttributeError, OSError):  # no text file, or dup2 made it a terminal
        stream.reconfigure(errors="backslashreplace")
    return _Output(stream)


def _sentence_of(error: Exception) -> str | None:
    """What the user reads of an error that is not our own; None for one that nobody foresaw."""
    kind = type(error).__name__  # torch raises its errors from anywhere; their names need no import of torch
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            return f"error: no space left for {error.filename or 'the logs'}; free some and run again"
        if error.errno and error.filename:
            return (f"error: {error.filename}: {error.strerror}; make it a file or folder that can be used, "
                    "and run the same command again")
        if type(error) is OSError and not error.errno:  # transformers and diffusers, of a model's folder
            return f"error: {str(error).strip().splitlines()[0]}"
    elif kind == "OutOfMemoryError":
        return ("error: the GPU is out of memory; checkpoints are intact; lower --batch-size; a stage can "
                "raise --accumulation by the same factor, lower --val-batch-size, or take --checkpointing "
                "all or --frozen-dtype nf4, with --allow-changed")
    elif kind in ("DistBackendError", "DistNetworkError") or "closed by peer" in str(error):
        return "error: another process of this run has ended; its own message says why"
    elif "DataLoader worker (pid" in str(error) or "shared memory" in str(error):
        return ("error: a data loading process was killed or failed; it ran out of memory or of shared "
                "memory: use Docker's --shm-size=8g or --workers 0")
    return None


def run_main(main) -> None:
    """Call main() and turn its end into an exit code. An error's one sentence is the last line on stderr."""
    sys.stdout, sys.stderr = _output(sys.stdout), _output(sys.stderr)
    for signum in [*stop_signals(), signal.SIGALRM]:
        signal.signal(signum, _raise_stopped)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one speaks; all may complain
        sys.stdout = _output(None)
    code, message = EXIT_FAILED, ""
    try:
        try:
            code = main() or 0
        except Exception:
            if _asked:  # a library made an error of its own out of the Stopped that we raised inside it
                raise Stopped(_asked[0][0]) from None
            raise
    except Stopped as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        code, message = 128 + error.signum, str(error)
    except (UserError, RunFailed) as error:
        code, message = EXIT_USER if isinstance(error, UserError) else error.code, f"error: {error}"
    except ImportError as error:
        if not packages.listed((error.name or "").split(".")[0]):
            raise
        code, message = EXIT_USER, packages.sentence(f"cannot import {error.name} ({error})")
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in UNREAD:  # as of `| head`
            code = 128 + signal.SIGPIPE
        else:
            message = _sentence_of(error)
            if message is None:
                raise
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                code = EXIT_USER
    finally:  # also of an error that nobody foresaw
        if "multiprocessing" in sys.modules:  # loader workers ignore SIGTERM: Python would wait for ever
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each killed one
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    for stream, text in ((sys.stdout, ""), (sys.stderr, message and f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            stream.to_nowhere()
    sys.exit(code)
