#!/bin/sh
# Usage: scripts/typecheck.sh PYTHON
# mypy on the package, as it installs.
set -eu

cd "$(dirname "$0")/.."
tree=build/types
sh scripts/installed_layout.sh "$tree"

status=0
MYPYPATH=$tree "$1" -m mypy --package guided_decode >build/types.log 2>&1 || status=$?
# Name the source that is to be mended, not its copy.
sed -e "s#^$tree/guided_decode/\(kernels\|integrations\)/#\1/#" -e "s#^$tree/##" build/types.log
exit $status
