"""Countdown: reach the target with all three numbers and + - *.   "3,8,2=22" -> "(3+8)*2."   "5,1,9=14" -> "5*1+9..."

Why it looks like this:
  * every prompt has 8 characters, and answers are filled up with "." to 8. Many are right: 2*(8+3) as well;
  * reward 1: each number used once, target hit; 0.1: only well formed. The judge parses; it runs no code.
"""

import functools
import itertools
import re

import numpy as np

name, vocab = "countdown", "0123456789+-*()=,."
prompt_len, completion_len, block_size = 8, 8, 2
defaults = {"base_accuracy": 0.2, "d_model": 96, "prompts": 16, "masks": "coupled", "copies": 2, "lr": 3e-5}


def _parse(text):
    """Value and sorted numbers of an expression over + - * ( ), the usual way; ValueError if it is none. Linear time."""
    tokens = ["end", *re.findall(r"[0-9]+|.", text, re.S)[::-1]]

    def expression(level):  # 0: sum, 1: product, 2: number or parentheses
        if level == 2:
            if re.fullmatch("[0-9]+", token := tokens.pop()):
                return int(token)
            value = expression(0) if token == "(" else None
            if value is None or tokens.pop() != ")":
                raise ValueError(f"{token!r} is out of place")
            return value
        value = expression(level + 1)
        while tokens[-1] in ("+-", "*")[level]:
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[tokens.pop()](value, expression(level + 1))
        return value

    value = expression(0)
    if len(tokens) > 1:
        raise ValueError(f"{tokens[-1]!r} is out of place")
    return value, sorted(map(int, re.findall("[0-9]+", text)))


@functools.cache
def _problems():
    """{"test": .., "train": ..}: lists of ((*digits, target), all right expressions), split by digits and target."""
    found = {}
    for *digits, x, y in itertools.product(*[range(1, 10)] * 3, *["+-*"] * 2):
        for form in ("{0}{3}{1}{4}{2}", "({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})"):
            value, numbers = _parse(text := form.format(*digits, x, y))
            if 0 <= value <= 99:
                found.setdefault((*numbers, value), []).append(text)
    problems = list(found.items())
    problems = [problems[i] for i in np.random.default_rng(0).permutation(len(problems))]
    return {"test": problems[:300], "train": problems[300:]}


def sample(rng, n, split):
    """n prompts and one right answer for each (two lists of str), drawn with replacement by the numpy Generator `rng`."""
    prompts, answers, problems = [], [], _problems()[split]
    for i in rng.integers(len(problems), size=n):
        (*digits, target), texts = problems[i]
        prompts.append(",".join(map(str, rng.permutation(digits))) + f"={target:02d}")
        answers.append(texts[rng.integers(len(texts))].ljust(completion_len, "."))
    return prompts, answers


def reward(prompt, completion):
    """1.0, 0.1 or 0.0, as above. Total: any two strings will do; another length than 8 is not looked at."""
    return {"right": 1.0, "well formed": 0.1}.get(explain(prompt, completion).split(":")[0], 0.0)


def explain(prompt, completion):
    """What is wrong with an answer, in words."""
    if not re.fullmatch("[1-9],[1-9],[1-9]=[0-9]{2}", prompt) or len(completion) != completion_len:
        return "not a prompt of this task, or not 8 characters"
    try:
        value, numbers = _parse(completion.rstrip("."))
    except ValueError as error:
        return f"not well formed: {error}"
    right = numbers == sorted(map(int, prompt[:5:2])) and value == int(prompt[6:])
    return "right" if right else f"well formed: but it makes {value} from {numbers}"
