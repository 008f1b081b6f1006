package verify

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// one is the proof of a requirement of one leaf.
func one(f Finding) []proof { return []proof{{finding: f}} }

func TestAllow(t *testing.T) {
	others := func(n int) []ocispec.Descriptor {
		var list []ocispec.Descriptor
		for i := range n {
			list = append(list, desc(fmt.Sprint("other", i)))
		}
		return list
	}
	for _, tt := range []struct {
		name   string
		change func(*Question, *Finding)
		want   Reason // VERIFIED: allowed
	}{
		{"as it should be", func(*Question, *Finding) {}, Verified},
		{"bound by snapshot", func(q *Question, _ *Finding) { q.Image.Binding = BoundSnapshot }, Verified},
		{"asked by digest", func(q *Question, _ *Finding) { q.Image.Use, q.Image.Binding = UseQuestion, BoundDigest }, Verified},
		{"signed manifest", func(_ *Question, f *Finding) { f.Signed = of("manifest") }, Verified},
		{"signed other", func(q *Question, f *Finding) { q.Image.Related = others(MaxRelated); f.Signed = of("other7") }, Verified},
		{"signed other beyond the bound", func(q *Question, f *Finding) { q.Image.Related = others(MaxRelated + 1); f.Signed = of("other8") }, Internal},
		{"signed something else", func(_ *Question, f *Finding) { f.Signed = of("evil") }, Internal},
		{"signed the config", func(_ *Question, f *Finding) { f.Signed = of("config") }, Internal},
		{"signed nothing", func(_ *Question, f *Finding) { f.Signed = "" }, Internal},
		{"signed nothing, other without digest", func(q *Question, f *Finding) { q.Image.Related = make([]ocispec.Descriptor, 1); f.Signed = "" }, Internal},
		{"zero finding", func(_ *Question, f *Finding) { *f = Finding{} }, Internal},
		{"finding without reason", func(_ *Question, f *Finding) { f.Reason = "" }, Internal},
		{"finding of audit", func(_ *Question, f *Finding) { f.Reason = AuditOnly }, Internal},
		{"finding against", func(_ *Question, f *Finding) { f.Reason = SignerUntrusted }, Internal},
		{"no end", func(_ *Question, f *Finding) { f.Until = time.Time{} }, Verified},
		{"ends in an instant", func(_ *Question, f *Finding) { f.Until = start.Add(1) }, Verified},
		{"ends now", func(_ *Question, f *Finding) { f.Until = start }, SignatureExpired},
		{"ended", func(_ *Question, f *Finding) { f.Until = start.Add(-time.Hour) }, SignatureExpired},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := bound()
			f := good(q)
			tt.change(&q, &f)
			d := allow(q, one(f), start)
			if tt.want != Verified {
				denied(t, d, tt.want)
				if d.Detail == "" {
					t.Error("the denial says nothing")
				}
				return
			}
			allowed(t, d, Verified)
			if d.Signed != f.Signed || len(d.Signers) != 1 || d.Signers[0] != f.Signer || !d.Until.Equal(f.Until) || !d.Made.Equal(start) {
				t.Errorf("the decision does not say what it rests on: %+v", d)
			}
		})
	}
	for _, tt := range weakened {
		t.Run(tt.name, func(t *testing.T) {
			q := with(tt.weaken)
			f := good(bound())
			denied(t, allow(q, one(f), start), tt.want)
			f.Signed = q.Image.Target.Digest
			denied(t, allow(q, one(f), start), tt.want)
		})
	}
}

func TestAudit(t *testing.T) {
	yes := allow(bound(), one(good(bound())), start)
	allowed(t, audit(yes, Enforce), Verified)
	allowed(t, audit(yes, Audit), Verified)
	if d := audit(yes, Audit); d.Would != "" {
		t.Errorf("an allow would be %v", d.Would)
	}
	for _, r := range append(append([]Reason{}, unranked...), ranked...) {
		for _, m := range []Mode{Enforce, 2, 255} {
			denied(t, audit(Deny(r, "x"), m), r)
		}
		no := Deny(r, "x")
		no.Rule, no.Key = "prod", bound().Key()
		d := audit(no, Audit)
		allowed(t, d, AuditOnly)
		if d.Would.String() != r.String() || d.Would == "" || d.Detail != "x" || d.Rule != "prod" {
			t.Errorf("audit of %q lost what enforce would say: %+v", string(r), d)
		}
		if d.ID() != no.ID() {
			t.Errorf("audit of %q has another ID", string(r))
		}
	}
}

// TestNoWayBackFromBytes: no decoder makes a Decision that allows.
func TestNoWayBackFromBytes(t *testing.T) {
	yes := audit(allow(bound(), one(good(bound())), start), Enforce)
	if !yes.Allowed() {
		t.Fatal("nothing to try with")
	}
	raw, err := json.Marshal(yes)
	if err != nil || !strings.Contains(string(raw), `"allowed":true`) {
		t.Fatalf("JSON is %s (%v)", raw, err)
	}
	inputs := []string{string(raw), `{}`, `null`, `[]`, `true`, `{"allowed":true}`, `{"Allowed":true,"reason":"VERIFIED"}`}
	for _, in := range inputs {
		d := Decision{}
		if err := json.Unmarshal([]byte(in), &d); err == nil || d.Allowed() {
			t.Errorf("%.40s: read as %+v, error %v", in, d, err)
		}
		var s struct{ D Decision }
		if err := json.Unmarshal([]byte(`{"D":`+in+`}`), &s); err == nil || s.D.Allowed() {
			t.Errorf("%.40s in a struct: read, error %v", in, err)
		}
		var p struct{ D *Decision }
		if err := json.Unmarshal([]byte(`{"D":`+in+`}`), &p); in != "null" && (err == nil || p.D != nil && p.D.Allowed()) {
			t.Errorf("%.40s behind a pointer: read, error %v", in, err)
		}
		var l []Decision
		if err := json.Unmarshal([]byte(`[`+in+`]`), &l); err == nil {
			t.Errorf("%.40s in a list: read", in)
		}
		var m map[string]Decision
		if err := json.Unmarshal([]byte(`{"D":`+in+`}`), &m); err == nil {
			t.Errorf("%.40s in a map: read", in)
		}
		var e struct{ Decision }
		if err := json.Unmarshal([]byte(in), &e); err == nil || e.Allowed() {
			t.Errorf("%.40s embedded: read", in)
		}
		// Over an allow, too, nothing is read.
		kept := yes
		if err := json.Unmarshal([]byte(in), &kept); err == nil {
			t.Errorf("%.40s over an allow: read", in)
		}
	}
	// Decoders that know no UnmarshalJSON cannot reach the field.
	var b bytes.Buffer
	var d Decision
	if err := gob.NewEncoder(&b).Encode(yes); err != nil {
		t.Fatal(err)
	}
	if err := gob.NewDecoder(&b).Decode(&d); err != nil || d.Reason != Verified || d.Allowed() {
		t.Errorf("gob made allowed=%t %v, %v", d.Allowed(), d.Reason, err)
	}
	d = Decision{}
	if err := xml.Unmarshal([]byte(`<Decision><allowed>true</allowed><Allowed>true</Allowed><Reason>VERIFIED</Reason></Decision>`), &d); err != nil || d.Allowed() {
		t.Errorf("XML made allowed=%t, %v", d.Allowed(), err)
	}
	// A Report can be read, and is no Decision.
	var r Report
	if err := json.Unmarshal(raw, &r); err == nil && r.Schema != Schema {
		t.Errorf("report has schema %q", r.Schema)
	}
}

func TestID(t *testing.T) {
	d := Deny(SignatureMissing, "")
	d.Key = bound().Key()
	if got, want := d.ID(), "4d31dfc47669"; got != want {
		t.Errorf("ID is %s, want %s: it must never change", got, want)
	}
	same := d
	same.Detail, same.Rule, same.Made, same.Until, same.Source, same.Binding, same.Revision = "x", "x", start, start, "x", BoundDigest, Revision{1}
	if same.ID() != d.ID() {
		t.Error("the ID depends on more than question and reason")
	}
	other := d
	other.Reason = SignatureInvalid
	if other.ID() == d.ID() {
		t.Error("another reason has the same ID")
	}
	other = d
	other.Key.Requirement[0]++
	if other.ID() == d.ID() {
		t.Error("another question has the same ID")
	}
}

func TestMessage(t *testing.T) {
	key := bound().Key()
	img := bound().Image
	sum := strings.TrimPrefix(of("index").String(), "sha256:")
	deny := func(detail string) Decision {
		d := Deny(SignatureMissing, detail)
		d.Rule, d.Key = "prod", key
		return d
	}
	id := deny("").ID()
	yes := allow(bound(), one(good(bound())), start)
	yes.Rule, yes.Key = "prod", key
	for _, tt := range []struct {
		name string
		d    Decision
		img  Image
		node string
		want string
	}{
		{"denied", deny("no notary signature found at layout /media/usb"), img, "edge-17",
			`tidewaiter: denied [SIGNATURE_MISSING] registry.local/app:1.2@sha256:` + sum +
				`: no notary signature found at layout /media/usb; rule "prod"; on node edge-17: tidewaiter explain ` + id},
		{"allowed", yes, img, "edge-17",
			`tidewaiter: allowed [VERIFIED] registry.local/app:1.2@sha256:` + sum + `; rule "prod"; on node edge-17: tidewaiter explain ` + yes.ID()},
		{"audited", audit(deny("why"), Audit), img, "edge-17",
			`tidewaiter: allowed [AUDIT_ONLY], enforce would deny [SIGNATURE_MISSING] registry.local/app:1.2@sha256:` + sum +
				`: why; rule "prod"; on node edge-17: tidewaiter explain ` + id},
		{"audited zero", audit(Decision{}, Audit), Image{}, "",
			`tidewaiter: allowed [AUDIT_ONLY], enforce would deny [INTERNAL] an image without a name`},
		{"zero", Decision{}, Image{}, "", `tidewaiter: denied [INTERNAL] an image without a name`},
		{"a denial that claims to be audit's", Decision{Reason: AuditOnly, Would: SignatureMissing}, Image{}, "",
			`tidewaiter: denied [AUDIT_ONLY] an image without a name`},
		{"no name, what the pod asked", Deny(ImageUnresolved, "an ID"), Image{Asked: "sha256:\"abc\"\n"}, "",
			`tidewaiter: denied [IMAGE_UNRESOLVED] "sha256:'abc' ": an ID`},
		{"name without digest", Deny(PolicyNoMatch, ""), Image{Name: Name{Host: "h", Path: "p", Tag: "1"}}, "",
			`tidewaiter: denied [POLICY_NO_MATCH] h/p:1`},
		{"digest of the pod where there is no target", Deny(ImageMismatch, ""), Image{Name: Name{Host: "h", Path: "p", Digest: "sha256:ab"}}, "",
			`tidewaiter: denied [IMAGE_MISMATCH] h/p@sha256:ab`},
		{"detail on several lines", deny("a\r\nb\tc\x00d\u202ee\u2028f\x1b[31m\xff"), img, "",
			`tidewaiter: denied [SIGNATURE_MISSING] registry.local/app:1.2@sha256:` + sum + `: a  b c d e f [31m ; rule "prod"`},
		{"a quote does not end the rule", Decision{Reason: SignatureMissing, Rule: `a"; rule "b` + "\n"}, Image{}, "n\n1",
			`tidewaiter: denied [SIGNATURE_MISSING] an image without a name; rule "a'; rule 'b "; on node n 1: tidewaiter explain ` +
				Decision{Reason: SignatureMissing}.ID()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.d.Message(tt.img, tt.node); got != tt.want {
				t.Errorf("message is\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// TestMessageLong: whatever is long, code, digest, rule and decision ID are there.
func TestMessageLong(t *testing.T) {
	long := strings.Repeat("é", 3000)
	d := Deny(SnapshotterUnverified, long)
	d.Rule = long
	img := Image{
		Name:   Name{Host: long, Path: long, Tag: long},
		Target: ocispec.Descriptor{Digest: digest.SHA512.FromString("x")},
	}
	for _, d := range []Decision{d, audit(d, Audit)} {
		m := d.Message(img, long)
		checkLine(t, m)
		for _, part := range []string{"[SNAPSHOTTER_UNVERIFIED]", img.Target.Digest.String(), `; rule "é`, "tidewaiter explain " + d.ID(), "...@sha512:"} {
			if !strings.Contains(m, part) {
				t.Errorf("message lacks %q: %s", part, m)
			}
		}
		if len(m) < MaxMessage-8 {
			t.Errorf("message has %d bytes and leaves room unused", len(m))
		}
	}
	m := Deny(Reason(long), long).Message(Image{Asked: long}, long)
	checkLine(t, m)
}

func checkLine(t *testing.T, m string) {
	t.Helper()
	if len(m) > MaxMessage {
		t.Errorf("message has %d bytes", len(m))
	}
	if !utf8.ValidString(m) {
		t.Errorf("message is not UTF-8: %q", m)
	}
	for _, r := range m {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			t.Errorf("message has a %U: %q", r, m)
		}
	}
	if !strings.HasPrefix(m, "tidewaiter: denied [") && !strings.HasPrefix(m, "tidewaiter: allowed [") {
		t.Errorf("message begins otherwise: %q", m)
	}
}

func FuzzMessage(f *testing.F) {
	f.Add(false, false, "SIGNATURE_MISSING", "prod", "edge-17", "why", "h", "p", "1", "sha256:ab", "h/p:1")
	f.Add(true, false, "", "", "", "", "", "", "", "", "")
	f.Add(true, true, "X", "\"", "\n", strings.Repeat("\u202e", 400), "\xff\xfe", "é", "\x00", strings.Repeat("a", 999), "`")
	f.Fuzz(func(t *testing.T, allow, audited bool, reason, rule, node, detail, host, path, tag, dig, asked string) {
		d := Decision{allowed: allow, Reason: Reason(reason), Rule: rule, Detail: detail}
		if audited {
			d = audit(d, Audit)
		}
		img := Image{Name: Name{Host: host, Path: path, Tag: tag, Digest: digest.Digest(dig)}, Asked: asked}
		m := d.Message(img, node)
		checkLine(t, m)
		if strings.HasPrefix(m, "tidewaiter: allowed [") != d.Allowed() {
			t.Errorf("allowed=%t, message %q", d.Allowed(), m)
		}
		if node != "" && !strings.HasSuffix(m, ": tidewaiter explain "+d.ID()) {
			t.Errorf("message does not end with the decision: %q", m)
		}
		raw, err := json.Marshal(d.Report(img, node))
		if err != nil || bytes.ContainsAny(raw, "\r\n") {
			t.Errorf("report is %q, %v", raw, err)
		}
		var r struct {
			Schema  string `json:"schema"`
			Allowed bool   `json:"allowed"`
			Reason  string `json:"reason"`
		}
		if err := json.Unmarshal(raw, &r); err != nil || r.Schema != Schema || r.Allowed != d.Allowed() || r.Reason == "" {
			t.Errorf("report is read as %+v, %v", r, err)
		}
	})
}

// TestReport pins the JSON form: scripts read it, so that a change here that is
// not an addition needs another Schema.
func TestReport(t *testing.T) {
	q := bound()
	f := good(q)
	f.Signer = Signer{Subject: "CN=build,O=Acme", Thumbprint: "ab12", Anchor: "ca:acme/root.crt"}
	f.Warnings = []Reason{RevocationUnknown}
	f.Ends = "certificate"
	yes := allow(q, one(f), start)
	yes.Rule, yes.Key, yes.Binding, yes.Revision = "prod", q.Key(), BoundRuntime, Revision{0xab}
	yes.Source, yes.Tried = "mirror http://10.0.0.5:5000", []Attempt{
		{Source: "store", Reason: SignatureMissing},
		{Source: "mirror http://10.0.0.5:5000", Reason: Verified, Seen: 2, Detail: "one was bad"},
	}
	for _, tt := range []struct {
		name string
		d    Decision
		img  Image
		want string
	}{
		{"allowed", yes, q.Image, "allowed.json"},
		{"audited fault", audit(Deny(ImageUnresolved, "x\ny"), Audit), Image{Asked: "a b"}, "audit.json"},
		{"zero", Decision{}, Image{}, "zero.json"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := json.MarshalIndent(tt.d.Report(tt.img, "edge-17"), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join("testdata", "report", tt.want))
			if err != nil {
				t.Fatal(err)
			}
			if got := string(raw) + "\n"; got != string(want) {
				t.Errorf("report is\n%s\nwant\n%s", got, want)
			}
		})
	}
	// A Decision by itself is the same form.
	raw, err := json.Marshal(struct{ D Decision }{yes})
	if err != nil || !strings.HasPrefix(string(raw), `{"D":{"schema":"tidewaiter.dev/decision/v1","id":"`+yes.ID()+`","allowed":true,"reason":"VERIFIED",`) {
		t.Errorf("decision is %s, %v", raw, err)
	}
	// What the pod wrote is said only where there is no name.
	asked := q.Image
	asked.Asked = "something else"
	if r := yes.Report(asked, ""); r.Image != "registry.local/app:1.2" {
		t.Errorf("the report is about %q", r.Image)
	}
	// A report is a copy.
	r := yes.Report(q.Image, "")
	r.Signers[0].Subject, r.Tried[0].Source = "changed", "changed"
	if yes.Signers[0].Subject == "changed" || yes.Tried[0].Source == "changed" {
		t.Error("a report shares memory with its decision")
	}
}
