"""Training a ViT Shapley explainer: first a surrogate that bears missing patches, then the network that explains it."""

import copy
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from prunex.callbacks.run_folder import only_trying
from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.learned.diffmask import divergence
from prunex.learned.vit_shapley import ShapleyExplainer
from prunex.recipes.modules.training import ExplainerTraining, check_at_most, cosine, images_of, scheduled
from prunex.removal.coalitions import batch_coalitions, seeded, uniform_coalitions
from prunex.removal.game import Removal, masked
from prunex.vit.anatomy import find, read
from prunex.vit.embedding import embed


class ViTShapley(ExplainerTraining):
    """Trains a surrogate of a classifier and then its ViT Shapley explainer (arXiv 2206.05282), in one ``fit``.

    The first ``surrogate_epochs`` epochs train the surrogate: KL(classifier on the whole image || surrogate on a random
    part of its patches), the number of patches uniform on 0..P, absent ones hidden as attention keys in every block.
    The rest train the explainer, which starts from the surrogate: P times the mean squared error of v(0) + sum of the
    values of the patches there, against the surrogate's probabilities, over ``masks`` coalitions an image, all classes
    at once.

    Coalitions have exact sizes with probability ~ 1 / (s (P - s)), as in the paper; the authors' code keeps patches
    independently, with a shifted weight, and draws 13 % trivial coalitions. Other departures: the images of a training
    batch share the sizes of their coalitions (not the coalitions), so that tokens can be dropped instead of masked; no
    crops and jitter of its own (the data module's business); the warm-up is a share of each stage; one optimiser serves
    both. Run it in one process.

    After every validation of the second stage with the lowest ``val_explainer_loss`` so far, the explainer is written
    to ``explainer/`` in the run's folder: ``prunex.explain("vit_shapley", model, images, explainer=that_folder)``.

    Logged: ``train_surrogate_loss``, ``train_explainer_loss``, ``val_surrogate_loss`` (KL under random masks),
    ``val_surrogate_kl`` (KL on whole images), ``val_surrogate_agreement`` (share of images whose predicted class is the
    classifier's) and ``val_explainer_loss``. Validation masks depend on the image's number alone.

    Args:
        architecture: Name of a timm ViT.
        num_classes: Number of classes; on the command line, None takes it from the data module.
        model_args: Overrides for timm's constructor.
        weights: The classifier: path of a safetensors file, or the name of weights shipped with prunex.
        pretrained: Download timm's weights; needs a network.
        from_scratch: Explain a classifier of random weights: without it, and without weights, training is refused.
        surrogate_epochs: Epochs of the first stage; 0 takes the classifier itself as the surrogate.
        masks: Coalitions an image and step in the second stage; even.
        surrogate_learning_rate: Peak of the first stage.
        learning_rate: Peak of the second stage.
        weight_decay: AdamW's.
        warmup: Share (0..1) of each stage's steps over which the learning rate rises; then a cosine takes it to 0.
        chunk: Most token sequences in one forward of the surrogate.

    Raises:
        PrunexError: If an argument is outside its range, or the weights cannot be loaded.
    """

    def __init__(
        self,
        architecture: str = "vit_small_patch16_224",
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
        surrogate_epochs: int = 10,
        masks: int = 32,
        surrogate_learning_rate: float = 1e-5,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-5,
        warmup: float = 0.05,
        chunk: int = 512,
        from_scratch: bool = False,
    ) -> None:
        super().__init__()
        check_whole("surrogate_epochs", surrogate_epochs, 0)
        check_whole("chunk", chunk, 1)
        if check_whole("masks", masks, 2) % 2:
            raise PrunexError(f"masks={masks} is not allowed: give an even number, each with its complement")
        self.save_hyperparameters()
        check_at_most(math.inf, self.hparams, "surrogate_learning_rate", "learning_rate", "weight_decay")
        check_at_most(1.0, self.hparams, "warmup")
        classifier = self.build_classifier(architecture, num_classes, model_args, weights, pretrained)
        self.players = math.prod(read(find(classifier)[1]).grid)
        self.classifier = cast(Any, classifier.eval().requires_grad_(False))
        # A copy, since the surrogate trains and the classifier stays what is explained.
        self.explainer = ShapleyExplainer(copy.deepcopy(self.classifier))
        self.explaining = surrogate_epochs == 0
        self.explainer.surrogate.requires_grad_(not self.explaining)
        self._validated = 0

    def train(self, mode: bool = True) -> "ViTShapley":
        """Train or eval mode; the classifier never trains, the surrogate only in its own stage."""
        super().train(mode)
        self.classifier.eval()
        self.explainer.surrogate.train(mode and not self.explaining)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Estimated Shapley values ``[B, P, num_classes]`` of images ``[B, 3, H, W]``."""
        return self.explainer(images)

    def on_fit_start(self) -> None:
        """See that there is something to explain, and that both stages have epochs."""
        super().on_fit_start()
        epochs, first = self.trainer.max_epochs, self.hparams["surrogate_epochs"]
        if not only_trying(self.trainer) and epochs is not None and 0 <= epochs <= first:
            raise PrunexError(
                f"surrogate_epochs={first} of {epochs} epochs leave none for the explainer: raise trainer.max_epochs"
            )

    def on_train_epoch_start(self) -> None:
        """Begin the second stage when its turn has come."""
        if not self.explaining and self.current_epoch >= self.hparams["surrogate_epochs"]:
            self._begin_explaining()

    def _begin_explaining(self) -> None:
        self.explaining = True
        surrogate = self.explainer.surrogate
        surrogate.requires_grad_(False)
        # The explainer's backbone has no classifier.
        names = self.explainer.backbone.state_dict().keys()
        self.explainer.backbone.load_state_dict({k: v for k, v in surrogate.state_dict().items() if k in names})
        self.train(self.training)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the stage that is on."""
        images = images_of(batch)
        # From torch's generator, so that a run that goes on draws what it would have drawn.
        draws = seeded(int(torch.randint(2**62, ())))
        name = "explainer" if self.explaining else "surrogate"
        if self.explaining:
            loss = self.explainer_loss(images, self._coalitions(len(images), draws))
        else:
            loss = self.surrogate_loss(images, uniform_coalitions(len(images), self.players, draws))
        self.log(f"train_{name}_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def surrogate_loss(self, images: Tensor, present: Tensor) -> Tensor:
        """KL(classifier on images ``[B, 3, H, W]`` || surrogate on the patches present, bool ``[B, P]``), a scalar."""
        with torch.no_grad():
            wanted = self.classifier(images)
        x, grid = embed(self.explainer.surrogate, images)
        return divergence(wanted, masked(self.explainer.surrogate, x, grid, present.to(x.device))).mean()

    def explainer_loss(self, images: Tensor, coalitions: Tensor) -> Tensor:
        """P times the mean squared error of v(0) + z^T phi against v(z) of coalitions bool ``[B, M, P]``, a scalar."""
        # All patches and none, which every set of values must add up to, come with the coalitions.
        ends = torch.tensor([[True], [False]]).expand(len(images), -1, -1).expand(-1, -1, self.players)
        game = Removal(self.explainer.surrogate, images, chunk=self.hparams["chunk"])
        values = game(torch.cat([ends, coalitions], 1)).to(images.dtype)
        full, empty, wanted = values[:, 0], values[:, 1], values[:, 2:]
        return regression_loss(self.explainer(images, (full, empty)), empty, coalitions, wanted)

    def on_validation_epoch_start(self) -> None:
        """Number the images anew."""
        self._validated = 0

    on_test_epoch_start = on_validation_epoch_start

    def _evaluate(self, stage: str, batch: Any) -> None:
        images = images_of(batch)
        count = len(images)
        # By the image's number, so that the batch size changes nothing.
        draws = [seeded(self._validated + i) for i in range(count)]
        self._validated += count
        uniform = torch.cat([uniform_coalitions(1, self.players, d) for d in draws])
        with torch.no_grad():
            whole, surrogate = self.classifier(images), self.explainer.surrogate(images)
            metrics = {
                "surrogate_loss": self.surrogate_loss(images, uniform),
                "surrogate_kl": divergence(whole, surrogate).mean(),
                "surrogate_agreement": (whole.argmax(1) == surrogate.argmax(1)).float().mean(),
            }
            if self.explaining:
                metrics["explainer_loss"] = self.explainer_loss(
                    images, torch.cat([self._coalitions(1, d) for d in draws])
                )
        for name, value in metrics.items():
            self.log(f"{stage}_{name}", value, batch_size=count, sync_dist=True, prog_bar=name == "explainer_loss")

    def _coalitions(self, images: int, draws: torch.Generator) -> Tensor:
        return batch_coalitions(images, self.hparams["masks"], self.players, draws)

    def score(self) -> float | None:
        """The explainer's loss."""
        loss = self.trainer.callback_metrics.get("val_explainer_loss")
        return None if loss is None else float(loss)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over both stages, each with its own warm-up and cosine."""
        surrogate = list(self.explainer.surrogate.parameters())
        rest = [p for name, p in self.explainer.named_parameters() if not name.startswith("surrogate.")]
        first_rate, rate = self.hparams["surrogate_learning_rate"], self.hparams["learning_rate"]
        groups: list[dict[str, Any]] = [{"params": surrogate, "lr": first_rate}, {"params": rest, "lr": rate}]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=self.hparams["weight_decay"])
        total, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs or 0
        first = self.hparams["surrogate_epochs"]
        # The step at which the second stage begins.
        change = total * first / epochs if epochs > 0 and math.isfinite(total) else 0

        def factor(begin: float, end: float) -> Any:
            def at(step: int) -> float:
                if math.isinf(total) or not begin < end:  # an open-ended run has no cosine
                    return 1.0
                done, warm = (step - begin) / (end - begin), self.hparams["warmup"]
                if done < warm:
                    # A step more than is done, so that a stage's first one learns already.
                    return max(0.0, done / warm) + 1 / (end - begin)
                return cosine((done - warm) / max(1e-9, 1 - warm))

            return at

        return scheduled(optimizer, [factor(0, change), factor(change, total)])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Note the stage and the best so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["vit_shapley"] = {"explaining": self.explaining, "best": self.best}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Go on in the stage the checkpoint was written in."""
        saved = checkpoint.get("vit_shapley", {})
        self.explaining, self.best = bool(saved.get("explaining")), float(saved.get("best", math.inf))
        self.explainer.surrogate.requires_grad_(not self.explaining)


def regression_loss(phi: Tensor, empty: Tensor, coalitions: Tensor, wanted: Tensor) -> Tensor:
    """P times the mean squared error of v(0) + z^T phi: phi [B, P, C], v(0) [B, C], z [B, M, P], v(z) [B, M, C]."""
    estimated = empty[:, None] + coalitions.to(phi) @ phi
    return coalitions.shape[2] * F.mse_loss(estimated.float(), wanted.float())
