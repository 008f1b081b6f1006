package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

const (
	maxName = 1024 // bytes of an image name as a pod writes it
	maxHost = 255  // bytes of a host with its port
	hub     = "docker.io"
)

// ParseName returns the canonical name of what a pod wrote as its image. It
// reads s as containerd's CRI does (reference.ParseDockerRef: Docker Hub and the
// tag latest where s names neither) and then makes aliases equal:
//
//   - a host is lower-case, without trailing dot and without :443;
//   - index.docker.io and registry-1.docker.io are docker.io, where a path of one
//     word is below library/;
//   - an IPv6 host is in RFC 5952 form, and an IPv4-mapped one is IPv4;
//   - a port has no leading zeros;
//   - a host of one word other than localhost always has a port: without it the
//     word would be read as a path at Docker Hub.
//
// The canonical name of a canonical name is itself. Tag and digest are both kept.
//
// ParseName refuses what containerd takes for an image ID (a digest, anything
// that starts like one, 64 hex digits), what is longer than 1,024 bytes or not
// printable ASCII, and numeric hosts that are no dotted IPv4 address. A shorter
// run of hex digits is a name here; containerd takes it for an ID only where no
// image record has that name, so the caller must find the record (see [Record]).
func ParseName(s string) (verify.Name, error) {
	if err := plausible(s); err != nil {
		return verify.Name{}, nameError(s, err)
	}
	undotted := s
	if host, rest, found := strings.Cut(s, "/"); found {
		host, err := undot(host)
		if err != nil {
			return verify.Name{}, nameError(s, err)
		}
		undotted = host + "/" + rest
	}
	named, err := reference.ParseNormalizedNamed(undotted)
	if err != nil {
		return verify.Name{}, nameError(s, err)
	}
	var n verify.Name
	if n.Host, n.Path, err = canonical(named); err != nil {
		return verify.Name{}, nameError(s, err)
	}
	if t, ok := named.(reference.Tagged); ok {
		n.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		n.Digest = d.Digest()
	}
	if n.Tag == "" && n.Digest == "" {
		n.Tag = "latest"
	}
	return n, nil
}

// Record returns the name of the image record that containerd's CRI looks for
// when it is given s: reference.ParseDockerRef (internal/cri/server/images,
// LocalResolve) and nothing else. It is not canonical. Record refuses what
// ParseName refuses as an image ID, as too long or as not printable.
func Record(s string) (string, error) {
	if err := plausible(s); err != nil {
		return "", nameError(s, err)
	}
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return "", nameError(s, err)
	}
	return named.String(), nil
}

// ParseScope returns the canonical form, "host/path", of one of a statement's
// registryScopes, or "*". Aliases are made equal as by ParseName, but nothing is
// added to a scope that names no host: scopes are fully qualified
// (trust-store-trust-policy.md, "Selecting a trust policy based on artifact URI"),
// so that "library/nginx" is the path nginx at the host library, port 443. Unlike
// notation's own check it allows IPv6 hosts.
func ParseScope(s string) (string, error) {
	if s == "*" {
		return s, nil
	}
	if err := plausible(s); err != nil {
		return "", scopeError(s, err)
	}
	host, path, found := strings.Cut(s, "/")
	switch {
	case !found:
		return "", scopeError(s, errors.New(`is not fully qualified: write host/repository, for example docker.io/library/nginx`))
	case strings.Contains(s, "*"):
		return "", scopeError(s, errors.New(`has a wildcard: only "*" alone is one`))
	case strings.ContainsAny(path, ":@"), strings.Contains(s, "://"):
		return "", scopeError(s, errors.New("has a scheme, tag or digest: write host/repository alone"))
	case strings.ToLower(path) != path:
		return "", scopeError(s, errors.New("can never match: a repository's path is lower-case"))
	}
	host, err := ParseHost(host)
	if err != nil {
		return "", scopeError(s, err)
	}
	named, err := reference.WithName(host + "/" + path)
	if err != nil {
		return "", scopeError(s, err)
	}
	if host, path, err = canonical(named); err != nil {
		return "", scopeError(s, err)
	}
	return host + "/" + path, nil
}

// ParseHost returns the canonical form of a registry's host, with its port where
// that is not 443: what [verify.Name] has in Host. A host of one word other than
// localhost always has a port.
func ParseHost(s string) (string, error) {
	if len(s) > maxHost {
		return "", fmt.Errorf("host is longer than %d bytes", maxHost)
	}
	s, err := undot(s)
	if err != nil {
		return "", err
	}
	// The grammar of hosts is that of references.
	named, err := reference.WithName(s + "/x")
	if err != nil || reference.Domain(named) != s {
		return "", fmt.Errorf("%s is not a registry's host", text.Quote(s, 80))
	}
	name, port := s, ""
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, ']') {
		n, err := strconv.ParseUint(s[i+1:], 10, 16)
		if err != nil || n == 0 {
			return "", fmt.Errorf("%s is not a port", text.Quote(s[i+1:], 80))
		}
		name, port = s[:i], strconv.FormatUint(n, 10)
	}
	name = strings.ToLower(name)
	if inner, v6 := strings.CutPrefix(name, "["); v6 {
		ip, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if err != nil {
			return "", fmt.Errorf("%s is not an IPv6 address", text.Quote(name, 80))
		}
		name = "[" + ip.String() + "]"
		if ip.Is4In6() {
			name = ip.Unmap().String()
		}
	} else if numeric(name[strings.LastIndexByte(name, '.')+1:]) {
		// Resolvers read 10.5, 0x0a.0.0.5 and 10.0.0.05 as addresses too, and
		// not all alike.
		if _, err := netip.ParseAddr(name); err != nil {
			return "", fmt.Errorf("%s is not an IPv4 address", text.Quote(name, 80))
		}
	}
	switch {
	case name == "index."+hub, name == "registry-1."+hub:
		name = hub
	case !qualified(name) && port == "":
		port = "443"
	}
	if port == "" || port == "443" && qualified(name) {
		return name, nil
	}
	return name + ":" + port, nil
}

// canonical splits a parsed name into canonical host and path.
func canonical(named reference.Named) (host, path string, err error) {
	path = reference.Path(named)
	if host, err = ParseHost(reference.Domain(named)); err != nil {
		return "", "", err
	}
	if host == hub && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	if len(path) > reference.RepositoryNameTotalLengthMax {
		return "", "", reference.ErrNameTooLong
	}
	return host, path, nil
}

// qualified reports whether a host without port is read as a host, and not as the
// first word of a path at Docker Hub.
func qualified(host string) bool {
	return host == "localhost" || strings.ContainsAny(host, ".[")
}

// numeric reports whether a host that ends in label is an address and no name.
func numeric(label string) bool {
	hex, found := strings.CutPrefix(label, "0x")
	return label != "" && strings.Trim(label, "0123456789") == "" ||
		found && strings.Trim(hex, "0123456789abcdef") == ""
}

// undot drops the trailing dot of a host, which the grammar of references does
// not know.
func undot(host string) (string, error) {
	name, port := host, ""
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		name, port = host[:i], host[i:]
	}
	bare, dotted := strings.CutSuffix(name, ".")
	if dotted && !qualified(strings.ToLower(bare)) {
		// Without its dot the word would be read as something else.
		return "", errors.New("has a host of one word with a trailing dot")
	}
	return bare + port, nil
}

// plausible refuses what is no name before anything parses it.
func plausible(s string) error {
	if len(s) > maxName {
		return fmt.Errorf("is longer than %d bytes", maxName)
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return errors.New("holds something other than printable ASCII")
		}
	}
	if _, err := digest.Parse(s); err == nil {
		return errors.New("is a digest: containerd takes it for an image ID")
	}
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		if strings.HasPrefix(s, alg.String()+":") {
			return errors.New("starts like a digest: containerd may take it for an image ID")
		}
	}
	return nil
}

func nameError(s string, err error) error {
	return fmt.Errorf("image name %s: %s", text.Quote(s, 160), text.Clean(err.Error(), 240))
}

func scopeError(s string, err error) error {
	return fmt.Errorf("scope %s: %s", text.Quote(s, 160), text.Clean(err.Error(), 240))
}

// split is ParseScope in the form in which scopes are looked up. "*" is the host
// of the scope that matches everything.
func split(scope string) (repository, error) {
	c, err := ParseScope(scope)
	if err != nil {
		return repository{}, err
	}
	host, path, _ := strings.Cut(c, "/")
	return repository{host, path}, nil
}
