package cluster_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// imageName is how the manifests name the image.
const imageName = "ghcr.io/tidewaiter/tidewaiter"

// root is the directory of the module under test.
func (s *scene) root() string {
	s.Helper()
	out, err := exec.CommandContext(s.ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/tidewaiter/tidewaiter").Output()
	s.must(err)
	return strings.TrimSpace(string(out))
}

// release builds the image as `make image` does, for this machine alone, imports it
// as somebody without a registry would, and returns its name.
func (s *scene) release(version string) string {
	s.Helper()
	name := imageName + ":" + version
	dir, err := os.MkdirTemp(s.Dir, "image-")
	s.must(err)
	s.build(dir, version)
	cmd := exec.CommandContext(s.ctx, "go", "run", "./deploy/image", "-name", name, "-o", dir, filepath.Join(dir, "tidewaiter"))
	cmd.Dir = s.root()
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("%v: %s", err, out)
	}
	_, err = s.Ctr(s.ctx, "images", "import", filepath.Join(dir, "tidewaiter.tar"))
	s.must(err)
	return name
}

// build builds the program with a version, by the line of the Makefile for images.
func (s *scene) build(dir, version string) {
	s.Helper()
	cmd := exec.CommandContext(s.ctx, "go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w -X main.version="+version,
		"-o", filepath.Join(dir, "tidewaiter"), "./cmd/tidewaiter")
	cmd.Dir = s.root()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("%v: %s", err, out)
	}
}

// manifests copies deploy/ onto the machine, into /tmp/deploy.
func (s *scene) manifests() {
	s.Helper()
	s.must(os.CopyFS(s.Path("/tmp/deploy"), os.DirFS(filepath.Join(s.root(), "deploy"))))
}
