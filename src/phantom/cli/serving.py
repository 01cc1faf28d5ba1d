"""`phantom serve`: the HTTP service and its page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import ParamsFile, Set, app, arguments, settings
from phantom.config import load_params, preset_path
from phantom.config.sampling import default_arguments
from phantom.errors import UserError

EXPORT = "models/phantom"
DEFAULT_PRESET = "mini"  # without params.yaml: where the registry is, and what a base alone makes


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="An export, a saved pipeline, a base, or models:/phantom@champion; by default models/phantom, until "
            "there is one models.base.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other than this machine's needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.", min=0, max=65535)] = 8000,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; by default one per GPU, else one.", min=1, max=64)
    ] = None,
    state: Annotated[Path, typer.Option(help="Folder of the queue, the results and files in progress.")] = Path(
        "served"
    ),
    database: Annotated[
        str | None,
        typer.Option(envvar="PHANTOM_SERVE_DATABASE", help="SQLAlchemy URL of the queue; by default in --state."),
    ] = None,
    results: Annotated[str | None, typer.Option(help="Folder or s3:// of the videos; by default in --state.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients send; or PHANTOM_SERVE_TOKEN.")
    ] = None,
    queue_limit: Annotated[int, typer.Option(help="Jobs that may wait; more are refused with 429.", min=1)] = 64,
    job_seconds: Annotated[float, typer.Option(help="Longest time that a job may take.", min=1)] = 3600.0,
    keep_hours: Annotated[float, typer.Option(help="Time for which finished videos are kept.", min=0.001)] = 168.0,
    upload_mib: Annotated[float, typer.Option(help="Largest request body.", min=0.001)] = 64.0,
    allow_uri: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="What inputs may be fetched from, such as s3://bucket/; repeatable."),
    ] = None,
    params: ParamsFile = None,
    set_: Set = None,
) -> None:
    """Serve a model over HTTP, with a page in the browser, until Ctrl-C."""
    from phantom.serving.options import local_options
    from phantom.serving.server import count_gpus, serve

    file, overrides = arguments(context, params, set_)
    if file or Path("params.yaml").is_file():
        tree = settings(context, params, set_)
    else:
        tree = load_params(preset_path(DEFAULT_PRESET), overrides)
    serve(
        local_options(
            state,
            model=model or EXPORT,
            fallback=tree.models.base if model is None and Path(tree.models.base).is_dir() else None,
            database=database,
            results=results,
            storage=tree.storage,
            tracking_uri=tree.tracking.uri,
            base_defaults=default_arguments(tree),
            workers=workers or max(1, count_gpus()),
            host=host,
            port=port,
            token=_token(token_file),
            queue_limit=queue_limit,
            job_seconds=job_seconds,
            keep_hours=keep_hours,
            upload_mib=upload_mib,
            allowed_uris=tuple(allow_uri or ()),
        )
    )


def _token(file: Path | None) -> str | None:
    """The token of the file or the environment. Raises UserError for one that could be guessed."""
    text, where = os.environ.get("PHANTOM_SERVE_TOKEN"), "PHANTOM_SERVE_TOKEN"
    if file is not None:
        where = f"--token-file: {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if text is None:
        return None
    if len(text.strip()) < 16:
        raise UserError(f"{where}: found {len(text.strip())} characters; accepted: at least 16")
    return text.strip()
