"""Training a Vision DiffMask explainer: gates that keep as few patches as the frozen model's output allows."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from prunex.checks import check_flag, check_whole
from prunex.learned.diffmask import MOST, DiffMaskExplainer, divergence, log_keep
from prunex.recipes.modules.lookahead import LookaheadAdam
from prunex.recipes.modules.training import ExplainerTraining, check_at_most, images_of

DECAY = 0.9  # of the running figures of a layer
EASY = {"agreement": 0.75, "l0": 0.1, "draws": 100, "weight": 0.1}  # when a layer is drawn less often, and how much


class DiffMask(ExplainerTraining):
    """Trains Vision DiffMask's gates beside a frozen classifier (arXiv 2304.06391); no labels are used.

    Every step draws one layer k of the L + 2, samples the votes of the gates 0..k and masks the input by their product:
    gates and placeholder descend on mean_b[a_k (KL(z || z') - eps)] + mean_{b,p} c_k, the multiplier a_k ascends on the
    same and is held in 0..200. While the masked output is further than eps from the whole one a_k rises, else it falls.
    (In the authors' code under its Lightning the sign is lost, by our reading; their large first multiplier and its
    bound may owe to it.) The size term is the mean log-probability of being kept, as coded, not the expected count.

    Other departures from the authors' code: patches alone are gated and averaged over; a parameter that a step does not
    train is left alone by Lookahead, too. Optimisation is by hand, without clipping. Run it in one process.

    What is found is one of many masks: gates learn from samples, and what is closed for long learns no more. A learned
    placeholder may come to look like a class, whose patches need not be shown then (seen on toy images); a classifier
    that is very sure of itself makes KL drown the size term. Then ``lr_placeholder``, ``alpha_init`` and ``add`` help.

    After every validation that is the best so far the explainer is written to ``explainer/`` in the run's folder:
    ``prunex.explain("diffmask", model, images, explainer=that_folder)``, ``prunex.attach(model, "diffmask",
    explainer=that_folder)``. Best is the smallest share of patches kept with a KL of at most 2 eps, or the smallest KL
    where none gets there.

    Logged in training: ``train_kl``, ``train_l0`` (mean exp c_k) and ``train_alpha``, of the layers drawn. In
    validation, for all votes and patches with exp(c) > 0.5, the others replaced by the placeholder: ``val_kl``,
    ``val_agreement`` (share of images whose class stays), ``val_kept`` (share of patches), and ``val_l0``.

    Args:
        architecture: Name of a timm ViT.
        num_classes: Number of classes; on the command line, None takes it from the data module.
        model_args: Overrides for timm's constructor.
        weights: The classifier: path of a safetensors file, or the name of weights shipped with prunex.
        pretrained: Download timm's weights; needs a network.
        from_scratch: Explain a classifier of random weights: without it, and without weights, training is refused.
        eps: Divergence that the masked output is allowed.
        alpha_init: Where the multipliers start, in [0, 200].
        lr: Of the gates.
        lr_placeholder: Of the placeholder.
        lr_alpha: Of the multipliers.
        warmup_steps: Steps over which ``lr`` and ``lr_placeholder`` rise.
        mul: Half the range of the gates' logits.
        add: Where they start.
        no_placeholder: Masked patches become zeros instead of one learned vector.
        weighted_layer_distribution: Draw a layer a tenth as often where it agrees (running agreement above 0.75) with
            few patches (running l0 below 0.1), after 100 draws.
        slow_steps: Of Lookahead; 0 trains with plain Adam.
        slow_rate: Of Lookahead.

    Raises:
        PrunexError: If an argument is outside its range, or the weights cannot be loaded.
    """

    worst = best = (math.inf, math.inf)
    running_agreement: Tensor
    running_l0: Tensor
    draws: Tensor

    def __init__(
        self,
        architecture: str = "vit_small_patch16_224",
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
        eps: float = 0.1,
        alpha_init: float = 20.0,
        lr: float = 2e-5,
        lr_placeholder: float = 1e-3,
        lr_alpha: float = 0.3,
        warmup_steps: int = 1200,
        mul: float = 15.0,
        add: float = 8.0,
        no_placeholder: bool = False,
        weighted_layer_distribution: bool = False,
        slow_steps: int = 6,
        slow_rate: float = 0.5,
        from_scratch: bool = False,
    ) -> None:
        super().__init__()
        check_whole("warmup_steps", warmup_steps, 0)
        check_flag("weighted_layer_distribution", weighted_layer_distribution)
        # Now, and not when training begins.
        LookaheadAdam([torch.zeros(1)], slow_steps=slow_steps, slow_rate=slow_rate)  # refuses what it cannot take
        self.save_hyperparameters()
        check_at_most(math.inf, self.hparams, "eps", "lr", "lr_placeholder", "lr_alpha")
        self.automatic_optimization = False
        classifier = self.build_classifier(architecture, num_classes, model_args, weights, pretrained)
        self.explainer = DiffMaskExplainer(cast(Any, classifier), mul, add, no_placeholder, alpha_init)
        layers = self.explainer.layers
        for name, start in (("running_agreement", 1.0), ("running_l0", 1.0), ("draws", 0.0)):
            self.register_buffer(name, torch.full((layers,), start))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities of being kept, all votes together: ``[B, P]`` for images ``[B, 3, H, W]``."""
        return self.explainer(images)[:, -1].exp()

    def draw_layer(self) -> int:
        """A layer of the L + 2 by chance; where asked for, seldom one that is easy by now."""
        chances = torch.ones(self.explainer.layers)
        if self.hparams["weighted_layer_distribution"]:
            agrees, few = self.running_agreement > EASY["agreement"], self.running_l0 < EASY["l0"]
            # A layer that agrees with few patches has little left to learn.
            easy = agrees & few & (self.draws > EASY["draws"])
            chances[easy.cpu()] = EASY["weight"]
        return int(torch.multinomial(chances, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of gates and placeholder down, and of one layer's multiplier up."""
        layer = self.draw_layer()
        terms = self.explainer.terms(images_of(batch), layer)
        alpha = self.explainer.alpha[layer]
        optimizers, schedule = cast(list, self.optimizers()), cast(Any, self.lr_schedulers())
        # Gates descend and multipliers ascend on one loss: one backward serves both optimisers.
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(terms.loss(alpha, self.hparams["eps"]))
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            # The multiplier ascends without end while a layer cannot meet eps.
            alpha.clamp_(0, MOST)
            agreement = _agreement(terms.wanted, terms.masked)
            l0 = terms.log_keep.exp().mean()
            for running, now in ((self.running_agreement, agreement), (self.running_l0, l0)):
                running[layer] = DECAY * running[layer] + (1 - DECAY) * now
            self.draws[layer] += 1
        metrics = {"train_kl": terms.divergence.mean(), "train_l0": l0, "train_alpha": alpha}
        for name, value in metrics.items():
            self.log(name, value.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(terms.masked))

    def _evaluate(self, stage: str, batch: Any) -> None:
        images = images_of(batch)
        with torch.no_grad():
            seen = self.explainer.observe(images)
            probability = log_keep(seen.gates).sum(1).exp()
            kept = probability > 0.5
            masked = self.explainer.masked(seen, kept)
            metrics = {
                "kl": divergence(seen.logits, masked).mean(),
                "agreement": _agreement(seen.logits, masked),
                "kept": kept.float().mean(),
                "l0": probability.mean(),
            }
        for name, value in metrics.items():
            self.log(f"{stage}_{name}", value, batch_size=len(images), sync_dist=True, prog_bar=name in ("kl", "kept"))

    def score(self) -> tuple[float, float] | None:
        """No divergence and the share of patches kept where that is within 2 eps, else the divergence."""
        metrics = self.trainer.callback_metrics
        if "val_kl" not in metrics:
            return None
        kl, kept = float(metrics["val_kl"]), float(metrics["val_kept"])
        return (0.0 if kl <= 2 * self.hparams["eps"] else kl, kept)

    def configure_optimizers(self) -> tuple[list, list]:
        """Lookahead(Adam) down for gates and placeholder, warmed up; another one up for the multipliers."""
        h, gates = self.hparams, self.explainer.gates
        slow = {"slow_steps": h["slow_steps"], "slow_rate": h["slow_rate"]}
        groups = [{"params": list(gates.gates.parameters()), "lr": h["lr"]}]
        if not gates.no_placeholder:
            groups.append({"params": [gates.placeholder], "lr": h["lr_placeholder"]})
        down = LookaheadAdam(groups, **slow)
        up = LookaheadAdam(self.explainer.alpha.parameters(), lr=h["lr_alpha"], maximize=True, **slow)
        warm = torch.optim.lr_scheduler.LambdaLR(down, lambda step: min(1.0, (step + 1) / max(1, h["warmup_steps"])))
        return [down, up], [warm]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Note the best so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["diffmask"] = {"best": list(self.best)}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Go on where the checkpoint was written."""
        first, second = checkpoint.get("diffmask", {}).get("best", self.best)
        self.best = (float(first), float(second))


def _agreement(logits: Tensor, masked: Tensor) -> Tensor:
    """Share of images whose predicted class stays; of one logit, whose sign does."""
    if logits.shape[1] == 1:
        return ((logits > 0) == (masked > 0)).float().mean()
    return (logits.argmax(1) == masked.argmax(1)).float().mean()
