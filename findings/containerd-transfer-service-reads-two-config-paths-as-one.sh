#!/usr/bin/env bash
# containerd's default registry config_path names two directories with a colon between them.
# A CRI pull through the transfer service, the default since 2.1, takes the whole string as
# one directory: it finds neither, and asks no mirror. A local pull looks into both. Root.
set -euo pipefail
VERSION=${VERSION:-2.4.2} CRI_API=0.36.0
dir=$(mktemp -d); pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"; GOBIN=$dir GOFLAGS=-mod=mod go install -tags no_btrfs "github.com/containerd/containerd/v2/cmd/containerd@v$VERSION"
mkdir pull first second
cat >pull/main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	conn, err := grpc.NewClient("unix://"+os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err = cri.NewImageServiceClient(conn).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: os.Args[2]}}, grpc.WaitForReady(true))
	fmt.Println("pull:", err)
}
GO
(cd pull && go mod init pull && go get "k8s.io/cri-api@v$CRI_API" && go mod tidy && go build -o ../cri-pull .) >/dev/null 2>&1

# A mirror that only notes that it was asked. Nothing listens on the registry's own port.
cat >mirror.py <<'PY'
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self): open('asked', 'a').write(self.path + '\n'); self.send_error(404)
    do_HEAD = do_GET
s = http.server.HTTPServer(('127.0.0.1', 0), H)
open('port', 'w').write(str(s.server_port))
s.serve_forever()
PY
python3 mirror.py 2>/dev/null & pids+=($!)
until [ -s port ]; do sleep 0.1; done; registry=127.0.0.1:1
mkdir "first/$registry"
printf '[host."http://127.0.0.1:%s"]\n  capabilities = ["pull", "resolve"]\n' "$(cat port)" >"first/$registry/hosts.toml"

ask() { # config_path, use_local_image_pull -> asked or not asked
	rm -rf asked run; mkdir run
	cat >run/config.toml <<TOML
version = 3
root = '$dir/run/root'
state = '$dir/run/state'
disabled_plugins = ['io.containerd.nri.v1.nri', 'io.containerd.tracing.processor.v1.otlp', 'io.containerd.internal.v1.tracing']
[grpc]
  address = '$dir/run/c.sock'
[plugins.'io.containerd.cri.v1.images']
  use_local_image_pull = $2
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '$1'
TOML
	./containerd -c run/config.toml >run/log 2>&1 & local pid=$!; pids+=("$pid")
	./cri-pull "$dir/run/c.sock" "$registry/app:1" >run/pull 2>&1 || true
	kill "$pid"; wait "$pid" 2>/dev/null || true; [ -s asked ] && echo "asked" || echo "not asked"
}
got="one directory, transfer service: $(ask "$dir/first" false)
two directories, transfer service: $(ask "$dir/first:$dir/second" false)
two directories, local pull: $(ask "$dir/first:$dir/second" true)"
echo "# version: containerd $VERSION, CRI API $CRI_API"
echo "# behaviour: whether the mirror in the first directory is asked"; echo "$got"
[ "$got" = "one directory, transfer service: asked
two directories, transfer service: not asked
two directories, local pull: asked" ] || { echo "changed"; exit 1; }
