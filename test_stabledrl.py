"""The claims of stabledrl.py, as tests, in the order of its sections: the second half of the tutorial.

An oracle is a second way to the same number: enumeration, plain Python loops, one separate pass per
block, autograd. `one_block_log_probs` is the only one that uses the model, and it uses no staircase
and no cache. Where chance is involved, the docstring says how often the test would fail if the
claim were true. Seeds are fixed, so a test that has passed once keeps passing on the same machine.

    pytest              all but the learning run and the benchmarks, under a minute on two cores
    pytest -m slow      a learning run, more kills, longer fuzzing: minutes
    pytest -m bench -s  benchmarks, beside the results page: ratios of times
"""

import ast
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import stabledrl as S
from toy_tasks import TASKS

torch.set_num_threads(1)  # the tensors are tiny; and so no test forks this process
HERE = Path(__file__).parent
SOURCE = (HERE / "stabledrl.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def tiny_model(vocab_size=5, seed=0, n_layer=2):
    """Random and with large weights: its predictions are far from uniform, so no mistake hides."""
    model = S.BlockDiffusionTransformer(vocab_size, d_model=16, n_layer=n_layer, n_head=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=seeded(seed))
    return model

def batch(N=3, P=4, L=6, vocab_size=5, seed=1):
    """Random prompts (N,P) and completions (N,L) without [MASK]."""
    tokens = torch.randint(vocab_size - 1, (N, P + L), generator=seeded(seed))
    return tokens[:, :P], tokens[:, P:]

def gradients(scalar, model):
    """d scalar / d every weight, as one vector."""
    found = torch.autograd.grad(
        scalar, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])

def one_block_log_probs(model, prompt, completion, hidden, block, B):
    """Oracle: log p(y_i | ..) of one block of one sequence (lists of ints), by a pass of its own:
    the prompt, the true blocks before it, and the block with the places in `hidden` masked."""
    history = prompt + completion[: block * B]
    answers = completion[block * B : (block + 1) * B]
    noisy = [model.mask_id if i in hidden else token for i, token in enumerate(answers)]
    n = len(history) + B
    may_look = [[key // B <= query // B for key in range(n)] for query in range(n)]
    tokens = torch.tensor([history + noisy])
    logits = model(tokens, torch.arange(n), torch.tensor(may_look))[0, -B:]
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return [p[i, token].log().item() for i, token in enumerate(answers)]

def pictures(function):
    """The rows of # and . in a docstring, as a bool array."""
    rows = []
    for line in function.__doc__.splitlines():
        if re.fullmatch(r"[a-z0-9 ]*([#.] *)+", line):
            cells = re.sub("[^#.]", "", line)
            rows.append([cell == "#" for cell in cells])
    return np.array(rows)

def check_chi_square(counts, expected):
    """Counts of independent draws follow expected counts (dicts). Cells that expect less than 5 are
    joined. The bound is 5 standard deviations above the mean of chi-square: with its skewed tail,
    passed by chance less than once in 10,000."""
    assert set(counts) <= set(expected)
    assert sum(expected.values()) == pytest.approx(sum(counts.values()), rel=1e-4)
    cells = [(counts[key], e) for key, e in expected.items() if e >= 5]
    rare = [key for key, e in expected.items() if e < 5]
    if rare:
        cells.append((sum(counts[key] for key in rare), sum(expected[key] for key in rare)))
    chi_square = sum((count - e) ** 2 / e for count, e in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5

# §1 -----------------------------------------------------------------------------------------------

def test_mask_token_is_read_but_never_predicted():
    model, (prompts, completions) = tiny_model(), batch()
    tokens = torch.cat((prompts, completions), 1)
    mask = S.block_causal_mask(10, 2)
    logits = model(tokens, torch.arange(10), mask)
    assert logits.shape == (3, 10, 5) and model.mask_id == 4
    assert (logits[..., 4] == -math.inf).all() and logits[..., :4].isfinite().all()
    assert (S.generate(model, prompts, 6, 2, generator=seeded()) != 4).all()
    tokens[:, 0] = model.mask_id
    changed = model(tokens, torch.arange(10), mask)
    assert not torch.allclose(changed[..., :4], logits[..., :4])

def turned(vector, position):
    """Oracle: pairs (a, b) of a vector, turned by the angle position · 10,000^(−2d/D)."""
    D, out = len(vector), []
    for d in range(D // 2):
        a, b = vector[2 * d], vector[2 * d + 1]
        angle = position * 10_000.0 ** (-2 * d / D)
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return np.array(out)

def test_one_layer_against_plain_loops():
    """§1: one layer, two heads, written out: scores q·k/√D of the rotated, softmax over what the
    mask allows, MLP, and everything added to what came in."""
    model = tiny_model(n_layer=1)
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}
    tokens, positions, may_look = batch()[0][0], [2, 5, 9, 4], S.block_causal_mask(4, 2)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[name]

    x = w["embed.weight"][tokens]  # (4, 16)
    projected = norm(x, "layers.0.norm1.weight") @ w["layers.0.qkv.weight"].T
    q, k, v = projected.reshape(4, 3, 2, 8).transpose(1, 2, 0, 3)  # each (heads, tokens, features)
    attended = np.zeros((4, 2, 8))
    for i, head in itertools.product(range(4), range(2)):
        seen = [j for j in range(4) if may_look[i, j]]
        query = turned(q[head, i], positions[i])
        scores = [query @ turned(k[head, j], positions[j]) / 8**0.5 for j in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        attended[i, head] = weights @ v[head, seen]
    x = x + attended.reshape(4, 16) @ w["layers.0.out.weight"].T
    hidden = norm(x, "layers.0.norm2.weight") @ w["layers.0.mlp.0.weight"].T
    hidden = np.maximum(hidden + w["layers.0.mlp.0.bias"], 0)
    x = x + hidden @ w["layers.0.mlp.2.weight"].T + w["layers.0.mlp.2.bias"]
    expected = norm(x, "norm.weight") @ w["head.weight"].T
    logits = model(tokens[None], torch.tensor(positions), may_look)[0, :, :4]
    assert logits.detach().numpy() == pytest.approx(expected, abs=1e-3)

def test_a_text_read_in_pieces_is_the_text_read_at_once():
    """§1: to 1e-5, whatever the pieces; and the cache is that of all."""
    model, (prompts, completions) = tiny_model(), batch()
    tokens, positions = torch.cat((prompts, completions), 1), torch.arange(10)
    mask = S.block_causal_mask(10, 2)
    whole, whole_cache = model.read(tokens, positions, mask)
    pieces, cache = [], None
    for a, b in ((0, 4), (4, 6), (6, 10)):
        logits, cache = model.read(tokens[:, a:b], positions[a:b], mask[a:b, :b], cache)
        pieces.append(logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    for piecewise, at_once in zip(cache, whole_cache):
        assert piecewise.shape == (2, 3, 2, 10, 8)  # keys and values, N, heads, tokens, features
        assert torch.allclose(piecewise, at_once, atol=1e-5)

def test_a_cached_prompt_serves_several_completions_in_a_row():
    """§1: rows 2n and 2n+1 stand behind prompt n."""
    model, (prompts, completions) = tiny_model(), batch()
    positions, mask = torch.arange(10), S.block_causal_mask(10, 2)
    _, cache = model.read(prompts, positions[:4], mask[:4, :4])
    others = completions.flip(0)
    two_each = torch.stack((completions, others), 1).flatten(0, 1)  # (6, L)
    logits, _ = model.read(two_each, positions[4:], mask[4:], cache)
    for first, part in enumerate((completions, others)):
        alone = model(torch.cat((prompts, part), 1), positions, mask)
        assert torch.allclose(logits[first::2], alone[:, 4:], atol=1e-5)

def test_a_width_that_cannot_be_cut_into_heads_is_refused():
    with pytest.raises(AssertionError, match=r"d_model 30 is no multiple of 2\*4 heads"):
        S.BlockDiffusionTransformer(5, d_model=30)

# §2 -----------------------------------------------------------------------------------------------

def test_the_masks_are_their_pictures():
    assert (pictures(S.block_causal_mask) == S.block_causal_mask(4, 2).numpy()).all()
    assert (pictures(S.staircase_mask) == S.staircase_mask(4, 4, 2, copies=2).numpy()).all()

def may_look(query, key, B):
    """Oracle: the staircase's rules for two tokens, each (copy, position); copy 0 is clean."""
    query_block, key_block = query[1] // B, key[1] // B
    if query[0] == 0:
        return key[0] == 0 and key_block <= query_block
    if key[0] == 0:
        return key_block < query_block
    return key[0] == query[0] and key_block == query_block

SHAPES = [(2, 4, 2, 1), (0, 6, 3, 2), (6, 3, 3, 3), (2, 4, 1, 2), (4, 4, 4, 2)]

@pytest.mark.parametrize("P,L,B,K", SHAPES)
def test_staircase_follows_its_three_rules(P, L, B, K):
    tokens = [(0, i) for i in range(P + L)]
    tokens += [(copy, P + i) for copy in range(1, K + 1) for i in range(L)]
    expected = [[may_look(query, key, B) for key in tokens] for query in tokens]
    assert S.staircase_mask(P, L, B, K).tolist() == expected
    assert S.staircase_positions(P, L, K).tolist() == [position for _, position in tokens]
    if K == 1:
        assert S.staircase_mask(P, L, B).tolist() == expected, "one copy is the default"
        assert S.staircase_positions(P, L).tolist() == [position for _, position in tokens]

def test_lengths_that_are_no_multiple_of_the_block_are_refused():
    model = tiny_model()
    for P, L in ((3, 4), (4, 3)):
        with pytest.raises(AssertionError, match="must be multiples of block_size 2"):
            S.staircase_mask(P, L, 2)
        with pytest.raises(AssertionError, match="must be multiples of block_size 2"):
            S.generate(model, torch.zeros(1, P, dtype=torch.long), L, 2)
    for draw in S.MASKS.values():
        with pytest.raises(AssertionError, match="must be multiples of block_size 2"):
            draw(4, 2, 5, 2, seeded())

def noisy_logits(model, prompts, clean, noisy, B):
    """One whole pass under the staircase -> (N, K, L/B, B, vocab) of the noisy copies (N,K,L)."""
    (N, K, L), P = noisy.shape, prompts.shape[1]
    tokens = torch.cat((prompts, clean, noisy.flatten(1)), 1)
    logits = model(tokens, S.staircase_positions(P, L, K), S.staircase_mask(P, L, B, K))
    return logits[:, P + L :].view(N, K, L // B, B, -1)

def test_no_block_sees_its_own_answer_or_the_future():
    """§2, the leak test. Changed clean tokens in block b leave the logits of noisy blocks up to b
    bit-identical, and do change later ones. (Comparing a noisy copy with an identical clean one
    would pass under a leaking mask.)"""
    model, (prompts, completions), B, L = tiny_model(), batch(), 2, 6
    masks = S.sample_masks(3, 2, L, B, seeded())
    noisy = torch.where(masks, model.mask_id, completions[:, None])
    before = noisy_logits(model, prompts, completions, noisy, B)
    for b in range(L // B):
        changed = completions.clone()
        block = slice(b * B, (b + 1) * B)
        changed[:, block] = (changed[:, block] + 1) % 4
        after = noisy_logits(model, prompts, changed, noisy, B)
        assert torch.equal(after[:, :, : b + 1], before[:, :, : b + 1])
        for later in range(b + 1, L // B):
            assert (after[:, :, later] != before[:, :, later]).any()

@pytest.mark.parametrize("B", [1, 2, 3])
def test_one_staircase_pass_is_one_separate_pass_per_block(B):
    """§2, §3: all blocks and copies at once, against a pass of its own for each."""
    model, (prompts, completions) = tiny_model(), batch(N=2, P=6)
    masks = S.sample_masks(2, 2, 6, B, seeded(3))
    together = S.token_log_probs(model, prompts, completions, masks, B)
    for n, k, b in itertools.product(range(2), range(2), range(6 // B)):
        block = slice(b * B, (b + 1) * B)
        hidden = [i for i in range(B) if masks[n, k, block][i]]
        sequence = prompts[n].tolist(), completions[n].tolist()
        alone = one_block_log_probs(model, *sequence, hidden, b, B)
        assert together[n, k, block].tolist() == pytest.approx(alone, abs=1e-4)

@pytest.mark.parametrize("P,L,B,K", [(2, 4, 2, 3), (0, 6, 3, 2), (6, 3, 3, 4), (8, 16, 4, 15)])
def test_the_pass_behind_the_prompts_cache_is_the_whole_staircase(P, L, B, K):
    """§3: token_log_probs reads the prompt first and the rest behind its cache. Values and
    gradients are those of one plain pass under the mask that is drawn in §2."""
    model, (prompts, completions) = tiny_model(), batch(P=P, L=L)
    masks = S.sample_masks(3, K, L, B, seeded())
    noisy = torch.where(masks, model.mask_id, completions[:, None])
    log_p = noisy_logits(model, prompts, completions, noisy, B).log_softmax(-1).flatten(2, 3)
    whole = log_p.gather(-1, completions[:, None, :, None].expand(-1, K, -1, 1))[..., 0]
    cached = S.token_log_probs(model, prompts, completions, masks, B)
    assert torch.allclose(cached, whole, atol=1e-4)
    weights = torch.randn(3, K, L, generator=seeded(1))
    expected = gradients((whole * weights).sum(), model)
    got = gradients((cached * weights).sum(), model)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() and expected.any()

def test_completions_of_one_prompt_may_share_it():
    """§3, §4: prompts (M,P) with N = 3·M completions give what the prompts written out 3 times
    give, with the same gradient; and samples=3 is sampling from each prompt 3 times."""
    model, (prompts, completions) = tiny_model(), batch(N=6)
    prompts, masks = prompts[:2], S.sample_masks(6, 2, 6, 2, seeded())
    written_out = prompts.repeat_interleave(3, 0)
    shared = S.elbo(model, prompts, completions, masks, 2)
    separate = S.elbo(model, written_out, completions, masks, 2)
    assert torch.allclose(shared, separate, atol=1e-5)
    expected = gradients(separate.square().sum(), model)
    difference = gradients(shared.square().sum(), model) - expected
    assert difference.abs().max() < 1e-3 * expected.abs().max()
    for likelihood in (S.mean_field, S.exact_elbo, S.exact_log_likelihood):
        value = likelihood(model, prompts, completions, 2)
        assert torch.allclose(value, likelihood(model, written_out, completions, 2), atol=1e-5)
    samples = S.generate(model, prompts, 6, 2, generator=seeded(), samples=3)
    assert torch.equal(samples, S.generate(model, written_out, 6, 2, generator=seeded()))
    assert len(samples.unique(dim=0)) > 3

def test_block_size_one_is_an_autoregressive_model():
    """All likelihoods are then one number, the chain rule Σ log p(y_i | everything before)."""
    model, (prompts, completions) = tiny_model(), batch(P=3, L=4)
    chain = []
    for prompt, completion in zip(prompts.tolist(), completions.tolist()):
        terms = [one_block_log_probs(model, prompt, completion, [0], i, 1)[0] for i in range(4)]
        chain.append(sum(terms))
    everything = torch.ones(3, 1, 4, dtype=torch.bool)
    steps = torch.zeros(3, 4, dtype=torch.long)
    for estimate in S.ESTIMATORS.values():
        log_p = estimate(model, prompts, completions, block_size=1, masks=everything, steps=steps)
        assert log_p.tolist() == pytest.approx(chain, abs=1e-4)

# §3 -----------------------------------------------------------------------------------------------

def test_masks_have_uniform_counts_and_uniform_places():
    """Two blocks of B = 3, 15,000 times: P(pattern) = 1/B · 1/C(B, m) for each of the 7 patterns,
    and the two blocks of a copy are independent."""
    p = {}
    for pattern in itertools.product((False, True), repeat=3):
        if any(pattern):
            p[pattern] = 1 / 3 / math.comb(3, sum(pattern))
    expected = {(*a, *b): 15_000 * p[a] * p[b] for a in p for b in p}
    masks = S.sample_masks(15_000, 1, 6, 3, seeded(5))
    check_chi_square(Counter(map(tuple, masks[:, 0].tolist())), expected)
    assert S.sample_masks(4, 5, 6, 3, seeded()).shape == (4, 5, 6)

def test_coupled_masks_are_pairs_in_which_every_token_is_hidden():
    """§3: where a copy shows something, its partner shows the rest; where it shows nothing, neither
    does its partner."""
    masks = S.coupled_masks(500, 4, 6, 3, seeded())
    assert masks.shape == (500, 4, 6) and masks.dtype == torch.bool
    for n, k, b in itertools.product(range(500), range(2), range(2)):
        block = slice(3 * b, 3 * b + 3)
        one, partner = masks[n, k, block].tolist(), masks[n, k + 2, block].tolist()
        assert partner == ([True] * 3 if all(one) else [not hidden for hidden in one])
    with pytest.raises(AssertionError, match="copies must be even, not 3"):
        S.coupled_masks(500, 3, 6, 3, seeded())

def test_elbo_is_the_weighted_sum_over_hidden_tokens():
    """§3, against a loop: mean over copies of Σ_blocks B/m · Σ_hidden log p."""
    model, (prompts, completions), B = tiny_model(), batch(N=2, P=3), 3
    masks = S.sample_masks(2, 4, 6, B, seeded(7))
    expected = [0.0, 0.0]
    for n, k, b in itertools.product(range(2), range(4), range(2)):
        hidden = [i for i in range(B) if masks[n, k, b * B + i]]
        sequence = prompts[n].tolist(), completions[n].tolist()
        log_p = one_block_log_probs(model, *sequence, hidden, b, B)
        expected[n] += B / len(hidden) * sum(log_p[i] for i in hidden) / 4
    assert S.elbo(model, prompts, completions, masks, B).tolist() == pytest.approx(expected, abs=1e-4)

@pytest.mark.parametrize("B", [2, 3])
@pytest.mark.parametrize("masks", S.MASKS)
def test_the_estimate_is_unbiased(masks, B):
    """Mean of 3,000 estimates from a pair of copies against exact_elbo, within 5 standard errors
    (fails by chance once in 1.7 million, for each of 3 completions)."""
    model, (prompts, completions) = tiny_model(), batch(P=6)
    many = completions.repeat_interleave(3_000, 0)
    with torch.no_grad():
        pairs = S.elbo(model, prompts, many, S.MASKS[masks](9_000, 2, 6, B, seeded(1)), B)
        pairs = pairs.view(3, 3_000)
        error = pairs.mean(1) - S.exact_elbo(model, prompts, completions, B)
    assert (error.abs() < 5 * pairs.std(1) / 3_000**0.5).all() and (pairs.std(1) > 0.01).all()

@pytest.mark.parametrize("B", [2, 3])
def test_more_copies_are_less_noisy_and_coupled_ones_less_still(B):
    """§5: four copies have a quarter of the variance of one, within 20 % (8 standard errors); one
    coupled pair has less than two independent copies, by more than a tenth."""
    model, (prompts, completions) = tiny_model(), batch(P=6)
    many = completions.repeat_interleave(4_000, 0)

    def variance(draw, copies):
        masks = draw(12_000, copies, 6, B, seeded(copies))
        return S.elbo(model, prompts, many, masks, B).view(3, -1).var(1)

    with torch.no_grad():
        one, two, four = (variance(S.sample_masks, copies) for copies in (1, 2, 4))
        assert (4 * four).tolist() == pytest.approx(one.tolist(), rel=0.2)
        assert (variance(S.coupled_masks, 2) < 0.9 * two).all()

# §4 -----------------------------------------------------------------------------------------------

def every_completion(L, vocab_size):
    return torch.tensor(list(itertools.product(range(vocab_size - 1), repeat=L)))

@pytest.mark.parametrize("B,L", [(1, 3), (2, 4), (3, 3)])
def test_sampler_frequencies_follow_the_exact_likelihood(B, L):
    """§4, §5: 30,000 samples over all 3^L completions."""
    model, prompt = tiny_model(vocab_size=4, seed=2), torch.tensor([[0, 1, 2, 0, 1, 2]])
    everything = every_completion(L, 4)
    with torch.no_grad():
        p = S.exact_log_likelihood(model, prompt, everything, B).exp().tolist()
    expected = {tuple(y): 30_000 * q for y, q in zip(everything.tolist(), p)}
    samples = S.generate(model, prompt, L, B, generator=seeded(B), samples=30_000)
    check_chi_square(Counter(map(tuple, samples.tolist())), expected)

@pytest.mark.parametrize("B", [2, 3])
def test_completions_and_their_steps_follow_the_trajectory_distribution(B):
    """§4, §5: 30,000 samples of one block, over all pairs of completion and order."""
    model, prompt = tiny_model(vocab_size=4, seed=2), torch.tensor([[0, 1, 2, 0, 1, 2]])
    everything, expected = every_completion(B, 4), {}
    for order in itertools.permutations(range(B)):
        steps = torch.tensor(order).expand(len(everything), -1)
        p = S.trajectory(model, prompt, everything, steps, B).exp() / math.factorial(B)
        expected |= {(*y, *order): 30_000 * q for y, q in zip(everything.tolist(), p.tolist())}
    samples, steps = S.generate(
        model, prompt, B, B, generator=seeded(B), samples=30_000, return_steps=True)
    pairs = torch.cat((samples, steps), 1).tolist()
    check_chi_square(Counter(map(tuple, pairs)), expected)

def test_temperature_divides_the_logits():
    """One token, 40,000 draws at T = 0.5 against softmax(logits/T)."""
    model, prompt = tiny_model(), torch.tensor([[1, 3]])
    logits = model(torch.tensor([[1, 3, 4]]), torch.arange(3), S.block_causal_mask(3, 1))
    weights = [math.exp(2 * x) for x in logits[0, -1, :4].tolist()]
    expected = {token: 40_000 * weight / sum(weights) for token, weight in enumerate(weights)}
    drawn = S.generate(model, prompt, 1, 1, 0.5, generator=seeded(), samples=40_000)
    check_chi_square(Counter(drawn[:, 0].tolist()), expected)

def decode_surest_first(model, prompt, L, B):
    """Oracle: greedy decoding that reads the whole sequence again at every step -> tokens, steps."""
    tokens, steps = prompt + [model.mask_id] * L, [None] * L
    for start in range(len(prompt), len(prompt) + L, B):
        for step in range(B):
            end = start + B
            mask = S.block_causal_mask(end, B)
            p = model(torch.tensor([tokens[:end]]), torch.arange(end), mask)[0].softmax(-1)
            hidden = [i for i in range(start, end) if tokens[i] == model.mask_id]
            place = max(hidden, key=lambda i: p[i].max().item())
            tokens[place] = p[place].argmax().item()
            steps[place - len(prompt)] = step
    return tokens[len(prompt) :], steps

def test_confidence_order_reveals_the_surest_place_first():
    model, (prompts, _) = tiny_model(seed=4), batch(N=8, P=3)
    completions, steps = S.generate(
        model, prompts, 6, 3, temperature=0.0, order="confidence", return_steps=True)
    for n in range(8):
        expected = decode_surest_first(model, prompts[n].tolist(), 6, 3)
        assert (completions[n].tolist(), steps[n].tolist()) == expected
    assert len(steps.view(-1, 3).unique(dim=0)) > 1, "the model must not make the order trivial"

class FakeModel(torch.nn.Module):
    """A model whose logits are logits(tokens, positions) (N,S,vocab), without a cache."""
    def __init__(self, logits, mask_id):
        super().__init__()
        self.logits, self.mask_id = logits, mask_id

    def read(self, tokens, positions, mask, cache=None):
        return self.logits(tokens, positions), None

def test_confidence_is_measured_at_temperature_one():
    """Two places whose order would turn round if greedy decoding read the logits at half or double
    size: one competitor 1 nat behind (p = 0.73), and three 2.6 nats behind (p = 0.82). The model
    writes the number of the step."""
    def logits(tokens, positions):
        values = torch.tensor([[1.0, 0.0, -50.0, -50.0], [2.6, 0.0, 0.0, 0.0]])[: tokens.shape[1]]
        written = int((tokens[0] != 4).sum())
        return torch.nn.functional.pad(values.roll(written, dims=1), (0, 1), value=-math.inf)[None]
    model, prompts = FakeModel(logits, 4), torch.zeros(1, 0, dtype=torch.long)
    greedy = S.generate(model, prompts, 2, 2, temperature=0.0, order="confidence")
    assert greedy.tolist() == [[1, 0]]

def test_generate_depends_on_its_generator_alone():
    model, (prompts, _) = tiny_model(), batch(N=50)
    torch.manual_seed(0)
    samples = S.generate(model, prompts, 6, 2, generator=seeded(1))
    torch.manual_seed(1)
    assert torch.equal(samples, S.generate(model, prompts, 6, 2, generator=seeded(1)))
    assert not torch.equal(samples, S.generate(model, prompts, 6, 2, generator=seeded(2)))
    from_numpy = S.generate(model, prompts.numpy(), 6, 2, generator=seeded(1))
    assert torch.equal(samples, from_numpy), "what `encode` returns"

def test_generate_refuses_what_cannot_be():
    model, (prompts, _) = tiny_model(), batch()
    with pytest.raises(AssertionError, match="order is 'random' or 'confidence', not 'left'"):
        S.generate(model, prompts, 6, 2, order="left")
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(AssertionError, match="temperature is at least 0 and finite"):
            S.generate(model, prompts, 6, 2, temperature)

def test_a_broken_model_cannot_be_sampled_from():
    model, (prompts, _) = tiny_model(), batch()
    with torch.no_grad():
        model.layers[1].mlp[0].weight[0, 0] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            S.generate(model, prompts, 6, 2, temperature)

# §5 -----------------------------------------------------------------------------------------------

def brute_force(model, prompt, completion, B):
    """Oracle: (ELBO, log-likelihood) of one completion, through all B! orders of every block."""
    elbo = likelihood = 0.0
    for b in range(len(completion) // B):
        paths = []
        for order in itertools.permutations(range(B)):
            path = 0.0
            for step, place in enumerate(order):
                path += one_block_log_probs(model, prompt, completion, order[step:], b, B)[place]
            paths.append(path)
        elbo += statistics.mean(paths)
        likelihood += math.log(statistics.mean(map(math.exp, paths)))
    return elbo, likelihood

@pytest.mark.parametrize("B", [2, 3])
def test_exact_values_equal_brute_force_over_all_orders(B):
    """Jensen's inequality in numbers as well: the mean of the logs is below the log of the mean."""
    model, (prompts, completions) = tiny_model(), batch(P=6)
    bound = S.exact_elbo(model, prompts, completions, B)
    likelihood = S.exact_log_likelihood(model, prompts, completions, B)
    for n in range(3):
        expected = brute_force(model, prompts[n].tolist(), completions[n].tolist(), B)
        assert (bound[n].item(), likelihood[n].item()) == pytest.approx(expected, abs=1e-4)
    assert (bound < likelihood - 1e-3).all()

@pytest.mark.parametrize("B", [1, 2, 3])
def test_the_trajectory_is_the_product_along_the_order_and_its_mean_is_the_likelihood(B):
    """Every order of two blocks, each against a loop with a pass of its own per block and step."""
    model, (prompts, completions) = tiny_model(), batch(N=1, P=6, L=2 * B)
    prompt, completion = prompts[0].tolist(), completions[0].tolist()
    probabilities = []
    for orders in itertools.product(itertools.permutations(range(B)), repeat=2):
        expected, steps = 0.0, []
        for b, order in enumerate(orders):
            for step, place in enumerate(order):
                log_p = one_block_log_probs(model, prompt, completion, order[step:], b, B)
                expected += log_p[place]
            steps += [order.index(place) for place in range(B)]
        log_p = S.trajectory(model, prompts, completions, torch.tensor([steps]), B).item()
        assert log_p == pytest.approx(expected, abs=1e-4)
        probabilities.append(math.exp(log_p))
    exact = S.exact_log_likelihood(model, prompts, completions, B).item()
    assert math.log(statistics.mean(probabilities)) == pytest.approx(exact, abs=1e-4)

def test_patterns_are_all_ways_to_hide_something():
    """B = 5: 31 patterns, four of them against a pass of their own; B = 7 is refused."""
    model, (prompts, completions) = tiny_model(), batch(N=1, P=5, L=5)
    patterns, log_p = S.every_pattern(model, prompts, completions, 5)
    for pattern, hidden in zip(patterns.tolist(), range(1, 32)):
        assert pattern == [bool(hidden & 2**i) for i in range(5)]
    for hidden in (1, 16, 17, 31):
        places = [i for i in range(5) if hidden & 2**i]
        sequence = prompts[0].tolist(), completions[0].tolist()
        alone = one_block_log_probs(model, *sequence, places, 0, 5)
        assert log_p[0, hidden - 1, 0].tolist() == pytest.approx(alone, abs=1e-4)
    for likelihood in (S.exact_elbo, S.exact_log_likelihood):
        with pytest.raises(AssertionError, match="block_size 7 is above 6"):
            likelihood(model, *batch(N=1, P=7, L=7), 7)

def test_mean_field_scores_fully_hidden_blocks():
    model, (prompts, completions) = tiny_model(), batch()
    expected = []
    for prompt, completion in zip(prompts.tolist(), completions.tolist()):
        blocks = [one_block_log_probs(model, prompt, completion, [0, 1], b, 2) for b in range(3)]
        expected.append(sum(map(sum, blocks)))
    value = S.mean_field(model, prompts, completions, 2)
    assert value.tolist() == pytest.approx(expected, abs=1e-4)

def test_likelihoods_can_be_differentiated_and_the_truth_of_the_log_is_not():
    """The exact ratio is a training objective too: its gradient against a central difference in one
    weight. The log's truth builds no graph: at B = 4 it would hold 15 copies in memory."""
    model, (prompts, completions) = tiny_model(), batch()
    weight = model.layers[0].mlp[0].weight
    S.exact_log_likelihood(model, prompts, completions, 2).sum().backward()
    values = []
    with torch.no_grad():
        for change in (1e-2, -2e-2):
            weight[0, 0] += change
            value = S.exact_log_likelihood(model, prompts, completions, 2)
            values.append(value.double().sum().item())
    difference = (values[0] - values[1]) / 2e-2
    assert weight.grad[0, 0].item() == pytest.approx(difference, rel=0.02, abs=2e-3)
    assert not S.true_log_prob(model, prompts, completions, 2).requires_grad

def test_the_worked_example_of_noise_is_right():
    """§5: one of two tokens is certain, the other has p = 0.01 whatever is shown. L̂ is −4.6 half of
    the time, 0 and −9.2 a quarter each. The exact ELBO, their mean, is −4.6, as for a pair."""
    def logits(tokens, positions):
        p = torch.tensor([[1.0, 0.0, 0.0], [0.01, 0.99, 0.0]])
        return p.log()[positions % 2].expand(len(tokens), -1, -1)
    model, prompts = FakeModel(logits, 2), torch.zeros(1, 0, dtype=torch.long)
    y = torch.zeros(1, 2, dtype=torch.long)
    drawn = Counter(map(tuple, S.sample_masks(1, 40_000, 2, 2, seeded())[0].tolist()))
    check_chi_square(drawn, {(True, True): 20_000, (True, False): 10_000, (False, True): 10_000})
    for masks, value in (([[1, 1]], -4.6), ([[1, 0]], 0), ([[0, 1]], -9.2), ([[1, 0], [0, 1]], -4.6)):
        estimate = S.elbo(model, prompts, y, torch.tensor([masks]).bool(), 2).item()
        assert estimate == pytest.approx(value, abs=0.02)
    for exact in (S.exact_elbo, S.exact_log_likelihood):
        assert exact(model, prompts, y, 2).item() == pytest.approx(math.log(0.01))

# §6 -----------------------------------------------------------------------------------------------

LOG_RATIOS = [-2.0, -0.1, 0.2, 3.0, 0.0, 5.0, -5.0, 1.0]
ADVANTAGES = [1.0, -2.0, 0.5, -0.7, 0.3, 2.0, -1.5, 0.9]

def weight_by_hand(loss, ratio, A, eps):
    """Oracle: §6's table, a completion's weight before it is divided. One eps for all losses."""
    clipped = min(max(ratio, 1 - eps), 1 + eps)
    if loss == "grpo":
        left_alone = ratio > 1 + eps if A > 0 else ratio < 1 - eps
        return 0.0 if left_alone else ratio
    return {"stabledrl": clipped, "clip_only": clipped, "norm_only": ratio, "no_ratio": 1.0}[loss]

def gradient(loss, log_ratio, advantages, eps, group_size):
    """(value, [d loss / d log ρ̂_i]) of a loss in float64."""
    leaf = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    value = loss(leaf, torch.tensor(advantages, dtype=torch.float64), eps, group_size)
    value.backward()
    return value.item(), leaf.grad.tolist()

@pytest.mark.parametrize("name", S.LOSSES)
@pytest.mark.parametrize("eps", [0.2, 0.5, 1.0, 5.0])
def test_every_loss_gives_the_weights_of_its_table(name, eps):
    """§6: the gradient of the loss by log ρ̂ is −weight·A / divisor, two groups of four."""
    loss, own_eps = S.LOSSES[name]
    ratios = [math.exp(x) for x in LOG_RATIOS]
    weights = [weight_by_hand(name, r, A, eps) for r, A in zip(ratios, ADVANTAGES)]
    divisors = [8.0] * 8
    if name in ("stabledrl", "norm_only"):
        divisors = [2 * sum(weights[:4])] * 4 + [2 * sum(weights[4:])] * 4
    expected = [-w * A / d for w, A, d in zip(weights, ADVANTAGES, divisors)]
    used_eps = own_eps if name in ("norm_only", "no_ratio") else eps
    _, found = gradient(loss, LOG_RATIOS, ADVANTAGES, used_eps, 4)
    assert found == pytest.approx(expected)

def test_the_values_of_both_losses():
    """GRPO: −mean min(ρ̂A, clip(ρ̂)A). StableDRL: −mean over groups of Σ w·A·log ρ̂."""
    surrogates = []
    for x, A in zip(LOG_RATIOS, ADVANTAGES):
        clipped = min(max(math.exp(x), 0.8), 1.2)
        surrogates.append(min(math.exp(x) * A, clipped * A))
    value, _ = gradient(S.grpo_loss, LOG_RATIOS, ADVANTAGES, 0.2, 4)
    assert value == pytest.approx(-statistics.mean(surrogates))
    value, derivatives = gradient(S.stabledrl_loss, LOG_RATIOS, ADVANTAGES, 5.0, 4)
    assert value == pytest.approx(sum(d * x for d, x in zip(derivatives, LOG_RATIOS)))

def test_advantages_are_standardised_within_their_group():
    rewards = [1.0, 0.0, 0.5, 0.25, 0.1, 0.9, 3.0, 3.0]
    expected = []
    for group in (rewards[:4], rewards[4:]):
        mean, deviation = statistics.mean(group), statistics.pstdev(group)
        expected += [(reward - mean) / deviation for reward in group]
    assert S.group_advantages(torch.tensor(rewards), 4).tolist() == pytest.approx(expected, rel=1e-4)
    nearly_equal = S.group_advantages(torch.tensor([0.0, 2e-6]), 2)
    assert nearly_equal.abs().max() <= 1, "no blow-up where rewards hardly differ"

@pytest.mark.parametrize("name", S.LOSSES)
def test_equal_rewards_give_exactly_no_gradient(name):
    """For every value and size of group, also where the mean of equal floats is not that float."""
    loss, eps = S.LOSSES[name]
    for value, size in itertools.product((0.0, 0.1, 1 / 3, 1.0), (2, 3, 7, 8)):
        advantages = S.group_advantages(torch.full((2 * size,), value), size)
        assert (advantages == 0).all()
        _, found = gradient(loss, (LOG_RATIOS * 2)[: 2 * size], advantages.tolist(), eps, size)
        assert found == [0.0] * (2 * size)

@pytest.mark.parametrize("sign", [1, -1])
def test_one_spike_has_no_bound_under_grpo_and_one_under_stabledrl(sign):
    """The paper's first claim. One completion of 8 has log ρ̂ = 5, 10, 20. GRPO's gradient grows as
    ρ̂ where A < 0, and is 0 where A > 0. StableDRL's stays below 1, the largest |A|; and §6's 6/13:
    the most that one of eight may have beside seven of ratio 1."""
    A = [float(sign), -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    for spike in (5.0, 10.0, 20.0):
        log_ratio = [spike] + [0.0] * 7
        _, grpo = gradient(S.grpo_loss, log_ratio, A, 0.2, 8)
        assert abs(grpo[0]) == pytest.approx(math.exp(spike) / 8 if sign < 0 else 0.0)
        _, stable = gradient(S.stabledrl_loss, log_ratio, A, 5.0, 8)
        assert abs(stable[0]) == pytest.approx(6 / 13)
        assert sum(map(abs, stable)) <= 1 + 1e-12

@pytest.mark.parametrize("name", S.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_finite_log_ratio_gives_a_finite_loss_and_gradient(name, dtype):
    """Up to e^1000 and down to e^−1000, for either sign of A."""
    loss, own_eps = S.LOSSES[name]
    signs = torch.tensor([1.0, -1.0] * 4, dtype=dtype)
    extreme = [1000.0, -1000.0, 0.0, 0.3, -0.3, 300.0, -300.0, 90.0]
    for eps, advantages in itertools.product((own_eps, 0.2, 1.0, 5.0, 1e6), (signs, -signs)):
        leaf = torch.tensor(extreme, dtype=dtype, requires_grad=True)
        value = loss(leaf, advantages, eps, 4)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all() and leaf.grad.any()

def test_grpos_open_case_stays_the_largest_and_its_zero_a_zero():
    """Beyond what float32 can hold, too: e^1000 with A < 0 and with A > 0."""
    for A, smallest, largest in ((-1.0, 1e30, 1e36), (1.0, 0.0, 0.0)):
        leaf = torch.tensor([1000.0, 0.0], requires_grad=True)
        S.grpo_loss(leaf, torch.tensor([A, -A]), 0.2).backward()
        assert smallest <= leaf.grad[0].item() <= largest and abs(leaf.grad[1].item()) == 0.5

def test_wrong_shapes_are_refused_in_one_sentence():
    """A column beside a row would broadcast to (N, N), silently."""
    shapes = [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4, 2)), ((4,), (2,)), ((), ())]
    for (loss, eps), (a, b) in itertools.product(S.LOSSES.values(), shapes):
        with pytest.raises(AssertionError, match=r"shape must be \(N,\) = "):
            loss(torch.zeros(a), torch.zeros(b), eps, 2)
    with pytest.raises(AssertionError, match="3 completions are no multiple of group_size 2"):
        S.grpo_loss(torch.zeros(3), torch.zeros(3), 0.2, 2)
    with pytest.raises(AssertionError, match="3 completions are no multiple of group_size 2"):
        S.group_advantages(torch.zeros(3), 2)

def test_stabledrl_update_lies_in_the_convex_hull_of_its_samples():
    """The paper's second claim, with a real model and wild ratios: the update is Σ w_j A_j g_j with
    w ≥ 0, Σ w = 1, so its norm is at most the largest ‖A_j g_j‖. GRPO breaks the bound."""
    model, (prompts, completions) = tiny_model(), batch(N=4)
    A, noise = torch.tensor([0.9, -1.4, 1.1, -0.6]), torch.tensor([0.5, 8.0, -3.0, 2.0])
    log_prob = S.elbo(model, prompts, completions, S.sample_masks(4, 2, 6, 2, seeded()), 2)
    log_ratio = log_prob - log_prob.detach() + noise
    corners = torch.stack([gradients(a * l, model) for a, l in zip(A, log_prob)]).double()
    update = -gradients(S.stabledrl_loss(log_ratio, A, 5.0, 4), model).double()
    w = torch.linalg.lstsq(corners.T, update[:, None]).solution[:, 0]
    assert torch.allclose(w @ corners, update, atol=1e-5 * update.abs().max().item())
    assert (w > -1e-6).all() and w.sum().item() == pytest.approx(1, abs=1e-4)
    largest = corners.norm(dim=1).max()
    assert update.norm() <= largest * (1 + 1e-6)
    assert gradients(S.grpo_loss(log_ratio, A, 0.2), model).norm() > 100 * largest

@pytest.mark.parametrize("name", S.LOSSES)
def test_at_ratio_one_all_losses_are_the_policy_gradient(name):
    """−mean A·∇L̂; and their value is 0, where Σ A = 0, though their gradient is not (§6)."""
    loss, eps = S.LOSSES[name]
    A = [1.0, -2.0, 1.0, 3.0, -2.6, -0.4]
    value, found = gradient(loss, [0.0] * 6, A, eps, 3)
    assert found == pytest.approx([-a / 6 for a in A]) and value == pytest.approx(0)

# §7 -----------------------------------------------------------------------------------------------

def test_diagnostics_against_plain_loops():
    log_ratio, G, eps = [0.0, 1.0, -2.0, 0.5, 4.0, 0.1], 3, 0.5
    ratios = [math.exp(x) for x in log_ratio]
    sizes = []
    for group in (ratios[:3], ratios[3:]):
        sizes.append(sum(group) ** 2 / sum(ratio**2 for ratio in group))
    outside = [ratio < 1 - eps or ratio > 1 + eps for ratio in ratios]
    expected = {"ratio_max": max(ratios), "ess": sum(sizes) / 2, "clip_fraction": sum(outside) / 6}
    found = S.ratio_diagnostics(torch.tensor(log_ratio, requires_grad=True), eps, G)
    assert found == pytest.approx(expected, rel=1e-5)

def test_diagnostics_at_the_extremes():
    """Equal ratios: ESS = G, and ratios on the bounds are inside. One outlier: ESS = 1. e^±900 does
    not overflow: JSON has no infinity."""
    equal = S.ratio_diagnostics(torch.zeros(8), 0.0, 4)
    assert equal == {"ratio_max": 1.0, "clip_fraction": 0.0, "ess": 4.0}
    wild = S.ratio_diagnostics(torch.tensor([900.0, 0.0, -900.0, 0.0]), 0.2, 4)
    assert wild == pytest.approx({"ess": 1, "ratio_max": math.exp(700), "clip_fraction": 0.5})

def test_noise_and_drift_against_plain_python():
    log_ratio, truth, old, base = [1.0, 3.0, 0.0], [-1.0, -2.0, -4.0], [-2.0, -2.5, -3.0], [-3.0] * 3
    noise = [x - (t - o) for x, t, o in zip(log_ratio, truth, old)]
    found = S.noise_diagnostics(*map(torch.tensor, (log_ratio, truth, old, base)))
    assert found == pytest.approx({"noise_std": statistics.pstdev(noise), "drift": 0.5})

# §8 -----------------------------------------------------------------------------------------------

SIZES = dict(prompts=2, group_size=3, d_model=16, n_layer=1, n_head=2, base_accuracy=0)

def tiny(**settings):
    return S.Config(**(SIZES | dict(updates=4, log_every=2) | settings))

def train(folder, **settings):
    """A tiny run from an untrained base policy -> rows of its log."""
    config = tiny(**settings)
    _, rows = S.train(config, S.new_model(config), folder)
    return rows

@pytest.fixture
def dense(monkeypatch):
    """Addition with the share of right characters as reward: an untrained policy gets some of it,
    so a run of four updates has a gradient."""
    def reward(prompt, completion):
        total = f"{int(prompt[:2]) + int(prompt[3:5])}...."
        return sum(a == b for a, b in zip(completion, total)) / 4
    monkeypatch.setattr(TASKS["addition"], "reward", reward)

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """As if matplotlib were missing, so that no test waits for a figure."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

def test_same_seed_same_log_whatever_the_global_random_state_is(tmp_path, dense):
    logs = []
    for i, seed in enumerate((0, 0, 1)):
        config = tiny(seed=seed)
        model = S.new_model(tiny(seed=0))
        torch.manual_seed(i)
        np.random.seed(i)
        _, rows = S.train(config, model, tmp_path / str(i))
        logs.append(without_seconds(rows))
    assert logs[0] == logs[1] != logs[2]

def watch_batches(monkeypatch):
    """A list that gets (texts, the policy's weights, batch) for every batch that is sampled."""
    batches, answer = [], S.answer
    def watched(model, task, texts, *arguments, **options):
        result = answer(model, task, texts, *arguments, **options)
        if options.get("samples"):
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            batches.append((texts, weights, result[0]))
        return result
    monkeypatch.setattr(S, "answer", watched)
    return batches

def test_all_policies_see_the_same_prompts_and_first_answers(tmp_path, monkeypatch):
    """The paper's protocol: same base policy, same prompts, same budget for each of one seed."""
    batches = watch_batches(monkeypatch)
    policies = list(itertools.product(S.LOSSES, ("elbo", "exact")))
    for loss, estimator in policies:
        train(tmp_path / loss / estimator, loss=loss, estimator=estimator)
    texts = [text for text, _, _ in batches]
    assert texts == texts[:2] * len(policies) and texts[0] != texts[1]
    first = [batch["completions"] for _, _, batch in batches[::2]]
    assert all(torch.equal(completions, first[0]) for completions in first)

def test_the_log_has_the_columns_that_readme_explains(tmp_path):
    rows = train(tmp_path)
    assert [row["update"] for row in rows] == [2, 4]
    settings, *lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert settings == vars(tiny()) and lines == rows
    table = README[README.index("| column |") :].split("\n\n")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.M)
    explained = {name for cell in cells for name in re.findall(r"\w+", cell)}
    assert set(rows[0]) == set(rows[1]) == explained, "a new column needs a row in README's table"

def test_rows_sum_up_all_updates_since_the_row_before(tmp_path, dense):
    """One row per update against one row for all: means of the means, maximum of the maxima, and
    what is measured at the line is that of the last."""
    fine = train(tmp_path / "fine", mu=1, log_every=1)
    (coarse,) = train(tmp_path / "coarse", mu=1, log_every=4)
    for name in ("reward", "grad_norm", "ess", "clip_fraction", "spread"):
        assert coarse[name] == pytest.approx(statistics.mean(row[name] for row in fine))
    assert coarse["ratio_max"] == max(row["ratio_max"] for row in fine)
    for name in ("noise_std", "drift", "accuracy"):
        assert coarse[name] == fine[-1][name]

NO_NOISE = {"exact": True, "trajectory": True, "mean_field": True, "exact_elbo": True, "elbo": False}

@pytest.mark.parametrize("estimator", S.ESTIMATORS)
@pytest.mark.parametrize("shared_masks", [False, True])
def test_every_ratio_is_one_at_the_first_update_or_noise(estimator, shared_masks, tmp_path, dense):
    """`spread` is 0 for whatever draws nothing, or draws the same masks again. With μ = 1 there is
    no other update: every ρ̂ is then 1. With μ = 2 the policy has moved at the second."""
    settings = dict(loss="grpo", estimator=estimator, shared_masks=shared_masks, log_every=2, lr=0.01)
    one = train(tmp_path / "1", mu=1, **settings)
    two = train(tmp_path / "2", mu=2, **settings)
    quiet = NO_NOISE[estimator] or shared_masks
    for first, second in zip(one, two):
        assert (first["spread"] == 0) == (second["spread"] == 0) == quiet
        assert (first["ratio_max"] == 1) == quiet and second["ratio_max"] != 1
    if estimator == "exact":
        assert all(row["noise_std"] == 0 for row in two)

def test_coupled_masks_are_drawn_anew_for_each_estimate_too(tmp_path):
    for row in train(tmp_path, masks="coupled", copies=2):
        assert row["spread"] > 0

def test_gradient_norm_is_logged_before_clipping_and_clipped_after(tmp_path, monkeypatch, dense):
    """The norm of what the optimiser gets, at the first of two updates from one base."""
    norms, step = [], torch.optim.Adam.step
    def watched(optimizer, *arguments):
        (group,) = optimizer.param_groups
        norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item())
        return step(optimizer, *arguments)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    settings = dict(mu=1, log_every=1, updates=1)
    (free,) = train(tmp_path / "free", max_grad_norm=1e9, **settings)
    (clipped,) = train(tmp_path / "clipped", max_grad_norm=1e-3, **settings)
    assert free["grad_norm"] == clipped["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)

@pytest.mark.parametrize("loss", S.LOSSES)
def test_one_update_follows_the_advantages(loss, tmp_path, monkeypatch):
    """With everything else fixed, one step on the exact ratio makes rewarded completions likelier
    than the others."""
    config = tiny(loss=loss, estimator="exact", prompts=8, group_size=4, mu=1, updates=1, log_every=1)
    A, batches = torch.tensor([1.0, -1.0] * 16), watch_batches(monkeypatch)
    monkeypatch.setattr(S, "group_advantages", lambda rewards, group_size: A)
    base = S.new_model(config)
    model, _ = S.train(config, base, tmp_path)
    ((_, _, batch),) = batches
    gain = S.exact_log_likelihood(model, **batch) - S.exact_log_likelihood(base, **batch)
    assert (gain * A).mean() > 0

def test_drift_is_measured_on_the_batch_that_was_sampled(tmp_path, monkeypatch, dense):
    """0 in the first batch; then the mean of log π_old − log π_base over the completions of π_old,
    by enumeration of all orders."""
    batches = watch_batches(monkeypatch)
    rows = train(tmp_path, lr=0.01)
    (_, base, _), (_, old, batch) = batches
    prompts = batch["prompts"].repeat_interleave(3, 0).tolist()
    means = []
    for weights in (old, base):
        model = S.new_model(tiny())
        model.load_state_dict(weights)
        pairs = zip(prompts, batch["completions"].tolist())
        means.append(statistics.mean(brute_force(model, p, c, 2)[1] for p, c in pairs))
    assert rows[0]["drift"] == 0 and abs(rows[1]["drift"]) > 1e-3
    assert rows[1]["drift"] == pytest.approx(means[0] - means[1], abs=1e-4)

def long_task(B):
    """Prompts and answers of one block of B zeros and ones; no answer is right."""
    return types.SimpleNamespace(
        name="long", vocab="01", prompt_len=B, completion_len=B, block_size=B,
        reward=lambda prompt, completion: 0.0, sample=lambda rng, n, split: (["0" * B] * n, None))

@pytest.mark.parametrize("B", [6, 7])
def test_noise_is_measured_for_blocks_of_at_most_6(B, tmp_path, monkeypatch):
    """Exact likelihoods of 2^7 − 1 copies are not asked for: the columns are then missing."""
    monkeypatch.setitem(TASKS, "long", long_task(B))
    row = train(tmp_path, task="long", block_size=None)[0]
    assert ("noise_std" in row) == ("drift" in row) == (B == 6)

def test_pretraining_stops_at_the_accuracy_asked_for_or_says_why_not(monkeypatch):
    config = tiny(base_accuracy=0.004)
    assert 0.004 <= S.accuracy(S.pretrain(config), TASKS["addition"], 2) < 0.2
    monkeypatch.setattr(S, "tqdm", lambda steps, disable: steps[:10])
    with pytest.raises(TimeoutError, match="--base_accuracy 0.9 is not reached in 2,000 updates"):
        S.pretrain(tiny(base_accuracy=0.9))

@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_the_run(poison, tmp_path, monkeypatch):
    """One likelihood of one sample, in update 4. It is never replaced by a number: a NaN that became
    0 would be the largest weight of its group. Log and checkpoint are those of update 2."""
    calls = []
    def poisoned(model, **arguments):
        calls.append(1)
        values = S.elbo(model, **arguments)
        is_one = torch.arange(len(values)) == 3
        return torch.where(is_one, poison, values) if len(calls) == 6 else values  # old, new, new
    monkeypatch.setitem(S.ESTIMATORS, "elbo", poisoned)
    with pytest.raises(FloatingPointError, match="update 4 was not made: loss .*, gradient norm"):
        train(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert [row["update"] for row in torch.load(tmp_path / "checkpoint.pt")["rows"]] == [2]

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_is_the_same_kind_of_thing_on_a_gpu(tmp_path):
    """Run there, and read here: the exact likelihood is that of the CPU."""
    config = tiny(device="cuda")
    S.train(config, S.new_model(config), tmp_path)
    values = []
    for device in ("cpu", "cuda"):
        model = S.new_model(tiny(device=device))
        S.load(tmp_path / "checkpoint.pt", model=model)
        prompts, completions = (x.to(device) for x in batch(P=6, L=4, vocab_size=14))
        values.append(S.exact_log_likelihood(model, prompts, completions, 2).tolist())
    assert values[1] == pytest.approx(values[0], abs=1e-3)

# Config -------------------------------------------------------------------------------------------

OTHER_VALUES = {
    "loss": "grpo", "estimator": "exact", "masks": "coupled", "shared_masks": True, "copies": 4,
    "clip_eps": 0.01, "seed": 1, "lr": 0.1, "prompts": 3, "group_size": 4, "mu": 1,
    "max_grad_norm": 1e-9, "block_size": 1, "d_model": 32, "n_layer": 3, "n_head": 1,
    "log_every": 4, "updates": 6}

@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(S.Config)])
def test_no_setting_is_dead(name, tmp_path, dense):
    """Each with another value changes the rows of the log, and the name of the run. (Those of the
    base policy, the task and the device have tests of their own. `updates` names no run.)"""
    if name in ("base_accuracy", "base_lr", "task", "device"):
        return
    usual = dict(lr=0.01, copies=2)
    changed = usual | {name: OTHER_VALUES[name]}
    rows = train(tmp_path / "usual", **usual)
    assert without_seconds(train(tmp_path / "changed", **changed)) != without_seconds(rows)
    same_name = S.run_name(tiny(**usual)) == S.run_name(tiny(**changed))
    assert same_name == (name == "updates")

def test_the_learning_rate_of_the_base_is_used():
    policies = [S.pretrain(tiny(base_accuracy=0.004, base_lr=rate)) for rate in (1e-3, 2e-3)]
    assert not torch.equal(policies[0].embed.weight, policies[1].embed.weight)

def test_base_policies_have_a_file_for_every_setting_that_makes_them():
    """Two runs share a base if and only if they agree in all that pretraining looks at."""
    others = OTHER_VALUES | {"task": "chain", "base_accuracy": 0.5, "base_lr": 1e-4, "device": "cpu"}
    for name, value in others.items():
        same = S.base_path(S.Config(), "x") == S.base_path(S.Config(**{name: value, "copies": 2}), "x")
        assert same == (name not in S.BASE)
    class Seen(types.SimpleNamespace):
        """Settings that only BASE and device may be read from."""
    seen = Seen(**{name: getattr(tiny(), name) for name in S.BASE}, device="cpu")
    assert isinstance(S.pretrain(seen), S.BlockDiffusionTransformer)

def test_a_config_built_in_python_is_complete_and_canonical():
    """No field is None, for any task and loss; 1, 1.0 and True make one run; and the command line
    makes the same one."""
    for task, loss in itertools.product(TASKS, S.LOSSES):
        config = S.Config(task=task, loss=loss)
        assert config.block_size == TASKS[task].block_size
        assert config.clip_eps == S.LOSSES[loss][1] and None not in vars(config).values()
        flags = f"--task {task} --loss {loss}"
        assert S.parse(flags.split())[0] == [config]
    ones = [S.Config(shared_masks=1, clip_eps=1), S.Config(shared_masks=True, clip_eps=1.0)]
    assert ones[0] == ones[1] and json.dumps(vars(ones[0])) == json.dumps(vars(ones[1]))
    with pytest.raises(AssertionError, match="--copies must be finite, and at least 1"):
        S.Config(copies=0)

def test_a_run_is_named_by_all_that_differs_from_the_defaults():
    named = S.Config(loss="grpo", lr=2e-4, copies=2, shared_masks=True, seed=4, updates=40)
    name = "addition-grpo-elbo-shared_masks=True-copies=2-lr=0.0002-seed=4"
    assert S.run_name(named) == name
    assert S.run_name(S.Config(clip_eps=0.2)) == "addition-stabledrl-elbo-clip_eps=0.2-seed=0"
    assert S.run_name(S.Config(loss="grpo", clip_eps=0.2)) == "addition-grpo-elbo-seed=0"

# Files and resume ---------------------------------------------------------------------------------

LONG = ("--updates 600 --log_every 6 --seed 3 --estimator elbo --prompts 2 --group_size 3 "
        "--d_model 16 --n_layer 1 --n_head 2 --base_accuracy 0")

def start(flags, program=("stabledrl.py",), **options):
    """The real program as a process of its own, on two threads."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MPLBACKEND": "agg"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, *program, *flags.split()]
    return subprocess.Popen(command, cwd=HERE, env=environment, text=True, **pipes)

def lines_of(folder):
    path = folder / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []

def wait_for(condition, process):
    """Until condition() holds, or the process has ended, or 100 s are over."""
    deadline = time.monotonic() + 100
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)

def assert_same_run(a, b):
    """Logs that are equal but for the seconds, bit-identical weights and optimiser state."""
    logs = [list(map(json.loads, lines_of(folder))) for folder in (a, b)]
    assert without_seconds(logs[0]) == without_seconds(logs[1])
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (a, b))
    for name, weights in one["model"].items():
        assert torch.equal(weights, other["model"][name])
    for i, state in one["optimizer"]["state"].items():
        for name, values in state.items():
            assert torch.equal(values, other["optimizer"]["state"][i][name])

@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_two_runs_killed_at_any_moment_end_as_if_they_had_not_been(kills, tmp_path):
    """Two policies in two processes, SIGKILL to their parent at a random moment after new lines: no
    child goes on behind its back. Then --resume, and the logs of runs one after the other."""
    flags = f"{LONG} --loss grpo stabledrl"
    names = [f"addition-{loss}-elbo-d_model=16-n_layer=1-n_head=2-base_accuracy=0.0-prompts=2-"
             f"group_size=3-log_every=6-seed=3" for loss in ("grpo", "stabledrl")]
    folders = [tmp_path / "killed" / name for name in names]
    for _ in range(kills):
        before = [len(lines_of(folder)) for folder in folders]
        process = start(f"{flags} --out {tmp_path / 'killed'} --resume")
        wait_for(lambda: all(len(lines_of(f)) > max(n, 1) for f, n in zip(folders, before)), process)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.communicate(timeout=30)  # returns when no child holds the pipe any more
        checkpoints = [(folder / "checkpoint.pt").read_bytes() for folder in folders]
        time.sleep(0.2)
        assert checkpoints == [(folder / "checkpoint.pt").read_bytes() for folder in folders]
    assert min(len(lines_of(folder)) for folder in folders) < 101, "killed too late"
    resumed = start(f"{flags} --out {tmp_path / 'killed'} --resume")
    S.main(f"{flags} --out {tmp_path / 'whole'}".split())
    assert resumed.wait() == 0
    for name, folder in zip(names, folders):
        assert_same_run(tmp_path / "whole" / name, folder)

SAYS = {"ctrl-c": "interrupted: the same command with --resume goes on from the last lines",
        "parent alone": "interrupted: the same command with --resume goes on from the last lines",
        "kill": "stabledrl.py: A process in the process pool was terminated abruptly while the "
                "future was running or pending."}

@pytest.mark.parametrize("event", SAYS)
def test_an_interruption_is_one_line(event, tmp_path):
    """SIGINT to the group of processes, as from a terminal, or to the parent alone; or SIGKILL to a
    worker: no traceback, and all is over within a few seconds."""
    flags = f"{LONG} --loss grpo stabledrl --updates 60000 --out {tmp_path}"
    process = start(flags, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("*/checkpoint.pt"))) == 2, process)
    if event == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    elif event == "parent alone":
        process.send_signal(signal.SIGINT)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1] == SAYS[event]

@pytest.mark.parametrize("moment", ["write", "rename", "log"])
def test_a_crash_while_something_is_written_leaves_the_last_good_checkpoint(
        moment, tmp_path, monkeypatch, dense):
    """The second of three checkpoints is cut off: the first is whole, and the run goes on."""
    train(tmp_path / "whole", updates=6)
    place = {"write": (torch, "save"), "rename": (os, "replace"), "log": (Path, "write_text")}[moment]
    original, calls = getattr(*place), []
    def crash_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == (3 if moment == "log" else 2):  # the log is also written at the start
            if moment == "log":
                arguments[0].write_bytes(b"half of it")
            raise RuntimeError("power cut")
        return original(*arguments, **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(*place, crash_at_the_second)
        train(tmp_path / "crashed", updates=6)
    assert len(torch.load(tmp_path / "crashed" / "checkpoint.pt")["rows"]) == 1
    train(tmp_path / "crashed", updates=6)
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")

def test_resume_is_exact_for_losses_that_draw_and_for_more_updates(tmp_path, monkeypatch, dense):
    """Stopped after one line, and asked to go on to three, a run is the run that was asked for
    three at once: also where the estimate draws from torch's global stream."""
    def noisy(model, **batch):
        return S.elbo(model, **batch) * (1 + torch.rand(len(batch["completions"])))
    monkeypatch.setitem(S.ESTIMATORS, "noisy", noisy)
    train(tmp_path / "whole", estimator="noisy", updates=6)
    train(tmp_path / "cut", estimator="noisy", updates=2)
    torch.manual_seed(99)
    train(tmp_path / "cut", estimator="noisy", updates=6)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")

def test_a_log_that_was_deleted_is_written_again(tmp_path):
    rows = train(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").unlink()
    assert train(tmp_path) == rows and (tmp_path / "log.jsonl").read_bytes() == log

def test_files_written_on_a_gpu_can_be_read_without_one(tmp_path, monkeypatch):
    """A file in which every tensor is marked as one of cuda:0."""
    path, model = tmp_path / "x.pt", tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        S.save(path, model=model, rows=[1])
    other = tiny_model(seed=5)
    assert S.load(path, model=other) == [1]
    assert torch.equal(other.embed.weight, model.embed.weight)

def test_two_processes_write_under_two_names(tmp_path, monkeypatch):
    """So two programs that make one base at the same time do not take each other's file away."""
    names, replace = [], os.replace
    def watched(temporary, path):
        names.append(temporary)
        replace(temporary, path)
    monkeypatch.setattr(os, "replace", watched)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        S.save(tmp_path / "base.pt", model=tiny_model())
    assert len(set(names)) == 2

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-code-has-run",)

def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()

def test_a_damaged_file_is_refused_before_any_work_and_runs_no_code(tmp_path, monkeypatch, capsys):
    """Empty, text, noise, cut off anywhere, a pickle that runs code, weights of other sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S, "pretrain", lambda config: pytest.fail("work was done before"))
    model, config = S.new_model(tiny()), tiny()
    base, folder = S.base_path(config, tmp_path), tmp_path / S.run_name(config)
    S.save(base, model=model)
    train(folder)
    flags = f"{LONG} --updates 4 --log_every 2 --seed 0 --loss stabledrl --resume --out {tmp_path}"
    good = (folder / "checkpoint.pt").read_bytes()
    contents = [b"", b"hello", b"\x80\x02}.", np.random.default_rng(0).bytes(5_000), good[:-1]]
    contents += [good[: int(len(good) * part)] for part in (0.001, 0.1, 0.5, 0.99)]
    contents += [pickle.dumps(Hostile()), saved(Hostile()), saved({}), saved([1]), saved(model.embed.weight)]
    contents += [saved({"model": tiny_model().state_dict(), "rows": []})]
    for path in (folder / "checkpoint.pt", base):
        whole = path.read_bytes()
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(SystemExit) as stop:
                S.main(flags.split())
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1
            assert error.startswith(f"stabledrl.py: error: {path} is damaged, or of another task or")
        path.write_bytes(whole)
    assert not (tmp_path / "hostile-code-has-run").exists()
    S.main(flags.split())

# §9 -----------------------------------------------------------------------------------------------

BAD_INPUT = {
    "--lerning_rate 1": "unrecognized arguments", "--updates ten": "--updates: invalid int",
    "--updates 1.5": "--updates: invalid int", "--lr ten": "--lr: invalid float",
    "--shared_masks 5": "unrecognized arguments: 5", "--resume 0 1": "unrecognized arguments: 0 1",
    "--out a b": "unrecognized arguments: b", "--masks coupled": "copies must be even, not 1",
    "--masks coupled --copies 2 3": "copies must be even, not 3", "--task chess": "invalid choice",
    "--loss ppo": "--loss: invalid choice", "--estimator magic": "--estimator: invalid choice",
    "--masks none": "--masks: invalid choice", "--device tpu": "tpu",
    "--loss": "expected at least one argument", "--base_accuracy 1.1": "must be at most 1",
    "--block_size 3": "lengths (6, 4) must be multiples of block_size 3",
    "--d_model 30": "d_model 30 is no multiple of 2*4 heads",
    "--mu 3": "--log_every must be a multiple of --mu", "--out /dev/null/x": "/dev/null/x",
    "--updates 30": "--updates must be a multiple of --log_every",
    "--task addition5 --estimator exact": "block_size 8 is above 6",
    "--seed -1": "--seed must be finite, and at least 0",
    "--group_size 1": "--group_size must be finite, and at least 2"}
for name in "block_size d_model n_layer n_head copies prompts mu updates log_every".split():
    BAD_INPUT[f"--{name} 0"] = f"--{name} must be finite, and at least 1"
for name, value in itertools.product(("base_lr", "clip_eps", "lr", "max_grad_norm"), ("-1", "nan", "inf")):
    BAD_INPUT[f"--{name} {value}"] = f"--{name} must be finite, and at least 0"
if not torch.cuda.is_available():
    BAD_INPUT["--device cuda"] = "NVIDIA" if torch.version.cuda else "CUDA"

def refused(flags, capsys, monkeypatch):
    """The one line with which the command line ends, before any work."""
    monkeypatch.setattr(S, "pretrain", lambda config: pytest.fail("work was done before"))
    with pytest.raises(SystemExit) as stop:
        S.main(flags.split())
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith("stabledrl.py: error: ")
    return error

@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_status_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert BAD_INPUT[flags] in refused(flags, capsys, monkeypatch)

def no_scalar(log_ratio, advantages, clip_eps, group_size):
    return log_ratio * advantages

def per_token(model, prompts, completions, masks, block_size, steps):
    return S.token_log_probs(model, prompts, completions, masks, block_size)[:, 0]

def hide_nothing(*shape_and_generator):
    return torch.zeros(shape_and_generator[:3], dtype=torch.bool)

def test_what_you_register_is_tried_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(S.LOSSES, "mine", (no_scalar, 1.0))
    monkeypatch.setitem(S.ESTIMATORS, "mine", per_token)
    monkeypatch.setitem(S.MASKS, "mine", hide_nothing)
    says = {"--loss mine": "is no finite number", "--masks mine": "is no finite number, from estimates",
            "--estimator mine": "shape must be (N,) = (32,), not [8, 4]"}
    for flags, words in says.items():
        assert words in refused(f"--loss stabledrl {flags}", capsys, monkeypatch)

def test_an_estimator_that_misses_a_keyword_is_told_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(S.ESTIMATORS, "mine", lambda model, prompts, completions: None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        S.main(["--estimator", "mine"])

def test_a_finished_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    log = tmp_path / "addition-grpo-elbo-seed=0" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("kept")
    assert "exists: --resume it" in refused(f"--loss grpo --out {tmp_path}", capsys, monkeypatch)
    assert log.read_text() == "kept"

def test_no_flags_mean_the_main_job_and_several_values_their_product():
    configs, out, resume = S.parse([])
    policies = [(config.loss, config.estimator, config.clip_eps) for config in configs]
    assert policies == [("grpo", "elbo", 0.2), ("grpo", "exact", 0.2), ("stabledrl", "elbo", 5)]
    assert out == "runs" and not resume
    for config in configs:
        same = dataclasses.replace(config, loss="grpo", estimator="elbo", clip_eps=0.2)
        assert same == configs[0] and same.updates == 1200 and same.masks == "independent"
    flags = "--loss grpo stabledrl --estimator exact mean_field --seed 3 4 --seed 3 4"
    product, _, _ = S.parse(flags.split())
    expected = itertools.product(("grpo", "stabledrl"), ("exact", "mean_field"), (3, 4))
    assert [(c.loss, c.estimator, c.seed) for c in product] == list(expected)
    assert len(S.parse("--loss grpo --lr 1e-4 1e-4 2e-4".split())[0]) == 2, "each run once"

def test_help_explains_each_flag_and_gives_its_default(capsys):
    with pytest.raises(SystemExit):
        S.main(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(S.Config):
        assert re.search(rf"^ *{field.name} +\w", shown, re.M), "Config's docstring explains it"
        assert re.search(rf"--{field.name}\b[^-]*default: ?\n? *{field.default}", shown)
    assert "--out" in shown and "--resume" in shown

def test_what_is_printed_is_ascii():
    """Consoles under Windows may know no other letters: the strings of the code, and --help."""
    tree = ast.parse(SOURCE)
    prose = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
             if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in prose:
            assert node.value.isascii()
    assert S.Config.__doc__.isascii()

def test_main_says_how_far_it_is_and_how_to_get_a_figure(tmp_path, capsys):
    S.main(f"{LONG} --updates 12 --out {tmp_path}".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"base policies: {tmp_path}/base-*.pt; delete them after a change")
    for line in lines[1:-1]:
        assert re.search(r"seed=3  update (6|12)  reward 0\.\d{3}$", line)
    assert lines[-1] == "no figure: pip install matplotlib, and repeat the command with --resume"

def test_the_figure_has_a_panel_for_each_column_and_a_line_for_each_run(tmp_path, monkeypatch):
    """With a stand-in for matplotlib that notes what is drawn. No logarithmic axis: a column of
    zeros would be lost on it, with a warning."""
    pyplot = mock.MagicMock()
    figure, axes = mock.MagicMock(), [mock.MagicMock() for _ in S.PANELS]
    pyplot.subplots.return_value = figure, axes
    monkeypatch.setitem(sys.modules, "matplotlib", mock.MagicMock(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    S.main(f"{LONG} --updates 12 --loss grpo stabledrl --out {tmp_path}".split())
    for axis, column in zip(axes, S.PANELS):
        labels = [call.kwargs["label"] for call in axis.plot.call_args_list]
        assert [label.split(", ")[1] for label in labels] == ["grpo", "stabledrl"]
        assert all(call.args[0] == [6, 12] for call in axis.plot.call_args_list)
        assert axis.set.call_args.kwargs["title"] == column
        assert axis.set.call_args.kwargs["yscale"] != "log"
    figure.savefig.assert_called_once_with(tmp_path / "plot.svg")

def test_one_failure_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    """A number that is not finite, no memory left, a full disk: one line. An error in somebody's
    own loss: with its traceback. The other run goes on, and the status says that one failed."""
    errors = [FloatingPointError("bad luck"), torch.OutOfMemoryError("bad luck"), OSError("bad luck"),
              ZeroDivisionError("bad luck")]
    def unlucky(log_ratio, advantages, clip_eps, group_size):
        if log_ratio.any():  # not when it is tried
            raise error
        return log_ratio.sum()
    monkeypatch.setitem(S.LOSSES, "unlucky", (unlucky, 1.0))
    for i, error in enumerate(errors):
        with pytest.raises(SystemExit) as stop:
            S.main(f"{LONG} --updates 6 --loss unlucky grpo --out {tmp_path / str(i)}".split())
        out = capsys.readouterr().out
        assert stop.value.code == 1 and "addition-grpo" in out.splitlines()[-2]
        assert re.search(r"^addition-unlucky.* FAILED: .*", out, re.M)
        own = isinstance(error, ZeroDivisionError)
        assert ("Traceback" in out) == own and ("in unlucky" in out) == own

def test_a_base_that_cannot_be_made_fails_its_runs_and_no_others(tmp_path, monkeypatch, capsys):
    def pretrain(config):
        if config.seed == 0:
            raise TimeoutError("not reached")
        return S.new_model(config)
    monkeypatch.setattr(S, "pretrain", pretrain)
    with pytest.raises(SystemExit) as stop:
        S.main(f"{LONG} --updates 6 --seed 0 1 --out {tmp_path}".split())
    out = capsys.readouterr().out
    assert stop.value.code == 1 and out.count("FAILED: not reached") == 1
    assert len(list(tmp_path.glob("*seed=1/checkpoint.pt"))) == 1

PARENT_NEVER_RUNS_BACKWARD = """
import os, sys, torch, stabledrl
parent, backward, pretrain = os.getpid(), torch.autograd.backward, stabledrl.pretrain
def noted(*arguments, **options):
    assert os.getpid() != parent, "the process that forks has run a backward pass"
    return backward(*arguments, **options)
def counted(config):
    print("a base is made", flush=True)
    return pretrain(config)
torch.autograd.backward, stabledrl.pretrain = noted, counted
stabledrl.main(sys.argv[1:])
"""

def test_the_process_that_forks_never_runs_a_backward_pass(tmp_path):
    """Where torch sees a GPU, autograd does not survive a fork. Two runs, one base to be made: in a
    worker, and once."""
    flags = f"{LONG} --updates 6 --base_accuracy 0.002 --loss grpo stabledrl --out {tmp_path}"
    process = start(flags, program=("-c", PARENT_NEVER_RUNS_BACKWARD))
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    assert out.count("a base is made") == 1 and len(list(tmp_path.glob("*/checkpoint.pt"))) == 2

@pytest.mark.parametrize("platform,forks", [("linux", True), ("darwin", False), ("win32", False)])
def test_runs_go_side_by_side_where_processes_can_be_forked(platform, forks, tmp_path, monkeypatch):
    """And one after the other elsewhere, on a GPU, or if there is one alone."""
    jobs = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(S, "check", lambda *arguments: None)
    monkeypatch.setattr(S, "launch", lambda work, configs, out, n: jobs.append(n) or [[1]] * len(configs))
    S.main("--seed 0 1 2 --loss grpo".split())
    S.main("--seed 0 --loss grpo".split())
    S.main("--seed 0 1 2 --loss grpo --device cuda".split())
    assert jobs == [2 if forks else 1] * 2 + [1] * 4

@pytest.mark.parametrize("stdout", ["closed pipe", "/dev/full"])
def test_an_output_that_cannot_be_written_costs_its_lines_and_not_the_run(stdout, tmp_path):
    """As with `python stabledrl.py | head`: both runs, side by side, come to their end."""
    if stdout == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(stdout, os.O_WRONLY)
    process = start(f"{LONG} --updates 12 --loss grpo stabledrl --out {tmp_path}", stdout=writer)
    os.close(writer)
    _, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors
    assert [len(lines_of(path.parent)) for path in tmp_path.glob("*/log.jsonl")] == [3, 3]

IMPORT_CHANGES_NOTHING = """
import sys, toy_tasks
assert "torch" not in sys.modules
import random, numpy, torch
def state():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
            torch.get_num_threads(), torch.get_default_dtype())
before = state()
import stabledrl
assert state() == before and "matplotlib" not in sys.modules
"""

def test_importing_does_nothing_visible():
    """No output, no seeding, no change of threads or defaults; and toy_tasks needs no torch."""
    process = start("", program=("-c", IMPORT_CHANGES_NOTHING))
    assert process.communicate() == ("", "") and process.returncode == 0

# README -------------------------------------------------------------------------------------------

def test_readme_code_runs(tmp_path, monkeypatch):
    """Every python block, in a fresh namespace, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    for code in blocks:
        with mock.patch.dict(S.LOSSES), mock.patch.dict(S.ESTIMATORS), mock.patch.dict(TASKS):
            exec(compile(code, "README.md", "exec"), {})
    assert blocks

def test_readme_commands_are_accepted_and_every_flag_exists(tmp_path):
    flags = re.findall(r"^\| `(--[^`]*)`", README, re.M)
    flags += re.findall(r"`python stabledrl.py (--[^`]*)`", README)
    for line in flags:
        assert S.parse(line.split())[0]
    known = {f"--{field.name}" for field in dataclasses.fields(S.Config)} | {"--out", "--resume", "--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9-]*", README + SOURCE))
    assert len(flags) > 5 and named - {"--page"} <= known

def test_readme_quotes_the_two_lines_of_stabledrl():
    quoted = re.findall(r"^(?:clipped|weights) .*", README, re.M)
    code = [" ".join(line.split("#")[0].split()) for line in quoted]
    source = [" ".join(line.split("#")[0].split()) for line in SOURCE.splitlines()]
    assert len(code) >= 2 and all(line in source for line in code)

# A learning run, not in the default run -----------------------------------------------------------

@pytest.mark.slow
def test_grpo_collapses_on_the_estimate_and_learns_on_the_exact_ratio(tmp_path):
    """The main job with half of its updates: GRPO falls below half of its first line on the
    estimate, rises by half on the exact ratio, and StableDRL ends above three times GRPO."""
    process = start(f"--updates 600 --seed 0 --out {tmp_path}")
    process.communicate()
    first, final = {}, {}
    for path in tmp_path.glob("*/log.jsonl"):
        config, *rows = map(json.loads, path.read_text().splitlines())
        policy = config["loss"], config["estimator"]
        first[policy] = rows[0]["reward"]
        final[policy] = statistics.mean(row["reward"] for row in rows[-5:])
    assert final["grpo", "elbo"] < first["grpo", "elbo"] / 2
    assert final["grpo", "exact"] > 1.5 * first["grpo", "exact"]
    assert final["stabledrl", "elbo"] > 3 * final["grpo", "elbo"]
