"""A search finds what fails, shrinks it in the same way, remembers it, and hides no mistake."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase

import tpcheck
from tpcheck import generated
from tpcheck import search as searching
from tpcheck.errors import SubjectError
from tpcheck.records import FAIL, PASS, Check, Verdict
from tpcheck.search import failure_kind, search
from tpcheck.spec import Case, ModelSpec
from tpcheck.strategies import generated_cases, model_specs

FIELDS = {
    "vocab_size": 11,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 2,
    "max_position_embeddings": 16,
}
SPECS = st.builds(
    lambda layers, hidden: FIELDS | {"num_hidden_layers": layers, "hidden_size": hidden},
    st.integers(1, 4),
    st.integers(1, 32),
)


def verdict(case: Case, outcome: str = "PASS", check: str = "structural") -> Verdict:
    failed = Check(PASS) if outcome == "PASS" else Check(FAIL, "because")
    return Verdict(case.id, 2, "bfloat16", outcome, {check: failed})


def cases(**options):
    return generated_cases(SPECS, longest=8, **options)


def hunt(judge, limit=200, database=None, **options):
    database = InMemoryExampleDatabase() if database is None else database
    return search(cases(), judge, limit=limit, seed=0, key="subject", database=database, **options)


def wrong_above(hidden, seq_len):
    def judge(case):
        wrong = case.spec.hidden_size >= hidden and case.seq_len >= seq_len
        return [verdict(case, "WRONG" if wrong else "PASS")]

    return judge


def test_a_failure_is_shrunk_to_the_smallest_case():
    found = hunt(wrong_above(17, 3))
    assert found.failing == Case(0, 1, 3, ModelSpec(**FIELDS | {"hidden_size": 17}))
    assert found.first is not None
    assert found.tried > 1


def test_nothing_found_gives_every_verdict_in_order():
    found = hunt(lambda case: [verdict(case)], limit=20)
    assert found.failing is None
    assert len(found.passed) == found.tried <= 20


def test_a_case_is_not_shrunk_into_another_bug():
    def judge(case):
        if case.spec.hidden_size >= 17:
            return [verdict(case, "WRONG", "structural")]
        return [verdict(case, "ERROR", "schedule") if case.seq_len > 1 else verdict(case)]

    kinds = set()

    def noting(case):
        made = judge(case)
        kinds.add(failure_kind(made[-1]))
        return made

    found = hunt(noting)
    assert found.first is not None
    assert found.failing is not None
    assert failure_kind(judge(found.failing)[-1]) == failure_kind(judge(found.first)[-1])
    assert len(kinds - {None}) == 2, "both bugs were seen"


def test_a_found_failure_is_tried_first_next_time():
    database = InMemoryExampleDatabase()
    first = hunt(wrong_above(17, 3), database=database)
    assert first.tried > 2
    tried = []

    def judge(case):
        tried.append(case)
        return wrong_above(17, 3)(case)

    found = search(cases(), judge, limit=1, seed=99, key="subject", database=database)
    assert tried == [found.failing] == [first.failing]
    assert (first.remembered, found.remembered) == (False, True)


def test_the_verdict_of_a_remembered_failure_says_so(monkeypatch):
    monkeypatch.setattr(generated, "search", partial(search, database=InMemoryExampleDatabase()))

    @tpcheck.subject(specs=model_specs(2, legal=True, max_layers=1), seq_len=4)
    def build(tp, spec):
        embed = tp.weight("embed", spec.vocab_size, 8)
        return lambda ids: embed[ids] * tp.size

    first, second = (
        tpcheck.run(build, (2,), backend="sim", confirm=False, cases=3).verdicts[-1].reasons[-1]
        for _ in range(2)
    )
    assert first.startswith("smallest of ")
    assert second == "remembered from an earlier run (delete .hypothesis to forget)"


def test_a_failure_that_was_fixed_is_forgotten():
    database = InMemoryExampleDatabase()
    hunt(wrong_above(17, 3), database=database)
    (stored,) = database.data.values()
    assert len(stored) == 1
    database.save(b"tpcheck/subject", b"not a case")
    found = hunt(lambda case: [verdict(case)], limit=3, database=database)
    assert found.failing is None
    assert not any(database.data.values())


def test_another_subject_has_failures_of_its_own():
    database = InMemoryExampleDatabase()
    hunt(wrong_above(17, 3), database=database)
    found = search(cases(), wrong_above(99, 1), limit=3, seed=0, key="other", database=database)
    assert found.failing is None


def test_a_known_failure_is_no_news():
    judge = wrong_above(31, 8)
    first = hunt(judge, limit=2000)
    again = hunt(judge, limit=2000, known=frozenset({first.failing.id}))
    assert again.failing is not None
    assert again.failing != first.failing


def test_a_users_mistake_ends_the_search_at_once():
    judged = []

    def judge(case):
        judged.append(case)
        raise SubjectError("broken declaration")

    with pytest.raises(SubjectError, match="broken declaration"):
        hunt(judge)
    assert len(judged) == 1


def test_shrinking_ends(monkeypatch):
    monkeypatch.setattr(searching, "SHRINK_S", -1.0)
    judged = []

    def judge(case):
        judged.append(case)
        return wrong_above(2, 2)(case)

    found = hunt(judge)
    assert found.failing == found.first == judged[-1]


def test_batch_and_length_can_be_pinned_and_never_exceed_what_the_spec_takes():
    found = search(
        cases(batch=3, seq_len=40),
        lambda case: [verdict(case)],
        limit=5,
        seed=0,
        key="k",
        database=InMemoryExampleDatabase(),
    )
    assert {one.case_id.partition("+")[0].split("-", 1)[1] for one in found.passed} == {"b3-t16"}


@pytest.mark.parametrize("specs", [3, st.integers()])
def test_what_is_no_strategy_of_specs_is_named(specs):
    build = tpcheck.subject(vocab_size=8, specs=specs)(lambda tp, spec: None)
    with pytest.raises(SubjectError, match=r"specs(=| drew)"):
        tpcheck.run(build, (2,), backend="sim")
