"""The reader of Markdown refuses what it does not know, so that no block goes unread."""

import pytest

from tests.documentation.markdown_blocks import NEEDS, Inline, read_blocks, read_inline
from tests.documentation.shell_reading import read_commands
from tests.documentation.stand_ins import stand_in


def blocks(text):
    return read_blocks("x.md", text)


def test_a_block_has_its_language_line_and_mark():
    text = "# x\n\n<!-- run: needs gpu, network; continues y.md -->\n```python\na\n\nb\n```\n"
    (block,) = blocks(text)
    assert (block.language, block.line, block.code) == ("python", 5, "a\n\nb\n")
    assert block.clause("needs") == ("gpu", "network")
    assert block.clause("continues") == ("y.md",)
    assert not block.has("given")
    assert str(block) == "x.md:5"


def test_a_longer_fence_holds_a_shorter_one():
    (block,) = blocks("<!-- run: text -->\n````\n```sh\n```\n````\n")
    assert block.code == "```sh\n```\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```json\n{}\n```", r"x.md:1: a block in 'json': expected one of 'python'"),
        ("\n```\nx\n```", "x.md:1: a block without a language: name its language, or mark it"),
        ("<!-- run: slow -->\n```sh\nx\n```", r"x.md:1: the clause 'slow' before a block in 'sh'"),
        ("<!-- run: text -->\n```sh\nx\n```", "the clause 'text' before a block in 'sh'"),
        ("<!-- run: continues -->\n```sh\nx\n```", "the clause 'continues'"),
        ("<!-- run: needs luck -->\n```sh\nx\n```", "needs luck: expected network, gpu"),
        ("<!-- run: needs -->\n```sh\nx\n```", "x.md:1: needs : expected network, gpu"),
        ("<!-- run:needs gpu -->\n```sh\nx\n```", "expected <!-- run: CLAUSE; CLAUSE -->"),
        ("<!-- run: needs gpu -->\n\n```sh\nx\n```", "x.md:1: a mark that stands before no block"),
        ("a\n\n    x = 1\n", "x.md:3: an indented block: fence it"),
        ("```sh\nx\n", "x.md:1: a block without an end"),
    ],
)
def test_what_nothing_could_run_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        blocks(text)


def test_inline_code_is_read_outside_of_blocks_and_over_line_ends():
    text = "a `b` c\n```sh\n`no`\n```\n`d\ne` and ``f`g``\n"
    assert read_inline("x.md", text) == [
        Inline("x.md", 1, "b"), Inline("x.md", 5, "d e"), Inline("x.md", 6, "f`g"),
    ]  # fmt: skip


def test_the_shell_reads_quotes_variables_and_functions(tmp_path):
    code = "export A=1\nask() { make \"$1 $A\" 'b c'; }\nask x  # y\nask \\\n  z\n"
    code += ".venv/bin/make 'w'\n"
    (block,) = blocks(f"```sh\n{code}```")
    commands = read_commands(block, ["make"], tmp_path)
    assert [command.words for command in commands] == [("x 1", "b c"), ("z 1", "b c"), ("w",)]
    assert commands[0].environment["A"] == "1"


def test_a_program_that_no_check_knows_is_refused(tmp_path):
    (block,) = blocks("```sh\nmake x\nrm -r x\n```")
    with pytest.raises(AssertionError, match=r"rm.* not found"):
        read_commands(block, ["make"], tmp_path)


@pytest.mark.parametrize("needs", NEEDS)
def test_a_need_that_a_block_does_not_have_is_refused(needs):
    with pytest.raises(ValueError, match=f"needs {needs}, but the block has none of"):
        stand_in("print(1)\n", needs)
