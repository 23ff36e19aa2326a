"""What a spec may say: its keys, their types and bounds. Also exported as a JSON schema."""

from dsl.schema.cluster import Cluster
from dsl.schema.measured import Calibration, MeasuredLink, MeasuredProduct
from dsl.schema.sections import (
    MTP,
    SIZES,
    VARIANT_KEYS,
    Architecture,
    LayerGroup,
    Parallel,
    Precision,
    SequenceLimits,
    Spec,
    json_schema,
)
from dsl.schema.traffic import Traffic
from dsl.schema.train import Loss, Phase, SavedFormats, Schedule, Train, constant
from dsl.schema.validate import read_validated, validate, validate_file
from dsl.schema.values import BlockUse, Loc, text_of

__all__ = [
    "MTP",
    "SIZES",
    "VARIANT_KEYS",
    "Architecture",
    "BlockUse",
    "Calibration",
    "Cluster",
    "LayerGroup",
    "Loc",
    "Loss",
    "MeasuredLink",
    "MeasuredProduct",
    "Parallel",
    "Phase",
    "Precision",
    "SavedFormats",
    "Schedule",
    "SequenceLimits",
    "Spec",
    "Traffic",
    "Train",
    "constant",
    "json_schema",
    "read_validated",
    "text_of",
    "validate",
    "validate_file",
]
