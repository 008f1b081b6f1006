package sourcetest

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Registry serves a Content as one repository over the distribution API, read
// only. Set its fields before the first request. It is safe for concurrent use.
type Registry struct {
	Content    Content
	Repository string                   // the one that there is, such as "team/app"; others are 404 NAME_UNKNOWN
	Tags       map[string]digest.Digest // of images; may be nil
	NoAPI      bool                     // no Referrers API: 404, as CNCF distribution
	NoTags     bool                     // no referrers tags
	NoFilter   bool                     // artifactType is not filtered
	PageSize   int                      // referrers a page; 0: all on one

	// Intercept may answer in the registry's place and then returns true.
	Intercept func(http.ResponseWriter, *http.Request) bool

	mu       sync.Mutex
	requests []string
}

// Requests lists the requests so far: method, space, path, and the query if any.
func (g *Registry) Requests() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string{}, g.requests...)
}

// ServeHTTP implements [http.Handler].
func (g *Registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.requests = append(g.requests, r.Method+" "+r.URL.RequestURI())
	g.mu.Unlock()
	if g.Intercept != nil && g.Intercept(w, r) {
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/"+g.Repository+"/")
	kind, ref, _ := strings.Cut(rest, "/")
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.WriteHeader(http.StatusMethodNotAllowed)
	case !ok:
		failed(w, http.StatusNotFound, "NAME_UNKNOWN")
	case kind == "referrers" && !g.NoAPI:
		g.referrers(w, r, digest.Digest(ref))
	case kind == "manifests" && !strings.Contains(ref, ":"):
		g.tag(w, ref)
	case kind == "manifests" || kind == "blobs":
		raw, ok := g.Content.Blobs[digest.Digest(ref)]
		if !ok {
			failed(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
			return
		}
		mediaType := "application/octet-stream"
		if kind == "manifests" {
			mediaType = g.mediaType(digest.Digest(ref))
		}
		send(w, mediaType, digest.Digest(ref), raw)
	default:
		http.NotFound(w, r)
	}
}

// mediaType is that of the manifest d as it was listed.
func (g *Registry) mediaType(d digest.Digest) string {
	for _, e := range g.Content.Images {
		if e.Digest == d {
			return e.MediaType
		}
	}
	for _, list := range g.Content.Referrers {
		for _, e := range list {
			if e.Digest == d {
				return e.MediaType
			}
		}
	}
	return ocispec.MediaTypeImageManifest
}

func (g *Registry) tag(w http.ResponseWriter, ref string) {
	if d, ok := g.Tags[ref]; ok {
		send(w, g.mediaType(d), d, g.Content.Blobs[d])
		return
	}
	if d, ok := g.Content.Tagged[ref]; ok {
		send(w, d.MediaType, d.Digest, g.Content.Blobs[d.Digest])
		return
	}
	for subject, list := range g.Content.Referrers {
		if !g.NoTags && tag(subject) == ref {
			raw := index(list)
			send(w, ocispec.MediaTypeImageIndex, digest.FromBytes(raw), raw)
			return
		}
	}
	failed(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
}

func (g *Registry) referrers(w http.ResponseWriter, r *http.Request, subject digest.Digest) {
	var list []ocispec.Descriptor
	want := r.URL.Query().Get("artifactType")
	for _, d := range g.Content.Referrers[subject] {
		if want == "" || g.NoFilter || d.ArtifactType == want {
			list = append(list, d)
		}
	}
	if want != "" && !g.NoFilter {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if g.PageSize > 0 {
		page, _ := strconv.Atoi(r.URL.Query().Get("page"))
		from := min(max(page, 0)*g.PageSize, len(list))
		if to := from + g.PageSize; to < len(list) {
			q := r.URL.Query()
			q.Set("page", strconv.Itoa(page+1))
			w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.Path, q.Encode()))
			list = list[:to]
		}
		list = list[from:]
	}
	send(w, ocispec.MediaTypeImageIndex, "", index(list))
}

func send(w http.ResponseWriter, mediaType string, d digest.Digest, raw []byte) {
	w.Header().Set("Content-Type", mediaType)
	if d != "" {
		w.Header().Set("Docker-Content-Digest", d.String())
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	w.Write(raw)
}

func failed(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"no"}]}`, code)
}
