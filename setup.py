"""Builds kv_cache._cpu and quant_methods._cpu: C with flags for each instruction set, which is chosen at run time."""

import platform
import runpy
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No contraction into fused multiply-adds: every instruction set then rounds alike.
COMMON = ["-std=gnu11", "-O3", "-fopenmp", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=generic"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")), "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8"]
PER_FILE = {"_avx2.c": AVX2, "_avx512.c": AVX512, "_amx.c": AMX}
"""Flags by how a source's name ends."""


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension; the OpenMP runtime is the one that PyTorch has loaded."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        macros = [("PARETO_X86", "1")] if x86 else []
        objects = []
        for source in ext.sources:
            own = next((flags for end, flags in PER_FILE.items() if source.endswith(end)), None)
            if own is not None and not x86:
                continue
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=[*ext.include_dirs, sysconfig.get_paths()["include"]],
                depends=ext.depends,
                extra_postargs=COMMON + (own or []),
            )
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=undefined, target_lang="c"
        )


def extension(room: str) -> Extension:
    """Return the extension of a room's C sources."""
    folder = Path(room) / "csrc"
    return Extension(
        f"{room}._cpu",
        sorted(str(path) for path in folder.glob("*.c")),
        depends=sorted(str(path) for path in folder.glob("*.h")),
        py_limited_api=True,
        # Without a C compiler the package still installs, for CUDA; the CPU backend then says what is missing, and
        # compression takes PyTorch's operations instead.
        optional=True,
    )


# The repository has the weights of the models that ship packed.
if (embedded := Path("quant_methods/embedded.py")).is_file():
    runpy.run_path(str(embedded))["unpack"]()

setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[extension("kv_cache"), extension("quant_methods")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
