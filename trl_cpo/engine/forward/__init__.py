"""The packed forward over preference pairs, with shared prompts. Modules, and what they import:

plan      where every token goes              (torch only)
mask      attention masks for packed rows     plan
segments  attention per part of a pair        plan, mask
device_check  an attention on its device      mask, plan, segments
varlen    one attention call a layer          device_check, segments
backends  which attention a model gets        mask, plan, segments, varlen
repack    hooks around the backbone           plan
adapter   called in place of the model        backends, mask, plan, repack, segments
probing   tests on the model itself           all of these
sharing   one forward for each model          adapter, backends, plan, probing, repack
"""

from .adapter import PackedPairForward
from .plan import NotPackable, PackingPlan, plan_pairs
from .probing.probe import Verdict, packed_forward, probe

__all__ = ["NotPackable", "PackedPairForward", "PackingPlan", "Verdict", "packed_forward", "plan_pairs", "probe"]
