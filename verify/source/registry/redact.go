package registry

import (
	"errors"
	"fmt"
	"strings"
)

// redact returns err, unless it repeats something that was sent in confidence: a
// registry can put into its answers what it was told, and what is odd in those ends
// up in errors, and so in the events of a pod.
func (e *exchange) redact(err error) error {
	if err == nil || !repeats(err.Error(), e.secrets) {
		return err
	}
	const text = "an answer that repeats the credentials, and is not shown"
	for _, class := range classes {
		if errors.Is(err, class) {
			return fmt.Errorf("%w: %s", class, text)
		}
	}
	return errors.New(text)
}

// repeats reports whether text holds a secret, or 12 bytes in a row of one.
func repeats(text string, secrets []string) bool {
	const window = 12
	for _, s := range secrets {
		if len(s) <= window {
			// Three letters or less are in any text, and hide nothing.
			if len(s) > 3 && strings.Contains(text, s) {
				return true
			}
			continue
		}
		for i := 0; i+window <= len(text); i++ {
			if strings.Contains(s, text[i:i+window]) {
				return true
			}
		}
	}
	return false
}
