"""`phantom sample`, `score` and `report`: generate a benchmark's videos with any model, score and compare them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom.cli.shared import (
    AsJson,
    Index,
    Of,
    ParamsFile,
    Physics,
    Pipeline,
    Set,
    Videos,
    app,
    arguments,
    find_part,
    resumable,
    sample,
    score,
    settings,
    show,
    stage,
)
from phantom.evaluation.benchmarks import BENCHMARKS
from phantom.evaluation.protocol import Benchmark, Option
from phantom.progress import is_first_process

SETTINGS = [
    Parameter("params", Parameter.KEYWORD_ONLY, default=None, annotation=ParamsFile),
    Parameter("set_", Parameter.KEYWORD_ONLY, default=None, annotation=Set),
]
AS_JSON = Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)


def add_commands(benchmark: Benchmark) -> None:
    """Adds `phantom score` of a benchmark and, if videos are sampled for it, `phantom sample`."""
    if benchmark.sample_options is not None:
        sample.command(benchmark.name)(_sample_command(benchmark, benchmark.sample_options))
    score.command(benchmark.name)(_score_command(benchmark))


def _sample_command(benchmark: Benchmark, options: Any) -> Callable[..., None]:
    def command(
        context: typer.Context,
        model: Path,
        out: Path,
        physics: bool,
        index: int | None,
        of: int | None,
        params: Path | None,
        set_: list[str] | None,
        as_json: bool,
        **given: Any,
    ) -> None:
        part = find_part(index, of)
        stated = [one.partition("=")[0] for one in arguments(context, params, set_)[1]]
        with stage("sample", context, params, set_, benchmark=benchmark, given={**given, "model": model}) as tree:
            from phantom.data.part import Part
            from phantom.evaluation.sample_benchmark import sample_benchmark

            result = sample_benchmark(benchmark, tree, model, out, physics, given, part and Part(*part), stated)
        made = f"{result.videos} videos of {result.frames} frames at {result.fps} per second"
        if is_first_process():
            show(result, as_json, f"{result.out}: {made}")

    first = [_parameter("model", Pipeline), _parameter("out", Videos)]
    parts = [_parameter("index", Index, None), _parameter("of", Of, None)]
    last = [_parameter("physics", Physics, True), *parts, *SETTINGS, AS_JSON]
    said = f"Generate the videos of {benchmark.title}, with the settings of `evaluate` and the sizes of `data`."
    return _with_options(command, said, [*first, *map(_option, options), *last])


def _score_command(benchmark: Benchmark) -> Callable[..., None]:
    def command(
        context: typer.Context,
        as_json: bool,
        params: Path | None = None,
        set_: list[str] | None = None,
        **given: Any,
    ) -> None:
        with resumable("score"):
            result = benchmark.score(partial(settings, context, params, set_, benchmark, given), **given)
        show(result, as_json, benchmark.as_text(result))

    last = [*(SETTINGS if benchmark.scored_by_settings else []), AS_JSON]
    said = benchmark.score_help or f"Score a model's videos on {benchmark.title}."
    return _with_options(command, said, [*map(_option, benchmark.score_options), *last])


def _with_options(command: Callable[..., None], said: str, parameters: list[Parameter]) -> Callable[..., None]:
    """`command` as typer reads it: with a help text and typed parameters."""
    context = _parameter("context", typer.Context)
    command.__doc__ = said
    command.__signature__ = Signature([context, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (context, *parameters)}
    return command


def _option(option: Option) -> Parameter:
    typed = typer.Option(*option.flags, help=option.help, min=option.least)
    return _parameter(option.name, Annotated[option.type, typed], option.default)


def _parameter(name: str, annotation: Any, default: Any = ...) -> Parameter:
    given = Parameter.empty if default is ... else default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=given, annotation=annotation)


for _benchmark in BENCHMARKS.values():
    add_commands(_benchmark)


@score.command("shapes")
def score_shapes(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or frozen parts (models/mini).")],
    worlds: Annotated[int, typer.Option(help="Number of held-out simulated worlds.")] = 36,
    physics: Physics = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether bodies keep their area and colour in a model's videos of simulated worlds, and start in time."""
    with stage("score", context, params, set_) as tree:
        from phantom.evaluation import model_shapes

        result = model_shapes.score_shapes(tree, model, worlds, physics)
    show(result, as_json, model_shapes.as_text(result))


@score.command("forces")
def score_forces(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="An export (models/phantom).")],
    worlds: Annotated[int, typer.Option(help="Number of held-out simulated worlds, with five videos each.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Also write the videos into this folder, with arrows.")] = None,
    physics: Physics = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether bodies follow the force of a prompt: how far, in which direction, farther if it is stronger."""
    with stage("score", context, params, set_) as tree:
        from phantom.evaluation import model_forces

        result = model_forces.score_forces(tree, model, worlds, physics, out)
    show(result, as_json, model_forces.as_text(result))


@score.command("surprise")
def score_surprise(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of mp4 files, of any model.")],
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Measure how much V-JEPA 2's predictor is surprised by videos, with `models.physics_encoder`."""
    with stage("score", context, params, set_) as tree:
        from phantom.evaluation import surprise

        result = surprise.score_surprise(tree, folder)
    show(result, as_json, surprise.as_text(result))


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Output folder of the page.")],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]FILE...", help="JSON files of `phantom score`.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model to compare the others with; by default the first.")
    ] = None,
    videos: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Show this model's videos; repeatable.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Show the recordings of this benchmark beside the videos.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Also show what others have published, by protocol.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare models on one page."""
    from phantom.evaluation.compare import compare

    result = compare(files or (), out, base, videos or (), truth, published)
    show(result, as_json, f"{result.report}: compared with {result.base}" if result.base else result.report)
