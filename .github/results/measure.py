"""Every experiment of the results page, and the page's tables and figures.

    python .github/results/measure.py [GRID ..]    run what is missing, all grids or these, in that order; then the below
    python .github/results/measure.py --page       put finished runs into the kept lines; write tables and figures anew

Runs go to runs/ and may be stopped at any time: the next call goes on with them. A finished run is kept as one line of
GRID.jsonl beside this file, and is never run again; who wants to measure a grid anew deletes its file. The tables of
README.md here and all figures are made from the kept lines alone.
"""

import contextlib
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
import torch

import stabledrl as S

OUT = "runs"

# ---- Objectives of other papers, registered as a fork would do it -----------------------------------------------------
# (N,) log-ratios and advantages in; a scalar out. ε is the one that each paper or its code uses.

def dual_clip(log_ratio, advantages, clip_eps, group_size):
    """Dual-clip PPO (Ye et al., arXiv 1912.09729): GRPO, but never below c·A where A < 0; here c = 1 + clip_eps."""
    ratio = log_ratio.clamp(max=80).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -torch.where(advantages < 0, surrogate.maximum((1 + clip_eps) * advantages), surrogate).mean()

def per_token(log_ratio, advantages, clip_eps, group_size):
    """GSPO (Zheng et al., arXiv 2507.18071) and ESPO (arXiv 2512.03759): GRPO on ρ̂^(1/L). L = 4 on addition."""
    return S.grpo_loss(log_ratio / 4, advantages, clip_eps)

def wd1(log_ratio, advantages, clip_eps, group_size):
    """wd1 (Tang et al., arXiv 2507.08838): no ratio; Σ (softmax(−A) − softmax(A))·log p over each group, ψ = 1."""
    groups = advantages.view(-1, group_size)
    weights = (-groups).softmax(-1) - groups.softmax(-1)
    return (weights.flatten() * log_ratio).view(-1, group_size).sum(-1).mean()

def spiked(loss):
    """The paper's stress test: a twentieth of the ratios, drawn by lot, is multiplied by 1e5."""
    def with_spikes(log_ratio, advantages, clip_eps, group_size):
        hit = torch.rand_like(log_ratio) < 0.05
        return loss(log_ratio + hit * math.log(1e5), advantages, clip_eps, group_size)
    return with_spikes

def mean_over_masked(model, prompts, completions, masks, block_size, **unused):
    """Likelihood as in StableDRL's release, on all blocks: the mean of log p over the masked tokens. No bound."""
    log_p = S.token_log_probs(model, prompts, completions, masks, block_size)  # (N, K, L)
    return ((masks * log_p).sum(-1) / masks.sum(-1)).mean(-1)

def one_sided(sign, single):
    """Policy gradient without a ratio, from the good (sign 1) or the bad (−1) answers only: from one of them, drawn by
    lot, or from all, weighted by A."""
    def loss(log_ratio, advantages, clip_eps, group_size):
        weights = (sign * advantages).clamp(min=0)
        if single and weights.any():
            weights = torch.zeros_like(weights).index_fill(0, (weights > 0).float().multinomial(1), 1.0)
        return -sign * (weights * log_ratio).sum() / weights.sum().clamp(min=1e-6)
    return loss

ONE_SIDED = {"one_bad": (-1, True), "one_good": (1, True), "all_bad": (-1, False), "all_good": (1, False)}

SPIKED = ("grpo", "norm_only", "clip_only", "stabledrl", "no_ratio")  # the losses of the stress test

def register():
    """Make all of these known to the program."""
    S.LOSSES |= {"dual_clip": (dual_clip, 5.0), "per_token": (per_token, 0.2), "wd1": (wd1, 0.0)}
    for name in SPIKED:
        loss, eps = S.LOSSES[name]
        S.LOSSES[f"spiked_{name}"] = (spiked(loss), eps)
    S.LOSSES |= {name: (one_sided(*which), 0.0) for name, which in ONE_SIDED.items()}
    S.ESTIMATORS["mean_over_masked"] = mean_over_masked

@contextlib.contextmanager
def release():
    """The other conventions of the release, while runs of its grid are made: A without division by the deviation, and
    AdamW with weight decay 0.1."""
    def centred(rewards, group_size):
        groups = rewards.view(-1, group_size)
        return (groups - groups.mean(-1, keepdim=True)).flatten()
    def adamw(parameters, lr, betas=(0.9, 0.99)):
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=0.1)
    with mock.patch.object(S, "group_advantages", centred), mock.patch.object(torch.optim, "Adam", adamw):
        yield

# ---- The grids: name -> settings that differ from the defaults, with all values of each ---------------------------------

SEEDS, FIVE, BOTH = [0, 1, 2], [0, 1, 2, 3, 4], ["grpo", "stabledrl"]
OBJECTIVES = ["grpo", "stabledrl", "clip_only", "dual_clip", "per_token", "no_ratio", "wd1"]
SHORT = {"updates": [600], "seed": SEEDS}
PAIR = {"masks": ["coupled"], "copies": [2]}
SUDOKU = {"task": "sudoku", "base_accuracy": 0.6, "prompts": 16, "lr": 3e-5}  # its defaults, but for the masks

def product_of(settings, **others):
    """One value for each of the settings, several for the others."""
    return {name: [value] for name, value in settings.items()} | others

POLICIES = {  # of the main job
    "GRPO, estimate": {"loss": "grpo"}, "GRPO, exact ratio": {"loss": "grpo", "estimator": "exact"},
    "StableDRL, estimate": {"loss": "stabledrl"}}
AIRS = {  # the wind tunnel's noises: name in PRICES -> settings
    "exact": {"estimator": "exact"}, "coupled, K = 2": {"masks": "coupled", "copies": 2}, "K = 8": {"copies": 8},
    "K = 4": {"copies": 4}, "K = 2": {"copies": 2}, "K = 1": {}}
PARTS = {"`no_ratio`, ε = 0": {"loss": "no_ratio"}}
PARTS |= {f"StableDRL, ε = {eps:,g}": {"loss": "stabledrl", "clip_eps": eps} for eps in (0.2, 1.0, 5.0, 100.0, 1000.0)}
PARTS |= {"`norm_only`, ε = ∞": {"loss": "norm_only"}, "`clip_only`, ε = 5, divided by G": {"loss": "clip_only"},
          "dual clip": {"loss": "dual_clip"}, "GRPO": {"loss": "grpo"}}

def wind_tunnel(mu):
    """Every objective at every noise."""
    products = []
    for air in AIRS.values():
        common = product_of(air, mu=[mu], **SHORT)
        products += [{"loss": OBJECTIVES, **common}, {"loss": ["stabledrl"], "clip_eps": [1.0], **common}]
    return products

GRIDS = {  # a grid is a list of products
    "main": [product_of(policy, seed=FIVE) for policy in POLICIES.values()],
    "blocks": [{"block_size": [1, 2], "loss": BOTH, "updates": [600], "seed": FIVE}],
    "lr": [{"loss": BOTH, "lr": [5e-5, 1e-4, 2e-4, 4e-4], **SHORT}],
    "tunnel": wind_tunnel(2),
    "ratio": [
        {"loss": BOTH, "estimator": ["trajectory", "mean_field", "exact_elbo"], **SHORT},
        {"loss": BOTH, "shared_masks": [1], **SHORT},
        {"loss": BOTH, "shared_masks": [1], **PAIR, **SHORT}],
    "blocks_sudoku": [product_of(SUDOKU, loss=BOTH, block_size=[1, 2, 4], **SHORT)],
    "reuse": wind_tunnel(8),
    "spikes": [{"loss": [f"spiked_{name}" for name in SPIKED], "shared_masks": [1], **SHORT}],
    "unclipped": [{"loss": BOTH, "max_grad_norm": [1e9], **SHORT}],
    "long": [product_of(policy, updates=[2400], seed=SEEDS) for policy in POLICIES.values()],
    "one_sided": [{"loss": [*ONE_SIDED], "estimator": ["elbo", "exact"], **SHORT}],
    "release": [{"loss": ["stabledrl"], "estimator": ["mean_over_masked"], "clip_eps": [4.0], "copies": [2],
                 "max_grad_norm": [0.2], "mu": [2, 8], **SHORT}],
    "parts": [product_of(part, mu=[2, 8], updates=[600], seed=FIVE) for part in PARTS.values()],
    "epsilon_4": [{"mu": [2, 8], "loss": ["stabledrl"], "clip_eps": [4.0], **SHORT}],
    "tasks": [product_of(S.TASKS[name].defaults, task=[name], loss=BOTH, **SHORT) for name in ("chain", "countdown")],
    "trust": [{"loss": BOTH, "clip_eps": [0.2, 5.0], "lr": [1e-4, 2e-4, 4e-4], "mu": [2, 8], **PAIR, **SHORT}],
}

def configs_of(grid):
    """All runs of a grid, each once, seeds outermost: so that whatever is stopped early is whole for its first seeds."""
    found = {}
    for product in GRIDS[grid]:
        for values in itertools.product(*product.values()):
            config = S.Config(**dict(zip(product, values)), out=OUT, resume=1)
            found[S.run_name(config)] = config
    return sorted(found.values(), key=lambda config: config.seed)

# ---- Kept lines -----------------------------------------------------------------------------------------------------------

COLUMNS = "accuracy reward spread noise_std drift grad_norm ratio_max ess clip_fraction".split()

def kept(grid):
    """The kept lines of a grid: run's name -> dict."""
    path = HERE / f"{grid}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["run"]: line for line in map(json.loads, lines)}

def everything_kept():
    return {name: line for grid in GRIDS for name, line in kept(grid).items()}

def short(value):
    return float(f"{value:.4g}")

def line_of(config, base):
    """One kept line: settings that say what ran, the base's reward, and all columns of the log; None if not finished. A
    run that ended with a number that is not finite is kept with the lines that it had."""
    path = S.run_folder(config) / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    failed = path.with_name("failed").exists()
    if len(rows) * config.log_every < config.updates and not failed:
        return None
    line = {"run": S.run_name(config), "task": config.task, "loss": config.loss, "estimator": config.estimator}
    line |= {name: getattr(config, name) for name in "masks shared_masks copies block_size clip_eps lr mu".split()}
    line |= {"updates": config.updates, "seed": config.seed, "failed": failed, "base": base}
    return line | {name: [short(row[name]) for row in rows if name in row] for name in COLUMNS}

def base_reward(config):
    """Mean reward of 2,000 training prompts, answered as in RL by the base policy: kept in bases.json."""
    path = HERE / "bases.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    name = "-".join(f"{n}={getattr(config, n)}" for n in "task seed block_size d_model base_accuracy".split())
    if name not in values:
        task, model = S.TASKS[config.task], S.new_model(config, S.base_policy(config))
        texts, _ = task.sample(np.random.default_rng(1), 2_000, "train")
        _, rewards = S.answer(model, task, texts, config.block_size, generator=S.stream(config, "base"))
        values[name] = {"reward": short(rewards.mean().item()), "accuracy": S.accuracy(model, task, config.block_size)}
        path.write_text(json.dumps(values, indent=0) + "\n")
    return values[name]["reward"]

def keep():
    """Finished runs into the kept lines, each into those of the first grid that has it."""
    elsewhere = set()
    for grid in GRIDS:
        lines = {name: line for name, line in kept(grid).items() if name not in elsewhere}
        for config in configs_of(grid):
            name = S.run_name(config)
            if name not in lines and name not in elsewhere and S.run_folder(config).exists():
                line = line_of(config, base_reward(config))
                lines |= {name: line} if line else {}
        elsewhere |= lines.keys()
        if lines:
            order = [S.run_name(config) for config in configs_of(grid) if S.run_name(config) in lines]
            (HERE / f"{grid}.jsonl").write_text("".join(json.dumps(lines[name]) + "\n" for name in order))

def measure(grids):
    """Run what is neither kept nor finished."""
    for grid in grids:
        known = everything_kept()
        missing = [config for config in configs_of(grid) if S.run_name(config) not in known and not line_of(config, 0)]
        print(f"{grid}: {len(missing)} runs", flush=True)
        for config in missing:
            S.base_policy(config)
        with release() if grid == "release" else contextlib.nullcontext():
            finished = S.attempt_all(missing) if missing else []
        for config, done in zip(missing, finished):
            if not done:
                S.run_folder(config).mkdir(exist_ok=True)
                (S.run_folder(config) / "failed").touch()

# ---- Who moves the policy at the first update --------------------------------------------------------------------------------

def measure_shares():
    """At the first update of ten batches of each of five base policies (ρ = 1, settings of the main job): the share of the
    bad answers, and of the heaviest single answer, in Σ |weight·A|, by loss, into shares.json."""
    found = {loss: {"bad answers": [], "heaviest answer": []} for loss in BOTH}
    for seed in FIVE:
        config = S.Config(seed=seed, out=OUT, resume=1)
        task, B, G = S.TASKS[config.task], config.block_size, config.group_size
        model = S.new_model(config, S.base_policy(config))
        for number in range(10):
            texts, _ = task.sample(np.random.default_rng([3, seed, number]), config.prompts, "train")
            stream = S.stream(config, f"shares {number}")
            batch, rewards = S.answer(model, task, texts, B, samples=G, generator=stream)
            advantages = S.group_advantages(rewards, G)
            new, old = (S.sample_masks(len(rewards), config.copies, task.completion_len, B, stream) for _ in range(2))
            with torch.no_grad():
                log_ratio = S.elbo(model, masks=new, **batch) - S.elbo(model, masks=old, **batch)
            for loss, values in found.items():
                leaf = log_ratio.clone().requires_grad_()
                function, eps = S.LOSSES[loss]
                function(leaf, advantages, eps, G).backward()  # leaf.grad: −weight·A / divisor
                share = leaf.grad.abs() / leaf.grad.abs().sum()
                values["bad answers"].append(short(share[advantages < 0].sum().item()))
                values["heaviest answer"].append(short(share.max().item()))
    (HERE / "shares.json").write_text(json.dumps(found) + "\n")

# ---- Price list of estimators ---------------------------------------------------------------------------------------------

PRICES = {  # name -> estimator, how masks are drawn, copies, shared or not
    "K = 1": ("elbo", "independent", 1, False), "K = 2": ("elbo", "independent", 2, False),
    "K = 4": ("elbo", "independent", 4, False), "K = 8": ("elbo", "independent", 8, False),
    "coupled, K = 2": ("elbo", "coupled", 2, False), "coupled, K = 4": ("elbo", "coupled", 4, False),
    "shared, K = 1": ("elbo", "independent", 1, True), "coupled and shared, K = 2": ("elbo", "coupled", 2, True),
    "per token, K = 1": ("elbo", "independent", 1, False), "mean field": ("mean_field", "independent", 1, False),
    "trajectory": ("trajectory", "independent", 1, False), "exact ELBO": ("exact_elbo", "independent", 1, False),
    "exact": ("exact", "independent", 1, False)}
LATER = {"loss": "grpo", "estimator": "exact", "mu": 8, "updates": 8, "log_every": 8}  # the policy that is compared
PRICE_SETTINGS = {"addition": {}, "sudoku": SUDOKU}

@torch.no_grad()
def price(name, base, later, truth_base, truth_later, batch, masking):
    """-> tokens read per completion, and three standard deviations in nats, over the completions of the base policy: of
    log ρ̂ where nothing has been trained; of log ρ̂ − log ρ between base and later policy; of L̂ − log π."""
    kind, masks, copies, shared = PRICES[name]
    (N, L), B = batch["completions"].shape, batch["block_size"]
    draw = lambda: S.MASKS[masks](N, copies, L, B, masking)
    estimate = lambda model, masks: S.ESTIMATORS[kind](model, masks=masks, **batch)
    old_masks = draw()
    old, masks = estimate(base, old_masks), old_masks if shared else draw()
    unit = L if name.startswith("per token") else 1
    copies = {"mean_field": 1, "trajectory": B, "exact_elbo": 2**B - 1, "exact": 2**B - 1}.get(kind, copies)
    noises = {
        "same": estimate(base, masks) - old,
        "later": estimate(later, masks) - old - (truth_later - truth_base),
        "estimate": old - truth_base}
    return {"tokens": L * (1 + copies)} | {k: short((v / unit).std(correction=0).item()) for k, v in noises.items()}

def measure_prices():
    """All prices on addition with B = 2 and sudoku with B = 4, three seeds, 1,000 completions each, into prices.json."""
    found = {}
    for task_name, settings in PRICE_SETTINGS.items():
        for seed in SEEDS:
            config = S.Config(**settings, **LATER, seed=seed, out=OUT, resume=1)
            task, weights = S.TASKS[config.task], S.base_policy(config)
            base, (later, _) = S.new_model(config, weights), S.train(config, weights)
            texts, _ = task.sample(np.random.default_rng(2), 1_000, "train")
            batch, _ = S.answer(base, task, texts, config.block_size, generator=S.stream(config, "prices"))
            with torch.no_grad():
                truths = [S.exact_log_likelihood(model, **batch) for model in (base, later)]
            for name in PRICES:
                values = price(name, base, later, *truths, batch, S.stream(config, f"prices {name}"))
                row = found.setdefault(task_name, {}).setdefault(name, {"tokens": values.pop("tokens")})
                for key, value in values.items():
                    row.setdefault(key, []).append(value)
    (HERE / "prices.json").write_text(json.dumps(found, indent=1) + "\n")

# ---- Tables -----------------------------------------------------------------------------------------------------------------

class Kept:
    """All kept lines, by the settings of a run."""
    def __init__(self):
        self.lines = everything_kept()

    def of(self, seeds=SEEDS, **settings):
        """The kept lines with these settings, defaults otherwise, seed by seed."""
        names = (S.run_name(S.Config(**settings, seed=seed)) for seed in seeds)
        return [self.lines[name] for name in names if name in self.lines]

    def times(self, seeds=SEEDS, **settings):
        """The last reward over that of the base, seed by seed."""
        return [times(line) for line in self.of(seeds, **settings)]

    def cell(self, seeds=SEEDS, **settings):
        """As a cell of a table."""
        lines = self.of(seeds, **settings)
        return spread_of([times(line) for line in lines]) + " †" * any(line["failed"] for line in lines)

def times(line):
    """The last reward over that of the base; 0 for a run that ended with a number that is not finite."""
    return 0.0 if line["failed"] else line["reward"][-1] / line["base"]

def spread_of(values, form="{:.2f}"):
    """mean ± standard deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {form.format(deviation)}"

def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

RATIO_ROWS = {
    "one copy, independent masks (the main job)": {},
    "`--copies 2`": {"copies": 2}, "`--copies 4`": {"copies": 4}, "`--copies 8`": {"copies": 8},
    "`--masks coupled --copies 2`": {"masks": "coupled", "copies": 2},
    "`--shared_masks`": {"shared_masks": 1},
    "`--shared_masks --masks coupled --copies 2`": {"shared_masks": 1, "masks": "coupled", "copies": 2},
    "`--estimator trajectory`": {"estimator": "trajectory"}, "`--estimator mean_field`": {"estimator": "mean_field"},
    "`--estimator exact_elbo`": {"estimator": "exact_elbo"}, "`--estimator exact`": {"estimator": "exact"}}
TUNNEL = {  # name in tables and figure -> settings
    "GRPO": {"loss": "grpo"}, "StableDRL, ε = 5": {"loss": "stabledrl"},
    "StableDRL, ε = 4": {"loss": "stabledrl", "clip_eps": 4.0}, "StableDRL, ε = 1": {"loss": "stabledrl", "clip_eps": 1.0},
    "CISPO (`clip_only`)": {"loss": "clip_only"}, "dual clip": {"loss": "dual_clip"},
    "GSPO, ESPO (per token)": {"loss": "per_token"}, "no ratio (SPG)": {"loss": "no_ratio"}, "wd1": {"loss": "wd1"}}

def prices():
    return json.loads((HERE / "prices.json").read_text())

def noise_of(name):
    """Noise in nats of an estimator at the base policies of addition."""
    return statistics.mean(prices()["addition"][name]["same"])

def median_of(lines, column):
    return [statistics.median(line[column]) for line in lines if line[column]]

def shares():
    return json.loads((HERE / "shares.json").read_text())

def main_table(runs):
    rows = []
    for name, policy in POLICIES.items():
        lines = runs.of(FIVE, **policy)
        rows.append([
            name, f"**{spread_of([times(line) for line in lines])}**", " / ".join(f"{times(line):.2f}" for line in lines),
            spread_of([line["reward"][-1] for line in lines], "{:.3f}"),
            spread_of([line["accuracy"][-1] for line in lines], "{:.3f}"),
            spread_of(median_of(lines, "noise_std"), "{:.1f}")])
    return table(["policy", "times the base", "each seed", "reward", "accuracy", "noise, nats"], rows)

def length_table(runs):
    rows = []
    for name, policy in POLICIES.items():
        rows.append([name, *(runs.cell(updates=updates, **policy) for updates in (600, 1200, 2400)),
                     runs.cell(updates=600, max_grad_norm=1e9, **policy)])
    return table(["three seeds", "600 updates", "1,200", "2,400", "600, norm not clipped"], rows)

def lr_table(runs):
    rates = [5e-5, 1e-4, 2e-4, 4e-4]
    rows = [[name] + [runs.cell(loss=loss, lr=rate, updates=600) for rate in rates]
            for name, loss in (("GRPO", "grpo"), ("StableDRL", "stabledrl"))]
    return table(["600 updates"] + [f"{rate:.0e}".replace("e-0", "e-") for rate in rates], rows)

BLOCKS = [("addition", B, {"updates": 600, "seeds": FIVE}) for B in (1, 2)]
BLOCKS += [("sudoku", B, {**SUDOKU, "updates": 600}) for B in (1, 2, 4)]

def blocks_table(runs):
    rows = []
    for task, B, settings in BLOCKS:
        grpo, stable = (runs.of(loss=loss, block_size=B, **settings) for loss in BOTH)
        rows.append([
            f"{task}, B = {B}", spread_of([line["base"] for line in grpo], "{:.3f}"),
            spread_of([line["spread"][0] for line in stable], "{:.1f}"),
            " / ".join(f"{line['spread'][-1]:.1f}" if line["spread"] else "–" for line in grpo),
            " / ".join(f"{line['spread'][-1]:.1f}" for line in stable),
            "{:.0e}".format(max((ratio for line in grpo + stable for ratio in line["ratio_max"]), default=0)),
            runs.cell(loss="grpo", block_size=B, **settings), runs.cell(loss="stabledrl", block_size=B, **settings)])
    return table(["", "base reward", "noise, first 40 updates", "noise at the end, GRPO, by seed", "StableDRL, by seed",
                  "largest ρ̂", "GRPO", "StableDRL"], rows)

def loop_table(runs):
    """Does noise grow with drift?"""
    rows = []
    for task, B, settings in BLOCKS:
        for name, loss in (("GRPO", "grpo"), ("StableDRL", "stabledrl")):
            lines = [line for line in runs.of(loss=loss, block_size=B, **settings) if len(line["drift"]) > 2]
            if B > 1 and lines:
                rows.append([
                    f"{task}, B = {B}, {name}", " / ".join(f"{max(line['drift']):.1f}" for line in lines),
                    " / ".join(f"{line['spread'][0]:.1f} → {line['spread'][-1]:.1f}" for line in lines),
                    " / ".join(f"{statistics.correlation(line['drift'], line['spread']):+.2f}" for line in lines)])
    return table(["by seed", "largest drift, nats", "noise, first → last line", "correlation of noise and drift"], rows)

def ratio_table(runs):
    rows = []
    for name, settings in RATIO_ROWS.items():
        lines = runs.of(loss="grpo", updates=600, **settings)
        rows.append([name, spread_of(median_of(lines, "noise_std"), "{:.2f}"),
                     runs.cell(loss="grpo", updates=600, **settings), runs.cell(loss="stabledrl", updates=600, **settings)])
    return table(["how the ratio is estimated", "noise under GRPO, nats", "GRPO", "StableDRL"], rows)

def price_table(runs):
    rows, measured = [], prices()
    for name in PRICES:
        row = [name]
        for task in PRICE_SETTINGS:
            found = measured[task][name]
            row += [str(found["tokens"])] + [f"{statistics.mean(found[key]):.2f}" for key in ("same", "later", "estimate")]
        rows.append(row)
    head = ["tokens read", "noise at θ = θ_old", "after 8 updates", "L̂ − log π"]
    return table([""] + [f"addition, B = 2: {head[0]}"] + head[1:] + [f"sudoku, B = 4: {head[0]}"] + head[1:], rows)

def tunnel_table(mu):
    def made(runs):
        airs = {name: air for name, air in AIRS.items() if runs.of(mu=mu, updates=600, loss="grpo", **air)}
        rows = [[name] + [runs.cell(mu=mu, updates=600, **settings, **air) for air in airs.values()]
                for name, settings in TUNNEL.items()]
        return table([f"μ = {mu}"] + [f"{name}: {noise_of(name):.1f} nats" for name in airs], rows)
    return made

def parts_table(runs):
    rows = []
    for name, settings in PARTS.items():
        row = [name]
        for mu in (2, 8):
            common = {"seeds": FIVE, "mu": mu, "updates": 600}
            stable = runs.times(loss="stabledrl", **common)
            behind = [b - a for a, b in zip(stable, runs.times(**common, **settings))]
            row += [runs.cell(**common, **settings), spread_of(behind, "{:+.2f}").replace("± +", "± ")]
        rows.append(row)
    return table(["", "μ = 2", "against StableDRL, seed by seed", "μ = 8", "against StableDRL, seed by seed"], rows)

def spikes_table(runs):
    row = [runs.cell(loss=f"spiked_{name}", shared_masks=1, updates=600) for name in SPIKED]
    return table(["", *SPIKED], [["times the base", *row]])

def release_table(runs):
    settings = dict(estimator="mean_over_masked", clip_eps=4.0, copies=2, max_grad_norm=0.2, updates=600)
    row = [runs.cell(loss="stabledrl", mu=mu, **settings) for mu in (2, 8)]
    return table(["", "μ = 2", "μ = 8"], [["times the base", *row]])

def tasks_table(runs):
    rows = []
    for product in GRIDS["tasks"]:
        settings = {name: values[0] for name, values in product.items() if name not in ("loss", "seed")}
        lines = runs.of(loss="grpo", **settings)
        rows.append([settings["task"], spread_of([line["base"] for line in lines], "{:.3f}"),
                     spread_of(median_of(lines, "noise_std"), "{:.1f}"), runs.cell(loss="grpo", **settings),
                     runs.cell(loss="stabledrl", **settings)])
    return table(["600 updates", "base reward", "noise under GRPO, nats", "GRPO", "StableDRL"], rows)

def trust_table(runs):
    rows = []
    for name, loss in (("GRPO", "grpo"), ("StableDRL", "stabledrl")):
        for eps in (0.2, 5.0):
            common = dict(loss=loss, clip_eps=eps, masks="coupled", copies=2, updates=600)
            rows.append([f"{name}, ε = {eps:g}"] + [
                runs.cell(mu=mu, lr=lr, **common) for mu in (2, 8) for lr in (1e-4, 2e-4, 4e-4)])
    head = [f"μ = {mu}, {lr:g}" for mu in (2, 8) for lr in (1e-4, 2e-4, 4e-4)]
    return table(["one coupled pair", *head], rows)

def one_sided_table(runs):
    rows = []
    names = {"one_bad": "one bad answer, pushed down", "all_bad": "all bad answers, pushed down",
             "one_good": "one good answer, pushed up", "all_good": "all good answers, pushed up"}
    for loss, name in names.items():
        row = [name]
        for estimator in ("elbo", "exact"):
            settings = dict(loss=loss, estimator=estimator, updates=600)
            row += [runs.cell(**settings), spread_of([line["drift"][-1] for line in runs.of(**settings)], "{:.1f}")]
        rows.append(row)
    head = ["what a step learns from", "estimate: times the base", "drift, nats", "exact: times the base", "drift, nats"]
    return table(head, rows)

def shares_table(runs):
    rows, found = [], shares()
    for name, loss in (("GRPO", "grpo"), ("StableDRL", "stabledrl")):
        cells = [" / ".join(f"{quartile:.2f}" for quartile in statistics.quantiles(values)) for values in found[loss].values()]
        rows.append([name, *cells])
    return table(["quartiles over 50 batches", "share of all bad answers", "share of the heaviest answer"], rows)

TABLES = {
    "main": main_table, "length": length_table, "lr": lr_table, "blocks": blocks_table, "loop": loop_table, "ratio": ratio_table,
    "prices": price_table, "tunnel 2": tunnel_table(2), "tunnel 8": tunnel_table(8), "parts": parts_table,
    "spikes": spikes_table, "release": release_table, "tasks": tasks_table, "trust": trust_table,
    "shares": shares_table, "one_sided": one_sided_table}

def page_with_tables(page):
    """The page's text with every table between its markers made anew from the kept lines."""
    runs = Kept()
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin in page:
            before, rest = page.split(begin, 1)
            page = before + begin + make(runs) + end + rest.split(end, 1)[1]
    return page

# ---- Figures ----------------------------------------------------------------------------------------------------------------

FIGURES = HERE.parent / "figures"
COLOURS = {"grpo": "tab:red", "stabledrl": "tab:blue"}

def band(axis, x, series, label, alpha=0.15, **style):
    """Mean over seeds as a line, one standard deviation to either side as a band."""
    middle = [statistics.mean(values) for values in series]
    half = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in series]
    (line,) = axis.plot(x, middle, label=label, **style)
    lower, upper = [m - h for m, h in zip(middle, half)], [m + h for m, h in zip(middle, half)]
    axis.fill_between(x, lower, upper, color=line.get_color(), alpha=alpha, linewidth=0)

def draw_shares(axis):
    """Bars: who has the weight of a first step, median over batches."""
    found = shares()
    for i, loss in enumerate(BOTH):
        medians = [100 * statistics.median(values) for values in found[loss].values()]
        bars = axis.bar([0.2 + 0.4 * i, 1.2 + 0.4 * i], medians, 0.4, color=COLOURS[loss])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set(title="B = 2: % of a step's weight", xticks=[0.4, 1.4], ylim=(0, 120))
    axis.set_xticklabels(["all bad\nanswers", "heaviest\nanswer"])

def draw_blocks(plt, runs):
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
    for row, task in zip(axes, PRICE_SETTINGS):
        noises = {loss: [] for loss in BOTH}
        for axis, B in zip(row, (1, 2, 4)):
            settings = dict(PRICE_SETTINGS[task], updates=600, block_size=B, seeds=FIVE)
            if task == "addition" and B == 4:  # no blocks of 4, as prompts have 6 tokens
                draw_shares(axis)
                continue
            for loss in BOTH:
                lines = runs.of(loss=loss, **settings)
                if lines:
                    updates = range(40, 601, 40)
                    rewards = [[(line["reward"] + [0.0] * 15)[i] for line in lines] for i in range(15)]
                    band(axis, updates, rewards, {"grpo": "GRPO", "stabledrl": "StableDRL"}[loss], color=COLOURS[loss])
                    noises[loss].append((B, statistics.mean(line["spread"][-1] for line in lines if line["spread"])))
                    base = statistics.mean(line["base"] for line in lines)
            axis.axhline(base, color="grey", linestyle=":", label="base policy, before RL")
            axis.set(title=f"{task}, B = {B}" + " (a GPT)" * (B == 1), xlabel="update (μ = 2 per batch)", ylim=(0, None))
        for loss in BOTH:
            row[3].plot(*zip(*noises[loss]), "o-", color=COLOURS[loss])
        row[3].set(title="noise at the end, nats", xlabel="B", xticks=[1, 2, 4], ylim=(-0.2, None))
        row[0].set_ylabel("reward, mean of seeds ± std")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(FIGURES / "blocks.svg")

def draw_tunnel(plt, runs):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharey=True)
    x_of = {name: noise_of(name) for name in AIRS}
    styles = dict(zip(TUNNEL, ["o-", "s-", "s--", "P-", "^-", "D-", "v-", "x--", "+--"]))
    colours = dict(zip(TUNNEL, ["tab:red", "tab:blue", "tab:blue", "tab:purple", "tab:cyan", "tab:green", "tab:orange",
                                "black", "grey"]))
    shown = {"GRPO": "GRPO (± std)", "StableDRL, ε = 5": "StableDRL, ε = 5 (± std)"}
    for axis, mu in zip(axes, (2, 8)):
        for name, settings in TUNNEL.items():
            if name != "StableDRL, ε = 4":  # lies on ε = 5
                points = {air: runs.times(mu=mu, updates=600, **settings, **AIRS[air]) for air in AIRS}
                points = {x_of[air]: values for air, values in points.items() if values}
                alpha = 0.15 if name in shown else 0  # the bands of the others lie on each other
                label = shown.get(name, name.replace("`", ""))
                band(axis, list(points), list(points.values()), label, alpha, color=colours[name],
                     marker=styles[name][0], linestyle=styles[name][1:], markersize=5)
        axis.axhline(1, color="grey", linestyle=":", linewidth=1)
        axis.annotate("the base policy, before RL", (0.02, 1.02), fontsize=8, color="grey")
        axis.set(title=f"μ = {mu} updates per batch, {600 // mu} batches", ylim=(0, None))
        axis.set_xlabel("noise of log ρ̂ in nats, and the estimate that has it")
        axis.set_xticks(list(x_of.values()), [f"{x:.1f}\n{name.replace('coupled, K = 2', 'pair')}" for name, x in x_of.items()])
    axes[0].set_ylabel("reward after 600 updates, times the base")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(FIGURES / "tunnel.svg")

def draw_prices(plt, runs):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for axis, (task, title) in zip(axes, (("addition", "addition, B = 2"), ("sudoku", "sudoku, B = 4"))):
        for name, found in prices()[task].items():
            x, y = found["tokens"], max(statistics.mean(found["later"]), 0.01)  # the exact ratio: at the lower edge
            axis.plot(x, y, "o", color="tab:red" if name == "trajectory" else "tab:blue")
            down = {"coupled, K = 2": 10, "coupled, K = 4": 9, "shared, K = 1": 9, "mean field": 12}.get(name, 2)
            axis.annotate(name, (x, y), xytext=(5, -down), textcoords="offset points", fontsize=8)
        ticks = sorted({found["tokens"] for found in prices()[task].values()})
        axis.set(title=title, xlabel="tokens read per completion", xscale="log", yscale="log")
        axis.set(xlim=(ticks[0] * 0.9, ticks[-1] * 1.9), ylim=(0.008, 12))
        axis.set_xticks(ticks, ticks)
        axis.set_yticks([0.01, 0.1, 1, 10], ["0", "0.1", "1", "10"])
        axis.minorticks_off()
    axes[0].set_ylabel("noise of log ρ̂ after 8 updates, nats")
    figure.savefig(FIGURES / "prices.svg")

def draw():
    """All figures, from the kept lines."""
    import matplotlib
    matplotlib.rcParams |= {"svg.hashsalt": "stabledrl", "font.size": 9}
    import matplotlib.pyplot as plt
    for make in (draw_blocks, draw_tunnel, draw_prices):
        make(plt, Kept())

def main(arguments):
    register()
    if arguments != ["--page"]:
        measure(arguments or GRIDS)
        if not (HERE / "prices.json").exists():
            measure_prices()
        if not (HERE / "shares.json").exists():
            measure_shares()
    keep()
    page = HERE / "README.md"
    page.write_text(page_with_tables(page.read_text()))
    draw()

if __name__ == "__main__":
    main(sys.argv[1:])
