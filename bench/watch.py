"""Run a training script as it is and write down when each optimizer step ended, and the peak memory after the first one.

    python bench/watch.py OUT.json train_stage2.py --config ... # or any script whose optimizer is one of torch's

With WATCH_STEPS=N it ends after N steps, whatever the script would do then. The other benchmarks call this; it patches nothing but common.validation_losses, whose losses of each clip it keeps.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import common
    out, script, *flags = sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in flags else "cpu")
    began = float(os.environ.get("WATCH_BEGAN", time.time()))
    seen = {"steps": [], "memory_mb": [], "losses": []}

    def after_step(*_) -> None:
        seen["steps"].append(time.time() - began)
        memory = common.peak_memory_mb(device)
        seen["memory_mb"].append(memory.get("cuda_reserved", memory["rss"]))
        if len(seen["steps"]) == 1 and Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew: loading maps whole weight files beside their copies
            if device.type == "cuda":  # what was reserved for loading and validating, too
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        if len(seen["steps"]) == int(os.environ.get("WATCH_STEPS", 0)):
            Path(out).write_text(json.dumps(seen))
            os._exit(0)

    def kept(*args, **options):
        losses = measure(*args, **options)
        if not options:  # a stage's validation, with all three sounds
            seen["losses"].append(losses["right"].tolist())
        return losses

    register_optimizer_step_post_hook(after_step)
    measure, common.validation_losses = common.validation_losses, kept
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
