package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
)

// RegistryOptions say what registry to start. The zero value serves the
// Referrers API, as go-containerregistry does: a list says of each manifest the media
// type of its config, and is not filtered.
type RegistryOptions struct {
	NoReferrers bool // 404 at the Referrers API: referrers are found by tag only
}

// A Registry is a registry in this process, on a loopback port that it keeps
// while it lives. Its contents are in memory and survive Stop and Start.
// All methods but Stop and Start may be called from several goroutines.
type Registry struct {
	Host string // the made-up host in the names of its images: "registry.example"
	Addr string // where it listens: "127.0.0.1:41234"

	handler     http.Handler
	log         *log.Logger
	noReferrers bool
	twoRequests bool         // to put a blob
	busy        atomic.Int64 // requests that are being answered
	port        *Port        // that of Addr
	behind      *Port        // of the registry in another process, or nil

	mu       sync.Mutex
	server   *http.Server // nil while stopped
	served   chan struct{}
	tls      *tls.Config // of Secure, or nil
	tlsPort  *Port
	fault    func(http.Handler) http.Handler
	requests []Request
}

// A Request is one that a registry was asked.
type Request struct {
	Method, Path, Query string
	UserAgent           string
	Status              int // what it answered; 0 if the handler gave up
}

// NewRegistry starts a registry for images of host. Names of images say host;
// [Node.Use] maps it to the registry, which never resolves host itself.
func NewRegistry(host string, o RegistryOptions) (*Registry, error) {
	logger := log.New(io.Discard, "", 0)
	port, err := ReservePort()
	if err != nil {
		return nil, err
	}
	r := &Registry{
		Host:    host,
		Addr:    port.Addr,
		port:    port,
		handler: registry.New(registry.WithReferrersSupport(!o.NoReferrers), registry.Logger(logger)),
		log:     logger,

		noReferrers: o.NoReferrers,
	}
	return r, r.Start()
}

// NewDistribution starts a registry that is the CNCF's, which has no Referrers API.
// Behind what this process answers is a process of its own that ends with the node;
// its contents are in the node's directory.
func (n *Node) NewDistribution(ctx context.Context, host string) (*Registry, error) {
	bin, err := FindDistribution(ctx, n.log)
	if err != nil {
		return nil, err
	}
	behind, err := ReservePort()
	if err != nil {
		return nil, err
	}
	front, err := ReservePort()
	if err != nil {
		return nil, err
	}
	addr := behind.Addr
	config := filepath.Join(n.Dir, distributionFile)
	text := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q}\n", filepath.Join(n.Dir, "distribution"), addr)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, "serve", config)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	n.mu.Lock()
	if n.distribution != nil {
		n.mu.Unlock()
		return nil, errors.New("registry: the node has one of the CNCF's already")
	}
	n.distribution, err = startProcess(cmd)
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	target := &url.URL{Scheme: "http", Host: addr}
	logger := log.New(io.Discard, "", 0)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport, proxy.ErrorLog = client.Transport, logger
	r := &Registry{Host: host, Addr: front.Addr, port: front, behind: behind, handler: proxy, log: logger, noReferrers: true, twoRequests: true}
	for end := time.Now().Add(2 * time.Minute); ; {
		res, err := client.Get(target.String() + "/v2/")
		if err == nil {
			res.Body.Close()
			return r, r.Start()
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("the CNCF's registry does not answer: %w", err)
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// URL returns "http://" and the address.
func (r *Registry) URL() string { return "http://" + r.Addr }

// Start makes the registry answer again after Stop, on the port that it had.
func (r *Registry) Start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		return nil
	}
	l, err := net.Listen("tcp", r.Addr)
	if err != nil {
		return fmt.Errorf("registry of %s: %w", r.Host, err)
	}
	listeners := []net.Listener{l}
	if r.tls != nil {
		l, err := tls.Listen("tcp", r.tlsPort.Addr, r.tls)
		if err != nil {
			return errors.Join(fmt.Errorf("registry of %s: %w", r.Host, err), listeners[0].Close())
		}
		listeners = append(listeners, l)
	}
	s := &http.Server{Handler: http.HandlerFunc(r.serve), ReadHeaderTimeout: 10 * time.Second, ErrorLog: r.log}
	served := make(chan struct{})
	r.server, r.served = s, served
	go func() {
		defer close(served)
		var wg sync.WaitGroup
		for _, l := range listeners {
			wg.Go(func() { _ = s.Serve(l) })
		}
		wg.Wait()
	}()
	return nil
}

// Secure makes the registry answer TLS too, at the address that it returns and
// keeps, for those whom c lets in. Addr goes on without. Nobody may be asking.
func (r *Registry) Secure(c *tls.Config) (addr string, err error) {
	port, err := ReservePort()
	if err != nil {
		return "", err
	}
	if err := r.Stop(); err != nil {
		return "", err
	}
	r.mu.Lock()
	r.tls, r.tlsPort = c, port
	r.mu.Unlock()
	return port.Addr, r.Start()
}

// Stop makes the registry unreachable: connections are cut and new ones refused.
func (r *Registry) Stop() error {
	r.mu.Lock()
	s, served := r.server, r.served
	r.server = nil
	r.mu.Unlock()
	if s == nil {
		return nil
	}
	err := s.Close()
	<-served
	// What it was answering notices soon that nobody listens any more.
	r.idle()
	return err
}

// idle waits until nothing is being answered, but not for what hangs.
func (r *Registry) idle() {
	for end := time.Now().Add(5 * time.Second); r.busy.Load() > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
}

// Fault puts wrap around the registry, to delay, refuse or falsify; what wrap
// answers itself is in Requests too. Nil removes it.
func (r *Registry) Fault(wrap func(http.Handler) http.Handler) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = wrap
}

// Requests returns the requests that ended since the start or Forget, the oldest
// first. Those that Push and Attach make are among them.
func (r *Registry) Requests() []Request {
	r.idle()
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Request(nil), r.requests...)
}

// Forget empties Requests.
func (r *Registry) Forget() {
	r.idle() // who asked may have the answer already that is about to be noted
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = nil
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	r.busy.Add(1)
	defer r.busy.Add(-1)
	r.mu.Lock()
	h, fault := r.handler, r.fault
	r.mu.Unlock()
	if fault != nil {
		h = fault(h)
	}
	s := &statusWriter{ResponseWriter: w}
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.requests = append(r.requests, Request{req.Method, req.URL.Path, req.URL.RawQuery, req.UserAgent(), s.status})
	}()
	h.ServeHTTP(s, req)
	if s.status == 0 {
		s.status = http.StatusOK
	}
}

// statusWriter remembers the status.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap lets faults use http.ResponseController to flush or hijack.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// reference is where the registry really has an image of its host: "app:1",
// "app@sha256:…", or the same with the host in front.
func (r *Registry) reference(image string) (name.Reference, error) {
	image = strings.TrimPrefix(image, r.Host+"/")
	ref, err := name.ParseReference(r.Addr+"/"+image, name.Insecure)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", image, err)
	}
	return ref, nil
}

// Use makes containerd pull what names a registry's host from that registry and
// from nowhere else. Several with one host are its mirrors, asked in this order.
// It counts from the next pull, without a restart.
func (n *Node) Use(registries ...*Registry) error {
	hosts := map[string]string{}
	for _, r := range registries {
		if hosts[r.Host] == "" {
			// Without a server line containerd would ask the host itself in the end.
			hosts[r.Host] = fmt.Sprintf("server = %q\n", r.URL())
		}
		hosts[r.Host] += fmt.Sprintf("\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", r.URL())
	}
	for host, toml := range hosts {
		if err := n.Hosts(host, toml); err != nil {
			return err
		}
	}
	return nil
}

// Hosts writes certs.d/HOST/hosts.toml, or with empty content removes it. It
// counts from the next pull, without a restart.
func (n *Node) Hosts(host, toml string) error {
	if host == "" || strings.Contains(host, "/") || strings.HasPrefix(host, ".") {
		return fmt.Errorf("%q is not a host", host)
	}
	dir := filepath.Join(n.CertsDir, host)
	if toml == "" {
		return os.RemoveAll(dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o600)
}

// pauseImage makes a registry with the image that sandboxes run.
func pauseImage(ctx context.Context) (p struct {
	registry *Registry
	image    *Image
}, err error) {
	p.registry, err = NewRegistry("pause.example", RegistryOptions{})
	if err != nil {
		return p, err
	}
	p.image, err = p.registry.Push(ctx, "pause:1", ImageOptions{Word: "pause"})
	if err != nil {
		return p, errors.Join(err, p.registry.Stop())
	}
	return p, nil
}
