"""A covering design is small and leaves no pair out."""

import itertools

from covering import covering, on_backends, pairwise


def pairs(cases):
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


def test_every_pair_meets():
    cases = list(itertools.product(range(4), range(3), range(3), range(2)))
    chosen = covering(cases, lambda case: {str(i): x for i, x in enumerate(case)})
    assert pairs(chosen) == pairs(cases)
    assert 12 <= len(chosen) <= 16 and len(cases) == 72


def test_the_rest_is_slow():
    mark = pairwise(x="abc", y=(1, 2, 3), z=(True, False))
    names, params = mark.args
    assert names == ("x", "y", "z") and len(params) == 18
    quick = [param.values for param in params if not param.marks]
    assert pairs(quick) == pairs([param.values for param in params])
    assert len(quick) <= 10 and params[0].id == "a-1-True"


def test_only_the_specification_is_not_thinned_out():
    quick = [x.values for x in on_backends(x="abc", y=(1, 2, 3), z=(True, False)).args[1] if not x.marks]
    apart = {name: [values[1:] for values in quick if values[0] == name] for name in ("torch", "loops", "triton")}
    assert len(apart["torch"]) == 18 and 9 <= len(apart["triton"]) <= 10
    assert pairs(apart["torch"]) == pairs(apart["triton"]) and apart["loops"] == apart["triton"]
