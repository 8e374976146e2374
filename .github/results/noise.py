"""Which completions are noisy, who holds the weight of an update, and does noise grow as a policy
drifts? Measured on policies, and kept in tails.json, shares.json and drift.json."""

import collections
import functools
import itertools
import json

import numpy as np
import torch
from experiments import FIVE, HERE, POLICIES, SMALL, S, load, make_bases, short

SHARES = {"GRPO": ("grpo", 1), "StableDRL": ("stabledrl", 1), "every ratio 1": ("grpo", 0)}
BINS = np.arange(-20.25, 20.5, 0.5)  # of log ρ̂ in nats; the middle one is centred on 0


def read(name):
    return json.loads((HERE / f"{name}.json").read_text())


def write(name, found):
    (HERE / f"{name}.json").write_text(json.dumps(found) + "\n")


def bases(out):
    """Config and base policy of the square, seed by seed."""
    configs = [S.Config(seed=seed) for seed in FIVE]
    make_bases(out, configs)
    return [(config, load(S.base_path(config, out), config)) for config in configs]


def complete(model, config, key, prompts, generator):
    """Eight completions of each of some training prompts -> batch, rewards."""
    task = S.TASKS[config.task]
    texts, _ = task.sample(np.random.default_rng(key), prompts, "train")
    return S.answer(model, task, texts, config.block_size, samples=8, generator=generator)


@torch.no_grad()
def log_ratios(model, batch, number, generator):
    """(number, N): log ρ̂ where ρ = 1, the difference of two estimates with masks of their own."""
    N, L = batch["completions"].shape
    found = []
    for _ in range(2 * number):
        masks = S.sample_masks(N, 1, L, batch["block_size"], generator)
        found.append(S.elbo(model, masks=masks, **batch))
    return torch.stack(found[:number]) - torch.stack(found[number:])


def shortened(numbers):
    return {name: short(number.item()) for name, number in numbers.items()}


def measure_tails(out):
    """2,048 completions of each base policy, and for each of them 64 values of log ρ̂ where ρ = 1."""
    seeds = []
    histogram = {"good completions": np.zeros(81), "bad completions": np.zeros(81)}
    for config, base in bases(out):
        generator = S.stream(config, "tails")
        batch, rewards = complete(base, config, [4, config.seed], 256, generator)
        log_ratio, good = log_ratios(base, batch, 64, generator), rewards == 1  # (64, N), (N,)
        seeds.append(tail_of(log_ratio, good, generator))
        for counts, chosen in zip(histogram.values(), (good, ~good)):
            counts += np.histogram(log_ratio[:, chosen].clamp(-20, 20), BINS)[0]
    histogram = {name: counts.tolist() for name, counts in histogram.items()}
    write("tails", {"seeds": seeds, "histogram": histogram})


def tail_of(log_ratio, good, generator):
    """The numbers of one base policy. `own` is the deviation of a completion over its masks;
    `largest` the largest of 256 ratios, its median over batches: as it is, and as it would be if the
    noise were normal with one σ."""
    sigma, own = log_ratio.std(), log_ratio.std(0)  # (), (N,)
    noisy, variance = own > 4, own.square()
    normal = torch.randn(4096, 256, generator=generator) * sigma
    numbers = {
        "sigma": sigma,
        "good": log_ratio[:, good].std(),
        "bad": log_ratio[:, ~good].std(),
        "share_good": good.float().mean(),
        "own_median": own.median(),
        "noisy": noisy.float().mean(),
        "noisy_variance": variance[noisy].sum() / variance.sum(),
        "largest": log_ratio.view(-1, 256).amax(-1).median().exp(),
        "largest_normal": normal.amax(-1).median().exp(),
    }
    return shortened(numbers)


def gradient_norms(model, batch, masks):
    """(N,): the norm of the gradient of each completion's log π̂."""
    norms, samples = [], len(masks) // len(batch["prompts"])
    for i in range(len(masks)):
        own = {name: batch[name][i : i + 1] for name in ("completions", "steps")}
        own["prompts"] = batch["prompts"][i // samples : i // samples + 1]
        log_prob = S.elbo(model, masks=masks[i : i + 1], block_size=batch["block_size"], **own)
        gradients = torch.autograd.grad(log_prob.sum(), model.parameters())
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    return torch.stack(norms)


def measure_shares(out):
    """The first update of ten batches of each base policy, where ρ = 1: the share of all bad
    completions, and of the heaviest single one, in Σ ‖weight·A·g‖."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for (config, base), number in itertools.product(bases(out), range(10)):
        generator = S.stream(config, f"shares {number}")
        batch, rewards = complete(base, config, [3, config.seed, number], 32, generator)
        advantages = S.group_advantages(rewards, 8)
        N, L = batch["completions"].shape
        new, old = (S.sample_masks(N, 1, L, config.block_size, generator) for _ in range(2))
        with torch.no_grad():
            log_ratio = S.elbo(base, masks=new, **batch) - S.elbo(base, masks=old, **batch)
        norms = gradient_norms(base, batch, new)
        for label, (name, noise) in SHARES.items():
            leaf = (noise * log_ratio).requires_grad_()
            loss, eps = S.LOSSES[name]
            loss(leaf, advantages, eps, 8).backward()
            push = leaf.grad.abs() * norms
            share = push / push.sum()
            found[label]["all bad completions"].append(short(share[advantages < 0].sum().item()))
            found[label]["the heaviest of 256"].append(short(share.max().item()))
    write("shares", found)


def measure_drift(out):
    found = {}
    for policy, flags in POLICIES.items():
        line = f"--task addition3 {SMALL} {flags} --updates 400 --seed {' '.join(map(str, FIVE))}"
        configs, _, _ = S.parse(line.split())
        fork = make_bases(out, configs)
        found[policy] = S.launch(functools.partial(drift_of, out), configs, fork)
    write("drift", found)


def drift_of(out, config):
    """One run, looked at every 40 updates -> column -> numbers: how far its policy has drifted, and
    how noisy log ρ̂ is where ρ = 1, in nats: on 512 completions of the base, on 512 of its own, and
    on the good and the bad ones of its own apart."""
    found, base = collections.defaultdict(list), load(S.base_path(config, out), config)
    model, key, prompts = S.new_model(config), [5, config.seed], 64
    of_base, _ = complete(base, config, key, prompts, S.stream(config, "of base"))
    start = S.first_checkpoint(config, base)
    try:
        for checkpoint in itertools.chain([start], S.train(config, base, start)):
            model.load_state_dict(checkpoint["model"])
            generator = S.stream(config, f"drift {checkpoint['rows'][-1]['update']}")
            own, rewards = complete(model, config, key, prompts, generator)
            drift = S.true_log_prob(model, **own) - S.true_log_prob(base, **own)
            log_ratio = log_ratios(model, own, 8, generator)  # (8, N)
            numbers = {
                "drift": drift.mean(),
                "own": log_ratio.std(),
                "base": log_ratios(model, of_base, 8, generator).std(),
                "good": log_ratio[:, rewards == 1].std(),
                "bad": log_ratio[:, rewards < 1].std(),
            }
            for name, number in shortened(numbers).items():
                found[name].append(number)
    except FloatingPointError:
        pass  # the run has ended: what it has shown is kept
    return found


MEASURE = {"tails": measure_tails, "shares": measure_shares, "drift": measure_drift}
