#!/bin/sh
# Usage: scripts/typecheck.sh PYTHON
# mypy knows no package mapping: kernels/ would be checked as `kernels`, and nothing would find
# `guided_decode.kernels`. So it is shown the installed layout, as links to the sources.
set -eu

cd "$(dirname "$0")/.."
tree=build/types
rm -rf "$tree"
mkdir -p "$tree/guided_decode"
for entry in guided_decode/*; do
    ln -s "$PWD/$entry" "$tree/$entry"
done
for folder in kernels integrations; do
    ln -s "$PWD/$folder" "$tree/guided_decode/$folder"
done

status=0
MYPYPATH=$tree "$1" -m mypy --package guided_decode >build/types.log 2>&1 || status=$?
# Name the source that is to be mended, not the link.
sed -e "s#^$tree/guided_decode/\(kernels\|integrations\)/#\1/#" -e "s#^$tree/##" build/types.log
exit $status
