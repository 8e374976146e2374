"""What do the kept lines look like? The figures of README and of the results page."""

import itertools
import os
import statistics

import matplotlib
import noise
import numpy as np
from experiments import (
    EXPERIMENTS,
    NOISES,
    S,
    kept_of,
    noise_of_columns,
    times_base,
)

os.environ["SOURCE_DATE_EPOCH"] = "0"  # the same lines give the same file
matplotlib.rcParams |= {"svg.hashsalt": "stabledrl", "font.size": 9, "axes.titlesize": 10}
import matplotlib.pyplot as plt

COLOURS = {  # one method has one colour in all figures; those of `plot` are in this order, too
    "GRPO": "tab:red",
    "GRPO, trajectory": "tab:orange",
    "StableDRL": "tab:blue",
    "StableDRL, ε = 5": "tab:blue",
    "StableDRL, ε = 1": "tab:cyan",
    "good only": "tab:green",
    "VESPO": "tab:purple",
    "ρ̂^(1/L)": "tab:brown",
    "SAPO": "tab:pink",
    "dual clip": "goldenrod",
    "no ratio": "black",
    "every ratio 1": "grey",
    "good completions": "goldenrod",
    "bad completions": "saddlebrown",
}
ONLY_IN_TABLE = "clip only, ε = 1"


def panels(number, height):
    """-> figure of 900 pixels' width, axes."""
    return plt.subplots(1, number, figsize=(9, height), layout="constrained", sharey=True)


def finish(figure, axis, path):
    """One legend above all panels, from the labels of one of them."""
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4)
    figure.savefig(path)
    plt.close(figure)


def draw_base(axis, height):
    axis.axhline(height, color="grey", linestyle=":", label="base policy")


def rows_of(line):
    """A kept line -> rows of the log, as `plot` wants them, and whether the run failed."""
    rows = [{"update": 0, "reward": line["base"]}]
    for i, reward in enumerate(line["reward"], 1):
        row = {"update": 40 * i, "reward": reward}
        rows.append(row | {name: line[name][i - 1] for name in ("ratio_max", "grad_norm")})
    return rows, line["failed"]


def draw_square(path):
    """The figure of stabledrl.py itself."""
    found, _ = kept_of("square")
    policies = {}
    for (loss, column), lines in found.items():
        ratio, updates = column.split(", ")
        if updates == "1,200 updates":
            label = f"{loss}, {ratio.removesuffix(' ratio')}"
            policies[label] = [rows_of(line) for line in lines]
    S.plot(policies, path)


def draw_noise(path):
    """The noise of good and of bad completions, and who has the weight of a first update."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    tails = noise.read("tails")
    x = noise.BINS[:-1] + 0.25
    for name, counts in tails["histogram"].items():
        density = np.array(counts) / sum(counts) / 0.5
        left.plot(x, density, color=COLOURS[name], label=name, drawstyle="steps-mid")
    sigma = np.mean([numbers["sigma"] for numbers in tails["seeds"]])
    normal = np.exp(-((x / sigma) ** 2) / 2) / sigma / np.sqrt(2 * np.pi)
    left.plot(x, normal, "--", color="black", label=f"normal, σ = {sigma:.1f}")
    left.set(yscale="log", xlim=(-19, 19), ylim=(1e-7, 30))
    left.set(title="density of log ρ̂ at first updates", xlabel="nats")
    left.legend(loc="upper left", handlelength=1)
    for i, (label, shares) in enumerate(noise.read("shares").items()):
        heights = [100 * statistics.median(values) for values in shares.values()]
        bars = right.bar([0.3 * i, 0.3 * i + 1.2], heights, 0.3, color=COLOURS[label], label=label)
        right.bar_label(bars, [f"{height:.0f} %" for height in heights])
    right.set_xticks([0.3, 1.5], list(shares))
    right.set(title="share of Σ ‖weight · A · g‖", ylim=(0, 115), ylabel="%")
    right.legend()
    figure.savefig(path)


def draw_blocks(path):
    """Reward against updates: a thin line for each seed, a thick one for their mean. A run that has
    failed has the reward 0 from then on."""
    blocks, (found, _) = EXPERIMENTS["blocks"], kept_of("blocks")
    figure, axes = panels(4, 3.2)
    for axis, row in zip(axes, blocks.rows):
        for column in blocks.columns:
            rewards = np.zeros((3, 5))
            for of_seed, line in zip(rewards, found[row, column]):
                of_seed[: len(line["reward"])] = line["reward"]
            updates, colour = range(40, 201, 40), COLOURS[column]
            axis.plot(updates, rewards.T, linewidth=0.5, color=colour)
            axis.plot(updates, rewards.mean(0), linewidth=2, color=colour, label=column)
        draw_base(axis, statistics.mean(line["base"] for line in found[row, column]))
        axis.set(title=row, xlabel="update")
    axes[0].set(ylabel="reward", ylim=(0, None))
    finish(figure, axes[0], path)


def draw_means(axis, xs, lines, label, **style):
    """A point for each x: the mean over seeds of the lines of a cell."""
    ys = [statistics.mean(map(times_base, of_x)) for of_x in lines]
    axis.plot(xs, ys, label=label, markersize=5, **style)


def draw_tunnel(path, own=()):
    """Reward against noise, a line per objective; own: more cells of the left panel."""
    figure, axes = panels(2, 4.8)
    nats = noise_of_columns()
    for axis, name, mu in zip(axes, ("tunnel", "tunnel_8"), ("two", "eight")):
        found = kept_of(name)[0] | dict(own if name == "tunnel" else ())
        rows = [row for row in dict.fromkeys(row for row, _ in found) if row != ONLY_IN_TABLE]
        for row, marker in zip(rows, itertools.cycle("osdPvXD^*")):
            style = {"color": COLOURS.get(row, "tab:olive"), "marker": marker}
            draw_means(axis, nats, [found[row, column] for column in NOISES], row, **style)
        draw_base(axis, 1)
        ticks = [f"{x:.1f}\n{column.replace(', ', chr(10))}" for x, column in zip(nats, NOISES)]
        axis.set_xticks(nats, ticks)
        axis.set(title=f"{mu} updates per batch", ylim=(0, None))
        axis.set_xlabel("noise of log ρ̂ in nats, and the estimate that has it")
    axes[0].set_ylabel("reward, times that of the base")
    finish(figure, axes[0], path)


DRAW = {
    "plot": draw_square,
    "noise": draw_noise,
    "blocks": draw_blocks,
    "tunnel": draw_tunnel,
}
