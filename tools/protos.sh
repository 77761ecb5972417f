#!/bin/sh
# Generate service/hone/v1 from protos/; `tools/protos.sh --check` fails when what is committed is not current.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=service
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" protos/hone/v1/*.proto
"$python" -m grpc_tools.protoc -I protos --grpc_python_out="$out" protos/hone/v1/*_service.proto
if [ "$out" != service ]; then
  diff -r -x __init__.py -x __pycache__ "$out/hone/v1" service/hone/v1 ||
    { echo "service/hone/v1 is not current: run tools/protos.sh" >&2; exit 1; }
fi
