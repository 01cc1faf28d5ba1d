"""k8s/overlays/monitoring: what it selects exists, alerts are in the runbook, metrics are exported, and rules fire.

Expressions are parsed, and the rules tried on series, by promtool, where there is one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.cluster.render import render
from phantom.cluster.spec import METRICS_PORT, last_spec, make_spec
from phantom.config import load_params, preset_path
from phantom.serving.metrics import Metrics
from phantom.training.metrics import HELP, PREFIX
from tests.cluster.manifests import K8S, ROOT, SECRETS, Manifest, applied, load, needs_kubectl, one
from tests.cluster.schemas import schema_errors

FOLDER = K8S / "overlays/monitoring"
RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
PROMTOOL = shutil.which("promtool")
OTHERS = {  # metrics of other exporters, as their documentation names them
    "kube-state-metrics": {
        "kube_cronjob_created",
        "kube_cronjob_status_last_successful_time",
        "kube_deployment_status_replicas_available",
        "kube_job_status_failed",
        "kube_pod_status_phase",
        "kube_statefulset_status_replicas_ready",
    },
    "kubelet": {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"},
    "kueue": {"kueue_pending_workloads"},
    "DCGM": {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_POWER_USAGE"},
}
METRIC = re.compile(r"\b(?:phantom|kube|kubelet|kueue|DCGM)_\w+\b(?!=)")  # not a label, which stands before = or =~
VARIABLE = re.compile(r"\$\{?(\w+)")

needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="no promtool")


def manifests(file: str) -> list[Manifest]:
    return load((FOLDER / file).read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    (made,) = manifests("rules.yaml")
    return [rule for group in made["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def jobs() -> dict[str, Manifest]:
    """The manifests of the jobs of every stage."""
    params = load_params(preset_path("wan2.2-ti2v-5b"))
    specs = [make_spec(stage, params) for stage in ("encode", "train", "evaluate")]
    return {spec.name: render(spec) for spec in (*specs, last_spec(specs[0]), last_spec(specs[2]))}


def exported() -> set[str]:
    """Names of the metrics of training and of `phantom serve`."""

    class Queue:
        limit = 1

        def now(self) -> float:
            return 0.0

        def counts(self) -> dict[str, int]:
            return {"queued": 0}

        def workers(self, host: str) -> list[Any]:
            return []

        def finished_since(self, seen: float, host: str) -> list[Any]:
            return []

    served = Metrics(Queue(), "here").text().decode()  # type: ignore[arg-type]
    return {f"{PREFIX}{name}" for name in HELP} | set(re.findall(r"^# TYPE (\w+)", served, re.MULTILINE))


# --- the manifests ----------------------------------------------------------------------------------------------------


@needs_kubectl
def test_the_overlay_builds_and_its_manifests_are_valid():
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = load(done.stdout)
    assert {m["metadata"]["namespace"] for m in made} == {"phantom"}
    figures = one(made, "ConfigMap", "phantom-dashboard")
    assert figures["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(figures["data"]["phantom.json"]) == dashboard()
    for each in made:
        assert schema_errors(each) == [], each["metadata"]["name"]


def test_what_is_scraped_exists_and_prometheus_may_reach_it():
    (training,) = [m for m in manifests("monitors.yaml") if m["kind"] == "PodMonitor"]
    (job,) = [job for job in jobs().values() if job["kind"] == "PyTorchJob"]
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert training["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert set(training["spec"]["podTargetLabels"]) <= set(template["metadata"]["labels"])
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert [ports[end["port"]] for end in training["spec"]["podMetricsEndpoints"]] == [METRICS_PORT]
    services = [m for m in (*applied(), *load((K8S / "serving/serving.yaml").read_text())) if m["kind"] == "Service"]
    reached = {METRICS_PORT}
    for monitor in manifests("monitors.yaml"):
        if monitor["kind"] == "ServiceMonitor" and monitor["metadata"]["name"] != "phantom-dcgm":
            selector = monitor["spec"]["selector"]["matchLabels"].items()
            (service,) = [s for s in services if selector <= s["metadata"]["labels"].items()]
            (port,) = service["spec"]["ports"]
            (login,) = [end.get("basicAuth", {}) for end in monitor["spec"]["endpoints"]]
            assert {key["name"] for key in login.values()} <= SECRETS
            assert [end["port"] for end in monitor["spec"]["endpoints"]] == [port["name"]]
            reached.add(port["port"])
    policies = [m["spec"] for m in manifests("network.yaml") if "ingress" in m["spec"]]
    assert {port["port"] for spec in policies for rule in spec["ingress"] for port in rule["ports"]} == reached
    server = one(applied(), "Deployment", "prefect-server")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "PREFECT_SERVER_METRICS_ENABLED", "value": "true"} in server["env"]


def test_alerts_name_what_there_is():
    """Pods and jobs by the patterns of the rules, services by name."""
    text = "\n".join(rule["expr"] for rule in rules())
    pods = [f"{name}-worker-0" for name in jobs()]
    for pattern in set(re.findall(r'pod=~"([^"]+)"', text)):
        assert any(re.fullmatch(pattern, pod) for pod in pods), pattern
    (encode,) = set(re.findall(r'job_name=~"([^"]+encode[^"]+)"', text))
    assert sum(bool(re.fullmatch(encode, name)) for name in jobs()) == 2  # the parts and their merge
    (deployments,) = set(re.findall(r'deployment=~"([^"]+)"', text))
    assert set(deployments.split("|")) == {m["metadata"]["name"] for m in applied() if m["kind"] == "Deployment"}
    for stateful in set(re.findall(r'statefulset="([^"]+)"', text)):
        one(applied(), "StatefulSet", stateful)
    (queue,) = set(re.findall(r'cluster_queue="([^"]+)"', text))
    one(load((K8S / "kueue/queues.yaml").read_text(encoding="utf-8")), "ClusterQueue", queue)


def test_every_alert_has_an_entry_in_the_runbook_and_every_entry_an_alert():
    entries = re.findall(r"^### (Phantom\w+)$", RUNBOOK, re.MULTILINE)
    assert entries == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("warning", "critical")
    assert "runbook.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_metrics_of_rules_and_dashboard_are_exported():
    ours = {name for name in exported() if name.startswith("phantom_")}
    known = ours.union(*OTHERS.values())
    for expression in (*queries(), *(rule["expr"] for rule in rules())):
        named = set(METRIC.findall(re.sub(r"(by|on) \([^)]*\)", "", expression)))
        assert named and named <= known, expression
    shown = {name for query in queries() for name in METRIC.findall(query)}
    assert {f"{PREFIX}{name}" for name in HELP} <= shown  # nothing is exported in vain


def test_the_dashboard_is_whole():
    found = dashboard()
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids) and found["uid"] and found["schemaVersion"] >= 36
    cells = [cell for panel in found["panels"] for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells) and all(x < 24 for x, _ in cells)
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert {name for query in queries() for name in VARIABLE.findall(query)} <= variables
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def _cells(place: dict[str, int]) -> list[tuple[int, int]]:
    return [(place["x"] + x, place["y"] + y) for x, y in product(range(place["w"]), range(place["h"]))]


# --- by promtool ------------------------------------------------------------------------------------------------------


def promtool(folder: Path, *arguments: str, **files: Any) -> str:
    for name, content in files.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = subprocess.run([str(PROMTOOL), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_expressions_are_valid(tmp_path: Path):
    asked = [VARIABLE.sub(".*", query) for query in queries()]
    recorded = [{"record": f"panel_{number}", "expr": query} for number, query in enumerate(asked)]
    groups = [*manifests("rules.yaml")[0]["spec"]["groups"], {"name": "panels", "rules": recorded}]
    promtool(tmp_path, "check", "rules", "rules.yml", rules={"groups": groups})


RUN = 'namespace="phantom", phantom_job="phantom-train-1", model="phantom", pod="phantom-train-1-worker-0"'
POD = 'namespace="phantom", pod="phantom-train-1-worker-0"'
BACKUP = '{namespace="phantom", cronjob="postgres-backup"}'
# alert: (series, minute at which it is not yet raised, minute at which it is)
CASES = {
    "PhantomTrainingNoProgress": ({f"{PREFIX}last_progress_timestamp_seconds{{{RUN}}}": "60 600+0x60"}, 25, 28),
    "PhantomTrainingSilent": ({f'kube_pod_status_phase{{{POD}, phase="Running"}}': "1+0x60"}, 29, 31),
    "PhantomTrainingNotFinite": ({f"{PREFIX}bad_steps{{{RUN}}}": "0+0x9 1 0+0x60"}, 9, 15),
    "PhantomAlphaHeldAtZero": ({f"{PREFIX}alpha_stalled{{{RUN}}}": "0+0x10 1+0x60"}, 14, 17),
    "PhantomGpuIdle": ({f'DCGM_FI_DEV_GPU_UTIL{{{POD}, gpu="0"}}': "90+0x10 0+0x60"}, 35, 45),
    "PhantomJobQueued": ({f'kube_pod_status_phase{{{POD}, phase="Pending"}}': "1+0x90"}, 59, 61),
    "PhantomEncodeIndexFailed": (
        {'kube_job_status_failed{namespace="phantom", job_name="phantom-encode-1"}': "0+0x9 2+0x60"},
        9,
        11,
    ),
    "PhantomDiskNearlyFull": (
        {
            'kubelet_volume_stats_available_bytes{namespace="phantom", persistentvolumeclaim="w"}': "50-1x60",
            'kubelet_volume_stats_capacity_bytes{namespace="phantom", persistentvolumeclaim="w"}': "100+0x60",
        },
        50,
        52,
    ),
    "PhantomPostgresDown": (
        {'kube_statefulset_status_replicas_ready{namespace="phantom", statefulset="postgres"}': "1 0+0x60"},
        5,
        7,
    ),
    "PhantomServiceDown": (
        {'kube_deployment_status_replicas_available{namespace="phantom", deployment="mlflow"}': "1 0+0x60"},
        10,
        12,
    ),
    "PhantomBackupMissing": (
        {
            f"kube_cronjob_created{BACKUP}": "0+0x3000",
            f"kube_cronjob_status_last_successful_time{BACKUP}": "_x60 3600+0x3000",
        },
        36 * 60 + 30,
        37 * 60 + 2,
    ),
}


@needs_promtool
def test_every_alert_is_raised_when_it_should_and_not_before(tmp_path: Path):
    assert set(CASES) == {rule["alert"] for rule in rules()}
    tests = []
    for alert, (series, quiet, raised) in CASES.items():
        asked = [
            {"expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)', "eval_time": f"{at}m"}
            | {"exp_samples": [{"labels": "{}", "value": value}]}
            for at, value in ((quiet, 0), (raised, 1))
        ]
        given = [{"series": name, "values": values} for name, values in series.items()]
        tests.append({"name": alert, "interval": "1m", "input_series": given, "promql_expr_test": asked})
    rule_file = {"groups": manifests("rules.yaml")[0]["spec"]["groups"]}
    cases = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    promtool(tmp_path, "test", "rules", "cases.yml", rules=rule_file, cases=cases)
