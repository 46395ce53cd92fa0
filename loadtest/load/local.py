"""Sends the requests of stages, or this process's part of them, with Locust's local runner."""

from __future__ import annotations

import logging

import gevent
from gevent.event import Event
from locust.env import Environment

from loadtest import clock
from loadtest.endpoint.client import Client
from loadtest.load.counts import Counts, share
from loadtest.load.loop_lag import LoopLag
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.load.users import GenerationUser, Session
from loadtest.results.schema import Generator
from loadtest.workloads.workload import Workload


class RunUser(GenerationUser):
    """The user that ``pareto loadtest`` starts."""


class LocalLoad:
    """The load that this process makes.

    Args:
        client: connections to the endpoint.
        workload: makes the requests.
        sink: takes the records.
        counts: of the present stage.
        lag: watches the event loop.
        part: (i, n): this process is number i of n that send each stage together.

    """

    error: str | None = None

    def __init__(
        self,
        client: Client,
        workload: Workload,
        sink: Sink,
        counts: Counts,
        lag: LoopLag,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.counts = counts
        self._client, self._workload, self._sink, self._lag, self._part = client, workload, sink, lag, part
        # Locust warns about spawn rates and CPU on a log that nobody configured; the summary has better numbers.
        logging.getLogger("locust").setLevel(logging.ERROR)
        self._environment = Environment(user_classes=[RunUser], host=client.base_url)
        self._environment.create_local_runner()

    def begin_measuring(self) -> float:
        """Return the moment at which the measured phase begins: now."""
        return clock.now()

    def run(self, stage: Stage, stop: Event) -> None:
        """Start the stage's users and wait until all have ended by themselves, or until ``stop``."""
        environment, runner = self._environment, self._environment.runner
        environment.loadtest_session = Session(
            environment, self._client, self._workload, stage, self._sink, part=self._part
        )
        users = 1 if stage.spec.mode == "open" else share(stage.spec.concurrency or 1, self._part)
        if users:
            runner.start(users, spawn_rate=users)

        def await_users() -> None:
            if not users:
                # The others wait for this process, too.
                stage.begin_measuring()
                return
            runner.spawning_greenlet.join()
            runner.user_greenlets.join()

        waiting = gevent.spawn(await_users)
        gevent.wait([waiting, stop], count=1)
        # Locust takes its time over stopping, and what is read from the sockets after that would look slow: so first
        # this.
        runner.user_greenlets.kill()
        waiting.kill()
        runner.stop()
        # The next stage, and the files of the results, need the descriptors of this one's connections.
        self._client.close_idle()

    def health(self) -> Generator:
        """Stop watching the event loop and return what was found."""
        return self._lag.stop()

    def close(self) -> None:
        """Give up what Locust holds."""
        self._lag.stop()
        self._environment.runner.quit()
