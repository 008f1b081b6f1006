package registry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
)

// An authority issues certificates.
type authority struct {
	pool *x509.CertPool
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

var issuer = sync.OnceValue(func() *authority {
	a := &authority{pool: x509.NewCertPool()}
	a.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &a.key.PublicKey, a.key)
	if err != nil {
		panic(err)
	}
	a.cert, _ = x509.ParseCertificate(der)
	a.pool.AddCert(a.cert)
	return a
})

// pair is a certificate for these names and addresses.
func (a *authority) pair(t testing.TB, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// encrypted serves h with https on loopback, as 127.0.0.1, localhost and whatever is
// below cdn.test. Who comes is asked for a certificate.
func encrypted(t testing.TB, h http.Handler) *url.URL {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{issuer().pair(t, "127.0.0.1", "localhost", "*.cdn.test")}, ClientAuth: tls.RequestClientCert}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// A cdn is a host that a registry has its blobs at, and what it was asked.
type cdn struct {
	url     *url.URL
	content sourcetest.Content

	mu     sync.Mutex
	asked  []*http.Request
	answer func(w http.ResponseWriter, r *http.Request, blob []byte) // nil: as it is
}

// newCDN starts one. Its URLs are signed, and end in the digest.
func newCDN(t testing.TB, c sourcetest.Content) *cdn {
	d := &cdn{content: c}
	d.url = encrypted(t, d)
	return d
}

func (d *cdn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	d.asked = append(d.asked, r)
	answer := d.answer
	d.mu.Unlock()
	_, hex, _ := strings.Cut(r.URL.Path, "/sha256/")
	blob := d.content.Blobs[digest.Digest("sha256:"+hex)]
	if answer != nil {
		answer(w, r, blob)
		return
	}
	w.Header().Set("Accept-Ranges", "bytes") // as buckets say
	w.Write(blob)
}

func (d *cdn) answers(f func(w http.ResponseWriter, r *http.Request, blob []byte)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answer = f
}

func (d *cdn) requests() []*http.Request {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.asked)
}

const signature = "X-Amz-Date=20260301T120000Z&X-Amz-Signature=s3cret%2Fs3cret%2Fs3cret"

// at is where a blob of the registry is at the host.
func (d *cdn) at(host string, r *http.Request) string {
	return "https://" + host + "/bucket/sha256/" + r.URL.Path[strings.LastIndexByte(r.URL.Path, ':')+1:] + "?" + signature
}

// redirecting is g, whose blobs are elsewhere.
func redirecting(g *sourcetest.Registry, to func(*http.Request) string) *sourcetest.Registry {
	return meddling(g, "/blobs/", to)
}

// meddling is g, which redirects what has part in its path.
func meddling(g *sourcetest.Registry, part string, to func(*http.Request) string) *sourcetest.Registry {
	g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, part) {
			return false
		}
		w.Header().Set("Location", to(r))
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	}
	return g
}

func patterns(t testing.TB, list ...string) (all []registry.Pattern) {
	t.Helper()
	for _, s := range list {
		p, err := registry.ParsePattern(s)
		if err != nil {
			t.Fatal(s, err)
		}
		all = append(all, p)
	}
	return all
}

const field = "sources.mirrors[0].blobHosts"

func elsewhere(t testing.TB, list ...string) *registry.RedirectPolicy {
	e := registry.NewRedirectPolicy(field, patterns(t, list...), issuer().pool)
	t.Cleanup(e.Close)
	return e
}

// secure is a source at u that redirects as e says.
func secure(t testing.TB, u *url.URL, e *registry.RedirectPolicy, edits ...func(*registry.Mirror)) *registry.Source {
	m := registry.Mirror{Host: sourcetest.Name.Host, URL: u, Client: client(t, &tls.Config{RootCAs: issuer().pool}), RedirectPolicy: e}
	for _, edit := range edits {
		edit(&m)
	}
	return registry.New(m)
}

// localhost is u under another name.
func localhost(u *url.URL) string { return "localhost:" + u.Port() }

// What the registry is told, nobody else is.
func TestElsewhereIsToldNothing(t *testing.T) {
	t.Parallel()
	const secret = "geheim-geheim-geheim"
	c, subject, want := signed(2)
	d := newCDN(t, c)
	told := 0
	g := redirecting(serve(c), func(r *http.Request) string {
		if r.Header.Get("X-Site") == secret && r.Header.Get("Authorization") != "" && r.URL.Query().Get("ns") != "" && len(r.TLS.PeerCertificates) == 1 {
			told++
		}
		return d.at(localhost(d.url), r)
	})
	u := encrypted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Set-Cookie", "session="+secret+"; Path=/")
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return
		}
		g.ServeHTTP(w, r)
	}))
	src := secure(t, u, elsewhere(t, localhost(d.url)), func(m *registry.Mirror) {
		m.NS, m.Credentials, m.Header = true, robot, http.Header{"X-Site": {secret}}
		m.Client = client(t, &tls.Config{RootCAs: issuer().pool, Certificates: []tls.Certificate{issuer().pair(t, "node")}})
	})
	got, err := find(t, src, subject)
	if err != nil {
		t.Fatal(err)
	}
	sourcetest.Check(t, got, want, 0)
	if told != 2 {
		t.Errorf("the registry was told what it is to be told %d times", told)
	}
	list := d.requests()
	if len(list) != 2 {
		t.Fatalf("%d requests elsewhere", len(list))
	}
	for _, r := range list {
		if r.Method != "GET" || r.URL.RawQuery != signature || len(r.TLS.PeerCertificates) != 0 || r.ContentLength != 0 || r.Host != localhost(d.url) {
			t.Errorf("asked %s %s, %d certificates, host %s", r.Method, r.URL, len(r.TLS.PeerCertificates), r.Host)
		}
		for name := range r.Header {
			if name != "User-Agent" && name != "Accept-Encoding" {
				t.Errorf("was told %s: %q", name, r.Header[name])
			}
		}
	}
}

// Hosts that match a pattern are connected to where they are public, and only they.
func TestElsewherePatterns(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	d := newCDN(t, c)
	for name, tt := range map[string]struct {
		host, pattern string
		followed      bool
	}{
		"domain":        {"eu.cdn.test", "*.cdn.test", true},
		"capitals":      {"EU.CDN.Test", "*.cdn.TEST", true},
		"any":           {"eu.cdn.test", "*", true},
		"itself":        {"eu.cdn.test", "eu.cdn.test", false}, // named, and so looked up in the DNS, which knows no such name
		"another":       {"eu.cdn.test", "*.dn.test", false},
		"another port":  {"eu.cdn.test:8443", "*.cdn.test", false},
		"that port":     {"eu.cdn.test:8443", "*.cdn.test:8443", true},
		"the domain":    {"cdn.test", "*.cdn.test", false},
		"behind it":     {"eu.cdn.test.example", "*.cdn.test", false},
		"in front":      {"eucdn.test", "*.cdn.test", false},
		"an address":    {"192.0.2.1", "*", false},
		"address, IPv6": {"[2001:db8::1]", "*", false},
		"as a number":   {"2130706433", "*", false},
		"in hex":        {"0x7f.1", "*", false},
		"dot at end":    {"eu.cdn.test.", "*.cdn.test", false},
		"empty":         {"", "*", false},
		"no pattern":    {"eu.cdn.test", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return d.at(tt.host, r) }))
			var list []string
			if tt.pattern != "" {
				list = append(list, tt.pattern)
			}
			e := elsewhere(t, list...)
			if list != nil {
				e.DialPublic(func(ctx context.Context, network, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, network, d.url.Host)
				})
			}
			got, err := find(t, secure(t, u, e), subject)
			if !tt.followed {
				if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), "redirected") {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			sourcetest.Check(t, got, want, 0)
		})
	}
}

// A name that a pattern matches and that leads to a private address is not connected
// to: the address counts that is dialled, so that it is too late for the DNS to change
// its mind.
func TestElsewhereIsPublic(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan struct{}, 1)
	go func() {
		if conn, err := l.Accept(); err == nil {
			accepted <- struct{}{}
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return "https://localhost:" + port + "/x?" + signature }))
	_, err = find(t, secure(t, u, elsewhere(t, "*:"+port)), subject)
	if text := "redirected to localhost:" + port + ": the address is not public, and the registry chose it: if it is its own, add localhost:" + port + " to " + field; !errors.Is(err, verify.ErrUnreachable) || !strings.HasSuffix(fmt.Sprint(err), text) {
		t.Errorf("error %v", err)
	}
	select {
	case <-accepted:
		t.Error("it was connected to")
	default:
	}
	// By name it is, also beside the pattern.
	d := newCDN(t, c)
	u = encrypted(t, redirecting(serve(c), func(r *http.Request) string { return d.at(localhost(d.url), r) }))
	got, err := find(t, secure(t, u, elsewhere(t, "*:"+d.url.Port(), localhost(d.url))), subject)
	if err != nil {
		t.Fatal(err)
	}
	sourcetest.Check(t, got, want, 0)
}

func TestPublic(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"1.1.1.1", "8.8.8.8", "140.82.112.3", "2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::101:101", "::ffff:1.1.1.1", "172.32.0.1", "100.128.0.1"} {
		if !registry.Public(netip.MustParseAddr(s)) {
			t.Errorf("%s is not public", s)
		}
	}
	for _, s := range []string{
		"127.0.0.1", "127.1.2.3", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.1", "169.254.169.254", "169.254.170.2", "0.0.0.0", "0.1.2.3",
		"100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "192.0.2.1",
		"::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::7f00:1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "fec0::1", "ff02::1",
		"64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1",
	} {
		if registry.Public(netip.MustParseAddr(s)) {
			t.Errorf("%s is public", s)
		}
	}
	if registry.Public(netip.Addr{}) {
		t.Error("no address is public")
	}
}

// What is not followed, and what a person is told then.
func TestElsewhereRefused(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	other := newCDN(t, c)
	for name, tt := range map[string]struct {
		to   string // HOST is the listed one
		text string
	}{
		"not listed":       {"https://other.test/x", "redirected: the registry chose another host for the blob: if it is its own, add other.test to " + field},
		"another port":     {"https://localhost:1/x", "add localhost:1 to " + field},
		"an address":       {"https://[2001:DB8::1]/x", "add [2001:db8::1] to " + field},
		"http":             {"http://HOST/x", "redirected: http://HOST is another host or scheme and is not asked"},
		"http elsewhere":   {"http://169.254.169.254/latest/meta-data", "redirected: http://169.254.169.254 is another host or scheme and is not asked"},
		"metadata service": {"https://169.254.169.254/latest", "redirected: the registry chose another host for the blob"},
		"with a password":  {"https://root:s3cret@HOST/x", "redirected: https://HOST is another host or scheme"},
		"no host":          {"https:///x", "another host or scheme"},
		"opaque":           {"https:HOST", "another host or scheme"},
		"a file":           {"file:///etc/passwd", "redirected: file:// is another host or scheme"},
		"no URL":           {"https://HOST/%zz?\"s3cret s3cret", "redirected to what is no URL"},
		"port of many":     {"https://HOST0000/x", "redirected"},
		"control":          {"https://ho\x7fst/x?a s3cret", "malformed MIME header line"},
		"long":             {"https://" + strings.Repeat("a.", 4000) + "test/x", "redirected: https://a.a."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listed := localhost(other.url)
			at := strings.ReplaceAll(tt.to, "HOST", listed)
			u := encrypted(t, redirecting(serve(c), func(*http.Request) string { return at + "?" + signature }))
			_, err := find(t, secure(t, u, elsewhere(t, listed, "*")), subject)
			// Of "*" there is nothing here but names that lead nowhere.
			if name == "not listed" {
				_, err = find(t, secure(t, u, elsewhere(t, listed)), subject)
			}
			text := strings.ReplaceAll(tt.text, "HOST", listed)
			if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(fmt.Sprint(err), text) || len(fmt.Sprint(err)) > 400 {
				t.Errorf("error %v\nwant  %s", err, text)
			}
		})
	}
	if list := other.requests(); len(list) != 0 {
		t.Errorf("%d requests", len(list))
	}
}

// Only a blob may come from elsewhere.
func TestElsewhereIsForBlobs(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	d := newCDN(t, c)
	e := elsewhere(t, localhost(d.url))
	to := func(r *http.Request) string { return d.at(localhost(d.url), r) }
	for _, part := range []string{"/manifests/", "/referrers/"} {
		g := meddling(serve(c), part, to)
		g.NoTags = true
		_, err := find(t, secure(t, encrypted(t, g), e), subject)
		if part == "/manifests/" && (!errors.Is(err, verify.ErrUnreachable) || !strings.HasSuffix(fmt.Sprint(err), "is not asked: only blobs may come from elsewhere")) {
			t.Errorf("%s: error %v", part, err)
		}
		if part == "/referrers/" && !errors.Is(err, verify.ErrNoReferrers) {
			t.Errorf("%s: error %v", part, err)
		}
	}
	// A page of referrers, and a token.
	pages := serve(c)
	pages.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/referrers/") {
			return false
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		w.Header().Set("Link", "<"+to(r)+`>; rel="next"`)
		io.WriteString(w, `{"schemaVersion":2,"manifests":[]}`)
		return true
	}
	if _, err := find(t, secure(t, encrypted(t, pages), e), subject); !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("page: error %v", err)
	}
	tokens := encrypted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			http.Redirect(w, r, "https://"+localhost(d.url)+"/token", http.StatusTemporaryRedirect)
			return
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="https://`+r.Host+`/token"`)
		w.WriteHeader(401)
	}))
	if _, err := find(t, secure(t, tokens, e), subject); !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), "307 Temporary Redirect") {
		t.Errorf("token: error %v", err)
	}
	// Not from a mirror that anybody on the way can answer for.
	plain := redirecting(serve(c), to)
	src := registry.New(registry.Mirror{Host: sourcetest.Name.Host, URL: start(t, plain), Client: client(t, nil), RedirectPolicy: e})
	if _, err := find(t, src, subject); !errors.Is(err, verify.ErrUnreachable) || !strings.HasSuffix(fmt.Sprint(err), "that is done for registries with https alone") {
		t.Errorf("over http: error %v", err)
	}
	if list := d.requests(); len(list) != 0 {
		t.Errorf("%d requests, the first %s", len(list), list[0].URL)
	}
}

// GitHub's registry has no Referrers API and leads whoever asks for it to its web pages.
func TestReferrersElsewhere(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	for name, answer := range map[string]func(http.ResponseWriter){
		"303": func(w http.ResponseWriter) {
			w.Header().Set("Location", "https://web.test/-/v2/packages/container/package/app?"+signature)
			w.WriteHeader(http.StatusSeeOther)
		},
		"400": func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadRequest) },
		"406": func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotAcceptable) },
	} {
		g := serve(c)
		g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/referrers/") {
				return false
			}
			answer(w)
			return true
		}
		got, err := find(t, secure(t, encrypted(t, g), elsewhere(t)), subject)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		sourcetest.Check(t, got, want, 0)
	}
}

// At most two redirects, wherever they are.
func TestElsewhereChain(t *testing.T) {
	t.Parallel()
	c, subject, want := signed(1)
	for name, tt := range map[string]struct {
		way      string // m: the mirror, a and b: hosts elsewhere; the last has the blob
		followed bool
		text     string
	}{
		"once":                    {"a", true, ""},
		"twice":                   {"ab", true, ""},
		"twice at one":            {"aa", true, ""},
		"within, and out":         {"ma", true, ""},
		"three times":             {"aba", false, "redirected too often"},
		"within twice, and out":   {"mma", false, "redirected too often"},
		"in a circle":             {"ababababab", false, "redirected too often"},
		"out and back":            {"am", false, "another host for the blob"},
		"out, and to an http":     {"ah", false, "is another host or scheme"},
		"out, and to a stranger":  {"ax", false, "the registry chose another host for the blob: if it is its own, add stranger.test to"},
		"out, and to no URL":      {"a%", false, "redirected to what is no URL"},
		"out, and to nowhere":     {"a.", false, ": 307 Temporary Redirect"},
		"not a redirect: 300":     {"a3", false, ": 300 Multiple Choices"},
		"not a redirect: 304":     {"a4", false, ": 304 Not Modified"},
		"within twice is allowed": {"mm", true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var hosts sync.Map
			next := func(w http.ResponseWriter, r *http.Request, blob string) bool {
				step, _ := strconv.Atoi(r.URL.Query().Get("step"))
				if step == len(tt.way) {
					return false
				}
				host, _ := hosts.Load(tt.way[step])
				status, to := 307, fmt.Sprintf("%v%s?step=%d&%s", host, blob, step+1, signature)
				switch tt.way[step] {
				case 'h':
					to = "http://127.0.0.1:1/x?" + signature
				case 'x':
					to = "https://stranger.test/x?" + signature
				case '%':
					to = "%zz?" + signature
				case '.':
					to = ""
				case '3', '4':
					status = 300 + 4*int(tt.way[step]-'3')
				}
				if to != "" {
					w.Header().Set("Location", to)
				}
				w.WriteHeader(status)
				return true
			}
			g := serve(c)
			g.Intercept = func(w http.ResponseWriter, r *http.Request) bool {
				return strings.Contains(r.URL.Path, "/blobs/") && next(w, r, r.URL.Path)
			}
			u := encrypted(t, g)
			hosts.Store(byte('m'), u.String())
			var listed []string
			for _, name := range []byte("ab") {
				at := encrypted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if !next(w, r, r.URL.Path) {
						w.Write(want[0].Blob)
					}
				}))
				hosts.Store(name, "https://"+localhost(at))
				listed = append(listed, localhost(at))
			}
			got, err := find(t, secure(t, u, elsewhere(t, listed...)), subject)
			if tt.followed {
				if err != nil {
					t.Fatal(err)
				}
				sourcetest.Check(t, got, want, 0)
			} else if !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// Whatever the other host does, what it was asked for stays a secret, and what it says
// is no answer of the registry.
func TestElsewhereFails(t *testing.T) {
	t.Parallel()
	say := func(code int, header ...string) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, r *http.Request, _ []byte) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
		}
	}
	raw := func(answer string) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, r *http.Request, _ []byte) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				panic(err)
			}
			defer c.Close()
			query, _ := url.QueryUnescape(r.URL.RawQuery)
			io.WriteString(c, strings.NewReplacer("QUERY", query, "RAW", r.URL.RawQuery).Replace(answer))
		}
	}
	echo := func(w http.ResponseWriter, r *http.Request, _ []byte) {
		for _, h := range []string{"Retry-After", "Content-Type", "Docker-Content-Digest", "WWW-Authenticate"} {
			w.Header().Set(h, r.URL.RawQuery)
		}
		w.WriteHeader(503)
	}
	for name, tt := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request, blob []byte)
		err    error // nil: the answer is there, and this signature is none
		text   string
	}{
		"401":             {say(401, "WWW-Authenticate", `Basic realm="x"`), verify.ErrUnreachable, ": 401 Unauthorized"},
		"401 for a token": {say(401, "WWW-Authenticate", `Bearer realm="https://127.0.0.1:1/t"`), verify.ErrUnreachable, ": 401 Unauthorized"},
		"403":             {say(403), verify.ErrUnreachable, ": 403 Forbidden"},
		"404":             {say(404), verify.ErrUnreachable, ": 404 Not Found"},
		"429":             {say(429, "Retry-After", "7"), verify.ErrUnreachable, ": 429 Too Many Requests, asks to wait 7 s"},
		"500":             {say(500), verify.ErrUnreachable, ": 500 Internal Server Error"},
		"206":             {say(206), verify.ErrUnreachable, ": 206 Partial Content"},
		"echoes":          {echo, verify.ErrUnreachable, ": 503 Service Unavailable"},
		"closed":          {func(http.ResponseWriter, *http.Request, []byte) { panic(http.ErrAbortHandler) }, verify.ErrUnreachable, "EOF"},
		"no HTTP":         {raw("junk\r\n\r\n QUERY"), verify.ErrUnreachable, "malformed HTTP"},
		"no HTTP, echoed": {raw("QUERY\r\n\r\n"), verify.ErrUnreachable, "not shown"},
		"raw, echoed":     {raw("RAW\r\n\r\n"), verify.ErrUnreachable, "not shown"},
		"header, echoed":  {raw("HTTP/1.1 200 OK\r\nQUERY\r\n\r\n"), verify.ErrUnreachable, "not shown"},
		"trailer, echoed": {raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nQUERY\r\n\r\n"), verify.ErrUnreachable, "not shown"},
		"encoding, echoed": {func(w http.ResponseWriter, r *http.Request, _ []byte) {
			w.Header().Set("Content-Encoding", r.URL.Query().Get("X-Amz-Signature"))
		}, verify.ErrUnreachable, "not shown"},
		"gzip": {func(w http.ResponseWriter, r *http.Request, blob []byte) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			z.Write(blob)
			z.Close()
		}, verify.ErrUnreachable, `content encoding "gzip"`},
		"cut short": {func(w http.ResponseWriter, r *http.Request, blob []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
			w.Write(blob[:len(blob)/2])
		}, verify.ErrUnreachable, "unexpected EOF"},
		"other bytes":  {func(w http.ResponseWriter, r *http.Request, blob []byte) { w.Write(bytes.ToUpper(blob)) }, nil, "mismatch"},
		"other digest": {say(200, "Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64)), nil, "mismatch"},
		"nothing":      {say(200), nil, "mismatch"},
		"too much": {func(w http.ResponseWriter, r *http.Request, blob []byte) {
			w.Write(append(blob, make([]byte, 1<<20)...))
		}, nil, "too long"},
		"endless": {func(w http.ResponseWriter, r *http.Request, _ []byte) {
			for chunk := make([]byte, 64<<10); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}, nil, "too long"},
		"huge header": {say(200, "X-Junk", strings.Repeat("x", 1<<20)), verify.ErrUnreachable, "redirected to localhost"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, subject, want := signed(2)
			d := newCDN(t, c)
			bad := "/" + digest.FromBytes(want[0].Blob).Encoded()
			d.answers(func(w http.ResponseWriter, r *http.Request, blob []byte) {
				if strings.HasSuffix(r.URL.Path, bad) {
					tt.answer(w, r, blob)
					return
				}
				w.Write(blob)
			})
			u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return d.at(localhost(d.url), r) }))
			asked := func(m *registry.Mirror) {
				m.Credentials = func(context.Context) (registry.Credential, error) {
					t.Error("somebody asked for credentials")
					return registry.Credential{}, nil
				}
			}
			got, err := find(t, secure(t, u, elsewhere(t, localhost(d.url)), asked), subject)
			if !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
			if len(got) != 2 || got[0].Err == nil || got[1].Err != nil || string(got[1].Blob) != string(want[1].Blob) {
				t.Fatalf("evidence %v", got)
			}
			text := fmt.Sprint(got[0].Err)
			if !strings.Contains(text, tt.text) || strings.Contains(text, "bucket") || len(text) > 500 {
				t.Errorf("error %s\nwant  %s", text, tt.text)
			}
		})
	}
}

// A host that fails is blamed on the image that was asked about, as a registry that
// hangs is: another host's trouble is not that of all images at the registry.
func TestElsewhereIsNotTheRegistry(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(http.ResponseWriter, *http.Request, []byte){
		"closes": func(http.ResponseWriter, *http.Request, []byte) { panic(http.ErrAbortHandler) },
		"429 for a while": func(w http.ResponseWriter, _ *http.Request, _ []byte) {
			w.Header().Set("Retry-After", "3")
			w.WriteHeader(429)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, subject, _ := signed(1)
			d := newCDN(t, c)
			d.answers(answer)
			u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return d.at(localhost(d.url), r) }))
			now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
			links := registry.NewBreaker(func() time.Time { return now }, func() float64 { return 0 })
			src := secure(t, u, elsewhere(t, localhost(d.url)), func(m *registry.Mirror) { m.Breaker = links })
			ask := func(path string, about ocispec.Descriptor) error {
				return src.Find(t.Context(), verify.Name{Host: sourcetest.Name.Host, Path: path}, about, verify.NewBudget(sourcetest.Kind, verify.Limits{}), func(verify.Evidence) bool { return true })
			}
			for range 2 {
				ask(sourcetest.Name.Path, subject)
			}
			n := len(d.requests())
			if err := ask(sourcetest.Name.Path, subject); !strings.Contains(fmt.Sprint(err), "not asked, since this repository has failed") || len(d.requests()) != n {
				t.Errorf("error %v", err)
			}
			if err := ask("another/app", subject); !errors.Is(err, verify.ErrNoReferrers) {
				t.Errorf("another repository: %v", err)
			}
			if silent := name != "closes"; silent != strings.Contains(fmt.Sprint(ask(sourcetest.Name.Path, c.Image("another"))), "not asked") {
				t.Errorf("another image is asked about where it should not, or is not")
			}
		})
	}
}

// One that cannot be connected to is no sign that the registry cannot.
func TestElsewhereIsAway(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := "localhost:" + fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return "https://" + at + "/x?" + signature }))
	links := registry.NewBreaker(func() time.Time { return time.Unix(0, 0) }, func() float64 { return 0 })
	src := secure(t, u, elsewhere(t, at), func(m *registry.Mirror) { m.Breaker = links })
	for range 3 {
		_, err = sourcetest.Find(t.Context(), src, subject, verify.Limits{})
	}
	if !strings.Contains(fmt.Sprint(err), "this repository has failed since 1970-01-01T00:00:00Z (connection refused)") {
		t.Errorf("error %v", err)
	}
}

// What is asked elsewhere takes its turn too.
func TestElsewhereTakesATurn(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	d := newCDN(t, c)
	u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return d.at(localhost(d.url), r) }))
	links := registry.NewBreaker(func() time.Time { return time.Unix(0, 0) }, func() float64 { return 0 })
	src := secure(t, u, elsewhere(t, localhost(d.url)), func(m *registry.Mirror) { m.Breaker = links })
	b := verify.NewBudget(sourcetest.Kind, verify.Limits{})
	b.Prefetch = true
	if err := src.Find(t.Context(), sourcetest.Name, subject, b, func(verify.Evidence) bool { return true }); err != nil {
		t.Fatal(err)
	}
	// A burst of four, and 50 ms for the fifth.
	if d := links.Turn(u); d != 50*time.Millisecond {
		t.Errorf("the next waits for %v", d)
	}
}

// Certificates are checked, whatever is done for the registry.
func TestElsewhereIsChecked(t *testing.T) {
	t.Parallel()
	c, subject, _ := signed(1)
	d := newCDN(t, c)
	u := encrypted(t, redirecting(serve(c), func(r *http.Request) string { return d.at(localhost(d.url), r) }))
	e := registry.NewRedirectPolicy(field, patterns(t, localhost(d.url)), x509.NewCertPool())
	t.Cleanup(e.Close)
	src := secure(t, u, e, func(m *registry.Mirror) { m.Client = client(t, &tls.Config{InsecureSkipVerify: true}) })
	if _, err := find(t, src, subject); !errors.Is(err, verify.ErrUnreachable) || !strings.Contains(err.Error(), "redirected to "+localhost(d.url)+": ") || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("error %v", err)
	}
	if n := len(d.requests()); n != 0 {
		t.Errorf("%d requests", n)
	}
}

func TestParsePattern(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"cdn.example": "cdn.example", "CDN.Example:443": "cdn.example", "cdn.example:8443": "cdn.example:8443", "localhost": "localhost",
		"*.cdn.example": "*.cdn.example", "*.cdn.example:8443": "*.cdn.example:8443", "*": "*", "*:8443": "*:8443",
		"192.0.2.7": "192.0.2.7", "192.0.2.7:9000": "192.0.2.7:9000", "[2001:DB8:0::1]": "[2001:db8::1]", "[2001:db8::1]:9000": "[2001:db8::1]:9000",
		"a_b-c.s3.eu-west-1.amazonaws.com": "a_b-c.s3.eu-west-1.amazonaws.com",
	} {
		if p, err := registry.ParsePattern(in); err != nil || p.String() != want {
			t.Errorf("%s: %s, %v; want %s", in, p, err, want)
		}
	}
	for _, in := range []string{
		"", " ", ":443", "https://cdn.example", "cdn.example/", "cdn.example/x", "cdn.example.", ".cdn.example", "cdn..example", "*.", "*.com", "*.*.example", "**", "*cdn.example",
		"*.-x.example", "a.*.example", "cdn.*", "cdn.example:", "cdn.example:0", "cdn.example:65536", "cdn.example:443:443", "cdn.example:+80", "cdn.example:080", "2001:db8::1", "[2001:db8::1",
		"[fe80::1%eth0]", "[192.0.2.7]", "[]", "*.192.0.2.7", "1.2.3", "2130706433", "0x7f.1", "127.1", "root@cdn.example", "cdn example", "cdn.example?x", "ü.example", strings.Repeat("a", 64) + ".example",
		strings.Repeat("a.", 130) + "example", "*.[2001:db8::1]",
	} {
		if p, err := registry.ParsePattern(in); err == nil {
			t.Errorf("%q is %s", in, p)
		}
	}
	if (registry.Pattern{}).Matches(&url.URL{Scheme: "https", Host: ""}) {
		t.Error("the zero Pattern matches")
	}
}

// FuzzPattern: what is read prints as what it is, and a pattern of many hosts matches
// no address, whatever the URL.
func FuzzPattern(f *testing.F) {
	for _, s := range []string{"*", "*.cdn.example", "cdn.example:8443", "[2001:db8::1]:9000", "192.0.2.7", "*:1"} {
		f.Add(s, "https://eu.cdn.example:8443/x")
		f.Add(s, "https://192.0.2.7/")
		f.Add(s, "https://[::ffff:192.0.2.7]:9000/")
	}
	f.Fuzz(func(t *testing.T, s, to string) {
		p, err := registry.ParsePattern(s)
		if err != nil {
			return
		}
		if again, err := registry.ParsePattern(p.String()); err != nil || again != p {
			t.Fatalf("%q is %s, and that %s, %v", s, p, again, err)
		}
		u, err := url.Parse(to)
		if err != nil || !p.Matches(u) {
			return
		}
		_, err = netip.ParseAddr(u.Hostname())
		if many := strings.HasPrefix(p.String(), "*"); u.Hostname() == "" || many && err == nil {
			t.Fatalf("%s matches %s", p, u)
		} else if !many {
			// It is the very host.
			if q, err := registry.ParsePattern(u.Host); err != nil || q != p {
				t.Fatalf("%s matches %s, which is %s, %v", p, u, q, err)
			}
		}
	})
}
