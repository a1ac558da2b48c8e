"""The package. Pins live in requirements/; `bash toolkits/setup/venv.sh` makes an environment with the right build of torch."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines())
    return [line for line in lines if line]


setup(
    name="rlinf",
    version="0.1.0",
    description="Distributed reinforcement learning of reasoning models, from a laptop to a cluster",
    packages=find_packages(include=["rlinf", "rlinf.*"]),
    package_data={"rlinf": ["**/*.html", "**/*.css", "**/*.js"]},
    python_requires=">=3.10",
    install_requires=requirements("base"),
    extras_require={name: requirements(name) for name in ("cpu", "gpu", "rg", "docs", "dev")},
    entry_points={"console_scripts": ["rlinf = rlinf.cli:main"]},
)
