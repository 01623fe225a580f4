"""PyPI's ``prunex`` is another project whose package is called like ours: which of the two is there, and what to do.

In one folder of installed packages their files lie in one package, and who came last has its ``__init__.py``; removing
either one takes that file away. Ours in front warns; theirs, or none, in front of the rest of ours is an ImportError.
"""

import sys
import warnings
from pathlib import Path

REMEDY = "pip uninstall prunex, then install prunex-vit anew, with --force-reinstall --no-deps"


def installed_beside(folder: Path) -> list[str]:
    """Versions of the other project in the folder that our package lies in; none where it is not there."""
    # What pip knows is installed, whoever's files came last.
    infos = folder.glob("prunex-*.dist-info")
    return sorted(entry.name.removeprefix("prunex-").removesuffix(".dist-info") for entry in infos)


def warn_of_other(folder: Path) -> None:
    """One line where the other project was installed into the folder that our package lies in."""
    for version in installed_beside(folder):
        warnings.warn(
            f"PyPI's project prunex ({version}), which is not prunex-vit, is installed into the same package folder, "
            f"{folder / 'prunex'}: {REMEDY}",
            stacklevel=3,
        )


def check_ours() -> None:
    """Refuse to go on where ``import prunex`` gave anything but our ``__init__.py``."""
    if not hasattr(sys.modules.get("prunex"), "_PLACES"):
        raise ImportError(
            "'import prunex' gives another package than prunex-vit: PyPI's project prunex was installed into the same "
            f"folder, or removed from it: {REMEDY}"
        )
