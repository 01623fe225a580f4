"""Test-time registers: on a model in which one neuron, planted, makes a background patch the largest token."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex import PrunexError
from prunex.relevance.registers import RegisterNeurons, find_register_neurons, with_registers
from tests.vits import SIZES, images, largest, tiny

BLOCK, CHANNEL = 1, 7


def scenes(count, seed=0):
    """Noise with one plain, bright patch each, and where it is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    places = torch.randint(0, 16, (count,), generator=generator)
    for image, place in zip(x, places.tolist(), strict=True):
        image[:, place // 4 * 8 : place // 4 * 8 + 8, place % 4 * 8 : place % 4 * 8 + 8] = 4.0
    return x, places


@pytest.fixture(scope="module")
def planted():
    """A ViT whose neuron fires on plain patches alone, and writes a large vector there."""
    model, (x, places) = tiny(), scenes(64)
    block, seen = model.blocks[BLOCK], []
    watch = block.mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:]))
    with torch.no_grad():
        model(x)
        watch.remove()
        (normed,) = seen
        plain = torch.arange(16) == places[:, None]
        direction = normed[plain].mean(0) - normed[~plain].mean(0)
        at = normed @ direction
        low, high = float(at[~plain].max()), float(at[plain].min())
        assert low < high  # the plain patch can be told by a plane
        gain = 12 / (high - low)
        block.mlp.fc1.weight[CHANNEL] = gain * direction
        block.mlp.fc1.bias[CHANNEL] = -gain * (low + high) / 2
        vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
        block.mlp.fc2.weight[:, CHANNEL] = 60 * vector / vector.norm()
    return model


def norms(model, x, layer=-1):
    """Norms of all tokens after a block, [B, N]."""
    out = []
    watch = model.blocks[layer].register_forward_hook(lambda _, args, result: out.append(result))
    with torch.no_grad():
        model(x)
    watch.remove()
    return out[0].norm(dim=2)


def relative(model, x, prefix):
    after = norms(model, x)[:, prefix:]
    return after / after.median(1, keepdim=True).values


def test_the_planted_neuron_is_found_in_any_sample(planted):
    for seed in (1, 2):
        neurons = find_register_neurons(planted, scenes(16, seed)[0], count=1)
        assert neurons.neurons == ((BLOCK, CHANNEL),)
        assert neurons.outliers == pytest.approx(1 / 16)
        assert neurons.largest > 3
        assert neurons.images == 16


def test_a_loader_gives_what_its_images_give(planted):
    x, _ = scenes(8, 1)
    batches = [{"image": x[:3], "label": torch.zeros(3, dtype=torch.long)}, {"image": x[3:]}]
    whole, parts = find_register_neurons(planted, x, count=5), find_register_neurons(planted, batches, count=5)
    assert (parts.neurons, parts.outliers, parts.images) == (whole.neurons, whole.outliers, 8)


def test_outliers_move_from_patches_to_the_register(planted):
    x, places = scenes(8, 3)
    assert (relative(planted, x, 1).argmax(1) == places).all()
    assert (relative(planted, x, 1).amax(1) > 3).all()
    model = with_registers(planted, find_register_neurons(planted, x, count=1))
    assert (relative(model, x, 2) < 3).all()
    after = norms(model, x)
    assert (after[:, 1] > 3 * after[:, 2:].median(1).values).all()


def test_images_do_not_depend_on_their_neighbours(planted):
    x, _ = scenes(4, 4)
    model = with_registers(planted, find_register_neurons(planted, x, count=3))
    with torch.no_grad():
        assert largest(model(x), torch.cat([model(one[None]) for one in x])) < 1e-5


def test_silent_registers_are_an_extra_key_of_zeros_and_nothing_else(planted):
    x, _ = scenes(4, 5)
    neurons = find_register_neurons(planted, x, count=3)
    model = with_registers(planted, neurons, scale=0.0, patches="same", tokens=2)
    plain = VisionTransformer(**SIZES, reg_tokens=2).eval()
    state = planted.state_dict()
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([table[:, :1], torch.zeros(1, 2, 48), table[:, 1:]], 1)
    state["reg_token"] = torch.zeros(1, 2, 48)
    plain.load_state_dict(state)
    # The planted neuron alone is silenced there; the others say of the zero token what they say anyway.
    for block, channel in neurons.neurons:

        def hush(_, args, channel=channel):
            hidden = args[0].clone()
            hidden[:, 1:3, channel] = 0
            return (hidden,)

        plain.blocks[block].mlp.fc2.register_forward_pre_hook(hush)
    with torch.no_grad():
        assert largest(model(x), plain(x)) < 1e-5
        assert largest(model(x), planted(x)) > 1e-4


def test_without_outliers_there_is_nothing_to_do(planted):
    model, x = tiny(), images(4)
    neurons = find_register_neurons(model, x)
    assert neurons.neurons == ()
    assert neurons.outliers == 0
    with torch.no_grad():
        assert torch.equal(with_registers(model, neurons)(x), model(x))


def test_the_original_is_left_as_it_was(planted):
    x, _ = scenes(2, 6)
    before, state = planted(x).detach(), copy.deepcopy(planted.state_dict())
    model = with_registers(planted, find_register_neurons(planted, x))
    model(x)
    assert torch.equal(planted(x), before)
    assert all(torch.equal(value, state[name]) for name, value in planted.state_dict().items())
    assert planted.num_prefix_tokens == 1


@pytest.mark.parametrize("patches", ["zero", "mean", "same"])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "deit3", "avg_pool_no_class", "eva02", "dinov3"])
def test_families_with_the_mean_of_the_patches_by_hand(family, patches):
    """Hidden values of the first neuron's block, against the definition written out for one image."""
    model, x = tiny(family), images(2)
    neurons = find_register_neurons(model, x, threshold=1.0, count=6)
    widened, prefix = with_registers(model, neurons, patches=patches), model.num_prefix_tokens
    block = min(b for b, _ in neurons.neurons)
    channels = [c for b, c in neurons.neurons if b == block]
    seen = []

    class Last(torch.nn.Module):
        """The second layer, told apart from the hook before it."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden):
            seen.append(hidden)
            return self.layer(hidden)

    fc2 = widened.blocks[block].mlp.fc2
    hooks = dict(fc2._forward_pre_hooks)
    fc2._forward_pre_hooks.clear()
    given = []
    widened.blocks[block].mlp.fc2 = Last(fc2)
    widened.blocks[block].mlp.fc2.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    for hook in hooks.values():
        widened.blocks[block].mlp.fc2.register_forward_pre_hook(hook)
    with torch.no_grad():
        widened(x)
    for image in range(2):
        for c in channels:
            old, new = given[0][image, :, c].tolist(), seen[0][image, :, c].tolist()
            peak = max(old, key=abs)
            body = old[prefix + 1 :]
            wanted = {"zero": [0.0] * len(body), "mean": [sum(body) / len(body)] * len(body), "same": body}[patches]
            assert new == pytest.approx([*old[:prefix], peak, *wanted], abs=1e-5)
    others = [c for c in range(given[0].shape[2]) if c not in channels]
    assert torch.equal(given[0][..., others], seen[0][..., others])


@pytest.mark.parametrize("method", ["rollout", "raw_attention", "generic_attention", "grad_cam", "tokentm", "legrad"])
def test_explainers_take_them(planted, method):
    x, _ = scenes(3, 7)
    with pytest.raises(PrunexError, match="nothing was found for this model"):
        prunex.explain(method, copy.deepcopy(planted), x, registers="test")
    neurons = prunex.find_register_neurons(planted, x, count=1)
    e = prunex.explain(method, planted, x, registers="test")
    other = prunex.explain(method, prunex.with_registers(planted), x)
    assert torch.equal(e.maps, other.maps)
    assert e.maps.shape == (3, 4, 4)
    assert torch.equal(prunex.explain(method, planted, x, registers=neurons).maps, e.maps)
    assert largest(e.maps, prunex.explain(method, planted, x).maps) > 1e-5


def test_a_pruner_goes_onto_the_copy_and_never_drops_the_register(planted):
    x, _ = scenes(3, 8)
    model = prunex.with_registers(planted, find_register_neurons(planted, x, count=1))
    pruning = prunex.attach(model, "evit", keep_ratio=0.5, stages=(2,))
    with torch.no_grad():
        model(x)
    assert pruning.trace.prefix == 2
    assert int(pruning.trace.kept().flatten(1).sum(1)[0]) == 8


def test_relevance_rules_say_that_they_cannot_follow(planted):
    x, _ = scenes(2, 9)
    find_register_neurons(planted, x, count=1)
    with pytest.raises(PrunexError) as caught:
        prunex.explain("lrp", planted, x, registers="test")
    assert "\n" not in str(caught.value)


def test_refused(planted):
    x, _ = scenes(2)
    neurons = RegisterNeurons(((BLOCK, CHANNEL),), 0.1, 4.0, 2)
    for options, match in [
        ({"count": 0}, "count=0"),
        ({"threshold": 0.5}, "threshold=0.5"),
        ({"layer": 4}, r"layer=4.*-4\.\.3"),
        ({"images": x[:, :1]}, "shape"),
        ({"images": []}, "no images"),
        ({"images": 3}, "int"),
    ]:
        with pytest.raises(PrunexError, match=match):
            find_register_neurons(planted, **{"images": x, **options})
    for options, match in [
        ({"tokens": 0}, "tokens=0"),
        ({"patches": "none"}, "unknown patches 'none'"),
        ({"scale": -1}, "scale=-1"),
        ({"neurons": [(1, 2)]}, "neurons are a list"),
        ({"neurons": RegisterNeurons(((9, 0),), 0.1, 4.0, 2)}, r"neuron \(9, 0\)"),
    ]:
        with pytest.raises(PrunexError, match=match):
            with_registers(planted, **{"neurons": neurons, **options})
    for family, match in [
        ("deit_distilled", "no register tokens"),
        ("beit", "no register tokens"),
        ("avg_pool_prefix", "averages its"),
    ]:
        with pytest.raises(PrunexError, match=match):
            with_registers(tiny(family), neurons)
    pruned = copy.deepcopy(planted)
    prunex.attach(pruned, "evit", keep_ratio=0.5)
    with pytest.raises(PrunexError, match="has a token pruner"):
        find_register_neurons(pruned, x)
    with pytest.raises(PrunexError, match="explains a ViT by itself"):
        prunex.explain("rollout", torch.nn.Sequential(planted), x, registers="test")
    with pytest.raises(PrunexError, match="unknown registers 'train'"):
        prunex.explain("rollout", planted, x, registers="train")
