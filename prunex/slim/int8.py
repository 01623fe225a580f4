"""Exported graphs whose linear layers compute in eight bits, by ONNX Runtime's own quantisation."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunex.batches import parts
from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.files import write_or_refuse

_LINEAR = ("MatMul", "Gemm", "Conv")
_AGREE = 0.9  # of the images given: a share of equal classes below which a warning says so
_MOST = 1024  # images to calibrate by


@called_as('prunex.quantise("model.onnx", "model.int8.onnx", images=loader)')
def quantise(source: str | Path, path: str | Path, images: Tensor | Iterable[Any] | None = None) -> Path:
    """Write an exported ONNX graph once more, with its linear layers in eight bits.

    Layers with weights of their own become int8 (Jacob et al., CVPR 2018, arXiv 1712.05877): weights symmetric, a scale
    for each output, seven of the eight bits used, since processors without VNNI add pairs of products in sixteen.
    Everything that decides which tokens stay is left in float32: products of queries and keys, softmax, scores, TopK
    and what gathers by it; so are norms, GELU and attention times values.

    With ``images`` activations have fixed scales, from the smallest to the largest value seen (static quantisation, QDQ
    nodes), the patch embedding included. Without, each batch's own are taken in every forward (dynamic), and the patch
    embedding stays float32.

    Args:
        source: What :func:`prunex.export` wrote, ending in ``.onnx``.
        path: Where to, ending in ``.onnx``; another file than ``source``.
        images: What to calibrate by: float [B, C, H, W], normalised as for the model, or a loader (any iterable of
            batches) of which images alone are read, at most 1,024. Those of training, not of validation. None: dynamic.

    Returns:
        The path. What the graph says of itself (``metadata_props["prunex"]``) is copied.

    Raises:
        PrunexError: A file that is no such graph, other suffixes, a missing extra (``prunex-vit[onnx]``), no images, or
            images that the graph cannot take.

    >>> import prunex, timm, torch, tempfile, pathlib
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10).eval()
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> whole = prunex.export(model, folder / "model.onnx")
    >>> small = prunex.quantise(whole, folder / "model.int8.onnx")
    >>> small.stat().st_size < 0.5 * whole.stat().st_size
    True
    """
    source, path = Path(source), Path(path)
    _check_files(source, path)
    graph = _read(source)
    weighted, others = _products(graph)
    if not weighted:
        raise PrunexError(f"{source} holds no linear layer with weights: quantise what prunex.export wrote, once")
    batches = None if images is None else _calibration(images, source)

    def draft(waiting: Path) -> None:
        with _quietly():
            _quantise(source, waiting, batches, others)
        _keep_metadata(graph, waiting)
        _compare(source, waiting, batches, path.name)

    return write_or_refuse(path, draft)


def _check_files(source: Path, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise PrunexError(f"quantising needs {missing[0]}: pip install 'prunex-vit[onnx]'")
    for name in (source, path):
        if name.suffix != ".onnx":
            raise PrunexError(f"{name.name!r} is no name of a graph to quantise: it must end in .onnx")
    if not source.is_file():
        raise PrunexError(f"{source} is no file: write it by prunex.export(model, {source.name!r}) first")
    if path.resolve() == source.resolve():
        raise PrunexError(f"{path} is the graph itself: give another name, such as {path.stem}.int8.onnx")


def _read(source: Path) -> Any:
    import onnx

    try:
        return onnx.load(str(source))
    except Exception as error:  # protobuf has classes of its own
        raise PrunexError(f"{source} is no ONNX graph ({type(error).__name__}): write it by prunex.export") from error


def _products(model: Any) -> tuple[list[str], list[str]]:
    """Nodes that multiply by a weight, and those that multiply activations by each other."""
    # A product with an initializer is a linear layer; of two activations, it is attention or what scores tokens.
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in _LINEAR]
    weighted = [node.name for node in nodes if node.input[1] in weights]
    return weighted, [node.name for node in nodes if node.input[1] not in weights]


def _calibration(images: Any, source: Path) -> list[Tensor]:
    """Batches of images alone, float32 on the CPU, of the size that the graph takes."""
    batches: list[Tensor] = []
    session, seen = _session(source), 0
    wanted = session.get_inputs()[0].shape
    for batch in [images] if isinstance(images, Tensor) else images:
        some = parts(batch).need("images", "calibration").detach().float().cpu()[: _MOST - seen]
        fixed = [(n, w) for n, w in zip(some.shape[1:], wanted[1:], strict=False) if isinstance(w, int)]
        if some.ndim != 4 or any(n != w for n, w in fixed):
            raise PrunexError(f"images have shape {list(some.shape)}: {source.name} takes {list(wanted)}")
        if not torch.isfinite(some).all():
            raise PrunexError("images hold NaN or infinite values: clean them first")
        batches.append(some)
        seen += len(some)
        if seen >= _MOST:
            break
    if not seen:
        raise PrunexError("calibration got no images: give a loader with at least one, or leave images out")
    return batches


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.left = iter([{name: batch.numpy()} for batch in batches if len(batch)])

    def get_next(self) -> Any:
        return next(self.left, None)

    __next__ = get_next


def _quantise(source: Path, path: Path, batches: list[Tensor] | None, others: list[str]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    shared: dict[str, Any] = {"per_channel": True, "reduce_range": True, "nodes_to_exclude": others}
    # Without images only weights are known: products with them alone, by scales that each batch makes.
    if batches is None:
        only = {"MatMulConstBOnly": True}
        quantize_dynamic(str(source), str(path), op_types_to_quantize=["MatMul"], extra_options=only, **shared)
        return
    quantize_static(
        str(source),
        str(path),
        _Reader(_session(source).get_inputs()[0].name, batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_LINEAR),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **shared,
    )


def _keep_metadata(graph: Any, path: Path) -> None:
    import onnx

    written = onnx.load(str(path))
    del written.metadata_props[:]
    written.metadata_props.extend(graph.metadata_props)
    onnx.save(written, str(path))


def _compare(source: Path, path: Path, batches: list[Tensor] | None, name: str) -> None:
    """Run what was written; say where it gives many of the images given another class."""
    session, whole = _session(path), _session(source)
    given = whole.get_inputs()[0]
    if batches is None:
        sizes = [n if isinstance(n, int) else 1 for n in given.shape[1:]]
        session.run(None, {given.name: torch.zeros(1, *sizes).numpy()})
        return
    # Classes and not logits: eight bits move every number, and this is what they must not move.
    same = 0
    for batch in batches:
        first, second = (graph.run(["logits"], {given.name: batch.numpy()})[0].argmax(1) for graph in (whole, session))
        same += int((first == second).sum())
    agree = same / sum(map(len, batches))
    if agree < _AGREE:
        warnings.warn(
            f"{name} gives {agree:.0%} of {sum(map(len, batches))} images the class that {source.name} gives "
            "them: calibrate by more images, of all classes and normalised as in training, or leave images out",
            stacklevel=6,
        )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each thing that may be wrong
        raise PrunexError(f"{path} cannot be run ({str(error).splitlines()[0]}): write it by prunex.export") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the advice to pre-process first: an exported graph has its shapes, and its constants are folded."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
