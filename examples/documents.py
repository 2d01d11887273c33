"""Questions with documents as evidence, from what Python has on this machine: functions and their docstrings.

python examples/documents.py --train documents.jsonl --eval held_out.jsonl
"""

import argparse
import ast
import json
import random
import sysconfig
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", default=sysconfig.get_path("stdlib"), help="with Python files (the standard library)")
parser.add_argument("--train", default="documents.jsonl", help="file to write")
parser.add_argument("--eval", default="held_out.jsonl", help="another")
parser.add_argument("--held_out", type=int, default=96, help="questions in it")
parser.add_argument("--least", type=int, default=200, help="characters of the shortest document")
parser.add_argument("--most", type=int, default=350, help="of the longest")
options = parser.parse_args()

rows = {}
for path in sorted(Path(options.folder).glob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            text = " ".join((ast.get_docstring(node) or "").split())
            if options.least <= len(text) <= options.most:
                rows[text] = {"question": f"What does {node.name} of Python's {path.stem} do?", "document": text}

found = [json.dumps(row) + "\n" for row in rows.values()]
random.Random(0).shuffle(found)
held_out = min(options.held_out, len(found) // 2)
for name, part in ((options.train, found[held_out:]), (options.eval, found[:held_out])):
    Path(name).write_text("".join(part))
    print(f"{name}: {len(part)} questions")
