package store

import (
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Read is closed when the directory was read.
func (s *Store) Read() <-chan struct{} { return s.read }

// Looked is closed when the bundles were read.
func (s *Store) Looked() <-chan struct{} { return s.looked }

// Waiting returns how much evidence waits to be written.
func (s *Store) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

// Retained reports whether the last listing was looked at.
func (s *Store) Retained() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.news
}

// Most sets how many files there may be.
func (s *Store) Most(files int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.most = files
}

// Hang has reads hang that come after it, of the bundle with that name or, without
// one, of the store itself, until free is called.
func (s *Store) Hang(bundle string) (free func(), hung func() int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.place
	for _, b := range s.bundles {
		if b.name == bundle {
			p = b.place
		}
	}
	end := make(chan struct{})
	read := p.blob
	p.blob = func(d ocispec.Descriptor) ([]byte, error) {
		<-end
		return read(d)
	}
	return func() { close(end) }, func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.users
	}
}

// HangClosing has the closing of the bundle with that name hang until free is called.
func (s *Store) HangClosing(bundle string) (free func(), closing <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	begun, end := make(chan struct{}), make(chan struct{})
	for _, b := range s.bundles {
		if b.name == bundle {
			b.place.mu.Lock()
			closes := b.place.end
			b.place.end = func() error {
				close(begun)
				<-end
				return closes()
			}
			b.place.mu.Unlock()
		}
	}
	return func() { close(end) }, begun
}

// Slowly has touch called before an entry of the directory of bundles is read, with ""
// before the directory is, and a
// look wait no longer than that for all of them. It is called before Run.
func (s *Store) Slowly(touch func(name string), wait time.Duration) { s.touch, s.wait = touch, wait }

// Narrow has fewer manifests and indexes, and signatures of one image, remembered of
// bundles, and so many bytes of one read. It is called before Run.
func (s *Store) Narrow(documents, ofOne int, bytes int64) {
	s.bounds.all.documents, s.bounds.ofOne, s.bounds.bytes = documents, ofOne, bytes
}
