"""Samples to pixels on several threads, in order, with few of them in memory at once."""

import os
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from PIL import Image

from tasks.data import image_decoding
from tasks.data.image_decoding import Decoded
from tasks.data.samples import Sample

_PART = 64  # samples that a thread takes at once
_PART_BYTES = 2**23  # of their pixels, at most
# Threads, since Pillow lets others run while it decodes; more than these only wait for the interpreter.
THREADS = min(8, os.cpu_count() or 1)


def in_order(samples: list[Sample], size: int, threads: int) -> Generator[Decoded | str, None, None]:
    """For each sample its pixels, or the reason why there are none.

    Close the iterator (contextlib.closing) if it is left early: the threads end then.
    """
    step = max(1, min(_PART, _PART_BYTES // (3 * size * size)))
    stop = Event()

    def decode(start: int) -> list[Decoded | str]:
        return [_decode(sample, size) for sample in samples[start : start + step] if not stop.is_set()]

    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[list[Decoded | str]]] = deque()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # images.decode has its own limit
        try:
            for start in range(0, len(samples), step):
                ahead.append(pool.submit(decode, start))
                if len(ahead) > 2 * threads:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _decode(sample: Sample, size: int) -> Decoded | str:
    try:
        with sample.open() as image:
            return image_decoding.decode(image, size)
    except Exception as error:  # decoders meet damaged files with errors of every kind
        return image_decoding.reason(error)
