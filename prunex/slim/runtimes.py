"""Writing an exported program for a runtime, and running the file here: one pair of functions a format."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.slim.operators import OPSETS, PLAIN, check_tensorrt

BATCH = "batch"
SPEC = "prunex"  # under which a file holds what its user has to know
Outputs = dict[str, Tensor]


def write_graph(name: str, program: Any, path: Path, outputs: Sequence[str], spec: Any) -> None:
    """Write a program in a format; ``outputs`` are names of what it returns, ``spec`` what the file says of it."""
    _RUNTIMES[name][0](program, path, outputs, json.dumps(spec))


def open_graph(
    name: str, path: Path, outputs: Sequence[str], threads: int | None = None
) -> Callable[[Tensor], Outputs]:
    """What runs a written file on images, float32 [B, C, H, W], on the processor, and gives its outputs by name."""
    return _RUNTIMES[name][1](path, outputs, threads or torch.get_num_threads())


def _write_pt2(program: Any, path: Path, outputs: Sequence[str], spec: str) -> None:
    torch.export.save(program, path, extra_files={f"{SPEC}.json": spec})


def _open_pt2(path: Path, outputs: Sequence[str], threads: int) -> Callable[[Tensor], Outputs]:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Outputs:
        with torch.no_grad():
            out = module(images)
        return dict(zip(outputs, out if isinstance(out, tuple) else (out,), strict=True))

    return run


def _write_onnx(program: Any, path: Path, outputs: Sequence[str], spec: str, opset: int | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=outputs,
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if onnx is None:
        raise PrunexError("torch gave no ONNX program: upgrade torch or onnxscript, or export to .pt2")
    _name_batch(onnx.model.graph)
    onnx.model.metadata_props[SPEC] = spec
    onnx.save(str(path), external_data=False)


def _name_batch(graph: Any) -> None:
    """Call the free axis "batch" throughout a graph: torch numbers it by where it was first seen, as in "s34"."""
    given = str(graph.inputs[0].shape[0])
    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for shape in (value.shape for value in values if value.shape is not None):
        for axis, size in enumerate(shape):
            if str(size) == given:
                shape[axis] = BATCH


def _open_onnx(path: Path, outputs: Sequence[str], threads: int) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that wait by spinning would take the processor from whoever is compared with it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        given = session.run(list(outputs), {"images": images.float().numpy()})
        return dict(zip(outputs, map(torch.from_numpy, given), strict=True))

    return run


def _write_tensorrt(program: Any, path: Path, outputs: Sequence[str], spec: str) -> None:
    import onnx

    # The newest operation set that TensorRT lists, not the newest that torch writes.
    _write_onnx(program.run_decompositions(PLAIN), path, outputs, spec, max(OPSETS))
    check_tensorrt(onnx.load(str(path)))


def _write_openvino(program: Any, path: Path, outputs: Sequence[str], spec: str) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        _write_onnx(program, Path(folder) / "model.onnx", outputs, spec)
        # Not convert_model, which reports its use to its makers.
        model = openvino.Core().read_model(Path(folder) / "model.onnx")
        model.set_rt_info(spec, SPEC)
        openvino.save_model(model, path, compress_to_fp16=False)  # weights of 16 bits would keep other patches


def _open_openvino(path: Path, outputs: Sequence[str], threads: int) -> Callable[[Tensor], Outputs]:
    import openvino

    # Some processors would compute in 16 bits.
    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", how)

    def run(images: Tensor) -> Outputs:
        given = model([images.float().numpy()])
        return {name: torch.from_numpy(given[name].copy()) for name in outputs}

    return run


def _write_executorch(program: Any, path: Path, outputs: Sequence[str], spec: str) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # What XNNPACK has no kernel for runs by ExecuTorch's portable ones.
    edge = to_edge_transform_and_lower(
        program.run_decompositions(PLAIN), partitioner=[XnnpackPartitioner()], constant_methods={SPEC: spec}
    )
    path.write_bytes(edge.to_executorch().buffer)


def _open_executorch(path: Path, outputs: Sequence[str], threads: int) -> Callable[[Tensor], Outputs]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Outputs:
        rows: dict[str, list[Tensor]] = {name: [] for name in outputs}
        for image in images.float():
            given = method.execute([image[None].contiguous()])
            for name, out in zip(outputs, given, strict=True):
                rows[name].append(out.clone())  # the runtime writes its next answer to the same place
        return {name: torch.cat(parts) for name, parts in rows.items()}

    return run


_Write = Callable[[Any, Path, Sequence[str], str], None]
_Open = Callable[[Path, Sequence[str], int], Callable[[Tensor], Outputs]]
_RUNTIMES: dict[str, tuple[_Write, _Open]] = {
    "onnx": (_write_onnx, _open_onnx),
    "pt2": (_write_pt2, _open_pt2),
    "openvino": (_write_openvino, _open_openvino),
    "executorch": (_write_executorch, _open_executorch),
    "tensorrt": (_write_tensorrt, _open_onnx),  # an engine is built on the machine that will run it
}
