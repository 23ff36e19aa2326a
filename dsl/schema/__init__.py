"""What a spec may say: its keys, their types and bounds. Also exported as a JSON schema."""

from dsl.schema.sections import (
    MTP,
    VARIANT_KEYS,
    Architecture,
    LayerGroup,
    Loss,
    Phase,
    Precision,
    Schedule,
    SequenceLimits,
    Spec,
    Train,
    json_schema,
)
from dsl.schema.validate import validate
from dsl.schema.values import BlockUse, Loc, text_of

__all__ = [
    "MTP",
    "VARIANT_KEYS",
    "Architecture",
    "BlockUse",
    "LayerGroup",
    "Loc",
    "Loss",
    "Phase",
    "Precision",
    "Schedule",
    "SequenceLimits",
    "Spec",
    "Train",
    "json_schema",
    "text_of",
    "validate",
]
