"""The results page and its scripts: objectives against their published formulas, the page against
the kept lines, and your own loss."""

import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import experiments
import measure
import noise
from experiments import EXPERIMENTS, S

torch.set_num_threads(1)
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
README = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")

@pytest.fixture(autouse=True)
def registered():
    """The scripts' losses and estimators, for one test."""
    with mock.patch.dict(S.LOSSES), mock.patch.dict(S.ESTIMATORS):
        experiments.register()
        yield

# ==== Objectives ==================================================================================

def drawn(seed):
    """Random log-ratios of 12 completions, from small to wild, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(12, generator=generator, dtype=torch.float64)
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    return (0.1, 1.0, 3.0)[seed % 3] * log_ratio, advantages

def clip(ratio):
    return min(max(ratio, 0.8), 1.2)

def dual_clip(x, A):
    """max(min(ρA, clip(ρ)A), 6A) where A < 0, min(ρA, clip(ρ)A) else."""
    total = 0
    for log_ratio, a in zip(x, A):
        ratio = math.exp(log_ratio)
        objective = min(ratio * a, clip(ratio) * a)
        total += max(objective, 6 * a) if a < 0 else objective
    return -total / len(x)

def per_token(x, A):
    """min(sA, clip(s)A) with s = ρ^(1/4)."""
    total = 0
    for log_ratio, a in zip(x, A):
        s = math.exp(log_ratio) ** 0.25
        total += min(s * a, clip(s) * a)
    return -total / len(x)

def wd1(x, A):
    """Σ (softmax(−A) − softmax(A))·log p over groups of 4, mean over groups."""
    total = 0
    for i in range(0, len(x), 4):
        up = [math.exp(a) for a in A[i : i + 4]]
        down = [math.exp(-a) for a in A[i : i + 4]]
        for j in range(4):
            total += (down[j] / sum(down) - up[j] / sum(up)) * x[i + j]
    return total / (len(x) / 4)

def sapo(x, A):
    """(4/τ)·sigmoid(τ(ρ − 1))·A, with τ = 1 for A > 0 and 1.05 else."""
    total = 0
    for log_ratio, a in zip(x, A):
        tau = 1.0 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (math.exp(log_ratio) - 1)))
        total += 4 / tau * gate * a
    return -total / len(x)

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("formula", [dual_clip, per_token, wd1, sapo])
def test_objectives_are_their_published_formulas(formula, seed):
    """The value, and the gradient by central differences."""
    log_ratio, advantages = drawn(seed)
    loss, eps = S.LOSSES[formula.__name__]
    leaf = log_ratio.clone().requires_grad_()
    value = loss(leaf, advantages, eps, 4)
    value.backward()
    x, A = log_ratio.tolist(), advantages.tolist()
    assert value.item() == pytest.approx(formula(x, A))
    for i in range(12):
        above, below = x.copy(), x.copy()
        above[i] += 1e-6
        below[i] -= 1e-6
        slope = (formula(above, A) - formula(below, A)) / 2e-6
        assert leaf.grad[i].item() == pytest.approx(slope, abs=1e-6)

def cispo(ratio, a):
    """arXiv 2506.13585, without a lower clip."""
    return min(ratio, 6)

def vespo(ratio, a):
    """arXiv 2602.10693: ρ^k·e^(λ(1−ρ)), k = 2 and λ = 3 for A ≥ 0, k = 3 and λ = 2 else."""
    if a >= 0:
        return ratio**2 * math.exp(3 - 3 * ratio)
    return ratio**3 * math.exp(2 - 2 * ratio)

def masked(ratio, a):
    return ratio if 1 / 6 <= ratio <= 6 else 0

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name, weight", [
    ("clip_only", cispo), ("vespo", vespo), ("masked", masked)])
def test_gradients_have_their_published_weights(name, weight, seed):
    """The gradient is −mean weight·A·∇log p: the weight is constant to autograd."""
    log_ratio, advantages = drawn(seed)
    leaf, eps = log_ratio.clone().requires_grad_(), S.LOSSES[name][1]
    S.LOSSES[name][0](leaf, advantages, eps, 4).backward()
    expected = []
    for x, a in zip(log_ratio.tolist(), advantages.tolist()):
        expected.append(-weight(math.exp(x), a) * a / 12)
    assert leaf.grad.tolist() == pytest.approx(expected)

@pytest.mark.parametrize("x", [-1e4, -100.0, -1.0, 0.0, 50.0, 100.0, 1e4])
def test_objectives_are_finite_for_every_finite_ratio(x):
    """In float32, with one extreme answer of each sign beside ordinary ones."""
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for name, (loss, eps) in S.LOSSES.items():
        leaf = torch.tensor([x, x, 0.1, -0.1], requires_grad=True)
        value = loss(leaf, advantages, eps, 4)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all(), name

ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 3.0, -2.0, -1.0, 0.5, -0.1])

def one_sided_gradient(name):
    leaf = torch.zeros(8, requires_grad=True)
    S.LOSSES[name][0](leaf, ADVANTAGES, 0.0, 8).backward()
    return leaf.grad.tolist()

@pytest.mark.parametrize("name, chosen, sign", [
    ("bad", {1, 4, 5, 7}, 1),
    ("good", {0, 3, 6}, -1)])
def test_one_sided_updates_use_answers_of_one_sign_alone(name, chosen, sign):
    """One: each answer of that sign is chosen at times, no other ever (a right function fails by
    chance with probability 4·(3/4)^100). All: weighted by |A|."""
    seen = set()
    for _ in range(100):
        gradient = one_sided_gradient(f"one_{name}")
        (place,) = [i for i in range(8) if gradient[i]]
        assert gradient[place] == sign
        seen.add(place)
    assert seen == chosen
    total = sum(abs(ADVANTAGES[i].item()) for i in chosen)
    expected = [-ADVANTAGES[i].item() / total if i in chosen else 0 for i in range(8)]
    assert one_sided_gradient(f"all_{name}") == pytest.approx(expected)

def test_spikes_hit_a_twentieth_of_the_ratios():
    """5,000 of 100,000, to within 5.8 standard errors."""
    torch.manual_seed(0)
    spiked = experiments.spiked(lambda log_ratio, *others: log_ratio)
    values, counts = spiked(torch.zeros(100_000), None, 0.2, 8).unique(return_counts=True)
    assert values.tolist() == pytest.approx([0, math.log(1e5)])
    assert 4_600 < counts[1] < 5_400

# ==== Page and kept lines =========================================================================

def test_the_page_agrees_with_the_kept_lines():
    """Every command and table is what the script makes of them; and a cell by hand."""
    kept = experiments.read_kept()
    assert measure.page_with_tables(PAGE, kept) == PAGE
    lines = [kept[f"addition-grpo-elbo-seed={seed}"] for seed in range(5)]
    times = [line["reward"][1200 // 40 - 1] / line["base"] for line in lines]
    cell = f"{statistics.mean(times):.2f} ± {statistics.stdev(times):.2f}"
    assert f"| GRPO, estimated ratio | {cell} |" in PAGE

def test_kept_lines_are_those_of_the_experiments():
    """None is missing, none is foreign, and each is as long as an experiment needs it."""
    runs = experiments.runs_of(EXPERIMENTS.values())
    kept = experiments.read_kept()
    assert kept.keys() == runs.keys()
    bases = {}
    for name, config in runs.items():
        assert experiments.is_whole(kept[name], config)
        bases.setdefault(S.base_path(config, ""), set()).add(kept[name]["base"])
    assert all(len(rewards) == 1 for rewards in bases.values())  # one base for all runs of a seed

def test_commands_of_the_page_make_the_runs_of_their_experiments():
    for name, experiment in EXPERIMENTS.items():
        command = experiment.command(name)
        if "stabledrl.py" in command:
            configs, _, _ = S.parse(command.split()[2:])
            made = {S.run_name(config): config for config in configs}
            assert made == experiments.runs_of([experiment])

def test_links_and_figures_of_the_page_exist():
    for target in re.findall(r"\]\(#([^)]*)\)", PAGE):
        assert f'<a id="{target}"></a>' in PAGE
    for target in re.findall(r"\]\((\.\./[^)]*)\)", PAGE):
        assert (HERE / target).exists()

def test_tails_fit_together():
    """655,360 log-ratios are in the histogram; their spread is the pooled σ, and σ² is the mean of
    the variances of good and of bad answers."""
    tails = noise.read("tails")
    counts = torch.tensor(list(tails["histogram"].values()))  # (2, 81)
    x = torch.arange(-20, 20.5, 0.5)
    assert counts.sum() == 5 * 64 * 2048
    pooled = statistics.mean(numbers["sigma"] ** 2 for numbers in tails["seeds"])
    assert (counts * x**2).sum() / counts.sum() == pytest.approx(pooled, rel=0.02)
    for numbers in tails["seeds"]:
        good, share = numbers["good"], numbers["share_good"]
        variance = share * good**2 + (1 - share) * numbers["bad"] ** 2
        assert variance == pytest.approx(numbers["sigma"] ** 2, rel=0.01)

def test_readme_says_who_has_the_weight_of_a_first_update():
    readme = " ".join(README.split())
    percents = []
    for shares in noise.read("shares").values():
        percents += [re.escape(noise.percent(values)) for values in shares.values()]
    bad, heaviest, bad_stable, heaviest_stable = percents
    assert re.search(
        f"bad answers hold {bad} of GRPO's total[ a-z]*, and a single one of 256 answers holds "
        f"{heaviest}. With StableDRL the shares are {bad_stable} and {heaviest_stable}", readme)

def test_your_own_loss_is_run_and_drawn_beside_the_kept_ones(tmp_path, monkeypatch, capsys):
    """The page's example, with runs that are made up: reward 3 times the base everywhere."""
    asked = []
    def make_lines(configs, out):
        asked.extend(configs)
        line = {"failed": False, "base": 0.2} | dict.fromkeys(experiments.COLUMNS, [0.6] * 15)
        return {S.run_name(config): line for config in configs}
    (tmp_path / "mine.py").write_text(re.search("```python\n(.*?)```", PAGE, re.DOTALL)[1])
    monkeypatch.setattr(measure, "make_lines", make_lines)
    monkeypatch.setattr(EXPERIMENTS["tunnel"], "rows", EXPERIMENTS["tunnel"].rows)
    measure.main(["--loss", str(tmp_path / "mine.py"), "--out", str(tmp_path)])
    assert len(asked) == 18 and {config.loss for config in asked} == {"mine"}
    printed = capsys.readouterr().out
    assert "| mine | 3.00 ± 0.00 |" in printed and "| wd1 | 2.05 ± 0.37 |" in printed
    if importlib.util.find_spec("matplotlib"):
        assert "<!-- mine -->" in (tmp_path / "tunnel.svg").read_text()

def test_good_answers_only_of_the_readme_is_that_of_the_page():
    (source,) = re.findall(r"^def good_only.*?(?=\n\n)", README, re.S | re.M)
    namespace = {}
    exec(source, namespace)
    log_ratio, advantages = drawn(1)
    expected = S.LOSSES["all_good"][0](log_ratio, advantages, 0.0, 4)
    assert namespace["good_only"](log_ratio, advantages, 0.0, 4) == pytest.approx(expected)

def test_numbers_of_the_readme_are_those_of_the_page():
    """Every mean ± deviation. Those of the page are those of the kept lines."""
    found = re.findall(r"\d\.\d\d ± \d\.\d\d", README)
    assert len(found) > 20
    for number in found:
        assert number in PAGE, number

def test_the_numbers_of_larger_models_are_those_of_their_logs():
    """The page against h100.jsonl: first and last reward."""
    for line in map(json.loads, (HERE / "h100.jsonl").read_text().splitlines()):
        assert f"{line['reward'][0]:.2f} → {line['reward'][-1]:.2f}" in PAGE

def test_the_fit_of_the_noise_is_the_best_of_its_form():
    """No change of factor or exponents by a hundredth lowers the squared error of log σ."""
    points, best = noise.growth(experiments.read_kept())
    assert points["addition"] == (2, 4, pytest.approx(2.0, abs=0.05))
    def error(factor, b, l):
        total = 0
        for B, L, sigma in points.values():
            total += math.log(sigma / (factor * B**b * L**l)) ** 2
        return total
    for place in range(3):
        for step in (-0.01, 0.01):
            other = list(best)
            other[place] += step
            assert error(*other) > error(*best)
