"""The results page: missing runs, then tables and figures, which are made from kept lines alone.

    python .github/results/measure.py [NAME ..]      make what is not kept, of all experiments or of
                                                     these; then tables and figures
    python .github/results/measure.py --page         only tables and figures
    python .github/results/measure.py --loss FILE    your own loss in the wind tunnel (18 runs)

FILE is Python, and puts one loss or several into stabledrl.LOSSES. Runs that were stopped go on
with --resume.
"""

import argparse
import itertools
import runpy
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import noise
from experiments import (
    BOTH, EXPERIMENTS, HERE, NOISES, NOT_MADE, OBJECTIVES, S, is_whole, keep, lines_of, make_lines,
    read_kept, register, runs_of, times_base)

# ==== What a cell of a table says of its kept lines ===============================================

def spread_of(numbers, form=".2f"):
    """mean ± standard deviation."""
    numbers = list(numbers)
    if len(numbers) < 2:
        return ""
    return f"{statistics.mean(numbers):{form}} ± {statistics.stdev(numbers):{form}}"

def outcome(lines):
    """† marks a cell with a run that ended with a number that is not finite."""
    mark = " †" if any(line["failed"] for line in lines) else ""
    return spread_of(map(times_base, lines)) + mark

def each_seed(lines):
    return " / ".join(f"{times_base(line):.2f}" for line in lines)

def last_accuracy(lines):
    return spread_of((line["accuracy"][-1] for line in lines), ".3f")

def last_drift(lines):
    return spread_of((line["drift"][-1] for line in lines), ".1f")

def base_reward(lines):
    return spread_of((line["base"] for line in lines), ".3f")

def median_noise(lines):
    return spread_of(statistics.median(line["noise_std"]) for line in lines)

def largest_ratio(lines):
    return f"{max(itertools.chain(*(line['ratio_max'] for line in lines))):.0e}"

def noise_from_to(lines):
    logs = [line["spread"] for line in lines if line["spread"]]
    if max(map(max, logs)) < 0.01:
        return "none"
    return " / ".join(f"{log[0]:.1f} → {log[-1]:.1f}" for log in logs)

# ==== Tables ======================================================================================

def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

def heading(column, measure):
    if column in NOISES:
        column = f"{column}: {noise.noise_of(column):.1f} nats"
    return ", ".join(filter(None, (column, measure)))

def grid(name, once={}, measures={"": outcome}):
    """-> function that makes the table of an experiment. measures: what a cell says; once: what is
    said of a row, from the lines of its first column."""
    def make(kept):
        experiment, rows = EXPERIMENTS[name], []
        first, *_ = experiment.columns
        for row in experiment.rows:
            lines = lines_of(kept, experiment, row, first)
            cells = [row, *(measure(lines) for measure in once.values())]
            for column in experiment.columns:
                lines = lines_of(kept, experiment, row, column)
                cells += [measure(lines) for measure in measures.values()]
            rows.append(cells)
        pairs = itertools.product(experiment.columns, measures)
        return table(["", *once, *(heading(*pair) for pair in pairs)], rows)
    return make

def parts_table(kept):
    """Each part, and seed by seed against StableDRL as a whole."""
    parts, rows = EXPERIMENTS["parts"], []
    for row in parts.rows:
        cells = [row]
        for column in parts.columns:
            lines = lines_of(kept, parts, row, column)
            whole = map(times_base, lines_of(kept, parts, "StableDRL, ε = 5", column))
            differences = [times_base(line) - times for line, times in zip(lines, whole)]
            ahead = spread_of(differences, "+.2f")
            cells += [outcome(lines), ahead.replace("± +", "± ")]
        rows.append(cells)
    return table(["", "μ = 2", "ahead of ε = 5 by", "μ = 8", "ahead of ε = 5 by"], rows)

def price_table(kept):
    head, rows, prices = ["an estimate"], [], noise.read("prices")
    for task in ("addition, B = 2", "sudoku, B = 4"):
        head += [f"{task}: tokens read", "noise at ρ = 1", "after 8 updates", "L̂ − log π"]
    for name in prices["addition"]:
        row = [name]
        for task in prices.values():
            row.append(str(task[name]["tokens"]))
            for column in ("same", "later", "estimate"):
                row.append(f"{statistics.mean(task[name][column]):.2f}")
        rows.append(row)
    return table(head, rows)

def shares_table(kept):
    rows = []
    for label, found in zip(BOTH, noise.read("shares").values()):
        row = [label]
        for shares in found.values():
            row.append(" / ".join(f"{quartile:.2f}" for quartile in statistics.quantiles(shares)))
        rows.append(row)
    return table(["quartiles over 50 batches", "all bad answers", "the heaviest answer"], rows)

TAILS = {  # number in tails.json -> what it is, and its form
    "sigma": ("standard deviation of log ρ̂, all answers together, nats", ".2f"),
    "good": ("the same of good answers alone", ".2f"),
    "bad": ("the same of bad answers alone", ".2f"),
    "own_median": ("an answer's own standard deviation, median, nats", ".2f"),
    "own_90": ("the same, 90 % quantile", ".2f"),
    "own_99": ("the same, 99 % quantile", ".2f"),
    "noisy_answers": ("share of the answers that are above 4 nats", ".3f"),
    "noisy_variance": ("share of the variance that these answers carry", ".2f"),
    "kurtosis": ("excess kurtosis of log ρ̂ (0 if normal)", ".1f"),
    "largest": ("largest of 256 ratios ρ̂, median over batches", ",.0f"),
    "largest_normal": ("the same, if the noise were normal and equal for all answers", ",.0f"),
    "largest_own": ("the same, if it were normal with each answer's own deviation", ",.0f"),
}

def tails_table(kept):
    seeds, rows = noise.read("tails")["seeds"], []
    for name, (label, form) in TAILS.items():
        rows.append([label, *(f"{numbers[name]:{form}}" for numbers in seeds)])
    return table(["base policy of", *(f"seed {seed}" for seed in range(len(seeds)))], rows)

def growth_table(kept):
    """Noise of the base policies, and what a fit of log σ to log B and log L gives."""
    points, (factor, by_B, by_L) = noise.growth(kept)
    points["none: extrapolated"] = 32, 256, None
    rows = []
    for task, (B, L, sigma) in points.items():
        fit = factor * B**by_B * L**by_L
        rows.append([task, str(B), str(L), f"{sigma:.1f}" if sigma else "", f"{fit:.1f}"])
    head = ["base policies of", "B", "L", "σ, nats", f"{factor:.2f} · B^{by_B:.2f} · L^{by_L:.2f}"]
    return table(head, rows)

def drift_table(kept):
    """The first and the last noise of each run, mean over seeds."""
    rows = []
    for policy, seeds in noise.read("drift").items():
        row = [policy, spread_of((log["drift"][-1] for log in seeds), ".1f")]
        for column in ("base", "own", "good", "bad"):
            ends = [(log[column][0], log[column][-1]) for log in seeds]
            row.append(" → ".join(f"{statistics.mean(numbers):.1f}" for numbers in zip(*ends)))
        rows.append(row)
    return table(["", "drift at the end, nats", "noise on the base's answers", "on its own",
                  "on its own good ones", "on its own bad ones"], rows)

def diversity_table(kept):
    head, rows, found = [""], [], noise.read("diversity")
    for name in ("2,400 updates", "from bases of 0.04, 600 updates"):
        head += [f"{name}: right", "solved once in 8", "entropy, nats"]
    for row in found["best_long"]:
        cells = [row]
        for seeds in (found["best_long"][row], found["best_low"][row]):
            for column in ("right", "solved", "entropy"):
                cells.append(spread_of(numbers[column] for numbers in seeds))
        rows.append(cells)
    return table(head, rows)

BLOCKS = {
    "once": {"base reward": base_reward, "largest ρ̂ of GRPO": largest_ratio},
    "measures": {"": outcome, "noise": noise_from_to},
}
TABLES = {
    "main": grid("main", measures={
        "times the base": outcome, "each seed": each_seed, "accuracy": last_accuracy,
        "noise, nats": median_noise}),
    "length": grid("length"),
    "norm": grid("norm"),
    "lr": grid("lr"),
    "blocks_addition": grid("blocks_addition", **BLOCKS),
    "blocks_sudoku": grid("blocks_sudoku", **BLOCKS),
    "ratio_8": grid("ratio_8"),
    "mu_1": grid("mu_1"),
    "slow": grid("slow"),
    "ratio": grid("ratio", once={"noise under GRPO, nats": median_noise}),
    "blocks": grid("blocks", **BLOCKS),
    "tunnel": grid("tunnel"),
    "tunnel_8": grid("tunnel_8"),
    "best_rates": grid("best_rates"),
    "best_long": grid("best_long"),
    "best_low": grid("best_low"),
    "digits": grid("digits"),
    "sizes": grid("sizes", once={"base reward": base_reward, "noise under GRPO, nats": median_noise}),
    "growth": growth_table,
    "drift": drift_table,
    "diversity": diversity_table,
    "parts": parts_table,
    "cut": grid("cut"),
    "spikes": grid("spikes"),
    "release": grid("release"),
    "tasks": grid("tasks", once={
        "base reward": base_reward, "noise under GRPO, nats": median_noise}),
    "trust": grid("trust"),
    "one_sided": grid("one_sided", measures={"times the base": outcome, "drift, nats": last_drift}),
    "prices": price_table,
    "shares": shares_table,
    "tails": tails_table,
}

def page_with_tables(page, kept):
    """The text of the page, with what stands between markers made anew: command and table."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        made = make(kept)
        if name in EXPERIMENTS and name not in NOT_MADE:
            made = f"`{EXPERIMENTS[name].command(name)}`\n\n{made}"
        page = before + begin + made + end + after
    return page

# ==== Command line ================================================================================

def measure(names, out):
    """Make what is not kept, and keep it. Forks first: see `launch` in stabledrl.py."""
    kept = read_kept()
    for name in names:
        if name in NOT_MADE:
            continue
        missing = []
        for run, config in runs_of([EXPERIMENTS[name]]).items():
            if run not in kept or not is_whole(kept[run], config):
                missing.append(config)
        S.report(f"{name}: {len(missing)} runs")
        kept |= make_lines(missing, out)
        keep(kept)
    for name in ("drift", "diversity", "tails", "shares"):  # the last two run backward here
        if not (HERE / f"{name}.json").exists():
            getattr(noise, f"measure_{name}")(out)

def own_loss(file, out, resume):
    """Make the wind tunnel's runs at μ = 2 for the losses that a file registers. Print their rows
    below the kept ones, and draw all lines. Nothing is written but to the folder `out`."""
    before = set(S.LOSSES)
    runpy.run_path(file)
    own = {name: f"--loss {name}" for name in S.LOSSES if name not in before}
    if not own:
        sys.exit(f"measure.py: {file} puts no new name into stabledrl.LOSSES")
    tunnel = EXPERIMENTS["tunnel"]
    tunnel.rows = own
    configs = list(runs_of([tunnel]).values())
    try:
        for config in configs:
            S.check(config, out, resume)
    except (AssertionError, ValueError) as error:
        sys.exit(f"measure.py: {error}")
    kept = read_kept() | make_lines(configs, out)
    tunnel.rows = OBJECTIVES | own
    print(grid("tunnel")(kept))
    draw(["tunnel"], kept, out)

def draw(names, kept, folder):
    """Into the folder: these figures, or all."""
    try:
        import figures
    except ImportError:
        return S.report("no figures: pip install matplotlib")
    for name in names or figures.DRAW:
        figures.DRAW[name](kept, Path(folder, f"{name}.svg"))

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--loss", metavar="FILE")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(argv)
    register()
    if given.loss:
        return own_loss(given.loss, given.out, given.resume)
    if not EXPERIMENTS.keys() >= set(given.names):
        parser.error(f"the experiments are {', '.join(EXPERIMENTS)}")
    if not given.page:
        measure(given.names or EXPERIMENTS, given.out)
    kept, page = read_kept(), HERE / "README.md"
    page.write_text(page_with_tables(page.read_text(), kept))
    draw(None, kept, HERE.parent / "figures")

if __name__ == "__main__":
    main()
