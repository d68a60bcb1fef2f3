"""Servers that die, stall, answer nonsense or change their model, signals, and training amid it."""

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY, serve
from PIL import Image
from safetensors.torch import save

import data
import ref_server
import sampler
from sampler import InputError

# ------------------------------------------------------------------------- a server by a script

ANSWER = torch.arange(-6.0, 0).view(2, 3)
QUESTION = ({"input_ids": torch.ones(1, 4)}, torch.ones(2, 3), torch.ones(2, 3), 0.9)
EXPECTED = {"model": "runs/sft", "dtype": "float32", "fingerprint": "a" * 16, "vocab_size": 9}


def answer(body, status="200 OK"):
    return f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


HEALTH, GOOD = answer(json.dumps(EXPECTED).encode()), answer(save({"logps": ANSWER}))
BUSY = answer(b"busy with others\n", "503 busy")
NOTHING, RESET, SILENCE = b"", b"reset", b"silence"


@contextmanager
def scripted(*answers):
    """(URL, connections so far) of a server that gives one answer after another, as raw bytes."""
    seen, listening = [], socket.create_server(("127.0.0.1", 0))

    def work():
        for content in answers:
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as request:
                seen.append(content)
                head = iter(request.readline, b"\r\n")
                length = [line for line in head if line.startswith(b"Content-Length")]
                request.read(int(length[0].split()[1]) if length else 0)
                if content == RESET:  # closing drops what is on its way, and says so
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                elif content == SILENCE:
                    request.read()  # until the client hangs up
                else:
                    connection.sendall(content)

    thread = threading.Thread(target=work, daemon=True)  # a test that fails leaves it waiting
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen
    finally:
        thread.join(2)
        listening.close()


FAULTS = {
    "half a body": (GOOD[:-5], "it answered half"),
    "no body": (GOOD[: GOOD.index(b"\r\n\r\n") + 4], "it answered half"),
    "half a head": (b"HTTP/1.0 200 OK\r\nContent-Ty", "it answered half"),
    "half a status line": (b"HTTP/1.0 2", "it did not answer in HTTP"),
    "garbage": (b"\x80\x04K\x01.\n" * 99, "it did not answer in HTTP"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", "it did not answer in HTTP"),
    "a huge header": (b"HTTP/1.0 200 OK\r\nX: " + b"x" * 70000, "it did not answer in HTTP"),
    "garbled chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        "it answered half",
    ),
    "a garbled length": (b"HTTP/1.0 200 OK\r\nContent-Length: x\r\n\r\n", "it answered half"),
    "a reset": (RESET, "it closed the connection"),
    "nothing": (NOTHING, "it closed the connection"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_is_named_once_and_asked_again(fault, capsys):
    broken, words = FAULTS[fault]
    with scripted(HEALTH, broken, broken, GOOD, GOOD) as (url, seen):
        client = ref_server.Reference([url], EXPECTED, patience=20)
        for _ in range(2):
            assert (client.logps(*QUESTION) == ANSWER).all()
    assert len(seen) == 5
    assert capsys.readouterr().out.strip().splitlines() == [
        f"waiting for the reference at {url}: {words}",
        f"the reference at {url} answers again",
    ]


def test_each_outage_is_told_anew(capsys):
    with scripted(HEALTH, RESET, GOOD, RESET, GOOD) as (url, _):
        client = ref_server.Reference([url], EXPECTED, patience=20)
        for _ in range(2):
            client.logps(*QUESTION)
    assert capsys.readouterr().out.count("waiting") == 2


def test_a_busy_server_is_asked_again_and_told_of_if_it_lasts(capsys, monkeypatch):
    monkeypatch.setattr(ref_server, "QUIET", 1)
    with scripted(HEALTH, BUSY, GOOD, *[BUSY] * 5, GOOD) as (url, _):
        client = ref_server.Reference([url], EXPECTED, patience=20)
        client.logps(*QUESTION)
        assert capsys.readouterr().out == ""
        client.logps(*QUESTION)
    assert capsys.readouterr().out.strip().splitlines() == [
        f"waiting for the reference at {url}: busy with others",
        f"the reference at {url} answers again",
    ]


def slowly(seconds, server):
    """Let a scripted server's answers take so long."""
    send = socket.socket.sendall
    return lambda self, content: (time.sleep(seconds * (content in server)), send(self, content))[1]


def test_a_slow_server_is_told_of_and_not_asked_twice(capsys, monkeypatch):
    monkeypatch.setattr(ref_server, "QUIET", 1)
    monkeypatch.setattr(socket.socket, "sendall", slowly(1.5, [GOOD]))
    with scripted(HEALTH, GOOD, GOOD) as (url, seen):
        client = ref_server.Reference([url], EXPECTED, patience=20)
        client.logps(*QUESTION)
        printed = capsys.readouterr().out.strip().splitlines()
        assert len(printed) == 2 and "no answer for 1 s" in printed[0]
        client.logps(*QUESTION)  # it takes what it takes
    assert capsys.readouterr().out == "" and len(seen) == 3


def test_a_silent_server_is_given_up_and_not_asked_twice():
    with scripted(HEALTH, SILENCE, GOOD) as (url, seen):
        client = ref_server.Reference([url], EXPECTED, patience=1)
        start = time.time()
        with pytest.raises(InputError, match=r"in 1 s \(it fell silent\).*--ref_patience"):
            client.logps(*QUESTION)
        assert time.time() - start < 3 and len(seen) == 2


def test_a_server_that_stays_away_ends_in_one_line_also_for_what_is_queued():
    with scripted(HEALTH) as (url, _):
        client = ref_server.Reference([url], EXPECTED, patience=2)
    start = time.time()
    with pytest.raises(
        InputError, match="in 2 s .*refused the connection.*--ref_patience"
    ) as error:
        client.logps(*QUESTION)
    assert 2 < time.time() - start < 5 and "\n" not in str(error.value)
    with pytest.raises(InputError):
        client.logps(*QUESTION)
    assert time.time() - start < 5


def test_an_answer_of_any_size_does_not_fill_the_memory():
    endless = b"HTTP/1.0 200 OK\r\nContent-Length: 99000000000\r\n\r\n" + b"x" * 9
    with scripted(HEALTH, endless) as (url, _):
        client = ref_server.Reference([url], EXPECTED, patience=20)
        with pytest.raises(InputError, match="99000000000 bytes"):
            client.logps(*QUESTION)


@pytest.mark.parametrize("address", ["http://a..b:80", "http://a:b"])
def test_an_address_that_is_none_is_not_waited_for(address):
    with pytest.raises(InputError, match="http://host:port"):
        ref_server.Reference([address], EXPECTED)


# ------------------------------------------------------------------------- another model


@contextmanager
def serving(model, processor, port=0):
    """Port of a real server of a model, in this process."""
    args = ref_server.get_args(["--port", str(port)])
    health = ref_server.describe(model, processor, "runs/other")
    server = ref_server.Server(args, model, processor, health)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def other():
    """(model, processor): the tiny model, but for one weight."""
    model, processor = sampler.load_policy()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    return model, processor


def test_a_reference_with_other_weights_is_refused_with_the_command_that_mends_it(tiny, other):
    expected = ref_server.describe(*tiny, "runs/sft")
    with serving(*other) as port, pytest.raises(InputError) as error:
        ref_server.Reference([f"http://127.0.0.1:{port}"], expected)
    line, theirs = str(error.value), ref_server.describe(*other, "")["fingerprint"]
    assert "runs/other" in line and theirs in line and expected["fingerprint"] in line
    assert "python ref_server.py --model_path runs/sft --dtype float32" in line


def test_a_server_that_comes_back_with_another_model_is_noticed(tiny, other):
    expected = ref_server.describe(*tiny, "runs/sft")
    with serving(*tiny) as port:
        client = ref_server.Reference([f"http://127.0.0.1:{port}"], expected, patience=10)
    with serving(*other, port), pytest.raises(InputError) as error:
        client.logps(*QUESTION)
    line, theirs = str(error.value), ref_server.describe(*other, "")["fingerprint"]
    assert theirs in line and expected["fingerprint"] in line and "\n" not in line
    assert "python ref_server.py --model_path runs/sft --dtype float32" in line


@pytest.mark.parametrize(
    "error, words",
    [
        (
            RuntimeError("CUDA error:\nfirst line"),
            "400: .* cannot score this: CUDA error: f",
        ),
        (IndexError("too far"), "400: the model cannot score this: too far"),
        (torch.OutOfMemoryError("99 GB"), "413: not enough memory: .*--batch_size"),
    ],
)
def test_what_a_model_raises_is_an_answer(tiny, monkeypatch, error, words):
    prompt = data.collate(tiny[1], [Image.new("RGB", (64, 64))], [data.box_prompt("a ship")])
    question = (prompt, torch.ones(2, 3).long(), torch.ones(2, 3).bool(), 0.9)
    with serving(*tiny) as port:
        expected = ref_server.describe(*tiny, "runs/sft")
        client = ref_server.Reference([f"http://127.0.0.1:{port}"], expected, patience=5)
        monkeypatch.setattr(sampler, "completion_logps", Mock(side_effect=error))
        with pytest.raises(InputError, match=f"refused /logps with {words}"):
            client.logps(*question)
        monkeypatch.undo()
        assert client.logps(*question).isfinite().all()


# ------------------------------------------------------------------------- signals

LOADING = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import ref_server, sampler
sampler.load_policy = lambda *_: (print("loading", flush=True), time.sleep(60))
sampler.run_script(ref_server.main, ref_server.get_args)
"""


def start_loading(*options):
    """A server that loads a model for a minute."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # where pytest runs in a script's background, it ignores Ctrl-C, and so would what it starts
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", LOADING, *options]
    process = subprocess.Popen(command, text=True, preexec_fn=listens, **pipes)
    assert process.stdout.readline() == "loading\n"
    return process


@pytest.mark.parametrize(
    ("number", "said", "status"),
    [(signal.SIGINT, "stopped\n", 130), (signal.SIGTERM, "", -signal.SIGTERM)],
)
def test_a_signal_ends_a_server_that_is_loading_without_a_traceback(number, said, status):
    process = start_loading()
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", said) and process.returncode == status


def test_a_child_that_is_loading_ends_with_its_parent_and_not_by_a_signal():
    process = start_loading("--child")
    for name in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(name)
    time.sleep(0.5)
    assert process.poll() is None
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


def test_a_child_answers_after_signals_until_it_is_stopped(tiny):
    child = ref_server.start_child(TINY, "cpu", "float32", 1)
    url = f"http://127.0.0.1:{ref_server.child_port(child)}"
    for name in (signal.SIGINT, signal.SIGTERM):
        child.send_signal(name)
    time.sleep(0.5)
    expected = ref_server.describe(*tiny, TINY)
    assert ref_server.Reference([url], expected, child=child).models == [TINY]
    start = time.time()
    ref_server.stop_child(child)
    assert child.returncode == 0 and time.time() - start < 5
    ref_server.stop_child(child)  # also where there is nothing left to stop


# ------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_goes_on_when_its_reference_is_killed_and_started_again(small_set, port, tmp_path):
    """A run whose server dies twice, beside one whose server does not: the weights are the same."""

    def train(name, port):
        options = f"--version_name {name} --ref_url http://127.0.0.1:{port} --max_step 12 --lr 1e-3"
        options += " --lora_rank 4 --group 4 --batch_size 2 --max_new_tokens 40 --val_limit 0"
        options += f" --model_path {TINY} --data_root {small_set}"
        command = [sys.executable, str(ROOT / "grpo.py"), *options.split()]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    calm = train("calm", port)
    server, own = serve()
    shaken = train("shaken", own)
    log = tmp_path / "runs" / "shaken" / "train.jsonl"
    lines = lambda: log.read_text().count("\n") if log.exists() else 0
    try:
        for wanted in (3, 6):
            while lines() < wanted:
                assert shaken.poll() is None
                time.sleep(0.02)
            server.kill()
            server.wait()
            time.sleep(2)
            assert lines() < 12
            server, _ = serve("--port", str(own))
        printed = shaken.communicate(timeout=120)[0]
        assert calm.wait(120) == shaken.returncode == 0
    finally:
        for process in (server, calm, shaken):
            process.kill()
            process.wait()
    assert lines() == 12
    assert printed.count("waiting for the reference") == printed.count("answers again") == 2
    names = ("calm", "shaken")
    files = [tmp_path / "runs" / name / "adapter/adapter_model.safetensors" for name in names]
    assert files[0].read_bytes() == files[1].read_bytes()
