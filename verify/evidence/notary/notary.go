// Package notary checks Notary Project signatures under the statements of a
// trust policy, with notation-go and without a network.
//
// notation-go decides whether an envelope is intact, whether its chain reaches a
// trust store and whether its leaf has a trusted identity; it is handed a
// statement that enforces these three whatever the author's level says. A
// [Checker] reads the answer from the results of each check, never from a nil
// error, and adds what notation-go does not do: bounds, one meaning for the
// bytes, critical attributes and certificate extensions, and a clock that is
// handed in, against which it judges expiry, validity, timestamps and revocation
// itself.
//
// Line numbers in comments are those of notation-go v1.3.2 and notation-core-go
// v1.3.0; specifications are those of the Notary Project.
package notary
