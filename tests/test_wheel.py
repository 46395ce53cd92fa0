"""The wheel and the sdist: what is in them, how the wheel is named, and whether its kernels run from where it is put.

``PARETO_WHEEL=FILE`` looks at a wheel that is there (the workflow that makes wheels does); else one is built, without
optimization, which takes seconds instead of a minute.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from quant_methods.embedded import PACKED

ROOT = Path(__file__).parents[1]
PACKAGES = ("kv_cache", "quant_methods", "vllm_ext", "bench", "loadtest")
DATA = {
    "kv_cache": ("csrc/*", "cuda/csrc/*", "cuda/runtime/csrc/*"),
    "quant_methods": (
        "csrc/*", "kernels/csrc/*", "recipes/*.yaml", "models/*/*", "calibration/text/*", "backends/*.lock",
    ),
    "loadtest": (
        "deploy/*.yaml", "deploy/kubernetes/*", "deploy/prometheus/*", "deploy/grafana/boards/*",
        "deploy/grafana/provisioning/*/*",
    ),
    "bench": (
        "report/templates/*", "quality/tasks/own/*.yaml", "quality/tasks/own/*.json", "study/templates/*", "studies/*",
    ),
}  # fmt: skip
KERNELS = """
import importlib.metadata, pathlib, sys
import torch
import kv_cache, quant_methods
from kv_cache import cpu_kernels
from quant_methods.formats import grid_search
target = pathlib.Path(sys.argv[1])
for package in (kv_cache, quant_methods):
    assert target in pathlib.Path(package.__file__).parents, package.__file__
assert cpu_kernels.best_isa() in cpu_kernels.ISAS
assert grid_search._library() is not None, "quant_methods"
(found,) = importlib.metadata.distributions(name="vllm-pareto", path=[str(target)])
names = {e.group: e for e in found.entry_points}
assert names["vllm.general_plugins"].load().__module__ == "vllm_ext.plugin"
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the images are made of, so that .dockerignore is tried and nothing of a build stays here."""
    copy = tmp_path_factory.mktemp("source")
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept, left = [rule[1:] for rule in rules if rule[0] == "!"], [rule[3:] for rule in rules if rule[:3] == "**/"]
    assert ["*", *(f"!{name}" for name in kept), *(f"**/{name}" for name in left)] == rules
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*left))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def unoptimized(folder: Path) -> dict[str, str]:
    """Return an environment whose C compiler does not optimize, whatever setup.py asks of it."""
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0\n')
    compiler.chmod(0o755)
    return {**os.environ, "CC": str(compiler)}


def run(*command: object, **options: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    program = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, out, cwd=source)
    (file,) = out.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Build the wheel from the sdist, as pip does where no wheel fits: what the sdist lacks is missing then."""
    if given := os.environ.get("PARETO_WHEEL"):
        return Path(given).resolve()
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, sdist,
        env=unoptimized(out),
    )  # fmt: skip
    (file,) = out.glob("*.whl")
    return file


def test_one_wheel_is_for_all_pythons(wheel):
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("vllm_pareto", "cp311", "abi3")
    assert platform.startswith(("linux_", "manylinux", "macosx_"))


def test_the_wheel_has_all_that_the_code_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    wanted |= {f"{package}/py.typed" for package in PACKAGES}
    wanted |= {"kv_cache/_cpu.abi3.so", "quant_methods/_cpu.abi3.so"}
    for package, patterns in DATA.items():
        for pattern in patterns:
            files = {str(path.relative_to(ROOT)) for path in (ROOT / package).glob(pattern) if path.is_file()}
            files -= {name for name in files if name.endswith(PACKED)}  # It has what these unpack to.
            assert files, f"{package}/{pattern}"
            wanted |= files
    assert not wanted - names
    assert not any(name.endswith(PACKED) for name in names)
    # Nothing else goes into site-packages: no tests, no top-level folder with a name that is somebody else's.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_licenses_are_in_both(wheel, sdist):
    files = {"LICENSE", "NOTICE", "quant_methods/calibration/text/NOTICE"}
    with zipfile.ZipFile(wheel) as file:
        (folder,) = {name.split("/")[0] for name in file.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(file.read(f"{folder}/METADATA").decode())
        for name in files:
            assert file.read(f"{folder}/licenses/{name}") == (ROOT / name).read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File")) == files
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert files <= names


def test_kernels_run_from_where_the_wheel_is_put(wheel, tmp_path):
    target = tmp_path / "fresh"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
    for library in target.glob("*/_cpu.abi3.so"):
        # PyTorch's OpenMP answers (kv_cache/compiled.py); a second runtime would have threads of its own.
        assert b"libgomp.so" not in library.read_bytes()
    run(sys.executable, "-c", KERNELS, target, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)})
