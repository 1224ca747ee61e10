"""Random programs that make a mask, for comparing proofs with what the programs compute."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from support.graphs import NEG

B, H, D = 2, 2, 4
HIDING = (NEG, -1e4, -1e9, torch.finfo(torch.float32).min)


class MaskProgram:
    """A function of tensors, decided by a seed: a mask of random parts, and attention under it.

    Calling it twice runs the same program. ``triangle`` is meant to be a constant.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def inputs(self, dynamic: bool = False) -> tuple[Tensor, ...]:
        random_numbers = random.Random(-1 - self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [(9, 9), (7, 12), (12, 12), (1, 9)]
        tokens, keys = random_numbers.choice(sizes[:3] if dynamic else sizes)
        shapes = ((B, H, tokens, D), (B, H, keys, D), (B, H, keys, D))
        numbers = torch.cat([torch.arange(4), torch.arange(keys - 4)])
        return (
            *(torch.randn(*shape, generator=generator) for shape in shapes),
            torch.rand(B, keys, generator=generator) > 0.3,
            torch.randint(0, 3, (B, keys), generator=generator),
            torch.randint(0, 2, (B, keys), generator=generator).cumsum(-1),
            numbers.expand(B, -1).contiguous(),
            torch.rand(tokens, keys, generator=generator) > 0.4,
            torch.rand(B, H, keys, generator=generator) > 0.3,
            torch.ones(20, 20).tril().view(1, 1, 20, 20),
        )

    def __call__(self, q, k, v, *data):
        self.random = random.Random(self.seed)
        self.tokens, self.keys = q.shape[2], k.shape[2]
        self.data = data
        shift = self.random.choice([0, 0, self.keys - self.tokens])
        self.row = (torch.arange(self.tokens) + shift)[None, None, :, None]
        self.column = torch.arange(self.keys)[None, None, None, :]
        self.item = torch.arange(B)[:, None, None, None]
        depth = self.random.choice([0, 1, 2, 3])
        if self.random.random() < 0.4:
            return self._attend_with_numbers(q, k, v, self._numbers(depth))
        return self._attend_with_booleans(q, k, v, self._boolean(depth))

    def _attend_with_booleans(self, q, k, v, mask):
        if self.random.random() < 0.6:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        logits = q @ k.mT * 0.25
        if self.random.random() < 0.5:
            return logits.masked_fill(~mask, NEG).softmax(-1) @ v
        return torch.where(mask, logits, -1e9).softmax(-1) @ v

    def _attend_with_numbers(self, q, k, v, mask):
        if self.random.random() < 0.5:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v

    def _boolean(self, depth):
        if depth == 0 or self.random.random() < 0.25:
            return self.random.choice([self._position, self._position, self._datum])()
        joins = ("and", "and", "and", "or", "not", "where", "mul", "equal", "fill", "layout", "xor")
        return self._join(self.random.choice(joins), depth - 1)

    def _join(self, name, depth):
        first = self._boolean(depth)
        if name == "not":
            return ~first
        if name == "layout":
            return self._layout(first)
        second = self._boolean(depth)
        if name == "where":
            return torch.where(first, second, self._boolean(depth))
        if name == "fill":
            return self._full(first).clone().masked_fill_(second, self.random.random() < 0.5)
        if name == "equal":
            return first == (self.random.random() < 0.5)
        functions = {"and": torch.bitwise_and, "or": torch.bitwise_or, "mul": torch.mul}
        return functions.get(name, torch.logical_xor)(first, second)

    def _full(self, mask):
        return mask.expand(B, H, self.tokens, self.keys)

    def _layout(self, mask):
        mask = self._full(mask)
        merged = mask.reshape(B * H, self.tokens, self.keys).view(mask.shape)
        variants = (
            merged,
            torch.cat([mask[..., :3], mask[..., 3:]], -1),
            mask.mT.mT,
            mask[:, :1],
            F.pad(mask, (0, 2))[..., : self.keys],
        )
        return self.random.choice(variants)

    def _position(self):
        row, column = self.row, self.column
        shift = self.random.choice([-3, -1, 0, 0, 0, 1, 2, 5])
        square = torch.ones(self.tokens, self.keys)
        triangle = self.data[6][:, :, : self.tokens, : self.keys]
        numbers = torch.arange(self.keys).unsqueeze(0).expand(B, -1)
        variants = (
            column <= row + shift,
            column < row + shift,
            column + shift > row,
            row - column <= shift,
            column > row - 4 + shift,
            (row - column).abs() <= abs(shift),
            (row + abs(shift)) // 4 == (column + abs(shift)) // 4,
            square.bool().tril(shift),
            square.triu(shift) == 0,
            triangle != 0,
            square.bool(),
            torch.zeros(1, 1, 1, 1, dtype=torch.bool),
            column < abs(shift) * 4,
            row >= shift,
            row * 2 >= column + shift,
            row // 3 >= column // 3,
            numbers[self.item, column] <= numbers[self.item, row] + shift,
            torch.cat([square[:, :4] == 1, square[:, 4:].tril(shift) == 1], -1),
            torch.cat([square[:3].tril(shift), square[3:].tril(shift + 3)]) == 1,
            square.tril(shift).index_select(0, torch.arange(self.tokens)) == 1,
        )
        return self.random.choice(variants)

    def _datum(self):
        padding, integers, documents, numbers, square, per_head, _ = self.data
        row, column, item = self.row, self.column, self.item
        runs = (torch.diff(numbers, prepend=numbers[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        variants = (
            padding[:, None, None, :],
            padding[item, column],
            integers[:, None, None, :] != 0,
            documents[:, None, : self.tokens, None] == documents[:, None, None, :],
            documents[item, row] == documents[item, column],
            documents[:, None, : self.tokens, None] != documents[:, None, None, :],
            runs[item, row] == runs[item, column],
            (runs[item, row] == runs[item, column]) & (numbers[item, column] <= numbers[item, row]),
            numbers[:, None, None, :] <= numbers[:, None, : self.tokens, None],
            square[None, None],
            per_head[:, :, None, :],
        )
        return self.random.choice(variants)

    def _numbers(self, depth):
        mask = self._boolean(depth)
        hiding = self.random.choice(HIDING)
        variants = (
            lambda: torch.where(mask, 0.0, hiding),
            lambda: torch.where(mask, torch.tensor(0.0), torch.tensor(hiding)),
            lambda: torch.zeros(1, 1, 1, 1).masked_fill(mask, hiding),
            lambda: (~mask).float() * self.random.choice([-1e9, -1e4, -100.0, 1.0]),
            lambda: (1.0 - mask.float()) * torch.finfo(torch.float32).min,
            lambda: torch.full((self.tokens, self.keys), NEG).triu(self.random.choice([0, 1, 2])),
            lambda: torch.where(mask, 0.0, hiding) + self._numbers(0),
        )
        return self.random.choice(variants)()
