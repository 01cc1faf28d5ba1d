"""What a worker does before it starts: `prefect deploy --all`, and on the server what that cannot state.

    python -m phantom.orchestration.deploy

A schedule, off, with the first deployment: whoever switches it on or changes it is not overruled by a later start. And
the automations that start a run again whose pod was lost.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import Any

PIPELINE = "phantom/full-pipeline"
FLOWS = ("phantom", "phantom-study")
NIGHTLY = "0 2 * * *"  # UTC
# Without a heartbeat; flows send one every PREFECT_FLOWS_HEARTBEAT_FREQUENCY seconds, 30 in pods.
LOST_SECONDS = 90
HEARTBEAT = "prefect.flow-run.heartbeat"
LONGEST_RUN = timedelta(days=90)  # between two starts


def deploy() -> None:
    """Deploys the flows of prefect.yaml in this folder to the server at PREFECT_API_URL."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(PIPELINE)
            is_new = False
        except ObjectNotFound:
            is_new = True
        subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], check=True)
        if is_new:
            deployment = client.read_deployment_by_name(PIPELINE)
            nightly = DeploymentScheduleCreate(schedule=CronSchedule(cron=NIGHTLY, timezone="UTC"), active=False)
            client.create_deployment_schedules(deployment.id, [nightly])
        keep_automations(client)


def keep_automations(client: Any) -> None:
    """Makes `automations`, and changes those of an earlier version. One that was switched off stays off.

    client: a synchronous one of Prefect. What is as it should be is not touched: a change forgets what has been seen.
    """
    present = {found.name: found for found in client.read_automations()}
    for automation in automations():
        found = present.get(automation.name)
        if found is None:
            client.create_automation(automation)
        elif (found.trigger, found.actions) != (automation.trigger, automation.actions):
            client.update_automation(found.id, automation.model_copy(update={"enabled": found.enabled}))


def automations() -> list[Any]:
    """A run without heartbeats, or whose process ended without a result, is scheduled again: the same run, which adopts
    the job that its stage has left on the cluster. The flow limits how often."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ours: dict[str, Any] = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
    lost_pod = "its pod was lost"
    restart = ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=lost_pod, force=False)
    every_run: dict[str, Any] = {"match": {"prefect.resource.id": "prefect.flow-run.*"}, "match_related": ours}
    lost = EventTrigger(
        **every_run,
        posture=Posture.Proactive,
        after={HEARTBEAT},
        expect={"prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=LOST_SECONDS),
    )
    crashed = EventTrigger(
        **every_run,
        posture=Posture.Reactive,
        after={"prefect.flow-run.Running"},  # not one whose pod cannot start: it would crash again and again
        expect={"prefect.flow-run.Crashed"},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=LONGEST_RUN,
    )
    return [
        AutomationCore(name="phantom: runs without a heartbeat", trigger=lost, actions=[restart]),
        AutomationCore(name="phantom: crashed runs", trigger=crashed, actions=[restart]),
    ]


if __name__ == "__main__":
    deploy()
