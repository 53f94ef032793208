#!/bin/sh
# Sets up spark_me and all it needs in a virtual environment, root or not:
#
#     docker/install.sh [VENV]        VENV is .venv beside the README unless given
#
# PYTHON names the interpreter; ENGINE=cpu or ENGINE=cuda forces what the engine is built for; EXTRAS names the optional
# groups of setup.py, all,dev unless given. uv's own settings hold: UV_TORCH_BACKEND=cpu takes a torch without CUDA.
#
# `make setup` and the Dockerfiles call this one script. It can be repeated: what is in place is left alone, in seconds,
# and a set-up that was cut short is begun again.
set -eu

UV=uv==0.13.9
# Together, from one source: a torch and a torchvision that differ in their CUDA fail at import.
TORCH="torch==2.11.0 torchvision==0.26.0"

root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=${PYTHON:-python3}
extras=${EXTRAS:-all,dev}
stamp=$venv/.spark-me-setup
unfinished=$venv/.spark-me-unfinished
# What the packages depend on. The place counts too: an environment does not work where it was not made.
wanted="$venv
$root [$extras] $(cat "$root/setup.py" "$root/docker/install.sh" | cksum)"

fail() {
    echo "spark_me setup: $*" >&2
    exit 1
}

check_system() {
    missing=
    command -v "$python" >/dev/null || missing="python3 python3-venv"
    if [ -z "$missing" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$python is $("$python" -V 2>&1), and 3.10 or newer is needed: name one, as in PYTHON=python3.11"
        "$python" -c 'import ensurepip, venv' 2>/dev/null || missing=python3-venv
    fi
    command -v "${CXX:-c++}" >/dev/null || missing="$missing g++"
    if [ -n "$missing" ]; then
        sudo=sudo
        [ "$(id -u)" -ne 0 ] || sudo=
        fail "missing system packages; install them with:" ${sudo:+sudo} apt-get install $missing
    fi
}

# Whether the environment's Python installs into the environment. One whose pyvenv.cfg is gone still runs, but it is
# the machine's own Python then, and everything would go there.
is_environment() {
    [ -e "$venv/pyvenv.cfg" ] &&
        "$venv/bin/python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null
}

# Whether what the stamp promises is there. Only looks for the packages: importing torch takes seconds.
is_sound() {
    [ ! -e "$unfinished" ] && is_environment && [ "$(head -n 1 "$stamp")" = "$venv" ] &&
        "$venv/bin/python" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "torchvision", "pypi_simple"))))' 2>/dev/null
}

make_environment() {
    # Nothing is removed that is not an environment, or the beginning of one.
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$unfinished" ]; then
        fail "$venv exists and is no virtual environment: remove it, or name another place"
    fi
    mkdir -p "$venv"
    touch "$unfinished"
    # The mark stays while the rest goes: a removal may be cut short too.
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$unfinished" -exec rm -rf {} +
    echo "making $venv with $("$python" -V)"
    "$python" -m venv "$venv"
    is_environment || fail "$python -m venv $venv made no usable environment"
}

install_packages() {
    touch "$unfinished"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$UV"
    # shellcheck disable=SC2086  # two requirements
    "$venv/bin/uv" pip install --python "$venv/bin/python" $TORCH --editable "$root[$extras]"
    rm "$unfinished"
    echo "$wanted" >"$stamp"
}

# Docker can clear an argument, but not unset it; uv takes an empty one for a wrong one.
[ -n "${UV_TORCH_BACKEND:-}" ] || unset UV_TORCH_BACKEND
check_system
if [ -e "$stamp" ] || [ -e "$unfinished" ]; then
    is_sound || make_environment
elif ! is_environment; then
    make_environment
fi
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] || install_packages
"$venv/bin/spark-me" engine install ${ENGINE:+"--$ENGINE"}
