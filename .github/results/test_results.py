"""Are the objectives their published formulas, and does the page say what the kept lines say?"""

import importlib.util
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
from experiments import EXPERIMENTS, MACHINES, NOISES, S

torch.set_num_threads(1)
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
TEMPLATE = (HERE / "page.md").read_text(encoding="utf-8")
README = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def registered():
    """The scripts' losses, masks and estimators, for one test."""
    with mock.patch.dict(S.LOSSES), mock.patch.dict(S.MASKS), mock.patch.dict(S.ESTIMATORS):
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


def sapo(x, A):
    """(4/τ)·sigmoid(τ(ρ − 1))·A, with τ = 1 for A > 0 and 1.05 else."""
    total = 0
    for log_ratio, a in zip(x, A):
        tau = 1.0 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (math.exp(log_ratio) - 1)))
        total += 4 / tau * gate * a
    return -total / len(x)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("formula", [dual_clip, per_token, sapo])
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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name, weight", [("clip_only", cispo), ("vespo", vespo)])
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
    """In float32, with one extreme completion of each sign beside ordinary ones."""
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for name, (loss, eps) in S.LOSSES.items():
        if name == "released_bound":
            continue  # it needs the estimate that belongs to it
        leaf = torch.tensor([x, x, 0.1, -0.1], requires_grad=True)
        value = loss(leaf, advantages, eps, 4)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all(), name


def gradient(name, log_ratio, advantages):
    leaf = torch.tensor(log_ratio, requires_grad=True)
    S.LOSSES[name][0](leaf, torch.tensor(advantages), 0.2, 4).backward()
    return leaf.grad.tolist()


def test_finite_grpo_bounds_a_ratio_or_skips_the_update():
    """Nothing above e^40: both are GRPO. A bad completion above: its ratio is e^40, or the gradient
    is 0. A good one above: GRPO clips it, and nothing is skipped."""
    advantages = [1.0, -1.0, 1.0, -1.0]
    calm, bad, good = [0.1, 39.0, 2.0, -3.0], [0.1, 50.0, 2.0, -0.1], [50.0, 0.1, 0.1, -0.1]
    for name in ("finite", "skipping"):
        for log_ratio in (calm, good):
            assert gradient(name, log_ratio, advantages) == gradient("grpo", log_ratio, advantages)
    expected = gradient("grpo", [0.1, 40.0, 2.0, -0.1], advantages)
    assert gradient("finite", bad, advantages) == expected
    assert expected[1] == pytest.approx(math.exp(40) / 4)
    assert gradient("skipping", bad, advantages) == [0, 0, 0, 0]


ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 3.0, -2.0, -1.0, 0.5, -0.1])


def one_sided_gradient(name):
    leaf = torch.zeros(8, requires_grad=True)
    S.LOSSES[name][0](leaf, ADVANTAGES, 0.0, 8).backward()
    return leaf.grad.tolist()


@pytest.mark.parametrize("name, chosen, sign", [("bad", {1, 4, 5, 7}, 1), ("good", {0, 3, 6}, -1)])
def test_one_sided_updates_use_completions_of_one_sign_alone(name, chosen, sign):
    """One: each completion of that sign is chosen at times, no other ever (a right function fails by
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


def test_injected_noise_reaches_the_chosen_completions_alone():
    """Its deviation is σ, to within 5 standard errors; and it carries no gradient."""
    torch.manual_seed(0)
    advantages = torch.tensor([1.0, -1.0, 0.0]).repeat(10_000)
    for who, chosen in {
        "all": advantages < 9,
        "bad": advantages < 0,
        "good": advantages > 0,
    }.items():
        seen = experiments.injected(lambda log_ratio, *others: log_ratio, 0.7, who)
        leaf = torch.zeros(30_000, requires_grad=True)
        value = seen(leaf, advantages, 0.2, 8)
        value.sum().backward()
        assert value[chosen].std().item() == pytest.approx(0.7, abs=0.025)
        assert (value[~chosen] == 0).all() and (leaf.grad == 1).all()


def test_the_releases_loss_is_stabledrl_on_centred_rewards():
    """And where both copies hide the same, its upper bound is its lower one."""
    torch.manual_seed(0)
    rewards, leaf = (torch.rand(64) < 0.3).double(), torch.randn(64, requires_grad=True)
    S.LOSSES["released"][0](leaf, S.group_advantages(rewards, 8), 4.0, 8).backward()
    groups = rewards.view(-1, 8)
    centred = (groups - groups.mean(-1, keepdim=True)).flatten()
    again = leaf.detach().clone().requires_grad_()
    S.stabledrl_loss(again, centred, 4.0, 8).backward()
    assert leaf.grad.tolist() == pytest.approx(again.grad.tolist(), abs=1e-6)

    model, tokens = S.BlockDiffusionTransformer(14), torch.randint(13, (8, 4))
    masks = S.sample_masks(8, 1, 4, 2, torch.Generator()).repeat(1, 2, 1)
    lower = experiments.hidden_mean(model, tokens, tokens, 2, masks)
    assert experiments.hidden_mean.for_bad.tolist() == pytest.approx(lower.tolist(), abs=1e-5)


def test_masks_per_batch_are_the_same_for_all_estimates_of_a_batch():
    one, two = (S.stream(S.Config(), f"masks {done}") for done in (0, 8))
    first = experiments.masks_per_batch(64, 1, 4, 2, one)
    assert (experiments.masks_per_batch(64, 1, 4, 2, one) == first).all()
    assert (experiments.masks_per_batch(64, 1, 4, 2, two) != first).any()
    assert (S.sample_masks(64, 1, 4, 2, S.stream(S.Config(), "masks 0")) == first).all()


# ==== Page and kept lines =========================================================================


def test_the_page_is_what_the_template_makes_of_the_kept_lines():
    """And no sentence is contradicted; and two cells by hand."""
    measure.BROKEN.clear()
    assert measure.fill(TEMPLATE) == PAGE
    assert not measure.BROKEN
    for machine, name, row in (("xeon", "grpo", "GRPO"), ("epyc", "vespo", "VESPO")):
        kept = experiments.read_lines(machine)
        lines = [kept[f"addition-{name}-elbo-seed={seed}"] for seed in (0, 1, 2)]
        times = [line["reward"][600 // 40 - 1] / line["base"] for line in lines]
        cell = f"{statistics.mean(times):.2f} ± {statistics.stdev(times):.2f} |"
        rows = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
        assert machine == "xeon" or any(line.endswith(cell) for line in rows)


SETTINGS = """0.1 0.2 0.7 0.8 1.05 1.2 1.5 1.9 2.11 2.13 3.11 3.12 10 15 16 18 25 32 40 64 95
100 200 240 256 320 400 512 600 1,000 1,200 2,000 2,048 5,120 2026""".split()  # what the template may write: no results


def test_no_result_is_written_into_the_template_by_hand():
    """Every number of its prose with more than one digit is an expression, or one of SETTINGS."""
    beside = (
        r"{{.*?}}|<!--.*?-->|```.*?```|`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}"  # 2603.06743 is a paper
    )
    prose = re.sub(beside, "", TEMPLATE, flags=re.DOTALL)
    assert {*re.findall(r"\d[\d,.]*\d", prose)} == {*SETTINGS}


def test_kept_lines_are_those_of_the_experiments():
    """None is foreign, and all runs of a file with one seed and one kind of base policy have one
    base. Nothing is missing."""
    for machine in MACHINES:
        kept, bases, wanted = experiments.read_lines(machine), {}, set()
        for name, experiment in EXPERIMENTS.items():
            if experiment.machine == machine:
                assert experiments.kept_of(name)[1] == [*experiment.seeds]
                for config in experiment.configs():
                    run = S.run_name(config)
                    wanted.add(run)
                    bases.setdefault(S.base_path(config, ""), set()).add(kept[run]["base"])
        assert kept.keys() <= wanted
        assert all(len(rewards) == 1 for rewards in bases.values())


def test_the_defaults_are_those_of_the_kept_lines():
    """A line is named after what differs from them: with others it would be of another run."""
    base = dict(task="addition", seed=0, block_size=2, d_model=64, n_layer=2, n_head=4)
    base |= dict(base_accuracy=0.4, base_lr=1e-3)
    rl = dict(loss="stabledrl", estimator="elbo", masks="independent", shared_masks=False, copies=1)
    rl |= dict(clip_eps=5, lr=1e-4, prompts=32, group_size=8, mu=2, max_grad_norm=1, log_every=40)
    assert vars(S.Config()) == base | rl | dict(updates=600, device="cpu")
    assert [S.LOSSES[name][1] for name in ("grpo", "clip_only", "no_ratio")] == [0.2, 5, 0]


def test_new_seeds_have_the_rates_with_the_highest_means():
    found, _ = experiments.kept_of("rates")
    for row, best in experiments.BEST_RATES.items() if experiments.kept_of("fresh")[1] else ():
        means = {}
        for (label, rate), lines in found.items():
            if label == row:
                means[rate] = statistics.mean(map(experiments.times_base, lines))
        assert max(means, key=means.get) == best


@pytest.mark.parametrize("n", [3, 5, 10])
def test_95_of_100_intervals_hold_the_true_difference(n):
    """Of 2,000, 1,900 ± 10 do: a right function fails by chance once in 10^7."""
    generator, hits = torch.Generator().manual_seed(n), 0
    for numbers in torch.randn(2_000, n, generator=generator).tolist():
        low, high = measure.interval(numbers, [0.0] * n)
        hits += low < 0 < high
    assert abs(hits - 1_900) < 55


def test_links_and_figures_of_the_page_exist():
    anchors = re.findall(r'<a id="([^"]*)"></a>', PAGE)
    assert {*re.findall(r"\]\(#([^)]*)\)", PAGE)} <= {*anchors}
    for target in re.findall(r"\]\(([^)#:]*)\)", PAGE):
        assert (HERE / target).exists(), target


def test_tails_fit_together():
    """655,360 log-ratios are in the histogram; their spread is the pooled σ, and σ² is the mean of
    the variances of good and of bad completions."""
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


def test_gradient_norms_are_those_of_each_completion():
    """Oracle: the whole batch in one pass, three completions to a prompt."""
    torch.manual_seed(0)
    model = S.BlockDiffusionTransformer(14, 16, 1, 2)
    tokens = torch.randint(13, (8, 4))
    batch = {"prompts": tokens[:2], "completions": tokens[2:], "steps": tokens[2:], "block_size": 2}
    masks = S.sample_masks(6, 1, 4, 2, torch.Generator())
    log_prob = S.elbo(model, masks=masks, **batch)
    for i, norm in enumerate(noise.gradient_norms(model, batch, masks)):
        gradients = torch.autograd.grad(log_prob[i], model.parameters(), retain_graph=True)
        expected = sum(gradient.square().sum() for gradient in gradients).sqrt()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-4)


def test_your_own_loss_is_run_and_shown_beside_the_kept_ones(tmp_path, monkeypatch, capsys):
    """README's example, and a loss with a name that is taken. Runs are made up: 3 times the base."""
    asked = []

    def make_lines(out, resume, configs):
        asked.extend(configs)
        line = {"failed": False, "base": 0.2} | dict.fromkeys(experiments.COLUMNS, [0.6] * 3)
        return [line | {"run": S.run_name(config)} for config in configs]

    (example,) = re.findall("```python\n(import.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(example + '\nS.LOSSES["vespo"] = S.LOSSES["good_only"]\n')
    monkeypatch.setattr(measure, "make_lines", make_lines)
    flags = ["--seed", "3", "4", "--updates", "120", "--out", str(tmp_path)]
    measure.main(["--loss", str(tmp_path / "mine.py"), *flags])
    printed = capsys.readouterr().out
    assert len(asked) == 2 * len(NOISES) * 2
    assert {(config.loss, config.seed, config.updates) for config in asked} == {
        (loss, seed, 120) for loss in ("good_only", "my_vespo") for seed in (3, 4)
    }
    assert "has a vespo of its own: it is run as my_vespo" in printed
    assert "| good_only | 3.00 ± 0.00 |" in printed and "| my_vespo | 3.00 ± 0.00 |" in printed
    lines = [experiments.read_lines("epyc")[f"addition-vespo-exact-seed={i}"] for i in range(3)]
    times = [line["reward"][2] / line["base"] for line in lines]  # at 120 updates, as yours
    assert f"| VESPO | {statistics.mean(times):.2f} ± " in printed
    if importlib.util.find_spec("matplotlib"):
        assert "<!-- good_only -->" in (tmp_path / "tunnel.svg").read_text("utf-8")


FACTS = [  # the sentences of README that have results or two decimals in them, as page.md has them
    "the probability 0.01, whatever is visible. The log of 0.01 is −4.6",
    "and GRPO ends at {{pm(of('shared', 'GRPO', 'μ = 2: per update'))}}.",
    "Under GRPO bad completions account for {{share('GRPO', 'all bad completions')}} of the "
    "sum, and a single one of the 256 for {{share('GRPO', 'the heaviest of 256')}} (medians",
    "Under StableDRL the shares are {{share('StableDRL', 'all bad completions')}} and "
    "{{share('StableDRL', 'the heaviest of 256')}}; if every ratio were 1 they would be "
    "{{share('every ratio 1', 'all bad completions')}} and "
    "{{share('every ratio 1', 'the heaviest of 256')}} (grey).",
    "({{ahead(of('shared', 'StableDRL, ε = 1', 'μ = 8: anew'), "
    "of('two_by_two', 'all completions', 'μ = 8: no ratio'))}}, the paired difference",
    "of four tokens σ is then {{noise_at_start(kept_of('release')[0]['GRPO', 'μ = 2'])}}, and GRPO",
]


def test_results_in_the_readme_are_those_of_the_kept_lines():
    """A row of a table with a mean ± deviation begins one of the page, word for word; a sentence
    with a result is one of FACTS, filled; and there is no other number with two decimals."""
    for row in re.findall(r"^\|.*\d ± \d.*$", README, re.MULTILINE):
        assert row.replace("**", "").removesuffix(" |") in PAGE, row
    prose = re.sub(r"(?m)^\|.*$|(?s:```.*?```)|`[^`]*`", "", README)
    prose = " ".join(prose.split())
    for fact in map(measure.values, FACTS):
        assert fact in prose, fact
        prose = prose.replace(fact, "")
    assert not re.findall(r"\d\.\d\d", re.sub(r"\d{4}\.\d{5}", "", prose))


def test_good_completions_only_of_the_readme_is_that_of_the_page():
    (source,) = re.findall(r"^def good_only.*?(?=\n\n)", README, re.DOTALL | re.MULTILINE)
    namespace = {}
    exec(source, namespace)
    log_ratio, advantages = drawn(1)
    expected = S.LOSSES["all_good"][0](log_ratio, advantages, 0.0, 4)
    assert namespace["good_only"](log_ratio, advantages, 0.0, 4) == pytest.approx(expected)
