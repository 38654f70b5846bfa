#!/bin/sh
# Makes the virtual environment that every make target runs in, and installs talkoot into it.
#
#   tools/bootstrap.sh DIRECTORY        (make calls it; PYTHON=… chooses the interpreter)
#
# Needs only a Python of 3.11 or newer and the network. Running it again repairs or updates.
set -eu

venv=${1:-.venv}
cd "$(dirname "$0")/.."
log=$venv/setup.log

fail() {
    printf 'talkoot: %s\n' "$1" >&2
    exit 1
}

usable() { # a Python that really runs (pyenv's shims may exist and not) and is new enough
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 to 3.14: name another one."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null 2>&1 && usable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "No Python of version 3.11 or newer was found: install one (Debian, Ubuntu: 'apt install python3') or name it with PYTHON=/path/to/python3."
}

make_venv() {
    python=$(choose_python)
    printf 'talkoot: setting up %s with %s (takes a few minutes the first time)\n' \
        "$venv" "$("$python" --version 2>&1)"
    rm -rf "$venv"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    else
        # Debian and Ubuntu keep ensurepip in python3-venv, which a fresh machine lacks and only
        # root can install. Fetching pip needs neither.
        "$python" -m venv --without-pip "$venv"
        "$venv/bin/python" tools/fetch_pip.py
    fi
}

# Shows what pip is at while it runs. A terminal gets one line that changes; a log gets a line now
# and then, so that nobody takes a long download for a hang.
watch_pip() {
    seconds=0
    while kill -0 "$1" 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        doing=$(sed -n 's/^ *\(Collecting [A-Za-z0-9._-]*\|Downloading [A-Za-z0-9._-]*\|Installing collected packages\).*/\1/p' "$log" | tail -n 1)
        if [ -t 1 ]; then
            printf '\r\033[K  %3d s  %s' "$seconds" "${doing:-starting}"
        elif [ $((seconds % 30)) -eq 0 ]; then
            printf '  %3d s  %s\n' "$seconds" "${doing:-starting}"
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

install() {
    # Left on standard input, pip could stop to ask something that nobody sees.
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        --constraint constraints.txt --editable '.[dev]' >"$log" 2>&1 </dev/null &
    pip=$!
    trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM
    watch_pip "$pip"
    if ! wait "$pip"; then
        tail -n 15 "$log" >&2
        fail "Installing did not finish: see the lines above (all of them are in $log), check the network, and run the same command again."
    fi
}

# A half-made environment, or one whose interpreter has gone, is made anew.
if ! { usable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    make_venv
else
    printf 'talkoot: bringing %s up to date\n' "$venv"
fi
install
printf 'talkoot: %s is ready\n' "$venv"
