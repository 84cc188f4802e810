"""Runs the cases of a test a few at a time, before each of them reads its own result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

Outcome = TypeVar("Outcome")
Cases = dict[str, dict[str, Any]]


def asked_for(session: pytest.Session, test: Callable[..., object]) -> Cases:
    """Return the parameters of a test's cases that this session runs, by the case's id."""
    return {
        item.callspec.id: dict(item.callspec.params)
        for item in session.items
        if getattr(item, "function", None) is test and hasattr(item, "callspec")
    }


@contextmanager
def run_together(
    cases: Cases, run: Callable[[dict[str, Any]], Outcome], at_once: int
) -> Iterator[dict[str, Future[Outcome]]]:
    """Give what each case comes to, as it comes; in the order of the cases.

    Whoever gives up after one failure (`-x`) waits only for what has begun.
    """
    with ThreadPoolExecutor(at_once) as pool:
        yield {case: pool.submit(run, parameters) for case, parameters in cases.items()}
        pool.shutdown(cancel_futures=True)
