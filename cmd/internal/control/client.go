package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
)

const (
	askTime   = 5 * time.Second // for one request
	maxAnswer = 1 << 20         // bytes
)

// Ask returns the status of the gate whose run directory is dir. Errors say that it
// could not be found out.
func Ask(ctx context.Context, dir string) (*Status, error) {
	raw, err := get(ctx, dir, "/v1/status")
	if err != nil {
		return nil, err
	}
	var s Status
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("what answers at %s is no gate: %w", filepath.Join(dir, SocketName), err)
	}
	if s.Schema != StatusSchema {
		return nil, fmt.Errorf("what answers at %s speaks %s, not %s", filepath.Join(dir, SocketName), verify.Quote(s.Schema, 64), StatusSchema)
	}
	return &s, nil
}

func get(ctx context.Context, dir, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	name := filepath.Join(dir, SocketName)
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", name)
		if err != nil {
			return nil, err
		}
		// Somebody else's answer is none: the directory may be one that others write to.
		if err := trust(c); err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://tidewaiter"+path, nil)
	if err != nil {
		return nil, err
	}
	r, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("no gate answers at %s: %w", name, cause(err))
	}
	defer r.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(r.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the answer of the gate at %s: %w", name, err)
	case len(raw) > maxAnswer:
		return nil, fmt.Errorf("the answer of what is at %s is longer than %d bytes", name, maxAnswer)
	case r.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("what answers at %s says %s to GET %s", name, verify.Clean(r.Status, 64), path)
	}
	return raw, nil
}

// cause is what went wrong below the name of the socket, which the caller says.
func cause(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}
