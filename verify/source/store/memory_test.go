package store_test

import (
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/verify/source/archives"
	"github.com/tidewaiter/tidewaiter/verify/source/sourcetest"
	"github.com/tidewaiter/tidewaiter/verify/source/store"
)

// heap is how much is in use after a collection, in bytes.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkMemory says what a thousand images with one signature each take, in the
// store and in an archive: each has an index of two manifests, one of which is there.
func BenchmarkMemory(b *testing.B) {
	const images = 1000
	var c site
	for i := range images {
		index := c.index(c.Image(fmt.Sprint("image ", i)), c.Image(fmt.Sprint("other ", i)))
		delete(c.Blobs, c.Images[len(c.Images)-1].Digest)
		c.Images = append(c.Images[:len(c.Images)-2], index)
		c.evidence(index, fmt.Sprint(i, strings.Repeat("x", 4000)))
	}
	for name, at := range map[string]func(string) string{
		"store":   inside,
		"archive": func(dir string) string { return filepath.Join(below(dir), "a") },
		"tar":     func(dir string) string { return filepath.Join(below(dir), "a.tar") },
	} {
		b.Run(name, func(b *testing.B) {
			dir := b.TempDir()
			sourcetest.Layout(b, at(dir), c.Content, false)
			if name == "tar" {
				pack(b, at(dir))
			}
			var took int64
			for b.Loop() {
				before := heap()
				r := start(b, dir, store.Options{})
				n, _ := r.Signatures()
				for _, one := range func() []archives.Status { l, _ := r.archives.Status(); return l }() {
					n += one.Signatures
				}
				if n != images {
					b.Fatalf("%d signatures", n)
				}
				took = heap() - before
				runtime.KeepAlive(r)
				r.stop()
			}
			b.ReportMetric(float64(took)/images, "B/image")
		})
	}
}
