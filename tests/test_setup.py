"""requirements/install.sh, with a Python and a uv that only write down what they are asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = r"""#!/bin/bash
# Stands for Python, also that of the virtual environment which it is asked to make.
echo "python $*" >>"$LOG"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"metadata as m"*) exit 1 ;;
  *" --index-url "*" torch=="*) [[ $* == *"$PIP_HAS"* ]] || { echo "no torch there" >&2; exit 1; } ;;
  *" install "*" torch=="*) [[ $PIP_HAS == torch ]] || { echo "No matching distribution" >&2; exit 1; } ;;
  *"--target"*" uv=="*)
    [[ -z $NO_UV ]] || { echo "no uv here" >&2; exit 1; }
    while [[ $1 != --target ]]; do shift; done
    mkdir -p "$2/bin" && cp "$UV" "$2/bin/uv" ;;
esac
"""
UV = r"""#!/bin/bash
echo "uv $*" >>"$LOG"
[[ -z $UV_FAILS ]] || { echo "$UV_FAILS" >&2; exit 2; }
"""


@pytest.fixture
def setup(tmp_path):
    """Return a function that sets up a copy of the repository's skeleton: status, what was run, what was said."""
    copy = tmp_path / "repository"
    for name in ("requirements/install.sh", "requirements/cpu.lock", "pyproject.toml", "setup.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for folder in ("kv_cache/csrc", "quant_methods/csrc"):
        (copy / folder).mkdir(parents=True)
        (copy / folder / "module.c").write_text("")
    for name, text in (("python", PYTHON), ("uv", UV)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**variables):
        environment = {
            "PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python"), "UV": str(tmp_path / "uv"), "CC": "true",
            "LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path / "scratch"), "PIP_HAS": "nothing",
        }  # fmt: skip
        (tmp_path / "scratch").mkdir(exist_ok=True)
        done = subprocess.run(
            [copy / "requirements/install.sh"], env=environment | variables, capture_output=True, text=True, check=False
        )
        assert not list((tmp_path / "scratch").iterdir())
        return done.returncode, (tmp_path / "log").read_text().splitlines(), done.stderr, copy

    return run


TORCH = next(line for line in (ROOT / "requirements/cpu.lock").read_text().splitlines() if line.startswith("torch=="))


def test_uv_brings_pytorch_where_pip_finds_no_build_for_cpus(setup):
    """It once stopped there and told the user to look for an address."""
    status, calls, said, copy = setup()
    (used,) = [call for call in calls if call.startswith("uv ")]
    assert "--torch-backend cpu" in used
    assert "--compile-bytecode" in used
    assert "--python .venv/bin/python" in used
    assert used.endswith(TORCH)
    # The rest goes on, and nobody is shown the attempt that failed.
    assert "No matching distribution" not in said
    assert any("-r requirements/cpu.lock" in call for call in calls)
    assert status == 0
    assert (copy / ".venv/.stamp").is_file()


@pytest.mark.parametrize(
    "variables", [{"PIP_HAS": "torch"}, {"PIP_HAS": "mirror", "TORCH_INDEX_URL": "file:///mirror"}]
)
def test_uv_stays_out_of_it_where_pip_finds_pytorch(setup, variables):
    status, calls, _, _ = setup(**variables)
    assert status == 0
    assert not [call for call in calls if "uv" in call.split()[-1] or call.startswith("uv ")]


@pytest.mark.parametrize(
    ("variables", "cause", "advice"),
    [
        ({"UV_FAILS": "dns error"}, "dns error", "neither pip nor uv could install torch=="),
        ({"NO_UV": "1"}, "no uv here", "neither pip nor uv could install torch=="),
        ({"TORCH_INDEX_URL": "file:///mirror"}, "no torch there", "leave that variable unset"),
    ],
)
def test_without_pytorch_it_stops_and_says_why(setup, variables, cause, advice):
    status, calls, said, copy = setup(**variables)
    assert status == 1
    assert cause in said
    assert said.splitlines()[-1].startswith("set-up: ")
    assert advice in said.splitlines()[-1]
    assert not any("-r requirements/cpu.lock" in call for call in calls)
    assert not (copy / ".venv/.stamp").exists()
