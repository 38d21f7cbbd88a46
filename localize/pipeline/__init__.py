"""Share a training step out to ranks, which hand detached values forward and nothing back.

``units`` -> ``costs`` -> ``partition`` -> ``texts`` -> ``rank``, which ``stream`` connects; ``together`` runs one rank
after the other in one process.
"""

from localize.pipeline.partition import partition

__all__ = ["partition"]
