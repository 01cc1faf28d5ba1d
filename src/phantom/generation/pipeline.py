"""PhantomPipeline: text-, image- and video-to-video generation with both branches denoised jointly (docs/model.md).

Legend: B videos, F latent frames of the video, T tubelets, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import empty_device_cache, randn_tensor
from diffusers.video_processor import VideoProcessor
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel, VJEPA2Model

from phantom.encoders import PhysicsEncoder, TextEncoder, VideoEncoder, first_line
from phantom.encoders.text import pad
from phantom.encoders.vjepa import load_vjepa
from phantom.generation.conditions import (
    BadArgument,
    ImageInput,
    VideoInput,
    condition_frames,
    encode_conditions,
    image_conditions,
    video_conditions,
)
from phantom.generation.guidance import apply_guidance
from phantom.generation.schedulers import make_scheduler, shifted_copy
from phantom.model import PhantomTransformer3DModel
from phantom.model.export import base_path, read_export_config
from phantom.model.positions import tubelets
from phantom.model.transformer import BlockTextKV
from phantom.progress import quiet_loading

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")

# Defaults for models whose metadata states none: the paper's clips, and the sampler settings of Wan2.2-TI2V-5B. They
# agree with the preset wan2.2-ti2v-5b.
PAPER_DEFAULTS: dict[str, Any] = {
    "frames": 121,
    "height": 480,
    "width": 832,
    "fps": 24,
    "max_prefix_frames": 45,
    "text_tokens": 512,
    "steps": 50,
    "guidance_scale": 5.0,
    "physics_guidance_scale": 1.0,
    "flow_shift": 5.0,
    "scheduler": "unipc",
    "negative_prompt": "",
}


@dataclass
class PhantomPipelineOutput(BaseOutput):
    """`frames` (B, frames, H, W, 3), or as set by `output_type`; `physics`: float32 z (B, C_z, T, h, w), on request."""

    frames: Any
    physics: torch.Tensor | None = None


class PhantomPipeline(DiffusionPipeline):
    """Generates videos from a prompt, from a prompt and a first frame, or from a prompt and a video to continue.

    A model with LoRA adapters in place of a physics branch is denoised alone.

    `from_pretrained` loads an export (`models/phantom`) together with the frozen models it names, or a folder written
    by `save_pretrained`, which holds all components. Arguments that a call omits are taken from `defaults`.
    """

    _optional_components = ["physics_encoder"]  # a model with LoRA adapters has no physics branch
    # The order of use within a call, so that each component makes room for the next. The VAE also encodes conditions.
    model_cpu_offload_seq = "physics_encoder->text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "physics_latents"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        transformer: PhantomTransformer3DModel,
        scheduler: SchedulerMixin,
        physics_encoder: VJEPA2Model | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            physics_encoder=physics_encoder,
        )
        self.video_processor = VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Loads an export (arguments of `from_export`) or a saved pipeline (arguments of diffusers)."""
        if "torch_dtype" in kwargs:  # the former name in diffusers
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if read_export_config(pretrained_model_name_or_path) is not None:
            return cls.from_export(pretrained_model_name_or_path, **kwargs)
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = {"default": kwargs["dtype"], "vae": torch.float32}  # as Wan runs it
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        physics_encoder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads the export in `folder`, its base and its physics encoder.

        `base` and `physics_encoder` override the locations named by the export. The VAE stays float32; the other
        components have `dtype`, by default that of the base's files. Raises BadArgument.
        """
        config = read_export_config(folder)
        if config is None:
            raise BadArgument(f"{folder}: no export here; accepted: a folder such as models/phantom")
        sources = {}
        for part, override in (("base", base), ("physics_encoder", physics_encoder)):
            if part == "physics_encoder" and config["physics"] is None:
                continue
            source = override or config[f"{part}_id"]
            if source is None:
                raise BadArgument(f"{folder}: config.json names no {part}_id; pass {part}=")
            revision = None if override else config[f"{part}_revision"]
            sources[part] = {"pretrained_model_name_or_path": base_path(folder, str(source)), "revision": revision}
        with _load_errors(f"{folder}: base {sources['base']['pretrained_model_name_or_path']!r}"):
            wan = WanTransformer3DModel.from_pretrained(**sources["base"], subfolder="transformer", torch_dtype=dtype)
            dtype = dtype or wan.dtype
            vae = AutoencoderKLWan.from_pretrained(**sources["base"], subfolder="vae", torch_dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**sources["base"], subfolder="tokenizer")
            text_encoder = UMT5EncoderModel.from_pretrained(**sources["base"], subfolder="text_encoder", dtype=dtype)
            schedule = UniPCMultistepScheduler.load_config(**sources["base"], subfolder="scheduler")
            scheduler = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
        encoder = None
        if found := sources.get("physics_encoder"):
            with _load_errors(f"{folder}: physics encoder {found['pretrained_model_name_or_path']!r}"):
                place, revision = found.values()
                encoder = load_vjepa(str(place), revision, dtype, config.get("physics_encoder_random_seed"))
        with _load_errors(str(folder)):
            transformer = PhantomTransformer3DModel.from_export(
                folder, wan, torch_dtype=dtype, base_revision=sources["base"]["revision"]
            )
        for model in (vae, text_encoder):
            model.eval().requires_grad_(False)
        pipe = cls(tokenizer, text_encoder, vae, transformer, scheduler, encoder)
        if "flow_shift" in pipe.metadata:
            pipe.scheduler = make_scheduler(pipe.defaults["scheduler"], pipe.defaults["flow_shift"])
        return pipe

    @property
    def defaults(self) -> dict[str, Any]:
        """Default arguments: frames, height, width, fps, max_prefix_frames, text_tokens, and the sampler settings.

        Those in the model's metadata, otherwise `PAPER_DEFAULTS`.
        """
        return {**PAPER_DEFAULTS, **self.metadata}

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the model's config (see `save_export`), with the entries of `sampling` at the top level."""
        metadata = self.transformer.config.metadata or {}
        return {**metadata, **metadata.get("sampling", {})}

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to skip the remaining steps."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        video: VideoInput | Sequence[VideoInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        physics_guidance_scale: float | None = None,
        modality_guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        physics: bool = True,
        output_type: str = "np",
        return_physics: bool = False,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PhantomPipelineOutput:
        """Generates videos of `num_frames` frames, starting with the condition frames if there are any.

        Args:
            prompt, negative_prompt: one for the batch, or a list with one per video.
            image: the first frame, of any size and colour mode; one, or one per prompt.
            video: frames to continue from; one clip, or one per prompt. Its last 4m + 1 frames, at most the model's
                `max_prefix_frames`, become the first frames of the result.
            guidance_scale, physics_guidance_scale: text guidance of each modality's velocity; off at 1 or below.
            modality_guidance_scale: guidance of each modality by the other, relative to a pass without the coupling;
                off at 1.
            generator: one for the batch, or one per video, which makes each video independent of the rest of its batch.
            physics: False runs the frozen base alone, without physics branch or adapters, from the same noise.
            output_type: np (B, frames, H, W, 3) in [0, 1]; pt (B, frames, 3, H, W) in [0, 1]; uint8, shaped as np; pil;
                latent, the normalised latents (B, C_v, F, h, w).
            return_physics: also return the generated latent physical states, standardised if the model's are.
            callback_on_step_end: callback as in diffusers, for the tensors `latents` and `physics_latents`.

        Raises BadArgument, which is a ValueError and a UserError.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        defaults = self.defaults
        height = defaults["height"] if height is None else height
        width = defaults["width"] if width is None else width
        num_frames = defaults["frames"] if num_frames is None else num_frames
        steps = defaults["steps"] if num_inference_steps is None else num_inference_steps
        scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        scale_z = defaults["physics_guidance_scale"] if physics_guidance_scale is None else physics_guidance_scale
        negative_prompt = defaults["negative_prompt"] if negative_prompt is None else negative_prompt
        prompts, negatives = _text_list("prompt", prompt), _text_list("negative_prompt", negative_prompt)
        batch = len(prompts) * num_videos_per_prompt
        self._check_size(height, width, num_frames, conditioned=image is not None or video is not None)
        for is_wrong, message in (
            (image is not None and video is not None, "image and video: found both; accepted: one of them"),
            (steps < 1, f"num_inference_steps: found {steps}; accepted: at least 1"),
            (batch < 1, f"found {len(prompts)} x {num_videos_per_prompt} videos to make; accepted: at least 1"),
            (
                len(negatives) not in (1, len(prompts)),
                f"negative_prompt: found {len(negatives)} for {len(prompts)} prompt(s); accepted: one, or one for each",
            ),
            (
                isinstance(generator, list) and len(generator) != batch,
                f"generator: found a list of another length; accepted: one, or one for each of {batch} video(s)",
            ),
            (
                output_type not in OUTPUT_TYPES,
                f"output_type: found {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}",
            ),
            (
                not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs),
                f"callback_on_step_end_tensor_inputs: found {list(callback_on_step_end_tensor_inputs)}; "
                f"accepted: {', '.join(self._callback_tensor_inputs)}",
            ),
        ):
            if is_wrong:
                raise BadArgument(message)
        conditions = image_conditions(image, len(prompts)) or video_conditions(video, len(prompts))
        self._interrupt = self._sequential_passes = False
        trained_parts = nullcontext if physics else self.transformer.base_alone
        physics = physics and self.transformer.has_physics
        device, dtype = self._execution_device, self.transformer.dtype

        # The video noise is drawn first, so that it is the same with and without physics.
        shape_v, shape_z = self._shapes(batch, num_frames, height, width)
        latents = randn_tensor(shape_v, generator, device, torch.float32)
        physics_latents = randn_tensor(shape_z, generator, device, torch.float32) if shape_z and physics else None
        max_frames = min(defaults["max_prefix_frames"], num_frames - self.vae.config.scale_factor_temporal)
        conditioning = None
        if conditions:
            encoders = VideoEncoder(self.vae, device), self._physics_encoder(device), self.transformer.config.physics
            prefixes = [condition_frames(clip, height, width, max_frames) for clip in conditions]
            conditioning = encode_conditions(prefixes, *encoders, latents, physics_latents)
            latents, physics_latents = conditioning.apply(latents, physics_latents)

        # The text embeddings, and the keys and values of all blocks, are constant over the steps: computed once.
        passes = ["prompt"]
        embeddings = {"prompt": self._embed_prompts(prompts, batch, device)}
        if scale > 1 or (physics and scale_z > 1):
            passes.append("negative")
            embeddings["negative"] = self._embed_prompts(negatives, batch, device)
        if physics and modality_guidance_scale != 1:
            passes.append("uncoupled")
            embeddings["uncoupled"] = embeddings["prompt"]
        text = torch.cat([embeddings[name] for name in passes]).to(device, dtype)
        with trained_parts():
            text = self.transformer.encode_text(text)
        coupling = torch.tensor([name != "uncoupled" for name in passes], device=device).repeat_interleave(batch)

        self.scheduler.set_timesteps(steps, device=device)
        self.scheduler.set_begin_index(0)
        # Its own: a multistep solver keeps past velocities per modality, and the noise levels may differ.
        noise_shift = self.transformer.config.physics["noise_shift"] if physics else 1.0
        physics_scheduler = shifted_copy(self.scheduler, noise_shift, steps, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                time = torch.where(conditioning.is_condition, 0.0, t) if conditioning else t.expand(batch)
                with trained_parts():
                    velocity, velocity_z = self._velocities(
                        len(passes),
                        torch.cat([latents] * len(passes)).to(dtype),
                        None if physics_latents is None else torch.cat([physics_latents] * len(passes)).to(dtype),
                        torch.cat([time] * len(passes)),
                        text,
                        coupling if "uncoupled" in passes else True,
                    )
                velocity = apply_guidance(velocity, passes, scale, modality_guidance_scale)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if physics_latents is not None:
                    velocity_z = apply_guidance(velocity_z, passes, scale_z, modality_guidance_scale)
                    t_z = physics_scheduler.timesteps[i]
                    physics_latents = physics_scheduler.step(velocity_z, t_z, physics_latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "physics_latents": physics_latents}
                    requested = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, requested)
                    latents = changed.get("latents", latents)
                    physics_latents = changed.get("physics_latents", physics_latents)
                if conditioning:
                    latents, physics_latents = conditioning.apply(latents, physics_latents)
                bar.update()

        out = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return PhantomPipelineOutput(out, physics_latents if return_physics else None)

    def _check_size(self, height: int, width: int, num_frames: int, conditioned: bool) -> None:
        """Raises BadArgument, naming the nearest valid size, for sizes that the strides do not divide."""
        config, patch = self.vae.config, self.transformer.config.video["patch_size"]
        m = config.scale_factor_temporal
        least = 1 + m if conditioned else 1  # a condition needs at least one latent frame after it
        if num_frames % m != 1 or num_frames < least:
            nearest = max(least, round((num_frames - 1) / m) * m + 1)
            raise BadArgument(
                f"num_frames: found {num_frames}; accepted: {m}m + 1, from {least}; nearest valid: {nearest}"
            )
        for name, size, stride in (("height", height, patch[1]), ("width", width, patch[2])):
            stride *= config.scale_factor_spatial
            if size % stride or size < stride:
                nearest = max(1, round(size / stride)) * stride
                raise BadArgument(f"{name}: found {size}; accepted: multiples of {stride}; nearest valid: {nearest}")

    def _shapes(
        self, batch: int, num_frames: int, height: int, width: int
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Shapes of the latents of both modalities; None for physics without a physics branch."""
        vae, shape_z = self.vae.config, None
        frames, stride = (num_frames - 1) // vae.scale_factor_temporal + 1, vae.scale_factor_spatial
        if self.physics_encoder is not None:
            encoder, per_latent = self.physics_encoder.config, self.transformer.config.physics["tubelets_per_latent"]
            side = encoder.crop_size // encoder.patch_size
            shape_z = batch, encoder.hidden_size, tubelets(frames, per_latent), side, side
        return (batch, vae.z_dim, frames, height // stride, width // stride), shape_z

    def _physics_encoder(self, device: torch.device) -> PhysicsEncoder | None:
        """The encoder of condition frames to z; None without a physics branch."""
        if self.physics_encoder is None:
            return None
        return PhysicsEncoder(self.physics_encoder, device, self.transformer.config.physics["tubelets_per_latent"])

    def _velocities(self, passes: int, *inputs: Any) -> tuple[torch.Tensor, Any]:
        """Velocities of both modalities, (passes x B, ...): in one batch, or pass by pass once memory has run out."""
        if not self._sequential_passes:
            try:
                return self.transformer(*inputs, return_dict=False)
            except torch.OutOfMemoryError:
                if passes == 1:
                    raise
                self._sequential_passes = True
            empty_device_cache()
            logger.warning("out of memory with all passes of a step in one batch: running them sequentially")

        def chunk(value: Any, i: int) -> Any:
            if isinstance(value, BlockTextKV):
                return BlockTextKV(*(chunk(one, i) for one in value))
            if isinstance(value, tuple):
                return tuple(chunk(one, i) for one in value)
            return value.chunk(passes)[i] if isinstance(value, torch.Tensor) else value

        outputs = [self.transformer(*(chunk(x, i) for x in inputs), return_dict=False) for i in range(passes)]
        velocities, velocities_z = zip(*outputs, strict=True)
        return torch.cat(velocities), velocities_z[0] if velocities_z[0] is None else torch.cat(velocities_z)

    def _embed_prompts(self, texts: list[str], batch: int, device: torch.device) -> torch.Tensor:
        """Text embeddings (batch, S, text_dim), each text repeated for its videos."""
        tokens = self.defaults["text_tokens"]
        embeddings = TextEncoder(self.tokenizer, self.text_encoder, tokens, device).encode(texts)
        return pad(embeddings, tokens).repeat_interleave(batch // len(texts), 0)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Latents -> frames as `output_type`."""
        pixels = VideoEncoder(self.vae, latents.device).pixels(latents)
        if output_type != "uint8":
            return self.video_processor.postprocess_video(pixels, output_type)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


@contextmanager
def _load_errors(what: str) -> Iterator[None]:
    """Turns errors of loading into a BadArgument that starts with `what`."""
    try:
        with quiet_loading():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        line = first_line(error)
        raise BadArgument(line if line.startswith(what) else f"{what}: {line}") from None


def _text_list(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BadArgument(f"{name}: found {type(value).__name__}; accepted: a text, or a list of texts")
    return list(texts)
