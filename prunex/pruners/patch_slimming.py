"""Patch Slimming: the same patch positions for every image, fewer in each block, found once from the last down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from prunex.checks import check_choice, check_number, check_whole
from prunex.errors import PrunexError, unknown
from prunex.pruners.base import TokenPruner, calibration_images
from prunex.pruners.patch_slimming_search import SETTINGS, Search, SearchOptions, Slimming
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.aside import as_found
from prunex.vit.blocks import layout_of
from prunex.vit.decisions import Keep
from prunex.vit.embedding import embed
from prunex.vit.forward import own_anatomy, resume
from prunex.vit.positions import positions_of
from prunex.vit.recording import check_made_outside
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn

CRITERIA = ("mean", "relative")


class CalibrationOptions(SearchOptions, total=False):
    """:class:`~prunex.pruners.patch_slimming_search.SearchOptions`, and what is looked at.

    Attributes:
        calibration_images: Most images looked at.
    """

    calibration_images: int


@register(
    "pruner",
    "patch_slimming",
    "Tang et al., CVPR 2022, arXiv 2106.02852",
    "a class token; calibration on some images, fine-tuning recommended, no parameters",
)
class PatchSlimming(TokenPruner):
    r"""Static patch slimming ("Patch Slimming for Efficient Vision Transformers", PS-ViT, arXiv 2106.02852).

    Each block has one set of patch positions that it computes, the same for all images, each set within the one before.
    A slimmed block asks queries for these alone; its keys and values come from all tokens that enter, so what it
    computes is exactly what the dense block would. The last block computes prefix tokens only (the paper: the class
    token), which costs no accuracy and is no stage of the trace: no patch is chosen there, and ``trace.kept()`` is the
    last set that was. Nothing is ranked at inference: shapes and indices are constants.

    Freshly attached, everything is kept. ``pruning.calibrate(loader)`` finds the sets, see
    :class:`~prunex.pruners.patch_slimming_search.Search`: from the last block down, a score says which positions,
    the tolerance says how many. With ``epochs`` above 0 it fine-tunes blocks as it goes, frozen parameters excepted, so
    ``detach()`` then gives the dense model with these weights, as after any training.

    There is no public code, and of the paper only abstract and results were read: the score, the search, the slimmed
    block and the defaults 0.01, 10 and 3 are second-hand (unverified). Choices of ours: how many calibration images,
    optimiser and learning rate, how the error is normalised, and that distillation and register tokens are in every
    set. PS-ViT then fine-tunes the whole model. Its dynamic variant (DPS-ViT) is not this. Fixed positions follow the
    framing of the calibration images; objects that lie elsewhere are lost.

    Args:
        keep: Rising patch positions (raster order), one list a block but the last, each within the one before it. None:
            all, until calibrated.
        **search: See :class:`CalibrationOptions`.

    Raises:
        PrunexError: For a model whose head reads patches (pooled, unpooled or without class token), a model of one
            block, sets that do not fit, or numbers out of range.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=3).eval()
    >>> with prunex.attach(model, "patch_slimming", keep=[range(100), range(0, 100, 2)]) as pruning, torch.no_grad():
    ...     _ = model(torch.zeros(1, 3, 224, 224))
    ...     [int(pruning.trace.kept(s).sum()) for s in range(2)], prunex.cost(model).blocks[-1].mlp_tokens
    ([100, 50], 1)
    """

    name = "patch_slimming"
    chooses = "positions"
    handed_on: ClassVar[CalibrationOptions] = {**SETTINGS, "calibration_images": 2048}
    kept: Tensor
    found: Tensor
    first: Tensor

    def __init__(
        self,
        anatomy: Anatomy,
        keep: Sequence[Sequence[int]] | None = None,
        **search: Unpack[CalibrationOptions],
    ) -> None:
        _check_head(anatomy)
        if anatomy.depth < 2:
            raise PrunexError("patch_slimming needs at least two blocks: the last one computes prefix tokens only")
        super().__init__(anatomy, 1.0, tuple(range(anatomy.depth - 1)))
        self.prefix, self.grid = anatomy.prefix, anatomy.grid
        self.patches = anatomy.grid[0] * anatomy.grid[1]
        self.options: dict[str, Any] = {"keep": None, **_settings(**{**self.handed_on, **search})}
        given = keep is not None
        sets = [list(range(self.patches))] * len(self.stages) if keep is None else self._check(keep)
        kept = torch.zeros(len(self.stages), self.patches, dtype=torch.bool)
        for row, positions in enumerate(sets):
            kept[row, positions] = True
        self.register_buffer("kept", kept)
        self.register_buffer("found", torch.tensor(given))
        self.register_buffer("first", torch.arange(self.prefix), persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)
        self._use(sets, given)

    def _check(self, keep: Any) -> list[list[int]]:
        """The sets in plain values: rising lists of positions, each within the one before; or refused."""
        want = f"give {len(self.stages)} lists of patch positions 0..{self.patches - 1}, one a block but the last"
        many = isinstance(keep, Sequence) and not isinstance(keep, str)
        if not many or len(keep) != len(self.stages):
            what = f"{len(keep)} lists" if many else type(keep).__name__
            raise PrunexError(f"keep has {what}: {want}")
        before = set(range(self.patches))
        sets = []
        for block, positions in enumerate(keep):
            whole = isinstance(positions, Sequence) and not isinstance(positions, str)
            if not whole or any(isinstance(p, bool) or not isinstance(p, int) for p in positions):
                raise PrunexError(f"keep[{block}] is no list of whole numbers: {want}")
            if any(b <= a for a, b in zip(positions, positions[1:], strict=False)):
                raise PrunexError(f"keep[{block}] must rise, each position once: sort it")
            foreign = sorted(set(positions) - before)
            if foreign and block and 0 <= foreign[0] < self.patches:
                raise PrunexError(
                    f"keep[{block}] has position {foreign[0]}, which block {block - 1} does not compute: "
                    f"each set must lie within the one before it"
                )
            if foreign:
                raise PrunexError(f"keep[{block}] has position {foreign[0]}: {want}")
            before = set(positions)
            sets.append([int(p) for p in positions])
        return sets

    def _use(self, sets: list[list[int]], chosen: bool) -> None:
        """Take these sets, checked, into force: constant indices, and the options that would make them again."""
        self.sets = sets
        self.options["keep"] = [list(s) for s in sets] if chosen else None
        device = self.kept.device
        before = list(range(self.patches))
        for block, positions in enumerate(sets):
            at = {p: i for i, p in enumerate(before)}
            # Buffers, to move with the model; not persistent, since they follow from ``kept``.
            among = torch.tensor([at[p] for p in positions], dtype=torch.long, device=device)
            self.register_buffer(f"original_{block}", torch.tensor(positions, dtype=torch.long, device=device), False)
            self.register_buffer(f"among_{block}", among, False)
            tokens = torch.cat([torch.arange(self.prefix, device=device), among + self.prefix])
            self.register_buffer(f"tokens_{block}", tokens, False)
            before = positions

    def _entering(self, block: int) -> int:
        return len(self.sets[block - 1]) if block else self.patches

    def plan(self) -> list[Turn]:
        """Inside the blocks that compute fewer patches than enter; the last one computes what the head reads."""
        slimmed = [b for b in range(len(self.sets)) if len(self.sets[b]) < self._entering(b)]
        inside = [Turn(b, "inside", only=getattr(self, f"tokens_{b}")) for b in slimmed]
        return [Turn(0), *inside, Turn(len(self.sets), "never", only=self.first)]

    def decide(self, turn: Turn, state: TokenState) -> Keep | None:
        """Keep the block's set; images it was not made for are refused, and patches missing in some images only."""
        if turn.when == "before":
            self._check_images(state)
            return None
        block, batch = turn.block, state.tokens.shape[0]
        original = getattr(self, f"original_{block}")
        # Masked tokens keep their slots, so positions in the grid are positions in the stream.
        if state.masked:
            return Keep(original.expand(batch, -1))
        if state.left == self._entering(block):
            return Keep(getattr(self, f"among_{block}").expand(batch, -1))
        # Some patches were never there: positions count in the original grid, so the trace knows where the others are.
        places = state.trace.tokens()[:, original]
        counts = (places >= 0).sum(1)
        if not bool((counts == counts[0]).all()):
            raise PrunexError(
                "images of this batch lack different numbers of the patches that patch_slimming keeps: use "
                "pruning.masked = True, or removal='mask'"
            )
        return Keep(places[places >= 0].unflatten(0, (batch, int(counts[0]))))

    def alter(self, anatomy: Anatomy) -> Anatomy:
        """As it is; refused where the head came to read patches after this was attached."""
        _check_head(anatomy)
        return anatomy

    def _check_images(self, state: TokenState) -> None:
        if len(self.sets[-1]) < self.patches and state.trace.grid != self.grid:
            (h, w), (gh, gw) = state.trace.grid, self.grid
            raise PrunexError(
                f"these images have {h} x {w} patches, the sets of patch_slimming are for {gh} x {gw}: resize the "
                "images, or attach and calibrate again"
            )

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each block but the last."""
        slims = len(self.sets[-1]) < self.patches
        if slims and patches != self.patches:
            raise PrunexError(f"the sets of patch_slimming are for {self.patches} patches, not {patches}")
        return [len(s) if slims else patches for s in self.sets]

    def inference_only(self) -> None:
        """Let go of an infinite tolerance, which plain files cannot hold; what it led to is in the sets."""
        super().inference_only()
        if self.options["tolerance"] == math.inf:
            self.options["tolerance"] = self.handed_on["tolerance"]

    @property
    def needs_calibration(self) -> bool:
        """Whether no sets were given, loaded or found yet."""
        return self.options["keep"] is None

    def calibrate(self, model: ViT, images: Any, verbose: bool = False, **options: Any) -> Slimming:
        """Find the sets on some images, dense weights and all, and take them into force; nothing changes if refused.

        ``verbose`` shows a progress bar; other options stand for those given to ``attach``, but ``keep``. The report
        tells counts and errors block by block; printed, it is a table.
        """
        known = {k: v for k, v in self.options.items() if k != "keep"}
        for name in options:
            if name not in known:
                raise unknown("calibration option of patch_slimming", name, [*known, "verbose"])
        settings = _settings(**(known | options))
        anatomy = own_anatomy(model)
        _check_head(anatomy)
        _check_blocks(model, anatomy)
        if anatomy.grid != self.grid:
            raise PrunexError(
                f"the model has {anatomy.grid[0]} x {anatomy.grid[1]} patches now, it had {self.grid[0]} x "
                f"{self.grid[1]} when patch_slimming was attached: detach() and attach again"
            )
        if settings["epochs"]:
            check_made_outside(model.blocks, "calibrate with epochs=0")
        limit = settings.pop("calibration_images")
        batches = calibration_images(images, limit)
        kind = next(model.parameters()).device.type
        with (
            as_found(model, train=False),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(kind, enabled=False),
        ):
            # Tensors of inference mode cannot enter the graph of the fine-tuning.
            batches = [b.clone() if b.is_inference() else b for b in batches]
            search = Search(model, anatomy, batches, verbose=verbose, **settings)
            report = search.run()
            # Before the fine-tuned blocks take the place of the model's.
            dense = [self._logits(model, b, slimmed=False) for b in batches]
            search.install()
            self.kept.copy_(search.kept[:-1])
            self.found.fill_(True)
            self._use(report.keep, True)
            self.options |= {**settings, "calibration_images": limit}
            ours = [self._logits(model, b, slimmed=True) for b in batches]
        a, b = torch.cat(ours), torch.cat(dense)
        distance = float((a - b).square().sum() / b.square().sum().clamp(min=1e-300))
        agreement = float((a.argmax(1) == b.argmax(1)).double().mean()) if anatomy.classes else math.nan
        return replace(report, distance=distance, agreement=agreement)

    def _logits(self, model: ViT, images: Tensor, slimmed: bool) -> Tensor:
        weight = next(model.parameters())
        parts = [embed(model, p.to(weight.device, weight.dtype)) for p in images.split(64)]
        return torch.cat([resume(model, x, grid, (self,) if slimmed else ()) for x, grid in parts]).double().cpu()


def _after_loading(module: PatchSlimming, _: Any) -> None:
    """Sets travel with the state dict; indices and options follow them."""
    if not module.kept.is_meta:
        sets = module._check([row.nonzero().flatten().tolist() for row in module.kept])
        module._use(sets, bool(module.found))


def _check_head(anatomy: Anatomy) -> None:
    """Refuse a model whose head reads patches."""
    if not anatomy.readers or anatomy.pool == "":
        what = "an explainable head that reads patches" if anatomy.rankers else f"global_pool={anatomy.pool!r}"
        what = "a class token that enters behind the blocks" if anatomy.late else what
        raise PrunexError(
            f"patch_slimming needs a head that reads a class token, this model has {what}: the last block's set is "
            "what the head reads, so here it would be all patches, and so would every set before"
        )


def _check_blocks(model: ViT, anatomy: Anatomy) -> None:
    """Refuse blocks that the search cannot run on their own."""
    parallel = any(layout_of(b).parallel for b in model.blocks)
    if parallel or positions_of(model, anatomy.prefix, anatomy.grid) is not None:
        what = "halves are parallel" if parallel else "attention looks positions up"
        raise PrunexError(
            f"patch_slimming cannot be calibrated on this {type(model).__name__}, whose {what}: give the sets with "
            "keep=[...], or use topk or evit"
        )


def _settings(**given: Any) -> dict[str, Any]:
    """The search's settings, checked."""
    if given["tolerance"] != math.inf:
        given["tolerance"] = check_number("tolerance", given["tolerance"], 0)
    for name in ("step", "epochs", "calibration_images", "seed"):
        given[name] = check_whole(name, given[name], int(name in ("step", "calibration_images")))
    check_choice("criterion", given["criterion"], CRITERIA)
    given["learning_rate"] = check_number("learning_rate", given["learning_rate"], 0)
    return given
