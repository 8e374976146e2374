"""What the program does with files, processes and flags: each kind of mishap once.

Tests of several runs side by side start the program as a process of its own: a process that has run
a backward pass, as this one may have, cannot be forked where torch sees a GPU.
"""

import ast
import dataclasses
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import stabledrl as S
from test_stabledrl import MODEL, SOURCE, log_lines, setting, tiny, tiny_model, train

FLAGS = (
    "--updates 600 --log_every 6 --seed 3 --estimator elbo --prompts 2 --group_size 3 "
    "--d_model 16 --n_layer 1 --n_head 2 --base_accuracy 0"
)

def start(flags, program=("stabledrl.py",), **options):
    """The real program as a process of its own, on two threads."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job would ignore it
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MPLBACKEND": "agg"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, *program, *flags.split()]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

# Files and resume ---------------------------------------------------------------------------------

def assert_same_run(a, b):
    """Logs that are equal but for the seconds, bit-identical weights and optimiser state."""
    for one, other in zip(log_lines(a), log_lines(b), strict=True):
        assert dict(json.loads(one), seconds=0) == dict(json.loads(other), seconds=0)
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (a, b))
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)
    states = one["optimizer"]["state"], other["optimizer"]["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)

def two_checkpoints(folder, process):
    """Wait until both runs have written one, or the process has ended."""
    while process.poll() is None and len(list(folder.glob("*/checkpoint.pt"))) < 2:
        time.sleep(0.005)

@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_two_runs_killed_at_any_moment_end_as_if_they_had_not_been(kills, tmp_path):
    """Two policies in two processes, SIGKILL to their parent at a random moment: no child goes on
    behind its back. Then --resume, and the logs of runs that were not killed."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    updates = 60 * (kills + 1)
    flags = f"{FLAGS} --updates {updates} --loss grpo stabledrl --resume"
    for i in range(kills):
        process = start(f"{flags} --out {killed}")
        two_checkpoints(killed, process)
        time.sleep(random.uniform(0, 0.2) + 0.5 * (i > 0))
        process.kill()
        process.communicate(timeout=30)  # returns when no child holds the pipe any more
        logs = [log_lines(folder) for folder in killed.glob("addition*")]
        time.sleep(0.2)
        assert logs == [log_lines(folder) for folder in killed.glob("addition*")]
    assert min(map(len, logs)) < 1 + updates / 6, "killed too late"
    for out in (killed, whole):
        process = start(f"{flags} --out {out}")
        process.communicate()
        assert process.returncode == 0
    for folder in killed.glob("addition*"):
        assert_same_run(whole / folder.name, folder)

RESUME = "interrupted: the same command with --resume goes on from the last lines"
BROKEN = (
    "stabledrl.py: A process in the process pool was terminated abruptly while the future was "
    "running or pending. The same command with --resume goes on."
)

@pytest.mark.parametrize(
    "event,says", [("group", RESUME), ("parent", RESUME), ("worker", BROKEN)]
)
def test_an_interruption_is_one_line(event, says, tmp_path):
    """SIGINT to the group of processes, as from a terminal, or to the parent alone; or SIGKILL to a
    worker: no traceback, and all is over within a few seconds."""
    flags = f"{FLAGS} --loss grpo stabledrl --updates 60000 --out {tmp_path}"
    process = start(flags, start_new_session=True)
    while process.poll() is None and len(list(tmp_path.glob("*/checkpoint.pt"))) < 2:
        time.sleep(0.005)
    if event == "group":
        os.killpg(process.pid, signal.SIGINT)
    elif event == "parent":
        process.send_signal(signal.SIGINT)
    else:
        children = Path(
            f"/proc/{process.pid}/task/{process.pid}/children"
        ).read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1] == says

@pytest.mark.parametrize(
    "module,function,call",
    [(torch, "save", 2), (os, "replace", 2), (Path, "write_text", 3)],
)
def test_a_crash_while_something_is_written_costs_one_line_at_most(
    module, function, call, tmp_path, monkeypatch
):
    """While the second of three lines is written: the first checkpoint is whole, and the run goes
    on. (The log is also written at the start.)"""
    train(tmp_path / "whole", updates=6)
    original, calls = getattr(module, function), []

    def crash(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("power cut")
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(
        RuntimeError, match="power cut"
    ):
        patch.setattr(module, function, crash)
        train(tmp_path / "crashed", updates=6)
    assert len(torch.load(tmp_path / "crashed" / "checkpoint.pt")["rows"]) == 1
    train(tmp_path / "crashed", updates=6)
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")

def test_a_run_that_goes_on_is_the_run_that_was_asked_for_at_once(
    tmp_path, monkeypatch
):
    """One line, then three: also where the estimate draws from torch's global stream, and where the
    log was deleted."""

    def noisy(model, **batch):
        return S.elbo(model, **batch) * (1 + torch.rand(len(batch["completions"])))

    monkeypatch.setitem(S.ESTIMATORS, "noisy", noisy)
    train(tmp_path / "whole", estimator="noisy", updates=6)
    train(tmp_path / "cut", estimator="noisy", updates=2)
    torch.manual_seed(99)
    for _ in range(2):
        (tmp_path / "cut" / "log.jsonl").unlink()
        train(tmp_path / "cut", estimator="noisy", updates=6)
        assert_same_run(tmp_path / "whole", tmp_path / "cut")

def test_a_file_is_read_without_its_gpu_and_written_under_a_name_of_ones_own(
    tmp_path, monkeypatch
):
    """Every tensor of the file is marked as one of cuda:0. Two programs that write one file at the
    same time do not take each other's half away."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    names, replace = set(), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: names.add(a) or replace(a, b))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        S.save(tmp_path / "x.pt", model=MODEL, rows=[1])
    other = tiny_model(seed=5)
    assert S.load(tmp_path / "x.pt", model=other) == [1] and len(names) == 2
    assert torch.equal(other.embed.weight, MODEL.embed.weight)

class Hostile:
    """A pickle of this makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("hostile-code-has-run",)

def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_refused_before_any_work_and_runs_no_code(
    tmp_path, monkeypatch, capsys
):
    """Empty, text, noise, cut off, a pickle that runs code, weights of another size."""
    config, flags = (
        tiny(),
        f"{FLAGS} --seed 0 --updates 4 --log_every 2 --resume --out {tmp_path}",
    )
    folder, base = tmp_path / S.run_name(config), S.base_path(config, tmp_path)
    train(folder)
    good = (folder / "checkpoint.pt").read_bytes()
    base.write_bytes(good)
    S.main(flags.split())
    contents = [
        b"",
        b"hello",
        b"\x80\x02}.",
        np.random.default_rng(0).bytes(5_000),
        good[:-1],
    ]
    contents += [good[: int(len(good) * part)] for part in (0.001, 0.1, 0.5, 0.99)]
    contents += [pickle.dumps(Hostile()), saved(Hostile()), saved({}), saved([1])]
    contents += [saved({"model": MODEL.state_dict(), "rows": []})]
    monkeypatch.chdir(tmp_path)
    for path, content in itertools.product(
        (folder / "checkpoint.pt", base), contents
    ):
        path.write_bytes(content)
        says = refused(flags, capsys, monkeypatch)
        assert says.startswith(
            f"stabledrl.py: error: {path} is damaged, or of another task or model"
        )
        path.write_bytes(good)
    assert not Path("hostile-code-has-run").exists()

# §9 -----------------------------------------------------------------------------------------------

def refused(flags, capsys, monkeypatch):
    """The one line with which the command line ends, with status 2, before any work."""
    monkeypatch.setattr(S, "launch", lambda *arguments: pytest.fail("work was begun"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        S.main(flags.split())
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith("stabledrl.py: error: ")
    return error

BAD_INPUT = {
    "--lerning_rate 1": "unrecognized arguments",
    "--updates 1.5": "--updates: invalid int",
    "--lr ten": "--lr: invalid float",
    "--loss": "expected at least one argument",
    "--shared_masks 5": "unrecognized arguments: 5",
    "--resume 0 1": "unrecognized arguments: 0 1",
    "--out a b": "unrecognized arguments: b",
    "--masks coupled --copies 2 3": "copies must be even",
    "--task chess": "invalid choice",
    "--loss ppo": "invalid choice",
    "--device tpu": "tpu",
    "--estimator magic": "invalid choice",
    "--masks none": "invalid choice",
    "--block_size 3": "lengths (6, 4) must be multiples of block_size 3",
    "--d_model 30": "d_model 30 is not a multiple of 2*4 heads",
    "--out /dev/null/x": "/dev/null/x",
    "--mu 3": "--log_every must be a multiple",
    "--updates 30": "--updates must be a multiple",
    "--task addition5 --estimator exact": "block_size 8 is above 6",
    "--base_accuracy 1.1": "--base_accuracy must be at most 1",
    "--group_size 1": "--group_size must be finite, and at least 2",
    "--seed -1": "--seed must be finite, and at least 0",
}
for (
    name
) in "block_size d_model n_layer n_head copies prompts mu updates log_every".split():
    BAD_INPUT[f"--{name} 0"] = f"--{name} must be finite, and at least 1"
for name in "base_lr clip_eps lr max_grad_norm base_accuracy".split():
    for value in ("-1", "nan", "inf"):
        BAD_INPUT[f"--{name} {value}"] = f"--{name} must be finite, and at least 0"

@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_status_2(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert BAD_INPUT[flags] in refused(flags, capsys, monkeypatch)

def no_scalar(log_ratio, advantages, clip_eps, group_size):
    return log_ratio * advantages

def per_token(model, prompts, completions, block_size, masks, steps):
    return S.token_log_probs(model, prompts, completions, masks, block_size)[:, 0]

def hide_nothing(num_seqs, copies, completion_len, block_size, generator):
    return torch.zeros(num_seqs, copies, completion_len, dtype=torch.bool)

def no_gradient(log_ratio, advantages, clip_eps, group_size):
    return log_ratio.detach().mean()

OWN = {
    "loss": ((no_scalar, 1.0), "is not a finite number"),
    "masks": (hide_nothing, "is not a finite number with a gradient, from [nan"),
    "estimator": (per_token, "shape must be (N,) = (32,), not [8, 4]"),
}

@pytest.mark.parametrize("flag", OWN)
def test_what_you_register_is_tried_before_any_work(
    flag, tmp_path, monkeypatch, capsys
):
    mine, says = OWN[flag]
    monkeypatch.setitem(S.CHOICES[flag], "mine", mine)
    assert says in refused(
        f"--mu 2 --{flag} mine --out {tmp_path}", capsys, monkeypatch
    )

def test_a_loss_without_a_gradient_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(S.LOSSES, "mine", (no_gradient, 1.0))
    says = refused(f"--loss mine --out {tmp_path}", capsys, monkeypatch)
    assert "not a finite number with a gradient" in says

def test_a_run_does_not_go_back_to_fewer_updates(tmp_path, monkeypatch, capsys):
    """Its log would say so above rows that say otherwise."""
    S.main(f"{FLAGS} --updates 12 --out {tmp_path}".split())
    says = refused(f"{FLAGS} --updates 6 --resume --out {tmp_path}", capsys, monkeypatch)
    assert "--updates 6: " in says and says.endswith(" has 12 already\n")

def test_a_console_that_lacks_a_letter_gets_it_as_a_number(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    S.report("somebody's ρ̂")
    stream.flush()
    assert b"somebody's \\u03c1\\u0302" in stream.buffer.getvalue()

def test_a_finished_run_is_never_overwritten(tmp_path, monkeypatch, capsys):
    train(tmp_path / "addition-grpo-elbo-seed=0")
    before = log_lines(tmp_path / "addition-grpo-elbo-seed=0")
    assert "exists: --resume it" in refused(
        f"--loss grpo --out {tmp_path}", capsys, monkeypatch
    )
    assert log_lines(tmp_path / "addition-grpo-elbo-seed=0") == before

def test_no_flags_mean_the_main_job_and_several_values_their_product():
    configs, out, resume = S.parse([])
    main_job = [
        S.Config(loss="grpo"),
        S.Config(loss="grpo", estimator="exact"),
        S.Config(),
    ]
    assert configs == main_job and out == "runs" and not resume
    flags = (
        "--loss grpo stabledrl --estimator exact mean_field --seed 3 4 --seed 3 4 4"
    )
    configs, _, _ = S.parse(flags.split())
    found = [(config.loss, config.estimator, config.seed) for config in configs]
    expected = itertools.product(
        ("grpo", "stabledrl"), ("exact", "mean_field"), (3, 4)
    )
    assert found == list(expected), "each run once"

def test_help_explains_each_flag_gives_its_default_and_is_ascii(capsys):
    """Consoles under Windows may know no other letters: so it is for all strings of the code."""
    with pytest.raises(SystemExit):
        S.main(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(S.Config):
        assert re.search(
            rf"^ *{field.name} +\w", shown, re.M
        ), "Config's docstring explains it"
        assert re.search(rf"--{field.name}\b.*?default: {field.default}", shown, re.S)
    tree = ast.parse(SOURCE)
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef)
    parts = [node for node in ast.walk(tree) if isinstance(node, defined)]
    prose = [ast.get_docstring(node, clean=False) for node in parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value not in prose:
            assert str(node.value).isascii()
    assert shown.isascii()

def test_main_says_how_far_it_is_and_how_to_get_a_figure(tmp_path, capsys):
    S.main(f"{FLAGS} --updates 12 --out {tmp_path}".split())
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"base policies: {tmp_path}/base-*.pt; delete them after a change"
    )
    for line, update in zip(lines, (6, 12), strict=True):
        assert re.search(rf"-seed=3  update {update}  reward 0\.\d{{3}}$", line)
    assert (
        last
        == "no figure: pip install matplotlib, and repeat the command with --resume"
    )

def test_the_figure_has_a_panel_for_each_column_and_a_line_for_each_run(
    tmp_path, monkeypatch
):
    """With a stand-in for matplotlib that notes what is drawn. No logarithmic axis: a column of
    zeros would be lost on it, with a warning."""
    pyplot, figure, axes = (
        mock.MagicMock(),
        mock.MagicMock(),
        [mock.MagicMock() for _ in S.PANELS],
    )
    pyplot.subplots.return_value = figure, [axes]
    monkeypatch.setitem(sys.modules, "matplotlib", mock.MagicMock(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    S.main(f"{FLAGS} --updates 12 --loss grpo stabledrl --out {tmp_path}".split())
    for axis, column in zip(axes, S.PANELS):
        for call, loss in zip(
            axis.plot.call_args_list, ("grpo", "stabledrl"), strict=True
        ):
            assert call.args[0] == (6, 12) and f", {loss}, " in call.kwargs["label"]
        axis.set.assert_called_once_with(
            title=column, xlabel="update", yscale="symlog"
        )
    figure.savefig.assert_called_once_with(tmp_path / "plot.svg")

FAILURES = [
    FloatingPointError("bad luck"),
    torch.OutOfMemoryError("bad luck"),
    OSError("bad luck"),
    ZeroDivisionError("bad luck"),
]

@pytest.mark.parametrize("error", FAILURES)
def test_one_failure_does_not_end_the_others(error, tmp_path, monkeypatch, capsys):
    """A number that is not finite, no memory left, a full disk: one line. An error in somebody's
    own loss: with its traceback. The other run goes on, and the status says that one failed.
    """

    def unlucky(log_ratio, advantages, clip_eps, group_size):
        if log_ratio.any():  # not when it is tried
            raise error
        return log_ratio.sum()

    monkeypatch.setitem(S.LOSSES, "unlucky", (unlucky, 1.0))
    with pytest.raises(SystemExit) as stop:
        S.main(f"{FLAGS} --updates 6 --loss unlucky grpo --out {tmp_path}".split())
    out = capsys.readouterr().out
    assert stop.value.code == 1 and re.search("addition-grpo.* update 6 ", out)
    assert re.search("addition-unlucky.* FAILED: ", out) and "bad luck\n" in out
    assert (
        ("in unlucky" in out)
        == ("Traceback" in out)
        == isinstance(error, ZeroDivisionError)
    )

def test_a_base_that_cannot_be_made_fails_its_runs_and_no_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(S, "tqdm", lambda steps, disable: steps[:1])
    with pytest.raises(SystemExit) as stop:
        S.main(f"{FLAGS} --updates 6 --base_accuracy 0 1 --out {tmp_path}".split())
    out = capsys.readouterr().out
    assert stop.value.code == 1 and out.count("FAILED") == 1
    assert "FAILED: --base_accuracy 1.0 is not reached in 2,000 updates" in out
    assert len(list(tmp_path.glob("*/checkpoint.pt"))) == 1

NOTED = """
import os, sys, torch, stabledrl
parent, backward, pretrain = os.getpid(), torch.autograd.backward, stabledrl.pretrain
def noted(*arguments, **options):
    assert os.getpid() != parent, "the process that forks has run a backward pass"
    return backward(*arguments, **options)
def counted(config):
    print("a base is made", flush=True)
    return pretrain(config)
torch.autograd.backward, stabledrl.pretrain = noted, counted
stabledrl.main(sys.argv[1:])
"""

def test_the_process_that_forks_never_runs_a_backward_pass(tmp_path):
    """Where torch sees a GPU, autograd does not survive a fork. Two runs, one base to be made: in a
    worker, and once."""
    flags = f"{FLAGS} --updates 6 --base_accuracy 0.002 --loss grpo stabledrl --out {tmp_path}"
    process = start(flags, program=("-c", NOTED))
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    assert (
        out.count("a base is made") == 1
        and len(list(tmp_path.glob("*/checkpoint.pt"))) == 2
    )

@pytest.mark.parametrize("platform,jobs", [("linux", 2), ("darwin", 1), ("win32", 1)])
def test_runs_go_side_by_side_where_processes_can_be_forked(
    platform, jobs, monkeypatch
):
    """And one after the other elsewhere, on a GPU, or if there is one alone."""
    found = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(S, "check", lambda *arguments: None)
    monkeypatch.setattr(
        S, "launch", lambda work, configs, out, n: found.append(n) or [[1]] * 3
    )
    for flags in ("--seed 0 1 2", "--seed 0", "--seed 0 1 2 --device cuda"):
        S.main(["--loss", "grpo", *flags.split()])
    assert found == [jobs] * 2 + [1] * 4  # bases, runs

def test_an_output_that_cannot_be_written_costs_its_lines_and_not_the_run(tmp_path):
    """As with `python stabledrl.py | head`: both runs, side by side, come to their end."""
    reader, writer = os.pipe()
    os.close(reader)
    flags = f"{FLAGS} --updates 12 --loss grpo stabledrl --out {tmp_path}"
    process = start(flags, stdout=writer)
    os.close(writer)
    _, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors
    logs = [log_lines(path.parent) for path in tmp_path.glob("*/log.jsonl")]
    assert [len(log) for log in logs] == [3, 3]

QUIET = """
import sys, toy_tasks
assert "torch" not in sys.modules
import random, numpy, torch
def state():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
            torch.get_num_threads(), torch.get_default_dtype())
before = state()
import stabledrl
assert state() == before and "matplotlib" not in sys.modules
"""

def test_importing_does_nothing_visible():
    """No output, no seeding, no change of threads or defaults; and toy_tasks needs no torch."""
    process = start("", program=("-c", QUIET))
    assert process.communicate() == ("", "") and process.returncode == 0

# README -------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")

def test_readme_code_runs(tmp_path, monkeypatch):
    """Every python block, in a fresh namespace, after a run of the name that one of them reads."""
    monkeypatch.chdir(tmp_path)
    config = S.Config(updates=2, log_every=2, prompts=2)
    S.train(config, S.new_model(config), Path("runs/addition-stabledrl-elbo-seed=0"))
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        with mock.patch.dict(S.LOSSES), mock.patch.dict(S.ESTIMATORS):
            exec(compile(code, "README.md", "exec"), {})

def test_readme_commands_are_accepted_and_every_flag_exists():
    flags = re.findall(r"^\| `(--[^`]*)`", README, re.M)
    flags += re.findall(r"python stabledrl.py (--[^`\n#]*)", README)
    assert len(flags) > 5 and all(S.parse(line.split())[0] for line in flags)
    known = {field.name for field in dataclasses.fields(S.Config)} | {
        "out",
        "resume",
        "help",
        "page",
    }
    assert (
        set(re.findall(r"(?<![\w-])--([a-z][a-z_0-9-]*)", README + SOURCE))
        <= known
    )

def test_readme_quotes_the_two_lines_of_stabledrl():
    """Up to the comment, and up to `if normalise` of the second."""
    source = [line.strip() for line in SOURCE.splitlines()]
    quoted = re.findall(r"^(?:clipped|weights) = .*", README, re.M)
    for line in quoted:
        code = line.split("#")[0].strip()
        assert any(found.startswith(code) for found in source)
    assert len(quoted) == 2

# README: carry it to a model of your own ----------------------------------------------------------

(CARRY,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "whole_groups" in code]

class OtherModel(torch.nn.Module):
    """Each token's logits follow from the mean of all embeddings and from its own."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(torch.tanh(x + x.mean(1, keepdim=True)))

def test_the_estimate_of_readme_is_unbiased_for_answers_of_any_length():
    """4,000 draws for answers of 1, 2 and 3 tokens, against Σ over all ways to hide m of n, within 5
    standard errors: fails by chance once in 1.7 million for each answer."""
    exec(CARRY, names := {})
    model, tokens = OtherModel(), torch.tensor([[0, 1, 2, 3]] * 3)
    is_answer = torch.arange(4) >= torch.tensor([[3], [2], [1]])
    with torch.no_grad():
        draws = []
        for _ in range(4_000):
            hidden = names["hide"](is_answer)
            draws.append(names["estimate"](model, tokens, is_answer, hidden, 4))
        draws = torch.stack(draws)
        for row, n in enumerate((1, 2, 3)):
            expected = 0.0
            for m in range(1, n + 1):
                ways = list(itertools.combinations(range(4 - n, 4), m))
                for hidden in ways:
                    noisy = torch.tensor([[4 if i in hidden else i for i in range(4)]])
                    log_p = model(noisy)[0].log_softmax(-1)
                    total = sum(log_p[i, i].item() for i in hidden)
                    expected += n / m * total / (n * len(ways))
            error = draws[:, row].std().item() / 4_000**0.5
            assert abs(draws[:, row].mean().item() - expected) < 5 * error + 1e-4

def test_the_training_step_of_readme_makes_rewarded_answers_likelier():
    exec(CARRY, names := {})
    model, tokens = OtherModel(), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]] * 4)
    batch = tokens, torch.arange(4).expand(8, -1) > 1
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    rewards = torch.tensor([1.0, 0.0] * 4)
    before = model(tokens).log_softmax(-1)[:2, 2:]
    for _ in range(20):
        masked = (*batch, names["hide"](batch[1]))
        with torch.no_grad():
            old = names["estimate"](model, *masked, 4)
        names["training_step"](model, optimizer, masked, old, rewards, 8, 4)
    gain = model(tokens).log_softmax(-1)[:2, 2:] - before
    good = gain[0].gather(-1, tokens[0, 2:, None]).sum()
    bad = gain[1].gather(-1, tokens[1, 2:, None]).sum()
    assert good > bad

TWO_RANKS = """
import sys, torch, torch.distributed as dist, stabledrl as S
rank, meeting_point, code = int(sys.argv[1]), sys.argv[2], sys.argv[3]
exec(open(code).read(), names := {})
torch.manual_seed(0)
x, old, A = torch.randn(8, 4), torch.randn(8), torch.randn(8)
w = torch.ones(4, requires_grad=True)
S.stabledrl_loss(x @ w - old, A, 1.0, 8).backward()
expected, w.grad = w.grad, None
dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
mine = slice(4 * rank, 4 * rank + 4)
log_ratio = names["whole_groups"](x[mine] @ w - old[mine])
S.stabledrl_loss(log_ratio, A, 1.0, 8).backward()
dist.all_reduce(w.grad)
assert torch.allclose(w.grad, expected, atol=1e-6) and expected.abs().min() > 1e-3
dist.destroy_process_group()
"""

def test_a_group_on_two_processes_gives_the_gradient_of_one(tmp_path):
    """One group of eight, four of its answers on each of two processes."""
    (tmp_path / "code.py").write_text(CARRY, encoding="utf-8")
    processes = []
    for rank in (0, 1):
        flags = f"{rank} {tmp_path / 'meet'} {tmp_path / 'code.py'}"
        processes.append(start(flags, program=("-c", TWO_RANKS)))
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
