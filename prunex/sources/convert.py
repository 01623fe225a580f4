"""From a ViT of transformers, live or in a local folder, to its timm twin, which was seen to answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunex.attach import attach
from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.sources.folder import open_folder
from prunex.sources.parts import Parts, known_class, pair
from prunex.sources.said import describe_twin
from prunex.sources.twin import twin_of
from prunex.vit.fold import copy_of
from prunex.vit.weights import is_plain

TOLERANCE = 1e-5  # of the largest output


@called_as('prunex.from_transformers("folder")')
def from_transformers(
    model_or_folder: nn.Module | str | Path,
    img_size: int | tuple[int, int] | None = None,
    processor: Any = None,
) -> Any:
    """The timm model that answers as a ViT of Hugging Face transformers does, for all that prunex does with timm ViTs.

    Known are ViT, DeiT (distilled or not), DINOv2 (with registers, SwiGLU), DINOv3, the image towers of CLIP, SigLIP
    and SigLIP 2 with their projection, and BEiT: base models, those for image classification, and whole CLIP models.
    The twin has copies of the weights. It and the model were given one random image before it is returned.

    It gives what the model is used for: logits where there is a classifier; what ``get_image_features`` gives of CLIP
    and SigLIP; else the class token behind the last norm (a base ViT's pooling layer is left out). A layer without a
    bias where timm's has one, as CLIP's projection, has one of zeros. A DINOv2 for image classification reads the class
    token and the mean patch: its twin has the head ``mean_patch`` (see :func:`prunex.attach`). Dropout and stochastic
    depth are not taken over.

    Args:
        model_or_folder: A model of transformers, which stays as it is; or a local folder that ``save_pretrained``
            wrote, of which safetensors alone are read. Nothing is downloaded, unpickled, or run that the folder brings.
        img_size: Height and width of the images the twin is for, in pixels; None: the model's own. Positions are
            resampled as the model itself does it, so that the twin answers as the model does at that size; it takes no
            other, but for DINOv3's, which takes any.
        processor: The image processor, or a processor that has one, whose mean and standard deviation are taken over;
            None: the one in the folder, or in the folder the model came from.

    Returns:
        A timm ``VisionTransformer``, ``VisionTransformerDistilled``, ``Eva`` or ``Beit`` in eval mode, on the model's
        device and in its dtype. ``pretrained_cfg`` has mean and standard deviation of pixels in 0..1, and
        ``label_names`` the classes, where the model names them.

    Raises:
        PrunexError: For another class, which is named, or a part that timm has none like; a model that is quantised,
            adapted or without values; a size that is no multiple of the patch; a folder that is none, damaged or
            without safetensors; a twin that differs from the model by more than 1e-5 of its largest output.

    >>> import prunex, torch
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> config = ViTConfig(image_size=64, hidden_size=48, num_hidden_layers=4, num_attention_heads=3)
    >>> theirs = ViTForImageClassification(config).eval()
    >>> processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    >>> ours = prunex.from_transformers(theirs, processor=processor)
    >>> images = torch.randn(2, 3, 64, 64)
    >>> torch.allclose(ours(images), theirs(images).logits, atol=1e-5)
    True
    >>> prunex.attach(ours, "evit", keep_ratio=0.7).counts()
    [13, 11, 9]
    """
    size = None if img_size is None else pair(img_size)
    if isinstance(model_or_folder, nn.Module):
        model, folder = model_or_folder, _origin(model_or_folder)
        known_class(model)
        _check_whole(model)
        weight = next(model.parameters())
        device, dtype = weight.device, weight.dtype
        model = _to_read(copy_of(model), dtype)
    elif isinstance(model_or_folder, str | Path):
        folder = Path(model_or_folder)
        model = open_folder(folder).eval()
        device, dtype = torch.device("cpu"), torch.float32
    else:
        kind = type(model_or_folder).__name__
        raise PrunexError(f"a {kind} is no model: give a model of transformers, or a local folder of one")
    twin = _checked_twin(model, size)
    describe_twin(twin, model.config, processor, folder)
    twin.to(device=device, dtype=dtype)
    return twin


def _origin(model: Any) -> Path | None:
    """The local folder that a model was loaded from, if that is known."""
    # Set by from_pretrained to what it was given, a name on the Hub as well.
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    folder = Path(str(name))
    return folder if name and folder.is_dir() else None


def _check_whole(model: Any) -> None:
    """Refuse weights that are not there, or are no plain numbers."""
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise PrunexError(f"{name} is quantised: convert it before it is, and quantise what prunex exports")
    for path, module in model.named_modules():
        packed = callable(getattr(module, "weight", None))  # as torch's quantised layers have it
        if packed or hasattr(module, "base_layer") or (isinstance(module, nn.Linear) and not is_plain(module)):
            raise PrunexError(
                f"{path} of {name} is a {type(module).__name__} and no plain linear layer: merge adapters "
                "(merge_and_unload()) and convert before quantising"
            )
    for path, weight in model.named_parameters():
        if weight.is_meta:
            raise PrunexError(f"{path} of {name} is on the meta device and has no values: load the weights first")
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise PrunexError(f"{path} of {name} is {weight.dtype}, quantised or sharded: convert the plain model")


def _to_read(copy: Any, dtype: torch.dtype) -> Any:
    """A copy to convert: on the CPU, precise, in eval mode, with attention that runs there."""
    # In half precision nothing could be compared to five digits.
    copy.to("cpu", torch.float64 if dtype == torch.float64 else torch.float32)
    if hasattr(copy, "set_attn_implementation"):
        copy.set_attn_implementation("eager")
    return copy.eval()


@torch.no_grad()
def _checked_twin(model: Any, size: tuple[int, int] | None) -> Any:
    """The twin, once it was seen to answer as the model does."""
    name = type(model).__name__
    try:
        parts = Parts(model, size)
        twin = _with_head(parts, twin_of(parts))
        apart = difference(parts, twin)
        if apart > TOLERANCE and next(model.parameters()).dtype == torch.float32:
            # Rounding grows with depth; whatever else is different stays so in double precision.
            apart = difference(Parts(copy_of(model).double(), parts.size), copy_of(twin).double())
    except PrunexError:
        raise
    except Exception as error:  # what a model says of a size it does not take, or of parts it lost
        raise PrunexError(
            f"{name} cannot be converted: {type(error).__name__} {str(error)[:200]}; was it altered, or does it not "
            "take images of this size?"
        ) from error
    if not apart <= TOLERANCE:
        raise PrunexError(
            f"the timm twin of {name} differs by {apart:.2g} of its largest output, more than {TOLERANCE:g}: something "
            "in this model (hooks, layers put in, this version of transformers) is not known"
        )
    return twin


def _with_head(parts: Parts, twin: Any) -> Any:
    """The twin with the part of a classifier that timm's own has no place for: what reads the mean patch."""
    if parts.known.both and parts.head is not None:
        head: Any = attach(twin, "mean_patch").head
        head.values.weight.copy_(parts.head.weight[:, parts.config.hidden_size :])
    return twin


def difference(parts: Parts, twin: Any) -> float:
    """How far the answers to one random image lie apart, as a share of the largest number; NaN for no numbers."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(1, parts.config.num_channels, *parts.size, generator=draw)
    weight = next(twin.parameters())
    theirs: Tensor = parts.answer(images.to(weight))
    ours = twin(images.to(weight))
    if ours.shape != theirs.shape:
        raise PrunexError(
            f"the timm twin gives {list(ours.shape)} where {type(parts.model).__name__} gives {list(theirs.shape)}"
        )
    return float((ours - theirs).abs().max() / theirs.abs().max())
