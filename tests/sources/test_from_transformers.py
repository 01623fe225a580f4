"""Twins of transformers' ViTs: the same answers at two sizes, dense, pruned and slimmed, saved, loaded and exported."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.sources.classes import CLASSES
from prunex.sources.convert import TOLERANCE, difference
from prunex.sources.parts import Parts
from tests.sources.models import CLASSES as COUNT
from tests.sources.models import MODELS, PATCH, SIZE, images, made, transformers
from tests.vits import assert_same_state, quick, relative, state_of

MEANS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
GREY = {"image_mean": [0.4], "image_std": [0.2]}


def twin_of(model, size=None):
    channels = getattr(model.config, "num_channels", 3)
    return prunex.from_transformers(model, size, processor=GREY if channels == 1 else MEANS)


def patches_of(x):
    """Images as SigLIP 2's processor packs them, written once more: patch by patch, channels last."""
    rows = []
    for image in x:
        cells = [
            image[:, i : i + PATCH, j : j + PATCH].permute(1, 2, 0).flatten()
            for i in range(0, image.shape[1], PATCH)
            for j in range(0, image.shape[2], PATCH)
        ]
        rows.append(torch.stack(cells))
    count = len(rows[0])
    return {
        "pixel_values": torch.stack(rows),
        "pixel_attention_mask": torch.ones(len(x), count, dtype=torch.long),
        "spatial_shapes": torch.tensor([[x.shape[2] // PATCH, x.shape[3] // PATCH]] * len(x)),
    }


@torch.no_grad()
def theirs(model, x):
    """What a model is used for, asked as its documentation asks it."""
    name = type(model).__name__
    inputs = {"pixel_values": x}
    if name.startswith("Siglip2"):
        inputs = patches_of(x)
    elif name.startswith(("ViT", "DeiT", "CLIP", "Siglip")):
        inputs["interpolate_pos_encoding"] = True
    if name in ("CLIPModel", "SiglipModel", "Siglip2Model"):
        features = model.get_image_features(**inputs)
        return features if isinstance(features, torch.Tensor) else features.pooler_output
    out = model(**inputs)
    if "Classification" in name:
        return out.logits
    if name == "CLIPVisionModelWithProjection":
        return out.image_embeds
    if name in ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "BeitModel"):
        return out.last_hidden_state if out.pooler_output is None else out.pooler_output
    return out.last_hidden_state[:, 0]


def channels(model):
    return getattr(model.config, "num_channels", 3)


def test_every_class_has_a_model_here():
    assert {cls for cls, _, _ in MODELS.values()} == set(CLASSES)


@pytest.mark.parametrize("size", [SIZE, 96, (64, 96)])
@pytest.mark.parametrize("name", MODELS)
def test_a_twin_answers_as_the_model(name, size):
    model = made(name)
    twin = twin_of(model, None if size == SIZE else size)
    x = images(size, channels=channels(model))
    with torch.no_grad():
        assert relative(twin(x), theirs(model, x)) < TOLERANCE
    assert twin(x).shape == theirs(model, x).shape
    assert not twin.training
    assert prunex.cost(twin).macs > 0


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_registers", "dinov3_gated", "siglip"])
def test_all_tokens_are_the_models(name):
    model = made(name)
    x = images()
    with torch.no_grad():
        assert relative(twin_of(model).forward_features(x), model(x).last_hidden_state) < TOLERANCE


def test_dinov3_takes_any_size_and_others_their_own():
    model = made("dinov3")
    x = images((48, 96))
    with torch.no_grad():
        assert relative(twin_of(model)(x), theirs(model, x)) < TOLERANCE
    twin = twin_of(made("vit"))
    with pytest.raises(PrunexError, match="48 x 96 pixels: this model takes 64 x 64"):
        prunex.explain("rollout", twin, x)


WRONG = {
    "eps": lambda twin: [setattr(m, "eps", 1e-3) for m in twin.modules() if isinstance(m, nn.LayerNorm)],
    "activation": lambda twin: [setattr(b.mlp, "act", nn.ReLU()) for b in twin.blocks],
    "tanh": lambda twin: [setattr(b.mlp, "act", nn.GELU("tanh")) for b in twin.blocks],
    "order of qkv": lambda twin: twin.blocks[0].attn.qkv.weight.data.copy_(
        twin.blocks[0].attn.qkv.weight.data.roll(48, 0)
    ),
    "positions": lambda twin: twin.pos_embed.data.copy_(twin.pos_embed.data.flip(1)),
    "a norm": lambda twin: twin.norm.weight.data.fill_(1),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_seen(what):
    model = made("vit_classes")
    twin = twin_of(model)
    with torch.no_grad():
        assert difference(Parts(model), twin) < TOLERANCE
        WRONG[what](twin)
        assert difference(Parts(model), twin) > 3 * TOLERANCE


@pytest.mark.parametrize(
    "alter",
    [
        lambda model: setattr(model.vit.layers[1].mlp, "activation_fn", nn.ReLU()),
        lambda model: setattr(model.vit.layers[2], "mlp", nn.Sequential(model.vit.layers[2].mlp, nn.Tanh())),
        lambda model: model.vit.layers[0].register_forward_hook(lambda m, args, out: out * 1.1),
        lambda model: setattr(model.vit.layernorm, "eps", 0.1),
    ],
)
def test_an_altered_model_is_refused(alter):
    model = made("vit_classes")
    if not hasattr(model.vit, "layers"):
        pytest.skip("this transformers names blocks otherwise")
    alter(model)
    with pytest.raises(PrunexError, match="differs by|no fc2 that is known"):
        twin_of(model)


def test_the_model_stays_as_it_is_and_shares_nothing():
    model = made("vit_classes").train()
    model.vit.embeddings.cls_token.requires_grad_(False)
    before = state_of(model)
    twin = twin_of(model)
    assert_same_state(model, before)
    assert model.training
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same_state(model, before)
    assert all(p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_the_models_precision(dtype):
    model = made("dinov2_registers_classes").to(dtype)
    twin = twin_of(model)
    assert {p.dtype for p in twin.parameters()} == {dtype}
    x = images().to(dtype)
    with torch.no_grad():
        assert (
            relative(twin(x).double(), theirs(model, x).double()) < {torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
        )


def test_random_numbers_stay():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    model = copy.deepcopy(made("vit"))
    torch.manual_seed(3)
    twin_of(model)
    assert torch.rand(1) == want


# ------------------------------------------------------------------------------------------------ pruned and slimmed
REMOVED = ["vit_classes", "deit_teacher", "dinov2_classes", "dinov2_registers_classes", "clip_projected", "siglip"]
REMOVED += ["siglip_classes", "clip_classes"]
MASKED = ["dinov3", "dinov3_gated", "beit_relative_class_token", "beit_class_token", "vit_classes"]


def blocks_of(model):
    return Parts(model).blocks


@torch.no_grad()
def theirs_without(model, x, leave):
    """The model's answer where rows leave behind blocks: {block: int64 [B, n] of the rows that stay}."""
    hooks = []
    for block, rows in leave.items():

        def cut(module, args, out, rows=rows):
            first = out if isinstance(out, torch.Tensor) else out[0]
            return first.gather(1, rows[..., None].expand(-1, -1, first.shape[2]))

        hooks.append(blocks_of(model)[block].register_forward_hook(cut))
    try:
        return theirs(model, x)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def theirs_masked(model, x, there):
    """The model's answer where later blocks cannot look at keys: {block: bool [B, N] of those that stay}."""
    hooks, gone = [], None
    for number, block in enumerate(blocks_of(model)):
        if gone is not None:

            def hide(module, args, kwargs, gone=gone):
                hidden = torch.zeros(gone.shape).masked_fill(gone, torch.finfo(torch.float32).min)[:, None, None]
                mask = kwargs.get("attention_mask")
                args = args[:1]  # a mask that came by place is none
                return args, kwargs | {"attention_mask": hidden if mask is None else mask + hidden}

            hooks.append(block.register_forward_pre_hook(hide, with_kwargs=True))
        gone = ~there[number] if number in there else gone
    try:
        return theirs(model, x)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", REMOVED)
def test_pruned_and_slimmed_as_the_model_without_the_same_rows(name):
    model, x = made(name), images()
    twin = twin_of(model)
    prefix = twin.num_prefix_tokens
    pruning = prunex.attach(twin, "topk", keep_ratio=0.6, stages=(1, 2))
    small = prunex.slim(twin)
    with torch.no_grad():
        ours = small(x)
    trace = prunex.attached(small).trace
    kept = [trace.kept(stage).flatten(1) for stage in range(2)]
    front = torch.arange(prefix).expand(len(x), -1)

    def rows(among, stay):  # the places, among the patches that were there, of those that stay
        places = torch.stack([after[before].nonzero()[:, 0] for before, after in zip(among, stay, strict=True)])
        return torch.cat([front, places + prefix], 1)

    leave = {1: rows(torch.ones_like(kept[0]), kept[0]), 2: rows(kept[0], kept[1])}
    want = theirs_without(model, x, leave)
    assert relative(ours, want) < TOLERANCE
    assert relative(ours, theirs(model, x)) > 100 * TOLERANCE  # which rows are there does matter
    assert pruning.counts() == [10, 6]


@pytest.mark.parametrize("name", MASKED)
def test_pruned_as_the_model_with_the_same_keys_masked(name):
    model, x = made(name), images()
    twin = twin_of(model)
    prunex.attach(twin, "topk", keep_ratio=0.6, stages=(1, 2))
    with torch.no_grad():
        ours = twin(x)
    trace = prunex.attached(twin).trace
    front = torch.ones(len(x), twin.num_prefix_tokens, dtype=torch.bool)
    there = {block: torch.cat([front, trace.kept(stage).flatten(1)], 1) for stage, block in enumerate((1, 2))}
    assert relative(ours, theirs_masked(model, x, there)) < TOLERANCE
    assert relative(ours, theirs(model, x)) > 100 * TOLERANCE


SAVED = ["vit_classes", "deit_teacher", "deit_classes", "dinov2_swiglu", "dinov2_registers_classes", "dinov3_gated"]
SAVED += ["clip_projected", "clip_classes", "siglip", "siglip_classes", "beit", "beit_relative", "beit_shared"]


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded(name, tmp_path):
    model, x = made(name), images()
    twin = twin_of(model)
    again = prunex.load(prunex.save(twin, tmp_path / "dense"))
    with torch.no_grad():
        assert relative(again(x), theirs(model, x)) < TOLERANCE
    assert again.pretrained_cfg["mean"] == MEANS["image_mean"]
    prunex.attach(twin, "evit", keep_ratio=0.6, stages=(1, 2))
    small = prunex.load(prunex.save(prunex.slim(twin), tmp_path / "slim"))
    with torch.no_grad():
        want = twin(x)
        assert relative(small(x), want) < TOLERANCE


@pytest.mark.parametrize("name", quick(SAVED, ["dinov2_registers_classes", "clip_projected"]))
def test_exported(name, tmp_path):
    twin, x = twin_of(made(name)), images()
    prunex.attach(twin, "evit", keep_ratio=0.6, stages=(1, 2))
    with torch.no_grad():
        program = torch.export.load(prunex.export(twin, tmp_path / "model.pt2")).module()
        assert relative(program(x), twin(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_classes", "dinov2_classes", "dinov3", "siglip_classes", "beit_relative"])
def test_trained_and_explained(name):
    twin = twin_of(made(name))
    pruning = prunex.attach(twin, "dynamicvit", keep_ratio=0.6, stages=(1, 2), teacher=False)
    twin.train()
    loss = twin(images()).square().mean() + sum(pruning.losses().values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in twin.parameters() if p.grad is not None)
    twin.eval()
    for method in ("rollout", "generic_attention") if twin.num_classes else ("rollout",):
        assert prunex.explain(method, twin, images()).maps.shape == (3, 4, 4)


def test_what_reads_the_mean_patch_is_a_head_that_says_so():
    model, x = made("dinov2_classes"), images()
    twin = twin_of(model)
    e = prunex.explain("mean_patch", twin, x, target=2)
    weight = model.classifier.weight[2, 48:]
    tokens = model.dinov2(x).last_hidden_state[:, 1:]
    want = (tokens @ weight / tokens.shape[1]).detach().reshape(3, 4, 4)
    assert relative(e.maps, want) < TOLERANCE
    assert relative(e.logits, theirs(model, x)) < TOLERANCE


# ---------------------------------------------------------------------------------------------------- names and pixels
def test_classes_keep_their_names():
    model = made("vit_classes")
    assert twin_of(model).label_names == []  # LABEL_0 is no name
    model.config.id2label = {i: f"animal {i}" for i in range(COUNT)}
    assert twin_of(model).label_names == [f"animal {i}" for i in range(COUNT)]
    assert twin_of(made("vit")).label_names == []


def test_mean_and_std_of_a_processor():
    model = made("vit_classes")
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3)
    cfg = prunex.from_transformers(model, processor=processor).pretrained_cfg
    assert cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert cfg["std"] == pytest.approx((0.4, 0.5, 0.6))
    assert cfg["interpolation"] == "bicubic"
    assert cfg["input_size"] == (3, SIZE, SIZE)
    # A picture of either road.
    pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    said = processor(pixels, do_resize=False, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    assert relative((pixels / 255 - mean) / std, said) < 1e-5


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"do_normalize": False}, 0, 1),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5),
    ],
)
def test_pixels_are_told_in_0_to_1(said, mean, std):
    cfg = prunex.from_transformers(made("vit"), processor=said).pretrained_cfg
    assert cfg["mean"] == pytest.approx((mean,) * 3)
    assert cfg["std"] == pytest.approx((std,) * 3)


def test_without_a_processor_one_warning():
    with pytest.warns(UserWarning, match="nothing says how the model's images are normalised") as told:
        prunex.from_transformers(made("vit"))
    assert len(told) == 1
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin_of(made("vit"))


@pytest.mark.parametrize(
    ("processor", "wrong"),
    [
        (3, "a int is no image processor"),
        ({"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}, "image_mean has 2 numbers for 3 channels"),
        ({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, "must be above 0"),
        ({"image_mean": [0.5] * 3}, "no image_mean and image_std"),
        ({"do_normalize": False, "rescale_factor": "x"}, "rescale_factor=x is no number"),
    ],
)
def test_processors_that_say_nothing(processor, wrong):
    with pytest.raises(PrunexError, match=wrong):
        prunex.from_transformers(made("vit"), processor=processor)


# -------------------------------------------------------------------------------------------------------------- refused
def masked_images():
    return transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=80)
    )


class ViTModel(nn.Linear):
    """A stranger of a known name."""


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (masked_images, "ViTForMaskedImageModeling has no timm twin that is known; known are ViTModel, "),
        (lambda: ViTModel(3, 3), "ViTModel has no timm twin"),
        (lambda: nn.Linear(3, 3), "Linear has no timm twin"),
        (lambda: 7, "a int is no model: give a model of transformers, or a local folder"),
        (lambda: made("vit", hidden_act="gelu_fast"), "hidden_act='gelu_fast' is in no timm model: known are gelu"),
        (lambda: made("beit", hidden_act="relu"), "hidden_act='relu' is not timm's for BEiT"),
        (lambda: made("dinov3", hidden_act="relu"), "hidden_act='relu' is not timm's for this DINOv3"),
        (lambda: made("dinov3", key_bias=True), "block 0 has a key bias"),
        (lambda: made("vit").to("meta"), "on the meta device and has no values"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(made("vit"), {nn.Linear}),
            "is a Linear and no plain linear layer: merge adapters",
        ),
        (
            lambda: transformers.BeitModel(made("beit").config, add_pooling_layer=False).eval(),
            "norm of the mean|without its pooling",
        ),
    ],
)
def test_refused_by_name(model, wrong):
    with pytest.raises(PrunexError, match=wrong):
        prunex.from_transformers(model(), processor=MEANS)


@pytest.mark.parametrize("size", [70, (64, 70), 0, -16, 1.5, "64", (64, 64, 64), True])
def test_sizes_that_are_none(size):
    with pytest.raises(PrunexError, match="is no size|multiples of the patch"):
        twin_of(made("vit"), size)


def test_who_attaches_to_the_model_itself_is_told_of_its_twin():
    with pytest.raises(PrunexError, match="prunex.from_transformers makes the timm twin"):
        prunex.attach(made("vit_classes"), "evit")


def test_timm_finds_how_images_are_prepared():
    cfg = timm.data.resolve_model_data_config(twin_of(made("vit_classes")))
    assert cfg["mean"] == pytest.approx((0.4, 0.5, 0.6))
    assert cfg["input_size"] == (3, SIZE, SIZE)


def test_an_adapted_model_is_refused():
    peft = pytest.importorskip("peft")
    names = ["q_proj", "query"]
    adapted = peft.get_peft_model(made("vit"), peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    with pytest.raises(PrunexError, match="merge adapters"):
        twin_of(adapted.base_model.model)
    merged = adapted.merge_and_unload().eval()
    x = images()
    with torch.no_grad():
        assert relative(twin_of(merged)(x), theirs(merged, x)) < TOLERANCE
