"""Files that a model can be exported to: what each ends in, and what writing and running it needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from prunex.errors import PrunexError, unknown


@dataclass(frozen=True)
class Format:
    """One kind of file: its ending, the modules that write it, and what to install where they are missing."""

    suffix: str
    needs: tuple[str, ...] = ()
    install: str = ""
    runs: str | None = None  # the module by which it is run here and compared with the model

    def file(self, name: str) -> str:
        """What its file is called where nobody says."""
        return f"model.tensorrt{self.suffix}" if name == "tensorrt" else f"model{self.suffix}"


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "onnx": Format(".onnx", _ONNX, "prunex-vit[onnx]", "onnxruntime"),
    "pt2": Format(".pt2"),
    "openvino": Format(".xml", (*_ONNX, "openvino"), "prunex-vit[onnx,openvino]"),
    "executorch": Format(".pte", ("executorch",), "prunex-vit[executorch]"),
    "tensorrt": Format(".onnx", _ONNX, "prunex-vit[onnx]", "onnxruntime"),
}
SUFFIXES = tuple(dict.fromkeys(kind.suffix for kind in FORMATS.values()))


def check_format(name: str) -> Format:
    """The format of a name; refused where what writes it is not installed."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    missing = [module for module in FORMATS[name].needs if find_spec(module) is None]
    if missing:
        raise PrunexError(
            f"export to {name} needs {missing[0]}: pip install '{FORMATS[name].install}', or export to pt2, which "
            "needs nothing more"
        )
    return FORMATS[name]
