r"""Countdown: reach the target with all three numbers and + - * ( ).

    "3,8,2=22" -> "(3+8)*2."      "5,1,9=14" -> "5*1+9..."

Why it looks like this:
  * The target has two digits, so every prompt has 8 characters. Answers are filled up with "." to 8.
    Several may be right: 2*(8+3) as well.
  * The reward is 1 if each number is used once and the target is hit, and 0.1 if the expression is
    only well formed, be it a lone digit. The judge parses; it runs no code.

The runs of the results page:

    python stabledrl.py --task countdown --base_accuracy 0.2 --d_model 96 --prompts 16 --lr 3e-5 \
        --masks coupled --copies 2
"""

import functools
import itertools
import operator
import re

import numpy as np

name = "countdown"
vocab = "0123456789+-*()=,."
prompt_len, completion_len, block_size = 8, 8, 2

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_FORMS = ("{a}{x}{b}{y}{c}", "({a}{x}{b}){y}{c}", "{a}{x}({b}{y}{c})")


def _parse(text):
    """The value of an expression over + - * ( ) with the usual precedence, in linear time.
    ValueError if the text is no expression."""
    tokens = ["end", *re.findall(r"[0-9]+|.", text, re.S)[::-1]]  # the last one is read next

    def series(symbols, part):  # part (symbol part)*, from left to right
        value = part()
        while tokens[-1] in symbols:
            combine = _OPERATORS[tokens.pop()]
            value = combine(value, part())
        return value

    def atom():  # a number without a zero in front, or a sum in parentheses
        token = tokens.pop()
        if re.fullmatch("0|[1-9][0-9]*", token):
            return int(token)
        if token == "(":
            value = total()
            if tokens.pop() == ")":
                return value
        raise ValueError(f"{token!r} is out of place")

    def product():
        return series(("*",), atom)

    def total():
        return series(("+", "-"), product)

    value = total()
    if tokens != ["end"]:
        raise ValueError(f"{tokens[-1]!r} is out of place")
    return value


@functools.cache
def _problems():
    """{"test": .., "train": ..}: lists of ((*digits, target), the correct expressions of _FORMS),
    split by digits and target: about one in seven is a test problem."""
    found = {}
    for a, b, c in itertools.product(range(1, 10), repeat=3):
        for x, y in itertools.product("+-*", repeat=2):
            for form in _FORMS:
                text = form.format(a=a, b=b, c=c, x=x, y=y)
                value = _parse(text)
                if 0 <= value <= 99:
                    problem = (*sorted((a, b, c)), value)
                    found.setdefault(problem, []).append(text)
    problems = list(found.items())
    order = np.random.default_rng(0).permutation(len(problems))
    problems = [problems[i] for i in order]
    return {"test": problems[:300], "train": problems[300:]}


def sample(rng, n, split):
    """n prompts and one right answer for each (two lists of str), drawn with replacement by the
    numpy Generator `rng`."""
    problems = _problems()[split]
    prompts, answers = [], []
    for i in rng.integers(len(problems), size=n):
        (*digits, target), texts = problems[i]
        numbers = ",".join(map(str, rng.permutation(digits)))
        prompts.append(f"{numbers}={target:02d}")
        text = texts[rng.integers(len(texts))]
        answers.append(text.ljust(completion_len, "."))
    return prompts, answers


def reward(prompt, completion):
    """1.0, 0.1 or 0.0, as above. A length other than 8 earns 0.0."""
    if not re.fullmatch("[1-9],[1-9],[1-9]=[0-9]{2}", prompt) or len(completion) != completion_len:
        return 0.0
    text = completion.rstrip(".")
    try:
        value = _parse(text)
    except ValueError:
        return 0.0
    numbers = re.findall("[0-9]+", text)
    right = sorted(numbers) == sorted(prompt[:5:2]) and value == int(prompt[6:])
    return 1.0 if right else 0.1
