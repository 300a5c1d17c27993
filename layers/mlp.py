"""The two feed-forward blocks of the families in this zoo."""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "silu"]


class MLP(nn.Module):
    """`down_proj(act(up_proj(x)))`, with biases (GPT-NeoX, Phi). x: [B, T, E]."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.up_proj(x), self.activation))


class GatedMLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`: SwiGLU, GeGLU (2002.05202). x: [B, T, E]."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation, *, bias: bool
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.gate_proj(x), self.activation) * self.up_proj(x))


def activate(x: Tensor, activation: str) -> Tensor:
    """`activation` by its name in config.json."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_new" | "gelu_pytorch_tanh":  # Hugging Face's names for the approximation
            return F.gelu(x, approximate="tanh")
        case _:
            known = ", ".join(get_args(Activation))
            raise ValueError(f"activation must be one of {known}, not {activation!r}")
