"""How the query of a test episode is drawn. A protocol names one of QUERY_DRAWS (`la.episodes.protocols`).

To draw queries otherwise, add a function here and name it in a protocol of your own.
"""

from collections.abc import Callable

from la.episodes.chance import Uniform, pick, sample
from la.episodes.pool import Pool

# (pool, ways, shots, chance of the episode, chance that all episodes of a seed share)
# -> (the query's class, the query, the classes that the others may be drawn from)
QueryDraw = Callable[[Pool, int, int, Uniform, Uniform], tuple[int, int, list[int]]]


def by_class(
    pool: Pool, ways: int, shots: int, uniform: Uniform, of_seed: Uniform, usable: list[int] | None = None
) -> tuple[int, int, list[int]]:
    """A class first, each as likely, then an image that shows it (HSNet)."""
    usable = pool.usable(shots) if usable is None else usable
    first = pick(usable, uniform)
    return first, pick(pool.images_of[first], uniform), usable


def by_image(pool: Pool, ways: int, shots: int, uniform: Uniform, of_seed: Uniform) -> tuple[int, int, list[int]]:
    """An image first, each as likely, then a class on it (PFENet)."""
    query, usable = pick(pool.images_showing(shots), uniform), pool.usable(shots)
    return pick([c for c in pool.classes_in[query] if c in usable], uniform), query, usable


def by_run(pool: Pool, ways: int, shots: int, uniform: Uniform, of_seed: Uniform) -> tuple[int, int, list[int]]:
    """As `by_class`, of the N classes that all episodes of a seed share (PANet)."""
    return by_class(pool, ways, shots, uniform, of_seed, sample(pool.usable(shots), ways, of_seed))


QUERY_DRAWS: dict[str, QueryDraw] = {"class": by_class, "image": by_image, "run": by_run}
