package oci

import "fmt"

// What follows walks over JSON that json.Valid has accepted: it need not look for
// errors, and takes no stack or memory for nesting.

// members hands each member of the object v to fn. A null has none.
func members(what string, v []byte, fn func(name string, v []byte) error) error {
	at := space(v, 0)
	switch v[at] {
	case 'n':
		return nil
	case '{':
	default:
		return fmt.Errorf("%s is no object", what)
	}
	for at = space(v, at+1); v[at] != '}'; at = space(v, at+1) { // beyond a comma
		end := value(v, at)
		key := "" // a long one is none that a caller asks for
		if name := v[at:end]; len(name) <= maxWord {
			key = unquote(name)
		}
		at = space(v, space(v, end)+1) // beyond the colon
		end = value(v, at)
		if err := fn(key, v[at:end]); err != nil {
			return err
		}
		if at = space(v, end); v[at] == '}' {
			break
		}
	}
	return nil
}

// array hands each element of the array v to fn. A null has none. It returns nil if fn
// returns errStop.
func array(what string, v []byte, fn func(v []byte) error) error {
	switch v[0] {
	case 'n':
		return nil
	case '[':
	default:
		return fmt.Errorf("%s is no list", what)
	}
	for at := space(v, 1); v[at] != ']'; at = space(v, at+1) {
		end := value(v, at)
		if err := fn(v[at:end]); err == errStop {
			return nil
		} else if err != nil {
			return err
		}
		if at = space(v, end); v[at] == ']' {
			break
		}
	}
	return nil
}

// space returns where the white space ends that begins at at.
func space(v []byte, at int) int {
	for v[at] == ' ' || v[at] == '\t' || v[at] == '\n' || v[at] == '\r' {
		at++
	}
	return at
}

// value returns where the value ends that begins at at.
func value(v []byte, at int) int {
	switch v[at] {
	case '"':
		return quoted(v, at)
	case '{', '[':
		for depth := 0; ; at++ {
			switch v[at] {
			case '"':
				at = quoted(v, at) - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return at + 1
				}
			}
		}
	}
	for at < len(v) {
		switch v[at] {
		case ',', '}', ']', ' ', '\t', '\n', '\r':
			return at
		}
		at++
	}
	return at
}

// quoted returns where the string ends that begins at at.
func quoted(v []byte, at int) int {
	for at++; v[at] != '"'; at++ {
		if v[at] == '\\' {
			at++
		}
	}
	return at + 1
}
