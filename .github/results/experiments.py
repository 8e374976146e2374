"""The experiments of the results page: what is compared, how it is run, and how it is kept.

An experiment is rows × columns × seeds. A row and a column are flags of stabledrl.py. From the
experiment come its runs, the command on the page, and the table. A finished run is one line of
runs.jsonl: its name, which says its settings; reward and accuracy of its base policy; and the
columns of its log. A run of 600 updates is the beginning of a run of 1,200, so only the longest is
kept. No kept run is made again: to measure it anew, delete its line.
"""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import stabledrl as S

# ==== Objectives of other papers, registered as a fork would do it ================================
# log_ratio (N,) and advantages (N,) -> scalar. ε is what each paper or its code uses.

def dual_clip(log_ratio, advantages, clip_eps, group_size):
    """Dual-clip PPO (Ye et al., arXiv 1912.09729): GRPO, but never below c·A where A < 0. Here c
    is 1 + clip_eps."""
    ratio = S.safe_exp(log_ratio)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    bounded = surrogate.maximum((1 + clip_eps) * advantages)
    return -torch.where(advantages < 0, bounded, surrogate).mean()

def per_token(log_ratio, advantages, clip_eps, group_size):
    """GSPO (Zheng et al., arXiv 2507.18071) and ESPO (arXiv 2512.03759): GRPO on ρ̂^(1/L). L is 4
    on addition."""
    return S.grpo_loss(log_ratio / 4, advantages, clip_eps)

def wd1(log_ratio, advantages, clip_eps, group_size):
    """wd1 (Tang et al., arXiv 2507.08838), with ψ = 1. No ratio: Σ (softmax(−A) −
    softmax(A))·log p over each group."""
    groups = advantages.view(-1, group_size)
    weights = (-groups).softmax(-1) - groups.softmax(-1)
    return (weights.flatten() * log_ratio).view(-1, group_size).sum(-1).mean()

def sapo(log_ratio, advantages, clip_eps, group_size):
    """SAPO (arXiv 2511.20347), per answer: a soft gate in place of the clip. The weight of A·g is
    4·s·(1−s)·ρ̂ with s = sigmoid(τ(ρ̂ − 1)): 1 at ρ̂ = 1, and 0 at both ends."""
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

def masked(log_ratio, advantages, clip_eps, group_size):
    """Masked importance sampling: the weight of A·g is ρ̂ between 1/(1+ε) and 1+ε, and 0 outside."""
    inside = log_ratio.detach().abs() <= math.log(1 + clip_eps)
    weights = torch.where(inside, S.safe_exp(log_ratio.detach()), 0)
    return -(weights * advantages * log_ratio).mean()

def spiked(loss):
    """The paper's stress test: a twentieth of the ratios, chosen at random, times 1e5."""
    def with_spikes(log_ratio, advantages, clip_eps, group_size):
        hit = torch.rand_like(log_ratio) < 0.05
        return loss(log_ratio + hit * math.log(1e5), advantages, clip_eps, group_size)
    return with_spikes

def one_sided(sign, single):
    """Policy gradient without a ratio, from the good answers only (sign 1) or the bad ones (−1):
    from one of them, chosen at random, or from all, weighted by |A|."""
    def loss(log_ratio, advantages, clip_eps, group_size):
        weights = (sign * advantages).clamp(min=0)
        if single and weights.any():
            chosen = (weights > 0).float().multinomial(1)
            weights = torch.zeros_like(weights).index_fill(0, chosen, 1.0)
        return -sign * (weights * log_ratio).sum() / weights.sum().clamp(min=1e-6)
    return loss

def mean_over_masked(model, prompts, completions, block_size, masks, steps=None):
    """Likelihood as in StableDRL's release, on all blocks: the mean of log p over the masked
    tokens. It is not a bound."""
    log_p = S.token_log_probs(model, prompts, completions, masks, block_size)  # (N, K, L)
    return ((masks * log_p).sum(-1) / masks.sum(-1)).mean(-1)

IN_THE_FILE = (*S.LOSSES, *S.ESTIMATORS)
SPIKED = ("grpo", "norm_only", "clip_only", "stabledrl", "no_ratio")

def register():
    """Make all of these known to stabledrl.py. It is called before an experiment is looked at."""
    for name in SPIKED:
        loss, eps = S.LOSSES[name]
        S.LOSSES[f"spiked_{name}"] = (spiked(loss), eps)
    S.LOSSES["dual_clip"] = (dual_clip, 5.0)
    S.LOSSES["per_token"] = (per_token, 0.2)
    S.LOSSES["wd1"] = (wd1, 0.0)
    S.LOSSES["sapo"] = (sapo, 0.0)
    S.LOSSES["vespo"] = (vespo, 0.0)
    S.LOSSES["masked"] = (masked, 5.0)
    S.LOSSES["one_bad"] = (one_sided(-1, single=True), 0.0)
    S.LOSSES["all_bad"] = (one_sided(-1, single=False), 0.0)
    S.LOSSES["one_good"] = (one_sided(1, single=True), 0.0)
    S.LOSSES["all_good"] = (one_sided(1, single=False), 0.0)
    S.ESTIMATORS["mean_over_masked"] = mean_over_masked

# ==== The experiments =============================================================================
# Label in tables and figures -> flags.

BOTH = {"GRPO": "--loss grpo", "StableDRL": "--loss stabledrl"}
LENGTHS = {f"{n:,} updates": f"--updates {n}" for n in (600, 1200, 2400)}
TWO_AND_EIGHT = {"μ = 2": "--mu 2", "μ = 8": "--mu 8"}
PAIR = "--masks coupled --copies 2"
SUDOKU = "--task sudoku --base_accuracy 0.6 --prompts 16 --lr 3e-5"

POLICIES = {  # the main job
    "GRPO, estimated ratio": "--loss grpo",
    "GRPO, exact ratio": "--loss grpo --estimator exact",
    "StableDRL, estimated ratio": "--loss stabledrl",
}
OBJECTIVES = {
    "GRPO": "--loss grpo",
    "StableDRL, ε = 5": "--loss stabledrl",
    "StableDRL, ε = 1": "--loss stabledrl --clip_eps 1",
    "CISPO, ε = 5": "--loss clip_only",
    "dual clip": "--loss dual_clip",
    "ρ̂^(1/L) (GSPO, ESPO)": "--loss per_token",
    "no ratio (SPG)": "--loss no_ratio",
    "wd1": "--loss wd1",
    "CISPO, ε = 1": "--loss clip_only --clip_eps 1",
    "masked ratio": "--loss masked",
    "SAPO": "--loss sapo",
    "VESPO": "--loss vespo",
    "good answers only": "--loss all_good",
}
NOISES = {  # ways to estimate the ratio, the least noise first; prices.json has the same names
    "exact": "--estimator exact",
    "coupled, K = 2": PAIR,
    "K = 8": "--copies 8",
    "K = 4": "--copies 4",
    "K = 2": "--copies 2",
    "K = 1": "--copies 1",
}
RATIOS = (
    "--copies 1", "--copies 2", "--copies 4", "--copies 8", PAIR, "--shared_masks",
    f"--shared_masks {PAIR}", "--estimator trajectory", "--estimator mean_field",
    "--estimator exact_elbo", "--estimator exact")
PARTS = {
    "`no_ratio`, which is ε = 0": "--loss no_ratio",
    "StableDRL, ε = 0.2": "--loss stabledrl --clip_eps 0.2",
    "StableDRL, ε = 1": "--loss stabledrl --clip_eps 1",
    "StableDRL, ε = 5": "--loss stabledrl",
    "StableDRL, ε = 100": "--loss stabledrl --clip_eps 100",
    "StableDRL, ε = 1,000": "--loss stabledrl --clip_eps 1000",
    "`norm_only`, which is ε = ∞": "--loss norm_only",
    "`clip_only`, ε = 5, divided by G": "--loss clip_only",
    "dual clip": "--loss dual_clip",
    "GRPO": "--loss grpo",
}

BEST = {  # at 2 nats and μ = 2, and StableDRL as in the paper
    row: OBJECTIVES[row] for row in (
        "StableDRL, ε = 5", "StableDRL, ε = 1", "no ratio (SPG)", "SAPO", "VESPO",
        "good answers only")}
RATES = ("1e-4", "3e-5", "1e-5")
SMALL = "--d_model 128 --n_layer 4 --lr 3e-5"  # 0.8 M parameters
SIZES = {f"0.1 M, {rate}": f"--lr {rate}" for rate in RATES}
GPU = "--device cuda --n_head 8"
SIZES |= {f"3.2 M, {rate}": f"{GPU} --d_model 256 --n_layer 4 --lr {rate}" for rate in RATES}
SIZES["25 M, 1e-5"] = f"{GPU} --d_model 512 --n_layer 8 --base_lr 1e-4 --lr 1e-5"

@dataclasses.dataclass
class Experiment:
    """Every row with every column, on every seed. The flags of `common` hold for all."""
    rows: dict
    columns: dict
    common: str = "--updates 600"
    seeds: str = "0 1 2"

    def cell(self, row, column):
        """The configs of one cell, seed by seed."""
        flags = f"{self.common} {self.rows[row]} {self.columns[column]} --seed {self.seeds}"
        return S.parse(flags.split())[0]

    def command(self, name):
        """The command that makes all runs: of stabledrl.py, if its flags can say it in one call."""
        cells = [self.common, *self.rows.values(), *self.columns.values(), f"--seed {self.seeds}"]
        values = {}
        for words in " ".join(cells).split("--")[1:]:
            flag, *given = words.split()
            values.setdefault(flag, {}).update(dict.fromkeys(given))
        line = " ".join(" ".join([f"--{flag}", *given]) for flag, given in values.items())
        same = {S.run_name(config) for config in S.parse(line.split())[0]} == runs_of([self]).keys()
        used = {*values["loss"], *values.get("estimator", ())}
        if same and used <= set(IN_THE_FILE):
            return f"python stabledrl.py {line}"
        return f"python .github/results/measure.py {name}"

FIVE = "0 1 2 3 4"
EXPERIMENTS = {
    "main": Experiment(POLICIES, {"": ""}, "--updates 1200", FIVE),
    "length": Experiment(POLICIES, LENGTHS),
    "norm": Experiment(BOTH, {"clipped to 1": "", "not clipped": "--max_grad_norm 1e9"}),
    "lr": Experiment(BOTH, {rate: f"--lr {rate}" for rate in ("5e-5", "1e-4", "2e-4", "4e-4")}),
    "blocks_addition": Experiment({
        f"addition, B = {B}": f"--block_size {B}" for B in (1, 2)}, BOTH, seeds=FIVE),
    "blocks_sudoku": Experiment({
        f"sudoku, B = {B}": f"--block_size {B}" for B in (1, 2, 4)}, BOTH,
        f"--updates 600 {SUDOKU}"),
    "ratio": Experiment({f"`{flags}`": flags for flags in RATIOS}, BOTH),
    "ratio_8": Experiment(
        {f"`{flags}`": flags for flags in ("--shared_masks", "--estimator trajectory")}, BOTH,
        "--updates 600 --mu 8"),
    "mu_1": Experiment(BEST | {"GRPO": "--loss grpo"}, {"μ = 1": "--mu 1", "μ = 2": ""}),
    "tunnel": Experiment(OBJECTIVES, NOISES),
    "tunnel_8": Experiment(OBJECTIVES, NOISES, "--updates 600 --mu 8"),
    "parts": Experiment(PARTS, TWO_AND_EIGHT, seeds=FIVE),
    "cut": Experiment({"ε = 5, the paper's": "", "ε = 4, the release's": "--clip_eps 4"},
                      TWO_AND_EIGHT, "--updates 600 --loss stabledrl"),
    "spikes": Experiment({f"`{name}`": f"--loss spiked_{name}" for name in SPIKED},
                         {"times the base": ""}, "--updates 600 --shared_masks"),
    "tasks": Experiment({
        "chain": "--task chain --base_accuracy 0.6",
        "countdown": "--task countdown --base_accuracy 0.2 --d_model 96 --prompts 16"},
        BOTH, f"--updates 600 --lr 3e-5 {PAIR}"),
    "trust": Experiment({
        "GRPO, ε = 0.2": "--loss grpo --clip_eps 0.2",
        "GRPO, ε = 5": "--loss grpo --clip_eps 5",
        "StableDRL, ε = 0.2": "--loss stabledrl --clip_eps 0.2",
        "StableDRL, ε = 5": "--loss stabledrl --clip_eps 5"}, {
        f"μ = {mu}, {lr}": f"--mu {mu} --lr {lr}"
        for mu in (2, 8) for lr in ("1e-4", "2e-4", "4e-4")}, f"--updates 600 {PAIR}"),
    "one_sided": Experiment({
        "one bad answer, pushed down": "--loss one_bad",
        "all bad answers, pushed down": "--loss all_bad",
        "one good answer, pushed up": "--loss one_good",
        "all good answers, pushed up": "--loss all_good"},
        {"estimated likelihood": "--estimator elbo", "exact likelihood": "--estimator exact"}),
    "sizes": Experiment(SIZES, POLICIES),
    "slow": Experiment(BOTH, LENGTHS, "--lr 1e-5"),
    "blocks": Experiment(
        {f"B = {B}": f"--block_size {B}" for B in (1, 2, 4, 8)},
        BOTH | {"GRPO, trajectory": "--loss grpo --estimator trajectory"},
        f"--updates 200 --task addition5 {SMALL}"),
    "best_rates": Experiment(BEST, {rate: f"--lr {rate}" for rate in ("5e-5", "1e-4", "2e-4")}),
    "best_long": Experiment(BEST, LENGTHS),
    "best_low": Experiment(BEST, {"times the base": ""}, "--updates 600 --base_accuracy 0.1"),
    "digits": Experiment(
        {row: OBJECTIVES[row] for row in (
            "GRPO", "StableDRL, ε = 5", "StableDRL, ε = 1", "no ratio (SPG)", "VESPO",
            "good answers only")},
        {"K = 1: 3.2 nats": ""}, f"--updates 400 --task addition3 {SMALL}"),
    "release": Experiment({"times the base": "--loss stabledrl --clip_eps 4"}, TWO_AND_EIGHT,
                          "--updates 600 --estimator mean_over_masked --copies 2 "
                          "--max_grad_norm 0.2"),
}

# The release only centres the advantages, and uses AdamW with weight decay 0.1. `train` has no
# settings for these. The six runs were made with both replaced: they are kept, and not made again.
NOT_MADE = ("release",)

def runs_of(experiments):
    """Name -> config of all runs of some experiments, each once and as long as any needs it. Seed 0
    comes first, so that whatever is stopped early is whole for its first seeds."""
    found = {}
    for experiment in experiments:
        for row, column in itertools.product(experiment.rows, experiment.columns):
            for config in experiment.cell(row, column):
                name = S.run_name(config)
                if name not in found or found[name].updates < config.updates:
                    found[name] = config
    return dict(sorted(found.items(), key=lambda item: item[1].seed))

# ==== Running and keeping =========================================================================

COLUMNS = ("accuracy", "reward", "spread", "noise_std", "drift", "grad_norm", "ratio_max", "ess",
           "clip_fraction")

def short(number):
    """Four digits."""
    return float(f"{number:.4g}")

def read_kept():
    """Name of a run -> its kept line."""
    lines = (HERE / "runs.jsonl").read_text().splitlines()
    return {line["run"]: line for line in map(json.loads, lines)}

def keep(kept):
    text = "".join(json.dumps(line) + "\n" for line in kept.values())
    (HERE / "runs.jsonl").write_text(text)

def is_whole(line, config):
    """Has the line all that config asks for? It has, too, if a number that is not finite ended the
    run."""
    return line["failed"] or len(line["reward"]) * config.log_every >= config.updates

def lines_of(kept, experiment, row, column):
    """The kept lines of one cell, seed by seed, cut to the length that the experiment asks for."""
    found = []
    for config in experiment.cell(row, column):
        line = kept.get(S.run_name(config))
        if line and is_whole(line, config):
            length = config.updates // config.log_every
            cut = {name: line[name][:length] for name in COLUMNS}
            found.append(line | cut | {"failed": len(line["reward"]) < length})
    return found

def times_base(line):
    """The last reward over that of the base; 0 if a number that is not finite ended the run."""
    return 0.0 if line["failed"] else line["reward"][-1] / line["base"]

def load_base(out, config):
    """The base policy of a run."""
    S.make_base(out, config)
    model = S.new_model(config)
    S.load(S.base_path(config, out), model=model)
    return model

def make_line(out, config):
    """Make one run, or go on with it -> its kept line. A number that is not finite ends the run,
    which is kept as failed. Any other error goes up."""
    try:
        rows, failed = S.make_run(out, config), False
    except FloatingPointError as error:
        S.report(f"{S.run_name(config)}: {error}")
        log = Path(out, S.run_name(config), "log.jsonl").read_text().splitlines()
        rows, failed = [json.loads(row) for row in log[1:]], True
    base, task, B = load_base(out, config), S.TASKS[config.task], config.block_size
    texts, _ = task.sample(np.random.default_rng(1), 2_000, "train")
    _, rewards = S.answer(base, task, texts, B, generator=S.stream(config, "base"))
    line = {
        "run": S.run_name(config), "failed": failed, "base": short(rewards.mean().item()),
        "base_accuracy": S.accuracy(base, task, B)}
    for column in COLUMNS:
        line[column] = [short(row[column]) for row in rows if column in row]
    return line

def side_by_side(work, configs, out):
    """What work(out, config) returns for each, after their bases are made. Side by side where this
    is possible."""
    jobs = torch.get_num_threads() if sys.platform == "linux" else 1
    bases = {S.base_path(config, out): config for config in configs}.values()
    S.launch(S.make_base, bases, out, jobs)
    return S.launch(work, configs, out, jobs)

def make_lines(configs, out):
    """Make runs -> name -> kept line of each that ended."""
    return {line["run"]: line for line in side_by_side(make_line, configs, out) if line}
