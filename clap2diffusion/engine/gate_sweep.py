"""The gate sweep of stage 3 and its verdict: validation loss against tanh(gate), as a table and as a plot."""

import argparse
import io
from pathlib import Path

from clap2diffusion.base import files, processes
from clap2diffusion.base.exits import RunFailed
from clap2diffusion.base.statistics import interval, show_interval
from common import AudioAttentionAdapter

NAMES = {"right": "right sound", "silence": "silence", "other": "another's sound"}
FEWEST = 10  # validation clips; intervals of fewer are too narrow
COLOURS = {"right": "tab:blue", "silence": "tab:gray", "other": "tab:red", "learned": "black"}


def sweep_gate(audio_attn: AudioAttentionAdapter, measure, sounds: tuple[str, ...] = tuple(NAMES)
               ) -> list[dict]:
    """The loss with each of the sounds at each tanh(gate) from 0 to 1; the gate is put back. A row for each:
    {"tanh_gate": 0.1, "right": [mean, low, high], "silence": [...], "other": [...]}, 95 % intervals.
    measure(sounds=...): common.validation_losses() at the gate as it is."""
    kept, table = audio_attn.gate.data.clone(), []
    for strength in [i / 10 for i in range(11)] if processes.first() else []:
        audio_attn.set_strength(strength)
        losses = {name: interval(values.mean(1)) for name, values in measure(sounds=sounds)[0].items()}
        table.append({"tanh_gate": strength, **losses})
    audio_attn.gate.data.copy_(kept)
    return table


def read_sweep(rows: list[dict]) -> list[dict]:
    """A sweep as it is written now. The first ones had the right sound alone, as loss, low and high."""
    return [{"tanh_gate": row["tanh_gate"], "right": [row["loss"], row["low"], row["high"]]}
            if "loss" in row else row for row in rows]


def judge_gate(ended: str, tanh_gate: float, validation: dict[str, list[float]], n: int, cfg) -> str:
    """Why stage 3 does not show that the sound helps; '' if it does. n: the validation clips.

    A gate in the window shows that the audio branch lowers the loss. A branch that has only learned the look
    of the pictures does that too, whatever the sound. So the right sound must also be better than silence and
    better than another's, at the learned gate: both lower bounds of the paired differences are above 0."""
    if ended == "the gate walked away":
        low = tanh_gate < cfg.away_low
        return "the sound raises the loss" if low else "the loss asks for ever more sound"
    if not cfg.window_low <= tanh_gate <= cfg.window_high:
        return "the gate has not come into the window"
    if n < FEWEST:
        return f"{n} validation clips are too few to tell whether the sound helps, expected at least {FEWEST}"
    found = {name: validation[f"{name}_minus_right"] for name in ("silence", "other")}
    if min(low for _, low, _ in found.values()) > 0:
        return ""
    said = ", ".join(f"{name} - right {show_interval(values, 5)}" for name, values in found.items())
    return f"the gate learned the pictures' look, not the sound ({said}; both must be above 0)"


def find_warning(folder: Path) -> str:
    """What judge_gate() says of a finished stage 3, from its result.json; '' for a folder without one.
    Results from before there was a verdict are judged now."""
    if not (folder / "result.json").exists():
        return ""
    result, cfg = files.read_json(folder / "result.json"), files.read_json(folder / "config.json")
    if "warning" in result or "window" not in result:  # only stage 3 has a window
        return result.get("warning", "")
    return judge_gate(result["ended"], result["tanh_gate"], result["validation"],
                      cfg["val_clips"] or FEWEST, argparse.Namespace(**cfg))


def require_proof(folder: Path, warning: str, cfg) -> None:
    """Raises RunFailed: there is a warning, and --require-proof is on."""
    if warning and cfg.require_proof:
        raise RunFailed(f"{folder}: {warning}; see sweep.png there, and train stages 1 and 2 anew or longer; "
                        "--no-require-proof keeps the adapter, with this as a warning in it")


def conclude(folder: Path, progress, tanh_gate: float, validation: dict, n_val: int, cfg) -> dict:
    """Write the sweeps as sweep.json and sweep.png, whatever the verdict; what result.json says of the gate:
    in_window, window, both sweeps, and `warning`, '' if the sound was shown to help. n_val: clips of the
    validation split. Raises RunFailed: it was not shown, and --require-proof is on."""
    window = (cfg.window_low, cfg.window_high)
    before, after = read_sweep(progress.sweep_before), read_sweep(progress.sweep_after)
    n = min(n_val, cfg.val_clips or n_val)
    warning = judge_gate(progress.ended, tanh_gate, validation, n, cfg)
    if warning:
        warning += (f": tanh(gate) {tanh_gate:.2f} after {progress.step} steps, the window is "
                    f"[{cfg.window_low}, {cfg.window_high}]")
    found = {"in_window": window[0] <= tanh_gate <= window[1], "window": window, "warning": warning,
             "sweep_before": before, "sweep_after": after}
    if processes.first():
        files.write_json(folder / "sweep.json", {"before": before, "after": after, "tanh_gate": tanh_gate,
                                                 "warning": warning})
        files.write_atomic(folder / "sweep.png", _plot({**found, "tanh_gate": tanh_gate}))
    require_proof(folder, warning, cfg)
    return found


def draw_sweep(axes, stage: dict, colours: dict[str, str]) -> None:
    """Draw what is known of a stage 3 into matplotlib's `axes`, by the keys of its result.json: loss with
    each sound before and after, with 95 % interval, the window and the learned gate. colours: of the sounds
    and of the "learned" line."""
    if "window" in stage:
        axes.axvspan(*stage["window"], color=colours["silence"], alpha=0.2, linewidth=0, label="window")
    for name, title in NAMES.items():
        for when, style in (("before", "--"), ("after", "-")):
            rows = [(row["tanh_gate"], *row[name]) for row in read_sweep(stage.get(f"sweep_{when}") or [])
                    if name in row]
            if rows:
                x, loss, low, high = zip(*rows)
                label = title if when == "after" else f"{title}, before"
                axes.plot(x, loss, style, color=colours[name], marker="o", markersize=3, label=label)
                axes.fill_between(x, low, high, color=colours[name], alpha=0.1, linewidth=0)
    if (gate := stage.get("tanh_gate")) is not None:
        axes.axvline(gate, color=colours["learned"], linewidth=1.2, label=f"learned: {gate:.3f}")
    axes.set(xlabel="tanh(gate)", ylabel="validation loss")


def _plot(stage: dict) -> bytes:
    """The PNG of both sweeps."""
    from matplotlib.figure import Figure  # here: the other stages do without matplotlib
    figure, content = Figure(figsize=(6, 4.5), dpi=120, layout="constrained"), io.BytesIO()
    axes = figure.add_subplot(title="Which sound lowers the loss, at what gate")
    draw_sweep(axes, stage, COLOURS)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(content, format="png")
    return content.getvalue()
