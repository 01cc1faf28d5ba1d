"""`train`: the training run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from phantom.config.base import Count, Fraction, Positive, PositiveFloat, Role, Section


class RecursiveWeight(Section):
    """alpha_z: grows over `growth_steps` to `alpha_max`, back to 0 when the gradient norm passes `threshold`."""

    alpha_max: PositiveFloat
    growth_steps: Positive  # S
    threshold: PositiveFloat  # eta_z
    norm: Literal["raw", "weighted"]
    every: Positive  # steps between measurements
    mode: Literal["exact", "head"]  # head: the output head's gradient, looked at in between, can call for one more


class Optimizer(Section):
    """AdamW over the trainable parameters; `learning_rate` is the peak, after `warmup_steps`."""

    learning_rate: PositiveFloat
    betas: tuple[Fraction, Fraction]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: PositiveFloat
    warmup_steps: Count
    decay: Literal["constant", "cosine"]


class Train(Section):
    """The training run. `control: true` trains the same thing with alpha_z held at 0 beside it."""

    steps: Positive
    batch_size: Positive  # global: over all processes and accumulation steps
    accumulation: Annotated[Positive, Role.NOT_IN_WEIGHTS]
    processes: Annotated[Positive, Role.NOT_IN_WEIGHTS]  # torchrun processes, over all machines
    seed: Count
    flow_shift: PositiveFloat
    conditioned: Fraction  # share of samples with a condition prefix
    caption_dropout: Fraction
    coupling_dropout: Fraction  # share of samples trained with the coupling off (modality guidance)
    physics_latents: Literal["stored", "online"]  # online: made from the clips' frames, and not stored
    recursive_weight: RecursiveWeight
    optimizer: Optimizer
    ema_decay: Fraction | None
    precision: Literal["float32", "bfloat16"]
    strategy: Annotated[Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"], Role.NOT_IN_WEIGHTS]
    activation_checkpointing: Annotated[Literal["none", "full", "selective"], Role.NOT_IN_WEIGHTS]
    compile: Annotated[bool, Role.NOT_IN_WEIGHTS]
    control: Annotated[bool, Role.NOT_IN_WEIGHTS]
    log_every: Annotated[Positive, Role.NOT_IN_WEIGHTS]
    checkpoint_every: Annotated[Positive, Role.NOT_IN_RESULT]
    keep_checkpoints: Annotated[Positive, Role.NOT_IN_RESULT]
    validate_every: Annotated[Count, Role.NOT_IN_WEIGHTS]  # 0: never
    sample_every: Annotated[Count, Role.NOT_IN_RESULT]  # steps between sample videos in MLflow; 0: never
    max_bad_steps: Annotated[Positive, Role.NOT_IN_WEIGHTS]  # NaN or inf losses in a row before stopping

    @model_validator(mode="after")
    def _batches(self) -> Train:
        unit = self.accumulation * self.processes
        if self.batch_size % unit:
            raise ValueError(
                f"batch_size {self.batch_size} must divide by accumulation x processes = {unit}; "
                f"nearest valid: {max(unit, round(self.batch_size / unit) * unit)}"
            )
        return self
