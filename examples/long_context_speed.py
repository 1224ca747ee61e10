"""Time a forward over a long context, dense and sparse, on a GPU.

The model has the shape of an 8-billion-parameter Llama, cut to a few layers, with random weights;
the untrained gate selects. Time depends on shapes and density, not on what the weights know.

    python examples/long_context_speed.py --lengths 16384 32768 131072 --density 0.1

Expected lines, one per length, before the report of the sites:

    32,768 tokens: dense ... ms, sparse ... ms (... x)
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import seer_compile


def build_model(layers: int, longest: int) -> nn.Module:
    """Return the decoder stack in bfloat16 on the GPU, without a language head."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=longest,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("cuda"):
        return LlamaModel(config).to(torch.bfloat16).eval()


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call on the GPU, after two calls that warm up."""
    times: list[float] = []
    for attempt in range(2 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if attempt >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def main(lengths: list[int], density: float = 0.1, layers: int = 4) -> dict[int, float]:
    """Print times per length; return the speed-ups."""
    if not torch.cuda.is_available():
        raise SystemExit("this example times a GPU, and there is none")
    model = build_model(layers, max(lengths))
    compiled_dense = torch.compile(model)
    speed_ups: dict[int, float] = {}
    inputs: dict[int, Tensor] = {
        length: torch.randint(0, 1024, (1, length), device="cuda") for length in lengths
    }
    dense = {
        length: milliseconds(lambda tokens=tokens: compiled_dense(tokens))
        for length, tokens in inputs.items()
    }
    fraction = seer_compile.GateConfig(selector=seer_compile.Fraction(density=density))
    model = seer_compile.optimize(model, config=fraction, zero_shot=True)
    for length, tokens in inputs.items():
        sparse = milliseconds(lambda tokens=tokens: model(tokens))
        speed_ups[length] = dense[length] / sparse
        print(
            f"{length:,} tokens: dense {dense[length]:.1f} ms, sparse {sparse:.1f} ms "
            f"({speed_ups[length]:.2f} x)"
        )
    print(seer_compile.seer_report(model))
    return speed_ups


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    main(args.lengths, density=args.density, layers=args.layers)
