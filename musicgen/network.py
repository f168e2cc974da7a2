"""The language model for generation: one step at a time, with caches of fixed size.

It computes what the model's own forward pass computes, for every kind of attention and positions
that audiocraft has. What can be computed once is.

Letters: R rows (a piece has one with its conditions, and one without them for guidance),
K codebooks, n steps at once (1 while generating), P places in a cache, L condition vectors,
H heads, D model width, card = codebook size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from audiocraft.modules.transformer import create_sin_embedding
from torch import nn
from torch.nn import functional as F

from musicgen.attention import unwrapped
from musicgen.projection import Projector, plain

Cross = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # keys, values, mask of what is real
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Tables:
    """What depends on a place alone."""

    places: torch.Tensor  # [P]
    added: torch.Tensor | None  # to the step, [P, D]
    turns: tuple[torch.Tensor, torch.Tensor] | None  # of queries and keys, complex [P, D / H / 2]


@dataclass(frozen=True)
class Cache:
    """Keys and values of each layer, `[R, H, P, D / H]`, written in place.

    `groups` are the rows that attend together. `crosses` holds, for each layer and group, the keys
    and values of the conditions; None for a model without cross-attention.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    crosses: list[list[Any]]
    groups: list[slice]
    tables: Tables

    def group(self, number: int) -> "Cache":
        """Return the part of one group, in the same memory."""
        rows = self.groups[number]
        return Cache(
            [keys[rows] for keys in self.keys],
            [values[rows] for values in self.values],
            [groups[number : number + 1] for groups in self.crosses],
            [slice(None)],
            self.tables,
        )


@dataclass(frozen=True)
class Here:
    """The places `[n]` of the steps at hand, and how many they see; None = all, masked."""

    at: torch.Tensor
    span: int | None
    mask: torch.Tensor | None  # [n, span]


class Network:
    """A language model's weights, arranged for generation.

    By default they are shared, LoRA's adapters included. Another `project` replaces them by copies,
    layer by layer, so that memory doesn't grow; then nothing else can use the model.
    """

    @torch.inference_mode()
    def __init__(self, lm: Any, project: Projector = plain) -> None:
        self.lm = lm
        self.device = next(lm.parameters()).device
        self.layers = []
        for layer in lm.transformer.layers:
            self.layers.append(_Layer(layer, project))
            _drop_matrices(layer, project)
        self.heads = project(lm.linears)
        _drop_matrices(lm.linears, project)
        self.out_norm = None if lm.out_norm is None else _norm(lm.out_norm)

    def cache_bytes(self, places: int) -> int:
        """Return the bytes of one row in a cache."""
        one = self.layers[0]
        return 2 * len(self.layers) * one.kv_heads * one.width * places * one.dtype.itemsize

    def cache(self, groups: list[list[torch.Tensor]], places: int) -> Cache:
        """Make an empty cache for groups of pieces, given by what cross-attention reads.

        That is `[rows of the piece, L, D]`, of width 0 for models without it. All rows of a piece
        have L vectors, as in audiocraft: no condition is as many zeros.
        """
        rows, first = [], 0
        for group in groups:
            rows.append(slice(first, first := first + sum(map(len, group))))
        one = self.layers[0]
        shape = (first, one.kv_heads, places, one.width)
        # One block, so that freeing it gives the memory back: of small ones, glibc keeps some.
        # Zeros, because what is masked enters products, and 0 * NaN is NaN.
        both = torch.zeros(2, len(self.layers), *shape, dtype=one.dtype, device=self.device)
        keys, values = (list(half.unbind()) for half in both)
        sources = [_padded(group) for group in groups]
        crosses = [[layer.cross_from(*source) for source in sources] for layer in self.layers]
        return Cache(keys, values, crosses, rows, self._tables(places))

    @torch.inference_mode(mode=False)  # audiocraft keeps what it computes here, for training too
    def _tables(self, places: int) -> Tables:
        transformer = self.lm.transformer
        at = torch.arange(places, device=self.device)
        added = turns = None
        if transformer.positional_embedding in ("sin", "sin_rope"):
            period = transformer.max_period
            waves = create_sin_embedding(at[None, :, None], self.lm.dim, max_period=period)[0]
            added = transformer.positional_scale * waves
        if rope := transformer.rope:
            turn = rope.get_rotation(0, places)
            decay = rope.xpos.get_decay(0, places) if rope.xpos else torch.ones_like(turn)
            queries, keys = ((turn * decay**s) * rope.scale + (1 - rope.scale) for s in (1, -1))
            turns = queries, keys
        return Tables(at, added, turns)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens `[R, K, n]` -> `[R, n, D]`."""
        x = self.lm.emb[0](tokens[:, 0])
        for k, embed in enumerate(self.lm.emb[1:], start=1):
            x = x + embed(tokens[:, k])
        return x.float()

    def run(
        self, x: torch.Tensor, at: torch.Tensor, cache: Cache, span: int | None
    ) -> torch.Tensor:
        """Run embedded steps x `[R, n, D]` through the layers, and keep their keys and values.

        Args:
            at: their places, `[n]`; several are the first ones.
            span: the number of places so far, these included; None = attend to the whole cache,
                masked, so that a captured graph can be replayed at any place.
        """
        if cache.tables.added is not None:
            x = x + cache.tables.added.index_select(0, at)
        here = Here(at, span, self._mask(at, cache.tables.places[:span], span))
        for number, layer in enumerate(self.layers):
            x = layer(x, here, cache, number)
        return x if self.out_norm is None else self.out_norm(x)

    def _mask(
        self, at: torch.Tensor, places: torch.Tensor, span: int | None
    ) -> torch.Tensor | None:
        limit = self.layers[0].past_context
        if span is not None and limit is None:
            return None
        back = at[:, None] - places
        return back >= 0 if limit is None else (back >= 0) & (back <= limit)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[R, K, card]` after a step `[R, D]`."""
        return self.heads(x[:, None]).float().view(len(x), -1, self.lm.card)


class _Layer:
    """One layer of audiocraft's transformer, on a cache."""

    def __init__(self, layer: Any, project: Projector) -> None:
        attention = unwrapped(layer.self_attn)
        assert attention.custom and not attention.attention_as_float32
        D = attention.embed_dim
        self.norm_first = layer.norm_first
        self.width = D // attention.num_heads  # of a head
        self.kv_heads = attention.num_heads // attention.kv_repeat
        self.dtype = attention.in_proj_weight.dtype
        # audiocraft ignores past_context in its memory-efficient attention.
        self.past_context = None if attention.memory_efficient else attention.past_context
        self.norm_q = _norm(attention.q_layer_norm) if attention.qk_layer_norm else None
        self.norm_k = _norm(attention.k_layer_norm) if attention.qk_layer_norm else None
        self.qkv = project(layer.self_attn)
        self.parts = [attention.num_heads, self.kv_heads, self.kv_heads]
        self.out = project(attention.out_proj)
        self.norm1, self.norm2 = _norm(layer.norm1), _norm(layer.norm2)
        self.linear1 = project(layer.linear1, activation=layer.activation)
        self.linear2 = project(layer.linear2)
        self.scale1, self.scale2 = _scale(layer.layer_scale_1), _scale(layer.layer_scale_2)
        self.cross_kv = None
        if layer.cross_attention is not None:
            self.norm_cross, self.scale_cross = (
                _norm(layer.norm_cross),
                _scale(layer.layer_scale_cross),
            )
            self.cross_q = project(layer.cross_attention, slice(0, D))
            self.cross_kv = project(layer.cross_attention, slice(D, None))
            self.cross_out = project(unwrapped(layer.cross_attention).out_proj)

    def cross_from(self, source: torch.Tensor, mask: torch.Tensor | None) -> Cross | None:
        """Return keys and values `[R, H, L, D / H]` of conditions `[R, L, D]`, and their mask."""
        if self.cross_kv is None:
            return None
        keys, values = self.cross_kv(source).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values), mask

    def __call__(self, x: torch.Tensor, here: Here, cache: Cache, number: int) -> torch.Tensor:
        """Run steps x `[R, n, D]` through the layer, the `number`-th of the cache."""
        if self.norm_first:
            x = x + self.scale1(self._self(self.norm1(x), here, cache, number))
            if self.cross_kv:
                x = x + self.scale_cross(self._cross(self.norm_cross(x), cache, number))
            return x + self.scale2(self._feed(self.norm2(x)))
        y = self.norm1(x + self.scale1(self._self(x, here, cache, number)))
        if self.cross_kv:  # from the layer's input, as in audiocraft
            y = self.norm_cross(y + self.scale_cross(self._cross(x, cache, number)))
        return self.norm2(y + self.scale2(self._feed(y)))

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.linear1(x))

    def _self(self, x: torch.Tensor, here: Here, cache: Cache, number: int) -> torch.Tensor:
        q, k, v = self._heads(self.qkv(x)).split(self.parts, dim=1)
        if self.norm_q and self.norm_k:
            q, k = (
                self._heads(norm(_joined(t))).to(v)
                for norm, t in ((self.norm_q, q), (self.norm_k, k))
            )
        if cache.tables.turns is not None:
            of_q, of_k = cache.tables.turns
            q = _turned(q, of_q.index_select(0, here.at))
            k = _turned(k, of_k.index_select(0, here.at))
        keys, values = cache.keys[number], cache.values[number]
        keys.index_copy_(2, here.at, k)
        values.index_copy_(2, here.at, v)
        keys, values = keys[:, :, : here.span], values[:, :, : here.span]
        attend = functools.partial(
            F.scaled_dot_product_attention,
            attn_mask=here.mask,
            is_causal=here.mask is None and x.shape[1] > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if len(cache.groups) == 1:
            return self.out(_joined(attend(q, keys, values)))
        parts = [attend(q[rows], keys[rows], values[rows]) for rows in cache.groups]
        return self.out(_joined(torch.cat(parts)))

    def _cross(self, x: torch.Tensor, cache: Cache, number: int) -> torch.Tensor:
        q = self._heads(self.cross_q(x))
        parts = [
            F.scaled_dot_product_attention(q[rows], keys, values, attn_mask=mask)
            for rows, (keys, values, mask) in zip(cache.groups, cache.crosses[number], strict=True)
        ]
        return self.cross_out(_joined(parts[0] if len(parts) == 1 else torch.cat(parts)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:  # [R, n, D] -> [R, H, n, D / H]
        return x.view(*x.shape[:2], -1, self.width).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:  # [R, H, n, D / H] -> [R, n, D]
    return x.transpose(1, 2).flatten(2)


def _padded(group: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a group's conditions as `[R, L, D]`, and the mask `[R, 1, 1, L]` of what is real."""
    L = max(piece.shape[1] for piece in group)
    source = torch.cat([F.pad(piece, (0, 0, 0, L - piece.shape[1])) for piece in group])
    if all(piece.shape[1] == L for piece in group):
        return source, None
    real = [torch.arange(L) < piece.shape[1] for piece in group for _ in piece]
    return source, torch.stack(real)[:, None, None].to(source.device)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of x `[R, H, n, D / H]` by complex numbers `[n, D / H / 2]`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _norm(norm: Any) -> Function:
    """Return a layer norm in float32."""
    weight, bias = (None if p is None else p.detach().float() for p in (norm.weight, norm.bias))
    shape, eps = norm.normalized_shape, norm.eps
    return lambda x: torch.layer_norm(x.float(), shape, weight, bias, eps)


def _scale(scale: nn.Module) -> Function:
    return (lambda x: x) if isinstance(scale, nn.Identity) else scale


def _drop_matrices(module: nn.Module, project: Projector) -> None:
    """Free the weights that `project` has copied."""
    if project is not plain:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.new_empty(0)
