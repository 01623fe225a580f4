"""Sphinx's settings. Missing references are errors (``nitpicky``, and ``-W`` on the command line)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from docs.site.reference import defined
from prunex import __version__

NAMES = defined(Path(__file__).parents[2])

project = "prunex"
author = "The prunex developers"
copyright = author  # noqa: A001  (Sphinx's name for it)
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
exclude_patterns: list[str] = []
nitpicky = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"prunex {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> nodes.Node | None:
    """Find what a docstring refers to by a name that is not the documented one.

    What exists and has no entry of its own is left as words, and so are types in signatures; a name that nothing has is
    a missing reference.
    """
    if node.get("refdomain") != "py":
        return None
    # A role shows its target as a literal, an annotation as plain words.
    if not isinstance(shown, nodes.literal):
        return shown
    domain: Any = env.get_domain("py")
    name = same(node["reftarget"], domain.objects)
    if name is not None:
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, shown)
    target = "." + node["reftarget"].lstrip("~.")
    return shown if any(f".{name}".endswith(target) for name in NAMES) else None


def same(target: str, documented: Iterable[str]) -> str | None:
    """The only documented name that ends as a target does: in class and method, or in its last part."""
    parts = target.lstrip("~.").split(".")
    for count in (min(2, len(parts)), 1):
        names = [name for name in documented if name.endswith("." + ".".join(parts[-count:]))]
        if len(names) == 1:
            return names[0]
    return None


def escape(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Bars in docstrings are absolute values, and no substitutions."""
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(``.+?``)", line)
            lines[number] = "".join(part if odd % 2 else part.replace("|", r"\|") for odd, part in enumerate(parts))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", escape)
