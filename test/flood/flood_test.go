package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/test/node"
	"github.com/tidewaiter/tidewaiter/verify"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: the flood of test/flood: a node needs root")
	}
	os.Exit(m.Run())
}

// TestFlood is a flood of some hundred creations. The mirror does not lie in it,
// since the gate keeps what follows from a lie for 30 s. containerd waits longer than it
// does, so that a machine that is busy with something else is no gate that hangs.
func TestFlood(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a node needs root")
	}
	o := options{creations: 200, perKind: 3, turns: 2, callers: 4, fails: illnesses[:6], patience: 10 * time.Second, log: t.Logf}
	var out bytes.Buffer
	err := all(t.Context(), o, []string{node.Containerd24, node.Containerd23}, &out)
	t.Log(out.String())
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\nescapes: 0\n"); n != 2 {
		t.Errorf("%d times no escape", n)
	}
}

// TestVerdict has answers that are not as they should be.
func TestVerdict(t *testing.T) {
	of := func(r verify.Reason) image {
		for i := range kinds {
			if kinds[i].reason == r {
				return image{Image: &node.Image{Name: "registry.example/app:1"}, kind: &kinds[i], repository: "app"}
			}
		}
		t.Fatalf("no kind for %s", r)
		return image{}
	}
	no := func(r verify.Reason) error { return fmt.Errorf("tidewaiter: denied [%s] ...", r) }
	for name, tt := range map[string]struct {
		image image
		err   error
		lied  bool
		want  string // in the verdict; empty for none
	}{
		"a good image":                     {of(verify.Verified), nil, false, ""},
		"it waits":                         {of(verify.Verified), no(verify.Pending), false, ""},
		"its mirror fails":                 {of(verify.Verified), no(verify.SourceUnreachable), false, ""},
		"its mirror lied":                  {of(verify.Verified), no(verify.SignatureMissing), true, ""},
		"a no without a lie":               {of(verify.Verified), no(verify.SignatureMissing), false, "wrong: 1"},
		"a no of another kind":             {of(verify.Verified), no(verify.Internal), true, "wrong: 1"},
		"a no of somebody else":            {of(verify.Verified), errors.New("deadline exceeded"), false, "wrong: 1"},
		"an unsigned image":                {of(verify.SignatureMissing), no(verify.SignatureMissing), false, ""},
		"an unsigned image that ran":       {of(verify.SignatureMissing), nil, false, "escapes: 1"},
		"an unknown image that ran":        {of(verify.PolicyNoMatch), nil, true, "escapes: 1"},
		"an image of no statement, asked":  {of(verify.PolicyNoMatch), no(verify.SourceUnreachable), true, "wrong: 1"},
		"a stranger's signature, mistaken": {of(verify.SignerUntrusted), no(verify.IdentityMismatch), false, "wrong: 1"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &flood{sick: newSick(1, illnesses)}
			f.tally.gate.good = append(f.tally.gate.good, 1)
			f.sick.lied["app"] = tt.lied
			f.judge(tt.image, tt.err)
			err := f.verdict()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if err := (&flood{options: options{creations: 1}, sick: newSick(1, illnesses)}).verdict(); err == nil {
		t.Error("nothing was asked, and all is well")
	}
}

// TestSick asks a mirror that fails and is then cured.
func TestSick(t *testing.T) {
	s := newSick(1, []illness{falsifies, forgets, broken})
	server := httptest.NewServer(s.wrap(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("whole")) })))
	defer server.Close()
	ask := func() string {
		res, err := http.Get(server.URL + "/v2/a/b/manifests/1")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var b bytes.Buffer
		_, _ = b.ReadFrom(res.Body)
		return b.String()
	}
	spoilt := 0
	for range 2000 {
		if ask() != "whole" {
			spoilt++
		}
	}
	if spoilt == 0 || spoilt == 2000 || !s.lies("a/b") || s.lies("a") {
		t.Errorf("%d of 2000 failed; %s", spoilt, s)
	}
	s.cure()
	for range 100 {
		if b := ask(); b != "whole" {
			t.Fatalf("cured, and says %q", b)
		}
	}
}
