"""Addition with more digits, for larger blocks:

    addition3    "123+456=" -> "579."                  P = 8,  L = 4, B = 4
    addition5    "0012345+0067890=" -> "80235..."      P = 16, L = 8, B = 8; also for B = 1, 2 and 4

Why they look like this:
  * As in `addition`, operands keep zeros in front, answers are filled up with ".", and one string
    is right.
  * The whole answer is one block. Carries run through it, and its digits come in any order. With a
    smaller --block_size there are fewer orders, and with B = 1 there is one.
  * Numbers of five digits are written with seven, so that P is a multiple of 8.
  * Too many pairs for a list: whether one is held out follows from its numbers.

    python stabledrl.py --task addition3 --d_model 128 --n_layer 4 --lr 3e-5
    python stabledrl.py --task addition5 --d_model 128 --n_layer 4 --lr 3e-5 --loss grpo stabledrl

(A block of 8 is too long for the exact likelihood, so addition5 has no exact ratio at its own B.)
"""

import re


class LongAddition:
    """A task, as toy_tasks/__init__.py describes it: operands below 10^digits, written with `width`
    characters."""

    vocab = "0123456789+=."

    def __init__(self, digits, width, completion_len):
        self.name = f"addition{digits}"
        self.limit, self.width = 10**digits, width
        self.prompt_len = 2 * width + 2
        self.completion_len = self.block_size = completion_len

    def sample(self, rng, n, split):
        """n prompts and their answers (two lists of str), drawn with replacement by the numpy
        Generator `rng`."""
        prompts, answers = [], []
        while len(prompts) < n:
            a, b = map(int, rng.integers(self.limit, size=2))
            if _held_out(a, b) == (split == "test"):
                prompts.append(f"{a:0{self.width}}+{b:0{self.width}}=")
                answers.append(str(a + b).ljust(self.completion_len, "."))
        return prompts, answers

    def reward(self, prompt, completion):
        """1.0 if `completion` is the right sum, written the one right way, else 0.0."""
        number = f"([0-9]{{{self.width}}})"
        operands = re.fullmatch(rf"{number}\+{number}=", prompt)
        if operands is None:
            return 0.0
        total = int(operands[1]) + int(operands[2])
        return float(completion == str(total).ljust(self.completion_len, "."))


def _held_out(a, b):
    """Whether a + b is a test problem: one pair in ten is, in both orders. 1,009 shares no factor
    with 10, so the last digits do not decide."""
    low, high = sorted((a, b))
    return (17 * low + 31 * high) % 1009 < 101


addition3 = LongAddition(digits=3, width=3, completion_len=4)
addition5 = LongAddition(digits=5, width=7, completion_len=8)
