package daemon

import (
	"os"
	"path/filepath"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

// modeFile is where the gate that comes after this one finds the mode that was in force.
const modeFile = "mode"

// turned notes the mode of a configuration that was put in force. One that audits after
// one that enforced was written by somebody, who may not be the only one who is to know:
// it is logged, counted and in the status for as long as it holds, also where the gate was
// started anew between the two. It is called by apply alone.
func (d *daemon) turned(mode verify.Mode) {
	was := d.mode
	if was == "" && d.kept != "" {
		if raw, err := os.ReadFile(filepath.Join(d.kept, modeFile)); err == nil && len(raw) < 16 {
			was = string(raw)
		}
	}
	d.mode = mode.String()
	if d.mode == was {
		return
	}
	if d.kept != "" {
		_ = os.WriteFile(filepath.Join(d.kept, modeFile), []byte(d.mode), 0o600) // it only tells
	}
	at := time.Time{}
	if was == verify.Enforce.String() && mode == verify.Audit {
		at = time.Now()
		d.counters.Lowered.Add(1)
		d.log.Warn("this node enforced, and audits from now on: everything starts, and what enforce would refuse is recorded", "config", d.options.ConfigDir)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state.lowered = at
}

// loweredText is a warning of the status.
func loweredText(at time.Time) string {
	return "this node enforced until " + at.UTC().Format(time.RFC3339) + ", and audits since then, as its configuration says: everything starts"
}
