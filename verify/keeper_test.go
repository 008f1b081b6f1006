package verify

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// keeps is a Keeper that remembers what it was given.
type keeps struct {
	holds
	documents map[digest.Digest][]byte
	kept      *[]string
	panics    bool
}

func (k keeps) Keep(_ Image, subject ocispec.Descriptor, ev Evidence) {
	if k.panics {
		panic("a disk")
	}
	*k.kept = append(*k.kept, fmt.Sprintf("%.12s %s", subject.Digest.Encoded(), ev.Blob))
}

func (k keeps) Indexes(_ context.Context, _ digest.Digest, _ *Budget, yield func(digest.Digest, []byte) bool) {
	if k.panics {
		panic("a disk")
	}
	for d, raw := range k.documents {
		if !yield(d, raw) {
			return
		}
	}
}

// stored returns an engine with a store.
func stored(k keeps, sources ...Source) (*Engine, *[]string) {
	k.kept = new([]string)
	e := engine(sources...)
	e.Store = k
	return e, k.kept
}

func TestStore(t *testing.T) {
	q := with(func(q *Question) { q.Image.Vouched = true })
	manifest := q.Image.Manifest
	short := func(d digest.Digest) string { return fmt.Sprintf("%.12s", d.Encoded()) }
	index := func(list ...ocispec.Descriptor) []byte {
		raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: list})
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	other, wider, nested := manifest, manifest, manifest
	other.Digest, wider.Size, nested.MediaType = of("another"), manifest.Size+1, ocispec.MediaTypeImageIndex
	lists := index(other, manifest)
	signed := digest.FromBytes(lists)
	both := []byte(strings.Replace(string(lists), "{", `{"layers":[],`, 1))
	of := func(d digest.Digest) map[digest.Digest][]string { return map[digest.Digest][]string{d: {"good"}} }

	for _, tt := range []struct {
		name    string
		store   keeps
		sources []Source
		want    Reason
		kept    string
		tried   int
	}{
		{"found at a mirror", keeps{}, []Source{on("a"), on("b", "good")}, Verified, short(q.Image.Target.Digest) + " good", 2},
		{"in the store", keeps{holds: on("store", "good")}, []Source{failing("a", ErrUnreachable)}, Verified, "", 1},
		{"bad in the store", keeps{holds: on("store", "SIGNATURE_EXPIRED")}, []Source{on("a", "good")}, Verified, short(q.Image.Target.Digest) + " good", 2},
		{"bad everywhere", keeps{holds: on("store", "SIGNATURE_EXPIRED")}, []Source{on("a", "SIGNER_UNTRUSTED")}, SignatureExpired, "", 2},
		{"nowhere", keeps{}, []Source{on("a")}, SignatureMissing, "", 1},
		{"the store cannot be read", keeps{holds: failing("store", ErrUnreachable)}, []Source{on("a")}, SourceUnreachable, "", 2},
		{"the store cannot be read, the mirror can", keeps{holds: failing("store", ErrUnreachable)}, []Source{on("a", "good")}, Verified, short(q.Image.Target.Digest) + " good", 2},
		{"the store panics", keeps{panics: true}, []Source{on("a", "good")}, Verified, "", 1},
		{"the store lies", keeps{holds: on("store", "lie")}, []Source{on("a")}, Internal, "", 2},

		{"an index that lists the manifest is signed", keeps{holds: holds{name: "store", evidence: of(signed)}, documents: map[digest.Digest][]byte{signed: lists}},
			[]Source{on("a")}, Verified, "", 1},
		{"the same, signed at the mirror", keeps{documents: map[digest.Digest][]byte{signed: lists}},
			[]Source{holds{name: "a", evidence: of(signed)}}, Verified, short(signed) + " good", 1},
		{"the index has another digest", keeps{holds: holds{name: "store", evidence: of(other.Digest)}, documents: map[digest.Digest][]byte{other.Digest: lists}},
			[]Source{on("a")}, SignatureMissing, "", 1},
		{"a digest that is none", keeps{holds: holds{name: "store", evidence: of("x")}, documents: map[digest.Digest][]byte{"x": lists}},
			[]Source{on("a")}, SignatureMissing, "", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, kept := stored(tt.store, tt.sources...)
			d := e.Judge(t.Context(), q)
			if d.Allowed() != (tt.want == Verified) || d.Reason != tt.want || len(d.Tried) != tt.tried {
				t.Errorf("%v %s: %s, tried %v", d.Allowed(), d.Reason, d.Detail, d.Tried)
			}
			if got := strings.Join(*kept, "; "); got != tt.kept {
				t.Errorf("kept %q, want %q", got, tt.kept)
			}
		})
	}
	unvouched := q
	unvouched.Image.Vouched = false
	e, _ := stored(keeps{holds: holds{name: "store", evidence: of(signed)}, documents: map[digest.Digest][]byte{signed: lists}}, on("a"))
	if d := e.Judge(t.Context(), unvouched); d.Allowed() || d.Reason != SignatureMissing {
		t.Errorf("by an index, where nobody vouches for the layers: %v %s", d.Allowed(), d.Reason)
	}
	for name, raw := range map[string][]byte{
		"another manifest": index(other), "another size": index(wider), "another type": index(nested), "none": index(),
		"two ways to read it": both, "no JSON": []byte("{"), "a list": []byte("[]"), "too long": []byte("{" + strings.Repeat(",", maxElements+1)),
	} {
		d := digest.FromBytes(raw)
		e, _ := stored(keeps{holds: holds{name: "store", evidence: of(d)}, documents: map[digest.Digest][]byte{d: raw}}, on("a"))
		if d := e.Judge(t.Context(), q); d.Allowed() || d.Reason != SignatureMissing {
			t.Errorf("an index of %s: %v %s", name, d.Allowed(), d.Reason)
		}
	}
}
