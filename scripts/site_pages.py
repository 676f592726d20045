"""What the site has beside docs/: pages from elsewhere in the repository, and links to its files.

A hook of mkdocs. Formulas become MathML, which browsers show by themselves. Relative links in
Markdown are those of the repository, where most readers follow them; on the site a link to a page
of it goes there, and one to another file goes to `repo_url`, or is the file's path where there is
none.
"""

import posixpath
import re
import shutil
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger(__name__)
ROOT = Path(__file__).resolve().parent.parent
# In a checkout these stand beside the package, in an installation inside it.
BESIDE = ("integrations", "kernels")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
PICTURE = re.compile(r'(?P<before>!\[[^\]]*\]\(|src(?:set)?=")(?P<path>[^)":\s]+)(?=[)"])')
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<latex>.*?)</(?P=tag)>', re.DOTALL)
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """{path in the repository: path on the site} of every page."""
    found = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    for path in sorted((ROOT / "recipes").glob("*/README.md")):
        name = path.parent.name
        found[f"recipes/{name}/README.md"] = f"recipes/{name}.md"
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.md")):
        within = path.relative_to(ROOT).as_posix()
        found[within] = within.removeprefix("benchmarks/")
    return found | {"README.md": "readme.md", "CHANGELOG.md": "changelog.md"}


def on_startup(command: str, dirty: bool) -> None:
    """The package as it is installed, for the reference, where mkdocs.yml has its path: the plugin
    looks for that when it is configured."""
    whole = ROOT / "build" / "site_package"
    shutil.rmtree(whole, ignore_errors=True)
    package = whole / "guided_decode"
    code_alone = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(ROOT / "guided_decode", package, ignore=code_alone)
    for name in BESIDE:
        shutil.copytree(ROOT / name, package / name, ignore=code_alone)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that do not stand in docs/."""
    for source, page in pages().items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links that lead somewhere on the site; code stays as it is."""
    source = next(at for at, on in pages().items() if on == page.file.src_uri)
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_linked(markdown[last : fence.start()], source, config), fence[0]]
        last = fence.end()
    return "".join([*parts, _linked(markdown[last:], source, config)])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its formulas as MathML."""
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    latex = unescape(found["latex"]).strip()
    inline = latex.startswith(r"\(")
    return str(convert(latex[2:-2].strip(), display="inline" if inline else "block"))


def _linked(text: str, source: str, config: MkDocsConfig) -> str:
    text = PICTURE.sub(lambda found: _picture(found, source), text)
    return LINK.sub(lambda found: _link(found, source, config.repo_url), text)


def _picture(found: re.Match[str], source: str) -> str:
    """Pictures stand in docs/, whoever shows them."""
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
    start = posixpath.dirname(pages()[source]) or "."
    path = posixpath.relpath(wanted.removeprefix("docs/"), start)
    # Raw HTML is not rewritten for pages that become folders.
    outwards = "" if found["before"].startswith("!") else "../"
    return f"{found['before']}{outwards}{path}"


def _link(found: re.Match[str], source: str, repo_url: str | None) -> str:
    text, target = found["text"], found["target"]
    if re.match(r"[a-z]+:|#", target):
        return found[0]
    path, _, anchor = target.partition("#")
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    known = pages()
    if wanted in known:
        start = posixpath.dirname(known[source]) or "."
        target = posixpath.relpath(known[wanted], start) + (f"#{anchor}" if anchor else "")
        return f"[{text}]({target})"
    if not (ROOT / wanted).exists():
        # Which is a failure, as the site is built strictly.
        log.warning("%s: a link leads to %s, which is not there", source, wanted)
    if repo_url:
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{wanted})"
    return f"{text} (`{wanted}`)"
