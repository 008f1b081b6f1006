package main

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/deploy/config"
)

// FuzzMirrorFlag feeds the one flag that has a syntax of its own. Nothing of it is
// repeated beyond a host.
func FuzzMirrorFlag(f *testing.F) {
	for _, s := range []string{
		"registry.test=http://127.0.0.1:5000", "*=https://[::1]/hub/", "docker.io:443=https://x.test", "=", "a=b=c",
		"registry.test=http://me:hunter2@x.test", "registry.test=http://x.test/?hunter2", "http://me:hunter2@x.test",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var c config.Config
		err := verifyOptions{mirrors: []string{s}}.listed(&c)
		if err != nil {
			if len(c.Mirrors) != 0 {
				t.Errorf("%q: an error and a mirror", s)
			}
			if len(err.Error()) > 400 || strings.ContainsAny(err.Error(), "\n\x1b\x00") {
				t.Errorf("%q: error %q", s, err)
			}
			return
		}
		m := c.Mirrors[0]
		if c.Network != config.NetworkMirrors || m.Host == "" || m.URL.Host == "" || m.URL.User != nil || m.URL.RawQuery != "" || m.URL.Fragment != "" ||
			m.URL.Scheme != "http" && m.URL.Scheme != "https" {
			t.Errorf("%q: took %+v, %v", s, m, m.URL)
		}
	})
}
