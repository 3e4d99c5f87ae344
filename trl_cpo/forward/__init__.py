"""The packed, prefix-shared forward over preference pairs.

plan      where every token goes          (torch only)
mask      what a packed token sees        plan
segments  attention by parts of a pair    plan, mask
repack    the backbone's door             plan
adapter   called in place of the model    mask, plan, repack, segments
fitness   what can be told unrun          mask, plan, repack, segments
made_up   pairs of tokens to try          repack
rounding  what rounding alone does        repack
judging   packed set beside padded
probing   what the model itself shows     adapter, fitness, judging, made_up, plan, repack, rounding
"""

from .adapter import PackedPairForward
from .plan import NotPackable, PackingPlan, plan_pairs
from .probing import Verdict, packed_forward, probe

__all__ = ["NotPackable", "PackedPairForward", "PackingPlan", "Verdict", "packed_forward", "plan_pairs", "probe"]
