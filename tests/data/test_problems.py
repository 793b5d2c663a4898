"""Problems: right answers, splits that never meet, and every family's working."""

import pytest

from nemojax.data import problems
from nemojax.data.chat import answer_with_thinking, split_thinking
from nemojax.data.problems import FAMILIES, make_problems, verify

SMALL = {"sum2x1": 100, "caesar": 100}
SMALL_HELDOUT = {"sum2x1": 10, "caesar": 50}
ONE_COMMON_ANSWER = {"letters", "sum2x1"}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    train = make_problems(name, SMALL.get(name, 300), 0, "train")
    heldout = make_problems(name, SMALL_HELDOUT.get(name, 100), 1, "heldout")
    prompts = {p.prompt for p in train}
    assert len(prompts) == len(train) and not prompts & {p.prompt for p in heldout}
    for problem in train:
        assert problem.answer and problem.trace
        assert verify(problem, problem.answer) == 1.0
        assert verify(problem, answer_with_thinking(problem.trace, f"\n{problem.answer} ")) == 1.0
        assert verify(problem, problem.answer + " 1") == 0.0 and verify(problem, "") == 0.0
    if name not in ONE_COMMON_ANSWER:
        assert problems.commonest_answer_share(heldout) <= 0.25


@pytest.mark.parametrize("name", ["sort3", "sum2", "sum3", "bits", "base", "product"])
def test_answers_are_those_of_reasoning_gym(name):
    import itertools

    import reasoning_gym

    family = FAMILIES[name]
    scorer = reasoning_gym.create_dataset(family.dataset, size=1, seed=0, **family.settings)
    for entry in itertools.islice(problems.entries(family, 5), 50):
        _, _, answer = family.ask(entry)
        theirs = str([float(n) for n in answer.split()]) if name == "sort3" else answer
        assert scorer.score_answer(theirs, entry) == 1.0


def test_deterministic_and_different_by_seed():
    assert make_problems("sum2", 50, 0, "train") == make_problems("sum2", 50, 0, "train")
    first, second = (make_problems("sort5", 200, seed, "train") for seed in (0, 1))
    assert len({p.prompt for p in first} & {p.prompt for p in second}) < 5


def test_columns_with_carries_and_signs():
    def ask(expression, answer):
        return FAMILIES["sum2"].ask({"metadata": {"expression": expression}, "answer": answer})

    assert ask("57 + 68", "125") == ("57+68=", "7+8+0=15 5+6+1=12 is 125", "125")
    assert ask("31 - 58", "-27") == ("31-58=", "8-1-0=07 5-3-0=02 is -27", "-27")
    assert ask("52 - 18", "34")[1] == "2-8-0=14 5-1-1=03 is 34"


def test_forms():
    problem = make_problems("sort3", 1, 0, "train")[0]
    assert problems.lines(problem) == [f"{problem.prompt} {problem.answer}"]
    assert problems.lines(problem, "both")[1].endswith(f" -> {problem.answer}")
    on, off = problems.conversations([problem])
    assert (on.thinking, off.thinking) == (True, False)
    assert split_thinking(on.messages[-1]["content"]) == (problem.trace, problem.answer)
    assert off.messages[-1]["content"] == problem.answer


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown family 'sortt'; known ones are sort3"):
        make_problems("sortt", 1, 0, "train")
    with pytest.raises(ValueError, match="expected 5000 different heldout problems of sum2x1, found"):
        make_problems("sum2x1", 5000, 0, "heldout")
    assert problems.commonest_answer_share([]) == 0.0
