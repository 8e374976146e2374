"""What is measured on policies: where the tail of the ratios comes from (tails.json), who has the
weight of a first update (shares.json), whether noise grows while a policy drifts (drift.json), and
how diverse its answers are (diversity.json). What an estimate costs (prices.json) is kept, and
nothing here measures it again."""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from experiments import (
    BEST, EXPERIMENTS, FIVE, HERE, POLICIES, S, SMALL, lines_of, load_base, short, side_by_side)

SEEDS = range(5)  # of the main job's base policies
BINS = np.arange(-20.25, 20.5, 0.5)  # of log ρ̂ in nats; the middle one is centred on 0

def read(name):
    return json.loads((HERE / f"{name}.json").read_text())

def write(name, found):
    (HERE / f"{name}.json").write_text(json.dumps(found) + "\n")

def percent(shares):
    """Their median, as it is written."""
    median = 100 * statistics.median(shares)
    return f"{median:.1f} %" if median > 99 else f"{median:.0f} %"

def noise_of(name):
    """The noise of log ρ̂ in nats, at the base policies of addition."""
    return statistics.mean(read("prices")["addition"][name]["same"])

def answers_of(model, config, key, prompts, generator, split="train"):
    """A model answers prompts, eight times each -> batch, rewards."""
    task = S.TASKS[config.task]
    texts, _ = task.sample(np.random.default_rng(key), prompts, split)
    return S.answer(model, task, texts, config.block_size, samples=8, generator=generator)

@torch.no_grad()
def estimates_of(base, batch, number, generator):
    """(number, N): estimates of log π with masks of their own, K = 1."""
    N, L = batch["completions"].shape
    found = []
    for _ in range(number):
        masks = S.sample_masks(N, 1, L, batch["block_size"], generator)
        found.append(S.elbo(base, masks=masks, **batch))
    return torch.stack(found)

def noise_of_ratio(model, batch, number, generator):
    """(number, N): log ρ̂ where ρ = 1, the difference of two estimates with masks of their own."""
    new = estimates_of(model, batch, number, generator)
    return new - estimates_of(model, batch, number, generator)

def shortened(numbers):
    """name -> tensor of one number, into name -> four digits."""
    return {name: short(number.item()) for name, number in numbers.items()}

def measure_tails(out):
    """2,048 answers of each base policy, and for each answer 64 values of log ρ̂ where ρ = 1."""
    seeds = []
    histogram = {"good answers": np.zeros(81), "bad answers": np.zeros(81)}
    for seed in SEEDS:
        config = S.Config(seed=seed)
        generator = S.stream(config, "tails")
        base = load_base(out, config)
        batch, rewards = answers_of(base, config, [4, seed], 256, generator)
        estimates = estimates_of(base, batch, 128, generator)
        log_ratio = estimates[:64] - estimates[64:]  # (64, N)
        own = estimates.std(0) * 2**0.5  # (N,): a log-ratio is a difference of two estimates
        good = rewards == 1
        seeds.append(tail_of(log_ratio, own, good, generator))
        for counts, chosen in zip(histogram.values(), (good, ~good)):
            counts += np.histogram(log_ratio[:, chosen].clamp(-20, 20), BINS)[0]
    histogram = {name: counts.tolist() for name, counts in histogram.items()}
    write("tails", {"seeds": seeds, "histogram": histogram})

def tail_of(log_ratio, own, good, generator):
    """The numbers of one base policy, standard deviations in nats. `own` (N,) is that of an answer
    over its masks. `largest` is the largest of 256 ratios, the median over batches: as it is; as it
    would be if the noise were normal with one σ; and normal with each answer's own."""
    sigma = log_ratio.std()
    noisy, variance = own > 4, own.square()
    normal = torch.randn(4096, 256, generator=generator) * sigma
    normal_own = torch.randn(512, 8, 256, generator=generator) * own.view(8, 256)
    numbers = {
        "sigma": sigma,
        "good": log_ratio[:, good].std(),
        "bad": log_ratio[:, ~good].std(),
        "share_good": good.float().mean(),
        "own_median": own.median(),
        "own_90": own.quantile(0.9),
        "own_99": own.quantile(0.99),
        "noisy_answers": noisy.float().mean(),
        "noisy_variance": variance[noisy].sum() / variance.sum(),
        "kurtosis": (log_ratio - log_ratio.mean()).div(sigma).pow(4).mean() - 3,
        "largest": log_ratio.view(-1, 256).amax(-1).median().exp(),
        "largest_normal": normal.amax(-1).median().exp(),
        "largest_own": normal_own.amax(-1).median().exp(),
    }
    return shortened(numbers)

def measure_shares(out):
    """The first update of ten batches of each base policy, where ρ = 1: the share of all bad
    answers, and of the heaviest single answer, in Σ |weight·A|."""
    found = {}
    for loss in ("grpo", "stabledrl"):
        bad, heaviest = [], []
        function, eps = S.LOSSES[loss]
        for seed, number in itertools.product(SEEDS, range(10)):
            config = S.Config(seed=seed)
            generator = S.stream(config, f"shares {number}")
            base = load_base(out, config)
            batch, rewards = answers_of(base, config, [3, seed, number], 32, generator)
            advantages = S.group_advantages(rewards, 8)
            log_ratio = noise_of_ratio(base, batch, 1, generator)[0].requires_grad_()
            function(log_ratio, advantages, eps, 8).backward()
            weight = log_ratio.grad.abs()  # |weight·A| / divisor
            share = weight / weight.sum()
            bad.append(short(share[advantages < 0].sum().item()))
            heaviest.append(short(share.max().item()))
        found[loss] = {"bad answers": bad, "heaviest answer": heaviest}
    write("shares", found)

GROWTH = {  # task -> the cell of an experiment, B and L
    "addition": ("blocks_addition", "addition, B = 2", "StableDRL", 2, 4),
    "addition3": ("digits", "StableDRL, ε = 5", "K = 1: 3.2 nats", 4, 4),
    "addition5, B = 2": ("blocks", "B = 2", "StableDRL", 2, 8),
    "addition5, B = 4": ("blocks", "B = 4", "StableDRL", 4, 8),
    "addition5, B = 8": ("blocks", "B = 8", "StableDRL", 8, 8),
    "sudoku, B = 2": ("blocks_sudoku", "sudoku, B = 2", "StableDRL", 2, 16),
    "sudoku, B = 4": ("blocks_sudoku", "sudoku, B = 4", "StableDRL", 4, 16),
}

def growth(kept):
    """Noise at the start of training, K = 1 -> task -> (B, L, mean σ over seeds), and the fit of
    σ = factor · B^b · L^l: (factor, b, l)."""
    points = {}
    for task, (name, row, column, B, L) in GROWTH.items():
        lines = lines_of(kept, EXPERIMENTS[name], row, column)
        points[task] = B, L, statistics.mean(line["spread"][0] for line in lines)
    log_B, log_L, log_sigma = np.log(list(points.values())).T
    columns = np.stack([np.ones(len(points)), log_B, log_L], axis=1)
    (log_factor, b, l), *_ = np.linalg.lstsq(columns, log_sigma)
    return points, (np.exp(log_factor), b, l)

def measure_drift(out):
    found = {}
    for policy, flags in POLICIES.items():
        line = f"--task addition3 {SMALL} {flags} --updates 400 --seed {FIVE}"
        configs, _, _ = S.parse(line.split())
        found[policy] = side_by_side(drift_of, configs, out)
    write("drift", found)

def drift_of(out, config):
    """A run, stopped every 40 updates -> column -> list of numbers: how far its policy has drifted,
    and how noisy log ρ̂ is where ρ = 1, in nats: on 512 answers of the base, on 512 of its own, and
    on good and bad ones of its own apart."""
    found, base = collections.defaultdict(list), load_base(out, config)
    model = copy.deepcopy(base)
    key, prompts = [5, config.seed], 64
    of_base, _ = answers_of(base, config, key, prompts, S.stream(config, "of base"))
    for update in range(0, config.updates + 1, 40):
        if update:
            try:
                S.make_run(out, dataclasses.replace(config, updates=update))
            except FloatingPointError:
                break
            load_trained(out, config, model)
        generator = S.stream(config, f"drift {update}")
        own, rewards = answers_of(model, config, key, prompts, generator)
        drift = S.true_log_prob(model, **own) - S.true_log_prob(base, **own)
        log_ratio = noise_of_ratio(model, own, 8, generator)  # (8, N)
        numbers = {
            "reward": rewards.mean(),
            "drift": drift.mean(),
            "own": log_ratio.std(),
            "base": noise_of_ratio(model, of_base, 8, generator).std(),
            "good": log_ratio[:, rewards == 1].std(),
            "bad": log_ratio[:, rewards < 1].std(),
        }
        for name, number in shortened(numbers).items():
            found[name].append(number)
    return found

def load_trained(out, config, model):
    """The model gets the weights of a run's last checkpoint."""
    S.load(Path(out, S.run_name(config), "checkpoint.pt"), model=model)

def measure_diversity(out):
    """Of the policies at the end of two experiments, and of their bases."""
    found = {}
    for name, column in (("best_long", "2,400 updates"), ("best_low", "times the base")):
        found[name] = {}
        for row in BEST:
            configs = EXPERIMENTS[name].cell(row, column)
            found[name][row] = side_by_side(diversity_of, configs, out)
        of_base = functools.partial(diversity_of, trained=False)
        found[name]["base policy"] = side_by_side(of_base, configs, out)
    write("diversity", found)

def diversity_of(out, config, trained=True):
    """500 held-out prompts, answered eight times each -> share of right answers, share of prompts
    that are solved at least once, and entropy of an answer in nats (the mean of −log π)."""
    model = load_base(out, config)
    if trained:
        S.make_run(out, config)
        load_trained(out, config, model)
    generator = S.stream(config, "diversity")
    batch, rewards = answers_of(model, config, [6, config.seed], 500, generator, "test")
    groups = rewards.view(-1, 8)
    return shortened({
        "right": rewards.mean(),
        "solved": groups.amax(-1).mean(),
        "entropy": -S.true_log_prob(model, **batch).mean(),
    })
