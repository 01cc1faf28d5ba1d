"""`phantom pretrain`: trains the small frozen parts, evaluates them on held-out clips, and records provenance."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5EncoderModel, VJEPA2Model

from phantom.config import Params, load_params, preset_path
from phantom.data.files import sha256
from phantom.errors import UserError, listed
from phantom.evaluation.model_shapes import load_parts, measure, measure_vae
from phantom.pretraining import clips as drawn
from phantom.pretraining import loop, physics_encoder, vae, video_model
from phantom.pretraining.clips import Clips
from phantom.progress import quiet_loading, say

CLIPS, HELDOUT_CLIPS = 4500, 252
AGREEMENT_CAPTIONS, SHAPE_WORLDS = 96, 72
VAE_STEPS, PHYSICS_ENCODER_STEPS, VIDEO_MODEL_STEPS = 24000, 2500, 24000
COMMAND = "phantom pretrain"
# The folders of each part, in the layout of `models/mini`.
PARTS = {
    "vae": ("vae",),
    "physics_encoder": ("physics_encoder",),
    "video_model": ("transformer", "text_encoder"),
}


@quiet_loading()
def pretrain(
    out: Path = Path("models/mini"),
    seed: int = 0,
    work: Path = Path("checkpoints/pretrain"),
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains VAE, V-JEPA 2, text encoder and video model, and writes them to `out` with `provenance.json`.

    keep: of PARTS, those that are taken from `out` as they are. Checkpoints and finished parts are kept under `work`
    with their recipes: a later run goes on, and trains only parts that are missing or whose recipe has changed. `out`
    is replaced at the end. Returns the provenance. Raises UserError, and Interrupted when stopped after saving.
    """
    _check_keep(out, keep)
    train = drawn.draw(CLIPS, drawn.TRAINING_SEED + seed, "training")
    held = drawn.draw(HELDOUT_CLIPS, drawn.HELDOUT_SEED + seed, "held-out")
    recipe = {"seed": seed, "training_clips": _digest(train)}
    made: dict[str, dict[str, Any]] = {}  # by part, how it was made

    def part(name: str, module: ModuleType, recipe: dict[str, Any], make: Callable[[Path], list[Any]]) -> Path:
        if name in keep:
            made[name] = {"kept": _recipe_of(out, name)}
            return out
        made[name] = {**recipe, "settings": _settings(module)}
        return _train_or_reuse(work, name, made[name], make)

    auto = part(
        "vae",
        vae,
        {**recipe, "steps": VAE_STEPS},
        lambda checkpoints: [vae.train_vae(train, VAE_STEPS, seed, checkpoints)],
    )
    trained_vae = AutoencoderKLWan.from_pretrained(auto / "vae").eval()
    psnr = round(vae.heldout_psnr(trained_vae, held), 2)
    params = load_params(preset_path("mini"))
    kept = measure_vae(trained_vae, params, SHAPE_WORLDS)["vae"]["shape_kept"] or 0.0
    say(f"pretrain vae: {psnr} dB, bodies keep their shape in {kept:.0%} of the frames, which limits the video model")
    encoder = part(
        "physics_encoder",
        physics_encoder,
        {**recipe, "steps": PHYSICS_ENCODER_STEPS},
        lambda checkpoints: [
            physics_encoder.train_physics_encoder(train, PHYSICS_ENCODER_STEPS, seed, checkpoints),
        ],
    )
    video = part(
        "video_model",
        video_model,
        {**recipe, "steps": VIDEO_MODEL_STEPS, "vae": _digest_folder(auto / "vae")},
        lambda checkpoints: list(
            video_model.train_video_model(
                video_model.encode_clips(trained_vae, train), train, VIDEO_MODEL_STEPS, seed, checkpoints
            )
        ),
    )

    new = work / "mini.new"
    pipeline = _assemble(trained_vae, video, encoder, new)
    provenance = {
        "command": COMMAND,
        "parts": made,
        "heldout_clips": _digest(held),
        "clips": {"training": CLIPS, "heldout": HELDOUT_CLIPS, "frames": drawn.FRAMES, "fps": 4, "size": 64},
        "heldout": {"vae_psnr_db": psnr, **_measure(pipeline, new, params, train, held, seed)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "sha256": {str(p.relative_to(new)): sha256(p) for p in sorted(new.rglob("*.safetensors"))},
    }
    (new / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(new, out)
    return provenance


def _check_keep(out: Path, keep: Sequence[str]) -> None:
    """Raises UserError for parts that do not exist, or cannot be kept alone."""
    if unknown := sorted(set(keep) - PARTS.keys()):
        raise UserError(f"--keep: found {listed(unknown)}, accepted: {', '.join(PARTS)}")
    if "video_model" in keep and "vae" not in keep:
        raise UserError("--keep: found video_model without vae, accepted: with it, whose latents it is trained on")
    for folder in (out / name for part in keep for name in PARTS[part]):
        if not folder.is_dir():
            raise UserError(f"--keep: found no {folder}; accepted: parts that {out} has")


def _assemble(trained_vae: AutoencoderKLWan, video: Path, encoder: Path, new: Path) -> WanPipeline:
    """The parts in the layout of `models/mini`, written to the folder `new`."""
    shutil.rmtree(new, ignore_errors=True)
    pipeline = WanPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=UMT5EncoderModel.from_pretrained(video / "text_encoder"),
        transformer=WanTransformer3DModel.from_pretrained(video / "transformer"),
        vae=trained_vae,
        scheduler=video_model.scheduler(),
        expand_timesteps=True,
    )
    pipeline.save_pretrained(new)
    shutil.copytree(encoder / "physics_encoder", new / "physics_encoder")
    return pipeline


def _train_or_reuse(work: Path, name: str, recipe: dict[str, Any], make: Callable[[Path], list[Any]]) -> Path:
    """A folder with the models of a finished part, trained now unless its recipe matches.

    make: trains them, in the order of PARTS, with checkpoints in the folder it is given.
    """
    folder, mark = work / name, work / f"{name}.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == recipe:
        say(f"pretrain {name.replace('_', ' ')}: finished before, kept ({folder})")
        return folder
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    checkpoints = work / "steps" / name / key
    for old in checkpoints.parent.glob("*"):
        if old != checkpoints:  # of another recipe
            shutil.rmtree(old)
    models = make(checkpoints)
    shutil.rmtree(folder, ignore_errors=True)
    for model, part in zip(models, PARTS[name], strict=True):
        model.save_pretrained(folder / part)
    mark.write_text(json.dumps(recipe), encoding="utf-8")
    shutil.rmtree(checkpoints.parent, ignore_errors=True)  # none, if it took less than the time of one
    return folder


def _measure(
    pipeline: WanPipeline, folder: Path, params: Params, train: Clips, held: Clips, seed: int
) -> dict[str, Any]:
    """Quality metrics of the parts in `folder`, on held-out clips and worlds."""
    torch.manual_seed(seed + 1)
    untrained = VJEPA2Model(physics_encoder.CONFIG).eval()
    encoder = VJEPA2Model.from_pretrained(folder / "physics_encoder").eval()
    return {
        "physics_encoder_probe_r2": _rounded(physics_encoder.probe(encoder, train, held)),
        "untrained_encoder_probe_r2": _rounded(physics_encoder.probe(untrained, train, held)),
        "video_model_captions": _rounded(
            video_model.caption_agreement(pipeline, held.captions[:AGREEMENT_CAPTIONS], seed)
        ),
        "shapes": {
            name: _rounded(found) if isinstance(found, dict) else found
            for name, found in measure(load_parts(folder, params), params, SHAPE_WORLDS).items()
        },
    }


def _rounded(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 3) for key, value in figures.items()}


def _recipe_of(out: Path, part: str) -> dict[str, Any]:
    """How a part of `out` was made, by its provenance; empty if it has none."""
    file = out / "provenance.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found.get("parts", {}).get(part) or {
        key: found[key] for key in ("seed", "training_clips", "steps") if key in found
    }


def _settings(module: ModuleType) -> str:
    """SHA-256 over the constants that a part is trained with, so that a change of them trains it anew."""
    constants = [
        (key, str(value))
        for one in (loop, module)
        for key, value in sorted(vars(one).items())
        if key.isupper() and not isinstance(value, ModuleType)
    ]
    return hashlib.sha256(json.dumps(constants).encode()).hexdigest()


def _digest(clips: Clips) -> str:
    """SHA-256 over decoded frames and captions."""
    digest = hashlib.sha256(clips.frames.numpy().tobytes())
    digest.update("\n".join(clips.captions).encode())
    return digest.hexdigest()


def _digest_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(sha256(path).encode())
    return digest.hexdigest()
