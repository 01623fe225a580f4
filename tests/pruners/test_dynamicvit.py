"""DynamicViT: parameters, masks, losses, gradients, the teacher, and images that lose everything."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex.pruners.dynamicvit import Predictor
from tests.vits import assert_same_state, images, images_for, largest, randomise, state_of, tiny, weightless


def pruned(family="vit", keep_ratio=0.6, stages=(1, 2), double=False, train=True, model=None, **options):
    model = tiny(family) if model is None else model
    model = model.double() if double else model
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=keep_ratio, stages=stages, **options)
    randomise(pruning.pruner)
    model.train(train)
    return model, pruning


@pytest.fixture
def scripted(monkeypatch):
    """Predetermined hard keep masks in place of the Gumbel draws, straight through as torch's own."""
    masks = []

    def draw(logits, tau=1.0, hard=False, dim=-1):
        soft = logits.softmax(dim)
        keep = masks.pop(0).to(soft)
        return torch.stack([keep, 1 - keep], -1) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", draw)
    return masks


@pytest.mark.parametrize(("width", "parameters"), [(384, 241_250), (768, 961_730)])
def test_predictor_parameters(width, parameters):
    assert sum(p.numel() for p in Predictor(width).parameters()) == parameters


@pytest.mark.parametrize(("width", "heads", "total"), [(384, 6, 22_774_414), (768, 12, 89_452_846)])
def test_model_totals_on_the_meta_device(width, heads, total):
    model = weightless(VisionTransformer, embed_dim=width, num_heads=heads, depth=12)
    with torch.device("meta"):
        pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.7, stages=(3, 6, 9))
    assert sum(p.numel() for p in model.parameters()) == total
    assert all(p.is_meta for p in model.parameters())
    assert pruning.counts() == [137, 96, 67]


def test_counts_are_what_a_forward_leaves():
    model, pruning = pruned(model=tiny(img_size=112), keep_ratio=0.7, stages=(1, 2, 3), train=False)
    with torch.no_grad():
        features = model.forward_features(images_for(model, 2))
    assert [pruning.trace.kept(s).flatten(1).sum(1).tolist() for s in range(3)] == [[137] * 2, [96] * 2, [67] * 2]
    assert features.shape[1] == 1 + 67
    assert pruning.counts() == [137, 96, 67]


def test_kept_are_the_best_scored_of_those_still_there():
    model, pruning = pruned("dinov2_reg", train=False)
    with torch.no_grad():
        model(images_for(model))
    first, second = pruning.trace.stages
    own = first.score.topk(9, 1).indices.sort(1).values
    assert torch.equal(pruning.trace.kept(0).flatten(1).nonzero()[:, 1].view(3, 9), own)
    best = second.score.topk(5, 1).indices
    assert torch.equal(pruning.trace.kept(1).flatten(1).nonzero()[:, 1].view(3, 5), own.gather(1, best).sort(1).values)


def test_the_predictor_is_its_definition():
    predictor = randomise(Predictor(16)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    policy = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
    out = predictor(x, policy)
    norm, linear = predictor.embed[0], predictor.embed[1]
    h = F.gelu(linear(F.layer_norm(x, (16,), norm.weight, norm.bias, 1e-5)))
    for b in range(2):
        pooled = sum(policy[b, j] * h[b, j, 8:] for j in range(5)) / policy[b].sum()
        for j in range(5):
            z = predictor.score(torch.cat([h[b, j, :8], pooled]))
            assert largest(out[b, j], z.log_softmax(-1)) < 1e-12
    assert largest(predictor(x, None), predictor(x, torch.ones(2, 5, dtype=torch.float64))) < 1e-12
    assert torch.isfinite(predictor(x, torch.zeros(2, 5, dtype=torch.float64))).all()


def test_gumbel_masks_keep_at_the_predicted_rate():
    model, pruning = pruned(stages=(1,), teacher=False)
    x = images_for(model, 1).expand(250, -1, -1, -1)  # one image, 250 draws of 16 patches at a time
    drawn = torch.zeros(16)
    for _ in range(50):
        model(x)
        mask = pruning._attached.steps.take()[-1].masks[0].detach()
        assert (((mask - 1).abs() < 1e-5) | (mask == 0)).all()  # hard
        drawn += mask.mean(0) / 50
    keep = pruning.trace.stages[0].score[0].exp()
    assert float(keep.std()) > 0.02
    spread = (keep * (1 - keep) / 12_500).sqrt()
    assert float(((drawn - keep) / spread).abs().max()) < 5
    assert abs(float(drawn.mean() - keep.mean())) < 0.005


def test_masks_are_cumulative_and_differ_between_images():
    model, pruning = pruned(stages=(0, 1, 2, 3), keep_ratio=0.8)
    for _ in range(5):
        model(images_for(model, 6))
        masks = pruning._attached.steps.take()[-1].masks
        assert len(masks) == 4
        for earlier, later in zip(masks, masks[1:], strict=False):
            assert (later.detach() <= earlier.detach() + 1e-6).all()
            assert ((earlier > 0) | (later == 0)).all()
        for s, mask in enumerate(masks):
            assert torch.equal(pruning.trace.kept(s).flatten(1), mask > 0)
    assert len(set(masks[-1].detach().round().sum(1).tolist())) > 1


def test_a_training_forward_under_a_mask_equals_the_gathered_one(scripted):
    """Fixed masks with equally many kept: policy in training mode against physically fewer tokens."""
    model, pruning = pruned("dinov2_reg", double=True, teacher=False, stages=(1,))
    x = images_for(model)
    keep = torch.zeros(3, 16, dtype=torch.float64)
    for i, index in enumerate(([0, 3, 5, 6, 9], [1, 2, 3, 14, 15], [4, 7, 8, 10, 12])):
        keep[i, index] = 1
    scripted.append(keep)
    with torch.no_grad():
        features = model.forward_features(x)
        chosen = keep.nonzero()[:, 1].view(3, 5)
        pruning.pruner.decide = lambda turn, state: prunex.vit.decisions.Keep(chosen)
        pruning.masked = False
        gathered = model.forward_features(x)
    assert largest(features[:, :5], gathered[:, :5]) < 1e-9
    kept = features[:, 5:][keep > 0].view(3, 5, -1)
    assert largest(kept, gathered[:, 5:]) < 1e-9


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "max_pool", "qk_norm"])
@pytest.mark.parametrize("double", [False, True])
def test_an_image_that_loses_every_patch_stays_finite(scripted, family, double):
    model, pruning = pruned(family, double=double)
    x = images_for(model)
    first = torch.ones(3, 16)
    first[1] = 0
    scripted += [first, torch.ones(3, 16)]
    out = model(x)
    losses = pruning.losses()
    loss = out.square().sum() + sum(losses.values())
    loss.backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v) for v in losses.values())
    for name, p in model.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name
    assert not pruning.trace.kept(0)[1].any()
    assert not pruning.trace.kept(1)[1].any()
    # and its neighbours see nothing of it
    scripted += [torch.ones(3, 16), torch.ones(3, 16)]
    assert largest(model(x)[[0, 2]], out[[0, 2]]) < 1e-6
    pruning.forget()
    scripted += [torch.zeros(3, 16), torch.zeros(3, 16)]
    out = model(x)
    assert float(pruning.losses()["tokens"].detach()) == 0  # nothing is kept, so nothing is compared
    assert torch.isfinite(out).all()


def test_ratio_loss_is_the_sheet_s(scripted):
    model, pruning = pruned(keep_ratio=0.7, teacher=False)
    m0, m1 = torch.ones(3, 16), torch.ones(3, 16)
    m0[0, :8], m0[1, :2] = 0, 0
    m1[1, :4], m1[2, 9:] = 0, 0
    scripted += [m0, m1]
    model(images_for(model))
    shares = [m0.mean(1), (m0 * m1).mean(1)]
    targets = (0.7, 0.7 * 0.7)
    want = 2 * sum(((s - t) ** 2).mean() for s, t in zip(shares, targets, strict=True)) / 2
    losses = pruning.losses()
    assert list(losses) == ["ratio"]
    assert float(losses["ratio"].detach()) == pytest.approx(float(want), rel=1e-5)
    model, pruning = pruned(keep_ratio=0.7, teacher=False, batch_ratio=True, ratio_weight=5)
    scripted += [m0, m1]
    model(images_for(model))
    want = 5 * sum((s.mean() - t) ** 2 for s, t in zip(shares, targets, strict=True)) / 2
    assert float(pruning.losses()["ratio"].detach()) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("token_loss", ["mse", "kl"])
def test_distillation_losses_are_the_sheet_s(token_loss):
    model, pruning = pruned("dinov2_reg", token_loss=token_loss, distill_weight=0.3)
    teacher = tiny("dinov2_reg")  # the same weights, never attached
    x = images_for(model)
    logits = model(x)
    losses = pruning.losses()
    last = pruning._attached.steps.take()[-1]
    with torch.no_grad():
        features = teacher.forward_features(x)
        p, q = teacher.forward_head(features).softmax(-1), logits.softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        a, b = last.tokens[:, 5:], features[:, 5:]
        kept = last.masks[-1] > 0.5
        if token_loss == "mse":
            per_token = (a - b).square().mean(-1)
        else:
            per_token = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1)
        tokens = per_token[kept].mean()
    assert float(losses["distill"].detach()) == pytest.approx(0.3 * float(kl), rel=1e-4)
    assert float(losses["tokens"].detach()) == pytest.approx(0.3 * float(tokens), rel=1e-4)


def test_each_loss_alone_reaches_what_it_should_and_never_the_teacher():
    for name in ("ratio", "distill", "tokens"):
        model, pruning = pruned()
        model(images_for(model))
        pruning.losses()[name].backward()
        for s, predictor in enumerate(pruning.pruner.predictors):
            for p in predictor.parameters():
                assert p.grad is not None, (name, s)
                assert torch.isfinite(p.grad).all()
            assert max(float(p.grad.abs().max()) for p in predictor.parameters()) > 0, (name, s)
        teacher = pruning.pruner._teacher[0]
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_policy_gradient_reaches_the_predictors_from_the_task_alone():
    model, pruning = pruned(teacher=False, double=True)
    F.cross_entropy(model(images_for(model)), torch.tensor([0, 1, 2])).backward()
    for predictor in pruning.pruner.predictors:
        assert max(float(p.grad.abs().max()) for p in predictor.parameters()) > 1e-8


def test_the_teacher_is_hidden_and_frozen():
    dense = tiny()
    names = list(dense.state_dict())
    model, pruning = pruned()
    own = [n for n in model.state_dict() if n not in names]
    assert all(n.startswith("prunex.dynamicvit.predictors.") for n in own)
    assert not any("teacher" in n for n, _ in model.named_modules())
    teacher = pruning.pruner._teacher[0]
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in teacher.parameters())
    assert not any(m is teacher for m in model.modules())
    assert not teacher.training
    before = state_of(teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(images_for(model))
        (out.square().sum() + sum(pruning.losses().values())).backward()
        optimizer.step()
    model.train()
    assert not teacher.training
    assert_same_state(teacher, before)
    assert largest(teacher.head.weight, dense.head.weight) == 0  # as it was when attached
    assert largest(model.head.weight, dense.head.weight) > 0


def test_without_a_teacher_there_is_no_copy_and_no_distillation():
    for options in ({"teacher": False}, {"distill_weight": 0}):
        model, pruning = pruned(**options)
        model(images_for(model))
        assert list(pruning.losses()) == ["ratio"]
    assert pruned(teacher=False)[1].pruner._teacher == ()


def test_losses_need_a_training_forward():
    model, pruning = pruned(train=False)
    assert pruning.losses() == {}
    model(images_for(model))
    assert pruning.losses() == {}
    model.train()
    model(images_for(model))
    assert set(pruning.losses()) == {"ratio", "distill", "tokens"}
    pruning.forget()
    assert pruning.losses() == {}
    with torch.no_grad():
        model(images_for(model))
    model.eval()
    model(images_for(model))
    assert pruning.losses() == {}


def test_features_alone_give_every_loss_but_the_logits_one():
    model, pruning = pruned()
    model.forward_features(images_for(model))
    assert set(pruning.losses()) == {"ratio", "tokens"}


def test_stages_at_rate_one_have_no_mask_and_no_target():
    model, pruning = pruned(keep_ratio=[1.0, 0.5], teacher=False)
    model(images_for(model))
    last = pruning._attached.steps.take()[-1]
    assert len(last.masks) == 1
    assert float(pruning.losses()["ratio"].detach()) == pytest.approx(
        2 * float(((last.masks[0].detach().mean(1) - 0.5) ** 2).mean())
    )
    model, pruning = pruned(keep_ratio=1.0)
    model(images_for(model))
    assert pruning.losses() == {}


def test_a_changed_classifier_is_told_from_the_teacher_s():
    model, pruning = pruned()
    model.reset_classifier(9)
    model(images_for(model))
    with pytest.raises(prunex.PrunexError, match=r"logits \[3, 9\], its dense teacher \[3, 5\].*teacher=False"):
        pruning.losses()


def test_distilled_training_gives_two_logits_and_works():
    model, pruning = pruned("deit_distilled")
    model.set_distilled_training(True)
    out = model(images_for(model))
    assert isinstance(out, tuple)
    losses = pruning.losses()
    assert set(losses) == {"ratio", "distill", "tokens"}
    sum(losses.values()).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_weight": -1}, "ratio_weight=-1"),
        ({"ratio_weight": "two"}, "ratio_weight='two'"),
        ({"distill_weight": float("nan")}, "distill_weight=nan"),
        ({"token_loss": "l1"}, "unknown token_loss 'l1'.*kl, mse"),
        ({"teacher": "no"}, "teacher='no'.*True or False"),
        ({"batch_ratio": 2}, "batch_ratio=2"),
        ({"taecher": True}, "did you mean 'teacher'"),
    ],
)
def test_bad_options(options, message):
    model = tiny()
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match=message):
        prunex.attach(model, "dynamicvit", **options)
    assert_same_state(model, before)


def official(pruning, wrap=None):
    """The predictors' weights under the published names."""
    names = {"embed": "in_conv", "score": "out_conv"}
    state = {}
    for key, value in pruning.pruner.state_dict().items():
        _, s, part, *rest = key.split(".")
        state[".".join(["score_predictor", s, names[part], *rest])] = value.clone()
    return {wrap: state} if wrap else state


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_official_predictors_load_by_their_published_names(wrap):
    source, source_pruning = pruned(train=False)
    state = official(source_pruning, wrap)
    backbone = {k: v.clone() for k, v in tiny(seed=5).state_dict().items()}
    inner = state[wrap] if wrap else state
    inner.update({"module." + k: v for k, v in backbone.items()})
    model = tiny(seed=8)
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2))
    assert pruning.load_official(state) is pruning
    for key, value in source_pruning.pruner.state_dict().items():
        assert torch.equal(pruning.pruner.state_dict()[key], value)
    for key, value in backbone.items():
        assert torch.equal(model.state_dict()[key], value)
    assert source is not model


def test_official_checkpoints_that_do_not_fit_change_nothing():
    _, source = pruned(train=False)
    good = official(source)
    model = tiny()
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2))
    before = state_of(model)
    some = next(iter(good))
    cases = {
        "missing": {k: v for k, v in good.items() if k != some},
        "do not fit": good | {some: torch.zeros(3)},
        "such as": {"head.weight": torch.zeros(5, 48)},
        "fit this model": good | {"score_predictor.7.in_conv.0.weight": torch.zeros(48)},
        "no state dict": {"epoch": 3},
        "holds nothing": {},
        "head.weight": good | {"head.weight": torch.zeros(1000, 48)},
    }
    for message, state in cases.items():
        with pytest.raises(prunex.PrunexError, match=message) as caught:
            pruning.load_official(state)
        assert "\n" not in str(caught.value)
        assert_same_state(model, before)


def test_training_learns_the_ratio():
    """A few steps on the ratio loss alone bring the kept share to its target."""
    model, pruning = pruned(keep_ratio=0.5, stages=(1,), teacher=False)
    optimizer = torch.optim.Adam(pruning.pruner.parameters(), lr=0.02)
    x = images(16, seed=3)
    shares = []
    for _ in range(60):
        optimizer.zero_grad()
        model(x)
        pruning.losses()["ratio"].backward()
        optimizer.step()
        shares.append(float(pruning.trace.keep_ratios()[0].mean()))
    assert sum(shares[-10:]) / 10 == pytest.approx(0.5, abs=0.06)
