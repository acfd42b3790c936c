"""Values from Python: the same rules as in a policy text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import STEADY
from verbs import Toy

from fxcompress.diagnostics import PolicyError
from fxcompress.policy import coerce
from fxcompress.policy.parsing import parse_expression
from fxcompress.policy.types import Bits, Boolean, Choice, Integer, Number, Percent, Registered, Text, Time, ValueType
from fxcompress.policy.units import UNITS, to_base
from fxcompress.policy.values import RAMPS, Call, Duration, NofM, Ramp
from fxcompress.source import Source


def test_python_values_and_texts_alike() -> None:
    written = Toy(amount="cubic(0% -> 60%)", rate="0.5", number="3k", flag="true", width="4 bits", every="100 steps",
                  mode="fast", keep="2:4", shape="block(4, 4)", label="as it is: 60%")
    given_ = Toy(amount=Ramp("cubic", 0, 0.6), rate=0.5, number=3000, flag=True, width=4, every=Duration(100, "steps"),
                 mode="fast", keep=NofM(2, 4), shape=Call("block", (4, 4)), label="as it is: 60%")
    assert written == given_
    assert Toy(amount=0.6).amount == Toy(amount="60%").amount == 0.6
    assert isinstance(Toy(amount=1).amount, float) and isinstance(Toy(number=8.0).number, int)


@pytest.mark.parametrize("wrong", [
    {"amount": 60}, {"amount": "60"}, {"amount": True}, {"amount": math.nan}, {"amount": Ramp("cubic", 0, 2)},
    {"amount": Ramp("qubic", 0, 0.5)}, {"plain": Ramp("cubic", 0.1, 0.2)}, {"rate": math.inf}, {"rate": "x"},
    {"number": 1.5}, {"number": True}, {"number": math.inf}, {"flag": 1}, {"width": 64}, {"every": 100},
    {"every": "100"},
    {"every": Duration(3, "samples")}, {"mode": "fats"}, {"mode": None}, {"keep": NofM(4, 2)}, {"keep": "4:2"},
    {"shape": Call("block", (0, 4))}, {"shape": "block(4)"}, {"shape": ("block", 4)}, {"label": 3},
    {"amount": "60% of dense"},
    {"amount": ""}, {"amount": "(" * 1000},
])
def test_wrong_python_values(wrong: dict[str, object]) -> None:
    with pytest.raises(PolicyError) as error:
        Toy(**wrong)
    assert all(item.code.startswith("FXC0") for item in error.value.diagnostics)


@pytest.mark.parametrize("type_",
                         [Percent(ramp=True), Percent(0.2, 0.4), Number(-1, 1, ramp=True), Integer(2, 9), Bits(),
                          Time(),
                                   Boolean(), Choice(("a", "b")), Text(), Registered("SCORES")])
def test_shown_values_read_back(type_: ValueType) -> None:
    tree, problems = parse_expression(Source("v", type_.example))
    assert tree is not None and not problems
    if isinstance(type_, Percent) and type_.low == 0.2:
        value: object = 0.3
    elif isinstance(type_, Integer) and not isinstance(type_, Bits):
        value = 7
    else:
        value = type_.convert(tree)
    assert coerce(type_, type_.show(value) if not isinstance(type_, Text) else value, "v") == value
    assert type_.describe() and type_.name


@STEADY
@given(st.sampled_from(sorted(RAMPS)), st.floats(0, 1), st.floats(0, 1))
def test_ramps_read_back(shape: str, start: float, end: float) -> None:
    ramp = Ramp(shape, round(start, 4), round(end, 4))
    assert coerce(Percent(ramp=True), Percent(ramp=True).show(ramp), "r") == ramp
    assert ramp.at(0) == pytest.approx(ramp.start) and ramp.at(1) == pytest.approx(ramp.end)


@STEADY
@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)))
def test_units_are_exact(count: int, unit: str) -> None:
    sizes = {"%": (1, 100), "us": (1, 10**6), "ms": (1, 1000)}
    up, down = sizes.get(unit, (int(UNITS[unit].size), 1))
    assert to_base(count, unit) == (count * up) / down


def test_decimal_percentages_are_the_nearest_floats() -> None:
    for tenths in range(1001):
        assert coerce(Percent(), f"{tenths / 10}%", "p") == pytest.approx(tenths / 1000, abs=1e-16)
    assert coerce(Percent(), "60%", "p") == 0.6 and coerce(Percent(), "7%", "p") == 0.07
