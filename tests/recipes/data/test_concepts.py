"""Concepts of images: the digits' parity, a folder's table and masks, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from prunex import PrunexError
from prunex.recipes import DigitScenes, ImageClassifier, ImageFolder
from prunex.recipes.data.digits import DigitDataset
from tests.callbacks.modules import trainer
from tests.recipes.data.test_folder import red, root  # noqa: F401  (a fixture)

TABLE = "image,furry,red box\ntrain/cat/0.png,1,0\ntrain/dog/2.png,,1\nval/cat/1.png,0,1\n"


def test_parity_says_which_digit_it_is():
    digits, parity = (DigitDataset("train", 64, task=t, annotated=0.5) for t in ("digit", "parity"))
    images, labels, masks = digits.__getitems__(range(64))
    same, parities, same_masks, more = parity.__getitems__(range(64))
    assert same.equal(images)
    assert same_masks.equal(masks)
    assert parities.equal(labels % 2)
    concepts = more["concepts"]
    known = ~concepts.isnan().any(1)
    assert 20 < int(known.sum()) < 44
    assert concepts[known].argmax(1).equal(labels[known])
    assert concepts[~known].isnan().all()
    one = parity[5]
    assert one[3]["concepts"].nan_to_num(-1).equal(concepts[5].nan_to_num(-1))
    # Validation is annotated whole.
    assert not DigitDataset("val", 8, task="parity", annotated=0.0).__getitems__(range(8))[3]["concepts"].isnan().any()


def test_parity_as_a_data_module():
    data = DigitScenes(task="parity", batch_size=4, train_size=8, val_size=8)
    assert (data.num_classes, data.class_names, len(data.concept_names)) == (2, ("even", "odd"), 10)
    assert DigitScenes().num_classes == 10
    assert DigitScenes().concept_names == ()
    with pytest.raises(PrunexError, match="unknown task 'colour'"):
        DigitScenes(task="colour")
    with pytest.raises(PrunexError, match="annotated=2 is not allowed"):
        DigitScenes(annotated=2)


def test_a_table_of_concepts(root):  # noqa: F811
    (root / "concepts.csv").write_text(TABLE)
    data = ImageFolder(root, image_size=32, batch_size=4)
    assert data.concept_names == ["furry", "red box"]
    assert data.spatial_concept_names == []
    data.setup("fit")
    *_, more = next(iter(data.val_dataloader()))
    assert set(more) == {"concepts"}
    assert more["concepts"][1].tolist() == [0, 1]
    assert more["concepts"][[0, 2, 3]].isnan().all()
    known = {tuple(item[-1]["concepts"].nan_to_num(-1).tolist()) for item in data._splits["train"]}
    assert known == {(1, 0), (-1, 1), (-1, -1)}


def test_masks_of_concepts_move_with_their_image(root):  # noqa: F811
    for name in ("val/cat/0.png", "val/dog/1.png", "train/cat/0.png"):
        path = root / "concepts" / "box" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root / "masks" / name).read_bytes())
    (root / "concepts" / "sky" / "val" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(root / "concepts" / "sky" / "val" / "cat" / "1.png")
    for augment in (False, True):
        data = ImageFolder(root, image_size=32, batch_size=4, patch_size=8, color_jitter=0.0, augment=augment)
        assert data.spatial_concept_names == ["box", "sky"]
        data.setup("fit")
        images, _, _, more = next(iter(data.val_dataloader()))
        spatial = more["spatial_concepts"]
        assert spatial.shape == (4, 16, 2)
        assert spatial[2].isnan().all()  # nobody annotated it
        assert spatial[1].eq(0).all()  # annotated, with nothing
        for i in (0, 3):
            seen = torch.nn.functional.adaptive_max_pool2d(red(images[i : i + 1]).float(), 4).flatten()
            assert bool((spatial[i, :, 0] >= seen).all())
            assert 0 < float(spatial[i, :, 0].mean()) < 1
            assert spatial[i, :, 1].eq(0).all()
        train = data._splits["train"][0]
        seen = torch.nn.functional.adaptive_max_pool2d(red(train[0][None]).float(), 4).flatten()
        assert bool((train[-1]["spatial_concepts"][:, 0] >= seen).all())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,furry,furry\n", r"the first line of .* is \['image', 'furry', 'furry'\]: give image and names"),
        ("", "the first line of .* is "),
        ("image,furry\ntrain/cat/0.png,2\n", "line 2 of .* has '2': give 0, 1 or nothing"),
        ("image,furry\ntrain/cat/0.png,1,0\n", "line 2 of .* has 2 values for 1 concepts"),
        ("image,furry\n\ntrain/cat/9.png,1\n", "line 3 of .* names 'train/cat/9.png', which is not there"),
    ],
)
def test_bad_tables(root, table, message):  # noqa: F811
    (root / "concepts.csv").write_text(table)
    with pytest.raises(PrunexError, match=message):
        ImageFolder(root, image_size=32).setup("fit")


def test_masks_of_concepts_need_the_patch_size(root):  # noqa: F811
    (root / "concepts" / "box").mkdir(parents=True)
    for size in (None, 5):
        with pytest.raises(PrunexError, match="has masks of concepts, so give the side of the model's patches"):
            ImageFolder(root, image_size=32, patch_size=size).setup("fit")


def test_a_head_takes_the_datas_names_and_refuses_others(tmp_path):
    from prunex.callbacks import ExplainableHead

    def run(**options):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
        module = ImageClassifier("vit_tiny_patch16_224", 2, sizes, from_scratch=True)
        data = DigitScenes(task="parity", batch_size=4, train_size=8, val_size=4, image_size=32, max_digit=28)
        head = ExplainableHead("concept_transformer", options)
        trainer(tmp_path, head, limit_train_batches=1).fit(module, datamodule=data)
        return head

    assert run(sparsity_weight=0.0).options["concepts"] == list(DigitScenes(task="parity").concept_names)
    with pytest.raises(PrunexError, match=r"concepts=\['a', 'b'\], and DigitScenes has labels for \['zero', "):
        run(concepts=["a", "b"])
    assert run(concepts=10).options["concepts"] == 10
