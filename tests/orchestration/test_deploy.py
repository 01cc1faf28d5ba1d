"""The automations that start a run again whose pod was lost, on a real server."""

from __future__ import annotations

from datetime import timedelta

import pytest

from phantom.orchestration.deploy import automations, keep_automations


def test_automations_of_an_earlier_version_are_changed_and_others_are_not_touched(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        keep_automations(client)
        made = {each.name: each for each in client.read_automations()}
        wanted = {each.name: each for each in automations()}
        assert made.keys() == wanted.keys()

        crashed = "phantom: crashed runs"  # which once started a run again whose pod had never started
        trigger = wanted[crashed].trigger.model_copy(update={"after": set(), "within": timedelta(0)})
        earlier = wanted[crashed].model_copy(update={"trigger": trigger, "enabled": False})
        client.update_automation(made[crashed].id, earlier)
        keep_automations(client)
        now = {each.name: each for each in client.read_automations()}
        assert [each.id for each in now.values()] == [each.id for each in made.values()]
        assert all(now[name].trigger == each.trigger for name, each in wanted.items())
        assert not now[crashed].enabled  # by whoever switched it off

        monkeypatch.setattr(client, "update_automation", lambda *_: pytest.fail("changed"))
        keep_automations(client)
