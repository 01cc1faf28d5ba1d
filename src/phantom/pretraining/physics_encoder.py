"""A small V-JEPA 2, trained by masked latent prediction against an EMA teacher, as V-JEPA 2 is (arXiv 2506.09985)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers import VJEPA2Config, VJEPA2Model

from phantom.encoders.vjepa import PhysicsEncoder, preprocess
from phantom.pretraining.clips import Clips
from phantom.pretraining.loop import fit
from phantom.progress import track

BATCH = 8
PEAK_LEARNING_RATE = 1e-3
TEACHER_DECAY = (0.99, 0.9995)  # from the first step to the last
FUTURE_SHARE = 0.5  # of batches whose mask hides the later frames: only those ask for motion
PROBE_RIDGE = (1e1, 1e2, 1e3, 1e4)

CONFIG = VJEPA2Config(
    patch_size=8,
    crop_size=64,
    frames_per_clip=30,
    tubelet_size=2,
    hidden_size=96,
    num_attention_heads=3,
    num_hidden_layers=4,
    mlp_ratio=4.0,
    pred_hidden_size=64,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=2,
    pred_num_mask_tokens=2,
    pred_zero_init_mask_tokens=False,
)


def draw_masks(
    batch: int, depth: int, side: int, future: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (batch, kept) and (batch, hidden), the same number hidden in every row.

    future: all places from a tubelet on are hidden. Otherwise three quarters of the places are hidden at all times, as
    two overlapping blocks per row completed at random.
    """
    tokens = torch.arange(depth * side * side).view(depth, side, side)
    kept, hidden = [], []
    start = int(torch.randint(depth // 3, depth - 2, (1,), generator=generator))
    for _ in range(batch):
        mask = torch.zeros(depth, side, side, dtype=torch.bool)
        if future:
            mask[start:] = True
        else:
            score = torch.rand(side, side, generator=generator)
            for _ in range(2):
                h, w = torch.randint(side // 2, side - 1, (2,), generator=generator).tolist()
                y = int(torch.randint(side - h + 1, (1,), generator=generator))
                x = int(torch.randint(side - w + 1, (1,), generator=generator))
                score[y : y + h, x : x + w] += 1
            chosen = score.flatten().topk(side * side * 3 // 4).indices
            mask.view(depth, -1)[:, chosen] = True
        kept.append(tokens[~mask])
        hidden.append(tokens[mask])
    return torch.stack(kept), torch.stack(hidden)


def encode_kept(model: VJEPA2Model, pixels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Runs the encoder on the kept tokens only, (B, kept, D): the model's own mask is applied after it has seen all."""
    x = model.encoder.embeddings(pixels)
    x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    for layer in model.encoder.layer:
        x = layer(x, kept)[0]
    return model.encoder.layernorm(x)


def train_physics_encoder(clips: Clips, steps: int, seed: int) -> VJEPA2Model:
    """L1 between the predictor's output at hidden tokens and the teacher's layer-normalised features there."""
    torch.manual_seed(seed)
    student = VJEPA2Model(CONFIG)
    student.train()
    teacher = copy.deepcopy(student.encoder).requires_grad_(False).eval()
    side, depth = CONFIG.crop_size // CONFIG.patch_size, CONFIG.frames_per_clip // CONFIG.tubelet_size

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(clips.frames), (BATCH,), generator=generator)
        pixels = preprocess(clips.frames[chosen], CONFIG.crop_size)
        future = bool(torch.rand(1, generator=generator) < FUTURE_SHARE)
        kept, hidden = draw_masks(BATCH, depth, side, future, generator)
        with torch.no_grad():
            target = F.layer_norm(teacher(pixels).last_hidden_state, (CONFIG.hidden_size,))
            target = target.gather(1, hidden.unsqueeze(-1).expand(-1, -1, CONFIG.hidden_size))
        context = encode_kept(student, pixels, kept)
        predicted = _predict(student, context, kept, hidden, int(future))
        return (predicted - target).abs().mean()

    def update_teacher(step: int) -> None:
        decay = TEACHER_DECAY[0] + (TEACHER_DECAY[1] - TEACHER_DECAY[0]) * step / steps
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.encoder.parameters()), 1 - decay)

    fit("physics encoder", list(student.parameters()), loss, steps, PEAK_LEARNING_RATE, seed, update_teacher, 0.04)
    student.encoder.load_state_dict(teacher.state_dict())
    return student.eval().requires_grad_(True)


def _predict(
    model: VJEPA2Model, context: torch.Tensor, kept: torch.Tensor, hidden: torch.Tensor, mask_index: int
) -> torch.Tensor:
    """The model's own predictor on a context that is already masked. Its `forward` would mask a second time."""
    predictor = model.predictor
    embeddings, ids = predictor.embeddings(context, [kept], [hidden], mask_index)
    for layer in predictor.layer:
        embeddings = layer(embeddings, ids)[0]
    return predictor.proj(predictor.layernorm(embeddings)[:, kept.shape[1] :])


@torch.no_grad()
def probe(model: VJEPA2Model, train: Clips, test: Clips) -> dict[str, float]:
    """R2 on `test` of a linear (ridge) map from a tubelet's features to the first body's x, y, vx, vy there.

    Tubelets in which the body is hidden or outside are left out. The ridge is chosen on a fifth of `train`.
    """
    x, y, owner = _probe_data(model, train)
    x_test, y_test, _ = _probe_data(model, test)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    centre = y.mean(0)
    held = owner % 5 == 0
    best, ridge = -float("inf"), PROBE_RIDGE[0]
    gram, target = x[~held].T @ x[~held], x[~held].T @ (y[~held] - centre)
    for value in PROBE_RIDGE:
        weights = torch.linalg.solve(gram + value * torch.eye(len(gram)), target)
        score = float(_r2(x[held] @ weights + centre, y[held]).mean())
        if score > best:
            best, ridge = score, value
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(len(gram)), x.T @ (y - centre))
    r2 = _r2(x_test @ weights + centre, y_test).tolist()
    return dict(zip(("x", "y", "vx", "vy"), r2, strict=True))


def _probe_data(model: VJEPA2Model, clips: Clips) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (M, side * side * D), targets (M, 4) and clip numbers (M,) of the tubelets that show the body."""
    encoder = PhysicsEncoder(model)
    features, targets, owners = [], [], []
    with track("probe features", len(clips.frames), "clips") as bar:
        for start in range(0, len(clips.frames), 8):
            window = slice(start, start + 8)
            z = encoder.encode(clips.frames[window])[:, :, 1:]  # tubelet 0 is the first frame twice
            state = clips.states[window, 1:].unflatten(1, (-1, 2)).mean(2)
            seen = clips.visible[window, 1:].unflatten(1, (-1, 2)).all(2)
            owner = torch.arange(start, start + len(z))[:, None].expand(-1, z.shape[2])
            features.append(z.permute(0, 2, 1, 3, 4).flatten(2)[seen])
            targets.append(state[seen])
            owners.append(owner[seen])
            bar.advance(len(z))
    return torch.cat(features), torch.cat(targets), torch.cat(owners)


def _r2(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return 1 - (predicted - true).square().sum(0) / (true - true.mean(0)).square().sum(0)
