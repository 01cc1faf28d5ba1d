"""What commands share: the typer app, common options, loading the settings, printing results."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom import logs
from phantom.config import Params, load_params, preset_names, preset_path
from phantom.cost import gpu_hours
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.evaluation.benchmarks import check_benchmarks
from phantom.evaluation.protocol import Benchmark
from phantom.orchestration.privacy import stay_offline
from phantom.progress import say
from phantom.tracking.lineage import PIPELINE_ENV, join_dvc_repro

app = typer.Typer(
    help="Physics-infused video generation: train, evaluate and use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
score = typer.Typer(help="Score a folder of generated mp4 files, of any model.", no_args_is_help=True)
app.add_typer(score, name="score")
sample = typer.Typer(help="Generate the videos that a benchmark asks for, with any model.", no_args_is_help=True)
app.add_typer(sample, name="sample")

ParamsFile = Annotated[Path | None, typer.Option("--params", help="Settings file (params.yaml).", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Pipeline = Annotated[
    Path, typer.Option(help="An export (models/phantom) or a diffusers pipeline: a folder, or an id of the hub.")
]
Videos = Annotated[Path, typer.Option(help="Output folder; existing videos are kept.")]
Index = Annotated[int | None, typer.Option(help="Generate one part of the videos: its number, from 0.", min=0)]
Of = Annotated[int | None, typer.Option(help="Number of parts, with --index.", min=1)]
Physics = Annotated[bool, typer.Option("--physics/--no-physics", help="--no-physics: only the base model.")]
Launcher = Annotated[
    str | None, typer.Option(metavar="local|kubernetes", help="Where to run the stage; by default from compute.*.")
]


@app.callback()
def _global(context: typer.Context, params: ParamsFile = None, set_: Set = None) -> None:
    """Options of every command, also accepted before its name."""
    context.obj = (params, set_ or [])
    logs.context.update(stage=context.invoked_subcommand, run=os.environ.get(PIPELINE_ENV))


def settings(
    context: typer.Context,
    params: Path | None,
    set_: list[str] | None,
    benchmark: Benchmark | None = None,
    given: Mapping[str, Any] | None = None,
) -> Params:
    """Loads and validates the settings. Keeps the hub client offline if neither they nor `benchmark` need the hub.

    given: the values of the benchmark's options.
    """
    file, overrides = arguments(context, params, set_)
    tree = load_params(file or "params.yaml", overrides)
    check_benchmarks(tree)
    stay_offline(tree, benchmark, given or {})
    return tree


def show(result: Any, as_json: bool, text: str | None = None) -> None:
    """Prints a result to stdout: as JSON, as `text`, or as one line per field that is not empty text."""
    plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        typer.echo(json.dumps(plain, indent=2, default=str))
    else:
        typer.echo(text if text is not None else "\n".join(f"{k}: {v}" for k, v in plain.items() if v != ""))


def find_part(index: int | None, of: int | None) -> tuple[int, int] | None:
    """--index and --of, which go together; None without them. Raises UserError."""
    if index is None and of is None:
        return None
    if index is None or of is None:
        raise UserError("--index and --of: found one of them; accepted: both, or neither")
    return index, of


def run_on_cluster(name: str, tree: Params) -> Any:
    """Runs a stage as a Kubernetes job, whose pods run the same command with `compute.*` set to local."""
    from phantom.cluster.submit import run_job

    return run_job(name, tree)


@contextmanager
def stage(
    name: str,
    context: typer.Context,
    params: Path | None,
    set_: list[str] | None,
    launcher: str | None = None,
    benchmark: Benchmark | None = None,
    given: Mapping[str, Any] | None = None,
) -> Iterator[Params]:
    """Context of a stage: gives its settings, validated before anything slow is imported; `resumable`."""
    join_dvc_repro()
    logs.context["run"] = os.environ.get(PIPELINE_ENV)
    compute = [f"compute.{name}={launcher}"] if launcher else []
    tree = settings(context, params, [*(set_ or []), *compute], benchmark, given)
    try:
        with resumable(name):
            yield tree
    finally:
        _log_cost(name, tree)


def _log_cost(name: str, tree: Params) -> None:
    """Logs the GPU-hours of a stage to the pipeline run that it belongs to, also if it failed."""
    from phantom.cluster.outputs import KEEP_ENV

    # The watcher of a job counts for its pods, and the process that started others for these.
    is_part = KEEP_ENV in os.environ or "RANK" in os.environ
    if gpu_hours() and PIPELINE_ENV in os.environ and not is_part:
        from phantom.tracking.records import log_cost

        log_cost(name, tree, gpu_hours())


@contextmanager
def resumable(name: str) -> Iterator[None]:
    """Converts exceptions of work that either replaces its outputs atomically or can resume.

    KeyboardInterrupt becomes Interrupted, a full disk StageFailed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{name}: interrupted; what was finished is kept, run again to go on") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path = error.filename or Path.cwd()
        raise StageFailed(f"{path}: no space left on the disk; make some and run again to go on") from None


def arguments(context: typer.Context, params: Path | None, set_: list[str] | None) -> tuple[Path | None, list[str]]:
    """Settings file and overrides: those given before the command's name apply first."""
    before, overrides = context.obj or (None, [])
    return params or before, [*overrides, *(set_ or [])]


def params_file(context: typer.Context, params: Path | None) -> Path:
    """The settings file: that of --params, else params.yaml."""
    return arguments(context, params, None)[0] or Path("params.yaml")


def replace_settings(target: Path, source: Path) -> Path | None:
    """Replaces a settings file by a copy of `source`. Returns its backup, made unless it was an unchanged preset."""
    new, backup = source.read_bytes(), None
    if target.is_file() and target.read_bytes() not in [new, *(preset_path(n).read_bytes() for n in preset_names())]:
        backup = target.with_name(target.name + ".bak")
        target.replace(backup)
        say(f"{target}: the former one is now {backup}")
    target.write_bytes(new)
    return backup
