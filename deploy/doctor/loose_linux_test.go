package doctor

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestLoose: a configuration that others than root may change is no guarantee of root's.
func TestLoose(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, whose files these are")
	}
	f := healthy(t)
	f.ConfigDir = f.Host.Path("/etc/tidewaiter")
	store := filepath.Join(f.ConfigDir, "truststore/x509/ca/node")
	must(t, os.MkdirAll(store, 0o755))
	file := filepath.Join(f.ConfigDir, "config.yaml")
	ca := filepath.Join(store, "ca.crt")
	for _, name := range []string{file, ca} {
		must(t, os.WriteFile(name, nil, 0o644))
	}
	if found := loose(f.ConfigDir); len(found) != 0 {
		t.Errorf("%v", found)
	}
	must(t, os.Chmod(file, 0o664))
	must(t, os.Chown(ca, 1000, 0))
	must(t, os.Chmod(store, 0o777))
	f.Loose = loose(f.ConfigDir)
	slices.Sort(f.Loose)
	want := []string{"config.yaml (0664) can be written to", "ca/node (0777) can be written to", "ca.crt belongs to uid 1000"}
	found := examined(f, "configuration")
	if len(f.Loose) != len(want) || len(found) < len(want) {
		t.Fatalf("%+v", found)
	}
	for k, w := range want {
		if one := found[k]; one.Level != Warn || !strings.Contains(one.Text, w) || !strings.Contains(one.Next, "chown -R root: "+f.ConfigDir) {
			t.Errorf("want %q: %+v", w, one)
		}
	}
	must(t, os.RemoveAll(f.ConfigDir))
	if found := loose(f.ConfigDir); found != nil {
		t.Errorf("%v", found)
	}
}
