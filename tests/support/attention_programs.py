"""Attention written down at random: layouts, products, scales, masks, casts and dropout composed.

A program knows what it means, so it says itself whether it must be replaced. ``Shuffled`` programs
know nothing: their axes have one size and random order, so that every mistake about axes runs, and
shows in the numbers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.types import SkipCode
from support.graphs import causal, repeat_kv

NEG = float("-inf")
SIZES = {"b": (1, 2, 3), "g": (1, 2), "r": (1, 2), "q": (4, 9, 20), "d": (4, 8), "v": (4, 8, 5)}
SPOILED = {
    "bias": SkipCode.FLOAT_BIAS,
    "squared_weights": SkipCode.AMBIGUOUS,
    "learned_scale": SkipCode.SCALE,
    "two_readers": SkipCode.WEIGHTS_ESCAPE,
}
CHOICES = {
    "layout": ("bhtd", "bthd", "merged", "packed", "grouped_5d"),
    "repeat": ("expand", "interleave"),
    "scale": ("query", "key", "logits_mul", "logits_div", "tensor", "none", "twice"),
    "product": ("matmul", "einsum", "transposed", "bmm", "baddbmm"),
    "mask": ("none", "causal", "window", "padding", "both", "arbitrary"),
    "mask_form": ("add_inf", "add_large", "fill_inf", "fill_lowest", "where", "fill_in_place"),
    "widened": ("no", "operands", "logits", "softmax"),
    "detour": ("none", "view", "permute", "maximum", "shift", "floor", "dropout", "clone"),
    "spoiler": (*["none"] * 6, "softcap", *SPOILED),
    "weights": ("plain", "dropout", "nan_to_num", "view", "clone"),
    "values": ("matmul", "einsum", "transposed", "einsum_reordered"),
    "result": ("as_it_is", "tokens_first", "merged"),
}


@dataclass
class Program:
    """One spelling; ``form`` holds a value per key of ``CHOICES``."""

    seed: int
    form: dict[str, str] = field(init=False)
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.form = {name: draw.choice(values) for name, values in CHOICES.items()}
        self.sizes = {name: draw.choice(values) for name, values in SIZES.items()}
        self.sizes["k"] = self.sizes["q"] if draw.random() < 0.6 else draw.choice((7, 12))
        self.form["sink"] = draw.choice(("none", "none", "column"))

    @property
    def reasons(self) -> set[SkipCode]:
        """Why the site must stay dense; empty where it must be replaced."""
        opaque = {SkipCode.OPAQUE_MASK} if self.form["mask"] == "arbitrary" else set[SkipCode]()
        form, found = self.form, opaque
        if form["spoiler"] in SPOILED:
            found |= {SPOILED[form["spoiler"]]}
        if form["spoiler"] == "softcap" and form["product"] == "baddbmm" and form["mask"] != "none":
            found |= {SkipCode.SOFTCAP}
        if form["sink"] == "column" and form["detour"] in ("maximum", "shift"):
            found |= {SkipCode.SINK_LOGIT}
        return found

    @property
    def merges_heads_with_sinks(self) -> bool:
        """Whether one dimension holds the heads that sinks differ by, and a batch of one item.

        What is heads there only their number tells, which a symbolic one does not.
        """
        is_merged = self.form["product"] in ("bmm", "baddbmm") and self.sizes["b"] == 1
        return self.form["sink"] == "column" and is_merged

    @property
    def heads(self) -> int:
        return self.sizes["g"] * self.sizes["r"]

    def inputs(self) -> list[Tensor]:
        """Query, key, value (batch x heads x tokens x dim), padding, bias, learned scale, sinks."""
        s, generator = self.sizes, torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        padding = torch.rand(s["b"], s["k"], generator=generator) > 0.3
        padding[:, 0] = True
        return [
            normal(s["b"], self.heads, s["q"], s["d"]),
            normal(s["b"], s["g"], s["k"], s["d"]),
            normal(s["b"], s["g"], s["k"], s["v"]),
            padding,
            normal(s["q"], s["k"]),
            normal(1).exp(),
            normal(self.heads),
        ]

    def __call__(self, q, k, v, padding, bias, learned, sinks):
        """Run it."""
        q, k, v = (self._laid_out(x) for x in (q, k, v))
        k, v = (self._repeated(x) for x in (k, v))
        is_split = self.form["layout"] == "grouped_5d"
        if is_split:
            q = q.unflatten(1, (self.sizes["g"], self.sizes["r"]))
            k, v = (x.unflatten(1, (self.sizes["g"], self.sizes["r"])) for x in (k, v))
        hidden = self._hidden(q, k, padding)
        if hidden is not None and is_split and hidden.ndim > 2:
            hidden = hidden.unsqueeze(1)
        logits = self._logits(q, k, hidden)
        if self.form["spoiler"] == "bias":
            logits = logits + bias
        if self.form["spoiler"] == "learned_scale":
            logits = logits * learned
        if self.form["spoiler"] == "softcap":
            logits = torch.tanh(logits / 20.0) * 20.0
        if hidden is not None and self.form["product"] != "baddbmm":
            logits = self._masked(logits, hidden)
        logits = self._detour(logits)
        if self.form["sink"] == "column":
            column = sinks.view(*logits.shape[1:-2], 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, column], -1)
        weights = self._weights(logits).to(v.dtype)
        out = self._combined(weights, v)
        out = out.flatten(1, 2) if is_split else out
        out = self._finished(out)
        return (out, weights.sum()) if self.form["spoiler"] == "two_readers" else out

    def _laid_out(self, x: Tensor) -> Tensor:
        """Return ``b h t d`` by way of the layout's own strides or merges."""
        layout = self.form["layout"]
        b, h, t, d = x.shape
        if layout == "bthd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "merged":
            return x.reshape(b * h, t, d).view(b, h, t, d)
        if layout == "packed":
            wide = torch.stack([x, x + 1, x - 1], 3)
            return wide.unbind(3)[0]
        return x

    def _repeated(self, x: Tensor) -> Tensor:
        count = self.sizes["r"]
        if self.form["repeat"] == "interleave":
            return x.repeat_interleave(count, dim=1)
        return repeat_kv(x, count) if count > 1 else x

    def _hidden(self, q: Tensor, k: Tensor, padding: Tensor) -> Tensor | None:
        """Return ``Bool``, True where a key is hidden; broadcasts to ``b h q k``."""
        mask = self.form["mask"]
        rows = torch.arange(q.shape[-2])[:, None]
        columns = torch.arange(k.shape[-2])[None, :]
        visible = {
            "causal": lambda: causal(q, k),
            "window": lambda: (columns <= rows + 1) & (columns > rows - 5),
            "padding": lambda: padding[:, None, None, :],
            "both": lambda: causal(q, k) & padding[:, None, None, :],
            "arbitrary": lambda: (rows * columns) % 3 != 1,
        }
        return None if mask == "none" else ~visible[mask]()

    def _logits(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
        scale, product = self.form["scale"], self.form["product"]
        number = 1 / math.sqrt(q.shape[-1])
        if self.form["widened"] == "operands":
            q, k = q.double(), k.double()
        if scale in ("query", "twice"):
            q = q * number
        if scale == "key":
            k = k / 2.0
        logits = self._product(q, k, product, hidden)
        if self.form["widened"] == "logits":
            logits = logits.double()
        if scale in ("logits_mul", "twice"):
            logits = logits * 0.7
        if scale == "logits_div":
            logits = logits / 3.0
        if scale == "tensor":
            logits = logits / torch.tensor(float(q.shape[-1])).sqrt()
        return logits

    def _product(self, q: Tensor, k: Tensor, product: str, hidden: Tensor | None) -> Tensor:
        lead = "bgr" if q.ndim == 5 else "bh"
        if product == "einsum":
            return torch.einsum(f"{lead}id,{lead}jd->{lead}ij", q, k)
        if product == "transposed":
            return (k @ q.mT).mT
        if product in ("bmm", "baddbmm"):
            shape = (*q.shape[:-1], k.shape[-2])
            flat_q, flat_k = q.flatten(0, -3), k.flatten(0, -3)
            if product == "bmm" or hidden is None:
                return torch.bmm(flat_q, flat_k.mT).view(shape)
            # Behind a scale below 1 a mask must be lower to hide.
            mask = torch.zeros(shape, dtype=q.dtype).masked_fill(hidden, -1e9).flatten(0, -3)
            return torch.baddbmm(mask, flat_q, flat_k.mT, alpha=0.5).view(shape)
        return q @ k.mT

    def _masked(self, logits: Tensor, hidden: Tensor) -> Tensor:
        form = self.form["mask_form"]
        if form in ("add_inf", "add_large"):
            number = NEG if form == "add_inf" else -1e6
            return logits + torch.zeros(hidden.shape, dtype=logits.dtype).masked_fill(
                hidden, number
            )
        if form == "fill_in_place":
            return logits.clone().masked_fill_(hidden, NEG)
        if form == "where":
            return torch.where(hidden, -1e9, logits)
        return logits.masked_fill(
            hidden, NEG if form == "fill_inf" else torch.finfo(logits.dtype).min
        )

    def _detour(self, logits: Tensor) -> Tensor:
        detours = {
            "none": lambda: logits,
            "view": lambda: logits.flatten(0, -3).view(logits.shape),
            "permute": lambda: logits.mT.contiguous().mT,
            "maximum": lambda: logits - logits.amax(-1, keepdim=True),
            "shift": lambda: logits - 2.5,
            "floor": lambda: logits.clamp(min=-3e38),
            "dropout": lambda: F.dropout(logits, 0.3, training=False),
            "clone": logits.clone,
        }
        return detours[self.form["detour"]]()

    def _weights(self, logits: Tensor) -> Tensor:
        if self.form["widened"] == "softmax":
            weights = F.softmax(logits, dim=-1, dtype=torch.float64)
        else:
            weights = logits.softmax(-1)
        if self.form["sink"] == "column":
            weights = weights[..., :-1]
        if self.form["spoiler"] == "squared_weights":
            weights = weights * weights
        how = self.form["weights"]
        if how == "dropout":
            return F.dropout(weights, 0.3, training=False)
        if how == "nan_to_num":
            return weights.nan_to_num(0.0)
        if how == "view":
            return weights.flatten(0, -3).view(weights.shape)
        return weights.clone() if how == "clone" else weights

    def _combined(self, weights: Tensor, v: Tensor) -> Tensor:
        how = self.form["values"]
        lead = "bgr" if v.ndim == 5 else "bh"
        if how == "transposed":
            return (v.mT @ weights.mT).mT
        if how == "einsum":
            return torch.einsum(f"{lead}ij,{lead}jd->{lead}id", weights, v)
        if how == "einsum_reordered":
            return torch.einsum(f"{lead}jd,{lead}ij->i{lead}d", v, weights).movedim(0, -2)
        return weights @ v

    def _finished(self, out: Tensor) -> Tensor:
        if self.form["result"] == "as_it_is":
            return out
        out = out.transpose(1, 2)
        return out.reshape(*out.shape[:2], -1) if self.form["result"] == "merged" else out


@dataclass
class Shuffled:
    """Two products around a softmax whose axes, all of one size, come in random order."""

    seed: int
    size: int = 4

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        letters = draw.choice(("bh", "b", "bgr"))
        roles = {
            "query": f"{letters}id",
            "key": f"{letters}jd",
            "logits": f"{letters}ij",
            "value": f"{letters}jv",
            "result": f"{letters}iv",
        }
        self.terms = {role: "".join(draw.sample(text, len(text))) for role, text in roles.items()}
        if draw.random() < 0.4:
            # A letter of one operand becomes another: mostly no attention, or another one.
            role = draw.choice(("key", "value", "query"))
            text = self.terms[role]
            unused = [letter for letter in f"{letters}ijdv" if letter not in text]
            self.terms[role] = text.replace(draw.choice(text), draw.choice(unused), 1)
        self.axis = draw.choice((self.terms["logits"].index("j"), draw.randrange(len(letters) + 2)))
        order = list(range(len(letters) + 2))
        self.moves = [draw.sample(order, len(order)) for _ in range(2)]
        self.is_moved = draw.random() < 0.5

    def inputs(self) -> list[Tensor]:
        """Query, key, value."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.size,) * len(self.terms[role]) for role in ("query", "key", "value")]
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def __call__(self, q, k, v):
        """Run it."""
        terms = self.terms
        logits = torch.einsum(f"{terms['query']},{terms['key']}->{terms['logits']}", q, k)
        weights = (logits * 0.5).softmax(self.axis)
        if self.is_moved:
            # Two orders that need not undo each other; sizes do not tell.
            weights = weights.permute(self.moves[0]).permute(self.moves[1])
        return torch.einsum(f"{terms['logits']},{terms['value']}->{terms['result']}", weights, v)
