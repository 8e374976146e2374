"""Sums of four digits, with the running sums from the second digit on:

    "7+5+8+6=" -> "122026"   (12, 20, 26)

Why it looks like this:
  * One running sum is one block (B = 2), with a leading zero: "09|15|21". So nothing needs padding.
  * Every block is easy with the one before it in view. This is the toy's chain of thought.
  * The reward is 1 for the right final number, and asks of the others only that they are digits. The
    steps are a means: a model may learn to skip them, or to recover from a wrong one.

The runs of the results page:

    python stabledrl.py --task chain --base_accuracy 0.6 --lr 3e-5 --masks coupled --copies 2
"""

import itertools
import re

import numpy as np

name = "chain"
vocab = "0123456789+="
prompt_len, completion_len, block_size = 8, 6, 2

# The four digits as a multiset: 1+2+3+4 is held out whenever 4+3+2+1 is. A fixed shuffle sends one
# in seven to the test split.
_DIGITS = list(itertools.combinations_with_replacement(range(10), 4))
_DIGITS = np.random.default_rng(0).permutation(_DIGITS)
_SPLITS = {"test": _DIGITS[:100], "train": _DIGITS[100:]}


def sample(rng, n, split):
    """n prompts and their answers (two lists of str), drawn with replacement by the numpy Generator
    `rng`."""
    digits = _SPLITS[split]
    drawn = digits[rng.integers(len(digits), size=n)]
    prompts, answers = [], []
    for row in rng.permuted(drawn, axis=1):  # in any order
        prompts.append("+".join(map(str, row)) + "=")
        answers.append("".join(_sums(prompts[-1])))
    return prompts, answers


def _sums(prompt):
    """The right running sums, or None if the prompt is not of the form N+N+N+N=."""
    if not re.fullmatch(r"[0-9](\+[0-9]){3}=", prompt):
        return None
    digits = map(int, prompt[:-1].split("+"))
    sums = [f"{total:02d}" for total in itertools.accumulate(digits)]
    return sums[1:]


def reward(prompt, completion):
    """1.0 if the last number is the right sum, and all six characters are digits, else 0.0."""
    sums = _sums(prompt)
    if sums is None or not re.fullmatch("[0-9]{6}", completion):
        return 0.0
    return float(completion[4:] == sums[-1])
