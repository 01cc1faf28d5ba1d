"""The command line's root: options that commands share, their settings, what they print."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom.config import Params, load_params, preset_names, preset_path
from phantom.errors import Interrupted, StageFailed
from phantom.orchestration.privacy import stay_offline
from phantom.progress import say
from phantom.tracking.lineage import join_repro

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


def settings(
    context: typer.Context,
    params: Path | None,
    set_: list[str] | None,
    benchmark: str | None = None,
    captions: str | None = None,
) -> Params:
    """The checked settings of this call; the hub client is kept offline if they, and `benchmark`, need no hub."""
    file, overrides = arguments(context, params, set_)
    tree = load_params(file or "params.yaml", overrides)
    stay_offline(tree, benchmark, captions)
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
    name: str,
    context: typer.Context,
    params: Path | None,
    set_: list[str] | None,
    launcher: str | None = None,
    benchmark: str | None = None,
    captions: str | None = None,
) -> Iterator[Params]:
    """The settings for a stage, checked before anything slow is imported.

    A stage replaces its outputs whole, or keeps its progress aside: it may be stopped at any time and run again.
    """
    join_repro()
    where = [f"compute.{name}={launcher}"] if launcher else []
    tree = settings(context, params, [*(set_ or []), *where], benchmark, captions)
    try:
        yield tree
    except KeyboardInterrupt:
        raise Interrupted(f"{name}: interrupted; what was finished is kept, run again to go on") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = error.filename or Path.cwd()
        raise StageFailed(f"{full}: no space left on the disk; make some and run again to go on") from None


def arguments(context: typer.Context, params: Path | None, set_: list[str] | None) -> tuple[Path | None, list[str]]:
    """Settings file and overrides of this call: those before the command's name come first."""
    before, overrides = context.obj or (None, [])
    return params or before, [*overrides, *(set_ or [])]


def params_file(context: typer.Context, params: Path | None) -> Path:
    """The settings file of this call."""
    return arguments(context, params, None)[0] or Path("params.yaml")


def replace_settings(target: Path, source: Path) -> Path | None:
    """Copies `source` over a settings file. One that is nobody's preset is kept beside it; returns where."""
    new, kept = source.read_bytes(), None
    if target.is_file() and target.read_bytes() not in [new, *(preset_path(n).read_bytes() for n in preset_names())]:
        kept = target.with_name(target.name + ".bak")
        target.replace(kept)
        say(f"{target}: the former one is now {kept}")
    target.write_bytes(new)
    return kept
