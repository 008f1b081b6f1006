package certsd

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2/unstable"
	"golang.org/x/net/http/httpguts"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

// A file is one hosts.toml.
type file struct {
	root     *entry   // server, and what stands before the first table
	hosts    []*entry // in the order of their tables
	warnings []*Error
}

// An entry is one host of a file.
type entry struct {
	name string
	line int

	url        *url.URL // scheme and host; nil for a root without server
	root       string
	pull       bool
	ca         []string
	client     [][2]string
	skipVerify bool
	override   bool
	header     http.Header
	rewrite    []Rewrite
}

// keys are what containerd knows of a host.
var keys = []string{"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout", "rewrite"}

// parser reads one file. It keeps the first error.
type parser struct {
	raw    []byte
	toml   unstable.Parser
	file   file
	server string
	seen   map[string]bool // full keys that have a value, and tables that were opened, with [ before them
	now    int             // offset of the expression that is read
	err    *Error
}

// parse reads a hosts.toml. Its order is that of the tables, as for containerd:
// hosts that are written otherwise, as dotted keys or inline tables, containerd does
// not ask, and neither are they here. Errors and warnings have no File.
func parse(raw []byte) (*file, *Error) {
	p := &parser{raw: raw, seen: map[string]bool{}}
	p.file.root = &entry{line: 1}
	p.file.root.pull = true
	p.toml.Reset(raw)
	var table []string
	for p.err == nil && p.toml.NextExpression() {
		e := p.toml.Expression()
		var key []string
		p.now = len(raw)
		for it := e.Key(); it.Next(); {
			if n := it.Node(); len(key) == 0 {
				p.now = int(n.Raw.Offset)
			}
			key = append(key, string(it.Node().Data))
		}
		switch e.Kind {
		case unstable.Table:
			table = key
			p.open(table)
		case unstable.ArrayTable:
			if table = key; key[0] == "host" || slices.Contains(keys, key[0]) || key[0] == "server" {
				p.fail("%s is no list of tables", key[0])
			}
		case unstable.KeyValue:
			p.value(slices.Concat(table, key), e.Value(), len(table))
		}
	}
	if err := p.toml.Error(); err != nil && p.err == nil {
		p.syntax(err)
	}
	if p.err == nil {
		p.finish()
	}
	if p.err != nil {
		return nil, p.err
	}
	return &p.file, nil
}

func (p *parser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = &Error{Line: line(p.raw, p.now), Text: fmt.Sprintf(format, args...)}
	}
}

func (p *parser) warn(format string, args ...any) {
	if len(p.file.warnings) < maxHosts {
		p.file.warnings = append(p.file.warnings, &Error{Line: line(p.raw, p.now), Text: fmt.Sprintf(format, args...)})
	}
}

// syntax is an error of the TOML parser. What it says is left out: it can hold
// pieces of the file.
func (p *parser) syntax(err error) {
	p.now = len(p.raw)
	if e := (*unstable.ParserError)(nil); errors.As(err, &e) && len(e.Highlight) > 0 && cap(e.Highlight) <= cap(p.raw) {
		p.now = cap(p.raw) - cap(e.Highlight) // where it begins, as unstable.Parser.Range finds it
	}
	p.fail("not TOML")
}

// open notes a table.
func (p *parser) open(table []string) {
	full := "[" + strings.Join(table, "\x00")
	if p.seen[full] || p.seen[full[1:]] {
		p.fail("table %s is given twice", text.Quote(strings.Join(table, "."), 80))
		return
	}
	p.seen[full] = true
	if table[0] != "host" {
		if table[0] != "header" && table[0] != "rewrite" {
			p.warn("unknown table %s is not used", text.Quote(table[0], 80))
		}
		return
	}
	if len(table) == 1 {
		return
	}
	e := p.host(table[1])
	if e == nil {
		if len(p.file.hosts) == maxHosts {
			p.fail("has more than %d hosts", maxHosts)
			return
		}
		e = &entry{name: table[1], line: line(p.raw, p.now), pull: true}
		p.file.hosts = append(p.file.hosts, e)
	}
	if len(table) == 2 {
		e.line = line(p.raw, p.now)
	}
}

func (p *parser) host(name string) *entry {
	for _, e := range p.file.hosts {
		if e.name == name {
			return e
		}
	}
	return nil
}

const notUsed = "host %s has no table of its own and is not used, as containerd does not use it"

// value takes one value; key is its full name, of which the first depth parts are
// those of its table.
func (p *parser) value(key []string, v *unstable.Node, depth int) {
	if len(key) > maxDepth {
		p.fail("a key has more than %d parts", maxDepth)
		return
	}
	full := strings.Join(key, "\x00")
	if p.seen[full] || p.seen["["+full] {
		p.fail("%s is given twice", text.Quote(strings.Join(key, "."), 80))
		return
	}
	p.seen[full] = true
	if v.Kind == unstable.InlineTable {
		if key[0] == "host" && len(key) == 2 && depth < 2 {
			p.warn(notUsed, quoteHost(key[1]))
			return
		}
		for it := v.Children(); it.Next() && p.err == nil; {
			pair := it.Node()
			if pair.Kind != unstable.KeyValue {
				continue
			}
			inner := slices.Clone(key)
			for k := pair.Key(); k.Next(); {
				inner = append(inner, string(k.Node().Data))
			}
			p.value(inner, pair.Value(), depth)
		}
		return
	}
	if key[0] != "host" {
		p.field(p.file.root, key, v)
		return
	}
	if len(key) < 3 {
		p.fail("a host must be a table: [host.\"URL\"]")
		return
	}
	e := p.host(key[1])
	if e == nil || depth < 2 {
		p.warn(notUsed, quoteHost(key[1]))
		return
	}
	p.field(e, key[2:], v)
}

// field takes the value of one field of a host.
func (p *parser) field(e *entry, key []string, v *unstable.Node) {
	name := key[0]
	if len(key) > 2 || len(key) == 2 && name != "header" && name != "rewrite" {
		if slices.Contains(keys, name) || name == "server" {
			p.fail("%s is no table", text.Quote(name, 80))
		} else {
			p.warn("unknown key %s is not used", text.Quote(name, 80))
		}
		return
	}
	if len(key) == 1 && (name == "header" || name == "rewrite") {
		p.fail("%s must be a table", name)
		return
	}
	switch name {
	case "server":
		if e != p.file.root {
			p.warn("server of a host is not used: the name of its table is where it is")
			return
		}
		p.server, e.line = p.text(v, name, maxText), line(p.raw, p.now)
	case "capabilities":
		list := p.texts(v, name, maxPEMs)
		e.pull = len(list) == 0
		for _, c := range list {
			switch strings.ToLower(c) {
			case "pull":
				e.pull = true
			case "resolve", "push", "referrers":
			default:
				p.fail("unknown capability %s", text.Quote(c, 32))
			}
		}
	case "ca":
		if v.Kind == unstable.String {
			e.ca = []string{p.text(v, name, maxText)}
		} else {
			e.ca = p.texts(v, name, maxPEMs)
		}
	case "client":
		p.client(e, v)
	case "skip_verify":
		e.skipVerify = p.boolean(v, name)
	case "override_path":
		e.override = p.boolean(v, name)
	case "dial_timeout":
		// Not used, and what containerd refuses is refused here too.
		if s := p.text(v, name, maxText); s != "" {
			if _, err := time.ParseDuration(s); err != nil {
				p.fail("dial_timeout is no duration")
			}
		}
	case "header":
		p.header(e, key[1], v)
	case "rewrite":
		if e == p.file.root {
			p.warn("rewrite is used in the table of a host alone")
			return
		}
		from, err := regexp.Compile(key[1])
		if err != nil || len(key[1]) > maxText {
			p.fail("rewrite: %s is no regular expression", text.Quote(key[1], 80))
			return
		}
		if len(e.rewrite) == maxRewrites {
			p.fail("a host has more than %d rewrites", maxRewrites)
			return
		}
		e.rewrite = append(e.rewrite, Rewrite{from, p.text(v, name, maxText)})
	default:
		p.warn("unknown key %s is not used", text.Quote(name, 80))
	}
}

// client takes one file with certificate and key, a list of such files, or a list
// of pairs.
func (p *parser) client(e *entry, v *unstable.Node) {
	e.client = nil
	if v.Kind == unstable.String {
		s := p.text(v, "client", maxText)
		e.client = [][2]string{{s, s}}
		return
	}
	if v.Kind != unstable.Array {
		p.fail("client must be a file, a list of files or a list of pairs of files")
		return
	}
	for it := v.Children(); it.Next() && p.err == nil; {
		n := it.Node()
		if n.Kind == unstable.Comment {
			continue
		}
		if len(e.client) == maxPEMs {
			p.fail("client has more than %d entries", maxPEMs)
			return
		}
		if n.Kind == unstable.String {
			s := p.text(n, "client", maxText)
			e.client = append(e.client, [2]string{s, s})
			continue
		}
		pair := p.texts(n, "client", 2)
		if len(pair) != 2 {
			p.fail("client: a pair is a certificate and its key")
			return
		}
		if pair[1] == "" { // for containerd too
			pair[1] = pair[0]
		}
		e.client = append(e.client, [2]string(pair))
	}
}

// header takes one header. What it holds may be secret and is not repeated.
func (p *parser) header(e *entry, name string, v *unstable.Node) {
	var values []string
	if v.Kind == unstable.String {
		values = []string{p.text(v, "header", maxHeader)}
	} else {
		values = p.texts(v, "header", maxHeaders)
	}
	n := len(values)
	for _, list := range e.header {
		n += len(list)
	}
	if n > maxHeaders {
		p.fail("header: more than %d values", maxHeaders)
		return
	}
	if !httpguts.ValidHeaderFieldName(name) || len(name) > 128 {
		p.fail("header: a name that no header can have")
		return
	}
	if e.header == nil {
		e.header = http.Header{}
	}
	for _, s := range values {
		if !httpguts.ValidHeaderFieldValue(s) || len(s) > maxHeader {
			p.fail("header %s: a value that no header can have", text.Quote(name, 80))
			return
		}
		e.header.Add(name, s)
	}
}

func (p *parser) text(v *unstable.Node, name string, limit int) string {
	switch {
	case v.Kind != unstable.String:
		p.fail("%s must be text", name)
	case len(v.Data) > limit:
		p.fail("%s is longer than %d bytes", name, limit)
	default:
		return string(v.Data)
	}
	return ""
}

func (p *parser) texts(v *unstable.Node, name string, limit int) (list []string) {
	if v.Kind != unstable.Array {
		p.fail("%s must be a list of texts", name)
		return nil
	}
	for it := v.Children(); it.Next() && p.err == nil; {
		if it.Node().Kind == unstable.Comment {
			continue
		}
		if len(list) == limit {
			p.fail("%s has more than %d entries", name, limit)
			return nil
		}
		list = append(list, p.text(it.Node(), name, maxHeader))
	}
	return list
}

func (p *parser) boolean(v *unstable.Node, name string) bool {
	if v.Kind != unstable.Bool {
		p.fail("%s must be true or false", name)
	}
	return string(v.Data) == "true"
}

// finish finds out where the hosts are.
func (p *parser) finish() {
	for _, e := range p.file.hosts {
		p.at(e, e.name)
	}
	if p.server != "" {
		p.at(p.file.root, p.server)
	} else {
		p.file.root.root = "/v2"
	}
}

// rootPath is what the path of an API may be.
var rootPath = regexp.MustCompile(`^(/[A-Za-z0-9._~@:+,=-]+)*$`)

// at reads the URL of a host and the path of its API as containerd does: below /v2,
// unless override_path says that the URL's path is all there is.
func (p *parser) at(e *entry, s string) {
	fail := func(text string) {
		if p.err == nil {
			p.err = &Error{Line: e.line, Text: "the URL of a host " + text} // not the URL: it may hold a password
		}
	}
	if !strings.HasPrefix(s, "http") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || len(s) > maxText || u.Opaque != "" || u.Hostname() == "":
		fail("is not one")
		return
	case u.Scheme != "http" && u.Scheme != "https":
		fail("must start with http:// or https://")
		return
	case u.User != nil || strings.ContainsAny(s, "?#"):
		fail("has a user, query or fragment")
		return
	}
	root := ""
	if u.Path != "" {
		root = path.Clean("/" + u.Path)
	}
	if !e.override && !strings.HasSuffix(root, "/v2") {
		root = path.Join("/", root, "v2")
	}
	if !rootPath.MatchString(strings.TrimSuffix(root, "/")) || u.RawPath != "" {
		fail("has a path that no registry is at")
		return
	}
	if root == "" {
		root = "/"
	}
	e.url, e.root = &url.URL{Scheme: u.Scheme, Host: strings.ToLower(u.Host)}, root
}

// quoteHost is the name of a host for a person, without what may be a password in it.
func quoteHost(s string) string {
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		s = "..." + s[i:]
	}
	return text.Quote(s, 80)
}
