"""The results page and its script: objectives against their published formulas, page against kept lines; benchmarks."""

import importlib.util
import itertools
import math
import statistics
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("measure", HERE / "measure.py")
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)
S = measure.S
torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def registered():
    """The script's losses and estimators, for one test."""
    with mock.patch.dict(S.LOSSES), mock.patch.dict(S.ESTIMATORS):
        measure.register()
        yield

def drawn(seed, N=12):
    """Random log-ratios, from small to wild, and advantages with both signs."""
    g = torch.Generator().manual_seed(seed)
    scale = (0.1, 1.0, 3.0)[seed % 3]
    log_ratio = scale * torch.randn(N, generator=g, dtype=torch.float64)
    return log_ratio, torch.randn(N, generator=g, dtype=torch.float64)

def softmax(values):
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]

def dual_clip(x, A, G):
    """max(min(ρA, clip(ρ)A), cA) where A < 0, c = 6; ε = 0.2."""
    total = 0.0
    for a, r in zip(A, map(math.exp, x)):
        clipped = min(r * a, min(max(r, 0.8), 1.2) * a)
        total += max(clipped, 6 * a) if a < 0 else clipped
    return -total / len(x)

def per_token(x, A, G):
    """min(sA, clip(s)A), s = ρ^(1/4)."""
    ratios = [math.exp(v) ** 0.25 for v in x]
    return -sum(min(s * a, min(max(s, 0.8), 1.2) * a) for s, a in zip(ratios, A)) / len(x)

def wd1(x, A, G):
    """Σ over a group of (softmax(−A) − softmax(A))·log p, mean over groups."""
    total = 0.0
    for i in range(0, len(x), G):
        plus, minus = softmax(A[i : i + G]), softmax([-a for a in A[i : i + G]])
        total += sum((m - p) * v for m, p, v in zip(minus, plus, x[i : i + G]))
    return total / (len(x) // G)

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("formula", [dual_clip, per_token, wd1])
def test_objectives_are_their_published_formulas(formula, seed):
    """Value, and gradient by central differences, in plain Python, on log-ratios of 0.1 to 3 nats."""
    log_ratio, A = drawn(seed)
    loss, eps = S.LOSSES[formula.__name__]
    leaf = log_ratio.clone().requires_grad_()
    value = loss(leaf, A, eps, 4)
    value.backward()
    x, A = log_ratio.tolist(), A.tolist()
    assert value.item() == pytest.approx(formula(x, A, 4))
    for i in range(len(x)):
        up, down = ([v + h * (j == i) for j, v in enumerate(x)] for h in (1e-6, -1e-6))
        assert leaf.grad[i].item() == pytest.approx((formula(up, A, 4) - formula(down, A, 4)) / 2e-6, abs=1e-6)

def test_cispo_is_clip_only_and_the_release_is_stabledrl_at_4():
    """CISPO (arXiv 2506.13585): −mean sg(min(ρ, 1+ε))·A·log p. The release: w = min(ρ, 5)/Σ min(ρ, 5), held constant."""
    for seed in range(6):
        log_ratio, A = drawn(seed)
        for name, eps in (("clip_only", 5.0), ("stabledrl", 4.0)):
            leaf = log_ratio.clone().requires_grad_()
            S.LOSSES[name][0](leaf, A, eps, 4).backward()
            w = [min(math.exp(v), 1 + eps) for v in log_ratio.tolist()]
            if name == "stabledrl":
                w = [4 * v / sum(w[i // 4 * 4 : i // 4 * 4 + 4]) for i, v in enumerate(w)]
            assert leaf.grad.tolist() == pytest.approx([-v * a / 12 for v, a in zip(w, A.tolist())])

def test_one_sided_steps_use_answers_of_one_sign_alone():
    """The gradient descended is +1 at a bad answer, −1 at a good one, drawn by lot among those of its sign; or |A|/Σ|A|
    of that sign. Nothing where no answer has that sign. All four indices of a sign come up: fails by chance 4·(3/4)^100."""
    A = torch.tensor([1.0, -1.0, 0.0, 3.0, -2.0, -1.0, 0.5, -0.1])
    for name, (sign, single) in measure.ONE_SIDED.items():
        found = set()
        for _ in range(100):
            leaf = torch.zeros(8, requires_grad=True)
            S.LOSSES[name][0](leaf, A, 0.0, 8).backward()
            found.add(tuple(leaf.grad.tolist()))
        chosen = [i for i in range(8) if sign * A[i] > 0]
        if single:
            assert found == {tuple(-sign * float(i == j) for j in range(8)) for i in chosen}
        else:
            total = sum(abs(A[i].item()) for i in chosen)
            (gradient,) = found
            assert gradient == pytest.approx([-sign * abs(A[i].item()) / total * (i in chosen) for i in range(8)])
        leaf = torch.zeros(8, requires_grad=True)
        S.LOSSES[name][0](leaf, torch.zeros(8), 0.0, 8).backward()
        assert not leaf.grad.any()

def test_spikes_hit_a_twentieth_of_the_ratios():
    torch.manual_seed(0)
    seen = []
    measure.spiked(lambda x, *_: seen.append(x))(torch.zeros(100_000), None, 0.2, 8)
    values, counts = seen[0].unique(return_counts=True)
    assert values.tolist() == pytest.approx([0, math.log(1e5)]) and 4_600 < counts[1] < 5_400  # 5.8 standard errors

def test_the_release_averages_over_masked_tokens_and_only_centres_the_rewards(monkeypatch):
    log_p = -torch.arange(1.0, 9.0).view(1, 2, 4)
    monkeypatch.setattr(S, "token_log_probs", lambda *_: log_p)
    masks = torch.tensor([[[True, False, False, True], [True, True, True, False]]])
    assert measure.mean_over_masked(None, None, None, masks, 2).item() == -((1 + 4) / 2 + (5 + 6 + 7) / 3) / 2
    with measure.release():
        assert S.group_advantages(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 3).tolist() == pytest.approx(
            [-2 / 3, 1 / 3, 1 / 3, 0, 0, 0])
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], 1e-4, betas=(0.9, 0.99))
        assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 0.1
    assert not isinstance(torch.optim.Adam([torch.zeros(1)]), torch.optim.AdamW)

def test_the_page_agrees_with_the_kept_lines():
    """Every table is what the script makes of the lines; and two cells by hand, by Python's own statistics."""
    page = (HERE / "README.md").read_text()
    assert measure.page_with_tables(page) == page
    by_hand = {"grpo-elbo": [], "stabledrl-elbo": []}
    for line in measure.kept("main").values():
        if f"{line['loss']}-{line['estimator']}" in by_hand:
            by_hand[f"{line['loss']}-{line['estimator']}"].append(line["reward"][-1] / line["base"])
    for values in by_hand.values():
        assert f"**{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}**" in page and len(values) == 5

def test_who_has_the_weight_of_a_first_step_as_readme_says():
    readme = (HERE.parents[1] / "README.md").read_text()
    found = {loss: [f"{100 * statistics.median(v):.0f} %" for v in s.values()] for loss, s in measure.shares().items()}
    bad, heaviest = found["grpo"]
    assert f"bad answers have {bad}, a single one of 256 has {heaviest}" in readme
    assert f"(StableDRL: {found['stabledrl'][0][:-2]} and {found['stabledrl'][1]}; medians of 50 batches)" in readme

def test_kept_lines_are_those_of_the_grids():
    """No line that no grid asks for, none twice, and every line that is not marked as failed is whole."""
    seen = set()
    for grid in measure.GRIDS:
        names = [measure.S.run_name(config) for config in measure.configs_of(grid)]
        lines = measure.kept(grid)
        assert list(lines) == [name for name in names if name in lines] and not seen & lines.keys()
        seen |= lines.keys()
        for line in lines.values():
            assert line["failed"] or len(line["reward"]) == line["updates"] / 40

# Benchmarks, not in the default run: pytest -m bench -s ------------------------------------------------------------------

def batch(N, P, L):
    """Random prompts (N,P) and completions (N,L) of addition's alphabet."""
    tokens = torch.randint(13, (N, P + L), generator=torch.Generator().manual_seed(1))
    return tokens[:, :P], tokens[:, P:]

def alternately(*functions, repeats=7):
    """Run the functions in turn -> the median seconds of each. In turn, since the machine's speed varies with time."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, times in zip(functions, seconds):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]  # the first was for warming up

@pytest.mark.bench
@pytest.mark.parametrize("L", [16, 64])
def test_bench_cached_generation_against_recomputation(L):
    """P = 16, B = 4, 256 completions. The other way reads the whole sequence for every token; its time per token does
    not depend on the token, and is measured on one of the L."""
    model, (prompts, completions) = S.BlockDiffusionTransformer(14), batch(256, 16, L)
    whole, may = torch.cat((prompts, completions), 1), S.block_causal_mask(16 + L, 4)
    cached = lambda: S.generate(model, prompts, L, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast, slow = alternately(cached, lambda: model(whole, torch.arange(16 + L), may))
    print(f"\nL = {L:3}: {1e3 * fast:.0f} ms cached, {1e3 * slow * L:.0f} ms recomputed, ratio {slow * L / fast:.1f}")

@pytest.mark.bench
def test_bench_one_staircase_pass_against_one_pass_per_block():
    """P = 16, 16 blocks of B = 4, K = 2, 32 completions: likelihood and its gradient."""
    (P, L, B, K, N), model = (16, 64, 4, 2, 32), S.BlockDiffusionTransformer(14)
    prompts, completions = batch(N, P, L)
    masks = S.sample_masks(N, K, L, B, torch.Generator().manual_seed(0))
    def per_block():
        parts = []
        for k, start in itertools.product(range(K), range(P, P + L, B)):
            block = slice(start - P, start - P + B)
            noisy = torch.where(masks[:, k, block], model.mask_id, completions[:, block])
            tokens = torch.cat((prompts, completions[:, : start - P], noisy), 1)
            logits = model(tokens, torch.arange(start + B), S.block_causal_mask(start + B, B))[:, -B:]
            log_p = logits.log_softmax(-1).gather(-1, completions[:, block, None])[..., 0]
            hidden = masks[:, k, block]
            parts.append((B / hidden.sum(-1, keepdim=True) * hidden * log_p).sum(-1))
        return torch.stack(parts).sum(0) / K
    one_pass = lambda: S.elbo(model, prompts, completions, masks, B)
    assert torch.allclose(one_pass(), per_block(), atol=1e-3)
    fast, slow = alternately(lambda: one_pass().sum().backward(), lambda: per_block().sum().backward())
    print(f"\n16 blocks, K = 2: {1e3 * fast:.0f} ms in one pass, {1e3 * slow:.0f} ms block by block, {slow / fast:.1f}")
