"""Tables of log-probabilities: keyed by all that changes them, written in shards, continued and reused."""

from .reference import ReferenceTables, table_of
from .scoring import BadScores
from .store import ScoreTable

__all__ = ["BadScores", "ReferenceTables", "ScoreTable", "table_of"]
