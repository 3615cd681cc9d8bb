"""Layers with the weights of ours as literal equations."""

import math

import torch
from torch import Tensor, nn

from models.layers import Attention, TransformerLayer

Video = list[Tensor]


def literal_linear(vector: Tensor, layer: nn.Linear) -> Tensor:
    product = torch.stack([(row * vector).sum() for row in layer.weight])
    return product if layer.bias is None else product + layer.bias


def literal_gate(vector: Tensor, layers: nn.Sequential, slope: float) -> Tensor:
    """Returns sigmoid(W_2 LeakyReLU(W_1 x)), with the negative slope of LeakyReLU."""
    hidden = literal_linear(vector, layers[0])
    leaky = torch.stack([value if value > 0 else slope * value for value in hidden])
    return 1 / (1 + torch.exp(-literal_linear(leaky, layers[2])))


def literal_attention(tokens: Video, block: Attention) -> Video:
    """Returns W_o MHA(LN(q) W_q, LN(k) W_k, LN(v) W_v), without the residual."""
    normalised = []
    for token in tokens:
        centred = token - token.mean()
        unit = centred / torch.sqrt((centred**2).mean() + block.norm.eps)
        normalised.append(unit * block.norm.weight + block.norm.bias)
    queries, keys, values = (
        [literal_linear(token, layer) for token in normalised]
        for layer in (block.to_query, block.to_key, block.to_value)
    )
    size = len(queries[0]) // block.heads
    mixed = []
    for query in queries:
        heads = []
        for head in range(block.heads):
            part = slice(head * size, (head + 1) * size)
            weights = [math.exp((query[part] @ key[part]).item() / math.sqrt(size)) for key in keys]
            heads.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)) / sum(weights))
        mixed.append(torch.cat(heads))
    return [literal_linear(token, block.project) for token in mixed]


def literal_feed_forward(vector: Tensor, layers: nn.Sequential) -> Tensor:
    hidden = literal_linear(vector, layers[0])
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return literal_linear(gelu, layers[3])


def literal_transformer(tokens: Video, layer: TransformerLayer) -> Video:
    """Tr(x) = y + FFN(y), y = A(x, x, x) + x."""
    attended = [x + a for x, a in zip(tokens, literal_attention(tokens, layer.attention), strict=True)]
    return [y + literal_feed_forward(y, layer.feed_forward) for y in attended]
