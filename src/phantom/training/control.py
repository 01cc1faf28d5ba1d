"""The control's settings: as many FLOPs as Phantom's run, all of them for L_v."""

from __future__ import annotations

from typing import Any

from phantom.config import Params
from phantom.data.latent_set import Latents
from phantom.model.flops import Shape, costs


def control_params(params: Params, model: Any, clip: Latents) -> Params:
    """`params` without `train.twin_steps`, in which alpha_z = 0 trains nothing, and with more steps of the whole model.

    Their number makes the training FLOPs equal, to half a step. Under DeepSpeed, where steps of the twin alone run the
    whole model, each is one. model: `PhantomTransformer3DModel.config`. clip: one that is trained on, for its shape.
    """
    train = params.train
    twin = min(train.twin_steps, train.steps)
    if not twin:
        return params
    (_, *video), (_, *physics) = clip.video.shape, clip.physics.shape
    shape = Shape(tuple(video), tuple(physics), params.encode.text_tokens, video[0])  # type: ignore[arg-type]
    cost = costs(model.video, model.physics, model.coupling, shape, force=model.force)
    share = 1.0 if train.strategy.startswith("zero") else cost.physics.training / cost.total.training
    steps = max(1, train.steps - twin + round(twin * share))
    return params.model_copy(update={"train": train.model_copy(update={"steps": steps, "twin_steps": 0})})
