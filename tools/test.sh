#!/usr/bin/env bash
# All tests: those of tests/cluster, which mostly wait, have the processor first; the others run beside them, and what
# they print comes after. Where there is no cluster, tests/cluster is over at once.
set -uo pipefail
cd "$(dirname "$0")/.."
printed=$(mktemp)
nice -n 15 .venv/bin/python -m pytest -n 2 --dist loadgroup -m "not slow" tests --ignore tests/cluster >"$printed" 2>&1 &
others=$!
trap 'kill -INT $others 2>/dev/null; wait $others; rm -f "$printed"; exit 130' INT TERM
.venv/bin/python -m pytest -n 0 -m "not slow" --durations 15 tests/cluster
on_cluster=$?
tail --pid=$others -n +1 -f "$printed"
wait $others
code=$?
rm -f "$printed"
exit $((on_cluster ? on_cluster : code))
