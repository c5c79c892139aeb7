"""A model with the structure of vLLM's, small enough to look into."""

from torch import Tensor, nn

from tests.tiny import HIDDEN, LAYERS, NEURONS


class Projection(nn.Linear):
    """What the installer reads of vLLM's RowParallelLinear, on one rank."""

    input_size = input_size_per_partition = NEURONS
    output_size = HIDDEN
    tp_rank = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, NEURONS, bias=False)
        self.act_fn = nn.SiLU()
        self.down_proj = Projection(NEURONS, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate(x)))[0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
