package archives

import "time"

// Bounds of archives.
const (
	maxArchives = 64      // entries looked at; dot files are not counted
	maxEntries  = 4096    // entries read of the directory
	maxLinks    = 1 << 16 // manifests that all indexes list
	maxDocument = 4 << 20 // bytes of a manifest or index
	maxDepth    = 4       // indexes below index.json
	maxHung     = 8       // readings of one entry under way
	maxHungAll  = 128     // and of all
)

// bounds of what is read of archives.
type bounds struct {
	all   limits // of all of them
	reads int    // manifests and indexes read of one archive
	bytes int64  // and bytes of these
	ofOne int    // signatures of one image remembered of one archive
}

// usual bounds. index.json has room for half of the documents that are read of a
// archive, and no configuration has more signatures of an image looked at.
var usual = bounds{limits{documents: 32768, links: maxLinks, inTar: 1 << 16}, 1 << 16, 256 << 20, 1024}

const (
	rescanInterval = 30 * time.Second       // between two looks that nothing asked for
	settleTime     = 200 * time.Millisecond // after a change before the look, and ten times that at most
	firstRetry     = time.Minute            // before an archive that could not be read whole is read again
	lastRetry      = time.Hour              // the same, later
	totalWait      = 5 * time.Second        // longest that a look waits for the disks of archives, all together
	endWait        = 5 * time.Second        // longest that Run waits at the end for a disk
	ownWait        = 200 * time.Millisecond // and for each at least
)

// limits bound what archives take of memory. Each archive has an equal share of it, and of
// what others do not need of theirs, who is first by name has it: then it is the same
// whichever came first.
type limits struct {
	documents int // manifests and indexes
	links     int // what those name
	inTar     int // files in tar files, each of which is remembered
}

// less is what x leaves of l. That x is more happens: an archive that is late keeps what
// it took before another came that goes before it.
func (l limits) less(x limits) limits {
	return limits{max(0, l.documents-x.documents), max(0, l.links-x.links), max(0, l.inTar-x.inTar)}
}

// within reports whether l is no more than x.
func (l limits) within(x limits) bool {
	return l.documents <= x.documents && l.links <= x.links && l.inTar <= x.inTar
}

// share is an equal one of n.
func (l limits) share(n int) limits {
	n = max(n, 1)
	return limits{l.documents / n, l.links / n, l.inTar / n}
}

// least is of each the smaller one.
func (l limits) least(x limits) limits {
	return limits{min(l.documents, x.documents), min(l.links, x.links), min(l.inTar, x.inTar)}
}

// reserve is what is kept for b, which was read before, or nil, for the sake of those
// before it by name, if its share is that.
func (b *archive) reserve(share limits) limits {
	if b == nil || b.cut || b.reader == nil {
		return share
	}
	return share.least(b.takes)
}

// suits reports whether b, which was read before, is what would be read of the same
// file with what is left now.
func (b *archive) suits(left limits) bool {
	return b.takes.within(left) && (!b.cut || b.given == left)
}
