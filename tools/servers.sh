#!/usr/bin/env bash
# Build the servers and clients that tests talk to, into .servers/bin. Needs Go and its module proxy.
#   tools/servers.sh            what integration tests need; `make servers`: about two minutes when cold, nothing when they are there
#   tools/servers.sh --cluster  and a Kubernetes with what goes with it; `make cluster`: about ten minutes more when cold
set -euo pipefail
cd "$(dirname "$0")/.."

programs=(                                                        # name, package@version
  "versitygw  github.com/versity/versitygw/cmd/versitygw@v1.8.0"  # an S3 server over a directory
  "grpcurl    github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4" # a gRPC client that is not ours
)
cluster_programs=(
  "coredns    github.com/coredns/coredns@v1.14.7"
  "helm       helm.sh/helm/v3/cmd/helm@v3.22.0"
  "toxiproxy  github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0"  # a proxy that breaks connections on demand
)
kubernetes_module=$PWD/tests/cluster                              # its go.mod says which versions
kubernetes_programs=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl etcd)

bin=$PWD/.servers/bin
mkdir -p "$bin"
export CGO_ENABLED=0
log=$(mktemp)
scratch=$(mktemp -d)
trap 'rm -rf "$log" "$scratch"' EXIT

build() { # NAME VERSION COMMAND...: the command leaves one program in $scratch
  local name=$1 version=$2 started=$SECONDS
  shift 2
  if [ -x "$bin/$name" ] && [ -e "$bin/.$name-$version" ]; then
    return
  fi
  if ! command -v go >/dev/null; then
    echo "$name $version: cannot be built, there is no 'go' on PATH. Install Go 1.26 or newer (https://go.dev/dl)." >&2
    exit 1
  fi
  if ! "$@" >"$log" 2>&1; then
    cat "$log" >&2
    echo "$name $version: build failed, see above." >&2
    exit 1
  fi
  rm -f "$bin/.$name-"*
  mv "$scratch"/* "$bin/$name"
  touch "$bin/.$name-$version"
  echo "$name $version: built in $((SECONDS - started)) s"
}

install() { # PACKAGE@VERSION
  GOBIN=$scratch go install -trimpath -ldflags '-s -w' "$1"
}

module_version() { # MODULE, as go.mod beside the cluster's harness has it
  awk -v module="$1" '$1 == module { print $2; exit }' "$kubernetes_module/go.mod"
}

build_kubernetes() { # NAME VERSION; without the ldflags a kubelet says that it is v0.0.0
  local package=k8s.io/kubernetes/cmd/$1 where=k8s.io/component-base/version
  local flags="-s -w -X $where.gitVersion=$2 -X $where.gitMajor=1 -X $where.gitMinor=$(cut -d. -f2 <<<"$2")"
  [ "$1" != etcd ] || package=go.etcd.io/etcd/server/v3
  (cd "$kubernetes_module" && go build -trimpath -ldflags "$flags" -o "$scratch/$1" "$package")
}

[ "${1:-}" != --cluster ] || programs+=("${cluster_programs[@]}")
for program in "${programs[@]}"; do
  read -r name package <<<"$program"
  build "$name" "${package#*@}" install "$package"
done
if [ "${1:-}" = --cluster ]; then
  for name in "${kubernetes_programs[@]}"; do
    module=k8s.io/kubernetes
    [ "$name" != etcd ] || module=go.etcd.io/etcd/server/v3
    version=$(module_version $module)
    build "$name" "$version" build_kubernetes "$name" "$version"
  done
fi
