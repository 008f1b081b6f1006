package reconcile

import (
	"bytes"
	"encoding/hex"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// A requirements is a file with what images were asked for when their signatures were
// last looked for: hashes of statements with their trust stores. A gate that starts
// with a root of trust that the one before had not finds that out by it. Nothing
// rests on it but when mirrors are asked. Without a directory it keeps nothing.
type requirements struct {
	dir     string
	earlier map[[32]byte]bool // nil: there is no file
	last    []byte            // what is written
}

const (
	requirementsFile = "refreshed"
	maxRequirements  = 256 << 10 // bytes
)

// read reads what an earlier process left. What cannot be read, or is broken, counts
// as none.
func (f *requirements) read() {
	if f.dir == "" {
		return
	}
	file, err := os.Open(filepath.Join(f.dir, requirementsFile))
	if err != nil {
		return
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxRequirements+1))
	if err != nil || len(raw) > maxRequirements {
		return
	}
	known := map[[32]byte]bool{}
	for line := range bytes.Lines(raw) {
		var one [32]byte
		line, whole := bytes.CutSuffix(line, []byte("\n"))
		if n, err := hex.Decode(one[:], line[:min(len(line), 64)]); err != nil || n != 32 || len(line) != 64 || !whole {
			return
		}
		known[one] = true
	}
	f.earlier, f.last = known, raw
}

// strange reports whether an earlier process did not know r.
func (f *requirements) strange(r [32]byte) bool { return f.earlier != nil && !f.earlier[r] }

// write replaces the file where list, which may be nil for nothing, says something else.
func (f *requirements) write(list map[[32]byte]bool) error {
	if f.dir == "" || list == nil {
		return nil
	}
	var b bytes.Buffer
	for _, one := range slices.SortedFunc(maps.Keys(list), func(x, y [32]byte) int { return bytes.Compare(x[:], y[:]) }) {
		if one != [32]byte{} {
			b.WriteString(hex.EncodeToString(one[:]) + "\n")
		}
	}
	if f.last != nil && bytes.Equal(f.last, b.Bytes()) {
		return nil
	}
	// Replaced whole: who is killed meanwhile leaves one or the other.
	name := filepath.Join(f.dir, requirementsFile)
	err := durable.ReplaceVolatile(name, durable.Bytes(b.Bytes(), 0o600))
	if err == nil {
		f.last = b.Bytes()
	}
	return err
}
