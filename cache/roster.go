package cache

import (
	"strings"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/tidewaiter/tidewaiter/verify"
)

const (
	maxProved = 64   // hosts that are remembered since they gave a yes
	maxFirsts = 4096 // image configs of which it is remembered that some host gave a yes
)

// A roster knows the hosts that the configuration names, those that gave a yes
// before, and lines that are slow. Cache.mu guards it.
type roster struct {
	named  func(verify.Name) (host, repository bool) // nil: none
	proved map[string]bool                           // with whether it was the first to give a yes for some content
	firsts *simplelru.LRU[string, struct{}]          // image configs that some host gave a yes for
	slow   [2]*simplelru.LRU[mark, struct{}]         // those of other hosts apart: there can be any number
}

// A mark is what is remembered as slow.
type mark struct {
	name  string
	other bool // of a host that no one named
}

func newRoster(named func(verify.Name) (host, repository bool)) *roster {
	r := &roster{named: named, proved: map[string]bool{}}
	r.firsts, _ = simplelru.NewLRU[string, struct{}](maxFirsts, nil) // fails only for a size below 1
	for i := range r.slow {
		r.slow[i], _ = simplelru.NewLRU[mark, struct{}](maxSlow, nil)
	}
	return r
}

// Outermost lines that are none of a host. No host has such a name.
const (
	proved = "(proved)"
	others = "(others)"
)

// place returns the line that flights of p wait in, from the outermost name to the
// innermost, and the mark that it has if it is slow.
//
// A repository that the configuration names has its own line within its host. In
// registries that several people share, the first part of a path is often what one of
// them owns, and they can make as many repositories in it as they like: so these share
// a line.
func (r *roster) place(p place) (path []string, m mark) {
	owner, _, _ := strings.Cut(p.path, "/")
	host, repository := false, false
	if r.named != nil {
		host, repository = r.named(verify.Name{Host: p.host, Path: p.path})
	}
	m.name = p.host + " " + owner
	switch {
	case repository:
		return []string{p.host, p.path}, mark{name: p.host + "/" + p.path}
	case host:
		return []string{p.host, "", owner, p.path}, m
	case r.isProved(p.host):
		return []string{proved, p.host, owner, p.path}, m
	}
	return []string{others, p.host, p.path}, mark{p.host, true}
}

// yields reports whether flights of m leave a slot to all others: those of a line that
// is slow, and those of hosts that no one named, unless there are no others.
func (r *roster) yields(m mark) bool {
	return m.other && (r.named != nil || len(r.proved) > 0) || r.isSlow(m)
}

func (r *roster) isSlow(m mark) bool { return r.slow[flag(m.other)].Contains(m) }

func (r *roster) isProved(host string) bool {
	_, is := r.proved[host]
	return is
}

// yes is told that there is a yes for an image with that config, and if other is true,
// that it came from a host that no one named.
//
// A pod's author can copy a signed image to any number of hosts, and so make as many give
// a yes. Content that is signed and that no host gave a yes for before they cannot make. So if
// as many hosts are remembered as may be, one that gave a yes for new content takes the
// place of one that never did, and else all stay.
func (r *roster) yes(host string, config string, other bool) {
	first := !r.firsts.Contains(config)
	r.firsts.Add(config, struct{}{})
	if other {
		r.prove(host, first)
	}
}

func (r *roster) prove(host string, first bool) {
	if !r.isProved(host) && len(r.proved) >= maxProved {
		gives := ""
		for h, was := range r.proved {
			if !was && (gives == "" || h < gives) {
				gives = h
			}
		}
		if gives == "" || !first {
			return
		}
		delete(r.proved, gives)
	}
	r.proved[host] = r.proved[host] || first
}

// took is told how long a flight of m took.
func (r *roster) took(m mark, took time.Duration) {
	if slow := r.slow[flag(m.other)]; took > long {
		slow.Add(m, struct{}{})
	} else {
		slow.Remove(m)
	}
}

// inherit takes over what o knows of hosts.
func (r *roster) inherit(o *roster) {
	for host, first := range o.proved {
		r.prove(host, first)
	}
	for _, config := range o.firsts.Keys() {
		r.firsts.Add(config, struct{}{})
	}
	for i, l := range o.slow {
		for _, m := range l.Keys() {
			r.slow[i].Add(m, struct{}{})
		}
	}
}
