package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// Limits of a trust policy. The format has none of its own.
const (
	MaxBytes      = 1 << 20 // of the file
	maxStatements = 1000
	maxScopes     = 10000 // in one statement
	maxTrust      = 200   // trust stores, and identities, in one statement
	maxDepth      = 8     // a valid file nests five deep
)

// An Error says what is wrong with a trust policy, and where.
type Error struct {
	Line  int    // in the file, from 1; 0 where there is no file
	Field string // "trustPolicies[2].signatureVerification.level"; empty for the whole
	Text  string // one clause
}

// Error implements error.
func (e *Error) Error() string {
	s := e.Text
	if e.Field != "" {
		s = e.Field + ": " + s
	}
	if e.Line > 0 {
		s = "line " + strconv.Itoa(e.Line) + ": " + s
	}
	return s
}

// Parse reads a Notary Project trust policy for OCI artifacts, version 1.0
// (trust-store-trust-policy.md), as `notation policy` writes it. What it accepts
// passes notation-go's trustpolicy.Document.Validate too, apart from scopes that
// ParseScope allows on top, and what the specification asks for besides: skip is
// refused with scope "*", and scopes are compared in canonical form.
//
// It is strict where encoding/json is not: unknown fields, keys in another case,
// duplicate keys, trailing data and invalid UTF-8 are errors, and the file has at
// most 1 MiB and 1,000 statements, each with at most 10,000 scopes, 200 trust
// stores and 200 identities. null stands for a list that is not there, since Go
// programs write it so. Every error is an [*Error].
func Parse(raw []byte) ([]verify.Statement, error) {
	root, lines, bad := tree(raw)
	if bad != nil {
		return nil, bad
	}
	r := reader{lines: lines}
	list := r.document(root)
	if r.err == nil {
		r.err = validate(list)
	}
	if r.err != nil {
		r.err.Line = r.line(r.err.Field)
		return nil, r.err
	}
	return list, nil
}

// object is a JSON object; the other values are those of json.Decoder.Token and
// []any.
type object map[string]any

// tree reads raw into objects, lists and values, and notes the line of each by
// its path.
func tree(raw []byte) (any, map[string]int, *Error) {
	if len(raw) > MaxBytes {
		return nil, nil, &Error{Text: fmt.Sprintf("longer than %d bytes", MaxBytes)}
	}
	if !utf8.Valid(raw) {
		return nil, nil, &Error{Text: "not UTF-8"}
	}
	// This looks at the whole of raw, so that nothing may follow the document.
	var all json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		at := len(raw)
		if s := (*json.SyntaxError)(nil); errors.As(err, &s) {
			at = int(s.Offset)
		}
		return nil, nil, &Error{Line: 1 + bytes.Count(raw[:at], []byte("\n")), Text: "not JSON: " + err.Error()}
	}
	t := treeReader{raw: raw, dec: json.NewDecoder(bytes.NewReader(raw)), line: 1, lines: map[string]int{}}
	t.dec.UseNumber()
	root, err := t.value("", 0)
	return root, t.lines, err
}

type treeReader struct {
	raw   []byte
	dec   *json.Decoder
	at    int64 // offset up to which newlines are counted
	line  int
	lines map[string]int
}

func (t *treeReader) token() (json.Token, error) {
	tok, err := t.dec.Token()
	end := t.dec.InputOffset()
	t.line += bytes.Count(t.raw[t.at:end], []byte("\n"))
	t.at = end
	return tok, err
}

func (t *treeReader) fail(path, text string) *Error {
	return &Error{Line: t.line, Field: path, Text: text}
}

func (t *treeReader) value(path string, depth int) (any, *Error) {
	tok, err := t.token()
	if err != nil {
		return nil, t.fail(path, err.Error())
	}
	t.lines[path] = t.line
	delim, nested := tok.(json.Delim)
	if !nested {
		return tok, nil
	}
	if depth == maxDepth {
		return nil, t.fail(path, "nested too deep")
	}
	o, list := object{}, []any{}
	for t.dec.More() {
		at, key := fmt.Sprintf("%s[%d]", path, len(list)), ""
		if delim == '{' {
			k, err := t.token()
			if err != nil {
				return nil, t.fail(path, err.Error())
			}
			key, _ = k.(string)
			at = join(path, text.Clean(key, 64))
			if _, twice := o[key]; twice {
				return nil, t.fail(at, "given twice")
			}
		}
		v, bad := t.value(at, depth+1)
		if bad != nil {
			return nil, bad
		}
		if delim == '{' {
			o[key] = v
		} else {
			list = append(list, v)
		}
	}
	if _, err := t.token(); err != nil { // the closing delimiter
		return nil, t.fail(path, err.Error())
	}
	if delim == '{' {
		return o, nil
	}
	return list, nil
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// reader turns the tree into statements. It keeps the first error.
type reader struct {
	lines map[string]int
	err   *Error
}

// line is where path stands, or else what it would stand in.
func (r *reader) line(path string) int {
	for path != "" && r.lines[path] == 0 {
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	return r.lines[path]
}

func (r *reader) fail(path, text string) {
	if r.err == nil {
		r.err = &Error{Field: path, Text: text}
	}
}

// document reads the whole file.
func (r *reader) document(root any) []verify.Statement {
	doc := r.object(root, "", "version", "trustPolicies")
	if v := r.text(doc, "", "version"); v != "1.0" {
		r.fail("version", `must be "1.0"`)
	}
	entries, ok := doc["trustPolicies"].([]any)
	if !ok {
		r.fail("trustPolicies", "must be a list of statements")
	}
	list := make([]verify.Statement, 0, len(entries))
	for i, e := range entries {
		list = append(list, r.statement(e, statementPath(i)))
	}
	return list
}

func (r *reader) statement(v any, path string) verify.Statement {
	o := r.object(v, path, "name", "registryScopes", "signatureVerification", "trustStores", "trustedIdentities")
	s := verify.Statement{
		Name:              r.text(o, path, "name"),
		Scopes:            r.list(o, path, "registryScopes"),
		TrustStores:       r.list(o, path, "trustStores"),
		TrustedIdentities: r.list(o, path, "trustedIdentities"),
	}
	path = join(path, "signatureVerification")
	sv, there := o["signatureVerification"]
	if !there {
		r.fail(path, "is required")
		return s
	}
	o = r.object(sv, path, "level", "override", "verifyTimestamp")
	s.Level = r.text(o, path, "level")
	s.VerifyTimestamp = r.text(o, path, "verifyTimestamp")
	if _, there := o["verifyTimestamp"]; there && s.VerifyTimestamp == "" {
		r.fail(join(path, "verifyTimestamp"), "must be always or afterCertExpiry")
	}
	if v, there := o["override"]; there {
		path = join(path, "override")
		checks := r.object(v, path, overridable...)
		for key := range checks {
			if s.Override == nil {
				s.Override = map[string]string{}
			}
			s.Override[key] = r.text(checks, path, key)
		}
	}
	return s
}

// object wants an object with no other fields than keys.
func (r *reader) object(v any, path string, keys ...string) object {
	o, ok := v.(object)
	if !ok {
		r.fail(path, "must be an object")
	}
	// In order, so that the same file always gives the same error.
	for _, key := range slices.Sorted(maps.Keys(o)) {
		if !slices.Contains(keys, key) {
			r.fail(join(path, text.Clean(key, 64)), "unknown field; known are "+strings.Join(keys, ", "))
		}
	}
	return o
}

// text wants a string; a missing one is empty.
func (r *reader) text(o object, path, key string) string {
	v, there := o[key]
	s, ok := v.(string)
	if there && !ok {
		r.fail(join(path, key), "must be a string")
	}
	return s
}

// list wants a list of strings; one that is missing or null is nil.
func (r *reader) list(o object, path, key string) []string {
	path = join(path, key)
	v := o[key]
	if v == nil {
		return nil
	}
	entries, ok := v.([]any)
	if !ok {
		r.fail(path, "must be a list of strings")
	}
	list := make([]string, 0, len(entries))
	for i, e := range entries {
		s, ok := e.(string)
		if !ok {
			r.fail(index(path, i), "must be a string")
		}
		list = append(list, s)
	}
	return list
}

func statementPath(i int) string { return index("trustPolicies", i) }

func index(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }
