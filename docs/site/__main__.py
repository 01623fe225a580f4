"""Build the site: python -m docs.site [OUT]."""

import sys
from pathlib import Path

from sphinx.cmd.build import main

from docs.site.tree import ROOT, stage

if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    sources = ROOT / "build" / "docs"
    stage(sources)
    options = ["-q", "-W", "--keep-going", "-j", "auto", "-d", f"{ROOT}/build/doctrees", "-c", f"{ROOT}/docs/site"]
    sys.exit(main([*options, "-D", f"html_extra_path={sources}/llms.txt", str(sources), str(out)]))
