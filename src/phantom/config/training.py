"""`train`: batches, alpha_z, optimizer, parallelism, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from phantom.config.base import Fraction, NonNegative, Positive, PositiveFloat, Role, Section


class RecursiveWeight(Section):
    """alpha_z: grows to `alpha_max` over `growth_steps`, reset to 0 when the gradient norm exceeds `threshold`.

    With `mode: fixed` it is `alpha_max` from the first step, and no norm is measured.
    """

    alpha_max: PositiveFloat
    growth_steps: Positive  # S
    threshold: PositiveFloat  # eta_z
    norm: Literal["raw", "weighted", "relative"]  # relative: threshold is a multiple of the running median
    every: Positive  # steps between measurements
    stalled_after: Annotated[Positive, Role.NOT_IN_RESULT]  # steps with resets alone, before a warning
    mode: Literal["exact", "head", "fixed"]  # head: the output head's gradient norm can trigger more measurements


class Optimizer(Section):
    """AdamW over the trainable parameters; `learning_rate` is the peak, reached after `warmup_steps`."""

    learning_rate: PositiveFloat
    betas: tuple[Fraction, Fraction]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: PositiveFloat
    warmup_steps: NonNegative
    decay: Literal["constant", "cosine"]


class Lora(Section):
    """The adapters that `train.method: lora` and `alignment` train on the frozen base, in place of a physics branch."""

    rank: Positive | None = None  # null: the rank whose number of parameters is nearest to that of method phantom
    alpha: PositiveFloat | None = None  # scale = alpha / rank; null: 1
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers' names


class Alignment(Section):
    """The term that `train.method: alignment` adds to the loss of its adapters (`training.alignment`)."""

    block: Positive | None = None  # of the video branch, from 1; null: 18 of 30, or the one at that share
    weight: PositiveFloat = 0.5
    margin: Annotated[float, Field(ge=0, lt=2)] = 0.1  # cosines differ by 2 at most


# Those with a backward pass.
AttentionBackend = Literal[
    "auto", "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flash"
]


class Mesh(Section):
    """How `strategy: fsdp2` arranges the processes: `replicate` copies of the weights, each over `shard` x `context`.

    `context` processes in a row share samples, whose tokens they divide. null: the other one's counterpart in
    `processes`; with both null one copy is sharded over all of them.
    """

    replicate: Annotated[Positive | None, Role.NOT_IN_WEIGHTS] = None
    shard: Annotated[Positive | None, Role.NOT_IN_WEIGHTS] = None
    context: Annotated[Positive, Role.NOT_IN_WEIGHTS] = 1

    def shape(self, processes: int) -> tuple[int, int]:
        """(replicate, shard) of so many processes. Raises ValueError, with the nearest that is valid."""
        processes = _divided(processes, "context", self.context)
        name, given = ("shard", self.shard) if self.shard else ("replicate", self.replicate or 1)
        other = _divided(processes, name, given)
        if self.shard and self.replicate not in (None, other):
            raise ValueError(
                f"mesh: found replicate {self.replicate} x shard {given}, but {processes} processes; "
                f"nearest valid: replicate {other}, or null"
            )
        return (other, given) if self.shard else (given, other)


def _divided(processes: int, name: str, given: int) -> int:
    """processes / given. Raises ValueError if that is not a whole number."""
    if processes % given:
        nearest = max(n for n in range(1, min(given, processes) + 1) if processes % n == 0)
        raise ValueError(f"mesh.{name} {given} must divide {processes} processes; nearest valid: {nearest}")
    return processes // given


class Train(Section):
    """The training run. `control: true` also trains a control of Phantom with alpha_z held at 0."""

    method: Literal["phantom", "lora", "alignment"] = "phantom"  # what is trained on the frozen base
    lora: Lora = Lora()
    alignment: Alignment = Alignment()
    steps: Positive
    batch_size: Positive  # global batch, over all processes and accumulation steps
    accumulation: Annotated[Positive, Role.NOT_IN_WEIGHTS]
    processes: Annotated[Positive, Role.NOT_IN_WEIGHTS]  # world size, over all machines
    seed: NonNegative
    init_from: str | None = None  # an export or a checkpoint whose weights a new run starts from
    flow_shift: PositiveFloat
    conditioned: Fraction  # fraction of samples with a condition prefix
    caption_dropout: Fraction
    coupling_dropout: Fraction  # fraction of samples with the coupling off (modality guidance)
    force_dropout: Fraction = 0.1  # fraction of samples whose force is withheld, where physics.force takes one
    physics_loss: Literal["clean", "velocity"]  # unit of L_z: |z_hat - z|^2, or the velocity's
    twin_steps: NonNegative  # first steps in which the physics branch is trained alone, without coupling
    physics_latents: Literal["stored", "online"]  # online: computed from the clips' frames during training
    recursive_weight: RecursiveWeight
    optimizer: Optimizer
    ema_decay: Fraction | None
    precision: Literal["float32", "bfloat16"]
    strategy: Annotated[Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"], Role.NOT_IN_WEIGHTS]
    mesh: Mesh = Mesh()
    offload: Annotated[Literal["none", "optimizer"], Role.NOT_IN_WEIGHTS] = "none"  # what is in host memory instead
    activation_checkpointing: Annotated[Literal["none", "full", "selective"], Role.NOT_IN_WEIGHTS]
    selective_every: Annotated[Positive, Role.NOT_IN_WEIGHTS] = 1  # n: selective keeps attention in every n-th block
    attention_backend: Annotated[AttentionBackend, Role.NOT_IN_WEIGHTS] = "native"  # by diffusers' names
    compile: Annotated[bool, Role.NOT_IN_WEIGHTS]
    export_dtype: Annotated[Literal["float32", "bfloat16"] | None, Role.NOT_IN_WEIGHTS] = None  # null: models.dtype
    control: Annotated[bool, Role.NOT_IN_WEIGHTS]
    log_every: Annotated[Positive, Role.NOT_IN_WEIGHTS]
    checkpoint_every: Annotated[Positive, Role.NOT_IN_RESULT]
    keep_checkpoints: Annotated[Positive, Role.NOT_IN_RESULT]
    validate_every: Annotated[NonNegative, Role.NOT_IN_WEIGHTS]  # 0: never
    sample_every: Annotated[NonNegative, Role.NOT_IN_RESULT]  # steps between sample videos in MLflow; 0: never
    # First and last step that torch's profiler traces; null: none.
    profile: Annotated[tuple[Positive, Positive] | None, Role.NOT_IN_RESULT] = None
    memory_check: Annotated[bool, Role.NOT_IN_RESULT] = True  # refuse to start what `phantom plan` says does not fit
    max_bad_steps: Annotated[Positive, Role.NOT_IN_WEIGHTS]  # consecutive non-finite gradients before stopping

    @property
    def trains_control(self) -> bool:
        """Whether a control is trained too: there is none where there is no physics loss to leave out."""
        return self.control and self.method == "phantom"

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained, in place of a physics branch."""
        return self.method != "phantom"

    def mesh_shape(self, processes: int) -> tuple[int, int]:
        """Of so many processes (replicate, shard): copies of what the strategy shards, and processes with one of them.

        Weights are sharded over the processes that share samples too. Raises ValueError if `mesh` does not fit them.
        """
        if self.strategy == "ddp":
            return processes, 1
        replicate, shard = self.mesh.shape(processes)
        return replicate, shard * self.mesh.context

    @property
    def micro_batch(self) -> int:
        """Samples that a process computes with at a time, alone or with those that share them."""
        return self.batch_size * self.mesh.context // (self.accumulation * self.processes)

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.strategy != "fsdp2" and self.mesh != Mesh():
            raise ValueError(f"mesh goes with strategy fsdp2; found strategy {self.strategy}; accepted: no mesh")
        shape, sharing = self.mesh.shape(self.processes), self.processes // self.mesh.context
        unit = self.accumulation * sharing
        if self.batch_size % unit:
            each, rest = divmod(self.batch_size, sharing)
            raise ValueError(
                f"batch_size {self.batch_size} must divide by accumulation x processes = {unit}; "
                f"nearest valid: {max(unit, round(self.batch_size / unit) * unit)}"
                + (f", or accumulation {each}" if each and not rest else "")
            )
        if self.offload != "none" and self.strategy != "ddp":
            raise ValueError(f"offload goes with strategy ddp; found strategy {self.strategy}; accepted: offload none")
        if shape[1] * self.mesh.context == 1 < self.processes:
            raise ValueError("mesh.shard 1 shards nothing; accepted: strategy ddp, or 2 and more")
        if self.mesh.context > 1 and self.method == "alignment":  # whose term compares all tokens of a sample
            raise ValueError(
                f"mesh.context {self.mesh.context} goes with method phantom or lora; found method alignment; nearest "
                "valid: 1"
            )
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: found {[*self.profile]}; accepted: [from, to], steps in their order")
        if self.trains_adapters and self.strategy == "zero3":
            # DeepSpeed releases a block's weights too early where its input has no gradient, as the first one's.
            raise ValueError(
                f"strategy zero3 does not go with method {self.method}; accepted: ddp, fsdp2, zero1, zero2"
            )
        return self
