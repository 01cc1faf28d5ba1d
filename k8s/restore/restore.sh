#!/bin/sh
# Brings Prefect's and MLflow's databases back from a backup: the newest, or the one that is named.
#
#   k8s/restore/restore.sh [20260131T013000Z]
#
# Both servers are stopped meanwhile; jobs that run go on. Roles and passwords are those of the secret phantom-postgres: on
# a new, empty volume Postgres makes them when it starts.
set -eu
namespace=${NAMESPACE:-phantom}
servers='deployment/prefect-server deployment/mlflow'
k() {
  kubectl --namespace "$namespace" "$@"
}

trap 'k scale $servers --replicas 1' EXIT
k scale $servers --replicas 0
while k get pods --selector 'app.kubernetes.io/component in (prefect-server, mlflow)' --output name | grep -q .; do
  sleep 2
done
job=$(sed "s/value: \"\" # the newest/value: \"${1:-}\"/" "$(dirname "$0")/job.yaml" | k create --filename - --output name)
# Until it has succeeded or failed.
until k get "$job" --output 'jsonpath={.status.conditions[*].type}' | grep -Eq 'Complete|Failed'; do
  sleep 5
done
k logs "$job" --all-containers
k wait "$job" --for condition=complete --timeout 0s
