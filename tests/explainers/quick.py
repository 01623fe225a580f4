"""Every explainer by name, with options that make the many-pass ones quick on tiny models."""

import prunex

QUICK = {
    "beyond_intuition": {"steps": 3},
    "integrated_gradients": {"steps": 3},
    "shap": {"budget": 60},
    "vit_cx": {"max_masks": 4},
}
# These bring networks of their own and are tested where they are made.
HEADS = ["attributes", "concept_transformer", "mean_patch", "vit_net"]
TRAINED = ["diffmask", "vit_shapley", *HEADS]
EXPLAINERS = [m.name for m in prunex.methods("explainer") if m.name not in TRAINED]
# raw is one number a token, [B, prefix + P].
ROWS = ["raw_attention", "rollout", "generic_attention", "tokentm", "grad_sam", "transformer_attribution"]
# What a pruned model's removed patches get: nothing, by the method's definition, or something from earlier blocks.
NOTHING_LEFT = ["raw_attention", "dino", "grad_cam", "partial_lrp", "r_cut", "beyond_intuition"]
# Relevance is divided by layer outputs that may be close to 0: equal in double precision, in single up to this.
DIVIDES = {"lrp": 2e-2, "partial_lrp": 5e-3, "transformer_attribution": 5e-3}
SIGNED = ["atman", "integrated_gradients", "lrp", "shap", "vit_cx"]


def explain(method, model, images, target=None, **options):
    """``prunex.explain`` with the quick options."""
    return prunex.explain(method, model, images, target, **(QUICK.get(method, {}) | options))
