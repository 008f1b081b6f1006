package config

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/tidewaiter/tidewaiter/verify/text"
)

func (r *reader) fail(n *yaml.Node, field, format string, args ...any) {
	if r.err == nil {
		r.err = &Error{File: r.file, Line: n.Line, Field: field, Text: fmt.Sprintf(format, args...)}
	}
}

// syntax is an error of the YAML parser, which leaves out the line where that is 1.
func (r *reader) syntax(err error) error {
	e := &Error{File: r.file, Line: 1, Text: "not YAML: " + yamlError.ReplaceAllString(err.Error(), "")}
	if m := yamlError.FindStringSubmatch(err.Error()); m != nil && m[1] != "" {
		e.Line, _ = strconv.Atoi(m[1])
	}
	return e
}

// plain refuses what makes one node stand in several places.
func (r *reader) plain(n *yaml.Node) {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		r.fail(n, "", "anchors and aliases are not supported")
		return
	}
	for _, sub := range n.Content {
		r.plain(sub)
	}
}

func (r *reader) names(n *yaml.Node, path string, form *regexp.Regexp, what string) (list []string) {
	for i, v := range r.sequence(n, path, maxNames) {
		s := r.text(v, index(path, i))
		if len(s) > maxName || !form.MatchString(s) {
			r.fail(v, index(path, i), "%s is not %s", text.Quote(s, 64), what)
		}
		if slices.Contains(list, s) {
			r.fail(v, index(path, i), "is listed twice")
		}
		list = append(list, s)
	}
	return list
}

// mapping wants a mapping with no other keys than these.
func (r *reader) mapping(n *yaml.Node, path string, keys ...string) map[string]*yaml.Node {
	if n.Kind != yaml.MappingNode || n.ShortTag() != "!!map" {
		what := "must be a mapping"
		if path == "" {
			what = "the file must be a mapping"
		}
		r.fail(n, path, "%s of %s", what, strings.Join(keys, ", "))
		return nil
	}
	fields := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		at := text.Clean(k.Value, 64)
		if path != "" {
			at = path + "." + at
		}
		if k.Kind != yaml.ScalarNode || k.ShortTag() != "!!str" || !slices.Contains(keys, k.Value) {
			r.fail(k, at, "unknown key; known are %s", strings.Join(keys, ", "))
		}
		if fields[k.Value] != nil {
			r.fail(k, at, "given twice")
		}
		fields[k.Value] = v
	}
	return fields
}

// sequence wants a list of 1 to limit entries; a node that is not there is none.
func (r *reader) sequence(n *yaml.Node, path string, limit int) []*yaml.Node {
	if n == nil {
		return nil
	}
	switch {
	case n.Kind != yaml.SequenceNode || n.ShortTag() != "!!seq":
		r.fail(n, path, "must be a list")
		return nil
	case len(n.Content) == 0:
		r.fail(n, path, "is empty: leave it out")
	case len(n.Content) > limit:
		r.fail(n, path, "has more than %d entries", limit)
		return nil
	}
	return n.Content
}

func (r *reader) text(n *yaml.Node, path string) string {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		r.fail(n, path, "must be text")
	}
	return n.Value
}

func (r *reader) boolean(n *yaml.Node, path string) (b bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Decode(&b) != nil {
		r.fail(n, path, "must be true or false")
	}
	return b
}

// integer wants a number from lo to hi; a node that is not there is 0.
func (r *reader) integer(n *yaml.Node, path string, lo, hi int64) int64 {
	if n == nil {
		return 0
	}
	var i int64
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || n.Decode(&i) != nil {
		r.fail(n, path, "must be a whole number")
	} else if i < lo || i > hi {
		r.fail(n, path, "must be from %d to %d", lo, hi)
	}
	return i
}

// duration wants text such as 50ms, from lo to hi; a node that is not there is 0.
func (r *reader) duration(n *yaml.Node, path string, lo, hi time.Duration) time.Duration {
	if n == nil {
		return 0
	}
	t, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		r.fail(n, path, "must be a duration with its unit, for example 50ms")
	} else if t < lo || t > hi {
		r.fail(n, path, "must be from %v to %v", lo, hi)
	}
	return t
}

func index(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// printable refuses text with what a terminal would not show.
func printable(s string) error {
	if text.Clean(s, len(s)) != s {
		return errors.New("holds what is not printable")
	}
	return nil
}
