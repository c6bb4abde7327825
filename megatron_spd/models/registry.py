"""The families this package knows."""

from __future__ import annotations

from megatron_spd.errors import UserError
from megatron_spd.models.family import ModelFamily
from megatron_spd.models.llama import LLAMA

FAMILIES: tuple[ModelFamily, ...] = (LLAMA,)


def family_of(model_type: str | None, where: str = "the model") -> ModelFamily:
    """The family of a ``model_type`` of a config.json, plain or SPD. Raises UserError with the list of known ones."""
    for family in FAMILIES:
        if model_type in (family.model_type, family.spd_model_type):
            return family
    known = sorted(f.model_type for f in FAMILIES)
    raise UserError(f"{where} has model_type {model_type!r}; the known families are {known}")
