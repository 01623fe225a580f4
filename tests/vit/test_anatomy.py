"""Which models are read, and what the refusal of the others says."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import nn

import prunex
from prunex.vit.anatomy import check_images, find, read
from prunex.vit.describe import describe
from prunex.vit.rebuild import build
from tests.vits import ALL_FAMILIES, assert_same_state, images_for, lively, state_of, tiny

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}

UNSUPPORTED = {
    "SwinTransformer": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(2, 2)),
        "windowed attention",
    ),
    "FastVit": (lambda: timm.create_model("fastvit_t8"), "convolutions"),
    "NaFlexVit": (
        lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, num_heads=3, depth=1),
        "a patch grid of its own for each image",
    ),
    "VisionTransformerSAM": (
        lambda: timm.create_model("samvit_base_patch16", embed_dim=48, num_heads=3, depth=1, img_size=64),
        "windowed attention",
    ),
    "Xcit": (lambda: timm.create_model("xcit_nano_12_p16_224", depth=1), "between channels"),
    "ResNet": (lambda: timm.create_model("resnet18"), ""),
    "prr": (lambda: VisionTransformer(**SMALL, global_pool="prr"), "global_pool"),
    "DiffAttention": (lambda: VisionTransformer(**SMALL, attn_layer="diff", block_fn=ParallelThingsBlock), "block 0"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_by_name(family):
    make, why = UNSUPPORTED[family]
    try:
        model = make()
    except (AssertionError, AttributeError, RuntimeError, TypeError):
        pytest.skip("this timm has no such model")
    before = state_of(model)
    for act in (lambda: prunex.attach(model, "evit"), lambda: read(model)):
        with pytest.raises(prunex.PrunexError) as caught:
            act()
        message = str(caught.value)
        assert family in message
        assert why in message
        assert "\n" not in message
        for works in ("ViT", "DeiT", "DINOv2", "registers", "attention pooling"):
            assert works in message
    assert_same_state(model, before)


class WithHelper(VisionTransformer):
    def helper(self):
        return 1


@pytest.mark.parametrize("name", ["forward", "forward_features", "forward_head", "pool", "_pos_embed"])
def test_a_subclass_with_its_own_forward_is_refused(name):
    cls = type("Mine", (VisionTransformer,), {name: lambda self, *a, **k: None})
    model = cls(**SMALL)
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match=rf"Mine has its own {name}\(\).*what works"):
        prunex.attach(model, "topk")
    assert_same_state(model, before)


def test_a_subclass_that_only_adds_is_fine():
    model = lively(WithHelper(**SMALL)).eval()
    with prunex.attach(model, "topk", keep_ratio=0.5):
        assert model(images_for(model)).shape == (3, 5)
        assert model.helper() == 1


@pytest.mark.parametrize("name", ["forward", "forward_features", "forward_head", "pool"])
def test_a_method_set_on_the_object_is_refused_instead_of_lost(name):
    model = tiny()
    replaced = lambda *a, **k: "mine"  # noqa: E731
    setattr(model, name, replaced)
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match=f"its own {name}, set on the object"):
        prunex.attach(model, "evit")
    assert getattr(model, name) is replaced
    assert_same_state(model, before)


def test_other_refusals_say_what_to_do():
    with pytest.raises(prunex.PrunexError, match="patch_drop_rate=0"):
        prunex.attach(VisionTransformer(**SMALL, patch_drop_rate=0.2), "evit")
    hollow = VisionTransformer(**SMALL)
    hollow.blocks = nn.Sequential()
    with pytest.raises(prunex.PrunexError, match="no blocks"):
        prunex.attach(hollow, "evit")

    class Hybrid(nn.Module):
        grid_size, img_size, patch_size, num_patches = (4, 4), (32, 32), (8, 8), 16

    odd = VisionTransformer(**SMALL)
    odd.patch_embed = Hybrid()
    with pytest.raises(prunex.PrunexError, match="Hybrid as patch embedding"):
        prunex.attach(odd, "evit")


def test_what_is_read():
    a = read(tiny("deit_distilled"))
    assert (a.depth, a.width, a.heads, a.head_dim, a.hidden) == (4, 48, (3,) * 4, 16, (192,) * 4)
    assert (a.prefix, a.grid, a.image, a.patch, a.channels, a.classes) == (2, (4, 4), (32, 32), (8, 8), 3, 5)
    assert a.readers == (0, 1)
    assert read(tiny()).readers == (0,)
    assert read(tiny("dinov2_reg")).prefix == 5
    assert read(tiny("avg_pool")).readers == ()
    assert read(tiny("avg_pool")).prefix == 1
    assert read(tiny("avg_pool_no_class")).prefix == 0
    assert read(tiny("avg_pool_prefix")).pool_prefix
    assert read(tiny("not_square")).grid == (5, 3)
    assert read(tiny("dynamic")).dynamic
    assert read(tiny(num_classes=0)).classes == 0


def test_readout_weights_sum_to_one():
    like = torch.zeros(2)
    policy = torch.ones(2, 17)
    policy[1, 1:] = 0
    assert read(tiny()).readout(17, policy, like)[1].tolist() == [1.0] + [0.0] * 16
    assert read(tiny("deit_distilled")).readout(18, None, like)[0, :3].tolist() == [0.5, 0.5, 0.0]
    pooled = read(tiny("avg_pool"))
    assert pooled.readout(17, None, like)[0].tolist() == pytest.approx([0.0] + [1 / 16] * 16)
    policy[0, 1:9] = 0
    row = pooled.readout(17, policy, like)
    assert row[0].tolist() == pytest.approx([0.0] * 9 + [1 / 8] * 8)
    assert torch.isfinite(row).all()  # nothing is left of the second image
    assert read(tiny("avg_pool_prefix")).readout(17, None, like)[0].tolist() == pytest.approx([1 / 17] * 17)


def test_finding_the_one_vit_inside():
    vit = tiny()
    assert find(vit) == ("", vit)
    assert find(nn.ModuleDict({"a": nn.ModuleDict({"b": vit})})) == ("a.b", vit)
    two = nn.ModuleDict({"student": tiny(), "teacher": tiny()})
    with pytest.raises(prunex.PrunexError, match=r"ModuleDict holds 2 timm ViTs \('student', 'teacher'\).*model="):
        find(two)
    assert find(two, "teacher")[1] is two["teacher"]
    nested = nn.ModuleDict({"a": nn.ModuleDict({"b": vit}), "c": tiny()})
    assert find(nested, "a") == ("a.b", vit)
    with pytest.raises(prunex.PrunexError, match=r"'nowhere' does not exist in ModuleDict; timm ViTs there: 'student'"):
        find(two, "nowhere")
    with pytest.raises(prunex.PrunexError, match="'student.blocks' is a Sequential holding 0"):
        find(two, "student.blocks")
    with pytest.raises(prunex.PrunexError, match="no supported ViT in .*Linear"):
        find(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(prunex.PrunexError, match="got str"):
        find("vit")
    shared = nn.ModuleDict({"one": vit, "again": vit})
    assert find(shared) == ("one", vit)  # one object under two names is one ViT


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_described_models_are_built_again(family):
    model = tiny(family)
    twin = build(describe(model))
    twin.load_state_dict(model.state_dict(), strict=True)
    x = images_for(model)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_a_description_that_cannot_be_built_is_refused():
    spec = describe(tiny())
    for damage in ({"class": "Nothing"}, {"args": spec["args"] | {"num_heads": 7}}, {"args": {"img_size": 3}}):
        with pytest.raises(prunex.PrunexError, match="cannot build the described model"):
            build(spec | damage)


BAD_IMAGES = {
    "a list": ([1, 2], "list"),
    "numpy": (torch.zeros(1, 3, 32, 32).numpy(), "ndarray"),
    "none": (None, "NoneType"),
    "integers": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
    "doubles": (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "torch.float64"),
    "halves": (torch.zeros(1, 3, 32, 32, dtype=torch.float16), "torch.float16"),
    "one image": (torch.zeros(3, 32, 32), r"\[3, 32, 32\].*images\[None\]"),
    "grey": (torch.zeros(1, 1, 32, 32), r"\[1, 1, 32, 32\]"),
    "channels last": (torch.zeros(1, 32, 32, 3), r"\[1, 32, 32, 3\]"),
    "five dimensions": (torch.zeros(1, 1, 3, 32, 32), r"\[1, 1, 3, 32, 32\]"),
    "larger": (torch.zeros(1, 3, 40, 32), "40 x 32 pixels: this model takes 32 x 32"),
    "tiny": (torch.zeros(1, 3, 4, 4), "4 x 4"),
    "empty": (torch.zeros(0, 3, 32, 32), r"empty batch \[0, 3, 32, 32\]"),
}


@pytest.mark.parametrize("method", ["topk", "dynamicvit"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused_in_one_line(kind, method):
    bad, message = BAD_IMAGES[kind]
    model = tiny()
    with prunex.attach(model, method) as pruning:
        with pytest.raises(prunex.PrunexError, match=message) as caught:
            model(bad)
        assert "\n" not in str(caught.value)
        model(torch.zeros(1, 3, 32, 32))  # and the model still works
        assert pruning.trace.batch == 1


def test_bad_values_are_found_when_asked_for():
    anatomy = read(tiny())
    x = torch.zeros(4, 3, 32, 32)
    check_images(anatomy, x, values=True)
    x[1, 0, 0, 0], x[3] = float("nan"), float("inf")
    with pytest.raises(prunex.PrunexError, match=r"images \[1, 3\] of the batch hold NaN"):
        check_images(anatomy, x, values=True)
