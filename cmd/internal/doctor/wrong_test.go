package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/cmd/internal/host"
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
	h, err := host.Detect(host.Options{Root: root, Runtime: "containerd", Service: "none"})
	if err != nil {
		t.Fatal(err)
	}
	f := &Facts{
		Host: h, Restart: "systemctl restart containerd",
		Effective: &host.Effective{Knows: true, Validates: true, Required: []string{"tidewaiter"}, NRISocket: "/run/nri/nri.sock"},
		ConfigErr: errors.New("not looked at"),
		Gate:      &control.Status{Mode: "enforce", Assurance: control.Full},
	}
	f.Gate.Runtime = control.Runtime{Registered: true, Socket: "/var/run/nri/nri.sock", Plugins: []string{"00-default-validator", "99-tidewaiter"}}
	restarted(f)
	return f
}

const requiring = "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['tidewaiter']\n"

// restarted has containerd read everything as it is now.
func restarted(f *Facts) {
	time.Sleep(2 * grain) // whose times are compared
	f.Process = &host.Process{PID: 1, Started: time.Now()}
	time.Sleep(2 * grain)
}

// examined are the findings of a check.
func examined(f *Facts, check string) (found []Finding) {
	f.Files, f.Dirs, f.NotImported, f.Now = nil, nil, "", time.Now()
	f.files()
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
	right := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &host.Process{Started: at("2026-11-22 11:00:00"), Listens: at("2026-11-22 11:00:04")}}
	set := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &host.Process{Started: at("2026-11-22 11:00:00"), Listens: at("1970-01-01 00:00:31")}}
	saved := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &host.Process{Started: at("2026-11-22 11:00:00"), Listens: at("2026-11-20 09:00:05")}}
	never := &Facts{Built: built, Now: at("1970-01-01 01:00:30"), Process: &host.Process{Started: at("1970-01-01 00:00:30"), Listens: at("1970-01-01 00:00:31")}}
	back := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &host.Process{Started: at("2026-11-22 11:00:00"), Listens: at("2031-01-01 00:00:31")}}
	unseen := &Facts{Built: built, Now: at("2026-11-22 12:00:00"), Process: &host.Process{Started: at("2026-11-22 11:00:00")}}
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
