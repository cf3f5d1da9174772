#!/usr/bin/env bash
# Set up both transformers generations, then lint and test. Arguments go to pytest.
#
# One virtual environment holds everything with transformers 5; a folder that goes in front of it
# holds transformers 4.57 and the libraries tied to it, so that torch is installed once.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
python="$venv/bin/python"
transformers_4="$venv/transformers-4.57"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

[ -x "$python" ] || python3 -m venv "$venv"
"$python" -m pip install --quiet --disable-pip-version-check -e '.[test]' 'transformers==5.23.*'
if [ ! -d "$transformers_4/transformers" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$transformers_4" \
        'transformers==4.57.6' 'huggingface-hub>=0.34,<1' 'tokenizers>=0.22,<0.23' \
        'datasets==3.6.0'
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
workers=(-n "$(getconf _NPROCESSORS_ONLN)") # not nproc, which takes OMP_NUM_THREADS for an answer
echo "== transformers 5"
"$python" -m pytest "${workers[@]}" "$@"
echo "== transformers 4.57"
PYTHONPATH="$PWD/$transformers_4" "$python" -m pytest "${workers[@]}" "$@"
