package main

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/control"
	"github.com/tidewaiter/tidewaiter/verify"
)

// TestImagesAnswer wants a digest that is listed for one namespace to count there alone,
// as the hook and the check of what runs have it.
func TestImagesAnswer(t *testing.T) {
	for _, c := range []struct {
		name              string
		reason            verify.Reason
		listed, runs      []string
		notImage, allowed bool
		want, says        string
	}{
		{name: "allowed", reason: verify.Verified, allowed: true, want: "allowed"},
		{name: "listed, does not run", reason: verify.SignatureMissing, listed: []string{"kube-system"}, want: "listed"},
		{name: "listed where it runs", reason: verify.SignatureMissing, listed: []string{"default", "kube-system"}, runs: []string{"default"}, want: "listed"},
		{name: "listed elsewhere", reason: verify.SignatureMissing, listed: []string{"kube-system"}, runs: []string{"default"}, want: "denied", says: "listed in kube-system, runs in default"},
		{name: "listed, runs outside Kubernetes too", reason: verify.SignatureMissing, listed: []string{"default"}, runs: []string{"", "default"}, want: "denied", says: "runs in no namespace,default"},
		{name: "source away", reason: verify.SourceUnreachable, runs: []string{"default"}, want: "inconclusive"},
		{name: "no image", reason: verify.NotAnImage, notImage: true, want: "other", says: "0 images: 0 allowed, 0 denied, 0 inconclusive\n1 of the records are of no image"},
	} {
		i := control.Image{Image: "registry.test/app:1", Reason: c.reason.String(), Allowed: c.allowed, Namespaces: c.listed, Runs: c.runs, NotImage: c.notImage}
		text := (&imagesOptions{}).table(control.Images{List: []control.Image{i}})
		if i.Answer() != c.want || !strings.Contains(text, "\n"+c.want+" ") || !strings.Contains(text, c.says) {
			t.Errorf("%s: %s: %s", c.name, i.Answer(), text)
		}
	}
	long := control.Images{TooLong: []string{"shop/ : longer than 300 KiB"}}
	if text := (&imagesOptions{}).table(long); !strings.Contains(text, "denied        POD_TOO_LARGE            shop/ : longer than 300 KiB\n") {
		t.Errorf("a container that is too long is not listed:\n%s", text)
	}
}
