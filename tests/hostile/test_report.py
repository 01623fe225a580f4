"""The report shows what data say as words: no tags, no links, no code, whatever names and numbers are called."""

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunex.recipes import write_report
from prunex.recipes.report.page import render

NASTY = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "javascript:alert(1)",
    "</style><script>", "</svg><script>", "<!--", "]]>", "&lt;b&gt;", "{{ 7*7 }}", "{% raw %}", "${oc.env:HOME}",
    "data:text/html,<b>", "$\\frac{$", "a\u202eb", "\ud800", "\x00\x01", "<a href=javascript:alert(1)>x</a>",
]  # fmt: skip
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "div", "b", "small", "section",
    "table", "thead", "tbody", "tr", "th", "td", "span", "i", "img", "figure", "figcaption", "pre", "code", "details",
    "summary", "svg", "g", "path", "defs", "text", "use", "clippath", "rect", "metadata", "tspan",
}  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def strange(self):
        """Tags that the template does not have."""
        return {tag for tag, _ in self.tags} - TAGS


def safe(run):
    """The page, after checking that nothing in it runs or leads anywhere."""
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert not page.strange()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
            if name.split(":")[-1] == "href":
                assert value.startswith("#")  # within the page
            if name == "style":
                assert "url(" not in value.replace("url(#", "")
            assert name not in ("action", "formaction", "srcdoc", "background", "poster")
    policy = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    return page


def rows(path, heading, lines):
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([heading, *lines])


def written(room, words):
    """A run folder that says these words wherever it may say any."""
    run = (room.copy("run") / "version_0").rename(room.work / "run" / "<b>x")
    slim = json.loads((run / "slim" / "config.json").read_text())
    slim |= {"label_names": words, "architecture": words[0]}
    (run / "slim" / "config.json").write_text(json.dumps(slim))
    (run / "slim" / "<img src=x>.txt").write_text("")
    model = [{"model": w, "accuracy": 0.5, "gmacs": 1, "images_per_s": 9} for w in words]
    (run / "summary.json").write_text(json.dumps({"machine": words[0], "rows": model}))
    measured = {"model": words[0], "images_per_s": 5, "low": 4, "high": 6, "ratio": 1}
    speed = [{"runtime": w, "batch": w, "models": [measured]} for w in words]
    told = {"machine": words[0], "dtype": words[0], "threads": words[0], "versions": {"torch": words[0]}}
    (run / "bench.json").write_text(json.dumps(told | {"rows": model, "speed": speed, "notes": words}))
    (run / "config.yaml").write_bytes("\n".join(words).encode(errors="replace"))
    plain = [w.replace("\0", "").replace("\ud800", "?") for w in words]
    rows(run / "metrics.csv", ["step", *plain], [[0, *range(len(plain))], [1, *range(len(plain))]])
    rows(run / "units.csv", ["epoch", "block", "head", "class", "relevance", "kept", "updates"],
         [[0, 0, i % 3, w, i, True, i] for i, w in enumerate(plain)])  # fmt: skip
    heading = ["model", "method", "metric", "group", "higher_is_better", "mean", "low", "high", "images"]
    rows(run / "score" / "scores.csv", heading, [[w, w, w, w, True, 0.5, 0.4, 0.6, 3] for w in plain])
    (run / "score" / "about.json").write_text(json.dumps({"machine": words[0], "notes": words}))
    with np.load(run / "maps" / "epoch=001.npz") as file:
        arrays = dict(file)
    for word in plain:
        arrays[f"relevance/{word.replace('/', '|')}"] = arrays["relevance/tokentm"]
    (run / "maps" / "epoch=000.npz").unlink()
    np.savez(run / "maps" / "epoch=001.npz", **arrays)
    return run


def test_words_of_all_kinds_stay_words(room):
    page = safe(written(room, NASTY))
    said = "".join(page.words)
    for word in NASTY[:2]:
        assert word in said
    assert "{{ 7*7 }}" in said
    assert "49" not in said.split("{{")[0][-20:]


@settings(derandomize=True, deadline=None, max_examples=2, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=3, unique=True))
def test_any_words(room, words):
    room.fresh()
    safe(written(room, words))


def test_everything_in_the_template_is_escaped():
    page = render("waiting.html", title="<b>x", waits_for="<i>y", live={"version": "<u>z", "state": "<s>z"})
    assert b"&lt;b&gt;x" in page
    assert not any(tag in page for tag in (b"<b>x", b"<i>y", b"<u>z", b"<s>z"))
    from importlib.resources import files

    for template in (files("prunex.recipes") / "templates").iterdir():
        text = template.read_text()
        assert "|safe" not in text.replace(" ", "")
        assert "autoescape" not in text


@pytest.mark.parametrize("name", ["summary.json", "bench.json", "slim/config.json", "score/about.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"rows": [{"model": 1' + "0" * 400 + "}]}", '{"rows": NaN}', "\xff", ""]
)
def test_json_that_is_none(room, name, text):
    run = room.copy("run") / "version_0"
    (run / "metrics.csv").unlink()
    (run / name).write_bytes(text.encode("latin-1"))
    words = " ".join(safe(run).words)
    assert "prunex.recipes.DigitScenes" in words  # the config, and what else is whole
    # Of about.json the page says nothing: the scores themselves are there.
    if text in ("[" * 100_000, "\xff", "") and name != "score/about.json":
        assert f"{name.rpartition('/')[2]} could not be read" in words


def test_numbers_beyond_all_measure(room):
    run = room.copy("run") / "version_0"
    row = {"model": "dense", "accuracy": 10**400, "gmacs": 1e308, "images_per_s": -1, "params_m": "1e999"}
    (run / "summary.json").write_text(json.dumps({"rows": [row, {"model": "a", "gmacs": 1e-308, "accuracy": "nan"}]}))
    (run / "units.csv").write_text(
        "epoch,block,head,class,relevance,kept,updates\n0,0,0,\u00b2,1,True,1\n0,0,0," + "9" * 5000 + ",1,1,1\n"
    )
    (run / "metrics.csv").write_text("step,a\n1," + "9" * 400 + '\n2,"' + "x" * 200_000 + '"\n')
    assert "could not be read" in "".join(safe(run).words)
    (run / "metrics.csv").write_text("step,a,b\n1,1.7e308,1\n2,-1.7e308,2\n")  # no axis has steps between these
    (run / "score" / "scores.csv").write_text(
        "model,method,metric,group,higher_is_better,mean,low,high,images\n"
        "a,b,c,d,True,1.7e308,-1.7e308,nan,1e99\na,e,c,d,True,1,0,2,3\n"
    )
    safe(run)


NPZ = {
    "a promise of terabytes": lambda run: promise(run, (10**13,)),
    "a promise beyond numbers": lambda run: promise(run, (10**6,) * 4),
    "text as relevance": lambda run: change(run, "relevance/tokentm", np.full((2, 4, 4), "x")),
    "classes that are no numbers": lambda run: change(run, "labels", np.array([np.nan, 1.0])),
    "a grid of nothing": lambda run: change(run, "kept", np.zeros((3, 2, 0, 4), bool)),
    "complex numbers": lambda run: change(run, "relevance/tokentm", np.zeros((2, 4, 4), complex)),
}


def change(run, name, values):
    with np.load(run / "maps" / "epoch=001.npz") as file:
        arrays = dict(file)
    np.savez(run / "maps" / "epoch=001.npz", **(arrays | {name: values}))


def promise(run, shape):
    import zipfile

    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(run / "maps" / "epoch=001.npz", "w") as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize("what", NPZ)
def test_maps_that_lie_are_left_out(room, what):
    run = room.copy("run") / "version_0"
    (run / "metrics.csv").unlink()
    NPZ[what](run)
    assert "maps/epoch=001.npz could not be read" in "".join(safe(run).words)


def test_relevance_that_is_no_number_is_drawn_or_left_out(room):
    run = room.copy("run") / "version_0"
    change(run, "relevance/tokentm", np.full((2, 4, 4), np.nan))
    safe(run)
