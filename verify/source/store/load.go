package store

import (
	"context"
	_ "crypto/sha256" // digests of blobs
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
)

// algorithms have a directory each below blobs.
var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512}

// unfinished begins the names of files that are being written.
const unfinished = ".unfinished-"

// A look is what reading the directory found.
type look struct {
	blobs   []*blob
	left    []string // files that were being written when the power went
	foreign int      // files that do not belong there
	first   string   // one of these
	partial bool     // not everything could be read
	links   int      // names in them
}

// scan reads the files below blobs. Nothing of them is believed: their digests are
// checked when they are used.
func (s *Store) scan(ctx context.Context, dir *layout.Dir) look {
	var l look
	files, bytes := 0, int64(0)
	for _, alg := range algorithms {
		at := path.Join(ocispec.ImageBlobsDir, alg.String())
		f, err := dir.Root.OpenFile(at, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_DIRECTORY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			l.foreigner(at)
			l.partial = true
			continue
		}
		for {
			entries, err := f.ReadDir(256)
			for _, e := range entries {
				if files++; files > maxFiles || ctx.Err() != nil {
					l.partial = true
					break
				}
				bytes += s.look(dir, &l, alg, e, 2*s.o.Size-bytes)
			}
			if err != nil || l.partial && files > maxFiles || ctx.Err() != nil {
				l.partial = l.partial || err != nil && !errors.Is(err, io.EOF)
				break
			}
		}
		f.Close()
	}
	return l
}

// look reads one file of at most room bytes, and returns how many it had.
func (s *Store) look(dir *layout.Dir, l *look, alg digest.Algorithm, e fs.DirEntry, room int64) int64 {
	name := path.Join(ocispec.ImageBlobsDir, alg.String(), e.Name())
	d := digest.NewDigestFromEncoded(alg, e.Name())
	switch {
	case !e.Type().IsRegular():
		l.foreigner(name)
		return 0
	case strings.HasPrefix(e.Name(), unfinished):
		l.left = append(l.left, name)
		return 0
	case d.Validate() != nil:
		l.foreigner(name)
		return 0
	}
	info, err := e.Info()
	if err != nil {
		l.partial = true
		return 0
	}
	if info.Size() > min(maxDocument, room) {
		l.foreigner(name)
		l.partial = l.partial || info.Size() > room
		return 0
	}
	raw, err := dir.Read(name, func(n int64) error {
		if n != info.Size() {
			return fs.ErrInvalid
		}
		return nil
	})
	if err != nil {
		l.partial = true
		return 0
	}
	b := see(d, raw)
	if l.links+len(b.names) > maxListed {
		b.names = nil
	}
	l.links += len(b.names)
	b.seen = info.ModTime()
	l.blobs = append(l.blobs, b)
	return info.Size()
}

func (l *look) foreigner(name string) {
	if l.foreign++; l.first == "" {
		l.first = name
	}
}

// load reads the directory and has it asked from then on.
func (s *Store) load(ctx context.Context, dir *layout.Dir) look {
	l := s.scan(ctx, dir)
	s.mu.Lock()
	s.catalog = newCatalog()
	s.place.close()
	s.place = newPlace(dir, nil)
	for _, b := range l.blobs {
		s.add(b, maxListed)
	}
	s.mu.Unlock()
	if l.foreign > 0 {
		s.o.Log.Warn("files in the store are no part of it and are not read", "store", s.Name(), "files", l.foreign, "one of them", verify.Clean(l.first, 128))
	}
	if info, err := dir.Root.Stat("."); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok && (info.Mode().Perm()&0o022 != 0 || int(st.Uid) != os.Geteuid()) {
			s.o.Log.Warn("others than the gate can write to the store: they can make signatures go away, and no more (chown and chmod 700 end that)",
				"store", s.Name(), "owner", fmt.Sprint(st.Uid), "mode", info.Mode().Perm().String())
		}
	}
	return l
}
