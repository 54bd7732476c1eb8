"""A worker that is killed by what it decodes. A module of its own, for the actor's process imports it."""

from __future__ import annotations

import os

from harp_batch.cluster.actor import Worker
from harp_batch.cluster.dispatcher import Lease

DEADLY = 3  # document


class Mortal(Worker):
    """Dies as soon as it is given the deadly document."""

    def assign(self, lease: Lease) -> None:
        if any(request.doc_id == DEADLY for request in lease.requests):
            os._exit(1)
        super().assign(lease)
