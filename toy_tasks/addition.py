"""Addition of two numbers below 100:   "12+34=" -> "46.."     "07+95=" -> "102."

Why it looks like this:
  * Operands keep their leading zero. So every prompt has 6 characters, and no batch needs padding.
  * The answer is left-aligned, and filled up with "." to 4 characters. The dot is an ordinary token
    that the model must write. So the likelihood covers exactly what was sampled, and no
    padding mask exists anywhere.
  * Two characters form a block (B = 2): "46|..", "10|2.". Sometimes the tens are written first, and
    sometimes the units, so the model must know each with and without the other in view, carry and
    all. This is easy to half-learn, and hard to get right.
  * The reward is 1 for the one right string and 0 for any other. There is nothing to game.
"""

import re

import numpy as np

name = "addition"
vocab = "0123456789+=."
prompt_len, completion_len, block_size = 6, 4, 2

# Unordered pairs {a, b}: 34+12 is held out whenever 12+34 is. A fixed shuffle sends one pair in ten
# to the test split.
_PAIRS = np.array([(a, b) for a in range(100) for b in range(a, 100)])
_PAIRS = np.random.default_rng(0).permutation(_PAIRS)
_SPLITS = {"test": _PAIRS[:505], "train": _PAIRS[505:]}


def sample(rng, n, split):
    """n prompts and their answers (two lists of str), drawn with replacement by the numpy Generator
    `rng`."""
    pairs = _SPLITS[split]
    drawn = pairs[rng.integers(len(pairs), size=n)]
    prompts, answers = [], []
    for a, b in rng.permuted(drawn, axis=1):  # either order of the two
        prompts.append(f"{a:02d}+{b:02d}=")
        answers.append(str(a + b).ljust(completion_len, "."))
    return prompts, answers


def _answer(prompt):
    """The right completion, or None if the prompt is not of the form NN+NN=."""
    operands = re.fullmatch(r"([0-9]{2})\+([0-9]{2})=", prompt)
    if operands is None:
        return None
    total = int(operands[1]) + int(operands[2])
    return str(total).ljust(completion_len, ".")


def reward(prompt, completion):
    """1.0 if `completion` is the right sum, written the one right way, else 0.0."""
    return float(completion == _answer(prompt))
