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
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/verify/durable"
	"github.com/tidewaiter/tidewaiter/verify/source/catalog"
	"github.com/tidewaiter/tidewaiter/verify/source/layout"
	"github.com/tidewaiter/tidewaiter/verify/text"
)

// algorithms have a directory each below blobs.
var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512}

// A look is what reading the directory found.
type look struct {
	blobs   []*catalog.Blob
	left    []string                    // files that were being written when the power went
	foreign int                         // files that do not belong there
	first   string                      // one of these
	partial bool                        // not everything could be read
	links   int                         // names in them
	damaged map[digest.Digest]time.Time // files that are not what their digest says, and their times
}

// scan reads the files below blobs. Nothing of them is believed: their digests are
// checked again when they are used.
func (s *Store) scan(ctx context.Context, dir *layout.Dir) look {
	l := look{damaged: map[digest.Digest]time.Time{}}
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
	case strings.HasPrefix(e.Name(), durable.Unfinished):
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
	if d.Algorithm().FromBytes(raw) != d {
		l.damaged[d] = info.ModTime()
		return info.Size()
	}
	b := s.see(d, raw)
	if l.links+len(b.Names) > maxListed {
		b.Names, b.Cut = nil, true
	}
	l.links += len(b.Names)
	b.Seen = info.ModTime()
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
	c := catalog.New()
	for _, b := range l.blobs {
		c.Add(b, maxListed)
	}
	s.mu.Lock()
	keep, now := s.keep, s.o.Now()
	s.mu.Unlock()
	broken, losses := spoil(&c, l, now.Add(-keep))
	s.mu.Lock()
	s.catalog = c
	s.reader.Close()
	s.reader = catalog.NewReader(dir, nil)
	s.broken = broken
	if len(losses) > 0 {
		s.losses, s.until = losses, now.Add(damageFor)
	}
	s.mu.Unlock()
	if n := len(l.damaged); n > 0 {
		s.o.Log.Warn("files in the store are damaged; what they were is looked for again", "store", s.Name(), "files", n)
	}
	if l.foreign > 0 {
		s.o.Log.Warn("files in the store are no part of it and are not read", "store", s.Name(), "files", l.foreign, "one of them", text.Clean(l.first, 128))
	}
	if info, err := dir.Root.Stat("."); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok && (info.Mode().Perm()&0o022 != 0 || int(st.Uid) != os.Geteuid()) {
			s.o.Log.Warn("others than the gate can write to the store: they can make signatures go away, and no more (chown and chmod 700 end that)",
				"store", s.Name(), "owner", fmt.Sprint(st.Uid), "mode", info.Mode().Perm().String())
		}
	}
	return l
}

// damageFor is how long an image without a signature is not known to have none, after
// files were found that may have been its signature. Within it mirrors are asked again
// for the signatures of every image on the node.
const damageFor = 24 * time.Hour

// spoil notes in the catalog what l found damaged. It returns documents that something
// in it names, and files of which it is not known what they were, if their time is not
// before oldest.
func spoil(c *catalog.Catalog, l look, oldest time.Time) (broken, losses map[digest.Digest]bool) {
	used := map[digest.Digest]bool{}
	for _, list := range c.Signed {
		for _, b := range list {
			if _, bad := l.damaged[b.Envelope]; bad || b.Envelope != "" && c.Blobs[b.Envelope] == nil && !l.partial {
				b.Lost = true
			}
			used[b.Envelope], used[b.Subject] = true, true
			for _, part := range b.Parts {
				b.Lost, used[part] = b.Lost || c.Blobs[part] == nil && !l.partial, true
			}
		}
	}
	broken, losses = map[digest.Digest]bool{}, map[digest.Digest]bool{}
	for d, at := range l.damaged {
		switch {
		case len(c.Named[d]) > 0:
			broken[d] = true
		case !used[d] && !at.Before(oldest):
			losses[d] = true
		}
	}
	return broken, losses
}

// see says what raw seems to be, and for whom it is if it is an envelope.
func (s *Store) see(d digest.Digest, raw []byte) *catalog.Blob {
	b, _ := catalog.See(d, raw, s.o.Kinds) // what goes beyond the bounds shows nothing
	if b.MediaType == "" {
		b.Chain = s.chain(raw)
	}
	return b
}

// chain is that of the first kind that finds one in a blob.
func (s *Store) chain(blob []byte) catalog.Chain {
	for _, k := range s.o.Kinds {
		if c := catalog.ChainOf(k.Chain(blob)); len(c) > 0 {
			return c
		}
	}
	return nil
}
