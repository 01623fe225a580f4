"""The one forward against timm's own: every family, eval and training, and everything a user may do around it."""

import copy
import io
import sys

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn

import prunex
from prunex.vit.embedding import embed, embed_patches, place
from prunex.vit.forward import run
from prunex.vit.methods import check_parity
from prunex.vit.recorder import Recorder
from prunex.vit.tape import Tape
from tests.vits import ALL_FAMILIES, images, images_for, largest, lively, randomise, relative, tiny

METHODS = ("topk", "evit", "dynamicvit")
DROPS = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.2}


def opened(model, x):
    """Our forward with every block opened into its halves."""
    return run(model, x, recorder=Recorder(Tape(rows=frozenset(range(len(model.blocks)))))).tokens


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_embedding_in_two_parts(family):
    model = tiny(family)
    x = images(3, (32, 56)) if family == "dynamic" else images_for(model)
    whole, grid = embed(model, x)
    patches, same = embed_patches(model, x)
    assert same == grid
    assert patches.shape == (3, grid[0] * grid[1], 48)
    assert place(model, patches, grid).equal(whole)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_forward_equals_timm_in_eval(family):
    model = tiny(family)
    x = images_for(model)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        assert largest(run(model, x).tokens, features) == 0  # whole blocks: the very same calls
        # Rounding alone, which differs between processors and which norms behind a half enlarge; float64 is sharper.
        assert relative(opened(model, x), features) < 1e-5
        with_map = run(model, x, recorder=Recorder(Tape(attention=True, streams=True))).tokens
        assert relative(with_map, features) < 1e-5
        for method in METHODS:
            with prunex.attach(model, method, keep_ratio=1.0):
                assert largest(model(x), logits) <= 1e-6, method
                assert largest(model.forward_features(x), features) <= 1e-6, method
                assert largest(model.forward_head(model.forward_features(x)), logits) <= 1e-6


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_forward_equals_timm_in_float64(family):
    model = tiny(family).double()
    x = images_for(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert largest(opened(model, x), features) < 1e-12
        assert largest(run(model, x, recorder=Recorder(Tape(attention=True))).tokens, features) < 1e-12


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "qk_norm"])
@pytest.mark.parametrize("attn_drop", [0.0, 0.2])
def test_training_equals_timm_under_the_same_seed(family, attn_drop):
    model = tiny(family, **DROPS, attn_drop_rate=attn_drop).double().train()
    x = images_for(model)

    def step(function):
        model.zero_grad()
        torch.manual_seed(11)
        out = function(x)
        out.square().sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted, wanted_grads = step(model.forward_features)
    again, _ = step(model.forward_features)
    assert largest(wanted, again) == 0
    model.eval()
    assert largest(wanted, model.forward_features(x)) > 1e-2  # something was dropped
    model.train()
    out, grads = step(lambda x: opened(model, x))
    assert largest(out, wanted) < 1e-10
    assert grads.keys() == wanted_grads.keys()
    assert max(largest(grads[n], wanted_grads[n]) for n in grads) < 1e-8
    with prunex.attach(model, "evit", keep_ratio=1.0):
        out, grads = step(model.forward_features)
    assert largest(out, wanted) < 1e-10
    assert max(largest(grads[n], wanted_grads[n]) for n in wanted_grads) < 1e-8


def test_forward_features_feeds_a_head_of_ones_own():
    model = tiny(num_classes=0)
    x = images_for(model)
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)) as pruning:
        features = model.forward_features(x)
        assert features.shape == (3, 1 + 8, 48)
        assert torch.equal(model.forward_head(features), features[:, 0])
        assert torch.equal(model(x), features[:, 0])
        assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
        assert int(pruning.trace.kept().sum()) == 3 * 8


@pytest.mark.parametrize("method", METHODS)
def test_reset_classifier_while_pruned(method):
    model = tiny()
    x = images_for(model)
    with prunex.attach(model, method, keep_ratio=0.6):
        features = model.forward_features(x)
        model.reset_classifier(7)
        assert model(x).shape == (3, 7)
        assert torch.equal(model.forward_features(x), features)
        model.reset_classifier(3, global_pool="avg")
        assert largest(model(x), model.head(model.fc_norm(model.forward_features(x)[:, 1:].mean(1)))) < 1e-6
        chosen = prunex.attached(model).trace.kept()
        spec = prunex.attached(model).spec
        state = {k: v for k, v in model.state_dict().items() if k.startswith("prunex.")}
        prunex.attached(model).detach()
        fresh = prunex.attach(model, **spec)
        model.load_state_dict(state, strict=False)
        model(x)
        assert torch.equal(fresh.trace.kept(), chosen)  # patches are ranked as the new pooling reads them
        model.reset_classifier(0, global_pool="token")
        assert model(x).shape == (3, 48)


@pytest.mark.parametrize("method", METHODS)
def test_set_input_size_while_pruned(method):
    model = tiny()
    with prunex.attach(model, method, keep_ratio=0.5, stages=(1, 2)) as pruning:
        model.set_input_size(img_size=(48, 40))
        x = images(2, (48, 40))
        logits = model(x)
        assert pruning.trace.kept().shape == (2, 6, 5)
        assert int(pruning.trace.kept(0).sum()) == 2 * 15
        assert pruning.counts()[0] == 15 + (method == "evit")
        with pytest.raises(prunex.PrunexError, match="32 x 32"):
            model(images(2))
        model.train()
        out = model(x)  # the teacher, if there is one, must follow
        sum(pruning.losses().values(), out.sum()).backward()
        model.eval()
        assert torch.equal(model(x), logits)
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("method", METHODS)
def test_dynamic_image_sizes(method):
    model = tiny("dynamic")
    with prunex.attach(model, method, keep_ratio=0.5, stages=(1, 2)) as pruning:
        for size in ((32, 32), (48, 24), (16, 64)):
            logits = model(images(2, size))
            grid = (size[0] // 8, size[1] // 8)
            assert logits.shape == (2, 5)
            assert pruning.trace.kept().shape == (2, *grid)
            assert int(pruning.trace.kept(0).sum()) == grid[0] * grid[1]  # half, of two images
            pruning.masked = True
            assert largest(model(images(2, size)), logits) < 1e-5
            pruning.masked = None
        with pytest.raises(prunex.PrunexError, match="multiples of the patch size"):
            model(images(2, (36, 32)))


def test_dynamic_image_sizes_equal_timm():
    model = tiny("dynamic", dynamic_img_pad=True)
    for size in ((32, 32), (36, 50)):
        x = images(2, size)
        with torch.no_grad():
            wanted = model(x)
            with prunex.attach(model, "evit", keep_ratio=1.0) as pruning:
                assert largest(model(x), wanted) <= 1e-6
                assert pruning.trace.kept().all()


@pytest.mark.parametrize("method", METHODS)
def test_deep_copy_is_independent(method):
    model = tiny(**DROPS)
    pruning = prunex.attach(model, method, keep_ratio=0.5, stages=(1, 2))
    randomise(pruning.pruner)
    x = images_for(model)
    model.train()
    model(x)  # leaves a graph behind, which cannot be copied
    twin = copy.deepcopy(model)
    assert pruning.losses().keys() == (prunex.attached(model).losses().keys())
    model.eval()
    twin.eval()
    logits = model(x)
    assert torch.equal(twin(x), logits)
    other = prunex.attached(twin)
    assert other.method == method
    assert other.options == pruning.options
    assert other.trace is not pruning.trace
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), logits)
    other.detach()
    assert torch.equal(model(x), logits)
    assert pruning.trace.kept().shape == (3, 4, 4)
    assert not hasattr(twin, "prunex")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
def test_gradient_checkpointing_gives_the_same_gradients(method, family):
    model = tiny(family, **DROPS).double()
    pruning = prunex.attach(model, method, keep_ratio=0.6, stages=(1, 2))
    randomise(pruning.pruner)
    model.train()
    x = images_for(model)

    def step():
        model.zero_grad()
        torch.manual_seed(5)
        out = model(x)
        loss = out.square().sum() + sum(pruning.losses().values())
        loss.backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, plain_grads = step()
    model.set_grad_checkpointing(True)
    counted = []
    model.blocks[3].mlp.register_forward_hook(lambda *_: counted.append(1))
    saved, saved_grads = step()
    assert len(counted) == 2  # it was run again in the backward pass
    assert largest(plain, saved) == 0
    assert plain_grads.keys() == saved_grads.keys()
    assert max(largest(plain_grads[n], saved_grads[n]) for n in plain_grads) < 1e-10


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile does not know this Python yet")
@pytest.mark.parametrize("method", METHODS)
def test_compiles_as_one_graph(method):
    model = tiny()
    pruning = prunex.attach(model, method, keep_ratio=0.6, stages=(1, 2))
    randomise(pruning.pruner)
    x = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert largest(compiled(x), model(x)) < 1e-6
    assert pruning.trace.kept().shape == (3, 4, 4)
    model.train()
    torch.manual_seed(3)
    wanted = model(x)
    losses = pruning.losses()
    torch.manual_seed(3)
    assert largest(compiled(x), wanted) < 1e-6
    assert pruning.losses().keys() == losses.keys()
    for name, value in pruning.losses().items():
        assert float(value.detach()) == pytest.approx(float(losses[name].detach()), abs=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("evit", "aot_eager"),
        pytest.param("dynamicvit", "aot_eager", marks=pytest.mark.slow),
        pytest.param("evit", "inductor", marks=pytest.mark.slow),
        pytest.param("dynamicvit", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_training_step(method, backend):
    model = tiny()
    pruning = prunex.attach(model, method, keep_ratio=0.6, stages=(1, 2))
    randomise(pruning.pruner)
    model.train()
    x = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    model.eval()
    with torch.no_grad():
        assert largest(compiled(x), model(x)) < 1e-4
    model.train()
    compiled(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.blocks[0].attn.qkv.weight.grad is not None
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class", "qk_norm", "dinov2_reg"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast(family, method):
    model = tiny(family)
    x = images_for(model)
    pruning = prunex.attach(model, method, keep_ratio=0.6, stages=(1, 2))
    randomise(pruning.pruner)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        removed, kept = model(x), pruning.trace.kept()
        pruning.masked = True
        masked = model(x)
        same = (pruning.trace.kept() == kept).flatten(1).all(1)  # a near-tie may be decided otherwise
        pruning.masked = None
    assert removed.dtype == torch.bfloat16
    assert torch.isfinite(masked).all()
    assert same.any()
    assert relative(removed[same], masked[same]) < 0.1
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        loss = out.float().square().mean() + sum(pruning.losses().values())
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_equals_dense_at_keep_ratio_one(method):
    model = tiny()
    x = images_for(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = model(x)
        with prunex.attach(model, method, keep_ratio=1.0):
            assert torch.equal(model(x), dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_models_of_other_dtypes(method, dtype):
    model = tiny().to(dtype)
    x = images_for(model)
    with prunex.attach(model, method, keep_ratio=0.6, stages=(1, 2)) as pruning, torch.no_grad():
        for masked in (None, True):
            pruning.masked = masked
            out = model(x)
            assert out.dtype == dtype
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("method", METHODS)
def test_dense_names_unchanged_and_checkpoints_load_both_ways(method):
    model = tiny()
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    other = tiny(seed=9)
    pruning = prunex.attach(other, method, keep_ratio=0.5, stages=(1, 2))
    names = list(other.state_dict())
    own = [n for n in names if n.startswith("prunex.")]
    assert [n for n in names if n not in own] == list(dense)
    assert all(n.startswith(f"prunex.{method}.") for n in own)
    assert bool(own) == (method == "dynamicvit")
    before = {n: other.state_dict()[n].clone() for n in own}
    result = other.load_state_dict(dense, strict=True)  # dense into pruned: the pruner keeps its own
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(other.state_dict()[n], dense[n]) for n in dense)
    assert all(torch.equal(other.state_dict()[n], before[n]) for n in own)
    pruned = other.state_dict()
    assert model.load_state_dict(pruned, strict=False).missing_keys == []  # pruned into dense
    third = tiny(seed=4)
    prunex.attach(third, method, keep_ratio=0.5, stages=(1, 2))
    third.load_state_dict(pruned, strict=True)
    x = images_for(model)
    assert torch.equal(third(x), other(x))
    if own:  # a broken pruned checkpoint is still refused
        damaged = dict(pruned)
        del damaged[own[0]]
        with pytest.raises(RuntimeError, match="Missing key"):
            third.load_state_dict(damaged, strict=True)
    assert pruning.method == method


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_checkpoint_of_a_module_around_the_vit_loads_strictly(method):
    class Around(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.net = nn.ModuleDict({"vit": tiny(seed=seed)})

    dense, pruned = Around(1), Around(2)
    prunex.attach(pruned, method)
    pruned.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(pruned.net["vit"].head.weight, dense.net["vit"].head.weight)


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_travels_without_pickle(method, tmp_path):
    model = tiny()
    prunex.attach(model, method, keep_ratio=0.5)
    model.train()
    model(images_for(model))
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    loaded = torch.load(tmp_path / "pruned.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in loaded.values())
    twin = tiny(seed=3)
    prunex.attach(twin, method, keep_ratio=0.5)
    twin.load_state_dict(loaded)
    model.eval()
    assert torch.equal(twin(images()), model(images()))
    buffer = io.BytesIO()
    torch.save({"optimizer": torch.optim.AdamW(model.parameters()).state_dict()}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)


def test_user_hooks_fire():
    model = tiny()
    fired = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: fired.append(i))
        block.attn.register_forward_hook(lambda *_, i=i: fired.append(f"attn{i}"))
        block.mlp.register_forward_hook(lambda *_, i=i: fired.append(f"mlp{i}"))
    model.register_forward_hook(lambda *_: fired.append("model"))
    model.head.register_forward_hook(lambda *_: fired.append("head"))
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,)):
        fired.clear()
        model(images_for(model))
        assert {0, 1, 2, 3, "attn0", "attn1", "attn2", "mlp1", "mlp2", "model", "head"} <= set(fired)
    with prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(1,)):
        fired.clear()
        model(images_for(model))
        assert {0, 1, 2, 3} <= set(fired)  # tokens leave before the block


def test_a_hook_that_changes_a_block_is_obeyed():
    model, x = tiny(), images(2)
    model.blocks[0].register_forward_hook(lambda m, args, out: out * 1.5)
    wanted = model(x)
    with prunex.attach(model, "evit", keep_ratio=1.0, stages=(0, 1)):
        assert largest(model(x), wanted) < 1e-5


def test_attention_extras_cost_nothing_when_nobody_asks(monkeypatch):
    model = tiny()
    calls = []
    monkeypatch.setattr("prunex.vit.attention.matrix", lambda *a, **k: calls.append(1))
    with prunex.attach(model, "evit", keep_ratio=0.5):
        model(images_for(model))
    assert not calls


def test_masks_are_refused_in_one_line():
    model = tiny()
    x = images_for(model)
    with prunex.attach(model, "evit"):
        for call in (
            lambda: model.forward_intermediates(x, attn_mask=torch.zeros(17, 17)),
            lambda: model(x, attn_mask=torch.zeros(17, 17)),
        ):
            with pytest.raises(prunex.PrunexError, match=r"detach\(\)") as caught:
                call()
            assert "\n" not in str(caught.value)
    assert len(model.get_intermediate_layers(x, 2)) == 2


def test_parity_check_refuses_a_block_that_computes_something_else():
    model = tiny()
    block = model.blocks[2]
    block.forward = lambda x, **_: x  # not what its halves compute
    with pytest.raises(prunex.PrunexError, match="computes something prunex does not know"):
        check_parity(model)
    del block.forward
    check_parity(model)


def test_parity_check_leaves_modes_and_random_state_alone():
    model = tiny(**DROPS).train()
    model.blocks[1].eval()
    flags = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    check_parity(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("option", [{"gated": True}, {"attn_head_dim": 8}])
def test_less_common_attention_options(option):
    model = tiny()
    try:
        for block in model.blocks:
            block.attn = Attention(48, 3, qkv_bias=True, **option)
    except TypeError:
        pytest.skip("this timm's attention has no such option")
    lively(model).eval()
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        assert relative(opened(model, x), model.forward_features(x)) < 2e-6
        with prunex.attach(model, "evit", keep_ratio=1.0):
            assert largest(model(x), dense) <= 1e-6
        with prunex.attach(model, "evit", keep_ratio=0.5) as pruning:
            removed = model(x)
            pruning.masked = True
            assert largest(model(x), removed) < 1e-5


def test_tape_records_in_forward_order():
    model = tiny()
    x = images_for(model)
    tape = Tape(attention=True, streams=True)
    with torch.no_grad():
        run(model, x, recorder=Recorder(tape))
        seen, inputs = [], []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
            block.register_forward_hook(lambda m, args, out: seen.append(out))
        model(x)
    attended = tape.attended()
    fed = [s for s in tape.steps if not hasattr(s, "attention")]
    assert [a.block for a in attended] == [0, 1, 2, 3] == [f.block for f in fed]
    for i in range(4):
        assert attended[i].attention.shape == (3, 3, 17, 17)
        assert largest(attended[i].attention.sum(-1), torch.ones(3, 3, 17)) < 1e-5
        assert largest(attended[i].before, inputs[i]) < 1e-5
        assert largest(fed[i].before + fed[i].branch, seen[i]) < 1e-5  # no LayerScale, no drop path here
    assert tape.tokens == 17
    assert tape.policy is None
