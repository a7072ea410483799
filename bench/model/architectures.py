"""Shapes of models by name, from their published configurations: what is counted and modelled."""

from __future__ import annotations

from typing import NamedTuple


class Projections(NamedTuple):
    """Linear layers of a block that read one x of ``in_features``: the width of each one's output."""

    in_features: int
    out_features: tuple[int, ...]


class Architecture(NamedTuple):
    """A decoder. ``gpt2``: q/k/v are one layer, the feed-forward has no gate, norms are LayerNorms."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False  # the head is the embedding's weight
    gpt2: bool = False

    @property
    def kv_width(self) -> int:
        """Of k and of v. All of q is as wide as the model."""
        return self.width // self.heads * self.kv_heads

    @property
    def parameters(self) -> int:
        """Without norms, biases and learnt positions."""
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return embeddings + sum(count * out * inner for (out, inner), count in self.weights().items())

    def block(self) -> dict[str, Projections]:
        """The linear layers of one block: what ``target_modules="all-linear"`` adapts."""
        width, inner, kv = self.width, self.feed_forward, self.kv_width
        if self.gpt2:
            return {
                "c_attn": Projections(width, (width + 2 * kv,)),
                "attn.c_proj": Projections(width, (width,)),
                "c_fc": Projections(width, (inner,)),
                "mlp.c_proj": Projections(inner, (width,)),
            }
        return {
            "q/k/v": Projections(width, (width, kv, kv)),
            "o": Projections(width, (width,)),
            "gate/up": Projections(width, (inner, inner)),
            "down": Projections(inner, (width,)),
        }

    def weights(self) -> dict[tuple[int, int], int]:
        """(out_features, in_features) -> how many layers of the model have it."""
        found: dict[tuple[int, int], int] = {}
        for group in self.block().values():
            for out in group.out_features:
                shape = out, group.in_features
                found[shape] = found.get(shape, 0) + self.layers
        return found


ARCHITECTURES = {
    "smollm2-135m": Architecture(30, 576, 1536, 9, 3, 49152, tied=True),
    "llama-3.2-1b": Architecture(16, 2048, 8192, 32, 8, 128256, tied=True),
    "llama-3.1-8b": Architecture(32, 4096, 14336, 32, 8, 128256),
    "llama-3.1-70b": Architecture(80, 8192, 28672, 64, 8, 128256),
    "qwen2.5-0.5b": Architecture(24, 896, 4864, 14, 2, 151936, tied=True),
    "qwen2.5-7b": Architecture(28, 3584, 18944, 28, 4, 152064),
    "gpt2": Architecture(12, 768, 3072, 12, 12, 50257, tied=True, gpt2=True),
}
