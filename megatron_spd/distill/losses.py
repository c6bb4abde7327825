"""Losses on block outputs. Each takes the student's and the teacher's output, [s, b, h], and gives a scalar in
float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

#: Positions at the start of a sequence that are left out: their activations are hundreds of times larger than
#: all others
#: (method section 7) and would be all that the loss sees.
FIRST_POSITIONS = 1


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error (SPD paper, section 4.2) over all positions but the first."""
    return _difference(student, teacher).square().mean()


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each token relative to the squared size of the teacher's output there: every token
    counts alike, however large its activations."""
    size = teacher[FIRST_POSITIONS:].float().square().sum(-1).clamp_min(1e-12)
    return (_difference(student, teacher).square().sum(-1) / size).mean()


def fisher(weights: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error weighed by channel, the mean over tokens of ``sum_c weights[c] error[c]^2 / h``; ``weights`` [h]
    as :func:`megatron_spd.distill.fisher.output_fisher` makes them."""
    return (_difference(student, teacher).square() * weights).mean()


def make_loss(name: str, weights: Tensor | None = None) -> Loss:
    """The loss called ``name``, one of :data:`LOSSES`; ``weights`` [h] for "fisher". Raises ValueError without them."""
    if name == "fisher":
        if weights is None:
            raise ValueError("the loss 'fisher' was made without channel weights; it needs them, [h]")
        return partial(fisher, weights.float())
    return {"mse": mse, "nmse": normalised_mse}[name]


LOSSES = ("mse", "nmse", "fisher")


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    return student[FIRST_POSITIONS:].float() - teacher[FIRST_POSITIONS:].float()
