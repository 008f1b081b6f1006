package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/config"
	"github.com/tidewaiter/tidewaiter/cmd/internal/control"
	"github.com/tidewaiter/tidewaiter/cmd/internal/explain"
	"github.com/tidewaiter/tidewaiter/cmd/internal/host"
	"github.com/tidewaiter/tidewaiter/nri/node"
)

// Options say where things are, on the host.
type Options struct {
	Host      host.Options // Optional is set
	ConfigDir string
	StateDir  string // empty: nothing is kept
	RunDir    string
	Offline   bool // ask no source
	Now       func() time.Time
	Built     time.Time // zero: not known
}

// dropIn is what install writes.
const dropIn = "99-tidewaiter.toml"

// Gather looks. The error says that it is not known where to look; what is wrong there
// is in the Facts.
func Gather(ctx context.Context, o Options) (*Facts, error) {
	given := o.Host
	o.Host.Optional = true
	h, err := host.Detect(o.Host)
	if err != nil {
		return nil, err
	}
	if h.Socket == "" { // neither given nor found: say what Detect says
		if _, err := host.Detect(given); err != nil {
			return nil, err
		}
	}
	f := &Facts{Now: o.Now(), Built: o.Built, Synchronised: synchronised(), Host: h, ConfigDir: o.ConfigDir, RunDir: o.RunDir, StateDir: o.StateDir, Offline: o.Offline}
	if f.Process, f.ProcessErr = h.Running(f.Now); f.ProcessErr == nil {
		h.Follow(f.Process, given)
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
	if e := f.Effective; e != nil && !e.NRIDisabled && e.NRISocket != "" {
		f.NRISocket = listens(h.Path(e.NRISocket))
	}

	run := h.Path(o.RunDir)
	f.Gate, f.GateErr = control.Ask(ctx, run)
	f.Config, f.ConfigErr = config.Load(h.Path(o.ConfigDir))
	f.Loose = loose(h.Path(o.ConfigDir))
	// A change counts a moment after it was made.
	for range 3 {
		if f.Gate == nil || f.Config == nil || f.Gate.Configuration.Epoch == f.Config.Epoch.String() || ctx.Err() != nil {
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
		if l, err := explain.AskImages(ctx, run); err == nil {
			f.Images = &l
		}
	}
	if f.Config != nil && !o.Offline {
		var records []node.Record
		if c, err := node.Dial(h.Path(h.Socket)); err == nil {
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
	}
	return f, nil
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
	if h.DropIns == "" {
		return
	}
	ours := path.Join(h.DropIns, dropIn)
	if _, err := os.Stat(h.Path(ours)); err != nil {
		return
	}
	for _, one := range files {
		if one.Path == ours {
			return
		}
	}
	f.NotImported = ours
}

// listens is why nothing can listen at name. It does not connect: containerd takes in
// one plugin after the other, and waits seconds for what a connection has to say.
func listens(name string) error {
	i, err := os.Stat(name)
	if err == nil && i.Mode().Type() != fs.ModeSocket {
		return errors.New("it is no socket")
	}
	return err
}
