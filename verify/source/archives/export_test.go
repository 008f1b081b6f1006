package archives

import (
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Read is closed when the archives were read.
func (a *Archives) Read() <-chan struct{} { return a.start.Read() }

// Hang has reads of the archive with that name hang that come after it, until free is
// called.
func (a *Archives) Hang(name string) (free func(), hung func() int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var users atomic.Int64
	end := make(chan struct{})
	for _, b := range a.list {
		if b.name == name {
			read := b.reader.Blob
			b.reader.Blob = func(d ocispec.Descriptor) ([]byte, error) {
				users.Add(1)
				defer users.Add(-1)
				<-end
				return read(d)
			}
		}
	}
	return func() { close(end) }, users.Load
}

// HangClosing has the closing of the archive with that name hang until free is called.
func (a *Archives) HangClosing(name string) (free func(), closing <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	begun, end := make(chan struct{}), make(chan struct{})
	for _, b := range a.list {
		if b.name == name {
			closes := b.reader.End
			b.reader.End = func() error {
				close(begun)
				<-end
				return closes()
			}
		}
	}
	return func() { close(end) }, begun
}

// Slowly has touch called before an entry is read, with "" before the directory is, and a
// look wait no longer than that for all of them. It is called before Run.
func (a *Archives) Slowly(touch func(name string), wait time.Duration) { a.touch, a.wait = touch, wait }

// Narrow has fewer manifests and indexes, and signatures of one image, remembered of
// archives, and so many bytes of one read. It is called before Run.
func (a *Archives) Narrow(documents, ofOne int, bytes int64) {
	a.bounds.all.documents, a.bounds.ofOne, a.bounds.bytes = documents, ofOne, bytes
}
