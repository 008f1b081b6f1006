package verify

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/oci"
)

// keeps is a WritableSource that remembers what it was given.
type keeps struct {
	holds
	documents map[digest.Digest][]byte
	only      map[digest.Digest][]digest.Digest // of the documents, by whose parents they seem; nil: each of all
	kept      *[]string
	panics    bool
	more      error     // what Parents returns
	anchors   *[]string // is told those of the budget
}

func (k keeps) Keep(_ Image, subject ocispec.Descriptor, ev Evidence) {
	if k.panics {
		panic("a disk")
	}
	*k.kept = append(*k.kept, fmt.Sprintf("%.12s %s", subject.Digest.Encoded(), ev.Blob))
}

func (k keeps) Parents(_ context.Context, child digest.Digest, b *Budget, yield func(digest.Digest, []byte) bool) error {
	if k.panics {
		panic("a disk")
	}
	if k.anchors != nil {
		*k.anchors = b.Anchors
	}
	for _, d := range k.only[child] {
		if !yield(d, k.documents[d]) {
			return nil
		}
	}
	if k.only != nil {
		return k.more
	}
	for d, raw := range k.documents { // also those that do not name it
		if !yield(d, raw) {
			return nil
		}
	}
	return k.more
}

// stored returns an engine with a store.
func stored(k keeps, sources ...Source) (*Engine, *[]string) {
	k.kept = new([]string)
	e := engine(sources...)
	e.Store = k
	return e, k.kept
}

func TestStore(t *testing.T) {
	q := with(func(q *Question) { q.Image.LayersVerified = true })
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
		{"what it rests on has ended", keeps{}, []Source{on("a", "ended")}, SignatureExpired, "", 1},
		{"the store cannot be read", keeps{holds: failing("store", ErrUnreachable)}, []Source{on("a")}, SourceUnreachable, "", 2},
		{"the store cannot be read, the mirror can", keeps{holds: failing("store", ErrUnreachable)}, []Source{on("a", "good")}, Verified, short(q.Image.Target.Digest) + " good", 2},
		{"the store panics", keeps{panics: true}, []Source{on("a", "good")}, Verified, "", 2},
		{"the store panics, and nothing is at the mirror", keeps{panics: true}, []Source{on("a")}, SourceUnreachable, "", 2},
		{"the store may have more that leads to the image", keeps{more: ErrBudget}, []Source{on("a", "SIGNER_UNTRUSTED")}, LimitExceeded, "", 2},
		{"the same, and the mirror has it", keeps{more: ErrUnreachable}, []Source{on("a", "good")}, Verified, short(q.Image.Target.Digest) + " good", 2},
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
			d := e.Evaluate(t.Context(), q)
			if d.Allowed() != (tt.want == Verified) || d.Reason != tt.want || len(d.Tried) != tt.tried {
				t.Errorf("%v %s: %s, tried %v", d.Allowed(), d.Reason, d.Detail, d.Tried)
			}
			if got := strings.Join(*kept, "; "); got != tt.kept {
				t.Errorf("kept %q, want %q", got, tt.kept)
			}
		})
	}
	unvouched := q
	unvouched.Image.LayersVerified = false
	e, _ := stored(keeps{holds: holds{name: "store", evidence: of(signed)}, documents: map[digest.Digest][]byte{signed: lists}}, on("a"))
	if d := e.Evaluate(t.Context(), unvouched); d.Allowed() || d.Reason != SignatureMissing {
		t.Errorf("by an index, where nobody vouches for the layers: %v %s", d.Allowed(), d.Reason)
	}
	for name, raw := range map[string][]byte{
		"another manifest": index(other), "another size": index(wider), "another type": index(nested), "none": index(),
		"two ways to read it": both, "no JSON": []byte("{"), "a list": []byte("[]"), "too long": []byte(strings.Replace(string(lists), `"manifests":[`, `"manifests":[`+strings.Repeat("{},", oci.MaxList), 1)),
	} {
		d := digest.FromBytes(raw)
		e, _ := stored(keeps{holds: holds{name: "store", evidence: of(d)}, documents: map[digest.Digest][]byte{d: raw}}, on("a"))
		if d := e.Evaluate(t.Context(), q); d.Allowed() || d.Reason != SignatureMissing {
			t.Errorf("an index of %s: %v %s", name, d.Allowed(), d.Reason)
		}
	}

	// The image came in an archive: the runtime made a manifest of its own for it, and
	// the one that is signed has the same config.
	config := func(mediaType string, d digest.Digest) []byte {
		raw, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: 7}, Layers: []ocispec.Descriptor{}})
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	same := config(ocispec.MediaTypeImageConfig, q.Image.Config)
	sub := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(same), Size: int64(len(same))}
	above := index(sub)
	for _, tt := range []struct {
		name    string
		signed  []byte
		store   [][]byte
		vouched bool
		want    Reason
	}{
		{"a manifest with the same config", same, [][]byte{same}, true, Verified},
		{"Docker's", config(oci.DockerConfig, q.Image.Config), nil, true, Verified},
		{"an index that lists it", above, [][]byte{above, same}, true, Verified},
		{"an index, and nothing shows what is in it", above, [][]byte{above}, true, SignatureMissing},
		{"nobody vouches for the layers", same, [][]byte{same}, false, SignatureMissing},
		{"another config", config(ocispec.MediaTypeImageConfig, other.Digest), nil, true, SignatureMissing},
		{"a config that is none of an image", config("application/vnd.example+json", q.Image.Config), nil, true, SignatureMissing},
		{"no config", index(ocispec.Descriptor{Digest: q.Image.Config}), nil, true, SignatureMissing},
		{"two ways to read it", []byte(strings.Replace(string(same), "{", `{"manifests":[],`, 1)), nil, true, SignatureMissing},
	} {
		if tt.store == nil {
			tt.store = [][]byte{tt.signed}
		}
		d := digest.FromBytes(tt.signed)
		k := keeps{holds: holds{name: "store", evidence: of(d)}, documents: map[digest.Digest][]byte{}}
		for _, raw := range tt.store {
			k.documents[digest.FromBytes(raw)] = raw
		}
		e, kept := stored(k, on("a"))
		asked := with(func(q *Question) { q.Image.LayersVerified = tt.vouched })
		if got := e.Evaluate(t.Context(), asked); got.Allowed() != (tt.want == Verified) || got.Reason != tt.want || tt.want == Verified && got.Signed != d || len(*kept) != 0 {
			t.Errorf("%s: %v %s, signed %s: %s", tt.name, got.Allowed(), got.Reason, got.Signed, got.Detail)
		}
	}
	// Where the config is not known, a manifest without one is not of the same config.
	empty := config(ocispec.MediaTypeImageConfig, "")
	k := keeps{holds: holds{name: "store", evidence: of(digest.FromBytes(empty))}, documents: map[digest.Digest][]byte{digest.FromBytes(empty): empty}}
	e, _ = stored(k, on("a"))
	unknown := with(func(q *Question) {
		q.Image.Use, q.Image.Binding, q.Image.Config, q.Image.LayersVerified = UseQuestion, BoundDigest, "", true
	})
	if d := e.Evaluate(t.Context(), unknown); d.Allowed() || d.Reason != SignatureMissing {
		t.Errorf("a manifest without a config: %v %s", d.Allowed(), d.Reason)
	}
	// A digest that is none costs only that document.
	k = keeps{holds: holds{name: "store", evidence: of(signed)}, documents: map[digest.Digest][]byte{signed: lists, "x": lists},
		only: map[digest.Digest][]digest.Digest{manifest.Digest: {"x", signed}}}
	e, _ = stored(k)
	if d := e.Evaluate(t.Context(), q); !d.Allowed() {
		t.Errorf("after a digest that is none: %s %s", d.Reason, d.Detail)
	}
	// Whoever has an archive full of indexes that list the manifest does not hide by them
	// the manifest that is signed, and the index of that.
	k = keeps{holds: holds{name: "store", evidence: of(digest.FromBytes(above))},
		documents: map[digest.Digest][]byte{digest.FromBytes(same): same, digest.FromBytes(above): above}}
	k.only = map[digest.Digest][]digest.Digest{q.Image.Config: {sub.Digest}, sub.Digest: {digest.FromBytes(above)}}
	for i := range 20 {
		raw := index(manifest, ocispec.Descriptor{Digest: digest.FromString(fmt.Sprint(i))})
		d := digest.FromBytes(raw)
		k.documents[d], k.only[manifest.Digest] = raw, append(k.only[manifest.Digest], d)
	}
	full, _ := stored(k)
	if d := full.Evaluate(t.Context(), q); !d.Allowed() {
		t.Errorf("behind many indexes: %s %s", d.Reason, d.Detail)
	}
	// What is asked about is bounded, and nothing is asked about twice.
	var asked []string
	k.evidence, k.asked = nil, &asked
	k.only[q.Image.Config] = slices.Repeat(k.only[q.Image.Config], 10)
	full, _ = stored(k)
	if d := full.Evaluate(t.Context(), q); d.Allowed() || d.Reason != LimitExceeded {
		t.Errorf("without a signature, and of documents that were not looked at: %s", d.Reason)
	}
	// The target, the manifest, 4 indexes that list it, 1 of the same config, 1 above that.
	if n := len(asked); n != 8 || n != len(slices.Compact(slices.Sorted(slices.Values(asked)))) {
		t.Errorf("asked about %q", asked)
	}
	// Whom the rule trusts, the store is told.
	var told []string
	hinted, _ := stored(keeps{anchors: &told})
	hinted.Checkers = []Checker{checks{anchors: func(authority string) []string { return []string{"anchor of " + authority} }}}
	hinted.Evaluate(t.Context(), q)
	if want := "anchor of acme"; len(told) != 1 || told[0] != want {
		t.Errorf("told %q, want %q", told, want)
	}
	// Whoever asks nothing but the store was not told that there is no signature, unless
	// the configuration wants it so.
	for _, tt := range []struct {
		name   string
		closed bool
		source []Source
		store  keeps
		want   Reason
		tried  int
	}{
		{name: "nothing but a store", store: keeps{holds: on("store")}, want: SourceUnreachable},
		{name: "nothing but a store, as it is meant", closed: true, store: keeps{holds: on("store")}, want: SignatureMissing, tried: 1},
		{name: "closed, with a layout", closed: true, source: []Source{on("layout")}, store: keeps{holds: on("store")}, want: SignatureMissing, tried: 1},
		{name: "it has one that does not count", store: keeps{holds: on("store", "SIGNATURE_EXPIRED")}, want: SignatureExpired, tried: 1},
		{name: "it cannot be read", store: keeps{holds: failing("store", ErrUnreachable)}, want: SourceUnreachable, tried: 1},
	} {
		e, _ := stored(tt.store, tt.source...)
		e.Closed = tt.closed
		if d := e.Evaluate(t.Context(), q); d.Allowed() || d.Reason != tt.want || len(d.Tried) != tt.tried {
			t.Errorf("%s: %s %s, tried %v", tt.name, d.Reason, d.Detail, d.Tried)
		}
	}
}

// refresh asks every source but the store to the end, and gives the store what counts.
func refresh(e *Engine, q Question) (given int, tried []Attempt) {
	defer func() { _ = recover() }()
	for _, src := range e.Sources(q.Image.Name) {
		tried = append(tried, e.Ask(bg, src, q, func(s Step) {
			if s.Finding.Reason == Verified {
				given++
				e.keep(q.Image, &s)
			}
		})...)
	}
	return given, tried
}

func TestAsk(t *testing.T) {
	q := bound()
	target := fmt.Sprintf("%.12s", q.Image.Target.Digest.Encoded())
	for _, tt := range []struct {
		name    string
		store   keeps
		sources []Source
		kept    string
		tried   string
	}{
		{"all that verify, of all sources", keeps{holds: on("store", "good")},
			[]Source{on("a", "good", "SIGNER_UNTRUSTED", "unreadable", "panic", "good"), failing("b", ErrUnreachable), on("c", "good"), on("d"), on("e", "SIGNATURE_EXPIRED")},
			strings.Repeat("; "+target+" good", 3), "VERIFIED SOURCE_UNREACHABLE VERIFIED SIGNATURE_MISSING SIGNATURE_EXPIRED"},
		{"a signature of something else", keeps{}, []Source{on("a", "lie")}, "", "INTERNAL"},
		{"the store is not asked", keeps{holds: on("store", "good")}, []Source{on("a")}, "", "SIGNATURE_MISSING"},
		{"the store panics", keeps{panics: true}, []Source{on("a", "good")}, "", "VERIFIED"},
	} {
		e, kept := stored(tt.store, tt.sources...)
		given, tried := refresh(e, q)
		said := make([]string, len(tried))
		for i, a := range tried {
			said[i] = a.Reason.String()
		}
		if got := strings.Join(append([]string{""}, *kept...), "; "); got != tt.kept || strings.Join(said, " ") != tt.tried || !tt.store.panics && given != len(*kept) {
			t.Errorf("%s: kept %q, said %d, tried %q", tt.name, got, given, said)
		}
	}
	e, kept := stored(keeps{}, on("a", "good"))
	for _, w := range weakened {
		q := bound()
		w.weaken(&q)
		if n, tried := refresh(e, q); q.Validate() != nil && (n != 0 || tried != nil) {
			t.Errorf("%s: refreshed", w.name)
		}
	}
	if len(*kept) != 0 {
		t.Errorf("kept %q", *kept)
	}
	// Indexes that the store has seen to list the manifest are asked about as well.
	raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{q.Image.Manifest}})
	if err != nil {
		t.Fatal(err)
	}
	above := digest.FromBytes(raw)
	e, kept = stored(keeps{documents: map[digest.Digest][]byte{above: raw}}, holds{name: "a", evidence: map[digest.Digest][]string{above: {"good"}}})
	vouched := with(func(q *Question) { q.Image.LayersVerified = true })
	if n, _ := refresh(e, vouched); n != 1 || len(*kept) != 1 || (*kept)[0] != fmt.Sprintf("%.12s good", above.Encoded()) {
		t.Errorf("of an index that lists it: kept %q", *kept)
	}
	if n, _ := refresh(e, q); n != 0 {
		t.Error("of an index that lists it, where nobody vouches for the layers")
	}
	e.Sources = func(Name) []Source { panic("sources") }
	if n, tried := refresh(e, q); n != 0 || tried != nil {
		t.Error("refreshed without sources")
	}
}
