"""`phantom approve`: approves or rejects the model of a pipeline run that is suspended before `register`."""

from __future__ import annotations

from uuid import UUID

from phantom.errors import UserError


def approve(run: str | None = None, reject: bool = False) -> str:
    """Resumes a run that waits for approval, and returns its name.

    run: name of the flow run, or its id from the first 8 characters on; by default the only one that waits.
    reject: resume without registering the model.
    Raises UserError if no such run waits, if several wait and none is named, or if no Prefect server answers.
    """
    from httpx import HTTPStatusError, TransportError
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
    from prefect.client.schemas.objects import StateType
    from prefect.flow_runs import resume_flow_run
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():  # else Prefect would start a server of its own, in which no run waits
        raise UserError(
            "approve: no Prefect server is named; run it in a checkout of this project, or set PREFECT_API_URL"
        )
    with get_client(sync_client=True) as client:
        try:
            waiting = client.read_flow_runs(
                flow_filter=FlowFilter.model_validate({"name": {"any_": ["phantom"]}}),
                flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType.PAUSED]}}}),
            )
        except TransportError as error:
            raise UserError(
                f"approve: no answer from Prefect at {client.api_url} ({error}); `phantom up` starts it, "
                "PREFECT_API_URL says where another one is"
            ) from None
        except HTTPStatusError as error:
            if error.response.status_code != 401:
                raise
            raise UserError(
                f"approve: Prefect at {client.api_url} answers 401; set PREFECT_API_AUTH_STRING to the server's string"
            ) from None
    names = ", ".join(sorted(r.name for r in waiting)) or "none"
    chosen = [r for r in waiting if run is None or run == r.name or _is_id(run, r.id)]
    if not chosen:
        raise UserError(f"approve: {f'run {run!r} does not wait' if run else 'no run waits'}; waiting: {names}")
    if len(chosen) > 1:
        raise UserError(f"approve: {len(chosen)} runs wait, name one: {names}")
    resume_flow_run(chosen[0].id, run_input={"approved": not reject})
    return chosen[0].name


def _is_id(text: str, number: UUID) -> bool:
    return len(text) >= 8 and str(number).startswith(text)
