"""A folder that transformers' ``save_pretrained`` wrote, opened: its model, its processor, images as it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from PIL.Image import Image
from torch import Tensor

from prunex.errors import PrunexError
from prunex.multimodal import MultimodalExplanation
from prunex.pictures import from_tensor
from prunex.pictures.arrays import Picture
from prunex.recipes.commands.multimodal_options import Folder
from prunex.recipes.commands.processes import joined
from prunex.recipes.runs import to_device

_OF_IMAGES = ("pixel_values", "pixel_mask")


class OpenedFolder:
    """A model and its processor, from one folder and nowhere else; nothing is downloaded, unpickled or run from it.

    Attributes:
        model: In eval mode, in single precision.
        tokenizer: None where the model reads no text.
        texts: What the model reads beside every image.

    Raises:
        PrunexError: What cannot be opened, weights that do not fit, and a text that is too long.
    """

    def __init__(self, folder: Folder, texts: Sequence[str], device: str | None) -> None:
        self.folder, self.texts = folder, list(texts)
        self.model = opened_model(folder)
        self._images = self._made("AutoImageProcessor")
        self.tokenizer = self._made("AutoTokenizer") if folder.kind.texts != "none" else None
        self.device = to_device(device, [self.model])
        self._tokens = self._tokenised()

    def image(self, image: Image) -> dict[str, Tensor]:
        """One RGB image as the model sees it, a batch of one: alone, so that no other's size pads it."""
        try:
            made = self._images(images=[image], return_tensors="pt")
        except Exception as error:  # processors are other people's code
            raise _cannot(self.folder, "prepare an image", error) from error
        return {name: made[name] for name in _OF_IMAGES if isinstance(made.get(name), Tensor)}

    def batch(self, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Images of one size, and the texts, as the model is called with them."""
        inputs = joined(images)
        # CLIP's kind scores every text against every image; others read one with each.
        copies = 1 if self.folder.kind.shared else len(images)
        inputs |= {name: tokens.repeat(copies, 1) for name, tokens in self._tokens.items()}
        return {name: value.to(self.device) for name, value in inputs.items()}

    def picture(self, image: dict[str, Tensor]) -> Picture | None:
        """What the model sees of an image, uint8 [H, W, 3]; None where its processor does not say how it normalises."""
        pixels, processor = image["pixel_values"], self._images
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        if pixels.shape[1] != 3 or not getattr(processor, "do_normalize", False) or mean is None or std is None:
            return None
        mask = image.get("pixel_mask")
        whole: Picture = from_tensor(pixels, mean, std)[0]
        # Processors pad to the right and below.
        return whole if mask is None else whole[: int(mask[0].any(1).sum()), : int(mask[0].any(0).sum())]

    def class_name(self, number: int) -> str:
        """What one of the model's classes is called: the text itself where texts are compared."""
        if self.folder.kind.texts == "some":
            return self.texts[number]
        names = getattr(self.model.config, "id2label", None) or {}
        return str(names.get(number, number))

    def name(self, e: MultimodalExplanation) -> None:
        """Call what is explained as it was typed: a tokenizer may not know every word of it."""
        e.labels = [self.class_name(number) for number in e.target.tolist()] if e.target.ndim == 1 else e.labels
        for query in e.queries or ():
            query.label = self.class_name(query.target)

    def _made(self, kind: str) -> Any:
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(
                self.folder.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise _cannot(self.folder, f"open its {kind.removeprefix('Auto')}", error) from error

    def _tokenised(self) -> dict[str, Tensor]:
        """The texts' tokens, [texts, T]."""
        if self.tokenizer is None:
            return {}
        config = self.model.config
        most = int(getattr(config, "text_config", config).max_position_embeddings)
        try:
            made = self.tokenizer(self.texts, return_tensors="pt", padding=len(self.texts) > 1)
        except Exception as error:
            raise _cannot(self.folder, "read --text", error) from error
        length = made["input_ids"].shape[1]
        if length > most:
            raise PrunexError(f"--text is {length} tokens long, and the model reads {most} at most: shorten it")
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def opened_model(folder: Folder) -> Any:
    """The model of a folder alone, in eval mode; one that cannot be opened, or lacks weights, is refused."""
    import transformers

    made = getattr(transformers, folder.architecture)
    try:
        with _quiet():
            config = _config(folder, made.config_class)
            # Safetensors alone: nothing is unpickled, and nothing is fetched.
            model, read = made.from_pretrained(
                folder.path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except PrunexError:
        raise
    except Exception as error:  # damaged files surface in many ways
        raise _cannot(folder, f"open a {folder.architecture}", error) from error
    wrong = sorted(map(str, [*read["missing_keys"], *read["mismatched_keys"]]))
    if wrong:
        raise PrunexError(
            f"{folder.path}: its weights lack {len(wrong)} of the model's, such as {wrong[0][:120]}, which would be "
            "random: save the whole model"
        )
    return model.eval()


def _config(folder: Folder, kind: Any) -> Any:
    """The model's configuration, with its backbone's in it."""
    read, _ = kind.get_config_dict(folder.path, local_files_only=True)
    name, more = read.get("backbone"), read.get("backbone_kwargs") or {}
    if name is None or read.get("backbone_config") is not None:
        return kind.from_dict(read)
    # Older versions named the backbone alone, which newer ones look up in the library's hub.
    if not read.get("use_timm_backbone", True):
        raise PrunexError(
            f"{folder.path}: config.json says of the backbone no more than its name, {str(name)[:80]!r}, which would "
            "be looked up in the network: give its backbone_config"
        )
    read["backbone_config"] = {
        "model_type": "timm_backbone",
        "backbone": name,
        "features_only": True,
        "use_pretrained_backbone": False,
        "num_channels": more.get("in_chans", read.get("num_channels", 3)),
        "out_indices": more.get("out_indices", [1, 2, 3, 4]),
        **({"output_stride": more.get("output_stride", 16)} if read.get("dilation") else {}),
    }
    for key in ("backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone"):
        read.pop(key, None)
    return kind.from_dict(read)


def _cannot(folder: Folder, what: str, error: Exception) -> PrunexError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return PrunexError(f"{folder.path}: cannot {what} ({reason})")


@contextmanager
def _quiet() -> Any:
    """Without the progress bars of transformers, which shows one for each model that it opens."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
