"""`models`, `physics`, `coupling`: the frozen models, and the dimensions of the trainable parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from phantom.config.base import NonNegative, Positive, PositiveFloat, Section
from phantom.errors import UserError

LOCAL_PREFIXES = ("models/", "./", "../", "/")  # of paths; anything else is a hub id


class Models(Section):
    """The frozen models, each a folder or a hub id."""

    base: str  # a diffusers folder or hub id: transformer, vae, text_encoder, tokenizer, scheduler
    base_revision: str | None
    physics_encoder: str  # a V-JEPA 2 folder or hub id
    physics_encoder_revision: str | None
    physics_encoder_random_seed: NonNegative | None = None  # null: its trained weights; else random ones, as a control
    dtype: Literal["float32", "bfloat16"]  # of the frozen weights

    def check_folders(self, root: Path = Path()) -> None:
        """Raises UserError for a path that does not exist below `root`, instead of looking it up on the hub."""
        for name in ("base", "physics_encoder"):
            id_: str = getattr(self, name)
            if id_.startswith(LOCAL_PREFIXES) and not (root / id_).is_dir():
                hint = "a checkout of this project has models/mini, `phantom pretrain` makes it"
                raise UserError(f"models.{name}: {id_!r}: no such folder in {root.resolve()}; {hint}")


class Physics(Section):
    """Dimensions of the physics branch; null: same as the video branch."""

    num_layers: Positive | None
    num_attention_heads: Positive | None
    attention_head_dim: Positive | None
    ffn_dim: Positive | None
    patch_size: tuple[Positive, Positive, Positive]
    tubelets_per_latent: Literal[1, 2]  # V-JEPA 2 tubelets per video latent; 1: every second frame, half the tokens
    init: Literal["random", "video"]  # of its blocks; video: copies of the video branch's
    standardize: bool  # z per channel, by mean and standard deviation over the training set
    prediction: Literal["clean", "velocity"]  # what the output head predicts
    sigma_min: Annotated[float, Field(gt=0, le=1)]  # clean: v = (z_sigma - z_hat) / max(sigma, sigma_min)
    noise_shift: PositiveFloat  # r of sigma_z = r sigma / (1 + (r - 1) sigma); 1: same t in both branches
    force: Literal["none", "physics", "video"] = "none"  # the branch that takes a force prompt as input

    @property
    def force_branch(self) -> Literal["physics", "video"] | None:
        """`force`; None for none."""
        return None if self.force == "none" else self.force

    def of_model(self) -> dict[str, Any]:
        """The arguments of `phantom.model.PhysicsConfig`."""
        return self.model_dump(exclude={"standardize", "force"})


class Coupling(Section):
    """Dimensions of Vis-Attention and Phy-Attention; null: same as the video branch."""

    blocks: Literal["all"] | Positive | tuple[NonNegative, ...] = Field(
        description="all, a number n >= 1 for every n-th, or a list of block indices"
    )
    direction: Literal["both", "to_video", "to_physics", "none"] = "both"  # which branch reads the other
    num_attention_heads: Positive | None
    attention_head_dim: Positive | None
    physics_source: Literal["attention", "stream"]  # what Vis-Attention reads of the physics branch
    init: Literal["plain", "local"]  # local: each token begins by reading what lies where it does
