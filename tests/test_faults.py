"""The client of servers that die, stall or answer nonsense; signals, and training amid all that."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, TINY, serve
from safetensors.torch import save

import ref_server
from sampler import InputError

LOGPS = torch.arange(-6.0, 0).view(2, 3)
QUESTION = ({"input_ids": torch.ones(1, 4)}, torch.ones(2, 3), torch.ones(2, 3), 0.9)
IDENTITY = {"model": "runs/sft", "dtype": "float32", "fingerprint": "a" * 16, "vocab_size": 9}


def answer(body, status="200 OK"):
    return f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


HEALTH, GOOD = answer(json.dumps(IDENTITY).encode()), answer(save({"logps": LOGPS}))
RESET, SILENCE = b"reset", b"silence"


@contextmanager
def scripted(*answers):
    """(URL, answers so far) of a server that gives one answer after another, as raw bytes."""
    given, listening = [], socket.create_server(("127.0.0.1", 0))

    def work():
        for content in answers:
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as request:
                given.append(content)
                head = b"".join(iter(request.readline, b"\r\n"))
                request.read(int(head.partition(b"Content-Length: ")[2].split(b"\r")[0] or 0))
                if content == RESET:  # closing drops what is on its way, and says so
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                elif content == SILENCE:
                    request.read()  # until the client hangs up
                else:
                    connection.sendall(content)
        listening.close()

    thread = threading.Thread(target=work, daemon=True)  # a test that fails leaves it waiting
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", given
    thread.join(2)


FAULTS = {
    "half a body": GOOD[:-5],
    "half a head": b"HTTP/1.0 200 OK\r\nContent-Ty",
    "garbled chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a proxy whose server is away": answer(b"bad gateway\n", "502 bad"),
    "a reset": RESET,
    "nothing": b"",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_request_is_asked_again_and_each_outage_is_told_once(fault, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _, sleep=time.sleep: sleep(0.02))
    outage = [FAULTS[fault], FAULTS[fault], GOOD]
    with scripted(HEALTH, *outage, GOOD, *outage) as (url, given):
        client = ref_server.Reference([url], IDENTITY, patience=20)
        for _ in range(3):
            assert (client.start(*QUESTION)() == LOGPS).all()
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(given) == 8 and len(printed) == 5 and printed[:2] == printed[3:]
    assert printed[0].startswith(f"waiting for the reference at {url}: ")
    assert printed[1] == f"the reference at {url} answers again"


@pytest.mark.parametrize("answers", [[], [SILENCE]])
def test_a_server_that_is_away_or_silent_ends_in_one_line_also_for_what_is_queued(answers):
    with scripted(HEALTH, *answers) as (url, given):
        client = ref_server.Reference([url], IDENTITY, patience=1)
        for least, most in ((1, 4), (0, 0.9)):  # seconds
            start = time.time()
            with pytest.raises(InputError, match="no answer from .*--ref_patience") as error:
                client.start(*QUESTION)()
            assert least <= time.time() - start < most and "\n" not in str(error.value)
    assert given == [HEALTH, *answers]


SHORT, NANS = save({"logps": LOGPS[:1]}), save({"logps": LOGPS * torch.nan})
NONSENSE = [[b"<html>"], [b"[]"], *([HEALTH, body] for body in (b"\x80\x04K\x01.", SHORT, NANS))]


@pytest.mark.parametrize("answers", NONSENSE)
def test_what_answers_nonsense_is_named(answers):
    *known, last = answers
    with scripted(*known, answer(last)) as (url, _), pytest.raises(InputError) as error:
        ref_server.Reference([url], IDENTITY).start(*QUESTION)()
    words = "did not answer with logps" if known else "is no reference server"
    assert f"{url} {words}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["http://a..b:80", "http://a:b"])
def test_an_address_that_is_none_is_not_waited_for(address):
    with pytest.raises(InputError, match="http://host:port"):
        ref_server.Reference([address], IDENTITY)


def test_several_servers_take_turns():
    with scripted(HEALTH, GOOD) as (a, first), scripted(HEALTH, GOOD, GOOD) as (b, second):
        client = ref_server.Reference([a, b], IDENTITY, turn=1, patience=5)
        for counts in [(1, 2), (2, 2), (2, 3)]:
            client.start(*QUESTION)()
            assert (len(first), len(second)) == counts


# ------------------------------------------------------------------------- signals


def start_python(script, *options):
    """A process that runs a script and has printed its first line: (process, line)."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # where pytest runs in a script's background, it ignores Ctrl-C, and so would what it starts
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", "import time, ref_server, sampler" + script, *options]
    process = subprocess.Popen(command, text=True, cwd=ROOT, preexec_fn=listens, **pipes)
    return process, process.stdout.readline()


LOADING = """
sampler.load_policy = lambda *_: (print("loading", flush=True), time.sleep(60))
sampler.run_script(ref_server.main, ref_server.get_args)
"""


@pytest.mark.parametrize("number, said, status", [(2, "stopped\n", 130), (15, "", -15)])
def test_a_signal_ends_a_server_that_is_loading_without_a_traceback(number, said, status):
    process, _ = start_python(LOADING)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", said) and process.returncode == status


def test_a_child_that_is_loading_ends_when_it_is_stopped_and_not_by_a_signal():
    child, _ = start_python(LOADING, "--child")
    for number in (signal.SIGINT, signal.SIGTERM):
        child.send_signal(number)
    time.sleep(0.5)
    assert child.poll() is None
    ref_server.stop_child(child)
    assert child.returncode == 0
    ref_server.stop_child(child)  # also where there is nothing left to stop
    with pytest.raises(InputError, match="ended, code 0"):  # it is not waited for
        ref_server.Reference(["http://127.0.0.1:9"], IDENTITY, patience=1, child=child)


PARENT = f"""
child = ref_server.start_child({TINY!r}, "cpu", "float32", 1)
print(ref_server.child_port(child), child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_answers_after_signals_and_ends_when_its_parent_is_killed():
    parent, line = start_python(PARENT)
    port, child = map(int, line.split())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child, number)
    time.sleep(0.5)
    assert ref_server.http_request(f"http://127.0.0.1:{port}", "/health", None, {}, 9)[0] == 200
    parent.kill()
    try:
        parent.communicate(timeout=20)  # until the child, too, has closed standard error
    except subprocess.TimeoutExpired:
        os.kill(child, signal.SIGKILL)
        raise
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


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

    calm, (server, own) = train("calm", port), serve()
    shaken, folder = train("shaken", own), tmp_path / "runs" / "shaken"
    lines = lambda: sum(log.read_text().count("\n") for log in folder.glob("train.jsonl"))
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
        assert calm.wait(120) == shaken.returncode == 0 and lines() == 12
    finally:
        for process in (server, calm, shaken):
            process.kill()
            process.wait()
    assert printed.count("waiting for the reference") == printed.count("answers again") == 2
    weights = [path.read_bytes() for path in tmp_path.glob("runs/*/adapter/*.safetensors")]
    assert len(weights) == 2 and weights[0] == weights[1]
