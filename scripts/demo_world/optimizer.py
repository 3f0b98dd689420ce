"""Muon for the matrices inside the network and AdamW for the rest, with one schedule for both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 100  # steps


class Optimizer:
    """Both optimizers over ``named`` parameters; the rates fall linearly after a share ``plateau`` of the training."""

    def __init__(self, named: dict[str, nn.Parameter], matrix_rate: float, rate: float, plateau: float):
        self.plateau = plateau
        matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "head" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in named.values() if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = (matrix_rate, rate)
        self.parameters = [*matrices, *others]
        self.steps = 0

    def step(self, progress: float) -> None:
        """Apply the gradients: warm-up, a plateau, and a linear fall from there to ``progress`` 1."""
        self.steps += 1
        factor = max(0.0, min(1.0, self.steps / WARM_UP, (1 - progress) / (1 - self.plateau)))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def newton_schulz(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's iteration toward the orthogonal matrix nearest to ``gradient`` (M, N), in the gradient's own dtype.

    The library's is in bfloat16, which a CPU without instructions for it multiplies several times more slowly.
    """
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    made = gradient.T if tall else gradient
    made = made / made.norm().clamp(min=eps)
    for _ in range(steps):
        gram = made @ made.T
        made = torch.addmm(made, torch.addmm(gram, gram, gram, beta=b, alpha=c), made, beta=a)
    return made.T if tall else made
