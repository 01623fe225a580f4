"""Building a timm model by name, and its weights as safetensors files: reading, fitting, writing.

The weights that ship with the package are written by ``SaveWeights`` at the end of ``prunex fit``; their metadata
holds the architecture, the command and the accuracy.
"""

import json
import logging
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from safetensors import safe_open
from safetensors.torch import save
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.pictures.arrays import write_whole
from prunex.recipes.given import SHIPPED, check_weights
from prunex.untrusted import read_tensors
from prunex.vit.mount import TOKENS, UNITS
from prunex.vit.rebuild import Still

log = logging.getLogger(__name__)

# Arguments of timm.create_model that read files, download or place: none of a model's own.
_NOT_THE_MODELS = (
    "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable", "no_jit",
    "device", "dtype",
)  # fmt: skip
HEADS = ("head.", "head_dist.")
_ROOM, _TIMES, _DEEP, _PIXELS = 2**30, 64, 1000, 2**26  # bytes of a model beside its weights', blocks, pixels


def create_model(
    architecture: str, num_classes: int | None, model_args: Mapping[str, Any] | None = None, pretrained: bool = False
) -> nn.Module:
    """A timm model by name, with errors that say what to change.

    ``num_classes`` None is timm's own for this name; ``model_args`` override the constructor's arguments.

    >>> create_model("vit_tiny_patch16_224", 10, {"img_size": 32, "depth": 2}).num_classes
    10
    """
    foreign = [name for name in model_args or {} if name in _NOT_THE_MODELS]
    if foreign:
        raise PrunexError(f"model_args={foreign[0]} is not allowed: give arguments of the model; weights= takes a file")
    # With a colon timm looks elsewhere, and says itself what is wrong.
    if ":" not in architecture and not timm.is_model(architecture.split(".")[0]):
        near = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise PrunexError(
            f"unknown architecture {architecture!r}: did you mean {' or '.join(near) or 'a ViT'}? "
            "timm.list_models('*vit*') lists what there is"
        )
    try:
        return timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, **dict(model_args or {}))
    except Exception as error:  # timm passes on whatever its constructors and the download raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        wrong = f"architecture {architecture!r} does not accept model_args={dict(model_args or {})!r} ({reason})"
        if pretrained:
            wrong = (
                f"pretrained=True for {architecture!r} failed ({reason}): timm's weights could not be downloaded or do "
                "not fit; give a local safetensors file as weights=, or pretrained=False"
            )
        raise PrunexError(wrong) from error


def read_weights(weights: str) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, or of the shipped weights of that name."""
    with _located(weights) as path:
        # Nothing is unpickled here.
        if zipfile.is_zipfile(path):
            raise PrunexError(
                f"weights={weights!r} is a file of torch.save, which may run code when it is read: convert it once by "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors'); of a Lightning "
                "checkpoint take what lies in its ['state_dict']"
            )
        try:
            return read_tensors(path)
        except PrunexError as error:
            raise PrunexError(
                f"weights={weights!r} is not a readable safetensors file ({error}): save it again"
            ) from error


@contextmanager
def _located(weights: str) -> Iterator[Path]:
    path = check_weights(weights)
    if path is not None:
        yield path
    else:
        with as_file(SHIPPED / f"{weights}.safetensors") as shipped:
            yield shipped


def load_weights(model: nn.Module, weights: str) -> list[str]:
    """Load a safetensors file into a timm ViT, and give the names of the parameters that it did not set.

    Position embeddings of another patch grid are resampled. A classifier head of another width is left as it is
    (and logged); so is a missing one.
    """
    state, parameters = read_weights(weights), model.state_dict()
    # A checkpoint of a LightningModule holds the model under a name.
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    if not state.keys() & parameters.keys() and inner.keys() & parameters.keys():
        state = inner
    _resample(state, parameters, model, weights)
    # Fine-tuning on other classes begins with a new classifier.
    for name in [n for n in state if n.startswith(HEADS) and n in parameters and state[n].shape != parameters[n].shape]:
        log.warning(
            "Classifier %s of %s has shape %s, the model needs %s: it starts untrained.",
            name, weights, list(state[name].shape), list(parameters[name].shape),
        )  # fmt: skip
        del state[name]
    missing = [name for name in parameters if name not in state]
    problems: dict[str, list[str]] = {"missing": [name for name in missing if not name.startswith(HEADS)]}
    for name, tensor in state.items():
        # DINOv2's files hold a mask token, which its own training alone used.
        if name not in parameters and not name.startswith(HEADS) and name != "mask_token":
            problems.setdefault("unknown", []).append(name)
        elif name in parameters and tensor.shape != parameters[name].shape:
            shapes = f"{name} {list(tensor.shape)} instead of {list(parameters[name].shape)}"
            problems.setdefault("wrong shape", []).append(shapes)
    said = [f"{k}: {', '.join(v[:3])}{' and others' * (len(v) > 3)}" for k, v in problems.items() if v]
    if said:
        raise PrunexError(
            f"weights={weights!r} do not fit the model ({'; '.join(said)}): check architecture and model_args"
        )
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in parameters}, strict=False)
    return missing


def _resample(state: dict[str, Tensor], parameters: Mapping[str, Tensor], model: Any, weights: str) -> None:
    """Bring position embeddings in a state dict to the model's patch grid."""
    position = state.get("pos_embed")
    if position is None or "pos_embed" not in parameters or not position.ndim == parameters["pos_embed"].ndim == 3:
        return
    if position.shape[1] == parameters["pos_embed"].shape[1]:
        return
    grid = model.patch_embed.grid_size
    # With no_embed_class, as in DeiT III, only patches have positions.
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    try:
        state["pos_embed"] = resample_abs_pos_embed(position, grid, num_prefix_tokens=prefix)
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError, AssertionError) as error:
        raise PrunexError(
            f"weights={weights!r}: position embeddings {list(position.shape)} cannot be resampled to the grid "
            f"{grid} with {prefix} prefix tokens: give weights of this architecture"
        ) from error
    log.info("Resampled position embeddings from %d to %d tokens.", position.shape[1], state["pos_embed"].shape[1])


def model_from_weights(architecture: str, weights: str, image_size: int | None = None) -> nn.Module:
    """A timm ViT with the weights of a safetensors file, as wide and (where it tells) as large as these, in eval mode.

    >>> model_from_weights("vit_tiny_patch16_224", "digits").num_classes
    10
    """
    state, args = read_weights(weights), _model_args(architecture, weights)
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    # As many classes as the file's classifier has; without one the model has none.
    head = state.get("head.weight")
    classes = 0 if head is None or head.ndim == 0 else len(head)
    if image_size is not None:
        args["img_size"] = image_size
    # Metadata of a small file could describe a model that fills the memory.
    check_described(architecture, classes, args, state)
    model = create_model(architecture, classes, args)
    # Position embeddings tell the size of the images where the file says nothing.
    side = None if "img_size" in args else _side(model, state.get("pos_embed"))
    if side is not None:
        model = create_model(architecture, classes, {**args, "img_size": side})
    load_weights(model, weights)
    return model.eval()


def _model_args(architecture: str, weights: str) -> dict[str, Any]:
    """Constructor arguments that the file's metadata tell for this architecture."""
    with _located(weights) as path, safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("architecture") != architecture:
        return {}
    try:
        return dict(json.loads(metadata.get("model_args", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise PrunexError(f"weights={weights!r}: its metadata are damaged ({error}); save it again") from error


def check_described(architecture: str, classes: int | None, args: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a model that a file's metadata describe and that is far larger than its tensors, before it is built."""
    file_bytes = sum(t.numel() * t.element_size() for t in state.values())
    numbers: list[Any] = []
    for depth in (args.get("depth"), args.get("depths")):
        numbers += depth if isinstance(depth, list | tuple) else [depth or 0]
    if any(not isinstance(n, int) or n > max(_DEEP, len(state)) for n in numbers):
        raise PrunexError(f"model_args={str(args)[:120]} describe more blocks than the file has tensors")
    try:
        # Without memory and without drawing random numbers.
        with torch.device("meta"), Still():
            twin = create_model(architecture, classes, args)
    except PrunexError as error:
        if "meta tensor" in str(error):  # older versions of timm read values while they build
            return
        raise
    embed: Any = getattr(twin, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or (0, 0)
    if height * width * args.get("in_chans", 3) > _PIXELS:
        raise PrunexError(f"model_args={str(args)[:120]} describe images of {height} x {width} pixels")
    size = sum(t.numel() * t.element_size() for t in (*twin.parameters(), *twin.buffers()))
    if size > _ROOM + _TIMES * file_bytes:
        raise PrunexError(f"model_args={str(args)[:120]} describe {size:,} bytes, the file holds {file_bytes:,}")


def _side(model: nn.Module, position: Tensor | None) -> int | None:
    """The square image, in pixels, that position embeddings belong to; None where it is the model's own or unknown."""
    embed: Any = getattr(model, "patch_embed", None)
    positions: Any = getattr(model, "pos_embed", None)
    if position is None or embed is None or positions is None or position.ndim != 3:
        return None
    grid, patch = embed.grid_size, embed.patch_size
    patches = position.shape[1] - (positions.shape[1] - grid[0] * grid[1])
    side = math.isqrt(max(patches, 0))
    square = side > 0 and side * side == patches and patch[0] == patch[1]
    return side * patch[0] if square and (side, side) != tuple(grid) else None


class SaveWeights(Callback):
    """Writes the classifier's weights as one safetensors file, to a ``path`` of that ending, when training ends.

    The metadata tells how to build the model, which command made it, how much it was trained, and its metrics.
    """

    def __init__(self, path: str) -> None:
        if not path.endswith(".safetensors"):
            raise PrunexError(f"path={path!r} is not allowed: give a file name ending in .safetensors")
        self.path = path

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        model: nn.Module = pl_module.model  # type: ignore[assignment]
        state = {
            name: tensor.detach().float().cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if not name.startswith((f"{TOKENS}.", f"{UNITS}."))  # a pruner's parameters are not the classifier's
        }
        hparams = pl_module.hparams
        metrics = {k: f"{float(v):.4f}" for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        metadata = {
            "architecture": str(hparams["architecture"]),
            "num_classes": str(hparams["num_classes"]),
            "model_args": json.dumps(hparams["model_args"] or {}),
            "command": " ".join(["prunex", *sys.argv[1:]]),
            "epochs": str(trainer.current_epoch),
            "batches": str(trainer.global_step * trainer.accumulate_grad_batches),
        }
        # safetensors takes tensors that lie contiguously.
        write_whole(Path(self.path), save(state, metadata=metadata | metrics))  # with the user's file mode
        log.info("Wrote %s (%s).", self.path, ", ".join(f"{name}={value}" for name, value in metrics.items()))
