"""README's Python blocks run as they stand, and print what their comments say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
for index, block in enumerate(BLOCKS):
    if not block.startswith("import"):  # it goes on from the one before
        BLOCKS[index] = BLOCKS[index - 1] + block

pytestmark = pytest.mark.whole


def test_there_are_blocks():
    """The pattern still finds them."""
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs_and_prints_its_comments(block, tmp_path, monkeypatch):
    """Each `print(...)  # text` prints that text."""
    monkeypatch.chdir(tmp_path)  # one saves a file
    expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, "README.md", "exec"), {})
    assert out.getvalue().splitlines() == expected
    assert expected


@pytest.mark.parametrize("tag", ["main", "tests"])
def test_commands_are_where_ci_looks_for_them(tag):
    """A marker line is followed by a bash block."""
    assert re.search(rf"^<!-- {tag} -->\n```bash\n", README.read_text("utf-8"), re.M)
