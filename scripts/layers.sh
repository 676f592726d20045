#!/bin/sh
# Usage: scripts/layers.sh PYTHON
# import-linter holds the package, as it installs, to the layers of pyproject.toml.
set -eu

cd "$(dirname "$0")/.."
python=$(command -v "$1")
case $python in /*) ;; *) python=$PWD/$python ;; esac
tree=build/layers
sh scripts/installed_layout.sh "$tree"
cp pyproject.toml "$tree"
# import-linter looks for packages where it stands.
cd "$tree"
exec "$python" -c "from importlinter.cli import lint_imports_command as lint; lint()" \
    --no-cache --no-logo pyproject.toml
