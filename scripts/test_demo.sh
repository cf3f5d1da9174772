#!/usr/bin/env bash
# Test the demo in a browser, after scripts/test.sh has made the virtual environment. Without Chromium
# the tests skip and say so. One that fails is run once more: a browser may be late.
#
# A folder in front of the environment holds what `pip install '.[demo]'` and a driver of browsers would
# add to it or replace, as Gradio wants an older Pillow than all else is tested with.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
overlay="$PWD/.venv/demo"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

newest="$("$python" -c 'from importlib.metadata import version; print(version("transformers"))')"
packages="$(install --dry-run --report - -e '.[demo]' playwright "transformers==$newest" | "$python" -c '
import json, sys
for each in json.load(sys.stdin)["install"]:
    if each["metadata"]["name"] != "glimpseprune":
        print(each["metadata"]["name"], each["metadata"]["version"], sep="==")')"
if [ "$(cat "$overlay/packages.txt" 2>/dev/null)" != "$packages" ]; then
    rm -rf "$overlay"
    mkdir "$overlay"
    echo "$packages" >"$overlay/wanted.txt"
    install --no-deps --target "$overlay" --requirement "$overlay/wanted.txt"
    mv "$overlay/wanted.txt" "$overlay/packages.txt"
fi

tests=(tests/test_demo.py tests/test_demo_browser.py)
export PYTHONPATH="$overlay"
"$python" -m pytest -rs "${tests[@]}" || "$python" -m pytest -rs --last-failed "${tests[@]}"
