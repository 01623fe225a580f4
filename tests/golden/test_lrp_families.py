"""Token relevance of nine families where the first block begins; all biases are 0, and the score counts 1."""

from functools import partial

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from prunex.relevance import rules
from prunex.relevance.gradients import ModifiedGradients
from prunex.relevance.rules import RelevanceRules, Route
from prunex.vit.forward import resume
from prunex.vit.tape import Tape
from tests.explainers.reference import SEEDS, arrays, present
from tests.vits import OLD_TIMM, relative

rotary = partial(Eva, use_rot_pos_emb=True)
FAMILIES = {
    "vit": VisionTransformer,
    "vit_ls_qknorm": partial(VisionTransformer, init_values=0.5, qk_norm=True),
    "siglip": partial(VisionTransformer, class_token=False, global_pool="map", fc_norm=False),
    "gap": partial(VisionTransformer, class_token=False, global_pool="avg"),
    "eva_rope": partial(rotary, ref_feat_shape=(4, 4), init_values=0.5),
    "eva02": partial(rotary, ref_feat_shape=(4, 4), swiglu_mlp=True, scale_mlp=True, qkv_fused=False, mlp_ratio=8 / 3),
    "eva_mixed": partial(rotary, rope_type="mixed", use_abs_pos_emb=False, num_reg_tokens=2, class_token=True),
    "dinov3": partial(
        rotary,
        rope_type="dinov3",
        use_abs_pos_emb=False,
        num_reg_tokens=2,
        rope_rotate_half=True,
        init_values=0.5,
        qkv_bias=False,
    ),
    "beit": partial(Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.5),
}
pytestmark = [present, pytest.mark.parametrize("seed", SEEDS), pytest.mark.parametrize("family", FAMILIES)]


class Halves(RelevanceRules):
    """The epsilon rules with the softmax as identity, and a norm's mean in the denominator as the vectors have it."""

    def __init__(self):
        super().__init__("epsilon", epsilon=1e-12)

    def norm(self, module, x):
        if isinstance(module, torch.nn.Identity):
            return x

        def back(saved, out, r):
            x = saved[0].detach().requires_grad_()
            with torch.enable_grad():
                linear = ModifiedGradients("cplrp").norm(module, x)
                (gradient,) = torch.autograd.grad(linear, x, r / out)
            return (x.detach() * gradient,)

        return Route.apply(self, back, module(x), x)


def relevance(family, seed, ops):
    """Of each token, [B, N], and what is stored of the family."""
    if family == "eva_mixed" and OLD_TIMM:
        pytest.skip("this timm computes mixed rotary tables in float32 alone")
    stored = {k.split("/", 1)[1]: v for k, v in arrays("lrp_families", seed).items() if k.startswith(family + "/")}
    model = FAMILIES[family](img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    missing, unknown = model.load_state_dict({k[3:]: v for k, v in stored.items() if k[:3] == "sd/"}, strict=False)
    assert not unknown
    assert all(name.startswith("patch_embed.") for name in missing)
    x = stored["tokens_in"].double().requires_grad_()
    logits = resume(model.eval().double(), x, (4, 4), tape=Tape(gradients=True, ops=ops))
    assert relative(logits, stored["logits"]) < 1e-6
    score = logits.gather(1, stored["targets"][:, None])
    ops.relevance = True
    if isinstance(ops, RelevanceRules):
        r = torch.autograd.grad(logits, x, torch.zeros_like(logits).scatter_(1, stored["targets"][:, None], 1))[0]
    else:
        r = (x * torch.autograd.grad(score.sum(), x)[0]) / score.detach()[:, :, None]
    return r.sum(-1).detach(), stored


@pytest.mark.parametrize(("kind", "name"), [("cplrp", "signed_cp"), ("attnlrp", "signed_attn")])
def test_modified_gradients(family, seed, kind, name):
    found, stored = relevance(family, seed, ModifiedGradients(kind))
    assert relative(found, stored[name]) < 1e-6
    if kind == "cplrp":
        assert relative(found.sum(1), torch.ones(2)) < 1e-4  # what norms' own epsilon keeps


def test_rules_with_the_softmax_as_identity(family, seed, monkeypatch):
    monkeypatch.setattr(rules, "ratio", torch.div)  # the vectors have no stabiliser where a score is near 0
    found, stored = relevance(family, seed, Halves())
    # Products of queries and keys near 0 are divided by: what rounding did to the stored numbers grows to this.
    assert relative(found, stored["signed_half"]) < (5e-5, 1e-3)[seed]
    if family != "beit":  # its relative bias absorbs
        assert relative(found.sum(1), torch.ones(2)) < 1e-4
