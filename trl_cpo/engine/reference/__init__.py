"""Tables of log-probabilities: keyed by all that changes them, written in shards, continued and reused."""

from .filling import BadScores
from .source import ReferenceSource
from .store import ScoreTable
from .tables import ReferenceTables, table_of

__all__ = ["BadScores", "ReferenceSource", "ReferenceTables", "ScoreTable", "table_of"]
