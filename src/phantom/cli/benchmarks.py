"""`phantom sample`, `score` and `report`: generate a benchmark's videos with any model, score and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import (
    AsJson,
    Captions,
    Generated,
    Info,
    Model,
    ParamsFile,
    Physics,
    Set,
    Subset,
    Videos,
    Work,
    app,
    sample,
    score,
    settings,
    show,
    stage,
)


@sample.command("physics-iq")
def sample_physics_iq(
    context: typer.Context,
    model: Model,
    benchmark: Annotated[Path, typer.Option(help="The benchmark's folder.")],
    out: Videos,
    descriptions: Annotated[
        Path | None, typer.Option(help="The CSV of descriptions, if not in the benchmark's folder.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="single: condition on one frame; multi: on the preceding video.")
    ] = "single",
    physics: Physics = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Generate the videos of Physics-IQ, with the settings of `evaluate` and the sizes of `data`."""
    with stage("sample", context, params, set_) as tree:
        from phantom.evaluation.sample import sample_folder

        result = sample_folder(tree, model, benchmark, out, descriptions, mode, physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@sample.command("videophy")
def sample_videophy(
    context: typer.Context,
    model: Model,
    out: Videos,
    captions: Captions = None,
    physics: Physics = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Generate the videos of VideoPhy, with the settings of `evaluate` and the sizes and length of `data`."""
    with stage("sample", context, params, set_, benchmark="videophy", captions=captions) as tree:
        from phantom.evaluation.prompted import sample_captions

        result = sample_captions(tree, "videophy", model, out, captions, physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@sample.command("videophy2")
def sample_videophy2(
    context: typer.Context,
    model: Model,
    out: Videos,
    captions: Captions = None,
    physics: Physics = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Generate the videos of VideoPhy-2, with the settings of `evaluate` and the sizes and length of `data`."""
    with stage("sample", context, params, set_, benchmark="videophy2", captions=captions) as tree:
        from phantom.evaluation.prompted import sample_captions

        result = sample_captions(tree, "videophy2", model, out, captions, physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@sample.command("vbench2")
def sample_vbench2(
    context: typer.Context,
    model: Model,
    out: Videos,
    info: Info = None,
    dimension: Annotated[list[str] | None, typer.Option(help="Only this dimension; repeatable.")] = None,
    physics: Physics = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Generate the videos of VBench-2.0, with the settings of `evaluate` and the sizes and length of `data`."""
    with stage("sample", context, params, set_) as tree:
        from phantom.evaluation.prompted import sample_vbench2

        result = sample_vbench2(tree, model, out, str(info) if info else None, dimension or (), physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@score.command("physics-iq")
def score_physics_iq(
    generated: Annotated[
        list[Path] | None, typer.Option(help="A folder of mp4 files; repeat it for several runs of a model.")
    ] = None,
    benchmark: Annotated[Path | None, typer.Option(help="The benchmark's folder.")] = None,
    descriptions: Annotated[
        Path | None, typer.Option(help="The CSV of descriptions, if not in the benchmark's folder.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="original or verified.")] = "original",
    mask_codec: Annotated[str, typer.Option(help="mp4v, as published, or none.")] = "mp4v",
    subset: Annotated[bool, typer.Option("--subset", help="Score only the videos that exist.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the metrics as a CSV in the official format.")] = None,
    from_csv: Annotated[Path | None, typer.Option(help="Score an official CSV of metrics instead of videos.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Videos compared in parallel; by default one per core.", min=1)
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Cache of comparisons and downscaled recordings, keyed by content.")
    ] = Path("checkpoints/scores"),
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not use the cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score a model's videos on Physics-IQ."""
    from phantom.evaluation.physics_iq import runs

    result = runs.score_runs(
        generated or [],
        benchmark,
        descriptions,
        from_csv,
        protocol=protocol,
        mask_codec=mask_codec,
        subset=subset,
        workers=workers,
        cache=None if no_cache else cache,
        csv_out=csv,
    )
    show(result, as_json, runs.as_text(result))


@score.command("videophy")
def score_videophy(
    context: typer.Context,
    generated: Generated = None,
    captions: Captions = None,
    sa: Annotated[Path | None, typer.Option(help="The judge's output for sa_testing.csv, if run elsewhere.")] = None,
    pc: Annotated[Path | None, typer.Option(help="The judge's output for physics_testing.csv.")] = None,
    subset: Subset = False,
    work: Work = Path("checkpoints/judged"),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score a model's videos on VideoPhy, with the judge of evaluate.videophy or outputs of one run elsewhere."""
    from phantom.evaluation import ratings, videophy

    # No settings file is needed if the options say everything.
    complete = generated is None or (captions and sa and pc)
    own = None if complete else settings(context, params, set_, "videophy", captions).evaluate.videophy
    captions = captions or (own.captions if own else None)
    result = videophy.score_videophy(generated, captions, own, sa=sa, pc=pc, subset=subset, work=work)
    show(result, as_json, ratings.as_text(result, "VideoPhy"))


@score.command("videophy2")
def score_videophy2(
    context: typer.Context,
    generated: Generated = None,
    captions: Captions = None,
    sa: Annotated[Path | None, typer.Option(help="The judge's output with --task sa, if run elsewhere.")] = None,
    pc: Annotated[Path | None, typer.Option(help="The judge's output with --task pc.")] = None,
    rule: Annotated[Path | None, typer.Option(help="The judge's output with --task rule.")] = None,
    subset: Subset = False,
    work: Work = Path("checkpoints/judged"),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score a model's videos on VideoPhy-2, with the judge of evaluate.videophy2 or outputs of one run elsewhere."""
    from phantom.evaluation import ratings, videophy2

    # No settings file is needed if the options say everything.
    complete = generated is None or (captions and sa and pc)
    own = None if complete else settings(context, params, set_, "videophy2", captions).evaluate.videophy2
    captions = captions or (own.captions if own else None)
    result = videophy2.score_videophy2(generated, captions, own, sa=sa, pc=pc, rule=rule, subset=subset, work=work)
    show(result, as_json, ratings.as_text(result, "VideoPhy-2"))


@score.command("vbench2")
def score_vbench2(
    context: typer.Context,
    generated: Annotated[
        Path | None, typer.Option(help="A folder with a folder of mp4 files for each dimension.")
    ] = None,
    info: Info = None,
    results: Annotated[Path | None, typer.Option(help="The judges' outputs: a folder, or a zip of it.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score only the dimensions that exist.")] = False,
    work: Work = Path("checkpoints/judged"),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check a model's videos and score them on VBench-2.0, or read outputs of judges run elsewhere."""
    from phantom.evaluation import vbench2

    own = (
        None if generated is None or (info and results) else settings(context, params, set_, "vbench2").evaluate.vbench2
    )
    info = info or (Path(own.info) if own and own.info else None)
    result = vbench2.score_vbench2(generated, own, info=info, results=results, partial=partial, work=work)
    show(result, as_json, vbench2.as_text(result))


@score.command("likephys")
def score_likephys(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="worlds, or a folder in LikePhys' layout; by default from the settings.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Noise levels per clip; by default from the settings.")] = None,
    physics: Physics = True,
    work: Annotated[Path, typer.Option(help="Cache of the losses, keyed by content, and of the worlds.")] = Path(
        "checkpoints/likephys"
    ),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on LikePhys: how often it denoises a possible video worse than an impossible one (50: chance)."""
    with stage("score", context, params, set_) as tree:
        from phantom.evaluation.likephys import run
        from phantom.evaluation.likephys.score import as_text

        result = run.score_likephys(tree, model, data, steps, physics, work)
    show(result, as_json, as_text(result))


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


@app.command()
def report(
    files: Annotated[list[str], typer.Argument(metavar="[NAME=]FILE...", help="JSON files of `phantom score`.")],
    out: Annotated[Path, typer.Option(help="Output folder of the page.")],
    base: Annotated[
        str | None, typer.Option(help="The model to compare the others with; by default the first.")
    ] = None,
    videos: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Show this model's videos; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare models on one page."""
    from phantom.evaluation.compare import compare

    result = compare(files, out, base, videos or ())
    show(result, as_json, f"{result.report}: compared with {result.base}")
