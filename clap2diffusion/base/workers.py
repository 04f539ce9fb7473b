"""Work for several processes that make or check data. No torch."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

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
