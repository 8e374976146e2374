"""What is measured on base policies: where the tail of the ratios comes from (tails.json), and who
has the weight of a first update (shares.json). What an estimate costs (prices.json) is kept, and
nothing here measures it again."""

import itertools
import json
import statistics

import numpy as np
import torch

from experiments import HERE, S, load_base, short

SEEDS = range(5)  # of the main job's base policies
BINS = np.arange(-20.25, 20.5, 0.5)  # of log ρ̂ in nats; the middle one is centred on 0

def read(name):
    return json.loads((HERE / f"{name}.json").read_text())

def write(name, found):
    (HERE / f"{name}.json").write_text(json.dumps(found) + "\n")

def noise_of(name):
    """The noise of log ρ̂ in nats, at the base policies of addition."""
    return statistics.mean(read("prices")["addition"][name]["same"])

def answers_of_base(config, out, key, prompts, generator):
    """The base policy answers prompts, eight times each -> base, batch, rewards."""
    base = load_base(out, config)
    task = S.TASKS[config.task]
    texts, _ = task.sample(np.random.default_rng(key), prompts, "train")
    options = {"samples": 8, "generator": generator}
    batch, rewards = S.answer(base, task, texts, config.block_size, **options)
    return base, batch, rewards

@torch.no_grad()
def estimates_of(base, batch, number, generator):
    """(number, N): estimates of log π with masks of their own, K = 1."""
    N, L = batch["completions"].shape
    found = []
    for _ in range(number):
        masks = S.sample_masks(N, 1, L, batch["block_size"], generator)
        found.append(S.elbo(base, masks=masks, **batch))
    return torch.stack(found)

def measure_tails(out):
    """2,048 answers of each base policy, and for each answer 64 values of log ρ̂ where ρ = 1."""
    seeds = []
    histogram = {"good answers": np.zeros(81), "bad answers": np.zeros(81)}
    for seed in SEEDS:
        config = S.Config(seed=seed)
        generator = S.stream(config, "tails")
        base, batch, rewards = answers_of_base(config, out, [4, seed], 256, generator)
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
    return {name: short(number.item()) for name, number in numbers.items()}

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
            key = [3, seed, number]
            base, batch, rewards = answers_of_base(config, out, key, 32, generator)
            advantages = S.group_advantages(rewards, 8)
            new, old = estimates_of(base, batch, 2, generator)
            log_ratio = (new - old).requires_grad_()
            function(log_ratio, advantages, eps, 8).backward()
            weight = log_ratio.grad.abs()  # |weight·A| / divisor
            share = weight / weight.sum()
            bad.append(short(share[advantages < 0].sum().item()))
            heaviest.append(short(share.max().item()))
        found[loss] = {"bad answers": bad, "heaviest answer": heaviest}
    write("shares", found)
