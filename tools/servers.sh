#!/usr/bin/env bash
# Build the servers and clients that the integration tests talk to, into .servers/bin; `make servers` calls this.
# Needs Go and its module proxy; about two minutes when cold, nothing when they are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=(
  github.com/versity/versitygw/cmd/versitygw@v1.8.0      # an S3 server over a directory
  github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4     # a gRPC client that is not ours
)

bin=$PWD/.servers/bin
mkdir -p "$bin"
for tool in "${tools[@]}"; do
  name=$(basename "${tool%@*}")
  version=${tool#*@}
  stamp=$bin/.$name-$version
  if [ -x "$bin/$name" ] && [ -e "$stamp" ]; then
    echo "$name $version: there"
    continue
  fi
  if ! command -v go >/dev/null; then
    echo "$name $version: cannot be built, there is no 'go' on PATH. Install Go 1.26 or newer (https://go.dev/dl)." >&2
    exit 1
  fi
  log=$(mktemp)
  started=$SECONDS
  if ! CGO_ENABLED=0 GOBIN=$bin go install -trimpath -ldflags '-s -w' "$tool" >"$log" 2>&1; then
    cat "$log" >&2
    echo "$name $version: go install failed, see above." >&2
    exit 1
  fi
  rm -f "$log" "$bin/.$name-"*
  touch "$stamp"
  echo "$name $version: built in $((SECONDS - started)) s"
done
