"""What each `load.dtype` of a quantized base holds how: the one table that all who deal with one ask.

Purpose: what is said of a form follows from its entry here, so that another form is another entry.
"""

from __future__ import annotations

from dataclasses import dataclass

# The types of codes, and what messages call each.
CODES = {"int8": "8 bits", "int4": "4 bits"}


@dataclass(frozen=True)
class Form:
    """How a base is held.

    Attributes:
        policy: the Keras dtype policy of all that is no codes, and of the products.
        table: whether the token table is in codes too, with a scale for each row.
        four_bits: the layers, or an expert's matrices, whose codes have 4 bits; those of the others have 8.
    """

    policy: str
    table: bool = False
    four_bits: tuple[str, ...] = ()

    @property
    def codes(self) -> str:
        """What the codes are, for a person."""
        return " and ".join([CODES["int4"], CODES["int8"]] if self.four_bits else [CODES["int8"]])


# Values and what comes last in a pair lose the most in 4 bits: docs/training.md has figures.
FOUR_BITS = ("query", "key", "ffw_gating", "ffw_gating_2", "gate_proj", "up_proj")

FORMS = {
    "int8": Form("bfloat16"),
    "int8_table": Form("bfloat16", table=True),
    "int8_float32": Form("float32"),
    "int8_table_float32": Form("float32", table=True),
    "int4": Form("bfloat16", table=True, four_bits=FOUR_BITS),
    "int4_float32": Form("float32", table=True, four_bits=FOUR_BITS),
}
"""By `load.dtype`; any other is a Keras dtype policy, without codes."""


def four_bits_of(dtype: str) -> tuple[str, ...]:
    """Return the names of the layers, or of an expert's matrices, that a `load.dtype` holds in 4 bits."""
    return FORMS[dtype].four_bits if dtype in FORMS else ()


def policy_of(dtype: str) -> str:
    """Return the Keras dtype policy of a `load.dtype`: of all that does not become codes."""
    return FORMS[dtype].policy if dtype in FORMS else dtype
