"""The reference server as a process of its own, and what it does with what it should not get."""

import json
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, serve
from PIL import Image
from safetensors.torch import load, save

import data
import ref_server
import sampler
from sampler import InputError


@pytest.fixture(scope="module")
def asked(tiny):
    """(model, processor, prompt, completions, mask): two prompts, three completions of each."""
    model, processor = tiny
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)) for _ in range(2)]
    prompts = [data.box_prompt("a ship", think=True), data.box_prompt("a white house on the left")]
    prompt = data.collate(processor, images, prompts)
    torch.manual_seed(0)
    completions, mask, _ = sampler.sample_group(model, processor, prompt, 3, 24, 1.0)
    return model, processor, prompt, completions, mask


def test_the_server_gives_the_log_probs_of_the_model_it_serves(port, asked):
    model, processor, prompt, completions, mask = asked
    expected = ref_server.describe(model, processor, TINY)
    client = ref_server.Reference([f"http://127.0.0.1:{port}"], expected)
    found = client.logps(prompt, completions, mask, 0.9)
    own = sampler.completion_logps(model, prompt, completions, mask, 0.9).detach()
    d = (found - own)[mask]
    assert (torch.exp(d) - d - 1).abs().max() < 1e-6 and d.abs().max() < 1e-5
    assert (found[~mask] == 0).all()


def test_a_reference_with_another_vocabulary_or_precision_is_refused(port, asked):
    expected = ref_server.describe(*asked[:2], TINY)
    url = [f"http://127.0.0.1:{port}"]
    with pytest.raises(InputError, match="fingerprint"):
        ref_server.Reference(url, expected | {"fingerprint": "0" * 16})
    with pytest.raises(InputError, match="has dtype float32, .* --dtype bfloat16"):
        ref_server.Reference(url, expected | {"dtype": "bfloat16", "fingerprint": "0" * 16})
    with pytest.raises(InputError, match="vocab_size"):
        ref_server.Reference(url, expected | {"vocab_size": 1, "dtype": "bfloat16"})


def exchange(port, raw):
    """Bytes in, bytes out; the sending side is closed behind them."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has answered and hung up before reading all
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return answer


def send(port, raw):
    """Bytes in, (status, body) out."""
    head, _, body = exchange(port, raw).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def post(port, body, path="/logps", method="POST", length=None, extra=""):
    length = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n{extra}\r\n"
    return send(port, head.encode() + body)


def request_of(asked):
    _, _, prompt, completions, mask = asked
    return {**prompt, "completions": completions, "mask": mask, "temperature": torch.tensor(0.9)}


def broken_requests(asked):
    """About 200 (name, keyword arguments of `post`, or raw bytes), none of them a good request."""
    good, processor = request_of(asked), asked[1]
    body = save(good)
    size = asked[0].get_input_embeddings().num_embeddings
    rng = random.Random(0)
    for _ in range(40):
        yield "truncated, honest length", {"body": body[: rng.randrange(len(body))]}
    for _ in range(20):
        yield "truncated", {"body": body[: rng.randrange(len(body))], "length": len(body)}
    for _ in range(20):
        yield "noise", {"body": rng.randbytes(rng.randrange(1, 4000))}
    for name in good:
        yield f"without {name}", {"body": save({k: v for k, v in good.items() if k != name})}
        for dtype in (torch.float64, torch.int16, torch.bool, torch.complex64):
            if name in ("pixel_values", "temperature") and dtype.is_floating_point:
                continue
            if name.endswith(("mask", "type_ids")) and dtype == torch.bool:
                continue  # as good as integers
            yield f"{name} as {dtype}", {"body": save(good | {name: good[name].to(dtype)})}
        value = good[name]
        shapes = [value[None].contiguous(), torch.cat([value.reshape(-1)] * 3)]
        shapes += [value[:-1].contiguous(), value[:, :0].contiguous()] if value.dim() > 1 else []
        for shape in shapes:
            yield f"{name} of {tuple(shape.shape)}", {"body": save(good | {name: shape})}
    image = processor.image_token_id
    for name in ("input_ids", "completions"):
        for token in (-1, size, 2**40, -(2**62), image):
            for place in (0, -1):
                ids = good[name].clone()
                ids[0, place] = token
                yield f"{name} with {token}", {"body": save(good | {name: ids})}
    for grid in ([0, 16, 16], [1, -16, 16], [1, 2**40, 2], [1, 15, 15], [1, 8, 32], [2, 8, 16]):
        grids = good["image_grid_thw"].clone()
        grids[0] = torch.tensor(grid)
        if grid not in (
            [1, 8, 32],
            [2, 8, 16],
        ):  # as many patches: another picture, but a sound one
            yield f"grid {grid}", {"body": save(good | {"image_grid_thw": grids})}
    for number in (0.0, -1.0, float("nan"), float("inf")):
        yield f"temperature {number}", {"body": save(good | {"temperature": torch.tensor(number)})}
        pixels = good["pixel_values"].clone()
        pixels[3, 3] = float("nan") if number == 0 else float("inf")
        yield "pixels", {"body": save(good | {"pixel_values": pixels})}
    mask = good["attention_mask"].flip(1).contiguous() * 1
    mask[:, -1] = 0
    yield "padded on the right", {"body": save(good | {"attention_mask": mask})}
    yield "attention of 2", {"body": save(good | {"attention_mask": good["attention_mask"] * 2})}
    yield "unknown tensor", {"body": save(good | {"video": torch.zeros(1)})}
    for thing in (good, {"a": 1}, os.system):
        yield "pickle", {"body": pickle.dumps(thing)}
    yield "huge safetensors header", {"body": (2**40).to_bytes(8, "little") + b"{" * 1000}
    yield "metadata", {"body": save(good, metadata={"a": "b" * 70000})}
    yield "float8", {"body": save(good | {"temperature": torch.tensor(0.9).to(torch.float8_e5m2)})}
    header = json.dumps(
        {"mask": {"dtype": "I64", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    )
    yield "mad shape", {"body": len(header).to_bytes(8, "little") + header.encode()}
    padded = good["attention_mask"].clone()
    padded[0, : good["input_ids"][0].tolist().index(image) + 1] = 0
    yield "image token in the padding", {"body": save(good | {"attention_mask": padded})}
    many = {k: good[k][:1].repeat(60_000, 1) for k in ("input_ids", "attention_mask")}
    many = {k: v[:, -1:].contiguous() for k, v in many.items()}
    many |= {"mm_token_type_ids": many["input_ids"] * 0, "completions": many["input_ids"] + 1}
    yield "many short rows", {"body": save(good | many | {"mask": many["attention_mask"].bool()})}
    for shape in ((260_000, 1), (6, 9000)):
        long = {"completions": torch.zeros(shape, dtype=torch.int64)}
        long["mask"] = torch.ones(shape, dtype=torch.bool)
        yield f"completions {shape}", {"body": save(good | long)}
    for length in ("", "x", "-5", "1e3", "+7", "1_0", "9" * 30, str(2**32), "²".encode().decode()):
        yield f"length {length!r}", {"body": b"x", "length": length}
    for path in ("/", "/logp", "/logps/", "/../logps", "/health", "/" + "x" * 5000, "/%00"):
        yield f"POST {path[:9]}", {"body": body, "path": path}
        if path != "/health":
            yield f"GET {path[:9]}", {"body": b"", "path": path, "method": "GET"}
    for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO", "post"):
        yield f"{method} /logps", {"body": body, "method": method}
    yield "huge header", {"body": body, "extra": "X-Long: " + "x" * 70000 + "\r\n"}
    yield "many headers", {"body": body, "extra": "".join(f"X-{i}: 1\r\n" for i in range(200))}
    yield "long path", {"body": body, "path": "/" + "x" * 70000}
    lines = ["POST", "POST /logps HTTP/9.9", "POST /logps HTTP/x", "GET / extra words HTTP/1.1"]
    for raw in (*(f"{line}\r\n\r\n".encode() for line in lines), b"\x80\x04K\x01.\r\n\r\n"):
        yield f"raw {raw[:12]!r}", raw


def test_two_hundred_malformed_requests_get_a_line_each_and_a_good_one_succeeds(port, asked):
    body, count = save(request_of(asked)), 0
    for name, request in broken_requests(asked):
        status, answer = (
            send(port, request) if isinstance(request, bytes) else post(port, **request)
        )
        assert 400 <= status < 500, (name, status, answer)
        if request != b"" and "HEAD" not in name:
            assert answer.count(b"\n") == 1 and answer.endswith(b"\n") and len(answer) > 9, name
        count += 1
    assert count >= 200
    status, answer = post(port, body)
    logps = load(answer)["logps"]
    assert status == 200 and logps.shape == (6, asked[3].shape[1]) and logps.isfinite().all()


# ------------------------------------------------------------------------- fuzzing
# A good request with a few things changed at random: tensors, bytes of safetensors, or the head.

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)
WHOLES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint64)
REAL = (0.0, -1.0, 1e-45, 1e-40, 1e-30, 1e-4, 1e9, 1e38, -1e38, float("inf"), float("nan"))
WHOLE = (0, 1, -1, 2, 4, 8, 32, 255, 2**15, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def change_tensors(tensors, tokens, rng):
    """A tensor that is dropped, added, or of another type, shape, size or content. tokens: ids."""
    name, kind = rng.choice(sorted(tensors)), rng.randrange(10)
    value = tensors.pop(name).clone()
    if kind == 0:
        return
    if kind == 1:
        tensors[rng.choice(["", "video", "\n", "é" * 9, "mask ", "mask\0"])] = value.clone()
    elif kind == 2:
        value = value.to(rng.choice([*FLOATS, *WHOLES, torch.bool]))
    elif kind == 3:
        flat = value.flatten()
        value = rng.choice([flat, flat[None], flat[:, None], value[None], flat[:1].squeeze()])
    elif kind == 4 and value.dim():
        side = rng.randrange(value.dim())
        size = rng.choice([0, 1, value.shape[side] // 2])
        value = value.transpose(0, side)[:size].transpose(0, side)
    elif kind == 5 and value.dim():
        value = torch.cat([value] * rng.choice([2, 3, 7]), rng.randrange(value.dim()))
    elif kind == 6 and value.dim():
        value = value.flip(rng.randrange(value.dim()))
    elif value.numel():
        flat, whole = value.view(-1), value.dtype in WHOLES
        for place in rng.choices(range(len(flat)), k=rng.choice([1, 1, 9])):
            number = rng.choice([*WHOLE, *tokens] if whole else REAL)
            flat[place] = number if value.dtype == torch.int64 or not whole else number % 2
    tensors[name] = value.contiguous()


def change_header(body, rng):
    """Another type, shape or place of a tensor, metadata, nonsense, or a name that comes twice."""
    size = int.from_bytes(body[:8], "little")
    header, rest = json.loads(body[8 : 8 + size]), body[8 + size :]
    name, kind = rng.choice(sorted(header)), rng.randrange(7)
    side = rng.choice([0, 3, -1, 1.5, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**70])
    if kind == 0:
        dtypes = ["F4", "F8_E8M0", "U64", "C64", "I64", "I8", "BOOL", "F32", "x", "", 5, None]
        header[name]["dtype"] = rng.choice(dtypes)
    elif kind == 1:
        header[name]["shape"] = rng.choice([[], [side], [1, side], [side] * 3, [side] * 99, "2"])
    elif kind == 2:
        header[name]["data_offsets"] = rng.choice([[0, side], [side, 0], [side], [0, len(rest)]])
    elif kind == 3:
        header[name] |= {"shape": [0, side], "data_offsets": [0, 0]}
    elif kind == 4:
        metadata = [{"a": "b"}, {"a": 1}, [], "x", {"a": "b" * 70000}]
        header["__metadata__"] = rng.choice(metadata)
    elif kind == 5:
        header[name] = rng.choice([None, 1, [], {}, "x", [[[[]]]]])
    text = json.dumps(header)
    if kind == 6:
        text = text[:-1] + "," + json.dumps({name: header[rng.choice(sorted(header))]})[1:]
    text = text.encode() + b" " * rng.choice([0, 1, 8])
    return len(text).to_bytes(8, "little") + text + rest


def change_bytes(body, rng):
    """Bits that are flipped, bytes that are lost or too many, a wrong length of the header."""
    body, reach = bytearray(body), rng.choice([8, 800, 800, len(body)])
    place, kind = rng.randrange(reach), rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 8, 64])):
            body[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del body[place : place + rng.choice([1, 8, 500, len(body)])]
    elif kind == 2:
        body[place:place] = rng.randbytes(rng.choice([1, 8, 500]))
    else:
        size = rng.choice([0, 1, 2**16, 2**27, 2**40, 2**63, 2**64 - 1, rng.randrange(4000)])
        body[:8] = size.to_bytes(8, "little")
    return bytes(body)


def change_head(body, rng):
    """A first line and headers made of parts that are mostly good, and a body that mostly is."""
    size = len(body)
    pick = lambda good, *bad: good if rng.random() < 0.8 else rng.choice(bad)
    method = pick("POST", "GET", "HEAD", "post", "P\0ST", "", "__init__", "A" * 70000)
    paths = ["/health", "/", "//logps", "/logps?x", "*", "/\xff", "http://h/logps", "/" * 70000]
    path = pick("/logps", *paths)
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


def fuzzed_requests(asked, count):
    """`count` requests, as raw bytes, the same ones in every run."""
    rng, good = random.Random(0), request_of(asked)
    tokens = [*sampler.vision_tokens(*asked[:2]), 5, 700]
    for number in range(count):
        tensors = dict(good)
        if number % 4 == 0:
            for _ in range(rng.choice([1, 1, 2, 4])):
                change_tensors(tensors, tokens, rng)
        body = save(tensors)
        if number % 4 == 1:
            body = change_header(body, rng)
        elif number % 4 == 2:
            body = change_bytes(body, rng)
        head = f"POST /logps HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        yield change_head(body, rng) if number % 4 == 3 else head + body


def hang_up(port, raw):
    """A client that is gone while its request, or the answer, is on its way."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            connection.sendall(raw[: len(raw) // 2])
        except OSError:
            pass  # it was refused before it was read


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_request_however_strange_goes_unanswered_or_harms_the_server(port, asked, count):
    statuses = set()
    for number, raw in enumerate(fuzzed_requests(asked, count)):
        if number % 10 == 9:
            hang_up(port, raw)
        answer, first_line = exchange(port, raw), raw.partition(b"\n")[0].decode("latin-1")
        if not first_line.split() or "HTTP/0.9" in first_line:
            continue  # no request; a version that has no status line
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status == 200 or 400 <= status < 500, (raw[:300], answer)
        if status == 200 and first_line.startswith("POST"):
            assert load(body)["logps"].isfinite().all(), raw[:300]
        statuses.add(status)
    assert {200, 400, 405, 411} <= statuses
    time.sleep(0.5)
    # every slot but one is taken by a client that says nothing: the last one is free
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(15)]
    try:
        time.sleep(0.2)
        status, answer = post(port, save(request_of(asked)))
    finally:
        for connection in silent:
            connection.close()
    own = sampler.completion_logps(asked[0], *asked[2:], 0.9).detach()
    assert status == 200 and (load(answer)["logps"] - own).abs().max() < 1e-5


# ------------------------------------------------------------------------- many clients


def ask_at_once(port, asked, each):
    """Eight clients, each with a question of its own behind the other, ask for so many answers."""
    model, processor, prompt, completions, mask = asked
    questions = []
    for temperature in (0.5, 0.9, 2.0):
        questions.append((prompt, completions, mask, temperature))
        for row in range(2):
            own = slice(3 * row, 3 * row + 3)
            one = sampler.take_prompts(prompt, [row])
            questions.append((one, completions[own], mask[own], temperature))
    known = [sampler.completion_logps(model, *question).detach() for question in questions]
    expected = ref_server.describe(model, processor, TINY)

    def work(number):
        client = ref_server.Reference([f"http://127.0.0.1:{port}"], expected)
        for turn in range(each):
            k = (number + turn) % len(questions)
            if (client.logps(*questions[k]) - known[k]).abs().max() > 1e-5:
                return f"client {number}, request {turn}"

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8


def test_eight_clients_get_their_own_answers(port, asked):
    ask_at_once(port, asked, 8)


@pytest.mark.slow
def test_eight_clients_with_two_hundred_requests_each_leave_the_memory_as_it_was(asked):
    process, port = serve()
    try:
        used = []
        for _ in range(2):
            ask_at_once(port, asked, 100)
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            used += [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]  # kB
        assert used[1] - used[0] < 20_000
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_whole_numbers_and_bools_of_any_kind_and_short_floats_do(port, asked):
    own = sampler.completion_logps(*(x for x in (asked[0], *asked[2:])), 0.9).detach()
    for name, dtype in [
        *((name, torch.bool) for name in ("attention_mask", "mm_token_type_ids", "mask")),
        *((name, torch.int32) for name in ("attention_mask", "mm_token_type_ids", "mask")),
        *(("pixel_values", dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
        ("temperature", torch.float64),
    ]:
        good = request_of(asked)
        status, answer = post(port, save(good | {name: good[name].to(dtype)}))
        short = 0.1 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        assert status == 200 and (load(answer)["logps"] - own).abs().max() < short, (name, dtype)


def test_numbers_that_overflow_are_not_answered_by_nan(port, asked):
    good = request_of(asked)
    for name, value in (("temperature", 1e-45), ("pixel_values", 1e38)):
        wild = torch.full_like(good[name], value)
        status, line = post(port, save(good | {name: wild}))
        assert status == 400 and b"nan or infinite" in line, name


def test_a_request_for_another_model_is_refused_and_one_for_any_is_served(port, asked):
    body = save(request_of(asked))
    mine = sampler.fingerprint(*asked[:2])
    for wanted, expected in ((f'"{mine}"', 200), ("*", 200), ('"0123"', 412), ("\xff", 412)):
        status, line = post(port, body, extra=f"If-Match: {wanted}\r\n")
        assert status == expected, wanted
    status, line = post(port, body, extra='If-Match: "0123"\r\n')
    assert b"0123" in line and mine.encode() in line and TINY.encode() in line


def test_many_clients_that_come_at_once_do_not_wait_for_a_second(port):
    start = time.time()
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(16)]
    assert time.time() - start < 0.5
    for client in clients:
        client.close()
    time.sleep(0.5)


def test_a_client_that_falls_silent_loses_its_slot(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"POST /logps HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc")
        assert b" 408 " in connection.recv(4096)


def test_a_full_server_is_asked_again_and_a_token_keeps_others_out(asked, monkeypatch):
    process, port = serve("--max_requests", "1", "--timeout", "3", REF_TOKEN="open sesame")
    try:
        status, line = post(port, save(request_of(asked)))
        assert status == 401 and b"REF_TOKEN" in line
        expected, url = ref_server.describe(*asked[:2], TINY), [f"http://127.0.0.1:{port}"]
        with pytest.raises(InputError, match="REF_TOKEN"):
            ref_server.Reference(url, expected)
        monkeypatch.setenv("REF_TOKEN", "open sesame")
        time.sleep(0.5)  # until the slot of the last request is free again
        with socket.create_connection(("127.0.0.1", port)):  # silent, in the only slot
            time.sleep(0.5)
            status, line = send(port, b"GET /health HTTP/1.1\r\n\r\n")
            assert status == 503 and b"--max_requests" in line
            client = ref_server.Reference(url, expected, patience=20)
            assert client.logps(*asked[2:], 1.0).shape == asked[3].shape
        drip = socket.create_connection(("127.0.0.1", port))  # a byte now and then, for ever
        threading.Thread(target=trickle, args=[drip], daemon=True).start()
        time.sleep(0.5)
    finally:
        process.terminate()
        assert process.wait(30) == 0


def trickle(connection):
    connection.sendall(b"POST /logps HTTP/1.1\r\nContent-Length: 100\r\n")
    connection.sendall(b"Authorization: Bearer open sesame\r\n\r\n")
    try:
        while True:
            connection.sendall(b"x")
            time.sleep(0.5)
    except OSError:
        pass  # cut off


def test_a_request_that_is_too_large_is_named_though_it_was_not_read(port, asked):
    expected = ref_server.describe(*asked[:2], TINY)
    client = ref_server.Reference([f"http://127.0.0.1:{port}"], expected, patience=5)
    large = {**asked[2], "pixel_values": torch.zeros(5_000_000)}
    with pytest.raises(InputError, match="--max_mb"):
        client.logps(large, *asked[3:], 1.0)


def test_a_child_that_has_ended_is_not_waited_for(asked):
    expected, child = ref_server.describe(*asked[:2], TINY), subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(InputError, match="ended, code 0"):
        ref_server.Reference(["http://127.0.0.1:9"], expected, child=child)


def test_the_client_waits_for_a_server_that_is_starting_and_says_so_once(asked, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, expected = [f"http://127.0.0.1:{port}"], ref_server.describe(*asked[:2], TINY)
    with pytest.raises(InputError, match="no reference at .* is `python ref_server.py` running"):
        ref_server.Reference(url, expected, patience=0.5)
    capsys.readouterr()
    start = time.time()
    starter = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; time.sleep(1); sys.argv = sys.argv[1:]; "
         f"sys.path.insert(0, {str(ROOT)!r}); import ref_server as r; r.main(r.get_args())",
         "x", "--model_path", TINY, "--port", str(port)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        client = ref_server.Reference(url, expected, patience=60)
        assert time.time() - start > 1 and capsys.readouterr().out.count("waiting for") == 1
        assert client.logps(*asked[2:], 1.0).isfinite().all()
    finally:
        starter.send_signal(signal.SIGINT)
        assert starter.wait(20) == 0


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
         f"import ref_server as r\nchild = r.start_child({TINY!r}, 'cpu', 'float32', 1)\n"
         "print(r.child_port(child), child.pid, flush=True)\ntime.sleep(60)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    port, child = map(int, parent.stdout.readline().split())
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["model"] == TINY
    connection.close()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the server outlived its parent")


def test_several_servers_take_turns(asked, monkeypatch):
    seen = []
    expected = ref_server.describe(*asked[:2], TINY)
    body = save({"logps": torch.zeros(asked[3].shape)})

    def answer(self, url, method, path, *_):
        seen.append((url, path))
        return json.dumps(expected).encode() if path == "/health" else body

    monkeypatch.setattr(ref_server.Reference, "ask", answer)
    client = ref_server.Reference(["http://a:1", "http://b:2"], expected, turn=1)
    for _ in range(3):
        client.logps(*asked[2:], 1.0)
    assert [url[7] for url, path in seen] == ["a", "b", "b", "a", "b"]


def test_an_answer_that_is_none_ends_in_one_line(asked, monkeypatch):
    expected = ref_server.describe(*asked[:2], TINY)
    answers = iter([b"<html>", b"[]", json.dumps(expected).encode(), b"junk of some length"])
    monkeypatch.setattr(ref_server.Reference, "ask", lambda *_: next(answers))
    for _ in range(2):
        with pytest.raises(InputError, match="no reference server"):
            ref_server.Reference(["http://a:1"], expected)
    client = ref_server.Reference(["http://a:1"], expected)
    with pytest.raises(InputError, match="safetensors"):
        client.logps(*asked[2:], 1.0)
    answers = iter([save({"logps": torch.full(asked[3].shape, float("nan"))})])
    with pytest.raises(InputError, match="nan"):
        client.logps(*asked[2:], 1.0)


def test_a_port_in_use_ends_in_one_line(port, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C belongs to pytest
    with pytest.raises(InputError, match="--port"):
        ref_server.main(ref_server.get_args(["--model_path", TINY, "--port", str(port)]))
    with pytest.raises(InputError, match="--port"):
        ref_server.main(ref_server.get_args(["--model_path", TINY, "--port", "99999"]))
