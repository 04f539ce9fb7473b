"""Start the project's scripts by a fork of a process that has loaded the libraries, which takes five seconds.

The script runs as `python SCRIPT ...` runs it: it is read from its file as __main__, in a process and session
of its own, and imports the project's modules anew. Its end is Python's, but for taking the libraries apart,
which would be most of the time of a short script. Jobs come as JSON lines, answers are process numbers. The
first answer says that everything is loaded.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import sys
import tempfile
import threading
import weakref
from unittest import mock


def load() -> None:
    """Import what the scripts import of the libraries. Their finalizers are not for a script's end."""
    with mock.patch("atexit.register"):  # looks for leaks, at the end of each script
        import soxr  # noqa: F401
    import bitsandbytes  # noqa: F401
    import diffusers
    import diffusers.training_utils
    import jinja2  # noqa: F401
    import matplotlib.backends.backend_svg
    import matplotlib.pyplot  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    import PIL.ImageCms
    import PIL.ImageDraw
    import PIL.ImageFont
    import scipy.stats  # noqa: F401
    import soundfile  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    PIL.Image.init()
    get_checkpoint_conversion_mapping("clap")  # makes the table of all models, which each script would make
    _ = (diffusers.StableDiffusionPipeline, diffusers.AutoencoderKL, diffusers.UNet2DConditionModel,
         diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler,
         transformers.CLIPTextModel, transformers.CLIPTokenizer, transformers.RobertaTokenizerFast,
         transformers.ClapAudioModelWithProjection, transformers.ClapFeatureExtractor,
         transformers.SiglipModel)
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False


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


def run(path: str) -> int:
    """Run a script to its end, and all that it has registered for it. Returns its exit code."""
    try:
        runpy.run_path(path, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    load()
    # our own modules are compiled once, not at each of 1,000 starts, and nothing comes to lie beside them
    sys.dont_write_bytecode = False
    sys.pycache_prefix = f"{tempfile.gettempdir()}/clap2diffusion-tests-{os.getuid()}"
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
        code = run(job["argv"][0])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
