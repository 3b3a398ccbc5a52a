#!/bin/sh
# The measurements under any python that has torch with CUDA, without an environment of this project:
#     [PYTHON=python3] sh bench/gpu/run.sh [ARGUMENTS OF diff2flow_nodes.bench.gpu]
#     MODULE=diff2flow_nodes.bench.picture_prior sh bench/gpu/run.sh [ARGUMENTS OF ANOTHER MODULE]
# What `pack.py` has put into .gpu is taken from there; nothing is fetched, and nothing of that python is changed.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$root" "$site/diff2flow_nodes"
for wheel in "$root"/.gpu/wheels/*.whl; do
    [ -e "$wheel" ] || continue
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$site" "$wheel" || echo "not installed: $wheel" >&2
done
if [ -d "$root/.gpu/comfyui" ]; then
    export COMFYUI_DIR="${COMFYUI_DIR:-$root/.gpu/comfyui}"
fi
export PYTHONPATH="$site:$root/.gpu/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
"$python" -m "${MODULE:-diff2flow_nodes.bench.gpu}" "$@"
