"""An argument that is one constant in training and another in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class ByMode(nn.Module):
    """Gives `train_value` in training mode and `eval_value` in evaluation mode.

    Capture puts it where a model writes `F.dropout(x, training=self.training)`: the graph goes on following
    `.train()` and `.eval()`. It has no parameters and no inputs.
    """

    fxc_kind: ClassVar[str] = "by_mode"

    def __init__(self, train_value: Any, eval_value: Any) -> None:
        super().__init__()
        self.train_value, self.eval_value = train_value, eval_value

    def forward(self) -> Any:
        """The value for the mode the module is in."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Both values."""
        return f"train={self.train_value!r}, eval={self.eval_value!r}"
