package node

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A Port is one of 127.0.0.1 that nobody is given by chance: who asks for it by its
// number can listen there, again and again, until Close.
type Port struct {
	Addr string // "127.0.0.1:41234"
	file *os.File
}

// ReservePort finds a port that is free. It stays bound by a socket that does not
// listen: connections are refused, and the kernel gives it to nobody who asks for any
// port, as clients do.
func ReservePort() (*Port, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("reserving a port: %w", err)
	}
	p := &Port{file: os.NewFile(uintptr(fd), "port")}
	// With SO_REUSEADDR on both, who listens may bind it too (socket(7)).
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	var name unix.Sockaddr
	if err == nil {
		name, err = unix.Getsockname(fd)
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("reserving a port: %w", err)
	}
	p.Addr = fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	return p, nil
}

// Close gives the port back. Who listens there goes on. A Port that is not used any
// more is closed without it.
func (p *Port) Close() { _ = p.file.Close() }
