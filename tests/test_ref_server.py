"""The reference server, and what it does with what it should not get."""

import json
import os
import pickle
import random
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import load, save

import data
import ref_server
import sampler
from sampler import InputError


@pytest.fixture(scope="module")
def identity(tiny):
    return ref_server.model_identity(*tiny, TINY)


@pytest.fixture(scope="module")
def question(tiny):
    """(prompt, completions, mask, temperature): two prompts, three completions of each."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)) for _ in range(2)]
    prompts = [data.box_prompt("a ship", think=True), data.box_prompt("a white house on the left")]
    prompt = data.collate(tiny[1], images, prompts)
    torch.manual_seed(0)
    completions, mask, _ = sampler.sample_group(*tiny, prompt, 3, 24, 1.0)
    return prompt, completions, mask, 0.9


@pytest.fixture(scope="module")
def own(tiny, question):
    """The log-probs that the tiny model gives in this process."""
    return sampler.completion_logps(tiny[0], *question).detach()


@pytest.fixture(scope="module")
def good(question):
    """The tensors of a good request."""
    prompt, completions, mask, _ = question
    return {**prompt, "completions": completions, "mask": mask, "temperature": torch.tensor(0.9)}


def reference(port, identity, patience=5):
    return ref_server.Reference([f"http://127.0.0.1:{port}"], identity, patience=patience)


def test_the_server_gives_the_log_probs_of_the_model_it_serves(port, identity, question, own):
    found, mask = reference(port, identity).start(*question)(), question[2]
    d = (found - own)[mask]
    assert (torch.exp(d) - d - 1).abs().max() < 1e-6 and d.abs().max() < 1e-5
    assert (found[~mask] == 0).all()


def test_eight_clients_get_their_own_answers(port, tiny, identity, question):
    questions, (prompt, completions, mask, _) = [], question
    for temperature in (0.5, 0.9, 2.0):
        questions.append((prompt, completions, mask, temperature))
        for row in range(2):
            rows, one = slice(3 * row, 3 * row + 3), sampler.select_prompts(prompt, [row])
            questions.append((one, completions[rows], mask[rows], temperature))
    known = [sampler.completion_logps(tiny[0], *question).detach() for question in questions]

    def work(number):
        client, order = reference(port, identity, 60), [(number + k) % 9 for k in range(6)]
        return max((client.start(*questions[k])() - known[k]).abs().max() for k in order)

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) < 1e-5


def test_many_clients_that_come_at_once_do_not_wait_for_a_second(port):
    start = time.time()
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(16)]
    assert time.time() - start < 0.5
    for client in clients:
        client.close()


# ------------------------------------------------------------------------- malformed requests


def exchange(port, raw, hangs_up=False):
    """Bytes in, bytes out; the sending side is closed behind them, or the whole connection."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with suppress(OSError):  # it has answered and hung up before reading all
            connection.sendall(raw)
            if hangs_up:
                linger = struct.pack("ii", 1, 0)
                return connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    return answer


def post(port, body, path="/logps", method="POST", length=None, extra=""):
    """A request in, (status, body) out."""
    length = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n{extra}\r\n"
    head, _, content = exchange(port, head.encode() + body).partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else None, content


def broken_requests(good, vocabulary):
    """About 80 (name, keyword arguments of `post`), none of them a good request."""
    body, ids = save(good), good["input_ids"]
    for size in (0, 900, len(body) - 9):
        yield f"{size} bytes", {"body": body[:size]}
        yield f"{size} bytes of {len(body)}", {"body": body[:size], "length": len(body)}
    header = {"mask": {"dtype": "I64", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    header = json.dumps(header).encode()
    bodies = [pickle.dumps(good), pickle.dumps(os.system), random.Random(0).randbytes(2000)]
    bodies += [(2**40).to_bytes(8, "little") + b"{", len(header).to_bytes(8, "little") + header]
    for number, content in enumerate(bodies):
        yield f"no tensors {number}", {"body": content}
    for name in good:
        yield f"without {name}", {"body": save({k: v for k, v in good.items() if k != name})}
    changes = [{name: good[name].to(torch.complex64)} for name in good]
    changes += [{name: torch.cat([good[name].flatten()] * 3)} for name in good]
    for name in ("input_ids", "completions"):
        for token in (-1, vocabulary, 2**62):
            ids_beyond = good[name].index_fill(1, torch.tensor(5), token)
            yield "an id out of range", {"body": save(good | {name: ids_beyond})}
    for grid in ([0, 16, 16], [1, -16, 16], [1, 2**40, 2], [1, 15, 15], [1, 1, 256]):
        changes.append({"image_grid_thw": torch.tensor([grid, [1, 16, 16]])})
    for number in (0.0, -1.0, np.nan, np.inf, 1e-45):
        changes.append({"temperature": torch.tensor(number)})
    changes += [{"temperature": torch.tensor(0.9).to(torch.float8_e5m2)}]
    changes += [{"pixel_values": torch.full_like(good["pixel_values"], x)} for x in (1e38, np.nan)]
    places = torch.arange(ids.shape[1]).expand_as(ids)
    masks = places < 90, places > 40, 2 * good["attention_mask"]  # on the right, on image tokens
    changes += [{"attention_mask": mask.long()} for mask in masks] + [{"video": torch.zeros(1)}]
    for ones in (torch.ones(260_000, 1), torch.ones(6, 9000)):  # too much for the memory
        changes.append({"completions": ones.long(), "mask": ones.bool()})
    for tensors in changes:
        yield f"changed {tensors}", {"body": save(good | tensors)}

    changes = [{"length": n} for n in ("", "x", "-5", "1_0", "9" * 30, str(2**32), "²")]
    changes += [{"path": path} for path in ("/", "/health", "/" + "x" * 70000, "/ and more")]
    changes += [{"method": method} for method in ("GET", "HEAD", "FOO", "post", "\x80\x04K.")]
    changes += [{"extra": extra} for extra in ("X: " + "x" * 70000 + "\r\n", "X: 1\r\n" * 200)]
    for change in changes:
        yield f"head {str(change)[:30]}", {"body": body, **change}


def test_malformed_requests_get_a_line_each_and_a_good_one_works(port, identity, good, own):
    for name, request in broken_requests(good, identity["vocab_size"]):
        status, answer = post(port, **request)
        assert status and 400 <= status < 500, (name, status, answer)
        if "HEAD" not in name:
            assert answer.count(b"\n") == 1 and answer.endswith(b"\n") and len(answer) > 9, name
        assert "id out" not in name or b"expected 0 to" in answer  # it would end a GPU's process
    status, answer = post(port, save(good))
    assert status == 200 and (load(answer)["logps"] - own).abs().max() < 1e-5


def test_other_types_of_the_same_numbers_do(port, good, own):
    kinds = {name: (torch.bool, torch.int32) for name in ("attention_mask", "mask")}
    kinds |= {"mm_token_type_ids": (torch.bool, torch.int32), "temperature": (torch.float64,)}
    kinds |= {"pixel_values": (torch.float64, torch.float16, torch.bfloat16)}
    for name, dtype in [(key, dtype) for key in kinds for dtype in kinds[key]]:
        status, answer = post(port, save(good | {name: good[name].to(dtype)}))
        tolerance = 0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        assert status == 200 and (load(answer)["logps"] - own).abs().max() < tolerance, name


def test_a_request_that_is_too_large_is_named_though_it_was_not_read(port, identity, question):
    large = {**question[0], "pixel_values": torch.zeros(5_000_000)}
    with pytest.raises(InputError, match="--max_mb"):
        reference(port, identity).start(large, *question[1:])()


# ------------------------------------------------------------------------- fuzzing

DTYPES = [torch.float64, torch.float16, torch.float8_e5m2, torch.int32, torch.uint16, torch.bool]
REAL = (0.0, -1.0, 1e-45, 1e-40, 1e-30, 1e-4, 1e9, 1e38, -1e38, float("inf"), float("nan"))
WHOLE = (0, 1, -1, 2, 4, 8, 32, 255, 2**15, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
WORDS = (b"0", b"3", b"-1", b"1.5", b"%d" % 2**31, b"%d" % 2**62, b"%d" % 2**64, b"null", b"[", b"")
WORDS += (b'"F64"', b'"I8"', b'"BOOL"', b'"F8_E8M0"', b'"C64"', b'"x"', b'"mask"', b"[]", b"{}")


def change_tensors(tensors, tokens, rng):
    """A tensor that is dropped, renamed, or of another type, shape, size or content."""
    name, kind = rng.choice(sorted(tensors)), rng.randrange(10)
    value = tensors.pop(name).clone()
    side = rng.randrange(max(1, value.dim()))
    if kind == 0:
        return
    if kind == 1:
        name = rng.choice(["", "video", "\n", "é" * 9, "mask\0"])
    elif kind == 2:
        value = value.to(rng.choice(DTYPES))
    elif kind == 3:
        value = rng.choice([value.flatten(), value[None], value.flatten()[:1].squeeze()])
    elif kind == 4 and value.dim():
        value = value.narrow(side, 0, min(value.shape[side], rng.choice([0, 1, 9])))
    elif kind == 5 and value.dim():
        value = rng.choice([value.flip(side), torch.cat([value] * rng.choice([2, 3, 7]), side)])
    elif value.numel() and value.dtype in (torch.int64, torch.float32):
        numbers = [*WHOLE, *tokens] if value.dtype == torch.int64 else REAL
        for place in rng.choices(range(value.numel()), k=rng.choice([1, 1, 9])):
            value.view(-1)[place] = rng.choice(numbers)
    tensors[name] = value.contiguous()


def change_body(body, rng):
    """Other words in the safetensors header, or bytes that are changed, lost or too many."""
    if rng.random() < 0.5:
        size = int.from_bytes(body[:8], "little")
        words = re.split(rb'("\w+"|\d+|[][{},:])', body[8 : 8 + size])
        for _ in range(rng.choice([1, 1, 3])):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        header = b"".join(words)
        return len(header).to_bytes(8, "little") + header + body[8 + size :]
    place = rng.randrange(rng.choice([8, 800, 800, len(body)]))
    new = rng.choice([rng.randbytes(rng.choice([0, 1, 1, 8, 500])), bytes(8), b"\xff" * 8])
    return body[:place] + new + body[place + rng.choice([0, 1, 1, 8, 500, len(body)]) :]


def change_head(body, rng):
    """A first line and headers made of parts that are mostly good, and a body that mostly is."""
    size = len(body)
    pick = lambda good, *bad: good if rng.random() < 0.8 else rng.choice(bad)
    method = pick("POST", "GET", "HEAD", "post", "P\0ST", "", "__init__", "A" * 70000)
    path = pick("/logps", "/health", "/", "/logps?x", "*", "/\xff", "http://h/logps", "/" * 70000)
    version = pick("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1.1", "HTTP/\xb2.1", "")
    lengths = [size - 1, size + 1, 7, 0, -1, 2**40, 2**64, "", "x", "1e3", f"{size}, 7", "\xb2"]
    lines = [f"Content-Length: {pick(size, *lengths, '9' * 5000)}"] * pick(1, 0, 2)
    extra = ["Transfer-Encoding: chunked", "Content-Length: 7", "Expect: 100-continue", "no colon"]
    extra += ["If-Match: *", 'If-Match: "0"', "If-Match: \xff", "Authorization: \xe9", ": : :"]
    extra += ["X: " + "a" * 70000, "X: a\r\n" * 150, "X: a\0b", " folded", "Connection: keep-alive"]
    lines += rng.choices(extra, k=rng.choice([0, 1, 3]))
    rng.shuffle(lines)
    end = pick("\r\n", "\n", "\r", "\0", "\r\n\r\n")
    head = pick("", "\r\n", " ") + end.join([f"{method} {path} {version}", *lines, pick(end, "")])
    raw = head.encode("latin-1") + end.encode() + pick(body, body[: size // 2], b"", b"5\r\nabcde")
    return raw[: pick(None, rng.randrange(1, 200))]


def fuzzed_requests(good, tokens, count):
    """`count` requests, as raw bytes, the same ones in every run."""
    rng = random.Random(0)
    for number in range(count):
        tensors, kind = dict(good), number % 4
        for _ in range(rng.choice([1, 1, 2, 4]) if kind == 0 else 0):
            change_tensors(tensors, tokens, rng)
        body = change_body(save(good), rng) if kind in (1, 2) else save(tensors)
        head = f"POST /logps HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        yield change_head(body, rng) if kind == 3 else head + body


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_request_goes_unanswered_or_harms_the_server(port, tiny, good, own, count):
    statuses, tokens = set(), [*sampler.vision_token_ids(*tiny), 5, 700]
    for number, raw in enumerate(fuzzed_requests(good, tokens, count)):
        if number % 10 == 9:
            exchange(port, raw[: len(raw) // 2], hangs_up=True)
        answer, first_line = exchange(port, raw), raw.partition(b"\n")[0].decode("latin-1")
        if not first_line.split() or "HTTP/0.9" in first_line:
            continue  # no request; a version that has no status line
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1]) if head else 0
        assert status == 200 or 400 <= status < 500, (number, raw[:300], answer)
        if status == 200 and first_line.startswith("POST"):
            assert load(body)["logps"].isfinite().all(), raw[:300]
        statuses.add(status)
    assert {200, 400, 404, 411} <= statuses, statuses
    status, answer = post(port, save(good))
    assert status == 200 and (load(answer)["logps"] - own).abs().max() < 1e-5


# ------------------------------------------------------------------------- in this process


@contextmanager
def serving(model, processor, port=0):
    """Port of a server of a model, in this process."""
    args = ref_server.get_args(["--port", str(port)])
    theirs = ref_server.model_identity(model, processor, "runs/other")
    with ref_server.Server(args, model, processor, theirs) as server:
        threading.Thread(target=server.serve_forever, args=[0.05]).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def other():
    """(model, processor): the tiny model, but for one weight."""
    model, processor = sampler.load_policy()
    model.get_input_embeddings().weight.data[0, 0] += 1
    return model, processor


@pytest.mark.parametrize("key", ["fingerprint", "dtype", "vocab_size"])
def test_a_reference_with_another_model_is_refused(port, identity, key):
    command = f"python ref_server.py --model_path {TINY} --dtype"
    with pytest.raises(InputError, match=f"has {key} {identity[key]}, .* mine: .*{command}"):
        reference(port, identity | {key: "mine"})


def test_a_server_that_comes_back_with_another_model_is_noticed(tiny, other, identity, question):
    with serving(*tiny) as port:
        client = reference(port, identity)
    with serving(*other, port), pytest.raises(InputError, match="412.*runs/other") as error:
        client.start(*question)()
    assert sampler.fingerprint(*other) in str(error.value)
    assert identity["fingerprint"] in str(error.value) and "\n" not in str(error.value)


def test_the_client_waits_for_a_server_that_is_starting(tiny, identity, question, capsys):
    with serving(*tiny) as port:
        pass  # from here on nobody listens there
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(reference, port, identity, patience=30)
        time.sleep(1.2)
        with serving(*tiny, port):
            assert client.result().start(*question)().isfinite().all()
    printed = capsys.readouterr().out
    assert printed.count("waiting for") == printed.count("answers again") == 1


def test_a_token_keeps_others_out(tiny, identity, question, monkeypatch):
    with serving(*tiny) as port:
        stranger = reference(port, identity)
        monkeypatch.setenv("REF_TOKEN", "open sesame")
        friend = reference(port, identity)
        assert friend.start(*question)().isfinite().all()
        monkeypatch.setenv("REF_TOKEN", "another")
        for client in (stranger, friend):
            with pytest.raises(InputError, match="401.*REF_TOKEN"):
                client.start(*question)()
        assert b" 401 " in exchange(port, b"GET /health HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA:\n9 GB"), StopIteration()])
def test_what_a_model_raises_is_an_answer(tiny, identity, question, monkeypatch, error):
    with serving(*tiny) as port:
        client = reference(port, identity, patience=1)
        monkeypatch.setattr(sampler, "completion_logps", Mock(side_effect=error))
        with pytest.raises(InputError, match=f"400, .*{sampler.one_line(error)}.*--batch_size"):
            client.start(*question)()
        monkeypatch.undo()
        assert client.start(*question)().isfinite().all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_finishes_its_answer_after_a_signal(other, question, monkeypatch, number):
    """`main` runs here, in the main thread, as signals arrive there."""
    with serving(*other) as port:
        client = reference(port, ref_server.model_identity(*other, "runs/other"), patience=20)
    handlers = {n: signal.signal(n, Mock(side_effect=AssertionError)) for n in (2, 15)}
    score = sampler.completion_logps

    def interrupted(*inputs):
        os.kill(os.getpid(), number)
        time.sleep(1)
        return score(*inputs)

    monkeypatch.setattr(sampler, "load_policy", lambda *_: other)
    monkeypatch.setattr(sampler, "completion_logps", interrupted)
    get_logps = client.start(*question)
    try:
        ref_server.main(ref_server.get_args(["--port", str(port)]))
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert (get_logps(0.4) - score(other[0], *question)).abs().max() < 1e-5


def test_a_port_that_cannot_be_had_ends_in_one_line(port, other, monkeypatch):
    monkeypatch.setattr(sampler, "load_policy", lambda *_: other)
    for number in (port, 99999):  # in use, and none
        with pytest.raises(InputError, match="--port"):
            ref_server.main(ref_server.get_args(["--port", str(number)]))
