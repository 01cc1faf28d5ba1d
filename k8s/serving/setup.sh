#!/bin/sh
# Makes the queue's database and the secret that k8s/serving refers to. Run again, it keeps the database, its password and
# the token, and changes where results are.
#
#   PHANTOM_RESULTS=s3://bucket/videos k8s/serving/setup.sh
#   kubectl -n phantom get secret phantom-serving -o jsonpath='{.data.PHANTOM_SERVE_TOKEN}' | base64 -d
set -eu
namespace=${NAMESPACE:-phantom}
: "${PHANTOM_RESULTS:?set it to where videos are kept: s3://BUCKET/PREFIX}"

random() {
  head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'
}

# The value of a key of the secret, if there is one.
kept() {
  kubectl --namespace "$namespace" get secret phantom-serving --output "jsonpath={.data.$1}" 2> /dev/null | base64 -d
}

token=$(kept PHANTOM_SERVE_TOKEN || true)
password=$(kept PASSWORD || true)
token=${token:-$(random)}
password=${password:-$(random)}

# Through pipes: what stands in a command's arguments is seen by everyone on this machine.
kubectl --namespace "$namespace" exec --stdin statefulset/postgres -- psql --quiet --username postgres --set ON_ERROR_STOP=1 << SQL
SELECT 'CREATE ROLE serving LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'serving') \gexec
ALTER ROLE serving PASSWORD '$password';
SELECT 'CREATE DATABASE serving OWNER serving' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'serving') \gexec
SQL

{
  printf 'PHANTOM_SERVE_TOKEN=%s\n' "$token"
  printf 'PASSWORD=%s\n' "$password"
  printf 'PHANTOM_SERVE_DATABASE=postgresql+psycopg2://serving:%s@postgres:5432/serving\n' "$password"
  printf 'PHANTOM_SERVE_RESULTS=%s\n' "$PHANTOM_RESULTS"
  printf 'KEDA_CONNECTION=postgresql://serving:%s@postgres.%s.svc:5432/serving\n' "$password" "$namespace"
} | kubectl --namespace "$namespace" create secret generic phantom-serving --from-env-file=/dev/stdin --dry-run=client --output=yaml |
  kubectl apply --filename -
