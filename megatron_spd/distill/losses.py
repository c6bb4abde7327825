"""Losses on block outputs. Both take the student's and the teacher's output, [s, b, h], and give a scalar in
float32."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: Positions at the start of a sequence that are left out: their activations are hundreds of times larger than
#: all others
#: (method section 7) and would be all that the loss sees.
FIRST_POSITIONS = 1


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error (SPD paper, section 4.2) over all positions but the first."""
    difference = student[FIRST_POSITIONS:].float() - teacher[FIRST_POSITIONS:].float()
    return difference.square().mean()


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each token relative to the squared size of the teacher's output there: every token
    counts alike, however large its activations."""
    target = teacher[FIRST_POSITIONS:].float()
    difference = student[FIRST_POSITIONS:].float() - target
    return (difference.square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "nmse": normalised_mse}
