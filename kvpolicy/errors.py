"""Every error that kvpolicy raises on purpose."""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CalibrationError",
    "CompareError",
    "KvpolicyError",
    "MissingDependencyError",
    "PluginError",
    "RecipeError",
    "TaskError",
]


class KvpolicyError(Exception):
    """Base of all errors of kvpolicy. The message says what must hold, what was found, and the remedy."""


class RecipeError(KvpolicyError):
    """A recipe, or a parameter given to one, is not valid."""

    place: tuple[str | int, ...] = ()
    """Where in the part that was checked, as a path, if the message does not say it: `("budget", 1)`."""

    def at(self, *place: str | int) -> RecipeError:
        """The same error, seen from the part that holds the one that was checked."""
        self.place = (*place, *self.place)
        return self


class PluginError(KvpolicyError):
    """A plugin can't be loaded, clashes with another, or broke its contract."""


class MissingDependencyError(PluginError):
    """A recipe or a command needs an optional library that is not installed."""


class CacheError(KvpolicyError):
    """A cache can't be built for a model, or was used in a way that it can't serve."""


class CalibrationError(KvpolicyError):
    """A calibration can't be made as asked, or its file is missing, damaged or of another model."""


class TaskError(KvpolicyError):
    """A task of the comparison is unknown, or its file is not valid."""


class PlanError(KvpolicyError):
    """A plan or a check can't be made as asked for, or of this model."""


class CompareError(KvpolicyError):
    """A comparison or a search can't be run as asked."""
