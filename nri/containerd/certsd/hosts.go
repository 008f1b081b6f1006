// Package certsd reads containerd's certs.d: where it fetches the images of a host
// from, as plain mirrors.
//
// The files are those of containerd's docs/hosts.md, with the table
// [host."URL".rewrite] that k3s and RKE2 add and their containerd applies
// (docs.k3s.io, "Private Registry Configuration", "Rewrites").
//
// # Why not containerd's own package
//
// core/remotes/docker/config would be 0.5 MB, which is not the reason. It answers
// with clients that are ready to use, and an answer does not show what it comes
// from: a file that does not parse is logged, and the host itself is asked instead;
// the host is always appended; http is tried where https fails; certificates of
// localhost are not checked; rewrites are dropped. It reads the files by itself,
// without a bound and later than what the revision is the digest of. So the same bytes
// are read here with the parser that it uses, which also knows lines, and a test
// holds what both make of them together.
//
// What only containerd does with a push, and dial_timeout, are not looked at.
package certsd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Limits of what is read.
const (
	maxFile       = 64 << 10 // bytes of one hosts.toml
	maxTotal      = 16 << 20 // bytes of all files, certificates included
	maxPEM        = 1 << 20  // bytes of one file of certificates
	maxRegistries = 256      // directories
	maxHosts      = 32       // hosts in one file
	maxPEMs       = 16       // files of certificates of one host, and pairs
	maxHeaders    = 32       // values of one host
	maxHeader     = 8 << 10  // bytes of one value
	maxRewrites   = 64       // of one host
	maxText       = 1 << 10  // bytes of any other text
	maxDepth      = 16       // parts of one key
)

// Files is how files are read. Names are absolute. Errors say what is wrong and
// need not name the file; they wrap [fs.ErrNotExist] where there is nothing.
type Files interface {
	// List returns the names in a directory, sorted.
	List(dir string) ([]string, error)
	// Read returns a file of at most limit bytes.
	Read(name string, limit int64) ([]byte, error)
}

// A Registry is what one directory of certs.d says of the images of one host.
type Registry struct {
	Host    string   // as the directory is called, not canonical: "docker.io", "10.0.0.5:5000"; empty: _default
	Dir     string   // absolute
	Mirrors []Mirror // in the order to ask
	// Origin is the host itself, as the file says to ask it, or nil where the file
	// says that nothing is pulled there. What is written only of it is not of a mirror.
	Origin *Mirror
}

// A Mirror is one registry that images of a host may be fetched from.
type Mirror struct {
	URL     *url.URL    // scheme and host; nil for an Origin of which no server is written
	Root    string      // path of its API: "/v2", "/hub/v2", "/" for none
	TLS     *tls.Config // nil: as usual
	Header  Header      // sent with each request, and secret; may be nil
	Rewrite []Rewrite   // of the path asked for; the first that changes it counts

	File string // hosts.toml, or the directory where there is none
	Line int    // 0 for the directory
}

// A Header prints as nothing but the fact that it is one.
type Header http.Header

// Format implements [fmt.Formatter], so that no verb shows a secret.
func (Header) Format(f fmt.State, _ rune) { io.WriteString(f, "(header)") }

// MarshalText implements [encoding.TextMarshaler], so that no encoder shows one.
func (Header) MarshalText() ([]byte, error) { return []byte("(header)"), nil }

// A Rewrite changes a path: "library/nginx", without tag.
type Rewrite struct {
	From *regexp.Regexp
	To   string // with $1 as in regexp.Expand
}

// Insecure reports whether anybody on the way can answer for the mirror.
func (m Mirror) Insecure() bool {
	return m.URL != nil && m.URL.Scheme == "http" || m.TLS != nil && m.TLS.InsecureSkipVerify
}

// Proxy reports whether the mirror is to be told, in the query parameter ns, that it
// is asked for images of host: if it is another one (containerd,
// core/remotes/docker, RegistryHost.isProxy).
func (m Mirror) Proxy(host string) bool {
	return m.URL != nil && m.URL.Host != host && !(host == "docker.io" && hub(m.URL.Host))
}

// hub reports whether host is Docker Hub.
func hub(host string) bool {
	return host == "docker.io" || host == "registry-1.docker.io" || host == "index.docker.io"
}

// An Error is what is wrong in one place of a file. It repeats no value.
type Error struct {
	File string
	Line int // from 1; 0 where it is about the whole file
	Text string
}

// Error implements error.
func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s += ":" + strconv.Itoa(e.Line)
	}
	return s + ": " + e.Text
}

// Read returns what the directories in dir say, sorted by their names, and what of
// it is not used. For a host that no Registry names, that of _default counts, if
// there is one (Lookup). Where two directories name one host the one whose name ends
// in _ counts, as for containerd. Errors are [*Error]; one file that is broken is an
// error, since nobody knows what it says, and so is a link that leads nowhere.
func Read(dir string, files Files) ([]Registry, []*Error, error) {
	r := &reader{files: files, left: maxTotal}
	names, err := files.List(dir)
	if err != nil {
		return nil, nil, &Error{File: dir, Text: reason(err)}
	}
	// host_5000_ goes before host:5000.
	slices.SortStableFunc(names, func(a, b string) int {
		return strings.Compare(strconv.FormatBool(!strings.HasSuffix(a, "_")), strconv.FormatBool(!strings.HasSuffix(b, "_")))
	})
	var list []Registry
	for _, name := range names {
		reg := Registry{Host: hostOf(name), Dir: filepath.Join(dir, name)}
		if strings.HasPrefix(name, ".") || slices.ContainsFunc(list, func(o Registry) bool { return o.Host == reg.Host }) {
			continue
		}
		in, err := files.List(reg.Dir)
		if errors.Is(err, ErrNotDirectory) {
			continue
		}
		if err != nil {
			return nil, nil, &Error{File: reg.Dir, Text: reason(err)}
		}
		if len(list) == maxRegistries {
			return nil, nil, &Error{File: dir, Text: fmt.Sprintf("has more than %d directories", maxRegistries)}
		}
		if err := r.registry(&reg, in); err != nil {
			return nil, nil, err
		}
		list = append(list, reg)
	}
	slices.SortFunc(list, func(a, b Registry) int { return strings.Compare(a.Host, b.Host) })
	return list, r.warnings, nil
}

// ErrNotDirectory is wrapped by what Files.List returns of something else.
var ErrNotDirectory = errors.New("not a directory")

// hostOf is the host that a directory is for (containerd's hostDirectory, the
// other way).
func hostOf(name string) string {
	if name == "_default" {
		return ""
	}
	if s, found := strings.CutSuffix(name, "_"); found {
		if i := strings.LastIndexByte(s, '_'); i > 0 {
			return s[:i] + ":" + s[i+1:]
		}
	}
	return name
}

// reader reads all files of one certs.d.
type reader struct {
	files    Files
	left     int64 // bytes
	warnings []*Error
}

func (r *reader) read(name string, limit int64) ([]byte, error) {
	raw, err := r.files.Read(name, min(limit, r.left))
	r.left -= int64(len(raw))
	return raw, err
}

// registry reads one directory, which holds files of these names.
func (r *reader) registry(reg *Registry, in []string) error {
	const name = "hosts.toml"
	file := filepath.Join(reg.Dir, name)
	var raw []byte
	if slices.Contains(in, name) {
		var err error
		if raw, err = r.read(file, maxFile); err != nil {
			return &Error{File: file, Text: reason(err)}
		}
	}
	if len(raw) == 0 {
		if raw != nil { // perhaps it is being written
			r.warnings = append(r.warnings, &Error{File: file, Text: "is empty: read as if it were not there, as containerd does"})
		}
		return r.certificates(reg, in)
	}
	f, err := parse(raw)
	if err != nil {
		err.File = file
		return err
	}
	for _, w := range f.warnings {
		w.File = file
		r.warnings = append(r.warnings, w)
	}
	for _, e := range append(f.hosts, f.root) {
		m := Mirror{Root: e.root, Header: Header(e.header), Rewrite: e.rewrite, URL: e.url, File: file, Line: e.line}
		if err := r.tls(&m, e, reg.Dir); err != nil {
			return err
		}
		itself := e == f.root && (e.url == nil || strings.TrimSuffix(e.url.Host, ":443") == strings.TrimSuffix(reg.Host, ":443") || hub(e.url.Host) && hub(reg.Host))
		switch {
		case itself && (e.pull || e.url == nil):
			reg.Origin = &m
		case !itself && e.pull:
			reg.Mirrors = append(reg.Mirrors, m)
		}
	}
	return nil
}

// certificates reads a directory without hosts.toml as Docker does: *.crt are CAs,
// and *.cert with *.key is shown to the host.
func (r *reader) certificates(reg *Registry, in []string) error {
	e := &entry{}
	for _, name := range in {
		if strings.HasSuffix(name, ".crt") {
			e.ca = append(e.ca, name)
		}
		if bare, found := strings.CutSuffix(name, ".cert"); found {
			pair := [2]string{name, name}
			if slices.Contains(in, bare+".key") {
				pair[1] = bare + ".key"
			}
			e.client = append(e.client, pair)
		}
	}
	if len(e.ca) > maxPEMs || len(e.client) > maxPEMs {
		return &Error{File: reg.Dir, Text: fmt.Sprintf("has more than %d certificates", maxPEMs)}
	}
	reg.Origin = &Mirror{Root: "/v2", File: reg.Dir}
	return r.tls(reg.Origin, e, reg.Dir)
}

// tls reads the files that e names, relative to dir. As for containerd, CAs count
// besides those of the system.
func (r *reader) tls(m *Mirror, e *entry, dir string) error {
	if len(e.ca) == 0 && len(e.client) == 0 && !e.skipVerify {
		return nil
	}
	fail := func(name, fault string) error {
		return &Error{File: m.File, Line: e.line, Text: text.Quote(name, 256) + ": " + fault}
	}
	read := func(name string) ([]byte, error) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return r.read(filepath.Clean(name), maxPEM)
	}
	m.TLS = &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: e.skipVerify}
	for _, name := range e.ca {
		raw, err := read(name)
		if err != nil {
			return fail(name, reason(err))
		}
		if m.TLS.RootCAs == nil {
			if m.TLS.RootCAs, err = x509.SystemCertPool(); err != nil {
				m.TLS.RootCAs = x509.NewCertPool()
			}
		}
		if !m.TLS.RootCAs.AppendCertsFromPEM(raw) {
			return fail(name, "holds no certificate in PEM")
		}
	}
	for _, names := range e.client {
		cert, err := read(names[0])
		if err != nil {
			return fail(names[0], reason(err))
		}
		key := cert
		if names[1] != names[0] {
			if key, err = read(names[1]); err != nil {
				return fail(names[1], reason(err))
			}
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil { // not what it says: that is about a key
			return fail(names[0], "is not, with "+text.Quote(names[1], 256)+", a certificate and its key in PEM")
		}
		m.TLS.Certificates = append(m.TLS.Certificates, pair)
	}
	return nil
}

// reason is err without the name of the file, which stands before it.
func reason(err error) string {
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		err = p.Err
	}
	return err.Error()
}

// line is the number of the line in which raw[offset] stands.
func line(raw []byte, offset int) int {
	return 1 + bytes.Count(raw[:min(max(offset, 0), len(raw))], []byte("\n"))
}
