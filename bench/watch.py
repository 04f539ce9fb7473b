"""Run a training script; write down when each optimizer step ended, its memory, and the peak after the first.

    python bench/watch.py OUT.json SCRIPT.py FLAGS      # any script whose optimizer is one of torch's

With WATCH_STEPS=N it ends after N steps, whatever the script would do then. The other benchmarks call this.
It patches nothing but common.validation_losses, whose losses of each clip it keeps.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from clap2diffusion.base.device import peak_memory_mb  # noqa: E402

RESIDENT = Path("/proc/self/clear_refs")

def main() -> None:
    out, *sys.argv = sys.argv[1:]  # the script sees its own flags
    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in sys.argv else "cpu")
    began, steps = (float(os.environ.get(name, other)) for name, other in (
        ("WATCH_BEGAN", time.time()), ("WATCH_STEPS", 0)))
    seen, measure = {"steps": [], "memory_mb": [], "rss_mb": [], "losses": []}, common.validation_losses

    def after_step(*_) -> None:
        seen["steps"].append(time.time() - began)
        memory, status = peak_memory_mb(device), Path("/proc/self/status").read_text()
        seen["rss_mb"].append(int(status.split("VmRSS:")[1].split()[0]) / 1e3)
        seen["memory_mb"].append(memory.get("cuda_reserved", memory["rss"]))
        if len(seen["steps"]) == 1 and RESIDENT.exists():
            RESIDENT.write_text("5")  # begin the peak anew: loading maps whole files beside their copies
            if device.type == "cuda":  # what loading and validating reserved, too
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        if len(seen["steps"]) == steps:
            Path(out).write_text(json.dumps(seen))
            os._exit(0)

    def kept(*args, **options):
        losses = measure(*args, **options)
        if not options:  # a stage's validation, with all three sounds
            seen["losses"].append(losses["right"].tolist())
        return losses

    register_optimizer_step_post_hook(after_step)
    common.validation_losses = kept
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
