"""`zenith demo`: the model's code against known facts about its weights, and the command's exit codes."""

import ast
import importlib.util
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import zenith_jax as zenith
from zenith_jax import cli
from zenith_jax.demo import minilm, run
from zenith_jax.demo.texts import PASSAGES, QUESTIONS


def _missing() -> str | None:
    try:
        run.check_requirements()
    except run.MissingRequirement as error:
        return str(error)
    return None


pytestmark = pytest.mark.optimised
needs_weights = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def encoder(dtype=jnp.float32):
    graph, state = nnx.split(minilm.load(minilm.model_folder(), dtype=dtype))
    return (lambda state, ids, is_token: nnx.merge(graph, state)(ids, is_token)), state


def vectors(texts):
    encode, state = encoder()
    ids, is_token = minilm.tokenized(minilm.tokenizer(minilm.model_folder()), texts)
    return np.asarray(jax.jit(encode)(state, ids, is_token))


def test_the_model_does_not_mention_zenith():
    text = pathlib.Path(minilm.__file__).read_text()
    assert "zenith" not in text.lower()
    imported = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert not any(name and name.startswith("zenith") for name in imported)


@needs_weights
def test_paraphrases_are_near_and_unrelated_sentences_are_not():
    """What the weights were trained for. A transposed kernel or a wrong norm mixes them all."""
    pairs = [
        ("A man is playing a guitar.", "Someone plays a stringed instrument."),
        ("The weather was terrible all weekend.", "It rained and stormed on Saturday and Sunday."),
        ("How can I reset my password?", "I forgot my login credentials and need new ones."),
    ]
    found = vectors([text for pair in pairs for text in pair])
    cosines = found @ found.T
    same = [cosines[2 * i, 2 * i + 1] for i in range(3)]
    other = [cosines[i, j] for i in range(6) for j in range(6) if i // 2 != j // 2]
    assert min(same) > 0.45 and max(other) < 0.25, (same, other)


@needs_weights
def test_documented_similarities_of_these_weights():
    """The sentences of the model's usage example on sbert.net, with the scores printed there: 0.6660 and 0.1046."""
    found = vectors(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    np.testing.assert_allclose([found[0] @ found[1], found[0] @ found[2]], [0.6660, 0.1046], atol=2e-4)


@needs_weights
def test_padding_does_not_change_a_vector():
    alone, padded = vectors(["A short text."]), vectors(["A short text.", " ".join(PASSAGES.values())])
    np.testing.assert_allclose(padded[0], alone[0], atol=2e-6)


@needs_weights
def test_every_layer_is_fused():
    encode, state = encoder()
    ids = jax.ShapeDtypeStruct((16, 160), jnp.int32)
    report = zenith.explain(encode)(state, jnp.zeros(ids.shape, ids.dtype), jnp.ones(ids.shape, bool))
    assert report.counts() == {"attention": 6, "gelu_erf": 6, "add_layer_norm": 13}


@needs_weights
def test_the_command_compares_both_and_exits_with_0(capsys):
    assert cli.main(["demo", "--runs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "zenith.jit" in shown and "25 sites fused" in shown and "octopus" in shown


def test_exit_code_is_1_and_the_command_is_named_where_the_extra_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'zenith-jax[demo]'" in capsys.readouterr().err


def test_exit_code_is_1_and_the_command_is_named_where_the_wheel_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(run, "EXTRA", ())
    monkeypatch.setattr(minilm, "model_folder", lambda: None)
    assert cli.main(["demo"]) == 1
    assert run.WHEEL_COMMAND in capsys.readouterr().err


def test_wrong_vectors_and_wrong_answers_are_problems():
    n = len(PASSAGES)
    right = np.zeros((n + len(QUESTIONS), n))
    right[:n] = np.eye(n)
    right[n:] = np.eye(n)[[list(PASSAGES).index(title) for title in QUESTIONS.values()]]
    plain = run.Outcome(1.0, right, 1e-7)

    def problems(fused):
        outcomes = {"jax.jit": plain, "zenith.jit": fused}
        return run.check(outcomes, {name: run.nearest(o.vectors) for name, o in outcomes.items()}, "float32")

    assert not problems(run.Outcome(0.5, right, 1.5e-7))
    assert "error is 1.0e-03" in problems(run.Outcome(0.5, right, 1e-3))[0]
    assert "nan" in problems(run.Outcome(0.5, right, float("nan")))[0]
    wrong = np.concatenate([right[:n], np.roll(right[n:], 1, axis=1)])
    assert "answered by" in problems(run.Outcome(0.5, wrong, 1e-7))[0]


def test_tables_show_fused_and_refused_sites_with_reasons():
    report = zenith.Report(
        (
            zenith.Site("attention", True, "model.py:1", "t8 s8"),
            zenith.Site("attention", True, "model.py:1", "t8 s8"),
            zenith.Site("softmax", False, "model.py:2", reason="[too] small"),
        ),
        "cpu",
    )
    out = io.StringIO()
    Console(file=out, width=120).print(run.site_table(report))
    assert "2 sites fused, 1 left to XLA" in out.getvalue()
    assert "[too] small" in out.getvalue()
