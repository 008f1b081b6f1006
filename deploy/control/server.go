package control

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/net/netutil"
)

// Bounds of what comes in. A request is a few hundred bytes of header, and an answer
// some kilobytes.
const (
	connections = 8 // at once; others wait in the kernel
	headers     = 4 << 10
	readTime    = 2 * time.Second
	writeTime   = 5 * time.Second
	farewell    = time.Second // for what is being answered at the end
)

// Serve answers with h on l, which it closes, until ctx ends, with nil. It has few
// connections at once, each for one request, and all of them end soon whatever the
// other side does.
func Serve(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler:           h,
		MaxHeaderBytes:    headers,
		ReadTimeout:       readTime,
		ReadHeaderTimeout: readTime,
		WriteTimeout:      writeTime,
		IdleTimeout:       readTime,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, 0), // what clients do wrong

		DisableGeneralOptionsHandler: true,
	}
	srv.SetKeepAlivesEnabled(false)
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(netutil.LimitListener(l, connections)) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
	defer cancel()
	if srv.Shutdown(end) != nil {
		srv.Close()
	}
	<-ended
	return nil
}

// An Endpoint answers requests for one more path of the control socket, with GET.
type Endpoint struct {
	Path string // "/v1/images"

	// Longest is how long an answer may take: as long as that, and not the few seconds
	// that others have. Of the endpoints that have one, two questions are answered at
	// once, so that probes find a connection.
	Longest time.Duration

	// Answer returns what is encoded as JSON. An error says what is wrong with the
	// question. It is called by several goroutines at once.
	Answer func(ctx context.Context, q url.Values) (any, error)

	post http.Handler // that of RefreshEndpoint: POST alone
}

// slow is how many questions that take time are answered at once.
const slow = 2

// handle answers with e. turns are those of all endpoints that take time.
func (e Endpoint) handle(turns chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		if e.Longest > 0 {
			select {
			case turns <- struct{}{}:
				defer func() { <-turns }()
			default:
				http.Error(w, "others are asking; try again", http.StatusTooManyRequests)
				return
			}
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, e.Longest)
			defer cancel()
			// The deadline for reading would end ctx, since net/http reads on to see
			// whether the client left.
			c, end := http.NewResponseController(w), time.Now().Add(e.Longest+writeTime)
			_, _ = c.SetReadDeadline(end), c.SetWriteDeadline(end)
		}
		v, err := e.Answer(ctx, r.URL.Query())
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		answer(w, http.StatusOK, v)
	}
}

// Handler answers the control socket's requests from these, of which the first two
// must not block. All are safe for concurrent use.
func Handler(status func() Status, metrics func(io.Writer) error, more ...Endpoint) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/ready", func(w http.ResponseWriter, _ *http.Request) {
		s := status()
		code := http.StatusOK
		if !s.Ready {
			code = http.StatusServiceUnavailable
		}
		answer(w, code, s.Readiness())
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, status()) })
	mux.Handle("GET /metrics", metricsHandler(metrics))
	turns := make(chan struct{}, slow)
	for _, e := range more {
		if e.post != nil {
			mux.Handle("POST "+e.Path, e.post)
			continue
		}
		mux.HandleFunc("GET "+e.Path, e.handle(turns))
	}
	return noBody(mux)
}

// Metrics answers GET /metrics, and nothing else.
func Metrics(metrics func(io.Writer) error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metricsHandler(metrics))
	return noBody(mux)
}

func metricsHandler(metrics func(io.Writer) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		var b bytes.Buffer
		if err := metrics(&b); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(b.Bytes())
	})
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // the client is gone
}

// noBody refuses requests that send something.
func noBody(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			http.Error(w, "a request has no body here", http.StatusRequestEntityTooLarge)
			return
		}
		h.ServeHTTP(w, r)
	})
}
