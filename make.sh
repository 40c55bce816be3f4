#!/usr/bin/env bash
# Sets up a virtual environment in .venv, then does one thing in it. Every command can be run again.
#
#   bash make.sh demo            both training stages and the evaluation, on the embedded base and a synthetic cohort;
#                                stopped, it goes on where it was
#   bash make.sh test [ARGS]     the tests; arguments go to pytest
#   bash make.sh check           lint, formatting and types
#   bash make.sh setup           the environment alone
#
# For a machine without a network, from locks/cpu.txt or locks/cuda.txt (docs/offline.md):
#
#   bash make.sh wheels KIND DIR     fills DIR with every wheel of the lock; on a connected machine
#   bash make.sh offline KIND DIR    makes .venv from DIR alone; KIND is cpu or cuda
#   bash make.sh lock KIND [DIR]     writes the lock anew; cpu reads torch's wheel in DIR
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

# need_lock KIND DIR: both are there.
need_lock() {
    if [[ $1 != cpu && $1 != cuda || -z $2 ]]; then
        echo "make.sh: say cpu or cuda, and a folder, as in: bash make.sh wheels cpu wheels" >&2
        exit 2
    fi
}

# wheels KIND DIR: pip checks each file against the lock's hashes. Torch's CPU build has an index of its own, which
# pip has to know (docs/offline.md).
wheels() {
    local pip=("$(find_python)" -m pip --disable-pip-version-check download --quiet --require-hashes --no-deps
        --only-binary :all: --dest "$2")
    "${pip[@]}" --requirement <(torch_of "$1")
    "${pip[@]}" --requirement <(others_of "$1")
    echo "$2 holds what locks/$1.txt names: $(find "$2" -name '*.whl' | wc -l) wheels"
}

torch_of() {
    sed -n '/^torch==/,/[^\\]$/p' "locks/$1.txt"
}

others_of() {
    sed '/^torch==/,/[^\\]$/d' "locks/$1.txt"
}

# offline KIND DIR: nothing but DIR is asked, and a file that is not of the lock is refused.
offline() {
    local python
    python=$(find_python)
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear .venv
    else
        "$python" -m venv --clear --without-pip .venv
    fi
    "$python" -m pip --isolated --python .venv/bin/python --disable-pip-version-check install --quiet \
        --no-index --find-links "$2" --only-binary :all: --require-hashes --requirement "locks/$1.txt"
    # The demonstration finds everything that it would have installed.
    echo "$(cksum <pyproject.toml) $PWD" >.venv/.installed-mimic
    echo ".venv holds what locks/$1.txt names; begin with: source .venv/bin/activate"
}

# lock KIND [DIR]: asks PyPI alone, whatever else this machine is set up to ask, so no private host gets in.
lock() {
    local extras=(--extra mimic --extra search --extra tensorboard --extra tokenizers) torch=() aside about
    about="Torch is the build on PyPI, which brings CUDA 13."
    aside=$(mktemp -d)
    if [[ $1 == cpu ]]; then
        need_lock "$1" "${2:-}"
        # The wheel that is read is one of those published, whose hashes go into the lock.
        (cd "$2" && sha256sum --check --quiet --ignore-missing -) <locks/torch-cpu.sha256
        echo "torch==2.13.0+cpu" >"$aside/override.txt"
        grep -E '^[a-z]' locks/cuda.txt | grep -v '^torch==' | tr -d ' \\' >"$aside/constraint.txt"
        torch=(--override "$aside/override.txt" --constraint "$aside/constraint.txt" --find-links "$2")
        about="Torch is PyTorch's CPU build; locks/torch-cpu.sha256 names its wheels."
    fi
    {
        echo "# Every package of a run on Linux x86_64, CPython 3.11 and 3.12, with the hashes of its files."
        echo "# $about"
        echo "# Made by \`bash make.sh lock $1\`; see docs/offline.md."
        env -u UV_INDEX -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS uv pip compile pyproject.toml "${extras[@]}" \
            --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-config \
            --no-annotate --no-header --quiet "${torch[@]}"
    } >"$aside/lock.txt"
    if [[ $1 == cpu ]]; then
        awk 'FNR == NR { hashes = hashes " \\\n    --hash=sha256:" $1; next }
            /^torch==/ { print $1 hashes; in_torch = 1; next }
            in_torch && /^ / { next }
            { in_torch = 0; print }' locks/torch-cpu.sha256 "$aside/lock.txt" >"$aside/published.txt"
        mv "$aside/published.txt" "$aside/lock.txt"
    fi
    mv "$aside/lock.txt" "locks/$1.txt"
    rm -r "$aside"
}

show() {
    echo "+ $*" >&2
    "$@"
}

# go_on FOLDER COMMAND: train.py goes on with the run in FOLDER, or finds it finished. Where that was another run (the
# settings, the notes or the code have changed since), it begins anew.
go_on() {
    local folder=$1 code=0
    shift
    if [[ -f $folder/run.json ]]; then
        show "$@" --out "$folder" --resume || code=$?
        # 2: what is there is not this run; anything else has ended it.
        if [[ $code -ne 2 ]]; then
            return $code
        fi
    fi
    show "$@" --out "$folder" --overwrite
}

case "${1:-}" in
    demo)
        set_up mimic
        python=.venv/bin/python
        go_on runs/demo/clinical $python train.py --stage clinical
        go_on runs/demo/downstream $python train.py --stage downstream --task mor --init-adapter runs/demo/clinical
        show $python eval.py --run runs/demo/downstream
        ;;
    test)
        set_up test
        if [[ $# -gt 1 ]]; then
            .venv/bin/python -m pytest "${@:2}"
        else
            # A process for each core, one file at a time: most tests keep one core busy, whatever torch may use.
            export OMP_NUM_THREADS=1
            spread=(--numprocesses auto --maxprocesses 4 --dist loadfile)
            .venv/bin/python -m pytest "${spread[@]}"
            # Triton's interpreter is chosen at import, so the kernels' own tests are a run of their own.
            TRITON_INTERPRET=1 .venv/bin/python -m pytest "${spread[@]}" tests/kernels
        fi
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
    wheels)
        need_lock "${2:-}" "${3:-}"
        wheels "$2" "$3"
        ;;
    offline)
        need_lock "${2:-}" "${3:-}"
        offline "$2" "$3"
        ;;
    lock)
        need_lock "${2:-}" "${3:-none}"
        lock "$2" "${3:-}"
        ;;
    *)
        sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
