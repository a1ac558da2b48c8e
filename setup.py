"""The package. Pins live in requirements/; `bash toolkits/setup/venv.sh` makes an environment with the right build of torch."""

import copy
import platform
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines())
    return [line for line in lines if line]


# The C in rlinf/kernels/c, once for each instruction set. Not Python modules: rlinf/kernels/cpu.py opens the one that the CPU has.
# Optional: without a C compiler the embedded engine takes torch's products. They carry the number of the source that they are made of, so
# that a checkout whose source has changed since does not call them.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTIONS = {
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
}
SOURCES = sorted((ROOT / "rlinf" / "kernels" / "c").glob("*.[ch]"))
NUMBER = zlib.crc32(b"".join(source.read_bytes() for source in SOURCES))
kernels = [
    Extension(
        f"rlinf.kernels._cpu_{name}",
        [f"rlinf/kernels/c/{source.name}" for source in SOURCES if source.suffix == ".c" and (source.stem != "tiles" or name == "amx")],
        depends=[str(source) for source in SOURCES],
        define_macros=[("RLINF_SOURCE", f"{NUMBER}u")],
        extra_compile_args=["-O3", "-g0", "-ffp-contract=fast", *flags],
        optional=True,
    )
    for name, flags in INSTRUCTIONS.items()
    if platform.system() == "Linux" and platform.machine() == "x86_64"
]


class BuildSideBySide(build_ext):
    """As many kernels at a time as there are cores; one after the other they take a minute."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = True

    def build_extension(self, extension: Extension) -> None:
        own = copy.copy(self)  # the same sources in every one: their objects need folders of their own
        own.build_temp = f"{self.build_temp}/{extension.name}"
        super(BuildSideBySide, own).build_extension(extension)


setup(
    name="rlinf",
    version="0.1.0",
    description="Distributed reinforcement learning of reasoning models, from a laptop to a cluster",
    packages=find_packages(include=["rlinf", "rlinf.*"]),
    package_data={"rlinf": ["**/*.html", "**/*.css", "**/*.js"]},
    ext_modules=kernels,
    cmdclass={"build_ext": BuildSideBySide},
    python_requires=">=3.10",
    install_requires=requirements("base"),
    extras_require={name: requirements(name) for name in ("cpu", "gpu", "rg", "docs", "dev")},
    entry_points={"console_scripts": ["rlinf = rlinf.cli:main"]},
)
