"""What a ViT makes of an image of which only some parts are there: the value function of removal games.

Prefix tokens are always there. A patch that is absent is gone before the first block, by one of two routes with equal
results: *drop* takes its token out, so that the cost falls with the number of patches; *mask* keeps all slots and hides
absent ones from every query of every block, so that coalitions of any size share a batch (Covert, Kim, Lee, arXiv
2206.05282). The other routes paint pixels: *black* is 0 before normalisation, *grey* 0 after it (the mean colour of the
data), *mean* the image's own mean colour, *blur* the image under a Gaussian, *impute* what the pixels round it suggest
(see :mod:`prunex.removal.imputing`). Numbers of different routes are not interchangeable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.checks import check_choice
from prunex.errors import PrunexError
from prunex.removal.painting import PAINTS, normalisation, painter
from prunex.vit.anatomy import ViT
from prunex.vit.decisions import Decided
from prunex.vit.embedding import embed
from prunex.vit.forward import own_anatomy, own_pruners, record, resume
from prunex.vit.mount import mounted
from prunex.vit.positions import Places
from prunex.vit.readout import before_softmax, reads_grids, scalar
from prunex.vit.recording import check_chunk, sequences
from prunex.vit.replay import Absent, Replay, ReplayAmong
from prunex.vit.tape import Tape
from prunex.vit.turns import Pruner

Route = Literal["drop", "black", "grey", "mean", "blur", "impute"]
Selection = Literal["free", "frozen"]
Output = Literal["probability", "logit", "log_odds"]
TOKENS = ("drop", "mask")
ROUTES = ("drop", *PAINTS)
SELECTIONS = ("free", "frozen")
OUTPUTS = ("probability", "logit", "log_odds")


class GameOptions(TypedDict, total=False):
    """How a model is asked about altered images.

    Attributes:
        selection: Of a pruned model: "free", its pruner decides anew, or "frozen", as it decided on the clean image.
        mean: Of the normalisation, one number a channel; for "black" alone. None: as ``pretrained_cfg`` says.
        std: Likewise.
        chunk: Most images in one forward: bounds memory, changes no result. None: what is fastest.
    """

    selection: Selection
    mean: Sequence[float] | None
    std: Sequence[float] | None
    chunk: int | None


class RemovalOptions(GameOptions, total=False):
    """:class:`GameOptions`, and how parts of images are taken away.

    Attributes:
        removal: "drop" (tokens leave), or paint: "black", "grey", "mean", "blur", "impute".
    """

    removal: Route


class ScoreOptions(RemovalOptions, total=False):
    """:class:`RemovalOptions`, and the unit of the class's score f.

    Attributes:
        output: "probability", "logit", or "log_odds" ln(p / (1 - p)).
    """

    output: Output


DEFAULTS: RemovalOptions = {"removal": "drop", "selection": "free", "mean": None, "std": None, "chunk": None}
SCORE_DEFAULTS: ScoreOptions = {**DEFAULTS, "output": "probability"}


def check_selection(selection: Any) -> Selection:
    """The game's word, "free" or "frozen"; explainers call the first "adaptive"."""
    if selection == "free":
        return "free"
    check_choice("selection", selection, ("adaptive", "frozen"))
    return "frozen" if selection == "frozen" else "free"


class Removal:
    """The values of coalitions of patches, for a batch of images; a ``Value`` of ``prunex.removal.coalitions``.

    Images are embedded once where tokens leave. Call it with the model in eval mode; gradients are off.

    A pruned model plays one of two games. *Frozen*: what the clean run of all patches decided is decided again, among
    those that are there; a fused token takes what is there with the clean run's weights, and does not exist where
    nothing was left to fuse. *Free*: the pruner decides anew among the patches that are there (by its own counting: a
    share of these for ``topk`` and ``evit``, of the whole grid for ``dynamicvit``). A pruner that decides by place
    alone (``hvt``) plays one game: both selections are the same, and absent patches keep their slots by either route.

    A model that only pools patches gives its head zeros when no patch is there. Images are float [B, C, H, W]; options
    are those of :class:`ScoreOptions`, and "mask" is a route too, though no free pruner can take it.
    """

    def __init__(
        self,
        model: ViT,
        images: Tensor,
        *,
        removal: str = "drop",
        selection: str = "frozen",
        output: str = "probability",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        chunk: int | None = None,
    ) -> None:
        check_choice("removal", removal, (*TOKENS, *PAINTS))
        selection = check_selection(selection)
        check_choice("output", output, OUTPUTS)
        # A pruner that decides anew counts the tokens it sees, and hidden slots would count as tokens.
        if selection == "free" and removal == "mask":
            raise PrunexError("selection='free' needs removal='drop': a pruner that decides anew counts tokens left")
        check_chunk(chunk)
        self.model, self.removal, self.output = model, removal, "logit" if scalar(model) else output
        self.painted, self.batch = removal in PAINTS, len(images)
        if reads_grids(model) and not self.painted:
            raise PrunexError(
                f"removal={removal!r} leaves tokens out, and this model reads grids, which are whole: paint pixels "
                f"({', '.join(PAINTS)}) where that is offered, or use vit_cx"
            )
        self.anatomy = own_anatomy(model)
        self.free: Pruner | None = None
        self.decisions: list[Decided] = []
        with torch.no_grad():
            if self.painted:
                self._paint(images, selection, mean, std)
            else:
                self._embed(images, selection)
        self.chunk = sequences(chunk, self.tokens, 128)
        self.players = self.grid[0] * self.grid[1]

    def _embed(self, images: Tensor, selection: str) -> None:
        """Embed the images, and know what a pruner decides among fewer tokens."""
        attached = mounted(self.model)
        if attached is not None and attached.pruner.chooses == "slots":
            self.removal, selection = "mask", "frozen"
        self.tokens, self.grid = embed(self.model, images)
        # A pruner of fixed positions decides the same among fewer patches: anew is once more.
        if attached is not None and selection == "free" and attached.pruner.chooses != "positions":
            self.free = attached.pruner
        elif attached is not None:
            self.decisions = record(self.model, images, Tape(), masked=True).decisions

    def _paint(self, images: Tensor, selection: str, mean: Any, std: Any) -> None:
        """Make what pixels are painted with, and know what a pruner decided on the clean images."""
        scale = normalisation(self.model, mean, std) if self.removal == "black" else (None, None)
        # Painted images are embedded as they are made; one clean image is enough to know sizes by.
        self.images, self.painter = images, painter(images, self.removal, *scale)
        self.tokens, self.grid = embed(self.model, images[:1])
        self.masked, self.replayed = False, selection == "frozen" and bool(own_pruners(self.model))
        if self.replayed:
            state = record(self.model, images, Tape())
            self.decisions, self.masked = state.decisions, state.masked

    @torch.no_grad()
    def __call__(self, coalitions: Tensor) -> Tensor:
        """Values of M coalitions of each image: bool [B, M, P], true for present patches, to float64 [B, M, C]."""
        b, m, p = (*coalitions.shape, 0, 0, 0)[:3]
        if coalitions.ndim != 3 or coalitions.dtype != torch.bool or (b, p) != (self.batch, self.players):
            raise PrunexError(
                f"coalitions are {coalitions.dtype} {list(coalitions.shape)}: give bool "
                f"[{self.batch}, M, {self.players}], images, coalitions, patches"
            )
        present = coalitions.to(self.tokens.device).reshape(b * m, p)
        return self.rows(torch.arange(b, device=present.device).repeat_interleave(m), present).unflatten(0, (b, m))

    @torch.no_grad()
    def rows(self, image: Tensor, present: Tensor) -> Tensor:
        """Values [R, C] of coalitions of images int64 [R]: of patches, bool [R, P], or painted pixels, [R, H * W]."""
        values: Tensor | None = None
        for rows in self._groups(present.sum(1)):
            logits = self._logits(image[rows], present[rows])
            answer = score(logits if self.output == "logit" else before_softmax(self.model, logits), self.output)
            values = answer.new_empty(len(image), answer.shape[1]) if values is None else values
            values[rows] = answer
        if values is None:
            raise PrunexError("no coalitions were given: ask for at least one")
        return values

    def _groups(self, sizes: Tensor) -> list[Tensor]:
        """Rows that share a forward: of one size where tokens leave, and never more than ``chunk``."""
        # Where slots stay, sequences of any coalition have one length.
        if self.painted or self.removal == "mask":
            return list(torch.arange(len(sizes), device=sizes.device).split(self.chunk))
        # Sequences of one length share a forward, so that nothing is padded.
        order = sizes.argsort(stable=True)
        counts = sizes.bincount()
        return [part for group in order.split(counts[counts > 0].tolist()) for part in group.split(self.chunk)]

    def _logits(self, image: Tensor, present: Tensor) -> Tensor:
        """One forward of R sequences: [R, classes] for present bool [R, P], of equal sizes where tokens leave."""
        if self.painted:
            return self._logits_of(self.painter(image, self._pixels(present)), image)
        if self.removal == "mask":
            return masked(self.model, self.tokens[image], self.grid, present, self.decisions, image)
        prefix, count = self.anatomy.prefix, int(present[0].sum())
        if self.free is not None and count:
            return resume(self.model, self.tokens[image], self.grid, (Absent(present), self.free))
        # Decisions meant for all patches, and a head with nothing to pool, need one absent patch's slot to point to.
        spare = int(count < self.players and (bool(self.decisions) or (count == 0 and not self.anatomy.readers)))
        slots = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : count + spare]
        kept = self.tokens[image[:, None], prefix + slots]
        x = torch.cat([self.tokens[image, :prefix], kept], 1)
        grid, places = (1, slots.shape[1]), Places(slots, self.grid)
        if not self.decisions and not spare:
            return resume(self.model, x, grid, places=places)
        number = torch.arange(slots.shape[1], device=x.device).expand(len(x), -1)
        # Patches without a slot are placed in the spare one, which nobody reads.
        place = torch.full_like(present, count, dtype=torch.long).scatter(1, slots, number)
        return masked(self.model, x, grid, number < count, self.decisions, image, place, places)

    def _pixels(self, present: Tensor) -> Tensor:
        """Patches [r, P], or pixels [r, H * W], as pixels [r, 1, H, W]; pixels beyond the grid, never seen, stay."""
        height, width = self.images.shape[2:]
        # Metrics of pixels tell pixels; players of a game are patches.
        if present.shape[1] == height * width:
            return present.view(-1, 1, height, width)
        down, right = self.anatomy.patch
        fine = present.unflatten(1, self.grid).repeat_interleave(down, 1).repeat_interleave(right, 2)
        fine = fine[:, :height, :width]
        return F.pad(fine, (0, width - fine.shape[2], 0, height - fine.shape[1]), value=True).unsqueeze(1)

    def _logits_of(self, pictures: Tensor, image: Tensor) -> Tensor:
        """One forward of painted images [R, C, H, W], each made of one of the clean ones: [R, classes]."""
        decides: Sequence[Pruner] = [Replay(self.decisions, image)] if self.replayed else own_pruners(self.model)
        return resume(self.model, embed(self.model, pictures)[0], self.grid, decides, masked=self.masked)


def masked(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    present: Tensor,
    decisions: Sequence[Decided] = (),
    image: Tensor | None = None,
    place: Tensor | None = None,
    places: Places | None = None,
) -> Tensor:
    """Logits [R, classes] of token sequences x [R, prefix + n, D], of which only ``present`` slots bool [R, n] count.

    Differentiable, for training with missing patches; a pruner on the model is not asked. ``decisions`` of a clean
    masked run are repeated among those that are there, see :class:`~prunex.vit.replay.ReplayAmong` for ``image`` and
    ``place``. ``places``: which patches the slots hold, where not those of ``grid`` in order.
    """
    if not decisions and bool(present.all()):
        return resume(model, x, grid, places=places)
    return resume(model, x, grid, (ReplayAmong(present, decisions, image, place),), masked=True, places=places)


def score(logits: Tensor, output: str) -> Tensor:
    """The unit of the game, float64 [R, C] from logits: "probability", "logit" or "log_odds"."""
    logits = logits.detach().double()
    if output == "logit":
        return logits
    # A single output is a logit against nothing: its probability is a sigmoid.
    if logits.shape[1] == 1:
        return logits.sigmoid() if output == "probability" else logits
    logp = logits.log_softmax(1)
    if output == "probability":
        return logp.exp()
    odds = logp - torch.log1p(-logp.exp())
    # Where p rounds to 1, log(1 - p) is summed from the others instead.
    best = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, best, -torch.inf).logsumexp(1, keepdim=True)
    return odds.scatter(1, best, logits.gather(1, best) - others)
