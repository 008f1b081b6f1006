package tally

import (
	"math/rand/v2"
	"testing"
)

// Nothing that the gate lets be ends the runtime, however much there is of it.
func TestAdmittedIsNotTooLarge(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 7))
	for range 500 {
		pods, containers := make([]int, random.IntN(120)), make([]int, random.IntN(240))
		for _, list := range [][]int{pods, containers} {
			most := 1 + random.IntN(330<<10) // what 300 KiB count for, with what is beside
			for i := range list {
				list[i] = random.IntN(most)
				if random.IntN(4) == 0 {
					list[i] = most
				}
			}
		}
		if synchronize(pods, containers, maxMessage) == endsRuntime {
			t.Fatalf("%d and %d", pods, containers)
		}
	}
}

// The model, with messages of 64 bytes.
func TestSynchronize(t *testing.T) {
	const most = 64
	for name, tt := range map[string]struct {
		pods, containers []int
		want             outcome
	}{
		"nothing":                    {want: through},
		"one message":                {many(4, 8), many(4, 8), through},
		"several messages":           {many(20, 4), many(20, 4), through},
		"one that does not fit":      {many(1, most+1), nil, dropsPlugin},
		"as few as do not fit":       {many(4, 16), many(4, 16), dropsPlugin},
		"a list that is cut short":   {many(2, 1), many(10, 16), endsRuntime},
		"pods that it never gets to": {many(2, 1), many(80, 4), dropsPlugin},
	} {
		if got := synchronize(tt.pods, tt.containers, most); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}

func many(n, bytes int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = bytes
	}
	return list
}
