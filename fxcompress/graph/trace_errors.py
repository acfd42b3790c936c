"""What the code of a model, or an operator, may raise because it runs on fake tensors."""

from __future__ import annotations

RAISED_BY_MODELS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
                    NotImplementedError,
                    AssertionError)
