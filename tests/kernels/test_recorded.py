"""The numbers are as recorded, to rounding. ``python -m tests.kernels.recorded`` also counts equal bits."""

from dataclasses import replace

import pytest

from tests.kernels.recorded import differences, digest, recorded
from tests.kernels.recorded.cases import Case, cases

CASES = cases()
SLOW = pytest.mark.slow


def test_every_case_is_recorded():
    assert [case.key for case in CASES] == list(recorded()) and len(CASES) == 200


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.key, marks=SLOW if case.backend == "triton" else ()) for case in CASES]
)
def test_same_numbers(case: Case):
    found = {name: digest(x) for name, x in case.run().items()}
    assert not differences(case.key, found, recorded()[case.key])


@pytest.mark.parametrize("case", [pytest.param(x, id=x.key) for x in CASES if x.key.endswith("float32 | torch")])
def test_loops_give_the_numbers_of_the_specification(case: Case):
    found = {name: digest(x) for name, x in replace(case, backend="loops").run().items()}
    assert not differences(case.key, found, recorded()[case.key])
