"""Writes the README's table of families, from the table that the tests build every family by."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.vit.families import table  # noqa: E402

BETWEEN = re.compile(r"(<!-- families -->\n).*?(\n<!-- /families -->)", re.DOTALL)

if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(BETWEEN.sub(lambda found: found[1] + table() + found[2], readme.read_text()))
