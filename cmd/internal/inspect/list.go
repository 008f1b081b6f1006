package inspect

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/deploy/config"
	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/policy"
)

// maxList bounds a list of images, in bytes.
const maxList = 1 << 20

// A Listed is an image that a list names, in a line.
type Listed struct {
	Line int
	Text string
	Name verify.Name
}

// ReadList reads a file of images, such as k3s-images.txt: a name a line, and comments
// after #. The file - is standard input. Errors name file and line.
func ReadList(file string) (list []Listed, err error) {
	in := io.Reader(os.Stdin)
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxList+1))
	if err == nil && len(raw) > maxList {
		err = fmt.Errorf("larger than %d bytes", maxList)
	}
	if err == nil {
		raw, err = config.Text(raw)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	s := bufio.NewScanner(bytes.NewReader(raw))
	s.Buffer(nil, maxList)
	for n := 1; s.Scan(); n++ {
		line, _, _ := strings.Cut(s.Text(), "#")
		ref := strings.TrimSpace(line)
		if ref == "" {
			continue
		}
		name, err := policy.ParseName(ref)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, n, err)
		}
		list = append(list, Listed{n, ref, name})
	}
	return list, nil
}
