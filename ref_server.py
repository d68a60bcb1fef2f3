"""The reference model as a small HTTP server: log-probs of completions under the frozen policy.

GRPO keeps the policy close to where it started by a penalty on log p_ref - log p. The reference
never changes, so it can live outside the training process, on another GPU or another machine, and
serve many processes. (LoRA's frozen base is no reference: the vision merger trains as a whole.)

    POST /logps    safetensors in: input_ids, attention_mask (B, P) and the image of each of B
                   prompts, as the processor gives it; completions, mask (B*G, C); temperature ().
                   Out: logps (B*G, C)
    GET  /health   JSON: model, fingerprint (of vocabulary and weights), vocab_size, dtype

Nothing that arrives is unpickled or run. A bad request gets a 4xx and one line that says what was
expected, and the server lives on. It listens on 127.0.0.1 by default. If REF_TOKEN is set in its
environment, clients need the same value in theirs; set it wherever others can reach the port.

A server may be restarted during training: the client waits and says so. Every request carries the
fingerprint of the policy's start (If-Match), so a server with another model refuses it (412).

    python ref_server.py --model_path runs/sft
    python grpo.py --ref_url http://127.0.0.1:59875

`python grpo.py` alone starts a server of its own, as a child process, and stops it at the end.
"""

import argparse
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException, IncompleteRead, InvalidURL
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import load, save

import sampler
from sampler import InputError, error_border, one_line

MAX_TOKENS = 2**18  # of one request, counting the prompt for every completion
MAX_PAIRS = 2**27  # of tokens that attention compares
SMALLER = "send fewer prompts at once (--batch_size)"
TOKEN_HINT = "expected 'Authorization: Bearer ...' with this server's token: set REF_TOKEN to it"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = sampler.flag_adder(parser)
    add("--model_path", default="runs/sft", help="Hugging Face folder or hub name")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (set REF_TOKEN)")
    add("--port", type=int, default=59875, help="port to listen on; 0: any that is free")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA")
    add("--max_mb", type=int, default=512, help="largest request, in MB")
    on_off = argparse.BooleanOptionalAction
    add("--child", action=on_off, default=False, help="stop when standard input is closed")
    return parser.parse_args(argv)


def require(condition, line):
    if not condition:
        raise InputError(line)


def reference_token():
    """REF_TOKEN, without the line end that it may have from the file or secret it came from."""
    token = os.environ.get("REF_TOKEN", "").strip()
    if not token.isprintable():
        raise InputError("REF_TOKEN holds a line end or another character that no header may have")
    return token


def model_identity(model, processor, path, dtype=None):
    """What /health answers, and what a client expects of its reference: this model, or the same
    one in another `dtype`."""
    return {
        "model": str(path),
        "fingerprint": sampler.fingerprint(model, processor, dtype),
        "vocab_size": model.get_input_embeddings().num_embeddings,
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
    }


# ------------------------------------------------------------------------- client


def http_request(url, path, body, headers, timeout):
    """One GET or, with a body, POST: (status, content). timeout: seconds of silence."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=timeout)) as connection:
        try:
            connection.request("POST" if body else "GET", path, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server answered before it had read all: read why
        answer = connection.getresponse()
        if answer.length is None:  # a reference always sends a length: its header was cut off
            raise IncompleteRead(b"")
        return answer.status, answer.read()


class Reference:
    """Client of one or more servers, which take turns. A thread waits for their answers."""

    def __init__(self, urls, identity, turn=0, patience=300, child=None):
        """Wait until every server answers, and make sure that it has the model `identity` (see
        model_identity). turn: which server comes first (the rank). patience: seconds to wait for a
        server, at any time. child: the server's process if we started it."""
        self.urls, self.turn, self.patience, self.child = urls, turn, patience, child
        self.executor = ThreadPoolExecutor(1)
        self.headers = {"If-Match": f'"{identity["fingerprint"]}"'}
        if token := reference_token():
            self.headers["Authorization"] = f"Bearer {token}".encode()
        command = f"python ref_server.py --model_path {identity['model']}"
        self.remedy = f"start `{command} --dtype {identity['dtype']}` there"
        for url in urls:
            with error_border(f"{url} is no reference server", self.remedy):
                found = json.loads(self.request(url, "/health"))
                for key in ("vocab_size", "dtype", "fingerprint"):
                    if found[key] != identity[key]:
                        other = f"{key} {found[key]}, the policy {identity[key]}"
                        line = f"the reference at {url} ({found['model']}) has {other}"
                        raise InputError(f"{line}: {self.remedy}")

    def start(self, prompt, completions, mask, temperature):
        """Ask for log p_ref(completions), and return a function that waits for it: float32
        (B*G, C), see sampler.completion_logps."""
        tensors = {**prompt, "completions": completions, "mask": mask}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        tensors["temperature"] = torch.tensor(float(temperature))
        return self.executor.submit(self.logps, tensors).result

    def logps(self, tensors):
        """The answer of the next server to one question."""
        url, self.turn = self.urls[self.turn % len(self.urls)], self.turn + 1
        content = self.request(url, "/logps", save(tensors))
        with error_border(f"{url} did not answer with logps", self.remedy):
            logps = load(content)["logps"]
            if logps.shape != tensors["mask"].shape or not logps.isfinite().all():
                raise ValueError(f"{tuple(logps.shape)}, or numbers that are not finite")
        return logps

    def request(self, url, path, body=None):
        """The server's answer. While it is starting, gone or busy, ask again for `patience`
        seconds, and print once that training waits."""
        start, is_waiting = time.time(), False
        while True:
            if self.child and self.child.poll() is not None:
                raise InputError(child_ended(self.child))
            try:
                timeout = max(1, self.patience)
                status, content = http_request(url, path, body, self.headers, timeout)
                why = one_line(content.decode(errors="replace"))
            except (InvalidURL, UnicodeError) as error:
                raise InputError(f"{url}: expected http://host:port ({error})") from None
            except (OSError, HTTPException) as error:
                status, why = 503, f"{type(error).__name__}: {one_line(error)}"
            if status == 200:
                break
            if status < 500:
                remedy = f": {self.remedy}" if status == 412 else ""
                raise InputError(f"the reference at {url} refused {path} ({status}, {why}){remedy}")
            if time.time() - start >= self.patience:
                waited = self.patience
                self.patience = 0  # training ends now: requests in the queue fail at once
                remedy = (
                    "is `python ref_server.py` running there, or busy? --ref_patience waits longer"
                )
                raise InputError(f"no answer from {url} in {waited:.0f} s ({why}): {remedy}")
            if not is_waiting:
                print(f"\nwaiting for the reference at {url}: {why}", flush=True)  # below a bar
            is_waiting = True
            time.sleep(0.5)
        if is_waiting:
            print(f"the reference at {url} answers again", flush=True)
        return content


def start_child(model_path, device, dtype, threads):
    """Start a server on a free port, with so many threads on a CPU. It ends when this process does:
    its standard input is a pipe that only this process holds open (see exit_with_parent). In a
    session of its own it does not get the terminal's Ctrl-C."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--port", "0"]
    command += ["--model_path", str(model_path), "--device", device, "--dtype", dtype]
    # idle threads must not spin on cores that the training uses
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    options = {"env": environment, "text": True, "start_new_session": True}
    return subprocess.Popen(command, **options, **pipes)


def child_ended(child):
    hint = "it says why above (-9: killed, mostly for memory; --ref_device, --ref_url)"
    return f"the reference server ended, code {child.wait()}: {hint}"


def child_port(child):
    """The port of a child, as soon as it listens."""
    line = child.stdout.readline()  # "reference: MODEL at http://HOST:PORT"
    if not line:
        raise InputError(child_ended(child))
    return urlsplit(line.split()[-1]).port


def stop_child(child):
    """End a child, which may have ended already."""
    child.stdin.close()
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# ------------------------------------------------------------------------- server

IDS, FLAGS = (torch.int64,), (torch.bool, torch.int64, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = {  # name: (types, shape, largest value, where 0 is the smallest)
    "input_ids": (IDS, "BP", "vocabulary"),
    "attention_mask": (FLAGS, "BP", 1),
    "mm_token_type_ids": (FLAGS, "BP", 1),
    "completions": (IDS, "RC", "vocabulary"),  # R = B*G
    "mask": (FLAGS, "RC", 1),
    "temperature": (FLOATS, "", 1e9),
    "pixel_values": (FLOATS, None, None),
    "image_grid_thw": (IDS, "B3", 2**15),  # Qwen-VL
    "image_sizes": (IDS, "B2", 2**15),  # LLaVA-NeXT and OneVision
}
REQUIRED = set(TENSORS) - {"image_grid_thw", "image_sizes"}


def check_request(tensors, model, processor):
    """InputError for a request that would take too much memory, give wrong numbers in silence (no
    pixels, for example), or end the process on a GPU (an id out of range)."""
    unknown, missing = tensors.keys() - TENSORS.keys(), REQUIRED - tensors.keys()
    require(not unknown and not missing, f"unknown tensors {unknown}, missing {missing}")
    vocabulary, sizes = model.get_input_embeddings().num_embeddings, {"2": 2, "3": 3}
    for name in (name for name in TENSORS if name in tensors):
        (types, shape, high), value = TENSORS[name], tensors[name]
        found = f"{name}: found {value.dtype} {tuple(value.shape)}"
        require(value.dtype in types and value.numel(), f"{found}, expected {types}")
        if shape is not None:
            is_same = [sizes.setdefault(key, n) == n for key, n in zip(shape, value.shape)]
            require(value.dim() == len(shape) and all(is_same), f"{found}, expected ({shape})")
            high = vocabulary - 1 if high == "vocabulary" else high
            is_inside = value.min() >= 0 and value.max() <= high
            require(is_inside, f"{name}: expected 0 to {high}, found {value.min()}, {value.max()}")
    batch, start, rows, length = (sizes[key] for key in "BPRC")
    require(rows % batch == 0, f"{rows} completions for {batch} prompts: expected a multiple")
    pairs = batch * start**2 + rows * length * (start + length)
    is_small = rows * (start + length) <= MAX_TOKENS and pairs <= MAX_PAIRS
    require(is_small, f"{rows} completions of {length} tokens behind {start}: {SMALLER}")
    require(tensors["temperature"] > 0, "temperature: expected more than 0")
    attention = tensors["attention_mask"].long()
    is_left = attention[:, -1].all() and (attention.diff() >= 0).all()
    require(is_left, "attention_mask: expected padding on the left, 0 and then 1")
    is_image = tensors["input_ids"] == model.config.image_token_id
    kinds = tensors["mm_token_type_ids"]
    require((kinds == is_image).all(), "mm_token_type_ids: expected 1 on image tokens, else 0")
    require(attention[is_image].all(), "attention_mask: 0 on an image token")
    vision = torch.tensor(sampler.vision_token_ids(model, processor))
    is_text = not torch.isin(tensors["completions"], vision).any()
    require(is_text, "completions: a vision token, expected text")
    found, expected = is_image.sum(1).tolist(), image_token_counts(tensors, model, processor)
    require(expected in (None, found), f"image tokens {found}, images of {expected}")


def image_token_counts(tensors, model, processor):
    """How many image tokens each prompt needs; None where the family does not say.

    NOTE: models compare the sum over the batch alone: two images with each other's number of tokens
    would be taken for one another in silence.
    """
    if "image_grid_thw" in tensors:
        merge = model.config.vision_config.spatial_merge_size
        return (tensors["image_grid_thw"].prod(-1) // merge**2).tolist()
    if "image_sizes" in tensors:
        sizes = tensors["image_sizes"].tolist()
        return processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    return None


class Handler(BaseHTTPRequestHandler):
    """One request on one connection (HTTP/1.0)."""

    default_request_version = "HTTP/1.0"  # or a garbled first line would get no status line
    server_version = "reference"
    timeout = 60  # seconds of silence

    def reply(self, code, body, kind="text/plain"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        """One line. http.server calls it too, for a broken first line or an unknown method."""
        code = {501: 405, 505: 400}.get(code, code)
        line = one_line(message or self.responses[code][0])
        self.reply(code, line.encode("ascii", "replace") + b"\n")
        print(f"{self.client_address[0]} got {code}: {line}", file=sys.stderr, flush=True)

    def log_request(self, code="-", size="-"):
        pass  # a line for every request would bury the ones that matter

    def is_allowed(self):
        token = reference_token()
        given = self.headers.get("Authorization", "").encode("latin-1")
        return not token or hmac.compare_digest(given, f"Bearer {token}".encode())

    def do_GET(self):
        if not self.is_allowed():
            self.send_error(401, TOKEN_HINT)
        elif self.path == "/health":
            self.reply(200, json.dumps(self.server.identity).encode(), "application/json")
        else:
            self.send_error(404, "expected GET /health or POST /logps")

    def do_POST(self):
        length, identity = self.headers.get("Content-Length", ""), self.server.identity
        wanted, own = self.headers.get("If-Match"), f'"{identity["fingerprint"]}"'
        if not self.is_allowed():
            self.send_error(401, TOKEN_HINT)
        elif self.path != "/logps":
            self.send_error(404, "expected GET /health or POST /logps")
        elif wanted not in (None, "*", own):
            self.send_error(412, f"expected model {wanted}, this is {own} ({identity['model']})")
        elif not (length.isascii() and length.isdigit() and len(length) < 16):
            self.send_error(411, "expected a Content-Length, in bytes")
        elif int(length) > self.server.max_bytes:
            self.send_error(413, f"{length} bytes are more than --max_mb: {SMALLER}")
        else:
            self.answer_logps(int(length))

    def answer_logps(self, length):
        """NOTE: whatever a request makes torch raise must become an answer. A client without one
        would ask again and again."""
        body = self.rfile.read(length)  # outside: after a stall the client should ask again
        try:
            with error_border("the model cannot score this", f"see ref_server.py; {SMALLER}"):
                require(len(body) == length, f"{len(body)} bytes, Content-Length says {length}")
                content = self.server.score(load(body))
        except torch.OutOfMemoryError as error:
            self.send_error(400, f"{one_line(error)}: {SMALLER}")
        except InputError as error:
            self.send_error(400, error)
        else:
            self.reply(200, content, "application/octet-stream")


class Server(ThreadingHTTPServer):
    """A thread for each request. The model scores one at a time."""

    daemon_threads = False  # server_close waits for the answers that are under way
    request_queue_size = 128  # with 5, the default, clients that come at once wait for a second

    def __init__(self, args, model, processor, identity):
        self.model, self.processor, self.identity = model, processor, identity
        self.max_bytes, self.one_at_a_time = args.max_mb * 2**20, threading.Lock()
        if ":" in args.host:
            self.address_family = socket.AF_INET6
        super().__init__((args.host, args.port), Handler)

    def score(self, tensors):
        """A request's tensors -> log-probs as safetensors."""
        check_request(tensors, self.model, self.processor)
        completions, mask = tensors.pop("completions"), tensors.pop("mask")
        temperature = tensors.pop("temperature").item()
        with self.one_at_a_time, torch.no_grad():
            logps = sampler.completion_logps(self.model, tensors, completions, mask, temperature)
        require(logps.isfinite().all(), "log-probs are nan or infinite: temperature or pixels?")
        return save({"logps": logps.cpu()})

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def exit_with_parent():
    """End this process when its standard input is closed."""
    os.read(0, 1)
    os._exit(0)


def main(args):
    # 1. A child ignores signals: schedulers send SIGTERM to all processes of a job, but training
    # finishes its update first and needs its reference for that.
    endings = () if args.child else (signal.SIGTERM, signal.SIGINT)
    if args.child:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=exit_with_parent, daemon=True).start()

    # 2. The model.
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, processor = sampler.load_policy(args.model_path, args.device, dtype)
    model.requires_grad_(False)
    identity = model_identity(model, processor, args.model_path)

    # 3. The server. A signal lets it finish the answers that are under way.
    remedy = "choose another --host or --port"
    with error_border(f"cannot listen on {args.host}:{args.port}", remedy):
        server = Server(args, model, processor, identity)
    for number in endings:
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    host, port = server.server_address[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"reference: {args.model_path} at http://{shown}:{port}", flush=True)
    if not host.startswith("127.") and host != "::1" and not reference_token():
        print("NOTE: others can reach it, and REF_TOKEN is not set", file=sys.stderr)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    sampler.run_script(main, get_args)
