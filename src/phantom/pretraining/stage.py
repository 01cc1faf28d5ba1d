"""`phantom pretrain`: trains the small frozen parts, evaluates them on held-out clips, and records provenance."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5EncoderModel, VJEPA2Model

from phantom.pretraining import clips as drawn
from phantom.pretraining import physics_encoder, vae, video_model
from phantom.pretraining.clips import Clips
from phantom.progress import quiet_loading, say

CLIPS, HELDOUT_CLIPS = 1500, 252
AGREEMENT_CAPTIONS = 96
VAE_STEPS, PHYSICS_ENCODER_STEPS, VIDEO_MODEL_STEPS = 3400, 2500, 6000
COMMAND = "phantom pretrain"


@quiet_loading()
def pretrain(
    out: Path = Path("models/mini"), seed: int = 0, work: Path = Path("checkpoints/pretrain")
) -> dict[str, Any]:
    """Trains VAE, V-JEPA 2, text encoder and video model, and writes them to `out` with `provenance.json`.

    Finished parts are kept under `work` with their recipes; a later run trains only parts that are missing or whose
    recipe changed. `out` is replaced at the end. Returns the provenance.
    """
    train = drawn.draw(CLIPS, drawn.TRAINING_SEED + seed, "training")
    held = drawn.draw(HELDOUT_CLIPS, drawn.HELDOUT_SEED + seed, "held-out")
    recipe = {"seed": seed, "training_clips": _digest(train), "heldout_clips": _digest(held)}

    auto = _train_or_reuse(work, "vae", {**recipe, "steps": VAE_STEPS}, lambda: [vae.train_vae(train, VAE_STEPS, seed)])
    encoder = _train_or_reuse(
        work,
        "physics_encoder",
        {**recipe, "steps": PHYSICS_ENCODER_STEPS},
        lambda: [physics_encoder.train_physics_encoder(train, PHYSICS_ENCODER_STEPS, seed)],
    )
    latents = video_model.encode_clips(AutoencoderKLWan.from_pretrained(auto), train)
    video = _train_or_reuse(
        work,
        "video_model",
        {**recipe, "steps": VIDEO_MODEL_STEPS, "vae": _digest_folder(auto)},
        lambda: list(video_model.train_video_model(latents, train.captions, VIDEO_MODEL_STEPS, seed)),
    )

    new = work / "mini.new"
    shutil.rmtree(new, ignore_errors=True)
    pipeline = WanPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=UMT5EncoderModel.from_pretrained(video / "UMT5EncoderModel"),
        transformer=WanTransformer3DModel.from_pretrained(video / "WanTransformer3DModel"),
        vae=AutoencoderKLWan.from_pretrained(auto),
        scheduler=video_model.scheduler(),
        expand_timesteps=True,
    )
    pipeline.save_pretrained(new)
    shutil.copytree(encoder, new / "physics_encoder")
    provenance = {
        "command": COMMAND,
        **recipe,
        "clips": {"training": CLIPS, "heldout": HELDOUT_CLIPS, "frames": drawn.FRAMES, "fps": 4, "size": 64},
        "steps": {"vae": VAE_STEPS, "physics_encoder": PHYSICS_ENCODER_STEPS, "video_model": VIDEO_MODEL_STEPS},
        "heldout": _measure(pipeline, VJEPA2Model.from_pretrained(encoder), train, held, seed),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "sha256": {str(p.relative_to(new)): _sha256(p) for p in sorted(new.rglob("*.safetensors"))},
    }
    (new / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(new, out)
    return provenance


def _train_or_reuse(work: Path, name: str, recipe: dict[str, Any], make: Callable[[], list[Any]]) -> Path:
    """The folder of a finished part, trained now unless its recipe matches. Several models get a subfolder each."""
    folder, mark = work / name, work / f"{name}.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == recipe:
        say(f"pretrain {name.replace('_', ' ')}: finished before, kept ({folder})")
        return folder
    models = make()
    shutil.rmtree(folder, ignore_errors=True)
    for model in models:
        model.save_pretrained(folder / type(model).__name__ if len(models) > 1 else folder)
    mark.write_text(json.dumps(recipe), encoding="utf-8")
    return folder


def _measure(pipeline: WanPipeline, encoder: VJEPA2Model, train: Clips, held: Clips, seed: int) -> dict[str, Any]:
    """Quality metrics of the parts, on held-out clips."""
    torch.manual_seed(seed + 1)
    untrained = VJEPA2Model(physics_encoder.CONFIG).eval()
    return {
        "vae_psnr_db": round(vae.heldout_psnr(pipeline.vae, held), 2),
        "physics_encoder_probe_r2": _rounded(physics_encoder.probe(encoder.eval(), train, held)),
        "untrained_encoder_probe_r2": _rounded(physics_encoder.probe(untrained, train, held)),
        "video_model_captions": _rounded(
            video_model.caption_agreement(pipeline, held.captions[:AGREEMENT_CAPTIONS], seed)
        ),
    }


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in figures.items()}


def _digest(clips: Clips) -> str:
    """SHA-256 over decoded frames and captions."""
    digest = hashlib.sha256(clips.frames.numpy().tobytes())
    digest.update("\n".join(clips.captions).encode())
    return digest.hexdigest()


def _digest_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(_sha256(path).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
