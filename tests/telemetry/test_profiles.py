"""A profile and the compiled program name the op and the user's line."""

from __future__ import annotations

import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

import zenith_jax as zenith
from zenith_jax import native

pytestmark = pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="the CPU module is not built")

Q = jnp.ones((2, 16, 2, 8))


def attend(q):
    return jax.nn.dot_product_attention(q, q * 2, q)


def directly(q):
    return zenith.ops.attention(q, q * 2, q)


def calls(text):
    """(op_name, line of this file) of each custom call, by the tables of frames that precede the program."""
    locations = dict(re.findall(r"^(\d+) {file_name_id=\d+ function_name_id=\d+ line=(\d+)", text, re.MULTILINE))
    files = dict(re.findall(r"^(\d+) {file_name_id=(\d+)", text, re.MULTILINE))
    names = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("FunctionNames")[0], re.MULTILINE))
    frames = dict(re.findall(r"^(\d+) {file_location_id=(\d+)", text, re.MULTILINE))
    found = []
    for line in text.splitlines():
        if "custom_call_target" in line:
            (op_name,) = re.findall(r'op_name="([^"]*)"', line)
            (frame,) = re.findall(r"stack_frame_id=(\d+)", line)
            location = frames[frame]
            found.append((op_name, names[files[location]], int(locations[location])))
    return found


@pytest.mark.parametrize("function", [attend, directly])
def test_a_compiled_program_names_the_op_and_the_users_line(function):
    line = inspect.getsourcelines(function)[1] + 1
    with zenith.configured(use_cost=False):
        forward = zenith.jit(function).lower(Q).compile()
        backward = zenith.jit(jax.grad(lambda q: function(q).sum())).lower(Q).compile()
    ((op_name, file, number),) = calls(forward.as_text())
    assert op_name.endswith("/zenith.attention/zenith_call") and (file, number) == (__file__, line)
    found = calls(backward.as_text())
    assert len(found) == 2
    assert all((file, number) == (__file__, line) for _, file, number in found)
    assert all("zenith.attention" in name for name, _, _ in found)
    assert sorted("zenith.attention_bwd" in name for name, _, _ in found) == [False, True]


def test_a_saved_model_names_them_too(tmp_path):
    with zenith.configured(use_cost=False):
        zenith.compile(attend, Q).save(tmp_path / "attend.zenith")
    loaded = zenith.load(tmp_path / "attend.zenith")
    loaded.warm_up()
    (program,) = loaded.programs.values()
    ((op_name, file, line),) = calls(program.func.as_text())
    assert op_name.endswith("/zenith.attention/zenith_call")
    assert (file, line) == (__file__, inspect.getsourcelines(attend)[1] + 1)


# jaxlib makes a type without __module__ where events have statistics; as an error on Python 3.13 this ends the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_a_profile_leads_to_the_op(tmp_path):
    """On the CPU an event has the instruction's name; the program, in the same file, gives its op and line."""
    with zenith.configured(use_cost=False):
        jitted = zenith.jit(attend)
        jitted(Q).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        jitted(Q).block_until_ready()
    (file,) = tmp_path.rglob("*.xplane.pb")
    events = [
        event
        for plane in ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if dict(event.stats).get("hlo_module") == "jit_attend"
    ]
    (instruction,) = {dict(e.stats)["hlo_op"] for e in events if "zenith" in dict(e.stats)["hlo_op"]}
    compiled = jitted.lower(Q).compile().as_text()
    (line,) = [text for text in compiled.splitlines() if f"{instruction} =" in text]
    assert "zenith.attention" in line
    raw = file.read_bytes()
    assert b"/zenith.attention/zenith_call" in raw and __file__.encode() in raw
