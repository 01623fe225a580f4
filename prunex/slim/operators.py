"""Operations that some runtimes lack, by others that all of them have; and those that TensorRT takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError

# NVIDIA's list of operators and their types for TensorRT 10.0, as far as graphs of ViTs have use for them:
# https://github.com/onnx/onnx-tensorrt/blob/070096e781103cfc4adf4a6bb557e94bac8e693f/docs/operators.md
TENSORRT, OPSETS = "TensorRT 10.0", range(9, 21)
_FLOATS, _INTS, _BOOL = ("FLOAT", "FLOAT16", "BFLOAT16"), ("INT32", "INT64"), ("BOOL",)
_TYPES = {
    _FLOATS: "Clip Conv CumSum Einsum Erf Exp Floor Gemm LayerNormalization Log LogSoftmax MatMul Pow Reciprocal Round "
    "Sigmoid Sin Cos Softmax Sqrt Tanh",
    (*_FLOATS, *_INTS): "Abs Add ArgMax ArgMin Div Equal Gelu Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul "
    "Neg Pad Range ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ScatterElements ScatterND Sub TopK",
    (*_FLOATS, *_INTS, *_BOOL): "Cast Concat Constant ConstantOfShape Expand Gather GatherElements GatherND Identity "
    "Reshape Shape Slice Split Squeeze Tile Transpose Unsqueeze Where",
    _BOOL: "And Not Or Xor",
}
LISTED = {name: types for types, names in _TYPES.items() for name in names.split()}
_CONSTANT = {"CumSum": 1, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1, "Pad": 3}  # the input that must be an initializer
_MOST_K = 3840

aten: Any = torch.ops.aten


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _stable_sort(x, dim=dim, descending=descending)


def _stable_sort(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """By topk of a length that is known. Whole numbers have ties, which stay in order: places are added."""
    count = x.shape[dim]
    if x.is_floating_point():
        values, index = aten.topk.default(x, count, dim, descending, True)
        return values, index
    places = [1] * x.ndim
    places[dim] = count
    place = torch.arange(count, device=x.device)
    keys = x.to(torch.int64) * count + (count - 1 - place if descending else place).reshape(places)
    index = aten.topk.default(keys, count, dim, descending, True)[1]
    return torch.gather(x, dim, index), index


def _argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return _stable_sort(x, dim=dim, descending=descending)[1]


def _stable_argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return _argsort(x, dim, descending)


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    if x.is_floating_point():
        return NotImplemented
    return torch.cumsum(x.to(torch.float32), dim).to(dtype or torch.int64)  # exact up to 2^24 tokens


def _scatter(x: Tensor, dim: int, index: Tensor, value: Any) -> Any:
    if x.dtype != torch.bool:
        return NotImplemented
    value = value.to(torch.int32) if isinstance(value, Tensor) else int(value)
    return torch.scatter(x.to(torch.int32), dim, index, value) != 0


def _clamp(x: Tensor, least: Any = None, most: Any = None) -> Any:
    if x.is_floating_point():
        return NotImplemented
    x = x if least is None else torch.maximum(x, torch.full_like(x, least))
    return x if most is None else torch.minimum(x, torch.full_like(x, most))


PLAIN: dict[Any, Callable[..., Any]] = {
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.argsort.default: _argsort,
    aten.argsort.stable: _stable_argsort,
    aten.cumsum.default: _cumsum,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda x, most: _clamp(x, None, most),
}


def check_tensorrt(model: Any) -> None:
    """Refuse an ONNX model that holds what NVIDIA's list does not: an operation, a type, an operation set."""
    complaints = Counter(_complaints(model))
    if complaints:
        shown = ", ".join(f"{text} ({count} times)" for text, count in complaints.most_common(5))
        raise PrunexError(
            f"the graph holds what {TENSORRT} does not list: {shown}; export to onnx, and build an engine by a version "
            "that takes it"
        )


def _complaints(model: Any) -> Iterator[str]:
    import onnx

    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            yield f"operations of {opset.domain}"
        elif opset.version not in OPSETS:
            yield f"operation set {opset.version}"
    if model.functions:
        yield "functions of the model"
    graph = onnx.shape_inference.infer_shapes(model).graph
    fixed = {tensor.name: tensor for tensor in graph.initializer}
    types = {name: tensor.data_type for name, tensor in fixed.items()}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type not in LISTED:
            yield node.op_type
            continue
        yield from _restricted(node, fixed)
        # Others than these are of the same type, or say where and how far.
        shown = {"Where": node.input[1:2], "ConstantOfShape": node.output, "Constant": node.output}
        for name in shown.get(node.op_type, node.input[:1]):
            kind = onnx.TensorProto.DataType.Name(types.get(name, 0))
            if kind not in LISTED[node.op_type]:
                yield f"{node.op_type} of {kind}"


def _restricted(node: Any, fixed: dict[str, Any]) -> Iterator[str]:
    """What a node does that the list excepts."""
    from onnx import numpy_helper

    name, options = node.op_type, {option.name: option for option in node.attribute}
    place = 1 if name.startswith("Reduce") else _CONSTANT.get(name)
    if place is not None and len(node.input) > place and node.input[place] and node.input[place] not in fixed:
        yield f"{name} along an axis that is computed"
    if name == "LayerNormalization" and len(node.output) > 1:
        yield f"{name} with several outputs"
    if name in ("ScatterND", "ScatterElements") and "reduction" in options and options["reduction"].s != b"none":
        yield f"{name} with a reduction"
    if name == "TopK":
        if "sorted" in options and options["sorted"].i != 1:
            yield "TopK unsorted"
        # Not on the list of 10.0, but on those before it: a number that is known.
        count = fixed.get(node.input[1])
        if count is None or int(numpy_helper.to_array(count).item()) >= _MOST_K:
            yield f"TopK of {'a number that is computed' if count is None else f'{_MOST_K} or more'}"
