"""The models of the reference files, with their stored maps and gradients."""

import json

import numpy as np
import torch

from prunex.multimodal.rules import Attended
from tests.explainers.reference import GOLDEN, arrays


def model_and_inputs(name, seed, dtype=torch.float64):
    """The stored model, its inputs, and all arrays of its file."""
    import transformers

    stored = arrays(f"multimodal-{name}", seed)
    with np.load(GOLDEN / f"multimodal-{name}-seed{seed}.npz", allow_pickle=False) as file:
        kind, config = str(file["class_name"]), json.loads(str(file["config_kwargs"]))
        if "backbone_config_kwargs" in file:
            config["backbone_config"] = transformers.ResNetConfig(**json.loads(str(file["backbone_config_kwargs"])))
    family = kind.removesuffix("ForQuestionAnswering").removesuffix("ForObjectDetection")
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**config))
    model.load_state_dict({k[3:]: v for k, v in stored.items() if k.startswith("sd/")})
    inputs = {k.removeprefix("inputs/"): v for k, v in stored.items() if k.startswith("inputs/")}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.eval().to(dtype), inputs, stored


def stored_maps(stored, roles, targets, query=None, prefix=""):
    """The stored maps in the order of their layers with the gradients of some targets, in double precision.

    ``roles`` are pairs of a module path (with its call's number) and a role, in the order of execution.
    """
    maps = []
    for path, role in roles:
        gradient = stored[f"{prefix}attn_grad__{targets}/{path}"].double()
        gradient = gradient if query is None else gradient[:, query]
        maps.append(Attended(role, stored[f"{prefix}attn/{path}"].double(), gradient, path))
    return maps


def relative(ours, want):
    """Largest difference over the reference's largest value; 0 where both are zero everywhere."""
    largest = want.double().abs().max().item()
    difference = (ours.double() - want.double()).abs().max().item()
    return difference / largest if largest else difference
