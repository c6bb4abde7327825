"""The two kinds of failure that a user meets.

``UserError`` is a mistake that the user can mend: the command line prints its one line and exits with code 2.
Everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one line: what was given, what was expected, what to do."""


class PlanError(UserError):
    """A plan that does not follow the schema, or that belongs to another model."""


class CheckpointError(UserError):
    """A model folder or weight file that is missing, truncated, foreign or inconsistent."""


class RankDied(RuntimeError):
    """A launched rank ended before its work was done. The message names the rank."""
