"""The packed forward over preference pairs, with shared prompts. Modules, and what they import:

plan      where every token goes              (torch only)
mask      attention masks for packed rows     plan
segments  attention per part of a pair        plan, mask
repack    hooks around the backbone           plan
adapter   called in place of the model        mask, plan, repack, segments
probing   tests on the model itself           all of these
sharing   one forward for each model          adapter, plan, probing, repack, segments
"""

from .adapter import PackedPairForward
from .plan import NotPackable, PackingPlan, plan_pairs
from .probing.probe import Verdict, packed_forward, probe

__all__ = ["NotPackable", "PackedPairForward", "PackingPlan", "Verdict", "packed_forward", "plan_pairs", "probe"]
