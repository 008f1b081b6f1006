package decisionlog

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"strconv"

	"github.com/tidewaiter/tidewaiter/deploy/control"
)

// scan hands over the lines of f, at most twice as much as Ring writes to one file.
// Two gates that write at once may do so a little out of order. It reports whether
// yield wants more.
func scan(f io.Reader, after uint64, yield func(control.Line) bool) bool {
	s := bufio.NewScanner(io.LimitReader(f, 2*maxFile))
	s.Buffer(make([]byte, 0, 4<<10), 2*maxLine)
	for s.Scan() {
		// Most lines are old news to who follows.
		if n, ok := seq(s.Bytes()); !ok || n <= after {
			continue
		}
		var l control.Line
		if json.Unmarshal(s.Bytes(), &l) != nil || len(l.Decision) == 0 {
			continue
		}
		if !yield(l) {
			return false
		}
	}
	return true // a line that is too long ends a file, which nobody of ours writes
}

// seq reads the number at the start of a line.
func seq(line []byte) (uint64, bool) {
	rest, found := bytes.CutPrefix(line, []byte(`{"seq":`))
	end := bytes.IndexByte(rest, ',')
	if !found || end < 0 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(rest[:end]), 10, 64)
	return n, err == nil
}
