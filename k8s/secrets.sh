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

if ! kubectl --namespace "$namespace" get secret phantom-postgres > /dev/null 2>&1; then
  draw() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
  kubectl --namespace "$namespace" create secret generic phantom-postgres \
    --from-literal=POSTGRES_PASSWORD="$(draw)" \
    --from-literal=PREFECT_PASSWORD="$(draw)" \
    --from-literal=MLFLOW_PASSWORD="$(draw)"
fi

set -- --from-literal=MLFLOW_ARTIFACTS_DESTINATION="$PHANTOM_ARTIFACTS"
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL AWS_DEFAULT_REGION HF_TOKEN; do
  eval "value=\${$name:-}"
  if [ -n "$value" ]; then
    set -- "$@" --from-literal="$name=$value"
  fi
done
kubectl --namespace "$namespace" create secret generic phantom-s3 "$@" --dry-run=client --output=yaml |
  kubectl apply --filename -
