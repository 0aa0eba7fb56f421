"""The guide to the algebra runs as it stands."""

import re
from pathlib import Path


def test_every_block_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "algebra.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    space: dict[str, object] = {}
    exec(compile(code, "docs/algebra.md", "exec"), space)
    accuracy = space["accuracy"]
    assert isinstance(accuracy, dict)
    assert min(accuracy.values()) > 0.5
