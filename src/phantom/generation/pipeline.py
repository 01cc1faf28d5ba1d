"""PhantomPipeline: text-, image- and video-to-video generation with both branches denoised jointly (docs/model.md).

Legend: B videos, F latent frames of the video, T tubelets, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel, VJEPA2Model

from phantom.config import Refine
from phantom.encoders import PhysicsEncoder, TextEncoder, VideoEncoder
from phantom.encoders.text import pad
from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt
from phantom.generation.arguments import (
    BadArgument,
    check_counts,
    check_names,
    check_shape,
    check_size,
    check_texts,
    count_prompts,
    texts,
)
from phantom.generation.conditions import (
    ImageInput,
    VideoInput,
    condition_frames,
    encode_conditions,
    encode_force,
    image_conditions,
    video_conditions,
)
from phantom.generation.guidance import apply_guidance
from phantom.generation.loading import COMPONENTS, Dtype, component_dtypes, load_components, load_errors
from phantom.generation.passes import Passes
from phantom.generation.refinement import FurtherNoise, Refinement
from phantom.generation.running_call import RunningCall
from phantom.generation.schedulers import make_scheduler, restart, shifted_copy
from phantom.model import PhantomTransformer3DModel
from phantom.model.hub import HUB_ARGUMENTS, export_folder, one_device
from phantom.model.positions import tubelets

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
    "modality_guidance_scale": 1.0,
    "refine": None,
}


@dataclass
class PhantomPipelineOutput(BaseOutput):
    """`frames` (B, frames, H, W, 3), or as set by `output_type`; `physics`: float32 z (B, C_z, T, h, w), on request."""

    frames: Any
    physics: torch.Tensor | None = None


class PhantomPipeline(RunningCall, DiffusionPipeline, WanLoraLoaderMixin):
    """Generates videos from a prompt, from a prompt and a first frame, or from a prompt and a video to continue.

    A model with LoRA adapters in place of a physics branch is denoised alone.

    `from_pretrained` loads an export (`models/phantom`) together with the frozen models it names, or a folder written
    by `save_pretrained`, which holds all components. Arguments that a call omits are taken from `defaults`.
    """

    _optional_components = ["physics_encoder"]  # a model with LoRA adapters has no physics branch
    # The order of use within a call, so that each component makes room for the next. The VAE also encodes conditions.
    model_cpu_offload_seq = "physics_encoder->text_encoder->transformer->vae"
    _lora_loadable_modules = ["transformer"]
    _callback_tensor_inputs = ["latents", "physics_latents", "prompt_embeds", "negative_prompt_embeds"]

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
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Loads an export (arguments of `from_export`) or a saved pipeline (arguments of diffusers)."""
        if "torch_dtype" in kwargs:  # the former name in diffusers
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        at = {name: kwargs[name] for name in ("subfolder", "revision", *HUB_ARGUMENTS) if name in kwargs}
        with load_errors(str(pretrained_model_name_or_path)):
            found = export_folder(pretrained_model_name_or_path, **at)
        if found is not None:
            return cls.from_export(pretrained_model_name_or_path, **kwargs)
        if isinstance(kwargs.get("dtype"), torch.dtype | dict):
            kwargs["dtype"] = component_dtypes(kwargs["dtype"])
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        physics_encoder: str | Path | VJEPA2Model | None = None,
        dtype: Dtype = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        device_map: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads the export `folder`, a folder or hub id, its base and its physics encoder.

        `base` and `physics_encoder` override the locations named by the export. `dtype` is that of all components but
        the VAE, which stays float32, or a dict by component and `default`; without it, that of the base's files.
        `subfolder` and `revision` are those of the export, `variant` that of the base's files; `device_map` names one
        device. `kwargs` are components to use in place of those named, and `token`, `cache_dir`, `local_files_only` and
        `force_download`, for everything that comes from the hub. Raises BadArgument.
        """
        accepted = (*HUB_ARGUMENTS, *COMPONENTS)
        if unknown := [name for name in kwargs if name not in accepted]:
            raise BadArgument(f"{folder}: found {unknown[0]}; accepted for an export: {', '.join(accepted)}")
        given = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
        if isinstance(physics_encoder, VJEPA2Model):
            given["physics_encoder"], physics_encoder = physics_encoder, None
        with load_errors(str(folder)):
            device = one_device(device_map)
            found = export_folder(folder, subfolder, revision, **kwargs)
        if found is None:
            raise BadArgument(f"{folder}: no export here; accepted: a folder such as models/phantom")
        pipe = cls(**load_components(found, base, physics_encoder, dtype, given, variant, kwargs))
        if device is not None:
            pipe.to(device)
        if "flow_shift" in pipe.metadata and "scheduler" not in given:
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

    def check_inputs(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        height: int,
        width: int,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        *,
        num_frames: int,
        image: Any = None,
        video: Any = None,
        num_inference_steps: int = 1,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
    ) -> None:
        """Raises BadArgument for arguments of a call that do not fit the model or each other."""
        _, rows, columns = self.transformer.config.video["patch_size"]
        space = self.vae_scale_factor_spatial
        strides = self.vae_scale_factor_temporal, space * rows, space * columns
        check_size(height, width, num_frames, strides, conditioned=image is not None or video is not None)
        if image is not None and video is not None:
            raise BadArgument("image and video: found both; accepted: one of them")
        text_dim = self.transformer.config.video["text_dim"]
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, text_dim)
        prompts = count_prompts(prompt, prompt_embeds)
        check_counts(prompts, num_videos_per_prompt, num_inference_steps, max_sequence_length, generator)
        check_names(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text embeddings (prompts x num_videos_per_prompt, S, text_dim) of the prompts and the negative prompts.

        The latter are None without guidance. Embeddings that are passed are repeated for each video of their prompt.
        S is `max_sequence_length`, by default that of the embeddings that are passed, or the length in `defaults`:
        shorter texts are padded with zeros, longer ones are cut. They have the device and dtype of the transformer
        unless others are given. Raises BadArgument.
        """
        given = [embeds.shape[1] for embeds in (prompt_embeds, negative_prompt_embeds) if embeds is not None]
        tokens = max_sequence_length or [*given, self.defaults["text_tokens"]][0]
        device, dtype = device or self._execution_device, dtype or self.transformer.dtype
        videos = count_prompts(prompt, prompt_embeds) * num_videos_per_prompt

        def encode(name: str, text: str | Sequence[str] | None, embeds: torch.Tensor | None) -> torch.Tensor:
            if embeds is None:
                encoder = TextEncoder(self.tokenizer, self.text_encoder, tokens, device)
                embeds = pad(encoder.encode(texts(name, "" if text is None else text)), tokens)
            return embeds.repeat_interleave(max(1, videos // len(embeds)), 0).to(device, dtype)

        prompt_embeds = encode("prompt", prompt, prompt_embeds)
        if not do_classifier_free_guidance:
            return prompt_embeds, None
        negative_prompt_embeds = encode("negative_prompt", negative_prompt, negative_prompt_embeds)
        check_shape("negative_prompt_embeds", negative_prompt_embeds, tuple(prompt_embeds.shape))
        return prompt_embeds, negative_prompt_embeds

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        physics_latents: torch.Tensor | None = None,
        physics: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noise of both modalities (B, C_v, F, h, w) and (B, C_z, T, h', w'), or what is passed in its place.

        Sizes are those of the video; `num_channels_latents` is C_v. Physics is None without a physics branch, or if
        `physics` is False. float32 and the device that computes by default. Raises BadArgument for other shapes.
        """
        device, dtype = device or self._execution_device, dtype or torch.float32
        frames, stride = (num_frames - 1) // self.vae_scale_factor_temporal + 1, self.vae_scale_factor_spatial
        shape = batch_size, num_channels_latents, frames, height // stride, width // stride
        # The video noise is drawn first, so that it is the same with and without physics.
        drawn = _noise_or("latents", latents, shape, generator, device, dtype)
        if not physics or self.physics_encoder is None:
            return drawn, None
        encoder, per_latent = self.physics_encoder.config, self.transformer.config.physics["tubelets_per_latent"]
        side = encoder.crop_size // encoder.patch_size
        shape = batch_size, encoder.hidden_size, tubelets(frames, per_latent), side, side
        return drawn, _noise_or("physics_latents", physics_latents, shape, generator, device, dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        video: VideoInput | Sequence[VideoInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        physics_guidance_scale: float | None = None,
        modality_guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        physics: bool = True,
        output_type: str = "np",
        return_physics: bool = False,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        latents: torch.Tensor | None = None,
        physics_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        refine: Refine | Literal[False] | None = None,
        force: ForcePrompt | Sequence[ForcePrompt | None] | None = None,
    ) -> Any:
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
            callback_on_step_end: callback as in diffusers, for the tensors `latents`, `physics_latents`,
                `prompt_embeds` and `negative_prompt_embeds`. It may change the guidance of later steps.
            latents, physics_latents: noise to start from, in place of what `generator` draws (`prepare_latents`).
            prompt_embeds, negative_prompt_embeds: text embeddings in place of the texts (`encode_prompt`).
            max_sequence_length: text tokens, by default as many as in training.
            attention_kwargs: `scale`: factor of all LoRA adapters.
            return_dict: `PhantomPipelineOutput`; False returns a tuple, (frames,) or (frames, physics).
            refine: self-refinement of both modalities (`generation.refinement`); False: none, whatever the default is.
            force: pushes and wind (`phantom.force`), for a model that was trained with forces; one for all prompts, or
                one for each. Times are at the frame rate in `defaults`.

        Raises BadArgument, which is a ValueError and a UserError.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        defaults = self.defaults
        height = defaults["height"] if height is None else height
        width = defaults["width"] if width is None else width
        num_frames = defaults["frames"] if num_frames is None else num_frames
        steps = defaults["steps"] if num_inference_steps is None else num_inference_steps
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs,
            num_frames=num_frames,
            image=image,
            video=video,
            num_inference_steps=steps,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=max_sequence_length,
            generator=generator,
            output_type=output_type,
        )
        refining = self._refining(refine)
        prompts = count_prompts(prompt, prompt_embeds)
        forces = self._forces(force, prompts, num_frames, physics)
        batch = prompts * num_videos_per_prompt
        conditions = image_conditions(image, prompts) or video_conditions(video, prompts)
        negative_prompt = defaults["negative_prompt"] if negative_prompt is None else negative_prompt
        passes = Passes(self.transformer, base_alone=not physics, attention_kwargs=attention_kwargs)
        physics = physics and self.transformer.has_physics
        scale_z = defaults["physics_guidance_scale"] if physics_guidance_scale is None else physics_guidance_scale
        self._guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        self._physics_guidance_scale = scale_z if physics else 1.0
        by_modality = (
            defaults["modality_guidance_scale"] if modality_guidance_scale is None else modality_guidance_scale
        )
        self._modality_guidance_scale = by_modality if physics else 1.0
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        self._evaluations = 0
        device = self._execution_device

        channels = self.vae.config.z_dim
        further_noise = FurtherNoise(generator if refining else None)
        latents, physics_latents = self.prepare_latents(
            batch, channels, height, width, num_frames, None, device, generator, latents, physics_latents, physics
        )
        if forces:
            config = self.transformer.config.force
            passes.force = encode_force(forces, config, latents, physics_latents, defaults["fps"])
        conditioning = None
        if conditions:
            max_frames = min(defaults["max_prefix_frames"], num_frames - self.vae_scale_factor_temporal)
            encoders = VideoEncoder(self.vae, device), self._physics_encoder(device), self.transformer.config.physics
            prefixes = [condition_frames(clip, height, width, max_frames) for clip in conditions]
            conditioning = encode_conditions(prefixes, *encoders, latents, physics_latents)
            latents, physics_latents = conditioning.apply(latents, physics_latents)

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            max_sequence_length,
        )
        self.scheduler.set_timesteps(steps, device=device)
        self.scheduler.set_begin_index(0)
        # Its own: a multistep solver keeps past velocities per modality, and the noise levels may differ.
        noise_shift = self.transformer.config.physics["noise_shift"] if physics else 1.0
        physics_scheduler = shifted_copy(self.scheduler, noise_shift, steps, device)
        timesteps, sigmas = self.scheduler.timesteps, self.scheduler.sigmas.tolist()
        levels = sigmas, physics_scheduler.sigmas.tolist()
        refinement = Refinement(refining, further_noise, conditioning, *levels) if refining else None
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                embeds: dict[str, Any] = {"prompt": prompt_embeds}
                if self.do_classifier_free_guidance:
                    if negative_prompt_embeds is None:  # a callback has switched guidance on
                        text: dict[str, Any] = {"negative_prompt": negative_prompt, "prompt_embeds": prompt_embeds}
                        negative_prompt_embeds = self.encode_prompt(None, **text)[1]
                    embeds["negative"] = negative_prompt_embeds
                if self.modality_guidance_scale != 1:
                    embeds["uncoupled"] = prompt_embeds
                time = torch.where(conditioning.is_condition, 0.0, t) if conditioning else t.expand(batch)
                at = {"step_index": i, "sigma": sigmas[i], "num_inference_steps": len(timesteps)}
                evaluate = partial(self._velocities, passes, time, embeds, at)
                if refinement and refinement.applies(i):
                    latents, physics_latents = refinement.refine(i, latents, physics_latents, evaluate)
                else:
                    if refinement and i and refinement.applies(i - 1):
                        for solver in (self.scheduler, physics_scheduler):
                            restart(solver, steps, device, i)
                    velocity, velocity_z = evaluate(latents, physics_latents)
                    latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                    if physics_latents is not None and velocity_z is not None:
                        t_z = physics_scheduler.timesteps[i]
                        physics_latents = physics_scheduler.step(velocity_z, t_z, physics_latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = latents, physics_latents, prompt_embeds, negative_prompt_embeds
                    given: dict[str, Any] = dict(zip(self._callback_tensor_inputs, tensors, strict=True))
                    requested = {name: given[name] for name in callback_on_step_end_tensor_inputs}
                    given |= callback_on_step_end(self, i, t, requested)
                    latents, physics_latents, prompt_embeds, negative_prompt_embeds = (
                        given[name] for name in self._callback_tensor_inputs
                    )
                if conditioning:
                    latents, physics_latents = conditioning.apply(latents, physics_latents)
                bar.update()
        self._current_timestep = None

        out = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        output = PhantomPipelineOutput(out, physics_latents if return_physics else None)
        return output if return_dict else output.to_tuple()

    def _refining(self, refine: Refine | Literal[False] | None) -> Refine | None:
        """The settings of self-refinement, given or by default. Raises BadArgument with a cache, which counts steps."""
        default = self.defaults["refine"]
        found = default and Refine.model_validate(default) if refine is None else refine or None
        if found and self.transformer.is_cache_enabled:
            raise BadArgument("refine: found an enabled cache, which counts steps; accepted: one of the two")
        return found

    def _forces(self, force: Any, prompts: int, num_frames: int, physics: bool) -> list[ForcePrompt | None]:
        """One for each prompt; empty where none has a force. Raises BadArgument."""
        forces = [force] * prompts if force is None or isinstance(force, ForcePrompt) else list(force)
        if len(forces) != prompts:
            raise BadArgument(
                f"force: found {len(forces)} for {prompts} prompt(s); accepted: one for all, or one for each"
            )
        given = [one for one in forces if one is not None]
        if not given:
            return []
        if not self.transformer.takes_force:
            raise BadArgument(
                "force: found one, but the model was not trained with forces (physics.force); accepted: none"
            )
        if not physics:
            raise BadArgument("force: found one for the base alone, which takes none; accepted: with physics")
        try:
            for one in given:
                one.check_duration((num_frames - 1) / self.defaults["fps"])
        except UserError as error:
            raise BadArgument(str(error)) from None
        return forces

    def _velocities(
        self,
        passes: Passes,
        time: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        at: dict[str, Any],
        latents: torch.Tensor,
        physics_latents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The guided velocities of both modalities; arguments of `Passes`."""
        self._evaluations += len(embeds)
        velocity, velocity_z = passes(latents, physics_latents, time, embeds, at)
        names, modality = [*embeds], self.modality_guidance_scale
        velocity = apply_guidance(velocity, names, self.guidance_scale, modality)
        if velocity_z is not None:
            velocity_z = apply_guidance(velocity_z, names, self.physics_guidance_scale, modality)
        return velocity, velocity_z

    def _physics_encoder(self, device: torch.device) -> PhysicsEncoder | None:
        """The encoder of condition frames to z; None without a physics branch."""
        if self.physics_encoder is None:
            return None
        return PhysicsEncoder(self.physics_encoder, device, self.transformer.config.physics["tubelets_per_latent"])

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Latents -> frames as `output_type`."""
        pixels = VideoEncoder(self.vae, latents.device).pixels(latents)
        if output_type != "uint8":
            return self.video_processor.postprocess_video(pixels, output_type)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def _noise_or(
    name: str,
    given: torch.Tensor | None,
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`given`, the argument `name`, or noise of that shape if it is None."""
    if given is None:
        return randn_tensor(shape, generator, device, dtype)
    check_shape(name, given, shape)
    return given.to(device, dtype)
