package node

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestExec(t *testing.T) {
	run := Exec("/")
	if out, err := run(t.Context(), "sh", "-c", "echo $PATH; env | wc -l"); err != nil || !strings.HasPrefix(out, "/usr/local/sbin:") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := run(t.Context(), "sh", "-c", `echo first >&2; printf 'it is\033[2J broken\n' >&2; exit 3`); err == nil || strings.Contains(err.Error(), "\x1b") || !strings.Contains(err.Error(), "broken") {
		t.Errorf("%v", err)
	}
	if _, err := run(t.Context(), "sh", "-c", "head -c 9000000 /dev/zero"); err == nil || !strings.Contains(err.Error(), "too much") {
		t.Errorf("%v", err)
	}
	if out, err := run(t.Context(), "sh", "-c", "cut -d' ' -f5 /proc/$$/stat; echo $$"); err != nil || len(strings.Fields(out)) != 2 || strings.Fields(out)[0] != strings.Fields(out)[1] {
		t.Errorf("not a process group of its own: %q, %v", out, err)
	}
	if _, err := run(t.Context(), "no-such-program"); err == nil || !strings.Contains(err.Error(), "there is no no-such-program on this host") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := run(ctx, "sleep", "60"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
