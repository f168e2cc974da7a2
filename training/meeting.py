"""Let the processes of a run find each other in a part of the store that no others have used.

After a failure torchrun starts all processes again, with the store of those before (torch 2.14).
Without this, gloo and NCCL would find the former addresses there, and could not connect.
"""

import functools
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch import distributed

from errors import LostProcess

LOOK_SEC = 0.02


@functools.cache
def init_method() -> str:
    """Return what `init_process_group` needs."""
    distributed.register_rendezvous_handler("meeting", _meet)
    return "meeting://"


def _meet(_: str, timeout: timedelta, **__: Any) -> Iterator[tuple[Any, int, int]]:
    store, rank, count = next(distributed.rendezvous("env://", timeout=timeout))
    yield distributed.PrefixStore(agree(store, rank, count, timeout), store), rank, count


def agree(store: Any, rank: int, count: int, timeout: timedelta) -> str:
    """Return a name that the first process has made up now, the same in all processes.

    Each of the others asks under a name of its own, so that it can't take an old answer for a new
    one. The first answers again and again, as the question that it finds may be an old one.
    Raises: LostProcess if another one doesn't answer.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"question/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()  # waits
        store.set(f"thanks/{name}/{rank}", "")
        return name
    end = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, count))
    while missing:
        for other in missing:
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"thanks/{mine}/{other}"])}
        if missing and time.monotonic() > end:
            raise LostProcess("it did not start")
        time.sleep(LOOK_SEC)
    return mine
