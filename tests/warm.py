"""Start the project's scripts by a fork of a process that has loaded the libraries, which takes five seconds.

The script runs as `python SCRIPT ...` runs it: it is read from its file as __main__, in a process and session
of its own, and imports the project's modules anew. Jobs come as JSON lines, answers are process numbers. The
first answer says that everything is loaded.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import sys


def load() -> None:
    import bitsandbytes  # noqa: F401
    import diffusers
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import soundfile  # noqa: F401
    import soxr  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers
    _ = (diffusers.StableDiffusionPipeline, diffusers.AutoencoderKL, transformers.CLIPTextModel,
         transformers.CLIPTokenizer,
         transformers.ClapAudioModelWithProjection, transformers.ClapFeatureExtractor)


def next_job() -> dict | None:
    """Returns the job in a new process; in this process returns None when there are no more jobs."""
    for line in sys.stdin:
        job, (mine, theirs) = json.loads(line), os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                os.close(mine)
                os.close(theirs)
                return job
            os.write(theirs, f"{pid}\n".encode())
            os._exit(0)
        os.waitpid(between, 0)  # its end makes the script a child of the tests' process
        os.write(1, os.read(mine, 20))
        os.close(mine)
        os.close(theirs)
    return None


if __name__ == "__main__":
    load()
    gc.collect()
    gc.freeze()  # or every script would collect these objects at its end, for two seconds
    os.write(1, b"0\n")
    job = next_job()
    if job:
        os.setsid()
        os.chdir(job["cwd"])
        for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
            file = os.open(path,
                           (os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY) | os.O_NOCTTY)
            os.dup2(file, number)
            os.close(file)
        if job["file_limit"]:  # a write beyond it fails as on a full disk (Python ignores SIGXFSZ)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        sys.argv = job["argv"]
        sys.path[0] = os.path.dirname(job["argv"][0])
        runpy.run_path(job["argv"][0], run_name="__main__")
