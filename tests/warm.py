"""Start the project's scripts from a process that has the libraries loaded already: importing them takes five seconds, a fork none.

The script runs as `python SCRIPT ...` runs it: read from its file, as __main__, in a process and session of its own, with the
project's modules imported anew. Jobs come as JSON lines, answers are process numbers; the first answer says that all is loaded.
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
    _ = (diffusers.StableDiffusionPipeline, diffusers.AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTokenizer,
         transformers.ClapAudioModelWithProjection, transformers.ClapFeatureExtractor)


def next_job() -> dict | None:
    """In a new process, the job it is to do; in this one, None when there are no more."""
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
        os.waitpid(between, 0)  # gone, so that the tests' process has inherited the script's
        os.write(1, os.read(mine, 20))
        os.close(mine)
        os.close(theirs)
    return None


if __name__ == "__main__":
    load()
    gc.collect()
    gc.freeze()  # at its end a script would collect all of these objects: two seconds
    os.write(1, b"0\n")
    job = next_job()
    if job:
        os.setsid()
        os.chdir(job["cwd"])
        for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
            file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        if job["file_limit"]:  # a write beyond it fails as on a full disk (Python ignores SIGXFSZ)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        sys.argv = job["argv"]
        sys.path[0] = os.path.dirname(job["argv"][0])
        runpy.run_path(job["argv"][0], run_name="__main__")
