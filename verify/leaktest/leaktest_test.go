package leaktest

import (
	"strings"
	"testing"
)

// What stays is found and named; what ends is waited for.
func TestFind(t *testing.T) {
	end := make(chan struct{})
	go func() { <-end }()
	if err := find(2); err == nil || !strings.Contains(err.Error(), "leaktest.TestFind.func1") {
		t.Errorf("one that stays: %v", err)
	}
	close(end)
	if err := Find(); err != nil {
		t.Error(err)
	}
}
