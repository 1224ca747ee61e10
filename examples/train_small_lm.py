"""Train the small language model that the demo runs on, from Python's own standard library.

A byte-level BPE tokenizer and a 3.7-million-parameter Llama with grouped-query heads, context
8,192 tokens. Lines such as ``KEY_abcdef = 12345`` are planted twice in every training sequence, so
that the model learns to find a line again thousands of tokens later.

    python examples/train_small_lm.py --minutes 2          # one H200; writes examples/small_lm

Expected last lines (loss in nats per token on files that training never saw):

    tokens 2048: loss 2.09, retrieval 1.00
    tokens 4096: loss 1.94, retrieval 1.00
    tokens 8192: loss 1.82, retrieval 1.00
    wrote examples/small_lm (7.6 MB)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from seer_compile import corpus, retrieval

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CONTEXT = 8192
# The value at the second occurrence is the only part of a sequence that needs long-range attention.
VALUE_WEIGHT = 4.0
# No planted line is longer than this; the trainer plants one line per slot.
SLOT = 32


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training at one sequence length."""

    share: float
    """Part of the time, in (0, 1]; the shares sum to 1."""
    length: int
    batch: int
    keys: int
    near: float
    """Share of the sequences in which both occurrences of a key stand close together."""


PHASES = (
    # Copying is learned first where it is easy: many keys, short distances.
    Phase(share=0.35, length=2048, batch=32, keys=16, near=0.5),
    Phase(share=0.65, length=CONTEXT, batch=16, keys=32, near=0.1),
)
TINY_PHASES = (
    Phase(share=0.5, length=512, batch=2, keys=4, near=0.5),
    Phase(share=0.5, length=1024, batch=1, keys=4, near=0.1),
)


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer that keeps every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[corpus.END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Return the untrained model, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(corpus.END_OF_FILE),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        attn_implementation="sdpa",
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def forward(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return hidden states after the last norm, ``Float[b t hidden]``.

    The layers are called without a mask: traced through ``model(...)``, the mask would be a
    ``t x t`` tensor and the attention no longer the fast causal kernel.
    """
    hidden = model.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    for layer in model.model.layers:
        hidden = layer(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary
        )
    return model.model.norm(hidden)


def weighted_loss(model: LlamaForCausalLM, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token, weighted by ``weights [b t]``."""
    hidden = forward(model, tokens)
    logits = model.lm_head(hidden)[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Random cuts of the token stream with planted keys: endless, one batch per item."""

    def __init__(
        self, stream: np.ndarray, lines: list[retrieval.KeyLine], phase: Phase, seed: int
    ) -> None:
        self._stream = stream
        self._lines = lines
        self._phase = phase
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens ``Int64[b t]`` and loss weights ``Float[b t]`` without end."""
        worker = get_worker_info()
        number = worker.id if worker else 0
        generator = np.random.default_rng((self._seed, self._phase.length, number))
        while True:
            yield self._draw(self._phase, generator)

    def _draw(self, phase: Phase, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        shape = (phase.batch, phase.length)
        tokens, weights = np.empty(shape, np.int64), np.ones(shape, np.float32)
        for row in range(phase.batch):
            start = int(generator.integers(0, len(self._stream) - phase.length))
            tokens[row] = self._stream[start : start + phase.length]
            is_near = generator.random() < phase.near
            self._plant(tokens[row], weights[row], phase.keys, is_near, generator)
        return torch.from_numpy(tokens), torch.from_numpy(weights)

    def _plant(
        self,
        tokens: np.ndarray,
        weights: np.ndarray,
        keys: int,
        is_near: bool,
        generator: np.random.Generator,
    ) -> None:
        """Write each key twice, in place; what nobody can predict gets weight 0."""
        slots = generator.permutation(len(tokens) // SLOT)[: 2 * keys]
        slots = np.sort(slots) if is_near else slots
        pairs = np.sort(slots.reshape(keys, 2), axis=1)
        for pair in pairs:
            line = self._lines[int(generator.integers(0, len(self._lines)))]
            for occurrence, slot in enumerate(pair):
                space = SLOT - len(line.tokens)
                start = int(slot) * SLOT + int(generator.integers(0, space + 1))
                span = slice(start, start + len(line.tokens))
                tokens[span] = line.tokens
                weights[span] = float(occurrence)
                if occurrence:
                    value = slice(start + line.value.start, start + line.value.stop)
                    weights[value] = VALUE_WEIGHT


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate at a share of the training time: short warm-up, flat, then down to 0."""
    if progress < 0.02:
        return peak * max(progress / 0.02, 0.01)
    if progress < 0.5:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - 0.5) / 0.5, 1.0)))


def make_optimizer(model: LlamaForCausalLM, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


class BestWeights:
    """Keeps the weights that do best on held-out text: the corpus is small enough to overfit."""

    def __init__(self, model: LlamaForCausalLM, score: Callable[[], float]) -> None:
        self._model = model
        self._score = score
        self._best = math.inf
        self._weights: dict[str, Tensor] = {}

    def look(self) -> None:
        """Measure the model as it is; remember it if it is the best so far."""
        score = self._score()
        print(f"        held-out score {score:.4f}", flush=True)
        if score < self._best:
            self._best = score
            self._weights = {k: v.clone() for k, v in self._model.state_dict().items()}

    def restore(self) -> None:
        """Put the best weights back."""
        self.look()
        self._model.load_state_dict(self._weights)


def train(
    model: LlamaForCausalLM,
    data: Callable[[Phase], Iterable[tuple[Tensor, Tensor]]],
    phases: tuple[Phase, ...],
    args: argparse.Namespace,
    best: BestWeights,
) -> None:
    """Train for ``args.minutes``, compiling included."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, device)
    step_loss: Callable[..., Tensor] = weighted_loss
    if args.compile:
        step_loss = torch.compile(weighted_loss, dynamic=False)
    begun = time.perf_counter()
    total, done, tokens_seen = 60 * args.minutes, 0.0, 0
    for phase in phases:
        until = done + phase.share
        for step, (cpu_tokens, cpu_weights) in enumerate(data(phase), start=1):
            progress = (time.perf_counter() - begun) / total
            if progress >= until and step > 1:
                break
            tokens = cpu_tokens.to(device, non_blocking=True)
            weights = cpu_weights.to(device, non_blocking=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.learning_rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = step_loss(model, tokens, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens_seen += tokens.numel()
            if phase is phases[-1] and step % args.look_every == 0:
                best.look()
            # Reading the loss waits for the device, so the clock does not run ahead of the work.
            if step % 20 == 0 or step < 3:
                value = loss.item()
                if step % 200 == 0 or step < 3:
                    rate = tokens_seen / (time.perf_counter() - begun)
                    print(
                        f"{progress:6.1%}  length {phase.length}  step {step}  loss {value:.3f}  "
                        f"{rate / 1e3:.0f}k tokens/s",
                        flush=True,
                    )
        done = until
    best.restore()


@torch.no_grad()
def measure(
    model: LlamaForCausalLM,
    stream: np.ndarray,
    tokenizer: Tokenizer,
    length: int,
    sequences: int,
) -> tuple[float, float]:
    """Return the loss on ordinary held-out tokens and the share of planted keys retrieved."""
    device = next(model.parameters()).device
    loss, counted, found, keys = 0.0, 0, 0, 16
    for index in range(sequences):
        start = index * max((len(stream) - length) // max(sequences - 1, 1), 1)
        planted = retrieval.plant_keys(
            stream[start : start + length], tokenizer, keys=keys, seed=index
        )
        tokens = torch.from_numpy(planted.tokens)[None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model.lm_head(forward(model, tokens))[0].float()
        losses = F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none").cpu().numpy()
        ordinary = planted.ordinary[1:]
        loss += float(losses[ordinary].sum())
        counted += int(ordinary.sum())
        found += retrieval.count_retrieved(logits.argmax(-1).cpu().numpy(), planted)
    return loss / counted, found / (keys * sequences)


def save(
    model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, record: dict[str, object]
) -> None:
    """Write the model in bfloat16, the tokenizer and how they came about."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=corpus.END_OF_FILE, model_max_length=CONTEXT
    )
    wrapped.save_pretrained(folder)
    # Written compactly: the pretty form is three times as long.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "small_lm")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--look-every", type=int, default=100, help="steps between measurements")
    parser.add_argument(
        "--library", type=Path, help="folder of the standard library; this Python's when absent"
    )
    parser.add_argument("--max-files", type=int, help="use only so many files, for a quick try")
    parser.add_argument("--tiny", action="store_true", help="short sequences, for a quick try")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, measure and save; return loss and retrieval for each length."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    files = corpus.standard_library_files(held_out=False, root=args.library)[: args.max_files]
    tokenizer = train_tokenizer(iter(list(corpus.read_texts(files))), args.vocabulary)
    stream = corpus.encode_files(files, tokenizer)
    held_out_files = corpus.standard_library_files(held_out=True, root=args.library)[
        : args.max_files
    ]
    held_out = corpus.encode_files(held_out_files, tokenizer)
    model = build_model(args, tokenizer).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(stream):,} tokens to train on, {len(held_out):,} kept out, "
        f"{parameters:,} parameters, {device}",
        flush=True,
    )
    generator = random.Random(args.seed)
    count = 1000 if args.tiny else 100_000
    lines = [retrieval.draw_key_line(tokenizer, generator) for _ in range(count)]
    phases = TINY_PHASES if args.tiny else PHASES

    def data(phase: Phase) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            Batches(stream, lines, phase, args.seed),
            batch_size=None,
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
        )

    def score() -> float:
        loss, found = measure(model, held_out, tokenizer, phases[-1].length, 4)
        return loss + 1 - found

    train(model, data, phases, args, BestWeights(model, score))

    # What is stored is what is measured.
    model.to(torch.bfloat16).eval()
    measured = model if device.type == "cuda" else model.float()
    results: dict[str, dict[str, float]] = {}
    for length in (1024,) if args.tiny else (2048, 4096, 8192):
        loss, found = measure(measured, held_out, tokenizer, length, 2 if args.tiny else 16)
        results[str(length)] = {"loss": round(loss, 4), "retrieval": round(found, 4)}
        print(f"tokens {length}: loss {loss:.4f}, retrieval {found:.3f}", flush=True)
    record = {
        "results": results,
        "minutes": args.minutes,
        "parameters": parameters,
        "training_tokens": len(stream),
        "held_out_tokens": len(held_out),
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    save(model.to(torch.bfloat16), tokenizer, args.out, record)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"wrote {args.out} ({size / 1e6:.1f} MB)")
    return results


if __name__ == "__main__":
    main()
