"""A model of transformers from a local folder: safetensors alone, nothing downloaded, nothing of the folder's run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prunex.errors import PrunexError
from prunex.sources.classes import CLASSES, WRAPPERS, no_twin
from prunex.untrusted import read_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHERS = {
    "pytorch_model*.bin": "pickled",
    "*.pt": "pickled",
    "tf_model*.h5": "TensorFlow's",
    "flax_model*.msgpack": "Flax's",
}
# What of a checkpoint a twin has no use for: it may be missing.
_UNREAD = re.compile(r"(^|\.)(pooler\.dense|mask_token|text_model|text_projection|logit_scale|logit_bias|position_ids)")
_DEEP = 1000  # blocks that a configuration may tell of


def open_folder(folder: Path) -> Any:
    """The model in a folder that ``save_pretrained`` wrote, in float32.

    Refused is a folder that names another class, or whose weights are not safetensors, quantised, damaged or not whole.
    """
    config = read_config(folder)
    name = class_in(config)
    if name not in CLASSES:
        raise no_twin(str(name))
    weight_files(folder)
    return _opened(folder, str(name))


def class_in(config: Mapping[str, Any]) -> str:
    """The class of model that a config.json names."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else f"{names}"


def holds_vit(folder: Path) -> bool:
    """Whether a folder says that it is of a class that is known here."""
    try:
        config = read_json(folder / "config.json")
    except PrunexError:
        return False
    return isinstance(config, Mapping) and class_in(config) in (*CLASSES, *WRAPPERS)


def read_config(folder: Path) -> Mapping[str, Any]:
    """Its config.json, as far as it can be told before transformers reads it."""
    if not folder.is_dir():
        raise PrunexError(
            f"{str(folder)!r} is no folder: give a local one that save_pretrained wrote (nothing is downloaded)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise PrunexError(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    config = read_json(path)
    if not isinstance(config, Mapping):
        raise PrunexError(f"{path} is damaged: it is no JSON object")
    if (folder / "adapter_config.json").exists():
        raise PrunexError(f"{folder} holds an adapter: merge it (merge_and_unload()) and save the model")
    for part in (config, config.get("vision_config")):
        if not isinstance(part, Mapping):
            continue
        if part.get("quantization_config") is not None:
            raise PrunexError(
                f"{folder} is quantised: convert the model it was made from, and quantise what is exported"
            )
        # transformers builds all blocks before it looks at a weight.
        depth = part.get("num_hidden_layers", 0)
        if type(depth) is not int or depth > _DEEP:
            raise PrunexError(f"{path} tells of {str(depth)[:40]} blocks: it is damaged")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Its safetensors, each of which was seen to be one."""
    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file():
        if not (folder / _INDEX).is_file():
            other = next((kind for pattern, kind in _OTHERS.items() if any(folder.glob(pattern))), None)
            others = "" if other is None else f", but {other} weights, which are not read"
            raise PrunexError(
                f"{folder} has no {_WEIGHTS}{others}: save the model again with transformers' save_pretrained"
            )
        index = read_json(folder / _INDEX)
        shards = index.get("weight_map") if isinstance(index, Mapping) else None
        if not isinstance(shards, Mapping) or not all(isinstance(name, str) for name in shards.values()):
            raise PrunexError(f"{folder / _INDEX} is damaged: it has no weight_map")
        names = sorted(set(shards.values()))
    paths = [folder / name for name in names]
    for name, path in zip(names, paths, strict=True):
        # A shard's name comes out of a file, and may lead out of the folder.
        if Path(name).name != name or not path.is_file():
            raise PrunexError(f"{folder} has no {name[:80]}: it is not whole; save the model again")
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:  # safetensors has its own error
            raise PrunexError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    return paths


def library() -> Any:
    """The library itself; refused where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise PrunexError(
            "this folder is read by transformers, which is not installed: pip install 'prunex-vit[transformers]'"
        ) from error
    return transformers


def _opened(folder: Path, name: str) -> Any:
    transformers = library()
    try:
        # Attention is named, since a configuration may name a kernel that would be fetched and run.
        model, loading = getattr(transformers, name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers reports a strange configuration in many ways
        raise PrunexError(f"{folder} cannot be opened: {type(error).__name__} {str(error)[:200]}") from error
    missing = sorted(key for key in loading["missing_keys"] if not _UNREAD.search(key))
    wrong = [str(key[0]) if isinstance(key, tuple) else str(key) for key in loading.get("mismatched_keys", [])]
    if missing or wrong:
        raise PrunexError(
            f"{folder} is not whole: of {name} {', '.join([*missing, *wrong][:4])} is missing or of another shape; "
            "train it, or give a folder of the class that was trained"
        )
    return model
