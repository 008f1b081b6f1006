package node

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tool")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, path); err == nil {
		t.Fatal("locked twice")
	}
	unlock()
	again, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// TestFailedBuild: a build that fails says why and leaves nothing that the next
// one takes for a tool, and neither does one that was killed before.
func TestFailedBuild(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TIDEWAITER_TEST_CACHE", dir)
	if err := os.MkdirAll(filepath.Join(dir, "tool-1.0.0.building"), 0o755); err != nil {
		t.Fatal(err)
	}
	var progress bytes.Buffer
	// A path whose first element has no dot is refused without asking a network.
	_, err := install(t.Context(), &progress, tool{name: "tool", version: "v1.0.0", takes: "no time", packages: []string{"nowhere/tool"}})
	if err == nil || !strings.Contains(err.Error(), "nowhere/tool@v1.0.0") || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("error: %v", err)
	}
	if progress.String() != "building tool 1.0.0 (about no time the first time)\n" {
		t.Errorf("progress: %q", progress.String())
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != "tool-1.0.0.lock" {
		t.Errorf("left in the cache: %v, %v", left, err)
	}
	if _, err := install(t.Context(), &progress, tool{name: "tool", version: "../1"}); err == nil {
		t.Error("took a path for a version")
	}
	// One that is built in a module of its own.
	_, err = install(t.Context(), &progress, tool{name: "tool", version: "1.0.0", module: "nowhere", packages: []string{"nowhere/tool"}})
	if err == nil || !strings.Contains(err.Error(), "nowhere") || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("error: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("left in the cache: %v, %v", left, err)
	}
}
