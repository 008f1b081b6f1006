package text

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	for _, tt := range []struct {
		in    string
		limit int
		want  string
	}{
		{in: "", limit: 0, want: ""},
		{in: "abc", limit: 3, want: "abc"},
		{in: "abcd", limit: 3, want: "..."},
		{in: "abcdef", limit: 5, want: "ab..."},
		{in: "abc", limit: 2, want: ".."},
		{in: "abc", limit: 1, want: "."},
		{in: "abc", limit: 0, want: ""},
		{in: "abc", limit: -5, want: ""},
		{in: "ééé", limit: 5, want: "é..."},
		{in: "aéé", limit: 4, want: "a..."},
		{in: "a\nb", limit: 9, want: "a b"},
		{in: "\x00\x7f\u0085\u200b\u202e\ufeff", limit: 20, want: "      "},
		{in: "a\xffb", limit: 9, want: "a b"},
		{in: "日本 ok 🚢", limit: 40, want: "日本 ok 🚢"},
	} {
		if got := Clean(tt.in, tt.limit); got != tt.want {
			t.Errorf("Clean(%q, %d) is %q, want %q", tt.in, tt.limit, got, tt.want)
		}
	}
	if got := Quote("a\"b\n", 9); got != `"a'b "` {
		t.Errorf("Quote is %s", got)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("abc", 2)
	f.Add("éé\xff", 3)
	f.Add("", -1)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit %= 1 << 16
		got := Clean(s, limit)
		if len(got) > max(limit, 0) || !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("Clean(%q, %d) is %q", s, limit, got)
		}
		if q := Quote(s, limit); len(q) > max(limit, 0)+2 || strings.Count(q, `"`) != 2 || q[0] != '"' || q[len(q)-1] != '"' {
			t.Errorf("Quote(%q, %d) is %q", s, limit, q)
		}
	})
}
