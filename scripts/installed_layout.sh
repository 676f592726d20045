#!/bin/sh
# Usage: scripts/installed_layout.sh TREE
# Copies the Python sources into TREE as they install: tools that know no package mapping would take
# kernels/ for `kernels`, and find no `guided_decode.kernels`.
set -eu

cd "$(dirname "$0")/.."
tree=$1
rm -rf "$tree"
mkdir -p "$tree/guided_decode"
copy() { (cd "$2" && find $1 \( -name '*.py' -o -name py.typed \)) | tar -C "$2" -cf - -T - | tar -C "$3" -xf -; }
copy "guided_decode recipes benchmarks" . "$tree"
copy "kernels integrations" . "$tree/guided_decode"
