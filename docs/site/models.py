"""The page of model families, which is what the README says of models."""

from pathlib import Path


def pages(root: Path) -> dict[str, str]:
    """The page by its name."""
    said = (root / "README.md").read_text().partition("\nModels: ")[2].partition("\n## ")[0].replace("](docs/", "](")
    if not said:
        raise ValueError("README.md has no paragraph that begins with 'Models: ': put it back")
    return {"models.md": f"# Which models\n\n{said[0].upper()}{said[1:]}\n"}
