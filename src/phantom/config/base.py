"""Base class and value types of the settings, and the role of a setting in results."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]  # strict: YAML's yes and no are not accepted as 1 and 0
NonNegative = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
KeyValue = Annotated[str, Field(pattern=r"^[^=\s]+=[^\n]*$", description="KEY=VALUE")]
BenchmarkName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="the name of a benchmark")]


def _check_order(bounds: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    if None not in bounds and bounds[0] > bounds[1]:  # type: ignore[operator]
        raise ValueError("empty")
    return bounds


Range = Annotated[
    tuple[float | None, float | None],
    AfterValidator(_check_order),
    Field(description="[least, most], each a number or null"),
]


class Role(Enum):
    """What a setting does not affect, marked as `Annotated[..., Role.X]`. Settings without a role affect results."""

    NOT_IN_RESULT = "affects no file that a stage writes: neither a DVC parameter nor part of a job's name"
    NOT_IN_WEIGHTS = "affects files, but not the training result: checkpoints can be resumed with another value"


class Section(BaseModel):
    """A section of params.yaml: unknown keys are errors, values are validated, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def check_clip_length(section: Section, *names: str) -> None:
    """Checks that settings are 4m + 1, as the causal VAE needs. Raises ValueError with the nearest valid length."""
    for name in names:
        value = getattr(section, name)
        if value % 4 != 1:
            raise ValueError(f"{name} must be 4m + 1, found {value}; nearest valid: {max(1, (value + 1) // 4 * 4 + 1)}")
