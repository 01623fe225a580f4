"""Slim folders to the Hugging Face Hub: what is saved, under a name; huggingface_hub comes with timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from prunex.brief import brief
from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.handles.tokens import Pruning
from prunex.hub import HUB, in_one_line, read_name
from prunex.slim.files import CARD, load, save
from prunex.vit.mount import mounted

PICTURE = "kept.png"


@called_as('prunex.push_to_hub(model, "me/deit-small-evit")', model=nn.Module, name=str)
def push_to_hub(
    model: nn.Module,
    name: str,
    *,
    images: Tensor | None = None,
    labels: Sequence[str] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "prunex.push_to_hub",
) -> str:
    """Upload a ViT, pruned or dense, to the Hugging Face Hub: weights as safetensors, description, and model card.

    What is uploaded is what :func:`prunex.save` writes; ``prunex.load("hf-hub:me/deit-small-evit")`` opens it, and
    timm opens what is no pruner's of it under the same name.

    Args:
        model: As for :func:`prunex.save`.
        name: Of the repository, ``"owner/name"``; made where it is not there.
        images: float [B, C, H, W], as the model takes them: the card shows what each stage of a pruned model keeps of
            up to four. They are published; None: no picture.
        labels: As for :func:`prunex.save`.
        mean: Likewise.
        std: Likewise.
        private: Whether a repository that is made can be seen by its owner alone; None: as the owner's default is.
        token: Of the Hub; None: the one that ``hf auth login`` left, or that of ``HF_TOKEN``.
        message: Of the commit.

    Returns:
        The address of the repository.

    Raises:
        PrunexError: For a name that is none, a model that :func:`prunex.save` refuses, images of a model that is not
            pruned, or whatever the Hub or the network says.
    """
    from huggingface_hub import HfApi

    # All of the folder before the first request: what is refused has made no repository.
    repository, revision = read_name(name)
    if revision is not None:
        raise PrunexError(f"name={name!r} has a revision: what is uploaded is a new commit; leave @{revision} out")
    with TemporaryDirectory(prefix="prunex-") as scratch:
        folder = save(model, Path(scratch) / "model", labels=labels, mean=mean, std=std)
        card = (folder / CARD).read_text(encoding="utf-8").replace("path/to/this/folder", HUB + repository)
        if images is not None:
            _draw(folder, images)
            card += f"\nWhat each stage keeps, image by image:\n\n![kept patches]({PICTURE})\n"
        (folder / CARD).write_text(card, encoding="utf-8")
        with in_one_line(f"cannot upload to {repository}"):
            api = HfApi(token=token)
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return address


def _draw(folder: Path, images: Tensor) -> None:
    """The picture of the card: by the model as it will be loaded."""
    model = load(folder)
    if mounted(model) is None:
        raise PrunexError("images show what a pruned model keeps of them, and this one is dense: leave them out")
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise PrunexError(f"images={brief(images)} is not allowed: give float [B, C, H, W], as the model takes them")
    with torch.no_grad():
        model(images[:4].float().cpu())
    Pruning(model).trace.show(images[:4].float()).save(folder / PICTURE)
