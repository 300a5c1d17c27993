"""rate_factor: the learning rate as a pure function of the step."""

import math

from recipes import Stage


def rate_factor(stage: Stage, step: int) -> float:
    """By what every learning rate of the stage is multiplied in a step, from 0 to 1.

    In the `warmup` first steps 1/warmup, 2/warmup, ..., 1. Then 1 ("constant"), or half a cosine
    that would be at `lr_floor` one step after the last, which so is not a step of rate 0.

    Args:
        stage: what is trained.
        step: from 0.

    Raises:
        ValueError: the stage has no such step.
    """
    if not 0 <= step < stage.num_steps:
        raise ValueError(f"stage {stage.name!r} has steps 0 to {stage.num_steps - 1}, not {step}")
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return 1.0
    begin = max(stage.warmup - 1, 0)  # the step at the top
    progress = (step - begin) / (stage.num_steps - begin)
    return stage.lr_floor + (1 - stage.lr_floor) * (1 + math.cos(math.pi * progress)) / 2
