package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// RefreshSchema is that of what POST /v1/refresh answers. Fields are added and never
// change.
const RefreshSchema = "tidewaiter.dev/refresh/v1"

// A Refreshed is what became of one image whose signatures were looked for again.
type Refreshed struct {
	Image   string           `json:"image"`
	Target  string           `json:"target"`            // digest that its name leads to on the node
	New     int              `json:"new"`               // signatures that meet the policy and were not kept before
	Spare   int              `json:"spare,omitempty"`   // meet the policy and count no longer than others of the signer that are kept
	Unkept  int              `json:"unkept,omitempty"`  // meet the policy and could not be kept
	Failed  bool             `json:"failed"`            // a source could not be asked
	Tried   []verify.Attempt `json:"attempts"`          // each source that was asked
	Skipped string           `json:"skipped,omitempty"` // code of the reason why none was
	Detail  string           `json:"detail,omitempty"`  // of Skipped
}

// A Summary is of all images of one request. It comes last: without one, the answer
// is not whole.
type Summary struct {
	Schema string `json:"schema"`
	Images int    `json:"images"`
	New    int    `json:"new"`
	Failed int    `json:"failed"`          // images
	Error  string `json:"error,omitempty"` // why not all images were asked about
}

// A refreshLine is one line of the answer. One of the two is set.
type refreshLine struct {
	Image   *Refreshed `json:"image,omitempty"`
	Summary *Summary   `json:"summary,omitempty"`
}

// A Refresh looks for signatures of these images again, or without any of all, and
// hands over what became of each. It ends with ctx. An error that wraps a Refusal has
// its status.
type Refresh func(ctx context.Context, images []string, yield func(Refreshed) error) error

// A Refusal is why a request cannot be served now or at all.
type Refusal struct {
	Status int // of HTTP
	Err    error
}

// Error implements error.
func (r *Refusal) Error() string { return r.Err.Error() }

// Unwrap returns Err.
func (r *Refusal) Unwrap() error { return r.Err }

// RefreshEndpoint answers POST /v1/refresh.
func RefreshEndpoint(refresh Refresh) Endpoint {
	return Endpoint{Path: "/v1/refresh", post: refreshHandler(refresh)}
}

// refreshHandler answers a line for each image when it has been asked about, which
// may take minutes. Who goes away ends it.
func refreshHandler(refresh Refresh) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		begun := false
		send := func(l refreshLine) error {
			if !begun {
				begun = true
				w.Header().Set("Content-Type", "application/x-ndjson")
				w.Header().Set("Cache-Control", "no-store")
			}
			if err := c.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
				return err
			}
			e := json.NewEncoder(w)
			e.SetEscapeHTML(false)
			if err := e.Encode(l); err != nil {
				return err
			}
			return c.Flush()
		}
		// The server would take the end of the time to ask for the end of who asks.
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		sum := Summary{Schema: RefreshSchema}
		err := refresh(r.Context(), r.URL.Query()["image"], func(one Refreshed) error {
			sum.Images, sum.New = sum.Images+1, sum.New+one.New
			if one.Failed {
				sum.Failed++
			}
			return send(refreshLine{Image: &one})
		})
		if err != nil && !begun {
			status := http.StatusServiceUnavailable
			if no := (*Refusal)(nil); errors.As(err, &no) {
				status = no.Status
			}
			_ = c.SetWriteDeadline(time.Now().Add(writeTime))
			http.Error(w, err.Error(), status)
			return
		}
		if err != nil {
			sum.Error = err.Error()
		}
		_ = send(refreshLine{Summary: &sum}) // who asked has gone
	})
}

// maxNames bounds the images that AskRefresh names, in bytes: they are part of the
// request's line.
const maxNames = 3 << 10

// AskRefresh has the gate whose run directory is dir look for signatures again, of
// these images or without any of all, and waits for the end, however long that takes.
// Errors say that it could not be found out what became of all.
func AskRefresh(ctx context.Context, dir string, images []string, yield func(Refreshed)) (*Summary, error) {
	path := "/v1/refresh"
	if len(images) > 0 {
		path += "?" + url.Values{"image": images}.Encode()
	}
	if len(path) > maxNames {
		return nil, errors.New("these are too many images for one request: name fewer, or none for all")
	}
	name := filepath.Join(dir, SocketName)
	r, err := ask(ctx, dir, http.MethodPost, path)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		raw, _ := io.ReadAll(io.LimitReader(r.Body, 1024))
		return nil, fmt.Errorf("the gate at %s says: %s", name, text.Clean(strings.TrimSpace(string(raw)), 640))
	}
	lines := bufio.NewScanner(r.Body)
	lines.Buffer(nil, int(maxAnswer))
	for lines.Scan() {
		var l refreshLine
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return nil, fmt.Errorf("read the answer of the gate at %s: %w", name, err)
		}
		switch s := l.Summary; {
		case l.Image != nil:
			yield(*l.Image)
		case s != nil && s.Schema != RefreshSchema:
			return nil, fmt.Errorf("what answers at %s speaks %s, not %s", name, text.Quote(s.Schema, 64), RefreshSchema)
		case s != nil && s.Error != "":
			return s, fmt.Errorf("not all images were asked about: %s", text.Clean(s.Error, 640))
		case s != nil:
			return s, nil
		}
	}
	err = lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("read the answer of the gate at %s: %w", name, err)
}
