package config

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
)

type call struct {
	c   *Config
	err error
}

// watching runs a watcher that reads when something changes and, unless every is
// given, on no timer.
type watching struct {
	t     *testing.T
	dir   string
	calls chan call
	hup   chan os.Signal
}

func startWatching(t *testing.T, dir string, current *Config, every time.Duration) *watching {
	t.Helper()
	w := &watching{t: t, dir: dir, calls: make(chan call, 100), hup: make(chan os.Signal)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	inner := &watcher{dir: dir, last: current, every: every, settle: 20 * time.Millisecond, on: func(c *Config, err error) { w.calls <- call{c, err} }}
	go func() { done <- inner.run(ctx, w.hup) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.quiet("the end")
	})
	return w
}

// next is what on is called with.
func (w *watching) next(what string) call {
	w.t.Helper()
	select {
	case c := <-w.calls:
		return c
	case <-time.After(time.Minute):
		w.t.Fatalf("%s: nobody noticed", what)
		return call{}
	}
}

// good wants the configuration that the directory holds, and skips what there was in
// between: the watcher may read before all of a change was made.
func (w *watching) good(what string) *Config {
	w.t.Helper()
	now := load1(w.t, w.dir)
	for {
		c := w.next(what)
		if c.c != nil && c.err != nil {
			w.t.Fatalf("%s: an error beside a configuration: %v", what, c.err)
		}
		if c.c != nil && c.c.Revision == now.Revision {
			return c.c
		}
	}
}

// bad wants an error.
func (w *watching) bad(what, text string) {
	w.t.Helper()
	if c := w.next(what); c.c != nil || c.err == nil || !strings.Contains(c.err.Error(), text) {
		w.t.Fatalf("%s: got %v, %v; want an error with %q", what, c.c, c.err, text)
	}
}

// quiet wants no call for a while.
func (w *watching) quiet(what string) {
	w.t.Helper()
	time.Sleep(150 * time.Millisecond)
	select {
	case c := <-w.calls:
		w.t.Errorf("%s: called with %v, %v", what, c.c, c.err)
	default:
	}
}

// replace writes a file beside name and renames it.
func replace(t *testing.T, dir, name, text string) {
	t.Helper()
	fill(t, dir, map[string]string{name + ".tmp~": text})
	must(t, os.Rename(filepath.Join(dir, name+".tmp~"), filepath.Join(dir, name)))
}

func TestWatch(t *testing.T) {
	dir := write(t, with(notation(), "config.yaml", minimal))
	first := load1(t, dir)
	w := startWatching(t, dir, first, time.Hour)
	w.quiet("the start")

	must(t, os.Chtimes(dir+"/config.yaml", time.Now(), time.Now()))
	fill(t, dir, map[string]string{"notes": "x"})
	w.quiet("nothing that counts")

	replace(t, dir, "config.yaml", "version: 1\nmode: enforce\n")
	if c := w.good("atomic rename"); c.Mode != verify.Enforce {
		t.Errorf("got %+v", c)
	}
	fill(t, dir, map[string]string{"config.yaml": minimal + "gate: {wait: 0s}\n"})
	c := w.good("write in place")
	if c.Mode != verify.Audit || c.Gate.Wait != 0 {
		t.Errorf("got %+v", c)
	}

	// A broken file: one call for each error, and the last good one again.
	replace(t, dir, "config.yaml", "version: 1\nmode: off\n")
	w.bad("broken", "config.yaml:2: mode")
	must(t, os.Chtimes(dir+"/config.yaml", time.Now(), time.Now()))
	w.quiet("the same error")
	w.hup <- syscall.SIGHUP
	w.bad("SIGHUP", "config.yaml:2: mode")
	replace(t, dir, "config.yaml", "mode: off\n")
	w.bad("broken in another way", "config.yaml:1: version")
	replace(t, dir, "config.yaml", minimal+"gate: {wait: 0s}\n")
	if again := w.good("as it was"); again != c {
		t.Errorf("got %+v, want the last good configuration", again)
	}

	must(t, os.Remove(dir+"/trustpolicy.json"))
	w.bad("policy deleted", "there must be a trust policy")
	fill(t, dir, map[string]string{"trustpolicy.json": trustPolicy("*")})
	w.good("policy back")
	must(t, os.Chmod(dir+"/trustpolicy.json", 0o666))
	w.bad("writable", "everybody can write")
	must(t, os.Chmod(dir+"/trustpolicy.json", 0o600))
	w.good("not writable")
}

func TestWatchTrustStore(t *testing.T) {
	dir := write(t, with(notation(), "truststore/x509/ca/acme/root.crt", ""))
	w := startWatching(t, dir, nil, time.Hour)
	if c := w.good("no trust store"); len(c.Warnings) == 0 || !strings.Contains(c.Warnings[len(c.Warnings)-1].String(), `"ca:acme" does not exist or holds no certificate: no trust store of its type counts`) {
		t.Errorf("warnings %v", c.Warnings)
	}
	fill(t, dir, map[string]string{"truststore/x509/ca/acme/root.crt": string(root())})
	one := w.good("trust store made")
	replace(t, dir+"/truststore/x509/ca/acme", "two.crt", string(authority("two")))
	two := w.good("certificate added")
	must(t, os.Remove(dir+"/truststore/x509/ca/acme/two.crt"))
	if c := w.good("certificate removed"); c.Revision != one.Revision || c.Revision == two.Revision {
		t.Errorf("revisions %s, %s, %s", one.Revision, two.Revision, c.Revision)
	}
	// Renamed in from elsewhere, whole, and changed afterwards.
	other := write(t, map[string]string{"x509/ca/acme/root.crt": string(authority("three"))})
	must(t, os.Rename(dir+"/truststore", t.TempDir()+"/old"))
	must(t, os.Rename(other, dir+"/truststore"))
	three := w.good("trust store replaced")
	replace(t, dir+"/truststore/x509/ca/acme", "root.crt", string(authority("four")))
	if c := w.good("certificate in the new trust store replaced"); c.Revision == three.Revision {
		t.Error("the same revision")
	}
}

func TestWatchConfigMap(t *testing.T) {
	dir := t.TempDir()
	publish(t, dir, "1", with(notation(), "config.yaml", minimal))
	first := load1(t, dir)
	w := startWatching(t, dir, first, time.Hour)
	publish(t, dir, "2", with(notation(), "config.yaml", "version: 1\nmode: enforce\n"))
	second := w.good("..data swapped")
	if second.Mode != verify.Enforce {
		t.Errorf("got %+v", second)
	}
	publish(t, dir, "3", with(notation(), "config.yaml", "version: 1\nmode: enforce\n", "truststore/x509/ca/acme/root.crt", string(authority("three"))))
	if c := w.good("..data swapped again, only a certificate differs"); c.Revision == second.Revision {
		t.Error("the same revision")
	}
	must(t, os.RemoveAll(dir+"/..v1"))
	publish(t, dir, "4", map[string]string{"config.yaml": minimal})
	w.bad("a ConfigMap without policy", "trustpolicy.json")
	publish(t, dir, "5", with(notation(), "config.yaml", minimal))
	if c := w.good("the first again"); c.Revision != first.Revision {
		t.Errorf("revision %s, want %s", c.Revision, first.Revision)
	}
}

func TestWatchDirectoryAppearsAndIsReplaced(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "etc", "tidewaiter")
	w := startWatching(t, dir, nil, time.Hour)
	w.bad("missing", "does not exist")
	must(t, os.Mkdir(top+"/etc", 0o755))
	w.quiet("its parent appears") // the error is the same
	must(t, os.Rename(write(t, notation()), dir))
	first := w.good("it appears")

	must(t, os.Rename(dir, top+"/etc/old"))
	must(t, os.Rename(write(t, with(notation(), "config.yaml", minimal)), dir))
	second := w.good("it is replaced")
	if first.Mode != verify.Enforce || second.Mode != verify.Audit {
		t.Errorf("modes %v, %v", first.Mode, second.Mode)
	}
	fill(t, top+"/etc/old", map[string]string{"trustpolicy.json": "{}"})
	w.quiet("the old one changes")
	replace(t, dir, "config.yaml", "version: 1\nmode: enforce\n")
	w.good("the new one changes")

	// A link that is swapped.
	must(t, os.RemoveAll(dir))
	for { // file by file: what there is in between may be read too
		if c := w.next("removed"); c.err != nil && strings.Contains(c.err.Error(), "does not exist") {
			break
		}
	}
	a, b := write(t, notation()), write(t, with(notation(), "config.yaml", minimal))
	must(t, os.Symlink(a, dir))
	w.good("a link appears")
	must(t, os.Symlink(b, dir+"~"))
	must(t, os.Rename(dir+"~", dir))
	if c := w.good("the link is swapped"); c.Mode != verify.Audit {
		t.Errorf("got %+v", c)
	}
	replace(t, b, "config.yaml", minimal+"gate: {wait: 1ms}\n")
	w.good("a file behind the link changes")
}

func TestWatchFilesElsewhere(t *testing.T) {
	other := write(t, map[string]string{"ca.crt": string(root())})
	dir := write(t, with(notation(), "config.yaml", minimal+"sources: {mirrors: [{host: a.b, url: https://a.b, ca: "+other+"/ca.crt}]}\n"))
	w := startWatching(t, dir, load1(t, dir), time.Hour)
	replace(t, other, "ca.crt", string(authority("two")))
	w.good("CA replaced")
	replace(t, other, "ca.crt", "x")
	w.bad("CA broken", "no certificate")
}

// A file in a directory below that the configuration names.
func TestWatchFilesBelow(t *testing.T) {
	one, two := digest.FromString("one").String(), digest.FromString("two").String()
	dir := write(t, with(notation(), "allow/k3s.txt", one+"\n", "config.yaml", minimal+"allowDigests: [allow/k3s.txt]\n"))
	w := startWatching(t, dir, load1(t, dir), time.Hour)
	replace(t, dir, "allow/k3s.txt", one+"\n"+two+"\n")
	if c := w.good("a digest more"); len(c.AllowDigests) != 2 {
		t.Errorf("allowDigests %+v", c.AllowDigests)
	}
	replace(t, dir, "allow/k3s.txt", one+"\nnginx:1\n")
	w.bad("a tag", "allow/k3s.txt:2: ")
}

// What the kernel does not tell of is noticed all the same.
func TestWatchTicks(t *testing.T) {
	dir := write(t, with(notation(), "certs/ca.crt", string(root()),
		"config.yaml", minimal+"sources: {mirrors: [{host: a.b, url: https://a.b, ca: ca.crt}]}\n"))
	must(t, os.Symlink("certs/ca.crt", filepath.Join(dir, "ca.crt")))
	w := startWatching(t, dir, load1(t, dir), 30*time.Millisecond)
	w.quiet("nothing changes")
	replace(t, dir, "certs/ca.crt", string(authority("two")))
	w.good("a file that is not watched")
}

// A directory that never rests is read all the same.
func TestWatchBusyDirectory(t *testing.T) {
	dir := write(t, notation())
	w := startWatching(t, dir, load1(t, dir), time.Hour)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				os.WriteFile(filepath.Join(dir, "log"), []byte("x"), 0o644)
			}
		}
	}()
	replace(t, dir, "config.yaml", minimal)
	w.good("amid noise")
	close(stop)
	<-done
}

// Watch ends with its context and leaves nothing behind (TestMain).
func TestWatchEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	err := Watch(ctx, t.TempDir(), nil, nil, func(c *Config, err error) {
		if c != nil || err == nil {
			t.Errorf("got %v, %v", c, err)
		}
		calls++
		cancel()
	})
	if err != nil || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
}
