# Shared by the scripts beside it: finds Python, makes .venv, installs the pinned dependencies.
# Usage, from a script that has set ROOT:  . "$ROOT/scripts/_env.sh"; prepare default|dev

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
    for candidate in ${SINKSERVE_PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
        then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

make_venv() {
    local python
    python=$(find_python) || fail "Python 3.11, 3.12 or 3.13 is needed and was not found.
  Install it (Debian: apt install python3 python3-venv; macOS: brew install python@3.12),
  or name it:  SINKSERVE_PYTHON=/path/to/python3.11 $0"
    say "making .venv with $("$python" --version)"
    "$python" -m venv "$VENV" >&2 || {
        rm -rf "$VENV"
        fail "$python could not make a virtual environment (Debian: apt install python3-venv)."
    }
}

# A stamp holds the hash of what was installed, so that a second run starts at once.
stamp_of() { cat "$ROOT/pyproject.toml" "$ROOT/requirements/$1.txt" | "$VENV/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

is_prepared() {
    [ -x "$VENV/bin/python" ] && [ -x "$VENV/bin/sinkserve" ] &&
        [ "$(cat "$VENV/.installed-$1" 2>/dev/null)" = "$(stamp_of "$1")" ]
}

# Runs a command with its output in a log; on a terminal the log's last line is shown meanwhile.
run_logged() {
    local log="$1"
    shift
    if [ ! -t 2 ]; then
        "$@" >>"$log" 2>&1
        return
    fi
    "$@" >>"$log" 2>&1 &
    local pid=$!
    trap 'kill "$pid" 2>/dev/null; printf "\n" >&2; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        printf '\r\033[K  \033[2m%.100s\033[0m' "$(tail -n 1 "$log" | tr -d '\r')" >&2
        sleep 0.5
    done
    printf '\r\033[K' >&2
    trap - INT TERM
    wait "$pid"
}

install_pins() {
    local log="$VENV/install.log" pip=("$VENV/bin/python" -m pip install --disable-pip-version-check)
    pip+=(--progress-bar off)
    say "installing the pinned dependencies ($1); the first time takes a few minutes"
    : >"$log"
    if ! run_logged "$log" "${pip[@]}" --require-hashes -r "$ROOT/requirements/$1.txt" ||
        ! run_logged "$log" "${pip[@]}" --no-deps --editable "$ROOT"
    then
        tail -n 15 "$log" >&2
        fail "the installation failed (whole log: $log).
  Check the network and free disk space (about 1.5 GB), then run $0 again."
    fi
}

# Without hashes: the platform decides which build of torch is meant.
install_accelerators() {
    local pins="$ROOT/requirements/accelerators.txt" stamp="$VENV/.installed-accelerators"
    cmp -s "$pins" "$stamp" && return
    say "installing torch, Triton and TensorRT-RTX"
    if ! run_logged "$VENV/install.log" "$VENV/bin/python" -m pip install --disable-pip-version-check \
        --progress-bar off -r "$pins"
    then
        tail -n 15 "$VENV/install.log" >&2
        fail "torch, Triton and TensorRT-RTX could not be installed (whole log: $VENV/install.log)."
    fi
    cp "$pins" "$stamp"
}

# dev holds every pin of default, so an environment prepared for dev serves both.
prepare() {
    VENV="${SINKSERVE_VENV:-$ROOT/.venv}"
    { [ "$1" = default ] && is_prepared dev; } || is_prepared "$1" || (
        mkdir -p "$VENV-lock" && exec 9>"$VENV-lock/lock"
        command -v flock >/dev/null 2>&1 && flock 9
        [ -x "$VENV/bin/python" ] || make_venv
        is_prepared "$1" || { install_pins "$1" && stamp_of "$1" >"$VENV/.installed-$1"; }
    ) || exit 1
    PATH="$VENV/bin:$PATH"
}
