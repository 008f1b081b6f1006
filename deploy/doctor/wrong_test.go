package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

// healthy is a node on which all is well, as far as these findings go: the drop-in is there,
// containerd's own program says that it counts, and containerd was started after it.
func healthy(t *testing.T) *Facts {
	t.Helper()
	root := t.TempDir()
	write := func(name, text string) {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("/etc/containerd/config.toml", "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n")
	write("/etc/containerd/conf.d/99-tidewaiter.toml", requiring)
	h, err := node.Detect(node.Options{Root: root, Runtime: "containerd", Service: "none"})
	if err != nil {
		t.Fatal(err)
	}
	f := &Facts{
		Host: h, Restart: "systemctl restart containerd",
		Effective: &node.Effective{Knows: true, Validates: true, Required: []string{"tidewaiter"}, NRISocket: "/run/nri/nri.sock"},
		ConfigErr: errors.New("not looked at"),
		Gate:      &control.Status{Mode: "enforce", Assurance: control.AtCreate},
	}
	f.Gate.Runtime = control.Runtime{Registered: true, Socket: "/var/run/nri/nri.sock", Plugins: []string{"00-default-validator", "99-tidewaiter"}}
	restarted(f)
	return f
}

const requiring = "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['tidewaiter']\n"

// restarted has containerd read everything as it is now.
func restarted(f *Facts) {
	time.Sleep(2 * grain) // whose times are compared
	f.Process = &node.Process{PID: 1, Started: time.Now()}
	time.Sleep(2 * grain)
}

// examined are the findings of a check.
func examined(f *Facts, check string) (found []Finding) {
	f.Files, f.Dirs, f.NotImported, f.Now = nil, nil, "", time.Now()
	f.files()
	f.Halts = f.Host.Halts(f.Process, f.Effective)
	for _, one := range Examine(f).Findings {
		if one.Check == check {
			found = append(found, one)
		}
	}
	return found
}

// TestNotEnforced: states in which containers start unasked, or may, and nothing may
// say that all is well.
func TestNotEnforced(t *testing.T) {
	for _, check := range []string{"required", "restart", "registered"} {
		if found := examined(healthy(t), check); len(found) != 1 || found[0].Level != OK {
			t.Fatalf("%s: %+v", check, found)
		}
	}
	if found := examined(healthy(t), "plugins"); len(found) != 0 {
		t.Fatal(found)
	}
	in := func(f *Facts, name string) string { return f.Host.Path("/etc/containerd/" + name) }
	for name, tt := range map[string]struct {
		change  func(*testing.T, *Facts)
		check   string
		level   Level
		unknown bool
		text    string
	}{
		"a directory that was prepared elsewhere": {func(t *testing.T, f *Facts) {
			must(t, os.Mkdir(in(f, "new"), 0o755))
			must(t, os.Rename(in(f, "conf.d/99-tidewaiter.toml"), in(f, "new/99-tidewaiter.toml")))
			must(t, os.Remove(in(f, "conf.d")))
			restarted(f)
			must(t, os.Rename(in(f, "new"), in(f, "conf.d")))
		}, "restart", Fail, false, "has not read /etc/containerd/conf.d"},
		"a link that leads elsewhere now": {func(t *testing.T, f *Facts) {
			must(t, os.Rename(in(f, "config.toml"), in(f, "enforcing.toml")))
			restarted(f)
			must(t, os.Symlink("enforcing.toml", in(f, "config.toml")))
		}, "restart", Fail, false, "has not read /etc/containerd/config.toml"},
		"a file that cannot be looked into": {func(t *testing.T, f *Facts) {
			must(t, os.WriteFile(in(f, "conf.d/50.toml"), []byte("# "+strings.Repeat("x", 2<<20)), 0o644))
			restarted(f)
		}, "restart", Fail, true, "/etc/containerd/conf.d/50.toml: it is longer"},
		"another containerd asks": {func(t *testing.T, f *Facts) { f.Effective.NRISocket = "/run/other/nri.sock" }, "registered", Fail, false, "containerd listens at /run/other/nri.sock"},
		"the registration is held up": {func(t *testing.T, f *Facts) {
			f.Gate.Runtime.Registered, f.Gate.Runtime.AwaitingSync = false, &f.Now
			f.Gate.Judge()
		}, "registered", Fail, false, "has the gate's registration since"},
		"two gates": {func(t *testing.T, f *Facts) {
			f.Gate.Runtime.Plugins = append(f.Gate.Runtime.Plugins, "99-tidewaiter")
		}, "plugins", Fail, false, "2 gates were asked"},
		"another's list": {func(t *testing.T, f *Facts) {
			must(t, os.WriteFile(in(f, "conf.d/50.toml"), []byte(strings.ReplaceAll(requiring, "tidewaiter", "other")), 0o644))
			restarted(f)
		}, "required", Warn, false, "the plugin other is not required, though /etc/containerd/conf.d/50.toml:4 says so"},
	} {
		t.Run(name, func(t *testing.T) {
			f := healthy(t)
			tt.change(t, f)
			found := examined(f, tt.check)
			if len(found) == 0 {
				t.Fatal("nothing is found")
			}
			if last := found[len(found)-1]; last.Level != tt.level || last.Unknown != tt.unknown || !strings.Contains(last.Text, tt.text) {
				t.Errorf("%+v", found)
			}
			f.Gate.Mode = "audit"
			for _, one := range examined(f, tt.check) {
				if one.Level != OK && tt.check != "registered" {
					t.Errorf("in audit: %+v", one)
				}
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestClockThatIsSet: on a node without a clock that keeps running the times of files and
// processes prove less, and doctor says no more than they do.
func TestClockThatIsSet(t *testing.T) {
	at := func(s string) time.Time {
		t.Helper()
		v, err := time.Parse("2006-01-02 15:04:05", s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	built := at("2026-11-01 00:00:00")
	// All run for an hour.
	right := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &node.Process{Started: at("2026-11-22 11:00:00"), Listens: at("2026-11-22 11:00:04")}}
	set := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &node.Process{Started: at("2026-11-22 11:00:00"), Listens: at("1970-01-01 00:00:31")}}
	saved := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &node.Process{Started: at("2026-11-22 11:00:00"), Listens: at("2026-11-20 09:00:05")}}
	never := &Facts{Built: built, Now: at("1970-01-01 01:00:30"), Process: &node.Process{Started: at("1970-01-01 00:00:30"), Listens: at("1970-01-01 00:00:31")}}
	back := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &node.Process{Started: at("2026-11-22 11:00:00"), Listens: at("2031-01-01 00:00:31")}}
	unseen := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &node.Process{Started: at("2026-11-22 11:00:00")}}
	for name, tt := range map[string]struct {
		f       *Facts
		changed string
		want    int
	}{
		"right, before":                            {right, "2026-11-22 10:59:59", yes},
		"right, after":                             {right, "2026-11-22 11:00:01", no},
		"right, in the past of another boot":       {right, "1970-01-01 00:10:00", yes},
		"right, in the future":                     {right, "2031-01-01 00:00:00", unclear},
		"set since, days before":                   {set, "2026-11-20 00:00:00", yes},
		"set since, after that":                    {set, "2026-11-22 11:30:00", no},
		"set since, before that, or another boot":  {set, "1970-01-01 00:20:00", unclear},
		"set since, too long ago for this boot":    {set, "1970-01-01 02:00:00", yes},
		"from a saved time, before that was saved": {saved, "2026-11-20 08:00:00", yes},
		"from a saved time, before it was set":     {saved, "2026-11-20 09:30:00", unclear},
		"from a saved time, after it was set":      {saved, "2026-11-22 11:30:00", no},
		"never set, with a file of the right time": {never, "2026-11-10 00:00:00", unclear},
		"never set, this boot or another":          {never, "1970-01-01 00:30:00", unclear},
		"never set, before":                        {never, "1970-01-01 00:00:10", yes},
		"set back, before":                         {back, "2026-11-20 00:00:00", yes},
		"set back, after":                          {back, "2026-11-22 11:30:00", no},
		"a socket that cannot be seen, before":     {unseen, "2026-11-22 10:00:00", yes},
		"a socket that cannot be seen, after":      {unseen, "2026-11-22 11:30:00", no},
	} {
		if got := (&examination{Facts: tt.f}).read(at(tt.changed)); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}

	// What cannot be told is neither ok nor wrong: the clock was set by an hour since
	// containerd was started, and its files changed about then.
	f := healthy(t)
	f.Process.Listens = f.Process.Started
	f.Process.Started = f.Process.Started.Add(time.Hour)
	f.Files, f.Dirs = nil, nil
	f.files()
	f.Now = f.Process.Started.Add(10 * time.Minute)
	var found []Finding
	for _, one := range Examine(f).Findings {
		if one.Check == "restart" {
			found = append(found, one)
		}
	}
	if len(found) != 1 || !found[0].Unknown || !strings.Contains(found[0].Text, "nobody can tell") || !strings.Contains(found[0].Next, "selftest --absent") {
		t.Errorf("%+v", found)
	}
}

// TestUnstartable: in audit and enforce alike, and no line advises a restart.
func TestUnstartable(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		f := healthy(t)
		f.Gate.Mode = mode
		config := f.Host.Path("/etc/containerd/config.toml")
		must(t, os.WriteFile(config, []byte("version = 3\nimports = ['/etc/containerd/conf.d/*.toml', '/etc/site.toml']\n"), 0o644))
		f.Effective.Required = nil // and so a restart would be due
		found := examined(f, "restart")
		if len(found) == 0 || found[0].Level != Fail || found[0].Unknown ||
			found[0].Text != "containerd would not start: /etc/site.toml, imported by /etc/containerd/config.toml, is missing" ||
			found[0].Next != "put it back or take it out of imports, and do not restart before" {
			t.Errorf("%s: %+v", mode, found)
		}
		for _, one := range Examine(f).Findings {
			if strings.Contains(one.Next, f.Restart) {
				t.Errorf("%s: %+v", mode, one)
			}
		}
		must(t, os.WriteFile(f.Host.Path("/etc/site.toml"), nil, 0o644))
		restarted(f)
		if found := examined(f, "restart"); len(found) != 1 || found[0].Level != OK {
			t.Errorf("%s: %+v", mode, found)
		}
	}
}

// TestUnread: conf.d is read only if config.toml says so, whatever config dump shows.
func TestUnread(t *testing.T) {
	f := healthy(t)
	f.Effective.Required = nil
	must(t, os.WriteFile(f.Host.Path("/etc/containerd/config.toml"), []byte("version = 3\n"), 0o644))
	must(t, os.WriteFile(f.Host.Path("/etc/containerd/conf.d/50-site.toml"), []byte("version = 3\n"), 0o644))
	restarted(f)
	const line = `imports = ["/etc/containerd/conf.d/*.toml"] at the top of /etc/containerd/config.toml, then systemctl restart containerd`
	if found := examined(f, "required"); len(found) != 1 || found[0].Level != Fail || !strings.Contains(found[0].Text, "99-tidewaiter.toml is there, and no file imports it, whatever config dump shows") || !strings.Contains(found[0].Next, line) {
		t.Errorf("%+v", found)
	}
	for _, f.Gate.Mode = range []string{"enforce", "audit"} {
		if found := examined(f, "imports"); len(found) != 1 || found[0].Level != Warn || !strings.Contains(found[0].Text, "does not read /etc/containerd/conf.d/50-site.toml:") || !strings.Contains(found[0].Next, line) {
			t.Errorf("%s: %+v", f.Gate.Mode, found)
		}
	}
	if found := examined(healthy(t), "imports"); len(found) > 0 {
		t.Errorf("%+v", found)
	}
}

// TestOrphans: a required plugin that only our file names, and that is not connected.
func TestOrphans(t *testing.T) {
	ours := strings.ReplaceAll(requiring, "['tidewaiter']", "['other', 'tidewaiter']")
	for name, tt := range map[string]struct {
		plugins []string // asked about the last container
		other   string   // a file of others
		want    string
	}{
		"not connected":         {plugins: []string{"99-tidewaiter"}, want: "only /etc/containerd/conf.d/99-tidewaiter.toml:4 requires the plugin other, and containerd did not ask it"},
		"connected":             {plugins: []string{"10-other", "99-tidewaiter"}},
		"not known":             {want: "only /etc/containerd/conf.d/99-tidewaiter.toml:4 requires the plugin other: without it"},
		"its own file is there": {plugins: []string{"99-tidewaiter"}, other: strings.ReplaceAll(requiring, "tidewaiter", "other")},
	} {
		t.Run(name, func(t *testing.T) {
			f := healthy(t)
			must(t, os.WriteFile(f.Host.Path("/etc/containerd/conf.d/99-tidewaiter.toml"), []byte(ours), 0o644))
			if tt.other != "" {
				must(t, os.WriteFile(f.Host.Path("/etc/containerd/conf.d/50.toml"), []byte(tt.other), 0o644))
			}
			f.Effective.Required, f.Gate.Runtime.Plugins = []string{"other", "tidewaiter"}, tt.plugins
			restarted(f)
			found := examined(f, "required")
			last := found[len(found)-1]
			if tt.want == "" && (len(found) != 1 || last.Level != OK) || tt.want != "" && (last.Level != Warn || !strings.Contains(last.Text, tt.want)) {
				t.Errorf("%+v", found)
			}
		})
	}
}

// TestContainer: in the gate's container, and on the host beside it, doctor is right or
// says which of the two to ask, and nothing that works is a fail.
func TestContainer(t *testing.T) {
	inside := func(mode string) *Facts {
		f := healthy(t)
		f.Gate.Mode, f.Inside, f.Process, f.ProcessErr = mode, true, nil, node.ErrUnseen
		f.Effective, f.EffectiveErr, f.NRISocket = nil, node.ErrNoBinary, errors.New("no such file")
		f.Gate.Configuration.Revision = "0"
		f.Config, f.ConfigErr = &config.Config{Mode: verify.Audit}, nil
		if mode == "enforce" {
			f.Config.Mode = verify.Enforce
		}
		f.Gate.Configuration.Revision = f.Config.Revision.String()
		return f
	}
	outside := func() *Facts {
		f := healthy(t)
		f.Apart, f.Config, f.ConfigErr, f.Version = true, nil, nil, [2]int{2, 4}
		f.Gate.Configuration.Revision = "e"
		f.Effective.Runtimes, f.Effective.Handler = map[string]string{"runc": "io.containerd.runc.v2"}, "runc"
		f.Effective.Snapshotter, f.Effective.Pause = "stargz", "pause@sha256:0" // its configuration may list it
		return f
	}
	rejected := outside()
	rejected.Gate.Configuration.Rejected = &control.Rejected{Current: true, Error: "config.yaml:3: limits"}
	for name, tt := range map[string]struct {
		f      *Facts
		result string
		texts  []string
		next   string
	}{
		"in it, enforce": {inside("enforce"), "unknown", []string{"this is the gate's container: containerd and its configuration cannot be seen from here, nor whether containerd requires the gate"}, "on the node itself: tidewaiter doctor"},
		"in it, audit":   {inside("audit"), "ok", []string{"on the node itself tidewaiter doctor looks at them (not required in audit)"}, ""},
		"on the host":    {outside(), "ok", []string{"the gate runs in a container, and has its configuration from there: mode enforce, revision e", "kubectl -n tidewaiter-system exec POD -- /tidewaiter doctor"}, ""},
		"on the host, and it rejected its configuration": {rejected, "fail", []string{"config.yaml:3: limits; the last good one stays in force"}, "correct it in its ConfigMaps"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.f.Now = time.Now()
			r := Examine(tt.f)
			all, next, failed := "", "", 0
			for _, one := range r.Findings {
				if all += one.Text + "\n"; one.Level == Fail {
					next, failed = one.Next, failed+1
				}
			}
			if r.Result != tt.result || next != tt.next || failed > 1 {
				t.Errorf("%s, next %q: %+v", r.Result, next, r.Findings)
			}
			for _, want := range tt.texts {
				if !strings.Contains(all, want) {
					t.Errorf("%q is not said:\n%s", want, all)
				}
			}
		})
	}
	if apart(os.Getpid(), "/") || !apart(os.Getpid(), t.TempDir()) {
		t.Error("a root directory is taken for another")
	}
}

// TestUnfinished: an installation that was interrupted is said until the next one ends it.
func TestUnfinished(t *testing.T) {
	f := healthy(t)
	if found := examined(f, "install"); len(found) != 0 {
		t.Fatalf("%+v", found)
	}
	f.Unfinished = time.Date(2026, 12, 1, 1, 2, 3, 0, time.UTC)
	found := examined(f, "install")
	if len(found) != 1 || found[0].Level != Warn || !strings.Contains(found[0].Text, "an installation that began at 2026-12-01T01:02:03Z is under way or was interrupted") || found[0].Next != "tidewaiter install" {
		t.Errorf("%+v", found)
	}
}
