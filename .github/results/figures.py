"""The figures, from the kept lines. One method has one colour in all of them."""

import itertools
import json
import statistics

import matplotlib

matplotlib.rcParams |= {"svg.hashsalt": "stabledrl", "font.size": 9, "axes.titlesize": 10}
import matplotlib.pyplot as plt
import numpy as np

import noise
from experiments import BOTH, EXPERIMENTS, HERE, NOISES, POLICIES, lines_of, times_base

COLOURS = {
    "GRPO": "tab:red",
    "GRPO, estimated ratio": "tab:red",
    "GRPO, exact ratio": "tab:red",
    "StableDRL": "tab:blue",
    "StableDRL, ε = 5": "tab:blue",
    "StableDRL, estimated ratio": "tab:blue",
    "StableDRL, ε = 1": "tab:cyan",
    "dual clip": "tab:orange",
    "ρ̂^(1/L) (GSPO, ESPO)": "tab:brown",
    "no ratio (SPG)": "black",
    "SAPO": "tab:pink",
    "VESPO": "tab:purple",
    "good answers only": "tab:green",
    "GRPO, trajectory": "tab:red",
    "good answers": "goldenrod",
    "bad answers": "saddlebrown",
}

STYLES = {"GRPO, exact ratio": "--", "GRPO, trajectory": "--"}  # else: a full line
ONLY_IN_TABLE = ("CISPO, ε = 5", "CISPO, ε = 1", "masked ratio", "wd1")

def style_of(label):
    return {"color": COLOURS[label], "linestyle": STYLES.get(label, "-")}

def panels(rows, columns, height, **options):
    """-> figure of 900 pixels' width, axes."""
    return plt.subplots(rows, columns, figsize=(9, height), layout="constrained", **options)

def finish(figure, axis, path):
    """One legend above all panels, from the labels of one of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

def draw_base(axis, height):
    axis.axhline(height, color="grey", linestyle=":", label="base policy, before RL")

def draw_main_job(kept, path):
    """Three policies from one base, seed 0."""
    figure, axes = panels(1, 3, 3.2)
    main = EXPERIMENTS["main"]
    for policy in main.rows:
        line, *_ = lines_of(kept, main, policy, "")
        style = style_of(policy)
        for axis, column in zip(axes, ("reward", "ratio_max", "grad_norm")):
            axis.plot(range(40, 1201, 40), line[column], label=policy, **style)
            axis.set_xlabel("update")
    draw_base(axes[0], line["base"])
    axes[0].set(title="reward", ylim=(0, None))
    axes[1].set(title="largest ratio ρ̂", yscale="log")
    axes[2].set(title="norm of the gradient", yscale="log")
    finish(figure, axes[0], path)

def draw_noise(kept, path):
    """The noise of good and of bad answers, and who has the weight of a first update."""
    figure, (left, right) = panels(1, 2, 3.2)
    tails = noise.read("tails")
    x = noise.BINS[:-1] + 0.25
    for name, counts in tails["histogram"].items():
        density = np.array(counts) / sum(counts) / 0.5
        left.plot(x, density, color=COLOURS[name], label=name, drawstyle="steps-mid")
    sigma = np.mean([numbers["sigma"] for numbers in tails["seeds"]])
    normal = np.exp(-((x / sigma) ** 2) / 2) / sigma / np.sqrt(2 * np.pi)
    left.plot(x, normal, "--", color="black", label=f"normal, σ = {sigma:.1f}")
    left.set(yscale="log", xlim=(-19, 19), ylim=(1e-7, 30))
    left.set(title="density of log ρ̂ where ρ = 1", xlabel="nats")
    left.legend(loc="upper left", handlelength=1)
    place = 0
    for label, shares in zip(BOTH, noise.read("shares").values()):
        heights = [100 * statistics.median(values) for values in shares.values()]
        places = [place, place + 1.2]
        bars = right.bar(places, heights, 0.4, color=COLOURS[label], label=label)
        right.bar_label(bars, [noise.percent(values) for values in shares.values()])
        place += 0.4
    right.set_xticks([0.2, 1.4], ["all bad answers", "heaviest answer of 256"])
    right.set(title="share of the weight of a first update", ylim=(0, 115), ylabel="%")
    right.legend()
    figure.savefig(path, metadata={"Date": None})

def draw_learning(panels_of, path):
    """Reward against updates: title of a panel -> label -> lines. A thin line for each seed, a thick
    one for their mean. A run that has failed has the reward 0 from then on."""
    figure, axes = panels(1, len(panels_of), 3.2, sharey=True)
    for axis, (title, lines_by_label) in zip(axes, panels_of.items()):
        length = max(len(line["reward"]) for lines in lines_by_label.values() for line in lines)
        updates = np.arange(1, length + 1) * 40
        for label, lines in lines_by_label.items():
            style = style_of(label)
            rewards = np.zeros((len(lines), length))
            for of_seed, line in zip(rewards, lines):
                made = len(line["reward"])
                of_seed[:made] = line["reward"]
                of_seed[made:] = 0 if line["failed"] else np.nan
                axis.plot(updates, of_seed, linewidth=0.5, **style)
            axis.plot(updates, rewards.mean(0), linewidth=2, label=label, **style)
        bases = [line["base"] for lines in lines_by_label.values() for line in lines]
        draw_base(axis, statistics.mean(bases))
        axis.set(title=title, xlabel="update")
    axes[0].set(ylabel="reward", ylim=(0, None))
    finish(figure, axes[0], path)

def draw_blocks(kept, path):
    blocks = EXPERIMENTS["blocks"]
    draw_learning({
        row: {column: lines_of(kept, blocks, row, column) for column in blocks.columns}
        for row in blocks.rows}, path)

def draw_sizes(kept, path):
    """Each policy at its best rate of three, by the mean of its last rewards. 85 M parameters: the
    kept logs, at the one rate that they have."""
    sizes, panels_of = EXPERIMENTS["sizes"], {}
    for policy in POLICIES:
        for row in sizes.rows:
            size, rate = row.split(", ")
            lines = lines_of(kept, sizes, row, policy)
            found = panels_of.setdefault(f"{size} parameters", {})
            if last_reward(lines) > last_reward(found.get(policy, [])):
                found[policy] = lines
    panels_of["85 M parameters"] = larger = {}
    for line in map(json.loads, (HERE / "h100.jsonl").read_text().splitlines()):
        if line["d_model"] == 768:
            ratio = "exact" if line["estimator"] == "exact" else "estimated"
            loss = {"grpo": "GRPO", "stabledrl": "StableDRL"}[line["loss"]]
            line |= {"failed": False, "base": np.nan}
            larger[f"{loss}, {ratio} ratio"] = [line]
    draw_learning(panels_of, path)

def last_reward(lines):
    return sum(line["reward"][-1] for line in lines) if lines else -1

UPDATES = range(0, 401, 40)  # at which noise and drift were measured

def draw_drift(kept, path):
    """Noise while a policy drifts: of the base's answers, and of its own."""
    figure, axes = panels(1, 2, 3.4, sharey=True)
    columns = {"base": "on answers of the base policy", "own": "on answers of its own"}
    for axis, (column, title) in zip(axes, columns.items()):
        for policy, seeds in noise.read("drift").items():
            style = style_of(policy)
            for log in seeds:
                updates = UPDATES[: len(log[column])]
                axis.plot(updates, log[column], linewidth=0.5, **style)
            whole = [log[column] for log in seeds if len(log[column]) == len(UPDATES)]
            axis.plot(UPDATES, np.mean(whole, 0), linewidth=2, label=policy, **style)
        axis.set(title=f"noise {title}", xlabel="update")
    axes[0].set(ylabel="nats", ylim=(0, None))
    finish(figure, axes[0], path)

def draw_tunnel(kept, path):
    """Reward against noise, a line per objective."""
    figure, axes = panels(1, 2, 4.8, sharey=True)
    x_of = {name: noise.noise_of(name) for name in NOISES}
    ticks = [f"{x:.1f}\n{name.replace(', ', chr(10))}" for name, x in x_of.items()]
    for axis, name in zip(axes, ("tunnel", "tunnel_8")):
        experiment = EXPERIMENTS[name]
        shown = [row for row in experiment.rows if row not in ONLY_IN_TABLE]
        for row, marker in zip(shown, itertools.cycle("osdPvXD^*")):
            points = []
            for column, x in x_of.items():
                times = [times_base(line) for line in lines_of(kept, experiment, row, column)]
                if times:
                    points.append((x, statistics.mean(times)))
            style = {"color": COLOURS.get(row, "tab:olive"), "marker": marker}
            axis.plot(*zip(*points), label=row, markersize=5, **style)
        draw_base(axis, 1)
        axis.set(xlabel="noise of log ρ̂ in nats, and the estimate that has it", ylim=(0, None))
        axis.set_xticks(list(x_of.values()), ticks)
    axes[0].set(title="two updates per batch (μ = 2)", ylabel="reward, times that of the base")
    axes[1].set(title="eight updates per batch (μ = 8)")
    finish(figure, axes[0], path)

SHORTER = {"coupled, K = 2": "pair", "coupled, K = 4": "2 pairs", "shared, K = 1": "shared",
           "coupled and shared, K = 2": "pair, shared", "per token, K = 1": "per token"}

def draw_prices(kept, path):
    """Noise of the ratio against the cost of an estimate."""
    figure, axes = panels(1, 2, 4.4, sharey=True)
    titles = ("addition, B = 2", "sudoku, B = 4")
    for axis, title, prices in zip(axes, titles, noise.read("prices").values()):
        ticks = sorted({found["tokens"] for found in prices.values()})
        for name, found in prices.items():
            x = found["tokens"]
            y = max(statistics.mean(found["later"]), 0.01)
            axis.plot(x, y, "o", color="dimgrey")
            side = "right" if x == ticks[0] else "left"
            text = f"   {SHORTER.get(name, name)}   "
            height = "top" if name == "shared, K = 1" else "center"
            axis.text(x, y, text, ha=side, va=height)
        axis.set(title=title, xlabel="tokens read per answer", xscale="log", yscale="log")
        axis.set_xlim(ticks[0] * 0.4, ticks[-1] * 2.4)
        axis.set_xticks(ticks, ticks)
        axis.set_yticks([0.01, 0.1, 1, 10], ["0", "0.1", "1", "10"])
        axis.minorticks_off()
    axes[0].set_ylabel("noise of log ρ̂ after 8 updates, nats")
    figure.savefig(path, metadata={"Date": None})

DRAW = {"plot": draw_main_job, "noise": draw_noise, "blocks": draw_blocks,
        "sizes": draw_sizes, "drift": draw_drift, "tunnel": draw_tunnel, "prices": draw_prices}
