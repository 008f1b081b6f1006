package node

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

func TestParseDump(t *testing.T) {
	for _, version := range []string{"2.4.2", "2.2.9", "2.1.9"} {
		raw, err := os.ReadFile("testdata/dump-" + version + ".toml") // printed by that containerd, with a drop-in that requires the gate
		if err != nil {
			t.Fatal(err)
		}
		e, err := parseDump(raw)
		if err != nil {
			t.Fatal(err)
		}
		knows := version != "2.1.9"
		if e.Knows != knows || e.Requires("tidewaiter") != knows || e.Requires("other") || e.NRIDisabled || e.ConnectionsDisabled {
			t.Errorf("%s: %+v", version, e)
		}
		if e.NoCRI || e.Socket != "/run/containerd/containerd.sock" || e.NRISocket != "/var/run/nri/nri.sock" || e.RequestTimeout != "2s" || e.RegistrationTimeout != "5s" ||
			e.Pause != nodetest.Pause || e.Snapshotter != "overlayfs" || e.Runtimes["runc"] != "io.containerd.runc.v2" || e.Toleration != "" {
			t.Errorf("%s: %+v", version, e)
		}
	}
	for raw, want := range map[string]string{
		"version = 2\n":     "older than containerd 2.0",
		"":                  "older than containerd 2.0",
		"version = 3\n[x\n": "containerd's config dump",
	} {
		if _, err := parseDump([]byte(raw)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", raw, err)
		}
	}
	e, err := parseDump([]byte("version = 3\nplugins = 5\nimports = [1]\n"))
	if err != nil || !e.NRIDisabled || e.Requires("tidewaiter") {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestVersion(t *testing.T) {
	for said, want := range map[string]string{
		"containerd github.com/containerd/containerd/v2 v2.4.2 1e2b3c\n":    "2.4",
		"containerd github.com/containerd/containerd/v2 2.2.9+unknown \n":   "2.2",
		"containerd github.com/k3s-io/containerd/v2 v2.3.4-k3s1\n":          "2.3",
		"containerd containerd.io 1.7.35\n":                                 "1.7",
		"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1": "1.7",
		"nonsense": "",
	} {
		h := &Host{Binary: "c", Run: func(context.Context, string, ...string) (string, error) { return said, nil }}
		major, minor, err := h.Version(t.Context())
		if got := fmt.Sprintf("%d.%d", major, minor); err == nil && got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %s, %v", said, got, err)
		}
	}
}
