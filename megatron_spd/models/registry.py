"""The families this package knows."""

from __future__ import annotations

from megatron_spd.errors import UserError
from megatron_spd.models.family import ModelFamily
from megatron_spd.models.llama import LLAMA
from megatron_spd.models.mistral import MISTRAL
from megatron_spd.models.mixtral import MIXTRAL
from megatron_spd.models.opt import OPT
from megatron_spd.models.qwen2 import QWEN2
from megatron_spd.models.qwen3 import QWEN3
from megatron_spd.models.qwen3_moe import QWEN3_MOE
from megatron_spd.models.reading import NORM_BEHIND

FAMILIES: tuple[ModelFamily, ...] = (LLAMA, MISTRAL, MIXTRAL, OPT, QWEN2, QWEN3, QWEN3_MOE)
#: Families that the rule does not cover, and why.
REFUSED = dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3"), NORM_BEHIND)


def family_of(model_type: str | None, where: str = "the model") -> ModelFamily:
    """The family of a ``model_type`` of a config.json, plain or SPD. Raises UserError with the list of known ones."""
    for family in FAMILIES:
        if model_type in (family.model_type, family.spd_model_type):
            return family
    if model_type in REFUSED:
        raise UserError(
            f"{where} has model_type {model_type!r}, which is not supported: {REFUSED[model_type]}"
        )
    known = sorted(f.model_type for f in FAMILIES)
    raise UserError(f"{where} has model_type {model_type!r}; the known families are {known}")
