"""The learning rate of each step."""

from __future__ import annotations

import math

from seer_compile.config import CalibrationConfig

_LAST_PART = 0.2


def learning_rate(step: int, config: CalibrationConfig) -> float:
    """Return the rate of a step counted from 0: linear warm-up, then a fall to the final rate.

    Example:
        >>> config = CalibrationConfig(steps=10, warmup_steps=2, learning_rate=1.0,
        ...                            final_learning_rate=0.1)
        >>> [round(learning_rate(step, config), 2) for step in (0, 1, 2, 9)]
        [0.5, 1.0, 1.0, 0.1]
    """
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup - 1)
    progress = min(progress, 1.0)
    share = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "flat": min(1.0, (1 - progress) / _LAST_PART),
    }[config.schedule]
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * share
