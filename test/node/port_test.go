package node

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// A port is listened on several times, and refuses connections in between.
func TestReservePort(t *testing.T) {
	p, err := ReservePort()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 3 {
		if _, err := net.Dial("tcp", p.Addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		l, err := net.Listen("tcp", p.Addr)
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", p.Addr)
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		l.Close()
	}
	p.Close()
	if l, err := net.Listen("tcp", p.Addr); err != nil {
		t.Error(err)
	} else {
		l.Close()
	}
}
