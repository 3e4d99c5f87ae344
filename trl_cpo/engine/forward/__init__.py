"""The packed, prefix-shared forward over preference pairs.

plan      where every token goes          (torch only)
mask      what a packed token sees        plan
segments  attention by parts of a pair    plan, mask
repack    the backbone's door             plan
adapter   called in place of the model    mask, plan, repack, segments
probing   what the model itself shows     all of these
sharing   one forward for each model      adapter, plan, probing, repack, segments
"""

from .adapter import PackedPairForward
from .plan import NotPackable, PackingPlan, plan_pairs
from .probing.probe import Verdict, packed_forward, probe

__all__ = ["NotPackable", "PackedPairForward", "PackingPlan", "Verdict", "packed_forward", "plan_pairs", "probe"]
