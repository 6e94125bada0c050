"""Decodes samples on several threads, in order, with few images in memory at once."""

import os
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from PIL import Image

from tasks.data import image_decoding
from tasks.data.image_decoding import Decoded, Fit
from tasks.data.samples import Sample

_CHUNK = 64  # samples per unit of work
_CHUNK_BYTES = 2**23  # of their pixels, at most
# Threads suffice, since Pillow releases the interpreter lock while it decodes; more of them only wait for the lock.
THREADS = min(8, os.cpu_count() or 1)


def decode_in_order(
    samples: list[Sample], size: int, threads: int, fit: Fit = "stretch"
) -> Generator[Decoded | str, None, None]:
    """For each sample, the decoded image, or the reason why it could not be decoded.

    Close the generator (contextlib.closing) when stopping early, so that the threads end.
    """
    step = max(1, min(_CHUNK, _CHUNK_BYTES // (3 * size * size)))
    stop = Event()

    def decode(start: int) -> list[Decoded | str]:
        return [_decode(sample, size, fit) for sample in samples[start : start + step] if not stop.is_set()]

    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[list[Decoded | str]]] = deque()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # image_decoding.decode has its own limit
        try:
            for start in range(0, len(samples), step):
                pending.append(pool.submit(decode, start))
                if len(pending) > 2 * threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _decode(sample: Sample, size: int, fit: Fit) -> Decoded | str:
    try:
        with sample.open() as image:
            return image_decoding.decode(image, size, fit)
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        return image_decoding.reason(error)
