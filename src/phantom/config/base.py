"""Building blocks of the settings: a section's base class, checked types, and the role a setting has in results."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]  # strict: YAML's yes and no are not numbers
Count = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
Pair = Annotated[str, Field(pattern=r"^[^=\s]+=[^\n]*$", description="KEY=VALUE")]
Benchmark = Literal["physics-iq", "videophy", "videophy2", "vbench2"]


def _in_order(ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    if None not in ends and ends[0] > ends[1]:  # type: ignore[operator]
        raise ValueError("empty")
    return ends


Range = Annotated[
    tuple[float | None, float | None],
    AfterValidator(_in_order),
    Field(description="[least, most], each a number or null"),
]


class Role(Enum):
    """What a setting does not change, marked as `Annotated[..., Role.X]`. A setting without a role changes results."""

    NOT_IN_RESULT = "no file that a stage writes: it is neither a DVC parameter nor part of a job's name"
    NOT_IN_WEIGHTS = "files, but not what is learnt: a checkpoint is resumed under another value"


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values are checked, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def check_clip_length(section: Section, *names: str) -> None:
    """The causal VAE takes 4m + 1 frames. Raises ValueError with the nearest valid length."""
    for name in names:
        value = getattr(section, name)
        if value % 4 != 1:
            raise ValueError(f"{name} must be 4m + 1, found {value}; nearest valid: {max(1, (value + 1) // 4 * 4 + 1)}")
