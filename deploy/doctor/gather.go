package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/deploy/install"
	"github.com/tidewaiter/tidewaiter/deploy/node"
	"github.com/tidewaiter/tidewaiter/nri/containerd"
)

// Options say where things are, on the host.
type Options struct {
	Host      node.Options // Optional is set
	ConfigDir string
	StateDir  string // empty: nothing is kept
	RunDir    string
	Offline   bool // ask no source
	Now       func() time.Time
	Built     time.Time // zero: not known
}

// dropIn is what install writes.
const dropIn = "99-tidewaiter.toml"

// Gather looks at the node. It returns an error if it does not know where to look; faults
// that it finds are in the Facts.
func Gather(ctx context.Context, o Options) (*Facts, error) {
	given := o.Host
	o.Host.Optional = true
	h, err := node.Detect(o.Host)
	if err != nil {
		return nil, err
	}
	if h.Socket == "" { // neither given nor found: say what Detect says
		if _, err := node.Detect(given); err != nil {
			return nil, err
		}
	}
	f := &Facts{Now: o.Now(), Built: o.Built, Synchronised: synchronised(), Host: h, ConfigDir: o.ConfigDir, RunDir: o.RunDir, StateDir: o.StateDir, Offline: o.Offline}
	if f.Process, f.ProcessErr = h.Running(f.Now); f.ProcessErr == nil {
		h.Adopt(f.Process, given)
	}
	f.Restart = "restart containerd"
	if c := h.Manager.Restart(); c != nil {
		f.Restart = strings.Join(c, " ")
	}
	f.Enforces = "tidewaiter install --enforce"
	major, minor, err := h.Version(ctx)
	f.Version, f.VersionErr = [2]int{major, minor}, err
	f.Effective, f.EffectiveErr = h.Effective(ctx)
	f.files()
	f.Halts = h.Halts(f.Process, f.Effective)
	if e := f.Effective; e != nil && !e.NRIDisabled && e.NRISocket != "" {
		f.NRISocket = listens(h.Path(e.NRISocket))
	}

	run := h.Path(o.RunDir)
	f.Gate, f.GateErr = control.Ask(ctx, run)
	gate, _ := node.Listener(path.Join(run, control.SocketName))
	f.Inside = gate > 0 && errors.Is(f.ProcessErr, node.ErrUnseen)
	f.Apart = gate > 0 && !f.Inside && apart(gate, h.Path("/"))
	if f.Apart {
		f.Enforces = "put 99-tidewaiter.toml into " + h.DropIns + " (docs/install.md, Enforce from the pod)"
	} else {
		f.Config, f.ConfigErr = config.Load(h.Path(o.ConfigDir))
		f.Loose = loose(h.Path(o.ConfigDir))
	}
	pid := 0
	if f.Process != nil {
		pid = f.Process.PID
	}
	f.Proxies = h.Proxies(pid, gate)
	// A change counts a moment after it was made.
	for range 3 {
		if f.Gate == nil || f.Config == nil || f.Gate.Configuration.Revision == f.Config.Revision.String() || ctx.Err() != nil {
			break
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
		f.Gate, f.GateErr = control.Ask(ctx, run)
		f.Config, f.ConfigErr = config.Load(h.Path(o.ConfigDir))
	}
	if f.Gate != nil {
		if l, err := control.AskImages(ctx, run); err == nil {
			f.Images = &l
		}
	}
	if f.Config != nil && !o.Offline {
		var records []containerd.Record
		if c, err := containerd.Dial(h.Path(h.Socket)); err == nil {
			short, cancel := context.WithTimeout(ctx, askTime)
			records, _ = c.Images(short) // without, mirrors are asked about nothing real
			cancel()
			c.Close()
		}
		if f.Sources, err = Probe(ctx, f.Config, records, o.Now); err != nil {
			return nil, err
		}
	}
	if o.StateDir != "" {
		f.State = space(h.Path(o.StateDir))
		f.Unfinished, _ = install.Unfinished(h.Path(o.StateDir))
	}
	return f, nil
}

// apart reports whether a process has another root directory than the host: it runs in a
// container.
func apart(pid int, root string) bool {
	its, err := os.Stat(path.Join("/proc", strconv.Itoa(pid), "root"))
	if err != nil {
		return false
	}
	here, err := os.Stat(root)
	return err == nil && !os.SameFile(its, here)
}

// files reads those of containerd's configuration.
func (f *Facts) files() {
	h := f.Host
	if h.Config == "" {
		return
	}
	files, dirs, err := h.Files()
	f.Files, f.FilesErr = files, err
	for _, d := range dirs {
		if t, err := h.Changed(d); err == nil {
			f.Dirs = append(f.Dirs, Dir{d, t})
		}
	}
	f.NotImported, f.Unread = "", nil
	if h.DropIns == "" {
		return
	}
	names, _ := os.ReadDir(h.Path(path.Join(h.DropIns, ".")))
	for _, one := range names[:min(len(names), maxUnread)] {
		file := path.Join(h.DropIns, one.Name())
		if !strings.HasSuffix(file, ".toml") || one.IsDir() || slices.ContainsFunc(files, func(f node.File) bool { return f.Path == file }) {
			continue
		}
		if f.Unread = append(f.Unread, file); one.Name() == dropIn {
			f.NotImported = file
		}
	}
}

// maxUnread bounds the names of a directory of drop-ins that are looked at.
const maxUnread = 1000

// listens is why nothing can listen at name. It does not connect: containerd takes in
// one plugin after the other, and waits seconds for what a connection has to say.
func listens(name string) error {
	i, err := os.Stat(name)
	if err == nil && i.Mode().Type() != fs.ModeSocket {
		return errors.New("it is no socket")
	}
	return err
}
