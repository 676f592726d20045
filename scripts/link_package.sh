#!/bin/sh
# Usage: scripts/link_package.sh VENV
# Links the package's files into VENV again, if files have come or gone since it was last done.
set -eu

cd "$(dirname "$0")/.."
listed=$1/.files
files() {
    find guided_decode kernels integrations -type f ! -path '*/__pycache__/*' | LC_ALL=C sort
}
if files | cmp -s - "$listed"; then exit; fi
if [ -e "$listed" ]; then
    "$1/bin/python" -m pip --disable-pip-version-check -qq install --no-deps --no-build-isolation \
        --config-settings editable_mode=strict --editable .
fi
files >"$listed"
