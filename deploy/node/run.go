package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A Runner runs a program of the host without a shell and returns what it printed to
// standard output. A program without a slash is looked for where the host has its
// programs. The error has what it said on standard error.
type Runner func(ctx context.Context, program string, args ...string) (string, error)

const (
	runTime    = 5 * time.Minute // of one program; k3s is restarted within it
	maxPrinted = 4 << 20         // bytes of standard output
	maxSaid    = 4 << 10         // bytes of standard error
)

// searched are where programs are, whatever the environment says.
var searched = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/snap/bin"}

// Exec returns a Runner for the host that is mounted at root: programs run with it
// as their root directory, with an environment of PATH and HOME.
func Exec(root string) Runner {
	return func(ctx context.Context, program string, args ...string) (string, error) {
		line := strings.Join(append([]string{program}, args...), " ")
		if !strings.Contains(program, "/") {
			found := ""
			for _, dir := range searched {
				if i, err := os.Stat(filepath.Join(root, dir, program)); err == nil && i.Mode().IsRegular() && found == "" {
					found = filepath.Join(dir, program)
				}
			}
			if found == "" {
				return "", fmt.Errorf("%s: there is no %s on this host", line, program)
			}
			program = found
		}
		ctx, cancel := context.WithTimeout(ctx, runTime)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Env = []string{"PATH=" + strings.Join(searched, ":"), "HOME=/root", "SYSTEMD_IGNORE_CHROOT=1"}
		cmd.Dir = "/"
		cmd.WaitDelay = 5 * time.Second
		// A process group of its own: when a terminal goes, its signal is for all of the
		// group in front, and would end a restart half done. What ends the program ends
		// those that it started, too.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		if filepath.Clean(root) != "/" {
			cmd.SysProcAttr.Chroot = root
		}
		stdout, stderr := &bounded{limit: maxPrinted}, &bounded{limit: maxSaid}
		cmd.Stdout, cmd.Stderr = stdout, stderr
		err := cmd.Run()
		switch {
		case ctx.Err() != nil:
			return "", fmt.Errorf("%s: %w", line, ctx.Err())
		case err != nil:
			said := lastLine(stderr.String())
			if said != "" {
				said = ": " + text.Clean(said, 400)
			}
			return "", fmt.Errorf("%s: %w%s", line, err, said)
		case stdout.more:
			return "", fmt.Errorf("%s: %w", line, errors.New("it printed too much"))
		}
		return stdout.String(), nil
	}
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// bounded keeps the first limit bytes.
type bounded struct {
	kept  bytes.Buffer // not embedded: its ReadFrom knows no limit
	limit int
	more  bool
}

func (b *bounded) Write(p []byte) (int, error) {
	n := len(p)
	if room := b.limit - b.kept.Len(); n > room {
		b.more = true
		p = p[:room]
	}
	b.kept.Write(p)
	return n, nil
}

func (b *bounded) String() string { return b.kept.String() }
