#!/usr/bin/env bash
# Unpacks the text of a release of vLLM into build/vllm-VERSION, for 'pareto vllm-contract --source': also of one that
# this machine cannot run. Does nothing where it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?give a version of vLLM, such as 0.33.0}
folder=build/vllm-$version
if [[ -d $folder ]]; then exit 0; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -m pip --disable-pip-version-check download -q --no-deps --only-binary :all: -d "$scratch" "vllm==$version"
# Under another name until it is whole. The compiled libraries, most of the wheel's gigabyte, stay packed.
.venv/bin/python - "$scratch" <<'PY'
import sys
import zipfile
from pathlib import Path

scratch = Path(sys.argv[1])
(wheel,) = scratch.glob("*.whl")
with zipfile.ZipFile(wheel) as file:
    kept = [name for name in file.namelist() if name.endswith((".py", ".dist-info/METADATA"))]
    file.extractall(scratch / "text", kept)
PY
mkdir -p build
mv "$scratch/text" "$folder"
