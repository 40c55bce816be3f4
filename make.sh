#!/usr/bin/env bash
# Sets up a virtual environment in .venv, then does one thing in it. Every command can be run again.
#
#   bash make.sh demo            both training stages and the evaluation, on the embedded base and a synthetic cohort
#   bash make.sh test [ARGS]     the tests; arguments go to pytest
#   bash make.sh check           lint, formatting and types
#   bash make.sh setup           the environment alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "make.sh: found no Python 3.11 or later (looked for python3.11, python3.12, python3, python)" >&2
    exit 2
}

# set_up EXTRAS: installs once; again only when pyproject.toml or the place of the checkout has changed.
set_up() {
    local extras=$1 stamp=.venv/.installed-$1 python wanted
    wanted="$(cksum <pyproject.toml) $PWD"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    python=$(find_python)
    # A Python without ensurepip makes an environment without pip; its own pip then installs into it.
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv .venv
    else
        "$python" -m venv --without-pip .venv
    fi
    local pip=("$python" -m pip --python .venv/bin/python --disable-pip-version-check)
    # The exact version at the upper end of the range first: see docs/decisions.md.
    "${pip[@]}" install --quiet torch==2.13.0
    "${pip[@]}" install --quiet --editable ".[$extras]"
    echo "$wanted" >"$stamp"
}

show() {
    echo "+ $*" >&2
    "$@"
}

case "${1:-}" in
    demo)
        set_up mimic
        python=.venv/bin/python
        show $python train.py --stage clinical --out runs/demo/clinical --overwrite
        show $python train.py --stage downstream --task mor --init-adapter runs/demo/clinical --out runs/demo/downstream --overwrite
        show $python eval.py --run runs/demo/downstream
        ;;
    test)
        set_up test
        .venv/bin/python -m pytest "${@:2}"
        ;;
    check)
        set_up test
        .venv/bin/ruff check .
        .venv/bin/ruff format --check .
        .venv/bin/mypy
        ;;
    setup)
        set_up test
        ;;
    *)
        sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
