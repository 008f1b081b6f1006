//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "demo: containerd and its containers need Linux: run this on a Linux machine, as root")
	os.Exit(2)
}
