"""What the program does with files, processes and flags (§6 Config, §7): each kind of mishap once.

This process runs backward passes, so it must never fork (where torch sees a GPU, autograd would not
survive that). Runs side by side are therefore tested in programs that FORGE starts, at the end of this
file. Everywhere else they go one after the other.
"""

import dataclasses
import functools
import inspect
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import stabledrl as S
from toy_tasks import TASKS

torch.set_num_threads(1)
LAUNCH, PLOT, EVALUATE = S.launch, S.plot, S.evaluate
GETSOURCE = functools.cache(inspect.getsource)
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "stabledrl.py").read_text(encoding="utf-8")
linux = pytest.mark.skipif(sys.platform != "linux", reason="runs go side by side under Linux only")

# The share of right characters: an untrained policy gets some of it, so it has something to learn.
REWARD = """lambda prompt, completion: sum(
    a == b for a, b in zip(completion, f"{int(prompt[:2]) + int(prompt[3:5])}....")
) / 4"""
SIZES = dict(prompts=2, group_size=3, d_model=16, n_layer=1, n_head=2, base_accuracy=0)
FLAGS = " ".join(f"--{name} {value}" for name, value in SIZES.items())


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    """Nothing is forked here, no test waits for a figure but those that look at it, and 20
    prompts are enough for an accuracy. (To find the
    source of Config for --help takes 0.1 seconds: once is enough.)"""
    monkeypatch.setattr(TASKS["addition"], "reward", eval(REWARD))
    monkeypatch.setattr(S, "evaluate", functools.partial(EVALUATE, count=20))
    monkeypatch.setattr(S, "launch", lambda work, configs, fork: LAUNCH(work, configs, False))
    monkeypatch.setattr(S, "plot", lambda policies, path: None)
    monkeypatch.setattr(inspect, "getsource", GETSOURCE)


def tiny(**settings):
    return S.Config(**(SIZES | dict(updates=6, log_every=2) | settings))


def train(out, **settings):
    """A tiny run, or the rest of it -> its folder."""
    config = tiny(**settings)
    out.mkdir(exist_ok=True)
    S.make_base(out, config)
    S.run(out, config)
    return out / S.run_name(config)


def log_of(folder):
    """The lines of a log as dicts, without the seconds."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [dict(json.loads(line), seconds=0) for line in lines]


def assert_same_run(one, other):
    """Logs that are equal but for the seconds, and bit-identical checkpoints."""
    assert log_of(one) == log_of(other)
    a, b = (torch.load(folder / "checkpoint.pt") for folder in (one, other))
    for part in ("model", "base", "probe"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    states = a["optimizer"]["state"], b["optimizer"]["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)


# ==== Files and resume ============================================================================


@pytest.mark.parametrize("owner,name", [(torch, "save"), (os, "replace"), (Path, "write_text")])
def test_a_crash_while_something_is_written_costs_one_row_at_most(
    owner, name, tmp_path, monkeypatch
):
    """The power fails while half of row 4 is written, of the rows 0, 2, 4, 6. The checkpoint of row
    2 is whole, and the run that goes on is the whole run."""
    whole = train(tmp_path / "whole")
    out = tmp_path / "crashed"
    out.mkdir()
    S.make_base(out, tiny())
    original, calls = getattr(owner, name), []

    def crash(*arguments):
        calls.append(1)
        if len(calls) < 3:
            return original(*arguments)
        if name == "save":
            arguments[1].write_bytes(b"half of it")
        if name == "write_text":
            original(arguments[0], arguments[1][: len(arguments[1]) // 2])
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(owner, name, crash)
        train(out)
    crashed = out / whole.name
    rows = torch.load(crashed / "checkpoint.pt")["rows"]
    assert [row["update"] for row in rows] == [0, 2]
    train(out)
    assert_same_run(whole, crashed)


def test_a_run_that_goes_on_further_is_the_run_that_was_asked_for_at_once(tmp_path, monkeypatch):
    """One row, then three. Also where the estimator draws from torch's global stream, and where the
    log was deleted."""

    def noisy(model, prompts, completions, block_size, masks, steps):
        noise = torch.rand(len(completions))
        return S.elbo(model, prompts, completions, block_size, masks) * (1 + noise)

    monkeypatch.setitem(S.ESTIMATORS, "noisy", noisy)
    whole = train(tmp_path / "whole", estimator="noisy", updates=6)
    cut = train(tmp_path / "cut", estimator="noisy", updates=2)
    assert len(log_of(cut)) == 3 and len(log_of(whole)) == 5  # settings, updates 0, 2, 4, 6
    torch.manual_seed(99)
    for _ in range(2):
        (cut / "log.jsonl").unlink()
        train(tmp_path / "cut", estimator="noisy", updates=6)
        assert_same_run(whole, cut)


def test_a_column_that_is_not_finite_ends_the_run_and_keeps_the_rows_before_it(
    tmp_path, monkeypatch
):
    """JSON has no NaN. Its checkpoint is not written either. And a key that a fork adds is kept."""
    original = S.train

    def with_nan(*arguments):
        for checkpoint in original(*arguments):
            update = checkpoint["rows"][-1]["update"]
            checkpoint["rows"][-1]["entropy"] = 1.0 if update < 4 else float("nan")
            yield checkpoint | {"scheduler": update}

    monkeypatch.setattr(S, "train", with_nan)
    with pytest.raises(ValueError):
        train(tmp_path)
    folder = tmp_path / S.run_name(tiny())
    assert [row.get("update") for row in log_of(folder)] == [None, 0, 2]
    checkpoint = S.load(folder / "checkpoint.pt", S.new_model(tiny()))
    assert checkpoint["rows"][-1]["update"] == checkpoint["scheduler"] == 2


def test_a_file_is_read_without_its_gpu(tmp_path, monkeypatch):
    """Every tensor of the file is marked as one of cuda:0."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    model, other = S.new_model(tiny()), S.new_model(tiny(seed=1))
    state = {"model": model.state_dict(), "optimizer": None, "rows": [{"update": 8}]}
    S.save(tmp_path / "x.pt", model, state)
    assert S.load(tmp_path / "x.pt", other)["rows"] == [{"update": 8}]
    assert torch.equal(other.embed.weight, model.embed.weight)


def test_two_programs_that_write_one_file_do_not_take_each_others_half(tmp_path, monkeypatch):
    """Each writes under a name of its own, which is gone when the file is whole."""
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: names.append(a) or replace(a, b))
    model = S.new_model(tiny())
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        S.save(tmp_path / "x.pt", model, {})
    assert len(set(names)) == 2 and list(tmp_path.iterdir()) == [tmp_path / "x.pt"]


def refused(arguments, capsys, monkeypatch):
    """The one line with which the command line ends, with status 2, before any work."""
    monkeypatch.setattr(S, "attempt", lambda *arguments: pytest.fail("work was begun"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        S.main(arguments)
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and printed == ""
    assert re.fullmatch(r"stabledrl\.py: error: .+\n", error)
    return error


def resume(out):
    """The command that goes on with what `train` has begun."""
    flags = f"{FLAGS} --loss stabledrl --updates 6 --log_every 2 --resume"
    return [*flags.split(), "--out", str(out)]


class Hostile:
    """A pickle of this makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("hostile-code-has-run",)


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("which", ["checkpoint", "base", "checkpoint without base"])
def test_a_damaged_or_hostile_file_is_refused_before_any_work_and_runs_no_code(
    which, tmp_path, monkeypatch, capsys
):
    """Empty, text, noise, cut off, a pickle that runs code, weights of another size, or parts
    missing. The line names the file."""
    path = train(tmp_path / "runs") / "checkpoint.pt"
    base = S.base_path(tiny(), tmp_path / "runs")
    if which == "base":
        path = base
    elif which == "checkpoint without base":
        base.unlink()
    good, state = path.read_bytes(), torch.load(path)
    parts = ["model", "rows", "probe"] + ["base"] * (which == "checkpoint")
    noise = np.random.default_rng(0)
    contents = [b"", b"hello", b"\x80\x02}.", b"\x80\x02J.", good[:-1]]
    contents += [noise.bytes(size) for size in (1, 10, 100, 5_000)]
    contents += [good[: int(len(good) * part)] for part in (0.001, 0.1, 0.5, 0.99)]
    contents += [pickle.dumps(Hostile()), saved(Hostile()), saved({}), saved([1])]
    contents += [saved(state | {"model": S.new_model(tiny(d_model=32)).state_dict()})]
    contents += [saved({key: state[key] for key in state if key != part}) for part in parts]
    monkeypatch.chdir(tmp_path)
    for content in contents:
        path.write_bytes(content)
        assert str(path) in refused(resume(tmp_path / "runs"), capsys, monkeypatch)
    assert not Path("hostile-code-has-run").exists()


def test_weights_of_another_architecture_are_refused(tmp_path, monkeypatch, capsys):
    """LayerNorm has become RMSNorm: the names and shapes of all weights are the same. First the base
    is of the other architecture, then the checkpoint alone."""

    class RMSNorm(torch.nn.LayerNorm):
        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn, "LayerNorm", RMSNorm)
        folder = train(tmp_path)
        train(tmp_path)
    base = S.base_path(tiny(), tmp_path)
    says = refused(resume(tmp_path), capsys, monkeypatch)
    assert str(base) in says and "another architecture" in says
    base.unlink()
    S.make_base(tmp_path, tiny())
    says = refused(resume(tmp_path), capsys, monkeypatch)
    assert str(folder) in says and "another architecture" in says


def test_a_checkpoint_beside_another_base_than_its_own_is_refused(tmp_path, monkeypatch, capsys):
    """Its `drift` would be that from another policy."""
    folder = train(tmp_path)
    train(tmp_path, seed=1)
    shutil.copy(S.base_path(tiny(seed=1), tmp_path), S.base_path(tiny(), tmp_path))
    says = refused(resume(tmp_path), capsys, monkeypatch)
    assert str(folder) in says and "began from another base policy" in says


CPU_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory")
GPU_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("error", [GPU_MEMORY, CPU_MEMORY, MemoryError("out of memory")])
def test_out_of_memory_is_no_damaged_file(error, tmp_path, monkeypatch, capsys):
    """Nobody is told to delete a good file."""
    train(tmp_path)
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    says = refused(resume(tmp_path), capsys, monkeypatch)
    assert "out of memory" in says and "Delete it" not in says


def test_a_run_does_not_go_back_to_fewer_updates(tmp_path, monkeypatch, capsys):
    """Its log would say so above rows that say otherwise."""
    train(tmp_path, updates=8)
    says = refused(resume(tmp_path), capsys, monkeypatch)
    assert "--updates 6: " in says and says.endswith(" has 8 already\n")


def test_a_finished_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    """Without --resume its folder must not exist."""
    folder = train(tmp_path)
    before = (folder / "log.jsonl").read_text()
    arguments = [argument for argument in resume(tmp_path) if argument != "--resume"]
    assert f"{folder} exists: --resume" in refused(arguments, capsys, monkeypatch)
    assert (folder / "log.jsonl").read_text() == before


# ==== Settings and the command line ===============================================================

BAD_INPUT = {
    "--lerning_rate 1": "unrecognized arguments",
    "--see 1": "unrecognized arguments",
    "--base_acc 0.1": "unrecognized arguments",
    "--updates 1.5": "--updates: invalid int",
    "--updates 600 1200": "two values of --updates or --device",
    "--device cpu cuda": "two values of --updates or --device",
    "--lr ten": "--lr: invalid float",
    "--mu 2.5": "--mu: invalid int",
    "--loss": "expected at least one argument",
    "--shared_masks 5": "--shared_masks must be",
    "--shared_masks True": "--shared_masks: invalid int",
    "--resume 0 1": "unrecognized arguments: 0 1",
    "--out a b": "unrecognized arguments: b",
    "--out file": "file",
    "--out file/x": "file",
    "--task chess": "--task is one of addition, ",
    "--loss ppo": "--loss is one of grpo, stabledrl",
    "--estimator magic": "--estimator is one of elbo, ",
    "--masks none": "--masks is one of independent, coupled",
    "--masks coupled --copies 2 3": "copies must be even",
    "--device tpu": "tpu",
    "--block_size 3": "lengths (6, 4) must be multiples of block_size 3",
    "--task addition5 --estimator exact": "block_size 8 is above 6",
    "--d_model 16 30": "d_model 30 is not a multiple of 2*2 heads",
    "--group_size 2 1": "--group_size must be a finite int, and at least 2",
    "--log_every 5": "--log_every must be a multiple of --mu",
    "--updates 30": "--updates must be a multiple of --log_every",
    "--base_accuracy 1.1": "--base_accuracy must be at most 1",
    "--seed -1": "--seed must be a finite int, and at least 0",
    "--max_grad_norm 0": "--max_grad_norm must be a finite float",
}
for name in "block_size d_model n_layer n_head copies prompts mu updates log_every".split():
    BAD_INPUT[f"--{name} 0"] = f"--{name} must be a finite int, and at least 1"
for name in "base_accuracy base_lr clip_eps lr max_grad_norm".split():
    for value in ("-1", "nan", "inf"):
        BAD_INPUT[f"--{name} {value}"] = f"--{name} must be a finite float, and at least"


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_clear_line_before_any_work_and_any_folder(
    flags, tmp_path, monkeypatch, capsys
):
    """Also where only a later configuration of the grid is bad."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    arguments = f"{FLAGS} --loss grpo {flags}".split()
    assert BAD_INPUT[flags] in refused(arguments, capsys, monkeypatch)
    assert os.listdir() == ["file"]


def test_without_its_checks_the_program_does_not_start(tmp_path, monkeypatch, capsys):
    """As under `python -O`, which compiles assertions away. (The real thing would compile all of
    torch again.)"""
    monkeypatch.chdir(tmp_path)
    optimised = types.ModuleType("optimised")
    optimised.__file__ = S.__file__
    monkeypatch.setitem(sys.modules, "optimised", optimised)
    exec(compile(SOURCE, S.__file__, "exec", optimize=1), vars(optimised))
    with pytest.raises(SystemExit) as stop:
        optimised.main(f"{FLAGS} --loss grpo --log_every 2 --updates 2".split())
    error = "stabledrl.py: error: python -O removes all checks: run python without it\n"
    assert stop.value.code == 2 and capsys.readouterr() == ("", error)
    assert os.listdir() == []


def no_scalar(log_ratio, advantages, clip_eps, group_size):
    return log_ratio * advantages


def no_gradient(log_ratio, advantages, clip_eps, group_size):
    return log_ratio.detach().mean()


def wrong_shape(log_ratio, advantages, clip_eps, group_size):
    return (log_ratio * torch.ones(5)).sum()


def one_group(log_ratio, advantages, clip_eps, group_size):
    return (log_ratio * advantages.view(-1, group_size)).sum()


def hide_nothing(num_seqs, copies, completion_len, block_size, generator):
    return torch.zeros(num_seqs, copies, completion_len, dtype=torch.bool)


def per_token(model, prompts, completions, block_size, masks, steps):
    return S.token_log_probs(model, prompts, completions, block_size, masks)[:, 0]


OWN = [
    ("loss", (no_scalar, 1.0), "the loss mine must be a scalar that depends on log_ratio"),
    ("loss", (no_gradient, 1.0), "the loss mine must be a scalar that depends on log_ratio"),
    (
        "loss",
        (wrong_shape, 1.0),
        f"test_program.py, line {wrong_shape.__code__.co_firstlineno + 1}: ",
    ),
    ("loss", (one_group, 1.0), f"test_program.py, line {one_group.__code__.co_firstlineno + 1}: "),
    ("masks", hide_nothing, "update 1 was not made: loss nan"),
    ("estimator", per_token, "shape must be (N,) = (16,), not [16, 4]"),
]


@pytest.mark.parametrize("flag,mine,says", OWN)
def test_what_you_register_is_tried_before_any_work(
    flag, mine, says, tmp_path, monkeypatch, capsys
):
    """Behind a configuration that works: neither run is begun, and no folder is made."""
    usual = next(iter(S.CHOICES[flag]))
    monkeypatch.setitem(S.CHOICES[flag], "mine", mine)
    flags = f"{FLAGS} --group_size 8 --{flag} {usual} mine --out {tmp_path / 'runs'}"
    assert says in refused(flags.split(), capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


WRONG = [
    {"reward": lambda prompt, completion: 0.5},
    {"prompt_len": 8},
    {"sample": lambda rng, n, split: (["12+34="] * n, ["46"] * n), "reward": lambda *texts: 1.0},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_task_whose_own_completions_are_not_right_is_refused(
    wrong, tmp_path, monkeypatch, capsys
):
    for name, value in wrong.items():
        monkeypatch.setattr(TASKS["addition"], name, value)
    says = "has another length or no reward 1"
    assert says in refused(f"{FLAGS} --out {tmp_path / 'runs'}".split(), capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


NAN = float("nan")
NO_CONFIG = [("mu", 2.5), ("copies", 1.9), ("shared_masks", "False"), ("shared_masks", 2)]
NO_CONFIG += [("lr", "x"), ("lr", NAN), ("seed", NAN), ("prompts", [2]), ("task", None)]


@pytest.mark.parametrize("name,value", NO_CONFIG)
def test_a_config_built_in_python_refuses_what_cannot_be(name, value):
    """As the command line does, in the same words."""
    with pytest.raises(AssertionError, match=f"--{name} (must be|is one of)"):
        S.Config(**{name: value})


def test_a_config_built_in_python_is_complete_and_canonical():
    """No field is None, for any task and loss. 1, 1.0 and True make one run, and so does the command
    line."""
    for task, loss in itertools.product(TASKS, S.LOSSES):
        config = S.Config(task=task, loss=loss)
        assert config.block_size == TASKS[task].block_size
        assert None not in vars(config).values()
        assert S.parse(["--task", task, "--loss", loss])[0] == [config]
    one = S.Config(shared_masks=1, clip_eps=1, mu=2.0)
    other = S.Config(shared_masks=True, clip_eps=1.0)
    assert json.dumps(vars(one)) == json.dumps(vars(other))


def cells(flags):
    return [(config.loss, config.estimator) for config in S.parse(flags.split())[0]]


def test_no_flags_mean_the_square():
    """GRPO and StableDRL, each on the estimated and on the exact ratio, 600 updates each. If one of
    the two flags is given, the other has its single default."""
    configs, out, resume = S.parse([])
    square = [
        S.Config(loss=a, estimator=b) for a in ("grpo", "stabledrl") for b in ("elbo", "exact")
    ]
    assert configs == square and (out, resume) == ("runs", False)
    assert {config.updates for config in configs} == {600}
    assert sorted(cells("--seed 0 1")) == sorted(cells("") * 2)
    assert cells("--loss grpo") == [("grpo", "elbo")]
    assert cells("--estimator exact") == [("stabledrl", "exact")]


def test_several_values_mean_a_run_for_each_combination():
    """Each once, also where a value or a flag is repeated."""
    flags = "--loss grpo stabledrl --estimator exact mean_field --seed 3 4 --seed 3 4 4"
    found = [(c.loss, c.estimator, c.seed) for c in S.parse(flags.split())[0]]
    expected = itertools.product(("grpo", "stabledrl"), ("exact", "mean_field"), (3, 4))
    assert found == list(expected)
    for flags, values in (("", [True]), ("0 1", [False, True]), ("0", [False])):
        configs, _, _ = S.parse(f"--loss grpo --shared_masks {flags}".split())
        assert [config.shared_masks for config in configs] == values


OTHER_VALUES = """
task chain, seed 1, block_size 1, d_model 32, n_layer 3, n_head 1, base_accuracy 0.5, base_lr 0.1,
loss grpo, estimator exact, masks coupled, shared_masks 1, copies 4, clip_eps 0.01, lr 0.1,
prompts 3, group_size 4, mu 1, max_grad_norm 2, log_every 20, updates 1200, device cuda"""


def others():
    """(name of a setting, the default configuration with another value of it), for all settings."""
    for setting in OTHER_VALUES.split(","):
        (config,), _, _ = S.parse(f"--loss stabledrl --{setting.strip()}".split())
        yield setting.split()[0], config


def test_every_setting_is_in_the_name_of_a_run():
    """But how far it goes on, and where: otherwise one run would overwrite another."""
    assert [name for name, _ in others()] == [field.name for field in dataclasses.fields(S.Config)]
    for name, config in others():
        assert config != S.Config()
        assert (S.run_name(config) == S.run_name(S.Config())) == (name in ("updates", "device"))
    named = S.Config(shared_masks=1, clip_eps=1, seed=3)
    assert S.run_name(named) == "addition-stabledrl-elbo-shared_masks=True-clip_eps=1.0-seed=3"
    assert S.run_name(S.Config(loss="grpo", clip_eps=0.2)) == "addition-grpo-elbo-seed=0"


def test_the_name_of_a_bases_file_depends_on_exactly_what_pretraining_reads():
    """But the device."""
    read = set()

    class Watched:
        def __getattr__(self, name):
            read.add(name)
            return getattr(tiny(), name)

    S.first_checkpoint(Watched(), S.pretrain(Watched()))
    usual = S.base_path(S.Config(), "")
    assert {name for name, config in others() if S.base_path(config, "") != usual} == read - {
        "device"
    }


def test_help_shows_every_setting_with_its_default_and_a_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        S.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--out" in shown and "--resume" in shown
    for field in dataclasses.fields(S.Config):
        line = re.search(rf"^ *{field.name}: {field.type.__name__} = (.*?)  # \w.*", shown, re.M)
        assert eval(line[1]) == field.default


# ==== What fails, and what is printed at the end ==================================================

FAILURES = [FloatingPointError, torch.OutOfMemoryError, MemoryError, OSError, ZeroDivisionError]


@pytest.mark.parametrize("error", FAILURES)
def test_one_failed_run_does_not_end_the_others(error, tmp_path, monkeypatch, capsys):
    """A number that is not finite, no memory left, a full disk: one line. An error in somebody's own
    loss: with its place. The other run goes on, and the status says that one has failed."""

    def unlucky(log_ratio, advantages, clip_eps, group_size):
        if len(log_ratio) > 2 * group_size:  # not when it is tried
            raise error("bad luck")
        return log_ratio.sum()

    monkeypatch.setitem(S.LOSSES, "unlucky", (unlucky, 1.0))
    flags = f"{FLAGS} --prompts 3 --updates 2 --log_every 2 --loss unlucky grpo"
    with pytest.raises(SystemExit) as stop:
        S.main([*flags.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and re.search("^addition-grpo.* update 2 ", printed, re.M)
    own_mistake = error is ZeroDivisionError
    line = re.search("^addition-unlucky.* FAILED: (.*)", printed, re.M)[1]
    assert line == ("Traceback (most recent call last):" if own_mistake else "bad luck")
    assert ("in unlucky" in printed) == ("Traceback" in printed) == own_mistake
    assert "bad luck\n" in printed


def test_a_base_that_cannot_be_made_fails_its_runs_and_no_others(tmp_path, monkeypatch, capsys):
    """Both losses of the base that never solves everything; its error is said once."""
    monkeypatch.setattr(S, "evaluate", lambda *arguments: {"accuracy": 0.0, "writes": []})
    flags = f"{FLAGS} --updates 2 --log_every 2 --base_accuracy 0 1 --loss grpo stabledrl"
    monkeypatch.setattr(S, "tqdm", lambda steps, **options: Bar(steps[-10:]))
    with pytest.raises(SystemExit) as stop:
        S.main([*flags.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and printed.count("FAILED") == 1
    assert "FAILED: --base_accuracy 1.0 is not reached in 2,000 updates\n" in printed
    assert len(list(tmp_path.glob("*/checkpoint.pt"))) == 2


class Bar(list):
    """As tqdm, but a list."""


def row(update, reward, accuracy=0.5, ratio_max=20.0, grad_norm=3.0):
    return dict(
        update=update,
        reward=reward,
        accuracy=accuracy,
        ratio_max=ratio_max,
        grad_norm=grad_norm,
        writes=[f"12+34={update} right"],
    )


def test_the_table_counts_in_multiples_of_the_base():
    """The base policy first; several seeds as mean ± standard deviation; a run that failed counts
    as 0. All numbers by hand: 0.9 / 0.2 = 4.5, and 0.3 / 0.1 = 3."""
    seeds = [[row(0, 0.2, 0.4), row(40, 0.9, 0.8)], [row(0, 0.1, 0.6), row(40, 0.3, 0.7)]]
    policies = {
        "good": [(rows, False) for rows in seeds],
        "half": [(seeds[0], False), (seeds[1], True)],
        "alone": [(seeds[0], False)],
    }
    _, *lines = S.table(policies)
    numbers = {}
    for line in lines:
        name, *rest = re.split(r"  +", line)
        numbers.setdefault(name, []).append(rest)
    base = "0.150 ± 0.071", "0.500 ± 0.141", "1.00 ± 0.00", "12+34=0 right"
    alone = "0.200", "0.400", "1.00", "12+34=0 right"
    assert numbers.pop("base policy") == [list(base), list(alone)]
    assert numbers == {
        "good": [["0.600 ± 0.424", "0.750 ± 0.071", "3.75 ± 1.06", "12+34=40 right"]],
        "half": [["0.450 ± 0.636", "0.400 ± 0.566", "2.25 ± 3.18", "12+34=40 right"]],
        "alone": [["0.900", "0.800", "4.50", "12+34=40 right"]],
    }


def test_in_the_table_each_policy_stands_behind_its_own_base():
    """Also where policies of two bases alternate: each base is there once."""
    policies = {}
    for label, reward in (("a", 0.1), ("b", 0.2), ("c", 0.1), ("d", 0.2)):
        policies[label] = [([row(0, reward), row(40, 0.4)], False)]
    _, *lines = S.table(policies)
    assert [line.split()[0] for line in lines] == ["base", "a", "c", "base", "b", "d"]


def test_a_base_without_reward_has_no_multiples():
    """Nor do its policies; several seeds of it end as others do."""
    seeds = [([row(0, 0), row(40, 0.4)], False)] * 2
    for line in S.table({"a": seeds})[1:]:
        assert "nan" in line


def test_the_program_says_how_far_it_is_and_ends_with_the_table_of_its_logs(tmp_path, capsys):
    """A line for every row of a log. Then the base and each policy, two seeds of each, what they
    write, and whether it is right."""
    flags = f"{FLAGS} --updates 2 --log_every 2 --loss grpo stabledrl --seed 0 1"
    S.main([*flags.split(), "--out", str(tmp_path)])
    *progress, _, base, one, other = capsys.readouterr().out.splitlines()
    assert [re.search(r"update (\d)  reward 0\.\d{3}$", line)[1] for line in progress] == [
        *"02"
    ] * 4
    for line, loss, i in ((base, "grpo", 1), (one, "grpo", -1), (other, "stabledrl", -1)):
        logs = [log_of(folder) for folder in sorted(tmp_path.glob(f"addition-{loss}-*"))]
        rewards = [log[i]["reward"] for log in logs]
        times = [log[i]["reward"] / log[1]["reward"] for log in logs]
        for numbers, digits in ((rewards, 3), (times, 2)):
            mean, deviation = statistics.mean(numbers), statistics.stdev(numbers)
            assert f" {mean:.{digits}f} ± {deviation:.{digits}f} " in line
        assert ("base policy" in line) == (i == 1) and line.endswith(
            ",  ".join(logs[0][i]["writes"])
        )
    reward = eval(REWARD)
    for prompt, completion, verdict in re.findall(r"(\d\d\+\d\d=)(\S+) (right|wrong)", other):
        assert (reward(prompt, completion) == 1) == (verdict == "right")
    assert other.count("wrong") + other.count("right") == 3


# ==== The figure, with the real matplotlib ========================================================


def draw(policies, path, monkeypatch):
    """-> the figure, drawn and saved without a warning."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: figures.append(self) or savefig(self, path)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PLOT(policies, path)
    (figure,) = figures
    assert path.stat().st_size > 1_000
    return figure


def curve(*rewards, **columns):
    """Rows of a log; update 0 has no ratios and no gradient."""
    rows = [row(40 * i, reward, **columns) for i, reward in enumerate(rewards)]
    del rows[0]["ratio_max"], rows[0]["grad_norm"]
    return rows


def test_the_figure_shows_seeds_thin_their_mean_thick_and_where_one_failed(tmp_path, monkeypatch):
    """A panel for each column: rewards on a linear axis from 0 with plain ticks, the others
    logarithmic. The mean goes as far as all seeds, and the one that failed up to its end."""
    wild = curve(0.2, 0.3, 0.7, ratio_max=1e6, grad_norm=1e4)
    three_curves = (curve(0.2, 0.4, 0.5), wild, curve(0.2, 0.35, 0.6))
    policies = {
        "good": [(rows, False) for rows in three_curves],
        "bad": [(curve(0.2, 0.1), True), (curve(0.2, 0.1, 0.0), False)],
    }
    figure = draw(policies, tmp_path / "plot.svg", monkeypatch)
    reward, *others = figure.axes
    assert [axis.get_title() for axis in figure.axes] == list(S.PANELS.values())
    assert reward.get_yscale() == "linear" and reward.get_ylim()[0] == 0
    assert {axis.get_yscale() for axis in others} == {"log"}
    ticks = [tick.get_text() for tick in reward.get_yticklabels()]
    assert len(ticks) > 3 and all(re.fullmatch(r"\d\.\d+", tick) for tick in ticks)
    assert reward.yaxis.get_offset_text().get_text() == ""
    lines = [line for line in reward.lines if len(line.get_xdata()) > 1]
    drawn = {line: list(line.get_ydata()) for line in lines}
    base = [line for line in lines if drawn[line] == pytest.approx([0.2, 0.2])]
    assert [line.get_label() for line in base][0] == "base policy"
    for label, mean, seeds in (
        ("good", [0.2, 0.35, 0.6], [[0.2, 0.4, 0.5], [0.2, 0.3, 0.7], [0.2, 0.35, 0.6]]),
        ("bad", [0.2, 0.1], [[0.2, 0.1], [0.2, 0.1, 0.0]]),
    ):
        (thick,) = [line for line in lines if line.get_label() == label]
        assert drawn[thick] == pytest.approx(mean) and thick.get_linewidth() == 2
        thin = [line for line in lines if line.get_color() == thick.get_color() and line != thick]
        assert [drawn[line] for line in thin] == seeds
        assert all(line.get_linewidth() < 1 for line in thin)
        for line, (_, failed) in zip(thin, policies[label], strict=True):
            assert (line.get_marker() == "x") == failed and line.get_markevery() == [-1]
        assert thick.get_marker() in ("", "None")
    for axis, column in zip(others, ("ratio_max", "grad_norm")):
        seeds = [[row[column] for row in rows[1:]] for rows in three_curves]
        (thick,) = [line for line in axis.lines if line.get_label() == "good"]
        assert list(thick.get_ydata())[1:] == [*map(statistics.median, zip(*seeds))]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base policy", "good", "bad"]


def test_the_figure_is_readable_with_3_and_with_20_policies(tmp_path, monkeypatch):
    """Each has a colour and a kind of line of its own. The figure grows with the legend, so that the
    panels stay as high as before, and nothing lies outside of it."""
    heights = []
    for n in (3, 20):
        label = "addition, stabledrl, trajectory, copies=4, policy "
        policies = {f"{label}{i}": [(curve(0.2, i / n), False)] for i in range(n)}
        figure = draw(policies, tmp_path / "plot.svg", monkeypatch)
        (legend,) = figure.legends
        kinds = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
        assert len(kinds) == n + 1
        heights.append(figure.get_figheight())
        assert figure.axes[0].get_position().height * figure.get_figheight() > 1.5
        extent = legend.get_window_extent()
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1 and extent.y1 <= figure.bbox.y1
    assert heights[0] < heights[1]


def test_the_figure_takes_any_number_without_a_warning(tmp_path, monkeypatch):
    """Columns that are all 0 (a policy that has collapsed), or as large as numbers get; a run that
    failed at once; and no run at all, if all bases have failed."""
    huge = curve(0, 0, 0, ratio_max=1e304, grad_norm=1e304)
    zero = curve(0, 0, 0, ratio_max=0.0, grad_norm=0.0)
    for logs in ([huge, zero], [zero, zero], []):
        policies = {f"{i}": [(rows, False), (rows[:1], True)] for i, rows in enumerate(logs)}
        with monkeypatch.context() as patch:
            draw(policies, tmp_path / "plot.svg", patch)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    """Everything else works."""
    monkeypatch.setattr(S, "plot", PLOT)
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    S.main([*resume(tmp_path)])
    *_, line, last = capsys.readouterr().out.splitlines()
    assert last == "no figure: pip install matplotlib, and repeat the command with --resume"
    assert line.startswith("addition, stabledrl, elbo, ")


# ==== README ======================================================================================


def test_readme_code_runs(tmp_path, monkeypatch):
    """Every python block, in a fresh namespace. Runs that it reads are there, under their names."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    blocks = [code for code in blocks if "import" in code]  # others quote stabledrl.py
    folder = train(tmp_path / "tiny")
    for path in re.findall(r"runs/[\w.=-]*seed=\d+", " ".join(blocks)):
        shutil.copytree(folder, path, dirs_exist_ok=True)
    for code in blocks:
        with mock.patch.dict(S.LOSSES), mock.patch.dict(S.ESTIMATORS), mock.patch.dict(S.MASKS):
            exec(compile(code, "README.md", "exec"), {})


def test_readme_commands_are_accepted_and_every_flag_exists():
    """In README, and at the top of each task. Flags of other programs stand beside the path of their
    file."""
    files = [README, *(path.read_text("utf-8") for path in ROOT.glob("toy_tasks/*.py"))]
    text = "\n".join(files).replace("\\\n", "")
    commands = re.findall(r"python stabledrl\.py (--[^`\n#&|]*)", text)
    commands += re.findall(r"^(--.*?)  ", README, re.M)  # what it says to append
    assert len(commands) > 10 and all(S.parse(command.split())[0] for command in commands)
    known = {"out", "resume", "help", *S.SETTINGS}
    for line in (README + SOURCE).splitlines():
        if ".github/" not in line:
            assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", line)) <= known, line


# ==== Threads and processes =======================================================================


@pytest.mark.parametrize("threads", [None, "1", "2"])
def test_a_run_takes_one_thread_unless_the_environment_says_otherwise(threads, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(SystemExit):
        S.main(["--help"])
    assert set_to == ([] if threads else [1])


@linux
@pytest.mark.parametrize("cores,threads,jobs", [(2, 1, 2), (2, 2, 1), (8, 2, 4), (2, 8, 1)])
def test_as_many_runs_go_side_by_side_as_the_cores_allow(cores, threads, jobs, monkeypatch):
    """Cores that this process may use, divided by the threads of a run."""
    pools = []

    class Pool:
        map = staticmethod(map)

        def __init__(self, jobs, context, first):
            pools.append((jobs, context.get_start_method()))

    monkeypatch.setattr(S, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert LAUNCH(abs, [-1, -2, -3], True) == [1, 2, 3] and pools == [(jobs, "fork")]
    assert LAUNCH(abs, [-1, -2, -3], False) == [1, 2, 3] and len(pools) == 1


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("flags", ["--seed 0 1", "--seed 0", "--seed 0 1 --device cuda"])
def test_runs_go_side_by_side_where_processes_can_be_forked(platform, flags, monkeypatch, tmp_path):
    """And one after the other elsewhere, on a GPU, or if there is one alone."""
    found = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(S, "launch", lambda work, configs, fork: found.append(fork) or [])
    with pytest.raises(SystemExit):  # as no base was made
        S.main(["--loss", "grpo", *flags.split(), "--out", str(tmp_path)])
    assert found == [platform == "linux" and flags == "--seed 0 1"] * 3  # trials, bases, runs


# The program as a process of its own, several times. To load torch once, one process does that, and
# forks another for each line "FOLDER FLAGS" that it gets: the program, which leads a group of
# processes, and is watched. (An optimiser makes torch load more, which each worker would do again.)
FORGE = f"""
import concurrent.futures, os, random, runpy, signal, sys, numpy, toy_tasks, tqdm
print("torch is loaded:", "torch" in sys.modules)
import torch

def state():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
            torch.get_num_threads(), torch.get_default_dtype())

before = state()
import stabledrl
print("state is changed:", state() != before, "matplotlib" in sys.modules, flush=True)
backward, bar = torch.autograd.backward, tqdm.tqdm

def watched_backward(*arguments, **options):
    assert os.getpid() != os.getpgrp(), "the process that forks has run a backward pass"
    return backward(*arguments, **options)

def watched_bar(*arguments, **options):
    print("a base is made", flush=True)
    return bar(*arguments, **options)

class WatchedPool(concurrent.futures.ProcessPoolExecutor):
    def __init__(self, jobs, *arguments):
        print(jobs, "workers", flush=True)
        super().__init__(jobs, *arguments)

os.sched_getaffinity = lambda process: {{0, 1}}
torch.autograd.backward, tqdm.tqdm = watched_backward, watched_bar
concurrent.futures.ProcessPoolExecutor = WatchedPool
torch.optim.Adam([torch.zeros(1)])
toy_tasks.TASKS["addition"].reward = {REWARD}
sys.modules["matplotlib"] = None
os.dup(1)  # held open by all that live
programs = []
for line in sys.stdin:
    out, *flags = line.split()
    programs.append(os.fork())
    if programs[-1] == 0:
        os.setsid()
        stabledrl.start_worker()  # it dies with this process
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for i, name in ((1, "printed"), (2, "errors")):
            os.dup2(os.open(os.path.join(out, name), os.O_CREAT | os.O_WRONLY), i)
        sys.argv[1:] = [*flags, "--out", out]
        runpy.run_path("stabledrl.py", run_name="__main__")
        sys.exit()
    print(programs[-1], flush=True)
for program in programs:
    print(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), flush=True)
"""
PAIR = f"{FLAGS} --base_accuracy 0.002 --log_every 6 --loss grpo stabledrl --resume"


def first_worker(program):
    return int(Path(f"/proc/{program}/task/{program}/children").read_text().split()[0])


STOP = {
    "kill": lambda program: os.kill(program, signal.SIGKILL),
    "interrupt-all": lambda program: os.killpg(program, signal.SIGINT),  # as a terminal does
    "interrupt": lambda program: os.kill(program, signal.SIGINT),
    "kill-a-worker": lambda program: os.kill(first_worker(program), signal.SIGKILL),
}


@pytest.fixture(scope="module", autouse=sys.platform == "linux")
def forge(tmp_path_factory):
    """A folder, and the process FORGE. It begins with the first test of this file, and makes two
    runs side by side, from the beginning to the end, in `whole`."""
    folder = tmp_path_factory.mktemp("programs")
    process = subprocess.Popen(
        [sys.executable, "-c", FORGE],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    (folder / "whole").mkdir()
    print(folder / "whole", PAIR, "--updates 60", file=process.stdin, flush=True)
    yield folder, process
    process.kill()


@pytest.fixture(scope="module")
def programs(forge):
    """The same at their end; and four pairs of runs that were asked for 60,000 updates, each stopped
    in one way, at a random moment after their first checkpoints -> the folder, what FORGE has
    printed while it started, and the status of each program."""
    folder, process = forge
    imported = process.stdout.readline() + process.stdout.readline()
    process.stdout.readline()
    running, deadline = {}, time.monotonic() + 120
    for name in STOP:
        (folder / name).mkdir()
        print(folder / name, PAIR, "--updates 60000", file=process.stdin, flush=True)
        running[name] = int(process.stdout.readline())
    while running:
        time.sleep(0.005)
        assert time.monotonic() < deadline, f"no two checkpoints of {list(running)}"
        for name, program in list(running.items()):
            if len(list((folder / name).glob("*/checkpoint.pt"))) == 2:
                time.sleep(random.uniform(0, 0.1))
                STOP[name](program)
                del running[name]
    printed, _ = process.communicate(timeout=60)  # returns when no process of them lives any more
    statuses = dict(zip(["whole", *STOP], map(int, printed.split()), strict=True))
    return folder, imported, statuses


@linux
def test_importing_does_nothing_visible(programs):
    """No output, no seeding, no change of threads or defaults; and toy_tasks needs no torch."""
    _, imported, _ = programs
    assert imported == "torch is loaded: False\nstate is changed: False False\n"


@linux
def test_two_runs_go_side_by_side_on_one_thread_each(programs):
    """Trials, bases and runs, on two cores with OMP_NUM_THREADS=1, usual on clusters. Two runs of
    one base make it once. And the process that forks never runs a backward pass: where torch sees a
    GPU, autograd would not survive it. (The watched program would end with an error.)"""
    folder, _, statuses = programs
    printed = (folder / "whole" / "printed").read_text()
    assert statuses["whole"] == 0, (folder / "whole" / "errors").read_text()
    assert re.findall(r"^(\d+) workers", printed, re.M) == ["2"] * 3
    assert printed.count("a base is made") == 1 and "FAILED" not in printed


@linux
def test_a_run_is_the_same_alone_and_in_company(programs, tmp_path, monkeypatch):
    """Bit for bit, but for the seconds."""
    folder, _, _ = programs
    monkeypatch.setattr(S, "evaluate", EVALUATE)
    S.main([*PAIR.split(), "--loss", "stabledrl", "--updates", "60", "--out", str(tmp_path)])
    (alone,) = tmp_path.glob("addition*")
    assert_same_run(folder / "whole" / alone.name, alone)


@linux
def test_two_runs_killed_at_any_moment_end_as_if_they_had_not_been(programs, monkeypatch):
    """SIGKILL to their parent, and no child goes on behind its back. With --resume all is the same,
    bit for bit."""
    folder, _, statuses = programs
    monkeypatch.setattr(S, "evaluate", EVALUATE)
    killed = list((folder / "kill").glob("addition*"))
    logs = [log_of(run) for run in killed]
    time.sleep(0.1)
    assert logs == [log_of(run) for run in killed] and statuses["kill"] == -signal.SIGKILL
    S.main([*PAIR.split(), "--updates", "60", "--out", str(folder / "kill")])
    for run in killed:
        assert_same_run(folder / "whole" / run.name, run)


@linux
@pytest.mark.parametrize("name", [name for name in STOP if name != "kill"])
def test_an_interruption_is_one_line_and_a_quick_end(name, programs):
    """By Ctrl-C, or the death of a worker: no traceback, and no process that goes on."""
    folder, _, statuses = programs
    printed = (folder / name / "printed").read_text()
    errors = (folder / name / "errors").read_text()
    assert statuses[name] == 1 and "Traceback" not in errors
    *lines, last = (errors if "worker" in name else printed).splitlines()
    assert "--resume goes on" in last
    assert all(re.search("  update |workers$|base is made$", line) for line in lines)
