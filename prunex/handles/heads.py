"""What hangs on a model whose head explains itself, and the handle on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import prunex.heads  # noqa: F401  (registers the heads)
from prunex.brief import Brief
from prunex.checks import check_number
from prunex.errors import PrunexError
from prunex.handles.base import Handle, accept_dense, drop_mark, warn_of_frozen
from prunex.handles.steps import Steps
from prunex.heads.base import Evidence, Reading, TokenHead
from prunex.heads.final_tokens import FinalTokens
from prunex.pruners.base import strip_official
from prunex.vit.anatomy import Anatomy, ViT, check_images, head_classes, pixels_of, read
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.aside import as_found
from prunex.vit.forward import own_anatomy, run
from prunex.vit.handover import Handed, Handover
from prunex.vit.late import left_by
from prunex.vit.methods import route
from prunex.vit.mount import HEAD, mounted, mounted_head, unmount
from prunex.vit.readout import classifier, norm_behind_pool
from prunex.vit.recording import choose_target
from prunex.vit.sharded import gather
from prunex.vit.state import TokenState
from prunex.vit.trace import TokenTrace

_CLASSIFIER = ("head", "head_dist", "attn_pool")  # timm's own: what is between final tokens and logits


@dataclass(eq=False, repr=False)
class Read(Brief):
    """One training forward's reading, until its losses are asked for."""

    reading: Reading
    images: int


class Headed(nn.Module):
    """What hangs on a model as ``model.prunex_head``: the head's parameters, and what training forwards left.

    Dense parameter names stay as they are, timm's own classifier among them; the head's own are called
    ``prunex_head.<method>.*``. A dense state dict loads strictly, and leaves these as they are.

    Attributes:
        steps: The training forwards whose losses were not asked for yet.
        handover: Of models for any image size, without a token pruner: which patch grid tokens have.
        last: What the last forward in eval mode without a graph read.
        ran: Set by every forward, for whoever wants to know whether one came.
        rests: Parameters of timm's classifier that would be trained, and have no part in the answer meanwhile.
    """

    def __init__(self, head: TokenHead, dense: Anatomy) -> None:
        super().__init__()
        self.add_module(head.name, head)
        self.method = head.name
        self.dense = dense
        self.steps: Steps[Read] = Steps()
        self.handover = Handover()
        self.ran = False
        self.last: Reading | None = None
        self.rests: list[str] = []
        self._looked = False  # whether it was seen that a training trains the head
        self.register_load_state_dict_pre_hook(drop_mark)
        self.register_load_state_dict_pre_hook(accept_dense)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None}

    @property
    def head(self) -> TokenHead:
        """The head itself."""
        head: TokenHead = getattr(self, self.method)
        return head

    @property
    def reads_patches(self) -> bool:
        """Whether the head reads patch tokens."""
        return self.head.reads_patches

    def current(self, model: ViT) -> Anatomy:
        """The dense forward's anatomy, read again after ``set_input_size`` changed it."""
        embed: Any = model.patch_embed
        known = self.dense
        if (tuple(embed.img_size), pixels_of(embed)) != (known.image, known.patch):
            self.dense = read(model)
        return self.dense

    def came_from(self, model: ViT, images: Tensor, tokens: Tensor) -> None:
        """Remember that final tokens, from which nothing was taken, are of images [B, C, H, W]."""
        anatomy = self.current(model)
        grid = anatomy.grid_at(images.shape[2], images.shape[3])
        trace = TokenTrace(grid, anatomy.prefix, tokens.shape[0], tokens.device)
        self.handover.give(tokens, Handed(anatomy, trace=trace))

    def handed(self, model: ViT, x: Tensor) -> Handed:
        """What is known of final tokens where no token pruner is."""
        return self.handover.take(x) or Handed(self.current(model))

    def read(self, model: ViT, x: Tensor, left: Handed) -> Reading:
        """What the head makes of final tokens [B, prefix + n, D]."""
        head = self.head
        if head_classes(model) != head.classes:
            raise PrunexError(
                f"{self.method} was made for {head.classes} classes, and the model has {head_classes(model)} now: "
                "detach() it and attach again"
            )
        logits = classifier(model, x, left) if head.uses_classifier else None
        # Models that pool before their last norm have it between pooling and head.
        reading: Reading = head(FinalTokens.of(norm_behind_pool(model)(x), left), logits)
        return reading

    def logits(self, model: ViT, x: Tensor, left: Handed, ops: Arithmetic = PLAIN) -> Tensor:
        """The model's output [B, classes]; a training forward is remembered for its losses."""
        self.ran = True
        if self.training:
            check_one_output(model, self.method)
        # Rules for relevance see the head as one function, and ask for no losses.
        if ops.opened:
            return ops.whole(lambda tokens: self.read(model, tokens, left).logits, x)
        reading = self.read(model, x, left)
        self.remember(reading)
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.last = reading
        return reading.logits

    def remember(self, reading: Reading) -> None:
        """Keep a training forward's reading until its losses are asked for."""
        if self.training and Steps.counts():
            self.steps.remember(Read(reading, len(reading.logits)), reading.logits)
            # Once, and not at attaching: what freezes parameters may come later.
            if not self._looked and not torch.compiler.is_compiling() and reading.logits.requires_grad:
                self._looked = True
                warn_of_frozen(self.head, self.method, Head.reached)


class Head(Handle):
    """The handle on a model whose head explains itself, returned by :func:`prunex.attach`; leaving ``with`` detaches.

    Attributes:
        model: The ViT it is on.
    """

    kind = HEAD
    does = "reads"
    reached = "prunex.attached(self, head=True).head"

    @property
    def _headed(self) -> Headed:
        headed: Headed = self._holder()
        return headed

    @property
    def head(self) -> TokenHead:
        """The module that reads final tokens."""
        return self._headed.head

    @property
    def learner(self) -> TokenHead:
        """The head."""
        return self.head

    @property
    def progress(self) -> float:
        """Fraction of training done, 0..1, by which losses may rise; 1 unless set."""
        return self.head.progress

    @progress.setter
    def progress(self, value: float) -> None:
        self.head.progress = check_number("progress", value, 0, 1)

    def from_tokens(self, tokens: Tensor) -> Reading:
        """What the head makes of final tokens.

        Args:
            tokens: float [B, prefix + n, D], as ``model.forward_features`` returns them. Of tokens that no forward of
                this model gave, all count as patches of their own.

        Returns:
            The reading: ``.logits`` [B, classes], and what the head has beside. In training mode it is remembered, as
            a forward's is, for :meth:`losses`.

        Raises:
            PrunexError: For another shape.
        """
        anatomy = own_anatomy(self.model)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] != anatomy.width:
            came = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise PrunexError(f"tokens are {came}: give [B, {anatomy.prefix} + patches, {anatomy.width}]")
        pruned = mounted(self.model)
        left = self._headed.handed(self.model, tokens) if pruned is None else pruned.handed(tokens)
        reading = self._headed.read(self.model, tokens, left)
        self._headed.remember(reading)
        return reading

    def losses(
        self, labels: Tensor | None = None, concepts: Tensor | None = None, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted auxiliary losses of this step's training forwards, scalars by name, summed over forwards.

        As :meth:`prunex.Pruning.losses` has them: forwards in training mode with a graph since the losses were last
        asked for. The module's own loss is not among them.

        Args:
            labels: int64 [B], for heads that look at them.
            concepts: [B, C_g] of 0, 1 and NaN (unknown), or bool, which global concepts each image has. They go to
                every forward of B images, such as several views of one batch, as all three do.
            spatial: [B, P, C_s] or [B, gh, gw, C_s], likewise, which spatial concepts each patch has.

        Raises:
            PrunexError: For concept labels that fit neither the head nor a forward.
        """
        total: dict[str, Tensor] = {}
        gather(self.model)
        forwards = self._headed.steps.take()
        given = {"labels": labels, "concepts": concepts, "spatial": spatial}
        counts = list(dict.fromkeys(forward.images for forward in forwards))
        for name in ("concepts", "spatial"):
            value = given[name]
            if value is not None and counts and _rows(value) not in counts:
                raise PrunexError(
                    f"{name} has {_rows(value)} rows for a forward of {' and '.join(map(str, counts))} images: give "
                    "one an image"
                )
        for forward in forwards:
            fitting = {name: value for name, value in given.items() if _rows(value) == forward.images}
            for name, value in self.head.losses(forward.reading, **fitting).items():
                total[name] = total[name] + value if name in total else value
        # Beside each forward's own: what compares several views of one batch.
        for name, value in self.head.losses_between([f.reading for f in forwards]).items():
            total[name] = value
        return total

    @property
    def waiting(self) -> list[Read]:
        """The readings of this step's training forwards so far, with their numbers of images."""
        return self._headed.steps.waiting

    @property
    def last(self) -> Reading | None:
        """The reading of the last forward in eval mode without a graph, of any thread; None before it.

        Compiled forwards leave none.
        """
        return self._headed.last

    def forget(self) -> None:
        """Let go of this step's training forwards, their graphs, and the last reading."""
        self._headed.steps.forget()
        self._headed.last = None

    def read(self, images: Tensor, masked: bool | None = None) -> Reading:
        """What the head makes of images [B, C, H, W], in eval mode; ``masked`` as for :attr:`prunex.Pruning.masked`."""
        return self._read(images, masked)[0]

    def _read(self, images: Tensor, masked: bool | None = None) -> tuple[Reading, TokenState]:
        model = self.model
        check_images(read(model), images, values=True)
        with as_found(model, train=False), torch.no_grad():
            state = run(model, images, masked=masked)
            return self._headed.read(model, state.tokens, left_by(state)), state

    def evidence(self, images: Tensor, target: int | Tensor | None = None) -> Evidence:
        """What the decision is made of; in eval mode, leaving the model as it was.

        Args:
            images: float [B, C, H, W], as they enter the ViT.
            target: Class index, int64 [B], or None for the predicted class.

        Returns:
            The head's own evidence; ``.maps`` [B, gh, gw] on the original patch grid, whatever was pruned.

        Raises:
            PrunexError: For images or a target that the model cannot take.
        """
        reading, state = self._read(images)
        with torch.no_grad():
            return self.head.evidence(reading, choose_target(reading.logits, target), state.trace)

    def intervene(self, values: Mapping[str, float]) -> Intervention:
        """Set a Concept Transformer's attention to some concepts, in all heads and tokens, from now on.

        Nothing is normalised again, so that with 0 each score falls by exactly the concept's contribution. Ends with
        the ``with`` block that it opens, or by ``intervene({})``. Copies and pickles have it too; state dicts do not,
        and slim, saved and exported models are made without it, with a warning.

        Raises:
            PrunexError: For an unknown concept, a value outside [0, 1], or a head without concepts.
        """
        return Intervention(self.head, values)

    def tree(self) -> Any:
        """A ViT-NeT's tree: its branches and leaves in order, with the training patches nearest each prototype.

        Raises:
            PrunexError: For a head without a tree.
        """
        return self.head.tree()

    def controls(self, images: Tensor, labels: Tensor, masked: bool | None = None) -> dict[str, float]:
        """Whether a ViT-NeT's tree decides anything: accuracies on images [B, C, H, W] with labels int64 [B].

        Of more than one batch, take the mean weighted by batch size.

        Args:
            images: As they enter the ViT, two at least.
            labels: Class indices.
            masked: As for :attr:`prunex.Pruning.masked`.

        Returns:
            Each in [0, 1]: ``soft`` and ``hard``, the tree in both modes; ``classifier``, timm's own classifier alone;
            ``tree``, softly without that one's scores; ``shuffled``, softly, each image routed as another one.

        Raises:
            PrunexError: For a head without a tree, images or labels that do not fit.
        """
        return self.head.controls(self.read(images, masked), labels)

    def load_official(self, state: Mapping[str, Any]) -> Head:
        """Load a head's weights by the names of the authors' code.

        Args:
            state: A state dict, or a checkpoint holding one under "model".

        Raises:
            PrunexError: For missing or ill-shaped entries, or a head without public code; nothing is loaded then.
        """
        plain = strip_official(state)
        entries, needed = self.head.official(plain), self.head.official_names()
        missing = sorted(needed - set(entries))
        shapes = self.head.state_dict()
        wrong = [name for name in entries if name not in shapes or shapes[name].shape != entries[name].shape]
        if missing or wrong:
            raise PrunexError(
                f"no official {self.method} of these options: missing {missing[:4]}, of other shapes {wrong[:4]}; "
                f"it holds {', '.join(list(plain)[:4])}"
            )
        # Not strictly: what the authors' code has no name for keeps its values.
        self.head.load_state_dict(entries, strict=False)
        return self

    def detach(self) -> nn.Module:
        """Give the model back with timm's own classifier, bit for bit, and return it; harmless when done already.

        What of the classifier required gradients before :func:`prunex.attach` does so again, and what was thawed since
        stays so: to have it frozen, freeze it after this.
        """
        headed = mounted_head(self.model)
        if headed is not None:
            parameters = dict(self.model.named_parameters())
            for name in headed.rests:
                if name in parameters:  # the classifier may have been taken off meanwhile
                    parameters[name].requires_grad_(True)
            unmount(self.model, HEAD)
            route(self.model)
            _refit(self.model)
        return self.model


def _rows(value: Any) -> int:
    """How many images labels are of; 0 for what has no rows."""
    if isinstance(value, Tensor) and value.ndim == 0:  # which has a length that raises
        return 0
    return len(value) if hasattr(value, "__len__") else 0


class Intervention:
    """Attention set by hand, until the ``with`` block ends."""

    def __init__(self, head: TokenHead, values: Mapping[str, float]) -> None:
        self.head, self.before = head, dict(head.forced)
        head.force(values)

    def __enter__(self) -> Intervention:
        return self

    def __exit__(self, *_: object) -> None:
        self.head.forced = self.before


def put_head(vit: ViT, make: Any, options: Mapping[str, Any], root: nn.Module | None = None) -> Head:
    """Mount a head on a ViT, in a module that may use its weights elsewhere; what is refused leaves all as it was."""
    if mounted_head(vit) is not None:
        raise PrunexError(
            f"{type(vit).__name__} has a head that explains itself, {mounted_head(vit).method}: detach() it first"
        )
    check_one_output(vit, make.name)
    if own_anatomy(vit).late:
        raise PrunexError(
            f"{make.name} cannot be put on a {type(vit).__name__}, whose class token enters behind its blocks: heads "
            "that explain themselves take every other supported ViT"
        )
    head = make(own_anatomy(vit), **options)
    if mounted(vit) is not None:
        head.check_pruned()
    head.prepare(vit)
    weight = next(vit.parameters())
    headed = Headed(head.to(device=weight.device, dtype=weight.dtype), read(vit))
    headed.train(vit.training)
    vit.add_module(HEAD, headed)
    try:
        _refit(vit)
    except PrunexError:
        unmount(vit, HEAD)
        raise
    # Again: the anatomy also says what the head reads that is on now.
    headed.dense = read(vit)
    if not head.uses_classifier:
        # Without a part in the answer it has no gradient, which processes that share theirs would wait for.
        for name, parameter in vit.named_parameters():
            if name.split(".")[0] in _CLASSIFIER and parameter.requires_grad and not _shared(parameter, vit, root):
                headed.rests.append(name)
                parameter.requires_grad_(False)
    route(vit)
    return Head(vit)


def _shared(parameter: nn.Parameter, vit: ViT, root: nn.Module | None) -> bool:
    """Whether a module has a parameter of its ViT by further names than the ViT's own."""
    if root is None:
        return False
    # Tied weights are listed once unless asked.
    names = sum(p is parameter for _, p in root.named_parameters(remove_duplicate=False))
    return names > sum(m is vit for _, m in root.named_modules(remove_duplicate=False))


def check_one_output(vit: Any, method: str) -> None:
    """Refuse a DeiT whose training forwards give a pair, for a loss that would take a head's one output apart."""
    if getattr(vit, "distilled_training", False):
        raise PrunexError(
            f"{method} gives one output, and this DeiT's distilled_training two: call set_distilled_training(False), "
            "and let the module's loss take one"
        )


def _refit(vit: ViT) -> None:
    """Let the token pruner read the anatomy again, which says what the head reads."""
    tokens = mounted(vit)
    if tokens is not None:
        tokens.refit(vit)
