"""Runs killed, stopped, damaged or starved: --resume goes on as if nothing had happened."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, python, timeless
from safetensors.torch import load_file

import sft
from sampler import InputError

COMMON = "--lora_rank 4 --val_limit 0 --batch_size 2"
SFT = f"sft.py {COMMON} --accumulate 2 --lora_dropout 0.1 --lr 1e-3 --workers 1"
GRPO = f"grpo.py --model_path {TINY} {COMMON} --max_new_tokens 24 --group 4 --lr 1e-3 --mu 2"


class Runs:
    """Commands in a folder of their own, as subprocesses that a test can look at and end."""

    def __init__(self, folder, data_root):
        self.folder, self.data_root = folder, data_root

    def start(self, command, name, processes=1, **options):
        script, *rest = command.split()
        rest += ["--data_root", str(self.data_root), "--version_name", name]
        output = open(self.folder / f"{name}.txt", "a+")
        process = subprocess.Popen(
            [*python(processes), str(ROOT / script), *rest],
            cwd=self.folder,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a process group of its own, as a terminal gives it
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            **options,
        )
        process.output = Path(output.name)
        return process

    def finish(self, command, name, processes=1, status=0, **options):
        """Run to the end: what this and all earlier runs of that name have printed."""
        process = self.start(command, name, processes, **options)
        assert process.wait(300) == status, process.output.read_text()
        return process.output.read_text()

    def wait_for_updates(self, process, name, updates):
        """Until the log holds so many lines."""
        log, end = self[name] / "train.jsonl", time.time() + 120
        while not (log.exists() and len(lines_of(log)) >= updates):
            assert process.poll() is None and time.time() < end, process.output.read_text()
            time.sleep(0.01)

    def __getitem__(self, name):
        return self.folder / "runs" / name


@pytest.fixture
def runs(tmp_path, small_set):
    return Runs(tmp_path, small_set)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_set):
    """undisturbed(command, processes) -> the folder of a run that nobody disturbed."""
    runs, done = Runs(tmp_path_factory.mktemp("undisturbed"), small_set), {}

    def call(command, processes=1):
        if (command, processes) not in done:
            done[command, processes] = name = f"run{len(done)}"
            runs.finish(command, name, processes)
        return runs[done[command, processes]]

    return call


def lines_of(log):
    return log.read_text().splitlines()


def assert_same(a, b):
    """The same weights to the bit, the same log, each update in it once."""
    files = [sorted(run.glob("**/*.safetensors")) for run in (a, b)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]] != []
    for x, y in zip(*files):
        assert x.read_bytes() == y.read_bytes(), x
    steps = [[json.loads(line) for line in lines_of(run / "train.jsonl")] for run in (a, b)]
    assert [line["step"] for line in steps[0]] == list(range(1, len(steps[0]) + 1))
    assert timeless(steps[0]) == timeless(steps[1])


def tree(pid):
    """A process and all that it has started, also what has a session of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [pid, *(p for child in children.read_text().split() for p in tree(int(child)))]
    except OSError:  # it has ended meanwhile
        return []


def kill(process):
    """SIGKILL to all of a run at once, as a power cut."""
    for pid in tree(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def kill_often(runs, command, processes, kills, rng):
    """Start, kill, resume, kill, …: (names of runs that came to their end, how often they were
    killed while they saved). A kill comes up to three updates after the start, at any moment of
    the next; half of them wait for the moment of saving."""
    names, saving, name = [], 0, None
    while kills:
        name = name or f"killed{len(names)}"
        log, new = runs[name] / "train.jsonl", runs[name] / "checkpoints" / "new"
        begin = time.time()
        process = runs.start(f"{command} --resume", name, processes)
        going = lambda: process.poll() is None and time.time() < begin + 120
        while going() and not (log.exists() and log.stat().st_mtime > begin):
            time.sleep(0.01)
        target = len(lines_of(log)) + rng.randint(0, 3)
        while going() and len(lines_of(log)) < target:
            time.sleep(0.01)
        if rng.random() < 0.5:
            while going() and not new.exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, json.loads(lines_of(log)[-1])["seconds"] if target else 1))
        if process.poll() is None:
            saving += new.exists()
            kill(process)
            kills -= 1
        else:
            assert process.returncode == 0, process.output.read_text()
            names, name = [*names, name], None
    if name:
        runs.finish(f"{command} --resume", name, processes)
    return [*names, name] if name else names, saving


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(runs, undisturbed):
    command = f"{SFT} --max_step 6 --save_step 2"
    process = runs.start(command, "killed")
    runs.wait_for_updates(process, "killed", 3)
    kill(process)
    assert "going on after update" in runs.finish(f"{command} --resume", "killed")
    assert_same(runs["killed"], undisturbed(command))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "command", [SFT, GRPO, f"{GRPO} --lora_rank 0"], ids=["sft", "grpo", "grpo, all parameters"]
)
def test_twenty_kills_at_random_moments_change_nothing(runs, undisturbed, command, processes):
    command += " --max_step 16 --save_step 2"
    whole = undisturbed(command, processes)
    names, saving = kill_often(runs, command, processes, 20, random.Random(0))
    for name in names:
        assert_same(runs[name], whole)
    printed = "".join((runs.folder / f"{name}.txt").read_text() for name in names)
    assert printed.count("going on after update") >= 10 and saving >= 3


# ------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("command", "number", "status", "said"),
    [
        (SFT, signal.SIGTERM, 143, "stopped by SIGTERM after update"),
        (GRPO, signal.SIGINT, 130, "stopped by Ctrl-C after update"),
    ],
    ids=["sft, SIGTERM", "grpo, Ctrl-C"],
)
def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on_later(
    runs, undisturbed, command, number, status, said
):
    """The signal goes to the whole group: to data workers and to the reference server too."""
    command += " --max_step 6 --save_step 2"
    process = runs.start(command, "stopped")
    runs.wait_for_updates(process, "stopped", 2)
    os.killpg(process.pid, number)
    assert process.wait(60) == status
    printed = process.output.read_text()
    assert said in printed and "Traceback" not in printed
    assert "going on after update" in runs.finish(f"{command} --resume", "stopped")
    assert_same(runs["stopped"], undisturbed(command))


@pytest.mark.slow
def test_torchrun_that_is_asked_to_stop_saves_too(runs, undisturbed):
    command = f"{GRPO} --max_step 6"
    process = runs.start(command, "stopped", 2)
    runs.wait_for_updates(process, "stopped", 2)
    process.terminate()  # it passes SIGTERM on
    assert process.wait(60) != 0
    assert "stopped by SIGTERM after update" in process.output.read_text()
    runs.finish(f"{command} --resume", "stopped", 2)
    assert_same(runs["stopped"], undisturbed(command, 2))


# ------------------------------------------------------------------------- checkpoints
# in this process: what is looked at is what a run leaves behind and what the next one makes of it


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_set):
    """The folder of a finished run with three checkpoints."""
    log_dir = tmp_path_factory.mktemp("trained")
    sft.main(arguments(log_dir, small_set, "--save_step 2"))
    return log_dir / "run"


def arguments(log_dir, data_root, options):
    common = f"{SFT.partition(' ')[2]} --workers 0 --max_step 6 --keep 3 --version_name run"
    return sft.get_args(f"{common} --log_dir {log_dir} --data_root {data_root} {options}".split())


@pytest.fixture
def copy(trained, tmp_path, small_set, capsys):
    """A copy of it, `folder`; resume("options") -> what was printed, the error's line included."""

    def resume(options=""):
        try:
            sft.main(arguments(tmp_path, small_set, f"--resume {options}"))
        except InputError as error:
            print(error)
        return capsys.readouterr().out

    folder = shutil.copytree(trained, tmp_path / "run")
    return SimpleNamespace(folder=folder, resume=resume)


def file_of(run, step):
    return run / "checkpoints" / f"{step:08}" / "rank0of1.pt"


def test_the_last_n_checkpoints_stay(copy):
    steps = lambda: [int(path.name) for path in sft.checkpoints_in(copy.folder)]
    assert steps() == [2, 4, 6]
    file_of(copy.folder, 6).unlink()
    copy.resume("--keep 1")
    assert steps() == [6]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, trained):
    content = bytearray(file_of(copy.folder, 6).read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight
    file_of(copy.folder, 6).write_bytes(content)
    file_of(copy.folder, 4).write_bytes(file_of(copy.folder, 4).read_bytes()[:100_000])
    printed = copy.resume()
    assert "00000006 is damaged" in printed and "00000004 is damaged" in printed
    assert "going on after update 2" in printed
    assert_same(copy.folder, trained)


def test_a_run_without_a_whole_checkpoint_starts_from_the_beginning_and_says_so(copy, trained):
    for step, content in ((2, b""), (4, b"\xff\xfe"), (6, b"0" * 64)):
        file_of(copy.folder, step).with_suffix(".sha256").write_bytes(content)
    printed = copy.resume()
    assert printed.count("is damaged") == 3 and "starts from the beginning" in printed
    assert_same(copy.folder, trained)
    assert (Path(f"{copy.folder}.1") / "model.safetensors").exists()  # it was not written over


def test_two_runs_do_not_write_to_one_folder(runs, tmp_path):
    process = runs.start(SFT, "one")
    runs.wait_for_updates(process, "one", 1)
    printed = runs.finish(f"{SFT} --resume", "one", status=1)
    assert "error: another run is writing to runs/one" in printed
    kill(process)


def test_no_code_of_a_checkpoint_is_run(copy, tmp_path):
    """Its checksum is right, but a plain unpickler would call what it holds."""
    path, trap = file_of(copy.folder, 6), tmp_path / "trap"
    torch.save({"settings": {}, "step": Call(trap)}, path)
    path.with_suffix(".sha256").write_text(f"{sft.sha256(path)}  {path.name}\n")
    assert "is no checkpoint" in copy.resume() and not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()


class Call:
    """Pickled as a call of Path(trap).touch()."""

    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return Path.touch, (self.trap,)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--lr 2e-3", "lr"),
        ("--seed 1", "seed"),
        ("--max_step 7", "max_step"),
        ("--split val", "split"),
    ],
)
def test_other_settings_are_not_resumed(copy, options, name):
    printed = copy.resume(options)
    assert f"--resume: {name} was" in printed and "--version_name" in printed


def test_another_model_and_other_data_are_not_resumed(copy, trained, small_set, tmp_path):
    assert "fingerprint of the model" in copy.resume(f"--model_path {trained}")
    other = shutil.copytree(small_set, tmp_path / "other")
    table = json.loads((other / "demo" / "instances.json").read_text())
    table["categories"][0]["name"] = "thing"
    (other / "demo" / "instances.json").write_text(json.dumps(table))
    assert "--resume: checksum of the data" in copy.resume(f"--data_root {other}")


def test_an_earlier_run_of_the_same_name_is_set_aside(copy, trained):
    assert f"is in {copy.folder}.1 now" in copy.resume("--no-resume --max_step 1")
    assert_same(Path(f"{copy.folder}.1"), trained)
    assert len(lines_of(copy.folder / "train.jsonl")) == 1


@pytest.mark.parametrize(
    ("most", "options"),
    [(500, ""), (100_000, ""), (3_000_000, ""), (3_000_000, "--no-merge")],
    ids=["settings", "adapter", "merged weights", "checkpoint"],
)
def test_a_write_that_fails_ends_the_run_in_one_line_and_loses_nothing(
    copy, trained, most, options
):
    for step in (4, 6):
        shutil.rmtree(file_of(copy.folder, step).parent)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, usual[1]))  # bytes of one file
    try:
        printed = copy.resume(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    last = printed.splitlines()[-1]
    assert last.startswith("cannot write") and "--resume" in last
    assert ("checkpoints/new" in last) == (options == "--no-merge")
    assert "going on after update 2" in copy.resume()
    assert_same(copy.folder, trained)


# ------------------------------------------------------------------------- numbers


def test_an_update_that_is_not_finite_is_skipped_counted_and_in_the_end_an_error(
    copy, trained, monkeypatch
):
    whole, calls = sft.answer_loss, iter(range(100))

    def answer_loss(model, batch):
        loss, tokens = whole(model, batch)
        return loss * (math.inf if next(calls) in broken else 1), tokens

    monkeypatch.setattr(sft, "answer_loss", answer_loss)
    broken = range(1, 2)  # the second micro-batch of the first update
    copy.resume("--no-resume")
    lines = [json.loads(line) for line in lines_of(copy.folder / "train.jsonl")]
    assert [line["skipped"] for line in lines] == [1] * 6
    assert lines[0]["loss"] is None and lines[0]["grad_norm"] is None and lines[1]["loss"] > 0
    weights = load_file(copy.folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    broken = range(1000)
    assert "3 updates in a row" in copy.resume("--no-resume --max_skips 3")


def test_a_gradient_that_is_not_finite_is_skipped_too(copy, monkeypatch):
    monkeypatch.setattr(sft, "sum_gradients", lambda trained: trained[0].grad.fill_(math.nan))
    assert "2 updates in a row" in copy.resume("--no-resume --max_skips 2")
    lines = [json.loads(line) for line in lines_of(copy.folder / "train.jsonl")]
    assert [line["grad_norm"] for line in lines] == [None, None] and lines[0]["loss"] > 0


def test_the_number_of_data_workers_changes_nothing(copy, trained):
    for workers in (1, 2):
        copy.resume(f"--no-resume --workers {workers}")
        assert_same(copy.folder, trained)
