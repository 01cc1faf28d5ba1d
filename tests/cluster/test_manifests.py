"""k8s/: every file and overlay against strict schemas and Pod Security; the references between them; job templates."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from phantom.cluster.api import JOB_RESOURCES
from phantom.cluster.outputs import KEEP_ENV
from phantom.cluster.pods import containers, pod_security_violations, pod_templates
from phantom.cluster.render import render
from phantom.cluster.spec import ENV_OF_ONE_RUN, JobSpec, last_spec, make_spec
from phantom.cluster.submit import run_job
from phantom.cluster.validation import validate_manifest, validate_pod
from phantom.config import Compute, load_params, preset_path
from phantom.errors import UserError
from phantom.orchestration.run_settings import START
from tests.cluster.conftest import OF_THE_RUNTIME, Cluster
from tests.cluster.manifests import (
    K8S,
    OAUTH2,
    OURS,
    OVERLAYS,
    SECRETS,
    Manifest,
    applied,
    load,
    needs_kubectl,
    one,
    overlay,
    right_of,
    rights,
    settings_of,
)
from tests.cluster.schemas import schema_errors


def check_all(manifests: list[Manifest]) -> None:
    """Schema, pods, references."""
    for made in manifests:
        where = f"{made['kind']} {made['metadata']['name']}"
        assert schema_errors(made) == [], where
        assert made["kind"] != "Secret", where
        for _, template in pod_templates(made):
            claims = made.get("spec", {}).get("volumeClaimTemplates", [])
            claimed = [{"name": c["metadata"]["name"]} for c in claims]
            pod = {**template["spec"], "volumes": [*template["spec"].get("volumes", []), *claimed]}
            assert [*validate_pod(pod), *pod_security_violations(pod)] == [], where
            for place, container in containers(pod):
                assert set(container["resources"]["requests"]) == {"cpu", "memory"}, f"{where} {place}"
                assert set(container["resources"]["limits"]) == {"cpu", "memory"}, f"{where} {place}"
                assert container["securityContext"]["readOnlyRootFilesystem"] is True, f"{where} {place}"
            served = made["kind"] not in ("CronJob", "PodTemplate")
            for number, container in enumerate(pod["containers"] if served else ()):
                assert {"startupProbe", "readinessProbe"} <= set(container), f"{where} containers[{number}]"
    check_references(manifests)


def check_references(manifests: list[Manifest]) -> None:
    """What a pod names is there: accounts, claims, config maps, priority classes; secrets are the script's."""

    def names(kind: str) -> set[str]:
        return {m["metadata"]["name"] for m in manifests if m["kind"] == kind}

    for made in manifests:
        for _, template in pod_templates(made):
            pod = template["spec"]
            assert pod["serviceAccountName"] in names("ServiceAccount")
            assert pod["priorityClassName"] in names("PriorityClass")
            for volume in pod.get("volumes", []):
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] in names("PersistentVolumeClaim")
                if "configMap" in volume:
                    assert volume["configMap"]["name"] in names("ConfigMap")
            for _, container in containers(pod):
                for source in container.get("envFrom") or []:
                    assert source["secretRef"]["name"] in {*SECRETS, OAUTH2}
                for entry in container.get("env") or []:
                    if "secretKeyRef" in entry.get("valueFrom", {}):
                        assert entry["valueFrom"]["secretKeyRef"]["name"] in SECRETS


# --- kubectl apply -f k8s/ --------------------------------------------------------------------------------------------


def test_what_is_applied_is_valid_and_complete():
    manifests = applied()
    check_all(manifests)
    assert {m["metadata"]["name"] for m in manifests if m["kind"] in ("Deployment", "StatefulSet")} == {
        "postgres",
        "mlflow",
        "prefect-server",
        "worker",
    }
    assert all(m["metadata"].get("namespace", "phantom") == "phantom" for m in manifests)


def test_the_namespace_comes_first_and_no_other_folder_is_needed():
    files = sorted(K8S.glob("*.yaml"))
    assert load(files[0].read_text(encoding="utf-8"))[0]["kind"] == "Namespace"
    base = yaml.safe_load((K8S / "base/kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert [file.name for file in files] == base
    assert all(file.resolve() == (K8S / "base" / file.name).resolve() for file in files)
    assert not [m for m in applied() if "kubeflow" in m["apiVersion"] or "kueue" in m["apiVersion"]]


def test_the_services_request_no_gpu():
    assert "gpu" not in yaml.safe_dump([m for m in applied() if list(pod_templates(m))])


def test_a_kind_without_a_schema_is_an_error():
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        schema_errors({"apiVersion": "v1", "kind": "Podd", "metadata": {"name": "x"}})


def test_network_policies_allow_only_the_stated_connections():
    policies = {m["metadata"]["name"]: m["spec"] for m in applied() if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert "ports" not in policies["among-jobs"]["ingress"][0]  # NCCL chooses
    assert policies["among-jobs"]["ingress"][0]["from"] == [{"podSelector": policies["among-jobs"]["podSelector"]}]
    # Whoever is let out to a service is let in there, and every service has such a way.
    for service in (m for m in applied() if m["kind"] == "Service"):
        port = service["spec"]["ports"][0]["port"]
        component = service["spec"]["selector"]["app.kubernetes.io/component"]
        callers = _components(policies[component]["ingress"][0]["from"][0]["podSelector"])
        assert callers and [p["port"] for p in policies[component]["ingress"][0]["ports"]] == [port]
        for caller in callers:
            out = [
                rule
                for spec in policies.values()
                if "Egress" in spec["policyTypes"] and caller in _components(spec["podSelector"])
                for rule in spec.get("egress") or []
                if {"port": port} in rule.get("ports", [])
            ]
            assert any(component in _components(to.get("podSelector", {})) for r in out for to in r["to"]), caller


def test_cloud_metadata_is_unreachable_and_only_the_worker_reaches_the_api_server():
    open_to: dict[int, set[str]] = {}
    for policy in (m["spec"] for m in applied() if m["kind"] == "NetworkPolicy"):
        for rule in policy.get("egress") or []:
            for block in (to["ipBlock"] for to in rule["to"] if "ipBlock" in to and len(rule["to"]) == 1):
                assert block == {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}
                for port in rule["ports"]:
                    open_to.setdefault(port["port"], set()).update(_components(policy["podSelector"]))
    assert open_to == {443: {"worker", "job", "mlflow", "postgres-backup"}, 6443: {"worker"}}


def _components(selector: Manifest) -> set[str]:
    found = {v for k, v in (selector.get("matchLabels") or {}).items() if k == "app.kubernetes.io/component"}
    for expression in selector.get("matchExpressions") or []:
        found |= set(expression["values"])
    return found


def test_the_workers_role_has_only_the_permissions_it_uses(cluster: Cluster):
    cluster.image(torchrun="test -e again || { touch again; exit 1; }", python="true")
    run_job("train", cluster.params(), cluster.root)
    cluster.add_runtime()
    run_job("train", cluster.params(*OF_THE_RUNTIME), cluster.root)
    with pytest.raises(UserError):
        cluster.image(torchrun="""echo '{"code": 2, "error": "wrong"}' > "$PHANTOM_OUTCOME"; exit 2""")
        run_job("train", cluster.params("train.seed=7"), cluster.root)
    run_job("encode", cluster.params(), cluster.root)
    done = {right_of(request) for request in cluster.api.requests}
    allowed = rights("phantom-worker")
    assert done <= allowed
    looked_at = {("kueue.x-k8s.io", "localqueues", "get")}  # doctor
    a_cancelled = {(kind.group, kind.plural, "delete") for kind in JOB_RESOURCES.values()}
    assert allowed - done == looked_at | (a_cancelled - done) | {("", "pods", "watch")}  # it looks like a list here
    tokens = {
        m["metadata"]["name"]
        for m in applied()
        for _, template in pod_templates(m)
        if template["spec"]["automountServiceAccountToken"]
    }
    assert tokens == {"worker", "phantom-flow-run"}


def test_whatever_runs_or_schedules_flows_logs_json():
    wanted = {"PHANTOM_LOG": "json", "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json"}
    found = [
        {entry["name"]: entry.get("value") for entry in container.get("env") or []}
        for made in applied()
        for _, template in pod_templates(made)
        for container in template["spec"]["containers"]
    ]
    of_flows = [env for env in found if "PREFECT_API_URL" in env]
    assert of_flows and all(wanted.items() <= env.items() for env in of_flows)
    (server,) = [env for env in found if "PREFECT_SERVER_DATABASE_CONNECTION_URL" in env]
    assert server["PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER"] == "json"


def test_no_budget_keeps_a_pod_that_can_save_and_go_on_elsewhere():
    """A drain would wait for the days that a run takes. An integer minAvailable holds for pods of any controller."""
    for budget in (m["spec"] for m in applied() if m["kind"] == "PodDisruptionBudget"):
        assert budget["minAvailable"] == 0 and "maxUnavailable" not in budget
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_mlflow_accepts_its_service_name_and_a_forwarded_port():
    mlflow = one(applied(), "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]
    hosts = next(e["value"] for e in mlflow["env"] if e["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS").split(",")
    assert {"mlflow:*", "mlflow.phantom.svc:*", "localhost:*", "127.0.0.1:*"} <= set(hosts)


def test_what_the_jobs_settings_name_exists():
    manifests = applied()
    for preset in ("mini", "wan2.2-ti2v-5b"):
        settings = load_params(preset_path(preset)).cluster
        one(manifests, "Namespace", settings.namespace)
        one(manifests, "ServiceAccount", settings.service_account)
        one(manifests, "PersistentVolumeClaim", settings.volume)
        if settings.priority_class:
            one(manifests, "PriorityClass", settings.priority_class)
        assert set(settings.secrets) <= SECRETS


def test_the_initial_settings_are_valid():
    params = settings_of(applied())
    assert params.tracking.uri == "http://mlflow:5000" and params.compute.train == "kubernetes"
    for stage in ("encode", "train", "evaluate"):
        assert validate_manifest(render(make_spec(stage, params))) == []


def test_every_run_starts_from_the_images_code_and_the_present_settings(tmp_path: Path):
    (made,) = one(applied(), "PodTemplate", "phantom-flow-run")["template"]["spec"]["initContainers"]
    settings = one(applied(), "ConfigMap", "phantom-settings")["data"]
    image, mounted, checkout = (tmp_path / name for name in ("image", "etc", "workspace"))
    for folder in (image / "flows", mounted, checkout):
        folder.mkdir(parents=True)
    (image / "flows/full_pipeline.py").write_text("new", encoding="utf-8")
    for name, text in settings.items():
        (mounted / name).write_text(text, encoding="utf-8")
    (script,) = made["args"]
    script = script.replace("/opt/phantom", str(image)).replace("/etc/phantom", str(mounted))
    command = [*made["command"], script]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FLOW": "phantom"}
    subprocess.run(command, cwd=checkout, env=env, check=True, capture_output=True)
    assert (checkout / "flows/full_pipeline.py").read_text(encoding="utf-8") == "new"
    written = load_params(checkout / "params.yaml")
    assert written == settings_of(applied())
    (checkout / "params.yaml").write_text("of an earlier version, and of another run", encoding="utf-8")
    (checkout / "flows/of_an_earlier_version.py").touch()
    (checkout / "data").mkdir()
    (mounted / "settings").write_text(settings["settings"] + "train.steps=7\n", encoding="utf-8")
    subprocess.run(command, cwd=checkout, env=env, check=True, capture_output=True)
    now = load_params(checkout / "params.yaml")
    assert (now.train.steps, now.cluster, now.tracking) == (7, written.cluster, written.tracking)
    assert load_params(checkout / START) == now
    assert [path.name for path in (checkout / "flows").iterdir()] == ["full_pipeline.py"]
    assert {path.name for path in checkout.iterdir()} == {".dvc", "data", "flows", "params.yaml"}  # no backups

    with (checkout / ".dvc/tmp/phantom/lock").open("w") as lock:  # a run of the pipeline is active there
        fcntl.flock(lock, fcntl.LOCK_EX)
        (checkout / "params.yaml").write_text("of that run", encoding="utf-8")
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=checkout, env=env, timeout=1, capture_output=True)
        subprocess.run(command, cwd=checkout, env=env | {"FLOW": "phantom-study"}, check=True, capture_output=True)
        assert (checkout / "params.yaml").read_text(encoding="utf-8") == "of that run"


def test_images_are_pinned():
    for made in applied():
        for _, template in pod_templates(made):
            for _, container in containers(template["spec"]):
                name, _, version = container["image"].partition(":")
                assert name in (*OURS, "postgres") and re.fullmatch(r"\d+\.\d+.*", version), container["image"]


# --- overlays ---------------------------------------------------------------------------------------------------------


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_builds_and_is_valid(name: str):
    manifests = overlay(name)
    check_all(manifests)
    params = settings_of(manifests)
    locking = params.cluster.lock_memory
    level = one(manifests, "Namespace", "phantom")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == ("privileged" if locking else "restricted")
    for stage in ("encode", "train", "evaluate"):
        assert validate_manifest(render(make_spec(stage, params)), locking) == []


@needs_kubectl
def test_what_each_overlay_is_for():
    dev = overlay("dev")
    assert not one(dev, "PodTemplate", "phantom-flow-run")["template"]["spec"]["initContainers"]
    assert one(dev, "PersistentVolume", "phantom-workspace")["spec"]["hostPath"]["path"] == "/phantom"
    for name, storage in (("eks", "phantom-efs"), ("gke", "standard-rwx")):
        assert one(overlay(name), "PersistentVolumeClaim", "phantom-workspace")["spec"]["storageClassName"] == storage
    kueue = overlay("kueue")
    queue = settings_of(kueue).cluster.queue
    local = one(kueue, "LocalQueue", queue)
    one(kueue, "ClusterQueue", local["spec"]["clusterQueue"])
    assert (K8S / "kueue/queues.yaml").resolve() == (K8S / "overlays/kueue/queues.yaml").resolve()
    rdma = settings_of(overlay("rdma")).cluster
    assert rdma.lock_memory and rdma.resources == ("rdma/ib=1",)


@needs_kubectl
def test_from_outside_everything_goes_through_the_login():
    outside = overlay("ingress")
    (ingress,) = [m for m in outside if m["kind"] == "Ingress"]
    hosts = {rule["host"]: rule["http"]["paths"] for rule in ingress["spec"]["rules"]}
    assert ingress["spec"]["tls"] == [{"hosts": list(hosts), "secretName": "phantom-tls"}]
    assert ingress["metadata"]["annotations"].keys() == {"cert-manager.io/cluster-issuer"}
    service = one(outside, "Service", "oauth2-proxy")["spec"]
    proxy = one(outside, "Deployment", "oauth2-proxy")["spec"]["template"]["spec"]["containers"]
    ports = {c["ports"][0]["name"]: (c["ports"][0]["containerPort"], c["args"]) for c in proxy}
    for host, paths in hosts.items():
        ((port, args),) = [ports[path["backend"]["service"]["port"]["name"]] for path in paths]
        assert paths[0]["backend"]["service"]["name"] == "oauth2-proxy"
        assert port in [entry["port"] for entry in service["ports"]]
        assert f"--http-address=0.0.0.0:{port}" in args and f"--redirect-url=https://{host}/oauth2/callback" in args
        assert "--pass-basic-auth=false" in args and "--email-domain=*" not in args
    upstreams = {arg.partition("=")[2] for _, args in ports.values() for arg in args if arg.startswith("--upstream=")}
    assert upstreams == {"http://prefect-server:4200", "http://mlflow:5000"}
    # The servers have their passwords still, and their policies admit the login, not the ingress controller.
    servers = [one(outside, "Deployment", name)["spec"]["template"]["spec"] for name in ("prefect-server", "mlflow")]
    env = {entry["name"]: entry for pod in servers for entry in pod["containers"][0]["env"]}
    assert {"PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_AUTH_ADMIN_PASSWORD"} <= env.keys()
    assert env["PREFECT_SERVER_UI_API_URL"]["value"] == "https://prefect.example.com/api"
    there = {m["metadata"]["name"]: m["spec"] for m in outside if m["kind"] == "NetworkPolicy"}
    for name in {"from-oauth2-proxy", "prefect-server", "mlflow"}:
        assert all("podSelector" in source for rule in there[name]["ingress"] for source in rule["from"])
    (mlflow,) = one(applied(), "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    before = next(entry["value"] for entry in mlflow["env"] if entry["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS")
    assert env["MLFLOW_SERVER_ALLOWED_HOSTS"]["value"] == f"{before},mlflow.example.com"


# --- job templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*(f"{stage}.yaml" for stage in Compute.model_fields), "trainer-v2/train.yaml"])
def test_a_job_template_equals_the_submitted_job_but_is_suspended(file: str):
    templates = load((K8S / "jobs" / file).read_text(encoding="utf-8"))
    stage = Path(file).stem
    operator = "trainjob" if file.startswith("trainer") else "pytorchjob"
    spec = make_spec(stage, load_params(preset_path("wan2.2-ti2v-5b"), [f"cluster.operator={operator}"]))
    specs = [spec] if spec.indexes is None else [spec, last_spec(spec)]
    for template, submitted in zip(templates, specs, strict=True):
        _assert_equals_but_is_suspended(template, submitted, stage, spec.name)


def _assert_equals_but_is_suspended(template: Manifest, spec: JobSpec, stage: str, name: str) -> None:
    assert schema_errors(template) == [] and validate_manifest(template) == []
    submitted = yaml.safe_load(yaml.safe_dump(render(spec)).replace(name, f"phantom-{stage}"))
    assert template["spec"].pop("suspend", False) or template["spec"]["runPolicy"].pop("suspend")
    submitted["spec"].get("runPolicy", {}).pop("suspend", None)
    command = _bare(template)
    assert f"-m phantom.cli {stage}" in command and command.endswith(f"--set compute.{stage}=local")
    _bare(submitted)
    del submitted["metadata"]["annotations"]
    assert template == submitted


def _bare(manifest: Manifest) -> str:
    """Takes the command and the settings out, which a template has from the volume. Returns the command."""
    container: Manifest = manifest["spec"]["trainer"] if manifest["kind"] == "TrainJob" else {}
    for _, template in pod_templates(manifest):
        (container,) = template["spec"]["containers"]
    container["env"] = [entry for entry in container["env"] if entry["name"] not in (*ENV_OF_ONE_RUN, KEEP_ENV)]
    return container.pop("command")[-1]


def test_the_training_runtime_makes_restricted_pods():
    (runtime,) = load((K8S / "jobs/trainer-v2/runtime.yaml").read_text(encoding="utf-8"))
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert [*validate_pod(pod), *pod_security_violations(pod)] == []
    as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    assert schema_errors(as_pod) == []
    preset = load_params(preset_path("wan2.2-ti2v-5b"))
    assert pod["terminationGracePeriodSeconds"] == preset.cluster.grace_seconds
    assert (job["name"], pod["containers"][0]["name"]) == ("node", "node")
