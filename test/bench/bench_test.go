package main

import "testing"

// BenchmarkWarm is the gate's own part of a warm decision, for profiles:
//
//	go test ./bench -run - -bench . -cpuprofile cpu.out -memprofile mem.out
func BenchmarkWarm(b *testing.B) {
	for name, told := range map[string]bool{"told": true, "snapshot": false} {
		b.Run(name, func(b *testing.B) {
			decide, end, err := local(told)
			if err != nil {
				b.Fatal(err)
			}
			defer end()
			b.ReportAllocs()
			for b.Loop() {
				if err := decide(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
