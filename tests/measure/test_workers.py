"""Tasks in other processes: all come back, and what kills or stalls its process is lost alone."""

import os
import time

from resnet_fused.measure.workers import TaskFailure, isolated_map


def _task(what, value):
    if what == "dies":
        os._exit(7)
    if what == "hangs":
        time.sleep(600)
    if what == "raises":
        raise ValueError("no such value\nand more")
    return value, os.getpid()


def _spoilt(result):
    return result[0] < 0


def test_what_dies_hangs_raises_or_ends_its_process_takes_nothing_along():
    tasks = [("dies", 0), ("", 1), ("raises", 2), ("", -3), ("", 4), ("hangs", 5), ("", 6), ("dies", 7)]
    found = dict(isolated_map(_task, tasks, 2, limit_s=5.0, spoils=_spoilt))
    assert sorted(found) == list(range(len(tasks)))
    assert found[0] == found[7] == TaskFailure("its process ended with exit code 7")
    assert found[2] == TaskFailure("ValueError: no such value")
    assert found[5] == TaskFailure("not done after 5 s")
    assert [found[i][0] for i in (1, 3, 4, 6)] == [1, -3, 4, 6]
    assert os.getpid() not in {found[i][1] for i in (1, 3, 4, 6)}


def test_processes_are_used_again():
    found = dict(isolated_map(_task, [("", value) for value in range(5)], 1))
    assert [found[i][0] for i in range(5)] == list(range(5)) and len({pid for _, pid in found.values()}) == 1
