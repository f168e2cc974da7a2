"""Processes that torchrun starts again find each other, not those of the start before."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from errors import LostProcess
from training.meeting import agree

PATIENCE = timedelta(seconds=10)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_agrees_on_a_name_of_its_own(order):
    store, names = HashStore(), set[str]()
    for _ in range(3):  # with what the starts before have left in the store
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(agree, store, rank, 3, PATIENCE) for rank in order]
            (name,) = {job.result() for job in jobs}
        assert name not in names
        names.add(name)


def test_the_question_of_a_process_that_is_gone_does_not_count():
    store = HashStore()
    store.set("question/1", "old")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agree, store, 0, 2, PATIENCE)
        while not store.check(["answer/old"]):
            assert not first.done()
        second = pool.submit(agree, store, 1, 2, PATIENCE)
        assert first.result() == second.result()


def test_a_process_that_does_not_start_is_not_waited_for_for_ever():
    with pytest.raises(LostProcess):
        agree(HashStore(), 0, 2, timedelta(0))
