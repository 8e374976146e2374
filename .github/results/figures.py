"""The figures, from the kept lines. One method has one colour in all of them."""

import itertools
import statistics

import matplotlib

matplotlib.rcParams |= {"svg.hashsalt": "stabledrl", "font.size": 9, "axes.titlesize": 10}
import matplotlib.pyplot as plt
import numpy as np

import noise
from experiments import BOTH, EXPERIMENTS, NOISES, lines_of, times_base

COLOURS = {
    "GRPO": "tab:red",
    "GRPO, estimated ratio": "tab:red",
    "GRPO, exact ratio": "tab:red",
    "StableDRL": "tab:blue",
    "StableDRL, ε = 5": "tab:blue",
    "StableDRL, estimated ratio": "tab:blue",
    "StableDRL, ε = 1": "tab:cyan",
    "CISPO": "tab:purple",
    "dual clip": "tab:orange",
    "per token (GSPO, ESPO)": "tab:green",
    "no ratio (SPG)": "black",
    "wd1": "tab:pink",
    "good answers": "goldenrod",
    "bad answers": "saddlebrown",
}

UPDATES = range(40, 601, 40)  # of the lines of a log

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
        color = COLOURS[policy]
        style = "--" if "exact" in policy else "-"
        for axis, column in zip(axes, ("reward", "ratio_max", "grad_norm")):
            updates = range(40, 1201, 40)
            axis.plot(updates, line[column], style, color=color, label=policy)
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
        percent = [100 * statistics.median(values) for values in shares.values()]
        places = [place, place + 1.2]
        bars = right.bar(places, percent, 0.4, color=COLOURS[label], label=label)
        right.bar_label(bars, fmt="%.0f %%")
        place += 0.4
    right.set_xticks([0.2, 1.4], ["all bad answers", "heaviest answer of 256"])
    right.set(title="share of the weight of a first update", ylim=(0, 115), ylabel="%")
    right.legend()
    figure.savefig(path, metadata={"Date": None})

def draw_blocks(kept, path):
    """Reward against updates, a panel for each task and block size, a thin line for each seed."""
    figure, axes = panels(2, 3, 4.8)
    for name, row_of_axes in zip(("blocks_addition", "blocks_sudoku"), axes):
        experiment = EXPERIMENTS[name]
        for row, axis in zip(experiment.rows, row_of_axes):
            for label in BOTH:
                lines = lines_of(kept, experiment, row, label)
                color = COLOURS[label]
                rewards = np.zeros((len(lines), 15))  # 0 after a run has ended
                for of_seed, line in zip(rewards, lines):
                    of_seed[: len(line["reward"])] = line["reward"]
                    axis.plot(UPDATES, of_seed, color=color, linewidth=0.5)
                axis.plot(UPDATES, rewards.mean(0), color=color, linewidth=2, label=label)
            draw_base(axis, statistics.mean(line["base"] for line in lines))
            axis.set(title=row, xlabel="update", ylim=(0, None))
        row_of_axes[0].set_ylabel("reward")
    axes[0, 2].axis("off")
    finish(figure, axes[0, 0], path)

def draw_tunnel(kept, path):
    """Reward against noise, a line per objective."""
    figure, axes = panels(1, 2, 4.8, sharey=True)
    x_of = {name: noise.noise_of(name) for name in NOISES}
    ticks = [f"{x:.1f}\n{name.replace(', ', chr(10))}" for name, x in x_of.items()]
    for axis, name in zip(axes, ("tunnel", "tunnel_8")):
        experiment = EXPERIMENTS[name]
        for row, marker in zip(experiment.rows, itertools.cycle("osdPvXD^*")):
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
        "tunnel": draw_tunnel, "prices": draw_prices}
