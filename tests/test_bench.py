"""What a comparison says of itself."""

import pytest

from la.errors import InputError
from pipelines.bench import BenchResult, bench_featurize
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("ratio", "sense", "passed"),
    [(0.9, "at least", True), (0.8, "at least", False), (0.8, "at most", True), (0.9, "at most", False)],
)
def test_a_ratio_passes_on_its_side_of_the_bar(ratio, sense, passed):
    result = BenchResult("x", ratio, 0.85, sense)
    assert result.passed == passed
    assert ("passed" if passed else "FAILED") in str(result)


def test_more_photos_than_there_are_is_refused(tiny_coco, tiny_weights):
    with pytest.raises(InputError, match="--images is 99, but"):
        bench_featurize(tiny_coco, TINY["backbone"], tiny_weights, TINY["image_size"], images=99)
