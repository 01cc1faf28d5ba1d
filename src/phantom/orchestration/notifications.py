"""Lets Prefect tell someone of a pipeline or study run that has failed or crashed, through a block that can notify.

    python -m phantom.orchestration.notifications TYPE/NAME

such as slack-webhook/oncall, custom-webhook/oncall or sendgrid-email/oncall: the block is made on the pages of
Prefect's server (Blocks), which keeps its address and password. Called again, it changes the block. PREFECT_API_URL
names the server.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any
from uuid import UUID

from phantom.errors import UserError, listed
from phantom.orchestration.deploy import FLOWS
from phantom.progress import say

NAME = "phantom: tell of failed runs"
STATES = ("Failed", "TimedOut", "Crashed")
SUBJECT = "{{ flow.name }}/{{ flow_run.name }}: {{ flow_run.state.name }}"
BODY = """{{ flow_run.state.message }}
Run {{ flow_run.name }} of {{ flow.name }}, start {{ flow_run.run_count }}
{{ flow_run|ui_url }}
What to do: docs/runbook.md
"""


def notify(block: str) -> None:
    """Makes or changes the automation. block: type and name. Raises UserError if there is no such block."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    with get_client(sync_client=True) as client:
        try:
            document = client.read_block_document_by_name(name, kind)
        except ObjectNotFound:
            blocks = [
                f"{each.block_type.slug}/{each.name}" for each in client.read_block_documents() if each.block_type
            ]
            known = listed(blocks) or "none"
            raise UserError(
                f"block: found {block}, accepted: TYPE/NAME of one that can notify; there are: {known}"
            ) from None
        made = automation(document.id)
        present = client.read_automations_by_name(NAME)
        if present:
            client.update_automation(present[0].id, made)
        else:
            client.create_automation(made)


def automation(block: UUID) -> Any:
    """The automation: one message for each state in `STATES` of each run of the flows."""
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    trigger = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
        posture=Posture.Reactive,
        expect={f"prefect.flow-run.{state}" for state in STATES},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(0),
    )
    action = SendNotification(block_document_id=block, subject=SUBJECT, body=BODY)
    return AutomationCore(name=NAME, trigger=trigger, actions=[action])


if __name__ == "__main__":
    try:
        notify(sys.argv[1] if len(sys.argv) == 2 else "")
    except UserError as error:
        say(str(error))
        sys.exit(error.exit_code)
    say(f"{NAME}: through {sys.argv[1]}")
