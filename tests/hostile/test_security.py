"""SECURITY.md tells the limits that the code has."""

import re
from pathlib import Path

import pytest
from PIL import Image

from prunex import errors, untrusted
from prunex.recipes.modules import backbone
from prunex.vit import rebuild

TEXT = (Path(__file__).resolve().parents[2] / "SECURITY.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("says", "is_so"),
    [
        ("1 GiB + 64 times the weights", (rebuild._ROOM, rebuild._TIMES) == (2**30, 64)),
        ("1 GiB + 64 times the weights", (backbone._ROOM, backbone._TIMES) == (2**30, 64)),
        ("1,000 blocks", rebuild._BLOCKS_AT_LEAST == backbone._DEEP == 1000),
        (f"{rebuild._PATCHES:,} patches", True),
        (f"{rebuild._PIXELS:,} values", backbone._PIXELS == rebuild._PIXELS),
        (f"{untrusted.TEXT_BYTES // 2**20} MiB", True),
        (f"{untrusted.NPZ_BYTES // 2**30} GiB", True),
        (f"about {round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)} million pixels", True),
        (f"a side of {untrusted.LONGEST_SIDE:,}", True),
        (f"{errors.LONGEST:,} letters", True),
    ],
)
def test_limits_are_those_of_the_code(says, is_so):
    assert says in TEXT
    assert is_so


def test_formats_are_those_that_are_opened():
    told = re.search(r"Images are opened as ([^.]*?) whatever", " ".join(TEXT.split()))[1]
    assert set(told.upper().replace(" OR", ",").replace(" ", "").split(",")) == set(untrusted.FORMATS) - {"DIB"}


def test_long_texts_end_in_a_short_message(tmp_path):
    huge = tmp_path / "x.json"
    huge.write_bytes(b"[" + b" " * (untrusted.TEXT_BYTES + 1) + b"]")
    with pytest.raises(errors.PrunexError, match="larger than 64 MiB"):
        untrusted.read_json(huge)
    assert len(str(errors.PrunexError("x" * 10**6))) < errors.LONGEST + 9
