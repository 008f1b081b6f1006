package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

const (
	askTime   = 5 * time.Second // for one request
	maxAnswer = int64(1 << 20)  // bytes
)

// SweepPath is where the control socket answers with the status after what runs was looked
// at anew, and SweepTime how long that may take: the check rests for ten seconds after each.
const (
	SweepPath = "/v1/sweep"
	SweepTime = 30 * time.Second
)

// Ask returns the status of the gate whose run directory is dir. Errors say that it
// could not be found out.
func Ask(ctx context.Context, dir string) (*Status, error) {
	var s Status
	err := Get(ctx, dir, Question{Path: "/v1/status", Schema: StatusSchema}, &s)
	if err != nil {
		return nil, err
	}
	return &s, nil
}

// A Question is one request.
type Question struct {
	Path    string
	Query   url.Values
	Schema  string        // of the answer
	Longest time.Duration // that it may take; 0: 5 seconds
	Bytes   int64         // that the answer may have; 0: 1 MiB
}

// ErrRefused is wrapped where the gate answered that it does not.
var ErrRefused = errors.New("the gate says")

// Get asks the gate whose run directory is dir, and decodes its answer. Errors say
// that it could not be found out.
func Get(ctx context.Context, dir string, q Question, into any) error {
	raw, err := get(ctx, dir, q)
	if err != nil {
		return err
	}
	at := filepath.Join(dir, SocketName)
	var is struct{ Schema string }
	if err := json.Unmarshal(raw, &is); err != nil {
		return fmt.Errorf("what answers at %s is no gate: %w", at, err)
	}
	if is.Schema != q.Schema {
		return fmt.Errorf("what answers at %s speaks %s, not %s", at, text.Quote(is.Schema, 64), q.Schema)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("what answers at %s is no gate: %w", at, err)
	}
	return nil
}

func get(ctx context.Context, dir string, q Question) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(q.Longest, askTime))
	defer cancel()
	limit := cmp.Or(q.Bytes, maxAnswer)
	name := filepath.Join(dir, SocketName)
	r, err := ask(ctx, dir, http.MethodGet, q.Path+"?"+q.Query.Encode())
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the answer of the gate at %s: %w", name, err)
	case int64(len(raw)) > limit:
		return nil, fmt.Errorf("the answer of what is at %s is longer than %d bytes", name, limit)
	case r.StatusCode == http.StatusUnprocessableEntity, r.StatusCode == http.StatusTooManyRequests:
		return nil, fmt.Errorf("%w: %s", ErrRefused, text.Clean(strings.TrimSpace(string(raw)), 600))
	case r.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("the gate at %s is another version, which does not know GET %s", name, q.Path)
	case r.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("what answers at %s says %s to GET %s", name, text.Clean(r.Status, 64), q.Path)
	}
	return raw, nil
}

// ask puts a request to the gate whose run directory is dir. The caller closes the
// answer's body.
func ask(ctx context.Context, dir, method, path string) (*http.Response, error) {
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
	req, err := http.NewRequestWithContext(ctx, method, "http://tidewaiter"+path, nil)
	if err != nil {
		return nil, err
	}
	r, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("no gate answers at %s: %w", name, cause(err))
	}
	return r, nil
}

// cause is what went wrong below the name of the socket, which the caller says.
func cause(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}
