"""Final tokens as heads read them: a merged token counts as often as it has patches, an empty slot not at all."""

import torch

from prunex.heads.final_tokens import FinalTokens
from tests.vits import largest


def tokens(counts=None, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 4, width, generator=generator, dtype=torch.float64)
    counts = None if counts is None else torch.tensor(counts, dtype=torch.float64)
    return FinalTokens(patches[:, :0], patches, counts, None, (2, 2))


def repeated(t):
    """Every patch as a token of its own, image by image."""
    for i in range(2):
        body = torch.cat([t.patches[i, j].expand(int(n), -1) for j, n in enumerate(t.counts[i])])
        yield FinalTokens(body[None, :0], body[None], None, None, (2, 2))


def test_merged_tokens_count_as_their_patches_do():
    t = tokens([[1, 2, 0, 3], [4, 0, 0, 1]])
    direction = torch.tensor([[0.3], [-1.0], [0.7]], dtype=torch.float64)
    weights = t.softmax(t.patches @ direction)
    assert largest(weights.sum(1), torch.ones(2, 1)) < 1e-12
    for i, alone in enumerate(repeated(t)):
        assert largest(t.mean(t.patches)[i], alone.mean(alone.patches)[0]) < 1e-12
        pooled = alone.softmax(alone.patches @ direction).transpose(1, 2) @ alone.patches
        assert largest((weights.transpose(1, 2) @ t.patches)[i], pooled[0]) < 1e-12
        assert largest(t.hide(t.patches, -9.0).amax(1)[i], alone.patches.amax(1)[0]) == 0


def test_an_image_that_has_lost_every_patch_weighs_nothing():
    t = tokens([[0, 0, 0, 0], [1, 1, 0, 0]])
    scores = t.patches.clone().requires_grad_()
    weights = t.softmax(scores)
    assert weights[0].eq(0).all()
    assert t.mean(t.patches)[0].eq(0).all()
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_without_counts_all_are_alike():
    one, other = tokens(), tokens([[1, 1, 1, 1]] * 2)
    assert largest(one.mean(one.patches), other.mean(one.patches)) < 1e-12
    assert largest(one.softmax(one.patches), other.softmax(one.patches)) < 1e-12
    assert largest(one.shares, other.shares) < 1e-12
    values, present = one.on_patches(one.patches)
    assert values is one.patches
    assert present.all()
