package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/nri"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
)

// TestLowered: a node that enforced and audits says so in its log, its status and its
// metrics, also where the gate was started anew in between.
func TestLowered(t *testing.T) {
	kept := t.TempDir()
	etc := t.TempDir()
	write := func(mode string) {
		t.Helper()
		for name, text := range map[string]string{
			"config.yaml":      "version: 1\nmode: " + mode + "\n",
			"trustpolicy.json": `{"version":"1.0","trustPolicies":[{"name":"x","registryScopes":["*"],"signatureVerification":{"level":"strict"},"trustStores":["ca:x"],"trustedIdentities":["*"]}]}`,
		} {
			if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	var log bytes.Buffer
	gate := func() *daemon {
		d := &daemon{log: slog.New(slog.NewJSONHandler(&log, nil)), resolver: containerd.NewResolver(nil, resolverOptions(nil)), answers: make(chan *nri.Answer, 1), kept: kept}
		t.Cleanup(d.close)
		return d
	}
	see := func(d *daemon, what string, lowered bool, total string) {
		t.Helper()
		s := d.status(nri.State{}, false, nil)
		warned := strings.Contains(strings.Join(s.Warnings, "\n"), "this node enforced until")
		if (s.Configuration.Lowered != nil) != lowered || warned != lowered {
			t.Errorf("%s: lowered %v, warnings %q", what, s.Configuration.Lowered, s.Warnings)
		}
		var text bytes.Buffer
		if err := d.metrics(&text, nri.State{}, false); err != nil || !strings.Contains(text.String(), "\ntidewaiter_mode_lowered_total "+total+"\n") {
			t.Errorf("%s: not %s: %v", what, total, err)
		}
		if strings.Contains(log.String(), "this node enforced, and audits from now on") != lowered {
			t.Errorf("%s: logged\n%s", what, log.String())
		}
		log.Reset()
	}
	d := gate()
	for _, step := range []struct {
		mode    string
		lowered bool
		total   string
	}{{"audit", false, "0"}, {"enforce", false, "0"}, {"audit", true, "1"}, {"enforce", false, "1"}, {"audit", true, "2"}, {"enforce", false, "2"}} {
		write(step.mode)
		d.apply(config.Load(etc))
		see(d, step.mode, step.lowered, step.total)
	}
	write("audit")
	d = gate()
	d.apply(config.Load(etc))
	see(d, "a gate that comes after one that enforced", true, "1")
}
