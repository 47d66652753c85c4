"""Every error that Palimpsest raises on purpose.

    PalimpsestError
    ├── UsageError        (ValueError)      a key, option, name or command is wrong      exit 2
    │   └── RecipeError                     the same, in a recipe file
    ├── DataError         (ValueError)      a data set or a record is wrong              exit 3
    │   └── MissingFileError (FileNotFoundError)
    ├── ModelError        (ValueError)      a model, tokenizer or template is wrong      exit 3
    │   ├── LossError     (ArithmeticError) a loss term is NaN or infinite
    │   └── UnsupportedArchitectureError (NotImplementedError)
    ├── StoreError        (RuntimeError)    a run folder is locked, foreign or damaged   exit 3
    └── GateError         (RuntimeError)    a quality gate was not passed                exit 4

A message says what, where, which value, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PalimpsestError(Exception):
    """Base of all errors that a user can mend; the CLI prints its message without a traceback."""

    exit_code = 3


class UsageError(PalimpsestError, ValueError):
    """A key, option, name or command is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe is wrong."""


class DataError(PalimpsestError, ValueError):
    """A data set or a record is wrong."""


class MissingFileError(DataError, FileNotFoundError):
    """A file that is needed is not there."""

    def __str__(self) -> str:
        """Return the message alone (FileNotFoundError would format it as an errno)."""
        return str(self.args[0])


class ModelError(PalimpsestError, ValueError):
    """A model, tokenizer or chat template is wrong."""


class LossError(ModelError, ArithmeticError):
    """A loss term is NaN or infinite."""


class UnsupportedArchitectureError(ModelError, NotImplementedError):
    """The architecture is not known where its parts are needed."""


class StoreError(PalimpsestError, RuntimeError):
    """A run folder is locked, belongs to something else, or is damaged."""


class GateError(PalimpsestError, RuntimeError):
    """A quality gate was not passed."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, else a list of the known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
