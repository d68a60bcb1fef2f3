"""The reference model as a small HTTP server: log-probs of completions under the frozen policy.

GRPO keeps the policy close to where it started by a penalty on log p_ref - log p. The reference
never changes, so it need not live in the training process: one server can serve many ranks, on
another GPU or another machine.

    POST /logps    safetensors in: input_ids, attention_mask (B, P) and the image of each of B
                   prompts, as its processor gives it; completions, mask (B*G, C); temperature ().
                   Out: logps (B*G, C)
    GET  /health   JSON: model, fingerprint (of vocabulary and weights), vocab_size, dtype

Only the standard library's http.server and safetensors: nothing that arrives is ever unpickled or
run, a bad request gets a 4xx and one line that says what was expected, and the server lives on. It
listens on 127.0.0.1 unless told otherwise. If REF_TOKEN is set in the environment, clients need
the same; set it wherever others can reach the port.

A server may be stopped and started again while training goes on: the client waits and says so. It
sends the policy's fingerprint with every request (If-Match), so another model is noticed (412).

    python ref_server.py --model_path runs/sft
    python grpo.py --ref_url http://127.0.0.1:59875

`python grpo.py` alone starts one of its own, as a child, and stops it in the end.
"""

import argparse
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
from contextlib import closing
from http.client import HTTPConnection, HTTPException, IncompleteRead, InvalidURL
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import torch

import sampler
from sampler import InputError

MOST_TOKENS = 2**18  # of one request, with a prompt for every completion, as attention has it
MOST_PAIRS = 2**27  # of tokens that attention compares
MOST_HEADER = 2**16  # bytes of names and shapes in front of the tensors
QUIET = 10  # seconds of silence after which a client says that it waits
ENDING = signal.SIGTERM, signal.SIGINT
SMALLER = "send fewer prompts at once (--batch_size)"
NO_TOKEN = "expected 'Authorization: Bearer ...' with this server's token: set REF_TOKEN to it"

IDS, FLAGS = (torch.int64,), (torch.bool, torch.int64, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REQUEST = {  # what a request holds, and of which types it may be
    "input_ids": IDS,  # (B, P)
    "attention_mask": FLAGS,  # (B, P)
    "mm_token_type_ids": FLAGS,  # (B, P)
    "completions": IDS,  # (B*G, C)
    "mask": FLAGS,  # (B*G, C)
    "temperature": FLOATS,  # ()
}
IMAGES = {  # and the images, as the model's family has them: sampler.image_inputs
    "pixel_values": FLOATS,  # see check_patches, check_tiles, check_rows_of_tiles
    "image_grid_thw": IDS,  # (B, 3)
    "image_sizes": IDS,  # (B, 2), height and width
}


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


def describe(model, processor, path):
    """What /health says, and what a client expects it to say of its own model."""
    return {
        "model": str(path),
        "fingerprint": sampler.fingerprint(model, processor),
        "vocab_size": model.get_input_embeddings().num_embeddings,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def check(condition, line):
    if not condition:
        raise InputError(line)


def unpack(body):
    """{name: tensor} from bytes in safetensors format; InputError if they are not."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    header = int.from_bytes(body[:8], "little")
    found = f"expected safetensors format, with a header of {MOST_HEADER} bytes at most; found"
    check(header <= MOST_HEADER, f"{found} one of {header}")
    try:
        return load(body)
    except (SafetensorError, KeyError, RuntimeError) as error:  # an unknown dtype, a mad shape
        raise InputError(f"expected safetensors format; found {error}") from None


# ------------------------------------------------------------------------- client


ENDED = "it says why above (-9: killed, mostly for memory; --ref_device, --ref_url)"
FAULTS = (  # of a connection, as a user would put it; the first that fits
    (ConnectionRefusedError, "it refused the connection"),
    (ConnectionError, "it closed the connection"),
    (TimeoutError, "it fell silent"),
    (IncompleteRead, "it answered half"),
    (HTTPException, "it did not answer in HTTP"),
)


def exchange(url, method, path, body, headers, timeout, most):
    """One request: the answer's status and its content, which is of at most `most` bytes.

    Raises what FAULTS holds, or another OSError. timeout: seconds of silence.
    """
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=timeout)) as connection:
        try:
            connection.request(method, path, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it answered before it had read all: the answer says why
        answer = connection.getresponse()
        if answer.length is None:  # a reference always says how much follows: its head broke off
            raise IncompleteRead(b"")
        found = f"{url} answers with {answer.length} bytes, a reference with {most} at most"
        check(answer.length <= most, f"{found}: is `python ref_server.py` running there?")
        return answer.status, answer.read()


class Reference:
    """Client of one or more servers, which take turns. Safe to use from a thread."""

    def __init__(self, urls, expected, turn=0, patience=300, child=None):
        """Wait until every server answers. expected: `describe` of the client's own model. turn:
        which server comes first (the rank). patience: seconds, also for every later request.
        child: the server's process, if it is one's own: there is no waiting for one that ended."""
        self.urls, self.turn, self.patience, self.child = urls, turn, patience, child
        self.expected, self.quiet, self.waiting = expected, QUIET, set()  # waiting: for which URLs
        self.headers = {"If-Match": f'"{expected["fingerprint"]}"'}
        if token := os.environ.get("REF_TOKEN"):
            self.headers["Authorization"] = f"Bearer {token}".encode()
        model, dtype = expected["model"], expected["dtype"]
        self.mend = f"start `python ref_server.py --model_path {model} --dtype {dtype}` there"
        self.models = [self.find_model(url) for url in urls]

    def find_model(self, url):
        """The name of the model at `url`; InputError if it is not the policy's."""
        content = self.ask(url, "GET", "/health")
        try:
            found = {key: json.loads(content)[key] for key in self.expected}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"what answers at {url} is no reference server: {self.mend}") from None
        for key in ("vocab_size", "dtype", "fingerprint"):
            if found[key] != self.expected[key]:
                raise InputError(
                    f"the reference at {url} ({found['model']}) has {key} {found[key]}, the "
                    f"policy {self.expected[key]}: {self.mend}"
                )
        return found["model"]

    def logps(self, prompt, completions, mask, temperature):
        """log p_ref(completions), float32 (B*G, C): see sampler.completion_logps."""
        from safetensors.torch import save

        tensors = {key: value.cpu().contiguous() for key, value in prompt.items()}
        tensors |= {"completions": completions.cpu(), "mask": mask.cpu()}
        tensors["temperature"] = torch.tensor(float(temperature))
        url, self.turn = self.urls[self.turn % len(self.urls)], self.turn + 1
        most = 4 * completions.numel() + MOST_HEADER
        content = self.ask(url, "POST", "/logps", save(tensors), most)
        try:
            logps = unpack(content)["logps"]
        except (InputError, KeyError) as error:
            raise InputError(f"{url} did not answer with logps ({error}): {self.mend}") from None
        sound = logps.shape == completions.shape and logps.dtype == torch.float32
        if not sound or not logps.isfinite().all():
            found = f"{logps.dtype} {tuple(logps.shape)}" if not sound else "nan or infinity"
            raise InputError(
                f"the reference at {url} gave {found}, expected finite float32 "
                f"{tuple(completions.shape)}: {self.mend}"
            )
        return logps

    def tell(self, url, why):
        """That training waits: once, however long and for however many requests."""
        if url not in self.waiting:
            self.waiting.add(url)
            print(f"\nwaiting for the reference at {url}: {why}", flush=True)  # below a bar

    def attempt(self, url, method, path, body, most):
        """One request: (content, None), or (None, why) where another one may succeed."""
        try:
            patience = max(1, self.patience)
            status, content = exchange(url, method, path, body, self.headers, patience, most)
        except (InvalidURL, UnicodeError) as error:
            raise InputError(f"{url}: expected http://host:port ({error})") from None
        except (OSError, HTTPException) as error:
            why = next((words for kind, words in FAULTS if isinstance(error, kind)), str(error))
            self.tell(url, why)
            return None, why
        if status == 200:
            return content, None
        why = content.decode(errors="replace").strip()[:300].partition("\n")[0]
        if status >= 500 or status == 408:  # busy, a proxy's server is away, a network that stalled
            return None, why
        mend = f"; {self.mend}" if status == 412 else ""
        raise InputError(f"the reference at {url} refused {path} with {status}: {why}{mend}")

    def ask(self, url, method, path, body=None, most=MOST_HEADER):
        """What a server answers. One that is starting, gone or busy is asked again, until
        `patience` seconds have passed since it failed; a silent one is waited for that long."""
        failed, pause, why = None, 0.1, f"no answer for {self.quiet:.0f} s"
        late = threading.Timer(self.quiet, lambda: self.tell(url, why))
        late.start()
        try:
            while True:
                if self.child and self.child.poll() is not None:
                    code = self.child.returncode
                    raise InputError(f"the reference server ended, code {code}: {ENDED}")
                began = time.time()
                content, why = self.attempt(url, method, path, body, most)
                if content is not None:
                    break
                failed = failed or time.time()
                if time.time() - min(failed, began) >= self.patience:
                    waited, self.patience = self.patience, 0  # what is still queued fails at once
                    raise InputError(
                        f"no reference at {url} in {waited:.0f} s ({why}): is `python "
                        "ref_server.py` running there? --ref_patience waits longer"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 5)
        finally:
            late.cancel()
        self.quiet = max(self.quiet, 2 * (time.time() - began))  # slow is not silent
        if url in self.waiting:
            self.waiting.remove(url)
            print(f"the reference at {url} answers again", flush=True)
        return content


def start_child(model_path, device, dtype, threads):
    """Start a server of one's own on a free port, with so many threads on a CPU. It ends when this
    process does: its standard input is a pipe that nobody but this process holds open. Signals do
    not end it (see main); in a session of its own it does not see the terminal's."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--port", "0"]
    command += ["--model_path", str(model_path), "--device", device, "--dtype", dtype]
    # idle threads must not spin on cores that the training uses meanwhile
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    options = {"env": environment, "text": True, "start_new_session": True}
    return subprocess.Popen(command, **options, **pipes)


def child_port(child):
    """The port of a child that was started, as soon as it listens."""
    line = child.stdout.readline()  # "reference: MODEL at http://HOST:PORT"
    if not line:
        raise InputError(f"the reference server ended, code {child.wait()}: {ENDED}")
    return urlsplit(line.split()[-1]).port


def stop_child(child):
    """End a child that was started. It may have ended already."""
    child.stdin.close()
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# ------------------------------------------------------------------------- server


def check_request(tensors, model, processor):
    """InputError, saying what was expected, for a request that the model cannot score.

    NOTE: an id out of range must not reach a GPU: it ends the whole process, not the request.
    """
    config = model.config
    expected = REQUEST | {name: IMAGES[name] for name in sampler.image_inputs(config)}
    unknown, missing = tensors.keys() - expected.keys(), expected.keys() - tensors.keys()
    check(not unknown, f"unknown tensors {sorted(unknown)}, expected {', '.join(expected)}")
    check(not missing, f"missing tensors {sorted(missing)}")
    for name, types in expected.items():
        found = tensors[name].dtype
        check(found in types, f"{name}: expected {' or '.join(map(str, types))}, found {found}")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "completions", "mask"):
        value = tensors[name]
        found = f"found {tuple(value.shape)}"
        check(value.dim() == 2 and value.numel(), f"{name}: expected two dimensions, {found}")
    ids, completions = tensors["input_ids"], tensors["completions"]
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
    found = f"{rows} completions of {length} tokens behind {start}"
    check(small, f"{found}: too many for one request, {SMALLER}")
    size = model.get_input_embeddings().num_embeddings
    for name in ("input_ids", "completions"):
        least, most = tensors[name].min(), tensors[name].max()
        found = f"found {least} to {most}"
        check(0 <= least and most < size, f"{name}: expected ids from 0 to {size - 1}, {found}")
    attention = tensors["attention_mask"].long()
    left = attention[:, -1].all() and (attention.diff() >= 0).all()
    check(left, "attention_mask: expected padding on the left, 0 and then 1")
    is_image, types = ids == config.image_token_id, tensors["mm_token_type_ids"]
    check((types == is_image).all(), "mm_token_type_ids: expected 1 on image tokens, 0 elsewhere")
    check(not (is_image & (attention == 0)).any(), "attention_mask: 0 on an image token")
    for token in sampler.vision_tokens(model, processor):
        check(not (completions == token).any(), f"completions: vision token {token}, expected text")
    video = getattr(config, "video_token_id", None)
    check(video is None or not (ids == video).any(), "input_ids: a video token, expected images")
    check_images(tensors, is_image, config, processor)
    temperature = tensors["temperature"]
    check(temperature.dim() == 0, "temperature: expected one number, of no dimension")
    sound = math.isfinite(temperature) and temperature > 0
    check(sound, f"temperature: expected more than 0, found {temperature}")


def check_images(tensors, is_image, config, processor):
    """Every prompt's image tokens (is_image, bool (B, P)) are one run, of as many as its image has.

    NOTE: models compare the sum over the batch alone: two images with each other's number of tokens
    would be taken for one another without a word
    """
    pixels, batch = tensors["pixel_values"], len(is_image)
    if "image_grid_thw" in tensors:
        sizes = check_patches(pixels, tensors["image_grid_thw"], batch, config)
    elif "image_sizes" in tensors:
        sizes = check_rows_of_tiles(pixels, tensors["image_sizes"], batch, config, processor)
    else:
        sizes = check_tiles(pixels, is_image.sum(1), config)
    check(pixels.isfinite().all(), "pixel_values: expected numbers, found nan or infinity")
    runs = [len(list(r)) for row in is_image.tolist() for key, r in groupby(row) if key]
    found = f"runs of image tokens {runs[:9]}, expected {sizes[:9]} as the images are"
    check(runs == sizes, f"input_ids: {found}")


def check_patches(pixels, grid, batch, config):
    """Qwen-VL: patches of all images (patches, numbers of one) as grids (B, 3) say -> image tokens
    of each prompt."""
    check(grid.shape == (batch, 3), f"image_grid_thw: expected ({batch}, 3), an image a prompt")
    check((grid > 0).all() and (grid < 2**15).all(), "image_grid_thw: sides from 1 to 32767")
    vision = config.vision_config
    merge = vision.spatial_merge_size
    check((grid[:, 1:] % merge == 0).all(), f"image_grid_thw: expected multiples of {merge}")
    patch = math.prod((vision.temporal_patch_size, vision.patch_size, vision.patch_size))
    expected = (int(grid.prod(-1).sum()), getattr(vision, "in_channels", 3) * patch)
    found = f"found {tuple(pixels.shape)}"
    check(pixels.shape == expected, f"pixel_values: expected {expected}, as grids say, {found}")
    return (grid.prod(-1) // merge**2).tolist()


def check_tiles(pixels, tokens, config):
    """InternVL and LLaVA-1.5: tiles of all images (tiles, 3, side, side), of LLaVA-1.5 one each;
    prompts' numbers of image tokens, (B,) -> what they should be."""
    tile = shape_of_tile(config)
    found = f"found {tuple(pixels.shape)}"
    check(pixels.shape[1:] == tile, f"pixel_values: expected (tiles, {tile}), {found}")
    patch = config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    each = int((tile[1] // patch) ** 2 * getattr(config, "downsample_ratio", 1) ** 2)
    # InternVL has no count of tiles: what the tokens say must come to what there is
    counts = torch.ones_like(tokens) if config.model_type == "llava" else tokens // each
    check(counts.sum() == len(pixels), f"pixel_values: expected {counts.sum()} tiles, {found}")
    return (counts * each).tolist()


def check_rows_of_tiles(pixels, sizes, batch, config, processor):
    """LLaVA-NeXT and OneVision: a row of tiles for each image, (B, tiles, 3, side, side), padded to
    the longest or beyond; heights and widths (B, 2) -> image tokens of each prompt."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    check(sizes.shape == (batch, 2), f"image_sizes: expected ({batch}, 2), an image a prompt")
    check((sizes > 0).all() and (sizes < 2**15).all(), "image_sizes: sides from 1 to 32767")
    tile, grids = shape_of_tile(config), config.image_grid_pinpoints
    least = max(image_size_to_num_patches(size, grids, tile[1]) for size in sizes.tolist())
    sound = pixels.dim() == 5 and len(pixels) == batch and pixels.shape[2:] == tile
    found = f"found {tuple(pixels.shape)}"
    expected = f"({batch}, {least} tiles or more, {tile})"
    check(sound and pixels.shape[1] >= least, f"pixel_values: expected {expected}, {found}")
    # the processor's own count, which transformers keeps for programs that plan with it, as vLLM
    return processor._get_num_multimodal_tokens(image_sizes=sizes.tolist())["num_image_tokens"]


def shape_of_tile(config):
    """(3, height, width) of what the vision encoder takes."""
    side = config.vision_config.image_size
    return (3, side, side) if isinstance(side, int) else (3, *side)


class Handler(BaseHTTPRequestHandler):
    """One request. A connection carries one (HTTP/1.0), so that a client holds no slot for long."""

    default_request_version = "HTTP/1.0"  # or a garbled first line would get no status line
    server_version = "reference"

    def setup(self):
        """What has not arrived in time is cut off, however it trickles in."""
        seconds = self.server.timeout_s
        self.timeout = 2 * seconds  # of a single wait: for clients that do not take their answer
        super().setup()
        self.is_late = False
        self.late = threading.Timer(seconds, self.stop_reading)
        self.late.daemon = True
        self.late.start()

    def stop_reading(self):
        self.is_late = True  # before it: a read that is waiting goes on at once
        self.request.shutdown(socket.SHUT_RD)

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
        self.reply(code, (line.encode("ascii", "replace") + b"\n"))
        print(f"{self.client_address[0]} got {code}: {line!r}", file=sys.stderr, flush=True)

    def log_request(self, code="-", size="-"):
        pass  # one line per request would bury the ones that matter

    def is_allowed(self):
        token = os.environ.get("REF_TOKEN")
        given = self.headers.get("Authorization", "")
        return not token or hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode())

    def do_GET(self):
        if not self.is_allowed():
            self.send_error(401, NO_TOKEN)
        elif self.path == "/health":
            self.reply(200, json.dumps(self.server.health).encode(), "application/json")
        elif self.path == "/logps":
            self.send_error(405, "expected POST /logps")
        else:
            self.send_error(404, "expected GET /health or POST /logps")

    def do_POST(self):
        length, most = self.headers.get("Content-Length", ""), self.server.max_bytes
        wanted, health = self.headers.get("If-Match"), self.server.health
        mine = f'"{health["fingerprint"]}"'
        if not self.is_allowed():
            self.send_error(401, NO_TOKEN)
        elif self.path != "/logps":
            self.send_error(405 if self.path == "/health" else 404, "expected POST /logps")
        elif wanted not in (None, "*", mine):
            self.send_error(412, f"expected the model {wanted}, this is {mine} ({health['model']})")
        elif not re.fullmatch("[0-9]{1,15}", length):
            self.send_error(411, "expected a Content-Length, in bytes")
        elif int(length) > most:
            self.send_error(413, f"{length} bytes, expected {most} at most (--max_mb): {SMALLER}")
        else:
            self.answer_logps(int(length))

    def answer_logps(self, length):
        """NOTE: whatever the request makes torch raise must end in an answer: a client that gets
        none takes the server for one that is starting, and asks again."""
        from safetensors.torch import save

        server, body = self.server, self.rfile.read(length)
        if self.is_late:
            seconds = f"{server.timeout_s:.0f} s (--timeout)"
            return self.send_error(408, f"{length} bytes, expected to arrive in {seconds}")
        self.late.cancel()
        try:
            check(len(body) == length, f"{len(body)} bytes, Content-Length says {length}")
            tensors = unpack(body)
            check_request(tensors, server.model, server.processor)
            answers = tensors.pop("completions"), tensors.pop("mask")
            temperature = tensors.pop("temperature").item()
            with server.one_at_a_time, torch.no_grad():
                logps = sampler.completion_logps(server.model, tensors, *answers, temperature)
            why = "the temperature is too small, or pixel values are too large"
            check(logps.isfinite().all(), f"log-probs are nan or infinite: {why}")
        except InputError as error:
            self.send_error(400, error)
        except torch.OutOfMemoryError:
            self.send_error(413, f"not enough memory: {SMALLER}")
        except (RuntimeError, ValueError, IndexError) as error:
            self.send_error(400, f"the model cannot score this: {error}")
        else:
            self.reply(200, save({"logps": logps.cpu()}), "application/octet-stream")


class Server(ThreadingHTTPServer):
    """A thread per request, at most `max_requests` of them; the model scores one at a time."""

    daemon_threads = False  # server_close waits for the answers that are under way
    request_queue_size = 128  # of 5, the default, the sixth that asks at once waits for a second

    def __init__(self, args, model, processor, health):
        self.model, self.processor, self.health = model, processor, health
        self.timeout_s = args.timeout
        self.max_bytes, self.one_at_a_time = args.max_mb * 2**20, threading.Lock()
        self.slots = threading.BoundedSemaphore(args.max_requests)
        super().__init__((args.host, args.port), Handler)

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            return super().process_request(request, client_address)
        line = b"busy with as many requests as it takes (--max_requests): ask again\n"
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
    # 1. What ends it: SIGTERM or Ctrl-C; if it is a child, only the end of its standard input.
    # NOTE: schedulers send SIGTERM to all processes of a job, but training finishes its update
    # first and needs its reference for that
    if args.child:
        for name in ENDING:
            signal.signal(name, signal.SIG_IGN)
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()

    # 2. The model.
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, processor = sampler.load_policy(args.model_path, args.device, dtype)
    model.requires_grad_(False)
    health = describe(model, processor, args.model_path)

    # 3. The server. From here on it finishes what it has begun to answer.
    try:
        server = Server(args, model, processor, health)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {args.host}:{args.port} ({error}): choose another --port"
        ) from None
    stop = lambda *_: threading.Thread(target=server.shutdown).start()
    for name in ENDING if not args.child else ():
        signal.signal(name, stop)
    host, port = server.server_address[:2]
    print(f"reference: {args.model_path} at http://{host}:{port}", flush=True)
    if not host.startswith("127.") and not os.environ.get("REF_TOKEN"):
        print("NOTE: others can reach it, and REF_TOKEN is not set", file=sys.stderr)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    sampler.run_script(main, get_args)
