package daemon

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/nri/containerd"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary"
	"github.com/tidewaiter/tidewaiter/verify/oci"
	"github.com/tidewaiter/tidewaiter/verify/policy"
	"github.com/tidewaiter/tidewaiter/verify/source/registry"
)

// Targets of TestPeak, in bytes resident at the peak.
const (
	peakAll      = 40e6     // of the process
	peakQuestion = 16 << 20 // and more than with documents that are small
)

// TestPeak measures the memory of a process that reads the worst documents that pass all
// bounds, two of a kind at once: an index, a manifest and a config of an image, lists of
// referrers, signature manifests. The process has the limits of the pod manifests.
func TestPeak(t *testing.T) {
	if os.Getenv("TIDEWAITER_PEAK") != "" {
		peakChild(t)
		return
	}
	if testing.Short() {
		t.Skip("it takes seconds")
	}
	dir := t.TempDir()
	// Built anew, since the race detector takes more memory than it measures.
	program := filepath.Join(dir, "peak.test")
	if out, err := exec.Command("go", "test", "-c", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	registry := httptest.NewServer(http.HandlerFunc(worstRegistry))
	defer registry.Close()
	put := func(raw []byte) digest.Digest {
		d := digest.FromBytes(raw)
		if err := os.WriteFile(filepath.Join(dir, d.Encoded()), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		return d
	}
	measure := func(kind string, image func(n int) digest.Digest) int {
		var targets []string
		if image != nil {
			for n := range 2 {
				targets = append(targets, image(n).Encoded())
			}
		}
		cmd := exec.Command(program, "-test.run=^TestPeak$", "-test.v")
		cmd.Env = append(os.Environ(), "TIDEWAITER_PEAK="+kind, "TIDEWAITER_PEAK_DIR="+dir, "TIDEWAITER_PEAK_TARGETS="+strings.Join(targets, " "),
			"TIDEWAITER_PEAK_REGISTRY="+registry.URL, "GOMEMLIMIT=48MiB", "GOGC=", "GOMAXPROCS=")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", kind, err, out)
		}
		_, rest, _ := strings.Cut(string(out), "peak: ")
		n, err := strconv.Atoi(strings.Fields(rest + " x")[0])
		if err != nil {
			t.Fatalf("%s: no figure in %s", kind, out)
		}
		return n << 10
	}
	usual := measure("image", func(n int) digest.Digest { return worstImage(put, n, 4<<10, 4<<10, 0) })
	t.Logf("%-20s %.1f MiB", "usual", float64(usual)/(1<<20))
	for kind, image := range map[string]func(n int) digest.Digest{
		"index":    func(n int) digest.Digest { return worstImage(put, n, containerd.MaxBlob-64<<10, 0, 0) },
		"small":    func(n int) digest.Digest { return worstImage(put, n, containerd.MaxBlob-64<<10, 0, 2) },
		"manifest": func(n int) digest.Digest { return worstImage(put, n, 0, containerd.MaxBlob-64<<10, 0) },
		"config":   func(n int) digest.Digest { return worstImage(put, n, 0, 0, 1) },
		"both": func(n int) digest.Digest {
			return worstImage(put, n, containerd.MaxBlob/2, containerd.MaxBlob/2-64<<10, 1)
		},
		"list": nil, "listed": nil, "signatures": nil,
	} {
		what := "image"
		if image == nil {
			what = kind
		}
		n := measure(what, image)
		t.Logf("%-20s %.1f MiB", kind, float64(n)/(1<<20))
		if n > peakAll || n-usual > peakQuestion {
			t.Errorf("%s: %.1f MiB resident, %.1f more than usual; limits %d and %d", kind, float64(n)/(1<<20), float64(n-usual)/(1<<20), int(peakAll)>>20, peakQuestion>>20)
		}
	}
}

// worstImage writes an image whose index and manifest have about so many bytes, and
// whose config is as long as may be with config 1. With config 2 what is long is many
// small objects that nobody asks for.
func worstImage(put func([]byte) digest.Digest, n, index, manifest, config int) digest.Digest {
	word := func(of int) string { return strings.Repeat("x", max(1, min(of, 230))) }
	diffs := strings.Repeat(`"`+digest.FromString(fmt.Sprint(n)).String()+`",`, oci.MaxList-1) + `"` + digest.FromString("x").String() + `"`
	pad := ""
	if config == 1 {
		pad = strings.Repeat(`{"created_by":""},`, (containerd.MaxBlob-len(diffs)-1<<10)/18)
	}
	raw := []byte(fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%s]},"history":[%s{}]}`, diffs, pad))
	c := put(raw)
	list := func(size int, entry func(fill string) string) string {
		if size == 0 {
			return ""
		}
		e := entry(word((size/oci.MaxList - len(entry("")) - 1) / 2))
		return strings.Repeat(e+",", min(oci.MaxList-1, size/(len(e)+1)))
	}
	layers := list(manifest, func(fill string) string {
		return fmt.Sprintf(`{"mediaType":"%s","digest":"%s","size":1,"artifactType":"%s"}`, fill, digest.FromString("x"), fill)
	})
	m := []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s]}`,
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, c, len(raw), strings.TrimSuffix(layers, ",")))
	md := put(m)
	if index == 0 {
		return md
	}
	entries := list(index, func(fill string) string {
		return fmt.Sprintf(`{"mediaType":"%s","digest":"%s","size":1,"platform":{"os":"linux","architecture":"amd64","os.version":"1","os.features":["","","",""]},"artifactType":"%s"}`, fill, digest.FromString("x"), fill)
	})
	if config == 2 {
		entries = strings.Repeat(`{"platform":{"x":{}}},`, oci.MaxList-1)
	}
	i := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s{"mediaType":%q,"digest":%q,"size":%d,"platform":{"os":"linux","architecture":"amd64","variant":""}}],"x":[`,
		ocispec.MediaTypeImageIndex, entries, ocispec.MediaTypeImageManifest, md, len(m))
	if config == 2 {
		i += strings.Repeat(`{"a":{}},`, (containerd.MaxBlob-len(m)-len(i)-1<<10)/9)
	}
	return put([]byte(i + "{}]}"))
}

// worstRegistry lists as many referrers as a page may have, or signatures whose manifests
// are as long as may be.
func worstRegistry(w http.ResponseWriter, r *http.Request) {
	send := func(mediaType string, raw string) {
		w.Header().Set("Content-Type", mediaType)
		if !strings.Contains(r.URL.Path, "chunked") {
			w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
		}
		_, _ = w.Write([]byte(raw))
	}
	signature := func(n int) string {
		head := fmt.Sprintf(`{"mediaType":%q,"n":%d,"layers":[`, ocispec.MediaTypeImageManifest, n)
		return head + strings.Repeat(`{},`, (oci.MaxSignature-len(head)-10)/3) + `{}]}`
	}
	kind, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
	switch {
	case strings.HasPrefix(rest, "referrers/") && kind == "signatures":
		var b strings.Builder
		for n := range 100 {
			s := signature(n)
			fmt.Fprintf(&b, `{"mediaType":%q,"digest":%q,"size":%d,"artifactType":%q},`, ocispec.MediaTypeImageManifest, digest.FromString(s), len(s), notary.ArtifactType)
		}
		send(ocispec.MediaTypeImageIndex, `{"manifests":[`+strings.TrimSuffix(b.String(), ",")+`]}`)
	case strings.HasPrefix(rest, "manifests/") && kind == "signatures":
		for n := range 100 {
			if s := signature(n); digest.FromString(s).String() == strings.TrimPrefix(rest, "manifests/") {
				send(ocispec.MediaTypeImageManifest, s)
			}
		}
	case strings.HasPrefix(rest, "referrers/"):
		of := "application/vnd.example"
		if kind == "listed" {
			of = notary.ArtifactType
		}
		one := fmt.Sprintf(`{"mediaType":"%s","digest":%q,"size":1,"artifactType":%q,"annotations":{"io.cncf.notary.x509chain.thumbprint#S256":"%s"}},`, strings.Repeat("x", 100), digest.FromString("x"), of, strings.Repeat("x", 100))
		body := `{"manifests":[` + strings.Repeat(one, (4<<20-200)/len(one)) + `{}]}`
		if page, _ := strconv.Atoi(r.URL.Query().Get("page")); page < 3 {
			w.Header().Set("Link", fmt.Sprintf(`<%s?page=%d>; rel="next"`, r.URL.Path, page+1))
		}
		send(ocispec.MediaTypeImageIndex, body)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// disk is a content store. Each blob comes in pieces, as containerd sends it.
type disk struct {
	containerd.Records
	dir string
}

func (d disk) Blob(_ context.Context, desc ocispec.Descriptor) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(d.dir, desc.Digest.Encoded()))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) != desc.Size || len(raw) > containerd.MaxBlob {
		return nil, fmt.Errorf("%d bytes, not %d", len(raw), desc.Size)
	}
	return raw, nil
}

func (disk) Pulled(context.Context, digest.Digest) (bool, error) { return true, nil }

// peakChild is the process that is measured.
func peakChild(t *testing.T) {
	SmallShare()
	var wg sync.WaitGroup
	switch kind := os.Getenv("TIDEWAITER_PEAK"); kind {
	case "image":
		d := disk{dir: os.Getenv("TIDEWAITER_PEAK_DIR")}
		r := containerd.NewResolver(d, containerd.Options{ParseName: policy.ParseName, ParseRecord: func(s string) (string, error) { return s, nil }, Now: time.Now})
		for _, hex := range strings.Fields(os.Getenv("TIDEWAITER_PEAK_TARGETS")) {
			info, err := os.Stat(filepath.Join(d.dir, hex))
			if err != nil {
				t.Fatal(err)
			}
			mediaType := ocispec.MediaTypeImageManifest
			head := make([]byte, 200)
			f, err := os.Open(filepath.Join(d.dir, hex))
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.ReadAt(head, 0)
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(head), `"manifests"`) {
				mediaType = ocispec.MediaTypeImageIndex
			}
			img := verify.Image{Asked: "registry.example/app:1", Target: ocispec.Descriptor{MediaType: mediaType, Digest: digest.NewDigestFromEncoded(digest.SHA256, hex), Size: info.Size()}}
			for range 2 { // the hook, and the look at what came
				wg.Go(func() {
					if img := r.Read(t.Context(), img); img.Fault != nil {
						t.Error(img.Fault)
					}
				})
			}
		}
	default:
		for range 2 {
			wg.Go(func() {
				at, err := url.Parse(os.Getenv("TIDEWAITER_PEAK_REGISTRY"))
				if err != nil {
					t.Error(err)
					return
				}
				src := registry.New(registry.Mirror{Host: "registry.example", URL: at, Client: http.DefaultClient})
				in, err := policy.ParseName("registry.example/" + kind + ":1")
				if err != nil {
					t.Error(err)
					return
				}
				subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("subject"), Size: 7}
				n := 0
				err = src.Find(t.Context(), in, subject, verify.NewBudget(notary.Kind, verify.Limits{}), func(verify.Evidence) bool { n++; return true })
				t.Logf("%s: %d handed over, error %v", kind, n, err)
			})
		}
	}
	wg.Wait()
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	_, rest, _ := strings.Cut(string(raw), "VmHWM:")
	fmt.Printf("\npeak: %s\n", strings.Fields(rest)[0])
}
