"""Reports as text, table, page and JSON, with times, and `zenith explain` from the command line."""

from __future__ import annotations

import html.parser
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import zenith_jax as zenith
from zenith_jax import cli

MODEL = """
import jax, jax.numpy as jnp
def block(x, scale):
    y = jax.nn.gelu(x)
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=1) + 1e-5) * scale
def block_args(): return jnp.ones((4, 64)), jax.ShapeDtypeStruct((64,), jnp.float32)
class model:
    @staticmethod
    def apply(x): return jax.nn.softmax(x)
def example_args(): return jnp.ones((3, 8))
def raises(x): raise KeyError("mine")
"""


@pytest.fixture(autouse=True)
def without_cost():
    with zenith.configured(use_cost=False):
        yield


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a_model.py"
    path.write_text(MODEL)
    return path


def model(x):
    y = jax.nn.softmax(jax.nn.softmax(x * 3) * 2)
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=1) + 1e-5)


class Cells(html.parser.HTMLParser):
    """Text of each cell, by row; fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "img", "iframe"), "the page must need nothing else"
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def norm_gain(rows):
    return next(row for row in rows if row[0] == "XLA")[6]


def test_a_page_shows_every_site_once():
    report = zenith.explain(model)(jnp.ones((4, 64)))
    head, *rows = Cells(report.html()).rows
    assert head == ["by", "op and shapes", "source", "chosen because", "flops", "bytes saved, at most", "gain"]
    assert len(rows) == 2  # two softmax at one line, and the refused norm
    by_op = {"softmax": next(row for row in rows if "softmax" in row[1])}
    assert by_op["softmax"][0] == "fused ×2" and "by request" in by_op["softmax"][3]
    assert "float32[4,64]" in by_op["softmax"][1]
    assert by_op["softmax"][6].startswith("up to ") and not norm_gain(rows)
    norm = next(row for row in rows if row[0] == "XLA")
    assert "divided by 63.0" in norm[3] and "try: a mean divides by their number" in norm[3]
    assert Cells(report._repr_html_()).rows == [head, *rows]


def test_text_in_a_page_is_escaped():
    site = zenith.Site(op="<b>", fused=False, source="a & b", reason='"<script>alert(1)</script>"')
    assert "<script>" not in zenith.Report((site,), "cpu").html()


def test_flops_and_bytes_are_those_of_the_site():
    def attention(q, k, v):
        p = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", p, v)

    q = jnp.ones((2, 16, 4, 8))
    (site,) = zenith.explain(attention)(q, q, q).fused
    logits, products = 2 * 4 * 16 * 16, 2 * (2 * 2 * 4 * 16 * 16 * 8)
    # The softmax reads or writes the logits in about five equations; two products and no more.
    assert products < site.flops < products + 10 * logits
    assert 2 * 4 * 2 * logits < site.bytes_saved < 2 * 4 * 8 * logits
    assert site.expected_us == pytest.approx(site.bytes_saved / 45e3)  # a copy's 45 GB/s


def test_measured_sites_have_both_times():
    report = zenith.explain(model, measure=True)(jnp.ones((4, 64)))
    for site in report.sites:
        assert (site.measured_us is not None) == site.fused
    assert all(t > 0 for s in report.fused for t in s.measured_us)
    assert " us" in str(report) and " us" in report.html() and "gain" in Cells(report.html()).rows[0]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "gain" in console.export_text()
    console.file.close()


def test_a_primal_that_its_rule_replaces_is_counted_once():
    @jax.custom_vjp
    def own(x):
        return jax.nn.gelu(x)

    own.defvjp(lambda x: (jax.nn.gelu(x), x), lambda x, g: (g * jnp.cos(x),))
    x = jnp.ones((4, 64))
    assert zenith.explain(jax.grad(lambda x: own(x).sum()))(x).counts() == {}  # the value is dead
    assert zenith.explain(jax.value_and_grad(lambda x: own(x).sum()))(x).counts() == {"gelu_tanh": 1}
    # Not differentiated by y: the primal runs, once.
    both = zenith.explain(jax.value_and_grad(lambda x, y: (x * own(y)).sum()))(x, x)
    assert both.counts() == {"gelu_tanh": 1}


# --- zenith explain ---------------------------------------------------------------------------------------------------


def run(*arguments):
    return cli.main(["explain", *map(str, arguments)])


def test_explain_takes_the_arguments_of_the_file(file, capsys, tmp_path):
    page = tmp_path / "report.html"
    assert run(f"{file}:block", "--json", "--html", page) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["fused"], report["refused"]) == (1, 1)
    assert report["sites"][0]["op"] == "gelu_tanh" and report["sites"][0]["source"] == f"{file}:4"
    assert "divided by 63.0" in page.read_text()


def test_explain_of_a_dotted_name_with_the_common_arguments(file, capsys):
    assert run(f"{file}:model.apply", "--strict") == 0
    assert "softmax" in capsys.readouterr().out
    assert run(f"{file}:block", "--strict") == 1


def test_explain_takes_shapes_and_differentiates(file, capsys):
    assert run(f"{file}:model.apply", "--args", "bf16[2,3,16]", "--grad", "--json") == 0
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert site["differentiated"] and site["shapes"] == "bfloat16[2,3,16]"


@pytest.mark.parametrize(
    "target, options, message",
    [
        ("nowhere.py:f", [], "there is no file nowhere.py"),
        ("{file}", [], "expected FILE.py:FUNCTION"),
        ("{file}:blok", [], "it has block, block_args, example_args, model, raises"),
        ("{file}:block", ["--args", "f33[2]"], "dtypes are f16"),
        ("{file}:raises", [], "raised when it was traced"),
        ("{file}:block", ["--args", "f32[2]"], "raised when it was traced"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(target, options, message, file, capsys):
    assert run(target.format(file=file), *options) == 2
    assert message in capsys.readouterr().err


def test_a_function_without_arguments_says_how_to_give_them(tmp_path, capsys):
    path = tmp_path / "bare_model.py"
    path.write_text("def f(x): return x\n")
    assert run(f"{path}:f") == 2
    assert "define f_args() or example_args()" in capsys.readouterr().err
