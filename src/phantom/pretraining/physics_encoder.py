"""A small V-JEPA 2, trained by masked latent prediction against an EMA teacher, as V-JEPA 2 is (arXiv 2506.09985).

At this size and a few thousand steps, further choices keep position and motion in the features: targets from two
depths and a loss on visible tokens too, as in V-JEPA 2.1 (arXiv 2603.14482); a patch embedding frozen at its random
initialisation, as in MoCo v3 (arXiv 2104.02057), since it would learn to discard what is hard to predict; and most of
the loss weight on moving patches.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import VJEPA2Config, VJEPA2Model

from phantom.data.state_probe import STATE, StateProbe, of_tubelets, r2_scores, tokens_of_tubelets
from phantom.encoders.vjepa import PhysicsEncoder, preprocess
from phantom.pretraining.clips import Clips
from phantom.pretraining.loop import fit
from phantom.progress import track

BATCH = 16
PEAK_LEARNING_RATE = 1e-3
TEACHER_DECAY = (0.99, 0.999)  # from the first step to the last
WINDOW_TUBELETS = (3, 4)  # length of a training window
FUTURE_SHARE = 0.85  # of batches that mask the next tubelet: only those require predicting motion
VISIBLE_WEIGHT = 0.2  # of the loss on visible tokens
MOVING_SHARE = 0.8  # of the loss on moving patches, which are a few percent of all
MOTION_THRESHOLD = 0.25  # change of a normalised pixel, about 14 grey levels

CONFIG = VJEPA2Config(
    patch_size=8,
    crop_size=64,
    frames_per_clip=30,
    tubelet_size=2,
    hidden_size=96,
    num_attention_heads=3,
    num_hidden_layers=4,
    mlp_ratio=4.0,
    initializer_range=0.1,  # 1 / sqrt(hidden_size): the default suits widths around 1000
    pred_hidden_size=64,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
    pred_num_mask_tokens=2,
    pred_zero_init_mask_tokens=False,
)


def draw_masks(
    batch: int, depth: int, side: int, future: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (batch, kept) and (batch, hidden), with the same number hidden in every row.

    future: one tubelet is hidden and those before it are kept. Otherwise three quarters of the patches are hidden in
    every tubelet: two overlapping blocks per row, completed at random.
    """
    tokens = torch.arange(depth * side * side).view(depth, side, side)
    if future:
        start = int(torch.randint(1, depth, (1,), generator=generator))
        return tokens[:start].flatten().expand(batch, -1), tokens[start].flatten().expand(batch, -1)
    kept, hidden = [], []
    for _ in range(batch):
        score = torch.rand(side, side, generator=generator)
        for _ in range(2):
            h, w = torch.randint(side // 2, side - 1, (2,), generator=generator).tolist()
            y = int(torch.randint(side - h + 1, (1,), generator=generator))
            x = int(torch.randint(side - w + 1, (1,), generator=generator))
            score[y : y + h, x : x + w] += 1
        mask = torch.zeros(side * side, dtype=torch.bool)
        mask[score.flatten().topk(side * side * 3 // 4).indices] = True
        places = tokens.flatten(1)
        kept.append(places[:, ~mask].flatten())
        hidden.append(places[:, mask].flatten())
    return torch.stack(kept), torch.stack(hidden)


def encode_kept(model: VJEPA2Model, pixels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Runs the encoder on the kept tokens only: (B, kept, D). The model's own masking applies after the encoder."""
    x = model.encoder.embeddings(pixels)
    x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    for layer in model.encoder.layer:
        x = layer(x, kept)[0]
    return model.encoder.layernorm(x)


def moving_places(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, T, 3, S, S) -> bool (B, tokens): whether a pixel of the token changes between consecutive frames."""
    change = (pixels[:, 1:] - pixels[:, :-1]).abs().amax(2)
    change = F.max_pool2d(change, CONFIG.patch_size)
    change = torch.cat([change[:, :1], change], 1).unflatten(1, (-1, CONFIG.tubelet_size)).amax(2)
    return (change > MOTION_THRESHOLD).flatten(1)


def train_physics_encoder(clips: Clips, steps: int, seed: int, checkpoints: Path) -> VJEPA2Model:
    """L1 between the predictor's output and the teacher's layer-normalised features, at its first and last depth.

    L = hidden + VISIBLE_WEIGHT visible, each (1 - MOVING_SHARE) mean over still + MOVING_SHARE mean over moving tokens.
    Returns the teacher with the student's predictor.
    """
    torch.manual_seed(seed)
    student = VJEPA2Model(CONFIG)
    student.train()
    student.encoder.embeddings.requires_grad_(False)
    teacher = copy.deepcopy(student.encoder).requires_grad_(False).eval()
    # Projects to the first depth; the predictor's own projection is for the last.
    first = torch.nn.Linear(CONFIG.pred_hidden_size, CONFIG.hidden_size)
    side, tubelets = CONFIG.crop_size // CONFIG.patch_size, CONFIG.frames_per_clip // CONFIG.tubelet_size

    def loss(generator: torch.Generator, step: int) -> torch.Tensor:
        chosen = torch.randint(len(clips.frames), (BATCH,), generator=generator)
        depth = WINDOW_TUBELETS[int(torch.randint(len(WINDOW_TUBELETS), (1,), generator=generator))]
        start = CONFIG.tubelet_size * int(torch.randint(tubelets - depth + 1, (1,), generator=generator))
        pixels = preprocess(clips.frames[chosen], CONFIG.crop_size)[:, start : start + CONFIG.tubelet_size * depth]
        future = bool(torch.rand(1, generator=generator) < FUTURE_SHARE)
        kept, hidden = draw_masks(BATCH, depth, side, future, generator)
        with torch.no_grad():
            target = torch.cat([_norm(teacher.embeddings(pixels)), _norm(teacher(pixels).last_hidden_state)], -1)
        tokens = _predict(student, encode_kept(student, pixels, kept), kept, hidden, int(future))
        predicted = torch.cat([first(tokens), student.predictor.proj(tokens)], -1)
        ids = torch.cat([kept, hidden], 1)
        error = (predicted - target.gather(1, ids.unsqueeze(-1).expand_as(predicted))).abs().mean(-1)
        moving = moving_places(pixels).gather(1, ids)
        visible = kept.shape[1]
        hidden_loss = _motion_weighted_mean(error[:, visible:], moving[:, visible:])
        return hidden_loss + VISIBLE_WEIGHT * _motion_weighted_mean(error[:, :visible], moving[:, :visible])

    def update_teacher(step: int) -> None:
        decay = TEACHER_DECAY[0] + (TEACHER_DECAY[1] - TEACHER_DECAY[0]) * step / steps
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.encoder.parameters()), 1 - decay)

    models = torch.nn.ModuleList([student, first, teacher])
    fit("physics encoder", models, loss, steps, PEAK_LEARNING_RATE, seed, checkpoints, update_teacher, 0.04)
    student.encoder.load_state_dict(teacher.state_dict())
    return student.eval().requires_grad_(True)


def _norm(features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features, features.shape[-1:])


def _motion_weighted_mean(error: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the means over moving and over still tokens; the counts are offset by one, as they may be 0."""
    means = [(error * w).sum() / (w.sum() + 1) for w in (moving.float(), (~moving).float())]
    return MOVING_SHARE * means[0] + (1 - MOVING_SHARE) * means[1]


def _predict(
    model: VJEPA2Model, context: torch.Tensor, kept: torch.Tensor, hidden: torch.Tensor, mask_index: int
) -> torch.Tensor:
    """The model's predictor up to its output projection, on an already masked context (`forward` would mask it again).

    Returns (B, kept + hidden, C): the visible tokens, then the hidden ones.
    """
    predictor = model.predictor
    embeddings, ids = predictor.embeddings(context, [kept], [hidden], mask_index)
    for layer in predictor.layer:
        embeddings = layer(embeddings, ids)[0]
    return predictor.layernorm(embeddings)


@torch.no_grad()
def probe(model: VJEPA2Model, train: Clips, test: Clips) -> dict[str, float]:
    """R2 on `test` of a linear probe (`StateProbe`) from a tubelet's features to the body's x, y, vx, vy.

    Excludes clips with two bodies, and tubelets in which the body is hidden or out of the picture.
    """
    z, states, _ = _probe_data(model, test)
    r2 = r2_scores(StateProbe.fit(*_probe_data(model, train)).read(z), states)
    return dict(zip(STATE, r2.tolist(), strict=True))


def _probe_data(model: VJEPA2Model, clips: Clips) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (M, side * side * D), targets (M, 4) and clip indices (M,) of the tubelets that show the body."""
    encoder = PhysicsEncoder(model)
    features, targets, owners = [], [], []
    with track("probe features", len(clips.frames), "clips") as bar:
        for start in range(0, len(clips.frames), 8):
            window = slice(start, start + 8)
            z = encoder.encode(clips.frames[window])
            state, seen = of_tubelets(clips.states[window], clips.visible[window], z.shape[2])
            seen = seen & (clips.bodies[window, None] == 1)
            owner = torch.arange(start, start + len(z))[:, None].expand_as(seen)
            features.append(tokens_of_tubelets(z)[seen])
            targets.append(state[seen])
            owners.append(owner[seen])
            bar.advance(len(z))
    return torch.cat(features), torch.cat(targets), torch.cat(owners)
