#!/usr/bin/env bash
# Lint, and test on every release of transformers that the project stands for: the newest that
# pyproject.toml admits, the oldest 5.x, and 4.57. Arguments go to pytest.
#
# One virtual environment holds everything with the newest release; a folder that goes in front of it
# holds an older one and the libraries tied to it, so that torch is installed once. The newest release
# runs all tests, older ones those that depend on the release, of which they share out the widest
# (see `NEWEST_ONLY` and `SHARED_OUT` in tests/shares.py).
# What fails stops nothing; the exit code says whether anything did.
set -euo pipefail
cd "$(dirname "$0")/.."

older_releases=(5.6.0 4.57.6)
venv=.venv
python="$venv/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

# What is imported is compiled then; compiling all that is installed takes longer.
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }

# The packages of an older release, one a line.
packages_of() {
    echo "transformers==$1"
    case "$1" in
        4.*) printf '%s\n' 'huggingface-hub>=0.34,<1' 'tokenizers>=0.22,<0.23' 'datasets==3.6.0' ;;
        5.*) printf '%s\n' 'huggingface-hub>=1.5,<2' 'tokenizers>=0.22,<0.23' 'httpx<1' 'httpcore<2' ;;
    esac
}

overlay_of() { echo "$PWD/$venv/transformers-$1"; }

# Make an older release's folder, unless it is there and complete.
make_overlay() {
    local overlay packages
    overlay="$(overlay_of "$1")"
    packages="$(packages_of "$1")"
    if [ "$(cat "$overlay/packages.txt" 2>/dev/null)" = "$packages" ]; then return; fi
    rm -rf "$overlay" "$overlay.partial"
    mkdir "$overlay.partial"
    echo "$packages" >"$overlay.partial/packages.txt"
    install --no-deps --target "$overlay.partial" --requirement "$overlay.partial/packages.txt"
    mv "$overlay.partial" "$overlay"
}

"$python" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear "$venv"
making=()
for release in "${older_releases[@]}"; do
    make_overlay "$release" & # beside the rest, which waits for a disk most of the time
    making+=($!)
done
install --upgrade -e '.[test]' transformers
for overlay in "${making[@]}"; do wait "$overlay"; done
newest="$("$python" -c 'from importlib.metadata import version; print(version("transformers"))')"
echo "transformers $newest, ${older_releases[*]}; $("$python" --version)"

failed=()
check() { # a name, and a command
    echo "== $1"
    "${@:2}" || failed+=("$1")
}

workers=(-n "$(getconf _NPROCESSORS_ONLN)") # not nproc, which takes OMP_NUM_THREADS for an answer
check "ruff check" "$venv/bin/ruff" check .
check "ruff format" "$venv/bin/ruff" format --check .
check "transformers $newest" "$python" -m pytest "${workers[@]}" "$@"
for i in "${!older_releases[@]}"; do
    release="${older_releases[$i]}"
    check "transformers $release" env PYTHONPATH="$(overlay_of "$release")" \
        "$python" -m pytest "${workers[@]}" --older-release "$((i + 1))/${#older_releases[@]}" "$@"
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
