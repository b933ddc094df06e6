"""Draws from lists by `uniform`, a function that gives numbers in [0, 1)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Uniform = Callable[[], float]


def pick(items: Sequence[T], uniform: Uniform) -> T:
    """One of the items, each as likely."""
    return items[int(uniform() * len(items))]


def sample(items: Sequence[T], count: int, uniform: Uniform) -> list[T]:
    """`count` different items in random order, fewer where there are fewer."""
    rest = list(items)
    drawn = []
    for _ in range(min(count, len(rest))):
        k = int(uniform() * len(rest))
        drawn.append(rest[k])
        rest[k] = rest[-1]
        rest.pop()
    return drawn


def shuffle(items: list, uniform: Uniform) -> None:
    """Put the items into random order, in place."""
    items[:] = sample(items, len(items), uniform)
