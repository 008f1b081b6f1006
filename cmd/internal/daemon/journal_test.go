package daemon

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestJournal: lines have the level that journald knows, and only where it reads them.
func TestJournal(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewJSONHandler(journal{&b}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	log.Debug("d", "x", `"level":"ERROR"`)
	log.Info("i\nn", "image", `","level":"ERROR"`)
	log.Warn("w")
	log.Error("e")
	want := []string{"<7>{", "<6>{", "<4>{", "<3>{"}
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	if len(lines) != len(want) {
		t.Fatalf("%q", lines)
	}
	for k, l := range lines {
		if !strings.HasPrefix(l, want[k]) {
			t.Errorf("%s, want %s", l, want[k])
		}
	}

	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	s := info.Sys().(*syscall.Stat_t)
	is := func(w io.Writer) bool { _, is := w.(journal); return is }
	for stream, want := range map[string]bool{"": false, "1:2": false, "nonsense": false, fmt.Sprintf("%d:%d", s.Dev, s.Ino): true} {
		t.Setenv("JOURNAL_STREAM", stream)
		if is(ToJournal(f)) != want {
			t.Errorf("JOURNAL_STREAM=%q: %v", stream, !want)
		}
	}
	if is(ToJournal(&b)) {
		t.Error("a buffer is the journal")
	}
}
