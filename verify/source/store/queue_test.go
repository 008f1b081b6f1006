package store

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
)

// When too much evidence waits, that of one anchor or subject does not keep out that of
// others.
func TestQueueIsShared(t *testing.T) {
	t.Parallel()
	const part = maxWaiting / 8
	type item struct {
		anchor, subject string
		parts           int64
	}
	many := func(n int, i item) []item { return slices.Repeat([]item{i}, n) }
	for _, c := range []struct {
		name    string
		waits   []item
		comes   item
		want    string // what waits then, without the first
		dropped int
	}{
		{
			name: "there is room", waits: many(3, item{"a", "one", 1}), comes: item{"a", "one", 1},
			want: "a/one a/one a/one",
		},
		{
			name: "one anchor has all, another comes", waits: many(8, item{"a", "one", 1}), comes: item{"b", "two", 1},
			want: "a/one a/one a/one a/one a/one a/one b/two", dropped: 1,
		},
		{
			name:  "the subject that has most gives way",
			waits: slices.Concat(many(3, item{"a", "one", 1}), many(4, item{"a", "two", 1}), many(1, item{"a", "three", 1})), comes: item{"b", "four", 1},
			want: "a/one a/one a/two a/two a/two a/three b/four", dropped: 1,
		},
		{
			name: "another subject of the same anchor", waits: many(8, item{"a", "one", 1}), comes: item{"a", "two", 1},
			want: "a/one a/one a/one a/one a/one a/one a/two", dropped: 1,
		},
		{
			name: "more of the same is dropped", waits: many(8, item{"a", "one", 1}), comes: item{"a", "one", 1},
			want: "a/one a/one a/one a/one a/one a/one a/one", dropped: 1,
		},
		{
			name:  "two anchors with a half each: neither pushes the other out",
			waits: slices.Concat(many(4, item{"a", "one", 1}), many(4, item{"b", "two", 1})), comes: item{"b", "two", 1},
			want: "a/one a/one a/one b/two b/two b/two b/two", dropped: 1,
		},
		{
			name:  "nothing goes in vain",
			waits: slices.Concat(many(4, item{"a", "one", 1}), many(4, item{"b", "two", 1})), comes: item{"c", "three", 6},
			want: "a/one a/one a/one b/two b/two b/two b/two", dropped: 1,
		},
		{
			name: "the first may be in hand and stays", waits: []item{{"a", "one", 8}}, comes: item{"b", "two", 1},
			want: "", dropped: 1,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var q queue
			add := func(n int, i item) {
				q.add(evidence{
					anchor: i.anchor, subject: ocispec.Descriptor{Digest: digest.Digest(i.subject)},
					found: verify.Evidence{Manifest: ocispec.Descriptor{Digest: digest.FromString(fmt.Sprint(n))}, Blob: make([]byte, i.parts*part)},
				})
			}
			for n, i := range c.waits {
				add(n, i)
			}
			if q.dropped > 0 {
				t.Fatalf("%d dropped while there is room", q.dropped)
			}
			add(len(c.waits), c.comes)
			var got []string
			bytes := int64(0)
			for i, e := range q.list {
				bytes += e.size()
				if i > 0 {
					got = append(got, e.anchor+"/"+e.subject.Digest.String())
				}
			}
			if s := strings.Join(got, " "); s != c.want || q.dropped != c.dropped {
				t.Errorf("waits %q, %d dropped, want %q, %d", s, q.dropped, c.want, c.dropped)
			}
			if bytes != q.bytes || bytes > maxWaiting {
				t.Errorf("%d bytes, counted %d, bound %d", bytes, q.bytes, maxWaiting)
			}
		})
	}
}
