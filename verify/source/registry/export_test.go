package registry

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

// DialPublic is how hosts that a pattern is not the name of are connected to from now on.
func (e *RedirectPolicy) DialPublic(dial func(ctx context.Context, network, address string) (net.Conn, error)) {
	e.transports()[1].DialContext = dial
}

// Close closes connections that nobody uses.
func (e *RedirectPolicy) Close() {
	for _, t := range e.transports() {
		t.CloseIdleConnections()
	}
}

func (e *RedirectPolicy) transports() (list []*http.Transport) {
	if e.named == nil {
		return nil
	}
	for _, c := range []*http.Client{e.named, e.public} {
		list = append(list, c.Transport.(unfollowed).RoundTripper.(*http.Transport))
	}
	return list
}

// Turn takes a turn at the registry at u.
func (l *Breaker) Turn(u *url.URL) time.Duration { return l.turn(origin(u)) }

// Matches reports whether p names the host of u.
func (p Pattern) Matches(u *url.URL) bool { return p.matches(u) }

// Public reports whether a is on the internet.
func Public(a netip.Addr) bool { return public(a) }
