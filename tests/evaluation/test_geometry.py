"""The angles and norms of the terms' gradients against plain autograd in float64, and the random projections."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from tiny import plain_rows, tiny_model, tiny_processor, tiny_samples
from torch import Tensor

from vgs.data.prompts import encode_groups
from vgs.evaluation.geometry import PAIRS, TERMS, GeometryProbe, equal_bins, measure
from vgs.evaluation.projections import WIDTH, project, random_bits
from vgs.models.families import placeholder_ids
from vgs.models.forward import score_groups
from vgs.models.heads import read_head

RESPONSES = [[20, 9, 1], [21, 22, 10, 1], [11, 1], [12, 23, 24, 1]]
BINS = 3
EXACT = 1e-6  # the norms of transformers compute in float32, whatever comes in


@cache
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A student and a wider teacher in float64."""
    return tiny_model(0).double().eval(), tiny_model(1, hidden=48).double().eval()


def probe(batch_size: int = 2, **options) -> GeometryProbe:
    student, teacher = models()
    groups = encode_groups(
        tiny_processor(), tiny_samples(4), [[ids] for ids in RESPONSES], placeholder_ids(student.config)
    )
    for group in groups:
        if "pixel_values" in group.images:
            group.images["pixel_values"] = group.images["pixel_values"].double()
    batches = [groups[first : first + batch_size] for first in range(0, len(groups), batch_size)]
    head = read_head(teacher, torch.float64)
    return GeometryProbe(student, batches, lambda part: score_groups(teacher, part), head, **options)


@cache
def reference() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """vds [N], terms [N], their gradients at the hidden states [N, D], and each token's gradient of the parameters,
    all from whole tables of logits."""
    student, teacher = models()
    processor, samples = tiny_processor(), tiny_samples(4)

    def rows(model, with_image):
        return torch.cat(
            [plain_rows(model, processor, *pair, with_image) for pair in zip(samples, RESPONSES, strict=True)]
        )

    def logps(model, hidden):
        return torch.log_softmax(hidden @ model.lm_head.weight.T, dim=-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(dim=-1)

    with torch.no_grad():
        q_image, q_text = (logps(teacher, rows(teacher, flag)) for flag in (True, False))
    image, text = rows(student, True), rows(student, False)
    p_image, p_text = logps(student, image), logps(student, text)
    steered = torch.log_softmax(p_text.detach() + q_image - q_text, dim=-1)
    terms = {"standard": kl(p_image, q_image), "language": kl(p_text, q_text), "visual": kl(p_image, steered)}
    at = {
        term: torch.autograd.grad(value.sum(), text if term == "language" else image, retain_graph=True)[0]
        for term, value in terms.items()
    }
    parameters = list(student.parameters())
    per_token = []
    for token in range(len(image)):
        entry = {}
        for term, value in terms.items():
            parts = torch.autograd.grad(
                value[token], parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            entry[term] = torch.cat([part.flatten() for part in parts])
        per_token.append(entry)
    return kl(q_image, q_text), {name: x.detach() for name, x in terms.items()}, at, per_token


def angle(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(float(a @ b / (a.norm() * b.norm()))))


def expected(space: str, chosen: Tensor) -> dict[str, Tensor]:
    """Each term's gradient over some tokens, flat."""
    _, _, at, per_token = reference()
    if space == "hidden":
        return {term: at[term][chosen].flatten() / math.sqrt(len(chosen)) for term in TERMS}
    return {term: torch.stack([per_token[n][term] for n in chosen.tolist()]).mean(dim=0) for term in TERMS}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_exact_angles_and_norms_are_those_of_autograd(batch_size):
    vds, terms, _, _ = reference()
    found = probe(batch_size)
    before = [p.grad for p in found.student.parameters()]
    record = measure(found, BINS)
    assert [p.grad for p in found.student.parameters()] == before
    torch.testing.assert_close(found.vds, vds, rtol=EXACT, atol=1e-9)
    bins = equal_bins(vds, BINS)
    assert [len(part) for part in bins] == [5, 4, 4] and record["tokens"] == 13
    for number, chosen in enumerate(bins):
        assert record["vds"][number] == pytest.approx(float(vds[chosen].mean()), rel=EXACT)
        for term in TERMS:
            assert record["terms"][term][number] == pytest.approx(float(terms[term][chosen].mean()), rel=EXACT)
    for space, chosen in itertools.product(("parameters", "hidden"), [*bins, torch.arange(13)]):
        gradients = expected(space, chosen)
        whole = len(chosen) == 13
        part = record[space]["all"] if whole else record[space]

        def at(values, whole=whole, chosen=chosen):
            return values if whole else values[next(n for n, x in enumerate(bins) if x is chosen)]

        for a, b in PAIRS:
            assert at(part["angles"][f"{a}-{b}"]) == pytest.approx(angle(gradients[a], gradients[b]), abs=1e-4)
        for term in TERMS:
            assert at(part["norms"][term]) == pytest.approx(float(gradients[term].norm()), rel=EXACT)


def test_projections_agree_within_their_errors():
    found = probe(4)
    exact, near = measure(found, BINS)["parameters"], measure(found, BINS, projections=16)["parameters"]
    assert exact["errors"] is None
    for kind, names in (("angles", near["angles"]), ("norms", near["norms"])):
        for name, values in names.items():
            for value, error, true in zip(values, near["errors"][kind][name], exact[kind][name], strict=True):
                assert 0 < error < (2.0 if kind == "angles" else 0.02 * true)
                assert abs(value - true) < 5 * error


def test_projections_are_unbiased_and_depend_on_no_split():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3 * WIDTH + 17, dtype=torch.float64)
    first, second = project([a], 32), project([b], 32)
    parts = project([a[:100].view(10, 10), a[100:5000], a[5000:]], 32)
    torch.testing.assert_close(first, parts)
    estimates = (first * second).sum(dim=1)
    error = float(estimates.std() / math.sqrt(32))
    assert abs(float(estimates.mean() - a @ b)) < 4 * error
    assert error < 3 * float(a.norm() * b.norm()) / math.sqrt(32 * WIDTH)
    assert float((first * first).sum(dim=1).mean()) == pytest.approx(float(a @ a), rel=0.02)
    assert not torch.equal(project([a], 2, seed=1), project([a], 2, seed=2))


def test_the_hash_is_fair():
    bits = random_bits(0, 40_000, 3, torch.device("cpu"))
    signs = torch.stack([(bits >> n) & 1 for n in range(32)]).double() * 2 - 1
    limit = 5 / math.sqrt(40_000)
    assert signs.mean(dim=1).abs().max() < limit  # as many of either
    assert (signs @ signs.T / 40_000 - torch.eye(32)).abs().max() < limit  # no two alike
    assert (signs[:, 1:] * signs[:, :-1]).mean(dim=1).abs().max() < limit  # nor neighbours
    torch.testing.assert_close(bits[100:200], random_bits(100, 100, 3, torch.device("cpu")))


def test_numbers_out_of_range():
    found = probe(4)
    with pytest.raises(ValueError, match=r"bins must lie in \[1, 13\], the number of tokens, got 14"):
        measure(found, 14)
    with pytest.raises(ValueError, match=r"projections must lie in \[2, 32\] or be None, got 1"):
        measure(found, 3, projections=1)
