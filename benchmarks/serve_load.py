"""How the server holds up under many clients at once: requests held, seconds, tokens a second, and whether every answer
is the one that the same request gets when it is sent alone. Beside it `transformers serve` on the same model.

Half of the requests are greedy, half drawn with a seed of their own (transformers' server gets greedy ones only); every
third is streamed. All go through OpenAI's own client. The clients run on the same machine as the server, so figures of
different machines, or of a busy one (`load_average`), cannot be compared.

    python -m benchmarks.serve_load --model ../shared/data/models/stories3M --requests 96 --clients 1 8 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, merge, version_of, with_surroundings

FILE = RESULTS / "serve.json"
BEGINNINGS = (
    "Once upon a time",
    "Tom and Sue",
    "One day, a cat",
    "The big dog",
    "Lily was sad",
    "In the park",
    "Ben had a ball",
)
LAST_TOKENS = 48
SECONDS_TO_START = 180


@dataclass(frozen=True)
class Ask:
    """One request of the load."""

    number: int
    is_greedy: bool

    @property
    def is_streamed(self) -> bool:
        return self.number % 3 == 0

    def body(self, model: str) -> dict[str, Any]:
        drawn = {"temperature": 0} if self.is_greedy else {"temperature": 1.0, "seed": self.number}
        text = f"{BEGINNINGS[self.number % len(BEGINNINGS)]} {self.number}"
        return {"model": model, "prompt": text, "max_tokens": 8 + self.number * 7 % LAST_TOKENS, **drawn}


@dataclass(frozen=True)
class Got:
    """What became of it."""

    text: str | None
    num_tokens: int
    seconds: float
    first_seconds: float | None
    error: str = ""


async def send(client: Any, ask: Ask, model: str) -> Got:
    begun, first = time.perf_counter(), None
    try:
        if ask.is_streamed:
            text, num_tokens = "", 0
            events = await client.completions.create(
                **ask.body(model), stream=True, stream_options={"include_usage": True}
            )
            async for event in events:
                first = first or time.perf_counter() - begun
                text += "".join(choice.text or "" for choice in event.choices)
                num_tokens = event.usage.completion_tokens if event.usage else num_tokens
        else:
            said = await client.completions.create(**ask.body(model))
            text, num_tokens = said.choices[0].text, said.usage.completion_tokens
    except Exception as error:
        return Got(None, 0, time.perf_counter() - begun, None, f"{type(error).__name__}: {str(error)[:200]}")
    return Got(text, num_tokens, time.perf_counter() - begun, first)


async def send_all(url: str, asks: Sequence[Ask], *, num_clients: int, model: str) -> tuple[list[Got], float]:
    """The answers in the order of `asks`; each client sends one request after the other."""
    import openai

    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)
    found: dict[int, Got] = {}
    waiting = list(reversed(asks))

    async def work() -> None:
        while waiting:
            ask = waiting.pop()
            found[ask.number] = await send(client, ask, model)

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(num_clients)))
    seconds = time.perf_counter() - begun
    await client.close()
    return [found[ask.number] for ask in asks], seconds


def figures(got: Sequence[Got], alone: Sequence[Got], seconds: float) -> dict[str, Any]:
    """Counts and quantiles of one load."""
    times = sorted(one.seconds for one in got)
    firsts = sorted(one.first_seconds for one in got if one.first_seconds is not None)
    return {
        "num_answers": sum(one.text is not None for one in got),
        "num_lost": sum(one.text is None for one in got),
        "num_wrong": sum(
            one.text is not None and one.text != other.text for one, other in zip(got, alone, strict=True)
        ),
        "errors": sorted({one.error for one in got if one.error}),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(got) / seconds, 2),
        "tokens_per_s": round(sum(one.num_tokens for one in got) / seconds, 1),
        "p50_seconds": round(quantile(times, 0.5), 4),
        "p95_seconds": round(quantile(times, 0.95), 4),
        "first_piece_p50_seconds": round(quantile(firsts, 0.5), 4) if firsts else None,
        "first_piece_p95_seconds": round(quantile(firsts, 0.95), 4) if firsts else None,
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def running(command: Sequence[str], url: str, *, log: Path) -> Iterator[float]:
    """A server in a process of its own; the seconds until it answered."""
    begun = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(list(command), stdout=out, stderr=out, env=environment)
        try:
            while not is_up(url):
                if process.poll() is not None or time.perf_counter() - begun > SECONDS_TO_START:
                    raise RuntimeError(f"{command[0]} did not start: {log.read_text(encoding='utf-8')[-1500:]}")
                time.sleep(0.2)
            yield time.perf_counter() - begun
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(who: str, command: Sequence[str], url: str, arguments: argparse.Namespace, model: str) -> list[Record]:
    """Every load on one server, each compared with the answers that come one at a time."""
    asks = [Ask(number, is_greedy=who != "zhibei" or number % 2 == 0) for number in range(arguments.requests)]
    package = "zhibei" if who == "zhibei" else "transformers"
    common = {"benchmark": "serve", "who": who, "version": version_of(package), "method": Path(arguments.model).name}
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        try:
            with running(command, url, log=log) as start_seconds:
                asyncio.run(send_all(url, asks[:4], num_clients=1, model=model))
                alone, _ = asyncio.run(send_all(url, asks, num_clients=1, model=model))
                for num_clients in arguments.clients:
                    got, seconds = asyncio.run(send_all(url, asks, num_clients=num_clients, model=model))
                    settings = {"clients": num_clients, "requests": len(asks), "slots": arguments.slots}
                    found = figures(got, alone, seconds)
                    records.append({**common, "settings": settings, "start_seconds": round(start_seconds, 1), **found})
                    print(who, num_clients, json.dumps(found), flush=True)
        except Exception as error:
            records.append({**common, "settings": {"requests": len(asks)}, "error": str(error)[-600:]})
            print(who, error, file=sys.stderr)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--without-peer", action="store_true")
    arguments = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    ours = [sys.executable, "-m", "zhibei", "serve", f"model={arguments.model}", "--template", "alpaca"]
    ours += ["--port", str(port), "--slots", str(arguments.slots), "--max-waiting", "256", "--device", "cpu"]
    records = measure("zhibei", ours, url, arguments, "model")
    if not arguments.without_peer:
        theirs = [str(Path(sys.executable).parent / "transformers"), "serve", arguments.model, "--port", str(port)]
        theirs += ["--continuous-batching", "--device", "cpu"]
        records += measure("transformers serve", theirs, url, arguments, arguments.model)
    load = [round(value, 1) for value in os.getloadavg()]
    command = "python -m benchmarks.serve_load " + " ".join(sys.argv[1:])
    merge(FILE, [with_surroundings({**record, "load_average": load}, command) for record in records])


if __name__ == "__main__":
    main()
