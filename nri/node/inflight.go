package node

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// An inflight is a file with the digest of the image that is in hand. What is found
// there at start was in hand when a process died, perhaps because of it: it is
// skipped, and stays in the file, until the directory is emptied. Two processes
// that share the directory during an upgrade may skip each other's image, or lose
// each other's note: either costs the hook one wait. Its zero value keeps nothing.
type inflight struct {
	path string
	skip []digest.Digest
	log  *slog.Logger
}

const (
	inflightFile = "ahead"
	maxSkip      = 16
	maxInflight  = 4 << 10 // bytes
)

// openInflight reads what an earlier process left in dir. What cannot be read, or
// is broken, counts as empty and is replaced.
func openInflight(dir string, log *slog.Logger) *inflight {
	f := &inflight{log: log}
	if dir == "" {
		return f
	}
	f.path = filepath.Join(dir, inflightFile)
	file, err := os.Open(f.path)
	if err != nil {
		return f
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxInflight+1))
	if err != nil || len(raw) > maxInflight {
		return f
	}
	for line := range bytes.Lines(raw) {
		d, err := digest.Parse(strings.TrimSuffix(string(line), "\n"))
		if err != nil || !bytes.HasSuffix(line, []byte("\n")) {
			f.skip = nil
			return f
		}
		if !slices.Contains(f.skip, d) {
			f.skip = append(f.skip, d)
		}
	}
	f.skip = f.skip[max(len(f.skip)-maxSkip, 0):]
	for _, d := range f.skip {
		log.Warn("this image was being looked at ahead of time when an earlier process died; it is not looked at again until a container asks for it", "target", d.String())
	}
	return f
}

func (f *inflight) skips(d digest.Digest) bool { return slices.Contains(f.skip, d) }

// begin notes that d is in hand, end that it is not any more.
func (f *inflight) begin(d digest.Digest) { f.write(append(slices.Clone(f.skip), d)) }
func (f *inflight) end()                  { f.write(f.skip) }

func (f *inflight) write(list []digest.Digest) {
	if f.path == "" {
		return
	}
	var b bytes.Buffer
	for _, d := range list {
		if d.Validate() == nil {
			b.WriteString(d.String() + "\n")
		}
	}
	// Replaced whole: who is killed meanwhile leaves one or the other.
	next := f.path + ".next"
	err := os.WriteFile(next, b.Bytes(), 0o600)
	if err == nil {
		err = os.Rename(next, f.path)
	}
	if err != nil {
		f.log.Debug("the image in hand cannot be noted", "error", err.Error())
	}
}
