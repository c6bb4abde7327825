"""What later blocks are sensitive to: the Fisher information of a block's output, channel by channel.

For block ``i`` with output ``y`` the weight of channel ``c`` is the mean over tokens of ``(d NLL / d y_c)^2``,
where NLL is the plain model's negative log-likelihood of a sequence whose labels are drawn from the model itself:
the diagonal of the true Fisher information, so that ``sum_c w_c e_c^2`` is, up to a factor, what a small error
``e`` of the block costs in KL divergence of the model's answer.

Streaming: the hidden states in front of every block are kept, and the gradient walks from the last block to the
first by vector-Jacobian products. There is never more than one block in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.comm.all_reduce import all_reduce
from megatron_spd.distill.losses import FIRST_POSITIONS
from megatron_spd.errors import UserError

#: Sequences that the weights are taken from. They are ratios of channels, which a few thousand tokens settle.
FISHER_SEQUENCES = 8

#: Positions whose logits are in memory at a time.
_ROWS = 256


def output_fisher(
    streamer: BlockStreamer, tokens: Tensor, blocks: Iterable[int], seed: int
) -> dict[int, Tensor]:
    """Channel weights [h] in float32, of mean 1, for the outputs of ``blocks``; the same on every rank of a
    replica.

    ``streamer`` walks the plain model; ``tokens`` [n, s]. First positions are left out of the mean over tokens.
    Memory: the hidden states of ``tokens`` in front of every block. Raises UserError if a gradient is not finite.
    """
    wanted = set(blocks)
    if not wanted:
        return {}
    first = min(wanted)
    stream = streamer.embed(tokens)
    states = {}
    for block in range(streamer.num_layers):
        if block > first:
            states[block] = stream
        stream = streamer.advance(block, stream)
    gradients = _output_gradients(streamer, stream, tokens.shape[1], seed)
    weights = {}
    for block in range(streamer.num_layers - 1, first - 1, -1):
        if block in wanted:
            weights[block] = _second_moment(gradients, block)
        if block > first:
            gradients = _back_through(streamer, block, states.pop(block), gradients)
    return weights


def _second_moment(gradients: list[Tensor], block: int) -> Tensor:
    """Mean square by channel of ``gradients``, micro-batches [s, b, h], brought to mean 1."""
    squares = torch.stack([g[FIRST_POSITIONS:].double().square().sum((0, 1)) for g in gradients]).sum(0)
    if not bool(squares.isfinite().all()) or not float(squares.sum()) > 0:
        raise UserError(
            f"the gradient behind block {block} is not finite or zero on this text, so --loss fisher has no weights; "
            "use --loss mse, or --dtype fp32"
        )
    return (squares / squares.mean()).float()


def _back_through(
    streamer: BlockStreamer, block: int, stream: list[Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    """The gradients in front of ``block`` from those behind it, computed with all points kept."""
    unit = streamer.unit(block)
    result = []
    for x, gradient in zip(stream, gradients, strict=True):
        x = x.detach().requires_grad_()
        output, _ = unit.layer_forward(x, None)
        result.append(torch.autograd.grad(output, x, gradient)[0])
    return result


def _output_gradients(streamer: BlockStreamer, stream: list[Tensor], length: int, seed: int) -> list[Tensor]:
    """The gradient of the negative log-likelihood behind the last block, in the micro-batches of ``stream``.

    Positions are shared out over the ranks; every position draws its label by a random number of its own, so that
    neither the number of ranks nor the batches change what is drawn.
    """
    runtime, reader = streamer.runtime, streamer.reader
    norm = reader.final_norm().to(runtime.device, streamer.dtype)
    table = reader.output_table().to(runtime.device, streamer.dtype)
    generator = torch.Generator().manual_seed(seed)
    result = []
    for x in stream:
        rows = x.transpose(0, 1).reshape(-1, x.shape[-1]).detach().requires_grad_()
        draws = torch.rand(len(rows), generator=generator, dtype=torch.float64).to(runtime.device)
        mine = slice(*(len(rows) * (runtime.tp_rank + k) // runtime.tp_size for k in (0, 1)))
        normed = norm(rows)
        upstream = torch.zeros_like(normed)
        upstream[mine] = _sampled_gradient(normed[mine].detach(), draws[mine], table)
        gradient = all_reduce(torch.autograd.grad(normed, rows, upstream)[0], runtime.tp_group)
        result.append(gradient.view(x.shape[1], length, -1).transpose(0, 1).contiguous())
    return result


def _sampled_gradient(normed: Tensor, draws: Tensor, table: Tensor) -> Tensor:
    """d NLL / d ``normed`` [t, h] with labels drawn from the model by the uniform numbers ``draws`` [t]."""
    parts = []
    for rows, draw in zip(normed.split(_ROWS), draws.split(_ROWS), strict=True):
        p = (rows @ table.T).float().softmax(-1)
        sums = p.double().cumsum(-1)
        labels = torch.searchsorted(sums, (draw * sums[:, -1])[:, None]).clamp_max(len(table) - 1)
        p.scatter_add_(1, labels, p.new_full(labels.shape, -1.0))
        parts.append(p.to(table.dtype) @ table)
    return torch.cat(parts) if parts else torch.zeros_like(normed)
