"""The claims of stabledrl.py, as tests, in the order of its sections.

Every test compares with an oracle that shares no code with what it tests: enumeration, plain Python loops, one separate
pass per block, autograd. Where chance is involved, the docstring states how often the test would fail if the claim were
true. Seeds are fixed, so a test that has passed once keeps passing on the same machine.

    pytest              all but the learning runs, under a minute on two cores
    pytest -m slow      the learning runs: minutes
"""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import stabledrl as S
from toy_tasks import TASKS, decode, encode

HERE = Path(__file__).parent
SOURCE, README = (HERE / "stabledrl.py").read_text(), (HERE / "README.md").read_text()
TINY = "--updates 4 --log_every 2 --prompts 2 --group_size 3 --d_model 16 --n_layer 1 --n_head 2 --base_accuracy 0 --device cpu"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(vocab_size=5, seed=0, n_layer=2):
    """A small random model with large weights: its predictions are far from uniform, so that no mistake hides."""
    model = S.BlockDiffusionTransformer(vocab_size, d_model=16, n_layer=n_layer, n_head=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=seeded(seed))
    return model


def batch(N=3, P=4, L=6, vocab_size=5, seed=1):
    """Random prompts (N,P) and completions (N,L) without [MASK]."""
    tokens = torch.randint(vocab_size - 1, (N, P + L), generator=seeded(seed))
    return tokens[:, :P], tokens[:, P:]


def one_block_log_probs(model, prompt, completion, hidden, block, B):
    """Oracle: log p(y_i | ..) of one block of one sequence (lists of ints), by a pass of its own and no staircase: the
    prompt, the true blocks before it, and the block with the places in `hidden` masked, all under plain block order."""
    history = prompt + completion[: block * B]
    answers = completion[block * B : (block + 1) * B]
    tokens = torch.tensor([history + [model.mask_id if i in hidden else a for i, a in enumerate(answers)]])
    n = len(history) + B
    may = torch.tensor([[j // B <= i // B for j in range(n)] for i in range(n)])
    logits = model(tokens, torch.arange(n), may)[0, -B:]
    return [(logits[i].exp() / logits[i].exp().sum())[a].log().item() for i, a in enumerate(answers)]


def pictures(function):
    """The rows of # and . in a docstring, as a bool array."""
    rows = [re.sub("[^#.]", "", line) for line in function.__doc__.splitlines() if re.fullmatch(r"[a-z0-9 ]*([#.] *)+", line)]
    return np.array([[character == "#" for character in row] for row in rows if row])


# §1 --------------------------------------------------------------------------------------------------------------------


def test_mask_token_is_read_but_never_predicted():
    model, (prompts, completions) = tiny_model(), batch()
    tokens = torch.cat((prompts, completions), 1)
    logits = model(tokens, torch.arange(10), S.block_causal_mask(10, 2))
    assert logits.shape == (3, 10, 5) and model.mask_id == 4
    assert (logits[..., 4] == -math.inf).all() and logits[..., :4].isfinite().all()
    assert (S.generate(model, prompts, 6, 2, generator=seeded()) != 4).all()
    tokens[:, 0] = 4
    assert not torch.allclose(model(tokens, torch.arange(10), S.block_causal_mask(10, 2))[..., :4], logits[..., :4])


def test_position_matters_only_relative_to_other_positions():
    """Rotary embedding. Broken if queries and keys turned differently, or if positions were counted and not passed in."""
    model, tokens = tiny_model(), batch()[0]
    may = torch.ones(4, 4, dtype=torch.bool)
    logits = [model(tokens, torch.tensor(p), may)[..., :4] for p in ([0, 1, 2, 3], [7, 8, 9, 10], [0, 2, 1, 3])]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_rotation_is_by_position_times_frequency():
    """Against the written-out 2×2 rotation: pair d of D/2 at position p turns by p·10000^(−2d/D)."""
    x, positions, D = torch.randn(1, 3, 2, 8, generator=seeded()), [0, 1, 5], 8
    frequencies = torch.tensor([10_000.0 ** (-2 * d / D) for d in range(D // 2)])
    turns = torch.exp(1j * torch.tensor(positions)[:, None] * frequencies)[:, None]
    turned = S.rotate(x, turns)
    for s, h, d in itertools.product(range(3), range(2), range(D // 2)):
        angle, (a, b) = positions[s] * 10_000.0 ** (-2 * d / D), x[0, s, h, 2 * d : 2 * d + 2].tolist()
        expected = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        assert turned[0, s, h, 2 * d : 2 * d + 2].tolist() == pytest.approx(expected, abs=1e-5)


def test_cached_and_uncached_logits_agree():
    """§1, §4: to 1e-5, whatever the pieces that the sequence comes in, and after a block has been overwritten."""
    model, (prompts, completions) = tiny_model(), batch()
    tokens, positions, may = torch.cat((prompts, completions), 1), torch.arange(10), S.block_causal_mask(10, 2)
    whole, cache = model(tokens, positions, may), model.new_cache(3, 10)
    model(tokens.flip(1)[:, :6], positions[:6], may[:6, :6], cache)
    pieces = [model(tokens[:, a:b], positions[a:b], may[a:b, :b], cache) for a, b in ((0, 4), (4, 6), (6, 10))]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


# §2 --------------------------------------------------------------------------------------------------------------------


def test_the_masks_are_their_pictures():
    assert (pictures(S.block_causal_mask) == S.block_causal_mask(6, 2).numpy()).all()
    assert (pictures(S.staircase_mask) == S.staircase_mask(2, 4, 2, copies=2).numpy()).all()


@pytest.mark.parametrize("P,L,B,K", [(2, 4, 2, 1), (0, 6, 3, 2), (6, 3, 3, 3), (2, 4, 1, 2), (4, 4, 4, 2)])
def test_staircase_mask_follows_its_three_rules(P, L, B, K):
    """Against a loop over pairs of tokens, each described by (copy, position): copy 0 is clean."""
    who = [(0, i) for i in range(P + L)] + [(k, P + i) for k in range(1, K + 1) for i in range(L)]
    may = [[(kc == 0 and j // B <= i // B) if qc == 0 else (kc == 0 and j // B < i // B) or (kc == qc and j // B == i // B)
            for kc, j in who] for qc, i in who]
    assert S.staircase_mask(P, L, B, K).tolist() == may
    assert S.staircase_positions(P, L, K).tolist() == [i for _, i in who]


def test_lengths_that_are_no_multiple_of_the_block_are_refused():
    for P, L in ((3, 4), (4, 3)):
        with pytest.raises(AssertionError, match="multiples of block_size 2"):
            S.staircase_mask(P, L, 2)
        with pytest.raises(AssertionError, match="multiples of block_size 2"):
            S.generate(tiny_model(), torch.zeros(1, P, dtype=torch.long), L, 2)


def test_no_block_sees_its_own_answer_or_the_future():
    """§2, the leak test. Changed clean tokens in block ≥ b leave noisy block b's logits bit-identical; a change in a
    block before b does not. (Comparing a noisy copy with an identical clean one would pass under a leaking mask.)"""
    model, (prompts, completions), B, (P, L) = tiny_model(), batch(), 2, (4, 6)
    masks = S.sample_masks(3, 2, L, B, seeded())

    def noisy_logits(clean):
        noisy = torch.where(masks, model.mask_id, completions[:, None]).flatten(1)
        tokens = torch.cat((prompts, clean, noisy), 1)
        return model(tokens, S.staircase_positions(P, L, 2), S.staircase_mask(P, L, B, 2))[:, P + L :].view(3, 2, L // B, B, -1)

    before = noisy_logits(completions)
    for b in range(L // B):
        changed = completions.clone()
        changed[:, b * B : (b + 1) * B] = (changed[:, b * B : (b + 1) * B] + 1) % 4
        after = noisy_logits(changed)
        assert torch.equal(after[:, :, : b + 1], before[:, :, : b + 1])
        assert all((after[:, :, later] != before[:, :, later]).any() for later in range(b + 1, L // B))


def test_copies_do_not_see_each_other():
    model, (prompts, completions) = tiny_model(), batch()
    masks = S.sample_masks(3, 3, 6, 2, seeded())
    others = masks.clone()
    others[:, 1] = ~others[:, 1]
    a, b = (S.token_log_probs(model, prompts, completions, m, 2) for m in (masks, others))
    assert torch.equal(a[:, [0, 2]], b[:, [0, 2]]) and not torch.allclose(a[:, 1], b[:, 1])


@pytest.mark.parametrize("B", [1, 2, 3])
def test_one_staircase_pass_is_one_separate_pass_per_block(B):
    """§2, §3: token_log_probs for all blocks and copies at once, against a pass of its own for each."""
    model, (prompts, completions) = tiny_model(), batch(N=2, P=6)
    masks = S.sample_masks(2, 2, 6, B, seeded(3))
    together = S.token_log_probs(model, prompts, completions, masks, B)
    for n, k, b in itertools.product(range(2), range(2), range(6 // B)):
        hidden = [i for i in range(B) if masks[n, k, b * B + i]]
        alone = one_block_log_probs(model, prompts[n].tolist(), completions[n].tolist(), hidden, b, B)
        assert together[n, k, b * B : (b + 1) * B].tolist() == pytest.approx(alone, abs=1e-4)


def test_block_size_one_is_an_autoregressive_model():
    """All four likelihoods are then one number, the chain rule Σ log p(y_i | everything before)."""
    model, (prompts, completions) = tiny_model(), batch(P=3, L=4)
    chain = [sum(one_block_log_probs(model, p, c, [0], i, 1)[0] for i in range(4)) for p, c in zip(prompts.tolist(), completions.tolist())]
    masks = torch.ones(3, 1, 4, dtype=torch.bool)
    for log_p in (S.elbo(model, prompts, completions, masks, 1), S.mean_field(model, prompts, completions, 1),
                  S.exact_elbo(model, prompts, completions, 1), S.exact_log_likelihood(model, prompts, completions, 1)):
        assert log_p.tolist() == pytest.approx(chain, abs=1e-4)


# §3 --------------------------------------------------------------------------------------------------------------------


def test_masks_have_uniform_counts_and_uniform_places():
    """30,000 blocks of B = 3: P(pattern) = 1/B · 1/C(B, m) for each of the 7 patterns, and no empty one. Chi-square with
    6 degrees of freedom beyond 35.9 has probability 3e-6. Two blocks of one copy are independent: 48 d.o.f., 103 likewise."""
    masks = S.sample_masks(15_000, 1, 6, 3, seeded(5)).view(-1, 2, 3)
    p = {bits: 1 / 3 / math.comb(3, sum(bits)) for bits in itertools.product((False, True), repeat=3) if any(bits)}
    patterns = [tuple(map(tuple, row)) for row in masks.tolist()]
    singles = Counter(block for pair in patterns for block in pair)
    assert set(singles) == set(p)
    assert sum((singles[a] - 30_000 * p[a]) ** 2 / (30_000 * p[a]) for a in p) < 35.9
    pairs = Counter(patterns)
    assert sum((pairs[a, b] - 15_000 * p[a] * p[b]) ** 2 / (15_000 * p[a] * p[b]) for a in p for b in p) < 103
    assert S.sample_masks(4, 5, 6, 3, seeded()).shape == (4, 5, 6)


def test_elbo_is_the_weighted_sum_over_hidden_tokens():
    """§3, against a loop: mean over copies of Σ_blocks B/m · Σ_hidden log p. The loss is its negative per token."""
    model, (prompts, completions), B = tiny_model(), batch(N=2), 3
    prompts = prompts[:, :3]
    masks = S.sample_masks(2, 4, 6, B, seeded(7))
    expected = []
    for n in range(2):
        copies = []
        for k, b in itertools.product(range(4), range(2)):
            hidden = [i for i in range(B) if masks[n, k, b * B + i]]
            log_p = one_block_log_probs(model, prompts[n].tolist(), completions[n].tolist(), hidden, b, B)
            copies.append(B / len(hidden) * sum(log_p[i] for i in hidden))
        expected.append(sum(copies) / 4)
    assert S.elbo(model, prompts, completions, masks, B).tolist() == pytest.approx(expected, abs=1e-4)
    assert S.pretraining_loss(model, prompts, completions, masks, B).item() == pytest.approx(-sum(expected) / 2 / 6, abs=1e-4)


@pytest.mark.parametrize("B", [2, 3])
def test_monte_carlo_elbo_is_unbiased(B):
    """Mean of 4,000 one-copy estimates against exact_elbo, within 5 standard errors: fails by chance once in 1.7 million
    (for each of the 3 completions). Also: K copies have 1/K of the variance, within 20 % (8 standard errors)."""
    model, (prompts, completions) = tiny_model(), batch(P=6)
    with torch.no_grad():
        exact = S.exact_elbo(model, prompts, completions, B)
        for n in range(3):
            rows = [x[n : n + 1].expand(4_000, -1) for x in (prompts, completions)]
            one = S.elbo(model, *rows, S.sample_masks(4_000, 1, 6, B, seeded(n)), B)
            assert abs(one.mean() - exact[n]) < 5 * one.std() / 4_000**0.5 and one.std() > 0.1
            four = S.elbo(model, *rows, S.sample_masks(4_000, 4, 6, B, seeded(n + 9)), B)
            assert four.var() * 4 == pytest.approx(one.var().item(), rel=0.2)


# §4 --------------------------------------------------------------------------------------------------------------------


def every_completion(L, vocab_size):
    return torch.tensor(list(itertools.product(range(vocab_size - 1), repeat=L)))


@pytest.mark.parametrize("B,L", [(1, 3), (2, 4), (3, 3)])
def test_sampler_frequencies_follow_the_exact_likelihood(B, L):
    """§4, §5: 60,000 samples over all 3^L completions, chi-square (bins under 5 expected counts joined). The bound is at
    5 standard deviations above the mean of chi-square: by chance less than once in 10,000 (skewed tail included)."""
    model, prompt = tiny_model(vocab_size=4, seed=2), torch.tensor([[0, 1, 2, 0, 1, 2]])
    everything = every_completion(L, 4)
    with torch.no_grad():
        p = S.exact_log_likelihood(model, prompt.expand(len(everything), -1), everything, B).double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    samples = S.generate(model, prompt.expand(60_000, -1), L, B, generator=seeded(B))
    counts = Counter(map(tuple, samples.tolist()))
    expected = {tuple(y): 60_000 * q for y, q in zip(everything.tolist(), p.tolist())}
    rare = [y for y in expected if expected[y] < 5]
    bins = [(counts[y], expected[y]) for y in expected if expected[y] >= 5]
    bins.append((sum(counts[y] for y in rare), sum(expected[y] for y in rare) + 1e-9))
    freedom = len(bins) - 1
    assert sum((o - e) ** 2 / e for o, e in bins if e > 1) < freedom + 5 * (2 * freedom) ** 0.5


def test_temperature_divides_the_logits():
    """One token, 40,000 draws at T = 0.5 against softmax(logits/T): each frequency within 5 standard errors (1 in 4e5)."""
    model, prompt = tiny_model(), torch.tensor([[1, 3]])
    may = S.block_causal_mask(3, 1)
    weights = [math.exp(2 * x) for x in model(torch.tensor([[1, 3, 4]]), torch.arange(3), may)[0, -1, :4].tolist()]
    drawn = Counter(S.generate(model, prompt.expand(40_000, -1), 1, 1, 0.5, generator=seeded())[:, 0].tolist())
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(drawn[token] / 40_000 - p) < 5 * (p * (1 - p) / 40_000) ** 0.5 + 1e-9


def test_confidence_order_reveals_the_surest_place_first():
    """Greedy decoding against a loop that recomputes the whole sequence at every step, without a cache."""
    model, (prompts, _), B = tiny_model(seed=4), batch(N=8, P=3), 3
    fast = S.generate(model, prompts, 6, B, temperature=0.0, order="confidence")
    orders = set()
    for n in range(8):
        tokens = prompts[n].tolist() + [4] * 6
        for start in (3, 6):
            seen, order = tokens[: start + B], []
            while 4 in seen:
                probs = model(torch.tensor([seen]), torch.arange(start + B), S.block_causal_mask(start + B, B))[0].softmax(-1)
                place = max((i for i in range(start, start + B) if seen[i] == 4), key=lambda i: probs[i].max().item())
                seen[place] = probs[place].argmax().item()
                order.append(place - start)
            tokens[: start + B] = seen
            orders.add(tuple(order))
        assert fast[n].tolist() == tokens[3:]
    assert len(orders) > 1, "the model must not make the order trivial"


def test_random_order_is_a_fair_die():
    """A model whose answer reveals the order: it writes the number of tokens already there. 6,000 blocks of B = 3, each
    of the 6 orders within 5 standard errors (by chance 1 in 3e5)."""
    class Counting(torch.nn.Module):
        mask_id = 4

        def new_cache(self, *_):
            return None

        def forward(self, tokens, positions, mask, cache=None):
            revealed = (tokens[:, -3:] != 4).sum(1)
            return torch.nn.functional.one_hot(revealed, 5)[:, None].expand(-1, tokens.shape[1], -1).float() * 1e4

    orders = Counter(map(tuple, S.generate(Counting(), torch.zeros(6_000, 0, dtype=torch.long), 3, 3, generator=seeded()).tolist()))
    assert set(orders) == set(itertools.permutations(range(3)))
    assert all(abs(n - 1_000) < 5 * (6_000 / 6 * 5 / 6) ** 0.5 for n in orders.values())


def test_generate_depends_on_its_generator_alone_and_refuses_nonsense():
    model, (prompts, _) = tiny_model(), batch(N=50)
    torch.manual_seed(0)
    a = S.generate(model, prompts, 6, 2, generator=seeded(1))
    torch.manual_seed(1)
    assert torch.equal(a, S.generate(model, prompts, 6, 2, generator=seeded(1)))
    assert not torch.equal(a, S.generate(model, prompts, 6, 2, generator=seeded(2)))
    for bad in ({"order": "left"}, {"temperature": -1.0}, {"temperature": math.nan}):
        with pytest.raises(ValueError):
            S.generate(model, prompts, 6, 2, **bad)


# §5 --------------------------------------------------------------------------------------------------------------------


def brute_force(model, prompt, completion, B):
    """Oracle: (exact ELBO, log-likelihood) of one completion by going through all B! orders of every block."""
    total_elbo = total_likelihood = 0.0
    for b in range(len(completion) // B):
        log_p = {hidden: one_block_log_probs(model, prompt, completion, hidden, b, B)
                 for m in range(1, B + 1) for hidden in itertools.combinations(range(B), m)}
        paths = [sum(log_p[tuple(sorted(order[t:]))][order[t]] for t in range(B)) for order in itertools.permutations(range(B))]
        total_elbo += sum(paths) / len(paths)
        total_likelihood += math.log(sum(map(math.exp, paths)) / len(paths))
    return total_elbo, total_likelihood


@pytest.mark.parametrize("B", [2, 3])
def test_exact_values_equal_brute_force_over_all_orders(B):
    """Jensen in numbers as well: exact ELBO = mean of the log over orders < log of the mean = log-likelihood."""
    model, (prompts, completions) = tiny_model(), batch(P=6)
    bound, likelihood = (f(model, prompts, completions, B) for f in (S.exact_elbo, S.exact_log_likelihood))
    expected = [brute_force(model, p, c, B) for p, c in zip(prompts.tolist(), completions.tolist())]
    assert bound.tolist() == pytest.approx([e for e, _ in expected], abs=1e-4)
    assert likelihood.tolist() == pytest.approx([e for _, e in expected], abs=1e-4)
    assert (bound < likelihood - 1e-3).all()


def test_mean_field_scores_fully_hidden_blocks():
    model, (prompts, completions) = tiny_model(), batch()
    expected = [sum(sum(one_block_log_probs(model, p, c, [0, 1], b, 2)) for b in range(3))
                for p, c in zip(prompts.tolist(), completions.tolist())]
    assert S.mean_field(model, prompts, completions, 2).tolist() == pytest.approx(expected, abs=1e-4)


def test_likelihoods_can_be_differentiated():
    """The exact ratio is a training objective too: its gradient against a central difference in one weight."""
    model, (prompts, completions) = tiny_model(), batch()
    weight = model.blocks[0].mlp[0].weight
    S.exact_log_likelihood(model, prompts, completions, 2).sum().backward()
    with torch.no_grad():
        values = []
        for change in (1e-2, -2e-2):
            weight[0, 0] += change
            values.append(S.exact_log_likelihood(model, prompts, completions, 2).double().sum().item())
    assert weight.grad[0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("name", S.ESTIMATORS)
def test_ratio_is_one_before_the_first_update_unless_masks_differ(name):
    """Same weights, same masks: log ρ̂ is exactly 0. With other masks the estimate is noise and nothing else."""
    model, (prompts, completions) = tiny_model(), batch(N=64)
    a, b = (S.sample_masks(64, 2, 6, 2, seeded(s)) for s in (0, 1))
    old, same, other = (S.ESTIMATORS[name](model, prompts, completions, m, 2) for m in (a, a, b))
    assert (same - old == 0).all() and old.shape == (64,)
    assert ((other - old).std() > 0.1) == (name == "elbo")


# §6 --------------------------------------------------------------------------------------------------------------------

EXTREME = [0.0, 0.3, -0.3, 2.0, -2.0, 300.0, -300.0, 90.0]


def gradient(loss, log_ratio, *arguments):
    leaf = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    value = loss(leaf, *arguments)
    value.backward()
    return value.item(), leaf.grad.tolist()


def test_advantages_are_standardised_within_their_group():
    rewards = [1.0, 0.0, 0.5, 0.25, 0.1, 0.9, 3.0, 3.0]
    expected = [(r - statistics.mean(g)) / statistics.pstdev(g) for g in (rewards[:4], rewards[4:]) for r in g]
    assert S.group_advantages(torch.tensor(rewards), 4).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", S.LOSSES)
def test_equal_rewards_give_exactly_no_gradient(loss):
    """For every value and size of group, also where the mean of equal floats is not that float; and no NaN."""
    for value, size in itertools.product((0.0, 0.1, 1 / 3, 1.0), (2, 3, 7, 8)):
        advantages = S.group_advantages(torch.full((2 * size,), value), size)
        assert (advantages == 0).all()
        ratios = (EXTREME * 2)[: 2 * size]
        assert gradient(S.LOSSES[loss][0], ratios, advantages.double(), S.LOSSES[loss][1], size)[1] == [0.0] * 2 * size


def test_grpo_is_the_clipped_surrogate():
    """§6's table, cell by cell: value and gradient against the formula in plain Python, ε = 0.2."""
    log_ratio, eps = [-1.0, -0.1, 0.1, 1.0] * 2, 0.2
    A = [2.0] * 4 + [-3.0] * 4
    value, grad = gradient(S.grpo_loss, log_ratio, torch.tensor(A), eps)
    ratio = [math.exp(x) for x in log_ratio]
    surrogate = [min(r * a, min(max(r, 1 - eps), 1 + eps) * a) for r, a in zip(ratio, A)]
    assert value == pytest.approx(-sum(surrogate) / 8)
    multiplier = [ratio[0], ratio[1], ratio[2], 0, 0, ratio[5], ratio[6], ratio[7]]
    assert grad == pytest.approx([-m * a / 8 for m, a in zip(multiplier, A)])


def test_stabledrl_is_the_clipped_and_self_normalised_sum():
    """Value and gradient against plain Python: −(1/groups) Σ_groups Σ_j w_j A_j ∂, w = clip(ρ̂)/Σclip(ρ̂), w constant.
    ε = 0.5 has both bounds, ε = 5 only the upper one."""
    log_ratio, A, G = [-2.0, -0.1, 0.2, 3.0, 0.0, 5.0, -5.0, 1.0], [1.0, -2.0, 0.5, -0.7, 0.3, 2.0, -1.5, 0.9], 4
    for eps in (0.5, 1.0, 5.0):
        clipped = [min(max(math.exp(x), 1 - eps), 1 + eps) for x in log_ratio]
        w = [c / sum(clipped[i // G * G : i // G * G + G]) for i, c in enumerate(clipped)]
        value, grad = gradient(S.stabledrl_loss, log_ratio, torch.tensor(A, dtype=torch.float64), eps, G)
        assert value == pytest.approx(-sum(wi * a * x for wi, a, x in zip(w, A, log_ratio)) / 2)
        assert grad == pytest.approx([-wi * a / 2 for wi, a in zip(w, A)])


@pytest.mark.parametrize("sign", [1, -1])
def test_one_spike_has_no_bound_under_grpo_and_one_under_stabledrl(sign):
    """The paper's first claim. One rollout of 8 has log ρ̂ = 5, 10, 20: GRPO's gradient grows as ρ̂ where A < 0 (and is 0
    where A > 0); StableDRL's stays below |A|, the largest advantage, for either sign."""
    A = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    A[0] = sign
    largest = {"grpo": [], "stabledrl": []}
    for spike in (5.0, 10.0, 20.0):
        log_ratio = [spike] + [0.01] * 7
        largest["grpo"].append(abs(gradient(S.grpo_loss, log_ratio, A, 0.2)[1][0]))
        largest["stabledrl"].append(sum(map(abs, gradient(S.stabledrl_loss, log_ratio, A, 5.0, 8)[1])))
    assert largest["grpo"] == pytest.approx([math.exp(s) / 8 if sign < 0 else 0.0 for s in (5.0, 10.0, 20.0)])
    assert max(largest["stabledrl"]) <= 1 + 1e-12


def test_stabledrl_is_finite_at_any_ratio():
    for dtype, eps in itertools.product((torch.float32, torch.float64), (0.2, 1.0, 5.0, 1e6)):
        leaf = torch.tensor(EXTREME, dtype=dtype, requires_grad=True)
        value = S.stabledrl_loss(leaf, torch.tensor([1.0, -1.0] * 4, dtype=dtype), eps, 4)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    assert S.grpo_loss(torch.tensor(EXTREME), torch.tensor([1.0, -1.0] * 4), 0.2).isfinite()


def test_stabledrl_update_lies_in_the_convex_hull_of_its_samples():
    """The paper's second claim, with a real model and wild ratios: the update is Σ w_j A_j g_j with w ≥ 0, Σ w = 1, so its
    norm is at most the largest ‖A_j g_j‖. The per-sample gradients are made one by one; GRPO breaks the bound."""
    model, (prompts, completions), G = tiny_model(), batch(N=4), 4
    prompts, A = prompts[:1].expand(4, -1), torch.tensor([0.9, -1.4, 1.1, -0.6])
    noise = torch.tensor([0.5, 8.0, -3.0, 2.0])
    masks = S.sample_masks(4, 2, 6, 2, seeded())

    def flat_gradient(scalar):
        grads = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(model.parameters(), grads)])

    log_prob = S.elbo(model, prompts, completions, masks, 2)
    log_ratio = log_prob - log_prob.detach() + noise
    corners = torch.stack([a * flat_gradient(l) for a, l in zip(A, log_prob)])                   # the A_j·g_j
    update = -flat_gradient(S.stabledrl_loss(log_ratio, A, 5.0, G))
    w = torch.linalg.lstsq(corners.T.double(), update[:, None].double()).solution[:, 0]
    assert torch.allclose(w @ corners.double(), update.double(), atol=1e-5 * update.abs().max().item())
    assert (w > -1e-6).all() and w.sum().item() == pytest.approx(1, abs=1e-4)
    largest = corners.norm(dim=1).max()
    assert update.norm() <= largest * (1 + 1e-6)
    assert flat_gradient(S.grpo_loss(log_ratio, A, 0.2)).norm() > 100 * largest


def test_groups_do_not_touch_each_other():
    """A spike in group 1 changes nothing in group 2: a softmax across prompts is a bug seen in the wild."""
    A = torch.tensor([1.0, -1.0, 0.5, -0.5] * 2, dtype=torch.float64)
    calm = gradient(S.stabledrl_loss, [0.1, 0.2, -0.1, 0.0] * 2, A, 5.0, 4)[1]
    spiked = gradient(S.stabledrl_loss, [9.0, 0.2, -0.1, 0.0, 0.1, 0.2, -0.1, 0.0], A, 5.0, 4)[1]
    assert spiked[4:] == calm[4:] and spiked[:4] != calm[:4]


@pytest.mark.parametrize("loss", S.LOSSES)
def test_at_ratio_one_both_losses_are_the_policy_gradient(loss):
    """−mean A·∇L̂, and a shift of all log-ratios of a group does not matter to StableDRL while no clip binds."""
    A = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.2, -0.4], dtype=torch.float64)
    assert gradient(S.LOSSES[loss][0], [0.0] * 6, A, S.LOSSES[loss][1], 3)[1] == pytest.approx((-A / 6).tolist())
    if loss == "stabledrl":
        assert gradient(S.stabledrl_loss, [1.0] * 6, A, 5.0, 3)[1] == pytest.approx((-A / 6).tolist())


# §7 --------------------------------------------------------------------------------------------------------------------


def test_diagnostics_against_plain_loops():
    log_ratio, truth, G, eps = [0.0, 1.0, -2.0, 0.3, 4.0, 0.1], [0.1, 0.2, 0.0, -0.1, 0.3, 0.0], 3, 0.5
    rho = [math.exp(x) for x in log_ratio]
    ess = [sum(rho[i : i + G]) ** 2 / sum(r * r for r in rho[i : i + G]) for i in (0, 3)]
    got = S.ratio_diagnostics(torch.tensor(log_ratio, requires_grad=True), eps, G, torch.tensor(truth))
    assert got == pytest.approx({
        "ratio_max": max(rho), "ess": sum(ess) / 2, "clip_fraction": sum(not 1 - eps <= r <= 1 + eps for r in rho) / 6,
        "noise_std": statistics.pstdev([a - b for a, b in zip(log_ratio, truth)])}, rel=1e-5)
    assert "noise_std" not in S.ratio_diagnostics(torch.tensor(log_ratio), eps, G)


def test_diagnostics_at_the_extremes():
    """Equal ratios: ESS = G. One outlier: ESS = 1. e^±300 does not overflow."""
    assert S.ratio_diagnostics(torch.zeros(8), 0.2, 4) == {"ratio_max": 1.0, "clip_fraction": 0.0, "ess": 4.0}
    wild = S.ratio_diagnostics(torch.tensor([300.0, 0.0, -300.0, 0.0]), 0.2, 4)
    assert wild["ess"] == pytest.approx(1) and wild["ratio_max"] == pytest.approx(math.exp(300)) and wild["clip_fraction"] == 0.5
