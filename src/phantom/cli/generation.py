"""`phantom generate`: using a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom.cli.shared import (
    AsJson,
    app,
    show,
)
from phantom.errors import UserError


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or a saved pipeline.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The mp4; with --prompts, a folder.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What the video shall show.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line, each made into a video.")] = None,
    image: Annotated[Path | None, typer.Option(help="The first frame.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video, whose end is gone on from.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; line i of --prompts has seed + i.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    frames: Annotated[int | None, typer.Option(help="Length of the video, 4m + 1.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt; 1: no guidance.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, of --video and of the result.")] = None,
    physics: Annotated[bool, typer.Option("--physics/--no-physics", help="Without: the base model alone.")] = True,
    as_json: AsJson = False,
) -> None:
    """Make a video from a prompt, a first frame, or a video to go on from. What is left open is as the model states."""
    from phantom.generation.generate import generate as make
    from phantom.generation.generate import generate_all

    if (prompt is None) == (prompts is None):
        raise UserError(
            f"--prompt and --prompts: found {'neither' if prompt is None else 'both'}; accepted: one of them"
        )
    options: dict[str, Any] = {
        "image": image,
        "video": video,
        "seed": seed,
        "steps": steps,
        "frames": frames,
        "guidance": guidance,
        "fps": fps,
        "physics": physics,
    }
    if prompts is not None:
        made = generate_all(model, prompts, out, **options)
        show([asdict(one) for one in made], as_json, "\n".join(f"{one.out}: {one.prompt}" for one in made))
    elif prompt is not None:
        one = make(model, prompt, out, **options)
        show(one, as_json, f"{one.out}: {one.frames} frames of {one.width}x{one.height} at {one.fps:g} fps")
