"""Processes that check and time in place of the tuner's own: they hang, crash and err on demand, and need no kernel."""

import json
import os
import random
import time
from collections import Counter

import torch

from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.choice import ATEN
from resnet_fused.measure.progress import Silent
from resnet_fused.tuning.work import Roofs

CPU, GPU, ARCH, DTYPE = torch.device("cpu"), "NVIDIA H100 80GB HBM3", 90, torch.bfloat16
CHECK_S, PREPARE_S, RACE_S = 0.05, 0.02, 0.2  # what they take of a `Clock`


class Script:
    """Answers by what the path of a file says: a line `question choice what` for each thing to happen."""

    def __init__(self, arch, log):
        self.arch, self.log = arch, log
        self.prepared = []

    def note(self, *words):
        with open(self.log, "a") as out:
            print(os.getpid(), *words, file=out, flush=True)

    def happen(self, question, choice):
        with open(self.log + ".script") as lines:
            for line in lines:
                asked, name, what = line.rstrip("\n").split("|")
                if asked == question and name in (choice, "*"):
                    self.note(question, what)
                    if what == "crash":
                        os._exit(139)
                    if what == "hang":
                        time.sleep(600)
                    return what
        return None

    def check(self, job, choice, table, first):
        self.note("check", job.problem.op, choice)
        return {job.problem.op: self.happen("check", str(choice))}

    def roofs(self, dtype):
        return Roofs(1e12, 1e14)

    def prepare(self, job, choice, table):
        self.note("prepare", choice)
        why = self.happen("prepare", str(choice))
        if why is None:
            self.prepared.append(str(choice))
        return why

    def race(self, budget_s):
        self.note("race", len(self.prepared))
        if self.prepared != ["aten"]:  # which is beyond suspicion
            self.happen("race", "*")
        times = {name: 2.0 if name == "aten" else 1.0 + i for i, name in enumerate(self.prepared)}
        self.prepared = []
        return times


def script(device, arch, rounds):
    """In place of a `LocalWorker`."""
    return Script(arch, os.environ["TUNE_DOUBLE_LOG"])


def never(*_):
    """What does not get as far as an answer."""
    os._exit(3)


class Steps(Silent):
    """A reporter that keeps how many steps it was told to expect, and how many began."""

    expected = begun = 0

    def expect(self, total):
        self.expected = total

    def start(self, text):
        self.begun += 1
        assert self.begun <= self.expected


class Clock:
    """Time passes when the bench says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Bench:
    """Answers with made-up times, the same for the same candidate."""

    def __init__(self, clock, path, wrong=(), seed=0, slow=1.0):
        self.clock, self.path, self.wrong, self.seed, self.slow = clock, path, set(wrong), seed, slow
        self.checked, self.raced, self.prepared = Counter(), [], {}

    def start(self):
        pass

    def check(self, job, choice, table, first):
        self.clock.now += CHECK_S
        self.checked[(job.problem, choice)] += 1
        if sum(self.checked.values()) % 200 == 150:  # whenever anybody looks, it is a table
            tables.from_json(json.loads(self.path.read_text()))
        if (job.problem.op, str(choice)) in self.wrong or (job.problem.op, choice.backend) in self.wrong:
            return {job.problem.op: "y errs by 1"}
        return {job.problem.op: None}

    def roofs(self, dtype):
        return Roofs(1e12, 1e14)

    def prepare(self, job, choice, table):
        self.clock.now += PREPARE_S
        self.prepared[choice] = job.problem
        return None

    def race(self, budget_s):
        self.clock.now += min(budget_s, RACE_S)
        self.raced.append((next(iter(self.prepared.values())), list(self.prepared)))
        times = {str(choice): self.time(problem, choice) for choice, problem in self.prepared.items()}
        self.prepared = {}
        return times

    def time(self, problem, choice):
        chance = random.Random(f"{self.seed} {problem} {choice}")
        return (0.5 + chance.random()) * (1.0 if choice == ATEN else self.slow)

    def close(self):
        pass
