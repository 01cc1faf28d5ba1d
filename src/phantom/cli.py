"""`phantom ...`: reads arguments, calls one function, shows what it returns.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 75 interrupted
after saving. What is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom.config import Params, load_params, preset_names, preset_path
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.privacy import no_telemetry, stay_offline
from phantom.progress import say

app = typer.Typer(
    help="Physics-infused video generation: train, evaluate and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
score = typer.Typer(help="Score a folder of mp4 of any model.", no_args_is_help=True)
app.add_typer(score, name="score")
sample = typer.Typer(help="Make the videos that a benchmark wants, with any model.", no_args_is_help=True)
app.add_typer(sample, name="sample")

CTRL_C = 130  # what typer makes of it in a command that does not
ParamsFile = Annotated[Path | None, typer.Option("--params", help="Settings file (params.yaml).", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Generated = Annotated[Path | None, typer.Option(help="A folder of mp4: 0001.mp4, or 0001-7.mp4 with its seed.")]
Captions = Annotated[str | None, typer.Option(help="A csv, or an id of the hub; by default as the settings say.")]
Info = Annotated[Path | None, typer.Option(help="VBench2_full_info.json; by default as the settings say.")]
Subset = Annotated[bool, typer.Option("--subset", help="Score those videos that are there.")]
Work = Annotated[Path, typer.Option(help="Where the judge's files go, by the videos' contents.")]
Launcher = Annotated[str | None, typer.Option(metavar="local|kubernetes", help="Where; else as compute.* says.")]


@app.callback()
def _global(context: typer.Context, params: ParamsFile = None, set_: Set = None) -> None:
    """Options that hold for every command may stand before it as well."""
    context.obj = (params, set_ or [])


# --- settings -------------------------------------------------------------------------------------------------------


@app.command()
def preset(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which to write; without it they are listed.")] = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """List the presets, or write params.yaml from one, changed by --set."""
    if name is None:
        first = {n: preset_path(n).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for n in preset_names()}
        show(first, as_json, "\n".join(f"{n:18} {line}" for n, line in first.items()))
        return
    target, overrides = _params_file(context, params), _arguments(context, params, set_)[1]
    load_params(preset_path(name), overrides)  # a mistake replaces nothing
    kept = _replace(target, preset_path(name))
    if overrides:
        from phantom.run import write_params

        write_params(target, overrides)
    show({"preset": name, "file": target, "kept": kept}, as_json, f"{target}: preset {name}")


@app.command()
def plan(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="A preset instead of the settings file.")] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU.")] = "H200",
    gpus: Annotated[int, typer.Option(help="How many.", min=1)] = 8,
    clips: Annotated[int | None, typer.Option(help="Size of the data set; by default the manifest's.", min=1)] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' peak that the model's operations reach.")] = 0.4,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs, memory, storage and hours, from the settings alone."""
    from phantom import plan as planning

    file = preset_path(preset) if preset else params
    result = planning.plan(settings(context, file, set_), gpu, gpus, clips, mfu)
    show(result, as_json, planning.as_text(result))


@app.command()
def doctor(
    context: typer.Context,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check the cluster too.")] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and the cluster: each line a check, its finding and the mend."""
    from phantom import doctor as checking

    checks = checking.doctor(settings(context, params, set_), cluster=cluster)
    show([asdict(c) for c in checks], as_json, checking.as_text(checks))
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)


# --- stages ---------------------------------------------------------------------------------------------------------


@app.command()
def prepare(context: typer.Context, params: ParamsFile = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Make the clips: data/clips, and data/benchmark for the simulated worlds."""
    with stage("prepare", context, params, set_) as tree:
        from phantom.data.prepare import prepare
        from phantom.records import record
        from phantom.run import stand_in

        result = prepare(tree)
        if tree.evaluate.physics_iq.benchmark != "worlds":
            stand_in(Path("data/benchmark"), f"The benchmark of this run is {tree.evaluate.physics_iq.benchmark}.")
        record("prepare", tree, result)
    show(result, as_json)


@app.command()
def encode(
    context: typer.Context,
    worker: Annotated[int | None, typer.Option(help="Encode a share of the clips: the number of it.", min=0)] = None,
    of: Annotated[int | None, typer.Option(help="How many shares there are.", min=1)] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Make data/latents of the shares; with --worker, if it is the last to end.")
    ] = False,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Encode the clips into latents: data/latents. Any number of workers may do it side by side."""
    if (worker is None) != (of is None):
        raise UserError("--worker and --of: found one of them; accepted: both, or neither")
    with stage("encode", context, params, set_, launcher) as tree:
        if tree.compute.encode == "kubernetes" and worker is None and not merge:
            result: Any = on_cluster("encode", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.data.encode import encode
            from phantom.data.shards import LATENTS
            from phantom.data.shares import Share
            from phantom.records import record

            result = encode(tree, share=None if worker is None or of is None else Share(worker, of), merge=merge)
            if Path(result.folder) == LATENTS:  # not a worker that others are still beside
                keep("encode")
                record("encode", tree, result)
    show(result, as_json)


@app.command()
def train(
    context: typer.Context,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Train the physics branch and the coupling: models/phantom."""
    with stage("train", context, params, set_, launcher) as tree:
        if tree.compute.train == "kubernetes":
            result: Any = on_cluster("train", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.run import stand_in
            from phantom.training.trainer import train

            result = train(tree)
            if os.environ.get("RANK", "0") == "0":
                if not tree.train.control:
                    stand_in(Path("models/control"), "Trained with train.control: false, so there is no control.")
                keep("train")
    show(result, as_json)


@app.command()
def evaluate(
    context: typer.Context,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score base, control and Phantom: reports/evaluation.json and reports/index.html."""
    with stage("evaluate", context, params, set_, launcher) as tree:
        if tree.compute.evaluate == "kubernetes":
            result: Any = on_cluster("evaluate", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.evaluation.stage import evaluate
            from phantom.records import record

            result = evaluate(tree)
            keep("evaluate")
            record("evaluate", tree, result)
    show(result, as_json)


@app.command()
def register(
    context: typer.Context,
    promote: Annotated[bool, typer.Option("--promote", help="Champion whatever the score.")] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Register the evaluated model in MLflow; the best is champion."""
    with stage("register", context, params, set_) as tree:
        from phantom.registry import register

        result = register(tree, promote=promote)
    alias = "champion" if result.champion else "challenger"
    against = "" if result.champion_score is None else f", the champion's was {result.champion_score:.3f}"
    show(result, as_json, f"{result.name} version {result.version}: {alias}, score {result.score:.3f}{against}")


# --- the pipeline ---------------------------------------------------------------------------------------------------


@app.command()
def run(context: typer.Context, params: ParamsFile = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Run the whole pipeline here; stages that are up to date are left as they are.

    --set and --params change params.yaml, which the pipeline reads.
    """
    from phantom import run as pipeline

    file, overrides = _arguments(context, params, set_)
    target = Path("params.yaml")
    load_params(file or target, overrides)
    if file and file.resolve() != target.resolve():
        _replace(target, file)
    for change in pipeline.write_params(target, overrides):
        say(change)
    done = pipeline.run()
    result = pipeline.summary(load_params(target), done)
    show(result, as_json, pipeline.as_text(result))


@app.command()
def up(
    context: typer.Context,
    prefect_port: Annotated[int | None, typer.Option(help="Port of Prefect's server.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of MLflow.")] = None,
    params: ParamsFile = None,
    set_: Set = None,
) -> None:
    """Start Prefect, MLflow and the served deployment here, until Ctrl-C."""
    from phantom.up import up as start

    start(settings(context, params, set_), prefect_port, mlflow_port)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Where the parts go.")] = Path("models/mini"),
    seed: Annotated[int, typer.Option(help="Of clips, weights and batches.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the frozen parts of the mini preset again: models/mini. An hour or two on two cores."""
    from phantom.pretraining.stage import pretrain

    try:
        made = pretrain(out, seed)
    except KeyboardInterrupt:
        raise Interrupted("pretrain: interrupted; finished parts are kept, run again to go on") from None
    show(made, as_json, "\n".join(f"{name}: {figures}" for name, figures in made["heldout"].items()))


@app.command()
def approve(
    run: Annotated[str | None, typer.Argument(help="The run's name or id; by default the one that waits.")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Do not register.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a pipeline run that waits before registering."""
    from phantom.approve import approve as answer

    name = answer(run, reject)
    show({"run": name, "approved": not reject}, as_json, f"{name}: {'rejected' if reject else 'approved'}")


# --- using a model --------------------------------------------------------------------------------------------------


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
    from phantom.generate import generate as make
    from phantom.generate import generate_all

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


# --- benchmarks -----------------------------------------------------------------------------------------------------


@sample.command("physics-iq")
def sample_physics_iq(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or a folder of diffusers.")],
    benchmark: Annotated[Path, typer.Option(help="The benchmark's folder.")],
    out: Annotated[Path, typer.Option(help="Where the videos go; those that are there are kept.")],
    descriptions: Annotated[Path | None, typer.Option(help="The csv, if it is elsewhere.")] = None,
    mode: Annotated[str, typer.Option(help="single: from one frame; multi: from the video before.")] = "single",
    physics: Annotated[bool, typer.Option("--physics/--no-physics", help="Without: the base model alone.")] = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make the videos of Physics-IQ, by the settings of `evaluate` and the sizes of `data`."""
    with stage("sample", context, params, set_) as tree:
        from phantom.evaluation.sample import sample_folder

        result = sample_folder(tree, model, benchmark, out, descriptions, mode, physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@sample.command("videophy")
def sample_videophy(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or a folder of diffusers.")],
    out: Annotated[Path, typer.Option(help="Where the videos go; those that are there are kept.")],
    captions: Captions = None,
    physics: Annotated[bool, typer.Option("--physics/--no-physics", help="Without: the base model alone.")] = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make the videos of VideoPhy, by the settings of `evaluate` and the sizes and length of `data`."""
    with stage("sample", context, params, set_) as tree:
        from phantom.evaluation.prompted import sample_captions

        result = sample_captions(tree, "videophy", model, out, captions, physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@sample.command("videophy2")
def sample_videophy2(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or a folder of diffusers.")],
    out: Annotated[Path, typer.Option(help="Where the videos go; those that are there are kept.")],
    captions: Captions = None,
    physics: Annotated[bool, typer.Option("--physics/--no-physics", help="Without: the base model alone.")] = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make the videos of VideoPhy-2, by the settings of `evaluate` and the sizes and length of `data`."""
    with stage("sample", context, params, set_) as tree:
        from phantom.evaluation.prompted import sample_captions

        result = sample_captions(tree, "videophy2", model, out, captions, physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@sample.command("vbench2")
def sample_vbench2(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="An export (models/phantom), or a folder of diffusers.")],
    out: Annotated[Path, typer.Option(help="Where the videos go; those that are there are kept.")],
    info: Info = None,
    dimension: Annotated[list[str] | None, typer.Option(help="Only of this dimension; repeatable.")] = None,
    physics: Annotated[bool, typer.Option("--physics/--no-physics", help="Without: the base model alone.")] = True,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make the videos of VBench-2.0, by the settings of `evaluate` and the sizes and length of `data`."""
    with stage("sample", context, params, set_) as tree:
        from phantom.evaluation.prompted import sample_vbench2

        result = sample_vbench2(tree, model, out, str(info) if info else None, dimension or (), physics)
    show(result, as_json, f"{result.out}: {result.videos} videos of {result.frames} frames at {result.fps} per second")


@score.command("physics-iq")
def score_physics_iq(
    generated: Annotated[list[Path] | None, typer.Option(help="A folder of mp4; several: runs of one model.")] = None,
    benchmark: Annotated[Path | None, typer.Option(help="The benchmark's folder.")] = None,
    descriptions: Annotated[Path | None, typer.Option(help="The csv, if it is not in the benchmark.")] = None,
    protocol: Annotated[str, typer.Option(help="original or verified.")] = "original",
    mask_codec: Annotated[str, typer.Option(help="mp4v, as published, or none.")] = "mp4v",
    subset: Annotated[bool, typer.Option("--subset", help="Score those videos that are there.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the metrics in the official format.")] = None,
    from_csv: Annotated[Path | None, typer.Option(help="Score an official csv of metrics instead.")] = None,
    workers: Annotated[int | None, typer.Option(help="Videos at a time; by default one a core.", min=1)] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep finished comparisons here, by content.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score the videos of a model on Physics-IQ."""
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
        cache=cache,
        csv_out=csv,
    )
    show(result, as_json, runs.as_text(result))


@score.command("videophy")
def score_videophy(
    context: typer.Context,
    generated: Generated = None,
    captions: Captions = None,
    sa: Annotated[Path | None, typer.Option(help="What the judge has written elsewhere for sa_testing.csv.")] = None,
    pc: Annotated[Path | None, typer.Option(help="The same for physics_testing.csv.")] = None,
    subset: Subset = False,
    work: Work = Path("checkpoints/judged"),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score the videos of a model on VideoPhy, with the judge of evaluate.videophy or the files of one elsewhere."""
    from phantom.evaluation import ratings, videophy

    # What is complete without the settings is scored where there are none.
    complete = generated is None or (captions and sa and pc)
    own = None if complete else settings(context, params, set_).evaluate.videophy
    captions = captions or (own.captions if own else None)
    result = videophy.score_videophy(generated, captions, own, sa=sa, pc=pc, subset=subset, work=work)
    show(result, as_json, ratings.as_text(result, "VideoPhy"))


@score.command("videophy2")
def score_videophy2(
    context: typer.Context,
    generated: Generated = None,
    captions: Captions = None,
    sa: Annotated[Path | None, typer.Option(help="What the judge has written elsewhere with --task sa.")] = None,
    pc: Annotated[Path | None, typer.Option(help="The same with --task pc.")] = None,
    rule: Annotated[Path | None, typer.Option(help="The same with --task rule.")] = None,
    subset: Subset = False,
    work: Work = Path("checkpoints/judged"),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score the videos of a model on VideoPhy-2, with the judge of evaluate.videophy2 or the files of one elsewhere."""
    from phantom.evaluation import ratings, videophy2

    # What is complete without the settings is scored where there are none.
    complete = generated is None or (captions and sa and pc)
    own = None if complete else settings(context, params, set_).evaluate.videophy2
    captions = captions or (own.captions if own else None)
    result = videophy2.score_videophy2(generated, captions, own, sa=sa, pc=pc, rule=rule, subset=subset, work=work)
    show(result, as_json, ratings.as_text(result, "VideoPhy-2"))


@score.command("vbench2")
def score_vbench2(
    context: typer.Context,
    generated: Annotated[Path | None, typer.Option(help="A folder with a folder of mp4 for each dimension.")] = None,
    info: Info = None,
    results: Annotated[Path | None, typer.Option(help="The judges' output: a folder, or a zip of it.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score those dimensions that are there.")] = False,
    work: Work = Path("checkpoints/judged"),
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check the videos of a model and score them on VBench-2.0, or read what its judges have written elsewhere."""
    from phantom.evaluation import vbench2

    own = None if generated is None or (info and results) else settings(context, params, set_).evaluate.vbench2
    info = info or (Path(own.info) if own and own.info else None)
    result = vbench2.score_vbench2(generated, own, info=info, results=results, partial=partial, work=work)
    show(result, as_json, vbench2.as_text(result))


@app.command()
def report(
    files: Annotated[list[str], typer.Argument(metavar="[NAME=]FILE...", help="JSON of `phantom score`.")],
    out: Annotated[Path, typer.Option(help="The folder of the page.")],
    base: Annotated[str | None, typer.Option(help="The model to compare with; by default the first.")] = None,
    videos: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Show the videos of this model; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare models on one page."""
    from phantom.evaluation.compare import compare

    result = compare(files, out, base, videos or ())
    show(result, as_json, f"{result.report}: compared with {result.base}")


# --- what the process says -------------------------------------------------------------------------------------------


def settings(context: typer.Context, params: Path | None, set_: list[str] | None) -> Params:
    """The checked settings of this call; the hub client is kept offline if they need no hub."""
    file, overrides = _arguments(context, params, set_)
    tree = load_params(file or "params.yaml", overrides)
    stay_offline(tree)
    return tree


def show(result: Any, as_json: bool, text: str | None = None) -> None:
    """Prints a result on stdout: as JSON, or as `text`, or as a line for each field."""
    plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        typer.echo(json.dumps(plain, indent=2, default=str))
    else:
        typer.echo(text if text is not None else "\n".join(f"{k}: {v}" for k, v in plain.items()))


def on_cluster(name: str, tree: Params) -> Any:
    """Runs a stage as a job, whose pods run the same command with `compute.*` set to local."""
    from phantom.cluster.submit import run_job

    return run_job(name, tree)


@contextmanager
def stage(
    name: str, context: typer.Context, params: Path | None, set_: list[str] | None, launcher: str | None = None
) -> Iterator[Params]:
    """The settings for a stage, checked before anything slow is imported.

    A stage replaces its outputs whole, or keeps its progress aside: it may be stopped at any time and run again.
    """
    where = [f"compute.{name}={launcher}"] if launcher else []
    tree = settings(context, params, [*(set_ or []), *where])
    try:
        yield tree
    except KeyboardInterrupt:
        raise Interrupted(f"{name}: interrupted; what was finished is kept, run again to go on") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = error.filename or Path.cwd()
        raise UserError(f"{full}: no space left on the disk; make some and run again to go on") from None


def main() -> None:
    """Runs the command line and exits with its code."""
    no_telemetry()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has started this with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    code, error = _run()
    # Inside `phantom run` the line is left to it; else it is ours to say.
    from phantom.outcome import leave_outcome

    if not leave_outcome(code, error) and error:
        say(error)
    sys.stdout.flush()
    sys.exit(code)


def _run() -> tuple[int, str]:
    """Exit code and error line of this call."""
    wrong_usage = typer.BadParameter.__mro__[2]  # typer's base of everything that is wrong with the arguments
    try:
        code = int(app(prog_name="phantom", standalone_mode=False) or 0)
        return (1, "interrupted") if code == CTRL_C else (code, "")
    except (UserError, Interrupted, StageFailed) as error:
        return error.exit_code, str(error)
    except wrong_usage as error:  # type: ignore[misc]
        said = error.format_message()
        where = f"{error.ctx.command_path}: " if getattr(error, "ctx", None) else ""
        return 2, said and where + said  # nothing is said where help was shown instead
    except Exception as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"


def _arguments(context: typer.Context, params: Path | None, set_: list[str] | None) -> tuple[Path | None, list[str]]:
    before, overrides = context.obj or (None, [])
    return params or before, [*overrides, *(set_ or [])]


def _params_file(context: typer.Context, params: Path | None) -> Path:
    return _arguments(context, params, None)[0] or Path("params.yaml")


def _replace(target: Path, source: Path) -> Path | None:
    """Copies `source` over a settings file. One that is nobody's preset is kept beside it; returns where."""
    new, kept = source.read_bytes(), None
    if target.is_file() and target.read_bytes() not in [new, *(preset_path(n).read_bytes() for n in preset_names())]:
        kept = target.with_name(target.name + ".bak")
        target.replace(kept)
        say(f"{target}: the former one is now {kept}")
    target.write_bytes(new)
    return kept


if __name__ == "__main__":
    main()
