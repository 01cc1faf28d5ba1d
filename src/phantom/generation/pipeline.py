"""PhantomPipeline: text-, image- and video-to-video with both branches denoised side by side (docs/model.md).

Legend: B videos, F video latents, T = 2F - 1 tubelets, S text tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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

from phantom.config import load_params, preset_path
from phantom.encoders import PhysicsEncoder, TextEncoder, VideoEncoder, first_line
from phantom.encoders.text import pad
from phantom.generation.conditions import BadArgument, Clip, Picture, clips, encode, pictures, prefix
from phantom.generation.schedulers import make_scheduler
from phantom.model import PhantomTransformer3DModel
from phantom.model.export import base_path, read_export_config
from phantom.model.positions import tubelets
from phantom.model.transformer import BlockTextKV
from phantom.progress import quiet_loading

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")


@dataclass
class PhantomPipelineOutput(BaseOutput):
    """`frames` (B, F, H, W, 3), or as `output_type` says; `physics`, if asked for: float32 z (B, C_z, T, h, w)."""

    frames: Any
    physics: torch.Tensor | None = None


class PhantomPipeline(DiffusionPipeline):
    """Generates videos from a prompt, from a prompt and a first frame, or from a prompt and a video to go on from.

    `from_pretrained` takes an export (`models/phantom`), whose frozen parts are loaded from where it says, or a folder
    made by `save_pretrained`, which holds all parts. What a call leaves open is what the model was made for
    (`defaults`).
    """

    # In the order in which a call takes them, so that each makes room for the next; the VAE may come first, too.
    model_cpu_offload_seq = "physics_encoder->text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "physics_latents"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        transformer: PhantomTransformer3DModel,
        scheduler: SchedulerMixin,
        physics_encoder: VJEPA2Model,
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
        """An export, with the arguments of `from_export`; or a saved pipeline, with those of diffusers."""
        if "torch_dtype" in kwargs:  # diffusers' former name
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
        """The export in `folder` on its frozen parts; `base` and `physics_encoder` say where else these may lie.

        The VAE stays float32; the others have `dtype`, or that of the base's files. Raises BadArgument.
        """
        config = read_export_config(folder)
        if config is None:
            raise BadArgument(f"{folder}: no export here; accepted: a folder such as models/phantom")
        where = {}
        for part, given in (("base", base), ("physics_encoder", physics_encoder)):
            found = given or config[f"{part}_id"]
            if found is None:
                raise BadArgument(f"{folder}: config.json names no {part}_id; pass {part}=")
            revision = None if given else config[f"{part}_revision"]
            where[part] = {"pretrained_model_name_or_path": base_path(folder, str(found)), "revision": revision}
        with _loading(f"{folder}: base {where['base']['pretrained_model_name_or_path']!r}"):
            wan = WanTransformer3DModel.from_pretrained(**where["base"], subfolder="transformer", torch_dtype=dtype)
            dtype = dtype or wan.dtype
            vae = AutoencoderKLWan.from_pretrained(**where["base"], subfolder="vae", torch_dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where["base"], subfolder="tokenizer")
            text_encoder = UMT5EncoderModel.from_pretrained(**where["base"], subfolder="text_encoder", dtype=dtype)
            schedule = UniPCMultistepScheduler.load_config(**where["base"], subfolder="scheduler")
            scheduler = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
        with _loading(f"{folder}: physics encoder {where['physics_encoder']['pretrained_model_name_or_path']!r}"):
            encoder = VJEPA2Model.from_pretrained(**where["physics_encoder"], dtype=dtype)
        with _loading(str(folder)):
            transformer = PhantomTransformer3DModel.from_export(
                folder, wan, torch_dtype=dtype, base_revision=where["base"]["revision"]
            )
        for model in (vae, text_encoder, encoder):
            model.eval().requires_grad_(False)
        pipe = cls(tokenizer, text_encoder, vae, transformer, scheduler, encoder)
        if "flow_shift" in pipe.stated:
            pipe.scheduler = make_scheduler(pipe.defaults["scheduler"], pipe.defaults["flow_shift"])
        return pipe

    @property
    def defaults(self) -> dict[str, Any]:
        """What the model is for: frames, height, width, fps, max_prefix_frames, text_tokens, and how to sample it.

        As its metadata states them, at the top or under `sampling`; what it leaves open is as in the paper's preset.
        """
        return {**_paper(), **self.stated}

    @property
    def stated(self) -> dict[str, Any]:
        """What the model's metadata says of it."""
        metadata = self.transformer.config.metadata or {}
        return {**metadata, **metadata.get("sampling", {})}

    @property
    def num_timesteps(self) -> int:
        """Of the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to leave out the steps that are left."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        video: Clip | Sequence[Clip] | None = None,
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
        """Videos of `num_frames` frames that begin with what is given.

        Args:
            prompt, negative_prompt: one, or one for each video of a batch.
            image: the first frame, of any size and colours; one, or one for each prompt.
            video: frames to go on from; one clip, or one for each prompt. The longest 4m + 1 of its last frames, up to
                the model's `max_prefix_frames`, become the first of the result.
            guidance_scale, physics_guidance_scale: of the text, on each modality's velocity; off at 1 or less.
            modality_guidance_scale: of each modality by the other, against a pass with the coupling off; off at 1.
            generator: one for the batch, or one for each video, which then does not depend on what it is batched with.
            physics: False runs the frozen video branch alone: the base model, from the same noise.
            output_type: np (B, F, H, W, 3) in [0, 1]; pt (B, F, 3, H, W) in [0, 1]; uint8, as np; pil; latent, the
                normalised latents (B, C_v, F, h, w).
            return_physics: also the generated latent physical states.
            callback_on_step_end: diffusers' callback, on tensors out of `latents`, `physics_latents`.

        Raises BadArgument, which is a ValueError and a UserError.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        stated = self.defaults
        height = stated["height"] if height is None else height
        width = stated["width"] if width is None else width
        num_frames = stated["frames"] if num_frames is None else num_frames
        steps = stated["steps"] if num_inference_steps is None else num_inference_steps
        scale = stated["guidance_scale"] if guidance_scale is None else guidance_scale
        scale_z = stated["physics_guidance_scale"] if physics_guidance_scale is None else physics_guidance_scale
        prompts = _texts("prompt", prompt)
        negatives = _texts("negative_prompt", stated["negative_prompt"] if negative_prompt is None else negative_prompt)
        batch = len(prompts) * num_videos_per_prompt
        self._check_size(height, width, num_frames, given=image is not None or video is not None)
        for wrong, message in (
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
            if wrong:
                raise BadArgument(message)
        conditions = pictures(image, len(prompts)) or clips(video, len(prompts))
        self._interrupt = self._apart = False
        device, dtype = self._execution_device, self.transformer.dtype

        # The video's noise is drawn first: the same with physics and without.
        shape_v, shape_z = self._shapes(batch, num_frames, height, width)
        latents = randn_tensor(shape_v, generator, device, torch.float32)
        physics_latents = randn_tensor(shape_z, generator, device, torch.float32) if physics else None
        longest = min(stated["max_prefix_frames"], num_frames - self.vae.config.scale_factor_temporal)
        known = None
        if conditions:
            encoders = VideoEncoder(self.vae, device), PhysicsEncoder(self.physics_encoder, device)
            frames = [prefix(clip, height, width, longest) for clip in conditions]
            known = encode(frames, *encoders, latents, physics_latents)
            latents, physics_latents = known.impose(latents, physics_latents)

        # What is constant over the steps is computed once: the text's embeddings, and all that the blocks make of them.
        passes = ["prompt"]
        embedded = {"prompt": self._embed(prompts, batch, device)}
        if scale > 1 or (physics and scale_z > 1):
            passes.append("negative")
            embedded["negative"] = self._embed(negatives, batch, device)
        if physics and modality_guidance_scale != 1:
            passes.append("alone")
            embedded["alone"] = embedded["prompt"]
        text = torch.cat([embedded[name] for name in passes]).to(device, dtype)
        text = self.transformer.encode_text(text)
        coupling = torch.tensor([name != "alone" for name in passes], device=device).repeat_interleave(batch)

        self.scheduler.set_timesteps(steps, device=device)
        self.scheduler.set_begin_index(0)
        physics_scheduler = copy.deepcopy(self.scheduler)  # each remembers the velocities of its own modality
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                time = torch.where(known.given, 0.0, t) if known else t.expand(batch)
                velocity, velocity_z = self._velocities(
                    len(passes),
                    torch.cat([latents] * len(passes)).to(dtype),
                    None if physics_latents is None else torch.cat([physics_latents] * len(passes)).to(dtype),
                    torch.cat([time] * len(passes)),
                    text,
                    coupling if "alone" in passes else True,
                )
                velocity = guided(velocity, passes, scale, modality_guidance_scale)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if physics_latents is not None:
                    velocity_z = guided(velocity_z, passes, scale_z, modality_guidance_scale)
                    physics_latents = physics_scheduler.step(velocity_z, t, physics_latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "physics_latents": physics_latents}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, chosen)
                    latents = changed.get("latents", latents)
                    physics_latents = changed.get("physics_latents", physics_latents)
                if known:
                    latents, physics_latents = known.impose(latents, physics_latents)
                bar.update()

        out = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return PhantomPipelineOutput(out, physics_latents if return_physics else None)

    def _check_size(self, height: int, width: int, num_frames: int, given: bool) -> None:
        """Raises BadArgument, naming the nearest valid size, for what the strides do not divide."""
        config, patch = self.vae.config, self.transformer.config.video["patch_size"]
        m = config.scale_factor_temporal
        least = 1 + m if given else 1  # something must be left to generate
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

    def _shapes(self, batch: int, num_frames: int, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the latents of both modalities."""
        vae, encoder = self.vae.config, self.physics_encoder.config
        frames, stride = (num_frames - 1) // vae.scale_factor_temporal + 1, vae.scale_factor_spatial
        side = encoder.crop_size // encoder.patch_size
        return (
            (batch, vae.z_dim, frames, height // stride, width // stride),
            (batch, encoder.hidden_size, tubelets(frames), side, side),
        )

    def _velocities(self, passes: int, *inputs: Any) -> tuple[torch.Tensor, Any]:
        """Of both modalities, (passes x B, ...): all passes side by side, or one by one where memory is short."""
        if not self._apart:
            try:
                return self.transformer(*inputs, return_dict=False)
            except torch.OutOfMemoryError:
                if passes == 1:
                    raise
                self._apart = True
            empty_device_cache()
            logger.warning("memory does not suffice for all passes of a step at once: they run one after the other")

        def part(given: Any, i: int) -> Any:
            if isinstance(given, BlockTextKV):
                return BlockTextKV(*(part(one, i) for one in given))
            if isinstance(given, tuple):
                return tuple(part(one, i) for one in given)
            return given.chunk(passes)[i] if isinstance(given, torch.Tensor) else given

        found = [self.transformer(*(part(x, i) for x in inputs), return_dict=False) for i in range(passes)]
        velocities, velocities_z = zip(*found, strict=True)
        return torch.cat(velocities), velocities_z[0] if velocities_z[0] is None else torch.cat(velocities_z)

    def _embed(self, texts: list[str], batch: int, device: torch.device) -> torch.Tensor:
        """(batch, S, text_dim): each text for as many videos as fall to it."""
        tokens = self.defaults["text_tokens"]
        embeddings = TextEncoder(self.tokenizer, self.text_encoder, tokens, device).encode(texts)
        return pad(embeddings, tokens).repeat_interleave(batch // len(texts), 0)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Latents -> frames of `output_type`."""
        pixels = VideoEncoder(self.vae, latents.device).pixels(latents)
        if output_type != "uint8":
            return self.video_processor.postprocess_video(pixels, output_type)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def guided(velocity: torch.Tensor, passes: list[str], scale: float, modality_scale: float) -> torch.Tensor:
    """Velocities of all passes, side by side -> the velocity to follow, float32.

    v + (scale - 1) (v - v_negative) + (modality_scale - 1) (v - v_alone): away from what the model would do without the
    prompt, and without the other modality.
    """
    by_pass = dict(zip(passes, velocity.float().chunk(len(passes)), strict=True))
    v = out = by_pass["prompt"]
    if "negative" in by_pass:
        out = out + (max(scale, 1.0) - 1) * (v - by_pass["negative"])
    if "alone" in by_pass:
        out = out + (modality_scale - 1) * (v - by_pass["alone"])
    return out


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """A part that cannot be loaded is a BadArgument that begins with `what`."""
    try:
        with quiet_loading():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        line = first_line(error)
        raise BadArgument(line if line.startswith(what) else f"{what}: {line}") from None


@cache
def _paper() -> dict[str, Any]:
    params = load_params(preset_path("wan2.2-ti2v-5b"))
    return {
        **params.data.model_dump(include={"frames", "height", "width", "fps"}),
        **params.encode.model_dump(include={"max_prefix_frames", "text_tokens"}),
        **params.evaluate.sampling.model_dump(),
    }


def _texts(name: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BadArgument(f"{name}: found {type(given).__name__}; accepted: a text, or a list of texts")
    return list(texts)
