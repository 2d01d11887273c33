"""Planted faults are in lines that are there, so that a list that has grown old shows."""

from pathlib import Path

from tests.mutations.__main__ import check
from tests.mutations.faults import MUTATIONS


def test_every_fault_changes_one_line():
    check(Path(__file__).parents[1], MUTATIONS)
