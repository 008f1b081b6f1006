// Package text makes strings that others wrote fit for one line of a message, a log or
// a terminal. It imports nothing of this module, so that every room can use it.
package text

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Clean returns s fit for one line: a space stands for each control character, each
// character that is not printable, and each byte that is not UTF-8. The result has at
// most limit bytes and is cut between characters. Clean keeps nothing and is safe for
// concurrent use.
func Clean(s string, limit int) string {
	limit = max(limit, 0)
	if len(s) > 4*limit {
		s = s[:4*limit]
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) { // almost no string does
		s = strings.Map(func(r rune) rune {
			if r == utf8.RuneError || !unicode.IsPrint(r) {
				return ' '
			}
			return r
		}, s)
	}
	if len(s) <= limit {
		return s
	}
	more := "..."[:min(3, limit)]
	limit -= len(more)
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit] + more
}

// Quote returns Clean(s, limit) in double quotes; double quotes inside become single
// ones.
func Quote(s string, limit int) string {
	return `"` + strings.ReplaceAll(Clean(s, limit), `"`, `'`) + `"`
}
