"""The tasks and their judges, against judges of another kind. No torch in here."""

import ast
import itertools
import math
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from toy_tasks import TASKS, decode, encode

ADVERSARIAL = [
    "",
    ".",
    "....",
    "46",
    "46.",
    "46...",
    " 46.",
    "46..\n",
    "\n46..",
    "+46.",
    "046.",
    "4_6.",
    "1e1.",
    "9**9**9",
    "(" * 100_000,
    "4" * 100_000,
    "\0\0\0\0",
    "[MASK]",
    "nan.",
    "46.0",
    "٤٦..",
    "４６..",
    "４6..",
    "𝟒𝟔..",
    "46..".encode().decode("utf-16-le"),
]  # other scripts' digits


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def test_samples_keep_the_contract(task):
    """Lengths, alphabet, right references, disjoint splits; and one generator, one sample."""
    splits = {}
    for split in ("train", "test"):
        prompts, references = task.sample(np.random.default_rng(1), 2_000, split)
        assert {len(prompt) for prompt in prompts} == {task.prompt_len}
        assert {len(reference) for reference in references} == {task.completion_len}
        assert set("".join(prompts + references)) <= set(task.vocab)
        assert all(map(lambda p, r: task.reward(p, r) == 1.0, prompts, references))
        assert task.sample(np.random.default_rng(1), 2_000, split) == (
            prompts,
            references,
        )
        splits[split] = set(prompts)
    assert not splits["train"] & splits["test"]
    assert task.prompt_len % task.block_size == task.completion_len % task.block_size == 0


def test_text_and_tokens_are_one(task):
    prompts, _ = task.sample(np.random.default_rng(1), 100, "train")
    tokens = encode(task, prompts)
    assert decode(task, tokens) == prompts and tokens.dtype == np.int64
    assert decode(task, [[0, len(task.vocab)]]) == [task.vocab[0] + "_"], "[MASK] can be shown"
    with pytest.raises(ValueError, match="not in the vocabulary"):
        encode(task, ["?"])
    with pytest.raises(ValueError, match="one length"):
        encode(task, [prompts[0], ""])


# Oracles: is this completion right? ---------------------------------------------------------------


def right_sum(prompt, completion):
    """An exact sum, its one spelling, and dots up to the length."""
    length = {6: 4, 8: 4, 16: 8}[len(prompt)]
    digits = completion.rstrip(".")
    if len(completion) != length or not (digits.isascii() and digits.isdigit()):
        return False
    a, b = prompt[:-1].split("+")
    return str(int(digits)) == digits and Fraction(a) + Fraction(b) == Fraction(digits)


def right_chain(prompt, completion):
    """Six ASCII digits, of which the last two are the sum of the prompt's."""
    if len(completion) != 6 or not (completion.isascii() and completion.isdigit()):
        return False
    return sum(map(Fraction, prompt[:-1].split("+"))) == Fraction(completion[4:])


OPERATORS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
}


def evaluated(node, numbers):
    """The value of a syntax tree of numbers and + - *; it appends the numbers to a list."""
    if isinstance(node, ast.Constant):
        numbers.append(node.value)
        return Fraction(node.value)
    left, right = evaluated(node.left, numbers), evaluated(node.right, numbers)
    return OPERATORS[type(node.op)](left, right)


def right_countdown(prompt, completion):
    """Python's own parser, and fractions."""
    text, numbers = completion.rstrip("."), []
    if len(completion) != 8 or not set(text) <= set("0123456789+-*()"):
        return False
    try:
        value = evaluated(ast.parse(text, mode="eval").body, numbers)
    except (
        SyntaxError,
        KeyError,
        AttributeError,
    ):  # no expression, a sign, a call or a tuple
        return False
    given, target = prompt.split("=")
    return sorted(numbers) == sorted(map(int, given.split(","))) and value == int(target)


def right_sudoku(prompt, completion):
    """Rows, columns and boxes hold 1 to 4 each, and the givens are kept."""
    if len(completion) != 16 or not set(completion) <= set("1234"):
        return False
    cells = np.array(list(completion)).reshape(4, 4)
    groups = [*cells, *cells.T]
    for row, column in itertools.product((0, 2), repeat=2):
        groups.append(cells[row : row + 2, column : column + 2].flatten())
    kept = all(given in (".", cell) for given, cell in zip(prompt, completion))
    return kept and all(len(set(group)) == 4 for group in groups)


ORACLES = {
    "addition": right_sum,
    "addition3": right_sum,
    "addition5": right_sum,
    "chain": right_chain,
    "countdown": right_countdown,
    "sudoku": right_sudoku,
}


def random_completions(task, references, rng, n):
    """n strings: half of them of random characters of the task, a third right answers in which one
    character was replaced, or another one put in, the rest of any length and alphabet.
    """
    letters, L = np.array(list(task.vocab)), task.completion_len
    found = ["".join(row) for row in rng.choice(letters, size=(n // 2, L))]
    for _ in range(n // 3):
        right, place, letter = (
            rng.choice(references),
            rng.integers(L),
            rng.choice(letters),
        )
        found.append((right[:place] + letter + right[place + rng.integers(2) :])[:L])
    strange = np.array(list(task.vocab + "()*/-eE_ \n\t\0²½٣४𝟒é−÷×[]{}'\"\\" + "9" * 10))
    while len(found) < n:
        found.append("".join(rng.choice(strange, size=rng.integers(1, 12))))
    return found


@pytest.mark.parametrize("n", [4_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_no_completion_fools_or_stops_the_judge(task, n):
    """No exception, reward 1 for just what the oracle calls right, and no call above 2 s. (A
    judge that hangs takes seconds.)"""
    assert task.name in ORACLES, "a new task needs an independent judge here"
    rng = np.random.default_rng(0)
    prompts, references = task.sample(rng, 1_000, "train")
    completions = random_completions(task, references, rng, n) + references
    rewarded = 0
    for prompt, completion in zip(itertools.cycle(prompts), completions):
        began = time.perf_counter()
        reward = task.reward(prompt, completion)
        assert time.perf_counter() - began < 2
        assert 0.0 <= reward <= 1.0
        assert (reward == 1.0) == ORACLES[task.name](prompt, completion)
        rewarded += reward == 1.0
    assert rewarded >= 10


def test_strange_prompts_and_completions_earn_nothing(task):
    prompts, references = task.sample(np.random.default_rng(1), 1, "train")
    for prompt, completion in itertools.product(ADVERSARIAL + prompts, ADVERSARIAL):
        assert task.reward(prompt, completion) == 0.0
    for prompt in ADVERSARIAL:
        assert task.reward(prompt, references[0]) == 0.0


# Task by task -------------------------------------------------------------------------------------


def test_addition_rewards_the_sum_and_nothing_else():
    """All 10,000 prompts have their sum. Of all 13^4 completions of one prompt, one is right."""
    reward = TASKS["addition"].reward
    for a, b in itertools.product(range(100), repeat=2):
        assert reward(f"{a:02d}+{b:02d}=", f"{a + b}...."[:4]) == 1.0
        assert reward(f"{a:02d}+{b:02d}=", f"{a + b + 1}...."[:4]) == 0.0
    completions = map("".join, itertools.product(TASKS["addition"].vocab, repeat=4))
    assert [text for text in completions if reward("57+67=", text)] == ["124."]


@pytest.mark.parametrize("name", ["addition", "addition3", "addition5"])
def test_a_pair_is_held_out_in_both_orders(name):
    """And no digit decides whether it is: held-out operands end in every digit."""
    pairs = {}
    for split in ("train", "test"):
        prompts, _ = TASKS[name].sample(np.random.default_rng(0), 10_000, split)
        assert {prompt[-2] for prompt in prompts} == set("0123456789")
        pairs[split] = {tuple(sorted(prompt[:-1].split("+"))) for prompt in prompts}
    assert not pairs["train"] & pairs["test"]
    assert name != "addition" or len(pairs["test"]) == 505


def test_chain_looks_at_the_end_alone():
    reward, multisets = TASKS["chain"].reward, {}
    for text in ("122026", "120026", "000026"):
        assert reward("7+5+8+6=", text) == 1.0
    for text in ("122025", "12202.", "99 926"):
        assert reward("7+5+8+6=", text) == 0.0
    for split in ("train", "test"):
        prompts, _ = TASKS["chain"].sample(np.random.default_rng(0), 40_000, split)
        multisets[split] = {tuple(sorted(prompt)) for prompt in prompts}
    assert not multisets["train"] & multisets["test"]
    assert sum(map(len, multisets.values())) == math.comb(13, 4)


def balanced(text):
    depth = 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def test_countdown_rewards_every_right_expression_and_a_little_what_is_well_formed():
    """All strings of 5 from the characters that matter. Well formed is what Python's parser takes
    for sums and products of numbers without a sign or a zero in front."""
    reward, number = TASKS["countdown"].reward, r"\(*(0|[1-9]\d*)\)*"
    rewarded = []
    for text in map("".join, itertools.product("302+-*()", repeat=5)):
        value = reward("3,2,2=12", text + "...")
        well_formed = re.fullmatch(f"{number}([-+*]{number})*", text) and balanced(text)
        assert (value > 0) == bool(well_formed)
        if value == 1.0:
            rewarded.append(text)
    assert rewarded == ["3*2*2", "2*3*2", "2*2*3"]


COUNTDOWN = {
    "(3+8)*2.": 1.0,
    "2*(3+8).": 1.0,
    "2*(8+3).": 1.0,
    "3*8-02..": 0.0,
    "03*8-2..": 0.0,
    "3+8*2...": 0.1,
    "22......": 0.1,
    "11*2....": 0.1,
    "(3+8)*2": 0.0,
    "(3+8*2..": 0.0,
    ".3+8*2..": 0.0,
}


def test_countdown_by_hand_and_its_split():
    for text, value in COUNTDOWN.items():
        assert TASKS["countdown"].reward("3,8,2=22", text) == value
    problems = {}
    for split in ("train", "test"):
        prompts, _ = TASKS["countdown"].sample(np.random.default_rng(0), 30_000, split)
        problems[split] = {(*sorted(prompt[:5]), prompt[6:]) for prompt in prompts}
    assert not problems["train"] & problems["test"] and len(problems["test"]) == 300


def filled(cells):
    """All 4×4 grids that begin with these cells, found cell by cell."""
    if len(cells) == 16:
        return [cells]
    row, column = divmod(len(cells), 4)
    seen = set(cells[4 * row :]) | set(cells[column::4])
    for other_row in range(row // 2 * 2, row):
        begin = 4 * other_row + column // 2 * 2
        seen |= set(cells[begin : begin + 2])
    found = []
    for digit in sorted(set("1234") - seen):
        found += filled(cells + digit)
    return found


def test_sudoku_has_288_grids_a_split_by_grid_and_one_solution_each():
    task, grids, solutions = TASKS["sudoku"], filled(""), {}
    for split in ("train", "test"):
        solutions[split] = set(task.sample(np.random.default_rng(0), 9_000, split)[1])
    assert len(grids) == 288 and solutions["train"] | solutions["test"] == set(grids)
    assert not solutions["train"] & solutions["test"] and len(solutions["test"]) == 28
    for puzzle, solution in zip(*task.sample(np.random.default_rng(1), 300, "test")):
        pattern = re.compile(puzzle)  # a dot fits every digit
        assert [grid for grid in grids if pattern.fullmatch(grid)] == [solution]
        assert puzzle.count(".") == 4


def test_sudoku_rewards_right_cells_and_punishes_overwritten_givens():
    (puzzle,), (solution,) = TASKS["sudoku"].sample(np.random.default_rng(1), 1, "test")
    reward = TASKS["sudoku"].reward
    for place, given in enumerate(puzzle):
        wrong = str(int(solution[place]) % 4 + 1)
        changed = solution[:place] + wrong + solution[place + 1 :]
        assert reward(puzzle, changed) == (3 / 4 if given == "." else 4 / 5)
    assert reward(puzzle, puzzle) == reward("." * 16, solution) == reward(solution, solution) == 0
