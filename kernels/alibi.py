"""Slopes of attention with linear biases (ALiBi: Press et al. 2022, arXiv:2108.12409)."""

from __future__ import annotations


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each head, for AttentionMask.alibi_slopes.

    Geometric, from 2^(-8/n) to 2^-8, where the number of heads n is a power of two. Otherwise those of the next lower
    power of two, then every other slope of the next higher one, as in the authors' code (get_slopes in
    github.com/ofirpress/attention_with_linear_biases).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; expected at least 1")
    power = 1 << (num_heads.bit_length() - 1)
    lower = (2.0 ** (-8 * i / power) for i in range(1, power + 1))
    between = (2.0 ** (-8 * i / (2 * power)) for i in range(1, 2 * power, 2))
    return (*lower, *between)[:num_heads]
