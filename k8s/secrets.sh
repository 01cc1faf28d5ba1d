#!/bin/sh
# Makes the secrets that k8s/ refers to; none is kept in a file. Run again, it changes those of S3 and keeps the passwords
# of the database, Prefect and MLflow, which are drawn here once.
#
#   PHANTOM_ARTIFACTS=s3://bucket/phantom AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... k8s/secrets.sh
#
# Backups of the databases go to PHANTOM_BACKUPS, by default s3://bucket/phantom-backups here.
# For k8s/overlays/ingress also OAUTH2_CLIENT_ID and OAUTH2_CLIENT_SECRET, as registered with the login provider.
# AWS_ENDPOINT_URL for an S3 other than Amazon's. Without keys (a role of the service account) leave the two out.
set -eu
namespace=${NAMESPACE:-phantom}
: "${PHANTOM_ARTIFACTS:?set it to where MLflow keeps artifacts: s3://BUCKET/PREFIX}"

# Through a pipe: what stands in a command's arguments is seen by everyone on this machine.
secret() {
  kubectl --namespace "$namespace" create secret generic "$1" --from-env-file=/dev/stdin --dry-run=client --output=yaml
}

random() {
  head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'
}

# The secret $1 of the lines that the rest of the arguments print, unless there is one.
once() {
  name=$1
  shift
  kubectl --namespace "$namespace" get secret "$name" > /dev/null 2>&1 ||
    "$@" | secret "$name" | kubectl create --filename -
}

once phantom-postgres printf '%s\n' \
  "POSTGRES_PASSWORD=$(random)" "PREFECT_PASSWORD=$(random)" "MLFLOW_PASSWORD=$(random)"
once phantom-prefect printf '%s\n' "PREFECT_API_AUTH_STRING=phantom:$(random)"
# The same in two parts, for Prometheus (k8s/overlays/monitoring).
login=$(kubectl --namespace "$namespace" get secret phantom-prefect --output 'jsonpath={.data.PREFECT_API_AUTH_STRING}' |
  base64 -d)
printf '%s\n' "username=${login%%:*}" "password=${login#*:}" | secret phantom-prefect-scrape | kubectl apply --filename -
once phantom-mlflow printf '%s\n' "MLFLOW_TRACKING_USERNAME=phantom" "MLFLOW_TRACKING_PASSWORD=$(random)"
once phantom-mlflow-server printf '%s\n' "MLFLOW_FLASK_SERVER_SECRET_KEY=$(random)"

{
  printf 'MLFLOW_ARTIFACTS_DESTINATION=%s\n' "$PHANTOM_ARTIFACTS"
  # Not below the artifacts, which everyone reads who reaches MLflow.
  printf 'PHANTOM_BACKUPS=%s\n' "${PHANTOM_BACKUPS:-${PHANTOM_ARTIFACTS%/}-backups}"
  for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL AWS_DEFAULT_REGION HF_TOKEN; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || printf '%s=%s\n' "$name" "$value"
  done
} | secret phantom-s3 | kubectl apply --filename -

# A cookie's key has 32 bytes; a new one logs everybody out.
[ -z "${OAUTH2_CLIENT_ID:-}" ] || printf '%s\n' \
  "OAUTH2_PROXY_CLIENT_ID=$OAUTH2_CLIENT_ID" "OAUTH2_PROXY_CLIENT_SECRET=$OAUTH2_CLIENT_SECRET" \
  "OAUTH2_PROXY_COOKIE_SECRET=$(random | cut -c 1-32)" | secret phantom-oauth2 | kubectl apply --filename -
