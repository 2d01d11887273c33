"""The README's swap-in example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_swap_in_example(capsys):
    example = re.search(r"## Swap it in.*?```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    exec(compile(example, str(README), "exec"), {})
    assert "student_vds" in capsys.readouterr().out
