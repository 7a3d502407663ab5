"""A policy small enough for its whole Fisher matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slas_trl.trust_region import GaussianStep


class GaussianOutput:
    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std


class GaussianPolicy(nn.Module):
    """y ~ N(f(x), std²) over three elements, the log-probability their mean, as in the library."""

    def __init__(self, seed: int, std: float = 0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        generator = torch.Generator()
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator.manual_seed(seed), dtype=torch.float64)
            parameter.data = 0.7 * values
        self.std = torch.tensor(std, dtype=torch.float64)

    def __call__(self, x: Tensor) -> GaussianOutput:
        return GaussianOutput(self.layers(x), self.std)


def dense_fisher(outputs: Sequence[GaussianStep], parameters: list[Tensor]) -> Tensor:
    """E[Jᵀ J / σ²]."""
    total = torch.zeros(())
    for output in outputs:
        elements = (output.mean / output.std).flatten()
        rows = torch.autograd.grad(
            elements,
            parameters,
            torch.eye(len(elements), dtype=elements.dtype),
            is_grads_batched=True,  # all rows of J at once
            materialize_grads=True,
            allow_unused=True,
        )
        jacobian = torch.cat([part.flatten(1) for part in rows], 1).double()
        total = total + jacobian.T @ jacobian / len(jacobian) / len(outputs)
    return total
