"""The finishing pass on logits: its curve and its verdict. The record is that of ``distill/finish.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_spd.files import write_atomic
from megatron_spd.report.document import Section, pictures_of
from megatron_spd.report.style import GREY, plain_log_ticks, smooth
from megatron_spd.report.tables import change, number, ranges

_WHAT = {"blocks": "all parameters", "vectors": "norms and shifts"}


def finishing_section(record: Mapping[str, Any], pictures: Mapping[str, Path]) -> Section:
    """What trained, for how long, and whether it was kept."""
    if not record["blocks"]:
        return Section("Finishing pass", ["Nothing is dropped; there was nothing to train."])
    before, after = record["kl_before"], record["kl_after"]
    verdict = f"the state after step {record['best_step']} was kept" if record["kept"] else "nothing was kept"
    words = (
        f"{_WHAT.get(record['which'], record['which'])} of blocks {ranges(record['blocks'])}, "
        f"{len(record['losses'])} steps. Held-out KL divergence from the plain model: {number(before)} before, "
        f"{number(after)} nats per token after ({change(before, after)}); {verdict}."
    )
    return Section(
        "Finishing pass",
        [words[0].upper() + words[1:]],
        pictures=pictures_of(pictures, finish="KL divergence from the plain model over the steps"),
    )


def plot_finish(record: Mapping[str, Any], path: Path) -> Path:
    """The training loss (running mean) and the held-out loss over the steps.

    Raises:
        ValueError: no step was made.
    """
    losses = smooth([float(v) for v in record["losses"]])
    if not losses:
        raise ValueError("a finishing pass without steps; there is nothing to draw")
    figure = Figure(figsize=(7.5, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.plot(
        range(1, len(losses) + 1), losses, color="#66CCEE", linewidth=1.2, label="training, running mean"
    )
    if held_out := record["held_out"]:
        steps, values = zip(*held_out, strict=True)
        axes.plot(steps, values, "o-", color="#4477AA", markersize=5, label="held out")
    if record["kept"]:
        axes.plot(
            [record["best_step"]],
            [record["kl_after"]],
            "*",
            color="#EE6677",
            markersize=14,
            label="kept",
            zorder=3,
        )
    axes.axhline(record["kl_before"], color=GREY, linewidth=0.8, linestyle=":", label="before")
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="optimizer step",
        ylabel="KL(plain || SPD) in nats per token",
        title="Finishing pass on the plain model's logits",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return write_atomic(path, figure.savefig)
