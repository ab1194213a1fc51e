"""Every Python block of the documentation runs, and every relative link leads somewhere."""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from attrs import frozen

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("README.md")])
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@frozen
class Block:
    """A fenced block: its info string, its source and the line of the page it starts on."""

    info: str
    source: str
    line: int


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    found = _FENCE.finditer(text)
    return [Block(m[1].strip(), m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


def python_blocks(text: str) -> list[Block]:
    """Returns the Python blocks; an info string that is neither form is a misspelling."""
    found = [block for block in blocks(text) if block.info.split()[:1] == ["python"]]
    odd = [block for block in found if block.info not in ("python", "python no-run")]
    assert not odd, f"line {odd[0].line}: ```{odd[0].info} is neither python nor python no-run"
    return found


def run_page(text: str, page: str) -> None:
    """Runs the blocks in order in one module; lines in tracebacks are those of the page."""
    module = ModuleType("page_of_the_docs")
    sys.modules[module.__name__] = module  # where pickle looks up the classes of the page
    for block in python_blocks(text):
        code = compile("\n" * (block.line - 1) + block.source, page, "exec", dont_inherit=True)
        if block.info == "python no-run":
            reason = block.source.lstrip().startswith("#")
            assert reason, f"{page}:{block.line}: a no-run block starts with a comment that says why"
        else:
            exec(code, vars(module))


def dead_links(text: str, folder: Path) -> list[str]:
    """Returns the relative targets that do not exist, outside fenced blocks."""
    targets = _LINK.findall(_FENCE.sub("", text))
    relative = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [target for target in relative if not (folder / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), str(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_relative_links_of_a_page_resolve(page):
    assert dead_links(page.read_text(), page.parent) == []


def test_the_custom_judge_example_prints_the_verdicts_by_stage(capsys):
    example = runpy.run_path(str(ROOT / "examples" / "custom_judge.py"))
    example["main"]()
    printed = capsys.readouterr().out
    assert "reasoning" in printed
    assert "all others" in printed
    assert "1.5" in printed


# ---- The checks themselves -------------------------------------------------------------------


def test_blocks_share_a_namespace_and_errors_name_the_line_of_the_page():
    text = "# Title\n\n```python\na = 1\n```\n\ntext\n\n```python\nassert a == 1\nassert a == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_page(text, "page.md")
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 11)


def test_a_block_that_is_not_run_must_compile_and_say_why():
    run_page("```python no-run\n# Needs a GPU.\nmissing()\n```\n", "page.md")
    with pytest.raises(AssertionError, match=r"page\.md:2: a no-run block starts with a comment"):
        run_page("```python no-run\nmissing()\n```\n", "page.md")
    with pytest.raises(SyntaxError):
        run_page("```python no-run\n# Why.\nno python\n```\n", "page.md")
    with pytest.raises(AssertionError, match="line 2: ```python norun is neither"):
        run_page("```python norun\n```\n", "page.md")


def test_blocks_of_other_languages_are_left_alone():
    assert python_blocks("```\nnope(\n```\n```toml\n[a]\n```\n```pythonic\nnope(\n```\n") == []


def test_dead_links_are_found_outside_code(tmp_path):
    (tmp_path / "here.md").write_text("")
    text = "[a](here.md#part) [b](gone.md) [c](https://x.y/z) [d](#top) ![e](gone.png)\n"
    assert dead_links(text + "```\n[f](ignored.md)\n```\n", tmp_path) == ["gone.md", "gone.png"]
