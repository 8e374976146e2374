"""The claims of your_own_model.py. The model here is tiny, and its weights are large, so that its
predictions are far from uniform. Oracles: all orders, all masks, one backward pass of the whole
batch. Two real processes meet over gloo, once for all tests that need them."""

import functools
import itertools
import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import stabledrl as S
import your_own_model as Y

torch.set_num_threads(1)
PAD, MASK = 4, 5  # the other tokens are 0..3
STABLEDRL = {"loss": S.stabledrl_loss, "clip_eps": 5.0}


class Tiny(torch.nn.Module):
    """Full attention, except to padding. Positions count from the first token that is none."""

    def __init__(self, scale=0.6):
        super().__init__()
        self.embed, self.place = torch.nn.Embedding(6, 8), torch.nn.Embedding(20, 8)
        self.qkv, self.head = torch.nn.Linear(8, 24), torch.nn.Linear(8, 6)
        self.never_reached = torch.nn.Linear(2, 2)  # like an expert that no token was sent to
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.normal_(0, scale, generator=generator)
        self.eval()

    def forward(self, tokens):
        is_text = tokens != PAD
        x = self.embed(tokens) + self.place(is_text.cumsum(-1))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=is_text[:, None])
        logits = 2 * self.head(x.tanh())
        logits[..., PAD:] = -math.inf  # padding and [MASK] are never predicted
        return logits


def place(prompt, completion, left=0, right=0):
    """Lists of tokens, padded -> tokens (1,S), is_completion (1,S)."""
    tokens = [PAD] * left + prompt + completion + [PAD] * right
    is_completion = torch.zeros(1, len(tokens), dtype=torch.bool)
    is_completion[0, left + len(prompt) : len(tokens) - right] = True
    return torch.tensor([tokens]), is_completion


# Completions of 1 to 4 tokens, and padding on neither side, the left, the right, or both.
ROWS = [
    place([0, 3, 1, 2], [2, 0, 1, 3]),
    place([3, 2], [1, 1, 0], left=3),
    place([1, 2, 0], [3, 0], right=3),
    place([2, 0, 3], [1], left=1, right=3),
]
TOKENS, IS_COMPLETION = [torch.cat(parts) for parts in zip(*ROWS)]  # (4, 8)


def log_p(model, tokens, hidden, i):
    """log p(token i) with the places `hidden` of tokens (1,S) hidden, as a float."""
    noisy = [MASK if j in hidden else token for j, token in enumerate(tokens[0].tolist())]
    return model(torch.tensor([noisy]))[0, i].double().softmax(-1)[tokens[0, i]].log().item()


@torch.no_grad()
def exact(model, tokens, is_completion):
    """The ELBO: the mean over all orders of Σ log p(token | what is visible when it is written)."""
    look_up = functools.cache(functools.partial(log_p, model, tokens))
    places, total = is_completion[0].nonzero().flatten().tolist(), 0
    for order in itertools.permutations(places):
        for step, i in enumerate(order):
            total += look_up(frozenset(order[step:]), i)
    return total / math.factorial(len(places))


def all_masks(is_completion):
    """The places of a completion -> (frozenset, probability) of each way to hide some of them."""
    places = is_completion[0].nonzero().flatten().tolist()
    for m in range(1, len(places) + 1):
        sets = [frozenset(chosen) for chosen in itertools.combinations(places, m)]
        for hidden in sets:
            yield hidden, 1 / len(places) / len(sets)


# ==== Masks and estimate ==========================================================================


def test_any_count_of_tokens_is_equally_likely_to_be_hidden_and_padding_never_is():
    """All masks of a row occur, and no others. Each share is within 5 standard errors of its
    probability: for the 26 masks here this fails by chance once in 70,000 seeds."""
    torch.manual_seed(0)
    draws = 20_000
    hidden = Y.hide(IS_COMPLETION.repeat_interleave(draws, 0)).view(4, draws, -1)
    for row, is_completion in zip(hidden, IS_COMPLETION):
        patterns, counts = row.unique(dim=0, return_counts=True)
        found = {}
        for pattern, count in zip(patterns, counts.tolist()):
            found[frozenset(pattern.nonzero().flatten().tolist())] = count / draws
        expected = dict(all_masks(is_completion[None]))
        assert found.keys() == expected.keys()
        for mask, p in expected.items():
            assert abs(found[mask] - p) <= 5 * math.sqrt(p * (1 - p) / draws)


def test_the_estimate_is_the_elbo_on_average_for_any_length_and_padding():
    """Over all masks, each with its probability, it has the mean over all orders."""
    model = Tiny()
    for tokens, is_completion in ROWS:
        mean = 0
        for places, p in all_masks(is_completion):
            hidden = torch.zeros_like(is_completion)
            hidden[0, list(places)] = True
            mean += p * Y.estimate(model, tokens, is_completion, hidden, MASK).item()
        assert mean == pytest.approx(exact(model, tokens, is_completion), rel=1e-5)


def test_padding_changes_neither_estimate_nor_gradient():
    """Though −inf is what the model predicts for it."""
    results = []
    for left, right in ((0, 0), (4, 0), (0, 4), (1, 3)):
        model = Tiny()
        tokens, is_completion = place([0, 3, 1], [2, 0, 1], left, right)
        hidden = is_completion & (tokens != 0)
        log_prob = Y.estimate(model, tokens, is_completion, hidden, MASK)
        log_prob.sum().backward()
        results.append(torch.cat([log_prob.detach(), model.head.weight.grad.flatten()]))
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-5)
    assert results[0].isfinite().all() and results[0][0] < -1


def test_the_logits_of_a_bfloat16_model_are_summed_in_float32():
    """The oracle is a sum of Python floats. In bfloat16 the error would be up to 0.5 nats."""
    model = Tiny().bfloat16()
    tokens, is_completion = place([], [0, 1, 2, 3, 3, 1] * 3)
    with torch.no_grad():
        logits = model(torch.full_like(tokens, MASK))[0].tolist()
        found = Y.estimate(model, tokens, is_completion, is_completion, MASK)
    total = 0
    for row, token in zip(logits, tokens[0].tolist()):
        total += row[token] - math.log(sum(math.exp(logit) for logit in row))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(total, abs=1e-4)
    assert total < -32  # where bfloat16 has steps of 0.25


def test_a_row_without_completion_and_a_model_in_training_mode_are_refused():
    with pytest.raises(AssertionError, match="no completion"):
        Y.hide(IS_COMPLETION & torch.tensor([[True], [True], [False], [True]]))
    with pytest.raises(AssertionError, match="eval"):
        Y.estimate(Tiny().train(), TOKENS, IS_COMPLETION, IS_COMPLETION, MASK)
    model = Tiny()
    model.head.train()
    with pytest.raises(AssertionError, match="eval"):
        Y.estimate(model, TOKENS, IS_COMPLETION, IS_COMPLETION, MASK)


def test_a_completion_that_is_not_finished_is_refused():
    """Even if the place that is still masked is hidden."""
    tokens = TOKENS.masked_fill(IS_COMPLETION & (IS_COMPLETION.cumsum(-1) == 1), MASK)
    with pytest.raises(AssertionError, match="still masked"):
        Y.estimate(Tiny(), tokens, IS_COMPLETION, IS_COMPLETION, MASK)


def test_the_rows_that_are_not_finite_are_named():
    log_ratio, rewards = torch.zeros(4), torch.tensor([0.0, math.nan, 1.0, 0.0])
    log_ratio[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"rows \[1, 3\]"):
        Y.whole_batch(torch.tensor([3, 1, 0, 2]), log_ratio, rewards, 2)


def test_the_noise_is_that_of_two_independent_estimates():
    """σ² is twice the variance of one estimate, here over all masks. 20,000 differences give
    it with a standard error of 0.5 %, so this fails by chance in two seeds of a million."""
    torch.manual_seed(0)
    tokens, is_completion = ROWS[0]
    model, moments = Tiny(), [0, 0]
    for places, p in all_masks(is_completion):
        hidden = torch.zeros_like(is_completion)
        hidden[0, list(places)] = True
        value = Y.estimate(model, tokens, is_completion, hidden, MASK).item()
        moments = [moments[0] + p * value, moments[1] + p * value**2]
    sigma = math.sqrt(2 * (moments[1] - moments[0] ** 2))
    micro_batches = [(tokens.repeat(10_000, 1), is_completion.repeat(10_000, 1))] * 2
    assert Y.noise(model, micro_batches, MASK).item() == pytest.approx(sigma, rel=0.025)


# ==== Training step ===============================================================================

GROUP_SIZE = 4


class Descent:
    """Plain gradient descent. (The first step of one in torch.optim imports a compiler: seconds.)"""

    def __init__(self, model, lr=1.0):
        self.parameters, self.lr = list(model.parameters()), lr

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            if p.grad is not None:
                p -= self.lr * p.grad


def whole():
    """A batch of three groups: tokens, is_completion, hidden (12,8), old log π̂ and rewards (12,).
    Some ratios are beyond the clip of StableDRL, and each group has rewards of both kinds."""
    torch.manual_seed(1)
    tokens, is_completion = TOKENS.repeat(3, 1), IS_COMPLETION.repeat(3, 1)
    tokens = torch.where(is_completion, torch.randint(4, tokens.shape), tokens)
    hidden = Y.hide(is_completion)
    rewards = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1.0])
    old_log_prob = Y.log_probs(Tiny(), [(tokens, is_completion, hidden)], MASK)
    old_log_prob += 2 * torch.randn(12)
    return tokens, is_completion, hidden, old_log_prob, rewards


def gradient(model):
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def expected_gradient(loss, clip_eps):
    """One backward pass of the whole batch in one process."""
    *batch, old_log_prob, rewards = whole()
    model = Tiny()
    log_ratio = Y.estimate(model, *batch, MASK) - old_log_prob
    loss(log_ratio, S.group_advantages(rewards, GROUP_SIZE), clip_eps, GROUP_SIZE).backward()
    return gradient(model)


def step(rows, size, change=None, model=None, **options):
    """`training_step` with these rows of the batch, in micro-batches of this size -> the model, and
    in model.result what was returned. change(model, old_log_prob, rewards) comes first."""
    rows, model = torch.tensor(rows), model or Tiny()
    *batch, old_log_prob, rewards = [x[rows] for x in whole()]
    if change:
        change(model, old_log_prob, rewards)
    micro_batches = list(zip(*[x.split(size) for x in batch]))
    options = STABLEDRL | options
    model.result = Y.training_step(
        model,
        Descent(model),
        micro_batches,
        old_log_prob,
        rows,
        rewards,
        GROUP_SIZE,
        MASK,
        **options,
    )
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", S.LOSSES)
def test_micro_batches_that_cut_groups_give_the_gradient_of_the_whole_batch(name):
    loss, clip_eps = S.LOSSES[name]
    expected = expected_gradient(loss, clip_eps)
    assert expected.norm() > 0.05
    for rows, size in (
        (range(12), 12),
        (range(12), 5),
        (range(12), 1),
        ([7, *range(7), *range(8, 12)], 3),
    ):
        model = step(list(rows), size, loss=loss, clip_eps=clip_eps, max_grad_norm=1e9)
        assert torch.allclose(gradient(model), expected, atol=1e-5)


def test_the_step_is_the_clipped_gradient_and_returns_what_one_logs():
    expected = expected_gradient(S.stabledrl_loss, 5.0)
    model = step(range(12), 5, max_grad_norm=0.01)
    log_ratio, grad_norm = model.result
    moved = weights(model) - weights(Tiny())
    assert torch.allclose(moved, -0.01 * expected / expected.norm(), atol=1e-6)
    assert grad_norm.item() == pytest.approx(expected.norm().item(), rel=1e-4)
    *batch, old_log_prob, _ = whole()
    true_log_ratio = Y.log_probs(Tiny(), [batch], MASK) - old_log_prob
    assert torch.allclose(log_ratio.float(), true_log_ratio, atol=1e-5)
    assert not log_ratio.requires_grad


def test_gradients_do_not_pile_up_from_step_to_step():
    *batch, old_log_prob, rewards = whole()
    model = Tiny()
    for _ in range(2):
        arguments = old_log_prob, torch.arange(12), rewards, GROUP_SIZE, MASK
        optimizer, options = Descent(model, lr=0), STABLEDRL | {"max_grad_norm": 1e9}
        _, norm = Y.training_step(model, optimizer, [batch], *arguments, **options)
    assert norm.item() == pytest.approx(expected_gradient(S.stabledrl_loss, 5.0).norm().item())


def test_a_frozen_parameter_gets_no_gradient_and_the_others_get_theirs():
    model = step(range(12), 5, lambda model, *_: model.place.requires_grad_(False))
    assert model.place.weight.grad is None and model.embed.weight.grad.norm() > 0.1


def test_rewarded_completions_become_likelier_and_the_others_less_likely():
    """By the exact ELBO, after ten times two updates with the same four completions. With large
    weights, pushing the bad ones down would move the good ones as well. Seeds 0 to 7 all pass."""
    torch.manual_seed(0)
    model = Tiny(scale=0.2)
    rows = [place([3, 2], completion, left=2) for completion in ([0, 1], [2, 3], [1, 2], [3, 0])]
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    options = STABLEDRL | dict(rows=torch.arange(4), rewards=rewards, group_size=4)
    before = torch.tensor([exact(model, *row) for row in rows])
    for _ in range(10):
        Y.learn(model, Descent(model, lr=0.02), rows, 2, MASK, **options)
    gain = torch.tensor([exact(model, *row) for row in rows]) - before
    assert gain[rewards == 1].min() > 0.2 and gain[rewards == 0].max() < -0.2


@pytest.mark.parametrize("shared", [True, False])
def test_every_old_estimate_is_of_before_the_first_update(shared, monkeypatch):
    """Three updates, each with masks of its own. Shared: each has the old log π̂ of its own masks.
    Else all have one, of masks of its own."""
    calls, model = [], Tiny()

    def training_step(model, optimizer, batch, old_log_prob, **options):
        calls.append((batch, old_log_prob))
        model.head.weight.data.mul_(0.5)
        return len(calls)

    monkeypatch.setattr(Y, "training_step", training_step)
    micro_batches = [(TOKENS.repeat(20, 1), IS_COMPLETION.repeat(20, 1))]
    options = {} if shared else {"shared_masks": False}  # shared is the default
    assert Y.learn(model, None, micro_batches, 3, MASK, **options) == [1, 2, 3]
    old_of_masks = [Y.log_probs(Tiny(), batch, MASK) for batch, _ in calls]
    old = [old_log_prob for _, old_log_prob in calls]
    assert not old[0].requires_grad  # or the memory of all micro-batches would be held at once
    if shared:
        assert all(map(torch.equal, old, old_of_masks))
    else:
        assert all(one is old[0] for one in old)
        old_of_masks.append(old[0])
    for one, other in itertools.combinations(old_of_masks, 2):
        assert not torch.equal(one, other)


# ==== Refusals ====================================================================================


def spoil_log_ratio(value, model, old_log_prob, rewards):
    old_log_prob[1] = value


def spoil_rewards(model, old_log_prob, rewards):
    rewards[2] = math.nan


def spoil_gradient(model, old_log_prob, rewards):
    model.head.bias.register_hook(lambda gradient: gradient * math.nan)


SPOIL = {
    "NaN in a log-ratio": functools.partial(spoil_log_ratio, math.nan),
    "infinity in a log-ratio": functools.partial(spoil_log_ratio, -math.inf),
    "NaN in a reward": spoil_rewards,
    "NaN in a gradient": spoil_gradient,
}
EXPECTED = dict.fromkeys(SPOIL, "FloatingPointError")
EXPECTED["NaN in a gradient"] += ", late"  # the others are refused before any backward pass


def refusal(rows, size, change=None):
    """-> the name of the error, and whether a backward pass had begun; or None. No weight may have
    changed."""
    model = Tiny()
    try:
        step(rows, size, change, model)
    except (ValueError, FloatingPointError) as error:
        assert torch.equal(weights(model), weights(Tiny()))
        begun = any(p.grad is not None for p in model.parameters())
        return f"{type(error).__name__}, late" if begun else type(error).__name__


@pytest.mark.parametrize("name", SPOIL)
def test_what_is_not_finite_is_refused_and_changes_no_weight(name):
    assert refusal(range(12), 5) is None
    assert refusal(range(12), 5, SPOIL[name]) == EXPECTED[name]


def test_missing_rows_and_rows_held_twice_are_refused():
    for rows in (range(11), range(1, 12), [*range(11), 3], [0, 1, 2, 3, 8, 9, 10, 11]):
        assert refusal(rows, 5) == "ValueError"


# ==== Two processes ===============================================================================

SHARED = {  # rows on the first and on the second process; micro-batches have 2 rows
    "a half each, cutting a group": (range(6), range(6, 12)),
    "half of every group": ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]),
    "every other row, upside down": (range(11, 0, -2), range(10, -1, -2)),
    "one row and eleven": ([5], [*range(5), *range(6, 12)]),
}
BROKEN = {
    "a row is held twice": (range(6), range(5, 12)),
    "a row is held twice, another missing": (range(6), [5, *range(7, 12)]),
    "a row is missing in the middle": (range(5), range(6, 12)),
    "the last row is missing": (range(6), range(6, 11)),
}


def one_of_two(rank, folder):
    """What each process does. Both compute on, so a refusal by only one of them would hang."""
    meeting_point = (folder / "meet").as_uri()
    dist.init_process_group("gloo", meeting_point, timedelta(seconds=60), world_size=2, rank=rank)
    results = {}
    for name, rows in SHARED.items():
        for loss_name, (loss, clip_eps) in S.LOSSES.items():
            model = step(rows[rank], 2, loss=loss, clip_eps=clip_eps, max_grad_norm=1e9)
            results[name, loss_name] = gradient(model)
        results[name, "clipped"] = weights(step(rows[rank], 2, max_grad_norm=0.01))
    for name, rows in BROKEN.items():
        results[name] = refusal(rows[rank], 2)
    for name, change in SPOIL.items():
        results[name] = refusal(range(6 * rank, 6 * rank + 6), 2, change if rank == 1 else None)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of the two processes: a dict each."""
    folder = tmp_path_factory.mktemp("two")
    code = "import sys, pathlib; sys.path[:0] = [sys.argv[3]]; import test_your_own_model as T; "
    code += "T.one_of_two(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    processes = []
    for rank in (0, 1):
        command = [sys.executable, "-c", code, str(rank), str(folder), str(HERE)]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_give_the_gradient_of_the_whole_batch(two, name):
    for results in two:
        for loss_name, (loss, clip_eps) in S.LOSSES.items():
            expected = expected_gradient(loss, clip_eps)
            assert torch.allclose(results[name, loss_name], expected, atol=1e-5)


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_make_the_same_step_as_one(two, name):
    """The norm that is clipped is that of the sum."""
    for results in two:
        expected = weights(step(range(12), 12, max_grad_norm=0.01))
        assert torch.allclose(results[name, "clipped"], expected, atol=1e-6)


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_rows_are_refused_by_both_processes(two, name):
    assert [results[name] for results in two] == ["ValueError", "ValueError"]


@pytest.mark.parametrize("name", SPOIL)
def test_what_is_not_finite_on_one_process_is_refused_by_both(two, name):
    assert [results[name] for results in two] == [EXPECTED[name], EXPECTED[name]]
