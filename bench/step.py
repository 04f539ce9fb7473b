"""How much slower than the bare step (forward, backward, clip, optimizer) is each stage's own script?

    python bench/step.py                # the default model; writes bench/results/step-tiny-DEVICE.{json,md}
    python bench/step.py --sd15         # SD 1.5's architecture with random weights, 64 px

The real main() runs. After every `--block` of its steps as many bare steps follow, on the same UNet,
adapter, optimizer and batch size, with tensors that lie ready. So both see the same machine at the same time,
in turns. The ratio is that of neighbouring blocks; the first pair is a warm-up. Loader processes may fetch a
few batches ahead during bare steps.

A second table, loop-*, says where the difference goes: into the loss beside the UNet's pass (draws, dropped
conditions, noisy latents, target), between the optimizer and the next loss (batch, bar, log, learning rate),
or elsewhere. The bare step, too, zeroes gradients and takes a mean, so `the rest` may be below 0."""

import importlib
import statistics
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import bench_tools as tools
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from clap2diffusion.base.settings import Number

LOSSES = {1: "adapter_loss", 2: "adapter_loss", 3: "gate_loss"}
IN_LOSS, BETWEEN = "in the loss beside the UNet's pass", "between the steps"
PARSER = tools.bench_parser(__doc__, batch_size=16, image_size=64)
add = PARSER.add_argument
add("--stages", nargs="+", type=Number(int, 1, 3), default=[1, 2, 3], help="stages to time")
add("--pairs", type=Number(int, 5), default=40, help="pairs of blocks that count")
add("--block", type=Number(int, 1), default=5, help="steps in a block")
add("--frozen-dtype", choices=("fp32", "bf16"), default="fp32", help="as the stages' flag")
add("--precision", choices=("bf16", "fp32"), default="fp32", help="as the stages' flag")
add("--workers", type=Number(int, -1, 64), default=-1, help="as the stages' flag")
add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as the stages' flag")


class Enough(Exception):
    """All is measured: the stage need not be finished."""


class Times:
    """Watches a stage through its loss and its optimizer, and runs bare steps between blocks of its steps."""

    def __init__(self, args, loss):
        self.args, self.loss = args, loss
        self.steps, self.pairs, self.bare, self.began, self.inputs = 0, [], False, None, None
        self.in_loss, self.between, self.ended = 0.0, 0.0, time.perf_counter()

    def watched_loss(self, batch, draws, model, scheduler, empty_text_embeds, cfg, device, autocast):
        """The script's own loss, timed with and without its call of the model."""
        began, passed = time.perf_counter(), 0.0

        def timed_model(*inputs):
            nonlocal passed
            start = time.perf_counter()
            pred = model(*inputs)
            passed += time.perf_counter() - start
            if self.inputs is None:
                self.model, self.autocast = model, autocast
                self.inputs = [x.detach().clone() for x in inputs]
                self.target = torch.randn_like(pred.detach().float())
            return pred

        loss = self.loss(batch, draws, timed_model, scheduler, empty_text_embeds, cfg, device, autocast)
        self.in_loss += time.perf_counter() - began - passed
        self.between += began - self.ended
        return loss

    def bare_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            pred = self.model(*self.inputs)
        loss = torch.nn.functional.mse_loss(pred.float(), self.target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()

    def after_step(self, optimizer, *_) -> None:
        """What torch calls after each step of an optimizer, those of the bare steps included."""
        if self.bare:
            return
        self.steps += 1
        if self.steps % self.args.block == 0:
            self.optimizer = optimizer
            self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.bare = True
            self.end_block(self.args.block)
            self.bare = False
        self.ended = time.perf_counter()

    def end_block(self, size: int) -> None:
        """Note what the script's block took and let the bare one follow, until there are enough pairs."""
        began = tools.clock()
        for _ in range(size):
            self.bare_step()
        now = tools.clock()
        if self.began is not None:  # the first block began with loading
            seconds = (began - self.began, now - began, self.in_loss, self.between)
            self.pairs.append([value / size for value in seconds])
        if len(self.pairs) > self.args.pairs:  # the first one is a warm-up
            raise Enough
        self.in_loss, self.between, self.began = 0.0, 0.0, tools.clock()


def time_stage(stage: int, flags: list[str], args) -> tuple[dict, dict, Times]:
    """A row of each table: seconds a step of a stage's script and of the bare one; where the difference goes.
    The stage is not finished; Times can take more bare steps."""
    script, steps = importlib.import_module(f"train_stage{stage}"), str(args.block * (args.pairs + 2))
    times = Times(args, getattr(script, LOSSES[stage]))
    more = ["--min-steps", steps, "--away-steps", steps] if stage == 3 else []
    with (register_optimizer_step_post_hook(times.after_step), suppress(Enough),
          patch.object(script, LOSSES[stage], times.watched_loss)):
        script.main([*flags, "--name", f"timed{stage}", "--steps", steps, *more])
    script_s, bare_s, in_loss, between = zip(*times.pairs[1:], strict=True)
    ms = [1000 * statistics.median(values) for values in (
        [a - b for a, b in zip(script_s, bare_s, strict=True)], in_loss, between)]
    return ({"stage": stage, "pairs": len(script_s), "script, s a step": tools.spread(script_s),
             "bare step, s": tools.spread(bare_s), "ratio": tools.ratios(script_s, bare_s)},
            {"stage": stage, "the loop adds, ms": ms[0], IN_LOSS: ms[1], BETWEEN: ms[2],
             "the rest": ms[0] - ms[1] - ms[2]}, times)


def make_stages(last: int, flags: list[str]) -> None:
    """One step of each stage before `last`: what the timed ones begin with."""
    for stage in range(1, last):
        script = importlib.import_module(f"train_stage{stage}")
        script.main([*flags, "--name", f"stage{stage}", "--steps", "1"])


@tools.automain(PARSER)
def main(args, place: Path) -> None:
    world = tools.make_world(place / "world", max(200, args.batch_size), val=4)
    flags = tools.stage_flags(world, tools.models(args, place), args.image_size)
    flags += ["--run", str(place / "run"), "--precision", args.precision, "--frozen-dtype", args.frozen_dtype,
              "--device", args.device, "--batch-size", str(args.batch_size), "--workers", str(args.workers)]
    make_stages(max(args.stages), flags)
    rows, parts, _ = zip(*(time_stage(stage, flags, args) for stage in sorted(set(args.stages))), strict=True)
    about = (f"batch {args.batch_size}, {args.image_size} px, {args.precision}, blocks of {args.block} steps "
             "in turns; median [lowest, highest] of the pairs")
    tools.write_results(f"step-{args.size}", about, rows, args.device)
    if args.device == "cpu" or not torch.cuda.is_available():  # a GPU computes while the loop goes on
        about = "the same run; milliseconds a step, medians of the blocks"
        tools.write_results(f"loop-{args.size}", about, parts, args.device)
