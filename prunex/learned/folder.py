"""Networks that a recipe trains beside a model, on disk and as options: safetensors and config.json, no pickles."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.files import is_there, write_whole
from prunex.untrusted import read_json, read_tensors
from prunex.vit.anatomy import Anatomy, ViT, read
from prunex.vit.describe import describe
from prunex.vit.mount import mounted
from prunex.vit.weights import misfits

VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"

M = TypeVar("M", bound=nn.Module)


def how(kind: str) -> str:
    """What to do where a trained network is missing."""
    return f"train one with prunex fit --config configs/digits/{kind}.yaml"


class Beside(nn.Module):
    """A network beside the ViT that it explains, which is part of it: frozen, in eval mode whatever is trained."""

    kind: ClassVar[str]  # the method's name
    explained: ClassVar[str]  # the attribute that holds the ViT, by which folders describe it too

    def keep(self, model: ViT) -> Anatomy:
        """Hold a frozen copy of the ViT, which must have a classifier and all its tokens; its anatomy."""
        anatomy = read(model)
        if anatomy.classes < 1:
            raise PrunexError(f"the {self.explained} has no classifier (num_classes=0): give one that does")
        if mounted(model) is not None:
            raise PrunexError(f"the {self.explained} is pruned: detach() it first, all its patch tokens are read")
        self.add_module(self.explained, copy.deepcopy(model).eval().requires_grad_(False))
        return anatomy

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; the explained ViT stays in eval mode."""
        super().train(mode)
        self.get_submodule(self.explained).eval()
        return self

    def described(self) -> dict[str, Any]:
        """What builds the network beside the ViT, in plain values."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json`` to a folder, made if missing, for ``load_explainer``."""
        folder = Path(folder)
        vit: Any = self.get_submodule(self.explained)
        spec = {self.explained: describe(vit), **self.described()}
        config = {"prunex": {"version": VERSION, "kind": self.kind, **spec}}
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The description last: a new folder that has one has its weights.
            write_whole(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
            write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        except OSError as error:
            raise PrunexError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
        return folder


def read_folder(path: str | Path, kind: str, needs: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """The description, which must have a key, the tensors and the folder that :meth:`Beside.save` wrote."""
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:  # of a user that is not known
        raise PrunexError(f"explainer={str(path)!r} is no path ({error}): give the explainer's folder") from error
    folder = folder.parent if folder.name == WEIGHTS else folder
    for name in (CONFIG, WEIGHTS):
        if not is_there(folder / name, Path.is_file):
            raise PrunexError(
                f"explainer={str(path)!r} has no {name}: give a folder that the recipe wrote, or {how(kind)}"
            )
    config = read_json(folder / CONFIG)
    ours = config.get("prunex") if isinstance(config, Mapping) else None
    if not isinstance(ours, Mapping) or ours.get("kind") != kind or needs not in ours:
        raise PrunexError(f"{folder / CONFIG} is not of a {kind} explainer: {how(kind)}")
    if ours.get("version") != VERSION:
        raise PrunexError(
            f"{folder / CONFIG} is of format {ours.get('version')!r}, this prunex reads {VERSION}: upgrade prunex-vit"
        )
    return dict(ours), read_tensors(folder / WEIGHTS), folder


def load_into(module: M, tensors: Mapping[str, Tensor], folder: Path) -> M:
    """Tensors of a folder into the module built from its description: frozen, in eval mode, each in its own dtype."""
    odd = misfits(module.state_dict(), tensors)
    if odd:
        raise PrunexError(f"{folder / WEIGHTS} does not fit {CONFIG} ({', '.join(odd[:4])}): save the explainer again")
    # Layers of several types would only fail in the first forward, in torch's words.
    floats = sorted({str(v.dtype) for v in tensors.values() if v.is_floating_point()})
    if len(floats) > 1:
        raise PrunexError(f"{folder / WEIGHTS} holds {' and '.join(floats)}: an explainer has one type; save it again")
    # Assigned, not copied: a copy would take the dtype in which the module was built.
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()


def held(given: Any, wanted: type[M], kind: str, instead: str = "") -> M | None:
    """The one network of a kind that a user's ``explainer=`` holds, None for a path; ``instead`` is named without."""
    if given is None:
        more = f"; or use {instead}" if instead else ""
        raise PrunexError(
            f"{kind} needs a trained explainer: {how(kind)} and pass explainer=FOLDER "
            f"(on the command line --option {kind}.explainer=FOLDER){more}"
        )
    if isinstance(given, nn.Module):
        networks = [m for m in given.modules() if isinstance(m, wanted)]
        if len(networks) != 1:
            raise PrunexError(f"{type(given).__name__} holds {len(networks)} {kind} explainers: give one; {how(kind)}")
        return networks[0]
    if not isinstance(given, str | Path):
        raise PrunexError(
            f"explainer={given!r} is not allowed: give the explainer's folder or the module itself; {how(kind)}"
        )
    return None


def check_fits(theirs: Anatomy, ours: Anatomy, kind: str) -> None:
    """Refuse a network that was trained beside a model of other classes, image or patch sizes."""
    for what, a, b in (
        ("number of classes", theirs.classes, ours.classes),
        ("image size", theirs.image, ours.image),
        ("patch size", theirs.patch, ours.patch),
    ):
        if a != b:
            raise PrunexError(
                f"this explainer's {what} is {a}, the model's {b}: {how(kind).replace('one', 'one for it')} and the "
                "model's own data, model_args and num_classes"
            )


def quietly() -> Any:
    """Building draws initial weights; inside this the caller's random numbers stay."""
    return torch.random.fork_rng(devices=[])
