"""The site: every page is in it, every link leads somewhere, and it fetches nothing."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests import PATIENCE, ROOT

if not all(map(find_spec, ("mkdocs", "material", "mkdocstrings", "latex2mathml"))):
    pytest.skip("needs the extra docs", allow_module_level=True)

# What the site is made of.
PARTS = ("docs", "recipes", "benchmarks", "guided_decode", "integrations", "kernels", "scripts")
FILES = ("mkdocs.yml", "README.md", "CHANGELOG.md")
FETCHED = re.compile(r"""<(?:script|img|link)[^>]+(?:src|href)=["']?(https?:)?//[^"'> ]+""")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the site is made of, to break."""
    root = tmp_path_factory.mktemp("checkout")
    for name in PARTS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    for name in ("examples", "CONTRIBUTING.md", "LICENSE"):  # led to
        (root / name).symlink_to(ROOT / name)
    return root


def build(root):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=root, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "build" / "site"


def test_every_page_of_docs_is_in_the_site_and_in_its_navigation(site):
    start = (site / "index.html").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        name = "" if path.stem == "index" else f"{path.stem}/"
        assert (site / name / "index.html").is_file()
        assert f'href="{name or "."}"' in start, path.name


def test_links_out_of_docs_lead_to_pages_or_name_files(site):
    search = (site / "search" / "index.html").read_text()
    assert 'href="../results/search_methods/"' in search
    checkpoints = (site / "checkpoints" / "index.html").read_text()
    assert "(<code>examples/checkpoints/tulu_2_dpo.sh</code>)" in checkpoints
    assert (site / "recipes" / "ppo" / "index.html").is_file()
    assert "../examples" not in checkpoints


def test_pictures_are_found_from_pages_of_the_repositorys_root(site):
    page = site / "readme" / "index.html"
    shown = re.findall(r'(?:src|srcset)="?([^" >]+\.png)', page.read_text())
    assert len(shown) >= 3
    for path in shown:
        assert (page.parent / path).resolve().is_file(), path


def test_it_fetches_nothing(site):
    for page in site.rglob("*.html"):
        assert not FETCHED.findall(page.read_text()), page


def test_formulas_are_mathml(site):
    page = (site / "how_it_works" / "index.html").read_text()
    assert page.count("<math") > 10
    assert "$" not in re.sub(r"<(code|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "\\beta" not in page


def test_the_reference_has_every_public_name(site):
    import guided_decode.integrations.transformers as hugging_face
    from guided_decode import __all__ as names

    page = (site / "api" / "index.html").read_text()
    for name in (*names, *(f"integrations.transformers.{one}" for one in hugging_face.__all__)):
        # Results of `load_scorer` alone.
        if name != "Adapted":
            assert f'id="guided_decode.{name}"' in page, name
    # Docstrings are read as they are written.
    assert "in logits per unit of value" in page


def test_links_that_lead_nowhere_fail(checkout, site):
    page = checkout / "docs" / "limits.md"
    before = page.read_text()
    try:
        page.write_text(
            before + "\n[a](no_such_page.md) [b](../no/such/file.py) [c](search.md#no-such-part)\n"
        )
        done = build(checkout)
    finally:
        page.write_text(before)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "docs/limits.md: a link leads to docs/no_such_page.md, which is not there" in said
    assert "docs/limits.md: a link leads to no/such/file.py, which is not there" in said
    assert "'search.md#no-such-part', but the doc 'search.md' does not contain an anchor" in said
