"""FLOPs computed from configs against torch's counter on the models as `phantom encode` calls them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import VJEPA2Model

from phantom.encoders import VideoEncoder
from phantom.encoders.flops import physics_flops, text_flops, video_flops
from tests import tiny


def counted(function, *arguments) -> int:
    # The counter does not support fused CPU attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 32, 48), (17, 32, 32)])
def test_the_vaes_encoder(frames, height, width):
    vae = tiny.tiny_vae()
    pixels = torch.zeros(1, frames, height, width, 3, dtype=torch.uint8)
    found = video_flops(dict(vae.config), frames, height, width)
    assert found == counted(VideoEncoder(vae).encode, pixels) > 0


@pytest.mark.parametrize("frames", [1, 9, 29])
def test_the_physics_encoder(frames):
    config = tiny.tiny_vjepa().config
    with torch.device("meta"):
        model, pixels = VJEPA2Model(config), torch.empty(1, frames + 1, 3, config.crop_size, config.crop_size)
        assert physics_flops(config.to_dict(), frames) == counted(model.get_vision_features, pixels)


def test_the_text_encoder():
    model, ids = tiny.tiny_text_encoder(), torch.zeros(1, 96, dtype=torch.long)
    assert text_flops(model.config.to_dict(), 96) == counted(model, ids, torch.ones(1, 96))
