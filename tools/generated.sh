#!/usr/bin/env bash
# Make again what is made of other files: protobuf code, JSON Schemas, docs/spec.md. --check: only tell whether it is current.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out/service/hone/v1" "$out/service/hone/spec" "$out/docs"
protoc=(.venv/bin/python -m grpc_tools.protoc -I protos)
"${protoc[@]}" --python_out="$out/service" --pyi_out="$out/service" protos/hone/v1/*.proto
"${protoc[@]}" --grpc_python_out="$out/service" protos/hone/v1/*_service.proto
.venv/bin/python - "$out" <<'PYTHON'
import sys
from pathlib import Path

from hone.cluster import Cluster
from hone.spec.document import json_schema_text, markdown, with_table

root = Path(sys.argv[1])
page = Path("docs/kubernetes.md").read_text(encoding="utf-8")
(root / "docs/kubernetes.md").write_text(with_table(page, Cluster), encoding="utf-8")
(root / "service/hone/spec/job.schema.json").write_text(json_schema_text(), encoding="utf-8")
(root / "docs/spec.md").write_text(markdown(), encoding="utf-8")
PYTHON
mkdir -p "$out/helm/hone"
.venv/bin/python tools/chart_schema.py "$out/helm/hone/values.schema.json"
mkdir -p "$out/k8s/examples"
for example in mistral-lora smollm-full kubernetes/smollm-two-nodes kubernetes/smollm-queue; do
  HF_HUB_CACHE=/nowhere .venv/bin/hone render "examples/$example.yaml" --config examples/kubernetes/platform.yaml \
    --namespace team-nlp --with-tenant 2>/dev/null >"$out/k8s/examples/$(basename "$example").yaml"
done
if [ "$out" != . ]; then
  status=0
  while IFS= read -r file; do
    cmp -s "$out/$file" "$file" || { echo "$file is not current: run make generated"; status=1; }
  done < <(cd "$out" && find . -type f)
  exit "$status"
fi
