"""The claims of stabledrl.py, as tests, in the order of its sections: the second half of the tutorial.
(§7, which is files, processes and flags, is tested in .ci/test_program.py, the judges of the tasks
in toy_tasks/test_tasks.py, the results in .github/results/test_results.py.)

An oracle is a second way to the same number: enumeration, plain Python loops, one separate pass per
block, autograd. Where chance is involved, a test is one of `check_chi_square`, or its docstring says
how often it would fail if the claim were true. Seeds are fixed, so a test that has passed once keeps
passing on the same machine.

    pytest              all but the learning run and the benchmarks
    pytest -m slow      a learning run, more kills, longer fuzzing: minutes
    pytest -m bench -s  benchmarks, beside the results page: ratios of times
"""

import copy
import dataclasses
import functools
import inspect
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
from toy_tasks import TASKS

torch.set_num_threads(1)  # so no test forks this process; the tensors are tiny
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


MODEL = tiny_model()  # of the tokens 0..3 and [MASK] = 4
TOKENS = torch.randint(4, (3, 12), generator=seeded(1))
PROMPTS, COMPLETIONS = TOKENS[:, :6], TOKENS[:, 6:]  # so B may be 1, 2, 3 or 6


def gradients(scalar, model=MODEL):
    """d scalar / d every weight, as one vector."""
    found = torch.autograd.grad(
        scalar,
        list(model.parameters()),
        retain_graph=True,
        materialize_grads=True,
    )
    return torch.cat([gradient.flatten() for gradient in found])


@functools.cache
def separate_passes(n, B):
    """Oracle: (block, hidden places) -> log p of the tokens of this block of completion n. Each by
    a pass of its own, without staircase or cache: the prompt, the true blocks before, and the
    block with the hidden places masked."""
    found = {}
    for end in range(6 + B, 13, B):
        block_of = torch.arange(end) // B
        mask = block_of[:, None] >= block_of
        for size in range(1, B + 1):
            for hidden in itertools.combinations(range(B), size):
                tokens = TOKENS[n, :end].clone()
                for place in hidden:
                    tokens[end - B + place] = 4
                logits = MODEL(tokens[None], torch.arange(end), mask)
                p = logits[0, -B:].softmax(-1)
                answers = TOKENS[n, end - B : end]
                log_p = p.log().gather(-1, answers[:, None])
                found[(end - 6) // B - 1, hidden] = log_p[:, 0].tolist()
    return found


def places(hidden):
    """(B,) bool -> the places that are hidden, as `separate_passes` calls them."""
    return tuple(hidden.nonzero().flatten().tolist())


def pictures(function):
    """The rows of # and . in a docstring, as a bool array."""
    rows = []
    for line in function.__doc__.splitlines():
        if re.fullmatch(r"[a-z0-9 ]*([#.] *)+", line):
            cells = re.sub("[^#.]", "", line)
            rows.append([cell == "#" for cell in cells])
    return np.array(rows)


def check_chi_square(draws, expected):
    """Independent draws (N,..) follow the expected counts, a dict. Cells that expect less than 5 are
    joined. The bound is 5 standard deviations above the mean of chi-square: with its skewed tail,
    it is passed by chance less than once in 10,000."""
    counts = Counter(map(tuple, draws.flatten(1).tolist()))
    assert set(counts) <= set(expected)
    assert sum(expected.values()) == pytest.approx(len(draws), rel=1e-4)
    cells, rare = [], [0, 0]
    for key, count in expected.items():
        if count >= 5:
            cells.append((counts[key], count))
        else:
            rare = [rare[0] + counts[key], rare[1] + count]
    if rare[1]:
        cells.append(rare)
    chi_square = sum((count - e) ** 2 / e for count, e in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


# ==== §1 Transformer ================================================================================


def test_mask_token_is_read_but_never_predicted():
    positions, mask = torch.arange(12), S.block_causal_mask(12, 2)
    logits = MODEL(TOKENS, positions, mask)
    assert logits.shape == (3, 12, 5) and MODEL.mask_id == 4
    assert (logits[..., 4] == -math.inf).all() and logits[..., :4].isfinite().all()
    masked = TOKENS.clone()
    masked[:, 0] = 4
    assert not torch.allclose(MODEL(masked, positions, mask)[..., :4], logits[..., :4])


def turned(vector, position):
    """Oracle: pairs (a, b) of a vector, turned by the angle position · 10,000^(−2d/D)."""
    D, out = len(vector), []
    for d in range(0, D, 2):
        a, b = vector[d], vector[d + 1]
        angle = position * 10_000.0 ** (-d / D)
        out += [a * math.cos(angle) - b * math.sin(angle)]
        out += [a * math.sin(angle) + b * math.cos(angle)]
    return np.array(out)


def test_one_layer_against_plain_loops():
    """§1: one layer, two heads, written out: scores q·k/√D of the rotated, softmax over what the
    mask allows, MLP, and everything added to what came in."""
    model = tiny_model(n_layer=1)
    weights = model.state_dict().items()
    w = {name: value.double().numpy() for name, value in weights}
    tokens, positions, mask = (
        TOKENS[0, :4],
        [2, 5, 9, 4],
        S.block_causal_mask(4, 2),
    )

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[name]

    x = w["embed.weight"][tokens]  # (4, 16)
    projected = norm(x, "layers.0.norm1.weight") @ w["layers.0.qkv.weight"].T
    q, k, v = projected.reshape(4, 3, 2, 8).transpose(1, 2, 0, 3)  # each (heads, tokens, features)
    attended = np.zeros((4, 2, 8))
    for i, head in itertools.product(range(4), range(2)):
        seen = places(mask[i])
        query = turned(q[head, i], positions[i])
        keys = [turned(k[head, j], positions[j]) for j in seen]
        scores = np.array(keys) @ query / 8**0.5
        weights = np.exp(scores) / np.exp(scores).sum()
        attended[i, head] = weights @ v[head, seen]
    x = x + attended.reshape(4, 16) @ w["layers.0.out.weight"].T
    hidden = norm(x, "layers.0.norm2.weight") @ w["layers.0.mlp.0.weight"].T
    hidden = np.maximum(hidden + w["layers.0.mlp.0.bias"], 0)
    x = x + hidden @ w["layers.0.mlp.2.weight"].T + w["layers.0.mlp.2.bias"]
    expected = norm(x, "norm.weight") @ w["head.weight"].T
    logits = model(tokens[None], torch.tensor(positions), mask)[0, :, :4]
    assert logits.detach().numpy() == pytest.approx(expected, abs=1e-3)


def test_a_text_read_in_pieces_is_the_text_read_at_once():
    """§1: to 1e-5, whatever the pieces; and the cache is that of all."""
    positions, mask = torch.arange(12), S.block_causal_mask(12, 2)
    whole, whole_cache = MODEL.read(TOKENS, positions, mask)
    cache = None
    for a, b in ((0, 4), (4, 6), (6, 12)):
        logits, cache = MODEL.read(TOKENS[:, a:b], positions[a:b], mask[a:b, :b], cache)
        assert torch.allclose(logits, whole[:, a:b], atol=1e-5)
    for piecewise, at_once in zip(cache, whole_cache):
        assert piecewise.shape == (
            2,
            3,
            2,
            12,
            8,
        )  # keys and values, N, heads, tokens, features
        assert torch.allclose(piecewise, at_once, atol=1e-5)


def test_a_width_that_cannot_be_cut_into_heads_is_refused():
    with pytest.raises(AssertionError, match=r"d_model 30 is not a multiple of 2\*4 heads"):
        S.BlockDiffusionTransformer(5, d_model=30)


# ==== §2 Sampler ====================================================================================


SHARP, PROMPT = tiny_model(vocab_size=4, seed=2), torch.tensor([[0, 1, 2, 0, 1, 2]])


def every_completion(L):
    return torch.tensor(list(itertools.product(range(3), repeat=L)))


@pytest.mark.parametrize("B,L", [(1, 3), (2, 4), (3, 3)])
def test_sampler_frequencies_follow_the_exact_likelihood(B, L):
    """20,000 samples over all 3^L completions."""
    everything = every_completion(L)
    p = S.exact_log_likelihood(SHARP, PROMPT, everything, B).exp().tolist()
    expected = {tuple(y): 20_000 * q for y, q in zip(everything.tolist(), p)}
    samples = S.generate(SHARP, PROMPT, L, B, generator=seeded(B), samples=20_000)
    check_chi_square(samples, expected)


def test_temperature_divides_the_logits():
    """One token, 40,000 draws at T = 0.5 against softmax(logits/T)."""
    tokens = torch.cat((PROMPT, torch.tensor([[3]])), 1)
    logits = SHARP(tokens, torch.arange(7), S.block_causal_mask(7, 1))[0, -1, :3]
    p = (2 * logits).softmax(0).tolist()
    expected = {(token,): 40_000 * p[token] for token in range(3)}
    drawn = S.generate(SHARP, PROMPT, 1, 1, 0.5, generator=seeded(), samples=40_000)
    check_chi_square(drawn, expected)


def decode_surest_first(model, prompt, L, B):
    """Oracle: greedy decoding that reads the whole sequence again at every step -> tokens, steps."""
    tokens, steps = prompt + [4] * L, [None] * L
    for end in range(len(prompt) + B, len(prompt) + L + 1, B):
        for step in range(B):
            mask = S.block_causal_mask(end, B)
            p = model(torch.tensor([tokens[:end]]), torch.arange(end), mask)[0].softmax(-1)
            hidden = [i for i in range(end - B, end) if tokens[i] == 4]
            surest = max(hidden, key=lambda i: p[i].max().item())
            tokens[surest] = p[surest].argmax().item()
            steps[surest - len(prompt)] = step
    return tokens[len(prompt) :], steps


def test_confidence_order_reveals_the_surest_place_first():
    model, options = tiny_model(seed=4), dict(temperature=0.0, order="confidence")
    completions, steps = S.generate(model, TOKENS, 6, 3, return_steps=True, **options)
    for n, prompt in enumerate(TOKENS.tolist()):
        assert (
            completions[n].tolist(),
            steps[n].tolist(),
        ) == decode_surest_first(model, prompt, 6, 3)
    assert len(steps.view(-1, 3).unique(dim=0)) > 1, "the model must not make the order trivial"


class FakeModel(torch.nn.Module):
    """A model whose logits are logits(tokens, positions) (N,S,vocab), without a cache."""

    def __init__(self, logits, mask_id):
        super().__init__()
        self.logits, self.mask_id = logits, mask_id

    def read(self, tokens, positions, mask, cache=None):
        return self.logits(tokens, positions), None


NO_PROMPT = torch.zeros(1, 0, dtype=torch.long)


def test_confidence_is_measured_at_temperature_one():
    """Two places whose order would turn round if greedy decoding read the logits at half or double
    size: one competitor 1 nat behind (p = 0.73), and three 2.6 nats behind (p = 0.82). The model
    writes the number of the step."""

    def logits(tokens, positions):
        values = torch.tensor([[1.0, 0.0, -50.0, -50.0], [2.6, 0.0, 0.0, 0.0]])[: tokens.shape[1]]
        written = int((tokens[0] != 4).sum())
        return torch.nn.functional.pad(values.roll(written, dims=1), (0, 1), value=-math.inf)[None]

    greedy = S.generate(
        FakeModel(logits, 4),
        NO_PROMPT,
        2,
        2,
        temperature=0.0,
        order="confidence",
    )
    assert greedy.tolist() == [[1, 0]]


def test_generate_depends_on_its_generator_alone():
    torch.manual_seed(0)
    samples = S.generate(MODEL, PROMPTS, 6, 2, generator=seeded(1))
    torch.manual_seed(1)
    assert torch.equal(samples, S.generate(MODEL, PROMPTS, 6, 2, generator=seeded(1)))
    assert not torch.equal(samples, S.generate(MODEL, PROMPTS, 6, 2, generator=seeded(2)))


def test_generate_refuses_what_cannot_be():
    with pytest.raises(AssertionError, match="order is 'random' or 'confidence', not 'left'"):
        S.generate(MODEL, PROMPTS, 6, 2, order="left")
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(AssertionError, match="temperature is at least 0 and finite"):
            S.generate(MODEL, PROMPTS, 6, 2, temperature)
    broken = tiny_model()
    torch.nn.init.constant_(broken.layers[1].mlp[0].weight, math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            S.generate(broken, PROMPTS, 6, 2, temperature)


# ==== §3 Estimate ===================================================================================


def test_masks_have_uniform_counts_and_uniform_places():
    """Two blocks of B = 3, 15,000 times: P(pattern) = 1/B · 1/C(B, m) for each of the 7 patterns,
    and the two blocks of a copy are independent."""
    p = {}
    for pattern in itertools.product((False, True), repeat=3):
        if any(pattern):
            p[pattern] = 1 / 3 / math.comb(3, sum(pattern))
    expected = {(*a, *b): 15_000 * p[a] * p[b] for a in p for b in p}
    check_chi_square(S.sample_masks(15_000, 1, 6, 3, seeded(5)), expected)
    assert S.sample_masks(4, 5, 6, 3, seeded()).shape == (4, 5, 6)


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


@pytest.mark.parametrize("P,L,B,K", [(2, 4, 2, 1), (0, 6, 3, 2), (6, 3, 3, 3), (2, 4, 1, 2)])
def test_staircase_follows_its_three_rules(P, L, B, K):
    tokens = [(0, i) for i in range(P + L)]
    tokens += [(copy, P + i) for copy in range(1, K + 1) for i in range(L)]
    expected = [[may_look(query, key, B) for key in tokens] for query in tokens]
    copies = {} if K == 1 else {"copies": K}  # one copy is the default
    assert S.staircase_mask(P, L, B, **copies).tolist() == expected
    positions = [position for _, position in tokens]
    assert S.staircase_positions(P, L, **copies).tolist() == positions


@pytest.mark.parametrize("P,L", [(5, 6), (6, 5)])
def test_lengths_that_are_no_multiple_of_the_block_are_refused_in_one_sentence(P, L):
    """By whatever takes a block size: sampler, staircase, masks and every estimator."""
    says = pytest.raises(AssertionError, match="must be multiples of block_size 2")
    prompts, completions = TOKENS[:, :P], TOKENS[:, :L]
    with says:
        S.generate(MODEL, prompts, L, 2)
    with says:
        S.staircase_mask(P, L, 2)
    with says:
        S.sample_masks(4, 2, 5, 2, seeded())
    masks, steps = torch.ones(3, 1, L, dtype=torch.bool), torch.zeros_like(completions)
    for estimate in S.ESTIMATORS.values():
        with says:
            estimate(MODEL, prompts, completions, 2, masks, steps)


def whole_pass(clean, noisy, B):
    """One plain pass under the mask that is drawn in §2, noisy copies (3,K,6) -> their logits."""
    K = noisy.shape[1]
    tokens = torch.cat((PROMPTS, clean, noisy.flatten(1)), 1)
    logits = MODEL(tokens, S.staircase_positions(6, 6, K), S.staircase_mask(6, 6, B, K))
    return logits[:, 12:].unflatten(1, (K, 6))  # (3, K, 6, vocab)


def test_no_block_sees_its_own_answer_or_the_future():
    """§2, the leak test. Changed clean tokens in block b leave the logits of noisy blocks up to b
    bit-identical, and do change later ones. (Comparing a noisy copy with an identical clean one
    would pass under a leaking mask.)"""
    noisy = torch.where(S.sample_masks(3, 2, 6, 2, seeded()), 4, COMPLETIONS[:, None])
    before = whole_pass(COMPLETIONS, noisy, 2)
    for begin in (0, 2, 4):
        end = begin + 2
        changed = COMPLETIONS.clone()
        changed[:, begin:end] = (changed[:, begin:end] + 1) % 4
        after = whole_pass(changed, noisy, 2)
        assert torch.equal(after[:, :, :end], before[:, :, :end])
        for later in range(end, 6):
            assert (after[:, :, later] != before[:, :, later]).any()


@pytest.mark.parametrize("B", [1, 2, 3])
def test_one_staircase_pass_is_one_separate_pass_per_block(B):
    """§2, §3: all blocks and copies at once."""
    masks = S.sample_masks(3, 2, 6, B, seeded(3))
    log_p = S.token_log_probs(MODEL, PROMPTS, COMPLETIONS, B, masks)
    for n, k, b in itertools.product(range(3), range(2), range(6 // B)):
        block = slice(b * B, (b + 1) * B)
        alone = separate_passes(n, B)[b, places(masks[n, k, block])]
        assert log_p[n, k, block].tolist() == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("B,K", [(2, 3), (3, 4), (6, 15)])
def test_the_pass_behind_the_prompts_cache_is_the_whole_staircase(B, K):
    """§3: token_log_probs reads the prompt first and the rest behind its cache. Values and
    gradients are those of one plain pass."""
    masks = S.sample_masks(3, K, 6, B, seeded())
    noisy = torch.where(masks, 4, COMPLETIONS[:, None])
    answers = COMPLETIONS[:, None, :, None].expand(-1, K, -1, 1)
    whole = whole_pass(COMPLETIONS, noisy, B).log_softmax(-1).gather(-1, answers)[..., 0]
    cached = S.token_log_probs(MODEL, PROMPTS, COMPLETIONS, B, masks)
    assert torch.allclose(cached, whole, atol=1e-4)
    weights = torch.randn(3, K, 6, generator=seeded(1))
    expected = gradients((whole * weights).sum())
    got = gradients((cached * weights).sum())
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() and expected.any()


def test_completions_of_one_prompt_may_share_it():
    """§2, §3: prompts (M,P) with N = 3·M completions give what the prompts written out 3 times
    give, with the same gradient; and samples=3 is sampling from each prompt 3 times.
    """
    written_out = PROMPTS.repeat_interleave(3, 0)
    samples = S.generate(MODEL, PROMPTS, 6, 2, generator=seeded(), samples=3)
    assert torch.equal(samples, S.generate(MODEL, written_out, 6, 2, generator=seeded()))
    assert len(samples.unique(dim=0)) > 3
    masks = S.sample_masks(9, 2, 6, 2, seeded())
    shared = S.elbo(MODEL, PROMPTS, samples, 2, masks)
    separate = S.elbo(MODEL, written_out, samples, 2, masks)
    assert torch.allclose(shared, separate, atol=1e-5)
    expected = gradients(separate.square().sum())
    difference = gradients(shared.square().sum()) - expected
    assert difference.abs().max() < 1e-3 * expected.abs().max()


def test_block_size_one_is_an_autoregressive_model():
    """All likelihoods are then one number, the chain rule Σ log p(y_i | everything before)."""
    chain = []
    for n in range(3):
        chain.append(sum(separate_passes(n, 1)[i, (0,)][0] for i in range(6)))
    masks, steps = torch.ones(3, 1, 6, dtype=torch.bool), torch.zeros_like(COMPLETIONS)
    for estimate in S.ESTIMATORS.values():
        log_p = estimate(MODEL, PROMPTS, COMPLETIONS, block_size=1, masks=masks, steps=steps)
        assert log_p.tolist() == pytest.approx(chain, abs=1e-4)


@pytest.mark.parametrize("B", [1, 2, 3])
def test_elbo_is_the_weighted_sum_over_hidden_tokens(B):
    """§3, against a loop: mean over copies of Σ_blocks B/m · Σ_hidden log p."""
    masks, expected = S.sample_masks(3, 4, 6, B, seeded(7)), [0.0] * 3
    for n, k, b in itertools.product(range(3), range(4), range(6 // B)):
        hidden = places(masks[n, k, b * B : (b + 1) * B])
        log_p = separate_passes(n, B)[b, hidden]
        expected[n] += B / len(hidden) * sum(log_p[i] for i in hidden) / 4
    found = S.elbo(MODEL, PROMPTS, COMPLETIONS, B, masks)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def many_estimates(draw, copies, B):
    """2,000 estimates of each of the three completions -> (3, 4000)."""
    many, masks = COMPLETIONS.repeat_interleave(2_000, 0), draw(6_000, copies, 6, B, seeded(copies))
    with torch.no_grad():
        return S.elbo(MODEL, PROMPTS, many, B, masks).view(3, -1)


@pytest.mark.parametrize("B", [2, 3])
@pytest.mark.parametrize("masks", S.MASKS)
def test_the_estimate_is_unbiased(masks, B):
    """Mean of 2,000 estimates from a pair of copies against exact_elbo, within 5 standard errors
    (fails by chance once in 1.7 million, for each of 3 completions)."""
    estimates = many_estimates(S.MASKS[masks], 2, B)
    error = estimates.mean(1) - S.exact_elbo(MODEL, PROMPTS, COMPLETIONS, B)
    assert (error.abs() < 5 * estimates.std(1) / 2_000**0.5).all()


# ==== §4 Noise ======================================================================================


def test_the_worked_example_of_noise_is_right():
    """§4: one of two tokens is certain, the other has p = 0.01 whatever is shown. log π̂ is −4.6 half of
    the time, 0 and −9.2 a quarter each. The exact ELBO, their mean, is −4.6, as for a pair.
    """

    def logits(tokens, positions):
        p = torch.tensor([[1.0, 0.0, 0.0], [0.01, 0.99, 0.0]])
        return p.log()[positions % 2].expand(len(tokens), -1, -1)

    arguments = (
        FakeModel(logits, 2),
        NO_PROMPT,
        torch.zeros(1, 2, dtype=torch.long),
    )
    shares = {(True, True): 20_000, (True, False): 10_000, (False, True): 10_000}
    check_chi_square(S.sample_masks(40_000, 1, 2, 2, seeded()), shares)
    for masks, value in (
        ([[1, 1]], -4.6),
        ([[1, 0]], 0),
        ([[0, 1]], -9.2),
        ([[1, 0], [0, 1]], -4.6),
    ):
        estimate = S.elbo(*arguments, 2, torch.tensor([masks]).bool())
        assert estimate.item() == pytest.approx(value, abs=0.02)
    assert S.exact_elbo(*arguments, 2).item() == pytest.approx(math.log(0.01))
    assert S.exact_log_likelihood(*arguments, 2).item() == pytest.approx(math.log(0.01))


def test_coupled_masks_are_pairs_in_which_every_token_is_hidden():
    """§3: where a copy shows something, its partner shows the rest; where it shows nothing, neither
    does its partner."""
    masks = S.coupled_masks(500, 4, 6, 3, seeded())
    assert masks.shape == (500, 4, 6) and masks.dtype == torch.bool
    for n, k, b in itertools.product(range(500), range(2), (0, 3)):
        one, partner = masks[n, k, b : b + 3], masks[n, k + 2, b : b + 3]
        assert partner.all() if one.all() else torch.equal(partner, ~one)
    with pytest.raises(AssertionError, match="copies must be even, not 3"):
        S.coupled_masks(500, 3, 6, 3, seeded())


@pytest.mark.parametrize("B", [2, 3])
def test_more_copies_are_less_noisy_and_coupled_ones_less_still(B):
    """§4: four copies have a quarter of the variance of one, within 20 % (5 standard errors); one
    coupled pair has less than two independent copies, by more than a tenth."""
    one = many_estimates(S.sample_masks, 1, B).var(1)
    two = many_estimates(S.sample_masks, 2, B).var(1)
    four = many_estimates(S.sample_masks, 4, B).var(1)
    assert (4 * four).tolist() == pytest.approx(one.tolist(), rel=0.2)
    assert (many_estimates(S.coupled_masks, 2, B).var(1) < 0.9 * two).all()


def test_mean_field_scores_fully_hidden_blocks():
    expected = []
    for n in range(3):
        blocks = [sum(separate_passes(n, 2)[b, (0, 1)]) for b in range(3)]
        expected.append(sum(blocks))
    found = S.mean_field(MODEL, PROMPTS, COMPLETIONS, 2)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def path(n, B, b, order):
    """Oracle: log-probability of writing block b of completion n in this order."""
    log_p = 0.0
    for step, place in enumerate(order):
        log_p += separate_passes(n, B)[b, tuple(sorted(order[step:]))][place]
    return log_p


@pytest.mark.parametrize("B", [1, 2, 3])
def test_exact_values_equal_brute_force_over_all_orders(B):
    """Jensen's inequality in numbers as well: the mean of the logs is below the log of the mean."""
    bound = S.exact_elbo(MODEL, PROMPTS, COMPLETIONS, B)
    likelihood = S.exact_log_likelihood(MODEL, PROMPTS, COMPLETIONS, B)
    for n in range(3):
        expected = [0.0, 0.0]
        for b in range(6 // B):
            orders = itertools.permutations(range(B))
            paths = [path(n, B, b, order) for order in orders]
            expected[0] += statistics.mean(paths)
            expected[1] += math.log(statistics.mean(map(math.exp, paths)))
        assert [bound[n].item(), likelihood[n].item()] == pytest.approx(expected, abs=1e-4)
    assert B == 1 or (bound < likelihood - 1e-3).all()


@pytest.mark.parametrize("B", [2, 3])
def test_the_trajectory_is_the_product_along_the_order(B):
    """Every order of the first two blocks. (That it fits the sampler is tested above.)"""
    for orders in itertools.product(itertools.permutations(range(B)), repeat=2):
        expected = sum(path(0, B, b, order) for b, order in enumerate(orders))
        steps = [order.index(place) for order in orders for place in range(B)]
        found = S.trajectory(
            MODEL,
            PROMPTS[:1],
            COMPLETIONS[:1, : 2 * B],
            B,
            steps=torch.tensor([steps]),
        )
        assert found.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("B", [2, 3])
def test_completions_and_their_steps_follow_the_trajectory_distribution(B):
    """§2, §4: 30,000 samples of one block, over all pairs of completion and order."""
    everything, expected = every_completion(B), {}
    for order in itertools.permutations(range(B)):
        steps = torch.tensor(order).expand(len(everything), -1)
        p = S.trajectory(SHARP, PROMPT, everything, B, steps=steps).exp() / math.factorial(B)
        for y, q in zip(everything.tolist(), p.tolist()):
            expected[(*y, *order)] = 30_000 * q
    options = dict(generator=seeded(B), samples=30_000, return_steps=True)
    check_chi_square(torch.cat(S.generate(SHARP, PROMPT, B, B, **options), 1), expected)


def test_patterns_are_all_ways_to_hide_something():
    """B = 3, each pattern against passes of its own; blocks of more than 6 are refused."""
    patterns, log_p = S.every_pattern(MODEL, PROMPTS, COMPLETIONS, 3)
    bits = [[s & 1 > 0, s & 2 > 0, s & 4 > 0] for s in range(1, 8)]
    assert patterns.tolist() == bits
    for n, s, b in itertools.product(range(3), range(7), range(2)):
        alone = separate_passes(n, 3)[b, places(patterns[s])]
        assert log_p[n, s, b].tolist() == pytest.approx(alone, abs=1e-4)
    with pytest.raises(AssertionError, match="block_size 7 is above 6"):
        S.exact_log_likelihood(MODEL, torch.zeros(1, 7), torch.zeros(1, 7), 7)


@pytest.mark.parametrize("estimate", [S.exact_log_likelihood, S.exact_elbo, S.trajectory, S.elbo])
def test_likelihoods_can_be_differentiated(estimate):
    """The gradient along three random directions in weight space against a central difference, in
    float64."""
    model = tiny_model().double()
    masks = S.sample_masks(3, 2, 6, 2, seeded(1))
    steps = torch.tensor([[0, 1, 1, 0, 0, 1]] * 3)
    weights = list(model.parameters())

    def value():
        return estimate(model, PROMPTS, COMPLETIONS, 2, masks, steps)[1]

    slopes = torch.autograd.grad(value(), weights)
    for seed in range(3):
        direction = [torch.randn(w.shape, generator=seeded(seed)).double() for w in weights]
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for weight, d in zip(weights, direction):
                    weight += step * d
                values.append(value().item())
        with torch.no_grad():
            for weight, d in zip(weights, direction):
                weight += 1e-5 * d
        expected = sum((slope * d).sum().item() for slope, d in zip(slopes, direction))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-3)


def test_the_likelihood_of_the_log_keeps_no_graph():
    """At B = 4 it would hold 15 copies in memory."""
    batch = {"prompts": PROMPTS, "completions": COMPLETIONS, "block_size": 2}
    assert not S.true_log_prob(MODEL, **batch).requires_grad


# ==== §5 Losses =====================================================================================


LOG_RATIOS = [-2.0, -0.1, 0.2, 3.0, 0.0, 5.0, -5.0, 1.0]

ADVANTAGES = [1.0, -2.0, 0.5, -0.7, 0.3, 2.0, -1.5, 0.9]


def weight_by_hand(loss, ratio, A, eps):
    """Oracle: §5's table, a completion's weight before it is divided."""
    clipped = min(max(ratio, 1 - eps), 1 + eps)
    if loss == "grpo":
        left_alone = ratio > 1 + eps if A > 0 else ratio < 1 - eps
        return 0.0 if left_alone else ratio
    return {"norm_only": ratio, "no_ratio": 1.0}.get(loss, clipped)


def gradient(name, log_ratio, advantages, eps=None, group_size=4):
    """(value, [d loss / d log ρ̂_i]) of a loss in float64, with its own ε or another."""
    loss, own_eps = S.LOSSES[name]
    leaf = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor(advantages, dtype=torch.float64)
    value = loss(leaf, advantages, own_eps if eps is None else eps, group_size)
    value.backward()
    return value.item(), leaf.grad.tolist()


@pytest.mark.parametrize("name", S.LOSSES)
@pytest.mark.parametrize("eps", [0.2, 0.5, 1.0, 5.0])
def test_every_loss_gives_the_weights_of_its_table(name, eps):
    """§5: the gradient of the loss by log ρ̂ is −weight·A / divisor, two groups of four."""
    weights = []
    for x, A in zip(LOG_RATIOS, ADVANTAGES):
        weights.append(weight_by_hand(name, math.exp(x), A, eps))
    divisors = [8.0] * 8
    if name in ("stabledrl", "norm_only"):
        divisors = [2 * sum(weights[:4])] * 4 + [2 * sum(weights[4:])] * 4
    expected = [-w * A / d for w, A, d in zip(weights, ADVANTAGES, divisors)]
    own = None if name in ("norm_only", "no_ratio") else eps
    _, found = gradient(name, LOG_RATIOS, ADVANTAGES, own)
    assert found == pytest.approx(expected)


def test_the_values_of_both_losses():
    """GRPO: −mean min(ρ̂A, clip(ρ̂)A). StableDRL: −mean over groups of Σ w·A·log ρ̂."""
    surrogates = []
    for x, A in zip(LOG_RATIOS, ADVANTAGES):
        clipped = min(max(math.exp(x), 0.8), 1.2)
        surrogates.append(min(math.exp(x) * A, clipped * A))
    value, _ = gradient("grpo", LOG_RATIOS, ADVANTAGES)
    assert value == pytest.approx(-statistics.mean(surrogates))
    value, slopes = gradient("stabledrl", LOG_RATIOS, ADVANTAGES)
    assert value == pytest.approx(sum(slope * x for slope, x in zip(slopes, LOG_RATIOS)))


def test_advantages_are_standardised_within_their_group():
    rewards, expected = [1.0, 0.0, 0.5, 0.25, 0.1, 0.9, 3.0, 3.0], []
    for group in (rewards[:4], rewards[4:]):
        mean, deviation = statistics.mean(group), statistics.pstdev(group)
        expected += [(reward - mean) / deviation for reward in group]
    found = S.group_advantages(torch.tensor(rewards), 4)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    nearly_equal = S.group_advantages(torch.tensor([0.0, 2e-6]), 2)
    assert nearly_equal.abs().max() <= 1, "no blow-up where rewards hardly differ"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_rewards_may_be_whole_numbers_or_bools(dtype):
    A = S.group_advantages(torch.tensor([1, 0, 1, 0], dtype=dtype), 4)
    assert A.is_floating_point() and A.tolist() == pytest.approx([1, -1, 1, -1], rel=1e-4)


@pytest.mark.parametrize("name", S.LOSSES)
def test_equal_rewards_give_exactly_no_gradient(name):
    """For every value and size of group, also where the mean of equal floats is not that float."""
    for value, size in itertools.product((0.0, 0.1, 1 / 3, 1.0), (2, 3, 7, 8)):
        A = S.group_advantages(torch.full((size,), value), size).tolist()
        _, found = gradient(name, LOG_RATIOS[:size], A, group_size=size)
        assert A == found == [0.0] * size


@pytest.mark.parametrize("sign", [1, -1])
def test_one_spike_has_no_bound_under_grpo_and_one_under_stabledrl(sign):
    """The paper's first claim. One completion of 8 has log ρ̂ = 5, 10, 20. GRPO's gradient grows as
    ρ̂ where A < 0, and is 0 where A > 0. StableDRL's is §5's 6/13."""
    A = [sign, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    for spike in (5.0, 10.0, 20.0):
        log_ratio = [spike] + [0.0] * 7
        _, grpo = gradient("grpo", log_ratio, A, group_size=8)
        assert abs(grpo[0]) == pytest.approx(math.exp(spike) / 8 if sign < 0 else 0.0)
        _, stable = gradient("stabledrl", log_ratio, A, group_size=8)
        assert abs(stable[0]) == pytest.approx(6 / 13)


@pytest.mark.parametrize("name", S.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_finite_log_ratio_gives_a_finite_loss_and_gradient(name, dtype, sign):
    """Up to e^1000 and down to e^−1000, where A is 0 as well; and GRPO's open case stays the
    largest."""
    loss, own_eps = S.LOSSES[name]
    A = sign * torch.tensor([1.0, -1.0] * 4 + [0.0] * 4, dtype=dtype)
    extreme = [1000.0, -1000.0, 0.0, 0.3, -0.3, 300.0, -300.0, 90.0, 1000.0, 90.0, -1000.0, 0.0]
    for eps in (own_eps, 0.2, 1.0, 5.0, 1e6):
        leaf = torch.tensor(extreme, dtype=dtype, requires_grad=True)
        value = loss(leaf, A, eps, 4)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all() and leaf.grad.any()
        if name == "grpo":
            assert (leaf.grad[0] > 1e30) == (sign < 0)


def test_many_large_ratios_do_not_overflow_grpo():
    """8,192 bad completions at e^90: each objective fits into float32, their sum would not."""
    leaf = torch.full((8192,), 90.0, requires_grad=True)
    loss = S.grpo_loss(leaf, -torch.ones(8192), 0.2)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and (leaf.grad > 1e30).all()


SHAPES = [
    ((4, 1), (4,)),
    ((4,), (4, 1)),
    ((4, 2), (4, 2)),
    ((4,), (2,)),
    ((), ()),
]


@pytest.mark.parametrize("name", S.LOSSES)
def test_wrong_shapes_are_refused_in_one_sentence(name):
    """A column beside a row would broadcast to (N, N), silently."""
    loss, eps = S.LOSSES[name]
    for a, b in SHAPES:
        with pytest.raises(AssertionError, match=r"shape must be \(N,\) = "):
            loss(torch.zeros(a), torch.zeros(b), eps, 2)
    with pytest.raises(AssertionError, match="3 completions are not a multiple of group_size 2"):
        loss(torch.zeros(3), torch.zeros(3), eps, 2)


def test_stabledrl_update_lies_in_the_convex_hull_of_its_samples():
    """The paper's second claim, with a real model and wild ratios: the update is Σ w_j A_j g_j with
    w ≥ 0, Σ w = 1, so its norm is at most the largest ‖A_j g_j‖. GRPO breaks the bound.
    """
    A, noise = torch.tensor([0.9, -1.4, 1.1]), torch.tensor([0.5, 8.0, -3.0])
    masks = S.sample_masks(3, 2, 6, 2, seeded())
    log_prob = S.elbo(MODEL, PROMPTS, COMPLETIONS, 2, masks)
    log_ratio = log_prob - log_prob.detach() + noise
    corners = torch.stack([gradients(a * l) for a, l in zip(A, log_prob)]).double()
    update = -gradients(S.stabledrl_loss(log_ratio, A, 5.0, 3)).double()
    w = torch.linalg.lstsq(corners.T, update[:, None]).solution[:, 0]
    assert torch.allclose(w @ corners, update, atol=1e-5 * update.abs().max().item())
    assert (w > -1e-6).all() and w.sum().item() == pytest.approx(1, abs=1e-4)
    largest = corners.norm(dim=1).max()
    assert update.norm() <= largest * (1 + 1e-6)
    assert gradients(S.grpo_loss(log_ratio, A, 0.2)).norm() > 100 * largest


@pytest.mark.parametrize("name", S.LOSSES)
def test_at_ratio_one_all_losses_are_the_policy_gradient(name):
    """−mean A·∇log π̂; and their value is 0, where Σ A = 0, though their gradient is not (§5)."""
    A = [1.0, -2.0, 1.0, 3.0, -2.6, -0.4]
    value, found = gradient(name, [0.0] * 6, A, group_size=3)
    assert found == pytest.approx([-a / 6 for a in A]) and value == pytest.approx(0)


@pytest.mark.parametrize("name", S.LOSSES)
def test_the_expected_update_is_the_gradient_of_the_expected_reward(name):
    """§5, with nothing sampled: all 81 pairs of completions of two tokens, G = 2, rewards 0 or 1,
    exact likelihoods. The mean of −∇loss over pairs is ∇E[reward]: the factor 1 − 1/G and the
    deviation, both 1/2, cancel."""
    y = every_completion(2)
    rewards = (y.sum(-1) % 2).float()  # (9,)
    log_p = S.exact_log_likelihood(SHARP, PROMPT, y, 2)  # (9,)
    expected = gradients((log_p.exp() * rewards).sum(), SHARP)
    pairs = torch.tensor(list(itertools.product(range(9), repeat=2))).flatten()  # (162,)
    p = log_p.detach().exp()[pairs].view(81, 2).prod(-1)  # of each pair
    loss, eps = S.LOSSES[name]
    leaf = torch.zeros(162, requires_grad=True)
    loss(leaf, S.group_advantages(rewards[pairs], 2), eps, 2).backward()
    coefficients = leaf.grad.view(81, 2) * 81 * p[:, None]  # the loss is a plain mean over pairs
    update = -gradients((coefficients.flatten() * log_p[pairs]).sum(), SHARP)
    assert expected.abs().max() > 0.01
    assert torch.allclose(update, expected, atol=1e-5 * expected.abs().max().item() + 2e-6)


# ==== §6 Training =================================================================================


SIZES = dict(prompts=2, group_size=3, d_model=16, n_layer=1, n_head=2, base_accuracy=0)


def tiny(**settings):
    return S.Config(**(SIZES | dict(updates=4, log_every=2) | settings))


def start_of(model):
    """The checkpoint of update 0, without what is measured there."""
    return {"model": model.state_dict(), "optimizer": None, "rows": [{"update": 0}]}


def checkpoints(**settings):
    """All that a tiny run yields, from the untrained policy of seed 0."""
    config = tiny(**settings)
    base_model = S.new_model(dataclasses.replace(config, seed=0))
    return list(S.train(config, base_model, start_of(base_model)))


def train(**settings):
    """Its rows, without the seconds."""
    return [dict(row, seconds=0) for row in checkpoints(**settings)[-1]["rows"][1:]]


EVALUATE = S.evaluate


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    """Addition rewards the share of right characters: an untrained policy gets some of it, so a run
    of four updates has a gradient. And 20 prompts are enough for an accuracy."""

    def reward(prompt, completion):
        total = f"{int(prompt[:2]) + int(prompt[3:5])}...."
        return sum(a == b for a, b in zip(completion, total)) / 4

    monkeypatch.setattr(TASKS["addition"], "reward", reward)
    monkeypatch.setattr(S, "evaluate", functools.partial(EVALUATE, count=20))


def watch(monkeypatch, owner, name):
    """-> a list that gets (arguments by name with defaults, result) of every call from now on."""
    function, calls = getattr(owner, name), []

    def watched(*arguments, **options):
        bound = inspect.signature(function).bind(*arguments, **options)
        bound.apply_defaults()
        result = function(*arguments, **options)
        calls.append((dict(bound.arguments), result))
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


@pytest.fixture
def batches(monkeypatch):
    """A list that gets (copy of the policy, batch, rewards) for every batch of RL."""
    found, answer = [], S.answer

    def watched(model, task, texts, *arguments, **options):
        batch, rewards = answer(model, task, texts, *arguments, **options)
        if options.get("samples"):
            found.append((copy.deepcopy(model), batch, rewards))
        return batch, rewards

    monkeypatch.setattr(S, "answer", watched)
    return found


def test_each_completion_is_judged_with_its_own_prompt(monkeypatch):
    """Rows i·G .. i·G+G−1 answer prompt i."""
    task, texts = TASKS["addition"], ["12+34=", "56+07="]
    monkeypatch.setattr(task, "reward", lambda prompt, text: int(prompt[:2]) / 64)
    batch, rewards = S.answer(S.new_model(tiny()), task, texts, 2, samples=3)
    assert rewards.tolist() == [12 / 64] * 3 + [56 / 64] * 3
    assert S.decode(task, batch["prompts"]) == texts and batch["block_size"] == 2
    assert batch["completions"].shape == batch["steps"].shape == (6, 4)


def test_accuracy_is_the_share_of_500_held_out_prompts_that_are_solved(monkeypatch):
    """Not of those that earn something: some tasks reward a part. `writes` are the first three."""
    task = TASKS["addition"]
    rewards = {"0": 1.0, "1": 1.0, "2": 0.5}
    monkeypatch.setattr(task, "reward", lambda prompt, text: rewards.get(prompt[0], 0.0))
    texts, _ = task.sample(np.random.default_rng(0), 500, "test")
    found = EVALUATE(S.new_model(tiny()), task, 2)
    assert found["accuracy"] == sum(text[0] in "01" for text in texts) / 500
    for text, line in zip(texts[:3], found["writes"], strict=True):
        verdict = "right" if text[0] in "01" else "wrong"
        assert line.startswith(text) and line.endswith(f" {verdict}") and len(line) == 16


def test_what_training_asks_for(monkeypatch):
    """Training prompts for pretraining, RL and the base policy's reward; held-out ones for the
    accuracy. RL and that reward sample in random order at temperature 1, evaluation is greedy,
    surest first. Adam with the settings' rates, and in RL the authors' betas."""
    monkeypatch.setattr(S, "evaluate", EVALUATE)
    prompts = watch(monkeypatch, TASKS["addition"], "sample")
    written = watch(monkeypatch, S, "generate")
    optimizers = watch(monkeypatch, torch.optim, "Adam")
    config = tiny(base_accuracy=0.004, lr=0.25, base_lr=0.002, updates=2)
    base_model = S.pretrain(config)
    del written[:-1]
    checkpoint = S.first_checkpoint(config, base_model)
    list(S.train(config, base_model, checkpoint))
    asked = [(call["n"], call["split"]) for call, _ in prompts]
    pretraining, rest = asked[:-4], asked[-4:]
    assert set(pretraining) == {(256, "train"), (500, "test")}
    assert rest == [(2000, "train"), (500, "test"), (2, "train"), (500, "test")]
    manner = [
        (len(call["prompts"]), call["samples"], call["temperature"], call["order"])
        for call, _ in written
    ]
    greedy = (500, 1, 0, "confidence")
    assert manner == [greedy, (2000, 1, 1.0, "random"), greedy, (2, 3, 1.0, "random"), greedy]
    (first, _), (second, _) = optimizers
    assert first["lr"] == 0.002 and first["betas"] == (0.9, 0.999)
    assert second["lr"] == 0.25 and second["betas"] == (0.9, 0.99)


def test_pretraining_maximises_the_elbo_of_right_completions(monkeypatch):
    """Its loss is −mean ELBO per token, by one noisy copy of the tasks' own solutions; and it makes
    solutions likelier."""
    monkeypatch.setattr(S, "evaluate", EVALUATE)
    estimates = watch(monkeypatch, S, "elbo")
    model = S.pretrain(tiny(base_accuracy=0.004, base_lr=2e-3))
    task = TASKS["addition"]
    for call, _ in estimates:
        assert call["masks"].shape == (256, 1, 4)
        texts, completions = (S.decode(task, call[name]) for name in ("prompts", "completions"))
        for text, completion in zip(texts, completions):
            assert int(text[:2]) + int(text[3:5]) == int(completion.rstrip("."))
    texts, solutions = task.sample(np.random.default_rng(0), 200, "test")
    tokens = [torch.tensor(S.encode(task, strings)) for strings in (texts, solutions)]
    untrained = S.new_model(tiny())
    gain = S.exact_elbo(model, *tokens, 2).mean() - S.exact_elbo(untrained, *tokens, 2).mean()
    assert gain > 1


def test_pretraining_stops_at_the_accuracy_asked_for_or_says_why_not(monkeypatch):
    """It looks every 10 updates, the last time at update 2,000, and makes no update unseen."""
    looks = []

    def evaluate(model, task, block_size):
        looks.append(model)
        return {"accuracy": 0.5 if len(looks) > reached else 0.3}

    monkeypatch.setattr(S, "evaluate", evaluate)
    losses = watch(monkeypatch, S, "elbo")
    reached = 2
    S.pretrain(tiny(base_accuracy=0.4))
    assert len(looks) == 3 and len(losses) == 20
    monkeypatch.setattr(S, "tqdm", lambda updates, **options: Bar(list(updates)[-12:]))
    looks.clear(), losses.clear()
    reached = 99
    with pytest.raises(TimeoutError, match="--base_accuracy 0.4 is not reached in 2,000 updates"):
        S.pretrain(tiny(base_accuracy=0.4))
    assert len(looks) == 2 and len(losses) == 11  # at 1,990 and 2,000; 1,989 to 1,999


class Bar(list):
    """As tqdm: a list of updates with a description."""


def test_a_run_depends_on_its_seed_and_not_on_the_global_random_state():
    logs = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        np.random.seed(i)
        logs.append(train(seed=seed))
    assert logs[0] == logs[1] != logs[2]


def test_all_policies_see_the_same_prompts_and_first_completions(batches):
    """The paper's protocol: same base policy, same prompts, same budget for each of one seed."""
    for loss, estimator in itertools.product(S.LOSSES, ("elbo", "exact")):
        train(loss=loss, estimator=estimator)
    first, second = batches[0][1], batches[1][1]
    assert not torch.equal(first["prompts"], second["prompts"])
    for i, (_, batch, _) in enumerate(batches):
        assert torch.equal(batch["prompts"], batches[i % 2][1]["prompts"])
        assert i % 2 or torch.equal(batch["completions"], first["completions"])


@pytest.mark.parametrize("shared", [False, True])
def test_which_masks_the_estimates_of_a_batch_see(shared, monkeypatch):
    """Drawn anew: one old estimate, and μ new ones, no masks twice. Shared: μ old estimates, and
    each update has the masks of its own old one. The old ones come before any update."""
    seen, elbo = [], S.elbo

    def watched(model, masks, **batch):
        seen.append((masks, model.embed.weight.detach().clone(), torch.is_grad_enabled()))
        return elbo(model, masks=masks, **batch)

    monkeypatch.setitem(S.ESTIMATORS, "elbo", watched)
    train(mu=3, updates=3, log_every=3, copies=2, shared_masks=shared, lr=0.1)
    old = 3 if shared else 1
    assert [graph for _, _, graph in seen] == [False] * old + [True] * 3
    weights = [weight for _, weight, _ in seen]
    assert all(torch.equal(weight, weights[0]) for weight in weights[: old + 1])
    assert not torch.equal(weights[-2], weights[0]) and not torch.equal(weights[-1], weights[-2])
    for (i, (a, *_)), (j, (b, *_)) in itertools.combinations(enumerate(seen), 2):
        assert a.shape == (6, 2, 4) and torch.equal(a, b) == (shared and j == i + 3)


@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_gets_what_the_algorithm_says(shared, monkeypatch, batches):
    """new − old estimate of the same completions, the advantages of their rewards, ε and G."""
    estimates, elbo, losses = [], S.elbo, []

    def watched(model, **batch):
        estimates.append(elbo(model, **batch))
        return estimates[-1]

    def loss(log_ratio, advantages, clip_eps, group_size):
        losses.append((log_ratio.detach(), advantages, clip_eps, group_size))
        return S.stabledrl_loss(log_ratio, advantages, clip_eps, group_size)

    monkeypatch.setitem(S.ESTIMATORS, "elbo", watched)
    monkeypatch.setitem(S.LOSSES, "mine", (loss, 0.7))
    train(loss="mine", shared_masks=shared, updates=2, lr=0.01)
    *old, new, newer = estimates
    for (log_ratio, A, eps, G), before, after in zip(losses, (old[0], old[-1]), (new, newer)):
        assert torch.equal(log_ratio, after.detach() - before) and (eps, G) == (0.7, 3)
        assert torch.equal(A, S.group_advantages(batches[0][2], 3)) and A.any()
    assert len(old) == 1 + shared and len(losses) == 2


@pytest.mark.parametrize("estimator", S.ESTIMATORS)
@pytest.mark.parametrize("shared_masks", [False, True])
def test_the_first_ratios_of_a_batch_are_one_or_noise(estimator, shared_masks):
    """`spread` is 0 for whatever draws nothing, or draws the same masks again. With μ = 1 there is
    no other update: every ρ̂ is then 1. With μ = 2 the policy has moved at the second."""
    settings = dict(estimator=estimator, shared_masks=shared_masks, lr=0.01)
    quiet = estimator != "elbo" or shared_masks
    for row in train(mu=1, **settings):
        assert (row["spread"] == 0) == (row["ratio_max"] == 1) == quiet
    for row in train(mu=2, **settings):
        assert (row["spread"] == 0) == quiet and row["ratio_max"] != 1
        assert (row["noise_std"] == 0) == (estimator == "exact")


@pytest.mark.parametrize("loss", S.LOSSES)
def test_one_update_follows_the_advantages(loss, monkeypatch, batches):
    """One step on the exact ratio makes rewarded completions likelier than the others."""
    A = torch.tensor([1.0, -1.0] * 16)
    monkeypatch.setattr(S, "group_advantages", lambda rewards, group_size: A)
    settings = dict(estimator="exact", prompts=8, group_size=4, mu=1, updates=1, log_every=1)
    (checkpoint,) = checkpoints(loss=loss, **settings)
    ((base, batch, _),) = batches
    model = copy.deepcopy(base)
    model.load_state_dict(checkpoint["model"])
    gain = S.exact_log_likelihood(model, **batch) - S.exact_log_likelihood(base, **batch)
    assert (gain * A).mean() > 0


def test_gradient_norm_is_logged_before_clipping_and_clipped_after(monkeypatch):
    """The norm of what the optimiser gets, at the first update from one base."""
    norms, step = [], torch.optim.Adam.step

    def watched(optimizer, *arguments):
        (group,) = optimizer.param_groups
        gradient = torch.cat([p.grad.flatten() for p in group["params"]])
        norms.append(gradient.norm().item())
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    one = dict(mu=1, log_every=1, updates=1)
    (free,), (clipped,) = train(max_grad_norm=1e9, **one), train(max_grad_norm=1e-3, **one)
    assert free["grad_norm"] == clipped["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_the_run(poison, monkeypatch):
    """One likelihood of one completion, in update 4. It is never replaced by a number: a NaN that
    became 0 would be the largest weight of its group. What was yielded before is whole."""
    calls = []

    def poisoned(model, **arguments):
        calls.append(S.elbo(model, **arguments))
        if len(calls) == 6:  # old, new, new; old, new, new
            calls[-1][3] = poison
        return calls[-1]

    monkeypatch.setitem(S.ESTIMATORS, "elbo", poisoned)
    base_model, yielded = S.new_model(tiny()), []
    with pytest.raises(FloatingPointError, match="update 4 was not made: loss .*, gradient norm"):
        for checkpoint in S.train(tiny(), base_model, start_of(base_model)):
            yielded.append(checkpoint)
    (checkpoint,) = yielded
    assert [row["update"] for row in checkpoint["rows"]] == [0, 2]


def test_diagnostics_against_plain_loops():
    log_ratio, eps = [0.0, 1.0, -2.0, 0.5, 4.0, 0.1], 0.5
    ratios, sizes = [math.exp(x) for x in log_ratio], []
    for group in (ratios[:3], ratios[3:]):
        sizes.append(sum(group) ** 2 / sum(ratio**2 for ratio in group))
    outside = [ratio < 1 - eps or ratio > 1 + eps for ratio in ratios]
    expected = {
        "ratio_max": max(ratios),
        "ess": sum(sizes) / 2,
        "clip_fraction": sum(outside) / 6,
    }
    found = S.ratio_diagnostics(torch.tensor(log_ratio), eps, 3)
    assert found == pytest.approx(expected, rel=1e-5)


def test_diagnostics_at_the_extremes():
    """Equal ratios: ESS = G, and ratios on the bounds are inside. One outlier: ESS = 1. e^±900 does
    not overflow: JSON has no infinity."""
    equal = S.ratio_diagnostics(torch.zeros(8), 0.0, 4)
    assert equal == {"ratio_max": 1.0, "clip_fraction": 0.0, "ess": 4.0}
    wild = S.ratio_diagnostics(torch.tensor([900.0, 0.0, -900.0, 0.0]), 0.2, 4)
    assert wild == pytest.approx({"ess": 1, "ratio_max": math.exp(700), "clip_fraction": 0.5})


def test_noise_and_drift_are_those_of_the_last_batch(monkeypatch, batches):
    """noise_std against log ρ of the policies at its two updates; drift is the mean of log π_old −
    log π_base over the completions of π_old, and 0 in the first batch. spread is of the first update
    of the batch."""
    policies, step, log_ratios = [], torch.optim.Adam.step, []

    def watched(optimizer, *arguments):
        policies.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        return step(optimizer, *arguments)

    def loss(log_ratio, advantages, clip_eps, group_size):
        log_ratios.append(log_ratio.detach())
        return S.grpo_loss(log_ratio, advantages, clip_eps)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    monkeypatch.setitem(S.LOSSES, "mine", (loss, 0.2))
    first, last = train(loss="mine", lr=0.01)
    (base, _, _), (old, batch, _) = batches
    new = copy.deepcopy(old)
    with torch.no_grad():
        for parameter, value in zip(new.parameters(), policies[-1]):
            parameter.copy_(value)
        truth, old_truth, base_truth = (
            S.exact_log_likelihood(model, **batch) for model in (new, old, base)
        )
    noise = (log_ratios[-1] - (truth - old_truth)).tolist()
    assert last["noise_std"] == pytest.approx(statistics.pstdev(noise), rel=1e-4)
    assert last["spread"] == pytest.approx(statistics.pstdev(log_ratios[-2].tolist()), rel=1e-4)
    assert last["drift"] == pytest.approx((old_truth - base_truth).mean().item(), abs=1e-5)
    assert first["drift"] == 0 and abs(last["drift"]) > 1e-3


@pytest.mark.parametrize("B", [6, 7])
def test_noise_is_measured_for_blocks_of_at_most_6(B, monkeypatch):
    """Exact likelihoods of 2^7 − 1 copies are not asked for: the columns are then missing."""
    task = types.SimpleNamespace(vocab="01", prompt_len=B, completion_len=B, block_size=B)
    task.reward = lambda prompt, completion: 0.0
    task.sample = lambda rng, n, split: (["0" * B] * n, None)
    monkeypatch.setitem(TASKS, "long", task)
    row = train(task="long")[0]
    assert ("noise_std" in row) == ("drift" in row) == (B == 6)


def test_rows_sum_up_all_updates_since_the_row_before():
    """One row per update against one row for all: means of the means, maximum of the maxima, and
    what is measured at the row is that of the last update."""
    fine, (coarse,) = train(mu=1, log_every=1), train(mu=1, log_every=4)
    for name in ("reward", "grad_norm", "ess", "clip_fraction", "spread"):
        assert coarse[name] == pytest.approx(statistics.mean(row[name] for row in fine))
    assert coarse["ratio_max"] == max(row["ratio_max"] for row in fine)
    for name in ("noise_std", "drift", "accuracy", "writes"):
        assert coarse[name] == fine[-1][name]


def test_the_log_begins_with_the_base_policy_and_has_columns_that_are_explained():
    """Its reward is that of 2,000 completions of training prompts, drawn as in RL."""
    config, task = tiny(), TASKS["addition"]
    base_model = S.new_model(config)
    *_, last = S.train(config, base_model)
    first, *rows = last["rows"]
    texts, _ = task.sample(np.random.default_rng(1), 2000, "train")
    _, rewards = S.answer(base_model, task, texts, 2, generator=S.stream(config, "base"))
    assert first["reward"] == rewards.mean().item() and first["update"] == 0
    assert first["accuracy"] == S.evaluate(base_model, task, 2)["accuracy"]
    section = README[README.index("## What a run writes") :]
    to_watch = {*re.findall(r"`([a-z_]+)`", section)} - {"train"}
    (of_row,) = re.findall("A row has(.*)`train` touches", S.train.__doc__, re.DOTALL)
    explained = {*re.findall(r"`(\w+)`", of_row)} - {"ratio_diagnostics"}
    assert to_watch <= explained
    for row in rows:
        assert set(row) == explained, "a new column needs a line in the docstring of `train`"
        assert 0 < row["seconds"] < 600
    assert set(first) == {"update", "reward", "accuracy", "writes"}


def test_a_checkpoint_stays_what_it_is_and_training_goes_on_from_it():
    """Twice from the same one, with the same end; and the base policy is not touched."""
    config = tiny(updates=6, lr=0.01)
    base_model = S.new_model(config)
    before = copy.deepcopy(base_model.state_dict())
    whole = list(S.train(config, base_model, start_of(base_model)))
    assert [len(checkpoint["rows"]) for checkpoint in whole] == [2, 3, 4]
    kept = copy.deepcopy(whole[0])
    for _ in range(2):
        *_, end = S.train(config, base_model, whole[0])
        for one, other in ((end, whole[-1]), (whole[0], kept)):
            torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)
            states = one["optimizer"]["state"], other["optimizer"]["state"]
            torch.testing.assert_close(*states, rtol=0, atol=0)
        for a, b in zip(end["rows"], whole[-1]["rows"], strict=True):
            assert dict(a, seconds=0) == dict(b, seconds=0)
    torch.testing.assert_close(base_model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_is_the_same_kind_of_thing_on_a_gpu():
    """Run there, and read here: the exact likelihood is that of the CPU."""
    weights, values = checkpoints(device="cuda")[-1]["model"], []
    for device in ("cpu", "cuda"):
        model = S.new_model(tiny(device=device))
        model.load_state_dict(weights)
        tokens = TOKENS[:, :10].to(device)
        found = S.exact_log_likelihood(model, tokens[:, :6], tokens[:, 6:], 2)
        values.append(found.tolist())
    assert values[1] == pytest.approx(values[0], abs=1e-3)


OTHER_VALUES = {
    "seed": 1,
    "block_size": 1,
    "d_model": 32,
    "n_layer": 3,
    "n_head": 1,
    "loss": "grpo",
    "estimator": "exact",
    "masks": "coupled",
    "shared_masks": True,
    "copies": 4,
    "clip_eps": 0.01,
    "lr": 0.1,
    "prompts": 3,
    "group_size": 4,
    "mu": 1,
    "max_grad_norm": 1e-9,
    "log_every": 4,
    "updates": 6,
}
ELSEWHERE = {"task", "base_accuracy", "base_lr", "device"}  # what pretraining, or a machine, reads


USUAL = dict(lr=0.01, copies=2)
usual_rows = functools.cache(lambda: train(**USUAL))


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_no_setting_is_dead(name):
    """Another value changes the log."""
    assert usual_rows() != train(**USUAL | {name: OTHER_VALUES[name]})


def test_every_setting_is_tried(monkeypatch):
    assert {field.name for field in dataclasses.fields(S.Config)} == set(OTHER_VALUES) | ELSEWHERE
    accuracies = itertools.cycle([0, 1])  # of the untrained policy, and after 10 updates
    monkeypatch.setattr(S, "evaluate", lambda *arguments: {"accuracy": next(accuracies)})
    policies = [S.pretrain(tiny(base_accuracy=1, base_lr=rate)) for rate in (1e-3, 2e-3)]
    assert not torch.equal(policies[0].embed.weight, policies[1].embed.weight)


# ==== README ======================================================================================


def test_readme_quotes_the_two_lines_of_stabledrl():
    """As they stand in §5, up to the comment. And with the third line they are its gradient."""
    (block,) = re.findall(r"```python\n(clipped.*?)```", README, re.S)
    source = " ".join(SOURCE.split())
    for line in block.splitlines()[:2]:
        assert " ".join(line.split("#")[0].split()) in source
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(12, generator=generator)
    for eps in (0.5, 5.0):
        leaf = torch.randn(12, generator=generator).mul(3).requires_grad_()
        log_lower = math.log(0.5) if eps == 0.5 else -math.inf
        names = dict(log_ratio=leaf, advantages=advantages, clip_eps=eps, group_size=4)
        outcome = names | dict(math=math, log_lower=log_lower)
        exec(block, outcome)
        expected = S.stabledrl_loss(**names)
        (gradient,) = torch.autograd.grad(expected, leaf)
        assert outcome["loss"].item() == pytest.approx(expected.item())
        assert torch.autograd.grad(outcome["loss"], leaf)[0].tolist() == pytest.approx(
            gradient.tolist()
        )


# ==== A learning run, not in the default run ======================================================


@pytest.mark.slow
def test_the_square(tmp_path):
    """The main job: GRPO falls below half of its base on the estimate, and rises by half on the
    exact ratio; StableDRL rises on both."""
    command = [sys.executable, "stabledrl.py", "--out", str(tmp_path)]
    subprocess.run(command, cwd=HERE, check=True)
    times = {}
    for loss, estimator in itertools.product(("grpo", "stabledrl"), ("elbo", "exact")):
        log = (tmp_path / f"addition-{loss}-{estimator}-seed=0" / "log.jsonl").read_text()
        _, *rows = map(json.loads, log.splitlines())
        times[loss, estimator] = rows[-1]["reward"] / rows[0]["reward"]
    assert times["grpo", "elbo"] < 0.5 and times["grpo", "exact"] > 1.5
    assert times["stabledrl", "elbo"] > 1.1 and times["stabledrl", "exact"] > 1.3
