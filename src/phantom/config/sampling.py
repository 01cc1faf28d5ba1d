"""What a model generates where a call does not say otherwise, from the settings that it is trained with."""

from __future__ import annotations

from typing import Any

from phantom.config.tree import Params


def default_arguments(params: Params) -> dict[str, Any]:
    """Size, frame rate and sampler, as an export's metadata has them (`PhantomPipeline.defaults`).

    A search (`best_of`) is no default of a model: `phantom generate` is asked for one.
    """
    sampling = params.evaluate.sampling.model_copy(update={"best_of": 1})
    return {
        "frames": params.data.frames,
        "height": params.data.height,
        "width": params.data.width,
        "fps": params.data.fps,
        "max_prefix_frames": params.encode.max_prefix_frames,
        "text_tokens": params.encode.text_tokens,
        "sampling": sampling.record(),
        "surprise": params.evaluate.surprise.model_dump(mode="json"),
    }
