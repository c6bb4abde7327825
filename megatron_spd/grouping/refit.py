"""Re-fitting what reads a branch's input: the dense input predicted from it, the prediction folded into the weights.

A sublayer's first projections W read z = norm(X + P) in the dense block and z_g = norm(X + P_g + c_g) in branch g.
Their rows belong to one branch each, so that branch may read through any affine map for nothing:

    z  ~  T_g (z_g + b_g)          W_g <- W_g T_g,   b_g: the branch norm's bias (method section 7, "per-branch norms")

*Norm*: T_g diagonal; kept as the branch norm's weight w_g instead of being folded (z ~ w_g * z_g + b'_g, channel by
channel). *Re-fit*: T_g full, by ridge regression towards the identity,

    T_g = I + C(z - z_g, z_g) [C(z_g, z_g) + lambda I]^-1,    lambda = RIDGE * mean of the diagonal of C(z_g, z_g)

with C the covariances over calibration tokens. Closed-form: nothing is trained. The norm bounds z, so that no single
token decides the fit; a fit of output projections, whose inputs have outliers, does not survive (see the README).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.runtime.distributed import Runtime

#: Ridge of the re-fit, relative to the mean variance of a channel. Measured on SmolLM2-135M with 4000 tokens: 1 and 0.1
#: are equally good on held-out text, 0.01 over-fits.
RIDGE = 0.3


@dataclass(frozen=True)
class InputFit:
    """How each branch reads a sublayer's input; None: as the dense block does.

    ``shift`` c_g, ``norm_weight`` w_g, ``norm_bias`` b_g: [G, h]; ``transform`` T_g: [G, h, h], to be folded.
    """

    name: str = "none"
    shift: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    transform: Tensor | None = None

    def folded(self, weights: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
        """``weights`` with T_g multiplied into the projections ``names`` ([out, h], rows split over branches)."""
        folded = dict(weights)
        if self.transform is not None:
            for name in names:
                parts = weights[name].chunk(len(self.transform))
                maps = self.transform.to(weights[name].dtype)
                folded[name] = torch.cat([w @ t for w, t in zip(parts, maps, strict=True)])
        return folded


class InputMoments:
    """Streamed first and second moments of a branch's normed input and of the dense one, for all branches."""

    def __init__(self, branches: int, hidden: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._count = zeros(1)
        self._dense, self._branch = zeros(hidden), zeros(branches, hidden)
        self._square, self._cross = zeros(branches, hidden, hidden), zeros(branches, hidden, hidden)

    def add(self, dense: Tensor, branch: Tensor) -> None:
        """Rows of tokens: z ``dense`` [n, h], z_g ``branch`` [G, n, h]."""
        self._count += dense.shape[0]
        self._dense += dense.sum(0, dtype=torch.float64)
        self._branch += branch.sum(1, dtype=torch.float64)
        for g, z in enumerate(branch):
            self._square[g] += z.T @ z
            self._cross[g] += (dense - z).T @ z

    def reduce(self, runtime: Runtime) -> None:
        """Sum over all ranks' tokens. A collective; call it once, after the last :meth:`add`."""
        for name in ("_count", "_dense", "_branch", "_square", "_cross"):
            setattr(self, name, all_reduce(getattr(self, name), runtime.world_group))

    def norm_fit(self, shift: Tensor | None) -> InputFit:
        """The channel-by-channel fit: branch norms."""
        dense, branch, variance, covariance = self._centred()
        diagonal = variance.diagonal(dim1=1, dim2=2)
        ridge = 1e-6 * diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
        weight = 1.0 + covariance.diagonal(dim1=1, dim2=2) / (diagonal + ridge)
        bias = dense - weight * branch
        return InputFit("norm", shift, weight.float(), bias.float())

    def full_fit(self, shift: Tensor | None, ridge: float = RIDGE) -> InputFit:
        """The full ridge fit. b_g makes the means agree: T_g (mean z_g + b_g) = mean z."""
        dense, branch, variance, covariance = self._centred()
        eye = torch.eye(len(dense), dtype=torch.float64, device=dense.device)
        damping = ridge * variance.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
        # [C + lambda I] is symmetric: solving for the transpose gives covariance @ inverse.
        gain = torch.linalg.solve(variance + damping[:, None, None] * eye, covariance.transpose(1, 2))
        transform = eye + gain.transpose(1, 2)
        bias = torch.linalg.solve(transform, dense.expand_as(branch)) - branch
        return InputFit("refit", shift, torch.ones_like(bias).float(), bias.float(), transform.float())

    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of z [h] and z_g [G, h]; covariances of z_g with itself and of z - z_g with z_g [G, h, h]."""
        n = self._count.clamp_min(1.0)
        dense, branch = self._dense / n, self._branch / n
        missing = dense - branch
        variance = self._square / n - branch[:, :, None] * branch[:, None, :]
        covariance = self._cross / n - missing[:, :, None] * branch[:, None, :]
        return dense, branch, variance, covariance
