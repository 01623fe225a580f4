"""What only a GPU can show; skipped without one."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex.vit.policy import under_policy
from tests.callbacks.every import CASES, Module, batches
from tests.explainers.quick import EXPLAINERS, explain
from tests.on_any_device import TOKEN_PRUNERS, compiles, resumes, runs_beside_itself, trains
from tests.vits import MORE_FAMILIES, images_for, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=128, depth=6, num_heads=2, num_classes=5)
    return vit.cuda().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_policy_attention_agrees_with_float64(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 65, 64, generator=g) for _ in range(3))
    policy = (torch.rand(2, 65, generator=g) > 0.5).float()
    policy[:, 0] = 1
    wanted = under_policy(q.double(), k.double(), v.double(), policy.double(), 0.125)
    found = under_policy(*(t.cuda().to(dtype) for t in (q, k, v)), policy.cuda(), 0.125)
    assert (found.cpu().double() - wanted).abs().max() < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit"])
def test_gpu_agrees_with_cpu_and_trains_in_bf16(method):
    model, x = small(), torch.randn(4, 3, 64, 64)
    pruning = prunex.attach(model, method, keep_ratio=0.7)
    with torch.no_grad():
        there = model(x.cuda()).cpu()
        here = prunex.slim(model).cpu()(x)
    assert (there - here).abs().max() < 1e-2 * here.abs().max()
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x.cuda()).float().square().mean() + sum(pruning.losses().values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit"])
def test_compiled_on_the_gpu(method):
    model, x = small(), torch.randn(4, 3, 64, 64).cuda()
    prunex.attach(model, method, keep_ratio=0.7)
    with torch.no_grad():
        wanted = model(x)
        found = torch.compile(model)(x)
    assert (found - wanted).abs().max() < 1e-2 * wanted.abs().max()


@pytest.mark.parametrize(
    "explainer", [m for m in EXPLAINERS if m not in ("r_cut", "shap", "vit_cx")]
)  # these two have thresholds
def test_explanations_agree_with_the_cpu(explainer):
    model, x = small(), torch.randn(4, 3, 64, 64)
    with prunex.attach(model, "evit", keep_ratio=0.7):
        target = torch.tensor([0, 1, 2, 3])
        there = explain(explainer, model, x.cuda(), target.cuda()).maps.cpu()
        here = explain(explainer, prunex.slim(model).cpu(), x, target).maps
    assert torch.nn.functional.cosine_similarity(there.flatten(1), here.flatten(1)).min() > 0.99


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_other_families_agree_with_the_cpu(family, masked):
    model = tiny(family)
    x = images_for(model)
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)) as pruning, torch.no_grad():
        pruning.masked = masked
        here = model(x)
        model.cuda()
        assert (model(x.cuda()).cpu() - here).abs().max() < 1e-2 * here.abs().max()
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.isfinite(model(x.cuda())).all()


def test_a_loss_that_is_not_finite_is_told_without_waiting(tmp_path):
    from lightning.pytorch import seed_everything
    from torch.utils.data import DataLoader, TensorDataset

    from prunex.callbacks import TokenPruning
    from tests.callbacks.modules import Plain, data, trainer

    seed_everything(0)
    images, labels = data(16)
    images[9] = float("nan")
    run = trainer(tmp_path, TokenPruning("evit"), accelerator="gpu")
    with pytest.raises(prunex.PrunexError, match=r"batch 2; not finite is the task's loss; .*inputs of 1, logits of 1"):
        run.fit(Plain(lr=1e-3), DataLoader(TensorDataset(images, labels), 4))
    assert run.global_step == 3


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", CASES)
def test_every_callback_trains(tmp_path, name, precision):
    trains(tmp_path, name, "gpu", precision)


@pytest.mark.parametrize("name", CASES)
def test_every_callback_goes_on_from_a_checkpoint(tmp_path, name):
    """Bit for bit is the CPU's; kernels of a GPU that add up in any order are held to what that changes."""
    resumes(tmp_path, name, "gpu", exact=False)


@pytest.mark.parametrize("name", ["topk", "dynamicvit", "xpruner"])
def test_goes_on_bit_for_bit_where_all_is_deterministic(tmp_path, name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        resumes(tmp_path, name, "gpu")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", TOKEN_PRUNERS)
def test_every_token_pruner_compiles(method):
    compiles(method, TOKEN_PRUNERS[method], "cuda", "inductor")


@pytest.mark.parametrize("method", TOKEN_PRUNERS)
def test_two_streams(method):
    lanes = [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    runs_beside_itself(method, TOKEN_PRUNERS[method], "cuda", lanes)


# These wait, for reasons that tests/callbacks/test_waits.py lists.
WAITING = {"diffrate", "evit, adaptive", "guided tokens, cache"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in WAITING])
def test_no_step_waits_for_the_device(tmp_path, name):
    """From a batch's begin to its end, but for the steps in which units are chosen."""
    import lightning as L

    from prunex.callbacks import MaskPruning
    from tests.callbacks.modules import trainer

    class Strict(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step > 0:  # what is looked at once is looked at in the first step
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *args):
            torch.cuda.set_sync_debug_mode("default")

    callbacks = CASES[name](tmp_path)
    # Hooks run in the order of the callbacks: behind MaskPruning's, in which units are chosen, and before others'.
    at = 1 + max((i for i, c in enumerate(callbacks) if isinstance(c, MaskPruning)), default=-1)
    run = trainer(tmp_path, *callbacks[:at], Strict(), *callbacks[at:], accelerator="gpu", max_epochs=2)
    try:
        run.fit(Module(), batches(), batches())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.global_step == 12


def test_a_wait_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
