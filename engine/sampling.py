"""placeholder until the sampling module lands"""
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. `temperature` 0 is greedy; `seed` keys Philox (64 bits)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
