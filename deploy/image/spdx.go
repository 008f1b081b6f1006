package main

import (
	"fmt"
	"runtime/debug"
	"strings"
	"time"
)

// The part of SPDX 2.3 that a Go binary needs: one package for the program, one for
// each module in it, one for the standard library.
type (
	spdx struct {
		SPDXVersion       string         `json:"spdxVersion"`
		DataLicense       string         `json:"dataLicense"`
		SPDXID            string         `json:"SPDXID"`
		Name              string         `json:"name"`
		DocumentNamespace string         `json:"documentNamespace"`
		CreationInfo      creationInfo   `json:"creationInfo"`
		Packages          []spdxPackage  `json:"packages"`
		Relationships     []relationship `json:"relationships"`
	}
	creationInfo struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		SPDXID           string        `json:"SPDXID"`
		Name             string        `json:"name"`
		VersionInfo      string        `json:"versionInfo,omitempty"`
		PackageFileName  string        `json:"packageFileName,omitempty"`
		DownloadLocation string        `json:"downloadLocation"`
		FilesAnalyzed    bool          `json:"filesAnalyzed"`
		Checksums        []checksum    `json:"checksums,omitempty"`
		SourceInfo       string        `json:"sourceInfo,omitempty"`
		LicenseConcluded string        `json:"licenseConcluded"`
		LicenseDeclared  string        `json:"licenseDeclared"`
		CopyrightText    string        `json:"copyrightText"`
		ExternalRefs     []externalRef `json:"externalRefs,omitempty"`
		PrimaryPurpose   string        `json:"primaryPackagePurpose,omitempty"`
	}
	checksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	externalRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	relationship struct {
		Element string `json:"spdxElementId"`
		Type    string `json:"relationshipType"`
		Related string `json:"relatedSpdxElement"`
	}
)

const unsaid = "NOASSERTION"

// spdx is the list of what b was linked from, as its own build information says.
func (b *binary) spdx() spdx {
	binarySum := sum(b.raw)
	main := spdxPackage{
		SPDXID: "SPDXRef-tidewaiter", Name: b.info.Main.Path, VersionInfo: b.version, PackageFileName: "/tidewaiter",
		DownloadLocation: unsaid, Checksums: []checksum{{"SHA256", binarySum}},
		LicenseConcluded: "Apache-2.0", LicenseDeclared: "Apache-2.0", CopyrightText: unsaid,
		ExternalRefs: purl(b.info.Main.Path, b.version), PrimaryPurpose: "APPLICATION",
	}
	if commit := b.setting("vcs.revision"); commit != "" {
		main.DownloadLocation = "git+" + source + "@" + commit
	}
	doc := spdx{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT",
		Name:              "tidewaiter-" + b.version + "-" + b.arch(),
		DocumentNamespace: source + "/spdx/" + binarySum,
		CreationInfo:      creationInfo{b.created.UTC().Format(time.RFC3339), []string{"Organization: Tidewaiter", "Tool: tidewaiter-image"}},
		Packages:          []spdxPackage{main},
		Relationships:     []relationship{{"SPDXRef-DOCUMENT", "DESCRIBES", main.SPDXID}},
	}
	add := func(p spdxPackage) {
		p.SPDXID = fmt.Sprintf("SPDXRef-module-%d", len(doc.Packages))
		p.DownloadLocation, p.CopyrightText, p.LicenseConcluded, p.LicenseDeclared = unsaid, unsaid, unsaid, unsaid
		p.ExternalRefs, p.PrimaryPurpose = purl(p.Name, p.VersionInfo), "LIBRARY"
		doc.Packages = append(doc.Packages, p)
		doc.Relationships = append(doc.Relationships, relationship{main.SPDXID, "DEPENDS_ON", p.SPDXID})
	}
	add(spdxPackage{Name: "stdlib", VersionInfo: strings.TrimPrefix(b.info.GoVersion, "go")})
	for _, m := range b.info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		add(module(m))
	}
	return doc
}

func module(m *debug.Module) spdxPackage {
	p := spdxPackage{Name: m.Path, VersionInfo: m.Version}
	if m.Sum != "" {
		p.SourceInfo = "go.sum " + m.Sum
	}
	return p
}

// purl is the package URL by which scanners know a Go module.
func purl(name, version string) []externalRef {
	return []externalRef{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + name + "@" + strings.ReplaceAll(version, "+", "%2B")}}
}
