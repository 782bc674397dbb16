#!/bin/bash
# Waits for the server of a job and asks it one thing:
#
#   bash examples/slurm/ask.sh JOB "Machine learning is"
set -euo pipefail

name=server-$1
last=
until [ -f "$name.address" ]; do
  state=$(squeue --noheader --format="%T %R" --jobs="$1" 2>/dev/null || true)
  [ -n "$state" ] || { echo "job $1 has ended without a server; its log says why" >&2; exit 1; }
  [ "$state" = "$last" ] || echo "job $1: $state" >&2
  last=$state
  sleep 1
done
address=$(sed -n 's/^http=//p' "$name.address")
prompt=${2//\\/\\\\}
curl --silent --show-error --fail-with-body "$address/v1/completions" \
  --header "Authorization: Bearer $(cat "$name.key")" --header "Content-Type: application/json" \
  --data "{\"prompt\": \"${prompt//\"/\\\"}\", \"max_tokens\": 32, \"temperature\": 0}"
echo
