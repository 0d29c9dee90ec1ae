"""A torch model in Zenith: as a module with its weights shared, and as the backend of torch.compile.

pip install 'zenith-jax[torch]'
"""

import torch

import zenith_jax as zenith
from zenith_jax.frontends.torch.dynamo import zenith as backend


class Block(torch.nn.Module):
    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.before, self.after = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.project = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.after(x))


torch.manual_seed(0)
model, x = Block().eval(), torch.randn(2, 16, 64)

with torch.inference_mode():
    expected = model(x)

    fast = zenith.torch.compile(model)
    print(f"zenith.torch.compile: largest difference {(fast(x) - expected).abs().max():.1e}")
    print(f"another batch, another length: {tuple(fast(torch.randn(3, 10, 64)).shape)}")
    exports, sizes = fast.compilations
    print(f"exported {exports} time, compiled for {sizes} combinations of sizes")
    print(fast.report)

    # In an installed environment: torch.compile(model, backend="zenith").
    compiled = torch.compile(model, backend=backend)
    print(f"torch.compile: largest difference {(compiled(x) - expected).abs().max():.1e}")

    model.project.weight.mul_(0.5)  # torch's and JAX's weights are one memory
    print(f"after a change in place: largest difference {(fast(x) - model(x)).abs().max():.1e}")
