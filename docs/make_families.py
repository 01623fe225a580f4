"""Prints the README's table of families, from the table that the tests build every family by."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.vit.families import table  # noqa: E402

if __name__ == "__main__":
    print(table())
