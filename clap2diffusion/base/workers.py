"""Work for several processes that make or check data. No torch."""

import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children

from tqdm import tqdm

from clap2diffusion.base.exits import RunFailed


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


def in_processes(function, jobs: list, workers: int, what: str, unit: str) -> list:
    """[function(job) for job in jobs] by several processes, with a bar. A signal drops jobs not yet begun.
    Raises RunFailed: one of the processes was killed."""
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))
    try:
        return list(tqdm(pool.map(function, jobs, chunksize=8), total=len(jobs), desc=what, unit=unit))
    except BrokenProcessPool:
        raise RunFailed(f"{what}: a process of it was killed, perhaps for want of memory; run the same "
                        "command again, with fewer --workers") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + 5  # for the jobs that have begun
        # If a killed worker held the queue's lock, another one waits for it for ever, and ignores SIGTERM.
        for worker in active_children():
            worker.join(max(0, deadline - time.monotonic()))
            worker.kill()
