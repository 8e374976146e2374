"""Toy tasks with verifiable rewards. No torch in here: a task makes strings, and judges strings.

A task is any object, a module will do, with these attributes (`toy_tasks/addition.py` is the one to
copy):

    name            what --task calls it
    vocab           one character per token id, without "_"; the model adds its [MASK] token after
                    the last one, and `decode` shows it as "_"
    prompt_len      P, the number of characters of a prompt, a multiple of block_size (prompts are
                    read in blocks, too)
    completion_len  L, the number of characters of a completion, a multiple of block_size
    block_size      B, the number of characters of a block
    sample(rng, n, split)       -> n prompts and n reference completions (lists of str), drawn by
                                   the numpy Generator rng; split is "train" or "test", and no
                                   prompt is in both
    reward(prompt, completion)  -> float in [0, 1], judged from the two strings alone. It is 1 if the
                                   completion is right, which the accuracy counts. It takes any
                                   string and never raises. A completion of another length gets 0.

To add one: write the module, and put it into TASKS.
"""

import numpy as np

from . import addition, chain, countdown, sudoku
from .long_addition import addition3, addition5

TASKS = {task.name: task for task in (addition, addition3, addition5, chain, countdown, sudoku)}


def encode(task, texts):
    """Strings of one length -> (N, length) int64 array of token ids. ValueError if their lengths
    differ, and for a character outside task.vocab."""
    lengths = {len(text) for text in texts}
    if len(lengths) > 1:
        raise ValueError(f"the texts must have one length, not {sorted(lengths)}")
    ids = {character: i for i, character in enumerate(task.vocab)}
    rows = []
    for text in texts:
        if not set(text) <= set(task.vocab):
            raise ValueError(f"{text!r} is not in the vocabulary {task.vocab!r} of {task.name}")
        rows.append([ids[character] for character in text])
    return np.array(rows, dtype=np.int64)


def decode(task, tokens):
    """(N, length) token ids (array, tensor or nested list) -> list of N strings. [MASK] is shown
    as "_"."""
    rows = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    characters = task.vocab + "_"
    texts = []
    for row in rows:
        letters = [characters[i] for i in row]
        texts.append("".join(letters))
    return texts
