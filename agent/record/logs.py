"""A run's log: excerpt in the line, rest as blob."""

from sandbox.contract.run import Log

EXCERPT_HEAD_BYTES = 1024
EXCERPT_TAIL_BYTES = 3 * 1024


def excerpt(log: Log) -> Log:
    """The first and the last of a log, what lies between them counted."""
    head, tail = _bytes(log.head), _bytes(log.tail)
    if not log.omitted_bytes:
        head, tail = (head + tail)[:EXCERPT_HEAD_BYTES], (head + tail)[EXCERPT_HEAD_BYTES:]
    first = _text(head[:EXCERPT_HEAD_BYTES])
    last = _text(tail[-EXCERPT_TAIL_BYTES:])
    total_bytes = len(_bytes(log.head)) + len(_bytes(log.tail)) + log.omitted_bytes
    omitted_bytes = total_bytes - len(_bytes(first)) - len(_bytes(last))
    return Log(head=first, tail=last, omitted_bytes=omitted_bytes)


def packed_log(log: Log) -> bytes:
    """A log as its blob: one JSON object with head, tail and omitted_bytes."""
    return log.model_dump_json().encode()


def unpacked_log(stored: bytes) -> Log:
    """The log that `packed_log` stored.

    Raises:
        ValueError: the bytes are no log.
    """
    return Log.model_validate_json(stored)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _text(piece: bytes) -> str:
    """A cut may split a character; its rest is dropped and counted."""
    return piece.decode("utf-8", "ignore")
