"""Tokenisation in parallel processes: batches of texts in, arrays of ids out, in order.

The workers are plain subprocesses spoken to through pipes, one batch at a time. Unlike a forked pool they share no
lock or thread with the parent, they do not import the user's main script again, and they end by themselves when the
parent dies, because their input ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt

import ddlm
from ddlm.data.shards import id_dtype
from ddlm.data.sources import document_hash
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a batch of documents, packed one after another, each closed by the end token.

    Attributes:
        ids: Packed ids, uint16 or uint32.
        lengths: Tokens of each document, its end token included, int64.
        hashes: 8-byte hash of each document's text, uint64.
        nbytes: UTF-8 bytes of the texts together.
    """

    ids: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    nbytes: int


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encode documents and pack them, each followed by the end token."""
    dtype = id_dtype(tokenizer.vocab_size)
    ids = tokenizer.encode_batch(texts)
    for document in ids:
        document.append(tokenizer.end_id)
    return Encoded(
        ids=np.concatenate([np.asarray(d, dtype) for d in ids]) if ids else np.empty(0, dtype),
        lengths=np.asarray([len(d) for d in ids], np.int64),
        hashes=np.asarray([document_hash(t) for t in texts], np.uint64),
        nbytes=sum(len(t.encode()) for t in texts),
    )


class Encoder:
    """Encodes batches in ``processes`` worker processes, or in this one when ``processes`` is 1.

    Use it as a context manager; leaving it ends the workers.
    """

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self._tokenizer = tokenizer
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._local = threading.local()
        self._processes = processes
        self._threads = ThreadPoolExecutor(processes) if processes > 1 else None

    def map(self, batches: Iterable[tuple[list[str], Tag]]) -> Iterator[tuple[Encoded, Tag]]:
        """Encode ``(texts, tag)`` batches, in order; a bounded number of them is in flight."""
        if self._threads is None:
            for texts, tag in batches:
                yield encode_documents(self._tokenizer, texts), tag
            return
        waiting: deque[tuple[Future[Encoded], Tag]] = deque()
        for texts, tag in batches:
            waiting.append((self._threads.submit(self._encode_in_worker, texts), tag))
            if len(waiting) > 2 * self._processes:
                future, first = waiting.popleft()
                yield future.result(), first
        while waiting:
            future, first = waiting.popleft()
            yield future.result(), first

    def _encode_in_worker(self, texts: list[str]) -> Encoded:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker(self._tokenizer)
            with self._lock:
                self._workers.append(worker)
        return worker.encode(texts)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=kind is None, cancel_futures=True)
        with self._lock:
            for worker in self._workers:
                worker.close()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        root = str(Path(ddlm.__file__).parents[1])  # as found by this process, however it was
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import work; work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        _send(self._stdin, tokenizer.to_bytes())

    def encode(self, texts: list[str]) -> Encoded:
        try:
            _send(self._stdin, texts)
            answer = _receive(self._stdout)
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise ConfigError(
                f"a tokenising process {how}: run again to go on, with fewer --processes if memory is short"
            ) from error
        assert isinstance(answer, Encoded)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what a killed one was still to be sent
            self._stdin.close()
        self._stdout.close()


def _send(stream: IO[bytes], message: object) -> None:
    data = pickle.dumps(message, protocol=5)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> object:
    """The next message of our own child or parent process (the pickles never come from a file)."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    size = struct.unpack("<Q", head)[0]
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def work() -> None:
    """Body of a worker process: a tokenizer, then batches until the parent closes the pipe."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends the workers
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        data = _receive(requests)
        assert isinstance(data, bytes)
        tokenizer = Tokenizer.from_bytes(data)
        while True:
            texts = _receive(requests)
            assert isinstance(texts, list)
            _send(answers, encode_documents(tokenizer, texts))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nothing to flush to: the parent is gone
