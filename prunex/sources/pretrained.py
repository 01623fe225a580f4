"""transformers' wrapper of timm models, pruned as it was when it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from prunex.attach import attach
from prunex.checks import called_as, check_number
from prunex.errors import PrunexError
from prunex.handles.pretrained import ENTRY, MARK, PLACE
from prunex.sources.classes import WRAPPERS
from prunex.sources.folder import class_in, library, read_config, weight_files
from prunex.untrusted import read_tensors
from prunex.vit.weights import misfits

_ELSEWHERE = ("explainer", "model", "path")  # what would reach for another file, or another part of the model
_LARGEST = 2**16  # number among a timm model's arguments


@called_as('prunex.load_pretrained("folder")')
def load_pretrained(folder: str | Path) -> Any:
    """The wrapper of a timm model that ``save_pretrained`` wrote to a local folder, pruned as it was then.

    ``from_pretrained`` of transformers builds the timm model by its name, without what hung on it, and so gives a dense
    one: it reports the key ``open_with.prunex.load_pretrained`` as unexpected. A wrapper that was attached to as a
    whole (:func:`prunex.attach` or ``TokenPruning`` on the wrapper, or on a module that holds it) writes into its
    ``config.json`` what hangs on it; what was attached to its bare ``timm_model`` it does not know of.

    Args:
        folder: Where it was saved, of a ``TimmWrapperForImageClassification`` or a ``TimmWrapperModel``.

    Returns:
        The wrapper in eval mode, with token pruner, unit pruner and head as they were; without any if there were none.

    Raises:
        PrunexError: For a folder that is none, damaged, of another class, or whose weights do not fit what it says. A
            ViT of transformers itself is opened by :func:`prunex.from_transformers`, and what
            :func:`prunex.save` wrote by :func:`prunex.load`.

    >>> import prunex, tempfile, torch
    >>> from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    >>> config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"img_size": 64, "depth": 4})
    >>> model = TimmWrapperForImageClassification(config).eval()
    >>> pruning = prunex.attach(model, "evit", keep_ratio=0.5)
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> again, images = prunex.load_pretrained(folder), torch.randn(2, 3, 64, 64)
    >>> torch.equal(again(images).logits, model(images).logits)
    True
    """
    folder = Path(folder)
    config = read_config(folder)
    name = class_in(config)
    if name not in WRAPPERS:
        raise PrunexError(
            f"{folder} is of {name}, and this opens {' and '.join(WRAPPERS)}: prunex.from_transformers opens "
            "transformers' own ViTs, prunex.load what prunex.save wrote"
        )
    said = config.get(ENTRY) or {}
    if not isinstance(said, Mapping) or said.get("version", 1) != 1:
        raise PrunexError(f"{folder} was written by a later prunex, or its entry {ENTRY!r} was changed: upgrade prunex")
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)
    tensors.pop(MARK, None)
    # The wrapper writes timm's own names.
    tensors = {k if k.startswith(f"{PLACE}.") else f"{PLACE}.{k}": v for k, v in tensors.items()}
    _check_model(folder, config)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn is written over
            wrapper = _wrapper(folder, name, said)
    except PrunexError as error:
        raise PrunexError(f"{folder}: {error}") from error
    except Exception as error:  # a constructor's, or attach's, about whatever the file says
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise PrunexError(f"{folder} cannot be opened: {reason}") from error
    wrong = misfits(wrapper.state_dict(), tensors)
    if wrong:
        raise PrunexError(f"the weights in {folder} do not fit what its config.json says ({', '.join(wrong[:4])})")
    wrapper.load_state_dict(tensors, assign=True)
    return wrapper.eval()


def _wrapper(folder: Path, name: str, said: Mapping[str, Any]) -> Any:
    """A wrapper with all that hung on it; its weights are not read yet."""
    transformers = library()
    config = transformers.TimmWrapperConfig.from_pretrained(folder, local_files_only=True)
    wrapper = getattr(transformers, name)(config).eval()
    if hasattr(wrapper.config, ENTRY):  # which is written anew on each save
        delattr(wrapper.config, ENTRY)
    # Units first: tokens may be ranked by the attention of heads that are left.
    for kind in ("units", "pruning", "head"):
        spec = said.get(kind)
        if spec is None:
            continue
        if not isinstance(spec, Mapping) or any(spec.get(option) is not None for option in _ELSEWHERE):
            raise PrunexError(f"its entry {kind!r} is none of prunex's: was the file edited?")
        handle: Any = attach(wrapper, **spec)
        if kind == "pruning":
            handle.progress = check_number("progress", said.get("progress", 1.0), 0, 1)
    return wrapper


def _check_model(folder: Path, config: Mapping[str, Any]) -> None:
    """See that a timm model of a known name is described, by plain numbers of some size, before it is built."""
    architecture, args = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(architecture, str) or ":" in architecture or not timm.is_model(architecture.split(".")[0]):
        raise PrunexError(f"{folder} is of {str(architecture)[:80]!r}, which timm {timm.__version__} does not know")
    if not isinstance(args, Mapping):
        raise PrunexError(f"{folder}: model_args is no mapping: was the file edited?")
    for name, value in args.items():
        values = value if isinstance(value, list) else [value]
        # Names by which timm would fetch or read another file are no arguments of a model.
        plain = all(
            v is None or isinstance(v, bool | str) or (type(v) in (int, float) and abs(v) <= _LARGEST) for v in values
        )
        if not plain or name.startswith(("pretrained", "checkpoint", "cache")):
            raise PrunexError(
                f"{folder}: model_args {name[:40]!r} is nothing that describes a model: was the file edited?"
            )
