"""The reference server as a process of its own, and what it does with what it should not get."""

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

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
    with pytest.raises(InputError, match="vocab_size"):
        ref_server.Reference(url, expected | {"vocab_size": 1})
    with pytest.raises(InputError, match="--dtype"):  # the KL would not start at 0
        ref_server.Reference(url, expected | {"dtype": "bfloat16"})


def send(port, raw):
    """Bytes in, (status, body) out; the sending side is closed behind them."""
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
    head, _, body = answer.partition(b"\r\n\r\n")
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
            if name in ("mask", "attention_mask", "mm_token_type_ids") and not (
                dtype.is_floating_point or dtype.is_complex
            ):
                continue  # any integer or bool does for these
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
            assert send(port, b"GET /health HTTP/1.1\r\n\r\n") == (503, b"busy: ask again\n")
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
        starter.terminate()
        starter.wait(20)


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

    def answer(self, url, method, path, body_in=None):
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


def test_a_port_in_use_ends_in_one_line(port):
    with pytest.raises(InputError, match="--port"):
        ref_server.main(ref_server.get_args(["--model_path", TINY, "--port", str(port)]))
    with pytest.raises(InputError, match="--port"):
        ref_server.main(ref_server.get_args(["--model_path", TINY, "--port", "99999"]))
