package nri

import (
	"net"
	"sync"
	"time"
)

// A connection is the connection to the runtime. It says when that ended: the stub's
// own notice waits for Start, which may be waiting for the runtime. And it knows
// when every request was answered, down to the last byte written, which neither
// the stub nor ttrpc tells.
type connection struct {
	net.Conn
	once  sync.Once
	ended chan struct{}

	mu      sync.Mutex
	begun   uint64 // requests that were read
	open    int    // of them those whose answer is not written yet
	due     int    // of those the ones whose answer is about to be
	leaving bool   // the next answer after which nothing is open is the last
	cutting bool   // what is asked next ends the connection
}

func (c *connection) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

func (c *connection) Close() error {
	c.once.Do(func() { close(c.ended) })
	return c.Conn.Close()
}

func (c *connection) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(func() { close(c.ended) })
	}
	return n, err
}

// frameHeader is what NRI's multiplexer writes before each frame, by itself
// (pkg/net/multiplex). A message of ttrpc is longer, and ours fit a frame.
const frameHeader = 8

func (c *connection) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if len(b) > frameHeader && c.written() {
		c.Close()
	}
	return n, err
}

// asked notes that a request was read, and answered that its handler returned.
func (c *connection) asked() {
	c.mu.Lock()
	c.begun++
	c.open++
	cut := c.cutting
	c.mu.Unlock()
	if cut {
		c.Close()
	}
}

func (c *connection) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due++
}

// written notes that an answer was written, and reports whether it was the last.
func (c *connection) written() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.due == 0 {
		return false // our own request to register
	}
	c.due--
	c.open--
	return c.leaving && c.open == 0
}

// leave returns when the connection may be closed, or is. What is asked meanwhile
// is answered as ever.
//
// NRI knows no goodbye. A request that is on its way when the connection ends is
// refused, or worse: NRI 0.12.5 lets it through if the gate was counted present
// just before and found gone just after. So the connection is ended when nobody
// asks. If another gate is asked too, and will be, it is ended right after an
// answer, since the runtime asks one question at a time. And if neither comes to
// pass, it is ended with a question open, which is refused everywhere.
func (c *connection) leave(closed <-chan struct{}, others bool) {
	c.mu.Lock()
	c.leaving = others
	begun := c.begun
	c.mu.Unlock()
	limit := time.NewTimer(leaveTimeout)
	defer limit.Stop()
	tick := time.NewTicker(quietTime)
	defer tick.Stop()
	enough := 1
	if others {
		enough = answerTicks
	}
	for still := 0; ; {
		select {
		case <-closed:
			return
		case <-limit.C:
			c.mu.Lock()
			c.cutting = true
			hangs := c.open > 0
			c.mu.Unlock()
			if hangs {
				return
			}
		case <-tick.C:
			c.mu.Lock()
			if still++; c.open > 0 || c.begun != begun {
				still = 0
			}
			begun = c.begun
			c.mu.Unlock()
			if still == enough {
				return
			}
		}
	}
}
