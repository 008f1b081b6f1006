package store

import (
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Read is closed when the directory was read.
func (s *Store) Read() <-chan struct{} { return s.start.Read() }

// Waiting returns how much evidence waits to be written.
func (s *Store) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting.list)
}

// Retained reports whether the last listing was looked at.
func (s *Store) Retained() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done == s.listed
}

// Most sets how many files there may be.
func (s *Store) Most(files int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.most = files
}

// Hang has reads hang that come after it until free is called.
func (s *Store) Hang() (free func(), hung func() int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var users atomic.Int64
	end := make(chan struct{})
	read := s.reader.Blob
	s.reader.Blob = func(d ocispec.Descriptor) ([]byte, error) {
		users.Add(1)
		defer users.Add(-1)
		<-end
		return read(d)
	}
	return func() { close(end) }, users.Load
}

// Judging has judges called before it is found out whether a subject is on the node. It
// is called before Run.
func (s *Store) Judging(judges func(subject digest.Digest)) { s.judges = judges }
