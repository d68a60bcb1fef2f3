"""The reference model as a small HTTP server: log-probs of completions under the frozen policy.

GRPO keeps the policy close to where it started by a penalty on log p_ref - log p. The reference
never changes, so it need not live in the training process: one server can serve many ranks, on
another GPU or another machine.

    POST /logps    safetensors in: input_ids, attention_mask (B, P) and the image of each of B
                   prompts; completions, mask (B*G, C); temperature (). Out: logps (B*G, C)
    GET  /health   JSON: model, fingerprint (of the tokenizer's vocabulary), vocab_size, dtype

Only the standard library's http.server and safetensors: nothing that arrives is ever unpickled or
run, a bad request gets a 4xx and one line that says what was expected, and the server lives on. It
listens on 127.0.0.1 unless told otherwise. If REF_TOKEN is set in the environment, clients need
the same; set it wherever others can reach the port.

    python ref_server.py --model_path runs/sft
    python grpo.py --ref_url http://127.0.0.1:59875

`python grpo.py` alone starts one of its own, as a child, and stops it in the end.
"""

import argparse
import hashlib
import hmac
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import torch

import sampler
from sampler import InputError

MOST_TOKENS = 2**18  # of one request, with a prompt for every completion, as attention has it
MOST_PAIRS = 2**27  # of tokens that attention compares
PROMPT = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
ANSWERS = ("completions", "mask", "temperature")
REQUEST = PROMPT | set(ANSWERS)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_path", default="runs/sft", help="Hugging Face folder or hub name")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (set REF_TOKEN)")
    add("--port", type=int, default=59875, help="port to listen on; 0: any that is free")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA")
    add("--max_mb", type=int, default=512, help="largest request, in MB")
    add("--max_requests", type=int, default=16, help="connections at once; more get a 503")
    add("--timeout", type=float, default=60, help="seconds in which a request must have arrived")
    on_off = argparse.BooleanOptionalAction
    add("--child", action=on_off, default=False, help="stop when standard input is closed")
    args = parser.parse_args(argv)
    if min(args.max_mb, args.max_requests) < 1 or args.timeout <= 0:
        parser.error("--max_mb and --max_requests start at 1, --timeout is above 0")
    return args


def fingerprint(processor):
    """Of the tokenizer's vocabulary: a reference with another one would score other words."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def describe(model, processor, path):
    """What /health says, and what a client expects it to say of its own model."""
    size, dtype = model.get_input_embeddings().num_embeddings, str(model.dtype)[len("torch.") :]
    known = {"fingerprint": fingerprint(processor), "vocab_size": size, "dtype": dtype}
    return {"model": str(path), **known}


# ------------------------------------------------------------------------- client


class Reference:
    """Client of one or more servers, which take turns. Safe to use from a thread."""

    def __init__(self, urls, expected, turn=0, patience=300, child=None):
        """Wait until every server answers. expected: `describe` of the client's own model. turn:
        which server comes first (the rank). patience: seconds, also for every later request.
        child: the server's process, if it is one's own: there is no waiting for one that ended."""
        self.urls, self.turn, self.patience, self.child = urls, turn, patience, child
        self.models = []
        for url in urls:
            content = self.ask(url, "GET", "/health")
            try:
                found = {key: json.loads(content)[key] for key in expected}
            except (ValueError, KeyError, TypeError):
                raise InputError(f"what answers at {url} is no reference server") from None
            for key in ("vocab_size", "fingerprint", "dtype"):
                if found[key] != expected[key]:
                    mend = "the model that training starts from"
                    mend = f"--dtype {expected[key]}" if key == "dtype" else mend
                    raise InputError(
                        f"the reference at {url} ({found['model']}) has {key} {found[key]}, the "
                        f"policy {expected[key]}: start ref_server.py with {mend}"
                    )
            self.models.append(found["model"])

    def logps(self, prompt, completions, mask, temperature):
        """log p_ref(completions), float32 (B*G, C): see sampler.completion_logps."""
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        tensors = {key: value.cpu().contiguous() for key, value in prompt.items()}
        tensors |= {"completions": completions.cpu(), "mask": mask.cpu()}
        tensors["temperature"] = torch.tensor(float(temperature))
        url, self.turn = self.urls[self.turn % len(self.urls)], self.turn + 1
        try:
            logps = load(self.ask(url, "POST", "/logps", save(tensors)))["logps"]
        except (SafetensorError, KeyError) as error:
            raise InputError(f"{url} did not answer in safetensors ({error})") from None
        if logps.shape != completions.shape or not logps.isfinite().all():
            raise InputError(f"the reference at {url} gave log-probs {tuple(logps.shape)} or nan")
        return logps

    def ask(self, url, method, path, body=None):
        """One request; a server that is starting or busy is asked again, for `patience` seconds."""
        start, pause, said = time.time(), 0.1, False
        token = os.environ.get("REF_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        while True:
            if self.child and self.child.poll() is not None:
                raise InputError(f"the reference server ended, code {self.child.returncode}")
            try:
                connection = HTTPConnection(urlsplit(url).netloc, timeout=max(1, self.patience))
                try:
                    connection.request(method, path, body, headers)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it answered before it had read all: the answer says why
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
            except (OSError, HTTPException) as error:
                why = str(error) or repr(error)
            else:
                if answer.status == 200:
                    return content
                why = content.decode(errors="replace").strip()[:300].partition("\n")[0]
                if answer.status != 503:
                    raise InputError(f"the reference at {url} refused {path}: {why}")
            if time.time() - start > self.patience:
                waited, self.patience = self.patience, 0  # what is still queued fails at once
                raise InputError(
                    f"no reference at {url} in {waited:.0f} s ({why}): is `python ref_server.py` "
                    "running there?"
                )
            if not said and pause > 1:
                print(f"waiting for the reference at {url} ({why})", flush=True)
                said = True
            time.sleep(pause)
            pause = min(2 * pause, 5)


def start_child(model_path, device, dtype, threads):
    """Start a server of one's own on a free port, with so many threads on a CPU. It ends when this
    process does: its standard input is a pipe that nobody but this process holds open."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--port", "0"]
    command += ["--model_path", str(model_path), "--device", device, "--dtype", dtype]
    # idle threads must not spin on cores that the training uses meanwhile
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def child_port(child):
    """The port of a child that was started, as soon as it listens."""
    line = child.stdout.readline()  # "reference: MODEL at http://HOST:PORT"
    if not line:
        raise InputError(f"the reference server ended with code {child.wait()}: see above")
    return urlsplit(line.split()[-1]).port


# ------------------------------------------------------------------------- server


def check(condition, line):
    if not condition:
        raise InputError(line)


def check_request(tensors, model):
    """InputError, saying what was expected, for a request that the model cannot score.

    NOTE: an id out of range must not reach a GPU: it ends the whole process, not the request.
    """
    names, config = set(tensors), model.config
    check(names <= REQUEST, f"unknown tensors {sorted(names - REQUEST)}")
    check(REQUEST <= names, f"missing tensors {sorted(REQUEST - names)}")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "completions", "mask"):
        value = tensors[name]
        check(value.dim() == 2 and value.numel(), f"{name}: expected two dimensions, not empty")
        whole = not (value.is_floating_point() or value.is_complex())
        check(whole, f"{name}: expected integers, found {value.dtype}")
    for name in ("input_ids", "completions", "image_grid_thw"):
        check(tensors[name].dtype == torch.int64, f"{name}: expected int64")
    ids, completions, grid = (tensors[k] for k in ("input_ids", "completions", "image_grid_thw"))
    for name in ("attention_mask", "mm_token_type_ids"):
        check(tensors[name].shape == ids.shape, f"{name}: expected the shape of input_ids")
    check(tensors["mask"].shape == completions.shape, "mask: expected the shape of completions")
    for name in ("attention_mask", "mask"):
        check(((tensors[name] == 0) | (tensors[name] == 1)).all(), f"{name}: expected 0 and 1")
    (batch, start), (rows, length) = ids.shape, completions.shape
    check(rows % batch == 0, f"{rows} completions for {batch} prompts: expected a multiple")
    tokens = rows * (start + length)
    pairs = batch * start**2 + rows * length * (start + length)
    small = tokens <= MOST_TOKENS and pairs <= MOST_PAIRS
    check(small, f"{rows} completions of {length} tokens behind {start}: too many for one request")
    size = model.get_input_embeddings().num_embeddings
    for name in ("input_ids", "completions"):
        check(0 <= tensors[name].min() and tensors[name].max() < size, f"{name}: ids up to {size}")
    attention = tensors["attention_mask"].long()
    check(
        attention[:, -1].all() and (attention.diff() >= 0).all(), "attention_mask: pad on the left"
    )
    is_image = ids == config.image_token_id
    check((tensors["mm_token_type_ids"].long() == is_image).all(), "mm_token_type_ids: 1 on images")
    check(not (is_image & (attention == 0)).any(), "attention_mask: 0 on an image token")
    for token in sampler.vision_tokens(model):
        check(not (completions == token).any(), f"completions: vision token {token}")
    check(not (ids == config.video_token_id).any(), "input_ids: a video token, expected images")
    check_images(tensors["pixel_values"], grid, is_image, config.vision_config)
    temperature = tensors["temperature"]
    check(temperature.dim() == 0 and temperature.is_floating_point(), "temperature: one float")
    check(math.isfinite(temperature) and temperature > 0, "temperature: expected more than 0")


def check_images(pixels, grid, is_image, vision):
    """Every prompt's runs of image tokens (is_image, bool (B, P)) fit the grids, in their order."""
    check(grid.dim() == 2 and grid.shape[1] == 3 and len(grid), "image_grid_thw: expected (n, 3)")
    check((grid > 0).all() and (grid < 2**15).all(), "image_grid_thw: sides from 1 to 32767")
    merge = vision.spatial_merge_size
    check((grid[:, 1:] % merge == 0).all(), f"image_grid_thw: expected multiples of {merge}")
    patch = math.prod((vision.temporal_patch_size, vision.patch_size, vision.patch_size))
    expected = (int(grid.prod(-1).sum()), getattr(vision, "in_channels", 3) * patch)
    check(pixels.is_floating_point(), f"pixel_values: expected floats, found {pixels.dtype}")
    check(pixels.shape == expected, f"pixel_values: expected {expected}, as the grids say")
    check(pixels.isfinite().all(), "pixel_values: nan or infinite")
    runs = [len(list(r)) for row in is_image.tolist() for key, r in groupby(row) if key]
    sizes = (grid.prod(-1) // merge**2).tolist()
    check(runs == sizes, f"input_ids: runs of image tokens {runs[:9]}, grids say {sizes[:9]}")


class Handler(BaseHTTPRequestHandler):
    """One request. A connection carries one (HTTP/1.0), so that a client holds no slot for long."""

    default_request_version = "HTTP/1.0"  # or a garbled first line would get no status line
    server_version = "reference"

    def setup(self):
        """What has not arrived in time is cut off, however it trickles in."""
        seconds = self.server.timeout_s
        self.timeout = 2 * seconds  # of a single wait: for clients that do not take their answer
        super().setup()
        self.late = threading.Timer(seconds, self.request.shutdown, [socket.SHUT_RD])
        self.late.daemon = True
        self.late.start()

    def finish(self):
        self.late.cancel()
        super().finish()

    def reply(self, code, body, kind="text/plain"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        """Also what http.server calls for a broken first line, a huge header, a method unknown."""
        code = {501: 405, 505: 400}.get(code, code)
        line = " ".join(str(message or self.responses[code][0]).split())[:300]
        print(f"{self.client_address[0]} got {code}: {line!r}", file=sys.stderr, flush=True)
        self.reply(code, (line.encode("ascii", "replace") + b"\n"))

    def log_request(self, code="-", size="-"):
        pass  # one line per request would bury the ones that matter

    def is_allowed(self):
        token = os.environ.get("REF_TOKEN")
        given = self.headers.get("Authorization", "")
        return not token or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    def do_GET(self):
        if not self.is_allowed():
            self.send_error(401, "expected the token in REF_TOKEN, as 'Authorization: Bearer ...'")
        elif self.path == "/health":
            self.reply(200, json.dumps(self.server.health).encode(), "application/json")
        elif self.path == "/logps":
            self.send_error(405, "expected POST /logps")
        else:
            self.send_error(404, "expected GET /health or POST /logps")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        most = self.server.max_bytes
        if not self.is_allowed():
            self.send_error(401, "expected the token in REF_TOKEN, as 'Authorization: Bearer ...'")
        elif self.path != "/logps":
            self.send_error(405 if self.path == "/health" else 404, "expected POST /logps")
        elif not re.fullmatch("[0-9]{1,15}", length):
            self.send_error(411, "expected a Content-Length")
        elif int(length) > most:
            self.send_error(413, f"{length} bytes, expected {most} at most (--max_mb)")
        else:
            self.answer_logps(int(length))

    def answer_logps(self, length):
        """NOTE: whatever the request makes torch raise must end in an answer: a client that gets
        none takes the server for one that is starting, and asks again."""
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        model = self.server.model
        body = self.rfile.read(length)
        if not self.late.is_alive():
            return self.send_error(408, f"{length} bytes did not arrive in time")
        self.late.cancel()
        try:
            check(len(body) == length, f"{len(body)} bytes, Content-Length says {length}")
            tensors = load(body)
            check_request(tensors, model)
        except InputError as error:
            return self.send_error(400, error)
        except (SafetensorError, KeyError, RuntimeError) as error:  # an unknown dtype, a mad shape
            return self.send_error(400, f"expected a body in safetensors format ({error})")
        completions, mask, temperature = (tensors.pop(k) for k in ANSWERS)
        try:
            with self.server.one_at_a_time, torch.no_grad():
                logps = sampler.completion_logps(
                    model, tensors, completions, mask, temperature.item()
                )
        except torch.OutOfMemoryError:
            self.send_error(413, "not enough memory: send fewer prompts at once (--batch_size)")
        except (RuntimeError, ValueError, IndexError) as error:
            self.send_error(400, f"the model cannot score this: {error}")
        else:
            body = save({"logps": logps.float().cpu().contiguous()})
            self.reply(200, body, "application/octet-stream")


class Server(ThreadingHTTPServer):
    """A thread per request, at most `max_requests` of them; the model scores one at a time."""

    daemon_threads = False  # server_close waits for the answers that are under way

    def __init__(self, args, model, health):
        self.model, self.health, self.timeout_s = model, health, args.timeout
        self.max_bytes, self.one_at_a_time = args.max_mb * 2**20, threading.Lock()
        self.slots = threading.BoundedSemaphore(args.max_requests)
        super().__init__((args.host, args.port), Handler)

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            return super().process_request(request, client_address)
        line = b"busy: ask again\n"
        head = f"HTTP/1.0 503 busy\r\nContent-Length: {len(line)}\r\n\r\n".encode()
        request.settimeout(1)
        try:
            request.sendall(head + line)
        except OSError:
            pass  # it hung up: nothing to tell
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        """A client that hung up is no news; anything else is ours to mend, but not to die of."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main(args):
    # 1. The model.
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, processor = sampler.load_policy(args.model_path, args.device, dtype)
    model.requires_grad_(False)

    # 2. The server, and what ends it: SIGTERM, Ctrl-C, or the end of the process that started it.
    health = describe(model, processor, args.model_path)
    try:
        server = Server(args, model, health)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {args.host}:{args.port} ({error}): --port") from None
    stop = lambda *_: threading.Thread(target=server.shutdown).start()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    if args.child:
        threading.Thread(target=lambda: (os.read(0, 1), stop()), daemon=True).start()
    host, port = server.server_address[:2]
    print(f"reference: {args.model_path} at http://{host}:{port}", flush=True)
    if not host.startswith("127.") and not os.environ.get("REF_TOKEN"):
        print("NOTE: others can reach it, and REF_TOKEN is not set", file=sys.stderr)

    # 3. Serve.
    with server:
        server.serve_forever()


if __name__ == "__main__":
    try:
        main(get_args())
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
