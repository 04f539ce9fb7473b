"""Work for several processes that make or check data. No torch."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from tqdm import tqdm

from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.progress import bar_options


def start_worker(parent: int, number: int = 0) -> None:
    """Begin a worker; torch numbers them. It leaves when its parent is gone: after kill -9 no job would come.
    Signals are left to the parent, since Ctrl-C and a closed terminal reach the whole process group."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@functools.cache  # it is said once
def _why_alone() -> str:
    """Why this machine lets no processes work together, or ''. Semaphores lie in /dev/shm."""
    try:
        multiprocessing.Lock()
        return ""
    except (OSError, ImportError) as error:
        reason = f"semaphores cannot be made ({getattr(error, 'strerror', None) or error})"
        print(f"{reason}, perhaps for want of a /dev/shm that can be written: all runs in one process, "
              "as with --workers 0", file=sys.stderr, flush=True)
        return reason


def usable_workers(workers: int) -> int:
    """`workers`, or 0, said once on stderr, where processes cannot work together."""
    return 0 if workers and _why_alone() else workers


def in_processes(function, jobs: list, workers: int, what: str, unit: str) -> list:
    """[function(job) for job in jobs] by several processes, with a bar; by this one where they cannot work
    together. A signal drops jobs not yet begun. Raises RunFailed: one of the processes was killed."""
    options = bar_options(total=len(jobs), desc=what, unit=unit)
    if not usable_workers(workers):
        return list(tqdm(map(function, jobs), **options))
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))
    try:
        return list(tqdm(pool.map(function, jobs, chunksize=8), **options))
    except BrokenProcessPool:
        raise RunFailed(f"{what}: a process of it was killed, perhaps for want of memory; run the same "
                        "command again, with fewer --workers") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + 5  # for the jobs that have begun
        # If a killed worker held the queue's lock, another one waits for it for ever, and ignores SIGTERM.
        for worker in multiprocessing.active_children():
            worker.join(max(0, deadline - time.monotonic()))
            worker.kill()


MOST_JOBS = 1000  # of a process in each_in_processes(): what libraries leak ends with it


class Lost:
    """What each_in_processes() gives for a job that ended its process or did not end: `reason` says which."""

    def __init__(self, reason: str):
        self.reason = reason


class _Worker:
    """A process that does one job at a time. It shares nothing with the others, so that each may crash."""

    def __init__(self, function):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=self._serve, args=(function, theirs, os.getpid()),
                                               daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here
        self.job, self.again, self.began, self.jobs = None, False, 0.0, 0

    @staticmethod
    def _serve(function, connection, parent: int) -> None:
        start_worker(parent)
        while True:
            job = connection.recv()
            try:
                answer = True, function(job)
            except Exception as error:
                answer = False, error
            connection.send(answer)

    def begin(self, job, again: bool) -> None:
        self.job, self.again, self.began, self.jobs = job, again, time.monotonic(), self.jobs + 1
        with contextlib.suppress(OSError):  # it has ended meanwhile, which answer() finds
            self.connection.send(job)

    def answer(self, limit_s: float):
        """(True, result), (False, exception), a Lost, or None while it works."""
        with contextlib.suppress(EOFError, OSError):  # it has ended
            if self.connection.poll():
                return self.connection.recv()
            if time.monotonic() - self.began < limit_s:
                return None
            self.end()
            return Lost(f"not done after {limit_s:.0f} s")
        self.end()
        code = self.process.exitcode
        return Lost("its process ended with " + (signal.Signals(-code).name if code < 0 else f"code {code}"))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def each_in_processes(function, jobs: Iterable, workers: int, limit_s: float) -> Iterator[tuple]:
    """(job, function(job)) as they end, by several processes. A job that ends its process (a crash inside a
    library, too little memory) or takes longer than limit_s seconds is tried once more; then (job, Lost)
    comes, and the others go on. What function raises is raised here. Memory does not grow with the jobs."""
    todo, again, idle, busy = iter(jobs), [], [], []
    try:
        while True:
            ended = []
            for worker in [*busy]:
                if (answer := worker.answer(limit_s)) is None:
                    continue
                busy.remove(worker)
                if not isinstance(answer, Lost):
                    if worker.jobs < MOST_JOBS:
                        idle.append(worker)
                    else:
                        worker.end()
                    good, value = answer
                    if not good:
                        raise value
                    ended.append((worker.job, value))
                elif worker.again:
                    ended.append((worker.job, answer))
                else:
                    again.append(worker.job)
            while len(busy) < workers:
                second = bool(again)
                job = again.pop() if again else next(todo, None)
                if job is None:
                    break
                busy.append(idle.pop() if idle else _Worker(function))
                busy[-1].begin(job, second)
            yield from ended  # after the others have got their next jobs
            if not busy:
                return
            wait([worker.connection for worker in busy], timeout=min(1, limit_s))
    finally:
        for worker in [*idle, *busy]:
            worker.end()
