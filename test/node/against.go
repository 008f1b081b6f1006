package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// BuildAgainst builds a program of one file against a version of the module whose
// packages it imports, such as "0.12.3" without v, and returns its path. Versions
// of one module cannot be in one program, nor in the go.mod of these tests. The
// cache is that of [FindTools]; a file that changed is built anew.
func BuildAgainst(ctx context.Context, progress io.Writer, source []byte, module, version string) (string, error) {
	sum := sha256.Sum256(source)
	bin, err := cached("against-" + filepath.Base(module) + "-" + version + "-" + hex.EncodeToString(sum[:6]))
	if err != nil {
		return "", err
	}
	unlock, err := lock(ctx, bin)
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	fmt.Fprintf(progress, "building a program against %s %s\n", module, version)
	dir, err := building(bin)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	for name, content := range map[string]string{
		// What it leaves out is what the module's own go.mod requires.
		"go.mod":  fmt.Sprintf("module program\n\ngo 1.26\n\nrequire %s v%s\n", module, version),
		"main.go": string(source),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return "", err
		}
	}
	out := filepath.Join(dir, "program")
	if err := goTool(ctx, dir, []string{"CGO_ENABLED=0"}, "build", "-mod=mod", "-trimpath", "-o", out, "."); err != nil {
		return "", fmt.Errorf("building against %s %s: %w", module, version, err)
	}
	return bin, os.Rename(out, bin)
}
