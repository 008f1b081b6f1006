package daemon

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"syscall"
)

// A journal writes lines of slog's JSON handler, one a call, with the level in front that
// systemd's journal knows them by (sd-daemon(3)), so that journalctl -p warning shows what
// is one. systemd takes it off again.
type journal struct{ out io.Writer }

func (j journal) Write(line []byte) (int, error) {
	level := "<6>"
	switch head := line[:min(len(line), 80)]; { // behind the time, before anything of others
	case bytes.Contains(head, []byte(`"level":"ERROR"`)):
		level = "<3>"
	case bytes.Contains(head, []byte(`"level":"WARN"`)):
		level = "<4>"
	case bytes.Contains(head, []byte(`"level":"DEBUG"`)):
		level = "<7>"
	}
	if _, err := j.out.Write(append([]byte(level), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}

// ToJournal is out, or where it is a stream to systemd's journal a journal. systemd says
// which file that is, since what a service starts inherits the variable and perhaps not
// the file.
func ToJournal(out io.Writer) io.Writer {
	f, ok := out.(*os.File)
	if !ok {
		return out
	}
	info, err := f.Stat()
	if err != nil {
		return out
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok || os.Getenv("JOURNAL_STREAM") != fmt.Sprintf("%d:%d", s.Dev, s.Ino) {
		return out
	}
	return journal{out}
}
