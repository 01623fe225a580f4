"""The documentation site, built from the repository: ``python -m docs.site``, or ``make docs``.

Sphinx, Furo and MyST, since pages are Markdown that a forge shows as it is, docstrings use Sphinx's roles already, and
notebooks are pages too; mkdocs-material is in maintenance mode.
"""
