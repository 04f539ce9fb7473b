"""The gate sweep of stage 3: validation loss against tanh(gate), as a table and as a plot."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from clap2diffusion.base import files, processes, statistics
from clap2diffusion.base.exits import RunFailed
from common import AudioAttentionAdapter


def sweep_gate(audio_attn: AudioAttentionAdapter, measure) -> list[dict]:
    """The loss with the right sound at each tanh(gate) from 0 to 1, with its interval; the gate is put back.
    measure(): {"right": losses (n,) of the validation clips} on fixed noise, at the gate as it is."""
    kept, table = audio_attn.gate.data.clone(), []
    for strength in [i / 10 for i in range(11)] if processes.first() else []:
        audio_attn.set_strength(strength)
        mean, low, high = statistics.interval(measure()["right"])
        table.append({"tanh_gate": strength, "loss": mean, "low": low, "high": high})
    audio_attn.gate.data.copy_(kept)
    return table


def conclude(folder: Path, progress, tanh_gate: float, cfg) -> dict:
    """Write the sweeps as sweep.json and sweep.png, whatever the verdict; what result.json says of the gate.
    Raises RunFailed: the gate walked away."""
    window, (before, after) = (cfg.window_low, cfg.window_high), (progress.sweep_before, progress.sweep_after)
    if processes.first():
        files.write_json(folder / "sweep.json", {"before": before, "after": after, "tanh_gate": tanh_gate})
        files.write_atomic(folder / "sweep.png", _plot(before, after, tanh_gate, window))
    if progress.ended == "the gate walked away":
        low = tanh_gate < cfg.away_low
        reason = "the sound raises the loss" if low else "the loss asks for ever more sound"
        raise RunFailed(f"{folder}: {reason}: tanh(gate) {tanh_gate:.2f} after {progress.step} steps, the "
                        f"window is [{cfg.window_low}, {cfg.window_high}]; see sweep.png there, and train "
                        "stages 1 and 2 anew or longer")
    return {"in_window": window[0] <= tanh_gate <= window[1], "window": window, "sweep_before": before,
            "sweep_after": after}


def _plot(before: list[dict], after: list[dict], tanh_gate: float, window: tuple[float, float]) -> bytes:
    """The PNG of both sweeps: loss with 95 % interval against tanh(gate)."""
    figure = Figure(figsize=(6, 4), dpi=120)
    axes = figure.add_subplot()
    for table, label, style in ((before, "before", "o--"), (after, "after", "o-")):
        x, y = [row["tanh_gate"] for row in table], [row["loss"] for row in table]
        axes.plot(x, y, style, label=label)
        axes.fill_between(x, [row["low"] for row in table], [row["high"] for row in table], alpha=0.12)
    axes.axvspan(*window, color="gray", alpha=0.2, label="window")
    axes.axvline(tanh_gate, color="black", linewidth=1, label=f"learned: {tanh_gate:.3f}")
    axes.set(xlabel="tanh(gate)", ylabel="validation loss, right sound",
             title="How much sound lowers the loss")
    axes.legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
