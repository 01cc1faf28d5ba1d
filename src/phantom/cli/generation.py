"""`phantom generate`: text-, image- and video-to-video."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom.cli.shared import (
    AsJson,
    Physics,
    app,
    show,
)
from phantom.config import PUBLISHED_REFINE
from phantom.errors import UserError
from phantom.force.files import parse_forces
from phantom.progress import is_first_process


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or a saved pipeline.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The mp4 to write; with --prompts, a folder.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with one prompt per line; a video for each.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The first frame.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to continue from its last frames.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; line i of --prompts uses seed + i.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4n + 1.", min=1)] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE|videojam", help="Scale of classifier-free guidance; 1: none. Or VideoJAM's weights."
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of --video and of the result.")] = None,
    physics: Physics = True,
    best_of: Annotated[
        int | None, typer.Option(help="Make so many videos, from consecutive seeds, and write the best.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="What chooses with --best-of: vjepa, the least surprise of V-JEPA 2's predictor.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="V-JEPA 2 of --score, a folder or hub id; by default the model's.")
    ] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="With --best-of: also write the other videos.")] = False,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="self|prompt|none",
            help="self: predict and perturb while the noise is high. prompt: language models rewrite the prompt after "
            "each video.",
        ),
    ] = None,
    refine_rounds: Annotated[
        int | None, typer.Option(help="Rounds at each such step; videos after the first one.", min=1)
    ] = None,
    refine_until: Annotated[
        float | None, typer.Option(help="Refine while 1 - sigma is below it.", min=0.001, max=1)
    ] = None,
    refine_threshold: Annotated[
        float | None, typer.Option(help="Change of the predicted latents below which they stay.", min=0)
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,ANGLE,MAGNITUDE[,TIME]|FILE",
            help="A push, for a model trained with forces: fractions of the picture, degrees (90: up), 0 to 1, "
            "seconds; repeatable. Or a JSON or csv file of them.",
        ),
    ] = None,
    wind: Annotated[
        str | None, typer.Option(metavar="ANGLE,MAGNITUDE", help="A wind over the whole picture, likewise.")
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            metavar="exact|fast", help="fast: caches attention over the steps, which changes the video a little."
        ),
    ] = "exact",
    endpoint: Annotated[
        str | None, typer.Option(help="With --refine prompt: an OpenAI-compatible server, http://localhost:8000/v1.")
    ] = None,
    text_model: Annotated[str | None, typer.Option(help="Its model that rewrites the prompt.")] = None,
    captioner: Annotated[
        str | None, typer.Option(help="Its model that sees the video; by default the same one.")
    ] = None,
    stop_score: Annotated[float | None, typer.Option(help="A video that scores as much, of 1, is the last.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="phyt2v|diffphy", help="With --refine prompt: a loop over videos; or once, before the video."
        ),
    ] = None,
    endpoint_key: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with its key [OPENAI_API_KEY].")
    ] = None,
    endpoint_timeout: Annotated[int | None, typer.Option(help="Seconds to wait for an answer.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Generate a video from a prompt and, optionally, a first frame or a video to continue.

    Options that are not given have the model's defaults.
    """
    from phantom.generation.generate import generate as make
    from phantom.generation.generate import generate_all
    from phantom.generation.processes import takes_part
    from phantom.generation.search import Search

    if (prompt is None) == (prompts is None):
        raise UserError(
            f"--prompt and --prompts: found {'neither' if prompt is None else 'both'}; accepted: one of them"
        )
    if best_of is None and (score or encoder or keep_all):
        given = "--score" if score else "--encoder" if encoder else "--keep-all"
        raise UserError(f"{given}: found without --best-of; accepted: with the number of videos to choose from")
    options: dict[str, Any] = {
        "image": image,
        "video": video,
        "seed": seed,
        "steps": steps,
        "frames": frames,
        "guidance": _number(guidance),
        "fps": fps,
        "physics": physics,
        "refine": _refinement(refine, rounds=refine_rounds, until=refine_until, threshold=refine_threshold),
        "force": parse_forces(force or [], wind) if force or wind is not None else None,
        "profile": profile,
        "search": None if best_of is None else Search(best_of, score or "vjepa", encoder, keep_all),
    }
    asked = {
        "endpoint": endpoint,
        "text-model": text_model,
        "captioner": captioner,
        "stop-score": stop_score,
        "template": template,
        "endpoint-key": endpoint_key,
        "endpoint-timeout": endpoint_timeout,
    }
    stated = {name: value for name, value in asked.items() if value is not None}
    by_prompt = _prompt_refinement(refine, stated, refine_rounds)
    if not takes_part():
        return
    if by_prompt is not None:
        from phantom.generation.generate import forces_for, read_prompts
        from phantom.generation.prompt_refinement import PromptRefinement, generate_refined

        refinement = PromptRefinement(**by_prompt)
        pairs = [(prompt or "", out)] if prompts is None else read_prompts(prompts, out)
        forces = forces_for(options["force"], len(pairs))
        made = [
            generate_refined(
                model, text, path, refinement, **options | {"seed": seed + i * (best_of or 1), "force": force}
            )
            for i, ((text, path), force) in enumerate(zip(pairs, forces, strict=True))
        ]
        said = [f"{one.out}: {one.prompt}" for one in made]
    elif prompts is not None:
        made = generate_all(model, prompts, out, **options)
        said = [f"{one.out}: {one.prompt}" for one in made]
    elif prompt is not None:
        made = [make(model, prompt, out, **options)]
        said = [f"{one.out}: {one.frames} frames of {one.width}x{one.height} at {one.fps:g} fps" for one in made]
    if is_first_process():
        found = [asdict(one) for one in made]
        show(found if prompts is not None else found[0], as_json, "\n".join(said))


def _number(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


def _refinement(refine: str | None, **settings: float | None) -> Any:
    """What `generate` takes: the published settings with those that are given; False for none; None for the default."""
    given = {name: value for name, value in settings.items() if value is not None}
    if refine not in (None, "self", "prompt", "none"):
        raise UserError(f"--refine: found {refine!r}; accepted: self, prompt, none")
    if refine == "prompt":
        given.pop("rounds", None)
    if refine != "self":
        if given:
            raise UserError(f"--refine-{next(iter(given))}: found without --refine self; accepted: with it")
        return False if refine == "none" else None
    return PUBLISHED_REFINE.model_copy(update=given)


def _prompt_refinement(refine: str | None, given: dict[str, Any], rounds: int | None) -> dict[str, Any] | None:
    """The arguments of `PromptRefinement` that `given` options name; None without --refine prompt."""
    from phantom.generation.chat import Endpoint

    if refine != "prompt":
        if given:
            raise UserError(f"--{next(iter(given))}: found without --refine prompt; accepted: with it")
        return None
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UserError(f"--refine prompt: found {processes} processes, which may be answered differently; accepted: 1")
    for name, what in (("endpoint", "an address such as http://localhost:8000/v1"), ("text-model", "a model's name")):
        if name not in given:
            raise UserError(f"--{name}: missing; accepted with --refine prompt: {what}")
    if given.get("template") == "diffphy":
        unused = {"refine-rounds": rounds, **{name: given.get(name) for name in ("captioner", "stop-score")}}
        if found := [name for name, value in unused.items() if value is not None]:
            raise UserError(f"--{found[0]}: found with --template diffphy, which looks at no video; accepted: without")
    of_endpoint = {"key": given.get("endpoint-key"), "timeout_seconds": given.get("endpoint-timeout")}
    stated = {name: value for name, value in of_endpoint.items() if value is not None}
    text_model = given["text-model"]
    return {
        "endpoint": Endpoint(given["endpoint"], "--endpoint", **stated),
        "text_model": text_model,
        "captioner": given.get("captioner", text_model),
        **({"stop_score": given["stop-score"]} if "stop-score" in given else {}),
        **({"template": given["template"]} if "template" in given else {}),
        **({} if rounds is None else {"rounds": rounds}),
    }
