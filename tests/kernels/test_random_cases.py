"""Random calls against the float64 reference; ``python -m tests.kernels.random_cases`` runs as many as one likes."""

import pytest

from tests.kernels.random_cases import run


@pytest.mark.parametrize("first", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in range(100, 1000, 100))])
def test_a_hundred(first):
    found = {}
    run(first, first + 100, found)
    assert not found
