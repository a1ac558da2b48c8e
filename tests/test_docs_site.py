"""The documentation as a site: it builds strictly (a broken link, anchor or forgotten page fails), and fetches nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed; pip install '.[docs]' (Python 3.11 or newer)",
)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


@pytest.mark.slow
def test_the_site_builds_and_is_whole(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {p.stem for p in tmp_path.glob("*.html")} - {"404"}
    assert pages == {p.stem for p in (ROOT / "docs").glob("*.md")}
    elsewhere = re.compile(r'<(?:script|img|link(?! rel="canonical"))[^>]*?(?:src|href)="?(?:https?:)?//[^ ">]+')
    assert [found for page in pages for found in elsewhere.findall((tmp_path / f"{page}.html").read_text())] == []


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[gone](nowhere.md), [no such place](#nothing)\n")
    config = (ROOT / "mkdocs.yml").read_text()
    own = config[config.index("strict:") : config.index("theme:")]  # the rules are ours, the theme would cost seconds
    (tmp_path / "mkdocs.yml").write_text(f"site_name: t\n{own}")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "nowhere.md" in done.stderr and "#nothing" in done.stderr
