"""Checkpoints of fine-tuning in DeepSpeed, and what its universal checkpoint must know of a tensor-parallel model.

A killed run, started again with the same command, goes on from DeepSpeed's own checkpoint. With another number of ranks
that checkpoint does not fit; DeepSpeed's ``ds_to_universal`` joins its parts into one file for each parameter, from
which any M and any number of replicas cut theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from megatron_spd.distill.checkpoints import EngineCheckpoints
from megatron_spd.errors import UserError
from megatron_spd.finetune.loss import NextTokenLoss
from megatron_spd.runtime.distributed import Runtime

#: What ds_to_universal's result is called, beside the checkpoint that it was made from.
UNIVERSAL = "_universal"


@dataclass
class Progress:
    """``loss_before``: on held-out text, before the first step; ``losses``: of the steps made."""

    loss_before: float
    losses: list[float] = field(default_factory=list)


class FinetuneCheckpoints:
    """Checkpoints of one run in ``folder``; without a folder there are none.

    ``identity``: the options on which the result depends. Raises UserError if ``folder`` holds a run with others, or
    one of another number of ranks that has not been made universal, or cannot be (more ranks than ``branches`` = G).
    """

    def __init__(
        self, folder: str | None, every: int, identity: dict[str, Any], branches: int, runtime: Runtime
    ) -> None:
        self.every, self.identity, self.branches = every, identity, branches
        self.store = None if folder is None else EngineCheckpoints(Path(folder), runtime)
        self.found = None if self.store is None else self.store.latest()
        self.tag, self.universal = "", False
        if self.store is not None and self.found is not None:
            self._check(self.store, self.found)

    def _check(self, store: EngineCheckpoints, found: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if (other := found["identity"].get(name)) != value:
                raise UserError(
                    f"{store.folder} holds the checkpoint of a run with {name} = {other}, this one has {value}; give "
                    "another --checkpoint, or the same options"
                )
        self.tag, self.universal = found["tag"], found["ranks"] != store.ranks
        if not self.universal:
            return
        made, self.tag = store.folder / self.tag, self.tag + UNIVERSAL
        was, now = ("M = {} with {} replica(s)".format(*ranks) for ranks in (found["ranks"], store.ranks))
        told = f"the checkpoint in {store.folder} is of {was}, this run is of {now}; start it as it was"
        if max(found["ranks"][0], store.ranks[0]) > self.branches:
            raise UserError(f"{told} (with M above G = {self.branches} there is no universal checkpoint)")
        if not (store.folder / self.tag / "zero").is_dir():
            raise UserError(
                f"{told}, or first run: python -m deepspeed.checkpoint.ds_to_universal --input_folder {made} "
                f"--output_folder {made}{UNIVERSAL}"
            )

    def adapt(self, config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed ``config`` of an engine that can read the checkpoint."""
        return config | {"checkpoint": {"load_universal": True}} if self.universal else config

    def resume(self, engine: Any) -> Progress | None:
        """Put the last checkpoint into the fresh ``engine``; None if there is none."""
        if self.store is None or self.found is None:
            return None
        self.store.load(engine, self.tag)
        return Progress(self.found["loss_before"], self.found["losses"])

    def save_if_due(self, engine: Any, progress: Progress) -> None:
        """Save after every ``every`` steps."""
        step = len(progress.losses)
        if self.store is None or step % self.every:
            return
        state = {
            "identity": self.identity,
            "loss_before": progress.loss_before,
            "losses": progress.losses,
        }
        self.store.save(engine, step, state)


def prepare_for_universal(module: NextTokenLoss) -> None:
    """Give ``module`` what ds_to_universal reads from its checkpoints: how its parameters are cut over ranks.

    Call it before the engine is made. It does not hold for M > G, where several ranks have the same shifts and branch
    norms: ds_to_universal has no word for that.
    """
    module.register_state_dict_post_hook(_without_empty_states)
    module.universal_checkpoint_info = universal_checkpoint_info(module)  # type: ignore[assignment]


def universal_checkpoint_info(module: NextTokenLoss) -> dict[str, Any]:
    """DeepSpeed's description of the parameters of ``module`` by patterns of their names: replicated ones, those cut
    along columns, gate and up in one, the vocabulary's. Any other is cut along rows."""
    from deepspeed.checkpoint import constants

    named = dict(module.named_parameters())
    gated = module.model.config.gated_linear_unit

    def patterns(names: list[str]) -> list[str]:
        return [f"{re.escape(name)}$" for name in names]

    cut = {name: p for name, p in named.items() if getattr(p, "tensor_model_parallel", False)}
    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.ORIGINAL_VOCAB_SIZE: module.vocab_size,
        constants.TP_REPLICATED_PARAMETER_PATTERNS: patterns([n for n in named if n not in cut]),
        constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: patterns(
            [n for n, p in cut.items() if getattr(p, "partition_dim", 0) == 1]
        ),
        constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: patterns(
            [n for n in cut if gated and ".linear_fc1." in n]
        ),
        constants.VOCABULARY_PARAMETER_PATTERNS: patterns(
            [n for n in cut if n.endswith(("word_embeddings.weight", "output_layer.weight"))]
        ),
    }


def _without_empty_states(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Megatron-core's linears put empty extra states into the state dict, which ds_to_universal takes for tensors."""
    for name in [n for n, value in state.items() if n.startswith(prefix) and value is None]:
        del state[name]
