"""A server with threads: the model is attached once, and each request chooses its recipe.

    python docs/examples/serve_with_threads.py

What belongs to a request is in its cache, so requests run side by side, each with a cache of its own. The program
serves HTTP on a free port of this machine, sends itself four requests at the same time, one of them with a recipe
that the server does not have, prints the answers in order with the bytes of each cache, and ends.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy

directory = Path(kvpolicy.__file__).parent / "model"
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
recipes = {name: kvpolicy.load_recipe(name) for name in ("full", "balanced", "h2o")}  # read and checked once

handle = kvpolicy.attach(model)  # once; a server never needs to detach


def answer(prompt: str, recipe: str) -> dict[str, object]:
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = kvpolicy.make_cache(recipes[recipe], model)
    output = model.generate(**inputs, cache=cache, max_new_tokens=12, do_sample=False)
    return {"text": tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), "bytes": cache.memory().bytes}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["recipe"] in recipes:
            status, found = 200, answer(asked["prompt"], asked["recipe"])
        else:
            status, found = 400, {"error": f"recipe must be one of {', '.join(recipes)}, found {asked['recipe']}"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, *args: object) -> None:
        """Not a line for each request."""


def ask(prompt: str, recipe: str) -> dict[str, object]:
    body = json.dumps({"prompt": prompt, "recipe": recipe}).encode()
    try:
        with urlopen(Request(f"http://127.0.0.1:{server.server_port}", body)) as reply:
            return json.load(reply)
    except HTTPError as error:
        return json.load(error)


lines = "".join(f"<k{i}> <v{i}>\n" for i in range(60))
requests = [(f"Keys and values:\n{lines}? <k7> <k{i}> <k50> <k1>\n", name) for i, name in enumerate(recipes)]
requests.append((requests[0][0], "smallest"))

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
Thread(target=server.serve_forever, daemon=True).start()
with ThreadPoolExecutor(max_workers=4) as pool:
    replies = [pool.submit(ask, prompt, recipe) for prompt, recipe in requests]
    for (_, recipe), reply in zip(requests, replies, strict=True):
        print(f"{recipe}: {reply.result()}")
server.shutdown()
server.server_close()
handle.detach()
