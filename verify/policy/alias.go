package policy

import (
	"errors"
	"strings"

	"github.com/distribution/reference"

	"github.com/tidewaiter/tidewaiter/verify"
)

// An Alias changes a name that an importer gave an image back to the one that
// policies speak of. It is anchored, and whole segments of the path count:
// 127.0.0.1:31999/hub does not change 127.0.0.1:31999/hubble.
type Alias struct{ from, to repository }

// String is the alias as people read it: "from -> to".
func (a Alias) String() string { return a.from.String() + " -> " + a.to.String() }

// ParseAlias reads host or host/path, twice; a slash at the end says nothing.
func ParseAlias(from, to string) (Alias, error) {
	f, err := parsePrefix(from)
	if err != nil {
		return Alias{}, err
	}
	t, err := parsePrefix(to)
	if err == nil && f == t {
		err = scopeError(from, errors.New("is an alias of itself"))
	}
	return Alias{f, t}, err
}

func parsePrefix(s string) (repository, error) {
	if err := plausible(s); err != nil {
		return repository{}, scopeError(s, err)
	}
	host, path, _ := strings.Cut(strings.TrimSuffix(s, "/"), "/")
	host, err := ParseHost(host)
	if err != nil {
		return repository{}, scopeError(s, err)
	}
	if path != "" {
		if named, err := reference.WithName(host + "/" + path); err != nil || reference.Path(named) != path {
			return repository{}, scopeError(s, errors.New("has a path that no repository has"))
		}
	}
	return repository{host, path}, nil
}

// Unalias returns the name that policies speak of: that of the first alias that
// changes n, changed once, or n itself. Tag and digest stay. Where what would come
// out is no name it returns the zero Name, which no rule matches.
func Unalias(aliases []Alias, n verify.Name) verify.Name {
	for _, a := range aliases {
		if !a.from.holds(repository{n.Host, n.Path}) {
			continue
		}
		rest := strings.TrimPrefix("/"+n.Path, "/"+a.from.path)
		if a.from.path == "" {
			rest = "/" + n.Path
		}
		path := strings.Trim(a.to.path+rest, "/")
		named, err := reference.WithName(a.to.host + "/" + path)
		if err != nil {
			return verify.Name{}
		}
		if n.Host, n.Path, err = canonical(named); err != nil {
			return verify.Name{}
		}
		return n
	}
	return n
}

// holds reports whether o is r or below it.
func (r repository) holds(o repository) bool {
	rest, found := strings.CutPrefix(o.path, r.path)
	return r.host == o.host && found && (r.path == "" || rest == "" || rest[0] == '/')
}
