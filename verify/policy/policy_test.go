package policy_test

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/notaryproject/notation-go/verifier/trustpolicy"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// document is a valid trust policy with one statement whose fields tests replace,
// one a line.
func document(replace map[string]string) string {
	fields := []struct{ key, value string }{
		{"name", `"prod"`},
		{"registryScopes", `["docker.io/library/nginx"]`},
		{"signatureVerification", `{"level": "strict"}`},
		{"trustStores", `["ca:acme", "tsa:acme"]`},
		{"trustedIdentities", `["x509.subject: C=US, ST=WA, O=acme"]`},
	}
	var lines []string
	for _, f := range fields {
		v := f.value
		if r, ok := replace[f.key]; ok {
			v = r
		}
		if v != "" {
			lines = append(lines, fmt.Sprintf("%q: %s", f.key, v))
		}
	}
	return "{\n\"version\": \"1.0\",\n\"trustPolicies\": [{\n" + strings.Join(lines, ",\n") + "\n}]}\n"
}

func TestParse(t *testing.T) {
	raw := `{
  "version": "1.0",
  "trustPolicies": [
    {
      "name": "images",
      "registryScopes": ["registry.acme.io/a", "Registry.Acme.io/b"],
      "signatureVerification": {"level": "strict", "override": {"expiry": "log", "revocation": "skip"}, "verifyTimestamp": "afterCertExpiry"},
      "trustStores": ["ca:acme", "signingAuthority:acme", "tsa:a.b_c-d"],
      "trustedIdentities": ["x509.subject: C=US, ST=WA, O=acme, OU=a", "x509.subject:C=US,S=WA,O=acme,OU=b"]
    },
    {"name": "unsigned", "registryScopes": ["registry.acme.io/tool"], "signatureVerification": {"level": "skip"}, "trustStores": null},
    {"name": "rest", "registryScopes": ["*"], "signatureVerification": {"level": "permissive"}, "trustStores": ["ca:acme"], "trustedIdentities": ["*"]}
  ]
}`
	got, err := policy.Parse([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	want := []verify.Statement{
		{
			Name: "images", Scopes: []string{"registry.acme.io/a", "Registry.Acme.io/b"}, Level: "strict",
			Override: map[string]string{"expiry": "log", "revocation": "skip"}, VerifyTimestamp: "afterCertExpiry",
			TrustStores:       []string{"ca:acme", "signingAuthority:acme", "tsa:a.b_c-d"},
			TrustedIdentities: []string{"x509.subject: C=US, ST=WA, O=acme, OU=a", "x509.subject:C=US,S=WA,O=acme,OU=b"},
		},
		{Name: "unsigned", Scopes: []string{"registry.acme.io/tool"}, Level: "skip"},
		{Name: "rest", Scopes: []string{"*"}, Level: "permissive", TrustStores: []string{"ca:acme"}, TrustedIdentities: []string{"*"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %#v\nwant %#v", got, want)
	}
}

// Each error names the field by its path, and the line.
func TestParseErrors(t *testing.T) {
	type fields = map[string]string
	const p = "trustPolicies[0]."
	const sv = p + "signatureVerification"
	level := func(rest string) string { return document(fields{"signatureVerification": "{\n" + rest + "}"}) }
	identities := func(list string) string { return document(fields{"trustedIdentities": "[\n" + list + "]"}) }
	two := func(a, b fields) string { // two statements, the second from line 9 on
		x, y := document(a), document(b)
		x = strings.TrimSuffix(x, "]}\n")
		return x + "," + y[strings.Index(y, "[{")+1:]
	}
	for name, c := range map[string]struct {
		raw, field, text string
		line             int
	}{
		"empty":             {"", "", "not JSON", 1},
		"truncated":         {document(nil)[:60], "", "not JSON: unexpected end", 5},
		"syntax":            {"{\n\n\"version\" 1}", "", "not JSON: invalid character '1'", 3},
		"trailing comma":    {"{\n\"version\": \"1.0\",\n}", "", "not JSON", 3},
		"trailing data":     {document(nil) + "\n{}", "", "not JSON: invalid character '{' after top-level value", 11},
		"two documents":     {document(nil) + document(nil), "", "after top-level", 10},
		"comment":           {"// x\n{}", "", "not JSON", 1},
		"not UTF-8":         {document(fields{"name": "\"\xff\""}), "", "not UTF-8", 0},
		"too long":          {document(nil) + strings.Repeat(" ", 1<<20), "", "longer than 1048576", 0},
		"nested":            {strings.Repeat("[", 200_000), "", "depth", 1},
		"nested but closed": {strings.Repeat("[", 100) + strings.Repeat("]", 100), strings.Repeat("[0]", 8), "nested too deep", 1},
		"not an object":     {"[]", "", "must be an object", 1},
		"null":              {"null", "", "must be an object", 1},

		"no version":          {`{"trustPolicies": []}`, "version", `must be "1.0"`, 1},
		"version 2":           {"{\n\"version\": \"2.0\", \"trustPolicies\": []}", "version", `must be "1.0"`, 2},
		"version number":      {"{\n\"version\": 1.0, \"trustPolicies\": []}", "version", "must be a string", 2},
		"version twice":       {"{\"version\": \"1.0\",\n\"version\": \"1.0\"}", "version", "given twice", 2},
		"escaped twice":       {"{\"version\": \"1.0\",\n\"\\u0076ersion\": \"1.0\"}", "version", "given twice", 2},
		"Version":             {"{\n\"Version\": \"1.0\"}", "Version", "unknown field; known are version, trustPolicies", 2},
		"no policies":         {"{\n\"version\": \"1.0\"}", "trustPolicies", "must be a list", 1},
		"policies are null":   {"{\"version\": \"1.0\",\n\"trustPolicies\": null}", "trustPolicies", "must be a list", 2},
		"policies are empty":  {"{\"version\": \"1.0\",\n\"trustPolicies\": []}", "trustPolicies", "has no statement", 2},
		"policy is a string":  {"{\"version\": \"1.0\", \"trustPolicies\": [\n\"x\"]}", "trustPolicies[0]", "must be an object", 2},
		"unknown at top":      {"{\"version\": \"1.0\",\n\"a\\nb\": 1, \"trustPolicies\": []}", "a b", "unknown field", 2},
		"unknown in policy":   {strings.Replace(document(nil), "trustStores", "truststores", 1), p + "truststores", "unknown field", 7},
		"blob's globalPolicy": {document(fields{"name": "\"x\",\n\"globalPolicy\": true"}), p + "globalPolicy", "unknown field", 5},
		"field twice":         {document(fields{"name": "\"x\",\n\"name\": \"x\""}), p + "name", "given twice", 5},

		"no name":                   {document(fields{"name": ""}), p + "name", "is required", 3},
		"empty name":                {document(fields{"name": `""`}), p + "name", "is required", 4},
		"name number":               {document(fields{"name": `1`}), p + "name", "must be a string", 4},
		"name with newline":         {document(fields{"name": `"a\nb"`}), p + "name", "printable", 4},
		"long name":                 {document(fields{"name": `"` + strings.Repeat("a", 257) + `"`}), p + "name", "256", 4},
		"same name":                 {two(fields{"registryScopes": `["a.b/c"]`}, nil), "trustPolicies[1].name", `another statement is named "prod"`, 10},
		"no scopes":                 {document(fields{"registryScopes": ""}), p + "registryScopes", "must list", 3},
		"null scopes":               {document(fields{"registryScopes": "null"}), p + "registryScopes", "must list", 5},
		"empty scopes":              {document(fields{"registryScopes": "[]"}), p + "registryScopes", "must list", 5},
		"scope string":              {document(fields{"registryScopes": `"*"`}), p + "registryScopes", "list of strings", 5},
		"scope number":              {document(fields{"registryScopes": "[\"a.b/c\",\n1]"}), p + "registryScopes[1]", "must be a string", 6},
		"scope with tag":            {document(fields{"registryScopes": `["a.b/c:1"]`}), p + "registryScopes[0]", "tag", 5},
		"scope upper-case":          {document(fields{"registryScopes": `["a.b/C"]`}), p + "registryScopes[0]", "lower-case", 5},
		"scope short":               {document(fields{"registryScopes": `["nginx"]`}), p + "registryScopes[0]", "fully qualified", 5},
		"star and more":             {document(fields{"registryScopes": `["a.b/c", "*"]`}), p + "registryScopes[1]", "alone", 5},
		"scope wildcard":            {document(fields{"registryScopes": `["a.b/*"]`}), p + "registryScopes[0]", "wildcard", 5},
		"scope twice":               {document(fields{"registryScopes": `["a.b/c", "a.b/c"]`}), p + "registryScopes[1]", "twice", 5},
		"scope of two":              {two(nil, fields{"name": `"b"`}), "trustPolicies[1].registryScopes[0]", `of statement "prod" too`, 11},
		"alias of two":              {two(nil, fields{"name": `"b"`, "registryScopes": `["Index.docker.io:443/nginx"]`}), "trustPolicies[1].registryScopes[0]", `"docker.io/library/nginx" is a scope of statement "prod" too`, 11},
		"star of two":               {two(fields{"registryScopes": `["*"]`}, fields{"name": `"b"`, "registryScopes": `["*"]`}), "trustPolicies[1].registryScopes[0]", "too", 11},
		"skip with star":            {document(fields{"registryScopes": `["*"]`, "signatureVerification": `{"level": "skip"}`, "trustStores": "", "trustedIdentities": ""}), sv + ".level", `skip must not be used with scope "*"`, 6},
		"skip with stores":          {document(fields{"signatureVerification": `{"level": "skip"}`, "trustedIdentities": ""}), p + "trustStores", "remove", 7},
		"skip, identities":          {document(fields{"signatureVerification": `{"level": "skip"}`, "trustStores": ""}), p + "trustedIdentities", "remove", 7},
		"skip overridden":           {level("\"level\": \"skip\",\n\"override\": {\"expiry\": \"log\"}"), sv + ".override", "cannot be overridden", 8},
		"no verification":           {document(fields{"signatureVerification": ""}), sv, "is required", 3},
		"verification text":         {document(fields{"signatureVerification": `"strict"`}), sv, "must be an object", 6},
		"no level":                  {level(`"override": {}`), sv + ".level", "is required", 6},
		"bad level":                 {level(`"level": "Strict"`), sv + ".level", `"Strict" is not strict`, 7},
		"level null":                {level(`"level": null`), sv + ".level", "must be a string", 7},
		"overide":                   {level("\"level\": \"strict\",\n\"overide\": {}"), sv + ".overide", "unknown field", 8},
		"integrity":                 {level("\"level\": \"strict\", \"override\": {\n\"integrity\": \"log\"}"), sv + ".override.integrity", "unknown field; known are authenticity", 8},
		"override list":             {level(`"level": "strict", "override": []`), sv + ".override", "must be an object", 7},
		"override value":            {level(`"level": "strict", "override": {"expiry": "warn"}`), sv + ".override.expiry", `"warn" is not enforce`, 7},
		"override bool":             {level(`"level": "strict", "override": {"expiry": true}`), sv + ".override.expiry", "must be a string", 7},
		"override skip":             {level(`"level": "strict", "override": {"expiry": "skip"}`), sv + ".override.expiry", "only revocation", 7},
		"override twice":            {level(`"level": "strict", "override": {"expiry": "log", "expiry": "enforce"}`), sv + ".override.expiry", "given twice", 7},
		"timestamp":                 {level(`"level": "strict", "verifyTimestamp": "never"`), sv + ".verifyTimestamp", `"never" is not always`, 7},
		"timestamp empty":           {level(`"level": "strict", "verifyTimestamp": ""`), sv + ".verifyTimestamp", "must be always", 7},
		"no stores":                 {document(fields{"trustStores": ""}), p + "trustStores", "must list", 3},
		"empty stores":              {document(fields{"trustStores": "[]"}), p + "trustStores", "must list", 7},
		"store without type":        {document(fields{"trustStores": `["acme"]`}), p + "trustStores[0]", "is not ca:NAME", 7},
		"store type":                {document(fields{"trustStores": `["ca:x", "CA:acme"]`}), p + "trustStores[1]", "is not ca:NAME", 7},
		"store name":                {document(fields{"trustStores": `["ca:a/b"]`}), p + "trustStores[0]", "a store's name", 7},
		"store dots":                {document(fields{"trustStores": `["ca:.."]`}), p + "trustStores[0]", "a store's name", 7},
		"store newline":             {document(fields{"trustStores": `["ca:a\n"]`}), p + "trustStores[0]", "a store's name", 7},
		"store joined":              {document(fields{"trustStores": `["ca:a,tsa:b"]`}), p + "trustStores[0]", "a store's name", 7},
		"many stores":               {document(fields{"trustStores": `["ca:a"` + strings.Repeat(`,"ca:a"`, 200) + `]`}), p + "trustStores", "more than 200", 7},
		"no identities":             {document(fields{"trustedIdentities": ""}), p + "trustedIdentities", "must list", 3},
		"empty identities":          {identities(""), p + "trustedIdentities", "must list", 8},
		"identity number":           {identities("7"), p + "trustedIdentities[0]", "must be a string", 9},
		"identity empty":            {identities(`""`), p + "trustedIdentities[0]", "is not", 9},
		"identity star":             {identities("\"x509.subject: C=US, ST=WA, O=acme\",\n\"*\""), p + "trustedIdentities[1]", "alone", 10},
		"identity bare":             {identities(`"C=US, ST=WA, O=acme"`), p + "trustedIdentities[0]", "is not", 9},
		"identity no DN":            {identities(`"x509.subject:"`), p + "trustedIdentities[0]", "C is missing", 9},
		"only a tsa store":          {document(fields{"trustStores": `["tsa:acme"]`}), p + "trustStores", "trusts timestamps and no signer", 7},
		"another kind of identity":  {identities(`"subject: C=US, ST=WA, O=acme"`), p + "trustedIdentities[0]", `"subject" is a kind of identity that cannot be judged: write "x509.subject: `, 9},
		"capital letters of a kind": {identities(`"x509.Subject: C=US, ST=WA, O=acme"`), p + "trustedIdentities[0]", "cannot be judged", 9},
		"ARN":                       {identities(`"arn:aws:signer:eu-west-1:1:/signing-profiles/p"`), p + "trustedIdentities[0]", "an ARN names no certificate", 9},
		"comma":                     {identities(`"x509.subject: C=US, ST=WA, O=Acme, Inc."`), p + "trustedIdentities[0]", `"Inc." is no NAME=value; a comma inside a value is written \, (in JSON \\,)`, 9},
		"quotes":                    {identities(`"x509.subject: C=US, ST=WA, O=\"Acme, Inc.\""`), p + "trustedIdentities[0]", "quotes do not hold a value together", 9},
		"small letters":             {identities(`"x509.subject: c=US, st=WA, o=Acme"`), p + "trustedIdentities[0]", "C is missing: capital letters count, write C", 9},
		"no province":               {identities(`"x509.subject: C=DE, O=Acme GmbH"`), p + "trustedIdentities[0]", `ST is missing; a certificate whose subject has none can be trusted only with "*"`, 9},
		"slashes":                   {identities(`"x509.subject: /C=US/ST=WA/O=Acme"`), p + "trustedIdentities[0]", "has slashes, as older openssl prints a subject", 9},
		"odd escape":                {identities(`"x509.subject: C=US, ST=WA, O=a\\"`), p + "trustedIdentities[0]", "not a distinguished name: ", 9},
		"identity junk":             {identities(`"x509.subject: junk"`), p + "trustedIdentities[0]", "not a distinguished name", 9},
		"identity no ST":            {identities(`"x509.subject: C=US, O=acme"`), p + "trustedIdentities[0]", "ST is missing", 9},
		"identity e-mail":           {identities(`"x509.subject: C=US, ST=WA, O=acme, 1.2.840.113549.1.9.1=#0c01"`), p + "trustedIdentities[0]", "e-mail", 9},
		"identity two OUs":          {identities(`"x509.subject: C=US, ST=WA, O=acme, OU=a, OU=b"`), p + "trustedIdentities[0]", "OU twice", 9},
		"identity S and ST":         {identities(`"x509.subject: C=US, S=WA, ST=WA, O=acme"`), p + "trustedIdentities[0]", "ST twice", 9},
		"identity multi":            {identities(`"x509.subject: C=US, ST=WA, O=acme, OU=a+CN=b"`), p + "trustedIdentities[0]", "joins", 9},
		"identity overlap":          {identities("\"x509.subject: C=US, ST=WA, O=acme, OU=a\",\n\"x509.subject: O=acme, ST=WA, C=US\""), p + "trustedIdentities[1]", "overlaps with trustedIdentities[0]", 10},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := policy.Parse([]byte(c.raw))
			var e *policy.Error
			if !errors.As(err, &e) {
				t.Fatalf("got %v, %v; want an *Error", list, err)
			}
			if list != nil || e.Field != c.field || e.Line != c.line || !strings.Contains(e.Text, c.text) {
				t.Errorf("got line %d, field %q, text %q\nwant line %d, field %q, text with %q", e.Line, e.Field, e.Text, c.line, c.field, c.text)
			}
		})
	}
}

// FuzzParse: no panic, and what is accepted is accepted by notation-go too, by
// the same statements, and by New.
func FuzzParse(f *testing.F) {
	f.Add([]byte(document(nil)))
	f.Add([]byte(document(map[string]string{"registryScopes": `["*"]`, "trustedIdentities": `["*"]`})))
	f.Add([]byte(document(map[string]string{"signatureVerification": `{"level":"audit","override":{"authenticity":"enforce","revocation":"skip"},"verifyTimestamp":"always"}`})))
	f.Add([]byte(document(map[string]string{"trustedIdentities": `["x509.subject: C=US, S=W\\,A, O=\\20a, OU=", "plugin: x"]`})))
	f.Add([]byte(document(map[string]string{"signatureVerification": `{"level":"skip"}`, "trustStores": "null", "trustedIdentities": "[]"})))
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := policy.Parse(raw)
		if err != nil {
			if list != nil {
				t.Fatal("statements beside an error")
			}
			return
		}
		var doc trustpolicy.Document
		if err := json.Unmarshal(raw, &doc); err != nil {
			t.Fatal(err)
		}
		if len(doc.TrustPolicies) != len(list) {
			t.Fatalf("notation reads %d statements, not %d", len(doc.TrustPolicies), len(list))
		}
		extended := false
		for i, s := range list {
			n := doc.TrustPolicies[i]
			if n.Name != s.Name || n.SignatureVerification.VerificationLevel != s.Level || len(n.SignatureVerification.Override) != len(s.Override) ||
				string(n.SignatureVerification.VerifyTimestamp) != s.VerifyTimestamp || fmt.Sprint(n.RegistryScopes, n.TrustStores, n.TrustedIdentities) != fmt.Sprint(s.Scopes, s.TrustStores, s.TrustedIdentities) {
				t.Fatalf("notation reads %#v, not %#v", n, s)
			}
			for _, scope := range s.Scopes {
				host, _, _ := strings.Cut(scope, "/")
				extended = extended || strings.ContainsAny(host, "[") || strings.HasSuffix(strings.TrimRight(host, ":0123456789"), ".")
			}
		}
		if err := doc.Validate(); err != nil && !extended {
			t.Fatalf("notation refuses: %v", err)
		}
		if _, _, err := policy.New(list, verify.Enforce, requirement); err != nil {
			t.Fatal(err)
		}
	})
}

func requirement(statement string) (*verify.Requirement, error) {
	return verify.SignedBy(verify.Leaf{Kind: "test", Authority: statement, Hash: sha256.Sum256([]byte(statement))})
}

func statement(name, scope string) verify.Statement {
	return verify.Statement{
		Name: name, Scopes: []string{scope}, Level: "strict",
		TrustStores: []string{"ca:acme"}, TrustedIdentities: []string{"x509.subject: C=US, ST=WA, O=acme"},
	}
}

func build(t *testing.T, mode verify.Mode, list ...verify.Statement) (*policy.Policy, []policy.Warning) {
	t.Helper()
	p, warnings, err := policy.New(list, mode, requirement)
	if err != nil {
		t.Fatal(err)
	}
	return p, warnings
}

func image(t *testing.T, name string) verify.Image {
	t.Helper()
	n, err := policy.ParseName(name)
	if err != nil {
		t.Fatal(err)
	}
	return verify.Image{Name: n}
}

func TestSelect(t *testing.T) {
	p, warnings := build(t, verify.Enforce,
		statement("nginx", "index.docker.io/nginx"), statement("app", "registry.acme.internal:5000/team/app"),
		statement("six", "[2001:DB8::1]/a"), statement("rest", "*"))
	if len(warnings) != 2 {
		t.Errorf("warnings %v, want those about the two spellings", warnings)
	}
	for name, want := range map[string]string{
		"nginx:1.27":                                "nginx",
		"Docker.io./library/nginx":                  "nginx",
		"registry.acme.internal:5000/team/app":      "app",
		"registry.acme.internal/team/app":           "rest",
		"registry.acme.internal:5000/team":          "rest",
		"registry.acme.internal:5000/team/app/more": "rest",
		"[2001:db8:0::1]:443/a":                     "six",
		"nginx/nginx":                               "rest",
	} {
		r := p.Select(image(t, name))
		if r.Name != want || len(r.Require.Leaves()) != 1 || r.Require.Leaves()[0].Authority != want || r.Require.Hash() != sha256.Sum256([]byte(want)) || r.Fixed != "" {
			t.Errorf("Select(%q) = %+v, want rule %q", name, r, want)
		}
	}
	// The statement for everything else is for what has a name.
	for _, n := range []verify.Name{{}, {Host: "docker.io"}, {Path: "library/nginx"}, {Tag: "1"}} {
		if r := p.Select(verify.Image{Name: n}); r.Fixed != verify.PolicyNoMatch || r.Require != nil {
			t.Errorf("an image called %q selects %+v", n, r)
		}
	}
}

func TestSelectNothing(t *testing.T) {
	p, _ := build(t, verify.Enforce, statement("nginx", "docker.io/library/nginx"))
	for _, p := range []*policy.Policy{p, {}} {
		r := p.Select(image(t, "quay.io/other/app:1"))
		if r.Fixed != verify.PolicyNoMatch || r.Require != nil || !strings.Contains(r.Detail, "quay.io/other/app") || !strings.Contains(r.Detail, "registryScopes") {
			t.Errorf("Select = %+v", r)
		}
	}
}

// Statements that a stranger's signature meets settle as POLICY_INVALID in both
// modes.
func TestWeakStatements(t *testing.T) {
	weak := map[string]func(*verify.Statement){
		"level skip":                func(s *verify.Statement) { s.Level, s.TrustStores, s.TrustedIdentities = "skip", nil, nil },
		"level audit":               func(s *verify.Statement) { s.Level = "audit" },
		"audit, authenticity again": func(s *verify.Statement) { s.Level, s.Override = "audit", map[string]string{"authenticity": "enforce"} },
		"authenticity: log":         func(s *verify.Statement) { s.Override = map[string]string{"authenticity": "log"} },
		"permissive, authenticity": func(s *verify.Statement) {
			s.Level, s.Override = "permissive", map[string]string{"authenticity": "log"}
		},
	}
	for name, change := range weak {
		for _, mode := range []verify.Mode{verify.Enforce, verify.Audit} {
			s := statement("weak", "docker.io/library/nginx")
			change(&s)
			p, warnings, err := policy.New([]verify.Statement{s}, mode, func(string) (*verify.Requirement, error) {
				t.Errorf("%s: the requirement was asked for", name)
				return requirement("x")
			})
			if err != nil {
				t.Fatal(err)
			}
			if len(warnings) == 0 || !strings.Contains(warnings[0].Field, "signatureVerification") {
				t.Errorf("%s, %v: warnings %v", name, mode, warnings)
			}
			r := p.Select(image(t, "nginx"))
			if r.Fixed != verify.PolicyInvalid || r.Require != nil || r.Name != "weak" || !strings.Contains(r.Detail, "strict") {
				t.Errorf("%s, %v: rule %+v", name, mode, r)
			}
		}
	}
	s := statement("strong", "docker.io/library/nginx")
	s.Override = map[string]string{"authenticity": "enforce"}
	p, warnings := build(t, verify.Enforce, s)
	if r := p.Select(image(t, "nginx")); r.Fixed != "" || r.Require.Leaves()[0].Authority != "strong" || len(warnings) != 0 {
		t.Errorf("rule %+v, warnings %v", r, warnings)
	}
}

func TestNewRefuses(t *testing.T) {
	if _, _, err := policy.New(nil, verify.Enforce, requirement); err == nil {
		t.Error("no statements were accepted")
	}
	bad := statement("a", "docker.io/library/nginx")
	bad.Override = map[string]string{"integrity": "log"}
	if _, _, err := policy.New([]verify.Statement{bad}, verify.Enforce, requirement); err == nil {
		t.Error("an override of integrity was accepted")
	}
	none := func(s string) (*verify.Requirement, error) {
		return verify.SignedBy(verify.Leaf{Kind: "test", Authority: s})
	}
	if _, _, err := policy.New([]verify.Statement{statement("a", "*")}, verify.Enforce, none); err == nil {
		t.Error("a statement without requirement was accepted")
	}
}

func TestLint(t *testing.T) {
	const p = "trustPolicies[0]."
	for name, c := range map[string]struct {
		change      func(*verify.Statement)
		field, text string // field "" wants no warning
	}{
		"clean":         {func(*verify.Statement) {}, "", ""},
		"permissive":    {func(s *verify.Statement) { s.Level = "permissive" }, p + "signatureVerification.level", "only logged"},
		"override":      {func(s *verify.Statement) { s.Override = map[string]string{"revocation": "skip"} }, p + "signatureVerification.override.revocation", "(skip)"},
		"enforced":      {func(s *verify.Statement) { s.Override = map[string]string{"expiry": "enforce"} }, "", ""},
		"alias":         {func(s *verify.Statement) { s.Scopes = []string{"docker.io/a/b", "docker.io:443/a/b"} }, p + "registryScopes[1]", `same repository as "docker.io/a/b"`},
		"spelling":      {func(s *verify.Statement) { s.Scopes = []string{"docker.io/nginx"} }, p + "registryScopes[0]", `is read as "docker.io/library/nginx"`},
		"no host":       {func(s *verify.Statement) { s.Scopes = []string{"library/nginx"} }, p + "registryScopes[0]", `means "docker.io/library/nginx"`},
		"host LOCAL":    {func(s *verify.Statement) { s.Scopes = []string{"LOCAL/nginx"} }, p + "registryScopes[0]", `is read as "local:443/nginx"`},
		"store twice":   {func(s *verify.Statement) { s.TrustStores = []string{"ca:acme", "ca:acme"} }, p + "trustStores[1]", "twice"},
		"timestamp":     {func(s *verify.Statement) { s.VerifyTimestamp = "always" }, p + "signatureVerification.verifyTimestamp", "no effect"},
		"anybody":       {func(s *verify.Statement) { s.TrustedIdentities = []string{"*"} }, p + "trustedIdentities[0]", "every certificate"},
		"lower-case cn": {func(s *verify.Statement) { s.TrustedIdentities[0] += ", cn=x" }, p + "trustedIdentities[0]", `attribute "cn" never matches`},
		"E":             {func(s *verify.Statement) { s.TrustedIdentities[0] += ", E=a@b" }, p + "trustedIdentities[0]", "never matches"},
	} {
		t.Run(name, func(t *testing.T) {
			s := statement("one", "docker.io/a/b")
			c.change(&s)
			_, warnings := build(t, verify.Enforce, s)
			if c.field == "" {
				if len(warnings) != 0 {
					t.Errorf("got %v, want none", warnings)
				}
				return
			}
			if len(warnings) != 1 || warnings[0].Statement != "one" || warnings[0].Field != c.field || !strings.Contains(warnings[0].Text, c.text) {
				t.Errorf("got %v, want one at %s about %q", warnings, c.field, c.text)
			}
		})
	}
}

// The gate selects for every container.
func TestSelectAllocatesNothing(t *testing.T) {
	p, _ := build(t, verify.Enforce, statement("nginx", "docker.io/library/nginx"), statement("rest", "*"))
	img, other := image(t, "nginx"), image(t, "quay.io/a/b")
	if n := testing.AllocsPerRun(100, func() { p.Select(img); p.Select(other) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestBounds: a policy as long as it may be is taken, and one that is longer is not.
func TestBounds(t *testing.T) {
	many := func(n int, format string) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprintf(format, i))
		}
		return list
	}
	statements := func(n int) (list []verify.Statement) {
		for _, name := range many(n, "s%d") {
			list = append(list, statement(name, "registry.acme.io/"+name))
		}
		return list
	}
	one := func(change func(*verify.Statement)) []verify.Statement {
		s := statement("one", "registry.acme.io/one")
		change(&s)
		return []verify.Statement{s}
	}
	for name, c := range map[string]struct {
		list func(n int) []verify.Statement
		most int
	}{
		"statements": {statements, 1000},
		"scopes": {func(n int) []verify.Statement {
			return one(func(s *verify.Statement) { s.Scopes = many(n, "registry.acme.io/a%d") })
		}, 10_000},
		"trust stores": {func(n int) []verify.Statement {
			return one(func(s *verify.Statement) { s.TrustStores = many(n, "ca:a%d") })
		}, 200},
		"identities": {func(n int) []verify.Statement {
			return one(func(s *verify.Statement) { s.TrustedIdentities = many(n, "x509.subject: C=US, ST=WA, O=acme, CN=%d") })
		}, 200},
		"bytes of a name": {func(n int) []verify.Statement {
			return one(func(s *verify.Statement) { s.Name = strings.Repeat("a", n) })
		}, 256},
		"bytes of a trust store's name": {func(n int) []verify.Statement {
			return one(func(s *verify.Statement) { s.TrustStores = []string{"ca:" + strings.Repeat("a", n)} })
		}, 255},
	} {
		if _, _, err := policy.New(c.list(c.most), verify.Enforce, requirement); err != nil {
			t.Errorf("%d %s: %v", c.most, name, err)
		}
		if _, _, err := policy.New(c.list(c.most+1), verify.Enforce, requirement); err == nil {
			t.Errorf("%d %s are accepted", c.most+1, name)
		}
	}
}
