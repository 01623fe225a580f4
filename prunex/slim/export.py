"""Graphs for other runtimes, checked against the model before they appear."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.files import write_or_refuse
from prunex.formats import FORMATS, SUFFIXES, check_format
from prunex.handles.base import handle_on
from prunex.handles.tokens import Pruning
from prunex.slim.metadata import class_names, known_cfg
from prunex.slim.runtimes import BATCH, Outputs, open_graph, write_graph
from prunex.slim.slim import slim, slim_of
from prunex.version import __version__
from prunex.vit.anatomy import check_images, find
from prunex.vit.describe import outline
from prunex.vit.forward import predict, run
from prunex.vit.late import left_by
from prunex.vit.mount import mounted, mounted_head
from prunex.vit.units import Backbone

_MORE = 6  # batches of random images beside the example, where none of its images can be compared
_TRIES, _ROUNDINGS = 8, 8
_FIXED = ("executorch",)  # formats whose graphs take one image at a time


class Graph(nn.Module):
    """The inference graph of a slim model: images in, logits and what else is asked for out, no side effects."""

    def __init__(self, model: nn.Module, kept: bool = False, head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.kept, self.head = kept, head

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits [B, classes], or these and what else was asked for, as :meth:`outputs` has them."""
        outputs = tuple(self.outputs(images).values())
        return outputs if len(outputs) > 1 else outputs[0]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """By name: ``logits``, what a head has beside them, and ``kept``, bool [B, gh, gw], of the last stage."""
        vit: Any = self.model
        if isinstance(vit, SwinTransformer):
            return {"logits": vit(images)}
        if not self.head:
            prediction = predict(vit, images, masked=False)
            outputs = {"logits": prediction.logits}
            state = prediction.state
        else:
            state, explainable = run(vit, images, masked=False), mounted_head(vit)
            reading = explainable.read(vit, state.tokens, left_by(state))
            outputs = {"logits": reading.logits, **explainable.head.outputs(reading)}
        if self.kept:
            outputs["kept"] = state.trace.kept()
        return outputs


@called_as('prunex.export(model, "model.onnx")', model=nn.Module)
def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor | None = None,
    *,
    kept: bool = False,
    head: bool = False,
    format: str | None = None,
) -> Path:
    """Write the model as a graph, and check the graph against the model before the file appears.

    A model with ``count="adaptive"`` is exported with fixed counts, the expected ones, and a warning says so.

    Args:
        model: What :func:`prunex.slim` gave, or any supported ViT or timm Swin (it is slimmed first).
        path: Ends in ``.onnx``, ``.pt2`` (torch.export), ``.xml`` (OpenVINO; weights go into a ``.bin`` beside it) or
            ``.pte`` (ExecuTorch).
        example: float [B, C, H, W]; None: random images of the model's size. The graph is compared with the model on
            them and on random ones. Any batch size works afterwards, but for ExecuTorch, which takes one image.
        kept: Also return the kept-token map bool [B, gh, gw] (output ``kept``).
        head: Also return what a head that explains itself has beside logits: ``concepts`` float [B, C, classes],
            contributions; ``path`` int64 [B, depth]; ``attributes`` float [B, M, classes], contributions.
        format: One of :data:`prunex.formats.FORMATS`; None: as the path ends. "tensorrt" is an ``.onnx`` of operations
            that TensorRT lists, and refused where there are others.

    Returns:
        The path.

    Raises:
        PrunexError: Another suffix, images the model cannot take, a missing extra, or a graph that disagrees.
    """
    path = Path(path)
    if format is None:
        if path.suffix not in SUFFIXES:
            raise PrunexError(f"cannot export to {path.name!r}: the name must end in {' or '.join(SUFFIXES)}")
        format = next(name for name, kind in FORMATS.items() if kind.suffix == path.suffix)
    elif format in FORMATS and path.suffix != FORMATS[format].suffix:
        raise PrunexError(f"cannot export to {path.name!r}: a file for {format} must end in {FORMATS[format].suffix}")
    if path.is_dir():
        raise PrunexError(f"{path} is a folder: give the name of a file in it, such as {path / 'model.pt2'}")
    check_format(format)
    small = _plain(find(model, kinds=Backbone)[1])
    anatomy = outline(small)
    if kept and isinstance(small, SwinTransformer):
        raise PrunexError("kept=True: a Swin's tokens are not pruned, so there is no kept map; leave it out")
    if head and mounted_head(small) is None:
        raise PrunexError("head=True: this model has no head that explains itself; attach one, or leave it out")
    _fix_counts(small, path)
    if example is None:
        example = torch.randn(2, anatomy.channels, *anatomy.image, generator=torch.Generator().manual_seed(0))
    check_images(anatomy, example, values=True)
    example = example.detach().float().cpu()
    example = example.repeat(2, 1, 1, 1) if len(example) == 1 else example  # one image would fix the batch at 1
    graph = Graph(small, kept, head).eval()

    def draft(waiting: Path) -> None:
        free = None if format in _FIXED else ({0: torch.export.Dim(BATCH, min=1)},)
        # OpenVINO writes weights beside the graph, under the draft's name.
        beside = waiting.with_suffix(".bin")
        try:
            with torch.no_grad():
                given = example[:1] if format in _FIXED else example
                program = torch.export.export(graph, (given,), dynamic_shapes=free)
                names = list(graph.outputs(example[:1]))
                _write(format, program, waiting, names, graph)
                _check(format, waiting, graph, example, names)
            if format == "openvino":
                os.replace(beside, path.with_suffix(".bin"))
        finally:
            beside.unlink(missing_ok=True)

    return write_or_refuse(path, draft)


def _plain(vit: Any) -> Any:
    """A slim model in float32 on the CPU, in eval mode: the given one where it is that already, else a copy."""
    small = slim_of(vit)
    numbers = [t for t in (*vit.parameters(), *vit.buffers()) if t.is_floating_point()]
    ready = not vit.training and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in numbers)
    # Counts of each image's own are fixed in the exported model, which must not be the caller's.
    pruning = handle_on(Pruning, small)
    if small is vit and not (ready and (pruning is None or pruning.pruner.count == "fixed")):
        small = slim(vit)
    return small.float().cpu()


def _fix_counts(small: nn.Module, path: Path) -> None:
    """A graph has one shape for all images: counts that differ between them become their expected ones."""
    pruning = handle_on(Pruning, small)
    pruner: Any = None if pruning is None else pruning.pruner
    if pruning is None or pruner.count == "fixed":
        return
    measured = pruning.options.get("expected") is not None
    pruner.fix()
    source = "the mean that was measured" if measured else "as keep_ratio says; pruning.calibrate(images) measures them"
    warnings.warn(
        f"{path.name} keeps {pruning.counts()} patch tokens of every image ({source}): a graph cannot let images "
        "differ, as this model does",
        stacklevel=3,
    )


def _write(format: str, program: Any, path: Path, names: list[str], graph: Graph) -> None:
    write_graph(format, program, path, names, _spec(graph.model))


def _spec(small: Any) -> dict[str, Any]:
    """What a graph's user has to know: size and normalisation of its images, labels, and how it was pruned."""
    pruning, anatomy = handle_on(Pruning, small), outline(small)
    cfg = known_cfg(small, anatomy.channels)
    return {
        "prunex": __version__,
        "pruning": None if pruning is None else pruning.spec,
        "input_size": [anatomy.channels, *anatomy.image],
        "mean": cfg.get("mean"),
        "std": cfg.get("std"),
        "labels": class_names(small, anatomy.classes) or None,
    }


def _check(format: str, path: Path, graph: Graph, example: Tensor, names: list[str], tolerance: float = 1e-4) -> None:
    """Run the written file on one, two and more images and refuse it where its answers are not the model's.

    Where two scores lie within rounding of each other, file and model may keep other patches, and neither is wrong:
    such an image is no evidence against the file. Others are drawn until one is evidence for it.
    """
    runtime = FORMATS[format].runs
    if runtime is not None and find_spec(runtime) is None:
        warnings.warn(
            f"{path.name} was not compared with the model, since {runtime} is not installed: pip install {runtime}",
            stacklevel=5,
        )
        return
    run = open_graph(format, path, names)
    images = [example.repeat(2, 1, 1, 1)[:batch] for batch in (1, len(example), len(example) + 1)]
    generator = torch.Generator().manual_seed(1)
    images += [torch.randn(example.shape, generator=generator) for _ in range(_MORE)]
    agreed = 0
    for tried, batch in enumerate(images):
        if tried > 2 and agreed:
            return
        # NaN counts as a difference, by the negation.
        gap = _gap(run, graph, batch)
        differ = ~(gap <= tolerance)
        if differ.any() and not bool(_near_ties(graph, batch[differ]).all()):
            raise PrunexError(
                f"the exported graph differs from the model by {float(gap.max()):.1e} at batch {len(batch)}: nothing "
                "was written"
            )
        agreed += int((~differ).sum())
    if not agreed:
        warnings.warn(
            f"{path.name} could not be compared with the model: in all {sum(map(len, images))} images tried two scores "
            "lie within rounding of each other where one patch is kept and another not, as before training",
            stacklevel=2,
        )


def _gap(run: Callable[[Tensor], Outputs], graph: Graph, images: Tensor) -> Tensor:
    """How far each image's logits are from the model's, in units of the largest of these: [B]; other patches: inf."""
    wanted, given = graph.outputs(images), run(images)
    logits = wanted["logits"]
    gap = (given["logits"] - logits).abs().flatten(1).amax(1) / logits.abs().max().clamp(min=1e-6)
    if "kept" in given:
        same = (given["kept"].bool() == wanted["kept"]).flatten(1).all(1)
        gap = gap.masked_fill(~same, torch.inf)
    return gap


def _near_ties(graph: Graph, images: Tensor) -> Tensor:
    """Which images are decided about in another way when every module is off by some roundings: bool [B]."""
    generator = torch.Generator().manual_seed(0)

    def jitter(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        noise = torch.randn(out.shape, generator=generator).to(out)
        return out * (1 + _ROUNDINGS * torch.finfo(out.dtype).eps * noise)

    clean, differs = _decided(graph, images), torch.zeros(len(images), dtype=torch.bool)
    handles = [m.register_forward_hook(jitter) for m in graph.model.modules() if m is not graph.model]
    try:
        for _ in range(_TRIES):
            noisy = zip(clean, _decided(graph, images), strict=True)
            differs |= torch.stack([(a != b).flatten(1).any(1) for a, b in noisy]).any(0)
    finally:
        for handle in handles:
            handle.remove()
    return differs


def _decided(graph: Graph, images: Tensor) -> list[Tensor]:
    """Who went where, stage by stage; nobody anywhere in a model that prunes no tokens."""
    vit: Any = graph.model
    nothing = [torch.zeros(len(images), 1)]
    if mounted(vit) is None:
        return nothing
    return [stage.group for stage in run(vit, images, masked=False).trace.stages] or nothing
