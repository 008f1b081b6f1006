package control

import (
	"os"
	"regexp"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify"
)

// TestNext wants the page and the program to say the same of each reason that denies.
func TestNext(t *testing.T) {
	page, err := os.ReadFile("../../docs/reasons.md")
	if err != nil {
		t.Fatal(err)
	}
	said := map[verify.Reason]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| .* \\| (.*) \\|$").FindAllStringSubmatch(string(page), -1) {
		said[verify.Reason(row[1])] = row[2]
	}
	for r, text := range next {
		if said[r] != text {
			t.Errorf("%s: the page says %q, the program %q", r, said[r], text)
		}
	}
	for r := range said {
		if Next(r) == "" {
			t.Errorf("%s is on the page and has no next step in the program", r)
		}
	}
	// Every reason of the core is one or the other: it allows, or has a next step.
	core, err := os.ReadFile("../../verify/reason.go")
	if err != nil {
		t.Fatal(err)
	}
	codes := regexp.MustCompile(`Reason = "([A-Z_]+)"`).FindAllStringSubmatch(string(core), -1)
	if len(codes) < 20 {
		t.Fatalf("%d reasons are found", len(codes))
	}
	for _, c := range codes {
		switch r := verify.Reason(c[1]); r {
		case verify.Verified, verify.AllowedByDigest, verify.AuditOnly:
		default:
			if Next(r) == "" {
				t.Errorf("%s has no next step", r)
			}
		}
	}
	if Next(verify.Verified) != "" {
		t.Error("there is something to do about what is allowed")
	}
}
