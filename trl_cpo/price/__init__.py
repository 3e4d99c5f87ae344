"""What training did to the model: KL to the reference on the policy's own samples, repetition, text, likelihood."""

from .damage import in_words
from .divergence import answer_kl
from .document import FORMAT, Price, SetPrice
from .fields import keeps_last_within
from .meter import PriceMeter
from .of_trainer import meter_of
from .repetition import repeated
from .tracker import Limit, PriceTracker

__all__ = [
    "FORMAT",
    "Limit",
    "Price",
    "PriceMeter",
    "PriceTracker",
    "SetPrice",
    "answer_kl",
    "in_words",
    "keeps_last_within",
    "meter_of",
    "repeated",
]
