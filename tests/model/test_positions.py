"""Where tokens sit, and that the same place and time is the same rotation in both branches."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from phantom.model.positions import latent_of_tubelet, physics_positions, rotary_emb, tubelets, video_positions
from tests.model.build import phantom


@pytest.mark.parametrize("head_dim", [24, 36, 48, 64, 128])
def test_at_whole_positions_the_rotation_is_wans_to_the_last_bit(head_dim):
    rope = WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)
    cos, sin = rope(torch.zeros(1, 16, 5, 12, 14))
    ours = rotary_emb(video_positions((5, 6, 7)), head_dim)
    assert torch.equal(ours[0], cos) and torch.equal(ours[1], sin)


def test_tubelets_stand_in_the_time_of_their_latents():
    frames, _, _ = physics_positions((9, 1, 1), (5, 1, 1))
    assert frames.tolist() == [0, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25]
    assert tubelets(5) == 9
    assert latent_of_tubelet(5, 9).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    # The middle of both tubelets of a latent is the latent's own position.
    middles = frames[1:].view(-1, 2).mean(1)
    assert middles.tolist() == video_positions((5, 1, 1))[0][1:].tolist()


def test_one_tubelet_for_each_latent_stands_where_the_latent_does():
    assert physics_positions((5, 1, 1), (5, 1, 1))[0].tolist() == [0, 1, 2, 3, 4]
    assert tubelets(5, 1) == 5
    assert latent_of_tubelet(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert latent_of_tubelet(1, 1).tolist() == [0]
    for count in (6, 4, 1):
        with pytest.raises(ValueError, match=f"found {count} tubelets for 5 latent frames"):
            latent_of_tubelet(5, count)


def test_tokens_cover_the_picture_from_edge_to_edge_in_both_branches():
    """The paper's sizes: 15 x 26 video tokens, 8 x 8 physics tokens."""
    _, rows, columns = physics_positions((61, 8, 8), (31, 15, 26))
    for positions, count in ((rows, 15), (columns, 26)):
        step = count / 8
        assert torch.allclose(positions.diff(), torch.tensor(step, dtype=torch.float64))
        # Half a token from either edge of the picture, which lie at -1/2 and count - 1/2.
        assert positions[0] == step / 2 - 0.5 and positions[-1] == count - 0.5 - step / 2


def rows_of(cos_sin, token: int) -> torch.Tensor:
    return torch.stack([table[0, token, 0] for table in cos_sin])


@pytest.mark.parametrize("head_dim", [24, 128])
def test_the_same_place_and_time_is_the_same_rotation_in_both_branches(head_dim):
    grid = (1, 6, 8)
    video, physics = video_positions(grid), physics_positions(grid, grid)
    assert torch.equal(rotary_emb(video, head_dim)[0], rotary_emb(physics, head_dim)[0])  # grids alike, first frame

    # A grid three times as coarse: its tokens' centres are every third one's, from the second on.
    at_video, at_physics = (
        rotary_emb(video_positions((3, 6, 9)), head_dim),
        rotary_emb(physics_positions((5, 2, 3), (3, 6, 9)), head_dim),
    )
    for row in range(2):
        for column in range(3):
            a = rows_of(at_video, (3 * row + 1) * 9 + 3 * column + 1)
            b = rows_of(at_physics, row * 3 + column)
            assert torch.equal(a, b)
            later = rows_of(at_physics, 6 + row * 3 + column)  # tubelet 1, at 0.75: in no frame of the video
            assert not torch.equal(a, later)


def test_attention_falls_with_distance_across_the_branches():
    """The score of two rotated vectors depends on the difference of their positions alone."""
    q = torch.randn(48)

    def score(cos_sin_q, i, cos_sin_k, j):
        def turn(x, cos_sin, token):
            cos, sin = (table[0, token, 0, ::2] for table in cos_sin)
            return torch.view_as_complex(x.view(-1, 2)) * torch.complex(cos, sin)

        return (turn(q, cos_sin_q, i) * turn(q, cos_sin_k, j).conj()).real.sum()

    video = rotary_emb(video_positions((4, 4, 4)), 48)
    physics = rotary_emb(physics_positions((7, 4, 4), (4, 4, 4)), 48)

    def at(grid, frame, row, column):
        return (frame * grid[1] + row) * grid[2] + column

    v, z = (4, 4, 4), (7, 4, 4)
    # Latent 1 from tubelet 1 (at 0.75), and latent 2 from tubelet 3 (at 1.75), moved by a row and a column.
    a = score(video, at(v, 1, 0, 0), physics, at(z, 1, 0, 1))
    b = score(video, at(v, 2, 1, 2), physics, at(z, 3, 1, 3))
    other = score(video, at(v, 2, 1, 2), physics, at(z, 2, 1, 3))
    assert torch.allclose(a, b, atol=1e-3) and not torch.allclose(a, other, atol=1e-3)


def test_the_model_uses_these_positions_everywhere():
    model = phantom(num_attention_heads=3, attention_head_dim=36)
    found = model.rotary_embs((4, 3, 4), (7, 4, 4), torch.device("cpu"))
    at_v, at_z = video_positions((4, 3, 4)), physics_positions((7, 4, 4), (4, 3, 4))
    for ours, positions, head_dim in (
        (found.video, at_v, 24),
        (found.physics, at_z, 36),
        (found.coupling_video, at_v, 24),
        (found.coupling_physics, at_z, 24),
    ):
        assert torch.equal(ours[0], rotary_emb(positions, head_dim)[0])
        assert torch.equal(ours[1], rotary_emb(positions, head_dim)[1])
