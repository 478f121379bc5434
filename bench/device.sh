#!/usr/bin/env bash
# Builds and installs the checkout on a GPU machine without a network, from wheels in .whl/ where packages are missing.
# Usage: source bench/device.sh
set -u
export SITE=/tmp/site PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export NUMBA_CACHE_DIR=/tmp/numba PYTHONPATH=/tmp/site PATH=/tmp/site/bin:$PATH
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl
fi
python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target "$SITE" \
    --config-settings=cmake.define.GPUFGBG_ARCHITECTURES="${ARCHITECTURES:-90}" \
    --config-settings=cmake.define.GPUFGBG_PTX= . || return 1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
