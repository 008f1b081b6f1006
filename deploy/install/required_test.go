package install

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/deploy/node/nodetest"
)

const otherRequires = "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['other', 'more']\n"

// TestGivenBack: what others required is required for as long as they say so, and no longer.
func TestGivenBack(t *testing.T) {
	const file, ours = "/etc/containerd/conf.d/50.toml", "/etc/containerd/conf.d/99-tidewaiter.toml"
	s := auditing(t, nodetest.Kubeadm.With(nodetest.Tree{file: otherRequires}))
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	lists := func(want string) {
		t.Helper()
		if text := s.text(t, ours); !strings.Contains(text, "required_plugins = "+want) {
			t.Error(text)
		}
	}
	lists(`["other", "more", "tidewaiter"]`)
	must(t, "again", Nothing)(s.Install(t.Context()))

	// One goes, and one comes: its file is read before ours, whose list replaces it.
	s.write(t, file, strings.ReplaceAll(otherRequires, "other", "third"))
	s.said = nil
	must(t, "changed", Enforces)(s.Install(t.Context()))
	lists(`["more", "third", "tidewaiter"]`)
	s.heard(t, "warn: the plugin other is no longer required: "+file+":4, which required it, does not say so any more")

	s.write(t, file, "version = 3\n")
	must(t, "gone", Enforces)(s.Install(t.Context()))
	lists(`["tidewaiter"]`)
	must(t, "again", Nothing)(s.Install(t.Context()))
}

// TestNoRecordOfWhose: what nobody remembers stays, and that is said each time.
func TestNoRecordOfWhose(t *testing.T) {
	const ours = "/etc/containerd/conf.d/99-tidewaiter.toml"
	s := auditing(t, nodetest.Kubeadm)
	must(t, "enforce", Enforces)(s.Install(t.Context()))
	s.write(t, ours, strings.Replace(s.text(t, ours), `["tidewaiter"]`, `["old", "tidewaiter"]`, 1))
	must(t, "again", Nothing)(s.Install(t.Context()))
	s.heard(t, "warn: only the file of install requires the plugin old")
	if text := s.text(t, ours); !strings.Contains(text, `["old", "tidewaiter"]`) {
		t.Error(text)
	}

	// A file that names it makes a record, with nothing else to do.
	s.write(t, "/etc/containerd/conf.d/50.toml", strings.ReplaceAll(otherRequires, "'other', 'more'", "'old'"))
	must(t, "recorded", Nothing)(s.Install(t.Context()))
	s.write(t, "/etc/containerd/conf.d/50.toml", "version = 3\n")
	must(t, "given back", Enforces)(s.Install(t.Context()))
	if text := s.text(t, ours); strings.Contains(text, "old") {
		t.Error(text)
	}
}

// TestGivenBackOfTemplate: the same for the tables at the end of a template of k3s.
func TestGivenBackOfTemplate(t *testing.T) {
	h := &node.Host{Root: nodetest.Tree{"/c.toml": "version = 3\n[plugins.\"io.containerd.nri.v1.nri\".default_validator] # " + node.Marker + "\n  enable = true # " + node.Marker + "\n  required_plugins = [\"other\", \"tidewaiter\"] # " + node.Marker + "\n"}.Make(t), Distro: node.Distro{Config: "/c.toml"}}
	before := &node.Effective{Validates: true, Required: []string{"other", "tidewaiter"}}
	if o := h.Others(before, map[string]string{"other": "/x.toml:1"}); o.List() != `["tidewaiter"]` || len(o.Returned) != 1 {
		t.Errorf("%+v", o)
	}
	if o := h.Others(before, nil); o.List() != `["other", "tidewaiter"]` || len(o.Orphans) != 1 {
		t.Errorf("%+v", o)
	}
}
