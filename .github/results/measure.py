"""What does the results page say of the kept lines? And what does your own loss do?

    python .github/results/measure.py --page         README.md from page.md, and the figures
    python .github/results/measure.py NAME ..        make the runs of these experiments here, print
                                                     their tables, keep their lines in the folder
    python .github/results/measure.py --loss FILE    your own loss in the wind tunnel: FILE is Python
                                                     and puts one or several into stabledrl.LOSSES

In page.md {{..}} is an expression of Python, so that each number of the prose is one of the kept
lines; holds(..) says nothing, but reports a sentence that they do not bear out.
"""

import argparse
import functools
import itertools
import json
import re
import runpy
import statistics
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import noise
from experiments import (
    BEST_RATES,
    EXPERIMENTS,
    HERE,
    MACHINES,
    NOISES,
    OBJECTIVES,
    POLICIES,
    Experiment,
    S,
    kept_of,
    lines_of,
    make_lines,
    noise_of_columns,
    product,
    read_lines,
    register,
    times_base,
)

# ==== Numbers =====================================================================================

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def pm(numbers, digits=2):
    """mean ± standard deviation."""
    return S.over_seeds(list(numbers), digits).replace("-", "−") if numbers else "–"


def av(numbers, digits=2):
    return f"{statistics.mean(numbers):.{digits}f}" if numbers else "–"


def some(truths):
    """Of how many it is true."""
    truths = list(truths)
    return f"{sum(truths)} of {len(truths)}"


def interval(numbers, others):
    """95 % interval of the mean paired difference (t distribution) -> (low, high)."""
    differences = [a - b for a, b in zip(numbers, others)]
    n = len(differences)
    half = T_95[n] * statistics.stdev(differences) / n**0.5
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def ahead(numbers, others):
    """Mean paired difference, and its 95 % interval."""
    if len(numbers) < 2 or numbers == others:
        return "–"
    low, high = interval(numbers, others)
    return f"{(low + high) / 2:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")


def order(numbers, others):
    """What a paired test says of the means."""
    if len(numbers) > 1:
        low, high = interval(numbers, others)
        if low > 0 or high < 0:
            return "ahead of" if low > 0 else "behind"
    return "not told apart from"


def of(name, row, column, measure=times_base):
    """Of a cell of an experiment: a number for each seed."""
    return [measure(line) for line in kept_of(name)[0][row, column]]


def rows_with(relation, name, column, other, measure=times_base):
    """The rows of an experiment that stand in a relation of `order` to another, in words."""
    others = of(name, other, column, measure)
    rows = [row for row, of_column in kept_of(name)[0] if of_column == column and row != other]
    found = [row for row in rows if order(of(name, row, column, measure), others) == relation]
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]])) or "none"


DECISION = [  # condition, choice; experiment, row and column of its numbers; row among new seeds
    "old and new estimate can use the same masks/GRPO with shared masks/"
    "shared/GRPO/per update/GRPO, shared masks",
    "rewards are 0 or 1, and less diverse answers are acceptable/"
    "completions with A > 0 only, no ratio/two_by_two/good ones alone/no ratio/good only",
    "each batch is used once or twice/no ratio (REINFORCE)/"
    "two_by_two/all completions/no ratio/no ratio",
    "none of these fits/StableDRL, ε = 1 (try no ratio, too)/"
    "shared/StableDRL, ε = 1/anew/StableDRL, ε = 1",
    "for comparison: the paper's ε/StableDRL, ε = 5/shared/StableDRL, ε = 5/anew/StableDRL, ε = 5",
    "for comparison/GRPO, masks drawn anew/shared/GRPO/anew/",
]
DECISION = [line.split("/") for line in DECISION]


def decision_table():
    """With paired differences from the paper's StableDRL."""
    rows = []
    for condition, choice, name, row, column, fresh in DECISION:
        cells, differences = [], []
        for mu in ("μ = 2", "μ = 8"):
            numbers = of(name, row, f"{mu}: {column}")
            cells.append(pm(numbers))
            differences.append(ahead(numbers, of("shared", "StableDRL, ε = 5", f"{mu}: anew")))
        cells.append(pm(of("fresh", fresh, "times the base", held) if fresh else []))
        rows.append([condition, choice, *cells, *differences])
    head = ["μ = 2", "μ = 8", "own rate, new seeds", "difference, μ = 2", "difference, μ = 8"]
    return table(["if", "then", *head], rows)


def alike(mu):
    """The pairs of rows, by their numbers, that a paired test does not tell apart at their μ."""
    rows = []
    for i, (condition, _, name, row, column, _) in enumerate(DECISION, 1):
        if mu == "μ = 2" or condition != "each batch is used once or twice":
            rows.append((i, of(name, row, f"{mu}: {column}")))
    pairs = itertools.combinations(rows, 2)
    return [(i, j) for (i, one), (j, two) in pairs if order(one, two) == "not told apart from"]


def held(line):
    """Times the base on held-out prompts."""
    return 0.0 if line["failed"] else line["held_out"] / line["held_out_base"]


def share(label, what):
    return f"{100 * statistics.median(noise.read('shares')[label][what]):.0f} %"


def whole_drifts(policy):
    """The logs of drift.json that reach 400 updates."""
    return [log for log in noise.read("drift")[policy] if len(log["drift"]) == 11]


def growth(policy, column):
    """Of noise in nats, run by run."""
    return [log[column][-1] - log[column][0] for log in whole_drifts(policy)]


# ==== Tables ======================================================================================


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def outcome(lines):
    """† marks a cell with a run that ended with a number that is not finite."""
    mark = " †" if any(line["failed"] for line in lines) else ""
    return pm([times_base(line) for line in lines]) + mark


def base_reward(lines):
    return pm([line["base"] for line in lines], 3)


def noise_at_start(lines):
    """Of log ρ̂ where ρ = 1, in the first 40 updates."""
    return av([line["spread"][0] for line in lines if line["spread"]] or [0], 1)


def drift_at_end(lines):
    return av([line["drift"][-1] for line in lines], 1)


def grid(found, once=(), measures=(("", outcome),), against=None):
    """The table of an experiment. measures: what a cell says; once: what is said of a row, from the
    lines of its last column; against: the row from which paired differences are shown."""
    columns = list(dict.fromkeys(column for _, column in found))
    titles, rows = ["", *(title for title, _ in once)], []

    def say(measure, row, column):
        return measure(found[row, column]) if found.get((row, column)) else ""

    for column in columns:
        titles += [", ".join(filter(None, (column, title))) for title, _ in measures]
        titles += ["paired difference"] if against else []
    for row in dict.fromkeys(row for row, _ in found):
        cells = [row, *(say(measure, row, columns[-1]) for _, measure in once)]
        for column in columns:
            cells += [say(measure, row, column) for _, measure in measures]
            if against:
                pair = found[row, column], found[against, column]
                cells.append(ahead(*([*map(times_base, lines)] for lines in pair)))
        rows.append(cells)
    return table(titles, rows)


def fresh_table(found):
    """Each objective at its best rate, on seeds that did not choose it."""
    rows, whole = [], [held(line) for line in found["StableDRL, ε = 5", "times the base"]]
    for (row, _), lines in found.items():
        numbers = [held(line) for line in lines]
        rows.append([row, BEST_RATES[row], pm(numbers), ahead(numbers, whole), outcome(lines)])
    head = ["", "rate", "held-out prompts", "paired difference", "training prompts"]
    return table(head, rows)


def tunnel_table(found):
    """With the noise of each column beside its name."""
    nats = dict(zip(NOISES, noise_of_columns()))
    return grid(
        {(row, f"{name}: {nats[name]:.1f} nats"): lines for (row, name), lines in found.items()}
    )


TAILS = {  # number in tails.json -> what it is, and its digits
    "sigma": ("deviation of log ρ̂, all completions together, nats", 2),
    "good": ("the same, good completions", 2),
    "bad": ("the same, bad completions", 2),
    "own_median": ("a completion's own deviation, median, nats", 2),
    "noisy": ("share of the completions that are above 4 nats", 3),
    "noisy_variance": ("share of the variance that these carry", 2),
    "largest": ("largest of 256 ratios ρ̂, median over batches", 0),
    "largest_normal": ("the same, if the noise were normal, with one deviation for all", 0),
}


def tails_table():
    rows = []
    for name, (label, digits) in TAILS.items():
        rows.append([label, pm([seed[name] for seed in noise.read("tails")["seeds"]], digits)])
    return table(["", "five base policies"], rows)


def drift_table():
    """Means over the runs that reached the end, at the start and there."""
    rows = []
    for policy in POLICIES:
        whole = whole_drifts(policy)
        row = [policy, str(len(whole)), pm([log["drift"][-1] for log in whole], 1)]
        for column in ("base", "own", "good", "bad"):
            row.append(" → ".join(av([log[column][i] for log in whole], 1) for i in (0, -1)))
        rows.append(row)
    head = ["", "seeds", "drift at the end, nats", "noise on the base's completions"]
    return table([*head, "on its own", "on its own good ones", "on its own bad ones"], rows)


BASE = ("base reward", base_reward)
NOISE = ("noise", noise_at_start)
AGAINST_5 = functools.partial(grid, against="StableDRL, ε = 5")
TABLES = {  # of an experiment -> how it is shown, if not by `grid` as it is
    "fresh": fresh_table,
    "tunnel": tunnel_table,
    "tunnel_8": tunnel_table,
    "parts": AGAINST_5,
    "left": AGAINST_5,
    "one_sided": functools.partial(grid, measures=[("", outcome), ("drift", drift_at_end)]),
    "ways": functools.partial(grid, measures=[("", outcome), NOISE]),
    "release": functools.partial(grid, measures=[("", outcome), NOISE]),
    "tasks": functools.partial(grid, once=[BASE, NOISE]),
    "sizes": functools.partial(grid, once=[BASE, NOISE]),
    "blocks": functools.partial(grid, once=[BASE], measures=[("", outcome), NOISE]),
}
OTHERS = {  # no experiments: function, and where it was measured
    "tails": (tails_table, "xeon"),
    "drift": (drift_table, "h100"),
}


def show(name):
    """What makes it, machine, date and seeds, and the table."""
    if name in OTHERS:
        make, machine = OTHERS[name]
        return f"`measure.py {name}` · {MACHINES[machine]}\n\n{make()}"
    found, seeds = kept_of(name)
    machine = MACHINES[EXPERIMENTS[name].machine]
    numbers = ", ".join(map(str, seeds))
    return f"`measure.py {name}` · {machine} · seeds {numbers}\n\n{TABLES.get(name, grid)(found)}"


# ==== Page, runs, your own loss ===================================================================

BROKEN = []  # sentences that the kept lines do not bear out


def wrap(paragraph):
    """Lines of at most 100 columns; tables, commands, headings and code stay as they are."""
    items = re.split(r"\n(?=\* |\d\. )", paragraph)
    if re.search(r"^(\||`|#|<|!|    )", paragraph, re.MULTILINE):
        return paragraph
    indent = re.match(r"(\* |\d\. )?", paragraph).end() * " "
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return "\n".join(textwrap.fill(" ".join(item.split()), 100, **options) for item in items)


def holds(truth):
    """Nothing; but a sentence that is not true is reported by `values`."""
    return "" if truth else "NOT TRUE"


def values(text):
    """Each {{expression}} becomes its value."""

    def value(match):
        found = str(eval(match[1]))
        if found == "NOT TRUE":
            BROKEN.append(match[1])
        return found

    return re.sub(r"{{(.*?)}}", value, text, flags=re.DOTALL)


def fill(template):
    """page.md -> README.md."""
    return "\n\n".join(map(wrap, values(template).split("\n\n"))) + "\n"


def make_page():
    page = fill((HERE / "page.md").read_text("utf-8"))
    (HERE / "README.md").write_text(page, "utf-8")
    import figures

    for name, draw in figures.DRAW.items():
        draw(HERE.parent / "figures" / f"{name}.svg")
    for expression in BROKEN:
        print("not what the kept lines say:", expression)
    sys.exit(len(BROKEN) > 0)


def make_experiment(name, out, resume):
    """Make its runs here, with base policies of this machine, and print its table."""
    if name in noise.MEASURE:
        return noise.MEASURE[name](out)
    made = make_lines(out, resume, EXPERIMENTS[name].configs())
    with open(Path(out, "lines.jsonl"), "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in made)
    found, _ = lines_of(EXPERIMENTS[name], {line["run"]: line for line in made})
    print(TABLES.get(name, grid)(found))


def own_losses(file):
    """Run the file -> label -> flags of each loss that it registers. One with a name of this page
    gets another."""
    before, own = dict(S.LOSSES), {}
    runpy.run_path(file)
    for name in [name for name, loss in S.LOSSES.items() if loss is not before.get(name)]:
        label = name
        if name in before:
            label = f"my_{name}"
            S.LOSSES[label], S.LOSSES[name] = S.LOSSES[name], before[name]
            print(f"{file} has a {name} of its own: it is run as {label}")
        own[label] = f"--loss {label}"
    if not own:
        sys.exit(f"measure.py: {file} puts no loss into stabledrl.LOSSES")
    return own


def own_tunnel(file, seeds, updates, out, resume):
    """The wind tunnel's runs at μ = 2 for losses of a file: their rows below the kept ones."""
    common, rows = f"--updates {updates}", own_losses(file)
    experiment = Experiment(product(rows, NOISES), "epyc", common, seeds)
    made = {line["run"]: line for line in make_lines(out, resume, experiment.configs())}
    mine, _ = lines_of(experiment, made)
    tunnel = Experiment(product(OBJECTIVES, NOISES), "epyc", common)
    found, _ = lines_of(tunnel, read_lines("epyc"))
    print(f"seeds {seeds}; rows of the page: seeds 0 to 2, {MACHINES['epyc']}")
    print(tunnel_table(found | mine))
    try:
        import figures
    except ImportError:
        return print("no figure: pip install matplotlib")
    figures.draw_tunnel(Path(out, "tunnel.svg"), mine)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*EXPERIMENTS, *noise.MEASURE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--loss", metavar="FILE")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="of --loss")
    parser.add_argument("--updates", type=int, default=600, help="of --loss")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(argv)
    if not set(names) >= set(given.names):
        parser.error(f"NAME is one of {', '.join(names)}")
    torch.set_num_threads(1)  # so that a run's log is the same alone and in company
    register()
    try:
        for name in given.names:
            make_experiment(name, given.out, given.resume)
        if given.loss:
            own_tunnel(given.loss, given.seed, given.updates, given.out, given.resume)
    except (AssertionError, ValueError) as error:
        sys.exit(f"measure.py: {error}")
    if given.page:
        make_page()


if __name__ == "__main__":
    main()
