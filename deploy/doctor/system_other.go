//go:build !linux

package doctor

func synchronised() *bool { return nil }

func loose(string) []string { return nil }

func space(string) *Space { return nil }
