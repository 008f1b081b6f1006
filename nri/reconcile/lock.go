package reconcile

import (
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/tidewaiter/tidewaiter/verify/durable"
)

// A Lock is a file of which one process on the node holds the lock: of two gates
// that run during an upgrade one acts. The kernel drops it with the process. It is
// safe for concurrent use.
type Lock struct {
	path string

	mu   sync.Mutex
	file *os.File // nil: not held
}

// NewLock makes a Lock on the file "lock" in dir, and does not take it yet.
func NewLock(dir string) *Lock { return &Lock{path: filepath.Join(dir, "lock")} }

// Held takes the lock where nobody has it, and reports whether this process does.
// A file that cannot be opened or locked is one that somebody else holds.
func (l *Lock) Held() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		return true
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return false
	}
	if durable.TryLock(f) != nil {
		f.Close()
		return false
	}
	l.file = f
	return true
}

// Release gives the lock up. The file stays: whoever waits for it has it open.
func (l *Lock) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}
