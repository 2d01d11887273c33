"""Random calls against the float64 reference; ``python -m tests.kernels.random_cases`` runs as many as one likes."""

import json

import pytest

from tests.kernels.random_cases import Record, run


@pytest.mark.parametrize("first", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in range(200, 1000, 200))])
def test_two_hundred(first):
    found = {}
    run(first, first + 200, found)
    assert not found


def test_a_record_goes_on_where_it_was(tmp_path):
    path = tmp_path / "cases.json"
    record = Record(path)
    record.done, record.wrong = 300, {"7": ["loss: error 1"]}
    record.save()
    again = Record(path)
    assert (again.done, again.wrong) == (300, {"7": ["loss: error 1"]})
    path.write_text(json.dumps({"drawn by": "others", "done": 300, "wrong": {}}))
    with pytest.raises(SystemExit, match="drawn by others"):
        Record(path)
