"""Run the notebooks and store their outputs, without what is of one machine alone: paths, warnings, execution times.

    python docs/run_notebooks.py [--out DIR] [NAME ...]

Without names those that need nothing but the extra ``notebooks``: their names begin with a number. Each runs in an
empty folder.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
LONG = 1800  # seconds that one cell may take
# Absolute paths of Unix and of Windows; an address on this machine's own network is none.
PATHS = re.compile(r"(?<![\w.:/<])/(?:tmp|home|root|usr|opt|var|work|mnt|Users|private)/|[A-Z]:\\")


def executed(path: Path) -> Any:
    """A notebook with new outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        NotebookClient(notebook, timeout=LONG, resources={"metadata": {"path": scratch}}).execute()
    return notebook


def cleaned(notebook: Any) -> Any:
    """The notebook without what differs between two runs or two machines; refused where a path is left."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        # Warnings and progress bars tell of the machine.
        cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for output in cell.outputs:
            texts = [output.get("text", ""), *map(str, output.get("data", {}).values())]
            if any(PATHS.search(text) for text in texts):
                raise SystemExit(f"an output holds a path of this machine: {cell.source.splitlines()[0]}")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    """Do what was asked for."""
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to write them; default in their place")
    args = parser.parse_args()
    # A clone that is not installed is imported all the same.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in args.names or [name for name in known if name[0].isdigit()]:
        print(name, file=sys.stderr, flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        nbformat.write(cleaned(executed(FOLDER / f"{name}.ipynb")), args.out / f"{name}.ipynb")


if __name__ == "__main__":
    main()
