#!/bin/sh
# Makes the secrets that k8s/ refers to; none is kept in a file. Run again, it changes those of S3 and keeps the
# database's, which are drawn here once.
#
#   PHANTOM_ARTIFACTS=s3://bucket/phantom AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... k8s/secrets.sh
#
# AWS_ENDPOINT_URL for an S3 other than Amazon's. Without keys (a role of the service account) leave the two out.
set -eu
namespace=${NAMESPACE:-phantom}
: "${PHANTOM_ARTIFACTS:?set it to where MLflow keeps artifacts: s3://BUCKET/PREFIX}"

# Through a pipe: what stands in a command's arguments is seen by everyone on this machine.
secret() {
  kubectl --namespace "$namespace" create secret generic "$1" --from-env-file=/dev/stdin --dry-run=client --output=yaml
}

if ! kubectl --namespace "$namespace" get secret phantom-postgres > /dev/null 2>&1; then
  for name in POSTGRES_PASSWORD PREFECT_PASSWORD MLFLOW_PASSWORD; do
    printf '%s=%s\n' "$name" "$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')"
  done | secret phantom-postgres | kubectl create --filename -
fi

{
  printf 'MLFLOW_ARTIFACTS_DESTINATION=%s\n' "$PHANTOM_ARTIFACTS"
  for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL AWS_DEFAULT_REGION HF_TOKEN; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || printf '%s=%s\n' "$name" "$value"
  done
} | secret phantom-s3 | kubectl apply --filename -
