"""All that the command ``evaluate`` measures of a folder, alone or against another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spd.calibration.stream import BlockStreamer
from megatron_spd.checkpoint.hf import CheckpointReader
from megatron_spd.config import EvaluateOptions
from megatron_spd.errors import UserError
from megatron_spd.evaluate.agreement import greedy_continuations, measure_agreement, prompts_from
from megatron_spd.evaluate.generate import load_for_generation
from megatron_spd.evaluate.perplexity import plan_nll
from megatron_spd.evaluate.statistics import paired_difference, perplexity_interval
from megatron_spd.evaluate.tasks import run_tasks
from megatron_spd.models.build import DTYPES
from megatron_spd.plan import SPDPlan
from megatron_spd.runtime.distributed import Runtime

CONFIDENCE = 0.95


def check_same_vocabulary(model: CheckpointReader, other: CheckpointReader) -> None:
    """Raise UserError unless both folders' tokenizers know the same tokens: nothing could be compared otherwise."""
    if model.tokenizer().get_vocab() != other.tokenizer().get_vocab():
        raise UserError(
            f"{model.folder} and {other.folder} have different vocabularies; compare models of one tokenizer"
        )


def measure_folders(
    model: CheckpointReader,
    against: CheckpointReader | None,
    tokens: Tensor,
    runtime: Runtime,
    tasks: Mapping[str, Any] | None,
    options: EvaluateOptions,
) -> dict[str, Any]:
    """Every figure of ``model``, and under ``against`` those of the other folder and the differences.

    ``tokens`` [n, s]: the pieces scored. ``tasks``: from :func:`megatron_spd.evaluate.tasks.load_tasks`, or None.

    Of each folder: ``model``, ``kind`` ("plain" or "spd"), ``dropped``, ``low_bit`` (format by point), ``sync_points``
    (their number), ``perplexity``, ``interval`` (at 95 %), and ``tasks`` where asked for. Of both: ``against.increase``
    (percent) with ``against.increase_interval``, paired by sequence, and ``generation``.
    """
    scored = tokens.shape[1] - 1
    nll = _nll(model, runtime, tokens, options, "perplexity")
    result = _figures(model, nll, scored) | {"tokens": tokens.shape[0] * scored, "confidence": CONFIDENCE}
    if against is not None:
        plain = _nll(against, runtime, tokens, options, "perplexity of the other")
        difference = paired_difference(plain, nll, scored, CONFIDENCE)
        result["against"] = _figures(against, plain, scored) | {
            "increase": difference.increase,
            "increase_interval": [difference.low, difference.high],
        }
    if tasks is not None or options.generation:
        _add_whole_model_figures(result, model, against, prompts_from(tokens), runtime.device, tasks, options)
    return result


def _nll(
    reader: CheckpointReader, runtime: Runtime, tokens: Tensor, options: EvaluateOptions, what: str
) -> Tensor:
    streamer = BlockStreamer(reader, runtime, DTYPES[options.dtype], reader.block, options.batch_size)
    return plan_nll(streamer, reader.plan or SPDPlan.dense(reader.base_model(), 1), tokens, what)


def _figures(reader: CheckpointReader, nll: Tensor, scored: int) -> dict[str, Any]:
    found = perplexity_interval(nll, scored, CONFIDENCE)
    return {
        "model": str(reader.folder),
        "kind": "plain" if reader.plan is None else "spd",
        "dropped": [] if reader.plan is None else reader.plan.dropped,
        "low_bit": {} if reader.plan is None else reader.plan.low_bit,
        "sync_points": 2 * reader.num_layers,
        "perplexity": found.perplexity,
        "interval": [found.low, found.high],
    }


def _add_whole_model_figures(
    result: dict[str, Any],
    model: CheckpointReader,
    against: CheckpointReader | None,
    prompts: Tensor,
    device: torch.device,
    tasks: Mapping[str, Any] | None,
    options: EvaluateOptions,
) -> None:
    """Tasks and generation into ``result``: with transformers on one device, one model in memory at a time."""
    plain: Tensor | None = None
    folders: Sequence[tuple[CheckpointReader, dict[str, Any]]] = [(model, result)]
    if against is not None:
        folders = [(against, result["against"]), *folders]
    for reader, figures in folders:
        loaded = load_for_generation(reader.folder, DTYPES[options.dtype])
        # Module's own method: transformers' wrapper of it hides its types.
        torch.nn.Module.to(loaded, device)
        if tasks is not None:
            figures["tasks"] = run_tasks(tasks, loaded, reader.tokenizer(), options.batch_size, options.limit)
        if not options.generation:
            continue
        if plain is None:
            plain = greedy_continuations(loaded, prompts, options.max_new_tokens)
        else:
            result["generation"] = dataclasses.asdict(measure_agreement(loaded, prompts, plain)) | {
                "prompts": len(prompts),
                "new_tokens": options.max_new_tokens,
            }
