"""Times of one way beside another: pytest -m bench -s .github/results/test_speed.py"""

import itertools
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import stabledrl as S

torch.set_num_threads(1)


def batch(N, P, L):
    """Random prompts (N,P) and completions (N,L) of addition's alphabet."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(13, (N, P + L), generator=generator)
    return tokens[:, :P], tokens[:, P:]


def median_seconds(*functions):
    """Of seven calls each, in turn, since the speed of a machine varies with time."""
    seconds = [[] for _ in functions]
    for _ in range(8):
        for function, times in zip(functions, seconds):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]  # the first was for warming up


@pytest.mark.bench
@pytest.mark.parametrize("L", [16, 64])
def test_bench_cached_sampling_against_rereading_all_for_every_token(L):
    """P = 16, B = 4, 256 completions. Rereading takes as long for any token: one of L is timed."""
    model = S.BlockDiffusionTransformer(14)
    prompts, completions = batch(256, 16, L)
    whole = torch.cat((prompts, completions), 1)
    mask = S.block_causal_mask(16 + L, 4)
    positions = torch.arange(16 + L)

    def cached():
        S.generate(model, prompts, L, 4)

    def one_reading():
        with torch.no_grad():
            model(whole, positions, mask)

    fast, slow = median_seconds(cached, one_reading)
    print(f"\nL = {L}: {fast:.3f} s cached, {slow * L:.3f} s reread, {slow * L / fast:.1f} times")


@pytest.mark.bench
def test_bench_one_staircase_pass_against_one_pass_per_block():
    """P = 16, 16 blocks of B = 4, K = 2, 32 completions: likelihood and its gradient."""
    P, L, B, K = 16, 64, 4, 2
    model = S.BlockDiffusionTransformer(14)
    prompts, completions = batch(32, P, L)
    masks = S.sample_masks(32, K, L, B, torch.Generator().manual_seed(0))

    def one_pass():
        return S.elbo(model, prompts, completions, B, masks)

    def per_block():
        total = 0
        for k, start in itertools.product(range(K), range(0, L, B)):
            places = slice(start, start + B)
            answer, hidden = completions[:, places], masks[:, k, places]
            noisy = torch.where(hidden, model.mask_id, answer)
            tokens = torch.cat((prompts, completions[:, :start], noisy), 1)
            length = tokens.shape[1]
            mask = S.block_causal_mask(length, B)
            logits = model(tokens, torch.arange(length), mask)[:, -B:]
            log_p = logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0]
            total = total + (B / hidden.sum(-1, keepdim=True) * hidden * log_p).sum(-1) / K
        return total

    assert torch.allclose(one_pass(), per_block(), atol=1e-3)
    fast, slow = median_seconds(
        lambda: one_pass().sum().backward(), lambda: per_block().sum().backward()
    )
    print(f"\n{fast:.3f} s in one pass, {slow:.3f} s block by block, {slow / fast:.1f} times")
