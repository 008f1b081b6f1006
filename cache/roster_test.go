package cache

import (
	"fmt"
	"testing"
)

// Hosts that only gave a yes for copies do not make hosts forgotten that gave one for
// content of their own, however many they are, and give way to these.
func TestProvedHosts(t *testing.T) {
	r := newRoster(nil)
	good := func(i int) string { return fmt.Sprintf("good%d.example", i) }
	content := func(i int) string { return fmt.Sprint(i) }
	copies := func(n int) {
		for i := range n {
			r.yes(fmt.Sprintf("a%d.example", i), content(0), true)
		}
	}
	named := "of a host that is named"
	r.yes("named.example", named, false)
	r.yes("copy.example", named, true)
	for i := range maxProved / 2 {
		r.yes(good(i), content(i), true)
	}
	copies(10 * maxProved)
	for i := range 2 * maxProved { // more than are remembered
		r.yes(good(i), content(i), true)
		copies(maxProved)
	}
	for i := range maxProved {
		if !r.isProved(good(i)) {
			t.Errorf("%s is forgotten", good(i))
		}
	}
	if len(r.proved) != maxProved || r.isProved("named.example") || r.isProved("copy.example") {
		t.Errorf("%d are remembered: %v", len(r.proved), r.proved)
	}
	next := newRoster(nil)
	next.inherit(r)
	if len(next.proved) != maxProved || !next.isProved(good(0)) || !next.firsts.Contains(named) {
		t.Error("another configuration forgets")
	}
}
