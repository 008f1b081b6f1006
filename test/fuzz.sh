#!/usr/bin/env bash
# Runs every fuzz target of the main module for the given time, one after the
# other, and fails when there is none: a renamed pattern must not pass as green.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
ran=0
for pkg in $(go list ./...); do
  for target in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
    echo "fuzz $pkg $target $time"
    go test -run '^$' -fuzz "^${target}\$" -fuzztime "$time" "$pkg"
    ran=$((ran + 1))
  done
done
[ "$ran" -gt 0 ] || { echo 'no fuzz target was found'; exit 1; }
echo "$ran fuzz targets ran"
