#!/usr/bin/env bash
# Render k8s/install.yaml and k8s/tenant.yaml from the charts and their sample values, for people without Helm.
# usage: tools/k8s.sh [DIRECTORY]     default: k8s. Needs helm: on PATH, or .servers/bin of `make cluster`.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.servers/bin:$PATH
out=${1:-k8s}
mkdir -p "$out"

render() { # FILE CHART NAMESPACE
  cat <<YAML
# Made by tools/k8s.sh from helm/$2 and helm/$2/sample.yaml; do not edit. Replace what is yours (images, store, names), then:
#   kubectl apply -f k8s/$1
apiVersion: v1
kind: Namespace
metadata:
  name: $3
  labels:
    pod-security.kubernetes.io/enforce: restricted
YAML
  helm template "$2" "helm/$2" --namespace "$3" --values "helm/$2/sample.yaml" --kube-version 1.29.0 --skip-tests
}

render install.yaml hone hone-system >"$out/install.yaml"
render tenant.yaml hone-tenant team-a >"$out/tenant.yaml"
