"""What the sections of the schema share: their base class, types of settings, and marks of what a setting changes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
# No run counts further; beyond, integers of JAX and numpy overflow.
Positive = Annotated[int, Field(ge=1, le=10**9)]
# In tokens. No Gemma was trained on longer sequences.
Length = Annotated[int, Field(ge=8, le=131072)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Dtype = Literal[
    "float32",
    "bfloat16",
    "mixed_bfloat16",
    "int8",
    "int8_table",
    "int8_float32",
    "int8_table_float32",
    "int4",
    "int4_float32",
]
# AdamW works in the dtype of what it trains. Bfloat16 has 8 bits: 0.999 is 1.0 there, so that every step is exactly 0.
# Codes have no gradient.
IN_FULL_DTYPES = ("float32", "mixed_bfloat16")
IN_FULL = "must be mixed_bfloat16 (float32 weights, bfloat16 arithmetic) or float32 where every weight is trained"
IN_FLOATS = "needs a dtype of floats"
# What a setting has no influence on. DISPLAY: any result of the run (what is printed, how often a checkpoint is kept);
# dvc.yaml does not list it. RUN: the compiled train step (how long the run is, the size of a step); `plan` does not
# depend on it.
DISPLAY = Field(json_schema_extra={"changes": "display"})
RUN = Field(json_schema_extra={"changes": "run"})


class Section(BaseModel):
    """A section: no unknown key, no silent conversion, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Rule(Section):
    """A layout rule: a pattern over weight paths, and an axis (or several, or null) for each dimension."""

    pattern: Annotated[str, Field(min_length=1)]
    spec: list[str | list[str] | None]


def without(settings: Section, *changes: Literal["display", "run"]) -> dict[str, Any]:
    """Return a section's settings as plain values, without those marked as changing only `display` or `run`."""
    marked = {
        name
        for name, field in type(settings).model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("changes") in changes
    }
    return settings.model_dump(exclude=marked)
