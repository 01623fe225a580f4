"""Every architecture of timm is known or refused by name, in one line; none ends in a traceback."""

from collections import defaultdict

import pytest
import timm
import torch
from timm.models import _registry
from torch import nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import read

# Files of timm with models that are plain sequences, or nearly: all of their architectures are asked.
VITS = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "eva", "beit", "deit", "cait")


def by_file():
    """Architectures by the file of timm that has them."""
    files = defaultdict(list)
    for name in timm.list_models():
        files[_registry._model_to_module[name]].append(name)
    return files


def asked(name):
    """What ``read`` says of an architecture: its depth, or why not."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
    except Exception:  # some of timm's constructors read numbers
        model = timm.create_model(name).eval()
    assert isinstance(model, nn.Module)
    try:
        return read(model).depth
    except PrunexError as error:
        answer = str(error)
    assert "\n" not in answer
    assert type(model).__name__ in answer, name
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(set(by_file()) - set(VITS)))
def test_the_smallest_of_every_other_file(file):
    names = by_file()[file]
    # Names tell sizes well enough.
    small = ("atto", "nano", "femto", "pico", "xxs", "tiny", "xs", "mini", "small", "_s", "18", "b0", "050", "t")
    asked(min(names, key=lambda n: (next((i for i, s in enumerate(small) if s in n), len(small)), len(n))))


@pytest.mark.slow
@pytest.mark.parametrize("file", VITS)
def test_all_of_the_files_with_sequences(file):
    answers = {name: asked(name) for name in by_file()[file] if not any(s in name for s in ("giant", "gigantic", "7b"))}
    works = [name for name, answer in answers.items() if isinstance(answer, int)]
    assert works
    reasons = {answer for answer in answers.values() if isinstance(answer, str)}
    assert all("(" in reason or "with" in reason or "has its own" in reason for reason in reasons), reasons
