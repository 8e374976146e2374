"""What is compared on the results page? The objectives, the experiments, and the runs that are kept.

An experiment is a table of cells, and a cell is flags of stabledrl.py. A finished run is one line of
a file of kept lines: its name, which says its settings; whether it failed; the reward of its base
policy; and the columns of its log. There is a file for each machine, since another processor
rounds differently and so pretrains other base policies.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import stabledrl as S

# ==== Objectives and estimates that are not in stabledrl.py =======================================
# (log_ratio (N,), advantages (N,), ε, G) -> scalar, registered as a fork would do it. The constants
# are those of the sources, unless "ours" is said.


def dual_clip(log_ratio, advantages, clip_eps, group_size):
    """Dual-clip PPO (Ye et al., arXiv 1912.09729): GRPO with its 0.2, but never below c·A where
    A < 0. c is 1 + clip_eps; 6 is ours."""
    ratio = S.safe_exp(log_ratio)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    bounded = surrogate.maximum((1 + clip_eps) * advantages)
    return -torch.where(advantages < 0, bounded, surrogate).mean()


def per_token(log_ratio, advantages, clip_eps, group_size):
    """ESPO (arXiv 2512.03759), without its masks: GRPO on ρ̂^(1/L). L is 4 on addition."""
    return S.grpo_loss(log_ratio / 4, advantages, clip_eps)


def sapo(log_ratio, advantages, clip_eps, group_size):
    """SAPO (arXiv 2511.20347), per completion: a soft gate in place of the clip. The weight of A·g
    is 4·s·(1−s)·ρ̂ with s = sigmoid(τ(ρ̂ − 1)): 1 at ρ̂ = 1, and 0 at both ends."""
    tau = torch.where(advantages > 0, 1.0, 1.05)
    gate = 4 / tau * (tau * (S.safe_exp(log_ratio) - 1)).sigmoid()
    return -(gate * advantages).mean()


def vespo(log_ratio, advantages, clip_eps, group_size):
    """VESPO (arXiv 2602.10693): the weight of A·g is ρ̂^k·e^(λ(1−ρ̂)), constant to autograd."""
    log_weight = log_ratio.detach().clamp(math.log(1e-8), 20)
    power = torch.where(advantages >= 0, 2, 3)
    decay = torch.where(advantages >= 0, 3, 2)
    weights = (power * log_weight + decay * (1 - log_weight.exp())).exp()
    return -(weights * advantages * log_ratio).mean()


def good_clipped(log_ratio, advantages, clip_eps, group_size):
    """Good completions only, with a ratio that is clipped from above."""
    weights = advantages.clamp(min=0)
    ratio = log_ratio.detach().clamp(max=math.log(1 + clip_eps)).exp()
    return -(ratio * weights * log_ratio).sum() / weights.sum().clamp(min=1e-6)


def one_sided(sign, single):
    """Policy gradient without a ratio, from the good completions only (sign 1) or the bad ones (−1):
    from one of them, chosen at random, or from all, weighted by |A|."""

    def loss(log_ratio, advantages, clip_eps, group_size):
        weights = (sign * advantages).clamp(min=0)
        if single and weights.any():
            chosen = (weights > 0).float().multinomial(1)
            weights = torch.zeros_like(weights).index_fill(0, chosen, 1.0)
        return -sign * (weights * log_ratio).sum() / weights.sum().clamp(min=1e-6)

    return loss


def spiked(loss):
    """The paper's stress test: a twentieth of the ratios, chosen at random, times 1e5."""

    def with_spikes(log_ratio, advantages, clip_eps, group_size):
        hit = torch.rand_like(log_ratio) < 0.05
        return loss(log_ratio + hit * math.log(1e5), advantages, clip_eps, group_size)

    return with_spikes


def finite(skip):
    """GRPO whose gradients seldom overflow: a ratio above e^40 counts as e^40. With skip, an update
    has the gradient 0 if a bad completion has such a ratio."""

    def loss(log_ratio, advantages, clip_eps, group_size):
        above = (log_ratio - 40).clamp(min=0).detach()
        if skip and ((above > 0) & (advantages < 0)).any():
            return 0 * log_ratio.sum()
        return S.grpo_loss(log_ratio - above, advantages, clip_eps)

    return loss


def injected(loss, sigma, who):
    """Normal noise of σ nats in the log-ratio of all, of the bad or of the good completions. It is
    added to the number, so it changes weights and no gradient of log π."""

    def noisy(log_ratio, advantages, clip_eps, group_size):
        noise = sigma * torch.randn_like(log_ratio)
        if who == "bad":
            noise = torch.where(advantages < 0, noise, 0)
        if who == "good":
            noise = torch.where(advantages > 0, noise, 0)
        return loss(log_ratio + noise, advantages, clip_eps, group_size)

    return noisy


def hidden_mean(model, prompts, completions, block_size, masks, steps=None):
    """The likelihood of StableDRL's release, on all blocks: log p, mean over the hidden tokens. It is
    no bound of log π. `released` below takes from it what SPG (arXiv 2510.09541) descends on for
    bad completions: half of it, and half an upper bound, (1/β)·log of the mean of p^β over the
    copies that hide a token, mean over tokens, with β = 1.5."""
    log_p = S.token_log_probs(model, prompts, completions, block_size, masks)  # (N, K, L)
    lower = ((masks * log_p).sum(-1) / masks.sum(-1)).mean(-1)  # (N,)
    copies = masks.sum(1)  # (N, L), of those that hide a token
    powers = (1.5 * log_p).masked_fill(~masks, -1e9).logsumexp(1) - copies.clamp(min=1).log()
    upper = (powers / 1.5 * (copies > 0)).sum(-1) / (copies > 0).sum(-1)  # (N,)
    hidden_mean.for_bad = (lower + upper) / 2
    return lower


def released(bound):
    """StableDRL's loss with A = reward − mean, not divided by the deviation: the same for rewards 0
    and 1, where the deviation is √(p(1−p)), and p the share of good completions. With the bound,
    the gradient of bad ones is that of SPG's mixture."""

    def loss(log_ratio, advantages, clip_eps, group_size):
        groups = advantages.view(-1, group_size)
        p = (groups > 0).float().mean(-1, keepdim=True)
        score = torch.where(advantages < 0, hidden_mean.for_bad, log_ratio) if bound else log_ratio
        clipped = log_ratio.detach().clamp(max=math.log(1 + clip_eps))
        weights = clipped.view(-1, group_size).softmax(-1)
        centred = groups * (p * (1 - p)).sqrt()
        return -(weights * centred * score.view(-1, group_size)).sum(-1).mean()

    return loss


def masks_per_batch(num_seqs, copies, completion_len, block_size, generator):
    """The same masks for all estimates of a batch: a batch has one generator, with its own seed."""
    again = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return S.sample_masks(num_seqs, copies, completion_len, block_size, again)


SPIKED = {
    "GRPO": "grpo",
    "StableDRL, line 2 alone": "norm_only",
    "StableDRL, line 1 alone, ε = 5": "clip_only",
    "StableDRL, ε = 5": "stabledrl",
    "no ratio": "no_ratio",
}
SIGMAS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # of injected noise, nats
INJECTED = {
    "GRPO": ("grpo", S.grpo_loss, 0.2),
    "StableDRL, ε = 1": ("stabledrl", S.stabledrl_loss, 1.0),
}
WHO = ("good", "bad", "all")


def register():
    """Make all of these known to stabledrl.py. It is called before an experiment is looked at."""
    for name in SPIKED.values():
        loss, eps = S.LOSSES[name]
        S.LOSSES[f"spiked_{name}"] = (spiked(loss), eps)
    for (name, loss, eps), who, sigma in itertools.product(INJECTED.values(), WHO, SIGMAS):
        S.LOSSES[f"{name}_{who}_{sigma}"] = (injected(loss, sigma, who), eps)
    for sign, single in itertools.product((-1, 1), (True, False)):
        name = ("one_" if single else "all_") + ("good" if sign == 1 else "bad")
        S.LOSSES[name] = (one_sided(sign, single), 0.0)
    S.LOSSES["finite"] = (finite(skip=False), 0.2)
    S.LOSSES["skipping"] = (finite(skip=True), 0.2)
    S.LOSSES["dual_clip"] = (dual_clip, 5.0)
    S.LOSSES["per_token"] = (per_token, 0.2)
    S.LOSSES["sapo"] = (sapo, 0.0)
    S.LOSSES["vespo"] = (vespo, 0.0)
    S.LOSSES["good_clipped"] = (good_clipped, 1.0)
    S.LOSSES["released"] = (released(bound=False), 4.0)
    S.LOSSES["released_bound"] = (released(bound=True), 4.0)
    S.ESTIMATORS["hidden_mean"] = hidden_mean
    S.MASKS["per_batch"] = masks_per_batch


# ==== The experiments =============================================================================

MACHINES = {  # name of its file of kept lines -> what the page says
    "xeon": "Intel Xeon, 29 November 2026",
    "genoa": "AMD EPYC (Genoa), 29 November 2026",
    "turin": "AMD EPYC (Turin), 29 November 2026",
    "milan": "AMD EPYC (Milan), 30 November 2026",
    "epyc": "AMD EPYC, 25 to 27 November 2026",
    "h100": "H100 machine, 26 and 27 November 2026",
}


TYPES = {field.name: field.type for field in dataclasses.fields(S.Config)}


@dataclasses.dataclass(eq=False)
class Experiment:
    """cells: (row, column) -> flags. The flags of `common` hold for all cells, and each is run on
    every seed."""

    cells: dict
    machine: str
    common: str = "--updates 600"
    seeds: tuple = range(3)

    def __post_init__(self):
        self.rows = list(dict.fromkeys(row for row, _ in self.cells))
        self.columns = list(dict.fromkeys(column for _, column in self.cells))

    def config(self, row, column, seed):
        given = {"seed": seed}
        for words in f"{self.common} {self.cells[row, column]}".split("--")[1:]:
            name, *value = words.split()
            given[name] = TYPES[name](*value or [True])
        return S.Config(**given)

    def configs(self):
        """Of all runs, seed 0 first, so that what is stopped early is whole for its first seeds."""
        return [self.config(*cell, seed) for seed in self.seeds for cell in self.cells]


def product(rows, columns):
    """Label -> flags, twice, into cells: every row with every column."""
    pairs = itertools.product(rows.items(), columns.items())
    return {(row, column): f"{flags} {more}" for (row, flags), (column, more) in pairs}


MU = {"μ = 2": "--mu 2", "μ = 8": "--mu 8"}
PAIR = "--masks coupled --copies 2"
SMALL = "--d_model 128 --n_layer 4 --lr 3e-5"  # 0.8 M parameters
GPU = "--device cuda --n_head 8"
COUNTDOWN = "--task countdown --base_accuracy 0.2 --d_model 96 --prompts 16"
SUDOKU = "--task sudoku --base_accuracy 0.6 --prompts 16 --lr 3e-5"
TWO = {"GRPO": "--loss grpo", "StableDRL": "--loss stabledrl"}
STABLEDRL = {"StableDRL, ε = 5": "--loss stabledrl", "StableDRL, ε = 1": "--clip_eps 1"}
POLICIES = {
    "GRPO, estimated ratio": "--loss grpo",
    "GRPO, exact ratio": "--loss grpo --estimator exact",
    "StableDRL, estimated ratio": "--loss stabledrl",
}
OBJECTIVES = {"GRPO": "--loss grpo"} | STABLEDRL
OBJECTIVES |= {
    "clip only, ε = 1": "--loss clip_only --clip_eps 1",
    "dual clip": "--loss dual_clip",
    "ρ̂^(1/L)": "--loss per_token",
    "no ratio": "--loss no_ratio",
    "SAPO": "--loss sapo",
    "VESPO": "--loss vespo",
    "good only": "--loss all_good",
}
SIX = ("GRPO", "StableDRL, ε = 5", "StableDRL, ε = 1", "no ratio", "VESPO", "good only")
LEADING = {row: OBJECTIVES[row] for row in SIX}
NOISES = {  # ways to estimate the ratio, the least noise first
    "exact": "--estimator exact",
    "coupled, K = 2": PAIR,
    "K = 8": "--copies 8",
    "K = 4": "--copies 4",
    "K = 2": "--copies 2",
    "K = 1": "--copies 1",
}
SQUARE = {
    f"{ratio} ratio, {updates:,} updates": f"--estimator {estimator} --updates {updates}"
    for updates in (600, 1200)
    for ratio, estimator in (("estimated", "elbo"), ("exact", "exact"))
}
SHARING = {"anew": "", "per batch": "--masks per_batch", "per update": "--shared_masks"}
SHARING = {
    f"{mu}: {how}": f"{flags} {more}" for mu, flags in MU.items() for how, more in SHARING.items()
}


def injection(label, sigmas):
    """Cells of a loss with injected noise: how much, and who gets it."""
    (name, _, eps), cells = INJECTED[label], {}
    for who in WHO:
        cells["none", f"{label}: {who}"] = f"--loss {name} --clip_eps {eps}"
        for sigma in sigmas:
            cells[f"{sigma} nats", f"{label}: {who}"] = f"--loss {name}_{who}_{sigma}"
    return cells


OWN_RATE = {row: flags for row, flags in LEADING.items() if row != "GRPO"}
OWN_RATE["GRPO, shared masks"] = "--loss grpo --shared_masks"
OWN_RATE["GRPO, exact ratio"] = "--loss grpo --estimator exact"
BEST_RATES = {  # of those of the experiment "rates": highest mean
    "GRPO, exact ratio": "4e-4",
    "StableDRL, ε = 5": "2e-4",
    "StableDRL, ε = 1": "2e-4",
    "no ratio": "2e-4",
    "VESPO": "4e-4",
    "good only": "4e-4",
    "GRPO, shared masks": "4e-4",
}
RATES = product(OWN_RATE, {f"{rate}e-4": f"--lr {rate}e-4" for rate in (0.5, 1, 2, 4, 8)})
for row, best in BEST_RATES.items():  # as far as a rate that is too high
    del RATES[row, "0.5e-4" if best == "4e-4" else "8e-4"]
FRESH = {row: f"{flags} --lr {BEST_RATES[row]}" for row, flags in OWN_RATE.items()}
TWO_BY_TWO = {}
for mu, flags in MU.items():
    TWO_BY_TWO |= {
        ("all completions", f"{mu}: no ratio"): f"--loss no_ratio {flags}",
        ("all completions", f"{mu}: ratio, at most 2"): f"--loss clip_only --clip_eps 1 {flags}",
        ("good ones alone", f"{mu}: no ratio"): f"--loss all_good {flags}",
        ("good ones alone", f"{mu}: ratio, at most 2"): f"--loss good_clipped {flags}",
    }
LEFT = {
    "countdown": f"{COUNTDOWN} --lr 5e-5 --updates 400",
    "sudoku": f"{SUDOKU} --updates 240",
}
WAYS = {
    "GRPO, shared masks": "--loss grpo --shared_masks",
    "GRPO, trajectory": "--loss grpo --estimator trajectory",
    "GRPO, mean field": "--loss grpo --estimator mean_field",
    "GRPO, exact ELBO": "--loss grpo --estimator exact_elbo",
    "GRPO, exact": "--loss grpo --estimator exact",
    "StableDRL, ε = 1, masks anew": "--clip_eps 1",
}
PARTS = {
    "no ratio, which is ε = 0": "--loss no_ratio",
    "StableDRL, ε = 0.2": "--clip_eps 0.2",
    "StableDRL, ε = 1": "--clip_eps 1",
    "StableDRL, ε = 5": "--clip_eps 5",
    "StableDRL, ε = 100": "--clip_eps 100",
    "StableDRL, ε = 1,000": "--clip_eps 1000",
    "line 2 alone, which is ε = ∞": "--loss norm_only",
    "line 1 alone, ε = 5": "--loss clip_only",
    "dual clip": "--loss dual_clip",
    "GRPO": "--loss grpo",
}
HIDDEN_MEAN = "--estimator hidden_mean --copies 2 --max_grad_norm 0.2"
RELEASE = {
    "GRPO": f"--loss grpo {HIDDEN_MEAN}",
    "StableDRL, lower bound for all": f"--loss released {HIDDEN_MEAN}",
    "StableDRL, upper bound mixed in for bad ones": f"--loss released_bound {HIDDEN_MEAN}",
}
SIDES = {
    "one bad completion, pushed down": "--loss one_bad",
    "all bad completions, pushed down": "--loss all_bad",
    "one good completion, pushed up": "--loss one_good",
    "all good completions, pushed up": "--loss all_good",
}
TASKS = {
    "chain": f"--task chain --base_accuracy 0.6 --lr 3e-5 {PAIR}",
    "countdown": f"{COUNTDOWN} --lr 3e-5 {PAIR}",
    "sudoku": SUDOKU,
}
FINITE = {
    "GRPO": "--loss grpo",
    "GRPO, ratios at most e^40": "--loss finite",
    "GRPO, updates above e^40 skipped": "--loss skipping",
    "StableDRL, ε = 5": "--loss stabledrl",
}
SLOW = ("1e-5", "3e-5", "5e-5", "1e-4", "2e-4", "4e-4")
SIZES = {
    "3.2 M, 1e-4": "--d_model 256 --n_layer 4 --lr 1e-4",
    "3.2 M, 3e-5": "--d_model 256 --n_layer 4 --lr 3e-5",
    "3.2 M, 1e-5": "--d_model 256 --n_layer 4 --lr 1e-5",
    "25 M, 1e-5": "--d_model 512 --n_layer 8 --base_lr 1e-4 --lr 1e-5",
}
BLOCKS = {f"B = {B}": f"--block_size {B}" for B in (1, 2, 4, 8)}
IN_BLOCKS = TWO | {"GRPO, trajectory": "--loss grpo --estimator trajectory"}

FIVE = range(5)
EXACT_320 = "--updates 320 --estimator exact"
ONE = {"times the base": ""}  # a column
EXPERIMENTS = {
    "square": Experiment(product(TWO, SQUARE), "xeon", seeds=FIVE),
    "shared": Experiment(product({"GRPO": "--loss grpo"} | STABLEDRL, SHARING), "xeon", seeds=FIVE),
    "rates": Experiment(RATES, "genoa", seeds=FIVE),
    "fresh": Experiment(product(FRESH, ONE), "genoa", seeds=range(10, 20)),
    "two_by_two": Experiment(TWO_BY_TWO, "xeon", seeds=FIVE),
    "injected": Experiment(injection("GRPO", SIGMAS), "genoa", EXACT_320, FIVE),
    "injected_stable": Experiment(
        injection("StableDRL, ε = 1", SIGMAS[1::2]), "genoa", EXACT_320, FIVE
    ),
    "release": Experiment(product(RELEASE, MU), "genoa", seeds=FIVE),
    "left": Experiment(product(LEADING, LEFT), "genoa", "--mu 8", FIVE),
    "tunnel": Experiment(product(OBJECTIVES, NOISES), "epyc"),
    "tunnel_8": Experiment(product(OBJECTIVES, NOISES), "epyc", "--updates 600 --mu 8"),
    "one_update": Experiment(product(LEADING, {"μ = 1": "--mu 1", "μ = 2": ""}), "epyc"),
    "ways": Experiment(product(WAYS, MU), "turin", seeds=FIVE),
    "slow": Experiment(product(TWO, {rate: f"--lr {rate}" for rate in SLOW}), "epyc"),
    "parts": Experiment(product(PARTS, MU), "epyc", seeds=FIVE),
    "spikes": Experiment(
        product({row: f"--loss spiked_{name}" for row, name in SPIKED.items()}, ONE),
        "epyc",
        "--updates 600 --masks per_batch",
    ),
    "one_sided": Experiment(
        product(SIDES, {"estimated": "--estimator elbo", "exact": "--estimator exact"}), "epyc"
    ),
    "tasks": Experiment(product(TASKS, TWO), "epyc"),
    "finite": Experiment(product(FINITE, ONE), "milan", f"--updates 600 {SUDOKU}", FIVE),
    "sizes": Experiment(product(SIZES, POLICIES), "h100", f"--updates 600 {GPU}"),
    "blocks": Experiment(
        product(BLOCKS, IN_BLOCKS), "h100", f"--updates 200 --task addition5 {SMALL}"
    ),
}

# ==== Running and keeping =========================================================================

COLUMNS = "accuracy reward spread noise_std drift grad_norm ratio_max ess clip_fraction".split()


def short(number):
    """Four digits."""
    return float(f"{number:.4g}")


def read_lines(name):
    """A file of kept lines: name of a run -> line."""
    lines = map(json.loads, (HERE / f"{name}.jsonl").read_text().splitlines())
    return {line["run"]: line for line in lines}


def line_of(kept, config):
    """The kept line of a run, cut to the updates that config asks for, or None. A number that is not
    finite ends a run: its line is shorter, and it counts as failed."""
    line, length = kept.get(S.run_name(config)), config.updates // config.log_every
    if not line or not line["failed"] and len(line["reward"]) < length:
        return None
    cut = {name: line[name][:length] for name in COLUMNS}
    return line | cut | {"failed": len(line["reward"]) < length}


def lines_of(experiment, kept):
    """(row, column) -> lines, seed by seed, and the seeds: those for which all cells are there."""
    found, seeds = {cell: [] for cell in experiment.cells}, []
    for seed in experiment.seeds:
        lines = [line_of(kept, experiment.config(*cell, seed)) for cell in found]
        if all(lines):
            seeds.append(seed)
            for of_cell, line in zip(found.values(), lines):
                of_cell.append(line)
    return found, seeds


@functools.cache
def kept_of(name):
    """`lines_of` an experiment, from the file of its machine."""
    return lines_of(EXPERIMENTS[name], read_lines(EXPERIMENTS[name].machine))


def times_base(line):
    """The last reward over that of the base policy. A run that failed counts as 0."""
    return 0.0 if line["failed"] else line["reward"][-1] / line["base"]


def noise_of_columns():
    """Nats, for each of NOISES: deviation of log ρ̂ where ρ = 1, in the first 40 updates of
    StableDRL."""
    cells = [kept_of("tunnel")[0]["StableDRL, ε = 5", column] for column in NOISES]
    return [statistics.mean(line["spread"][0] for line in lines) for lines in cells]


def load(path, config):
    """A policy from a file of stabledrl.py."""
    model = S.new_model(config)
    S.load(path, model)
    return model


def held_out(model, config):
    """The reward of sampled completions of 2,000 held-out prompts."""
    task = S.TASKS[config.task]
    texts, _ = task.sample(np.random.default_rng(2), 2_000, "test")
    generator = S.stream(config, "held out")
    _, rewards = S.answer(model, task, texts, config.block_size, generator=generator)
    return short(rewards.mean().item())


def make_line(out, config):
    """Make one run, or go on with it -> its kept line."""
    (base, *rows), failed = S.run(out, config)
    line = {"run": S.run_name(config), "failed": failed, "base": short(base["reward"])}
    line["base_accuracy"] = base["accuracy"]
    for column in COLUMNS:
        line[column] = [short(row[column]) for row in rows if column in row]
    line["held_out"] = held_out(
        load(Path(out, S.run_name(config), "checkpoint.pt"), config), config
    )
    line["held_out_base"] = held_out(load(S.base_path(config, out), config), config)
    return line


def make_bases(out, configs):
    """The files of the base policies, in forked processes where this is possible -> whether it is."""
    fork = sys.platform == "linux" and configs[0].device == "cpu"
    Path(out).mkdir(parents=True, exist_ok=True)
    bases = {S.base_path(config, out): config for config in configs}
    S.launch(functools.partial(S.make_base, out), bases.values(), fork)
    return fork


def make_lines(out, resume, configs):
    """Make runs, side by side -> their lines. AssertionError, ValueError: an impossible setting."""
    S.launch(functools.partial(S.trial, out, resume), configs, fork=sys.platform == "linux")
    return S.launch(functools.partial(make_line, out), configs, make_bases(out, configs))
