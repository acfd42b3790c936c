"""`fmt`: the same tree, comments kept, a second run changes nothing."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from policies import STEADY, policies

from fxcompress.diagnostics import PolicyError
from fxcompress.policy import format_policy
from fxcompress.policy.parsing import parse_file
from fxcompress.source import Source

ROOT = Path(__file__).parent.parent

UGLY = '''

# head
use "x" {a,b
c}   # tail
policy   p ( a:percent=5 %,
   # inside
   b : int = -3 , c: number=2.5e3 # t

 ) { # open

   let  a=conv2d [ name~"x",   # c1

      out_channels<-3 ]
   let longer = (a|b)-c



   mask (a|b) - c{every=100steps, n=2 : 4
      # lone
      size=6MiB   # six
   }
   expect drift (output)<5% else "no"
   phase a over epochs 0 .. 12 after b , c { }
   phase d over 0 %..40% of training {
   override optional mask first ( a , 3 ) as q from t { sparsity = cubic( 0%->60 %) }
   pair output<-output{ loss=kl,weight = -  0.5 }

   }
   # end
}
# last'''

NEAT = '''# head
use "x" {
    a
    b
    c
}  # tail
policy p(a: percent = 5%,
    # inside
    b: int = -3, c: number = 2.5e3  # t
) {  # open
    let a = conv2d[name ~ "x",  # c1
        out_channels < -3]
    let longer = (a | b) - c

    mask (a | b) - c {
        every = 100 steps
        n     = 2:4
        # lone
        size = 6 MiB  # six
    }
    expect drift(output) < 5% else "no"
    phase a over epochs 0..12 after b, c {}
    phase d over 0%..40% of training {
        override optional mask first(a, 3) as q from t { sparsity = cubic(0% -> 60%) }
        pair output <- output { loss = kl, weight = -0.5 }
    }
    # end
}
# last
'''


def tree(text: str) -> object:
    parsed = parse_file(Source("p", text))
    assert parsed.diagnostics == ()
    return parsed.file


def comments(text: str) -> Counter[str]:
    without_texts = re.sub(r'"(\\.|[^"\\\n])*"', '""', text)
    return Counter(line.rstrip() for line in re.findall(r"#[^\n]*", without_texts))


def test_one_layout() -> None:
    assert format_policy(UGLY) == NEAT
    assert format_policy(NEAT) == NEAT
    assert tree(UGLY) == tree(NEAT)


@STEADY
@given(policies())
def test_same_tree_same_comments_twice_the_same(text: str) -> None:
    once = format_policy(text)
    assert tree(once) == tree(text)
    assert comments(once) == comments(text)
    assert format_policy(once) == once
    assert "\n\n\n" not in once and "\t" not in once.replace('"\t', "") and once.endswith("\n")
    assert not any(line != line.rstrip() for line in once.splitlines())


def test_empty_texts() -> None:
    assert format_policy("") == ""
    assert format_policy("\n\n") == ""
    assert format_policy("\ufeff# only\r\n") == "# only\n"


def test_syntax_errors_are_refused() -> None:
    with pytest.raises(PolicyError):
        format_policy("policy p {")


def test_shipped_policies_are_formatted() -> None:
    shipped = [*(ROOT / "fxcompress" / "policy" / "std").glob("*.fxc"), *(ROOT / "examples").rglob("*.fxc")]
    assert shipped
    for path in shipped:
        text = path.read_text(encoding="utf-8")
        assert format_policy(text) == text, path
