"""Initial weights, where the two published implementations differ in them. All else they start alike."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class InitialWeights(NamedTuple):
    """How a published implementation starts what the other starts in another way."""

    distribution: tuple[str, dict[str, Any]]
    """Of the decoder's convolutions, but for the transposed ones: a function of torch.nn.init with its arguments."""
    zero_init_residual: bool
    """Whether the norms that end a ResNet's residual branches start at zero, or else at one."""

    def fill(self, weight: "Tensor") -> None:
        """Draw the weights of a convolution of the decoder, [Cout, Cin, k, k]."""
        from torch.nn import init  # not above: configurations are checked without torch

        name, arguments = self.distribution
        getattr(init, name)(weight, **arguments)


INITIAL_WEIGHTS = {
    "official": InitialWeights(("trunc_normal_", {"std": 0.02}), zero_init_residual=True),
    "mmpretrain": InitialWeights(
        ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "relu"}), zero_init_residual=False
    ),
}
"""By the value of `model.init`: the paper's own code, and mmpretrain 1.x."""
