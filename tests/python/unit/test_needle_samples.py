"""Shape, placement and determinism of the needle samples."""

from __future__ import annotations

import pytest
import torch
from icecache.eval.needle import TASKS, Sample, make_samples
from icecache.eval.needle.draw import Draw
from icecache.eval.needle.haystack import Haystack
from icecache.eval.needle.records import Request
from icecache.eval.needle.samples import make_rows
from icecache.eval.needle.tasks import TRAINING_BUILDERS
from icecache.eval.needle.vocabulary import BOS, EOS, PAD, STOP, token_ids


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_has_exactly_the_length_asked_for(task: str) -> None:
    for n_tokens in (256, 1000, 4096):
        for sample in make_samples(task, n_tokens, 2, seed=1):
            assert len(sample.context) + len(sample.question) + len(sample.answer) == n_tokens
            assert len(sample.given) == len(sample.answer)
            assert sample.context[0] == BOS
            assert not {BOS, EOS, PAD} & {*sample.context[1:], *sample.question, *sample.answer}


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_the_seed_and_on_nothing_else(task: str) -> None:
    torch.manual_seed(1)
    first = make_samples(task, 300, 6, seed=5)
    torch.manual_seed(2)
    assert make_samples(task, 300, 6, seed=5) == first
    assert make_samples(task, 300, 2, seed=6) == first[4:]
    assert len({sample.prompt for sample in first}) == 6


@pytest.mark.parametrize("task", [task for task in TASKS if task not in {"mqar", "induct", "kv_rand"}])
def test_the_question_begins_where_the_context_ends(task: str) -> None:
    for sample in make_samples(task, 512, 4, seed=2):
        assert sample.question[:2] == tuple(token_ids("question :"))
        assert token_ids("question")[0] not in sample.context


@pytest.mark.parametrize("task", [task for task in TASKS if task not in {"mqar", "induct"}])
def test_needles_stand_between_sentences(task: str) -> None:
    for sample in make_samples(task, 1024, 8, seed=4):
        for start, stop in sample.evidence:
            assert start == 1 or sample.context[start - 1] in {STOP, BOS}
            assert sample.context[stop - 1] == STOP


def test_needles_stand_everywhere_in_the_context() -> None:
    samples = make_samples("passkey", 1024, 200, seed=0, rows_per_seed=50)
    depths = torch.tensor([sample.evidence[0][0] / len(sample.context) for sample in samples])
    tenths = torch.histc(depths, bins=10, min=0, max=1)
    # 200 uniform draws in ten bins: 20 +- 4.2; 5 is 3.5 standard deviations off.
    assert float(tenths.min()) >= 5


@pytest.mark.parametrize(("n_tokens", "count"), [(2048, 32), (512, 11)])
def test_kv32_holds_32_needles_where_they_fit(n_tokens: int, count: int) -> None:
    opening = tuple(token_ids("the special magic number for"))
    for sample in make_samples("kv32", n_tokens, 4, seed=9):
        starts = [i for i in range(len(sample.context)) if sample.context[i : i + 5] == opening]
        assert len(starts) == count


def test_kv_dense_is_mostly_needles() -> None:
    opening = tuple(token_ids("the special magic number for"))
    for sample in make_samples("kv_dense", 2048, 2, seed=9):
        starts = sum(sample.context[i : i + 5] == opening for i in range(len(sample.context)))
        assert starts * 15 > 0.7 * len(sample.context)


def test_only_the_recall_of_the_chase_is_given() -> None:
    for task in TASKS:
        sample = make_samples(task, 512, 1, seed=0)[0]
        given = [token for token, flag in zip(sample.answer, sample.given, strict=True) if flag]
        assert given[:2] == (token_ids("recall hop") if task == "chase8" else [])
        segments = sample.segments()
        assert [start for _, start, _ in segments] == [0, *(stop for _, _, stop in segments[:-1])]
        assert segments[-1][2] == len(sample.answer)
        for flag, start, stop in segments:
            assert set(sample.given[start:stop]) == {flag}


@pytest.mark.parametrize("task", TRAINING_BUILDERS)
def test_training_rows_ask_questions_whose_answers_stand_before(task: str) -> None:
    draw = Draw("cpu", 3)
    haystack = Haystack(draw, 1 << 14)
    for n_tokens in (128, 512):
        rows = haystack.assemble(TRAINING_BUILDERS[task](draw, Request(8, n_tokens)), n_tokens)
        assert rows.tokens.shape == rows.queries.shape == (8, n_tokens)
        assert bool((rows.queries > 0).any(1).all()), "a row without a question"
        assert int(rows.queries[:, 0].max()) == 0
        for row in range(8):
            numbers = rows.queries[row][rows.queries[row] > 0]
            assert 1 <= len(numbers.unique()) <= 200


def test_a_batch_is_the_same_rows_as_its_samples() -> None:
    rows = make_rows("vt3", 600, 4, seed=7)
    samples: list[Sample] = make_samples("vt3", 600, 4, seed=7)
    assert rows.tokens.tolist() == [list(sample.prompt + sample.answer) for sample in samples]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kv64", 512, 1), "task must be one of passkey, kv32.*got 'kv64'"),
        (("kv32", 100, 1), "n_tokens must be at least 256, got 100"),
        (("kv32", 512, 0), "n_samples .* must be at least 1, got 0"),
    ],
)
def test_impossible_wishes_are_refused_by_name(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_samples(*arguments)


def test_a_row_longer_than_the_filler_is_refused() -> None:
    haystack = Haystack(Draw("cpu", 0), 100)
    with pytest.raises(ValueError, match="n_tokens must be below"):
        haystack.filler(1, 5000)


def test_filler_of_a_batch_mixes_the_three_kinds() -> None:
    haystack = Haystack(Draw("cpu", 0), 1 << 14)
    noise = set(haystack.noise.tolist())
    rows = haystack.filler(300, 64)
    only_noise = sum(set(row) <= noise for row in rows.tolist())
    # 15 % of 300 rows: 45 +- 6.2.
    assert 20 <= only_noise <= 70
