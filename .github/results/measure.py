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

S.LOSSES |= {"dual_clip": (dual_clip, 5.0), "per_token": (per_token, 0.2), "wd1": (wd1, 0.0)}

def spiked(loss):
    """The paper's stress test: a twentieth of the ratios, drawn by lot, is multiplied by 1e5."""
    def with_spikes(log_ratio, advantages, clip_eps, group_size):
        hit = torch.rand_like(log_ratio) < 0.05
        return loss(log_ratio + hit * math.log(1e5), advantages, clip_eps, group_size)
    return with_spikes

for name in ("grpo", "stabledrl", "clip_only", "norm_only", "no_ratio"):
    S.LOSSES[f"spiked_{name}"] = (spiked(S.LOSSES[name][0]), S.LOSSES[name][1])

def mean_over_masked(model, prompts, completions, masks, block_size, **unused):
    """Likelihood as in StableDRL's release, on all blocks: the mean of log p over the masked tokens. No bound."""
    log_p = S.token_log_probs(model, prompts, completions, masks, block_size)  # (N, K, L)
    return ((masks * log_p).sum(-1) / masks.sum(-1)).mean(-1)

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
SUDOKU = {"task": ["sudoku"], "base_accuracy": [0.6], "prompts": [16], "lr": [3e-5], "loss": BOTH}
RATIOS = [{}, PAIR, {"estimator": ["exact"]}, {"copies": [2]}, {"copies": [4]}]  # from 1.8 nats of noise to none

def wind_tunnel(mu):
    """Every objective at every noise."""
    common = {"mu": [mu], **SHORT}
    return [
        product
        for ratio in RATIOS
        for product in (
            {"loss": OBJECTIVES, **ratio, **common}, {"loss": ["stabledrl"], "clip_eps": [1.0], **ratio, **common})]

GRIDS = {  # a grid is a list of products
    "main": [
        {"loss": ["grpo"], "estimator": ["elbo", "exact"], "seed": FIVE},
        {"loss": ["stabledrl"], "seed": FIVE}],
    "blocks": [{"block_size": [1, 2], "loss": BOTH, "updates": [600], "seed": FIVE}],
    "lr": [{"loss": BOTH, "lr": [5e-5, 1e-4, 2e-4, 4e-4], **SHORT}],
    "tunnel": wind_tunnel(2),
    "ratio": [
        {"loss": BOTH, "estimator": ["trajectory", "mean_field", "exact_elbo"], **SHORT},
        {"loss": BOTH, "shared_masks": [1], **SHORT},
        {"loss": BOTH, "shared_masks": [1], **PAIR, **SHORT}],
    "blocks_sudoku": [{**SUDOKU, "block_size": [1, 2, 4], **SHORT}],
    "reuse": wind_tunnel(8),
    "parts": [
        {"loss": ["grpo", "stabledrl", "clip_only", "norm_only", "no_ratio", "dual_clip"], "mu": [2, 8],
         "updates": [600], "seed": FIVE},
        {"loss": ["stabledrl"], "clip_eps": [0.2, 1.0, 100.0, 1000.0], "mu": [2, 8], "updates": [600], "seed": FIVE}],
    "spikes": [{"loss": [f"spiked_{name}" for name in ("grpo", "stabledrl", "clip_only", "norm_only", "no_ratio")],
                "shared_masks": [1], **SHORT}],
    "release": [{"loss": ["stabledrl"], "estimator": ["mean_over_masked"], "clip_eps": [4.0], "copies": [2],
                 "max_grad_norm": [0.2], "mu": [2, 8], **SHORT}],
    "eight_copies": [
        {"mu": [2, 8], "loss": OBJECTIVES, "copies": [8], **SHORT},
        {"mu": [2, 8], "loss": ["stabledrl"], "clip_eps": [1.0], "copies": [8], **SHORT}],
    "epsilon_4": [
        {"mu": [2, 8], "loss": ["stabledrl"], "clip_eps": [4.0], **ratio, **SHORT} for ratio in RATIOS],
    "tasks": [
        {"task": ["chain"], "base_accuracy": [0.6], "lr": [3e-5], "loss": BOTH, **PAIR, **SHORT},
        {"task": ["countdown"], "base_accuracy": [0.2], "d_model": [96], "prompts": [16], "lr": [3e-5], "loss": BOTH,
         **PAIR, **SHORT}],
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
    if not path.exists():
        return None
    settings, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = path.with_name("failed").exists()
    if len(rows) * config.log_every < config.updates and not failed:
        return None
    line = {"run": S.run_name(config), "task": config.task, "loss": config.loss, "estimator": config.estimator}
    line |= {name: getattr(config, name) for name in "masks shared_masks copies block_size clip_eps lr mu".split()}
    line |= {"updates": config.updates, "seed": config.seed, "failed": failed, "base": base}
    return line | {name: [short(row[name]) for row in rows if name in row] for name in COLUMNS}

def base_reward(config, known={}):
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
    """Finished runs into the kept lines."""
    for grid in GRIDS:
        lines = kept(grid)
        for config in configs_of(grid):
            name = S.run_name(config)
            if name not in lines and (S.run_folder(config) / "log.jsonl").exists():
                line = line_of(config, base_reward(config))
                lines |= {name: line} if line else {}
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
        with contextlib.ExitStack() as conventions:
            if grid == "release":
                conventions.enter_context(release())
            finished = S.attempt_all(missing) if missing else []
        for config, done in zip(missing, finished):
            if not done:
                S.run_folder(config).mkdir(exist_ok=True)
                (S.run_folder(config) / "failed").touch()

def main(arguments):
    if arguments != ["--page"]:
        measure(arguments or GRIDS)
    keep()

if __name__ == "__main__":
    main(sys.argv[1:])
