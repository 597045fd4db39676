"""A request's id that takes the request's lent timeline along, through any queue that pickles."""

from __future__ import annotations

from stagescope.middleware.carrier import lend
from stagescope.middleware.names import CODES
from stagescope.middleware.timeline import current


class CarriedId(str):
    """The id itself, to everyone who does not ask for its *carrier*."""

    carrier: str | None = None


def carried(request_id: str) -> str:
    """Give *request_id* with the present request's timeline, which from now on waits in a queue.

    Outside a request it is given back as it is.
    """
    carrier = lend()
    timeline = current.get()
    if carrier is None or timeline is None or not timeline.lent:
        return request_id
    # The worker's first entry takes this one's place; until then, also if the worker never
    # comes, the request is seen to wait.
    slot = timeline.lent[-1]
    slot.codes[0] = CODES["queue.batch"]
    slot.times[0] = timeline.clock()
    identity = CarriedId(request_id)
    identity.carrier = carrier
    return identity
