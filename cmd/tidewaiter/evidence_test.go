package main

import (
	"bytes"
	"context"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/cmd/internal/cli"
	"github.com/tidewaiter/tidewaiter/cmd/internal/imagetest"
	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/evidence/notary/notarytest"
)

// TestTrustAnswers has a gate that allows images, and an evidence archive with other trust:
// what would be refused under that is said, and not put in force unasked.
func TestTrustAnswers(t *testing.T) {
	const signed, unsigned = "registry.test/team/app:signed", "registry.test/team/app:unsigned"
	acme, other := notarytest.Stores{"ca/acme/root.crt": imagetest.World().Root}, notarytest.Stores{"ca/acme/root.crt": notarytest.NewCA(notarytest.CAOptions{}).PEM()}
	for _, tt := range []struct {
		name    string
		ours    notarytest.Stores // the trust that the node has
		theirs  notarytest.Stores // the trust in the archive
		with    []string          // images whose signatures are in the archive
		reasons map[string]verify.Reason
		flags   []string
		status  int
		want    []string
	}{
		{name: "nothing changes for them", ours: notarytest.Stores{"ca/acme/root.crt": append(imagetest.World().Root, other["ca/acme/root.crt"]...)}, theirs: acme, with: []string{"signed"},
			reasons: map[string]verify.Reason{signed: verify.Verified, unsigned: verify.SignatureMissing}, want: []string{"has the trust of the evidence archive now"}},
		{name: "an image is lost", ours: acme, theirs: other,
			reasons: map[string]verify.Reason{signed: verify.Verified}, status: cli.ExitNo,
			want: []string{"answer  " + signed + "@sha256:", "VERIFIED now, then ", "not imported: 1 of this node's images that are allowed now would not be, such as " + signed}},
		{name: "an image is lost, as told", ours: acme, theirs: other, flags: []string{"--replace"},
			reasons: map[string]verify.Reason{signed: verify.Verified}, want: []string{"VERIFIED now, then ", "has the trust of the evidence archive now"}},
		{name: "an image is won", ours: other, theirs: acme, with: []string{"signed"},
			reasons: map[string]verify.Reason{signed: verify.SignerUntrusted}, want: []string{"SIGNER_UNTRUSTED now, then VERIFIED", "has the trust of the evidence archive now"}},
		{name: "what is listed by its digest", ours: acme, theirs: other,
			reasons: map[string]verify.Reason{unsigned: verify.AllowedByDigest}, want: []string{"has the trust of the evidence archive now"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			node, away, run, layout := filepath.Join(dir, "node"), filepath.Join(dir, "away"), filepath.Join(dir, "r"), filepath.Join(dir, "layout")
			for at, stores := range map[string]notarytest.Stores{node: tt.ours, away: tt.theirs} {
				if err := notarytest.WriteConfig(at, stores, notarytest.Statement("prod", imagetest.Identity)); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(at, "config.yaml"), []byte("version: 1\nmode: enforce\nsources: {network: never}\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var list []control.Image
			for name, reason := range tt.reasons {
				img := imagetest.World().Images[name[strings.LastIndex(name, ":")+1:]]
				list = append(list, control.Image{Image: name, Target: img.Target.Digest.String(), Allowed: reason == verify.Verified, Reason: reason.String()})
			}
			serveImages(t, run, list)
			c, err := imagetest.Content(tt.with, "")
			if err == nil {
				err = imagetest.WriteLayout(layout, c)
			}
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "site.tar")
			args := []string{"evidence", "export", "--config-dir", away, "--trust", "-o", file}
			for _, name := range tt.with {
				args = append(args, "--layout", layout, "registry.test/team/app@"+imagetest.World().Images[name].Target.Digest.String())
			}
			tidewaiter(t, cli.ExitYes, args...)
			imports := []string{"evidence", "import", "--trust", "--config-dir", node, "--run-dir", run, "--state-dir", filepath.Join(dir, "state"), file}
			said := tidewaiter(t, cli.ExitNo, imports...)
			_, accept, _ := strings.Cut(said, "add --accept ")
			said = tidewaiter(t, tt.status, append(append(imports, "--accept", strings.TrimSpace(accept)), tt.flags...)...)
			for _, want := range tt.want {
				if !strings.Contains(said, want) {
					t.Errorf("%q is missing in\n%s", want, said)
				}
			}
			if len(tt.with) == 0 && tt.status == cli.ExitYes && len(tt.flags) == 0 && strings.Contains(said, "answer") {
				t.Errorf("an answer changes:\n%s", said)
			}
		})
	}
}

// tidewaiter runs the program, wants that status, and returns what it says.
func tidewaiter(t *testing.T, status int, args ...string) string {
	t.Helper()
	var out, err bytes.Buffer
	if got := Main(args, &out, &err); got != status {
		t.Fatalf("%q: status %d, want %d\n%s%s", args, got, status, out.String(), err.String())
	}
	return out.String()
}

// serveImages is a control socket of a gate that has these images.
func serveImages(t *testing.T, dir string, list []control.Image) {
	t.Helper()
	images := control.Endpoint{Path: control.ImagesPath, Longest: control.ImagesTime, Answer: func(context.Context, url.Values) (any, error) {
		return control.Images{Schema: control.ImagesSchema, Mode: "enforce", List: list}, nil
	}}
	if err := control.MakeDir(dir); err != nil {
		t.Fatal(err)
	}
	s := &control.Socket{Dir: dir, Log: slog.New(slog.DiscardHandler), Handler: control.Handler(func() control.Status { return control.Status{} }, nil, images)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, control.SocketName)); err == nil {
			return
		}
	}
	t.Fatal("the socket does not come")
}
