"""Train on the new rows alone: the floor that every way against forgetting must beat."""

from __future__ import annotations

from clm_app.strategies._base import Strategy


class Naive(Strategy):
    """No protection at all."""

    title = "Naive (no protection)"
    promise = "forgets, so that others can be set beside it (test_without_protection_the_first_task_is_forgotten)"
