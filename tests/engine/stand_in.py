"""A model with the structure of vLLM's, small enough to look into."""

from torch import Tensor, nn

from tests.tiny import HIDDEN, LAYERS, NEURONS


class Projection(nn.Linear):
    """What the installer reads of vLLM's linear maps, on one rank."""

    tp_rank = 0
    input_is_parallel = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.input_size = self.input_size_per_partition = inputs
        self.output_size = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Projection(HIDDEN, NEURONS)
        self.down_proj = Projection(NEURONS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate(x)[0]))[0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
