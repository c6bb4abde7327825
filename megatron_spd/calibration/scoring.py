"""The output layer, as scores need it: a few positions and a slice of the vocabulary at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spd.models.norm import Norm

#: Token positions and vocabulary entries whose logits are computed at a time: large enough for the matrix multiply,
#: small enough for a core's cache (whole logits of SmolLM2 take half as long again to score).
ROWS, COLUMNS = 512, 1024


class OutputLayer:
    """Final norm and output rows [vocabulary, h] of a model. Hidden states come as rows [t, h]."""

    def __init__(self, norm: Norm, table: Tensor) -> None:
        self.norm, self.table = norm, table

    def negative_log_likelihood(self, rows: Tensor, targets: Tensor) -> Tensor:
        """-log p(targets [t]) in nats: float64 [t]."""
        parts = []
        for part, wanted in zip(self.norm(rows).split(ROWS), targets.split(ROWS), strict=True):
            logits = (part @ columns.T for columns in self.table.split(COLUMNS))
            log_sums = torch.stack([z.float().logsumexp(-1) for z in logits])
            wanted_logits = (part.float() * self.table[wanted].float()).sum(-1)
            parts.append((log_sums.logsumexp(0) - wanted_logits).double())
        return torch.cat(parts)

    def divergence(self, rows: Tensor, plain: Tensor) -> Tensor:
        """KL(p of ``plain`` [t, h] || p of ``rows`` [t, h]) in nats: float64 [t].

        With logits z of p and y of q, KL = E_p[z - y] - (log sum exp z - log sum exp y). Both terms are put together
        from slices of the vocabulary, so that no logit is kept.
        """
        pairs = zip(self.norm(rows).split(ROWS), self.norm(plain).split(ROWS), strict=True)
        return torch.cat([self._divergence(mine, theirs) for mine, theirs in pairs])

    def _divergence(self, mine: Tensor, theirs: Tensor) -> Tensor:
        sums_q, sums_p, means = [], [], []
        for columns in self.table.split(COLUMNS):
            q, p = (mine @ columns.T).float(), (theirs @ columns.T).float()
            sums_q.append(q.logsumexp(-1))
            sums_p.append(p.logsumexp(-1))
            # The slice's own mean of p - q under p; slices are weighed by their share of p below.
            means.append(torch.linalg.vecdot((p - sums_p[-1][:, None]).exp(), p - q))
        slices = torch.stack(sums_p).double()
        total_p, total_q = slices.logsumexp(0), torch.stack(sums_q).double().logsumexp(0)
        mean = torch.linalg.vecdot((slices - total_p).exp(), torch.stack(means).double(), dim=0)
        return mean - (total_p - total_q)
