"""Sudoku on 4×4 cells:   "12.43.12.143432." -> the 16 digits of the full grid, row by row

Why it looks like this:
  * A row is a block (B = 4). When it is written, the rows before it are finished and those after it
    are not. So the first row must already fit what will come, which only the givens show.
  * 12 cells are given, chosen so that exactly one of the 288 grids fits. The model writes all 16,
    and copying the givens is part of the work.
  * The split is by grid: no solution of a test puzzle (28 of the 288 grids) has been seen in
    training, though its mirror images may have been.
  * The reward is the share of empty cells that are right. A given that was copied wrongly counts as
    one more wrong cell. So reward 1 means solved, and `accuracy` in the log is the solved rate.

The runs of the results page:

    python stabledrl.py --task sudoku --base_accuracy 0.6 --prompts 16 --lr 3e-5
"""

import functools
import itertools

import numpy as np

name = "sudoku"
vocab = "1234."
prompt_len, completion_len, block_size = 16, 16, 4


def _valid(grid):
    """Whether every row, column and 2×2 box of a (4,4) array holds four different digits."""
    boxes = grid.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    groups = [*grid, *grid.T, *boxes]
    return all(len(set(group)) == 4 for group in groups)


def _all_grids():
    """The 288 grids (288, 16), row by row: a half is two rows whose boxes are right."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    halves = []
    for above, below in itertools.product(rows, repeat=2):
        if len({*above[:2], *below[:2]}) == 4:
            halves.append(above + below)
    grids = []
    for top, bottom in itertools.product(halves, repeat=2):
        grid = np.array(top + bottom)
        if _valid(grid.reshape(4, 4)):
            grids.append(grid)
    return np.array(grids)


_GRIDS = np.random.default_rng(0).permutation(_all_grids())
_SPLITS = {"test": range(0, 28), "train": range(28, 288)}
# Cells as the digits of one number: grids have the same number if they agree on the givens, and only
# then. (5^16 is exact in a float.)
_PLACES = 5.0 ** np.arange(16)


def sample(rng, n, split):
    """n puzzles and their solutions (two lists of str), drawn with replacement by the numpy
    Generator `rng`."""
    prompts, answers = [], []
    twelve = np.tile(np.arange(16) < 12, (n, 1))
    while len(prompts) < n:
        which = rng.choice(_SPLITS[split], size=n)
        given = rng.permuted(twelve, axis=1)  # (n, 16) bool
        keys = (given * _PLACES) @ _GRIDS.T  # (n, 288)
        own_key = keys[np.arange(n), which][:, None]
        unique = (keys == own_key).sum(1) == 1
        for grid, shown in zip(_GRIDS[which[unique]], given[unique]):
            answers.append("".join(map(str, grid)))
            cells = np.where(shown, grid.astype(str), ".")
            prompts.append("".join(cells))
    return prompts[:n], answers[:n]


@functools.lru_cache(2**14)
def _solution(prompt):
    """The only grid that fits, as a str; None if the prompt has no empty cell, or not exactly one
    solution."""
    if len(prompt) != 16 or not set(prompt) <= set(vocab) or "." not in prompt:
        return None
    cells = np.array([vocab.index(c) + 1 for c in prompt])
    fits = ((_GRIDS == cells) | (cells == 5)).all(1)  # 5: an empty cell
    if fits.sum() != 1:
        return None
    return "".join(map(str, _GRIDS[fits][0]))


def reward(prompt, completion):
    """Empty cells filled correctly / (empty cells + givens copied wrongly); 0.0 for another
    length."""
    solution = _solution(prompt)
    if solution is None or len(completion) != 16:
        return 0.0
    right = overwritten = 0
    for given, written, wanted in zip(prompt, completion, solution):
        if given == ".":
            right += written == wanted
        else:
            overwritten += written != wanted
    return right / (prompt.count(".") + overwritten)
